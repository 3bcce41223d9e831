"""The two forms of a DCT model, each made from the other.

    coefficient form   what is trained: 1x1x1 patch embedding over K coefficients, image processor of this repository
    stock form         what is handed out: a plain Qwen2-VL, whose patch is the block of pixels, with stock processors

Both compute the same: tokens are linear in the pixels (dct/folding.py). The stock form needs no code of this
repository. Its token format lies in dct_format.json, which loaders ignore, so that the way back needs no flag. The file
also says which cells the model was trained without. The stock form itself reads all cells.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.checkpoints.conversion import (
    SHARD_BYTES,
    Converted,
    all_notes,
    changed_tensors,
    converted_config,
    copy_other_files,
    make_processor,
    new_directory,
    own_colours,
    patch_embedding,
    read_tensors,
    write_shards,
)
from dct_qwen2vl.checkpoints.inspection import (
    PATCH_EMBEDDING,
    PROCESSOR,
    SHARED,
    STOCK_FORM,
    CheckpointError,
    check_format,
    chosen_bounds,
    patch_of,
    read_config,
    read_json,
    read_processor,
    reads_larger_patches,
    reads_pixel_patches,
    recorded_skipping,
    skipping_in,
    token_format,
    unfolded_format,
    with_patch,
)
from dct_qwen2vl.checkpoints.source import Source, opened
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling, write_sampling
from dct_qwen2vl.common.files import write_json

if TYPE_CHECKING:
    import torch

# Settings of the image processor that both forms have.
SHARED_SETTINGS = ("do_resize", "do_rescale", "rescale_factor", "resample", "do_convert_rgb", "merge_size")
# The norm of what the format cannot show, over the norm of the weight. Rounding to bfloat16 leaves 0.0016.
MOST_LEFT_OUT = 0.005


def to_stock(
    model_dir: Path,
    output_dir: Path,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    complete: bool = True,
    only_patches: bool = False,
) -> Converted:
    """Writes the stock form of a coefficient-form directory, completely or not at all.

    model_dir: Hugging Face directory in the coefficient form, or a stock Qwen2-VL.
    output_dir: The directory to write.
    min_pixels: Least pixels of an image or frame. None: that of `model_dir`.
    max_pixels: Most pixels of an image or frame. None: that of `model_dir`.
    force: Whether a checkpoint in `output_dir` may be replaced.
    shard_bytes: Most bytes of tensors in one safetensors file.
    complete: Whether every weight must be there. A run that rehearses its last save has only the patch embedding.
    only_patches: Whether to write the patch embedding alone of a coefficient form. The other weights are equal in both.

    A stock Qwen2-VL that another version or tool has saved is rewritten as transformers 4.51 reads it.

    The patch embedding is written in float32, whatever the type of the other weights. Rounded to bfloat16 over pixels,
    it would not give the coefficient form back. Loaders cast it to the type they run in.

    Raises CheckpointError if the source cannot be used, or if `output_dir` may not be replaced.
    """
    import torch

    from dct_qwen2vl.dct.folding import unfold_patch_embedding

    with opened(model_dir, complete) as source:
        if token_format(source.folder, read_processor(source.folder)) is None:
            return _normalised(source, output_dir, min_pixels, max_pixels, force, shard_bytes)
        dct, config = _coefficient_format(source), read_config(source.folder)
        bounds = chosen_bounds(source.folder, min_pixels, max_pixels)
        dtype = str(patch_embedding(source).dtype).removeprefix("torch.")
        skipping = skipping_in(source.folder / PROCESSOR, read_processor(source.folder))

        def unfold(weight: "torch.Tensor") -> "torch.Tensor":
            return unfold_patch_embedding(weight, dct, dtype=torch.promote_types(weight.dtype, torch.float32))

        with new_directory(model_dir, output_dir, force) as folder:
            copy_other_files(source.folder, folder, without=(".py",))
            write_json(folder / "config.json", stock_config(config, dct))
            _write_processors(source.folder, folder, dct, bounds)
            write_json(folder / STOCK_FORM, {"patch_embedding_dtype": dtype, **skipping, "dct": dct.to_dict()})
            names = {PATCH_EMBEDDING} if only_patches else source.tensors.keys()
            written = replace(source, tensors={name: source.tensors[name] for name in names})
            total = write_shards(changed_tensors(written, unfold), folder, shard_bytes)
        return Converted(dct, total, notes=all_notes(source, min_pixels, max_pixels))


def _normalised(
    source: Source, output_dir: Path, min_pixels: int | None, max_pixels: int | None, force: bool, shard_bytes: int
) -> Converted:
    """Raises CheckpointError where there is nothing to change."""
    if not source.notes and min_pixels is None and max_pixels is None:
        raise CheckpointError(f"{source.model_dir} {_kind_of_pixels(source.folder)}: use it as it is")
    bounds = dict(zip(("min_pixels", "max_pixels"), chosen_bounds(source.folder, min_pixels, max_pixels), strict=True))
    with new_directory(source.model_dir, output_dir, force) as folder:
        copy_other_files(source.folder, folder, without=(".py",))
        write_json(folder / "config.json", read_json(source.folder / "config.json"))
        settings = {name: value for name, value in read_processor(source.folder).items() if name != "size"}
        write_json(folder / PROCESSOR, {**settings, **bounds})
        unfolded = source.folder / STOCK_FORM
        if unfolded.is_file():
            write_json(folder / STOCK_FORM, read_json(unfolded))
        total = write_shards(read_tensors(source.tensors), folder, shard_bytes)
    return Converted(None, total, notes=all_notes(source, min_pixels, max_pixels))


def _kind_of_pixels(model_dir: Path) -> str:
    """What a directory is that is not in the coefficient form. Raises CheckpointError."""
    saved = unfolded_format(model_dir)
    if saved:
        return f"is the stock form of {saved['name']} already"
    if reads_larger_patches(read_config(model_dir)):
        return "is the stock form of a DCT model already, by its large patches"
    return "reads pixels: it is a stock Qwen2-VL"


def to_dct(
    model_dir: Path,
    output_dir: Path,
    dct=None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Writes the coefficient form of a stock-form directory, completely or not at all.

    model_dir: Hugging Face directory in the stock form.
    output_dir: The directory to write.
    dct: DCTConfig. None: the one in dct_format.json. If that is missing, the preset with the model's patch.
    min_pixels: As in `to_stock`.
    max_pixels: As in `to_stock`.
    force: As in `to_stock`.
    shard_bytes: As in `to_stock`.

    Raises CheckpointError as `to_stock`, and for a model whose patch embedding the format cannot represent.
    """
    from dct_qwen2vl.dct.folding import distance_from_format, fold_block_embedding

    with opened(model_dir) as source:
        config = read_config(source.folder)
        _check_pixels(source)
        dct = dct or _saved_format(source.folder) or _preset_of(source.folder, config)
        dct = own_colours(source.folder, dct)
        _check_patch(source.folder, config, dct)
        weight = patch_embedding(source)
        left_out = distance_from_format(weight, dct)
        if not left_out <= MOST_LEFT_OUT:
            raise _too_far(source.folder, dct, left_out)
        processor = make_processor(source.folder, dct, min_pixels, max_pixels)
        saved = read_processor(source.folder)
        for name in ("do_resize", "do_rescale", "do_convert_rgb", "resample"):
            setattr(processor, name, saved.get(name, getattr(processor, name)))
        for name, value in recorded_skipping(source.folder).items():
            setattr(processor, name, value)
        dtype = _saved_dtype(source.folder, weight)
        with new_directory(model_dir, output_dir, force) as folder:
            copy_other_files(source.folder, folder)
            write_json(folder / "config.json", converted_config(config, dct.num_coefficients))
            processor.save_pretrained(folder)
            write_sampling(folder)
            tensors = changed_tensors(source, lambda weight: fold_block_embedding(weight, dct, dtype=dtype))
            total = write_shards(tensors, folder, shard_bytes)
        return Converted(dct, total, left_out, all_notes(source, min_pixels, max_pixels))


def stock_config(config: dict[str, Any], dct) -> dict[str, Any]:
    """config.json of the same model, whose patch is the block. Servers read the channels under either name.

    config: config.json of the coefficient form.
    dct: DCTConfig.
    """
    frames, rows, _ = dct.block
    vision = with_patch(config, 3, frames, rows)["vision_config"]
    vision = {**vision, "in_chans": 3, "spatial_patch_size": rows}
    return {**{name: value for name, value in config.items() if name != "auto_map"}, "vision_config": vision}


def stock_processor(processor: dict[str, Any], dct, bounds: tuple[int, int]) -> dict[str, Any]:
    """preprocessor_config.json of a `Qwen2VLImageProcessor` that cuts images into the format's blocks.

    processor: preprocessor_config.json of the coefficient form.
    dct: DCTConfig.
    bounds: min_pixels and max_pixels. Older transformers read them under these names, newer ones as `size`.
    """
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(dct.mean),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(dct.std),
        "max_pixels": bounds[1],
        "merge_size": dct.merge,
        "min_pixels": bounds[0],
        "patch_size": dct.block[1],
        "processor_class": processor.get("processor_class", "Qwen2VLProcessor"),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]},
        "temporal_patch_size": dct.block[0],
        **{name: processor[name] for name in SHARED_SETTINGS if name in processor},
    }


def _write_processors(model_dir: Path, folder: Path, dct, bounds: tuple[int, int]) -> None:
    """The image and the video processor; what names code of this repository goes out of other files."""
    images = stock_processor(read_processor(model_dir), dct, bounds)
    write_json(folder / PROCESSOR, images)
    write_sampling(folder, saved_sampling(model_dir))
    for name, unwanted in (
        (SHARED, ("image_processor", "video_processor", "auto_map")),
        ("tokenizer_config.json", ("auto_map",)),
    ):
        path = folder / name
        values = read_json(path) if path.is_file() else {}
        if any(key in values for key in unwanted):
            write_json(path, {key: value for key, value in values.items() if key not in unwanted})


def _coefficient_format(source: Source):
    """The DCTConfig of a coefficient-form directory, whose files go together. Raises CheckpointError."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    model_dir = source.folder
    processor = read_processor(model_dir)
    dct = token_format(model_dir, processor)
    check_format(model_dir, processor, dct, source.tensors[PATCH_EMBEDDING].shape)
    try:
        return DCTConfig.from_dict(processor["dct"])
    except ValueError as error:
        raise CheckpointError(f"{model_dir / PROCESSOR}: {error}: convert the model again") from error


def _check_pixels(source: Source) -> None:
    """Raises CheckpointError for what is the coefficient form already, or whose files do not go together."""
    model_dir = source.folder
    processor = read_processor(model_dir)
    dct = token_format(model_dir, processor)
    if dct is not None:
        raise CheckpointError(f"{model_dir} is the coefficient form of {dct['name']} already: use it as it is")
    check_format(model_dir, processor, None, source.tensors[PATCH_EMBEDDING].shape)


def _saved_format(model_dir: Path):
    """The DCTConfig in dct_format.json, None where there is none. Raises CheckpointError."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    saved = unfolded_format(model_dir)
    try:
        return None if saved is None else DCTConfig.from_dict(saved)
    except ValueError as error:
        raise CheckpointError(
            f"{model_dir / STOCK_FORM}: {error}: remove it, and name the format with --dct"
        ) from error


def _saved_dtype(model_dir: Path, weight: "torch.Tensor") -> "torch.dtype":
    """The type that the patch embedding had before `to_stock`; that of `weight` where nothing says it."""
    import torch

    path = model_dir / STOCK_FORM
    name = read_json(path).get("patch_embedding_dtype") if path.is_file() else None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else weight.dtype


def _preset_of(model_dir: Path, config: dict[str, Any]):
    """The preset whose blocks are the model's patches. Raises CheckpointError."""
    from dct_qwen2vl.dct.configuration_dct import PRESETS, DCTConfig

    for name in PRESETS:
        dct = DCTConfig.preset(name)
        if dct.block == patch_of(config):
            return dct
    frames, rows, columns = patch_of(config)
    raise CheckpointError(
        f"{model_dir} has no {STOCK_FORM}, and no preset has its patches of {frames} x {rows} x {columns}: "
        f"name the format, as in --block {frames} {rows} {columns}"
    )


def _check_patch(model_dir: Path, config: dict[str, Any], dct) -> None:
    """Raises CheckpointError for blocks that are not the model's patches, or another merge."""
    patch, merge = patch_of(config), config["vision_config"].get("spatial_merge_size", 2)
    if patch == dct.block and merge == dct.merge:
        return
    own, wanted = (
        f"{' x '.join(map(str, sides))}, merged {m} x {m}" for sides, m in ((patch, merge), (dct.block, dct.merge))
    )
    pixels = reads_pixel_patches(config)
    advice = "leave out --to dct to fold a pixel model" if pixels else "name the format with --dct or --block"
    raise CheckpointError(f"{model_dir} has patches of {own}, the format {dct.name} blocks of {wanted}: {advice}")


def _too_far(model_dir: Path, dct, left_out: float) -> CheckpointError:
    frames, rows, columns = dct.block
    lost = not (model_dir / STOCK_FORM).is_file() and reads_larger_patches(read_config(model_dir))
    copy = f"copy its {STOCK_FORM} from the folder that it was loaded from, or " if lost else ""
    return CheckpointError(
        f"{model_dir} is no unfolded {dct.name} model: {left_out:.2%} of its patch embedding's norm lies outside what "
        f"these tokens show (at most {MOST_LEFT_OUT:.1%}); {copy}--block {frames} {rows} {columns} --chroma 444 keeps "
        "all"
    )
