"""Images and videos made for the tests, as bytes of files."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOURS = {"r": RED, "g": GREEN, "b": BLUE, "w": WHITE}


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def quadrants(names: str, height: int = 32, width: int = 48) -> Image.Image:
    """Four flat quadrants, "rgbw": top left red, top right green, bottom left blue, bottom right white."""
    image = Image.new("RGB", (width, height))
    for number, name in enumerate(names):
        row, column = divmod(number, 2)
        image.paste(COLOURS[name], (column * width // 2, row * height // 2, width, height))
    return image


def noise(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rotated_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(height: int, width: int) -> bytes:
    """A grey PNG of any size that holds one byte of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0"))


def insert_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk behind its IHDR."""
    return png[:33] + png_chunk(kind, content) + png[33:]


def insert_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """The JPEG with one more segment at its beginning."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def video_file(
    container: str = "mp4", codec: str = "libx264", frames: int = 12, rotation: int = 0, equal: int = 1, **options
) -> bytes:
    """A video of 96 x 64 px (height, width): blocks of random grey levels, 8 frames a second, each `equal` times."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as target:
        video = target.add_stream(codec, rate=Fraction(8), width=64, height=96)
        video.pix_fmt = "yuv420p"
        video.options = {name: str(value) for name, value in options.items()}
        for number in range(frames):
            levels = np.random.default_rng(number // equal).integers(0, 256, (6, 4, 1), dtype=np.uint8)
            pixels = levels.repeat(16, axis=0).repeat(16, axis=1).repeat(3, axis=2)
            target.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(video.encode())
    return stream.getvalue()


def audio_file(container: str, codec: str) -> bytes:
    """64 ms of silence."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as target:
        audio = target.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        target.mux(audio.encode(frame))
        target.mux(audio.encode())
    return stream.getvalue()
