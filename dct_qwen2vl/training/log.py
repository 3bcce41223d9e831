"""What a run writes while it goes: a progress line, metrics.jsonl, TensorBoard (and W&B), the same for every engine.

metrics.jsonl has one JSON object for every optimizer step ({"step", "loss", "learning_rate", ...}) and one for every
validation ({"step", "val_loss", "val_samples", "val_left_out"}). A resumed run drops the lines past its checkpoint and
goes on.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.media import TOO_LONG
from dct_qwen2vl.data.samples import IGNORE_INDEX, QwenBatch
from dct_qwen2vl.training.flops import device_peak, training_flops
from dct_qwen2vl.training.metrics_file import MetricsFile, read_metrics

NON_FINITE = "non_finite_step.json"  # in the run folder: the samples of a step that was refused
MOST_WAIT = 0.1  # share of the time of WATCHED_STEPS that may go to waiting for data without a note
WATCHED_STEPS = 50
SUMMED = (
    "loss",
    "loss_weight",
    "flops",
    "samples",
    "visual_tokens",
    "cells",
    "text_tokens",
    "learned_tokens",
    "padding",
    "positions",
    "sequences",
    "sequence_fill",
)


class NonFiniteStep(UserError):
    """A loss or the gradient is NaN or infinite. The message names the samples of the step.

    told: the first process has shown the message already.
    """

    told = False


class OutOfMemory(UserError):
    """The device's memory is full. The message names the micro-batch and what to lower."""


class StepGuard:
    """Stops a run before the weights change where a loss or the gradient is NaN or infinite.

    file: gets the samples of such a step, as JSON. The message names the first NAMED of them.
    """

    NAMED = 10

    def __init__(self, file: Path) -> None:
        self.file = file

    def check(self, step: int, gradient_norm: float, micro_batches: Sequence[tuple[float, list[str]]]) -> None:
        """Raises NonFiniteStep. It names the samples of micro-batches with such a loss, or else all of the step.

        step: counted from 1.
        gradient_norm: over all processes. Where it is not finite, the call is collective.
        micro_batches: loss and keys of each of this process.
        """
        bad = [(loss, keys) for loss, keys in micro_batches if not math.isfinite(loss)]
        if math.isfinite(gradient_norm):
            for loss, keys in bad:
                self._write(step, "loss", loss, keys)
                raise self._error(step, "loss", loss, keys)
            return
        gathered = gather((bad, [key for _, keys in micro_batches for key in keys]))
        bad = [entry for its_bad, _ in gathered for entry in its_bad]
        what, value = ("loss", bad[0][0]) if bad else ("gradient norm", gradient_norm)
        named = [keys for _, keys in bad] or [keys for _, keys in gathered]
        keys = list(dict.fromkeys(key for keys in named for key in keys))  # tensor-parallel processes share samples
        error = self._error(step, what, value, keys)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first:
            self._write(step, what, value, keys)
        if torch.distributed.is_initialized():
            error.told = True
            if first:
                print(f"finetune_qwen2vl.py: {error}", file=sys.stderr, flush=True)
            torch.distributed.barrier()  # the launcher ends all processes as soon as one has ended
        raise error

    def _write(self, step: int, what: str, value: float, keys: list[str]) -> None:
        self.file.write_text(json.dumps({"step": step, what: str(value), "samples": keys}, indent=2) + "\n")

    def _error(self, step: int, what: str, value: float, keys: list[str]) -> NonFiniteStep:
        named = ", ".join(keys[: self.NAMED])
        more = f", ... ({len(keys)} in all, listed in {self.file})" if len(keys) > self.NAMED else ""
        otherwise = "lower --lr and take another --experiment-name"
        if step == 1:  # no rate was applied yet
            otherwise = "at the weights in --model-dir, which no step has changed: are they numbers?"
        return NonFiniteStep(
            f"the {what} is {value} at step {step}, which has changed no weight; its samples: {named}{more}. Look at "
            f"them, or {otherwise}"
        )


def gather(value: Any) -> list[Any]:
    """A picklable value of each process, in their order. Collective."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def count_cells(grids: torch.Tensor, merge_size: int) -> int:
    """Merge cells of whole media: their visual tokens without skipping.

    grids: int64 [M, 3]. (t, h, w) of the media.
    merge_size: Of the vision tower.
    """
    return int(grids.prod(dim=1).sum()) // merge_size**2


def count_tokens(batch: QwenBatch, merge_size: int) -> dict[str, float]:
    """What is in a micro-batch, by the names of `SUMMED`."""
    visual = int(batch.step_grids(merge_size).prod(dim=1).sum()) // merge_size**2
    present = int(batch.attention_mask.sum())
    return {
        "samples": len(batch.keys),
        "visual_tokens": visual,
        "cells": count_cells(torch.cat([batch.image_grid_thw, batch.video_grid_thw]), merge_size),
        "text_tokens": present - visual,
        "learned_tokens": int((batch.labels != IGNORE_INDEX).sum()),
        "padding": batch.attention_mask.numel() - present,
        "positions": batch.attention_mask.numel(),
    }


def validate(trainer: pl.Trainer) -> None:
    """A validation before the next step, as Lightning's training loop makes one after a step."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


class TrainingLog(pl.Callback):
    """Sums every micro-batch over an optimizer step and over the processes. Process 0 writes.

    run_dir: The run's folder.
    max_steps: Optimizer steps of the whole run.
    log_interval: Steps between progress lines.
    merge_size: Of the vision tower.
    skips: Whether some cells of media have no token. The log then has the share of cells that have one.
    """

    def __init__(self, run_dir: Path, max_steps: int, log_interval: int, merge_size: int, skips: bool = False) -> None:
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.merge_size = merge_size
        self.skips = skips
        self.peak_flops = device_peak()
        self._sums = dict.fromkeys(SUMMED, 0.0)
        self._skipped: Counter[str] = Counter()  # by this process; the first one's begin with those of earlier starts
        self._noted = False  # that samples are too long
        self._watched: list[tuple[float, float]] = []  # seconds, and seconds of waiting, of each step of a block
        self._waits = 0  # blocks of watched steps, one after the other, that waited too long

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the log at the step from which the run starts, and makes up for a missed validation."""
        if trainer.is_global_zero:
            self.metrics.start_from(trainer.global_step)
        self._start_step = trainer.global_step
        if trainer.strategy.broadcast(self._misses_validation(trainer)):
            validate(trainer)
        self._start_time = time.perf_counter()
        self._waited = 0.0
        self.restart_clock()

    def _misses_validation(self, trainer: pl.Trainer) -> bool:
        """Whether the run was ended between the checkpoint it goes on from and the validation of the same step."""
        if not trainer.enable_validation:
            return False
        step, interval = trainer.global_step, trainer.val_check_interval // trainer.accumulate_grad_batches
        done = any(line["step"] == step and "val_loss" in line for line in read_metrics(self.metrics.path))
        return step > 0 and step % interval == 0 and not done

    def restart_clock(self) -> None:
        """What came before (a validation, the writing of a checkpoint) is not part of the next step's time."""
        self._step_time = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Samples skipped so far, by reason. Collective, and of all processes."""
        return {"skipped": dict(self._skipped_by_all())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count of skipped samples in the first process."""
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._skipped = Counter(state_dict["skipped"] if first else {})

    def _skipped_by_all(self) -> Counter[str]:
        return sum(gather(self._skipped), Counter())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: QwenBatch, batch_index: int) -> None:
        batch = batch.host()
        grids, counts = batch.step_grids(self.merge_size), count_tokens(batch, self.merge_size)
        lengths = batch.attention_mask.sum(dim=1)
        flops = training_flops(pl_module.model.config, grids, lengths, counts["learned_tokens"])
        self.add(flops=flops, **counts)
        self._skipped.update(batch.skipped)
        if (batch_index + 1) % trainer.accumulate_grad_batches == 0:
            for loss, learned in pl_module.losses:  # on the host since the end of the step
                self.add(loss=loss, loss_weight=learned)
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
        skipped = {"skipped": self._skipped.total(), TOO_LONG: self._skipped[TOO_LONG]}
        sums = self._over_processes(trainer, {**self._sums, "wait": wait, **skipped})
        self._sums = dict.fromkeys(SUMMED, 0.0)
        line = {
            "step": trainer.global_step,
            "loss": sums["loss"] / max(1, sums["loss_weight"]),
            "learning_rate": pl_module.last_learning_rate,
            "gradient_norm": pl_module.gradient_norm,
            "samples": int(sums["samples"]),
            "visual_tokens": int(sums["visual_tokens"]),
            "text_tokens": int(sums["text_tokens"]),
            "padding_share": sums["padding"] / max(1, sums["positions"]),
            "skipped_samples": int(sums["skipped"]),
            "seconds": seconds,
            "data_wait_share": min(1.0, sums["wait"] / trainer.world_size / seconds),
            "tflops": sums["flops"] / seconds / 1e12,
        }
        if self.skips and sums["cells"]:
            line["kept_share"] = sums["visual_tokens"] / sums["cells"]
        if sums["sequences"]:
            line["sequence_fill"] = sums["sequence_fill"] / sums["sequences"]
        if self.peak_flops:
            line["mfu"] = sums["flops"] / seconds / (self.peak_flops * trainer.world_size)
        if torch.cuda.is_available():
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if trainer.is_global_zero:
            self._give_to_loggers(trainer, line)
            self.metrics.append(line)
            if trainer.global_step % self.log_interval == 0 or trainer.global_step in (1, self.max_steps):
                print(self._progress(line), flush=True)
            self._note_long_samples(int(sums[TOO_LONG]))
            if trainer.global_step > self._start_step + 1:  # the first step waits until a loader process has begun
                self._note_waiting(line["seconds"], line["data_wait_share"])

    def _note_long_samples(self, count: int) -> None:
        """Once: whole kinds of media can be too long, such as all HD videos."""
        if count and not self._noted:
            self._noted = True
            advice = "raise SEQ_LENGTH, or make media smaller (MAXPIXELS, --video-total-pixels)"
            print(
                f"Note: {count} samples so far have more tokens than --seq-length and are left out: {advice}",
                flush=True,
            )

    def _note_waiting(self, seconds: float, share: float) -> None:
        """Once: two blocks of steps, one after the other, have waited. At first the loader has read ahead, and one file
        may have been slow.

        seconds: Of a step.
        share: Of them that processes have waited for data, in the mean.
        """
        if self._waits == 2:  # said
            return
        self._watched.append((seconds, seconds * share))
        if len(self._watched) < WATCHED_STEPS:
            return
        block = sum(waited for _, waited in self._watched) / sum(seconds for seconds, _ in self._watched)
        self._watched.clear()
        self._waits = self._waits + 1 if block > MOST_WAIT else 0
        if self._waits == 2:
            print(
                f"Note: training waited for data for {block:.0%} of the last {WATCHED_STEPS} steps' time. More loader "
                'processes may help: NUM_WORKERS, see "Loader processes" in docs/training.md',
                flush=True,
            )

    @staticmethod
    def _give_to_loggers(trainer: pl.Trainer, line: dict[str, Any]) -> None:
        """Under the names and numbers that `log_dict` would give them, which takes a twentieth of a small step."""
        values = {f"train/{name}": float(value) for name, value in line.items() if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        """Made on first use, when the process has its device."""
        return torch.cuda.Stream() if torch.cuda.is_available() else None

    def _over_processes(self, trainer: pl.Trainer, values: dict[str, float]) -> dict[str, float]:
        """Sums. In a stream of their own: the device may still be busy with the optimizer's step."""
        if trainer.world_size == 1:
            return values
        with torch.cuda.stream(self._stream):
            total = torch.tensor(list(values.values()), dtype=torch.float64, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(total)
            return dict(zip(values, total.tolist()))

    def _progress(self, line: dict[str, Any]) -> str:
        done = line["step"] - self._start_step
        left = (self.max_steps - line["step"]) * (time.perf_counter() - self._start_time) / max(1, done)
        seconds = line["seconds"]
        filled = f"padding {line['padding_share']:.0%}"
        if "sequence_fill" in line:
            filled = f"sequences {line['sequence_fill']:.0%} full"
        parts = [
            f"step {line['step']}/{self.max_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.2e}",
            f"grad norm {line['gradient_norm']:.2f}",
            f"{line['samples'] / seconds:.1f} samples/s",
            f"{line['visual_tokens'] / seconds:.0f} visual + {line['text_tokens'] / seconds:.0f} text tokens/s",
            *([f"cells kept {line['kept_share']:.0%}"] if "kept_share" in line else []),
            filled,
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
        self.restart_clock()
        if not trainer.is_global_zero:
            return
        step, loss, samples = trainer.global_step, pl_module.validation.loss, pl_module.validation.samples
        left_out = trainer.datamodule.count_left_out(samples)
        self.metrics.append({"step": step, "val_loss": loss, "val_samples": samples, "val_left_out": left_out})
        of_the_split = f", {left_out} could not be used" if left_out else ""
        print(
            f"step {step}/{self.max_steps} | validation loss {loss:.4f} | {samples} samples{of_the_split}", flush=True
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        skipped = self._skipped_by_all()
        if skipped and trainer.is_global_zero:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            print(f"Skipped {skipped.total()} samples: {reasons}", flush=True)


class ValidationSum:
    """Loss, learned tokens and samples of a validation, summed over micro-batches and processes.

    loss: mean over the learned tokens of all micro-batches, NaN before there is one. samples: how many were seen.
    """

    def __init__(self) -> None:
        self.loss = math.nan
        self.samples = 0

    def begin(self, device: torch.device | str) -> None:
        """Starts a validation with sums of zero."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss_sum: torch.Tensor, tokens: torch.Tensor | int, samples: int) -> None:
        """Adds a micro-batch. A micro-batch without samples is a blank and counts nothing.

        loss_sum: float scalar. Sum of the losses of its learned tokens.
        tokens: How many tokens were learned.
        samples: How many samples it has.
        """
        if samples:
            self.sums[0] += loss_sum.double()
            self.sums[1] += tokens
            self.sums[2] += samples

    def end(self, counts: bool = True) -> None:
        """Sums over the processes. Collective.

        counts: Whether this process's micro-batches are its own, and not those of another process, too.
        """
        if not counts:
            self.sums.zero_()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        loss_sum, tokens, samples = self.sums.tolist()
        self.loss, self.samples = (loss_sum / tokens if tokens else math.nan), int(samples)
