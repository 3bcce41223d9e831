"""The plan of a set: every entry checked, every file of it found, everything in columns; nothing is written yet.

The metadata is parsed and checked by all workers, a piece of a file each. What an entry says is not kept, only where it
lies and what it refers to, so that 700,000 entries take about 100 MB.

Letters used for shapes: N entries, M their media in a row.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conversations import CheckedEntry, UnusableSample, check_entry
from media_index import DIGEST, NO_PLACE, NameList, Places, TarSource, digest_folded, digest_name, digest_of, locate
from raw_data import EntryRanges, MetadataReader, PreparationError, parse_entries, read_entry
from worker_pool import WorkerPool

MOST_SOURCES = 256  # more names are no names of datasets; the others are counted together
OTHER_SOURCES, NO_SOURCE, TEXT_SOURCE, NO_FOLDER = "other", "unknown", "text", "no folder"
OTHER_CASE = "other_letter_case"  # the repair of a medium's name
MAXIMUM_NAME, MAXIMUM_ID = 100, 200  # characters
MAXIMUM_MEDIA_BYTES = 1 << 30


@dataclass(frozen=True)
class SkippedEntry:
    """An entry left out. index: its number in the metadata; id: its own, if it has one; source: its dataset."""

    index: int
    id: Any
    source: str
    reason: str
    detail: str


@dataclass
class SkipList:
    """Entries left out, as JSON lines, and how many of each source for which reason."""

    indices: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def add(self, entry: SkippedEntry) -> None:
        self.indices.append(entry.index)
        self.lines.append(json.dumps(asdict(entry)).encode())
        self.counts[entry.source, entry.reason] += 1

    def __len__(self) -> int:
        return len(self.indices)

    def reasons(self) -> dict[str, int]:
        total = Counter()
        for (_, reason), count in self.counts.items():
            total[reason] += count
        return dict(sorted(total.items()))

    def first_detail(self) -> str:
        return json.loads(next(self.in_order()))["detail"]

    def in_order(self) -> Iterator[bytes]:
        """The lines in the order of the metadata."""
        for number in np.argsort(np.array(self.indices, np.int64), kind="stable").tolist():
            yield self.lines[number] + b"\n"


@dataclass
class Columns:
    """Entries that passed the check.

    index, file, start, stop int64 [N]: number among all entries; its metadata file, and its bytes there. source int64
    [N]: number in a list of names. digest S16 [N]: of id, turns and media. media_start int64 [N + 1]: entry i has the
    media media_start[i] to media_start[i + 1]. names, folded S16 [M]: digests of their names, which `spelled` holds.
    """

    index: np.ndarray
    file: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    source: np.ndarray
    digest: np.ndarray
    media_start: np.ndarray
    names: np.ndarray
    folded: np.ndarray
    spelled: NameList


@dataclass(frozen=True)
class CheckTask:
    ranges: EntryRanges
    strict: bool


@dataclass(frozen=True)
class CheckedPiece:
    """What became of a CheckTask. sources: names of those of its columns. read: entries of each source."""

    columns: Columns
    sources: list[str]
    skipped: list[SkippedEntry]
    read: Counter


@dataclass
class Plan:
    """All entries that can be written, as far as their files have not been read yet.

    index ... media_start: as in Columns. media int64 [M]: number in `places`. sources: names; read: entries by source.
    """

    index: np.ndarray
    file: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    source: np.ndarray
    digest: np.ndarray
    media_start: np.ndarray
    media: np.ndarray
    places: Places
    sources: list[str]
    read: Counter
    skipped: SkipList

    def __len__(self) -> int:
        return len(self.index)

    @property
    def content(self) -> np.ndarray:
        """S16 [M]: what tells the media apart."""
        return self.places.content[self.media]


def source_of(entry: Any) -> str:
    """The dataset that an entry comes from: its `source` or `dataset`, else the first folder of its first medium."""
    if not isinstance(entry, dict):
        return NO_SOURCE
    for name in (entry.get("source"), entry.get("dataset")):
        if isinstance(name, str) and name:
            return name[:MAXIMUM_NAME]
    names = entry.get("image") or entry.get("video")
    name = names[0] if isinstance(names, list) else names
    if name is None:
        return TEXT_SOURCE
    folder, slash, _ = name.removeprefix("./").partition("/") if isinstance(name, str) else (None, "", "")
    return folder[:MAXIMUM_NAME] if slash and folder else NO_FOLDER


def describe_skip(index: int, entry: Any, source: str, unusable: UnusableSample) -> SkippedEntry:
    identity = entry.get("id") if isinstance(entry, dict) else None
    if len(json.dumps(identity, default=str)) > MAXIMUM_ID:
        identity = str(identity)[:MAXIMUM_ID]
    return SkippedEntry(index, identity, source, unusable.reason, unusable.detail)


def be_strict(index: int, finding: str) -> None:
    raise PreparationError(f"--strict: entry {index} of the metadata: {finding}")


# Checking, in the workers


def check_piece(task: CheckTask, advance: Callable[[int], Any]) -> CheckedPiece:
    """Check some consecutive entries. Raises PreparationError for metadata that is no JSON, and where `strict` is set
    at the first finding."""
    ranges, skipped, sources, read = task.ranges, [], {}, Counter()
    rows, digests, names, spelled, counts = [], bytearray(), bytearray(), NameList(), []
    for number, value in enumerate(parse_entries(ranges)):
        source = source_of(value)
        read[source] += 1
        try:
            if isinstance(value, UnusableSample):
                raise value
            checked = check_entry(value)
        except UnusableSample as unusable:
            if task.strict:
                be_strict(ranges.first + number, str(unusable))
            skipped.append(describe_skip(ranges.first + number, value, source, unusable))
            continue
        if task.strict and checked.repairs:
            be_strict(ranges.first + number, f"needs repair: {', '.join(checked.repairs)}")
        rows.append((number, sources.setdefault(source, len(sources))))
        digests += digest_entry(checked)
        counts.append(len(checked.media))
        for _, name in checked.media:
            names += digest_name(name) + digest_folded(name)
            spelled.append(name.encode())
    advance(len(ranges.start))
    kept, source = np.array(rows, np.int64).reshape(-1, 2).T
    name, folded = np.frombuffer(bytes(names), DIGEST).reshape(-1, 2).T
    columns = Columns(
        kept + ranges.first,
        np.full(len(kept), ranges.file),
        ranges.start[kept],
        ranges.stop[kept],
        source,
        np.frombuffer(bytes(digests), DIGEST),
        np.cumsum([0, *counts]),
        name,
        folded,
        spelled,
    )
    return CheckedPiece(columns, list(sources), skipped, read)


def digest_entry(checked: CheckedEntry) -> bytes:
    """Of id, turns and media: entries that agree in these are one entry twice."""
    turns = checked.entry.get("conversations") or checked.entry.get("messages")
    return digest_of(json.dumps([checked.entry.get("id"), turns, checked.media], sort_keys=True).encode())


# Collecting


class Collector:
    """Puts the pieces together: columns of all entries, one list of sources."""

    def __init__(self) -> None:
        self.pieces: list[Columns] = []
        self.sources: dict[str, int] = {}
        self.read: Counter = Counter()
        self.skipped = SkipList()

    def add(self, piece: CheckedPiece) -> None:
        for source, count in piece.read.items():
            self.read[self.name_source(source)] += count
        for entry in piece.skipped:
            self.skipped.add(SkippedEntry(**{**asdict(entry), "source": self.name_source(entry.source)}))
        numbers = np.array([self.sources[self.name_source(name)] for name in piece.sources], np.int64)
        piece.columns.source = numbers[piece.columns.source] if len(numbers) else piece.columns.source
        self.pieces.append(piece.columns)

    def name_source(self, name: str) -> str:
        """The name under which a source is counted."""
        if name not in self.sources and len(self.sources) >= MOST_SOURCES:
            name = OTHER_SOURCES
        self.sources.setdefault(name, len(self.sources))
        return name

    def columns(self) -> Columns:
        """Of all entries; the pieces are given up."""
        starts = [columns.media_start for columns in self.pieces]
        bases = np.cumsum([0, *(start[-1] for start in starts)])
        joined = {"media_start": np.concatenate([[0], *(start[1:] + base for start, base in zip(starts, bases))])}
        spelled = NameList()
        for columns in self.pieces:
            spelled.extend(columns.spelled)
        for name in ("index", "file", "start", "stop", "source", "digest", "names", "folded"):
            joined[name] = np.concatenate([getattr(columns, name) for columns in self.pieces])
        self.pieces = []
        return Columns(**joined, spelled=spelled)


def check_all(reader: MetadataReader, pool: WorkerPool, strict: bool, advance: Callable[[int], Any]) -> Collector:
    """Check all entries of the metadata. Raises PreparationError."""
    collector = Collector()
    tasks = (CheckTask(ranges, strict) for ranges in reader)
    for piece in pool.map(check_piece, tasks, advance):
        collector.add(piece)
    if not collector.pieces:
        raise PreparationError(f"{', '.join(map(str, reader.paths))}: the metadata holds no entries")
    return collector


def make_plan(
    collector: Collector,
    metadata: list[Path],
    tars: list[TarSource],
    data_dir: Path,
    leave_out: Path,
    strict: bool = False,
) -> Plan:
    """Leave out duplicates and entries whose files are missing; find the files of the others."""
    columns = collector.columns()
    usable = np.ones(len(columns.index), bool)

    def skip(row: int, reason: str, detail: str) -> None:
        usable[row] = False
        entry = read_entry(metadata[columns.file[row]], int(columns.start[row]), int(columns.stop[row]))
        unusable, source = UnusableSample(reason, detail), list(collector.sources)[columns.source[row]]
        if strict:
            be_strict(int(columns.index[row]), str(unusable))
        collector.skipped.add(describe_skip(int(columns.index[row]), entry, source, unusable))

    for row, first in find_duplicates(columns.digest):
        skip(row, "duplicate_entry", f"entry {columns.index[first]} has the same id, turns and media")
    names, first, media = np.unique(columns.names, return_index=True, return_inverse=True)
    places = locate(tars, data_dir, leave_out, names, columns.folded[first])
    for row, number in find_first_of_each(columns.media_start, (places.source == NO_PLACE)[media], usable):
        skip(row, "missing_media", f"{columns.spelled[number].decode()} is in no tar and no folder")
    for row, number in find_first_of_each(columns.media_start, (places.size > MAXIMUM_MEDIA_BYTES)[media], usable):
        size = places.size[media[number]]
        skip(
            row,
            "media_too_large",
            f"{columns.spelled[number].decode()} has {size} bytes, the limit is {MAXIMUM_MEDIA_BYTES}",
        )
    if strict:
        for row, number in find_first_of_each(columns.media_start, places.other_case[media], usable):
            be_strict(int(columns.index[row]), f"needs repair: {OTHER_CASE}: {columns.spelled[number].decode()}")
    media_start, media = select_media(columns.media_start, media, usable)
    kept = {name: getattr(columns, name)[usable] for name in ("index", "file", "start", "stop", "source", "digest")}
    counted = {"sources": list(collector.sources), "read": collector.read, "skipped": collector.skipped}
    return Plan(**kept, media_start=media_start, media=media, places=places, **counted)


def find_duplicates(digest: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, the first row with the same digest) of each entry that an earlier one equals."""
    _, first, which = np.unique(digest, return_index=True, return_inverse=True)
    rows = np.flatnonzero(first[which] != np.arange(len(digest)))
    yield from zip(rows.tolist(), first[which[rows]].tolist())


def find_first_of_each(media_start: np.ndarray, is_bad: np.ndarray, usable: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, number of its first bad medium) of each usable entry with one. is_bad bool [M]."""
    bad = np.flatnonzero(is_bad)
    rows, first = np.unique(np.searchsorted(media_start, bad, side="right") - 1, return_index=True)
    for row, number in zip(rows.tolist(), bad[first].tolist()):
        if usable[row]:
            yield row, number


def select_media(media_start: np.ndarray, media: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """media_start and media of the usable entries alone."""
    counts = np.diff(media_start)
    return np.concatenate([[0], np.cumsum(counts[usable])]), media[np.repeat(usable, counts)]
