"""A pixel Qwen2-VL directory -> the same model reading DCT tokens.

Weights are memory-mapped and passed through in shards of at most 2 GB.
"""

import contextlib
import fcntl
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.checkpoints import inspection
from dct_qwen2vl.checkpoints.inspection import (
    INDEX,
    PATCH_EMBEDDING,
    PROCESSOR,
    STOCK_FORM,
    CheckpointError,
    chosen_bounds,
    keeps_part_of_a_block,
    note_on_saved_again,
    notes_on_bounds,
    patch_of,
    read_json,
    reads_larger_patches,
    reads_pixel_patches,
    unfolded_format,
    with_patch,
)
from dct_qwen2vl.checkpoints.source import Source, opened
from dct_qwen2vl.checkpoints.video_sampling import write_sampling
from dct_qwen2vl.checkpoints.weights import Stored
from dct_qwen2vl.common.files import write_json

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 2_000_000_000
UNFINISHED = ".unfinished"  # at the end of the name of a folder that is being written
THREE_NUMBERS = [list(types) for types in itertools.product((int, float), repeat=3)]


REWRITTEN = ("config.json", PROCESSOR, INDEX, STOCK_FORM)


@dataclass(frozen=True)
class Converted:
    """What was written.

    dct: DCTConfig. The token format; None for a stock Qwen2-VL that was only normalised.
    weight_bytes: Of all tensors.
    left_out: Share of the patch embedding's norm that the format cannot represent; 0 unless a stock form was folded.
    notes: Lines, one for each thing of the source that was normalised.
    patch: (frames, rows, columns) that a folded pixel model read.
    """

    dct: Any
    weight_bytes: int
    left_out: float = 0.0
    notes: tuple[str, ...] = ()
    patch: tuple[int, int, int] | None = None


def read_config(model_dir: Path) -> dict:
    """config.json of a pixel Qwen2-VL. Raises CheckpointError."""
    config = inspection.read_config(model_dir)
    unfolded = unfolded_format(model_dir)
    if unfolded and (not reads_pixel_patches(config) or keeps_part_of_a_block(unfolded)):
        raise CheckpointError(f"{model_dir} is the stock form of a DCT model ({unfolded['name']}): add --to dct to "
                              "make its coefficient form")  # fmt: skip
    if reads_larger_patches(config):
        patch = "x".join(map(str, patch_of(config)))
        raise CheckpointError(f"{model_dir / 'config.json'} reads patches of {patch} px: if it is the stock form of "
                              "a DCT model, add --to dct")  # fmt: skip
    if not reads_pixel_patches(config):
        raise CheckpointError(f"{model_dir / 'config.json'} does not read pixel patches of 2 frames: is it converted "
                              "already? Use it as it is")  # fmt: skip
    return config


def converted_config(config: dict, num_coefficients: int) -> dict:
    """The config of the same model with a 1x1x1 patch embedding over coefficients.

    config: config.json of the model.
    num_coefficients: Channels of the new patch embedding.
    """
    config = with_patch(config, num_coefficients, 1, 1)
    vision = config["vision_config"]
    # Qwen's released files carry these two under names that transformers ignores; they would contradict the rest.
    vision.pop("in_chans", None)
    vision.pop("spatial_patch_size", None)
    return {**config, "vision_config": vision}


def patch_embedding(source: Source) -> "torch.Tensor":
    """The weight of the patch embedding, [E, 3, 2, p, p] of a pixel model; p is 14 in Qwen2-VL. Raises
    CheckpointError."""
    ((_, weight),) = read_tensors({PATCH_EMBEDDING: source.tensors[PATCH_EMBEDDING]})
    return weight


def read_tensors(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(name, tensor) one by one, memory-mapped, file by file. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as opened_file:
                for name in names:
                    yield name, opened_file.get_tensor(tensors[name].name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): get the file again") from error


def changed_tensors(
    source: Source, change: Callable[["torch.Tensor"], "torch.Tensor"]
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(name, tensor) one by one, memory-mapped, with the patch embedding changed.

    source: The checked checkpoint.
    change: Weight of the patch embedding -> the new weight.

    Raises CheckpointError for a damaged file.
    """
    for name, tensor in read_tensors(source.tensors):
        yield name, change(tensor) if name == PATCH_EMBEDDING else tensor


def write_shards(tensors: Iterator[tuple[str, "torch.Tensor"]], output_dir: Path, shard_bytes: int) -> int:
    """Writes model.safetensors, or numbered files and their index. Returns the bytes of all tensors.

    tensors: (name, tensor) one by one.
    output_dir: Gets the files.
    shard_bytes: Most bytes of tensors in one file. A larger tensor has a file of its own.

    Raises CheckpointError if they cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary, shards, pending, size, total = [], [], {}, 0, 0

    def flush() -> None:
        path = output_dir / f"shard-{len(temporary)}.tmp"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            what = f"the weights could not be written to {output_dir.parent} ({error})"
            raise CheckpointError(f"{what}: make room, then run the same command again") from error
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


def own_colours(folder: Path, dct):
    """The token format with the mean and std of the source's own processor.

    folder: Hugging Face directory of the source.
    dct: DCTConfig.

    Raises CheckpointError for a processor that normalises in another way.
    """
    path = folder / PROCESSOR
    source = read_json(path) if path.is_file() else {}
    usual = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    for name, value in usual.items():
        said = source.get(name, value)
        if not isinstance(said, int | float) or not math.isclose(said, value, rel_tol=1e-6):
            raise CheckpointError(f"{path} has {name} {said!r}, but DCT tokens need {value!r}: get the file "
                                  "again")  # fmt: skip
    colours = {}
    for name, key, low, high in (("mean", "image_mean", 0, 1), ("std", "image_std", 0.01, 10)):
        numbers = source.get(key) or list(getattr(dct, name))
        if not isinstance(numbers, list) or list(map(type, numbers)) not in THREE_NUMBERS:
            raise CheckpointError(f"{path} has {key} {numbers!r}, not three numbers: get the file again")
        if not all(low <= number <= high for number in numbers):
            raise CheckpointError(f"{path} has {key} {numbers!r}, which are not of pixels in 0..1: get the file again")
        colours[name] = tuple(map(float, numbers))
    return replace(dct, **colours)


def make_processor(folder: Path, dct, min_pixels: int | None, max_pixels: int | None):
    """A DCTImageProcessor for the converted model.

    folder: Hugging Face directory of the source.
    dct: DCTConfig.
    min_pixels: As in `chosen_bounds`.
    max_pixels: As in `chosen_bounds`.

    Raises CheckpointError for bounds that contradict each other.
    """
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

    low, high = chosen_bounds(folder, min_pixels, max_pixels)
    processor = DCTImageProcessor(dct=dct, min_pixels=low, max_pixels=high)
    # transformers 4 has _set_processor_class for it, 5 has not.
    processor._processor_class = inspection.MODEL_TYPES[inspection.read_config(folder)["model_type"]]
    return processor


def copy_other_files(model_dir: Path, output_dir: Path, without: tuple[str, ...] = ()) -> None:
    """Copies everything that is not rewritten, byte for byte: tokenizer, chat template, licence, generation config.

    model_dir: Hugging Face directory.
    output_dir: Gets the copies.
    without: Ends of names. Files with these names are left out.
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
) -> Converted:
    """Writes the coefficient form of a pixel model, completely or not at all.

    model_dir: Hugging Face directory of a pixel Qwen2-VL or Qwen2.5-VL.
    output_dir: The directory to write.
    dct: DCTConfig, or a function that makes it from the checked `Source`.
    min_pixels: Least pixels of an image. None: the source's.
    max_pixels: Most pixels of an image. None: the source's.
    force: Whether a checkpoint in `output_dir` may be replaced.
    shard_bytes: Most bytes of tensors in one safetensors file.

    Raises CheckpointError if the source cannot be used, or if `output_dir` may not be replaced.
    """
    from dct_qwen2vl.dct.folding import fold_patch_embedding

    read_config(model_dir)
    with opened(model_dir) as source:
        config, dct = read_config(source.folder), dct(source) if callable(dct) else dct
        patch = patch_of(config)
        dct = own_colours(source.folder, dct)
        check_merge(model_dir, config, dct)
        processor = make_processor(source.folder, dct, min_pixels, max_pixels)
        with new_directory(model_dir, output_dir, force) as temporary:
            copy_other_files(source.folder, temporary)
            write_json(temporary / "config.json", converted_config(config, dct.num_coefficients))
            processor.save_pretrained(temporary)
            write_sampling(temporary)
            check_finite(model_dir, patch_embedding(source))
            tensors = changed_tensors(source, lambda weight: fold_patch_embedding(weight, dct, patch))
            total = write_shards(tensors, temporary, shard_bytes)
        return Converted(dct, total, notes=all_notes(source, min_pixels, max_pixels), patch=patch)


def check_finite(model_dir: Path, weight: "torch.Tensor") -> None:
    """Raises CheckpointError for a model whose training has diverged.

    model_dir: Named in the message.
    weight: The patch embedding.
    """
    if not weight.isfinite().all():
        raise CheckpointError(f"{model_dir}: {PATCH_EMBEDDING} has values that are no numbers (nan or inf): give the "
                              "model as it was before its training diverged")  # fmt: skip


def all_notes(source: Source, min_pixels: int | None, max_pixels: int | None) -> tuple[str, ...]:
    """What was corrected in the source, what it has lost, and whether its least pixels were lowered.

    source: The checked source.
    min_pixels: As given, or None.
    max_pixels: As given, or None.
    """
    lost = note_on_saved_again(source.folder, source.model_dir)
    return (*source.notes, *([lost] if lost else []), *notes_on_bounds(source.folder, min_pixels, max_pixels))


def check_merge(model_dir: Path, config: dict, dct) -> None:
    """Raises CheckpointError unless the model merges as many tokens as the format says.

    model_dir: Named in the message.
    config: config.json of the model.
    dct: DCTConfig.
    """
    merge = config["vision_config"].get("spatial_merge_size", 2)
    if merge != dct.merge:
        raise CheckpointError(f"{model_dir} merges {merge}x{merge} tokens, --dct says {dct.merge}: make them equal")


@contextlib.contextmanager
def new_directory(model_dir: Path, output_dir: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that gets the name `output_dir` at the end of the block. After an error, it is removed.

    model_dir: The source, which must not be replaced.
    output_dir: The directory to write.
    force: Whether a checkpoint in `output_dir` may be replaced.

    A link stays, and the directory that it leads to is written. Raises CheckpointError if `output_dir` may not be
    replaced.
    """
    if output_dir.resolve() == model_dir.resolve():
        raise CheckpointError(f"--output-dir must differ from --model-dir, both are {model_dir}")
    if force and output_dir.resolve() in model_dir.resolve().parents:
        raise CheckpointError(
            f"--force would remove {model_dir}, which is in {output_dir}: choose another --output-dir"
        )
    if output_dir.exists() and (not output_dir.is_dir() or output_dir.is_mount()):  # neither can be replaced
        kind = "a mounted disk: name a folder in it" if output_dir.is_mount() else "a file: choose another --output-dir"
        raise CheckpointError(f"{output_dir} is {kind}")
    if output_dir.is_symlink():
        output_dir = output_dir.resolve()
    if output_dir.exists() and any(output_dir.iterdir()) and not (force and (output_dir / "config.json").is_file()):
        raise CheckpointError(
            f"{output_dir} is not empty: choose another --output-dir, or --force to replace a checkpoint"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output_dir)
    temporary = Path(tempfile.mkdtemp(UNFINISHED, f".{output_dir.name}-", output_dir.parent))
    held = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        temporary.chmod(0o755)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(temporary, output_dir)
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what killed conversions into a directory have left beside it: as many bytes as the model has."""
    for path in output_dir.parent.glob(f".*{UNFINISHED}"):
        if not path.name.startswith(f".{output_dir.name}-"):
            continue
        with contextlib.suppress(OSError):  # another process writes it
            folder = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(folder)
