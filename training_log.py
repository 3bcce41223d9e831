"""What a run writes while it goes: a progress line, metrics.jsonl, TensorBoard (and W&B), the same for every engine.

metrics.jsonl has one JSON object for every optimizer step ({"step", "loss", "learning_rate", ...}) and one for every
validation ({"step", "val_loss"}). A resumed run drops the lines past its checkpoint and goes on.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from flops import device_peak, training_flops
from run_lock import RunFolderError
from task_encoder import IGNORE_INDEX, QwenBatch

SUMMED = (
    "loss",
    "loss_weight",
    "flops",
    "samples",
    "visual_tokens",
    "text_tokens",
    "learned_tokens",
    "padding",
    "positions",
    "rows",
    "row_fill",
)


class NonFiniteLoss(ValueError):
    """The loss is NaN or infinite. The message names the samples."""


class OutOfMemory(ValueError):
    """The device's memory is full. The message names the micro-batch and what to lower."""


def check_finite(loss: float, step: int, keys: list[str]) -> None:
    """Raises NonFiniteLoss naming the samples of the micro-batch."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss is {loss} at step {step}; samples of the batch: {', '.join(keys)}. Lower --lr, or look at these "
            f"samples"
        )


def count_tokens(batch: QwenBatch, merge_size: int) -> dict[str, float]:
    """What is in a micro-batch, by the names of `SUMMED`."""
    grids = torch.cat([batch.image_grid_thw, batch.video_grid_thw])
    visual = int(grids.prod(dim=1).sum()) // merge_size**2
    present = int(batch.attention_mask.sum())
    return {
        "samples": len(batch.keys),
        "visual_tokens": visual,
        "text_tokens": present - visual,
        "learned_tokens": int((batch.labels != IGNORE_INDEX).sum()),
        "padding": batch.attention_mask.numel() - present,
        "positions": batch.attention_mask.numel(),
    }


class MetricsFile:
    """Appends JSON lines; keeps what is older than the step that a run starts from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start_from(self, step: int) -> None:
        """Drops lines of later steps, and one that a killed run left half-written."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, [] where there is none. Raises RunFolderError for one that is broken."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise RunFolderError(f"{path} is broken in line {number}: take that line out, or move the file away")
        lines.append(line)
    return lines


class TrainingLog(pl.Callback):
    """Sums every micro-batch over an optimizer step and over the processes; process 0 writes.

    max_steps: of the whole run. log_interval: steps between progress lines. merge_size: of the vision tower.
    """

    def __init__(self, run_dir: Path, max_steps: int, log_interval: int, merge_size: int) -> None:
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.merge_size = merge_size
        self.peak_flops = device_peak()
        self._sums = dict.fromkeys(SUMMED, 0.0)
        self._skipped: dict[int, dict[str, int]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.metrics.start_from(trainer.global_step)
        self._start_step = trainer.global_step
        self._start_time = self._step_time = time.perf_counter()
        self._waited = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: QwenBatch, batch_index: int) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning hands it on divided
        check_finite(loss, trainer.global_step, batch.keys)
        grids = torch.cat([batch.image_grid_thw, batch.video_grid_thw])
        flops = training_flops(pl_module.model.config, grids, batch.attention_mask.sum(dim=1))
        self.add(loss=loss, loss_weight=1, flops=flops, **count_tokens(batch, self.merge_size))
        self._skipped[batch.worker] = batch.skipped
        if (batch_index + 1) % trainer.accumulate_grad_batches == 0:
            self._end_step(trainer, pl_module)

    def add(self, **values: float) -> None:
        """Adds to the sums of this optimizer step, by the names of `SUMMED`."""
        for name, value in values.items():
            self._sums[name] += value

    def _end_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter()
        waited = trainer.datamodule.train_loader.wait_seconds
        seconds, wait = now - self._step_time, waited - self._waited
        self._step_time, self._waited = now, waited
        sums = self._over_processes(trainer, {**self._sums, "wait": wait})
        self._sums = dict.fromkeys(SUMMED, 0.0)
        skipped = sum(sum(counts.values()) for counts in self._skipped.values())
        line = {
            "step": trainer.global_step,
            "loss": sums["loss"] / sums["loss_weight"],
            "learning_rate": pl_module.last_learning_rate,
            "gradient_norm": float(pl_module.gradient_norm),
            "samples": int(sums["samples"]),
            "visual_tokens": int(sums["visual_tokens"]),
            "text_tokens": int(sums["text_tokens"]),
            "padding_share": sums["padding"] / max(1, sums["positions"]),
            "skipped_samples": skipped,
            "seconds": seconds,
            "data_wait_share": min(1.0, sums["wait"] / trainer.world_size / seconds),
            "tflops": sums["flops"] / seconds / 1e12,
        }
        if sums["rows"]:
            line["row_fill"] = sums["row_fill"] / sums["rows"]
        if self.peak_flops:
            line["mfu"] = sums["flops"] / seconds / (self.peak_flops * trainer.world_size)
        if torch.cuda.is_available():
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        pl_module.log_dict(
            {f"train/{name}": float(value) for name, value in line.items() if name != "step"}, rank_zero_only=True
        )
        if trainer.is_global_zero:
            self.metrics.append(line)
            if trainer.global_step % self.log_interval == 0 or trainer.global_step in (1, self.max_steps):
                print(self._progress(line), flush=True)

    @staticmethod
    def _over_processes(trainer: pl.Trainer, values: dict[str, float]) -> dict[str, float]:
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def _progress(self, line: dict[str, Any]) -> str:
        done = line["step"] - self._start_step
        left = (self.max_steps - line["step"]) * (time.perf_counter() - self._start_time) / max(1, done)
        seconds = line["seconds"]
        parts = [
            f"step {line['step']}/{self.max_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.2e}",
            f"grad norm {line['gradient_norm']:.2f}",
            f"{line['samples'] / seconds:.1f} samples/s",
            f"{line['visual_tokens'] / seconds:.0f} visual + {line['text_tokens'] / seconds:.0f} text tokens/s",
            f"rows {line['row_fill']:.0%} full" if "row_fill" in line else f"padding {line['padding_share']:.0%}",
            f"data wait {line['data_wait_share']:.0%}",
            *([f"MFU {line['mfu']:.1%}"] if "mfu" in line else []),
            *([f"{line['peak_memory_gib']:.1f} GiB"] if "peak_memory_gib" in line else []),
            f"skipped {line['skipped_samples']}",
            f"ETA {int(left // 60)}:{int(left % 60):02d}",
        ]
        return " | ".join(parts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._step_time = time.perf_counter()  # validation is not part of a step's time
        if trainer.is_global_zero:
            self.metrics.append({"step": trainer.global_step, "val_loss": pl_module.validation_loss})
            print(
                f"step {trainer.global_step}/{self.max_steps} | validation loss {pl_module.validation_loss:.4f}",
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for worker, counts in sorted(self._skipped.items()):
            if counts:
                reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                print(f"process {trainer.global_rank}, worker {worker}: skipped {reasons}", flush=True)
