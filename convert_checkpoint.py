"""Converts a Qwen2-VL checkpoint to the same model reading DCT tokens. Both are Hugging Face directories.

    python convert_checkpoint.py --model-dir Qwen2-VL-2B-Instruct --output-dir Qwen2-VL-2B-Instruct-x4 --dct x4

Flags describe a format of your own in place of a preset: --block 2 28 28 --chroma 420 --num-coefficients 1176
--order weighted. This order is computed from the checkpoint's patch embedding.

Only the patch embedding changes: its weight is folded into the coefficient domain (fold_patch_embedding). The other
tensors are memory-mapped and copied in shards of at most 2 GB, so the model is never in memory twice.
Stock transformers loads the result. Its image processor, with the code that defines it, is saved in the same folder.

    python convert_checkpoint.py --to stock --model-dir MY-x4 --output-dir MY-x4-stock
    python convert_checkpoint.py --to dct --model-dir MY-x4-stock --output-dir MY-x4

The stock form of a DCT model is a plain Qwen2-VL whose patch is the block: it computes the same and needs no code of
this repository. The coefficient form is what is trained (checkpoints/stock_form.py).
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.checkpoints.conversion import convert, patch_embedding
from dct_qwen2vl.checkpoints.inspection import CheckpointError, note_on_skipping, patch_of, read_config
from dct_qwen2vl.checkpoints.source import Source
from dct_qwen2vl.checkpoints.stock_form import to_dct, to_stock
from dct_qwen2vl.common.scripts import UserError, run_main, run_program

if TYPE_CHECKING:
    import torch

MOST_GAIN = 1000  # of detail; more than training could use
Patch = tuple[int, int, int]  # frames, rows, columns


def own_format(arguments: argparse.Namespace, weight: "torch.Tensor | None" = None, patch: Patch | None = None):
    """The DCTConfig of --block and the flags beside it. Raises UserError, OSError.

    weight: the patch embedding, for the order "weighted"; without it the other flags are checked and the order is not.
    patch: that the model reads, (frames, rows, columns); without it Qwen2-VL's.
    """
    from dct_qwen2vl.dct.configuration_dct import PIXEL_PATCH, CoefficientTable, DCTConfig

    block = tuple(arguments.block)
    if block[1] != block[2]:
        raise UserError(f"the image processor needs square blocks, got {block[1]} x {block[2]} px")
    order = "variance" if arguments.order == "weighted" and weight is None else arguments.order
    count = arguments.num_coefficients
    words = ["x".join(map(str, block)), arguments.chroma, arguments.order if count else "all"]
    name = "-".join([*words, str(count)] if count else words)
    with usable():
        table = arguments.coefficient_table and CoefficientTable.from_file(arguments.coefficient_table)
        chosen = {"name": name, "order": order, "weight": weight, "table": table, "patch": patch or PIXEL_PATCH}
        return DCTConfig.select(block, arguments.chroma, count, **chosen)


@contextmanager
def usable() -> Iterator[None]:
    """A format that cannot be is something that the user can mend. Raises UserError for a ValueError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def gain(text: str) -> float:
    value = float(text)
    if not 0 < value <= MOST_GAIN:
        raise argparse.ArgumentTypeError(f"expected a number over 0 and at most {MOST_GAIN}, got {text}")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """With `dct` resolved to a DCTConfig, unless it is a file; an unknown one is a usage error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model-dir", type=Path, required=True, help="Hugging Face directory of a Qwen2-VL or Qwen2.5-VL"
    )
    parser.add_argument(
        "--to",
        choices=("stock", "dct"),
        help="stock: write a DCT model as a plain Qwen2-VL with larger patches, which needs no code of this "
        "repository; dct: write such a model in the form that is trained (default: convert a pixel model)",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    parser.add_argument("--dct", help="exact, x4, x16 or a DCT configuration as .json (default: x4)")
    own = parser.add_argument_group("another token format, instead of --dct")
    own.add_argument(
        "--block", type=int, nargs=3, metavar=("FRAMES", "ROWS", "COLUMNS"), help="block of a token, frames and pixels"
    )
    own.add_argument(
        "--chroma", choices=("444", "420"), help="444: colour at full resolution, 420: at half (default: 420)"
    )
    own.add_argument("--num-coefficients", type=int, metavar="K", help="numbers in a token (default: all)")
    own.add_argument(
        "--order",
        choices=("variance", "weighted", "zigzag", "box"),
        help="which coefficients are kept. variance: those of the largest expected variance (default); weighted: "
        "variance times the squared norm of this checkpoint's folded columns; zigzag: the lowest frequencies; "
        "box: the low corner",
    )
    own.add_argument(
        "--coefficient-table",
        type=Path,
        metavar="FILE",
        help="written by dct_qwen2vl.analysis.coefficient_statistics (default: the built-in table)",
    )
    parser.add_argument(
        "--detail-gain",
        type=gain,
        default=1,
        metavar="G",
        help="make the coefficients beyond the pixel model's patch G times as large, so that training at a low rate "
        "learns them sooner (default: 1)",
    )
    parser.add_argument("--min-pixels", type=int, help="least pixels of an image (default: the source's)")
    parser.add_argument("--max-pixels", type=int, help="most pixels of an image (default: the source's)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in --output-dir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    beside = ("chroma", "num_coefficients", "order", "coefficient_table")
    alone = [name for name in beside if getattr(arguments, name) is not None]
    if arguments.block is None and alone:
        parser.error(f"argument --{alone[0].replace('_', '-')}: needs --block, as in --block 2 28 28")
    if arguments.block is not None and arguments.dct is not None:
        parser.error("argument --block: not allowed with argument --dct")
    named = arguments.dct is not None or arguments.block is not None
    if arguments.to and arguments.detail_gain != 1:
        parser.error(f"argument --detail-gain: not allowed with --to {arguments.to}, which changes no model")
    if arguments.to == "stock" and named:
        parser.error("argument --dct, --block: not allowed with --to stock, which reads the format in --model-dir")
    if arguments.to == "dct" and arguments.order == "weighted":
        parser.error("argument --order: weighted needs a pixel model, not allowed with --to dct")
    arguments.chroma, arguments.order = arguments.chroma or "420", arguments.order or "variance"
    if named or not arguments.to:
        resolve_format(parser, arguments)
    return arguments


def resolve_format(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sets `arguments.dct` to a DCTConfig, unless it is a file; an impossible one is a usage error."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    if (arguments.dct or "").endswith(".json"):
        return
    try:
        arguments.dct = own_format(arguments) if arguments.block else DCTConfig.preset(arguments.dct or "x4")
    except (ValueError, OSError) as error:
        parser.error(f"argument {'--block' if arguments.block else '--dct'}: {error}")


def read_format(path: str):
    """The DCTConfig in a file. Raises CheckpointError, OSError."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    try:
        return DCTConfig.from_file(path)
    except ValueError as error:
        raise CheckpointError(f"{error}: give --dct a file that DCTConfig.save wrote") from error


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    work = change_form_and_say if arguments.to else convert_and_say
    return run_main("convert_checkpoint.py", lambda: work(arguments), arguments.debug)


def change_form_and_say(arguments: argparse.Namespace) -> int:
    folders, bounds = (arguments.model_dir, arguments.output_dir), (arguments.min_pixels, arguments.max_pixels)
    if arguments.to == "stock":
        done = to_stock(*folders, *bounds, arguments.force)
        if done.dct is None:
            print("It is a stock Qwen2-VL: written as transformers 4.51 reads it.")
    if arguments.to == "stock" and done.dct:
        frames, rows, columns = done.dct.block
        print(f"Unfolded the patch embedding: {done.dct.name} is a plain Qwen2-VL with patches of {frames} frames x "
              f"{rows} x {columns} px.")  # fmt: skip
        if note := note_on_skipping(arguments.model_dir):
            print(f"Note: {note}")
    elif arguments.to == "dct":
        dct = read_format(arguments.dct) if isinstance(arguments.dct, str) else arguments.dct
        done = to_dct(*folders, dct, *bounds, arguments.force)
        print(f"Folded the patch embedding: {done.dct.name}, {done.dct.num_coefficients} coefficients a token, leaves "
              f"out {done.left_out:.2g} of its norm.")  # fmt: skip
    say(done.notes)
    print(f"Wrote {done.weight_bytes / 1e6:.1f} MB of weights and the processor to {arguments.output_dir}.")
    return 0


def say(notes: tuple[str, ...]) -> None:
    """What was read otherwise than it is written in the source, a line each."""
    for note in notes:
        print(f"Note: {note}.")


def flags_format(arguments: argparse.Namespace, source: Source, patch: Patch):
    """The DCTConfig that the flags describe for a pixel model. A preset's blocks are in proportion to its patch."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    if arguments.block:
        weight = patch_embedding(source) if arguments.order == "weighted" else None
        return own_format(arguments, weight, patch)
    return DCTConfig.preset(arguments.dct.name, patch)


def convert_and_say(arguments: argparse.Namespace) -> int:
    given = read_format(arguments.dct) if isinstance(arguments.dct, str) else None

    def choose(source: Source):
        patch = patch_of(read_config(source.folder))
        with usable():
            dct = given or flags_format(arguments, source, patch)
            return dct.with_detail_gain(arguments.detail_gain, patch)

    bounds = arguments.min_pixels, arguments.max_pixels
    done = convert(arguments.model_dir, arguments.output_dir, choose, *bounds, arguments.force)
    say(done.notes)
    dct, (frames, before, _) = done.dct, done.patch
    side, before = dct.block[1] * dct.merge, before * dct.merge
    print(f"Folded the patch embedding: {dct.name}, blocks of {dct.block} -> {dct.num_coefficients} coefficients.")
    was = f"was {before}x{before} px of {frames}"
    print(f"One token of the language model now covers {side}x{side} px of {dct.block[0]} frames ({was}).")
    print(f"Wrote {done.weight_bytes / 1e6:.1f} MB of weights and the processor to {arguments.output_dir}.")
    return 0


if __name__ == "__main__":
    run_program("convert_checkpoint.py", main)
