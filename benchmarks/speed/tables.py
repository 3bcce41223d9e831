"""Measurements of docs/training.md that take one or two GPUs, one after the other: a log and a JSON file for each.

    python -m benchmarks.speed.tables --output tables
    python -m benchmarks.speed.tables --output tables --videos FOLDER --only wait_for_videos two_gpus

One that has its JSON file is not done again. One that takes too long is ended, and the next begins.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.commands import Command, end_by_signals
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main

SHOWN = 3  # last lines of a log on the screen


@dataclass(frozen=True)
class Measurement:
    """command: Program of benchmarks/speed and its arguments. seconds: It is ended after these. gpus: It needs.
    videos: Whether it takes --videos."""

    command: str
    seconds: int = 300
    gpus: int = 1
    videos: bool = False


MEASUREMENTS = {
    "two_gpus": Measurement("training_run --work videos --gpus 2 1 --samples 240 --steps 20", 500, gpus=2),
    "wait_for_videos": Measurement(
        "training_run --gpus 1 --skip-db 38 --num-workers 14 --samples 240 --steps 60 --uncounted 30 "
        "--sequences 2 --pack-vision-tokens 40960",
        900, videos=True,
    ),
    "skip_screens": Measurement("training --work screens --ways x4 --skip-db 38 --samples 24 --repeats 2"),
    "skip_pages": Measurement("training --work pages --ways x4 --skip-db 38 --samples 64 --repeats 2"),
    "start_up": Measurement("start_up --size 2b --processes 1 --repeats 1", 500),
    "x4_videos": Measurement("training --work videos --ways x4 --samples 42 --repeats 2 --kernels"),
    "x4_mix": Measurement("training --work mix --ways x4 x16 --samples 192 --repeats 3 --kernels"),
    "whole_mix": Measurement("training_run --work mix --gpus 1 --samples 400 --steps 20", 400),
    "all_videos": Measurement("training --work videos --samples 42 --stock-sizes 1 2 4 --repeats 2", 600),
    "all_mix": Measurement("training --work mix --samples 96 --stock-sizes 1 4 8 --repeats 2", 600),
    "low_scores": Measurement("low_scores"),
    "memory": Measurement("memory", 900),
}  # fmt: skip


def measure(arguments: argparse.Namespace) -> int:
    """Returns how many had no result."""
    import torch

    output, found, missing = arguments.output.resolve(), torch.cuda.device_count(), 0
    if not found:
        raise UserError("no CUDA device: these measurements say nothing of a CPU")
    end_by_signals()
    output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        each, result = MEASUREMENTS[name], output / f"{name}.json"
        if result.exists():
            continue
        if each.gpus > found or (each.videos and not arguments.videos):
            print(f"{name}: left out, it needs {'--videos' if each.gpus <= found else f'{each.gpus} GPUs'}", flush=True)
            continue
        program, *rest = each.command.split()
        videos = ["--videos", str(arguments.videos.resolve())] if each.videos else []
        begun = time.monotonic()
        words = [sys.executable, "-m", f"benchmarks.speed.{program}", *videos, *rest, "--json", str(result)]
        code = Command(words, output / f"{name}.log", {}).wait(each.seconds)
        said = (output / f"{name}.log").read_text(encoding="utf-8").splitlines()[-SHOWN:]
        end = "took too long" if code is None else f"exit status {code}"
        print(f"{name}: {end} after {time.monotonic() - begun:.0f} s", *said, sep="\n    ", flush=True)
        missing += not result.exists()
    return missing


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of logs and JSON files")
    add("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="these, in this order")
    add("--videos", type=Path, metavar="DIR", help="real videos, for those that take some")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("tables.py", lambda: measure(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
