"""Fine-tunes a (converted) Qwen2-VL on prepared shards with NeMo. Started by qwen_launch.sh through torchrun.

    python finetune_qwen2vl.py --model-dir M --data-dir D --output-dir O --experiment-name E ...

Writes into O/E: checkpoints/, hf/ (the fine-tuned model), metrics.jsonl, tensorboard/, logs/, run.json.
Started again with the same arguments it resumes from the newest checkpoint.
"""

import argparse
import os
import sys
import traceback

from dct_qwen2vl.checkpoints.inspection import (
    CheckpointError,
)
from dct_qwen2vl.data.energon_files import PreparedSetError
from dct_qwen2vl.training import run_lock
from dct_qwen2vl.training.checks import check, check_ranges, choose_engine, choose_precision, settle_batch
from dct_qwen2vl.training.config import ModelInfo, RunError, parse_arguments
from dct_qwen2vl.training.run_file import count_data_restarts, write_run_file


def load_processor(arguments: argparse.Namespace, info: ModelInfo):
    """The checkpoint's tokenizer and image processor, the latter with the pixel bounds of the command line. Raises
    CheckpointError for a token format that contradicts itself."""
    from transformers import AutoTokenizer

    from dct_qwen2vl.checkpoints.hf_folder import load_image_processor

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    return tokenizer, load_image_processor(arguments.model_dir, info.dct, **arguments.pixel_bounds)


def build_task_encoder(arguments: argparse.Namespace, info: ModelInfo, rows: bool):
    """rows: of packed rows instead of padded batches."""
    from dct_qwen2vl.data.media import VideoSampling
    from task_encoder import PackingTaskEncoder, QwenTaskEncoder

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
    from dct_qwen2vl.data.loader import EnergonDataModule

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

    from dct_qwen2vl.training.profile_step import ProfileStep

    pl.seed_everything(arguments.seed)
    data = build_data(arguments, info, engine)
    callbacks = [ProfileStep(arguments.profile, arguments.run_dir / "profile")] if arguments.profile else []
    if engine == "megatron":
        from dct_qwen2vl.training import megatron as chosen
    else:
        # Nothing is compiled; Megatron-core, which NeMo imports, would start processes that could.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from dct_qwen2vl.training import automodel as chosen
    chosen.run(arguments, data, data.task_encoder.image_processor.merge_size, callbacks)


def explain(error: Exception) -> str | None:
    """One line for errors that are the data's or the environment's, None for a bug."""
    marker = "TooManyBadSamples: "  # Energon wraps it, and from a loader process it arrives as text
    trace = "".join(traceback.format_exception(error))
    if marker in trace:
        return trace.split(marker)[1].split("\n")[0]
    from dct_qwen2vl.training.log import NonFiniteStep, OutOfMemory

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
