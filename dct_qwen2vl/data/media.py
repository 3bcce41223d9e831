"""Bytes of images and videos -> arrays: RGB, or a video's planes. The one place that decides how media are decoded.

Data preparation, training and evaluation all read media through this file, so they see the same pixels.

Letters used for shapes in this file: T frames of a video, H and W rows and columns in pixels as displayed, that is,
with the EXIF orientation or the display matrix applied.
"""

import io
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.video_sampling import VideoSampling

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi")
# FFmpeg's names of what is opened. Playlists and other formats that make it open further files are not among them.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg"

EXIF_ORIENTATION = 0x0112  # EXIF 2.32
TURNED = (5, 6, 7, 8)  # the orientations that exchange height and width
# PIL raises all of these for files that are broken in one way or another.
IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    RuntimeError,  # AVIF
    Image.DecompressionBombError,
)

# libswscale's flags (swscale.h): bicubic as the image processor, exact rounding, chroma filtered for every pixel. With
# the first alone white comes out as 253 and saturated colours are up to 3 levels off.
SCALER_FLAGS = 0x4 | 0x40000 | 0x2000 | 0x4000
# Codes of ITU-T H.273, which FFmpeg uses. Matrices 5 and 6 are BT.601's and 4 is next to it; 2 is "unspecified". What
# has no tag is BT.601 whatever its height, as FFmpeg has it and thus every reader that Qwen2-VL has been used with.
BT709, BT601 = 1, 5
BT601_ALIKE = (0, 2, 3, 4, 5, 6)
LIMITED, FULL = 1, 2

# (height, width, frames) of an image or video as displayed -> height and width to which it is resized. frames: 1 of an
# image, `counted_frames` of a video. A fit with an attribute `whole` that is true has JPEGs decoded at their own size.
Fit = Callable[[int, int, int], tuple[int, int]]


class MediaError(UserError):
    """The bytes are no readable image or video. The message says why, in one line."""


@dataclass(frozen=True)
class YUVFrames:
    """A video as C-contiguous 4:2:0 planes.

    luma uint8 [T, H, W], H and W even; cb, cr uint8 [T, H/2, W/2], each sample at the centre of its 2x2 luma samples.
    matrix: "bt601" or "bt709". full_range: values use 0..255; otherwise luma uses 16..235, cb and cr 16..240.
    """

    luma: np.ndarray
    cb: np.ndarray
    cr: np.ndarray
    matrix: str
    full_range: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the three planes."""
        return self.luma.nbytes + self.cb.nbytes + self.cr.nbytes


def counted_frames(frames: int) -> int:
    """Frames of a video as a `Fit` is told of them: a lone frame counts as two, as a token holds a pair."""
    return max(2, frames)


@contextmanager
def _readable(kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns what a decoder raises into a MediaError of one line."""
    try:
        yield
    except errors as error:
        raise MediaError(f"not a readable {kind}: {' '.join(str(error).split())}") from error


# Images


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: first frame, EXIF rotation applied, transparency on white, 16-bit scaled to 8."""
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


def decode_image(data: bytes, fit: Fit | None = None) -> np.ndarray:
    """Image file -> uint8 RGB [H, W, 3] of the size that `fit` gives (None: its own). Raises MediaError.

    Resizing is PIL's bicubic, the image processor's. A JPEG of at least twice the size in both directions is decoded at
    a half, a quarter or an eighth, never below the target: libjpeg leaves out the high frequencies of its blocks. A fit
    that is `whole` forbids that.
    """
    with _readable("image", IMAGE_ERRORS):
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    with image:
        target = fit(*_displayed_size(image, turned), 1) if fit else None
        with _readable("image", IMAGE_ERRORS):
            whole = getattr(fit, "whole", False)
            return np.asarray(_resize_image(image, target, turned, whole) if target else to_rgb(image))


def _displayed_size(image: Any, exchanged: bool) -> tuple[int, int]:
    """Height and width of a PIL image or a frame."""
    return (image.width, image.height) if exchanged else (image.height, image.width)


def _resize_image(image: Image.Image, target: tuple[int, int], turned: bool, whole: bool) -> Image.Image:
    """An opened image file as RGB with the displayed height and width `target`."""
    height, width = target
    stored_size = (height, width) if turned else (width, height)  # PIL's order is width, height
    draft = None if whole else image.draft("RGB", stored_size)
    if draft is None:  # or no JPEG
        return to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    image = image if image.mode == "RGB" else image.convert("RGB")
    # The sides of a draft are rounded up; the box is what the image covers of them. Its EXIF data stay with it.
    return to_rgb(image.resize(stored_size, Image.Resampling.BICUBIC, box=draft[1]))


# Videos


def decode_video(
    data: bytes, sampling: VideoSampling, fit: Fit | None = None, planes: bool = False, threads: int = 0
) -> np.ndarray | YUVFrames:
    """Video file -> the frames that `sampling` names: uint8 RGB [T, H, W, 3], or their planes. Raises MediaError.

    fit: gives the size, even sides for planes. Without it frames keep theirs, but for planes odd sides become the even
    ones below. threads: of the decoder and the scaler; 0 for one for each core.

    The matrix and range that the stream is tagged with are honoured; untagged streams are BT.601, of limited range.
    Planes keep both, but RGB streams become full-range BT.601 and other matrices (BT.2020) become BT.709. Transfer
    functions stay as they are (HDR is not tone-mapped), alpha is dropped, pixels are taken as square.
    """
    import av  # PyAV: only videos need it

    new_video = partial(_Video, fit=fit, planes=planes, threads=threads)
    with _readable("video", (av.FFmpegError, OSError, IndexError)):
        video = None
        with suppress(av.FFmpegError):  # decoding from what is no key frame, say; the whole video may still decode
            video = _read_by_stamp(data, sampling, new_video, threads)
        return (video or _read_by_number(data, sampling, new_video, threads)).result()


def _read_by_stamp(data: bytes, sampling: VideoSampling, new_video: Callable, threads: int) -> "_Video | None":
    """Reads a video by its packets' time stamps and decodes only the packets that the wanted frames need.

    None if that does not work: a container without stamps, wrong ones, packets that show nothing, false key frames.
    """
    with _open(data, threads) as (container, stream):
        packets = _packets(container, stream)
        stamps = _usable_stamps(container, packets)
        if not stamps:
            return None
        seconds = np.array(stamps, np.float64) * float(stream.time_base)
        video = new_video([stamps[number] for number in sampling.indices_at(seconds, float(stream.average_rate or 0))])
        latest = stamps[0]
        for frame in _decode_wanted(stream, packets, set(video.keys)):
            if frame.pts is None or frame.pts < latest:
                return None
            latest = frame.pts
            video.put(frame.pts, frame)
            if not video.missing:
                return video
    return None


def _read_by_number(data: bytes, sampling: VideoSampling, new_video: Callable, threads: int) -> "_Video":
    """Reads a video by counting its frames, all of which are decoded; twice, if they are not as many as its packets."""
    with _open(data, threads) as (container, stream):
        total = _shown(_packets(container, stream))
    video, decoded = _read_counted(data, sampling, new_video, threads, total)
    if decoded != total:
        video, _ = _read_counted(data, sampling, new_video, threads, decoded)
    if video.missing:
        raise MediaError(f"not a readable video: it has no frames ({total} packets)")
    return video


def _read_counted(
    data: bytes, sampling: VideoSampling, new_video: Callable, threads: int, total: int
) -> tuple["_Video", int]:
    """-> the video as if it had `total` frames, and how many it has."""
    with _open(data, threads) as (container, stream):
        video, decoded = new_video(sampling.indices(total, float(stream.average_rate or 0)).tolist()), 0
        for frame in container.decode(stream):
            video.put(decoded, frame)
            decoded += 1
    return video, decoded


@contextmanager
def _open(data: bytes, threads: int) -> Iterator[tuple[Any, Any]]:
    """-> container and first video stream."""
    import av

    # torchvision, when imported, has FFmpeg's messages go to Python: a decoder's thread then waits for the interpreter
    # lock, which is held by the thread that closes the video and waits for the decoder's.
    av.logging.set_level(None)
    options = {"format_whitelist": VIDEO_FORMATS}
    with av.open(io.BytesIO(data), metadata_errors="ignore", options=options) as container:
        if not container.streams.video:
            raise MediaError("not a readable video: it has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # decoding it would crash the process in PyAV < 18.1
            raise MediaError("not a readable video: its codec is unknown")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


def _packets(container: Any, stream: Any) -> list:
    return [packet for packet in container.demux(stream) if packet.size]  # the empty one at the end drains the decoder


def _usable_stamps(container: Any, packets: list) -> list[int]:
    """The ascending time stamps of all frames that are shown; [] if packets lack them."""
    stamps = sorted({packet.pts for packet in packets if packet.pts is not None and not packet.is_discard})
    # AVI stores none: FFmpeg guesses them from the order of the packets, which is not that of the frames.
    return [] if len(stamps) < _shown(packets) or container.format.name == "avi" else stamps


def _shown(packets: list) -> int:
    """How many packets show a frame: an edit list may have some decoded only."""
    return sum(not packet.is_discard for packet in packets)


def _decode_wanted(stream: Any, packets: list, wanted: set[int]) -> Iterator[Any]:
    """Frames, among them those with the time stamps `wanted`, from as few packets as possible."""
    context = stream.codec_context
    skips = context.name == "h264"  # a frame that is no reference there is none at all: leaving it out is exact
    for start, stop in _packet_runs(packets, wanted):
        for packet in packets[start:stop]:
            if skips:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()
        yield from context.decode(None)
        reorder_depth = context.reorder_depth
        context.flush_buffers()
        context.reorder_depth = reorder_depth  # flushing forgets it, and reordered frames would be lost


def _packet_runs(packets: list, wanted: set[int]) -> list[tuple[int, int]]:
    """Runs packets[start:stop] that hold the frames with the time stamps `wanted` and what they are predicted from.

    A frame needs the packets from the last key frame that is not shown after it. (A key frame's packet may be followed
    by frames shown before it, which are predicted from the packets before it as well.)
    """
    runs: list[tuple[int, int]] = []
    keys: list[int] = []
    for position, packet in enumerate(packets):
        if packet.is_keyframe:
            keys.append(position)
        if packet.pts in wanted:
            start = next((key for key in reversed(keys) if packets[key].pts <= packet.pts), 0)
            while runs and start <= runs[-1][1]:
                start = min(start, runs.pop()[0])
            runs.append((start, position + 1))
    return runs


class _Video:
    """The arrays of a video, filled frame by frame as a decoder yields them.

    keys: names of the wanted frames, in order, repeated where a frame is wanted repeatedly. Others are passed over.
    """

    def __init__(self, keys: list[int], fit: Fit | None, planes: bool, threads: int) -> None:
        self.keys = keys
        self.fit = fit
        self.planes = planes
        self.threads = threads
        self.missing = set(keys)
        self._arrays: list[np.ndarray] = []
        self._scalers: dict[tuple, Any] = {}  # one for each output: setting one up costs as much as scaling a frame

    def put(self, key: int, frame: Any) -> None:
        """Converts a frame if it is wanted."""
        if key not in self.missing:
            return
        if not self._arrays:
            self._begin(frame)
        self.missing.remove(key)
        places = [place for place, wanted in enumerate(self.keys) if wanted == key]
        for array, plane in zip(self._arrays, self._convert(frame)):
            array[places] = plane.reshape(array.shape[1:])

    def result(self) -> np.ndarray | YUVFrames:
        """The arrays, once no frame is missing."""
        arrays = [np.ascontiguousarray(_turn(array, self._orientation)) for array in self._arrays]
        matrix = "bt709" if self._matrix == BT709 else "bt601"
        return YUVFrames(*arrays, matrix, self._range == FULL) if self.planes else arrays[0]

    def _begin(self, frame: Any) -> None:
        """The first frame decides on size, orientation and colours of all."""
        self._matrix, self._range = _colours(frame)
        self._orientation = orientation(frame)
        exchanged = exchanges_axes(self._orientation)
        height, width = _displayed_size(frame, exchanged)
        if self.fit:
            height, width = self.fit(height, width, counted_frames(len(self.keys)))
        elif self.planes:
            height, width = max(2, height // 2 * 2), max(2, width // 2 * 2)
        self._size = height, width = (width, height) if exchanged else (height, width)
        shapes = [(height, width), *[(height // 2, width // 2)] * 2] if self.planes else [(height, width, 3)]
        self._arrays = [np.empty((len(self.keys), *shape), np.uint8) for shape in shapes]

    def _convert(self, frame: Any) -> list[np.ndarray]:
        """-> [luma, cb, cr], or [RGB as H x 3W], not turned yet."""
        height, width = self._size
        if _is_grey(frame) and frame.color_range == LIMITED:  # libswscale takes any grey as full range
            frame = self._scale(frame, "yuv444p", frame.height, frame.width, FULL)  # the values as they are
            frame.color_range = LIMITED
        if not self.planes:
            return _views(self._scale(frame, "rgb24", height, width, FULL))
        luma, *_ = _views(self._scale(frame, "yuv420p", height, width, self._range))
        # 4:4:4 at half the size has chroma at the centres, wherever 4:2:0 of this file has it (MPEG-2, H.264: left).
        # And FFmpeg 8 leaves rows of 4:2:0 chroma unwritten when it only copies a frame.
        _, *chroma = _views(self._scale(frame, "yuv444p", height // 2, width // 2, self._range))
        return [luma, *chroma]

    def _scale(self, frame: Any, pixel_format: str, height: int, width: int, color_range: int) -> Any:
        from av.video.reformatter import VideoReformatter

        key = (pixel_format, height, width)
        if key not in self._scalers:
            self._scalers[key] = VideoReformatter()
        return self._scalers[key].reformat(
            frame,
            width,
            height,
            pixel_format,
            dst_colorspace=self._matrix,
            dst_color_range=color_range,
            interpolation=SCALER_FLAGS,
            threads=self.threads,
        )


def _views(frame: Any) -> list[np.ndarray]:
    """The planes of an 8-bit frame without the padding of their rows: uint8 [rows, bytes of a row]."""
    size = 3 if frame.format.name == "rgb24" else 1
    return [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width * size] for p in frame.planes]


def _colours(frame: Any) -> tuple[int, int]:
    """Codes of the matrix and range that a frame's planes get."""
    if frame.format.is_rgb or frame.format.has_palette:
        return BT601, FULL
    untagged_grey = _is_grey(frame) and frame.color_range != LIMITED
    full = untagged_grey or frame.color_range == FULL or frame.format.name.startswith("yuvj")
    return BT601 if frame.colorspace in BT601_ALIKE else BT709, FULL if full else LIMITED


def _is_grey(frame: Any) -> bool:
    """One plane of luma, perhaps one of alpha."""
    return len(frame.format.components) <= 2 and not frame.format.is_rgb and not frame.format.has_palette


def orientation(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: what is stored at x, y is shown at a x + c y, b x + d y, scale and offset
    apart."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a, b, c, d


def exchanges_axes(orientation: tuple[int, int, int, int]) -> bool:
    return abs(orientation[1]) > abs(orientation[0])


def _turn(frames: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """[T, H, W, ...] as stored -> as displayed: one of the eight ways to turn and mirror, the nearest to the matrix."""
    a, b, c, d = orientation
    if exchanges_axes(orientation):
        frames, a, d = frames.swapaxes(1, 2), c, b
    return frames[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# Parts of a shard


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
    """A media part of a shard -> uint8 RGB [H, W, 3] (kind "image") or [T, H, W, 3] ("video"). Raises MediaError.

    content: file bytes, a PIL image, or what Energon's own decoding makes of them: for an image a float tensor
    [C, H, W] in 0..1, for a video an object with `frames`, a uint8 tensor [T, C, H, W], and `info`. fit: as for
    `decode_image`. planes, threads: as for `decode_video`; a video that Energon decoded is RGB in any case.
    """
    if isinstance(content, (bytes, bytearray)):
        if kind == "image":
            return decode_image(content, fit)
        return decode_video(content, sampling, fit, planes, threads)
    if kind == "image" and isinstance(content, Image.Image):
        with _readable("image", IMAGE_ERRORS):
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
    """Height, width and number (1 of an image) of the frames that `as_array` reads of the same part, before they are
    resized; from headers and packets. Of a video that is shown turned, height and width are those before. Raises
    MediaError. Damaged videos may hold fewer frames than they say."""
    if isinstance(content, (bytes, bytearray)):
        return _image_shape(content) if kind == "image" else _video_shape(content, sampling)
    if kind == "image" and isinstance(content, Image.Image):
        with _readable("image", IMAGE_ERRORS):
            return *_displayed_size(content, _is_turned(content)), 1
    if kind == "image" and getattr(content, "ndim", 0) == 3:
        return *content.shape[1:], 1
    if kind == "video" and hasattr(content, "frames"):
        count = sampling.count(len(content.frames), float(content.info.get("video_fps", 0)))
        return *content.frames.shape[2:], count
    raise MediaError(f"cannot read a {kind} part of type {type(content).__name__}")


def _image_shape(data: bytes) -> tuple[int, int, int]:
    with _readable("image", IMAGE_ERRORS), Image.open(io.BytesIO(data)) as image:
        return *_displayed_size(image, _is_turned(image)), 1


def _is_turned(image: Image.Image) -> bool:
    # A PNG's own getexif decodes the image, to find tags that stand behind it.
    return Image.Image.getexif(image).get(EXIF_ORIENTATION) in TURNED


def _video_shape(data: bytes, sampling: VideoSampling) -> tuple[int, int, int]:
    import av

    with _readable("video", (av.FFmpegError, OSError, IndexError)), _open(data, threads=1) as (container, stream):
        packets, rate = _packets(container, stream), float(stream.average_rate or 0)
        stamps = _usable_stamps(container, packets)
        seconds = np.array(stamps, np.float64) * float(stream.time_base or 0)
        count = len(sampling.indices_at(seconds, rate)) if stamps else sampling.count(_shown(packets), rate)
        return stream.codec_context.height, stream.codec_context.width, count


def resize_frames(kind: str, pixels: np.ndarray, fit: Fit | None) -> np.ndarray:
    """An image uint8 [H, W, 3] or the frames of a video uint8 [T, H, W, 3] at the size that `fit` gives, by PIL's
    bicubic; as it is where it has that size."""
    frames = pixels[None] if kind == "image" else pixels
    height, width = frames.shape[1:3]
    if fit:
        height, width = fit(height, width, 1 if kind == "image" else counted_frames(len(frames)))
    if (height, width) == frames.shape[1:3]:
        return pixels
    resized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
    return resized[0] if kind == "image" else np.stack(resized)


class BadSample(ValueError):
    """A sample that cannot be learned from; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
