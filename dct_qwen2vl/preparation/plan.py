"""The plan of a set: every entry checked, every file of it found, everything in columns; nothing is written yet.

The metadata is parsed and checked by all workers, a piece of a file each. What an entry says is not kept, only where it
lies and what it refers to, so that 700,000 entries take about 100 MB.

Letters used for shapes: N entries, M their media in a row.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.data.conversations import list_named_images, list_names, list_parts, name_in, strip_scheme
from dct_qwen2vl.preparation.entries import CheckedEntry, UnusableSample, check_entry, field_of, read_turns
from dct_qwen2vl.preparation.media_index import (
    DIGEST,
    NAME_REPAIRS,
    NO_PLACE,
    NameList,
    Places,
    TarSource,
    digest_folded,
    digest_name,
    digest_of,
    find_neighbour,
    locate,
    why_unread,
)
from dct_qwen2vl.preparation.metadata import EntryRanges, MetadataReader, PreparationError, parse_entries, read_entry
from dct_qwen2vl.preparation.other_names import folder_of

MOST_SOURCES = 256  # more names are no names of datasets; the others are counted together
OTHER_SOURCES, NO_SOURCE, TEXT_SOURCE, NO_FOLDER = "other", "unknown", "text", "no folder"
KINDS = ("image", "video", "frame")  # of conversations.CheckedEntry
MAXIMUM_NAME, MAXIMUM_ID = 100, 200  # characters
MAXIMUM_MEDIA_BYTES = 1 << 30


@dataclass(frozen=True)
class SkippedEntry:
    """An entry that is left out.

    index: Its number in the metadata.
    id: Its own id, if it has one.
    source: Its source data set.
    reason: One of the reasons in entries.py or conversion.py.
    detail: What was found.
    """

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
        """Adds an entry that is left out."""
        self.indices.append(entry.index)
        self.lines.append(json.dumps(asdict(entry)).encode())
        self.counts[entry.source, entry.reason] += 1

    def __len__(self) -> int:
        return len(self.indices)

    def reasons(self) -> dict[str, int]:
        """Entries left out, by reason."""
        total = Counter()
        for (_, reason), count in self.counts.items():
            total[reason] += count
        return dict(sorted(total.items()))

    def first_detail(self) -> str:
        """Why the first entry in the metadata is left out."""
        return json.loads(next(self.in_order()))["detail"]

    def in_order(self) -> Iterator[bytes]:
        """The lines in the order of the metadata."""
        for number in np.argsort(np.array(self.indices, np.int64), kind="stable").tolist():
            yield self.lines[number] + b"\n"


# An entry that passed the check: its number among all entries; its metadata file, its bytes there and their CRC-32;
# the number of its source's name; the characters of its turns; whether it was repaired; the hash of id, turns, media.
ENTRY = np.dtype(
    [
        ("index", "<i8"),
        ("start", "<i8"),
        ("stop", "<i8"),
        ("file", "<i4"),
        ("source", "<i4"),
        ("crc", "<u4"),
        ("characters", "<i4"),
        ("repaired", "?"),
        ("digest", DIGEST),
    ]
)


@dataclass
class Columns:
    """N entries and their M media, a column for each property.

    entries: ENTRY [N].
    media_start: int64 [N + 1]. Entry i has the media media_start[i] to media_start[i + 1].
    kind: uint8 [M]. Number in KINDS.
    names: S16 [M]. Digests of the media's names.
    folded: S16 [M]. Digests of the names in lower case.
    spelled: The names themselves.
    """

    entries: np.ndarray
    media_start: np.ndarray
    kind: np.ndarray
    names: np.ndarray
    folded: np.ndarray
    spelled: NameList


@dataclass(frozen=True)
class CheckTask:
    ranges: EntryRanges
    strict: bool


@dataclass(frozen=True)
class CheckedPiece:
    """The result of a CheckTask.

    columns: Entries that can be used, as far as is known.
    sources: Names of the sources in these columns.
    skipped: The other entries.
    read: Entries of each source.
    """

    columns: Columns
    sources: list[str]
    skipped: list[SkippedEntry]
    read: Counter


@dataclass
class Plan:
    """All entries that can be written, as far as is known before their files are read.

    entries: As in Columns.
    media_start: As in Columns.
    kind: As in Columns.
    media: int64 [M]. Number in `places`.
    places: Where the files lie.
    sources: Names of the sources.
    read: Entries by source.
    skipped: Entries that are left out.
    """

    entries: np.ndarray
    media_start: np.ndarray
    kind: np.ndarray
    media: np.ndarray
    places: Places
    sources: list[str]
    read: Counter
    skipped: SkipList

    def __len__(self) -> int:
        return len(self.entries)

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
    names = list_names(field_of(entry, "image")) or list_names(field_of(entry, "video"))
    names = names or list_names(next(filter(None, map(name_in, list_parts(entry))), None)) or list_named_images(entry)
    if not names:
        return TEXT_SOURCE
    name = strip_scheme(names[0]).replace("\\", "/") if isinstance(names[0], str) else ""
    folder, slash, _ = name.removeprefix("./").partition("/")
    return folder[:MAXIMUM_NAME] if slash and folder not in ("", "..") else NO_FOLDER


def describe_skip(index: int, entry: Any, source: str, unusable: UnusableSample) -> SkippedEntry:
    """An entry that is left out, as skipped.jsonl holds it.

    index: Number of the entry.
    entry: Of the metadata. Its id is kept, cut to MAXIMUM_ID characters.
    source: Source data set.
    unusable: Why it is left out.
    """
    identity = entry.get("id") if isinstance(entry, dict) else None
    if len(json.dumps(identity, default=str)) > MAXIMUM_ID:
        identity = str(identity)[:MAXIMUM_ID]
    return SkippedEntry(index, identity, source, unusable.reason, unusable.detail)


def be_strict(index: int, finding: str) -> None:
    """Raises PreparationError for a finding, with --strict.

    index: Number of the entry.
    finding: What was found.
    """
    raise PreparationError(f"--strict: entry {index} of the metadata: {finding}")


# Checking, in the workers


def check_piece(task: CheckTask, advance: Callable[[int], Any]) -> CheckedPiece:
    """Check some consecutive entries. Raises PreparationError for metadata that is no JSON, and where `strict` is set
    at the first finding."""
    ranges, skipped, sources, read = task.ranges, [], {}, Counter()
    entries, kinds, names, spelled, counts = [], bytearray(), bytearray(), NameList(), [0]
    starts, stops = ranges.start.tolist(), ranges.stop.tolist()
    for number, (text, value) in enumerate(parse_entries(ranges)):
        source, index = source_of(value), ranges.first + number
        read[source] += 1
        try:
            checked = check_value(value)
        except UnusableSample as unusable:
            if task.strict:
                be_strict(index, str(unusable))
            skipped.append(describe_skip(index, value, source, unusable))
            continue
        if task.strict and checked.repairs:
            be_strict(index, f"needs repair: {', '.join(checked.repairs)}")
        place = (index, starts[number], stops[number], ranges.file, sources.setdefault(source, len(sources)))
        characters = count_characters(checked.entry)
        entries.append((*place, crc32(text), characters, bool(checked.repairs), digest_entry(checked)))
        counts.append(len(checked.media))
        for kind, name in checked.media:
            kinds.append(KINDS.index(kind))
            names += digest_name(name) + digest_folded(name)
            spelled.append(name.encode())
    advance(len(ranges.start))
    name, folded = np.frombuffer(bytes(names), DIGEST).reshape(-1, 2).T
    kind = np.frombuffer(bytes(kinds), np.uint8)
    columns = Columns(np.array(entries, ENTRY), np.cumsum(counts), kind, name, folded, spelled)
    return CheckedPiece(columns, list(sources), skipped, read)


def check_value(value: Any) -> CheckedEntry:
    if isinstance(value, UnusableSample):
        raise value
    return check_entry(value)


def count_characters(entry: dict[str, Any]) -> int:
    return sum(len(turn.text) for turn in read_turns(entry))


def digest_entry(checked: CheckedEntry) -> bytes:
    """Of id, turns and media: entries that agree in these are one entry twice."""
    turns = checked.entry.get("conversations") or checked.entry.get("messages")
    return digest_of(repr((checked.entry.get("id"), turns, checked.media)).encode())


# Collecting


class Collector:
    """Puts the pieces together: columns of all entries, one list of sources."""

    def __init__(self) -> None:
        self.pieces: list[Columns] = []
        self.sources: dict[str, int] = {}
        self.read: Counter = Counter()
        self.skipped = SkipList()

    def add(self, piece: CheckedPiece) -> None:
        """Adds what a worker has checked."""
        for source, count in piece.read.items():
            self.read[self.name_source(source)] += count
        for entry in piece.skipped:
            self.skipped.add(SkippedEntry(**{**asdict(entry), "source": self.name_source(entry.source)}))
        numbers = np.array([self.sources[self.name_source(name)] for name in piece.sources], np.int64)
        if len(numbers):
            piece.columns.entries["source"] = numbers[piece.columns.entries["source"]]
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
        for name in ("entries", "kind", "names", "folded"):
            joined[name] = np.concatenate([getattr(columns, name) for columns in self.pieces])
        self.pieces = []
        return Columns(**joined, spelled=spelled)


def check_all(reader: MetadataReader, pool: WorkerPool, strict: bool, advance: Callable[[int], Any]) -> Collector:
    """Checks all entries of the metadata.

    reader: Reads the metadata.
    pool: Its workers check the entries.
    strict: Whether the first finding is an error.
    advance: Called with numbers of entries that were checked.

    Raises PreparationError for metadata that is not JSON or holds no entries, and for the first finding, if `strict`.
    """
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
    """Leaves out duplicates and entries whose files are missing, and finds the files of the others.

    collector: All checked entries.
    metadata: Files of the metadata.
    tars: The tars of the data folder.
    data_dir: The data folder.
    leave_out: A folder that is not looked into: the output.
    strict: Whether the first finding is an error.

    Raises PreparationError for the first finding, if `strict`.
    """
    columns = collector.columns()
    entries, usable = columns.entries, np.ones(len(columns.entries), bool)

    def skip(row: int, reason: str, detail: str) -> None:
        usable[row] = False
        of, unusable = entries[row], UnusableSample(reason, detail)
        if strict:
            be_strict(int(of["index"]), str(unusable))
        value = read_entry(metadata[of["file"]], int(of["start"]), int(of["stop"]))
        source = list(collector.sources)[of["source"]]
        collector.skipped.add(describe_skip(int(of["index"]), value, source, unusable))

    for row, first in find_duplicates(entries["digest"]):
        skip(row, "duplicate_entry", f"entry {entries['index'][first]} has the same id, turns and media")
    names, first, media = np.unique(columns.names, return_index=True, return_inverse=True)

    def spelled(row: int) -> str:
        return columns.spelled[int(first[row])].decode()

    places = locate(tars, data_dir, leave_out, names, columns.folded[first], spelled)
    for line in [*places.unread, *say_differing(places, tars, spelled)]:
        print(line, file=sys.stderr)
    if strict:
        for row, number in find_first_of_each(columns.media_start, places.differing[media], usable):
            name = columns.spelled[number].decode()
            be_strict(int(entries["index"][row]), f"several tars have another {name}")
    missing = MissingMedia(tars, data_dir)
    for row, number in find_first_of_each(columns.media_start, (places.source == NO_PLACE)[media], usable):
        skip(row, "missing_media", missing.describe(columns.spelled[number].decode()))
    for row, number in find_first_of_each(columns.media_start, (places.size > MAXIMUM_MEDIA_BYTES)[media], usable):
        size = f"{places.size[media[number]]} bytes, the limit is {MAXIMUM_MEDIA_BYTES}"
        skip(row, "media_too_large", f"{columns.spelled[number].decode()} has {size}")
    if strict:
        for row, number in find_first_of_each(columns.media_start, places.repair[media] > 0, usable):
            repair = NAME_REPAIRS[places.repair[media[number]]]
            be_strict(int(entries["index"][row]), f"needs repair: {repair}: {columns.spelled[number].decode()}")
    media_start, of_usable = select_media(columns.media_start, usable)
    kept = {"entries": entries[usable], "media_start": media_start, "kind": columns.kind[of_usable]}
    counted = {"sources": list(collector.sources), "read": collector.read, "skipped": collector.skipped}
    return Plan(**kept, media=media[of_usable], places=places, **counted)


class MissingMedia:
    """Says of names that lead to no file why that is so; of the first, which file there is instead."""

    def __init__(self, tars: list[TarSource], data_dir: Path) -> None:
        self.tars = tars
        self.data_dir = data_dir
        self.is_first = True

    @cached_property
    def refused(self) -> dict[str, str]:
        """Members of tars that are not used: name -> why."""
        found = ((tar, json.loads(line)) for tar in self.tars for line in tar.refused.splitlines())
        return {line["member"]: f"refused in {tar.path.name} ({line['reason']})" for tar, line in found}

    def describe(self, name: str) -> str:
        if unread := why_unread(self.data_dir / name):
            return f"{name:.300} is {unread}"
        why = self.refused.get(name) or self.refused.get(f"/{name}", "in no tar and no folder")
        nearest = find_neighbour(name, self.data_dir, self.tars) if self.is_first else ""
        self.is_first = False
        return f"{name} is {why}" + (f"; there is {nearest}" if nearest else "")


def find_duplicates(digest: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, the first row with the same digest) of each entry that an earlier one equals."""
    _, first, which = np.unique(digest, return_index=True, return_inverse=True)
    rows = np.flatnonzero(first[which] != np.arange(len(digest)))
    yield from zip(rows.tolist(), first[which[rows]].tolist())


def say_differing(places: Places, tars: list[TarSource], spelled: Callable[[int], str]) -> list[str]:
    """A line on names that lie in several tars with different content.

    places: Where the files lie that are read.
    tars: The tars of the data folder.
    spelled: Gives a name by its number.
    """
    rows = np.flatnonzero(places.differing)
    if not len(rows):
        return []
    name, tar = spelled(int(rows[0])), tars[places.source[rows[0]]].path
    return [
        f"Note: {len(rows)} of the names are in several tars with different content, such as {name}, which is read "
        f"from {tar.name}; to read another tar's, write its name before, as in {folder_of(tar)}/{name}"
    ]


def find_first_of_each(media_start: np.ndarray, is_bad: np.ndarray, usable: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, number of its first bad medium) of each usable entry with one. is_bad bool [M]."""
    bad = np.flatnonzero(is_bad)
    rows, first = np.unique(np.searchsorted(media_start, bad, side="right") - 1, return_index=True)
    for row, number in zip(rows.tolist(), bad[first].tolist()):
        if usable[row]:
            yield row, number


def select_media(media_start: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """media_start of the usable entries alone, and which media are theirs, bool [M]."""
    counts = np.diff(media_start)
    return np.concatenate([[0], np.cumsum(counts[usable])]), np.repeat(usable, counts)
