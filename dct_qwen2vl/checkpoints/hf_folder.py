"""Hugging Face directories: copying one, its permissions, its processor."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor
from transformers.image_processing_utils import BaseImageProcessor

from dct_qwen2vl.checkpoints.inspection import (
    PROCESSOR,
    CheckpointError,
    chosen_bounds,
    read_json,
    read_processor,
    remedy,
    token_format,
)
from dct_qwen2vl.checkpoints.video_sampling import write_sampling
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor


def load_image_processor(model_dir: Path, dct: dict[str, Any] | None, **settings: Any) -> BaseImageProcessor:
    """The image processor of a checkpoint, by this repository's code: a copy that lies beside the weights is not run.

    dct: the checkpoint's token format as `inspection.token_format` gives it, None for pixels. settings: min_pixels,
    max_pixels and skip_db in place of the checkpoint's, whose min_pixels gives way to a lower max_pixels. Raises
    CheckpointError for a format that contradicts itself.
    """
    processor_class = Qwen2VLImageProcessor if dct is None else DCTImageProcessor
    given = {name: settings[name] for name in ("min_pixels", "max_pixels") if name in settings}
    if given:
        settings |= dict(zip(("min_pixels", "max_pixels"), chosen_bounds(model_dir, **given), strict=True))
    try:
        return processor_class.from_pretrained(model_dir, **settings)
    except ValueError as error:
        raise CheckpointError(f"{model_dir / PROCESSOR} cannot be used ({error}): {remedy(model_dir)}") from error


def load_processor(model_dir: Path, **settings: Any) -> Qwen2VLProcessor:
    """A checkpoint's tokenizer, which pads on the left, chat template and image processor, all but the template as
    training loads them.

    settings: of the image processor, as in `load_image_processor`.
    Raises CheckpointError.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    dct = token_format(model_dir, read_processor(model_dir))
    image_processor = load_image_processor(model_dir, dct, **settings)
    configuration, of_own_file = Qwen2VLProcessor.get_processor_dict(model_dir)
    templates = of_own_file.get("chat_template"), configuration.get("chat_template"), tokenizer.chat_template
    # Several templates stand by their names.
    named = [each.get("default") if isinstance(each, dict) else each for each in templates]
    template = next((each for each in named if isinstance(each, str) and each), None)
    return Qwen2VLProcessor(image_processor, tokenizer, chat_template=template)


def copy_all_but_weights(model_dir: Path, folder: Path) -> None:
    """A fresh `folder` with the configuration, tokenizer and processor of a Hugging Face directory."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin") and "safetensors.index" not in path.name:
            shutil.copyfile(path, folder / path.name)


def let_others_read(folder: Path) -> None:
    """The weights of a Hugging Face directory get the permissions of its other files."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600


def write_reading(folder: Path, bounds: dict[str, int], sampling: dict[str, Any] | None) -> None:
    """The processors of a Hugging Face directory get what the run was trained with: `write_pixel_bounds`, and fields of
    `VideoSampling`."""
    write_pixel_bounds(folder, bounds)
    write_sampling(folder, sampling)


def write_pixel_bounds(folder: Path, bounds: dict[str, Any]) -> None:
    """The processor of a Hugging Face directory gets the bounds and the skip_db that the run was trained with; what is
    None is taken out."""
    path = folder / PROCESSOR
    if bounds and path.is_file():
        config = read_json(path)
        config.pop("size", None)  # the stock processor's second name for the same two numbers
        off = {name for name, value in bounds.items() if value is None}
        write_json(path, {name: value for name, value in {**config, **bounds}.items() if name not in off})
