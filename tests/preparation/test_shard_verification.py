"""--verify: a sound set has no problem; each kind of damage is said, with its shard."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import data_preparation
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.verification import verify

FIRST, LAST = "pretrain-000000.tar", "pretrain-000009.tar"
Members = list[tuple[str, bytes]]


def image(number: int, file_format: str = "JPEG") -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, file_format)
    return stream.getvalue()


def video(number: int) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=Fraction(8), width=32, height=32)
        video.pix_fmt = "yuv420p"
        for frame in range(5):
            noise = np.random.default_rng([number, frame]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def entry(number: int, **fields) -> dict:
    turns = [{"from": "human", "value": "<image>\n" * ("image" in fields) + "What?"}, {"from": "gpt", "value": "noise"}]
    return {"id": f"{number}", **fields, "conversations": turns}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A prepared set of ten shards with images, videos, a sample of two media, text, and two entries left out."""
    data, output = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "shards"
    for number in range(40):
        (data / f"{number}.jpg").write_bytes(image(number))
    (data / "a.png").write_bytes(image(50, "PNG"))
    (data / "a.gif").write_bytes(image(51, "GIF"))
    for number in range(3):
        (data / f"{number}.mp4").write_bytes(video(number))
    entries = [entry(number, image=f"{number}.jpg") for number in range(40)]
    entries += [entry(40, image="a.png"), entry(41, image="a.gif"), entry(42)]
    entries += [entry(43 + number, video=f"{number}.mp4") for number in range(2)]
    entries += [{**entry(45, image="0.jpg"), "video": "2.mp4"}, entry(46, image="none.jpg")]
    entries[-2]["conversations"][0]["value"] = "Is <video> after <image>?"
    (data / "0.jpg").write_bytes(image(0))
    (data / "cambrian737k.json").write_text(json.dumps(entries))
    arguments = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", "0", "--no-report"]
    assert data_preparation.main([*arguments, "--seed", "1"]) == 0
    assert read_members(output / FIRST)[0][0].endswith("jpg")
    return output


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "shards")


def read_members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def write_members(path: Path, members: Members, **fields) -> None:
    """Replace a shard, and correct what its stats say of its bytes; `fields` replaces other values of the stats."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    data = path.read_bytes()
    stats_path = path.with_suffix(".stats.json")
    stats = json.loads(stats_path.read_bytes())
    stats.update(bytes=len(data), sha256=sha256(data).hexdigest(), **fields)
    stats_path.write_text(json.dumps(stats))


def find_member(folder: Path, ending: str) -> tuple[Path, int]:
    """A shard that holds a member with this ending, and its number there."""
    for path in sorted(folder.glob("*.tar")):
        for number, (name, _) in enumerate(read_members(path)):
            if name.partition(".")[2] == ending:
                return path, number
    raise AssertionError(f"no member {ending}")


def replace_member(folder: Path, ending: str, change: Callable[[bytes], bytes]) -> str:
    """Change the content of one member with this ending; returns the shard's name and the sample's key."""
    path, number = find_member(folder, ending)
    members = read_members(path)
    name, data = members[number]
    members[number] = name, change(data)
    write_members(path, members)
    return f"{path.name}: {name.partition('.')[0]}"


def change_stats(path: Path, change: Callable[[dict], None]) -> None:
    stats = json.loads(path.read_bytes())
    change(stats)
    path.write_text(json.dumps(stats))


def has_problem(problems: list[str], *texts: str) -> bool:
    """Whether one of the problems has all of these texts in it."""
    return any(all(text in problem for text in texts) for problem in problems)


def only_problem(folder: Path) -> str:
    (problem,) = verify(folder, 0)
    assert "\n" not in problem
    return problem


# Nothing wrong


def test_a_sound_set_has_no_problems(sound, capsys):
    assert verify(sound, 0) == []
    out = capsys.readouterr().out
    assert "Verified 10 shards: 46 samples, 43 images and 3 videos decoded; no problems" in out
    assert verify(sound, 2) == []


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(PreparationError, match="holds no shards"):
        verify(tmp_path, 0)


# Shards


def test_one_changed_byte(copied):
    path = copied / FIRST
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))
    problems = verify(copied, 2)
    assert has_problem(problems, f"{FIRST}: its SHA-256 is not that of the stats")


@pytest.mark.parametrize("stop", [100, 512, 700, -1024, -1])
def test_a_cut_shard(copied, stop):
    path = copied / LAST
    path.write_bytes(path.read_bytes()[:stop])
    problems = verify(copied, 0)
    assert problems[0].startswith(f"{LAST}: ") and "at byte" in problems[0]


def test_a_tar_that_holds_a_link(copied):
    path = copied / FIRST
    data = bytearray(path.read_bytes())
    link = tarfile.TarInfo(read_members(path)[0][0])
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    data[:512] = link.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(bytes(data))
    assert verify(copied, 0)[0].startswith(f"{FIRST}: {link.name} at byte 0 is no plain file")


def test_garbage_behind_a_shard(copied):
    path = copied / FIRST
    path.write_bytes(path.read_bytes() + bytes(tarfile.RECORDSIZE))
    assert "the end of the archive" in verify(copied, 0)[0]


def test_missing_stats_and_missing_shards(copied):
    (copied / FIRST).with_suffix(".stats.json").unlink()
    assert has_problem(verify(copied, 0), f"{FIRST}: its pretrain-000000.stats.json is missing")
    (copied / FIRST).unlink()
    assert f"{FIRST}: no samples, stats.json says " in verify(copied, 0)[0]


def test_a_shard_too_many(copied):
    shutil.copy(copied / FIRST, copied / "pretrain-000010.tar")
    shutil.copy((copied / FIRST).with_suffix(".stats.json"), copied / "pretrain-000010.stats.json")
    problems = verify(copied, 0)
    assert has_problem(problems, f"{FIRST}: the key ", "comes again in pretrain-000010.tar")
    assert has_problem(problems, "pretrain-000010.tar: ", "stats.json says none")


def test_parts_that_are_not_side_by_side(copied):
    path = copied / FIRST
    members = read_members(path)
    write_members(path, [*members[1:], members[0]])
    problems = verify(copied, 0)
    key = members[0][0].partition(".")[0]
    assert f"{FIRST}: the key {key} comes again in {FIRST}" in problems


def test_stats_that_say_otherwise(copied):
    for name, change, message in (
        ("sha256", lambda stats: stats.update(sha256="0"), "its SHA-256"),
        ("bytes", lambda stats: stats.update(bytes=1), "bytes, the stats say 1"),
        ("written", lambda stats: stats.update(written=1), "samples, the stats say 1"),
        ("parts", lambda stats: stats["parts"].update(images_copied=99), "of both"),
        ("text", lambda stats: stats["samples"]["text"].append(1), "the column text"),
        ("height", lambda stats: stats["media"]["height"].__setitem__(0, 7), "height of medium 0 is"),
    ):
        path = (copied / FIRST).with_suffix(".stats.json")
        before = path.read_bytes()
        change_stats(path, change)
        assert message in only_problem(copied), name
        path.write_bytes(before)


# Samples


def damage_png(data: bytes) -> bytes:
    """The PNG with other compressed pixels and a right CRC."""
    place = data.index(b"IDAT")
    length = int.from_bytes(data[place - 4 : place], "big")
    pixels = data[place + 4 : place + 100] + bytes(length - 96)
    return data[: place + 4] + pixels + struct.pack(">I", zlib.crc32(b"IDAT" + pixels)) + data[place + 8 + length :]


def damage_video(data: bytes) -> bytes:
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][2]
        return data[: packet.pos] + bytes(packet.size) + data[packet.pos + packet.size :]


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("jpg", lambda data: data[:-200]),
        ("jpg", lambda data: b""),
        ("png", damage_png),
        ("mp4", damage_video),
        ("mp4", lambda data: data[: len(data) // 2]),
        ("0.mp4", lambda data: b"no video"),
        ("jpg", lambda data: image(1, "PNG")),
    ],
)
def test_media_that_cannot_be_decoded(copied, ending, change):
    where = replace_member(copied, ending, change)
    assert only_problem(copied).startswith(f"{where}: {ending}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "json: malformed_entry: no JSON"),
        (lambda data: data.replace(b"What?", b"Wh\xff?"), "json: malformed_entry: no JSON"),
        (lambda data: data.replace(b"human", b"robot"), "json: unknown_role"),
        (lambda data: data.replace(b'"noise"', b'""'), "json: empty_turn"),
        (lambda data: data.replace(b"<image>\\n", b""), "json: it needs repair: missing_placeholder"),
        (lambda data: data.replace(b'"image": ', b'"photo": '), "json: placeholder_mismatch"),
        (lambda data: data.replace(b'"image": ', b'"video": ').replace(b"<image>", b"<video>"), "placeholders ask for"),
    ],
)
def test_entries_that_training_would_not_take(copied, change, message):
    path, number = find_member(copied, "jpg")
    members = read_members(path)
    name, data = members[number + 1]
    members[number + 1] = name, change(data)
    write_members(path, members)
    assert only_problem(copied).startswith(f"{path.name}: {name.partition('.')[0]}: ")
    assert message in only_problem(copied)


def test_parts_with_other_names(copied):
    path, number = find_member(copied, "jpg")
    members = read_members(path)
    for ending in ("0.jpg", "exe", "x.jpg", "JPG"):
        changed = list(members)
        changed[number] = members[number][0].replace("jpg", ending), members[number][1]
        write_members(path, changed)
        key = members[number][0].partition(".")[0]
        assert f"{path.name}: {key}: the part '{ending}' is unknown, or not where it belongs" in verify(copied, 0)


def test_a_sample_without_an_entry(copied):
    path, number = find_member(copied, "jpg")
    members = read_members(path)
    del members[number + 1]
    write_members(path, members)
    assert "json: malformed_entry: it is missing" in only_problem(copied)


def test_many_problems_of_one_shard_are_counted(copied, monkeypatch):
    monkeypatch.setattr("dct_qwen2vl.preparation.verification.MOST_PROBLEMS", 2)
    path = copied / FIRST
    write_members(path, [(name, b"{" if name.endswith("json") else data) for name, data in read_members(path)])
    samples = len(read_members(path)) // 2
    assert samples > 3
    problems = verify(copied, 0)
    assert len(problems) == 3 and problems[-1] == f"{FIRST}: and {samples - 2} problems more"


# The set


def test_an_image_in_two_splits(copied):
    """The same file name, and the same content under another name."""
    data = {name: read_members(copied / name) for name in (FIRST, LAST)}
    media, text = data[FIRST][0], data[FIRST][1]
    assert media[0].endswith("jpg") and data[LAST][0][0].endswith("jpg")
    test = [(data[LAST][0][0], media[1]), *data[LAST][1:]]
    write_members(copied / LAST, test)
    assert "1 times one image or video is in two splits" in only_problem(copied)
    entry = {**json.loads(data[LAST][1][1]), "image": json.loads(text[1])["image"]}
    write_members(copied / LAST, [data[LAST][0], (data[LAST][1][0], json.dumps(entry).encode()), *data[LAST][2:]])
    assert "1 times one file name is in two splits" in only_problem(copied)


def test_equal_images_that_conversion_made_are_no_leak(copied):
    """Files that differ may become the same JPEG; only 4:4:4 ones can be such."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(stream, "JPEG", quality=95, subsampling=0)
    for name in (FIRST, LAST):
        members = read_members(copied / name)
        assert members[0][0].endswith("jpg")
        write_members(copied / name, [(members[0][0], stream.getvalue()), *members[1:]])
    assert verify(copied, 0) == []


def test_totals_that_say_otherwise(copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.suffix in (".json", ".jsonl")}
    for name, old, new, message in (
        ("stats.json", b'"read": 47', b'"read": 48', "stats.json: lost count of the set: 48 read, 47 accounted for"),
        ("stats.json", b'"complete": true', b'"complete": false', "stats.json is missing or not complete"),
        ("stats.json", b'"train": 3', b'"train": 4', "stats.json: splits is"),
        ("skipped.jsonl", b"missing_media", b"broken_image", "stats.json: skipped is"),
        ("cambrian737k_filtered.json", b"]\n", b", {}]\n", "cambrian737k_filtered.json: 47 entries, 46 written"),
        ("cambrian737k_filtered.json", b"]\n", b"", "is not closed"),
    ):
        changed = before[name].rpartition(old) if name.startswith("cambrian") else before[name].partition(old)
        assert changed[1] == old, (name, old)
        (copied / name).write_bytes(changed[0] + new + changed[2])
        assert has_problem(verify(copied, 0), message), message
        (copied / name).write_bytes(before[name])
    assert verify(copied, 0) == []


def test_energon_s_split_is_that_of_the_stats(copied):
    folder = copied / ".nv-meta"
    folder.mkdir()
    names = [f"pretrain-{number:06d}.tar" for number in range(10)]
    for last_of_train, problems in ((8, 0), (7, 1)):
        cut = {"train": names[:last_of_train], "val": names[last_of_train:9], "test": names[9:]}
        (folder / "split.yaml").write_text(json.dumps({"split_parts": cut}))
        found = verify(copied, 0)
        assert len(found) == problems
    assert found == ["pretrain-000007.tar: in the split val of .nv-meta/split.yaml, its stats say train"]
    (folder / "split.yaml").write_text("split_parts: 3")
    assert only_problem(copied).startswith(".nv-meta/split.yaml cannot be read")
