"""Bytes of videos -> RGB arrays or planes. The one place that decides which frames are read, and how.

Letters used for shapes in this file: T frames of a video, H and W rows and columns in pixels as displayed, that is,
with the display matrix applied.
"""

import io
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dct_qwen2vl.common.video_sampling import VideoSampling
from dct_qwen2vl.data.reading import Fit, MediaError, counted_frames, displayed_size, readable

VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi")
# FFmpeg's names of what is opened. Playlists and other formats that make it open further files are not among them.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg"
# libswscale's flags (swscale.h): bicubic as the image processor, exact rounding, chroma filtered for every pixel. With
# the first alone white comes out as 253 and saturated colours are up to 3 levels off.
SCALER_FLAGS = 0x4 | 0x40000 | 0x2000 | 0x4000
# Codes of ITU-T H.273, which FFmpeg uses. Matrices 5 and 6 are BT.601's and 4 is next to it; 2 is "unspecified". What
# has no tag is BT.601 whatever its height, as FFmpeg has it and thus every reader that Qwen2-VL has been used with.
BT709, BT601 = 1, 5
BT601_ALIKE = (0, 2, 3, 4, 5, 6)
LIMITED, FULL = 1, 2
DEFAULT_BONUS = 5_000_000  # pixels
EBML = b"\x1a\x45\xdf\xa3"  # with which Matroska and WebM begin (RFC 9559)
STILL_CODECS = ("mjpeg", "png", "bmp", "gif", "webp", "tiff")  # of covers; a film of JPEGs is a file's only stream


@dataclass(frozen=True)
class YUVFrames:
    """A video as C-contiguous 4:2:0 planes.

    luma: uint8 [T, H, W]. H and W are even.
    cb: uint8 [T, H/2, W/2]. Each sample lies at the centre of its 2 x 2 luma samples.
    cr: uint8 [T, H/2, W/2]. As cb.
    matrix: "bt601" or "bt709".
    full_range: Whether values use 0..255. Otherwise luma is clipped to 16..235, cb and cr to 16..240, as in a
        conversion to RGB.
    """

    luma: np.ndarray
    cb: np.ndarray
    cr: np.ndarray
    matrix: str
    full_range: bool

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, bool]:
        """The arguments of `DCTTokenizer.encode_planes`."""
        return self.luma, self.cb, self.cr, self.matrix, self.full_range

    @property
    def nbytes(self) -> int:
        """Bytes of the three planes."""
        return self.luma.nbytes + self.cb.nbytes + self.cr.nbytes


def decode_video(
    data: bytes, sampling: VideoSampling, fit: Fit | None = None, planes: bool = False, threads: int = 0
) -> np.ndarray | YUVFrames:
    """Decodes the frames of a video file that `sampling` names: uint8 RGB [T, H, W, 3], or their planes.

    data: The file.
    sampling: Which frames are read.
    fit: Gives the size, with even sides for planes. None: frames keep their size, and planes lose an odd row or column.
    planes: Whether the result is 4:2:0 planes.
    threads: Of the decoder and the scaler. 0: one for each core.

    The colour matrix and range of the stream's tags are used. Streams without tags are BT.601 of limited range. Planes
    keep both, but RGB streams become full-range BT.601, and other matrices (BT.2020) become BT.709. Transfer functions
    stay as they are (HDR is not tone-mapped). Alpha is dropped. Pixels are taken as square.

    Raises MediaError.
    """
    import av  # PyAV: only videos need it

    new_video = partial(_Video, fit=fit, planes=planes, threads=threads)
    with readable("video", (av.FFmpegError, OSError, IndexError)):
        video = None
        with suppress(av.FFmpegError):  # decoding from what is no key frame, say; the whole video may still decode
            video = _read_by_stamp(data, sampling, new_video, threads)
        return (video or _read_by_number(data, sampling, new_video, threads)).result()


def _read_by_stamp(data: bytes, sampling: VideoSampling, new_video: Callable, threads: int) -> "_Video | None":
    """Reads a video by its packets' time stamps and decodes only the packets that the wanted frames need.

    None if that does not work: a container without stamps, wrong ones, packets that show nothing, false key frames.
    """
    with _open(data, threads, has_own_stamps(data)) as (container, stream):
        packets = _packets(container, stream)
        stamps = _usable_stamps(container, packets)
        if not stamps:
            return None
        seconds = np.array(stamps, np.float64) * float(stream.time_base)
        video = new_video([stamps[number] for number in sampling.indices_at(seconds, float(stream.average_rate or 0))])
        latest = first = stamps[0]
        for frame in _decode_wanted(stream, packets, set(video.keys)):
            if frame.pts is not None and frame.pts < first:  # before the first key frame, and readable after all
                continue
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


def has_own_stamps(data: bytes) -> bool:
    """Whether a file is mp4, mov or Matroska, by its first bytes: these store when each frame is shown."""
    return data[4:8] == b"ftyp" or data.startswith(EBML)


@contextmanager
def _open(data: bytes, threads: int, unseen: bool = False) -> Iterator[tuple[Any, Any]]:
    """-> container and the stream that is the film.

    unseen: FFmpeg decodes no frames to guess what the container says: it decodes seven at least. For who knows the
        order of frames from their stamps.
    """
    import av

    # torchvision, when imported, has FFmpeg's messages go to Python: a decoder's thread then waits for the interpreter
    # lock, which is held by the thread that closes the video and waits for the decoder's.
    av.logging.set_level(None)
    options = {"format_whitelist": VIDEO_FORMATS} | ({"skip_frame": "all"} if unseen else {})
    with av.open(io.BytesIO(data), metadata_errors="ignore", options=options) as container:
        stream = film_of(container)
        if stream is None:
            raise MediaError("not a readable video: it has no video")
        if stream.codec_context is None:  # decoding it would crash the process in PyAV < 18.1
            raise MediaError("not a readable video: its codec is unknown")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


def film_of(container: Any) -> Any | None:
    """The video stream that the ffmpeg command takes where it is not told: the one of most pixels, to which being the
    default adds 5 megapixels (ffmpeg_mux_init.c, map_auto_video). None without one.

    A cover that is attached to the file is no film, and a single picture is one only where there is nothing else.
    """
    from av.stream import Disposition

    def rank(stream: Any) -> tuple[bool, int]:
        context = stream.codec_context
        pixels = context.height * context.width if context else 0
        is_still = stream.frames == 1 or (context is not None and context.name in STILL_CODECS)
        return not is_still, pixels + (DEFAULT_BONUS if stream.disposition & Disposition.default else 0)

    films = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    return max(films, key=rank, default=None)


def _packets(container: Any, stream: Any) -> list:
    return [packet for packet in container.demux(stream) if packet.size]  # the empty one at the end drains the decoder


def _usable_stamps(container: Any, packets: list) -> list[int]:
    """The ascending time stamps of all frames that are shown; [] if packets lack them.

    Frames before the first key frame are not: where a video was cut, they are predicted from frames that are gone.
    """
    stamps = sorted({packet.pts for packet in packets if packet.pts is not None and not packet.is_discard})
    # AVI stores none: FFmpeg guesses them from the order of the packets, which is not that of the frames.
    if len(stamps) < _shown(packets) or container.format.name == "avi":
        return []
    first = next((packet.pts for packet in packets if packet.is_keyframe), stamps[0])
    return [stamp for stamp in stamps if stamp >= first]


def _shown(packets: list) -> int:
    """How many packets show a frame: an edit list may have some decoded only."""
    return sum(not packet.is_discard for packet in packets)


def _decode_wanted(stream: Any, packets: list, wanted: set[int]) -> Iterator[Any]:
    """Frames, among them those with the time stamps `wanted`, from as few packets as possible."""
    context = stream.codec_context
    skips = context.name == "h264"  # a frame that is no reference there is none at all: leaving it out is exact
    if skips:  # without it in the stream, FFmpeg learns it from frames that it then loses
        context.reorder_depth = max(context.reorder_depth, _reorder_depth(packets))
    for start, stop in _packet_runs(packets, wanted):
        for packet in packets[start:stop]:
            if skips:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()
        yield from context.decode(None)
        reorder_depth = context.reorder_depth
        context.flush_buffers()
        context.reorder_depth = reorder_depth  # flushing forgets it, and reordered frames would be lost


def _reorder_depth(packets: list) -> int:
    """Most packets that come before another one and are shown after it."""
    earlier: list[int] = []  # stamps, ascending
    depth = 0
    for packet in packets:
        place = bisect(earlier, packet.pts)
        depth = max(depth, len(earlier) - place)
        earlier.insert(place, packet.pts)
    return depth


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
        height, width = displayed_size(frame, exchanged)
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
        return [luma, *chroma] if self._range == FULL else [_clip(luma, 235), *(_clip(plane, 240) for plane in chroma)]

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


def _clip(plane: np.ndarray, highest: int) -> np.ndarray:
    """Cameras write luma over white and below black, which RGB cannot show."""
    return plane.clip(16, highest)


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
    """Whether a display matrix, as `orientation` gives it, exchanges rows and columns."""
    return abs(orientation[1]) > abs(orientation[0])


def _turn(frames: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """[T, H, W, ...] as stored -> as displayed: one of the eight ways to turn and mirror, the nearest to the matrix."""
    a, b, c, d = orientation
    if exchanges_axes(orientation):
        frames, a, d = frames.swapaxes(1, 2), c, b
    return frames[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def video_shape(data: bytes, sampling: VideoSampling) -> tuple[int, int, int]:
    """Height and width as stored, pixels, and how many frames are read. Only headers and packets are read.

    data: The file.
    sampling: Which frames are read.

    Raises MediaError.
    """
    size, indices = _inspect(data, sampling)
    return *size, len(indices)


def frame_indices(data: bytes, sampling: VideoSampling) -> list[int]:
    """Numbers of the frames that `decode_video` reads, ascending, in the order in which they are shown.

    data: The file.
    sampling: Which frames are read.

    Raises MediaError.
    """
    return _inspect(data, sampling)[1].tolist()


def _inspect(data: bytes, sampling: VideoSampling) -> tuple[tuple[int, int], np.ndarray]:
    """-> height and width as stored, numbers of the frames that are read."""
    import av

    with readable("video", (av.FFmpegError, OSError, IndexError)), _open(data, threads=1) as (container, stream):
        packets, rate = _packets(container, stream), float(stream.average_rate or 0)
        stamps = _usable_stamps(container, packets)
        seconds = np.array(stamps, np.float64) * float(stream.time_base or 0)
        indices = sampling.indices_at(seconds, rate) if stamps else sampling.indices(_shown(packets), rate)
        return (stream.codec_context.height, stream.codec_context.width), indices
