"""Fine-tunes a (converted) Qwen2-VL on prepared shards with NeMo. Started by qwen_launch.sh through torchrun.

    python finetune_qwen2vl.py --model-dir M --data-dir D --output-dir O --experiment-name E ...

Writes into O/E: checkpoints/, hf/ (the fine-tuned model), metrics.jsonl, tensorboard/, logs/, run.json.
Started again with the same arguments it resumes from the newest checkpoint.
"""

import argparse
import json
import math
import os
import sys
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import run_lock
from checkpoint_files import (
    FORMAT_DEFAULTS,
    CheckpointError,
    check_checkpoint,
    read_json,
    saved_pixel_bounds,
)
from energon_files import PreparedSetError, read_counts, read_splits

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
PARTS = ("vision", "projector", "language")
MEGATRON_ONLY = ("tensor_parallel", "pipeline_parallel", "pack_tokens", "pack_vision_tokens", "recompute")
ROW_TOKENS, ROWS_PER_STEP = 8192, 16  # of packed rows, where the command line does not say


class RunError(ValueError):
    """The run cannot start or go on. The message is one line: what, where, what to type next."""


@dataclass(frozen=True)
class ModelInfo:
    """What the checks need to know of a checkpoint: the name of its token format ("none" for pixels) and its dict."""

    dct_name: str
    dct: dict[str, Any] | None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    paths = parser.add_argument_group("what")
    paths.add_argument(
        "--model-dir", type=Path, required=True, help="Hugging Face directory from convert_checkpoint.py"
    )
    paths.add_argument("--data-dir", type=Path, required=True, help="folder of shards after `energon prepare`")
    paths.add_argument(
        "--output-dir", type=Path, default=Path("experiments"), help="holds one folder for each experiment"
    )
    paths.add_argument("--experiment-name", default="qwen2vl_dct", help="name of the run's folder")
    paths.add_argument("--dct", help="refuse a checkpoint of another token format: exact, x4, x16, FILE.json, or "
                       "none to train a pixel model")  # fmt: skip
    paths.add_argument("--min-pixels", type=int, help="least pixels of a picture (default: the checkpoint's)")
    paths.add_argument("--max-pixels", type=int, help="most pixels of a picture (default: the checkpoint's)")
    paths.add_argument("--video-fps", type=float, default=2.0, help="frames read from a second of a clip")
    paths.add_argument("--video-min-frames", type=int, default=4, help="least frames read from a clip that has them")
    paths.add_argument("--video-max-frames", type=int, default=768, help="most frames read from a clip")
    paths.add_argument(
        "--video-total-pixels",
        type=int,
        default=24_576 * 28 * 28,
        help="most pixels of a clip, two frames counted as one",
    )
    paths.add_argument("--seq-length", type=int, default=2048, help="longer samples are skipped and counted, tokens")
    parser_optimizer(parser)
    parser_machine(parser)
    arguments = parser.parse_args(argv)
    arguments.freeze = sorted(set(arguments.freeze))
    return arguments


def parser_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument("--max-steps", type=int, default=1000, help="optimizer steps")
    group.add_argument("--micro-batch-size", type=int, help="samples of one forward pass of one process (default: 1; "
                       "megatron: packed rows)")  # fmt: skip
    group.add_argument("--global-batch-size", type=int, help="samples of one optimizer step, or packed rows (default: "
                       f"32 samples, {ROWS_PER_STEP} rows)")  # fmt: skip
    group.add_argument("--lr", type=float, default=1e-5, help="peak learning rate")
    group.add_argument("--min-lr", type=float, default=1e-6, help="learning rate at the end of the cosine")
    group.add_argument("--warmup-steps", type=int, default=30, help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=0.05, help="of weight matrices")
    group.add_argument("--adam-beta2", type=float, default=0.98, help="AdamW's second momentum")
    group.add_argument(
        "--max-gradient-norm", type=float, default=1.0, help="gradients are clipped to it; 0: not clipped"
    )
    group.add_argument(
        "--freeze",
        nargs="*",
        action="extend",
        default=[],
        choices=PARTS,
        help="parts that are not trained",
    )
    group.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank (arXiv 2106.09685) in "
                       "place of the language model's weights; 0: the weights")  # fmt: skip
    group.add_argument("--lora-alpha", type=int, default=32, help="what the adapters add is multiplied by it and "
                       "divided by --lora-rank")  # fmt: skip
    group.add_argument("--seed", type=int, default=42, help="of shuffling and of adapters")


def parser_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--engine",
        choices=("auto", "automodel", "megatron"),
        default="auto",
        help="auto: megatron where it can run, else automodel",
    )
    group.add_argument("--pack-tokens", type=int, help="megatron: a micro-batch is one row of samples with at most so "
                       f"many tokens together; 0: a row of --micro-batch-size samples (default: {ROW_TOKENS}, or 0 "
                       "where --micro-batch-size is given)")  # fmt: skip
    group.add_argument("--pack-vision-tokens", type=int, help="megatron: and so many tokens of the vision tower "
                       "(default: twice --pack-tokens)")  # fmt: skip
    group.add_argument("--packing-buffer", type=int, default=512, help="samples among which a loader fills rows")
    group.add_argument("--tensor-parallel", type=int, default=1, help="megatron: processes that share each layer")
    group.add_argument("--pipeline-parallel", type=int, default=1, help="megatron: processes that share the layers")
    group.add_argument("--recompute", action="store_true", help="megatron: less memory, a third more arithmetic")
    group.add_argument("--profile", type=int, metavar="STEP", help="write a trace of this step to RUN/profile")
    group.add_argument("--devices", type=int, default=1, help="processes of one node")
    group.add_argument("--num-nodes", type=int, default=1, help="nodes")
    group.add_argument("--precision", choices=("32", "bf16-mixed"), help="default: 32 on a CPU, bf16-mixed on a GPU")
    group.add_argument("--num-workers", type=int, default=2, help="loader processes of one process")
    group.add_argument("--shuffle-buffer", type=int, default=1000, help="samples among which a worker shuffles")
    group.add_argument(
        "--max-bad-in-a-row", type=int, default=100, help="consecutive unusable samples that stop the run"
    )
    group.add_argument("--val-interval", type=int, default=200, help="steps between validations")
    group.add_argument("--val-batches", type=int, help="micro-batches of one validation (default: the whole val split)")
    group.add_argument("--save-interval", type=int, default=200, help="steps between checkpoints; 0: none are written")
    group.add_argument("--keep", type=int, default=2, help="newest checkpoints that are kept")
    group.add_argument("--log-interval", type=int, default=10, help="steps between progress lines")
    group.add_argument(
        "--restart-data",
        action="store_true",
        help="resume weights and optimizer, and begin the data anew: its settings may then differ from before",
    )
    group.add_argument("--wandb-project", help="log to this Weights & Biases project as well")
    group.add_argument("--check", action="store_true", help="only check that the run can start")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


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


def check(arguments: argparse.Namespace) -> ModelInfo:
    """Everything that can be wrong before a heavy import. Raises RunError, CheckpointError or PreparedSetError."""
    check_numbers(arguments)
    check_parts(arguments)
    info = check_model(arguments.model_dir, arguments.dct)
    check_pixel_bounds(arguments)
    check_data(arguments)
    check_run_folder(arguments)
    return info


def write_run_file(arguments: argparse.Namespace, info: ModelInfo) -> None:
    values = {name: _plain(value) for name, value in vars(arguments).items() if name not in ("check", "debug")}
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = arguments.run_dir / ".run.json.tmp"
    temporary.write_text(json.dumps({**values, "token_format": info.dct_name}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(arguments.run_dir / "run.json")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def load_processor(arguments: argparse.Namespace, info: ModelInfo):
    """The checkpoint's tokenizer and image processor, the latter with the pixel bounds of the command line. Raises
    CheckpointError for a token format that contradicts itself."""
    from transformers import AutoTokenizer

    from media_encoder import load_image_processor

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    return tokenizer, load_image_processor(arguments.model_dir, info.dct, **arguments.pixel_bounds)


def build_task_encoder(arguments: argparse.Namespace, info: ModelInfo, rows: bool):
    """rows: of packed rows instead of padded batches."""
    from media import VideoSampling
    from packing import PackingTaskEncoder
    from task_encoder import QwenTaskEncoder

    options = {
        "seq_length": arguments.seq_length,
        "video_sampling": VideoSampling(
            arguments.video_fps, arguments.video_min_frames, arguments.video_max_frames, arguments.video_total_pixels
        ),
        "max_bad_in_a_row": arguments.max_bad_in_a_row,
    }
    tokenizer, processor = load_processor(arguments, info)
    if rows:
        budget = {name: getattr(arguments, name) for name in ("pack_tokens", "pack_vision_tokens")}
        return PackingTaskEncoder(tokenizer, processor, **budget, **options)
    return QwenTaskEncoder(tokenizer, processor, **options)


def build_data(arguments: argparse.Namespace, info: ModelInfo, engine: str):
    """The Energon data module, the same for both engines but for rows."""
    from data_module import EnergonDataModule

    several = arguments.data_parallel < arguments.world_size
    return EnergonDataModule(
        arguments.data_dir,
        build_task_encoder(arguments, info, rows=engine == "megatron"),
        micro_batch_size=arguments.micro_batch_size,
        global_batch_size=arguments.global_batch_size,
        total_batches=arguments.max_steps * arguments.accumulate,
        num_workers=arguments.num_workers,
        # Megatron-core counts tensor-parallel processes first, then data-parallel ones, then pipeline stages.
        rank=arguments.rank // arguments.tensor_parallel % arguments.data_parallel,
        world_size=arguments.data_parallel,
        seed=arguments.seed,
        val_batches=arguments.val_batches,
        shuffle_buffer_size=arguments.shuffle_buffer,
        packing_buffer_size=arguments.packing_buffer if arguments.pack_tokens else None,
        start_anew=arguments.restart_data,
        restarts=arguments.data_restarts,
        data_parallel_group=_megatron_data_group if several else None,
    )


def _megatron_data_group():
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group_gloo()


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


def train(arguments: argparse.Namespace, info: ModelInfo) -> None:
    """Builds the parts and runs the engine."""
    engine = arguments.chosen_engine
    if arguments.rank == 0:
        run_lock.lock(arguments.run_dir)
        write_run_file(arguments, info)
        print(f"Engine {engine}, token format {info.dct_name}, {arguments.world_size} process(es), GBS "
              f"{arguments.global_batch_size}, run folder {arguments.run_dir}", flush=True)  # fmt: skip
        if arguments.warmup_steps >= arguments.max_steps:
            print(f"Note: --warmup-steps {arguments.warmup_steps} of --max-steps {arguments.max_steps}: the learning "
                  "rate does not come down again from --lr, or never gets there", flush=True)  # fmt: skip
    import lightning.pytorch as pl

    from profile_step import ProfileStep

    pl.seed_everything(arguments.seed)
    data = build_data(arguments, info, engine)
    callbacks = [ProfileStep(arguments.profile, arguments.run_dir / "profile")] if arguments.profile else []
    if engine == "megatron":
        import megatron_engine as chosen
    else:
        # Nothing is compiled; Megatron-core, which NeMo imports, would start processes that could.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import automodel_engine as chosen
    chosen.run(arguments, data, data.task_encoder.image_processor.merge_size, callbacks)


def explain(error: Exception) -> str | None:
    """One line for errors that are the data's or the environment's, None for a bug."""
    marker = "TooManyBadSamples: "  # Energon wraps it, and from a loader process it arrives as text
    trace = "".join(traceback.format_exception(error))
    if marker in trace:
        return trace.split(marker)[1].split("\n")[0]
    from training_log import NonFiniteStep, OutOfMemory

    return str(error) if isinstance(error, (RunError, NonFiniteStep, OutOfMemory)) else None


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    arguments.world_size = arguments.devices * arguments.num_nodes
    arguments.rank = int(os.environ.get("RANK", 0))
    arguments.run_dir = arguments.output_dir / arguments.experiment_name
    bounds = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    arguments.pixel_bounds = {name: value for name, value in bounds.items() if value is not None}
    try:
        check_ranges(arguments)
        model_parallel = arguments.tensor_parallel * arguments.pipeline_parallel
        arguments.data_parallel = max(1, arguments.world_size // model_parallel)
        arguments.chosen_engine = choose_engine(arguments)
        arguments.precision = choose_precision(arguments)
        settle_batch(arguments, arguments.chosen_engine)
        info = check(arguments)
        arguments.data_restarts = count_data_restarts(arguments)
        arguments.accumulate = arguments.global_batch_size // (arguments.micro_batch_size * arguments.data_parallel)
        if arguments.check:
            if os.environ.get("NODE_RANK", "0") == "0":  # the first node may train when another still checks
                run_lock.check_unlocked(arguments.run_dir)
            return 0
        if arguments.world_size > 1 and "WORLD_SIZE" not in os.environ:
            raise RunError(f"{arguments.world_size} processes are torchrun's to start: bash qwen_launch.sh")
        if (arguments.run_dir / "finished").is_file():
            print(f"{arguments.run_dir} is finished: its model is in {arguments.run_dir / 'hf'}")
            return 0
        train(arguments, info)
    except Exception as error:
        if arguments.debug:
            raise
        one_line = isinstance(error, (RunError, CheckpointError, PreparedSetError, run_lock.RunFolderError))
        line = str(error) if one_line else explain(error)
        if line is None:
            raise
        if not getattr(error, "told", False):
            print(f"finetune_qwen2vl.py: {line}", file=sys.stderr)
        return 1
    if arguments.rank == 0:
        (arguments.run_dir / "finished").touch()
        print(f"Done: the fine-tuned model is in {arguments.run_dir / 'hf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
