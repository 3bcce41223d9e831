"""Data preparation: real pictures, clips and tars in; shards read back with tarfile and with Energon."""

import contextlib
import io
import json
import os
import shlex
import struct
import subprocess
import sys
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import data_preparation
from media import decode_image
from media_conversion import UnusableSample, convert_media
from raw_data import MediaIndex, PreparationError, check_conversations, clean_name, iterate_metadata
from shard_writing import SourceReader, replacing

SCRIPT = Path(data_preparation.__file__)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
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


def plain_jpeg(number: int = 0) -> bytes:
    """An RGB JPEG with 4:2:0 chroma, its own bytes for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG", quality=80)


def mp4_clip(path: Path, frames: int = 6, index_first: bool = False) -> bytes:
    """An mp4 of 32x32 noise at 8 frames a second; `index_first` puts its index (moov) before the packets."""
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        video = container.add_stream("mpeg4", rate=Fraction(8), width=32, height=32)
        video.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
    return path.read_bytes()


def png_header(height: int, width: int) -> bytes:
    """The first bytes of a grey PNG of any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def dialogue(question: str = "What is it?", answer: str = "noise") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def entry(number: int, **fields) -> dict:
    return {"id": f"id.{number}", **fields, "conversations": dialogue(f"Question {number}?")}


JPEGS = {f"coco/train/{number:04d}.jpg": plain_jpeg(number) for number in range(20)}
PICTURES = {"png/a.b.png": encode(quadrants("rgbw"), "PNG"), "png/cut.png": encode(quadrants("rgbw"), "PNG")[:60]}
# The entries of the small data set, and why some of them are skipped.
GOOD = [
    *(entry(number, image=name, source="coco") for number, name in enumerate(JPEGS)),
    entry(20, image="coco/train/0000.jpg", question_type=["colour"]),
    entry(21, image="png/a.b.png"),
    entry(22, image=["coco/train/0001.jpg", "./png/a.b.png"]),
    entry(23, image="folder/plain.jpg"),
    entry(24, video="clips/one.mp4"),
    entry(25),
    entry(26, note="Grüße, 世界 😀"),
    entry(27, image=None),
]
BAD = [
    ("missing_media", entry(30, image="coco/train/9999.jpg")),
    ("missing_media", entry(31, image=["coco/train/0002.jpg", "nowhere.jpg"])),
    ("broken_image", entry(32, image="png/cut.png")),
    ("broken_image", entry(33, image="coco/cut.jpg")),
    ("broken_image", entry(34, image="coco/empty.jpg")),
    ("broken_clip", entry(35, video="clips/cut.mp4")),
    ("broken_clip", entry(36, video="clips/none.mp4")),
    ("unsafe_path", entry(37, image="../coco/train/0001.jpg")),
    ("unsafe_path", entry(38, image="/etc/hostname")),
    ("no_conversations", {"id": "id.39", "image": "coco/train/0001.jpg"}),
    ("no_conversations", {"id": "id.40", "conversations": []}),
    ("malformed_turn", {"id": "id.41", "conversations": [{"from": "human", "value": 3}]}),
    ("malformed_entry", ["no", "object"]),
    ("malformed_entry", {"id": "id.43", "image": {"path": "x"}, "conversations": dialogue()}),
]


def make_raw_data(folder: Path, name: str = "cambrian737k.json") -> Path:
    """The small data set: GOOD and BAD entries in turns, their media in two tars and a plain folder."""
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "plain.jpg").write_bytes(plain_jpeg(99))
    write_tar(folder / "coco.tar", {**JPEGS, "coco/cut.jpg": plain_jpeg()[:-300], "coco/empty.jpg": b""})
    clip = mp4_clip(folder / "folder" / "one.mp4")
    clips = {"clips/one.mp4": clip, "clips/cut.mp4": clip[:-500], "clips/none.mp4": b"no clip"}
    write_tar(folder / "other.tar", {f"./{name}": data for name, data in {**PICTURES, **clips}.items()})
    bad = [item for _, item in BAD]
    entries = [item for pair in zip(GOOD, bad, strict=False) for item in pair] + GOOD[len(bad) :]
    (folder / name).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return folder


def run(data: Path, output: Path, *options: str, workers: int = 0) -> int:
    arguments = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", str(workers), *options]
    return data_preparation.main(arguments)


def read_shards(output: Path) -> dict[str, dict[str, bytes]]:
    """{key: {file ending: bytes}} of all shards, in their order; fails on a key that comes twice."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(output.glob("pretrain-*.tar")):
        last = None
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                assert (key == last) == (key in samples), f"{key} is not in one place"
                samples.setdefault(key, {})[ending] = tar.extractfile(member).read()
                last = key
    return samples


def by_id(output: Path) -> dict[str, dict[str, bytes]]:
    return {json.loads(parts["json"])["id"]: parts for parts in read_shards(output).values()}


def all_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def pixels(data: bytes) -> np.ndarray:
    """The JPEG's pixels, int [H, W, 3]; fails if it is no RGB JPEG without EXIF."""
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, len(image.getexif())) == ("JPEG", "RGB", 0)
    return np.asarray(image).astype(int)


def convert(image_file: bytes) -> np.ndarray:
    """What a picture file becomes, decoded; fails if it was copied."""
    stored = convert_media("image", "name", image_file)
    assert (stored.part, stored.treatment) == ("jpg", "images_converted")
    return pixels(stored.data)


def assert_quadrants(picture: np.ndarray, names: str, tolerance: int = 4) -> None:
    height, width = picture.shape[:2]
    centres = picture[[height // 4, height // 4, -height // 4, -height // 4], [width // 4, -width // 4] * 2]
    np.testing.assert_allclose(centres, [COLOURS[name] for name in names], atol=tolerance)


@pytest.fixture(scope="module")
def raw_data(tmp_path_factory) -> Path:
    return make_raw_data(tmp_path_factory.mktemp("raw") / "data")


@pytest.fixture(scope="module")
def prepared(raw_data, tmp_path_factory) -> Path:
    """The small data set, prepared for Energon without a dialogue."""
    output = tmp_path_factory.mktemp("prepared") / "shards"
    assert run(raw_data, output, "--energon-prepare", workers=2) == 0
    return output


# Pictures and clips


def test_plain_jpegs_keep_their_bytes():
    progressive = encode(quadrants("rgbw"), "JPEG", progressive=True, quality=70)
    upright = Image.Exif()
    upright[0x0112] = 1
    for data in (plain_jpeg(), progressive, encode(quadrants("rgbw"), "JPEG", exif=upright)):
        stored = convert_media("image", "name", data)
        assert (stored.part, stored.treatment, stored.data) == ("jpg", "images_copied", data)


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [(2, "grwb"), (3, "wbgr"), (4, "bwrg"), (5, "rbgw"), (6, "brwg"), (7, "wgbr"), (8, "gwrb")],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, shown, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    picture = convert(encode(quadrants("rgbw"), file_format, exif=exif, **options))
    assert picture.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert_quadrants(picture, shown, tolerance=8)


@pytest.mark.parametrize("options", [{}, {"dpi": (72, 72)}])
def test_damaged_exif_does_not_reach_training(options):
    data = encode(quadrants("rgbw"), "JPEG", quality=95, **options)
    block = b"Exif\0\0" + b"garbage that is no TIFF header"
    damaged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert_quadrants(decode_image(convert_media("image", "name", damaged).data).astype(int), "rgbw")


def test_transparency_lies_on_white():
    half = quadrants("rgbw").convert("RGBA")
    half.putalpha(128)
    np.testing.assert_allclose(convert(encode(half, "PNG"))[4, 4], (255, 127, 127), atol=4)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    np.testing.assert_allclose(convert(encode(clear, "WEBP", lossless=True)), 255, atol=2)
    grey = Image.new("LA", (16, 16), (100, 0))
    np.testing.assert_allclose(convert(encode(grey, "PNG")), 255, atol=2)


def test_palette_with_and_without_a_transparent_colour():
    palette = quadrants("rgbw").quantize(4)
    assert_quadrants(convert(encode(palette, "PNG")), "rgbw")
    red = palette.getpixel((2, 2))
    assert_quadrants(convert(encode(palette, "PNG", transparency=red)), "wgbw")
    assert_quadrants(convert(encode(palette, "GIF", transparency=red)), "wgbw")


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.repeat(np.array([[0, 40 * 257, 200 * 257, 65_535]], np.uint16), 16, axis=0).repeat(16, axis=1)
    for file_format in ("PNG", "TIFF"):
        picture = convert(encode(Image.fromarray(levels), file_format))
        np.testing.assert_allclose(picture[8, 8::16], [(0,) * 3, (40,) * 3, (200,) * 3, (255,) * 3], atol=3)


def test_pixels_of_unknown_range_are_refused():
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70_000, np.int32)):
        with pytest.raises(UnusableSample) as caught:
            convert_media("image", "x.tif", encode(Image.fromarray(values), "TIFF"))
        assert caught.value.reason == "unsupported_image"


def test_cmyk_grey_and_bilevel():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(convert(encode(cmyk, "JPEG", quality=95))[8, 8], RED, atol=4)
    np.testing.assert_allclose(convert(encode(cmyk, "TIFF"))[8, 8], RED, atol=4)
    np.testing.assert_allclose(convert(encode(Image.new("L", (16, 16), 90), "JPEG"))[8, 8], (90, 90, 90), atol=2)
    np.testing.assert_allclose(convert(encode(Image.new("1", (16, 16), 1), "PNG"))[8, 8], WHITE, atol=2)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(file_format):
    frames = [quadrants("rgbw"), quadrants("wbgr"), quadrants("bbbb")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert_quadrants(convert(data), "rgbw")


def test_conversion_is_quality_95_without_chroma_subsampling():
    stored = convert_media("image", "a.gif", encode(quadrants("rgbw"), "GIF", comment=b"not for the shard"))
    image = Image.open(io.BytesIO(stored.data))
    assert [(component[1], component[2]) for component in image.layer] == [(1, 1)] * 3
    assert image.quantization == Image.open(io.BytesIO(encode(image, "JPEG", quality=95))).quantization
    assert b"not for the shard" not in stored.data


@pytest.mark.parametrize("cut", [2, 40, 1000])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_found(cut, progressive):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", progressive=progressive)
    with pytest.raises(UnusableSample, match=r"a/x\.jpg.*truncated") as caught:
        convert_media("image", "a/x.jpg", data[:-cut])
    assert caught.value.reason == "broken_image"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("height", "width"), [(30_000, 30_000), (10_000, 10_000), (1, 70_000)])
def test_pictures_beyond_the_limits_are_refused_unread(height, width):
    with pytest.raises(UnusableSample) as caught:
        convert_media("image", "big.png", png_header(height, width))
    assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff", os.urandom(200)])
def test_what_is_no_picture(data):
    with pytest.raises(UnusableSample) as caught:
        convert_media("image", "x", data)
    assert caught.value.reason == "broken_image"


@pytest.mark.parametrize("index_first", [False, True])
def test_clips_keep_their_bytes(tmp_path, index_first):
    data = mp4_clip(tmp_path / "clip.mp4", index_first=index_first)
    assert (data.index(b"moov") < data.index(b"mdat")) == index_first
    stored = convert_media("video", "name", data)
    assert (stored.part, stored.treatment, stored.data) == ("mp4", "clips_copied", data)


def test_broken_clips_are_found(tmp_path):
    clip, index_first = mp4_clip(tmp_path / "1.mp4"), mp4_clip(tmp_path / "2.mp4", frames=40, index_first=True)
    sound_only = io.BytesIO()
    with av.open(sound_only, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    for data in (b"", b"no clip", clip[:-500], index_first[:-500], index_first[:-5000], sound_only.getvalue()):
        with pytest.raises(UnusableSample) as caught:
            convert_media("video", "clips/x.mp4", data)
        assert caught.value.reason == "broken_clip"
    gif = encode(quadrants("rgbw"), "GIF")
    with pytest.raises(UnusableSample) as caught:
        convert_media("video", "clips/x.mp4", gif)
    assert caught.value.reason == "unsupported_clip"


# Metadata and names


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_metadata_is_read_in_pieces_with_true_byte_offsets(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("raw_data.READ_CHARACTERS", chunk)
    values = [{"id": "ä", "n": [1, {"x": None}]}, 12345, -1.5e3, '世界\\n\\u00e9 \\"', True, [], {}, "x" * 300]
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    path = tmp_path / "list.json"
    for joint in (",", " ,\r\n\t", "\n, "):
        data = ("\ufeff [ " + joint.join(texts) + "\n]\n").encode()
        path.write_bytes(data)
        found = list(iterate_metadata(path))
        assert [value for _, _, value in found] == values
        assert [data[offset : offset + length].decode() for offset, length, _ in found] == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "does not begin with"),
        (b'{"id": 1}', "does not begin with"),
        (b'[{"id": 1}, {"id": ]', "Expecting value, in or after entry 1"),
        (b'[{"id": 1}', "not closed"),
        (b'[{"id": 1},]', "Expecting value"),
        (b'[{"id": 1} {"id": 2}]', "must follow"),
        (b'[{"id": "abc]', "Unterminated string"),
        (b"[1, 2] 3", "something follows"),
        (b'["\xff"]', "not UTF-8"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_metadata_that_is_no_json_list(tmp_path, text, message):
    path = tmp_path / "cambrian737k.json"
    path.write_bytes(text)
    with pytest.raises(PreparationError, match=message):
        list(iterate_metadata(path))


def test_names_of_media():
    assert clean_name("./a//b.jpg") == "a/b.jpg"
    assert clean_name("a..b/c.jpg") == "a..b/c.jpg"
    for name in ("../a.jpg", "a/../../b.jpg", "a/../b.jpg", "/a.jpg", "a\0.jpg"):
        with pytest.raises(UnusableSample, match="unsafe_path"):
            clean_name(name)
    for name in ("", ".", 3, None, {}):
        with pytest.raises(UnusableSample, match="malformed_entry"):
            clean_name(name)


def test_where_media_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "a/3.jpg"):
        (tmp_path / name).write_bytes(b"folder")
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        for name, data in (("a/1.jpg", b"first"), ("./a/1.jpg", b"second"), ("a/2.jpg", b"two")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        link = tarfile.TarInfo("a/4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    media = MediaIndex(tmp_path)
    media.add_tar(tmp_path / "m.tar")
    with contextlib.closing(SourceReader()) as reader:
        found = {
            name: reader.read_media(media.location(media.find(name))) for name in ("a/1.jpg", "a/2.jpg", "a/3.jpg")
        }
        assert found == {"a/1.jpg": b"second", "a/2.jpg": b"two", "a/3.jpg": b"folder"}
        (tmp_path / "m.tar").write_bytes(b"shrunk")
        with pytest.raises(PreparationError, match=r"m\.tar changed while it was read"):
            reader.read_media(media.location(media.find("a/2.jpg")))
    for name in ("a/4.jpg", "a", "x" * 5000, "a/\ud800.jpg"):
        with pytest.raises(UnusableSample, match="missing_media"):
            media.find(name)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "stats.json"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), replacing(path) as stream:
        stream.write(b"new")
        raise OSError("disk full")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"stats.json": b"old"}


# The whole tool


def test_every_entry_is_written_or_accounted_for(prepared):
    stats = json.loads((prepared / "stats.json").read_text())
    reasons = [reason for reason, _ in BAD]
    assert stats["complete"] is True
    assert (stats["read"], stats["written"]) == (len(GOOD) + len(BAD), len(GOOD))
    assert stats["skipped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert stats["parts"] == {"images_copied": 23, "images_converted": 2, "clips_copied": 1, "text_only": 3}
    assert sum(stats["shards"].values()) == len(GOOD)
    lines = [json.loads(line) for line in (prepared / "skipped.jsonl").read_text().splitlines()]
    assert [(line["index"], line["reason"]) for line in lines] == [
        (2 * n + 1, reason) for n, reason in enumerate(reasons)
    ]
    assert lines[0]["id"] == "id.30" and "coco/train/9999.jpg" in lines[0]["detail"]


def test_filtered_metadata_holds_what_was_written(prepared):
    assert json.loads((prepared / "cambrian737k_filtered.json").read_text(encoding="utf-8")) == GOOD


def test_shards_hold_the_entries_and_their_media(raw_data, prepared):
    samples = by_id(prepared)
    assert {json.loads(parts["json"])["id"]: json.loads(parts["json"]) for parts in samples.values()} == {
        item["id"]: item for item in GOOD
    }
    for number, data in enumerate(JPEGS.values()):
        assert samples[f"id.{number}"]["jpg"] == data
    assert samples["id.20"]["jpg"] == samples["id.0"]["jpg"]
    assert_quadrants(pixels(samples["id.21"]["jpg"]), "rgbw")
    assert set(samples["id.22"]) == {"0.jpg", "1.jpg", "json"}
    assert samples["id.22"]["0.jpg"] == JPEGS["coco/train/0001.jpg"]
    assert_quadrants(pixels(samples["id.22"]["1.jpg"]), "rgbw")
    assert samples["id.23"]["jpg"] == plain_jpeg(99)
    assert samples["id.24"]["mp4"] == (raw_data / "folder" / "one.mp4").read_bytes()
    assert set(samples["id.25"]) == set(samples["id.27"]) == {"json"}


def test_shards_are_even_and_shuffled(prepared):
    shards = json.loads((prepared / "stats.json").read_text())["shards"]
    assert list(shards) == [f"pretrain-{number:06d}.tar" for number in range(10)]
    keys = list(read_shards(prepared))
    assert keys != sorted(keys) and all("." not in key and "/" not in key for key in keys)


def test_bytes_do_not_depend_on_the_workers_but_on_the_seed(raw_data, prepared, tmp_path):
    for workers in (0, 3):
        assert run(raw_data, tmp_path / f"{workers}", workers=workers) == 0
        assert all_bytes(tmp_path / f"{workers}").items() <= all_bytes_of_files(prepared).items()
    assert run(raw_data, tmp_path / "other", "--seed", "1") == 0
    assert list(read_shards(tmp_path / "other")) != list(read_shards(prepared))
    assert read_shards(tmp_path / "other") == read_shards(prepared)


def all_bytes_of_files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_maxcount_bounds_the_samples_of_a_shard(raw_data, tmp_path):
    assert run(raw_data, tmp_path / "shards", "--maxcount", "2") == 0
    shards = json.loads((tmp_path / "shards" / "stats.json").read_text())["shards"]
    assert set(shards.values()) <= {1, 2} and sum(shards.values()) == len(GOOD)


def test_the_other_letter_case_of_the_metadata_name(tmp_path):
    data = make_raw_data(tmp_path / "data", "Cambrian737k.json")
    assert run(data, tmp_path / "shards") == 0
    assert len(read_shards(tmp_path / "shards")) == len(GOOD)
    assert (tmp_path / "shards" / "cambrian737k_filtered.json").is_file()


def test_shards_left_empty_by_broken_media_are_cut_again(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "a.tar", {"good.jpg": plain_jpeg(), "bad.jpg": b"bad"})
    entries = [entry(number, image="good.jpg" if number % 4 == 0 else "bad.jpg") for number in range(44)]
    (data / "cambrian737k.json").write_text(json.dumps(entries))
    assert run(data, tmp_path / "shards", "--maxcount", "2") == 0
    stats = json.loads((tmp_path / "shards" / "stats.json").read_text())
    assert (stats["read"], stats["written"], stats["skipped"]) == (44, 11, {"broken_image": 33})
    assert list(stats["shards"].values()) == [1] * 9 + [2]
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 10
    assert "came out empty" in capsys.readouterr().out


def test_what_it_says(raw_data, tmp_path):
    command = [sys.executable, str(SCRIPT), "--data-dir", str(raw_data), "--output-dir", str(tmp_path / "my shards")]
    done = subprocess.run([*command, "--num-workers", "1"], capture_output=True, text=True, check=True)
    for text in (
        "Keeping 33 of 42 conversations",
        f"{tmp_path}/my shards/cambrian737k_filtered.json",
        "read 42 = written 28 + skipped 14 (broken_clip 2, broken_image 3,",
        "Conversion done: 10 shards",
        f"prepare '{tmp_path}/my shards'",
    ):
        assert text in done.stdout
    assert "Processing images: 100%" in done.stderr
    assert not list((tmp_path / "my shards").glob("*.tmp"))


# Refusals


def test_help_and_wrong_arguments(tmp_path, capsys):
    for options, message in (
        ([], "--data-dir"),
        (["--data-dir", "x", "--output-dir", "y", "--maxcount", "0"], "--maxcount must be 1 or more"),
        (["--data-dir", "x", "--output-dir", "y", "--num-workers", "-1"], "--num-workers must be 0 or more"),
        (["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)], "must not be or contain"),
        (["--data-dir", str(tmp_path / "x"), "--output-dir", str(tmp_path)], "must not be or contain"),
    ):
        with pytest.raises(SystemExit) as caught:
            data_preparation.main(options)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def fails_with(capsys, data: Path, output: Path, message: str, *options: str) -> None:
    capsys.readouterr()
    assert run(data, output, *options) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("data_preparation.py: error: ") and message in lines[0], lines


def test_missing_or_unreadable_data(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "shards"
    fails_with(capsys, data, output, "is not a folder")
    data.mkdir()
    fails_with(capsys, data, output, "holds no cambrian737k.json")
    (data / "cambrian737k.json").write_text("[")
    (data / "Cambrian737k.json").write_text("[]")
    fails_with(capsys, data, output, "both Cambrian737k.json and cambrian737k.json")
    (data / "Cambrian737k.json").unlink()
    fails_with(capsys, data, output, "is not a JSON list of entries")
    (data / "cambrian737k.json").write_text(json.dumps([entry(number, image="a.jpg") for number in range(30)]))
    fails_with(
        capsys, data, output, "only 0 usable samples (of 30 entries read, missing_media 30; the first skipped: a.jpg"
    )
    write_tar(data / "a.tar", {"a.jpg": plain_jpeg()})
    (data / "a.tar").write_bytes((data / "a.tar").read_bytes()[:1000])
    fails_with(capsys, data, output, "a.tar cannot be read as a tar")
    assert not output.exists()


def test_too_few_samples_for_a_split(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "cambrian737k.json").write_text(json.dumps([entry(number) for number in range(9)]))
    fails_with(capsys, data, tmp_path / "shards", "only 9 usable samples")
    (data / "cambrian737k.json").write_text(json.dumps([entry(number) for number in range(10)]))
    assert run(data, tmp_path / "shards") == 0


def test_force_replaces_only_what_the_tool_wrote(raw_data, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_data, output, "--maxcount", "1") == 0
    first = all_bytes(output)
    (output / "notes.txt").write_text("mine")
    (output / "pretrain-000003.tar.idx").write_bytes(b"stale")
    (output / ".nv-meta").mkdir()
    (output / ".nv-meta" / "split.yaml").write_text("stale")
    fails_with(capsys, raw_data, output, "is not empty; add --force", "--maxcount", "1")
    assert run(raw_data, output, "--force") == 0
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert len(list(output.iterdir())) == 13 < len(first)
    assert run(raw_data, output, "--force", "--maxcount", "1") == 0
    assert all_bytes(output) == first


def test_force_leaves_other_shards_alone(raw_data, tmp_path, capsys):
    output = tmp_path / "shards"
    output.mkdir()
    (output / "pretrain-000000.tar").write_bytes(b"somebody's")
    fails_with(capsys, raw_data, output, "which this tool did not write", "--force")
    (output / "pretrain-000000.tar").rename(output / "other.tar")
    fails_with(capsys, raw_data, output, "energon would take it for a shard", "--force")
    assert (output / "other.tar").read_bytes() == b"somebody's"


def test_bad_data_are_seen_before_an_earlier_run_is_removed(raw_data, tmp_path, capsys):
    output, data = tmp_path / "shards", tmp_path / "data"
    assert run(raw_data, output) == 0
    before = all_bytes(output)
    data.mkdir()
    (data / "cambrian737k.json").write_text("[1, 2")
    fails_with(capsys, data, output, "not closed", "--force")
    assert all_bytes(output) == before


# Energon


def energon_samples(output: Path, split: str) -> list[dict]:
    """The raw samples of one split, through Energon's own validation loader."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_val_dataset,
    )

    class Reader(DefaultTaskEncoder):
        cookers = [Cooker(lambda sample: {**basic_sample_keys(sample), **sample})]  # noqa: RUF012 (Energon's own way)

        def encode_sample(self, sample):
            return sample

        def batch(self, samples):
            return samples

        def encode_batch(self, batch):
            return batch

    dataset = get_val_dataset(
        output,
        split_part=split,
        batch_size=1,
        task_encoder=Reader(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    return [sample for batch in get_loader(dataset) for sample in batch]


def test_energon_reads_back_every_sample(prepared):
    assert "auto_decode: false" in (prepared / ".nv-meta" / "dataset.yaml").read_text()
    stats = json.loads((prepared / "stats.json").read_text())["shards"]
    names, found = sorted(stats), {}
    for split, shards in (("train", names[:8]), ("val", names[8:9]), ("test", names[9:])):
        samples = energon_samples(prepared, split)
        assert len(samples) == sum(stats[name] for name in shards) > 0
        found.update({sample["json"]: sample for sample in samples})
    expected = read_shards(prepared)
    assert len(found) == len(expected) == len(GOOD)
    for parts in expected.values():
        sample = found[parts["json"]]
        assert {name: sample[name] for name in parts} == parts


def test_the_dialogue_it_names_works(raw_data, tmp_path, capsys):
    output = tmp_path / "shards"
    assert run(raw_data, output) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")).removeprefix(
        "Next: "
    )
    assert "printf '8,1,1\\ny\\n11\\n' | " in command
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Found 10 tar files in total" in done.stdout, done.stdout + done.stderr
    assert "CrudeWebdataset" in (output / ".nv-meta" / "dataset.yaml").read_text()
    counts = data_preparation.count_splits(output)
    assert sum(counts.values()) == len(GOOD) and min(counts.values()) >= 2
    assert shlex.split(command)[-1] == str(output)


def test_turns_may_stand_under_openai_s_name():
    check_conversations({"messages": [{"role": "user", "content": "What?"}]})
    with pytest.raises(UnusableSample):
        check_conversations({"messages": []})
