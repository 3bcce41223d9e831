"""The metadata of a raw data folder: one file or several, each a JSON list of entries or JSON lines.

A file is cut into its entries by brackets, commas, quotes and line ends alone, 512 KiB at a time, so that its size does
not matter and the entries can be parsed by several processes: an entry is known by its file and its bytes there.

Letter used for shapes: N entries.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.energon_files import METADATA_NAME
from dct_qwen2vl.preparation.entries import DECODER, UnusableSample
from dct_qwen2vl.preparation.file_kinds import name_kind

OWN_SHARDS = "pretrain-*.stats.json"
READ_BYTES = 1 << 19  # some 500 entries: small enough that small sets keep all workers busy
MAXIMUM_ENTRY_BYTES = 64 << 20  # an entry of Cambrian737k has 1 KB, a long conversation 1 MB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it first
OPEN, CLOSE, COMMA = 1, 2, 3
# What structures a JSON text, by byte; 0 for all other bytes.
STRUCTURE = np.zeros(256, np.uint8)
STRUCTURE[[*b"[{"]], STRUCTURE[[*b"]}"]], STRUCTURE[[*b","]] = OPEN, CLOSE, COMMA


class PreparationError(UserError):
    """Data or environment is wrong: one line that says what, where and what to do."""


@dataclass(frozen=True)
class EntryRanges:
    """Consecutive entries of one metadata file.

    file: Number of the file.
    path: The file.
    is_list: Whether it is a JSON list.
    first: Number of entry 0 among the entries of all files.
    start: int64 [N]. First byte of each entry.
    stop: int64 [N]. Byte after its last one.
    """

    file: int
    path: Path
    is_list: bool
    first: int
    start: np.ndarray
    stop: np.ndarray

    def head(self, count: int) -> "EntryRanges":
        """Without all entries from entry `count` on."""
        return EntryRanges(self.file, self.path, self.is_list, self.first, self.start[:count], self.stop[:count])


def find_metadata(data_dir: Path, names: list[Path] | None = None) -> list[Path]:
    """The files of the metadata.

    data_dir: The data folder.
    names: Files below the data folder or elsewhere. None: cambrian737k.json in any letter case.

    Raises PreparationError if one is missing, or if several differ only in letter case.
    """
    if not data_dir.is_dir():
        raise PreparationError(f"{data_dir} is not a folder; --data-dir takes the folder that holds the media")
    if names:
        return [find_named(data_dir, name) for name in names]
    found = sorted(path for path in data_dir.iterdir() if path.name.lower() == METADATA_NAME)
    if not found and any(data_dir.glob(OWN_SHARDS)):
        raise PreparationError(f"{data_dir} holds shards that this tool has written: give --data-dir the raw data")
    if not found:
        raise PreparationError(f"{data_dir} holds no {METADATA_NAME}{say_other_metadata(data_dir)}")
    if len(found) > 1:
        raise PreparationError(f"{data_dir} holds both {found[0].name} and {found[1].name}; leave one of them there")
    return found


def say_other_metadata(data_dir: Path) -> str:
    """What to do where a data folder holds no METADATA_NAME: which other file is there, or which folder has it."""
    below = sorted(path for path in data_dir.glob("*/*.json") if path.name.lower() == METADATA_NAME)
    if below:
        return f", but {below[0].parent} does: give that to --data-dir"
    others = ", ".join(sorted(path.name for path in data_dir.glob("*.json*"))[:3])
    tables = [] if others else sorted([*data_dir.glob("*.parquet"), *data_dir.glob("*/*.parquet")])
    if tables:
        what = f"{tables[0].relative_to(data_dir)}, which is not read"
        return f", but {what}: write its rows as JSON lines and its images as files, and add --metadata FILE"
    return f"; name the metadata: --metadata {others or 'FILE'}"


def find_named(data_dir: Path, name: Path) -> Path:
    paths = (data_dir / name, name)
    for path in paths:
        if path.is_file():
            return path
    for path in paths:
        if path.is_dir():
            inside = name / min(path.glob("*.json*"), default=path / "FILE").name
            raise PreparationError(f"--metadata {name} is a folder: name a file in it, as in --metadata {inside}")
    raise PreparationError(f"there is no metadata file {name}, neither in {data_dir} nor as a path of its own")


class MetadataReader:
    """Cuts files of metadata into entries. After the last one, `digests` holds the SHA-256 of each file, as hex, of
    what has been read of it; `count` the number of entries."""

    def __init__(self, paths: list[Path], limit: int | None = None):
        self.paths = paths
        self.limit = limit
        self.count = 0
        self.digests: list[str] = []

    def __iter__(self) -> Iterator[EntryRanges]:
        """All entries, those of a block of a file at a time. Raises PreparationError for what is neither a JSON list
        nor JSON lines; the entries themselves may still be no JSON."""
        for number, path in enumerate(self.paths):
            digest = sha256()
            for is_list, start, stop in cut_file(path, digest):
                ranges = EntryRanges(number, path, is_list, self.count, start, stop)
                if self.limit is not None:
                    ranges = ranges.head(self.limit - self.count)
                self.count += len(ranges.start)
                if len(ranges.start):
                    yield ranges
                if self.count == self.limit:
                    break
            self.digests.append(digest.hexdigest())


def cut_file(path: Path, digest: Any) -> Iterator[tuple[bool, np.ndarray, np.ndarray]]:
    """Yield (whether the file is a list, start, stop) of the entries that end in each block of a file."""
    with path.open("rb") as file:
        block = file.read(READ_BYTES)
        text = block.removeprefix(BYTE_ORDER_MARK).lstrip()
        offset = len(block) - len(text)
        kinds = {b"[": ListCutter, b"{": LineCutter}
        if text[:1] not in kinds:
            hint = (name_kind(text) or f"it begins with {text[:20]!r}") if text else "it is empty"
            raise PreparationError(f"{path} is neither a JSON list nor JSON lines: {hint}")
        cutter = kinds[text[:1]](path, offset)
        while block:
            digest.update(block)
            yield cutter.is_list, *cutter.cut(text, offset)
            offset += len(text)
            block = text = file.read(READ_BYTES)
        yield cutter.is_list, *cutter.finish(offset)


class LineCutter:
    """JSON lines: an entry is a line that is not blank."""

    is_list = False

    def __init__(self, path: Path, offset: int):
        self.begin = offset  # of the line that is being read
        self.is_blank = True

    def cut(self, block: bytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """The lines that end in this block, which lies at `offset` in the file."""
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        starts = np.concatenate(([0], ends + 1))
        is_text = (data > ord(" ")) | (data == 0)  # zeros are what a disk has left of lost lines
        has_text = np.logical_or.reduceat(np.append(is_text, False), starts)
        has_text[0] |= not self.is_blank
        start = starts + offset
        start[0], self.begin = self.begin, start[-1] if len(ends) else self.begin
        self.is_blank = not has_text[-1]
        return start[:-1][has_text[:-1]], (ends + offset)[has_text[:-1]]

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The last line, where nothing ends it."""
        last = [] if self.is_blank else [0]
        return np.array([self.begin], np.int64)[last], np.array([size], np.int64)[last]


class ListCutter:
    """A JSON list: its entries lie between commas outside of strings and of inner brackets."""

    is_list = True

    def __init__(self, path: Path, offset: int):
        self.path = path
        self.begin = offset + 1  # of the entry that is being read
        self.depth = 0
        self.in_string = False
        self.escaped = False  # the next character is behind an odd number of backslashes
        self.count = 0
        self.is_closed = False

    def cut(self, block: bytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries that end in this block, which lies at `offset` in the file."""
        if self.is_closed:
            self.check_rest(block, offset)
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places, kinds = self.find_structure(np.frombuffer(block, np.uint8))
        depth = self.depth + np.cumsum((kinds == OPEN).astype(np.int32) - (kinds == CLOSE))
        self.depth = int(depth[-1]) if len(depth) else self.depth
        closing = np.flatnonzero(depth == 0)[:1]
        stop = places[(kinds == COMMA) & (depth == 1)] + offset
        if len(closing):
            end = int(places[closing[0]])
            stop = np.append(stop[stop < end + offset], end + offset)
            self.close(block, end, offset)
        start = np.concatenate(([self.begin], stop + 1))
        self.begin = int(start[-1])
        self.count += len(stop)
        if self.is_closed and self.count == 1 and self.is_empty(int(start[0]), int(stop[0])):
            return start[:0], stop[:0]
        return start[:-1], stop

    def find_structure(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the brackets and commas outside of strings, and their kinds."""
        quotes = np.flatnonzero(data == ord('"'))
        quotes = quotes[~self.find_escaped(data, quotes)]
        places = np.flatnonzero(STRUCTURE[data])
        outside = (np.searchsorted(quotes, places) + self.in_string) % 2 == 0
        self.in_string = bool((len(quotes) + self.in_string) % 2)
        places = places[outside]
        return places, STRUCTURE[data[places]]

    def find_escaped(self, data: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """bool: which of these places are behind an odd number of backslashes."""
        backslashes = np.flatnonzero(data == ord("\\"))
        escaped = (quotes == 0) & self.escaped
        if not len(backslashes):
            self.escaped = False
            return escaped
        is_first = np.diff(backslashes, prepend=-2) != 1  # of a run
        run_start = np.maximum.accumulate(np.where(is_first, backslashes, -1))
        if self.escaped:
            run_start[run_start == 0] = -1  # the run began with the last block
        is_odd = (backslashes - run_start) % 2 == 0
        before = np.minimum(np.searchsorted(backslashes, quotes - 1), len(backslashes) - 1)
        escaped |= (backslashes[before] == quotes - 1) & is_odd[before]
        self.escaped = bool(backslashes[-1] == len(data) - 1 and is_odd[-1])
        return escaped

    def close(self, block: bytes, end: int, offset: int) -> None:
        if block[end : end + 1] != b"]":
            raise PreparationError(f"{self.path} is not a JSON list: it is closed by '}}' at byte {offset + end}")
        self.is_closed = True
        self.check_rest(block[end + 1 :], offset + end + 1)

    def check_rest(self, rest: bytes, offset: int) -> None:
        if rest.strip():
            raise PreparationError(f"{self.path} is not a JSON list: something follows it at or after byte {offset}")

    def is_empty(self, start: int, stop: int) -> bool:
        """Whether the list's only entry is none, as in "[ ]"."""
        with self.path.open("rb") as file:
            file.seek(start)
            return stop - start <= READ_BYTES and not file.read(stop - start).strip()

    def finish(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.is_closed:
            what = f"it ends at byte {size} inside of the entry that begins at byte {self.begin}"
            raise PreparationError(f"{self.path} is not a JSON list, for it is not closed: {what}; is it complete?")
        return np.zeros(0, np.int64), np.zeros(0, np.int64)


def read_range(descriptor: int, path: Path | str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an open file.

    descriptor: The open file.
    path: Named in the message.
    start: First byte.
    stop: Byte after the last one.

    Raises PreparationError if the file is shorter.
    """
    data = os.pread(descriptor, stop - start, start)
    if len(data) != stop - start:
        raise PreparationError(f"{path} changed while it was read; once it is complete, run the same command again")
    return data


def parse_entries(ranges: EntryRanges) -> Iterator[tuple[bytes, Any]]:
    """The text and the value of each entry; an UnusableSample in place of the value where the entry alone is at fault.

    Raises PreparationError where an entry of a list is no JSON, since all borders may then be wrong.
    """
    descriptor = os.open(ranges.path, os.O_RDONLY)
    try:
        for number, start, stop in zip(range(ranges.first, 1 << 62), ranges.start.tolist(), ranges.stop.tolist()):
            if stop - start > MAXIMUM_ENTRY_BYTES:
                what = f"an entry of {stop - start} bytes; the limit is {MAXIMUM_ENTRY_BYTES}"
                yield b"", UnusableSample("malformed_entry", what)
                continue
            data = read_range(descriptor, ranges.path, start, stop)
            try:
                yield data, parse_entry(data)
            except UnusableSample as unusable:
                yield data, unusable
            except ValueError as error:
                if ranges.is_list or number == 0:
                    kind = "a JSON list of entries" if ranges.is_list else "JSON lines (an entry a line)"
                    where = f"in entry {number}, which begins at byte {start}"
                    more = "" if ranges.is_list else "; if it is one object, write the list in it to a file of its own"
                    raise PreparationError(f"{ranges.path} is not {kind}: {error}, {where}{more}") from error
                yield data, UnusableSample("malformed_entry", f"not JSON: {error}")
    finally:
        os.close(descriptor)


def read_entry(path: Path, start: int, stop: int) -> Any:
    """One entry that `parse_entries` has read before.

    path: File of the metadata.
    start: First byte of the entry.
    stop: Byte after its last one.
    """
    with path.open("rb") as file:
        return parse_entry(read_range(file.fileno(), path, start, stop))


def parse_entry(data: bytes) -> Any:
    """The value of an entry. Raises UnusableSample where it is no UTF-8 or nested too deeply, ValueError where it is no
    JSON."""
    try:
        return DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        what = f"not UTF-8: {error.reason} at byte {error.start}"
        raise UnusableSample("malformed_entry", f"{what}; write the file as UTF-8") from error
    except RecursionError as error:
        raise UnusableSample("malformed_entry", "nested too deeply") from error
