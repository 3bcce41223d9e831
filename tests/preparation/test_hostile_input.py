"""Files that are broken, absurd or made to do harm: each is stored as what it is, or left out for a reason."""

import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import audio_file, encode, insert_chunk, insert_segment, noise, png_chunk, video_file
from PIL import Image

import data_preparation
from benchmarks import fuzz_preparation
from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.preparation.conversion import ConversionOptions, convert_media
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.image_structure import read_layout


def outcome(kind: str, data: bytes, **options) -> str:
    """The treatment, or the reason for which a medium is left out."""
    try:
        return convert_media(kind, "x.jpg", data, ConversionOptions(**options)).treatment
    except UnusableSample as unusable:
        return unusable.reason


# Images


def zeros_png(height: int, width: int) -> bytes:
    """A black grey PNG, sound to its end: 80 megapixels are 80 kB."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    compressor, rows = zlib.compressobj(1), bytes((width + 1) * 100)
    pixels = b"".join(compressor.compress(rows) for _ in range(height // 100))
    pixels += compressor.compress(rows[: (width + 1) * (height % 100)]) + compressor.flush()
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


def test_a_decompression_bomb_takes_neither_time_nor_memory():
    bomb = zeros_png(9500, 9500)
    assert len(bomb) < 1_000_000
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for options in ({}, {"max_pixels": 10_000}, {"check_images": True}):
        assert outcome("image", bomb, **options) == "image_too_large"
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KiB


def test_an_image_50_000_pixels_wide():
    assert outcome("image", zeros_png(100, 50_000)) == "extreme_aspect_ratio"
    wide = zeros_png(300, 50_000)
    assert outcome("image", wide) == "images_copied"
    small = convert_media("image", "x", wide, ConversionOptions(max_pixels=60_000))
    assert (small.treatment, small.height, small.width) == ("images_downsized", 18, 3162)


HUGE = {
    "GIF": b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\xf0\0\0" + bytes(6) + b",",
    "BMP": b"BM" + struct.pack("<IIIIiiHH", 1000, 0, 54, 40, 50_000, 50_000, 1, 24) + bytes(900),
    "PPM": b"P6 60000 60000 255\n" + bytes(900),
    "WEBP": b"RIFF\x00\x10\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\xff" * 2 + bytes(900),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", HUGE)
def test_headers_that_promise_gigabytes(file_format):
    assert outcome("image", HUGE[file_format]) in ("image_too_large", "broken_image")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_images_that_end_too_early(file_format):
    data = encode(noise(64, 64), file_format)
    for stop in (0, 1, 8, len(data) // 3, len(data) * 9 // 10):
        assert outcome("image", data[:stop]) == "broken_image", stop


def test_files_of_the_wrong_name_are_stored_as_what_they_are():
    for kind, data, part in (
        ("image", encode(noise(), "PNG"), "png"),
        ("image", encode(noise(), "WEBP"), "jpg"),
        ("video", video_file("matroska"), "mkv"),
        ("video", video_file("avi", "mpeg4"), "avi"),
        ("video", video_file("mpegts"), "mp4"),
    ):
        name = "x.jpg" if kind == "image" else "x.mp4"
        assert convert_media(kind, name, data).part == part
    assert outcome("image", video_file()) == "broken_image"
    assert outcome("video", encode(noise(), "JPEG")) == "unsupported_video"


def test_an_image_of_two_dozen_bytes():
    assert outcome("image", b"P2\n2 2\n255\n0 255 9 64\n") == "images_converted"


def test_what_follows_or_precedes_a_jpeg():
    jpeg = encode(noise(), "JPEG")
    for data in (jpeg + b"garbage", jpeg + bytes(1000), jpeg + jpeg, jpeg + b"PK\3\4"):
        assert outcome("image", data) == "images_copied"
        assert decode_image(data).shape == (40, 56, 3)
    assert outcome("image", jpeg[:-2]) == "broken_image"  # no EOI
    assert outcome("image", b"\n" + jpeg) == "broken_image"


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND", b"pHYs"])
def test_a_wrong_crc(kind):
    """What Pillow passes over, as that of IDAT, is no reason to lose an image; then it is stored as it decodes."""
    data = bytearray(encode(noise(), "PNG", dpi=(72, 72)))
    place = data.index(kind)
    data[place + 4 + int.from_bytes(data[place - 4 : place], "big")] ^= 1
    assert read_layout(bytes(data)) is None
    expected = "broken_image" if kind in (b"IHDR", b"pHYs") else outcome("image", bytes(data), check_images=True)
    assert outcome("image", bytes(data)) == expected


def test_compressed_text_and_profiles_that_explode():
    bomb = zlib.compress(bytes(20_000_000), 9)
    for kind, content in ((b"zTXt", b"Comment\0\0" + bomb), (b"iCCP", b"name\0\0" + bomb)):
        data = insert_chunk(encode(noise(), "PNG"), kind, content)
        start = time.perf_counter()
        assert outcome("image", data) == "broken_image"
        assert time.perf_counter() - start < 5


def exif_segment(ifd: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + ifd


def test_huge_and_circular_exif():
    jpeg = encode(noise(), "JPEG")
    entry = struct.pack("<HHII", 0x010E, 2, 65_000, 26)  # a description of 65,000 characters
    huge = exif_segment(struct.pack("<H", 1) + entry + bytes(4) + b"x" * 65_000)
    data = insert_segment(jpeg, 0xE1, huge)
    assert outcome("image", data) == "images_copied"
    for _ in range(20):  # more than a megabyte of it
        data = insert_segment(data, 0xE2, bytes(65_000))
    assert outcome("image", data) == "images_copied"
    circle = exif_segment(struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8))
    assert outcome("image", insert_segment(jpeg, 0xE1, circle)) == "images_copied"
    endless = exif_segment(struct.pack("<H", 65_535) + struct.pack("<HHII", 0x0112, 3, 1 << 31, 1 << 30))
    stored = convert_media("image", "x", insert_segment(jpeg, 0xE1, endless))
    assert decode_image(stored.data).shape == (40, 56, 3)


def test_cmyk_with_and_without_adobe_s_marker():
    """Adobe stores ink inverted, and so does everyone since."""
    cmyk = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    place = cmyk.index(b"Adobe") - 4
    length = int.from_bytes(cmyk[place + 2 : place + 4], "big")
    for data in (cmyk, cmyk[:place] + cmyk[place + 2 + length :]):
        stored = convert_media("image", "x", data)
        assert stored.treatment == "images_converted"
        np.testing.assert_allclose(decode_image(stored.data)[8, 8].astype(int), (255, 0, 0), atol=4)


def test_16_bit_colour():
    """Pillow writes none, so it is made by hand."""
    values = np.array([[[0, 40 * 257, 65_535]]], ">u2").repeat(16, axis=0).repeat(16, axis=1)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    stored = convert_media("image", "x", data)
    assert stored.treatment == "images_converted"
    np.testing.assert_allclose(decode_image(stored.data)[8, 8].astype(int), (0, 40, 255), atol=4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_image"),
        (b"%PDF-1.4", "unsupported_image"),
        (b"#EXTM3U\nfile:///etc/hostname\n", "broken_image"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "broken_image"),
        (b"PK\3\4" + bytes(100), "broken_image"),
        (b"\x7fELF" + bytes(100), "broken_image"),
    ],
)
def test_what_other_programs_would_have_to_open(data, reason):
    assert outcome("image", data) == reason
    assert outcome("video", data) == "broken_video"


AN_MP4 = b"\0\0\0\x18ftypisom" + bytes(50)
A_GIF = b"GIF89a" + bytes(50)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("image", b"", "x: it is empty: fetch it again"),
        ("video", bytes(99), "x: it is empty (99 bytes, all zero): fetch it again"),
        *((kind, b"<!DOCTYPE html><html>404", "x: it is a web page") for kind in ("image", "video")),
        *((kind, b"version https://git-lfs.github.com", "type git lfs pull") for kind in ("image", "video")),
        ("image", b"\0\5\x16\7\0\2\0\0Mac OS X", "x: macOS keeps notes on another file in it: remove such files"),
        ("image", AN_MP4, "x: it is a video: name it in video"),
        ("video", AN_MP4, "x: it cannot be opened: it is damaged, or"),
        ("video", A_GIF, "x: it is an image: name it in image, or make an mp4 of it with ffmpeg"),
        ("image", A_GIF[:10], "x: it cannot be opened: it is damaged, or"),
        ("image", b'{"error": 404}', "no image of a format that is read here, it begins with b'{\"error\": 404}'"),
        ("image", b"<?xml version='1.0'?>\n<svg/>", "x: SVG, which is not read here"),
    ],
)
def test_what_lies_in_place_of_a_medium_is_named(kind, data, said):
    with pytest.raises(UnusableSample, match=re.escape(said)):
        convert_media(kind, "x", data)


# Videos


def absurd_avi(height: int, width: int) -> bytes:
    """An AVI of raw video whose header says other sizes than its frames have."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as target:
        video = target.add_stream("rawvideo", rate=8, width=32, height=32)
        video.pix_fmt = "bgr24"
        for _ in range(3):
            target.mux(video.encode(av.VideoFrame(32, 32, "bgr24")))
        target.mux(video.encode())
    data = bytearray(stream.getvalue())
    place = data.index(b"strf") + 12  # behind the chunk's name, its size and biSize
    data[place : place + 8] = struct.pack("<ii", width, height)
    return bytes(data)


def test_videos_of_absurd_size(monkeypatch):
    assert outcome("video", absurd_avi(32, 32)) == "videos_copied"
    assert outcome("video", absurd_avi(32, 32_000)) == "extreme_aspect_ratio"
    for height, width in ((0, 32), (8192, 8192), (30_000, 30_000)):
        with pytest.raises(UnusableSample, match="broken_video: x: no frame size, or one of over 35389440 px"):
            convert_media("video", "x", absurd_avi(height, width))
    monkeypatch.setattr("dct_qwen2vl.preparation.video_conversion.MAXIMUM_FRAME_PIXELS", 64 * 96 - 1)
    for container in ("mp4", "mpegts"):
        assert outcome("video", video_file(container)) == "video_too_large"


def test_videos_of_too_many_frames(monkeypatch):
    monkeypatch.setattr("dct_qwen2vl.preparation.video_conversion.MAXIMUM_PACKETS", 11)
    assert outcome("video", video_file(frames=11)) == "videos_copied"
    assert outcome("video", video_file(frames=12)) == "video_too_long"


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
def test_videos_without_video_or_frames(container):
    assert outcome("video", audio_file(container, "aac")) == "broken_video"
    assert outcome("video", video_file(container, "libx264", frames=0)) == "broken_video"


def test_a_song_with_a_cover_is_no_video():
    data, stream = audio_file("matroska", "aac"), io.BytesIO()
    with av.open(io.BytesIO(data)) as song, av.open(stream, "w", format="matroska") as target:
        audio = target.add_stream_from_template(song.streams.audio[0])
        target.add_attachment("cover.png", "image/png", encode(noise(), "PNG"))
        for packet in song.demux(audio=0):
            if packet.size:
                packet.stream = audio
                target.mux(packet)
    assert outcome("video", stream.getvalue()) == "broken_video"


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm", "avi"])
def test_videos_that_end_too_early(container):
    data = video_file(container, {"webm": "libvpx", "avi": "mpeg4"}.get(container, "libx264"), frames=30)
    for stop in (0, 1, 40, len(data) // 3, len(data) * 9 // 10):
        assert outcome("video", data[:stop]) == "broken_video", stop


# Metadata


def dialogue(question: str = "What?", answer: str = "noise") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


SOUND = [json.dumps({"id": number, "conversations": dialogue(f"{number}?")}).encode() for number in range(30)]
TURNS = json.dumps(dialogue()).encode()
OTHER_TURNS = json.dumps(dialogue("Why?")).encode()
HOSTILE_ENTRIES = {
    "NaN": (b'{"id": NaN, "conversations": %s}' % TURNS, "not_a_number"),
    "infinity": (b'{"id": "i", "score": [1e999, -Infinity], "conversations": %s}' % TURNS, "not_a_number"),
    "huge integer": (b'{"id": %s, "conversations": %s}' % (b"9" * 100_000, OTHER_TURNS), "not_a_number"),
    "broken UTF-8": (b'{"id": "\xff\xc0", "conversations": %s}' % TURNS, "malformed_entry"),
    "UTF-8 of a surrogate": (b'{"id": "\xed\xa0\x80", "conversations": %s}' % TURNS, "malformed_entry"),
    "deep nesting": (b'{"id": %s%s, "conversations": %s}' % (b"[" * 50_000, b"]" * 50_000, TURNS), "malformed_entry"),
    "nesting": (b'{"id": %s%s, "conversations": %s}' % (b"[" * 70, b"]" * 70, TURNS), "malformed_entry"),
    "equal keys": (b'{"id": "k", "image": "../x.jpg", "image": null, "conversations": %s}' % TURNS, "written"),
    "lone surrogate": (b'{"id": "s", "conversations": %s}' % json.dumps(dialogue("\ud800")).encode(), "broken_text"),
    "lone surrogate in an id": (b'{"id": "\\udfff", "conversations": %s}' % TURNS, "written"),
    "zero character": (b'{"id": "0", "conversations": %s}' % json.dumps(dialogue("a\0b")).encode(), "written"),
    "giant text": (b'{"id": "g", "conversations": %s}' % json.dumps(dialogue("x" * 300_000)).encode(), "text_too_long"),
    "number": (b"17", "malformed_entry"),
    "null": (b"null", "malformed_entry"),
}


def prepare(folder: Path, text: bytes) -> int:
    (folder / "data").mkdir()
    (folder / "data" / "cambrian737k.json").write_bytes(text)
    arguments = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "shards"), "--num-workers", "0"]
    return data_preparation.main([*arguments, "--no-report"])


@pytest.mark.parametrize("as_lines", [False, True])
def test_hostile_entries_are_repaired_or_skipped_one_by_one(tmp_path, as_lines):
    entries = [*SOUND, *(text for text, _ in HOSTILE_ENTRIES.values())]
    text = b"\n".join(entries) if as_lines else b"[" + b",\n".join(entries) + b"]"
    assert prepare(tmp_path, text) == 0
    stats = json.loads((tmp_path / "shards" / "stats.json").read_bytes())
    expected = [reason for _, reason in HOSTILE_ENTRIES.values()]
    reasons = {"malformed_entry", "broken_text", "text_too_long"}
    assert stats["read"] == len(entries)
    assert stats["skipped"] == {reason: expected.count(reason) for reason in sorted(reasons)}
    assert stats["repairs"] == {"not_a_number": 3}
    assert stats["written"] == len(entries) - sum(reason in reasons for reason in expected)
    for line in (tmp_path / "shards" / "skipped.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    from dct_qwen2vl.preparation.verification import verify

    assert verify(tmp_path / "shards", 0) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        b"\xff\xfe[\0",
        b"[" + b",".join(SOUND),
        b"[" + b",".join(SOUND) + b"]]",
        b"[" + b",".join([*SOUND, b'{"id": "unclosed}']) + b"]",
        b"[" + b" ".join(SOUND) + b"]",
        b"<html>404</html>",
    ],
)
def test_metadata_that_is_no_list_is_refused_in_one_line(tmp_path, text, capsys):
    assert prepare(tmp_path, text) == 1
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("data_preparation.py: ") and "cambrian737k.json" in error
    assert not any("error" in line for line in progress)
    assert not list((tmp_path / "shards").glob("*.tar"))


# Fuzzing


def test_a_few_hundred_fuzzed_inputs():
    inputs = range(1_000_000, 1_000_300)
    result = fuzz_preparation.fuzz(inputs, seed=1, num_workers=2, limit=60)
    assert result.findings == []
    counts = {kind: outcomes.total() for kind, outcomes in result.outcomes.items()}
    assert counts == {kind: 3 * share for kind, share in fuzz_preparation.KINDS.items()}
    assert len(result.outcomes["image"]) >= 4 and len(result.outcomes["video"]) >= 3


def end_badly(seed: int, number: int) -> tuple[str, bool]:
    """A run_input that dies at one input, hangs at another, and raises at a third."""
    if number == 3:
        os.abort()
    if number == 5:
        time.sleep(600)
    if number == 7:
        return "KeyError: 'x'", True
    return "stored", False


def test_crashes_hangs_and_exceptions_are_named_and_nothing_is_lost(capsys):
    result = fuzz_preparation.fuzz(range(12), seed=0, num_workers=2, limit=4, run=end_badly)
    findings = {number: what for number, _, what in result.findings}
    assert set(findings) == {3, 5, 7}
    assert findings[3] == "the process died (exit code -6)" and findings[5] == "over 4 s" and "KeyError" in findings[7]
    assert sum(outcomes.total() for outcomes in result.outcomes.values()) == 12


def test_an_input_can_be_repeated():
    for number in (0, 5, 8, 11):
        assert fuzz_preparation.kind_of(number) != "video"
        assert fuzz_preparation.run_input(3, number) == fuzz_preparation.run_input(3, number)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fuzz_preparation", "--inputs", "4", "--num-workers", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "f.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 inputs in" in done.stdout and "0 findings, 0 lost" in done.stdout
    summary = json.loads((tmp_path / "f.json").read_text())
    assert (summary["inputs"], summary["lost"], summary["findings"]) == (4, 0, [])
