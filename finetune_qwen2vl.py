"""Fine-tunes a Qwen2-VL on prepared shards with NeMo. qwen_launch.sh starts it through torchrun.

    python finetune_qwen2vl.py --model-dir M --data-dir D --output-dir O --experiment-name E ...

Writes into O/E: checkpoints/, hf/ (the fine-tuned model, a plain Qwen2-VL), hf_dct/ (the same model over
DCT coefficients, to train further), metrics.jsonl, tensorboard/, logs/, run.json.
If it is started again with the same arguments, it resumes from the newest checkpoint. With --export as well, it writes
the model of a checkpoint to O/E/exported and trains nothing.
"""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from dct_qwen2vl.checkpoints.inspection import read_config, time_step
from dct_qwen2vl.common.imports import importing
from dct_qwen2vl.common.scripts import INTERRUPTED_CODE, UserError, leave
from dct_qwen2vl.data.energon_files import fingerprint_of_shards
from dct_qwen2vl.training import run_lock
from dct_qwen2vl.training.checks import (
    check,
    check_ranges,
    choose_engine,
    choose_min_pixels,
    choose_precision,
    choose_skip_share,
    say_skipping,
)
from dct_qwen2vl.training.config import ModelInfo, RunError, TrainingConfig, parse_arguments
from dct_qwen2vl.training.export import export
from dct_qwen2vl.training.final_model import tell_where, write_stock_form
from dct_qwen2vl.training.processes import (
    CONTINUE,
    INTERRUPTED,
    PEER_ENDED,
    TORCHRUN,
    Interrupted,
    end_with_launcher,
    forget_what_torchrun_has_not_set,
    interruptible,
    let_others_begin,
    told_by_machine,
    wait_for_first,
)
from dct_qwen2vl.training.run_file import count_data_restarts, write_run_file
from dct_qwen2vl.training.sequence_size import as_begun, choose_size, leaves_size_open

BROKEN_TAR = "tarfile.ReadError: "  # in a traceback; from a loader process the error arrives as text


def load_processor(config: TrainingConfig, info: ModelInfo):
    """The checkpoint's tokenizer and image processor, the latter with the settings of the command line. Raises
    CheckpointError for a token format that contradicts itself."""
    from transformers import AutoTokenizer

    from dct_qwen2vl.checkpoints.hf_folder import load_image_processor

    tokenizer = AutoTokenizer.from_pretrained(config.model_dir)
    return tokenizer, load_image_processor(config.model_dir, info.dct, **config.processor_settings)


def build_task_encoder(config: TrainingConfig, info: ModelInfo, packed: bool):
    """packed: gives packed sequences instead of padded batches."""
    from dct_qwen2vl.data.sample_encoder import SkippingShare
    from dct_qwen2vl.data.videos import VideoSampling
    from task_encoder import PackingTaskEncoder, QwenTaskEncoder

    options = {
        "seq_length": config.seq_length,
        "video_sampling": VideoSampling.of(config),
        "max_bad_in_a_row": config.max_bad_in_a_row,
        "skipping": SkippingShare(config.skip_share, config.seed),
    }
    tokenizer, processor = load_processor(config, info)
    model = read_config(config.model_dir)
    options["time_step"] = time_step(model, processor.temporal_patch_size, config.video_fps)
    if packed:
        return PackingTaskEncoder(
            tokenizer,
            processor,
            pack_tokens=config.pack_tokens,
            pack_vision_tokens=config.pack_vision_tokens,
            **options,
        )
    return QwenTaskEncoder(tokenizer, processor, **options)


def build_data(config: TrainingConfig, info: ModelInfo, engine: str):
    """The Energon data module, the same for both engines but for packing."""
    from dct_qwen2vl.data.loader import EnergonDataModule

    several = config.data_parallel < config.world_size
    return EnergonDataModule(
        config.data_dir,
        build_task_encoder(config, info, packed=engine == "megatron"),
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        total_batches=config.max_steps * config.accumulate,
        num_workers=config.num_workers,
        # Megatron-core counts tensor-parallel processes first, then data-parallel ones, then pipeline stages.
        rank=config.rank // config.tensor_parallel % config.data_parallel,
        world_size=config.data_parallel,
        seed=config.seed,
        val_batches=config.val_batches,
        shuffle_buffer_size=config.shuffle_buffer,
        packing_buffer_size=config.packing_buffer if config.pack_tokens else None,
        restart_data=config.restart_data,
        restarts=config.data_restarts,
        data_parallel_group=_megatron_data_group if several else None,
    )


def _megatron_data_group():
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group_gloo()


def train(config: TrainingConfig, info: ModelInfo) -> None:
    """Builds the parts and runs the engine."""
    engine = config.chosen_engine
    if config.rank == 0:
        run_lock.lock(config.run_dir)
        let_others_begin()
        write_run_file(config, info)
        print(f"Engine {engine}, token format {info.dct_name}, {config.world_size} process(es), GBS "
              f"{config.global_batch_size}, run folder {config.run_dir}{say_skipping(config)}", flush=True)  # fmt: skip
        if config.warmup_steps >= config.max_steps:
            print(f"Note: --warmup-steps {config.warmup_steps} is not below --max-steps {config.max_steps}: the run "
                  "ends before the learning rate falls again", flush=True)  # fmt: skip
        if engine == "megatron":
            with importing():  # TransformerEngine and then PyTorch load cuDNN; where there are two, not vice versa
                engine_module(engine)
        if not (config.run_dir / "comparison" / "before" / "comparison.json").is_file():
            compare_forms(config, info, "before", config.model_dir)
    else:
        wait_for_first()
    with importing():
        import lightning.pytorch as pl

        from dct_qwen2vl.training.profile_step import ProfileStep

        pl.seed_everything(config.seed)
        data = build_data(config, info, engine)
        if config.rank == 0 and not data.validates:
            print(f"Note: the val split of {config.data_dir} is empty, so there is no validation", flush=True)
        callbacks = [ProfileStep(config.profile, config.run_dir / "profile")] if config.profile else []
        chosen = engine_module(engine)
    chosen.run(config, info, data, data.task_encoder.image_processor.merge_size, callbacks)
    if config.rank == 0:
        write_stock_form(info, config.run_dir)
        compare_forms(config, info, "after", config.run_dir / "hf_dct", config.run_dir / "hf")


def engine_module(engine: str) -> ModuleType:
    """The module that trains; its import is slow.

    engine: "automodel" or "megatron".
    """
    if engine == "megatron":
        from dct_qwen2vl.training import megatron as chosen
    else:
        # Nothing is compiled; Megatron-core, which NeMo imports, would start processes that could.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from dct_qwen2vl.training import automodel as chosen
    return chosen


def compare_forms(
    config: TrainingConfig, info: ModelInfo, when: str, model_dir: Path, stock_dir: Path | None = None
) -> None:
    """Writes to RUN_DIR/comparison/WHEN whether a DCT model and its stock form give the same logits."""
    if not info.dct or not config.compare_samples:
        return
    from dct_qwen2vl.data.videos import VideoSampling
    from dct_qwen2vl.evaluation.comparison import compare_for_run

    folder, reading = config.run_dir / "comparison" / when, vars(VideoSampling.of(config))
    source = (config.data_dir, config.compare_samples)
    compare_for_run(folder, model_dir, stock_dir, *source, sampling=reading, bounds=config.pixel_bounds)


def explain(error: Exception) -> str | None:
    """One line for errors that are the data's or the environment's, None for a bug."""
    marker = "TooManyBadSamples: "  # Energon wraps it, and from a loader process it arrives as text
    trace = "".join(traceback.format_exception(error))
    if marker in trace:
        return trace.split(marker)[1].split("\n")[0]
    if BROKEN_TAR in trace:
        said = trace.split(BROKEN_TAR)[-1].split("\n")[0]
        return f"a shard is damaged ({said}): python data_preparation.py --output-dir SHARDS --verify says which"
    if not isinstance(error, UserError) and (line := told_by_machine(trace)):
        return line
    if any(words in trace for words in PEER_ENDED):
        return "another process of this run has ended, so this one ends as well"
    if type(error).__name__ == "SIGTERMException":  # Lightning's, whose import is slow
        return f"ended by SIGTERM; {CONTINUE}"
    return str(error) if isinstance(error, UserError) else None


def main(argv: list[str] | None = None) -> int:
    forget_what_torchrun_has_not_set(os.environ)
    end_with_launcher()
    config = replace(parse_arguments(argv), rank=int(os.environ.get("RANK", 0)))
    try:
        with interruptible() as interrupts:
            status = run_or_tell(config, interrupts)
            if config.check and argv is None:  # it holds nothing that Python's own end would close
                leave(status)
        return status
    except Interrupted:
        if config.debug:
            raise
    if TORCHRUN not in os.environ:  # else the launcher says it
        print(f"finetune_qwen2vl.py: {INTERRUPTED}", file=sys.stderr)
    return INTERRUPTED_CODE


def run_or_tell(config: TrainingConfig, interrupts: list[int]) -> int:
    """Returns the exit status. Raises Interrupted after Ctrl-C, whatever a library has made of it.

    interrupts: what `interruptible` gives.
    """
    try:
        return run(config)
    except BaseException as error:
        if config.debug or isinstance(error, Interrupted):
            raise
        if interrupts:
            raise Interrupted from error
        return tell(error)


def run(config: TrainingConfig) -> int:
    """Checks, trains, and says where the model is. Returns the exit status."""
    try:
        check_ranges(config)
        if config.export is not None:
            return 0 if config.rank else export(config)
        config, info, note = check_and_size(config, choose_engine(config))
    except UserError as error:
        if config.rank:
            wait_for_first()  # which says the same
            error.told = os.environ.get("LOCAL_RANK", "0") != "0"  # one of a node is enough, where it alone has it
        raise
    shards = fingerprint_of_shards(config.data_dir)
    config = replace(config, data_restarts=count_data_restarts(config), train_shards=shards)
    if config.check:
        if os.environ.get("NODE_RANK", "0") == "0":  # the first node may train when another still checks
            run_lock.check_unlocked(config.run_dir)
        return 0
    if config.world_size > 1 and TORCHRUN not in os.environ:
        raise RunError(f"{config.world_size} processes must be started by torchrun: bash qwen_launch.sh")
    if (config.run_dir / "finished").is_file():
        if config.rank == 0:
            print(f"{config.run_dir} is finished{where_its_model_is(config.run_dir)}", flush=True)
        return 0
    if note and config.rank == 0:
        print(note, flush=True)
    train(config, info)
    if config.rank == 0:
        (config.run_dir / "finished").touch()
        tell_where("the fine-tuned model", config.run_dir, info)
    return 0


def where_its_model_is(run_dir: Path) -> str:
    """Of a finished run, the end of a line."""
    if (run_dir / "hf").is_dir():
        return f": its model is in {run_dir / 'hf'}"
    again = f"remove {run_dir / 'finished'} and run the same command to write it again from the newest checkpoint"
    return f", but its model is no longer in {run_dir / 'hf'}: {again}"


def check_and_size(config: TrainingConfig, engine: str) -> tuple[TrainingConfig, ModelInfo, str | None]:
    """Resolves and checks the settings. The size of packed sequences, where it is left open, is that of the run that
    goes on, or what fits the device; a line says what was chosen. Raises UserError."""
    precision = choose_precision(config, engine)
    config = replace(config, min_pixels=choose_min_pixels(config), skip_share=choose_skip_share(config))
    if leaves_size_open(config, engine):
        config = as_begun(config)
    info = check(config.resolved(engine, precision))
    note = None
    if leaves_size_open(config, engine):
        config, note = choose_size(config)
    return config.resolved(engine, precision), info, note


def tell(error: BaseException) -> int:
    """Shows the error in one line and returns the exit status. Raises what is a bug, or no error."""
    line = explain(error) if isinstance(error, Exception) else None
    if line is None:
        raise error
    if not getattr(error, "told", False):
        print(f"finetune_qwen2vl.py: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
