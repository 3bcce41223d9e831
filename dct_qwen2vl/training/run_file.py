"""run.json: the settings of a run, and which of them a start that goes on from a checkpoint may change."""

import argparse
import json
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import (
    CheckpointError,
    read_json,
)
from dct_qwen2vl.training.config import ModelInfo, RunError

# A resumed run repeats the samples and losses of an uninterrupted one only if these are what they were.
DATA_SETTINGS = (  # --restart-data lets these change
    *("data_dir", "min_pixels", "max_pixels", "seq_length", "shuffle_buffer", "seed"),
    *("video_fps", "video_min_frames", "video_max_frames", "video_total_pixels", "packing_buffer"),
    *("data_parallel", "micro_batch_size", "global_batch_size", "pack_tokens", "pack_vision_tokens", "num_workers"),
)


FIXED_ON_RESUME = (
    *("model_dir", "chosen_engine", "precision", *DATA_SETTINGS),
    *("max_steps", "lr", "min_lr", "warmup_steps", "weight_decay", "adam_beta2", "max_gradient_norm", "freeze"),
    *("lora_rank", "lora_alpha"),
)


# Of settings that have no flag of their own name.
FLAGS = {"data_parallel": "--devices x --num-nodes", "chosen_engine": "--engine"}


def earlier_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """run.json of a run that can go on, empty where there is none: one that left no checkpoint has nothing to continue.
    Raises CheckpointError for a run.json that cannot be used."""
    path = arguments.run_dir / "run.json"
    begun = (arguments.run_dir / "finished").is_file() or any((arguments.run_dir / "checkpoints").glob("step*"))
    if not path.is_file() or not begun:
        return {}
    advice = "put back what the run was started with, or another --experiment-name"
    earlier = read_json(path, advice)
    count = earlier.setdefault("data_restarts", 0)
    if not isinstance(count, int):
        raise CheckpointError(f"{path} has data_restarts {count!r}, which is no whole number: {advice}")
    return earlier


def check_run_folder(arguments: argparse.Namespace) -> None:
    """A folder of another run is not continued. Raises RunError naming what differs, or CheckpointError for a run.json
    that cannot be used."""
    earlier = earlier_settings(arguments)
    for name in FIXED_ON_RESUME if earlier else ():
        if arguments.restart_data and name in DATA_SETTINGS:
            continue
        now = _plain(getattr(arguments, name))
        if earlier.get(name) != now:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            anew = ", --restart-data to begin the data anew" if name in DATA_SETTINGS else ""
            raise RunError(
                f"{arguments.run_dir} was started with {flag} {earlier.get(name)}, now it is {now}: use the same value "
                f"to resume{anew}, or another --experiment-name"
            )


def count_data_restarts(arguments: argparse.Namespace) -> int:
    """How often the run has begun its data anew, this start included. run.json says it as soon as the run begins, a
    checkpoint when there is one of those data: where they differ, the run ended in between, and the data begin anew
    once more, with the flag or without. (With it, a process may read what the first one has just written, and be one
    too high: only the number of the first is stored, and none of them restores a state.)"""
    return earlier_settings(arguments).get("data_restarts", 0) + arguments.restart_data


def write_run_file(arguments: argparse.Namespace, info: ModelInfo) -> None:
    values = {name: _plain(value) for name, value in vars(arguments).items() if name not in ("check", "debug")}
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = arguments.run_dir / ".run.json.tmp"
    temporary.write_text(json.dumps({**values, "token_format": info.dct_name}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(arguments.run_dir / "run.json")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
