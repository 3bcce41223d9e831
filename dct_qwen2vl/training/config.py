"""The command line of finetune_qwen2vl.py."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RunError(ValueError):
    """The run cannot start or go on. The message is one line: what, where, what to type next."""


@dataclass(frozen=True)
class ModelInfo:
    """What the checks need to know of a checkpoint: the name of its token format ("none" for pixels) and its dict."""

    dct_name: str
    dct: dict[str, Any] | None


PARTS = ("vision", "projector", "language")


ROW_TOKENS, ROWS_PER_STEP = 8192, 16  # of packed rows, where the command line does not say


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
