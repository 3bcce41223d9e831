"""Videos, through FFmpeg: what a file holds, whether it can be decoded, and its packets in another container.

Containers are opened by what they are. Playlists and other formats that would make FFmpeg open further files are not
opened.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from dct_qwen2vl.data.media import media_shape
from dct_qwen2vl.data.videos import VIDEO_FORMATS, VideoSampling, exchanges_axes, film_of, orientation
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.file_kinds import IMAGE, name_medium

MAXIMUM_FRAME_PIXELS = 8192 * 4320  # 8K
MAXIMUM_ASPECT_RATIO = 200  # of Qwen2-VL's smart_resize
MAXIMUM_PACKETS = 1_000_000  # nine hours at 30 frames a second
PART_PACKETS = 48  # decoded of the first, the middle and the last part of a video, at most
FRAMES_PER_SECOND = 2  # of a video given as images: what training samples by default, so that it reads all of them
TIME_TOLERANCE = 0.02  # of a video's seconds; stamps of a millisecond are off by less
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # with which an mp4 or mov may begin
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the two top-level elements of Matroska (RFC 9559)


class Probe(NamedTuple):
    """What a video file holds.

    part: its file ending. None if training does not read the container.
    height, width: as displayed, px.
    frames: that are shown.
    seconds: from the beginning of the first frame to the end of the last.
    """

    part: str | None
    height: int
    width: int
    frames: int
    seconds: float


@contextmanager
def open_video(data: bytes) -> Iterator[tuple[Any, Any]]:
    """-> container and the stream that training reads. Raises UnusableSample without one."""
    import av  # loads FFmpeg's libraries, which data without videos does not need

    guard = {"max_pixels": str(MAXIMUM_FRAME_PIXELS)}
    allowed = {"format_whitelist": VIDEO_FORMATS}
    try:
        container = av.open(io.BytesIO(data), options=guard, container_options=allowed, metadata_errors="ignore")
    except av.FFmpegError as error:
        reason = "unsupported_video" if IMAGE.match(data) else "broken_video"
        raise UnusableSample(reason, f"{name_medium(data, 'video')} ({error.strerror})") from None
    with container:
        stream = film_of(container)
        if stream is None:  # a piece of music, perhaps with a cover
            raise UnusableSample("broken_video", "no video stream")
        if stream.codec_context is None:  # decoding it would crash the process in PyAV < 18.1
            raise UnusableSample("unsupported_video", "a codec that FFmpeg does not know")
        refuse_frame_size(stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = guard  # its frames may be larger than the container says
        stream.codec_context.thread_count = 1
        yield container, stream


def refuse_frame_size(height: int, width: int) -> None:
    """Raises UnusableSample. FFmpeg itself refuses a size beyond `max_pixels` where the container tells it."""
    if min(height, width) < 1:
        raise UnusableSample("broken_video", f"no frame size, or one of over {MAXIMUM_FRAME_PIXELS} px")
    if height * width > MAXIMUM_FRAME_PIXELS:
        limit = f"the limit is {MAXIMUM_FRAME_PIXELS} px a frame"
        raise UnusableSample("video_too_large", f"{height} x {width} px (height, width), {limit}")
    if max(height, width) > MAXIMUM_ASPECT_RATIO * min(height, width):
        limit = f"one side is over {MAXIMUM_ASPECT_RATIO} times the other"
        raise UnusableSample("extreme_aspect_ratio", f"{height} x {width} px (height, width), {limit}")


def probe_video(data: bytes, everything: bool = False) -> Probe:
    """Reads all packets of a video and decodes a first, a middle and a last part.

    data: The file.
    everything: Whether all frames are decoded.

    Raises UnusableSample and FFmpeg's errors.
    """
    refuse_cut_file(data)
    with open_video(data) as (container, stream):
        formats = container.format.name.split(",")
        packets = read_packets(container, stream)
        if "mp4" in formats and len(packets) < stream.frames:
            raise UnusableSample("broken_video", f"{len(packets)} of {stream.frames} packets there")
        joined = any(packet.is_corrupt for packet in packets)
        runs = [(0, len(packets))] if everything or joined else parts_to_decode(packets)
        first, *_ = [decode_run(stream, packets, run, whole=joined) for run in runs]
        frames = sum(not packet.is_discard for packet in packets)
        exchanged = exchanges_axes(orientation(first))
        height, width = (first.width, first.height) if exchanged else (first.height, first.width)
        return Probe(file_ending(data, formats), height, width, frames, duration(stream, packets, frames))


def file_ending(data: bytes, formats: list[str]) -> str | None:
    """The ending of a container in VIDEO_EXTENSIONS. None for others.

    formats: FFmpeg's names for one demuxer.
    """
    if "mp4" in formats:
        return "mov" if data[4:12] == b"ftypqt  " else "mp4"
    if "matroska" in formats:
        return "webm" if b"webm" in data[:64] else "mkv"
    return "avi" if "avi" in formats else None


def refuse_cut_file(data: bytes) -> None:
    """Raises UnusableSample for an mp4, AVI or Matroska file that is shorter than its header says."""
    size = 0
    if data[4:8] in BOXES:
        size = end_of_boxes(data)
    elif data.startswith(b"RIFF"):
        size = (8 + int.from_bytes(data[4:8], "little")) & 0xFFFF_FFFF  # all ones where it was never filled in
    elif data.startswith(EBML):
        header, length, unknown = read_length(data, 4)
        segment = header + length
        if not unknown and data[segment : segment + 4] == SEGMENT:
            start, length, unknown = read_length(data, segment + 4)
            size = 0 if unknown else start + length
    if size > len(data):
        raise UnusableSample("broken_video", f"{len(data)} of {size} bytes there")


def end_of_boxes(data: bytes) -> int:
    """Where the last of an mp4's top-level boxes ends, of those that count (ISO 14496-12, 4.2)."""
    place = end = 0
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # 0: it goes to the end of the file; all else is wrong
            break
        place += size
        end = place if kind in (b"moov", b"mdat") else end
    return end


def read_length(data: bytes, position: int) -> tuple[int, int, bool]:
    """An element's length (RFC 8794, 4): position behind it, length, whether the length is said to be unknown."""
    first = data[position] if position < len(data) else 0
    size = 9 - first.bit_length()
    if size > 8:
        return position, 0, True
    length = int.from_bytes(data[position : position + size], "big") & ((1 << 7 * size) - 1)
    return position + size, length, length == (1 << 7 * size) - 1


def read_packets(container: Any, stream: Any) -> list[Any]:
    """All packets that hold something. Raises UnusableSample for cut ones, too many, and none."""
    packets, suspects = [], []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            suspects.append(len(packets))
        if packet.size:  # the last one only drains the decoder
            packets.append(packet)
        if len(packets) > MAXIMUM_PACKETS:
            raise UnusableSample("video_too_long", f"over {MAXIMUM_PACKETS} frames")
    for number in suspects:
        if not is_join(container, packets, number):
            raise UnusableSample("broken_video", f"packet {number} is cut short")
    if not packets:
        raise UnusableSample("broken_video", "no frames")
    return packets


def is_join(container: Any, packets: list[Any], number: int) -> bool:
    """Whether a packet that FFmpeg calls corrupt is where one transport stream was put behind another: the count of its
    parts begins again, and a key frame follows."""
    following = packets[number + 1 : number + 3]
    return container.format.name == "mpegts" and any(packet.is_keyframe for packet in following)


def parts_to_decode(packets: list[Any]) -> list[tuple[int, int]]:
    """Runs packets[start:stop] from the beginning and from the last key frames before the middle and the end."""
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    starts = {0}
    for place in (len(packets) // 2, len(packets) - 1):
        starts.add(max((key for key in keys if key <= place), default=0))
    return [(start, min(start + PART_PACKETS, len(packets))) for start in sorted(starts)]


def decode_run(stream: Any, packets: list[Any], run: tuple[int, int], whole: bool = False) -> Any:
    """-> the first frame of packets[start:stop]. Raises UnusableSample if there is none, and where all must be `whole`
    also for a damaged one."""
    start, stop = run
    first = None
    for packet in [*packets[start:stop], None]:
        for frame in stream.codec_context.decode(packet):
            first = first or frame
            if whole and frame.is_corrupt:
                raise UnusableSample("broken_video", f"a frame of packets {start} to {stop - 1} is damaged")
    stream.codec_context.flush_buffers()
    if first is None:
        raise UnusableSample("broken_video", f"no frame comes out of packets {start} to {stop - 1} of {len(packets)}")
    refuse_frame_size(first.height, first.width)
    return first


def duration(stream: Any, packets: list[Any], frames: int) -> float:
    """Seconds, by the packets' time stamps or by the frame rate. 0 where neither is there."""
    stamps = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
    if len(stamps) < frames or len(set(stamps)) < 2:
        return float(frames / stream.average_rate) if stream.average_rate else 0.0
    shown = max(stamps) - min(stamps)
    return float((shown + shown / (len(set(stamps)) - 1)) * stream.time_base)


def remux(data: bytes) -> bytes:
    """The packets of a video, from the first key frame on, in an mp4, or in an mkv or avi where mp4 takes no such
    codec.

    Time goes on where time stamps begin again, as in joined transport streams. An avi keeps a rate in place of time
    stamps. There, packets are numbered at the average rate of the video. Raises UnusableSample and FFmpeg's errors.
    """
    for container_format in ("mp4", "matroska", "avi"):
        with open_video(data) as (container, stream), new_video(container_format) as (output, target):
            try:
                copy = target.add_stream_from_template(stream, opaque=True)
            except ValueError:  # no such codec in this format
                continue
            interval = frame_interval(stream) if container_format == "avi" else None
            copy.time_base = interval or copy.time_base
            number, clock = 0, Clock()
            for packet in container.demux(stream):
                if packet.size and (number or packet.is_keyframe):
                    clock.set(packet)
                    if interval:
                        packet.pts = packet.dts = number
                        packet.time_base, packet.duration = interval, 1
                    packet.stream = copy
                    number += 1
                    target.mux(packet)
            target.close()
            return output.getvalue()
    raise UnusableSample("unsupported_video", "neither mp4 nor mkv nor avi takes its codec")


class Clock:
    """Gives packets ascending time stamps: where they step back, time goes on by one more frame from there."""

    def __init__(self) -> None:
        self.offset, self.last, self.step = 0, None, 1

    def set(self, packet: Any) -> None:
        if packet.dts is None:
            return
        if self.last is not None and packet.dts + self.offset <= self.last:
            self.offset = self.last + self.step - packet.dts
        stamp = packet.dts + self.offset
        if self.last is not None:
            self.step = packet.duration or stamp - self.last
        self.last = stamp
        if self.offset:
            packet.pts = packet.pts if packet.pts is None else packet.pts + self.offset
            packet.dts = stamp


def frame_interval(stream: Any) -> Fraction:
    """Seconds from one frame to the next, on average. Raises UnusableSample where the video does not say."""
    if not stream.average_rate:
        raise UnusableSample("unsupported_video", "only avi takes its codec, and it has no frame rate")
    return 1 / stream.average_rate


def refuse_other_times(before: tuple[bytes, Probe], after: tuple[bytes, Probe]) -> None:
    """Checks that a new container does not change what training reads of a video.

    before: The file and what it holds.
    after: The new file and what it holds.

    Raises UnusableSample for another number of frames, or another duration.
    """
    counts = [media_shape("video", data, VideoSampling())[2] for data, _ in (before, after)]
    seconds = [probe.seconds for _, probe in (before, after)]
    if counts[0] != counts[1] or abs(seconds[1] - seconds[0]) > TIME_TOLERANCE * seconds[0]:
        old, new = [f"{count} frames sampled of {length:.2f} s" for count, length in zip(counts, seconds)]
        raise UnusableSample("unsupported_video", f"only avi takes its codec, which has one rate: {old} became {new}")


def mux_jpegs(files: list[bytes], height: int, width: int) -> bytes:
    """An mp4 file that holds JPEG files as they are (Motion JPEG), at FRAMES_PER_SECOND.

    files: JPEG files of one size.
    height: Of the JPEGs, pixels.
    width: Of the JPEGs, pixels.
    """
    import av

    with new_video("mp4") as (output, target):
        stream = target.add_mux_stream("mjpeg", rate=FRAMES_PER_SECOND, width=width, height=height)
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        for number, data in enumerate(files):
            packet = av.Packet(data)
            packet.stream = stream  # which sets its time base, too
            packet.pts = packet.dts = number
            packet.time_base, packet.duration, packet.is_keyframe = Fraction(1, FRAMES_PER_SECOND), 1, True
            target.mux(packet)
        target.close()
        return output.getvalue()


@contextmanager
def new_video(container_format: str) -> Iterator[tuple[io.BytesIO, Any]]:
    """-> the bytes, complete once the container is closed, and the container. The same input gives the same bytes."""
    import av

    output = io.BytesIO()
    with av.open(output, "w", format=container_format, options={"fflags": "+bitexact"}) as container:
        yield output, container
