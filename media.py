"""Bytes of pictures and clips -> RGB arrays. The one place that decides how media are decoded.

Data preparation, training and evaluation all read media through this file, so they see the same pixels.
"""

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi")


class MediaError(ValueError):
    """The bytes are no readable picture or clip. The message says why, in one line."""


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a clip are read, as in Qwen2-VL's own utilities: `fps` frames a second, spread evenly over the
    clip, between `min_frames` and `max_frames` of them (never more than it has), an even number where possible."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def indices(self, total_frames: int, frames_per_second: float) -> np.ndarray:
        """Frame numbers to read from a clip of `total_frames`, int64, ascending."""
        wanted = total_frames / frames_per_second * self.fps if frames_per_second > 0 else total_frames
        count = min(max(wanted, self.min_frames), self.max_frames, total_frames)
        count = max(1, int(count) // 2 * 2)
        return np.linspace(0, total_frames - 1, count).round().astype(np.int64)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as 8-bit RGB: first frame, EXIF rotation applied, transparency on white, 16-bit scaled to 8."""
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: "I;16", and "I" in older files
        return Image.fromarray(
            (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes) -> np.ndarray:
    """Picture file -> uint8 RGB [H, W, 3]. Raises MediaError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(to_rgb(image))
    # PIL raises all of these for files that are broken in one way or another.
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise MediaError(f"not a readable picture: {error}") from error


def decode_video(data: bytes, sampling: VideoSampling) -> np.ndarray:
    """Clip file -> uint8 RGB [T, H, W, 3], the frames that `sampling` names. Raises MediaError."""
    import av  # PyAV: only clips need it

    try:
        total, rate = _count_frames(av, data)
        wanted = sampling.indices(total, rate) if total else np.empty(0, np.int64)
        with av.open(io.BytesIO(data)) as container:
            frames = _read_frames(container, wanted)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MediaError(f"not a readable clip: {error}") from error
    if not frames:
        raise MediaError("not a readable clip: it has no frames")
    return np.stack(frames)


def _count_frames(av, data: bytes) -> tuple[int, float]:
    """Frames (by counting packets: headers lie) and frames per second of the first video stream."""
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise ValueError("it has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # decoding it would crash the process in PyAV < 18.1
            raise ValueError("its codec is unknown")
        total = sum(packet.size > 0 for packet in container.demux(stream))
        return total, float(stream.average_rate or Fraction(0))


def _read_frames(container, wanted: np.ndarray) -> list[np.ndarray]:
    """The frames numbered in `wanted`; those past the last that decodes are left out."""
    frames, numbers = [], set(wanted.tolist())
    for number, frame in enumerate(container.decode(video=0)):
        if number in numbers:
            frames.append(frame.to_ndarray(format="rgb24"))
        if number >= wanted[-1]:
            break
    return frames


def as_array(kind: str, content: Any, sampling: VideoSampling) -> np.ndarray:
    """A media part of a shard -> uint8 [H, W, 3] (kind "image") or [T, H, W, 3] ("video"). Raises MediaError.

    content: file bytes, or what Energon's own decoding makes of them: for an image a float tensor [C, H, W] in 0..1,
    for a clip an object with `frames`, a uint8 tensor [T, C, H, W], and `info`.
    """
    if isinstance(content, (bytes, bytearray)):
        return decode_image(content) if kind == "image" else decode_video(content, sampling)
    if kind == "image" and getattr(content, "ndim", 0) == 3:
        rgb = content.expand(3, -1, -1) if content.shape[0] == 1 else content[:3]
        return (rgb * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if kind == "video" and hasattr(content, "frames"):
        indices = sampling.indices(len(content.frames), float(content.info.get("video_fps", 0)))
        return content.frames[indices].permute(0, 2, 3, 1).numpy()
    raise MediaError(f"cannot read a {kind} part of type {type(content).__name__}")
