"""What can be read at all? A convolutional classifier reads digits from images put together from a variant's tokens.

    python -m benchmarks.quality.analysis.digit_classifier --variants exact x4 x4-corner quarter --output legibility

It is trained on single cells of the reading task, one digit in each, and has nothing else to learn: no tokens, no
language, no looking for a place, no blanks. What it reads can be read, and what a language model misses beyond that is
left to training; a better reader may read more. Results go to legibility/legibility.jsonl, one line for each variant
and seed; --output FILE.jsonl names the file itself. What is finished there is skipped. The table is accuracy by height
of print, mean over seeds.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.analysis.run_results import level_accuracy, levels_of
from benchmarks.quality.analysis.scoring import by_level
from benchmarks.quality.result_files import Output, Result
from benchmarks.quality.runs import chosen_device, environment
from benchmarks.quality.settings import parser_of
from benchmarks.quality.tasks.cells import DIGITS, TOKEN
from benchmarks.quality.tasks.reading import Reading
from benchmarks.quality.tasks.registry import Source, make_task
from benchmarks.quality.trainer import DRAWN_AT_ONCE
from benchmarks.quality.variants import MERGE, Encoder, downscale, make_variant
from dct_qwen2vl.common.scripts import UserError, run_main

KNOBS = {"cells": 4, "blank": 0.0}
HEIGHTS = Reading.heights
TEST_IMAGES = 1024
RATE = 2e-3
DECAY = 0.05


class Rebuild:
    """Images from a variant's tokens: uint8 frames [B, 1, H, W, 3] -> float32 [B, H, W, 3] in levels of 0..255.

    DCT variants: by the pseudo-inverse of their analysis. Pixel variants: the downscaled image, each pixel as often as
    it was shrunk. Raises UserError for variants that are measured on data, which show what others show.
    """

    def __init__(self, variant: str, patch: int, size: int, device: torch.device) -> None:
        self.encoder = Encoder(make_variant(variant, patch), (size, size), 1, device)
        self.variant = self.encoder.variant
        if self.variant.config is None and self.variant.scaling != "clip":
            raise UserError(
                f"variant {variant} is measured on data: choose pixels, quarter, sixteenth or a DCT variant"
            )
        if self.variant.config is not None:
            self.inverse = torch.linalg.pinv(self.encoder.matrix.double().cpu()).float().to(device)

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        if self.variant.config is None:
            small = downscale(frames.to(self.encoder.device, torch.float32), self.variant.shrink)[:, 0]
            return small.repeat_interleave(self.variant.shrink, 1).repeat_interleave(self.variant.shrink, 2)
        blocks = (self.encoder.encode(frames) - self.encoder.shift) @ self.inverse + 128
        return join(blocks, self.encoder.grid, self.variant.side)


def join(blocks: torch.Tensor, grid: tuple[int, int, int], side: int) -> torch.Tensor:
    """The inverse of `variants.cut` for one frame: [B, N, 3*b*b] -> [B, H, W, 3]."""
    _, h, w = grid
    parts = blocks.unflatten(2, (3, side, side)).unflatten(1, (h // MERGE, w // MERGE, MERGE, MERGE))
    # from B, h, w, m, m, channel, row, column
    return parts.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(len(blocks), h * side, w * side, 3)


def make_classifier(width: int) -> nn.Module:
    """Levels [B, 3, 28, 28] -> scores [B, 10]. The digit may be anywhere, so the last pooling is over all places."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]

    layers = [*block(3, width), *block(width, width), nn.MaxPool2d(2)]
    layers += [*block(width, 2 * width), *block(2 * width, 2 * width), nn.MaxPool2d(2)]
    layers += [*block(2 * width, 4 * width), *block(4 * width, 4 * width), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * width, len(DIGITS)))


class Reader:
    """Trains and tests a classifier on the cells that a variant leaves."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.task = make_task("reading", {**KNOBS, "heights": settings["heights"]})
        self.source = Source(self.task, device)
        self.rebuild = Rebuild(settings["variant"], settings["patch"], self.task.size, device)
        torch.manual_seed(settings["seed"])
        self.model = make_classifier(settings["width"]).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)

    def samples(self, split: str, step: int, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cells [B*C, 3, 28, 28], about 0; digits [B*C]; levels [B*C]."""
        batch = self.source.batch(split, self.settings["seed"] if split == "train" else 0, step, images)
        side, cells = self.task.cell, self.task.cells
        levels = (self.rebuild(batch.frames) - 128) / 64
        parts = levels.unflatten(2, (cells, side)).unflatten(1, (cells, side))  # B, cells, row, cells, column, channel
        parts = parts.permute(0, 1, 3, 5, 2, 4).flatten(0, 2).contiguous(memory_format=torch.channels_last)
        return parts, (batch.answer[:, 1::2] - TOKEN[DIGITS[0]]).flatten(), batch.level.flatten()

    def scores(self, cells: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(cells).float()

    def train(self) -> float:
        """Returns the mean loss of the last tenth of the steps."""
        steps, losses = self.settings["steps"], []
        schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, steps, pct_start=0.1)
        self.model.train()
        for step in range(steps):
            cells, digits, _ = self.samples("train", step, self.settings["images"])
            loss = nn.functional.cross_entropy(self.scores(cells), digits)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses[-max(1, steps // 10) :]).mean().item()

    @torch.no_grad()
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """right bool [images, C], level int64 [images, C]"""
        self.model.eval()
        right, levels = [], []
        for step in range(math.ceil(self.settings["test"] / DRAWN_AT_ONCE)):
            cells, digits, level = self.samples("test", step, DRAWN_AT_ONCE)
            right.append((self.scores(cells).argmax(dim=1) == digits).view(DRAWN_AT_ONCE, -1))
            levels.append(level.view(DRAWN_AT_ONCE, -1))
        tested = slice(self.settings["test"])  # of the last images drawn, some may be too many
        return torch.cat(right)[tested].cpu(), torch.cat(levels)[tested].cpu()


def run_name(settings: dict[str, Any]) -> str:
    """Of a run's line."""
    return f"legibility_{settings['variant']}_seed{settings['seed']}"


def run(settings: dict[str, Any], output: Output, device: torch.device, commit: str) -> Result:
    """Trains and tests; writes and returns the result. A finished run of the same settings is read."""
    result = output.finished(run_name(settings))
    if result is not None and result["classifier"] == settings:
        return result
    started = time.perf_counter()
    reader = Reader(settings, device)
    loss = reader.train()
    right, level = reader.test()
    result = {
        "name": run_name(settings),
        "finished": True,
        "classifier": settings,
        "environment": environment(device, commit),
        "loss": loss,
        "accuracy": right.float().mean().item(),
        "by_level": by_level(right, level),
        "seconds": round(time.perf_counter() - started, 1),
    }
    output.record(result)
    return result


def table(results: list[Result]) -> list[str]:
    """Markdown lines: percent right by height, mean over seeds."""
    levels = levels_of(results)
    lines = [f"| what is read | {' | '.join(f'{level} px' for level in levels)} | all | seeds |"]
    lines.append("| --- " * (len(levels) + 3) + "|")
    for variant in dict.fromkeys(result["classifier"]["variant"] for result in results):
        runs = [result for result in results if result["classifier"]["variant"] == variant]
        cells = [f"{100 * level_accuracy(runs, level):.1f}" for level in levels]
        overall = 100 * sum(run["accuracy"] for run in runs) / len(runs)
        lines.append(f"| {variant} | {' | '.join(cells)} | {overall:.1f} | {len(runs)} |")
    return lines


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", default=["exact", "x4", "x4-corner", "quarter"], help="(default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and samples (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="PATH", help="FILE.jsonl, or FOLDER for FOLDER/legibility.jsonl")
    add("--steps", type=int, default=3000, help="(default: %(default)s)")
    add("--images", type=int, default=64, help="of 16 cells, in a step (default: %(default)s)")
    add("--width", type=int, default=48, help="channels of the first layers (default: %(default)s)")
    add("--heights", nargs="+", type=int, default=list(HEIGHTS), help="in pixels (default: %(default)s)")
    add("--patch", type=int, default=7, help="side of a pixel model's patch (default: %(default)s)")
    add("--test", type=int, default=TEST_IMAGES, help="images tested (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--commit", default="", help="noted in the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("digit_classifier.py", lambda: measure_and_say(arguments))


def measure_and_say(arguments: argparse.Namespace) -> int:
    """Raises UserError, OSError."""
    device, output, results = chosen_device(arguments.device), Output.at(arguments.output, "legibility"), []
    shared = {name: getattr(arguments, name) for name in ("steps", "images", "width", "heights", "patch", "test")}
    for variant in arguments.variants:
        for seed in arguments.seeds:
            settings = {"variant": variant, "seed": seed, **shared}
            result = run(settings, output, device, arguments.commit)
            print(f"{variant} seed {seed}: right {result['accuracy']:.1%} after {result['seconds']} s", flush=True)
            results.append(result)
    print("\n".join(["", *table(results)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
