"""Writes WebDataset shards, each by one worker from its task alone, so that the bytes do not depend on the workers.

The samples of a shard come in shuffled order, and their media lie all over the source tars. A worker takes as many
consecutive samples as have 128 MiB of media in the files (a shard of 1,000 photographs is one or two such windows),
tells the kernel what it is going to read, reads it in the order of the source files and their bytes, each file range
once, and only then writes the samples in their own order. So the sources are gone through from front to back in every
window, and a worker holds one window.
"""

import contextlib
import functools
import itertools
import json
import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from dct_qwen2vl.common.files import replacing
from dct_qwen2vl.preparation.conversion import ConversionOptions, StoredMedia, convert_all
from dct_qwen2vl.preparation.data_splits import Layout
from dct_qwen2vl.preparation.entries import UnusableSample, check_entry
from dct_qwen2vl.preparation.media_index import NAME_REPAIRS
from dct_qwen2vl.preparation.metadata import PreparationError, parse_entry
from dct_qwen2vl.preparation.output_folder import stats_path
from dct_qwen2vl.preparation.plan import KINDS, Plan, SkippedEntry, be_strict, describe_skip

WINDOW_BYTES = 128 << 20  # of media files
FLUSH_BYTES = 8 << 20
TEXT_ONLY = "text_only"
# A header with no name, size and checksum: owner 0, time 0, so that equal samples give equal bytes.
BLANK_HEADER = tarfile.TarInfo("")
BLANK_HEADER.mode = 0o444
TEMPLATE = BLANK_HEADER.tobuf(tarfile.USTAR_FORMAT)
TEMPLATE_SUM = sum(TEMPLATE[:124]) + sum(TEMPLATE[136:148]) + 8 * ord(" ") + sum(TEMPLATE[156:])
PADDING = bytes(tarfile.BLOCKSIZE)
MOST_PIECES = 1023  # in one system call; Linux takes 1,024
GO_ON = "then run the same command again"


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard of S samples with M media.

    entries: plan.ENTRY [S]. `file` and `source` are numbers in `metadata` and `sources`.
    copy: [S]. See data_splits.Layout.
    media_start: [S + 1]. As in plan.Columns.
    kind: [M]. As in plan.Columns.
    path: [M]. Number in `paths`.
    offset: [M]. Where the medium begins there, bytes.
    size: [M]. Its bytes.
    repair: uint8 [M]. Number in NAME_REPAIRS of how its file's name differs.
    ways_to_fewer: As in data_splits.Layout.
    """

    shard: Path
    split: str
    entries: np.ndarray
    copy: np.ndarray
    media_start: np.ndarray
    kind: np.ndarray
    path: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    repair: np.ndarray
    metadata: tuple[str, ...]
    sources: tuple[str, ...]
    paths: tuple[str, ...]
    options: ConversionOptions
    strict: bool = False
    ways_to_fewer: tuple[str, ...] = ()

    def unpack(self) -> list["PlannedSample"]:
        """The samples one by one."""
        paths, repair = [self.paths[number] for number in self.path.tolist()], self.repair.tolist()
        places, kinds = list(zip(paths, self.offset.tolist(), self.size.tolist())), self.kind.tolist()
        samples = []
        for entry, copy, (first, last) in zip(
            self.entries.tolist(), self.copy.tolist(), itertools.pairwise(self.media_start.tolist())
        ):
            index, start, stop, file, *rest, _digest = entry
            media = (
                tuple(KINDS[kind] for kind in kinds[first:last]),
                places[first:last],
                frozenset(repair[first:last]) - {0},
            )
            samples.append(PlannedSample(index, copy, self.metadata[file], start, stop, *rest, *media))
        return samples


class PlannedSample(NamedTuple):
    """One sample of a ShardTask.

    index: Number of the entry.
    copy: Number of its repetition.
    metadata: File that holds its text.
    start: First byte of its text.
    stop: Byte after its last one.
    source: Number in ShardTask.sources.
    crc: CRC-32 of its text.
    characters: Of all turns.
    repaired: Whether the entry needed a repair.
    kinds: Of its media, in order.
    places: Of its media, in order, as (path, offset, size).
    name_repairs: Numbers in NAME_REPAIRS, of its media's names.
    """

    index: int
    copy: int
    metadata: str
    start: int
    stop: int
    source: int
    crc: int
    characters: int
    repaired: bool
    kinds: tuple[str, ...]
    places: list[tuple[str, int, int]]
    name_repairs: frozenset[int]

    @property
    def key(self) -> str:
        """Unique in the set, and without a dot."""
        return f"{self.index:09d}-{self.copy}" if self.copy else f"{self.index:09d}"


def make_task(
    plan: Plan,
    layout: Layout,
    number: int,
    shard: Path,
    files: tuple[Path, tuple[Path, ...], tuple[Path, ...]],
    options: ConversionOptions,
    strict: bool,
) -> ShardTask:
    """The task of writing one shard.

    plan: Which entries are written.
    layout: In which order.
    number: Of the shard.
    shard: File to write.
    files: The data folder, the files of metadata, the tars as they are read.
    options: How media are stored.
    strict: Whether the first finding is an error.
    """
    data_dir, metadata, tars = files
    samples = slice(int(layout.bounds[number]), int(layout.bounds[number + 1]))
    rows = layout.row[samples]
    entries = plan.entries[rows]
    counts = plan.media_start[rows + 1] - plan.media_start[rows]
    media_start = np.concatenate([[0], np.cumsum(counts)])
    media = np.arange(media_start[-1]) + np.repeat(plan.media_start[rows] - media_start[:-1], counts)
    places = plan.media[media]
    used, path = np.unique(plan.places.source[places], return_inverse=True)
    sources, entries["source"] = np.unique(entries["source"], return_inverse=True)
    return ShardTask(
        shard=shard,
        split=layout.split_of[number],
        entries=entries,
        copy=layout.copy[samples],
        media_start=media_start,
        kind=plan.kind[media],
        path=path,
        offset=plan.places.offset[places],
        size=plan.places.size[places],
        repair=plan.places.repair[places],
        metadata=tuple(map(str, metadata)),
        sources=tuple(plan.sources[name] for name in sources.tolist()),
        paths=tuple(plan.places.path_of(number, data_dir, tars) for number in used.tolist()),
        options=options,
        strict=strict,
        ways_to_fewer=layout.ways_to_fewer,
    )


@dataclass
class ShardStats:
    """What the stats file of a shard says.

    name: Of the shard.
    split: Of the shard.
    sources: Names of the source data sets.
    written: Samples written.
    parts: Media parts written, by treatment, and samples without media.
    repairs: Samples repaired, by repair.
    skipped: Entries left out.
    samples: Columns with one value for each sample written.
    media: Columns with one value for each medium of these samples, in their order.
    """

    name: str
    split: str
    sources: list[str]
    written: int = 0
    parts: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    skipped: list[SkippedEntry] = field(default_factory=list)
    samples: dict[str, list] = field(default_factory=lambda: {name: [] for name in SAMPLE_COLUMNS})
    media: dict[str, list] = field(default_factory=lambda: {name: [] for name in MEDIA_COLUMNS})

    def count(self, sample: PlannedSample, stored: list[StoredMedia], repairs: tuple[str, ...]) -> None:
        self.written += 1
        self.parts.update([media.treatment for media in stored] or [TEXT_ONLY])
        self.repairs.update(repairs)
        self.repairs.update(NAME_REPAIRS[number] for number in sample.name_repairs)
        for column, value in zip(self.samples.values(), (sample.source, len(stored), sample.characters)):
            column.append(value)
        for medium in stored:
            shape = (medium.height, medium.width, medium.frames, round(medium.seconds, 3))
            for column, value in zip(self.media.values(), shape):
                column.append(value)

    def as_json(self, tar: "TarWriter") -> dict[str, Any]:
        head = {"name": self.name, "split": self.split, "written": self.written, "bytes": tar.size}
        counts = {"parts": dict(sorted(self.parts.items())), "repairs": dict(sorted((+self.repairs).items()))}
        skipped = [asdict(entry) for entry in self.skipped]
        hashed = {"sha256": tar.digest.hexdigest()}
        columns = {"sources": self.sources, "samples": self.samples, "media": self.media}
        return {**head, **hashed, **counts, "skipped": skipped, **columns}


SAMPLE_COLUMNS = ("source", "media", "text")  # number in `sources`, how many media, characters of all turns
MEDIA_COLUMNS = ("height", "width", "frames", "seconds")  # of media_conversion.StoredMedia


# Reading


class SourceReader:
    """Reads ranges of files and keeps the files open: a shard comes back to the same few tars all the time."""

    MOST_FILES = 64

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}

    def open(self, path: str) -> int:
        if path not in self.descriptors:
            if len(self.descriptors) == self.MOST_FILES:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            try:
                self.descriptors[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                why = f"{path} was there and cannot be opened any more ({error.strerror})"
                raise PreparationError(f"{why}; put it back, {GO_ON}") from error
        return self.descriptors[path]

    def announce(self, ranges: list[tuple[str, int, int]]) -> None:
        """Let the kernel begin to fetch some (path, offset, size), unless they are in too many files to keep open."""
        if len({path for path, _, _ in ranges}) <= self.MOST_FILES:
            for path, offset, size in ranges:
                with contextlib.suppress(OSError):  # it is a hint
                    os.posix_fadvise(self.open(path), offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, target: memoryview, path: str, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on. Raises PreparationError where they cannot be read any more."""
        try:
            read = os.preadv(self.open(path), [target], offset)
        except OSError as error:
            raise PreparationError(f"{path} cannot be read ({error.strerror}); repair it, {GO_ON}") from error
        if read != len(target):
            raise PreparationError(f"{path} changed while it was read; put back what it was, {GO_ON}")

    def read(self, path: str, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(memoryview(data), path, offset)
        return bytes(data)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def cut_windows(samples: list[PlannedSample], budget: int) -> Iterator[list[PlannedSample]]:
    """Consecutive samples whose media have at most `budget` bytes, at least one sample each."""
    window, held = [], 0
    for sample in samples:
        needed = sum(size for _, _, size in sample.places)
        if window and held + needed > budget:
            yield window
            window, held = [], 0
        window.append(sample)
        held += needed
    yield window


@functools.lru_cache(maxsize=1)
def window_memory() -> memoryview:
    """For one window after the other: memory that is new has to be cleared by the kernel each time. Private: processes
    that are forked later have their own."""
    memory = mmap.mmap(-1, WINDOW_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without: 30 times as many page faults
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def read_window(window: list[PlannedSample], reader: SourceReader) -> dict[tuple[str, int, int], memoryview]:
    """The media of some samples by their place, read in the order of their files. They stay until the next call."""
    ranges = sorted({place for sample in window for place in sample.places})
    reader.announce(ranges)
    total, place, files = sum(size for _, _, size in ranges), 0, {}
    memory = window_memory() if total <= WINDOW_BYTES else memoryview(bytearray(total))
    for path, offset, size in ranges:
        files[path, offset, size] = memory[place : place + size]
        reader.read_into(memory[place : place + size], path, offset)
        place += size
    return files


# Writing


class TarWriter:
    """Writes a tar and knows its SHA-256 and size.

    Not webdataset.TarWriter, which imports torch into every worker (5 s), nor tarfile, which takes 50 us for a header.
    """

    def __init__(self, stream: BinaryIO):
        self.stream = stream  # unbuffered
        self.digest = sha256()
        self.size = 0
        self.flushed = 0

    def add_sample(self, key: str, parts: dict[str, bytes]) -> None:
        """Append a file KEY.NAME for each of the parts."""
        pieces = []
        for name, data in parts.items():
            pieces += (make_header(f"{key}.{name}", len(data)), data, PADDING[: -len(data) % tarfile.BLOCKSIZE])
        self.write(pieces)

    def end(self) -> None:
        size = self.size + 2 * tarfile.BLOCKSIZE
        self.write([bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE)])

    def write(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.digest.update(piece)
            self.size += len(piece)
        for start in range(0, len(pieces), MOST_PIECES):
            write_all(self.stream.fileno(), pieces[start : start + MOST_PIECES])
        if self.size - self.flushed >= FLUSH_BYTES:
            self.begin_to_flush()

    def begin_to_flush(self) -> None:
        """Have the kernel send what is there to the disk meanwhile, so that fsync waits for little at the end."""
        with contextlib.suppress(OSError):  # it is a hint
            place, size = self.flushed, self.size - self.flushed
            os.posix_fadvise(self.stream.fileno(), place, size, os.POSIX_FADV_DONTNEED)
        self.flushed = self.size


def write_all(descriptor: int, pieces: list[bytes]) -> None:
    """One system call, unless the disk takes less."""
    size = sum(map(len, pieces))
    written = os.writev(descriptor, pieces)
    if written < size:
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def make_header(name: str, size: int) -> bytes:
    """512 bytes, a ustar header with an ASCII name of up to 100 characters; as tarfile makes it."""
    encoded, digits = name.encode("ascii"), b"%011o" % size
    total = TEMPLATE_SUM + sum(encoded) + sum(digits)
    number = b"%06o\0 " % total
    return b"".join(
        (encoded.ljust(100, b"\0"), TEMPLATE[100:124], digits, b"\0", TEMPLATE[136:148], number, TEMPLATE[156:])
    )


def write_shard(task: ShardTask, advance: Callable[[int], Any]) -> None:
    """Writes one shard, then its stats beside it.

    task: All that is needed.
    advance: Called with 1 after every sample.

    Samples that cannot be used are left out, and the stats name them. Raises PreparationError if no sample is left, or
    at the first finding if the task is strict.
    """
    stats = ShardStats(task.shard.name, task.split, list(task.sources))
    with contextlib.closing(SourceReader()) as reader, replacing(task.shard) as file:
        tar = TarWriter(file)
        for window in cut_windows(task.unpack(), WINDOW_BYTES):
            files = read_window(window, reader)
            for sample in window:
                write_sample(task, sample, files, reader, tar, stats)
                advance(1)
        tar.end()
        refuse_empty_shard(stats, task.ways_to_fewer)
    with replacing(stats_path(task.shard)) as file:
        file.write(json.dumps(stats.as_json(tar), separators=(",", ":")).encode() + b"\n")


def write_sample(
    task: ShardTask,
    sample: PlannedSample,
    files: dict[tuple[str, int, int], memoryview],
    reader: SourceReader,
    tar: TarWriter,
    stats: ShardStats,
) -> None:
    """Append the members of one sample, media first; or note why it cannot be used."""
    text = reader.read(sample.metadata, sample.start, sample.stop - sample.start)
    if crc32(text) != sample.crc:
        raise PreparationError(f"{sample.metadata} changed while it was read; put back what it was, {GO_ON}")
    data = [bytes(files[place]) for place in sample.places]
    try:
        if sample.repaired:
            entry = check_entry(parse_entry(text))
            text, repairs = json.dumps(entry.entry).encode(), entry.repairs
        else:
            text, repairs = text.strip(), ()
        stored = convert_all(zip(sample.kinds, itertools.repeat("")), data, task.options)
    except UnusableSample:
        note_unusable(task, sample, parse_entry(text), data, stats)
    else:
        tar.add_sample(sample.key, name_parts(stored, text))
        stats.count(sample, stored, repairs)


def note_unusable(task: ShardTask, sample: PlannedSample, value: Any, data: list[bytes], stats: ShardStats) -> None:
    """Convert the media once more, this time with their names, and say what is wrong with which."""
    try:
        convert_all(check_entry(value).media, data, task.options)
    except UnusableSample as unusable:
        if task.strict:
            be_strict(sample.index, str(unusable))
        stats.skipped.append(describe_skip(sample.index, value, task.sources[sample.source], unusable))


def name_parts(stored: list[StoredMedia], text: bytes) -> dict[str, bytes]:
    """The parts of a sample by file ending: "jpg" for a single medium, "0.jpg", "1.mp4" for several; "json"."""
    numbered = len(stored) > 1
    parts = {f"{number}.{media.part}" if numbered else media.part: media.data for number, media in enumerate(stored)}
    return {**parts, "json": text}


def refuse_empty_shard(stats: ShardStats, ways_to_fewer: tuple[str, ...]) -> None:
    """Energon drops an empty shard, and could then find no val split.

    stats: Of the shard.
    ways_to_fewer: As in data_splits.Layout.
    """
    if not stats.written:
        first = f"{len(stats.skipped)} in all; the first: {stats.skipped[0].reason}, {stats.skipped[0].detail}"
        remedies = [f"make fewer and larger shards ({', or '.join(ways_to_fewer)})"] if ways_to_fewer else []
        if ways_to_fewer and len(stats.skipped) > 1:  # shards of one sample: one is always empty
            remedies.append("try another --seed")
        remedy = ", ".join([*remedies, "add data", "or repair what is broken"])
        raise PreparationError(f"{stats.name} would be empty, for none of its samples can be used ({first}); {remedy}")
