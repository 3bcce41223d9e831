"""Small raw data sets, the tool run on them, and its shards read back."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from media_files import encode, noise, quadrants, video_file

import data_preparation


def plain_jpeg(number: int = 0) -> bytes:
    """An RGB JPEG with 4:2:0 chroma, its own bytes for every number."""
    return encode(noise(seed=number), "JPEG", quality=80)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def dialogue(question: str = "What is it?", answer: str = "noise") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def entry(number: int, **fields) -> dict:
    """An entry with the placeholders that its media need."""
    placeholders = ""
    for kind in ("image", "video"):
        names = fields.get(kind)
        placeholders += f"<{kind}>\n" * (len(names) if isinstance(names, list) else names is not None)
    return {"id": f"id.{number}", **fields, "conversations": dialogue(f"{placeholders}Question {number}?")}


VIDEO = video_file("mp4", "mpeg4", frames=6)
JPEGS = {f"coco/train/{number:04d}.jpg": plain_jpeg(number) for number in range(40)}
PNG = encode(quadrants("rgbw"), "PNG")
TRANSPARENT = encode(quadrants("rgbw").convert("RGBA"), "PNG")
IMAGES = {"png/a.b.png": PNG, "png/cut.png": PNG[:60], "png/clear.png": TRANSPARENT}
VIDEOS = {"videos/one.mp4": VIDEO, "videos/cut.mp4": VIDEO[:-500], "videos/none.mp4": b"no video"}
# The entries of the small data set, and why some of them are skipped.
GOOD = [
    *(entry(number, image=name, source="coco") for number, name in enumerate(JPEGS, 100)),
    entry(20, image="coco/train/0000.jpg", question_type=["colour"]),
    entry(21, image="png/a.b.png"),
    entry(22, image=["coco/train/0001.jpg", "./png/a.b.png"]),
    entry(23, image="folder/plain.jpg"),
    entry(24, video="videos/one.mp4"),
    entry(25),
    entry(26, note="Grüße, 世界 😀"),
    entry(27, image=None),
    entry(28, image="png/clear.png"),
    entry(29, image="COCO/train/0003.JPG"),
]
BAD = [
    ("missing_media", entry(30, image="coco/train/9999.jpg")),
    ("missing_media", entry(31, image=["coco/train/0002.jpg", "nowhere.jpg"])),
    ("broken_image", entry(32, image="png/cut.png")),
    ("broken_image", entry(33, image="coco/cut.jpg")),
    ("broken_image", entry(34, image="coco/empty.jpg")),
    ("broken_video", entry(35, video="videos/cut.mp4")),
    ("broken_video", entry(36, video="videos/none.mp4")),
    ("unsafe_path", entry(37, image="../coco/train/0001.jpg")),
    ("unsafe_path", entry(38, image="/etc/hostname")),
    ("no_conversations", {"id": "id.39", "image": "coco/train/0001.jpg"}),
    ("no_conversations", {"id": "id.40", "conversations": []}),
    ("malformed_turn", {"id": "id.41", "conversations": [{"from": "human", "value": 3}]}),
    ("malformed_entry", ["no", "object"]),
    ("malformed_entry", {"id": "id.43", "image": {"path": 3}, "conversations": dialogue()}),
    ("duplicate_entry", entry(105, image="coco/train/0005.jpg", source="coco")),
]


# 20 shards of 2 or 3 samples, none of which has broken media alone.
SMALL_SHARDS = ("--maxcount", "3")


def make_small_set(folder: Path, name: str = "cambrian737k.json") -> Path:
    """GOOD and BAD entries in turns, their media in two tars and a plain folder."""
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "plain.jpg").write_bytes(plain_jpeg(99))
    write_tar(folder / "coco.tar", {**JPEGS, "coco/cut.jpg": plain_jpeg()[:-300], "coco/empty.jpg": b""})
    write_tar(folder / "other.tar", {f"./{name}": data for name, data in {**IMAGES, **VIDEOS}.items()})
    bad = [item for _, item in BAD]
    entries = [item for pair in zip(GOOD, bad, strict=False) for item in pair] + GOOD[len(bad) :]
    write_entries(folder / name, entries)
    return folder


def make_set(folder: Path, entries: Iterable[dict], media: dict[str, bytes]) -> Path:
    """Any entries, with their media in one tar."""
    folder.mkdir(parents=True)
    write_tar(folder / "media.tar", media)
    write_entries(folder / "cambrian737k.json", list(entries))
    return folder


def write_entries(path: Path, entries: list) -> None:
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def command(data: Path, output: Path, *options: str, workers: int = 0, report: bool = False) -> list[str]:
    """Arguments of data_preparation.py."""
    folders = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", str(workers)]
    return [*folders, *options, *([] if report else ["--no-report"])]


def run(data: Path, output: Path, *options: str, workers: int = 0, report: bool = False) -> int:
    return data_preparation.main(command(data, output, *options, workers=workers, report=report))


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    """{key: {file ending: bytes}} of a shard, in its order; fails on a key that comes twice."""
    samples: dict[str, dict[str, bytes]] = {}
    last = None
    with tarfile.open(path) as tar:
        for member in tar:
            key, ending = member.name.split(".", 1)
            assert (key == last) == (key in samples), f"{key} is not in one place"
            samples.setdefault(key, {})[ending] = tar.extractfile(member).read()
            last = key
    return samples


def read_shards(output: Path) -> dict[str, dict[str, bytes]]:
    """The same of all shards; fails on a key that comes twice."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(output.glob("pretrain-*.tar")):
        shard = read_shard(path)
        assert not samples.keys() & shard.keys()
        samples.update(shard)
    return samples


def by_id(output: Path) -> dict[str, dict[str, bytes]]:
    return {json.loads(parts["json"])["id"]: parts for parts in read_shards(output).values()}


def read_stats(output: Path) -> dict:
    return json.loads((output / "stats.json").read_text())


def splits_of(output: Path) -> dict[str, list[dict]]:
    """The entries of each split, by the stats beside the shards."""
    entries: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for path in sorted(output.glob("pretrain-*.tar")):
        split = json.loads(path.with_suffix(".stats.json").read_text())["split"]
        entries[split] += [json.loads(parts["json"]) for parts in read_shard(path).values()]
    return entries


def all_files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}
