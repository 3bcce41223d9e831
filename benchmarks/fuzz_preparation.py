"""Data preparation against damaged input: mutated images, videos, tars, JSON and whole data sets.

    python -m benchmarks.fuzz_preparation --inputs 20000 --json fuzz.json

Every input must end as stored or as skipped with a known reason, within a few seconds. What is stored must be readable
in training: images by images.decode_image, whole and at a fraction of their size, videos by videos.decode_video.
(Damage that only decoding everything shows may pass the quick check; then --check-images must find it.) The shards of
a whole set must add up and pass --verify.

The inputs come from sound files drawn here, to which one to six mutations are applied: bits, numbers, ranges removed,
repeated, moved, zeroed, pieces of another file; the checksums of PNG chunks and tar headers are put right in half of
the cases, so that the damage gets past them. Input i of a seed is always the same: --first i --inputs 1 repeats it.

Worker processes do the work, so that a crash or a hang is seen, named, and not the end. The exit status is 1 if there
was a finding.
"""

import io
import json
import random
import struct
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks import fuzzing
from benchmarks.fuzzing import JSON_WORDS, Finding, Result, Run, Target, mutate, mutate_json, quiet
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, decode_video
from dct_qwen2vl.preparation import conversion
from dct_qwen2vl.preparation.conversion import ConversionOptions, convert_media
from dct_qwen2vl.preparation.entries import UnusableSample, check_entry
from dct_qwen2vl.preparation.metadata import MetadataReader, parse_entries

# Of 100 inputs, in this order.
KINDS = {"image": 48, "video": 22, "json": 16, "tar": 11, "set": 3}
REASONS = {
    "image": {"broken_image", "image_too_large", "extreme_aspect_ratio", "unsupported_image"},
    "video": {"broken_video", "video_too_large", "video_too_long", "extreme_aspect_ratio", "unsupported_video"},
}
ENTRY_REASONS = {
    "malformed_entry", "unsafe_path", "too_many_media", "no_conversations", "malformed_turn", "unknown_role",
    "broken_text", "roles_out_of_order", "empty_turn", "text_too_long", "placeholder_in_answer",
    "placeholder_in_system", "placeholder_mismatch", "media_names_disagree", "nothing_learned", "embedded_media",
    "missing_media",
}  # fmt: skip
WORDS = (
    *JSON_WORDS,
    *(b'"<|object_ref_start|>the cat<|object_ref_end|>"', b'"<|box_start|>(1,2),(3,4)<|box_end|>"', b'"<|im_end|>"'),
    *(b'"<|vision_start|><|image_pad|><|vision_end|>"', b'"<img>a.jpg</img>"', b'"data:image/png;base64,iVBORw0KGgo="'),
    *(b'"[{\\"from\\": \\"human\\", \\"value\\": \\"?\\"}]"', b'"[{}]"', b'{"data": ', b'"data"', b'"messages"'),
    *(b'"https://a.b/c.jpg"', b'"file://a.jpg"', b'{"path": "a.jpg", "bytes": null}', b'"weight"', b'"loss"', b"0.5"),
)
SMALL = 56, 84  # height and width to which what is stored is resized


# ---------------------------------------------------------------------------------------------------------------------
# Sound files


def draw(rng: np.random.Generator, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours with some noise, uint8 [height, width, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    return (np.asarray(coarse, np.int16) + rng.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    # Of copies, for saving a JPEG leaves its settings in the image.
    if "append_images" in options:
        options["append_images"] = [more.copy() for more in options["append_images"]]
    image.copy().save(stream, file_format, **options)
    return stream.getvalue()


@cache
def image_files() -> list[bytes]:
    """One of each kind that data sets hold."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(draw(rng))
    grey16 = Image.fromarray(rng.integers(0, 65_536, (32, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    alpha = image.convert("RGBA")
    alpha.putalpha(128)
    more = {"save_all": True, "append_images": [Image.fromarray(draw(rng))]}
    palette = image.quantize(16)
    xmp = b"<x:xmpmeta tiff:Orientation='6'/>"
    return [
        encode(image, "JPEG"),
        encode(image, "JPEG", quality=95, subsampling=0),
        encode(image, "JPEG", progressive=True),
        encode(image, "JPEG", optimize=True, restart_marker_blocks=2),
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", icc_profile=bytes(500), comment=b"a comment", xmp=xmp),
        encode(image.convert("L"), "JPEG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "MPO", **more),
        encode(image, "PNG"),
        encode(image, "PNG", exif=exif, dpi=(72, 72)),
        encode(image.convert("L"), "PNG"),
        encode(palette, "PNG", bits=8),
        encode(palette, "PNG", transparency=3),
        encode(image.convert("1"), "PNG"),
        encode(alpha, "PNG", icc_profile=bytes(500)),
        encode(grey16, "PNG"),
        encode(image, "PNG", **more),
        encode(image, "GIF", **more),
        encode(image, "WEBP", quality=50, exif=exif),
        encode(alpha, "WEBP", lossless=True),
        encode(image, "WEBP", **more),
        encode(image, "BMP"),
        encode(image, "TIFF", compression="tiff_lzw", exif=exif),
        encode(image, "TIFF", compression="jpeg"),
        encode(grey16, "TIFF"),
        encode(image, "TIFF", compression="tiff_adobe_deflate", **more),
        encode(image, "PPM"),
        *large_pngs(image, alpha),
    ]


def large_pngs(*images: Image.Image) -> list[bytes]:
    """With a history of edits and with a printer's profile, each over 1 MB."""
    made = []
    for image in images:
        history = PngImagePlugin.PngInfo()
        history.add_text("Comment", "history " * 200_000)
        packed = PngImagePlugin.PngInfo()
        packed.add_itxt("XML:com.adobe.xmp", "history " * 200_000, zip=True)
        profile = np.random.default_rng(0).bytes(1_500_000)
        made += [encode(image, "PNG", pnginfo=history), encode(image, "PNG", pnginfo=packed)]
        made += [encode(image, "PNG", icc_profile=profile)]
    return made


@cache
def video_files() -> list[bytes]:
    """One of each container and codec that this FFmpeg writes."""
    kinds = [
        ("mp4", "libx264", {"g": "6"}), ("mp4", "mpeg4", {"g": "5"}), ("mov", "libx264", {}), ("mp4", "libx265", {}),
        ("matroska", "libx264", {"g": "6"}), ("webm", "libvpx", {}), ("webm", "libvpx-vp9", {}), ("avi", "mpeg4", {}),
        ("avi", "mjpeg", {}), ("mpegts", "libx264", {"g": "6"}), ("mpegts", "mpeg2video", {}),
        ("mpeg", "mpeg2video", {}), ("flv", "libx264", {}), ("flv", "flv1", {}), ("ogg", "libvpx", {}),
        ("asf", "wmv2", {}),
    ]  # fmt: skip
    videos = [encode_video(*kind) for kind in kinds]
    videos += [encode_video(container, "libx264", {}, cover=True) for container in ("mp4", "mov", "matroska")]
    for codec in ("libx264", "mpeg2video"):
        parts = [encode_video("mpegts", codec, {"g": "6"}, size=size) for size in ((48, 64), (96, 64), (48, 64))]
        videos += [b"".join(parts[:2]), b"".join(parts)] if all(parts) else []
    return [video for video in videos if video]


def encode_video(
    container: str, codec: str, options: dict[str, str], size: tuple[int, int] = (48, 64), cover: bool = False
) -> bytes | None:
    """14 frames; None where this FFmpeg has no such encoder.

    size: height and width, px.
    cover: puts an attached picture before the film.
    """
    import av
    from av.stream import Disposition

    stream, rng = io.BytesIO(), np.random.default_rng(0)
    height, width = size
    try:
        with av.open(stream, "w", format=container) as target:
            picture = target.add_stream("mjpeg", rate=25, width=96, height=96) if cover else None
            if picture:
                picture.pix_fmt, picture.disposition = "yuvj420p", Disposition.attached_pic
            video = target.add_stream(
                codec, rate=Fraction(25), width=width, height=height, options={**options, "threads": "1"}
            )
            video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if picture:
                target.mux(picture.encode(av.VideoFrame.from_ndarray(draw(rng, 96, 96), format="rgb24")))
                target.mux(picture.encode())
            for _ in range(14):
                target.mux(video.encode(av.VideoFrame.from_ndarray(draw(rng, height, width), format="rgb24")))
            target.mux(video.encode())
    except (av.FFmpegError, ValueError):
        return None
    return stream.getvalue()


@cache
def tar_files() -> list[bytes]:
    """Of each kind of tar, with images, long names, links and a folder."""
    return [make_tar(file_format) for file_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def make_tar(file_format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=file_format) as tar:
        for number, data in enumerate([*image_files()[:5], b"", image_files()[9]]):
            long = "deep/" * (20 if number == 3 else 0)
            add_member(tar, f"coco/{long}{'ä' * (number == 2)}{number}.jpg", data)
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.DIRTYPE, "folder")):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "coco/0.jpg"
            tar.addfile(header)
    return stream.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def entry(number: int, **fields: Any) -> dict[str, Any]:
    question = "<image>\n" * ("image" in fields) + "<video>\n" * ("video" in fields) + f"What is {number}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Grüße, 世界 \U0001f600"}]
    return {"id": f"{number}", "score": 0.5, **fields, "conversations": turns}


@cache
def json_files() -> list[bytes]:
    """Two lists, JSON lines and a list in an object, with every style of turns and of media."""
    entries = [entry(0), entry(1, image="coco/0.jpg"), entry(2, image=["a.jpg"]), entry(3, video="a.mp4")]
    entries += [{**entry(4, image="a.jpg"), "video": ["1.jpg", "2.jpg"]}, {"id": 5, "conversations": []}]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": 'It \\ is "so".'}]
    entries += [{"id": 6, "image": "a.jpg", "messages": turns}]
    named = [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "video", "video": ["1.jpg", "2.jpg"]}]
    entries += [{"id": 8, "messages": [{"role": "user", "content": [*named, *parts[1:]]}, turns[1]]}]
    system = {"from": "system", "value": ""}
    entries += [{**entry(7), "conversations": [system, *entry(7)["conversations"], {"from": "human", "value": "?"}]}]
    marked = "<|vision_start|><|image_pad|><|vision_end|>What?"
    entries += [
        {"image": [["file://a.jpg"]], "system": "Be brief.", "conversations": [{"from": "human", "value": marked}]}
    ]
    entries[-1]["conversations"] += [{"from": "gpt", "value": "1", "loss": False}, *entry(9)["conversations"]]
    entries += [
        {"id": 10, "conversations": [{"from": "human", "value": "<img>a.jpg</img>?"}, {"from": "gpt", "value": "1"}]}
    ]
    entries += [{"id": 11, "image": {"path": "a.jpg", "bytes": None}, "conversations": json.dumps(turns), "system": ""}]
    entries += newer_entries(turns)
    lines = b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in entries)
    return [
        json.dumps(entries, indent=1).encode(),
        json.dumps(entries, ensure_ascii=False).encode(),
        lines,
        json.dumps({"data": entries}).encode(),
    ]


def newer_entries(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Grounding tokens, turns as JSON text, media in place of their names, shares of turns, addresses."""
    box = "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(110,220),(330,440)<|box_end|>"
    asked = [{"from": "human", "value": f"<image>\nWhere is {box}?"}, {"from": "gpt", "value": box, "weight": 0.5}]
    embedded, address = "data:image/png;base64,iVBORw0KGgo=", "https://a.b/c.jpg"
    part = [{"type": "image_url", "image_url": {"url": embedded}}, {"type": "text", "text": "What?"}]
    return [
        {"id": 12, "image": "a.jpg", "conversations": asked, "box": [1, 2.5, [3, 4]]},
        {"id": 13, "messages": json.dumps([{"role": "user", "content": "Why?"}, turns[1]])},
        {**entry(14, image=embedded)},
        {"id": 15, "messages": [{"role": "user", "content": part}, turns[1]]},
        {**entry(16, image=address), "system": None},
        {**entry(17), "image": {"bytes": "iVBORw0KGgo=", "path": None}},
        {**entry(18), "image": "", "video": [None]},
    ]


def correct_png(data: bytes) -> bytes:
    """Put right the CRCs of the chunks, as far as they can be followed."""
    corrected, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if end > len(data):
            break
        corrected[end - 4 : end] = struct.pack(">I", zlib.crc32(data[place + 4 : end - 4]))
        place = end
    return bytes(corrected)


def correct_tar(data: bytes) -> bytes:
    """Put right the checksums of all blocks that look like headers."""
    corrected = bytearray(data)
    for place in range(0, len(data) - 511, 512):
        block = corrected[place : place + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            corrected[place + 148 : place + 156] = b"%06o\0 " % sum(block)
    return bytes(corrected)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of an input: "stored ..." or "skipped ..."; raises Finding, or whatever must not come out


def fit(height: int, width: int, frames: int) -> tuple[int, int]:
    return SMALL


def run_image(rng: random.Random) -> str:
    data = mutate(rng, rng.choice(image_files()), rng.choice(image_files()))
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:
        data = correct_png(data)
    return store("image", data, ConversionOptions(max_pixels=rng.choice((None, None, None, 1000))))


def run_video(rng: random.Random) -> str:
    return store("video", mutate(rng, rng.choice(video_files()), rng.choice(video_files())), ConversionOptions())


def store(kind: str, data: bytes, options: ConversionOptions) -> str:
    """Convert an image or video, and read what is stored."""
    medium = "image" if kind == "image" else "video"
    try:
        stored = convert_media(medium, "x", data, options)
    except UnusableSample as unusable:
        if unusable.reason not in REASONS[kind]:
            raise Finding(f"an unknown reason: {unusable}") from unusable
        return f"skipped {unusable.reason}"
    if stored.treatment not in conversion.TREATMENTS or not stored.data:
        raise Finding(f"stored as {stored.treatment}, {len(stored.data)} bytes")
    try:
        shape = read_stored(medium, stored.data)
    except MediaError as error:
        return find_again(medium, data, error)
    if shape != (stored.height, stored.width):
        raise Finding(f"stored as {stored.height} x {stored.width}, read as {shape[0]} x {shape[1]}")
    return f"stored {stored.treatment}"


def read_stored(medium: str, data: bytes) -> tuple[int, int]:
    """Read a stored part as training does; returns height and width. Raises MediaError."""
    if medium == "image":
        if decode_image(data, fit).shape != (*SMALL, 3):
            raise Finding("resized to another size than asked for")
        return decode_image(data).shape[:2]
    frames = decode_video(data, VideoSampling(), fit, threads=1)
    if frames.shape[1:] != (*SMALL, 3) or not len(frames):
        raise Finding(f"read as {frames.shape}")
    seen: list[tuple[int, int]] = []
    decode_video(data, VideoSampling(max_frames=2), lambda *size: seen.append(size[:2]) or SMALL, threads=1)
    return seen[-1]  # an attempt by time stamps may have been given up


def find_again(medium: str, data: bytes, error: MediaError) -> str:
    """What passes the quick check and cannot be read must not pass the thorough one."""
    try:
        convert_media(medium, "x", data, ConversionOptions(check_images=True))
    except UnusableSample:
        return "stored, but damaged where only --check-images looks"
    raise Finding(f"stored, and training cannot read it: {error}")


def run_json(rng: random.Random) -> str:
    """A file of metadata, entry by entry. All are accounted for, or the file is refused in one line."""
    indented, compact, lines, in_object = json_files()
    data = mutate_json(rng, rng.choice([indented, compact, lines, lines, lines, in_object]), indented, WORDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.json"
        path.write_bytes(data)
        try:
            reader = MetadataReader([path])
            outcomes = Counter(check(value) for ranges in reader for _, value in parse_entries(ranges))
        except UserError as error:
            if "\n" in str(error):
                raise Finding(f"an error of several lines: {error}") from error
            return "skipped: the file is refused"
    if outcomes.total() != reader.count:
        raise Finding(f"{reader.count} entries, {outcomes.total()} outcomes")
    return "stored all entries" if set(outcomes) <= {"passed"} else "stored some entries, skipped others"


def check(value: Any) -> str:
    """What becomes of one entry. What passes is JSON, and passes again without repair."""
    try:
        if isinstance(value, UnusableSample):
            raise value
        checked = check_entry(value)
    except UnusableSample as unusable:
        if unusable.reason not in ENTRY_REASONS:
            raise Finding(f"an unknown reason: {unusable}") from unusable
        return unusable.reason
    again = check_entry(json.loads(json.dumps(checked.entry, allow_nan=False)))
    if again.repairs or again.media != checked.media:
        raise Finding(f"repaired twice: {checked.repairs}, {again.repairs}")
    return "passed"


def run_tar(rng: random.Random) -> str:
    """A tar: what its index names lies in it and is readable."""
    from dct_qwen2vl.preparation.media_index import count_refused, open_tar

    data = mutate(rng, rng.choice(tar_files()), rng.choice(tar_files()))
    data = correct_tar(data) if rng.random() < 0.5 else data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        try:
            source = open_tar(path, None)
        except UserError as error:
            if "\n" in str(error):
                raise Finding(f"an error of several lines: {error}") from error
            return "skipped: the tar is refused"
        count_refused(source)
        for offset, size in zip(source.index.offset.tolist(), source.index.size.tolist()):
            if not 0 <= offset <= offset + size <= len(data):
                raise Finding(f"a member at {offset} of {size} bytes in a tar of {len(data)}")
            store("image", data[offset : offset + size], ConversionOptions())
    return "stored members until the damage" if source.damage else "stored members"


def run_set(rng: random.Random) -> str:
    """A whole data set with a damaged tar, metadata and video: one line of error, or shards that pass --verify."""
    import data_preparation
    from dct_qwen2vl.preparation.verification import verify

    with tempfile.TemporaryDirectory() as name, quiet() as said:
        data, output = Path(name) / "data", Path(name) / "shards"
        write_set(rng, data)
        arguments = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", "0", "--no-report"]
        status = data_preparation.main([*arguments, "--split", "1,1,1"])
        if status not in (0, 1):
            raise Finding(f"exit status {status}")
        if status == 1:
            errors = [line for line in said.getvalue().splitlines() if line.startswith("data_preparation.py: ")]
            if len(errors) != 1:
                raise Finding(f"{len(errors)} lines of error: {errors}")
            return "skipped: the set is refused"
        problems = [problem for problem in verify(output, 0) if not is_deep_damage(problem)]
        if problems:
            raise Finding(f"--verify: {problems[0]}")
    return "stored a set"


def is_deep_damage(problem: str) -> bool:
    """What --verify finds because it decodes everything."""
    return any(word in problem for word in ("broken_video", "not a readable"))


def write_set(rng: random.Random, data: Path) -> None:
    """Thirty entries on the members of two tars and two plain files; one of these is mutated, or two."""
    data.mkdir()
    names = [f"coco/{number}.jpg" for number in (0, 1, 4, 5)] + ["coco/ä2.jpg", "plain.png", "LINK.jpg"]
    entries = [entry(number, image=rng.choice(names)) for number in range(20)]
    entries += [entry(20 + number, video="video.mp4") for number in range(3)] + [entry(23 + n) for n in range(7)]
    metadata = json.dumps(entries).encode()
    files = {"a.tar": tar_files()[0], "b.tar": tar_files()[2], "video.mp4": rng.choice(video_files())}
    files["plain.png"] = rng.choice(image_files())
    for name in rng.sample(sorted(files), 2):
        files[name] = mutate(rng, files[name], files["a.tar"])
        files[name] = correct_tar(files[name]) if name.endswith("tar") and rng.random() < 0.7 else files[name]
    metadata = mutate_json(rng, metadata, json_files()[0], WORDS) if rng.random() < 0.4 else metadata
    for name, content in {**files, "cambrian737k.json": metadata}.items():
        (data / name).write_bytes(content)


def make_files() -> None:
    """All sound files, before the clock runs."""
    for make in (image_files, video_files, tar_files, json_files):
        make()


TARGET = Target(
    "fuzz_preparation",
    KINDS,
    {"image": run_image, "video": run_video, "json": run_json, "tar": run_tar, "set": run_set},
    make_files,
)
kind_of, run_input = TARGET.kind_of, TARGET.run


def fuzz(inputs: range, seed: int, num_workers: int, limit: float, run: Run | None = None) -> Result:
    """See fuzzing.fuzz."""
    return fuzzing.fuzz(TARGET, inputs, seed, num_workers, limit, run)


def main(argv: list[str] | None = None) -> int:
    return fuzzing.run_target(TARGET, argv, __doc__, inputs=20_000)


if __name__ == "__main__":
    sys.exit(main())
