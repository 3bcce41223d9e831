"""Qwen2-VL checkpoint (HF directory) -> the same model reading DCT tokens (HF directory).

    python convert_checkpoint.py --model-dir Qwen2-VL-2B-Instruct --output-dir Qwen2-VL-2B-Instruct-x4 --dct x4

Instead of a preset, a format of one's own: --block 2 28 28 --chroma 420 --num-coefficients 1176 --order weighted, whose
order is computed from this checkpoint's patch embedding.

Only the patch embedding changes: its weight is folded into the coefficient domain (fold_patch_embedding). The other
tensors are memory-mapped and passed through in shards of at most 2 GB, so the model is never in memory twice.
Stock transformers loads the result; its image processor (and dct_tokenizer.py, which defines it) is saved beside the
weights.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoint_files
from checkpoint_files import (
    INDEX,
    PATCH_EMBEDDING,
    PROCESSOR,
    CheckpointError,
    no_patch_embedding,
    open_tensors,
    read_json,
    reads_pixel_patches,
    safetensors_files,
    saved_pixel_bounds,
)

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
MOST_GAIN = 1000  # of detail; more than training could use
REWRITTEN = ("config.json", PROCESSOR, INDEX)


def read_config(model_dir: Path) -> dict:
    """config.json of a pixel Qwen2-VL. Raises CheckpointError."""
    config = checkpoint_files.read_config(model_dir)
    if not reads_pixel_patches(config):
        raise CheckpointError(f"{model_dir / 'config.json'} does not read 2x14x14 pixel patches: is it converted "
                              "already? Use it as it is")  # fmt: skip
    return config


def converted_config(config: dict, num_coefficients: int) -> dict:
    """The config of the same model with a 1x1x1 patch embedding over `num_coefficients` channels."""
    vision = {**config["vision_config"], "in_channels": num_coefficients, "patch_size": 1, "temporal_patch_size": 1}
    # Qwen's released files carry these two under names that transformers ignores; they would contradict the rest.
    vision.pop("in_chans", None)
    vision.pop("spatial_patch_size", None)
    return {**config, "vision_config": vision}


def patch_embedding(files: list[Path]) -> "torch.Tensor":
    """The pixel model's weight [E, 3, 2, 14, 14]. Raises CheckpointError if it is missing."""
    for name, tensors in open_tensors(files, "pt"):
        if name.endswith(PATCH_EMBEDDING):
            return tensors.get_tensor(name)
    raise no_patch_embedding(files)


def folded_tensors(files: list[Path], dct) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(name, tensor) one by one, memory-mapped, the patch embedding folded. Raises CheckpointError if it is missing."""
    from dct_tokenizer import fold_patch_embedding

    found = False
    for name, tensors in open_tensors(files, "pt"):
        tensor = tensors.get_tensor(name)
        if name.endswith(PATCH_EMBEDDING):
            tensor, found = fold_patch_embedding(tensor, dct), True
        yield name, tensor
    if not found:
        raise no_patch_embedding(files)


def write_shards(tensors: Iterator[tuple[str, "torch.Tensor"]], output_dir: Path, shard_bytes: int) -> int:
    """Writes model.safetensors, or numbered shards and their index. Returns the bytes of all tensors."""
    from safetensors.torch import save_file

    temporary, shards, pending, size, total = [], [], {}, 0, 0

    def flush() -> None:
        path = output_dir / f"shard-{len(temporary)}.tmp"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600
        temporary.append(path)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size += nbytes
        total += nbytes
    flush()
    if len(temporary) == 1:
        temporary[0].rename(output_dir / "model.safetensors")
        return total
    weight_map = {}
    for number, (path, names) in enumerate(zip(temporary, shards, strict=True), start=1):
        final = f"model-{number:05d}-of-{len(temporary):05d}.safetensors"
        path.rename(output_dir / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(output_dir / INDEX, index)
    return total


def make_processor(model_dir: Path, dct, min_pixels: int | None, max_pixels: int | None):
    """The DCT processor with the source's pixel bounds, unless given. Raises CheckpointError for another mean, std."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from dct_tokenizer import DCTImageProcessor

    path = model_dir / PROCESSOR
    source = read_json(path) if path.is_file() else {}
    for name, expected in (("image_mean", OPENAI_CLIP_MEAN), ("image_std", OPENAI_CLIP_STD)):
        if source.get(name, expected) != expected:
            raise CheckpointError(f"{path} has {name} {source[name]}; the folding is for Qwen2-VL's {expected}")
    saved = saved_pixel_bounds(model_dir)
    low = saved["min_pixels"] or 56 * 56 if min_pixels is None else min_pixels
    high = saved["max_pixels"] or 28 * 28 * 1280 if max_pixels is None else max_pixels
    if low < 1 or high < 1:
        raise CheckpointError(f"min_pixels {low} and max_pixels {high} must be at least 1: change --min-pixels or "
                              "--max-pixels")  # fmt: skip
    if low > high:
        raise CheckpointError(f"min_pixels {low} is over max_pixels {high}: change --min-pixels or --max-pixels")
    processor = DCTImageProcessor(dct=dct, min_pixels=low, max_pixels=high)
    processor._set_processor_class("Qwen2VLProcessor")
    return processor


def copy_other_files(model_dir: Path, output_dir: Path) -> None:
    """Tokenizer, chat template, licence, generation config: everything that is not rewritten, byte for byte."""
    for path in sorted(model_dir.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if path.is_file() and path.name not in REWRITTEN and not weights and not path.name.startswith("."):
            shutil.copyfile(path, output_dir / path.name)


def convert(
    model_dir: Path,
    output_dir: Path,
    dct,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes the converted directory under a temporary name and renames it when whole. Returns the bytes of weights.

    dct: a DCTConfig. Raises CheckpointError for an unusable source or an existing output without `force`.
    """
    config = read_config(model_dir)
    merge = config["vision_config"].get("spatial_merge_size", 2)
    if merge != dct.merge:
        raise CheckpointError(f"{model_dir} merges {merge}x{merge} tokens, --dct says {dct.merge}: make them equal")
    files = safetensors_files(model_dir)
    processor = make_processor(model_dir, dct, min_pixels, max_pixels)
    if output_dir.resolve() == model_dir.resolve():
        raise CheckpointError(f"--output-dir must differ from --model-dir, both are {model_dir}")
    if output_dir.exists() and any(output_dir.iterdir()) and not (force and (output_dir / "config.json").is_file()):
        raise CheckpointError(
            f"{output_dir} is not empty: choose another --output-dir, or --force to replace a checkpoint"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        copy_other_files(model_dir, temporary)
        _write_json(temporary / "config.json", converted_config(config, dct.num_coefficients))
        processor.save_pretrained(temporary)
        total = write_shards(folded_tensors(files, dct), temporary, shard_bytes)
        temporary.chmod(0o755)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return total


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def own_format(arguments: argparse.Namespace, weight: "torch.Tensor | None" = None):
    """The DCTConfig of --block and the flags beside it. Raises ValueError, OSError.

    weight: the patch embedding, for the order "weighted"; without it the other flags are checked and the order is not.
    """
    from dct_config import CoefficientTable, DCTConfig

    block = tuple(arguments.block)
    if block[1] != block[2]:
        raise ValueError(f"the image processor needs square blocks, got {block[1]} x {block[2]} px")
    order = "variance" if arguments.order == "weighted" and weight is None else arguments.order
    table = arguments.coefficient_table and CoefficientTable.from_file(arguments.coefficient_table)
    count = arguments.num_coefficients
    words = ["x".join(map(str, block)), arguments.chroma, arguments.order if count else "all"]
    name = "-".join([*words, str(count)] if count else words)
    return DCTConfig.select(block, arguments.chroma, count, name=name, order=order, weight=weight, table=table)


def gain(text: str) -> float:
    value = float(text)
    if not 0 < value <= MOST_GAIN:
        raise argparse.ArgumentTypeError(f"expected a number over 0 and at most {MOST_GAIN}, got {text}")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """With `dct` resolved to a DCTConfig, unless it is a file; an unknown one is a usage error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-dir", type=Path, required=True, help="Hugging Face Qwen2-VL directory (pixel model)")
    parser.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    parser.add_argument("--dct", help="exact, x4, x16 or a DCT configuration as .json (default: x4)")
    own = parser.add_argument_group("another token format, instead of --dct")
    own.add_argument(
        "--block", type=int, nargs=3, metavar=("FRAMES", "ROWS", "COLUMNS"), help="frames and pixels of a token"
    )
    own.add_argument("--chroma", choices=("444", "420"), help="420 has colour at half the resolution (default: 420)")
    own.add_argument("--num-coefficients", type=int, metavar="K", help="floats of a token (default: all)")
    own.add_argument(
        "--order",
        choices=("variance", "weighted", "zigzag", "box"),
        help="which K: by variance (default), by variance times the squared norm of this checkpoint's folded columns, "
        "by frequency, or the low corner",
    )
    own.add_argument(
        "--coefficient-table", type=Path, metavar="FILE", help="made by coefficient_statistics.py (default: built in)"
    )
    parser.add_argument(
        "--detail-gain",
        type=gain,
        default=1,
        metavar="G",
        help="make the coefficients that the pixel model's patch does not show G times as large, so that training at a "
        "low rate learns them sooner (default: 1)",
    )
    parser.add_argument("--min-pixels", type=int, help="least pixels of a picture (default: the source's)")
    parser.add_argument("--max-pixels", type=int, help="most pixels of a picture (default: the source's)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in --output-dir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    beside = ("chroma", "num_coefficients", "order", "coefficient_table")
    alone = [name for name in beside if getattr(arguments, name) is not None]
    if arguments.block is None and alone:
        parser.error(f"argument --{alone[0].replace('_', '-')}: needs --block, as in --block 2 28 28")
    if arguments.block is not None and arguments.dct is not None:
        parser.error("argument --block: not allowed with argument --dct")
    arguments.chroma, arguments.order = arguments.chroma or "420", arguments.order or "variance"
    resolve_format(parser, arguments)
    return arguments


def resolve_format(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sets `arguments.dct` to a DCTConfig, unless it is a file; an impossible one is a usage error."""
    from dct_tokenizer import DCTConfig

    if (arguments.dct or "").endswith(".json"):
        return
    try:
        arguments.dct = own_format(arguments) if arguments.block else DCTConfig.preset(arguments.dct or "x4")
    except (ValueError, OSError) as error:
        parser.error(f"argument {'--block' if arguments.block else '--dct'}: {error}")


def read_format(path: str):
    """The DCTConfig in a file. Raises CheckpointError, OSError."""
    from dct_tokenizer import DCTConfig

    try:
        return DCTConfig.from_file(path)
    except ValueError as error:
        raise CheckpointError(f"{error}: give --dct a file that DCTConfig.save wrote") from error


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    dct = arguments.dct
    try:
        if isinstance(dct, str):
            dct = read_format(dct)
        if arguments.block and arguments.order == "weighted":
            read_config(arguments.model_dir)
            dct = own_format(arguments, patch_embedding(safetensors_files(arguments.model_dir)))
        dct = dct.with_detail_gain(arguments.detail_gain)
        total = convert(
            arguments.model_dir,
            arguments.output_dir,
            dct,
            arguments.min_pixels,
            arguments.max_pixels,
            arguments.force,
        )
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    side = dct.block[1] * dct.merge
    print(f"Folded the patch embedding: {dct.name}, blocks of {dct.block} -> {dct.num_coefficients} coefficients.")
    print(f"One token of the language model now covers {side}x{side} px of {dct.block[0]} frames (was 28x28 px of 2).")
    print(f"Wrote {total / 1e6:.1f} MB of weights and the processor to {arguments.output_dir}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
