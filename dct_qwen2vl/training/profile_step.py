"""A trace of one optimizer step, for chrome://tracing, Perfetto or TensorBoard's profiler.

And, on a GPU, where the next step makes the host wait for it.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from dct_qwen2vl.training.host_waits import describe, host_waits


class ProfileStep(Callback):
    """Writes `folder`/rank0.json.gz, one for each process, of everything from the end of step `step` - 1 to the end of
    step `step`: loading, forward and backward passes of all micro-batches, optimizer. On a GPU rank0.waits.txt has the
    places where the host waits for it, from the end of that step to the end of the next."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder
        self._profile: profile | None = None
        self._recording = ExitStack()
        self._waits = None

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
            self._profile = None
            if torch.cuda.is_available():
                self._waits = self._recording.enter_context(host_waits())
        elif self._waits is not None and trainer.global_step == self.step + 1:
            self._recording.close()
            file = self.folder / f"rank{trainer.global_rank}.waits.txt"
            file.write_text(describe(self._waits, f"step {trainer.global_step}") + "\n", encoding="utf-8")
            self._waits = None

    def teardown(self, trainer, pl_module, stage: str) -> None:
        """A run may end within the step."""
        self._recording.close()
