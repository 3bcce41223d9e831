"""A trace of one optimizer step, for chrome://tracing, Perfetto or TensorBoard's profiler."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile


class ProfileStep(Callback):
    """Writes `folder`/rank0.json.gz, one for each process, of everything from the end of step `step` - 1 to the end of
    step `step`: loading, forward and backward passes of all micro-batches, optimizer."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder
        self._profile: profile | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_index: int) -> None:
        if self._profile is None and trainer.global_step == self.step - 1:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_index: int) -> None:
        if self._profile is not None and trainer.global_step == self.step:
            self._profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.folder / f"rank{trainer.global_rank}.json.gz"))
            self._profile, self.step = None, -1
