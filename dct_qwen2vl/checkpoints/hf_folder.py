"""Hugging Face directories: copying one, its permissions, its processor."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor
from transformers.image_processing_utils import BaseImageProcessor

from dct_qwen2vl.checkpoints.inspection import (
    PROCESSOR,
    SKIPPING,
    STOCK_FORM,
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
    """The image processor of a checkpoint, from this repository's code. The copy in the checkpoint's folder is not run.

    model_dir: Hugging Face directory.
    dct: The checkpoint's token format as `inspection.token_format` gives it. None for pixels.
    settings: min_pixels, max_pixels (pixels of an image), skip_db (dB), skip_noise_floor and skip_share in place of
        the checkpoint's. The checkpoint's min_pixels is lowered to a lower max_pixels.

    Raises CheckpointError for a token format that contradicts itself.
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
    """A checkpoint's tokenizer, chat template and image processor. All but the template are loaded as in training.

    model_dir: Hugging Face directory.
    settings: Of the image processor, as in `load_image_processor`.

    The tokenizer pads on the left. Raises CheckpointError for a token format that contradicts itself.
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
    """Copies configuration, tokenizer and processor of a Hugging Face directory.

    model_dir: The directory to copy from.
    folder: Made from the start. What it held is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin") and "safetensors.index" not in path.name:
            shutil.copyfile(path, folder / path.name)


def give_name(folder: Path, output_dir: Path) -> None:
    """Gives a complete Hugging Face directory its name, and its weights the permissions of its other files.

    folder: The directory.
    output_dir: Its name. What is there is replaced.
    """
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600
    shutil.rmtree(output_dir, ignore_errors=True)
    folder.replace(output_dir)


def write_reading(folder: Path, settings: dict[str, Any], sampling: dict[str, Any] | None) -> None:
    """Saves with a model how the run read images and videos.

    folder: Hugging Face directory.
    settings: As in `write_processor_settings`.
    sampling: As in `write_sampling`.
    """
    write_processor_settings(folder, settings)
    write_sampling(folder, sampling)
    _forget_skipping(folder)


def _forget_skipping(folder: Path) -> None:
    """A stock form that is trained as a pixel model (--dct none) learns all cells, however it was trained before."""
    path = folder / STOCK_FORM
    saved = read_json(path) if path.is_file() else {}
    if saved.keys() & SKIPPING.keys():
        write_json(path, {name: value for name, value in saved.items() if name not in SKIPPING})


def write_processor_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Changes settings in the preprocessor_config.json of a Hugging Face directory.

    folder: Hugging Face directory. Nothing happens if it has no such file.
    settings: min_pixels, max_pixels and skipping of the run, as far as they were given. None takes a setting out.
        Without a skip_db, here or in the file, the other settings of skipping mean nothing and go out, too.
    """
    path = folder / PROCESSOR
    saved = read_json(path) if path.is_file() else {}
    config, off = {**saved, **settings}, {name for name, value in settings.items() if value is None}
    if settings.keys() & {"min_pixels", "max_pixels"}:
        off.add("size")  # the stock processor's second name for the same two numbers
    if not config.get("skip_db"):
        off |= SKIPPING.keys()
    changed = {name: value for name, value in config.items() if name not in off}
    if path.is_file() and changed != saved:
        write_json(path, changed)
