"""A pixel Qwen2-VL directory -> the same model reading DCT tokens.

Weights are memory-mapped and passed through in shards of at most 2 GB.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.checkpoints import inspection
from dct_qwen2vl.checkpoints.inspection import (
    INDEX,
    PATCH_EMBEDDING,
    PROCESSOR,
    STOCK_FORM,
    CheckpointError,
    no_patch_embedding,
    open_tensors,
    own_pixel_bounds,
    read_json,
    reads_pixel_patches,
    safetensors_files,
    unfolded_format,
    with_patch,
)
from dct_qwen2vl.common.files import write_json

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 2_000_000_000


REWRITTEN = ("config.json", PROCESSOR, INDEX, STOCK_FORM)


def read_config(model_dir: Path) -> dict:
    """config.json of a pixel Qwen2-VL. Raises CheckpointError."""
    config = inspection.read_config(model_dir)
    unfolded = unfolded_format(model_dir)
    if not reads_pixel_patches(config) and unfolded:
        raise CheckpointError(f"{model_dir} is the stock form of a DCT model ({unfolded['name']}): its coefficient "
                              "form is made with --to dct")  # fmt: skip
    if not reads_pixel_patches(config):
        raise CheckpointError(f"{model_dir / 'config.json'} does not read 2x14x14 pixel patches: is it converted "
                              "already? Use it as it is")  # fmt: skip
    return config


def converted_config(config: dict, num_coefficients: int) -> dict:
    """The config of the same model with a 1x1x1 patch embedding over `num_coefficients` channels."""
    config = with_patch(config, num_coefficients, 1, 1)
    vision = config["vision_config"]
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
    from dct_qwen2vl.dct.folding import fold_patch_embedding

    def fold(weight: "torch.Tensor") -> "torch.Tensor":
        try:
            return fold_patch_embedding(weight, dct)
        except ValueError as error:
            raise CheckpointError(f"{files[0].parent}: {error}: get the files again") from error

    return changed_tensors(files, fold)


def changed_tensors(
    files: list[Path], change: Callable[["torch.Tensor"], "torch.Tensor"]
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(name, tensor) one by one, memory-mapped; the patch embedding is changed. Raises CheckpointError."""
    found = False
    for name, tensors in open_tensors(files, "pt"):
        tensor = tensors.get_tensor(name)
        if name.endswith(PATCH_EMBEDDING):
            tensor, found = change(tensor), True
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
    write_json(output_dir / INDEX, index)
    return total


def make_processor(model_dir: Path, dct, min_pixels: int | None, max_pixels: int | None):
    """The DCT processor with the source's pixel bounds, unless given. Raises CheckpointError for another mean, std."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

    path = model_dir / PROCESSOR
    source = read_json(path) if path.is_file() else {}
    for name, expected in (("image_mean", OPENAI_CLIP_MEAN), ("image_std", OPENAI_CLIP_STD)):
        if source.get(name, expected) != expected:
            raise CheckpointError(f"{path} has {name} {source[name]}; the folding is for Qwen2-VL's {expected}")
    own_low, own_high = own_pixel_bounds(model_dir)
    low = own_low if min_pixels is None else min_pixels
    high = own_high if max_pixels is None else max_pixels
    if low < 1 or high < 1:
        raise CheckpointError(f"min_pixels {low} and max_pixels {high} must be at least 1: change --min-pixels or "
                              "--max-pixels")  # fmt: skip
    if low > high:
        raise CheckpointError(f"min_pixels {low} is over max_pixels {high}: change --min-pixels or --max-pixels")
    processor = DCTImageProcessor(dct=dct, min_pixels=low, max_pixels=high)
    # transformers 4 has _set_processor_class for it, 5 has not.
    processor._processor_class = inspection.MODEL_TYPES[inspection.read_config(model_dir)["model_type"]]
    return processor


def copy_other_files(model_dir: Path, output_dir: Path, without: tuple[str, ...] = ()) -> None:
    """Tokenizer, chat template, licence, generation config: everything that is not rewritten, byte for byte.

    without: ends of names. Files with these names are left out.
    """
    for path in sorted(model_dir.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        unwanted = path.name in REWRITTEN or path.name.endswith(without) or path.name.startswith(".")
        if path.is_file() and not weights and not unwanted:
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
    with new_directory(model_dir, output_dir, force) as temporary:
        copy_other_files(model_dir, temporary)
        write_json(temporary / "config.json", converted_config(config, dct.num_coefficients))
        processor.save_pretrained(temporary)
        return write_shards(folded_tensors(files, dct), temporary, shard_bytes)


@contextlib.contextmanager
def new_directory(model_dir: Path, output_dir: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder, which gets the name `output_dir` at the end of the block; after an error nothing is left of
    it. Raises CheckpointError for an `output_dir` that may not be replaced."""
    if output_dir.resolve() == model_dir.resolve():
        raise CheckpointError(f"--output-dir must differ from --model-dir, both are {model_dir}")
    if output_dir.exists() and any(output_dir.iterdir()) and not (force and (output_dir / "config.json").is_file()):
        raise CheckpointError(
            f"{output_dir} is not empty: choose another --output-dir, or --force to replace a checkpoint"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
