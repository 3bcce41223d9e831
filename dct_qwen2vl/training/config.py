"""The settings of a training run, and the command line that is made from them.

A new setting is one new field of `TrainingConfig`. Its metadata gives it a flag, bounds and a rule for resumed runs:

    lr: float = setting("how", 1e-5, "peak learning rate", over=0)
"""

import argparse
import sys
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import SHARE_FOR_BOTH
from dct_qwen2vl.common import settings
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.settings import DefaultsFormatter, add_flags, from_flags, setting_of
from dct_qwen2vl.common.video_sampling import PREFIX, VideoSampling

PARTS = ("vision", "projector", "language")
GROUPS = {"what": "model and data", "how": "optimization", "where": "machine, speed and output"}  # of the flags
SEQUENCE_TOKENS, SEQUENCES_PER_STEP = 8192, 16  # of packed sequences, where the command line does not say
STEP_TOKENS = SEQUENCE_TOKENS * SEQUENCES_PER_STEP  # about as many where the device's memory sets their size
NEWEST = sys.maxsize  # the step of --export where none is given: no run has as many

# What a resumed run may do with a setting. It repeats the samples and losses of an uninterrupted run only if the
# settings under SAME and DATA are what they were.
SAME = "same"  # keep it
DATA = "data"  # keep it, unless --restart-data restarts the data
FREE = "free"  # change it


class RunError(UserError):
    """The run cannot start or go on. The message is one line: what, where, what to type next."""


@dataclass(frozen=True)
class ModelInfo:
    """What the checks need to know of a checkpoint: the name of its token format ("none" for pixels) and its dict."""

    dct_name: str
    dct: dict[str, Any] | None


def setting(
    group: str | None,
    default: Any,
    help: str = "",
    *,
    engine: str | None = None,
    resume: str = SAME,
    flag: str | None = None,
    recorded: bool = True,
    **options: Any,
) -> Any:
    """A field of `TrainingConfig` with its metadata.

    engine: the only engine that knows it. With the other engine it must keep its default or be 0.
    resume: what a resumed run may do with it.
    flag: what messages call it (default: its own flag).
    recorded: whether run.json holds it.
    group: name in GROUPS of the flag's group; None for no flag.
    default, help, options: as `common.settings.setting` has them.
    """
    more = {"engine": engine, "resume": resume, "flag": flag, "recorded": recorded}
    return settings.setting(group and GROUPS[group], default, help, **more, **options)


def _video_setting(name: str) -> Any:
    """A field of `VideoSampling`."""
    more = {"group": GROUPS["what"], "engine": None, "resume": DATA, "flag": None, "recorded": True}
    return setting_of(VideoSampling, name, PREFIX, **more)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the engines, the run folder and LoRA take; run.json is `asdict` of it and the numbers derived from it.

    None means that a setting was not given. `resolved` replaces the None of engine, precision and batch, and
    `checks.choose_skip_share` that of the share.
    """

    model_dir: Path = setting(
        "what", MISSING, "Hugging Face directory from convert_checkpoint.py; with --dct none, a pixel model"
    )
    data_dir: Path = setting("what", MISSING, "folder of shards after `energon prepare`", resume=DATA)
    output_dir: Path = setting("what", Path("experiments"), "gets one folder for each experiment", resume=FREE)
    experiment_name: str = setting("what", "qwen2vl_dct", "name of the run's folder", resume=FREE)
    dct: str | None = setting(
        "what",
        None,
        "token format that the checkpoint must have: exact, x4, x16, FILE.json, or none for a pixel model (default: "
        "any but none)",
        resume=FREE,
    )
    min_pixels: int | None = setting(
        "what", None, "least pixels of an image (default: the checkpoint's)", at_least=1, resume=DATA
    )
    max_pixels: int | None = setting(
        "what", None, "most pixels of an image (default: the checkpoint's)", at_least=1, resume=DATA
    )
    skip_db: float | None = setting(
        "what",
        None,
        "leave out cells of images and videos that a kept cell already shows with this PSNR in dB, 38 for example; 0: "
        "none (default: the checkpoint's)",
        at_least=0,
        resume=DATA,
    )
    skip_noise_floor: bool = setting(
        "what",
        False,
        "with --skip-db: measure the noise between steps of a video and let cells go that differ by no more",
        resume=DATA,
    )
    skip_share: float | None = setting(
        "what",
        None,
        "where cells are left out: in this share of the training samples; the others keep all cells, so that the model "
        f"also learns to read without skipping, as its stock form does (default: {SHARE_FOR_BOTH:g}, or what the run "
        "began with)",
        over=0,
        at_most=1,
        resume=DATA,
    )
    video_fps: float = _video_setting("fps")
    video_min_frames: int = _video_setting("min_frames")
    video_max_frames: int = _video_setting("max_frames")
    video_total_pixels: int = _video_setting("total_pixels")
    seq_length: int = setting("what", 2048, "most tokens of a sample; longer ones are skipped", at_least=1, resume=DATA)

    max_steps: int = setting("how", 1000, "optimizer steps", at_least=1)
    micro_batch_size: int | None = setting(
        "how",
        None,
        "samples of one forward pass of one process (default: 1; megatron: packed sequences)",
        at_least=1,
        resume=DATA,
    )
    global_batch_size: int | None = setting(
        "how",
        None,
        "samples of one optimizer step, or packed sequences (default: 32 samples; sequences of about "
        f"{STEP_TOKENS} tokens together, or {SEQUENCES_PER_STEP} where --pack-tokens is given)",
        at_least=1,
        resume=DATA,
    )
    lr: float = setting("how", 1e-5, "peak learning rate", over=0)
    min_lr: float = setting("how", 1e-6, "learning rate at the end of the cosine", at_least=0, not_over="lr")
    warmup_steps: int = setting("how", 30, "steps of linear warm-up", at_least=0)
    weight_decay: float = setting("how", 0.05, "AdamW's, for weight matrices only", at_least=0)
    adam_beta2: float = setting("how", 0.98, "AdamW's beta2", at_least=0, below=1)
    max_gradient_norm: float = setting("how", 1.0, "gradients are clipped to this norm; 0: not clipped", at_least=0)
    freeze: tuple[str, ...] = setting("how", (), "parts that are not trained", choices=PARTS, nargs="*")
    lora_rank: int = setting(
        "how",
        0,
        "train adapters of this rank (arXiv 2106.09685) in place of the language model's weights; 0: the weights",
        at_least=0,
    )
    lora_alpha: int = setting(
        "how", 32, "scale of adapters: what they add is multiplied by it and divided by --lora-rank", at_least=1
    )
    seed: int = setting("how", 42, "for shuffling and for new adapters", resume=DATA)

    engine: str = setting(
        "where",
        "auto",
        "auto: megatron if it can run, otherwise automodel",
        choices=("auto", "automodel", "megatron"),
        resume=FREE,
    )
    # "auto" resolved; this must stay when a run goes on, whatever was typed.
    chosen_engine: str | None = setting(None, None, flag="--engine")
    pack_tokens: int | None = setting(
        "where",
        None,
        "megatron: a micro-batch is one packed sequence with at most so many tokens; 0: a sequence of "
        "--micro-batch-size samples (default: what the device's memory holds, or 0 where --micro-batch-size is given)",
        engine="megatron",
        resume=DATA,
    )
    pack_vision_tokens: int | None = setting(
        "where",
        None,
        "megatron: most tokens of the vision tower in a packed sequence (default: twice --pack-tokens)",
        engine="megatron",
        resume=DATA,
    )
    memory_limit: float | None = setting(
        "where",
        None,
        "megatron: take no more of each device's memory, GiB (default: all that is free)",
        over=0,
        engine="megatron",
        resume=FREE,
        recorded=False,
    )
    packing_buffer: int = setting(
        "where", 512, "samples from which a loader process fills packed sequences", at_least=1, resume=DATA
    )
    tensor_parallel: int = setting(
        "where", 1, "megatron: processes that share each layer", at_least=1, engine="megatron", resume=FREE
    )
    pipeline_parallel: int = setting(
        "where", 1, "megatron: processes that divide the layers among them", at_least=1, engine="megatron", resume=FREE
    )
    recompute: bool = setting(
        "where",
        False,
        "megatron: compute activations again in the backward pass: less memory, a third more arithmetic",
        engine="megatron",
        resume=FREE,
    )
    sharding: str = setting(
        "where",
        "none",
        "automodel: fsdp2 divides weights, gradients and optimizer among the processes, none gives each process a copy",
        choices=("none", "fsdp2"),
        engine="automodel",
        resume=FREE,
    )
    profile: int | None = setting(
        "where",
        None,
        "write a trace of this step to RUN/profile",
        at_least=1,
        not_over="max_steps",
        metavar="STEP",
        resume=FREE,
    )
    devices: int = setting("where", 1, "processes of one node", at_least=1, resume=FREE)
    num_nodes: int = setting("where", 1, "nodes", at_least=1, resume=FREE)
    precision: str | None = setting(
        "where", None, "of the arithmetic (default: 32 on a CPU, bf16-mixed on a GPU)", choices=("32", "bf16-mixed")
    )
    num_workers: int = setting("where", 2, "loader processes of each process", at_least=0, resume=DATA)
    shuffle_buffer: int = setting(
        "where", 1000, "samples among which a loader process shuffles", at_least=1, resume=DATA
    )
    max_bad_in_a_row: int = setting(
        "where", 100, "so many unusable samples in a row stop the run", at_least=1, resume=FREE
    )
    val_interval: int = setting("where", 200, "steps between validations", at_least=1, resume=FREE)
    val_batches: int | None = setting(
        "where", None, "micro-batches of one validation (default: the whole val split)", at_least=1, resume=FREE
    )
    save_interval: int = setting(
        "where", 200, "steps between checkpoints; 0: none are written", at_least=0, resume=FREE
    )
    keep: int = setting("where", 2, "how many of the newest checkpoints are kept", at_least=1, resume=FREE)
    compare_samples: int = setting(
        "where",
        3,
        "samples on which the two forms of a DCT model are compared before and after training; 0: none",
        at_least=0,
        resume=FREE,
        recorded=False,
    )
    log_interval: int = setting("where", 10, "steps between progress lines", at_least=1, resume=FREE)
    restart_data: bool = setting(
        "where",
        False,
        "resume weights and optimizer, but begin the data from the start; settings of the data may then change",
        resume=FREE,
    )
    wandb_project: str | None = setting("where", None, "log to this Weights & Biases project as well", resume=FREE)
    export: int | None = setting(
        "where",
        None,
        "train nothing: write the model of this step's checkpoint to RUN/exported (default: the newest checkpoint's)",
        at_least=0,
        nargs="?",
        const=NEWEST,
        metavar="STEP",
        resume=FREE,
        recorded=False,
    )
    check: bool = setting(
        "where", False, "only check that the run can start; prints nothing if it can", resume=FREE, recorded=False
    )
    debug: bool = setting("where", False, "show the traceback of an error", resume=FREE, recorded=False)
    rank: int = setting(None, 0, resume=FREE)  # of this process, from torchrun
    data_restarts: int = setting(None, 0, resume=FREE)
    train_shards: str | None = setting(None, None, resume=FREE, recorded=False)  # fingerprint
    # Which of pack_tokens and pack_vision_tokens were chosen for the device's memory, and are to be tried there.
    chosen_sizes: tuple[str, ...] = setting(None, (), resume=FREE, recorded=False)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.output_dir / self.experiment_name

    @property
    def pixel_bounds(self) -> dict[str, int]:
        """Those given; the others are the checkpoint's."""
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in bounds.items() if value is not None}

    @property
    def processor_settings(self) -> dict[str, Any]:
        """What the image processor has otherwise than the checkpoint's, now and where it is saved."""
        return {**self.pixel_bounds, **self._skipping}

    @property
    def _skipping(self) -> dict[str, Any]:
        """A threshold that is given brings its own noise floor, on or off. The share is always the run's own."""
        floor, share = {"skip_noise_floor": self.skip_noise_floor or None}, {"skip_share": self.skip_share}
        if self.skip_db is None:
            return {**(floor if self.skip_noise_floor else {}), **share}
        return {"skip_db": self.skip_db or None, **floor, **share}

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.devices * self.num_nodes

    @property
    def data_parallel(self) -> int:
        """Processes that read different samples."""
        return max(1, self.world_size // (self.tensor_parallel * self.pipeline_parallel))

    @property
    def accumulate(self) -> int:
        """Micro-batches of one process in one optimizer step, once resolved."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    def resolved(self, engine: str, precision: str) -> "TrainingConfig":
        """The settings for one engine. Micro-batch, packed sequence and step get numbers where none were given.

        engine: "automodel" or "megatron".
        precision: "32" or "bf16-mixed".
        """
        packs = engine == "megatron" and self.micro_batch_size is None
        pack_tokens = _given(self.pack_tokens, SEQUENCE_TOKENS if packs else 0)
        wanted = -(-STEP_TOKENS // pack_tokens) if self.chosen_sizes else SEQUENCES_PER_STEP
        sequences = -(-wanted // self.data_parallel) * self.data_parallel
        return replace(
            self,
            chosen_engine=engine,
            precision=precision,
            micro_batch_size=_given(self.micro_batch_size, 1),
            global_batch_size=_given(self.global_batch_size, sequences if pack_tokens else 32),
            pack_tokens=pack_tokens,
            pack_vision_tokens=_given(self.pack_vision_tokens, 2 * pack_tokens),
        )


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


# Properties that run.json holds as well.
DERIVED: dict[str, dict[str, Any]] = {
    "world_size": {"resume": FREE},
    "run_dir": {"resume": FREE},
    "pixel_bounds": {"resume": FREE},
    "data_parallel": {"resume": DATA, "flag": "--devices x --num-nodes"},
    "accumulate": {"resume": FREE},
}


def metadata_of(kind: type[TrainingConfig]) -> dict[str, dict[str, Any]]:
    """Name -> metadata of every field and derived number."""
    return {**{each.name: dict(each.metadata) for each in fields(kind)}, **DERIVED}


def parse_arguments(
    argv: list[str] | None, kind: type[TrainingConfig] = TrainingConfig, program: str | None = None
) -> TrainingConfig:
    """The settings on the command line.

    argv: Arguments. None: those of the process.
    kind: `TrainingConfig`, or a subclass with more fields.
    program: Its name in messages. None: that of the file that runs.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Fine-tunes a Qwen2-VL on prepared shards with NeMo. qwen_launch.sh starts it through torchrun.",
        formatter_class=DefaultsFormatter,
    )
    add_flags(parser, kind)
    config = from_flags(kind, parser.parse_args(argv))
    return replace(config, freeze=tuple(sorted(set(config.freeze))))  # their order and repetition mean nothing
