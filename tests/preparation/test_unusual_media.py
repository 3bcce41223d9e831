"""Sound files that are easily taken for broken ones: several video streams, joined videos, PNGs with large chunks."""

import io
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from media_files import audio_file, encode, insert_chunk, noise
from PIL import Image

from dct_qwen2vl.data.images import MAXIMUM_PNG_CHUNK, decode_image
from dct_qwen2vl.data.media import media_shape
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, decode_video
from dct_qwen2vl.preparation.conversion import convert_media
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.verification import is_copy

ALL_FRAMES = VideoSampling(fps=1000, min_frames=1)
WHITE, GREY = 235, 120  # levels of a preview's frames, of a film's
MEGABYTE = 1 << 20


def add_stream(file, codec: str, height: int, width: int, pixel_format: str = "yuv420p"):
    stream = file.add_stream(codec, rate=8, width=width, height=height)
    stream.pix_fmt = pixel_format
    return stream


def write(file, stream, level: int, frames: int) -> None:
    for number in range(frames):
        pixels = np.full((stream.height, stream.width, 3), level, np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 8)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def with_preview(
    container: str,
    preview: tuple[int, int, int],
    film: tuple[int, int, int],
    codecs: tuple[str, str] = ("libx264", "libx264"),
    default: tuple[bool, bool] = (True, True),
) -> bytes:
    """A file whose first video stream is a preview; each of height, width and frames."""
    output = io.BytesIO()
    formats = {"mjpeg": "yuvj420p"}
    with av.open(output, "w", format=container) as file:
        streams = [add_stream(file, codec, *sides[:2], formats.get(codec, "yuv420p"))
                   for codec, sides in zip(codecs, (preview, film))]  # fmt: skip
        for stream, is_default in zip(streams, default):
            stream.disposition = Disposition.default if is_default else Disposition(0)
        for stream, level, sides in zip(streams, (WHITE, GREY), (preview, film)):
            write(file, stream, level, sides[2])
    return output.getvalue()


def with_cover(container: str, sound_only: bool = False) -> bytes:
    output = io.BytesIO()
    with av.open(output, "w", format=container) as file:
        cover = add_stream(file, "mjpeg", 480, 640, "yuvj420p")
        cover.disposition = Disposition.attached_pic
        film = None if sound_only else add_stream(file, "libx264", 96, 64)
        sound = file.add_stream("aac", rate=16_000, layout="mono")
        write(file, cover, WHITE, 1)
        if film:
            write(file, film, GREY, 12)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 16_000, 0
        file.mux(sound.encode(silence))
        file.mux(sound.encode())
    return output.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
@pytest.mark.parametrize("preview", [(48, 64, 1), (48, 64, 12)], ids=["of one frame", "of all frames"])
def test_a_preview_is_not_the_film(container, preview):
    data = with_preview(container, preview, (192, 256, 12))
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].codec_context.height == 48
    stored = convert_media("video", "name", data)
    assert (stored.height, stored.width, stored.frames) == (192, 256, 12)
    for content in (data, stored.data):
        frames = decode_video(content, ALL_FRAMES)
        assert frames.shape == (12, 192, 256, 3) and np.abs(frames.astype(int) - GREY).max() <= 3
        assert media_shape("video", content, ALL_FRAMES) == (192, 256, 12)


@pytest.mark.parametrize("container", ["matroska", "avi"])
def test_a_single_picture_is_not_the_film_even_if_it_is_larger(container):
    data = with_preview(container, (480, 640, 1), (96, 64, 12), codecs=("mjpeg", "libx264"))
    assert decode_video(data, ALL_FRAMES).shape == (12, 96, 64, 3)
    assert convert_media("video", "name", data).frames == 12


def test_the_default_stream_is_the_film():
    """A second angle of more pixels is not taken."""
    data = with_preview("matroska", (96, 64, 12), (192, 256, 12), default=(True, False))
    assert decode_video(data, ALL_FRAMES).shape == (12, 96, 64, 3)


def test_a_cover_is_never_the_film():
    data = with_cover("mp4")
    stored = convert_media("video", "name", data)
    assert (stored.height, stored.width, stored.frames) == (96, 64, 12)
    assert decode_video(data, ALL_FRAMES).shape == (12, 96, 64, 3)
    music = with_cover("mp4", sound_only=True)
    with av.open(io.BytesIO(music)) as file:
        assert len(file.streams.video) == 1
    for content in (music, audio_file("mp4", "aac")):
        with pytest.raises(UnusableSample, match="no video stream") as caught:
            convert_media("video", "name", content)
        assert caught.value.reason == "broken_video"
        with pytest.raises(MediaError, match="it has no video"):
            decode_video(content, ALL_FRAMES)


# Joined transport streams


def transport_stream(codec: str, height: int, width: int, first: int, seed: int) -> bytes:
    """12 frames of random blocks, the first of them at the time `first`, in frames."""
    output, random = io.BytesIO(), np.random.default_rng(seed)
    with av.open(output, "w", format="mpegts") as file:
        stream = add_stream(file, codec, height, width)
        stream.options = {"g": "6", "bf": "0"}
        for number in range(12):
            blocks = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(blocks.repeat(16, 0).repeat(16, 1), format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return output.getvalue()


def counted_through(data: bytes) -> bytes:
    """The continuity counters (ISO 13818-1, 2.4.3.3) go on where one stream stands behind another."""
    parts, counts = bytearray(data), {}
    for start in range(0, len(parts), 188):
        channel = bytes([parts[start + 1] & 31, parts[start + 2]])
        if parts[start + 3] & 0x10:
            counts[channel] = (counts.get(channel, -1) + 1) & 15
            parts[start + 3] = parts[start + 3] & 0xF0 | counts[channel]
    return bytes(parts)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("size", [(96, 64), (192, 128), (64, 96)], ids=["same size", "larger", "turned"])
@pytest.mark.parametrize("first", [0, 12], ids=["time begins again", "time goes on"])
@pytest.mark.parametrize("counted", [False, True], ids=["cat", "counted through"])
def test_joined_transport_streams_are_one_video(codec, size, first, counted):
    parts = transport_stream(codec, 96, 64, 0, seed=0), transport_stream(codec, *size, first, seed=1)
    joined = counted_through(b"".join(parts)) if counted else b"".join(parts)
    stored = convert_media("video", "name", joined)
    assert (stored.part, stored.height, stored.width, stored.frames) == ("mp4", 96, 64, 24)
    assert stored.seconds == pytest.approx(3.0, abs=0.05)
    frames = decode_video(stored.data, VideoSampling(fps=8))
    halves = [decode_video(part, ALL_FRAMES, lambda *_: (96, 64)) for part in parts]
    assert len(frames) >= 22, "of other sizes, MPEG-2's decoder drops the frame before the change"
    np.testing.assert_array_equal(frames[:11], halves[0][:11])
    np.testing.assert_array_equal(frames[-11:], halves[1][-11:])


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_transport_stream_with_a_hole_is_still_skipped(codec):
    data = transport_stream(codec, 96, 64, 0, seed=0)
    third = len(data) // 188 // 3 * 188
    with pytest.raises(UnusableSample) as caught:
        convert_media("video", "name", data[:third] + data[third + 5 * 188 :])
    assert caught.value.reason == "broken_video"


# PNGs


def text(size: int) -> bytes:
    return b"history " * (size // 8)


LARGE_CHUNKS = {
    "profile": (b"iCCP", b"printer\0\0" + zlib.compress(np.random.default_rng(0).bytes(3 * MEGABYTE))),
    "profile of zeros": (b"iCCP", b"printer\0\0" + zlib.compress(bytes(3 * MEGABYTE))),
    "compressed text": (b"zTXt", b"Comment\0\0" + zlib.compress(text(3 * MEGABYTE))),
    "text": (b"tEXt", b"Comment\0" + text(3 * MEGABYTE)),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text(3 * MEGABYTE)),
    "compressed XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text(3 * MEGABYTE))),
}


@pytest.mark.parametrize("name", LARGE_CHUNKS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_chunk_costs_no_png(name, mode):
    image = noise().convert(mode)
    plain = encode(image, "PNG")
    data = insert_chunk(plain, *LARGE_CHUNKS[name])
    np.testing.assert_array_equal(decode_image(data), np.asarray(image.convert("RGB")))
    stored = convert_media("image", "name", data)
    assert stored.data == data if mode == "RGB" else stored.data == convert_media("image", "name", plain).data
    assert media_shape("image", data, ALL_FRAMES) == (40, 56, 1)
    assert is_copy(data)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize(("kind", "start"), [(b"iCCP", b"p\0\0"), (b"zTXt", b"Comment\0\0")])
def test_a_chunk_that_unpacks_to_too_much_is_refused(kind, start, behind):
    """A bomb of 17 KB. Nothing reads a colour profile behind the pixels."""
    plain, content = encode(noise(), "PNG"), start + zlib.compress(bytes(MAXIMUM_PNG_CHUNK + MEGABYTE))
    bomb = insert_chunk(plain, kind, content)
    if behind:
        chunk = bomb[33 : len(bomb) - len(plain) + 33]
        bomb = plain[:-12] + chunk + plain[-12:]
    assert len(bomb) < 40_000
    with pytest.raises(UnusableSample) as caught:
        convert_media("image", "name", bomb)
    assert caught.value.reason == "broken_image"


def test_many_texts_together_are_bounded():
    data, chunk = encode(noise(), "PNG"), b"Comment\0\0" + zlib.compress(bytes(15 * MEGABYTE))
    assert Image.open(io.BytesIO(insert_chunk(data, b"zTXt", chunk)))
    for _ in range(5):
        data = insert_chunk(data, b"zTXt", chunk)
    with pytest.raises(MediaError, match="not a readable image"):
        decode_image(data)
