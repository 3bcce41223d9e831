"""A run saves its model once before the first step: what cannot be saved is found there, not after the last step."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from dct_qwen2vl.training.config import ModelInfo, RunError, TrainingConfig
from dct_qwen2vl.training.final_model import trained_folder, write_stock_form
from dct_qwen2vl.training.processes import raise_in_all

MOST_TOLD = 400  # characters of a library's error
REHEARSAL = ".rehearsal"  # in the run folder while it lasts


class RehearseSave(Callback):
    """Saves the model before the first step as the end of the run will, without most weights, and removes it again.

    save: writes a Hugging Face directory with the patch embedding as its only weight.
    """

    def __init__(self, config: TrainingConfig, info: ModelInfo, save: Callable[[Path], None]) -> None:
        self.config = config
        self.info = info
        self.save = save

    def on_fit_start(self, trainer, pl_module) -> None:
        """Collective. Raises RunError, in every process."""
        raise_in_all(self._rehearse() if trainer.is_global_zero else None)

    def _rehearse(self) -> RunError | None:
        try:
            with rehearsal_folder(self.config) as folder:
                self.save(trained_folder(folder, self.info))
                write_stock_form(self.info, folder, complete=False)
        except RunError as error:
            return error
        return None


@contextmanager
def rehearsal_folder(config: TrainingConfig) -> Iterator[Path]:
    """A folder in the run folder, which is there inside the block only. Any error becomes a RunError of one line."""
    folder = config.run_dir / REHEARSAL
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except Exception as error:
        told = " ".join(str(error).replace(f"{folder}/", "").split())
        raise RunError(
            f"{config.model_dir} loads, but what is trained from it cannot be saved ({told[:MOST_TOLD]}): "
            "correct that there; no step was made"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
