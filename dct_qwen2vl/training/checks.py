"""Everything that can be wrong before a heavy import, each refused in one line."""

import argparse
import math
import os
from importlib.util import find_spec
from pathlib import Path

from dct_qwen2vl.checkpoints.inspection import (
    FORMAT_DEFAULTS,
    check_checkpoint,
    read_json,
    saved_pixel_bounds,
)
from dct_qwen2vl.data.energon_files import read_counts, read_splits
from dct_qwen2vl.training.config import PARTS, ROW_TOKENS, ROWS_PER_STEP, ModelInfo, RunError
from dct_qwen2vl.training.run_file import check_run_folder

POSITIVE = (
    *("max_steps", "micro_batch_size", "global_batch_size", "devices", "num_nodes", "val_interval", "val_batches"),
    *("keep", "log_interval", "seq_length", "max_bad_in_a_row", "shuffle_buffer", "profile"),
    *("min_pixels", "max_pixels", "video_min_frames", "video_max_frames", "video_total_pixels"),
    *("tensor_parallel", "pipeline_parallel", "packing_buffer", "lora_alpha"),
)


NOT_NEGATIVE = (
    "save_interval",
    "num_workers",
    "warmup_steps",
    "min_lr",
    "weight_decay",
    "max_gradient_norm",
    "adam_beta2",
)


OVER_ZERO = ("lr", "video_fps")


MEGATRON_ONLY = ("tensor_parallel", "pipeline_parallel", "pack_tokens", "pack_vision_tokens", "recompute")


def check_model(model_dir: Path, wanted: str | None) -> ModelInfo:
    """Reads what the checkpoint's token format is. Raises RunError or CheckpointError if it is missing, cannot be
    loaded or is not the wanted one."""
    if not (model_dir / "config.json").is_file():
        raise RunError(f"no model in {model_dir} (no config.json): python convert_checkpoint.py --model-dir "
                       f"QWEN2_VL --output-dir {model_dir}")  # fmt: skip
    dct = check_checkpoint(model_dir)
    info = ModelInfo(dct["name"] if dct else "none", dct)
    if info.dct_name == "none" and wanted != "none":
        raise RunError(f"{model_dir} reads pixels, not DCT tokens: python convert_checkpoint.py --model-dir "
                       f"{model_dir} --output-dir {model_dir}-x4, or --dct none to train on pixels")  # fmt: skip
    if wanted is None:
        return info
    if wanted.endswith(".json"):
        given = read_json(Path(wanted), "give --dct a file that DCTConfig.save wrote")
        same = {**FORMAT_DEFAULTS, **given} == info.dct
    else:
        same = wanted == info.dct_name
    if not same:
        raise RunError(f"--dct {wanted} contradicts the checkpoint {model_dir}, converted with {info.dct_name}: "
                       f"leave --dct out, or convert with --dct {wanted}")  # fmt: skip
    return info


def check_pixel_bounds(arguments: argparse.Namespace) -> None:
    """The command line's bounds, and the checkpoint's where it gives none, must leave room for a picture. Raises
    RunError, or CheckpointError for those of the checkpoint."""
    bounds = {**saved_pixel_bounds(arguments.model_dir), **arguments.pixel_bounds}
    low, high = bounds["min_pixels"], bounds["max_pixels"]
    if low is not None and high is not None and low > high:
        raise RunError(f"min_pixels {low} is over max_pixels {high}: change --min-pixels or --max-pixels")


def check_data(arguments: argparse.Namespace) -> None:
    """Raises RunError or PreparedSetError unless `energon prepare` has been run, both splits that training reads hold
    shards, and each loader process has a sample to train on."""
    data_dir, loaders = arguments.data_dir, arguments.data_parallel * max(1, arguments.num_workers)
    if not data_dir.is_dir() or not any(data_dir.glob("*.tar")):
        raise RunError(f"no shards in {data_dir}: python data_preparation.py --data-dir RAW --output-dir {data_dir}")
    splits, counts = read_splits(data_dir, ("train", "val")), read_counts(data_dir)
    empty = [part for part, shards in splits.items() if not shards]
    samples = sum(counts[name] for name in splits["train"])
    if not empty and samples < loaders:
        raise RunError(
            f"the train split of {data_dir} holds {samples} samples, fewer than {arguments.data_parallel} processes "
            f"have loader processes ({loaders}): lower --num-workers or --devices"
        )
    if empty:
        raise RunError(
            f"the {empty[0]} split of {data_dir} holds no shard: prepare with more shards (a smaller --maxcount)"
        )


def settle_batch(arguments: argparse.Namespace, engine: str) -> None:
    """Fills in what the command line leaves open of micro-batch, rows and step."""
    packs = engine == "megatron" and arguments.micro_batch_size is None
    if arguments.pack_tokens is None:
        arguments.pack_tokens = ROW_TOKENS if packs else 0
    if arguments.pack_vision_tokens is None:
        arguments.pack_vision_tokens = 2 * arguments.pack_tokens
    if arguments.micro_batch_size is None:
        arguments.micro_batch_size = 1
    if arguments.global_batch_size is None:
        rows = -(-ROWS_PER_STEP // arguments.data_parallel) * arguments.data_parallel
        arguments.global_batch_size = rows if arguments.pack_tokens else 32


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raises RunError for a number that is outside what it can be."""
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(arguments, name) < math.inf:
            raise RunError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(arguments, name)}")
    for name in OVER_ZERO:
        if not 0 < getattr(arguments, name) < math.inf:
            raise RunError(f"--{name.replace('_', '-')} must be over 0, got {getattr(arguments, name)}")
    if not arguments.adam_beta2 < 1:
        raise RunError(f"--adam-beta2 must be below 1, got {arguments.adam_beta2}")
    for low, high in (("min_lr", "lr"), ("video_min_frames", "video_max_frames"), ("profile", "max_steps")):
        low_value, high_value = getattr(arguments, low), getattr(arguments, high)
        if low_value is not None and low_value > high_value:
            low, high = (name.replace("_", "-") for name in (low, high))
            raise RunError(f"--{low} {low_value} is over --{high} {high_value}: change one of them")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises RunError for batch sizes and counts that do not fit each other."""
    model_parallel = arguments.tensor_parallel * arguments.pipeline_parallel
    if arguments.world_size % model_parallel:
        raise RunError(
            f"--tensor-parallel {arguments.tensor_parallel} x --pipeline-parallel {arguments.pipeline_parallel} = "
            f"{model_parallel} does not divide {arguments.world_size} processes: change them or --devices"
        )
    if arguments.pack_tokens < 0 or (arguments.pack_tokens and arguments.micro_batch_size != 1):
        raise RunError(
            f"--pack-tokens {arguments.pack_tokens} fills rows with samples up to it, so --micro-batch-size is 1, got "
            f"{arguments.micro_batch_size}: leave one of them out"
        )
    if bool(arguments.pack_tokens) != bool(arguments.pack_vision_tokens) or arguments.pack_vision_tokens < 0:
        raise RunError(
            f"--pack-vision-tokens {arguments.pack_vision_tokens} bounds the same rows as --pack-tokens "
            f"{arguments.pack_tokens}: both must be over 0, or leave both out"
        )
    per_step = arguments.micro_batch_size * arguments.data_parallel
    if arguments.global_batch_size % per_step:
        raise RunError(
            f"GBS {arguments.global_batch_size} is not divisible by MBS {arguments.micro_batch_size} x "
            f"{arguments.data_parallel} processes = {per_step}: change --global-batch-size or --micro-batch-size"
        )
    if os.environ.get("WORLD_SIZE") and int(os.environ["WORLD_SIZE"]) != arguments.world_size:
        raise RunError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, --devices {arguments.devices} x --num-nodes "
            f"{arguments.num_nodes} says {arguments.world_size}: make them equal"
        )


def check_parts(arguments: argparse.Namespace) -> None:
    """Raises RunError for parts that cannot be frozen or adapted as asked."""
    if set(arguments.freeze) == set(PARTS):
        raise RunError(f"--freeze {' '.join(PARTS)} leaves nothing to train: leave one of them out")
    if "language" in arguments.freeze and arguments.pipeline_parallel > 1:
        raise RunError(f"--freeze language leaves pipeline stages nothing to train, got --pipeline-parallel "
                       f"{arguments.pipeline_parallel}: use --tensor-parallel")  # fmt: skip
    check_lora(arguments)


def check_lora(arguments: argparse.Namespace) -> None:
    """Raises RunError for adapters that cannot be."""
    rank, size = arguments.lora_rank, arguments.tensor_parallel
    if rank < 0:
        raise RunError(f"--lora-rank must be at least 0, got {rank}")
    if rank and "language" in arguments.freeze:
        raise RunError(f"--lora-rank {rank} trains adapters of the language model, --freeze language nothing of it: "
                       "leave one of them out (with adapters its own weights are frozen anyway)")  # fmt: skip
    if rank and arguments.pipeline_parallel > 1:  # it wants weights with and without decay in every stage
        raise RunError(f"Megatron-core cannot resume --lora-rank {rank} under --pipeline-parallel "
                       f"{arguments.pipeline_parallel}: use --tensor-parallel")  # fmt: skip
    if rank % size:
        raise RunError(f"--lora-rank {rank} is not divisible by --tensor-parallel {size}: change one of them")


def check(arguments: argparse.Namespace) -> ModelInfo:
    """Everything that can be wrong before a heavy import. Raises RunError, CheckpointError or PreparedSetError."""
    check_numbers(arguments)
    check_parts(arguments)
    info = check_model(arguments.model_dir, arguments.dct)
    check_pixel_bounds(arguments)
    check_data(arguments)
    check_run_folder(arguments)
    return info


def megatron_refusal() -> str | None:
    """Why the megatron engine cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "--engine megatron needs a CUDA device and there is none: use --engine automodel"
    if find_spec("transformer_engine") is None:
        return "--engine megatron needs TransformerEngine: run inside the NeMo container, or use --engine automodel"
    return None


def choose_engine(arguments: argparse.Namespace) -> str:
    """ "auto" becomes what can run here. Raises RunError if what was asked for cannot."""
    reason = megatron_refusal() if arguments.engine != "automodel" else "--engine automodel was asked for"
    if arguments.engine == "megatron" and reason:
        raise RunError(reason)
    if not reason:
        if arguments.precision not in (None, "bf16-mixed"):
            raise RunError(f"--engine megatron trains in bf16-mixed, not {arguments.precision}: leave --precision out")
        return "megatron"
    for name in MEGATRON_ONLY:
        value = getattr(arguments, name)
        if value is True or value not in (None, 0, 1):
            raise RunError(f"--{name.replace('_', '-')} is of the megatron engine, but {reason}")
    return "automodel"


def choose_precision(arguments: argparse.Namespace) -> str:
    """What is asked for, or else what suits the device."""
    if arguments.precision:
        return arguments.precision
    import torch

    return "bf16-mixed" if arguments.chosen_engine == "megatron" or torch.cuda.is_available() else "32"
