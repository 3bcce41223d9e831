"""What a run keeps in its folder, the same for both engines: checkpoints by step, loggers, Hugging Face directories."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from nemo import lightning as nl

from dct_qwen2vl.common.files import unnamed
from dct_qwen2vl.training.config import TrainingConfig
from dct_qwen2vl.training.run_file import latest_checkpoint
from dct_qwen2vl.training.run_lock import RunFolderError


class StepCheckpoint(ModelCheckpoint):
    """Saves every `interval` optimizer steps and at the end.

    folder: Gets the checkpoints.
    interval: Optimizer steps between them.
    keep: How many of the newest are kept.
    saved: Called after each.
    """

    FILE_EXTENSION = ""

    def __init__(self, folder: Path, interval: int, keep: int, saved: Callable[[], None]) -> None:
        self.saved = saved
        super().__init__(
            dirpath=folder,
            filename="step{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=interval,
        )

    def _monitor_candidates(self, trainer) -> dict:
        """NeMo's Megatron strategy logs a "step" of its own, which is one behind."""
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def on_train_start(self, trainer, pl_module) -> None:
        """Lightning would save the step that a run goes on from once more, after the first of its micro-batches."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def _should_remove_checkpoint(self, trainer, previous: str, current: str) -> bool:
        """Lightning keeps the one that a run was resumed from for ever; a few restarts would fill the disk."""
        return previous != current

    def _remove_checkpoint(self, trainer, filepath: str) -> None:
        """It loses its name first, so that --export never reads half of one."""
        path = Path(filepath)
        nameless = unnamed(path)
        if trainer.is_global_zero and path.exists():
            shutil.rmtree(nameless, ignore_errors=True)
            path.replace(nameless)
            shutil.rmtree(nameless, ignore_errors=True)

    def _save_checkpoint(self, trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved()

    def on_train_end(self, trainer, pl_module) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def step_checkpoints(config: TrainingConfig, saved: Callable[[], None]) -> list[StepCheckpoint]:
    """The callback that saves checkpoints, in a list. An empty list where --save-interval is 0.

    config: The settings.
    saved: Called after each checkpoint.
    """
    if not config.save_interval:
        return []
    return [StepCheckpoint(config.run_dir / "checkpoints", config.save_interval, config.keep, saved)]


class ResumeFrom(nl.AutoResume):
    """NeMo's tells the callback that saves where the run goes on from; with --save-interval 0 there is none to tell."""

    def setup(self, trainer, model=None) -> None:
        if trainer.checkpoint_callback is None:
            trainer.ckpt_path = self.get_trainer_ckpt_path(model)
        else:
            super().setup(trainer, model)


def resume(config: TrainingConfig) -> ResumeFrom | None:
    """From the newest checkpoint of the run, where there is one. Collective. Raises RunFolderError."""
    checkpoint = latest_checkpoint(config.run_dir / "checkpoints")
    if config.world_size > 1 and torch.distributed.is_torchelastic_launched():
        store, rank, processes = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore("newest_checkpoint", store)
        checkpoint = agree_on_checkpoint(config.run_dir / "checkpoints", store, rank, processes)
    if checkpoint is None:
        return None
    if config.rank == 0:
        print(f"Resuming from {checkpoint}", flush=True)
    return ResumeFrom(resume_from_path=str(checkpoint))


def agree_on_checkpoint(folder: Path, store: torch.distributed.Store, rank: int, processes: int) -> Path | None:
    """The newest checkpoint that the first process sees. It decides for all, since processes that begin at different
    steps wait for each other for ever; so do those left over by one that ends, so all raise RunFolderError where one
    does not see it."""
    if rank == 0:
        newest = latest_checkpoint(folder)
        store.set("name", newest.name if newest else "")
    name = store.get("name").decode()
    store.set(f"blind{rank}", "" if not name or (folder / name).exists() else socket.gethostname())
    if rank == 0:
        store.set("blind", next(filter(None, (store.get(f"blind{each}") for each in range(processes))), b""))
    blind = store.get("blind").decode()
    if blind:
        raise RunFolderError(
            f"{blind} does not see {folder / name}: OUTPUT_DIR must be one folder that all nodes share"
        )
    return folder / name if name else None


def trainer_options(config: TrainingConfig, validates: bool = True) -> dict[str, Any]:
    """Options of NeMo's Trainer: how long it runs. This repository's own callbacks show progress and save.

    config: The settings.
    validates: Whether there is a val split.
    """
    return {
        "devices": config.devices,
        "num_nodes": config.num_nodes,
        "max_steps": config.max_steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        **({} if validates else {"limit_val_batches": 0}),
        "enable_checkpointing": bool(config.save_interval),
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": False,
    }


def sync_files(folder: Path) -> None:
    """Data reaches the disk before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def count_batches_of_whole_steps(checkpoint: dict, accumulate: int) -> None:
    """Corrects the batches that Lightning has counted in a loaded checkpoint, in place.

    checkpoint: Lightning's.
    accumulate: Micro-batches of one process in one optimizer step of this run.

    From these counts, Lightning tells where accumulation begins, when to validate and when to end. They become those of
    the checkpoint's steps at `accumulate` batches each: before --restart-data they may have been others. The saved
    count is also one short: Lightning saves inside on_train_batch_end, before it counts that batch as completed, and a
    resumed run starts from the completed ones.
    """
    batches = checkpoint["global_step"] * accumulate
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts.update(dict.fromkeys(counts, batches))


def build_loggers(config: TrainingConfig) -> nl.NeMoLogger:
    """TensorBoard, and Weights & Biases if a project is named."""
    wandb = None
    if config.wandb_project:
        wandb = WandbLogger(project=config.wandb_project, name=config.experiment_name, save_dir=config.run_dir)
    return nl.NeMoLogger(
        name=config.experiment_name,
        explicit_log_dir=str(config.run_dir / "logs"),
        update_logger_directory=False,
        tensorboard=TensorBoardLogger(save_dir=config.run_dir, name="tensorboard", version=""),
        wandb=wandb,
    )
