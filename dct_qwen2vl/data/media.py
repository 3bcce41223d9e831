"""Media parts of shards -> arrays: RGB, or a video's planes. Images and videos are decoded by images.py and videos.py.

Data preparation, training and evaluation all read media through these files, so they see the same pixels.

Letters used for shapes in this file: T frames of a video, H and W rows and columns in pixels as displayed, that is,
with the EXIF orientation or the display matrix applied.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dct_qwen2vl.data.images import IMAGE_ERRORS, decode_image, image_shape, is_turned, to_rgb
from dct_qwen2vl.data.reading import Fit, MediaError, counted_frames, displayed_size, readable
from dct_qwen2vl.data.videos import VideoSampling, YUVFrames, decode_video, video_shape
from dct_qwen2vl.dct.image_sizes_dct import target_size


def part_order(name: str) -> tuple[int, str]:
    """Sorts the media parts of a sample by the number before the first dot of their names: "10.jpg" after "9.jpg".
    Decimal digits of any script and of any number count; a name without a number counts as 0. Never raises."""
    number = name.split(".")[0]
    digits = "".join(str(unicodedata.decimal(digit)) for digit in number) if number.isdecimal() else ""
    digits = digits.lstrip("0")
    return len(digits), digits  # of two numbers the longer is larger; int() takes no more than 4,300 digits


def as_array(
    kind: str, content: Any, sampling: VideoSampling, fit: Fit | None = None, planes: bool = False, threads: int = 0
) -> np.ndarray | YUVFrames:
    """Decodes a media part of a shard: uint8 RGB [H, W, 3] of an image, [T, H, W, 3] of a video, or a video's planes.

    kind: "image" or "video".
    content: File bytes, a PIL image, or the result of Energon's own decoding. That is a float tensor [C, H, W] in 0..1
        for an image. For a video, it is an object with `frames`, a uint8 tensor [T, C, H, W], and `info`.
    sampling: Which frames of a video are read.
    fit: As in `decode_image`.
    planes: As in `decode_video`. A video that Energon decoded is RGB in any case.
    threads: As in `decode_video`.

    Raises MediaError.
    """
    if isinstance(content, (bytes, bytearray)):
        if kind == "image":
            return decode_image(content, fit)
        return decode_video(content, sampling, fit, planes, threads)
    if kind == "image" and isinstance(content, Image.Image):
        with readable("image", IMAGE_ERRORS):
            image = np.asarray(to_rgb(content))
        return resize_frames(kind, image, fit)
    if kind == "image" and getattr(content, "ndim", 0) == 3:
        rgb = content.expand(3, -1, -1) if content.shape[0] == 1 else content[:3]
        image = (rgb * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return resize_frames(kind, image, fit)
    if kind == "video" and hasattr(content, "frames"):
        indices = sampling.indices(len(content.frames), float(content.info.get("video_fps", 0)))
        return resize_frames(kind, content.frames[indices].permute(0, 2, 3, 1).numpy(), fit)
    raise MediaError(f"cannot read a {kind} part of type {type(content).__name__}")


def media_shape(kind: str, content: Any, sampling: VideoSampling) -> tuple[int, int, int]:
    """Height, width and number of the frames that `as_array` reads, before they are resized. Only headers and packets
    are read.

    kind: "image" or "video".
    content: As in `as_array`.
    sampling: Which frames of a video are read.

    For a video that is shown turned, height and width are those before turning. Damaged videos may hold fewer frames
    than they say. Raises MediaError.
    """
    if isinstance(content, (bytes, bytearray)):
        return image_shape(content) if kind == "image" else video_shape(content, sampling)
    if kind == "image" and isinstance(content, Image.Image):
        with readable("image", IMAGE_ERRORS):
            return *displayed_size(content, is_turned(content)), 1
    if kind == "image" and getattr(content, "ndim", 0) == 3:
        return *content.shape[1:], 1
    if kind == "video" and hasattr(content, "frames"):
        count = sampling.count(len(content.frames), float(content.info.get("video_fps", 0)))
        return *content.frames.shape[2:], count
    raise MediaError(f"cannot read a {kind} part of type {type(content).__name__}")


def resize_frames(kind: str, pixels: np.ndarray, fit: Fit | None) -> np.ndarray:
    """Resizes an image or the frames of a video with PIL's bicubic filter. Pixels of the right size are returned as
    they are.

    kind: "image" or "video".
    pixels: uint8 [H, W, 3] of an image, [T, H, W, 3] of a video.
    fit: Gives the size. None: nothing is resized.
    """
    frames = pixels[None] if kind == "image" else pixels
    height, width = frames.shape[1:3]
    if fit:
        height, width = fit(height, width, 1 if kind == "image" else counted_frames(len(frames)))
    if (height, width) == frames.shape[1:3]:
        return pixels
    resized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
    return resized[0] if kind == "image" else np.stack(resized)


TOO_LONG = "too_long"  # the reason of samples with more tokens than --seq-length


class BadSample(ValueError):
    """A sample that cannot be learned from; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True)
class PixelFit:
    """The size to which `as_array` resizes, so that the image processor has nothing left to resize (a `Fit`).

    factor: Height and width become multiples of it, pixels.
    min_pixels: Least height * width of an image or frame.
    max_pixels: Most height * width of an image or frame.
    sampling: Of videos. The frames of a video share `sampling.total_pixels`, which does not count images.
    whole: Whether JPEGs are decoded at their own size, as by the pixel model's image processor, which a pixel baseline
        must equal.

    If no multiple lies between min_pixels and a frame's share, the frame gets less than min_pixels.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    sampling: VideoSampling
    whole: bool = False

    @classmethod
    def of(cls, image_processor, sampling: VideoSampling) -> "PixelFit":
        """The fit of an image processor with Qwen2VLImageProcessor's attributes.

        image_processor: Any such processor.
        sampling: Of videos. Its budget of pixels bounds their frames.
        """
        factor = image_processor.patch_size * image_processor.merge_size
        whole = getattr(image_processor, "dct_config", None) is None
        return cls(factor, image_processor.min_pixels, image_processor.max_pixels, sampling, whole)

    def __call__(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Height and width of the result, pixels.

        height: Of the image or frame, pixels.
        width: Of the image or frame, pixels.
        frames: 1 for an image, `reading.counted_frames` for a video.

        Raises BadSample.
        """
        max_pixels = self.max_pixels
        if frames > 1:
            max_pixels = self.sampling.max_frame_pixels(frames, self.min_pixels, self.max_pixels)
        try:
            return target_size(height, width, self.factor, self.min_pixels, max_pixels)
        except ValueError as error:  # an aspect ratio over 200
            raise BadSample("unusable_media", str(error)) from error
