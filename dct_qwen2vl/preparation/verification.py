"""Reads a prepared set back, byte by byte, and says what is wrong where.

Each shard, by a worker process: size and SHA-256 as in its stats; a sound tar of plain files; keys without dots, the
parts of a sample side by side; a JSON part that passes conversations.check_entry without repair; media parts that agree
with its placeholders; every image and every frame of a video decoded as training will (images.py, videos.py); sizes,
frames and counts as in the stats. Then the set: no key twice, no image in two splits, totals as in stats.json,
skipped.jsonl, the filtered metadata and Energon's split.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.data.images import IMAGE_EXTENSIONS, decode_image, open_image
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS, VideoSampling, decode_video
from dct_qwen2vl.preparation.entries import DECODER, UnusableSample, check_entry, read_turns
from dct_qwen2vl.preparation.metadata import MetadataReader, PreparationError
from dct_qwen2vl.preparation.output_folder import (
    ENERGON_FOLDER,
    SKIPPED_NAME,
    STATS_NAME,
    read_stats,
    stats_path,
    with_new_names,
)
from dct_qwen2vl.preparation.video_conversion import probe_video

SHARD_FILES = "pretrain-*.tar"
BLOCK = tarfile.BLOCKSIZE
KEY = re.compile(r"[^./]+")
PART = re.compile(r"(?:(\d+)\.)?([a-z0-9]+)")
MOST_PROBLEMS = 50  # that are said of one shard; a set of wrong make would have one for every sample
SMALL_FRAME = 28, 28  # px, height and width to which frames are resized after decoding: a long video stays small
MAGIC = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}


@dataclass
class ShardCheck:
    """What was found in one shard.

    keys: of its samples.
    names: uint64 [M]. Digests of the media's names in the entries.
    contents: uint64 [M]. Digests of the media's bytes, 0 where conversion may have made two files equal.
    """

    name: str
    split: str = ""
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    names: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    images: int = 0
    videos: int = 0


def verify(output_dir: Path, num_workers: int) -> list[str]:
    """Reads a set back and prints what has been read. Returns a line for each problem, none for a sound set.

    output_dir: The folder of shards.
    num_workers: Processes that read.

    Raises PreparationError for a folder without shards.
    """
    shards = sorted(output_dir.glob(SHARD_FILES))
    if not shards:
        raise PreparationError(f"{output_dir} holds no shards; --output-dir takes a folder that this tool has written")
    stats = read_stats(output_dir / STATS_NAME)
    with WorkerPool(num_workers) as pool, tqdm(total=len(shards), desc="Verifying", unit="shard") as bar:
        checks = list(pool.map(verify_shard, shards, bar.update))
    problems = [problem for check in checks for problem in check.problems]
    problems += verify_keys(checks) + verify_splits(checks)
    problems += verify_totals(output_dir, stats, checks)
    samples, images, videos = (sum(counts) for counts in zip(*((len(c.keys), c.images, c.videos) for c in checks)))
    print(
        f"Verified {len(shards)} shards: {samples} samples, {images} images and {videos} videos decoded; "
        f"{len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}"
    )
    return problems


# One shard


def verify_shard(path: Path, advance: Callable[[int], Any]) -> ShardCheck:
    """Everything about one shard and the stats beside it."""
    check = ShardCheck(path.name)
    stats = read_stats(stats_path(path))
    if isinstance(stats, dict):
        check.split = stats.get("split", "")
    else:
        check.problems.append(f"{path.name}: its {stats_path(path).name} is missing or no JSON")
    measured = Measured()
    names, contents = [], []
    try:
        with path.open("rb") as file:
            tar = TarReader(file)
            for key, parts in tar.samples():
                measured.samples += 1
                check.keys.append(key)
                for problem in verify_sample(check, key, parts, measured, names, contents):
                    check.problems.append(f"{path.name}: {key}: {problem}")
        if isinstance(stats, dict):
            check.problems += [f"{path.name}: {problem}" for problem in compare_stats(stats, tar, measured)]
    except (DamagedShard, OSError) as error:
        check.problems.append(f"{path.name}: {error}")
    check.names, check.contents = np.array(names, np.uint64), np.array(contents, np.uint64)
    if len(check.problems) > MOST_PROBLEMS:
        more = len(check.problems) - MOST_PROBLEMS
        check.problems[MOST_PROBLEMS:] = [f"{path.name}: and {more} problems more"]
    advance(1)
    return check


class DamagedShard(Exception):
    """A tar that cannot be read on. The message says where."""


class TarReader:
    """Reads a tar of plain files from front to back. After the last one, `size` and `digest` are the file's."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = 0
        self.digest = sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def members(self) -> Iterator[tuple[str, bytes]]:
        """(name, data) of each member. Raises DamagedShard."""
        while (block := self.read(BLOCK)) != bytes(BLOCK):
            place = self.size - len(block)
            try:
                member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise DamagedShard(f"no tar header at byte {place}: {error}") from None
            if member.type != tarfile.REGTYPE:
                raise DamagedShard(f"{member.name} at byte {place} is no plain file")
            data = self.read(member.size)
            padding = self.read(-member.size % BLOCK)
            if len(data) != member.size or len(padding) != -member.size % BLOCK:
                raise DamagedShard(f"cut short at byte {self.size}, in {member.name}")
            yield member.name, data
        rest = self.read(tarfile.RECORDSIZE + 1)
        if any(rest) or not BLOCK <= len(rest) <= tarfile.RECORDSIZE or self.size % tarfile.RECORDSIZE:
            raise DamagedShard(f"the end of the archive at byte {self.size - len(rest)} is not as tar has it")

    def samples(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, {file ending: bytes}) of adjacent members with one key. Raises DamagedShard."""
        key, parts = None, {}
        for name, data in self.members():
            its_key, _, ending = name.partition(".")
            if parts and (its_key != key or ending in parts):
                yield key, parts
                parts = {}
            key, parts[ending] = its_key, data
        if parts:
            yield key, parts


@dataclass
class Measured:
    """Counts of a shard, and columns as in its stats; None for a value that cannot be told."""

    samples: int = 0
    parts: int = 0
    text_only: int = 0
    of_samples: dict[str, list] = field(default_factory=lambda: {name: [] for name in ("media", "text")})
    of_media: dict[str, list] = field(default_factory=lambda: {name: [] for name in ("height", "width", "frames")})


def verify_sample(
    check: ShardCheck,
    key: str,
    parts: dict[str, bytes],
    measured: Measured,
    names: list[int],
    contents: list[int],
) -> Iterator[str]:
    """Yields what is wrong with one sample."""
    entry = parts.pop("json", None)
    shapes, kinds = [], []
    if not KEY.fullmatch(key):
        yield "the key is empty or has a slash"
    for number, (ending, data) in enumerate(parts.items()):
        kind = part_kind(ending, number, len(parts))
        if kind is None:
            yield f"the part {ending!r} is unknown, or not where it belongs"
            continue
        kinds.append(kind)
        check.images, check.videos = check.images + (kind == "image"), check.videos + (kind == "video")
        try:
            shapes.append(decode_part(kind, ending, data))
        except (UnusableSample, MediaError) as error:
            shapes.append((None, None, None))
            yield f"{ending}: {error}"
        contents.append(digest(data) if kind == "video" or is_copy(data) else 0)
    characters = None
    try:
        checked = check_entry(parse(entry))
        characters = sum(len(turn.text) for turn in read_turns(checked.entry))
        names += [digest(name.encode()) for _, name in checked.media]
        if checked.repairs:
            yield f"json: it needs repair: {', '.join(checked.repairs)}"
        elif checked.part_kinds != kinds:
            yield f"its parts are {kinds}, its placeholders ask for {checked.part_kinds}"
    except UnusableSample as unusable:
        yield f"json: {unusable}"
    measured.parts += len(parts)
    measured.text_only += not parts
    for column, value in zip(measured.of_samples.values(), (len(parts), characters)):
        column.append(value)
    for shape in shapes:
        for column, value in zip(measured.of_media.values(), shape):
            column.append(value)


def part_kind(ending: str, number: int, count: int) -> str | None:
    """ "image" or "video", by the name of a part.

    None unless it is "jpg" where it is the only one, or "0.jpg", "1.mp4", ... in order.
    """
    found = PART.fullmatch(ending)
    if not found or found[1] != (str(number) if count > 1 else None):
        return None
    return "image" if found[2] in IMAGE_EXTENSIONS else "video" if found[2] in VIDEO_EXTENSIONS else None


def parse(entry: bytes | None) -> Any:
    """Raises UnusableSample."""
    if entry is None:
        raise UnusableSample("malformed_entry", "it is missing")
    try:
        return DECODER.decode(entry.decode())
    except (ValueError, RecursionError) as error:
        raise UnusableSample("malformed_entry", f"no JSON: {error}") from error


def decode_part(kind: str, ending: str, data: bytes) -> tuple[int, int, int]:
    """Decodes all of a part: height and width as displayed, frames. Raises UnusableSample and MediaError."""
    if not data.startswith(MAGIC.get(ending.rpartition(".")[2], b"")):
        raise UnusableSample("broken_image", "the content is of another format than the name says")
    if kind == "image":
        return *decode_image(data).shape[:2], 1
    try:
        probe = probe_video(data, everything=True)
    except UnusableSample:
        raise
    except Exception as error:  # whatever FFmpeg's errors are called
        raise UnusableSample("broken_video", f"{type(error).__name__}: {error}") from error
    decode_video(data, VideoSampling(), fit=lambda *_: SMALL_FRAME, threads=1)
    return probe.height, probe.width, probe.frames


def is_copy(data: bytes) -> bool:
    """Whether an image was not encoded by this tool, which makes baseline RGB JPEGs without chroma subsampling.

    Encoding may have made one file of two different ones.
    """
    try:
        with open_image(data) as image:
            factors = {(component[1], component[2]) for component in getattr(image, "layer", [])}
            return image.format != "JPEG" or image.mode != "RGB" or "progressive" in image.info or factors != {(1, 1)}
    except Exception:  # a broken one, which is said elsewhere
        return False


def digest(data: bytes) -> int:
    """8 bytes of a hash, never 0."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1


def compare_stats(stats: dict[str, Any], tar: TarReader, measured: Measured) -> Iterator[str]:
    """Yields what a shard's stats say otherwise than the shard."""
    if stats.get("bytes") != tar.size:
        yield f"{tar.size} bytes, the stats say {stats.get('bytes')}"
    elif stats.get("sha256") != tar.digest.hexdigest():
        yield "its SHA-256 is not that of the stats: its bytes have changed"
    if stats.get("written") != measured.samples:
        yield f"{measured.samples} samples, the stats say {stats.get('written')}"
    said = sum(stats.get("parts", {}).values())
    if said != measured.parts + measured.text_only:
        yield f"{measured.parts} media and {measured.text_only} samples without, the stats say {said} of both"
    yield from compare_columns("sample", stats.get("samples", {}), measured.of_samples, measured.samples)
    yield from compare_columns("medium", stats.get("media", {}), measured.of_media, measured.parts)


def compare_columns(thing: str, said: dict[str, list], measured: dict[str, list], count: int) -> Iterator[str]:
    """Yields a line for each column that is not what was measured, with a value for each of `count` things."""
    for name in {**said, **measured}:
        values = len(said.get(name, []))
        if values != count:
            yield f"the column {name} of the stats has {values} values, one for each {thing} would be {count}"
    for name, found in measured.items():
        wrong = [n for n, pair in enumerate(zip(found, said.get(name, []))) if pair[0] not in (None, pair[1])]
        if wrong:
            place, values = wrong[0], (found[wrong[0]], said[name][wrong[0]])
            yield f"{name} of {thing} {place} is {values[0]}, the stats say {values[1]} ({len(wrong)} such values)"


# The set


def verify_keys(checks: list[ShardCheck]) -> list[str]:
    """Keys that come twice in the set, or in one shard but not side by side."""
    keys = np.array([key for check in checks for key in check.keys], np.str_)
    shard = np.repeat(np.arange(len(checks)), [len(check.keys) for check in checks])
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    problems = []
    for place in twice[:MOST_PROBLEMS].tolist():
        shards = sorted({checks[shard[order[place + more]]].name for more in (0, 1)})
        problems.append(f"{shards[0]}: the key {keys[order[place]]} comes again in {shards[-1]}")
    return problems


def verify_splits(checks: list[ShardCheck]) -> list[str]:
    """Images and videos, by name or by content, that are in more than one split."""
    problems = []
    for what in ("names", "contents"):
        digests = np.concatenate([getattr(check, what) for check in checks])
        shard = np.repeat(np.arange(len(checks)), [len(getattr(check, what)) for check in checks])
        splits = np.array([check.split for check in checks], np.str_)[shard]
        order = np.lexsort((splits, digests))
        digests, shard, splits = digests[order], shard[order], splits[order]
        leaks = np.flatnonzero((digests[1:] == digests[:-1]) & (splits[1:] != splits[:-1]) & (digests[1:] > 0))
        if len(leaks):
            place, thing = int(leaks[0]), "file name" if what == "names" else "image or video"
            where = " and ".join(f"{checks[shard[n]].name} ({splits[n]})" for n in (place, place + 1))
            problems.append(f"{len(leaks)} times one {thing} is in two splits; the first: in {where}")
    return problems


def verify_totals(output_dir: Path, stats: Any, checks: list[ShardCheck]) -> list[str]:
    """What the files of the whole set say otherwise than the shards and each other."""
    if not isinstance(stats, dict) or not stats.get("complete"):
        return [f"{STATS_NAME} is missing or not complete: the command that prepares the set goes on"]
    found = {check.name: len(check.keys) for check in checks}
    said = stats.get("shards", {})
    problems = [
        f"{name}: {found.get(name, 'no')} samples, {STATS_NAME} says {said.get(name, 'none')}"
        for name in sorted({*found, *said})
        if found.get(name) != said.get(name)
    ]
    written = sum(found.values())
    problems += verify_equation("the set", stats)
    for source, counts in stats.get("sources", {}).items():
        problems += verify_equation(f"the source {source}", counts)
    splits = Counter()
    for check in checks:
        splits[check.split] += len(check.keys)
    for name, here, there in (
        ("written", written, stats.get("written")),
        ("splits", dict(+splits), {name: count for name, count in stats.get("splits", {}).items() if count}),
        ("skipped", count_skipped(output_dir / SKIPPED_NAME), stats.get("skipped")),
    ):
        if here != there:
            problems.append(f"{STATS_NAME}: {name} is {there}, the files say {here}")
    problems += verify_filtered(output_dir, {key.partition("-")[0] for check in checks for key in check.keys})
    return problems + verify_energon(output_dir, {check.name: check.split for check in checks})


def verify_equation(what: str, counts: dict[str, Any]) -> list[str]:
    """read + copies = written + skipped + thinned"""
    skipped = sum(counts.get("skipped", {}).values())
    left = counts.get("read", 0) + counts.get("copies", 0)
    right = counts.get("written", 0) + skipped + counts.get("thinned", 0)
    return [] if left == right else [f"{STATS_NAME}: lost count of {what}: {left} read, {right} accounted for"]


def count_skipped(path: Path) -> dict[str, int] | str:
    """The lines of skipped.jsonl by reason."""
    try:
        with path.open("rb") as lines:
            entries = (json.loads(line, object_hook=with_new_names) for line in lines)
            return dict(sorted(Counter(entry["reason"] for entry in entries).items()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({error})"


def verify_filtered(output_dir: Path, entries: set[str]) -> list[str]:
    """The filtered metadata holds each entry once that was written at least once."""
    paths = sorted(output_dir.glob("*_filtered.json"))
    if len(paths) != 1:
        return [f"{len(paths)} files of filtered metadata (*_filtered.json), there must be one"]
    reader = MetadataReader(paths)
    try:
        for _ in reader:
            pass
    except UserError as error:
        return [str(error)]
    return [] if reader.count == len(entries) else [f"{paths[0].name}: {reader.count} entries, {len(entries)} written"]


def verify_energon(output_dir: Path, split_of: dict[str, str]) -> list[str]:
    """Energon's own metadata, if there are any, cut the set as its stats say."""
    path = output_dir / ENERGON_FOLDER / "split.yaml"
    if not path.is_file():
        return []
    import yaml

    try:
        parts = yaml.safe_load(path.read_text())["split_parts"]
        split_there = {shard: split for split, shards in parts.items() for shard in shards}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, yaml.YAMLError) as error:
        return [f"{ENERGON_FOLDER}/split.yaml cannot be read: {error!r:.200}"]
    return [
        f"{shard}: in the split {split_there.get(shard)} of {ENERGON_FOLDER}/split.yaml, its stats say {split}"
        for shard, split in sorted(split_of.items())
        if split and split_there.get(shard) != split
    ]
