"""Whether the disk has room for what a run will write: its checkpoints, and the model at its end."""

import shutil
from math import ceil, prod
from pathlib import Path

from dct_qwen2vl.checkpoints.inspection import open_tensors, safetensors_files
from dct_qwen2vl.common.files import lowest_there
from dct_qwen2vl.training.config import RunError, TrainingConfig
from dct_qwen2vl.training.parts import is_frozen

# Bytes of a number in a file, by engine: of a weight, and of what the optimizer keeps for a weight that is trained
# (two moments; the megatron engine adds a float32 copy of the weight).
WEIGHT = {"automodel": 4, "megatron": 2}
OPTIMIZER = {"automodel": 8, "megatron": 12}
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
ADAPTED = tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def check_space(config: TrainingConfig, forms: int) -> None:
    """Checks that the disk has room for the run.

    config: Resolved for an engine.
    forms: Forms in which the model is written at the end, 2 for a DCT model.

    Raises RunError if the disk is known to have too little room.
    """
    free = free_bytes(config.run_dir)
    weights, trained, _ = count_numbers(config)
    checkpoint = weights * WEIGHT[config.chosen_engine] + trained * OPTIMIZER[config.chosen_engine]
    model = bytes_of_model(config)
    there = len(list((config.run_dir / "checkpoints").glob("step*")))
    most, kept = checkpoints_at_once(config)
    needed = max(most * checkpoint, kept * checkpoint + forms * model) - there * checkpoint
    if free is not None and needed > free:
        raise RunError(
            f"{config.run_dir} needs {in_gb(needed)} more ({most} checkpoints of {in_gb(checkpoint)} at once, "
            f"at the end {forms} x {in_gb(model)}), its disk has {in_gb(free)} free: make room, name another "
            "--output-dir, or write less (--keep, --save-interval 0)"
        )


def check_space_of_model(config: TrainingConfig, forms: int) -> None:
    """Checks that the disk has room for the model of one checkpoint.

    config: Resolved for an engine.
    forms: Forms in which it is written, 2 for a DCT model.

    Raises RunError if the disk is known to have too little room.
    """
    free, needed = free_bytes(config.run_dir), forms * bytes_of_model(config)
    if free is not None and needed > free:
        raise RunError(
            f"the model in {config.run_dir} needs {in_gb(needed)}, its disk has {in_gb(free)} free: make room"
        )


def bytes_of_model(config: TrainingConfig) -> int:
    """What one form of the model takes."""
    weights, _, saved = count_numbers(config)
    return saved if config.chosen_engine == "automodel" else weights * WEIGHT["megatron"]


def checkpoints_at_once(config: TrainingConfig) -> tuple[int, int]:
    """Most checkpoints that are on the disk at the same time, and how many at the end: a new one is whole before the
    oldest goes."""
    if not config.save_interval:
        return 0, 0
    written = ceil(config.max_steps / config.save_interval)
    return min(config.keep + 1, written), min(config.keep, written)


def count_numbers(config: TrainingConfig) -> tuple[int, int, int]:
    """Numbers of all weights, of those that are trained, and the bytes of all in the checkpoint's files, from their
    headers. Raises CheckpointError."""
    weights = trained = saved = 0
    freeze = (*config.freeze, "language") if config.lora_rank else config.freeze
    for name, tensors in open_tensors(safetensors_files(config.model_dir), "np"):
        tensor = tensors.get_slice(name)
        shape = tensor.get_shape()
        weights += prod(shape)
        saved += prod(shape) * BYTES.get(tensor.get_dtype(), 4)
        if not is_frozen(name, freeze):
            trained += prod(shape)
        elif config.lora_rank and name.startswith("model.layers.") and name.endswith(ADAPTED):
            trained += config.lora_rank * sum(shape)
    return weights, trained, saved


def free_bytes(folder: Path) -> int | None:
    """Room on the disk of a folder that may not be there yet. None where the file system does not tell."""
    try:
        usage = shutil.disk_usage(lowest_there(folder))
    except OSError:
        return None
    return usage.free if usage.total else None


def in_gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
