"""What users hand to an image processor - PIL, numpy or torch, channels first or last, bytes or floats - in one form.

The file is saved beside converted checkpoints, with image_processing_dct.py.

Letters used for shapes in this file: T frames, H and W rows and columns in pixels, C channels.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

logger = logging.get_logger(__name__)


def _dimensions(value: Any) -> int:
    """Of an array or tensor; a PIL image counts as [H, W, C]. Raises ValueError for anything else."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim
    if isinstance(value, Image.Image):
        return 3
    hint = ": open the file first, as PIL.Image.open does" if isinstance(value, (str, bytes, os.PathLike)) else ""
    raise ValueError(f"expected PIL, numpy or torch images, or lists of them, got {type(value).__name__}{hint}")


def flat_images(images: Any) -> list:
    """All images, one after another.

    images: An image, a batch of images [N, ...], or lists of these, nested or not.

    Raises ValueError for anything else.
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_images(item)]
    dimensions = _dimensions(images)
    if dimensions in (2, 3):
        return [images]
    if dimensions == 4:
        return list(images)
    raise ValueError(f"expected an image [H, W], [H, W, C] or [C, H, W], or a batch of them, got {list(images.shape)}")


def flat_videos(videos: Any) -> list:
    """All videos, one after another, each an array [T, ...] or a list of frames.

    videos: A video, a batch of videos, or lists of these, nested or not.

    Raises ValueError for anything else.
    """
    if isinstance(videos, (list, tuple)):
        if not videos:
            raise ValueError("expected videos of at least one frame, got an empty list")
        if all(not isinstance(item, (list, tuple)) and _dimensions(item) < 4 for item in videos):
            return [list(videos)]
        return [video for item in videos for video in flat_videos(item)]
    dimensions = _dimensions(videos)
    if dimensions in (2, 3):  # a lone frame
        return [[videos]]
    if dimensions == 4:
        return [videos]
    if dimensions == 5:
        return list(videos)
    raise ValueError(f"expected a video [T, H, W, C] or [T, C, H, W], or a list of frames, got {list(videos.shape)}")


def as_array(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A tensor of the CPU as an array of the same memory; what is on another device stays there."""
    if not isinstance(image, torch.Tensor):
        return image
    image = image.detach()
    if image.dtype == torch.bfloat16:  # numpy has none
        image = image.float()
    return image.numpy() if image.device.type == "cpu" else image


def channels_last(array: np.ndarray | torch.Tensor, layout: str | None) -> np.ndarray | torch.Tensor:
    """An image or video as [..., H, W, C]. A view of the same memory.

    array: [H, W], [..., H, W, C] or [..., C, H, W]. C is 1, 3 or 4.
    layout: A `ChannelDimension`. None: inferred from the shape.

    Raises ValueError for another shape.
    """
    shape = list(array.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(f"expected an image [H, W], [H, W, C] or [C, H, W] with H and W at least 1, got {shape}")
    if len(shape) == 2:
        return array[..., None]
    if layout is None:
        layout = _infer_layout(shape)
    axis = -1 if layout == ChannelDimension.LAST else -3
    if shape[axis] not in (1, 3, 4):
        raise ValueError(
            f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {shape[axis]}: {shape} with channels "
            f"{'last' if axis == -1 else 'first'}"
        )
    if axis == -1:
        return array
    return array.movedim(-3, -1) if isinstance(array, torch.Tensor) else np.moveaxis(array, -3, -1)


def _infer_layout(shape: list[int]) -> ChannelDimension:
    """As the stock processor an axis of 1 or 3, else one of 4. Where both ends could be it, ValueError; the stock
    processor takes the first."""
    first, last = shape[-3], shape[-1]
    if first in (1, 3) and last in (1, 3):
        raise ValueError(f"cannot tell which axis of {shape} holds the channels: give input_data_format")
    for channels in ((1, 3), (4,)):
        if first in channels or last in channels:
            return ChannelDimension.FIRST if first in channels else ChannelDimension.LAST
    raise ValueError(f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels first or last, got {shape}")


def to_levels(array: np.ndarray | torch.Tensor, do_rescale: bool) -> np.ndarray | torch.Tensor:
    """An image or video as uint8, or as float in 0..255.

    array: bool, uint8, uint16, other whole numbers in 0..255, or float.
    do_rescale: Whether float values may be in 0..1, as in the stock processor.

    Raises ValueError for another dtype or for values outside the range. Bytes, the usual case, are returned as they
    are.
    """
    kind = str(array.dtype).removeprefix("torch.")
    if kind == "uint8":
        return array
    if kind.startswith("float"):
        return _float_to_levels(array, do_rescale)
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if kind == "bool":
        return array * np.uint8(255)
    if kind == "uint16":
        return (array / 257).round().astype(np.uint8)
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"expected images of bytes, floats or whole numbers, got {kind}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"expected values 0..255, got {kind} from {array.min()} to {array.max()}")
    return array.astype(np.uint8)


def _float_to_levels(array: np.ndarray | torch.Tensor, do_rescale: bool) -> np.ndarray | torch.Tensor:
    """0..255 (do_rescale) or 0..1 -> 0..255. Raises ValueError for values that are plainly of another range, or NaN."""
    low, high, top = float(array.min()), float(array.max()), 255 if do_rescale else 1
    if not (low >= -0.5 * top and high <= 1.5 * top):  # filters overshoot a little
        other = "0..1 needs do_rescale=False" if do_rescale else "0..255 needs do_rescale=True"
        raise ValueError(f"expected values 0..{top}, got {low:.4g} to {high:.4g}: {other}, undo any normalization")
    if not do_rescale:
        # The float32 of double products is what the stock processor makes, whose bytes depend on the last bit.
        array = array.double() * 255 if isinstance(array, torch.Tensor) else array.astype(np.float64) * 255
        return array.float() if isinstance(array, torch.Tensor) else array.astype(np.float32)
    if 0 < high <= 1:
        logger.warning_once("Images of values 0..1 are taken as nearly black: for 0..1 give do_rescale=False.")
    return array


def to_three_channels(array: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """[..., H, W, C] in 0..255 -> [..., H, W, 3]: grey three times, RGBA on white."""
    channels = array.shape[-1]
    if channels == 3:
        return array
    if channels == 1:
        return array.expand(*array.shape[:-1], 3) if isinstance(array, torch.Tensor) else np.repeat(array, 3, axis=-1)
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.dtype == np.uint8:  # as Pillow composes
        colour, alpha = array[..., :3].astype(np.int32), array[..., 3:].astype(np.int32)
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    alpha = array[..., 3:] / 255
    return array[..., :3] * alpha + 255 * (1 - alpha)


def height_width(image: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """Height and width in pixels of an image or frame, channels last."""
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[-3:-1])


def resize(
    image: Image.Image | np.ndarray | torch.Tensor, size: tuple[int, int], resample: int, do_rescale: bool
) -> np.ndarray:
    """An image resized by Pillow, uint8 [height, width, 3].

    image: RGB, [H, W, 3] in 0..255 unless it is a PIL image.
    size: Height and width of the result, pixels.
    resample: A filter of Pillow.
    do_rescale: As in `to_levels`. It decides how float values are rounded, as in the stock processor.
    """
    if not isinstance(image, Image.Image):
        array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
        if array.dtype != np.uint8:
            array = array.clip(0, 255)
            # The stock processor cuts what was given as 0..1 to bytes, and takes of 0..255 only whole numbers.
            array = (array.round() if do_rescale else array).astype(np.uint8)
        image = Image.fromarray(array)
    return np.array(image.resize(size[::-1], resample))
