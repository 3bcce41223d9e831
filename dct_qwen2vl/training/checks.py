"""Everything that can be wrong before a heavy import, each refused in one line."""

import os
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import (
    FORMAT_DEFAULTS,
    PROCESSOR,
    SHARE_FOR_BOTH,
    check_checkpoint,
    chosen_bounds,
    note_on_old_code,
    note_on_threshold,
    notes_on_bounds,
    read_config,
    read_json,
    reads_larger_patches,
    skipping_in,
    unfolded_format,
    where_it_is,
)
from dct_qwen2vl.common import settings
from dct_qwen2vl.common.files import lowest_there
from dct_qwen2vl.common.files import read_json as read_file
from dct_qwen2vl.common.imports import importing
from dct_qwen2vl.common.settings import flag_of
from dct_qwen2vl.data.energon_files import count_samples, read_splits
from dct_qwen2vl.training.config import PARTS, ModelInfo, RunError, TrainingConfig
from dct_qwen2vl.training.disk_space import check_space
from dct_qwen2vl.training.run_file import (
    PUT_BACK,
    check_newest_checkpoint,
    check_run_folder,
    check_same_model,
    earlier_settings,
)

TOWER_ACTIVATIONS = ("quick_gelu", "gelu")  # of the vision tower, in the megatron engine


def check_model(model_dir: Path, wanted: str | None) -> ModelInfo:
    """Reads what the checkpoint's token format is.

    model_dir: Hugging Face directory.
    wanted: The token format that it must have, as --dct has it. None: any but "none".

    Raises RunError or CheckpointError if it is missing, cannot be loaded or is not the wanted one.
    """
    if not (model_dir / "config.json").is_file():
        make_it = f"python convert_checkpoint.py --model-dir QWEN2_VL --output-dir {model_dir}"
        if model_dir.exists():  # and is something else
            make_it = "give --model-dir a folder that convert_checkpoint.py wrote"
        raise RunError(f"no model in {model_dir} (no config.json): {where_it_is(model_dir) or make_it}")
    dct = check_checkpoint(model_dir)
    info = ModelInfo(dct["name"] if dct else "none", dct)
    unfolded = unfolded_format(model_dir)
    if unfolded and wanted != "none":
        raise RunError(f"{model_dir} is the stock form of a DCT model ({unfolded['name']}), but training needs its "
                       f"coefficient form: give a run's hf_dct, or python convert_checkpoint.py --to dct --model-dir "
                       f"{model_dir} --output-dir {model_dir}-dct")  # fmt: skip
    if info.dct_name == "none" and wanted != "none" and reads_larger_patches(read_config(model_dir)):
        raise RunError(f"{model_dir} reads pixels, not DCT tokens; if it is the stock form of a DCT model: python "
                       f"convert_checkpoint.py --to dct --model-dir {model_dir} "
                       f"--output-dir {model_dir}-dct")  # fmt: skip
    if info.dct_name == "none" and wanted != "none":
        raise RunError(f"{model_dir} reads pixels, not DCT tokens: python convert_checkpoint.py --model-dir "
                       f"{model_dir} --output-dir {model_dir}-x4, or --dct none to train on pixels")  # fmt: skip
    if wanted is None:
        return info
    if wanted.endswith(".json"):
        given = read_json(Path(wanted), "give --dct a file that DCTConfig.save wrote")
        inner = given.get("dct")  # as a model's files hold it
        same = {**FORMAT_DEFAULTS, **(inner if isinstance(inner, dict) else given)} == info.dct
    else:
        same = wanted == info.dct_name
    if not same:
        raise RunError(f"--dct {wanted} contradicts the checkpoint {model_dir}, converted with {info.dct_name}: "
                       f"leave --dct out, or convert with --dct {wanted}")  # fmt: skip
    return info


def choose_min_pixels(config: TrainingConfig) -> int | None:
    """The value that was given. A --max-pixels below the checkpoint's own lowers that, as in conversion.

    Raises CheckpointError for bounds that leave no room for an image.
    """
    chosen_bounds(config.model_dir, config.min_pixels, config.max_pixels)
    notes = notes_on_bounds(config.model_dir, config.min_pixels, config.max_pixels)
    if config.rank == 0:
        for note in notes:
            print(f"Note: {note}", flush=True)
    return config.max_pixels if notes else config.min_pixels


def check_skipping(config: TrainingConfig, info: ModelInfo) -> None:
    """Raises RunError where cells are to be skipped that cannot be; prints a note on a threshold that was probably not
    meant."""
    if config.skip_noise_floor and not skip_db_of(config):
        raise RunError(
            f"--skip-noise-floor goes with --skip-db, and {config.model_dir} skips no cells: add --skip-db 38"
        )
    if (config.skip_share or 1) < 1 and not skip_db_of(config):
        raise RunError(
            f"--skip-share {config.skip_share:g} goes with --skip-db, and this run skips no cells: add --skip-db 38, "
            "or leave it out"
        )
    if config.rank == 0 and (note := note_on_threshold(config.skip_db)):
        print(f"Note: {note}", flush=True)
    if not config.skip_db:
        return
    if info.dct is None:
        raise RunError(f"--skip-db {config.skip_db:g} needs DCT tokens, {config.model_dir} reads pixels: leave it out")


def skip_db_of(config: TrainingConfig) -> float | None:
    """Of this run: the command line's, or else the checkpoint's, if there is one. Raises CheckpointError."""
    path = config.model_dir / PROCESSOR
    if config.skip_db is not None or not path.is_file():
        return config.skip_db
    return read_json(path).get("skip_db")


def say_skipping(config: TrainingConfig) -> str:
    """For a run's first line; "" where it reads all cells."""
    skip_db = skip_db_of(config)
    whose = "" if config.skip_db else ", as in the model's files"
    return f", cells left out at {skip_db:g} dB in {config.skip_share:.0%} of the samples{whose}" if skip_db else ""


def choose_skip_share(config: TrainingConfig) -> float:
    """The share that was given. Otherwise that of the run that goes on, whatever the default was when it began, or
    `SHARE_FOR_BOTH`. 1 where no cells are skipped, as in run.json of all earlier runs.

    Raises CheckpointError for a run.json that cannot be used.
    """
    if config.skip_share is not None or not skip_db_of(config):
        return 1.0 if config.skip_share is None else config.skip_share
    earlier = earlier_settings(config)
    skip_db = skip_db_of(replace(config, skip_db=earlier.get("skip_db")))
    begun = skipping_in(config.run_dir / "run.json", {**earlier, "skip_db": skip_db}, PUT_BACK)
    return begun.get("skip_share", SHARE_FOR_BOTH)


def check_data(config: TrainingConfig) -> None:
    """Raises RunError or PreparedSetError unless `energon prepare` has been run and each loader process has a sample to
    train on. The val split may be empty: there is no validation then."""
    data_dir, loaders = config.data_dir, config.data_parallel * max(1, config.num_workers)
    splits = read_splits(data_dir, ("train", "val"))
    if not splits["train"]:
        raise RunError(f"the train split of {data_dir} holds no shard: prepare with more shards (a smaller --maxcount)")
    samples = count_samples(data_dir, splits["train"])
    if samples < loaders:
        raise RunError(
            f"the train split of {data_dir} holds {samples} samples, fewer than there are loader processes "
            f"({loaders}): lower --num-workers or --devices"
        )


def check_ranges(config: TrainingConfig) -> None:
    """Raises RunError for a number that is outside what it can be, and for a run folder that cannot be one."""
    settings.check_ranges(config, error=RunError)
    name = config.experiment_name
    if name.startswith("/") or not name.strip() or {".", ".."} & set(name.split("/")):
        raise RunError(f"--experiment-name must name a folder below --output-dir, got {name!r}")
    lowest = lowest_there(config.run_dir)
    if not lowest.is_dir():
        raise RunError(f"{lowest} is a file, the run folder {config.run_dir} cannot be made: choose another "
                       "--output-dir or --experiment-name")  # fmt: skip


def check_writable(config: TrainingConfig) -> None:
    """Raises RunError for a run folder that may not be written to."""
    lowest = lowest_there(config.run_dir)
    if not os.access(lowest, os.W_OK):
        raise RunError(f"{lowest} may not be written to, so the run folder {config.run_dir} cannot be used: choose "
                       "another --output-dir, or change its permissions")  # fmt: skip


def check_numbers(config: TrainingConfig) -> None:
    """Raises RunError for batch sizes and counts that do not fit each other."""
    model_parallel = config.tensor_parallel * config.pipeline_parallel
    if config.world_size % model_parallel:
        raise RunError(
            f"--tensor-parallel {config.tensor_parallel} x --pipeline-parallel {config.pipeline_parallel} = "
            f"{model_parallel} does not divide {config.world_size} processes: change them or --devices"
        )
    if config.pack_tokens < 0 or (config.pack_tokens and config.micro_batch_size != 1):
        raise RunError(
            f"--pack-tokens {config.pack_tokens} packs samples up to it, so --micro-batch-size is 1, got "
            f"{config.micro_batch_size}: leave one of them out"
        )
    if bool(config.pack_tokens) != bool(config.pack_vision_tokens) or config.pack_vision_tokens < 0:
        raise RunError(
            f"--pack-vision-tokens {config.pack_vision_tokens} bounds the same sequences as --pack-tokens "
            f"{config.pack_tokens}: both must be over 0, or leave both out"
        )
    per_step = config.micro_batch_size * config.data_parallel
    if config.global_batch_size % per_step:
        raise RunError(
            f"GBS {config.global_batch_size} is not divisible by MBS {config.micro_batch_size} x "
            f"{config.data_parallel} processes = {per_step}: change --global-batch-size or --micro-batch-size"
        )
    if config.sharding != "none" and config.world_size == 1:
        raise RunError(f"--sharding {config.sharding} divides a model among processes, but there is one: raise "
                       "--devices or leave --sharding out")  # fmt: skip
    if os.environ.get("WORLD_SIZE") and int(os.environ["WORLD_SIZE"]) != config.world_size:
        raise RunError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, --devices {config.devices} x --num-nodes "
            f"{config.num_nodes} says {config.world_size}: make them equal"
        )


def check_parts(config: TrainingConfig) -> None:
    """Raises RunError for parts that cannot be frozen or adapted as asked."""
    if set(config.freeze) == set(PARTS):
        raise RunError(f"--freeze {' '.join(PARTS)} leaves nothing to train: leave one of them out")
    if "language" in config.freeze and config.pipeline_parallel > 1:
        raise RunError(f"--freeze language leaves pipeline stages nothing to train, got --pipeline-parallel "
                       f"{config.pipeline_parallel}: use --tensor-parallel")  # fmt: skip
    check_lora(config)


def check_lora(config: TrainingConfig) -> None:
    """Raises RunError for adapters that cannot be."""
    rank, size = config.lora_rank, config.tensor_parallel
    if rank and "language" in config.freeze:
        raise RunError(
            f"--lora-rank {rank} trains adapters of the language model, but --freeze language trains nothing of it: "
            "leave one of them out (with adapters its own weights are frozen anyway)"
        )
    if rank and config.pipeline_parallel > 1:  # it wants weights with and without decay in every stage
        raise RunError(f"Megatron-core cannot resume --lora-rank {rank} under --pipeline-parallel "
                       f"{config.pipeline_parallel}: use --tensor-parallel")  # fmt: skip
    if rank % size:
        raise RunError(f"--lora-rank {rank} is not divisible by --tensor-parallel {size}: change one of them")


def check_loading(config: TrainingConfig) -> None:
    """Whether transformers loads what --model-dir holds: every tensor but not its numbers, the tokenizer, the
    processor. It takes seconds, of which most are imports. Raises CheckpointError."""
    with importing():
        from dct_qwen2vl.checkpoints.loading import check_directory

    check_directory(config.model_dir)
    note = note_on_old_code(config.model_dir)
    if note and config.rank == 0:
        print(f"Note: {note}", flush=True)


def check(config: TrainingConfig) -> ModelInfo:
    """Everything that can be wrong before training. Raises RunError, CheckpointError or PreparedSetError."""
    check_numbers(config)
    check_parts(config)
    info = check_model(config.model_dir, config.dct)
    check_loading(config)
    check_skipping(config, info)
    check_data(config)
    check_run_folder(config)
    check_same_model(config, info)
    if not (config.run_dir / "finished").is_file():
        check_writable(config)
        check_newest_checkpoint(config)
        check_space(config, forms=2 if info.dct else 1)
    return info


def unknown_to_megatron(model_dir: Path) -> str | None:
    """Why the megatron engine cannot train this model, or None; also where there is no model."""
    config = read_file(model_dir / "config.json")
    if isinstance(config, dict) and config.get("model_type") == "qwen2_5_vl":
        return "--engine megatron has no Qwen2.5-VL, since NeMo 2.4 has none: use --engine automodel"
    for named, default, known in activations_of(config) if isinstance(config, dict) else ():
        if (named or default) not in known:
            return (
                f"--engine megatron has {' and '.join(known)}, not the hidden_act {named!s:.40} of "
                f"{model_dir}: use --engine automodel"
            )
    return None


def activations_of(config: dict[str, Any]) -> list[tuple[Any, str, tuple[str, ...]]]:
    """(hidden_act, its default, those that the megatron engine has) of tower and language model."""
    tower = config.get("vision_config")
    vision = tower.get("hidden_act") if isinstance(tower, dict) else None
    return [(vision, "quick_gelu", TOWER_ACTIVATIONS), (config.get("hidden_act"), "silu", ("silu",))]


def megatron_refusal() -> str | None:
    """Why the megatron engine cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "--engine megatron needs a CUDA device and there is none: use --engine automodel"
    if find_spec("transformer_engine") is None:
        return "--engine megatron needs TransformerEngine: run inside the NeMo container, or use --engine automodel"
    return None


def choose_engine(config: TrainingConfig) -> str:
    """ "auto" becomes what can run here. Raises RunError if what was asked for cannot."""
    reason = "--engine automodel was asked for"
    if config.engine != "automodel":
        reason = unknown_to_megatron(config.model_dir) or megatron_refusal()
    if config.engine == "megatron" and reason:
        raise RunError(reason)
    if not reason:
        if config.precision not in (None, "bf16-mixed"):
            raise RunError(f"--engine megatron trains in bf16-mixed, not {config.precision}: leave --precision out")
        refuse_flags_of("automodel", config, ": add --engine automodel, or leave it out")
        return "megatron"
    refuse_flags_of("megatron", config, f", but {reason}; or leave it out")
    return "automodel"


def refuse_flags_of(engine: str, config: TrainingConfig, why: str) -> None:
    """Checks that settings that only one engine knows have their defaults.

    engine: The engine that is not used.
    config: The settings.
    why: End of the message.

    Raises RunError.
    """
    for each in fields(config):
        if each.metadata["engine"] == engine and getattr(config, each.name) not in (each.default, 0):
            raise RunError(f"{flag_of(each.name)} belongs to the {engine} engine{why}")


def choose_precision(config: TrainingConfig, engine: str) -> str:
    """The precision that was asked for. Otherwise what suits the engine and the device.

    config: The settings.
    engine: "automodel" or "megatron".
    """
    if config.precision:
        return config.precision
    import torch

    return "bf16-mixed" if engine == "megatron" or torch.cuda.is_available() else "32"
