"""One run: trains, tests, writes its line of a result file."""

import gc
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quality.analysis.scoring import accuracies, by_image, by_level
from benchmarks.quality.result_files import Output, Result
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks.registry import make_task
from benchmarks.quality.trainer import STARTS, StepClock, Trainer
from benchmarks.quality.widening import widened_tower
from dct_qwen2vl.common.scripts import UserError

CURVE_POINTS = 20  # evaluations during training
TIMED_EVERY = 10  # steps


def run(
    settings: Settings,
    output: Output,
    device: torch.device | str = "cpu",
    commit: str = "",
    graphs: bool = True,
    deadline: float | None = None,
    alone: bool = True,
) -> Result:
    """Trains and tests; writes the run's line after each evaluation and returns what the line holds. A finished run,
    whose model is there if it is one to save, is read.

    deadline: of time.monotonic(), after which the run stops at its next evaluation; it then stays unfinished, unless
    its last step is done.
    alone: nothing else uses the device meanwhile, so that its times mean something; noted in the result.
    Raises RuntimeError if the step cannot be captured, FloatingPointError if the loss is no number.
    """
    if (result := done(settings, output, settings.save)) is not None:
        return result
    device, spent = torch.device(device), Spent()
    memory = Memory(device)
    with spent.on("prepare"):
        trainer = prepare(settings, output, device, graphs)
    result = {**describe(trainer, commit, alone), "seconds": spent.seconds}
    if settings.start_from is not None:
        with spent.on("test"):
            result["curve"].append(curve_point(trainer, 0, 0.0, None))
    output.record(result)
    clock, losses, started = StepClock(device), [], time.perf_counter()
    every = max(1, settings.steps // CURVE_POINTS)
    for number in range(settings.steps):
        loss = trainer.step(number, clock if number % TIMED_EVERY == min(5, settings.steps - 1) else None)
        losses.append(loss.clone())
        if (number + 1) % every and number + 1 < settings.steps:
            continue
        train_loss = torch.stack(losses).mean().item()  # waits for the device
        trained = spent.add("train", time.perf_counter() - started)
        with spent.on("test"):
            result["curve"].append(curve_point(trainer, number + 1, trained, train_loss))
        result["milliseconds"] = clock.medians()
        output.record(result)
        print(f"{progress_line(settings, result['curve'][-1])}\n", end="", flush=True)  # at once: runs share the output
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"{settings.name}: the loss is {train_loss} after {number + 1} steps")
        if deadline is not None and time.monotonic() > deadline and number + 1 < settings.steps:
            return result
        losses, started = [], time.perf_counter()
    if (peak := memory.peak()) is not None:  # of training: generation needs less or more
        result["peak_memory_bytes"] = peak
    finish(trainer, result, spent)
    if settings.save:
        save(trainer, output.model(settings.name))
    output.record(result)
    return result


def prepare(settings: Settings, output: Output, device: torch.device, graphs: bool) -> Trainer:
    """Model, data and, on CUDA, the captured step of a run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if settings.save and settings.variant not in STARTS:
        raise UserError(
            f"a model of variant {settings.variant} cannot be saved to start from: choose {' or '.join(STARTS)}"
        )
    trainer = Trainer(settings, device, start_weights(settings, output))
    if device.type == "cuda" and graphs:
        capture(trainer)
    return trainer


def done(settings: Settings, output: Output, model_needed: bool) -> Result | None:
    """The result of a run that need not be done again: it is finished and, where it is needed, its model is there.

    Raises UserError for a result of a task whose images are drawn otherwise now.
    """
    result = output.finished(settings.name)
    if result is None or (model_needed and not output.model(settings.name).is_file()):
        return None
    if result.get("task", now := task_fields(settings)) != now:
        what = f"{settings.name} in {output.place}"
        raise UserError(f"{what} is of task {settings.task} as it was before a change: choose another --output")
    return result


def task_fields(settings: Settings) -> dict[str, Any]:
    """All that decides what a task draws, as JSON gives it back."""
    return json.loads(json.dumps(asdict(make_task(settings.task, settings.knobs))))


def capture(trainer: Trainer) -> None:
    try:
        trainer.capture()
    except RuntimeError as error:
        raise RuntimeError(f"no CUDA graph of the step, try --graphs off: {error}") from error


def save(trainer: Trainer, path: Path) -> None:
    temporary = path.with_suffix(".pt.part")
    torch.save(trainer.pixel_state(), temporary)
    temporary.replace(path)


def start_weights(settings: Settings, output: Output) -> dict[str, torch.Tensor] | None:
    """What the run that `start_from` names has saved, a narrower tower widened. Raises FileNotFoundError if it has
    not saved any, UserError for a tower that cannot be widened to the run's."""
    if settings.start_from is None:
        return None
    path = output.model(settings.start_from)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the variant pixels or exact there with --save first")
    return widened_tower(torch.load(path, weights_only=True), settings.size.vision_width, settings.seed)


def describe(trainer: Trainer, commit: str, alone: bool) -> Result:
    """The head of a result."""
    settings, encoder, kept = trainer.settings, trainer.encoder, trainer.kept_share()
    return {
        "name": settings.name,
        "finished": False,
        "settings": asdict(settings),
        "task": task_fields(settings),
        "environment": environment(trainer.device, commit),
        "backgrounds": trainer.source.tools[-1].names,
        "graph": trainer.graph is not None,
        "alone": alone,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "patches": encoder.tokens,
        "visual_tokens": round(kept * trainer.layout.visual_tokens),
        "floats_per_token": trainer.num_floats,
        "live_floats_per_token": trainer.live_floats,
        "chance": trainer.task.chance,
        "hard_levels": list(trainer.task.hard),
        "curve": [],
    }


def curve_point(trainer: Trainer, step: int, seconds: float, loss: float | None) -> dict[str, Any]:
    """An evaluation during training. seconds: of training, drawing of images included. loss: None before training."""
    measured = accuracies(*trainer.test(trainer.settings.probe), trainer.task.hard)
    return {"step": step, "seconds": seconds, "loss": loss, **measured}


def finish(trainer: Trainer, result: Result, spent: "Spent") -> None:
    """Adds the final test."""
    with spent.on("test"):
        right, level = trainer.test(trainer.settings.test)
        if (asked := trainer.asked_otherwise(trainer.settings.test)) is not None:
            result["asked"] = asked
    result.update(accuracies(right, level, trainer.task.hard))
    result["by_level"] = by_level(right, level)
    result["by_image"] = by_image(right, level, trainer.task.hard)
    with spent.on("generation"):
        result["generation"] = trainer.test_generation(trainer.settings.generated)
    result["finished"] = True


def environment(device: torch.device, commit: str) -> dict[str, str]:
    """Where a run took place."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


def progress_line(settings: Settings, point: dict[str, Any]) -> str:
    return (
        f"{settings.name} | step {point['step']}/{settings.steps} | {point['seconds']:.1f} s | "
        f"loss {point['loss']:.4f} | right {point['accuracy']:.1%}, hard {point['hard_accuracy']:.1%}"
    )


class Memory:
    """What a run needs of a CUDA device's memory. What earlier runs of the process left there, such as cuBLAS's
    workspaces of their streams, does not count."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            gc.collect()  # an earlier run's model
            torch.cuda.empty_cache()  # other processes may need it
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """Bytes allocated at once, so far; None where that is not known."""
        return torch.cuda.max_memory_allocated() - self.before if self.cuda else None


class Spent:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, what: str, seconds: float) -> float:
        """Returns the sum so far."""
        self.seconds[what] = round(self.seconds.get(what, 0.0) + seconds, 3)
        return self.seconds[what]

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - started)


def chosen_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
