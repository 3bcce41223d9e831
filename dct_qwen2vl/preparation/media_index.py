"""Where the media of a raw data folder lie: in D/*.tar, D/*.tar.gz and D/*.tgz (archives.py), and in plain folders
below D.

Every tar is walked over once (tar_walk.py); what was found is kept in O/.work, so that a run that goes on and the other
parts of a set need not walk again. A compressed tar is unpacked there once, as a whole, for its members cannot be
reached otherwise. A name is looked up in the tars, of which the last counts, as it would after unpacking them all; then
among the plain files; then in another letter case or Unicode form, if there is just one such file; then as it may have
been meant (other_names.py).

Names are known by 16 bytes of their BLAKE2b hash, and so is the content, by size and both ends of a file: an image
that lies in two places is known as one.

Letters used for shapes: M members of a tar or files of the folders, U different names that are looked up.
"""

import contextlib
import io
import json
import os
import stat
import unicodedata
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from gzip import BadGzipFile
from gzip import open as open_gzip
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dct_qwen2vl.common.files import replacing
from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.preparation.archives import list_tars, name_unread_below
from dct_qwen2vl.preparation.file_kinds import name_kind
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.other_names import (
    MOST_SPELLINGS,
    folder_of,
    other_spellings,
    shorter_names,
    within_folders,
)
from dct_qwen2vl.preparation.tar_walk import EDGE_BYTES, DamagedTar, Member, walk_tar

INDEX_VERSION = 2  # of the files in O/.work
DIGEST = np.dtype("S16")
GZIP_MAGIC = b"\x1f\x8b"
BAD_GZIP = (EOFError, BadGzipFile, zlib.error)
COPY_BYTES = 1 << 20
LEAST_BYTES = 64  # a smaller file is no image; nothing can be told from its content
READERS = 16  # threads that look at plain files: they wait for the disk
NO_PLACE = -1
# What is counted where a file has another name: in letter case or Unicode form, in spelling, without its tar's name.
NAME_REPAIRS = ("", "other_letter_case", "other_spelling", "tar_as_folder")
OTHER_CASE, OTHER_SPELLING, TAR_AS_FOLDER = 1, 2, 3


class NameList:
    """A list of byte strings in two columns: 700,000 strings would take 60 MB more."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends = array("q", [0])

    def append(self, name: bytes) -> None:
        """Adds a name."""
        self.text += name
        self.ends.append(len(self.text))

    def extend(self, other: "NameList") -> None:
        """Adds all names of another list."""
        base = len(self.text)
        self.text += other.text
        self.ends.extend(base + end for end in other.ends[1:])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self.text[self.ends[number] : self.ends[number + 1]])


@dataclass(frozen=True)
class Index:
    """The members of a tar that can be used, each name once; or the files of the plain folders.

    names: S16 [M]. Digests of the names.
    folded: S16 [M]. Digests of the names in lower case.
    content: S16 [M]. Digests of size and both ends. Not known yet for plain files.
    offset: int64 [M]. Where the data begin, bytes. For plain files the number in a NameList.
    size: int64 [M]. Bytes. Not known yet for plain files.
    """

    names: np.ndarray
    folded: np.ndarray
    content: np.ndarray
    offset: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class TarSource:
    """A tar of the raw set.

    path: As it is found.
    readable: The same file, or the unpacked one.
    members: How many can be used.
    index: Where they lie. None once they have been located.
    refused: JSON lines with the other members' names, and why each is not used.
    damage: Why what comes after some byte is not used; "" if all is.
    """

    path: Path
    readable: Path
    members: int
    index: Index | None
    refused: bytes
    damage: str


@dataclass
class Places:
    """Where the files behind U names lie.

    source: int32 [U]. Number of the tar; NO_PLACE where there is none; first_file + i is file i of `files`.
    offset: int64 [U]. As in Index.
    size: int64 [U]. As in Index.
    content: S16 [U]. As in Index.
    repair: uint8 [U]. Number in NAME_REPAIRS of how the file's name differs.
    differing: bool [U]. Whether several tars have a file of the name, with different content.
    first_file: How many tars there are.
    files: Names relative to the data folder.
    sought_in_folders: Whether some name was in no tar.
    unread: Lines that name the archives in folders below the data folder, which are not read. Only where some name is
        nowhere.
    """

    source: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    content: np.ndarray
    repair: np.ndarray
    differing: np.ndarray
    first_file: int
    files: NameList = field(default_factory=NameList)
    sought_in_folders: bool = False
    unread: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, count: int, first_file: int) -> "Places":
        """No name has a place yet.

        count: Number of names.
        first_file: Number of tars.
        """
        source, zeros = np.full(count, NO_PLACE, np.int32), np.zeros(count, np.int64)
        content, repair, differing = (np.zeros(count, kind) for kind in (DIGEST, np.uint8, bool))
        return cls(source, zeros, zeros.copy(), content, repair, differing, first_file)

    def enter(self, rows: np.ndarray, source: int, index: Index, members: np.ndarray) -> None:
        """Enters the places of some names.

        rows: int [n]. Numbers of the names.
        source: Number of the tar, or of the plain files.
        index: Members of this source.
        members: int [n]. Number in `index` for each name.
        """
        self.source[rows] = source
        for name in ("offset", "size", "content"):
            getattr(self, name)[rows] = getattr(index, name)[members]

    def path_of(self, source: int, data_dir: Path, tars: tuple[Path, ...]) -> str:
        """The file to read for a number in `source`.

        source: The number.
        data_dir: The data folder.
        tars: Paths of the tars as they are read.
        """
        if source < self.first_file:
            return str(tars[source])
        return os.path.join(data_dir, os.fsdecode(self.files[source - self.first_file]))


def digest_of(data: bytes) -> bytes:
    """A digest of 16 bytes (BLAKE2b)."""
    return blake2b(data, digest_size=DIGEST.itemsize).digest()


def digest_name(name: str) -> bytes:
    """The digest of a name."""
    return digest_of(name.encode("utf-8", "surrogateescape"))


def digest_folded(name: str) -> bytes:
    """The same for names that differ in letter case or Unicode form alone."""
    folded = name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
    return digest_of(folded.encode("utf-8", "surrogateescape"))


def digest_content(name: bytes, size: int, edges: bytes) -> bytes:
    return digest_of(size.to_bytes(8, "little") + (edges if size >= LEAST_BYTES else name))


# Tars


def index_tars(data_dir: Path, work: Path | None, pool: WorkerPool) -> list[TarSource]:
    """All tars of a data folder, by name, with their indexes.

    data_dir: The data folder.
    work: Keeps indexes and unpacked tars for a later run. None: nothing is kept.
    pool: Its workers read the tars.
    """
    tasks = [(path, work) for path in list_tars(data_dir)]
    return list(pool.map(open_in_worker, tasks, lambda steps: None))


def open_in_worker(task: tuple[Path, Path | None], advance: Callable[[int], Any]) -> TarSource:
    return open_tar(*task)


def open_tar(path: Path, work: Path | None) -> TarSource:
    """A tar with its index.

    path: The tar.
    work: As in `index_tars`.

    Raises PreparationError if it is no tar.
    """
    try:
        if work is None:
            return index_tar(path, path)
        state = path.stat()
        key = digest_of(f"{INDEX_VERSION} {path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hex()
        readable = work / f"{key}.unpacked" if is_gzip(path) else path
        return load_index(path, readable, work / f"{key}.npz") or make_index(path, readable, work / f"{key}.npz")
    except DamagedTar as error:
        with path.open("rb") as file:
            kind = "" if is_gzip(path) else name_kind(file.read(32))
        remedy = kind or "fetch it again or take it out of the folder"
        raise PreparationError(f"{path} cannot be read as a tar ({error}); {remedy}") from error
    except OSError as error:
        raise PreparationError(f"{path} cannot be read ({error.strerror or error})") from error


def is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def make_index(path: Path, readable: Path, kept: Path) -> TarSource:
    """Unpack the tar if need be, walk over it, and keep the index."""
    source = index_tar(path, readable, unpack(path, readable) if readable != path else "")
    columns = {name: getattr(source.index, name) for name in Index.__dataclass_fields__}
    texts = {"refused": source.refused, "damage": source.damage.encode()}
    with replacing(kept) as stream:
        np.savez(stream, **columns, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()})
    return source


def load_index(path: Path, readable: Path, kept: Path) -> TarSource | None:
    """The index that an earlier run kept, if there is one."""
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            index = Index(*(arrays[name] for name in Index.__dataclass_fields__))
            refused, damage = arrays["refused"].tobytes(), arrays["damage"].tobytes().decode()
            return TarSource(path, readable, len(index.names), index, refused, damage)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def make_readable(sources: list[TarSource], num_workers: int) -> None:
    """Unpacks tars again that an earlier run has indexed and then removed.

    sources: The tars.
    num_workers: Threads that unpack.
    """
    missing = [source for source in sources if not source.readable.exists()]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        list(pool.map(lambda source: unpack(source.path, source.readable), missing))


def unpack(path: Path, target: Path) -> str:
    """Decompress a tar; returns what is wrong with it, in which case the target holds what came before."""
    damage = ""
    with open_gzip(path) as packed, replacing(target) as stream:
        try:
            while data := packed.read1(COPY_BYTES):  # read() would drop what comes before the damage
                stream.write(data)
        except BAD_GZIP as error:
            damage = f"its compressed data are damaged ({error})"
    return damage


def index_tar(path: Path, readable: Path, damage: str = "") -> TarSource:
    """Walk over a tar. Raises DamagedTar where nothing in it can be used."""
    packed = readable == path and is_gzip(path)
    walked = WalkedTar()
    with open_gzip(path) if packed else readable.open("rb", buffering=2 * EDGE_BYTES) as stream:
        try:
            for member in walk_tar(stream, None if packed else readable.stat().st_size):
                walked.add(member)
        except (DamagedTar, *BAD_GZIP) as error:
            if not len(walked.names):
                raise error if isinstance(error, DamagedTar) else DamagedTar(0, str(error)) from error
            damage = damage or str(error)
    index, refused = walked.finish()
    return TarSource(path, readable, len(index.names), index, refused, damage)


class WalkedTar:
    """Collects the members of a tar in columns. A link has the range and the content of the file that it stands for."""

    def __init__(self) -> None:
        self.names = NameList()
        self.digests = bytearray()
        self.ranges = array("q")
        self.refused: list[bytes] = []
        self.links: list[tuple[int, Member]] = []  # those not followed yet, with the number of members before them
        self.rows: dict[bytes, int] = {}  # the last member of a name; made where there are links

    def add(self, member: Member) -> None:
        if member.refused:
            self.refused.append(write_refusal(member.name, member.refused))
        elif not member.target:
            self.append(member.name, digest_content(member.name, member.size, member.edges), member.offset, member.size)
        elif member.is_symbolic or not self.follow(member):
            self.links.append((len(self.names), member))

    def append(self, name: bytes, content: bytes, offset: int, size: int) -> None:
        if self.rows:
            self.rows[name] = len(self.names)
        self.names.append(name)
        self.digests += digest_of(name) + digest_folded(name.decode("utf-8", "surrogateescape")) + content
        self.ranges.extend((offset, size))

    def follow(self, link: Member) -> bool:
        """Append a link as the file that it stands for; False where that is not there (yet)."""
        self.number_rows()
        row = self.rows.get(link.target)
        if row is not None:
            start = (3 * row + 2) * DIGEST.itemsize
            content = bytes(self.digests[start : start + DIGEST.itemsize])
            self.append(link.name, content, *self.ranges[2 * row : 2 * row + 2])
        return row is not None

    def number_rows(self) -> None:
        if not self.rows:
            self.rows = {self.names[row]: row for row in range(len(self.names))}

    def follow_links(self) -> None:
        """Follow those that lead to later members or to other links; refuse those that lead nowhere."""
        if self.links:
            self.number_rows()
        waiting, before = self.links, None
        while waiting and len(waiting) != before:
            before = len(waiting)
            waiting = [link for link in waiting if not self.is_replaced(*link) and not self.follow(link[1])]
        self.refused += [write_refusal(link.name, "link") for _, link in waiting]

    def is_replaced(self, members: int, link: Member) -> bool:
        """Whether a later file of the tar has the name of a link, which is then a duplicate."""
        if self.rows.get(link.name, -1) < members:
            return False
        self.refused.append(write_refusal(link.name, "duplicate"))
        return True

    def finish(self) -> tuple[Index, bytes]:
        """The members that count and the refused ones as JSON lines. Of one name's members the last counts."""
        self.follow_links()
        names, folded, content = np.frombuffer(bytes(self.digests), DIGEST).reshape(-1, 3).T
        _, from_end = np.unique(names[::-1], return_index=True)
        counts = np.zeros(len(names), bool)
        counts[len(names) - 1 - from_end] = True
        self.refused += [write_refusal(self.names[row], "duplicate") for row in np.flatnonzero(~counts).tolist()]
        offset, size = np.frombuffer(self.ranges, np.int64).reshape(-1, 2).T
        index = Index(*(np.ascontiguousarray(column[counts]) for column in (names, folded, content, offset, size)))
        return index, b"".join(self.refused)


def write_refusal(name: bytes, reason: str) -> bytes:
    text = name.decode("utf-8", "backslashreplace")[:1000]
    return (json.dumps({"member": text, "reason": reason}) + "\n").encode()


def count_refused(source: TarSource) -> dict[str, int]:
    """Refused members by reason."""
    return dict(sorted(Counter(json.loads(line)["reason"] for line in source.refused.splitlines()).items()))


# Plain files


def index_folder(data_dir: Path, leave_out: Path) -> tuple[Index, NameList]:
    """All plain files below the data folder, but for those below `leave_out`; links are followed, but for those to a
    folder that they lie in."""
    files, digests = NameList(), bytearray()
    for name in walk_folder(str(data_dir), str(leave_out.resolve())):
        encoded = os.fsencode(name)
        files.append(encoded)
        digests += digest_of(encoded) + digest_folded(name)
    names, folded = (np.ascontiguousarray(column) for column in np.frombuffer(bytes(digests), DIGEST).reshape(-1, 2).T)
    count = len(files)
    return Index(names, folded, np.zeros(count, DIGEST), np.arange(count), np.zeros(count, np.int64)), files


def walk_folder(root: str, leave_out: str) -> Iterator[str]:
    """Names of plain files relative to the root."""
    for folder, _, names in walk_folders(root, leave_out):
        yield from (os.path.join(folder, name) for name in names)


def are_files_older(data_dir: Path, leave_out: Path, time_ns: int) -> bool:
    """Whether no plain file below the data folder was written, added or removed after a time.

    data_dir: The data folder.
    leave_out: A folder that is not looked into: the output.
    time_ns: Nanoseconds since 1970.
    """
    root = str(data_dir)
    for folder, changed_ns, names in walk_folders(root, str(leave_out.resolve())):
        paths = (os.path.join(root, folder, name) for name in names)
        if changed_ns > time_ns or any(os.stat(path).st_mtime_ns > time_ns for path in paths):
            return False
    return True


def walk_folders(root: str, leave_out: str) -> Iterator[tuple[str, int, list[str]]]:
    """(name relative to the root, when it changed, names of its plain files) of each folder."""
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        state = os.stat(path)
        if os.path.realpath(path) == leave_out or (state.st_dev, state.st_ino) in above:
            continue
        above = above | {(state.st_dev, state.st_ino)}
        inside, names = list_folder(path)
        waiting += [(os.path.join(folder, name), above) for name in inside]
        yield folder, state.st_mtime_ns, names


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the plain files in a folder; none of one that may not be read, as lost+found."""
    folders, files = [], []
    with contextlib.suppress(PermissionError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link that leads to itself
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
    return folders, files


def look_at_file(root: bytes, name: bytes) -> tuple[int, bytes] | None:
    """Size and content digest of a plain file; None if it is gone."""
    try:
        with io.FileIO(os.path.join(root, name)) as file:
            size = os.fstat(file.fileno()).st_size
            edges = os.pread(file.fileno(), EDGE_BYTES if size > 2 * EDGE_BYTES else 2 * EDGE_BYTES, 0)
            if size > 2 * EDGE_BYTES:
                edges += os.pread(file.fileno(), EDGE_BYTES, size - EDGE_BYTES)
    except OSError:
        return None
    return size, digest_content(name, size, edges)


# Looking up


def locate(
    sources: list[TarSource],
    data_dir: Path,
    leave_out: Path,
    names: np.ndarray,
    folded: np.ndarray,
    spelled: Callable[[int], str] | None = None,
) -> Places:
    """Looks for U different names in the tars, then in the plain folders. Returns their places.

    sources: The tars, with their indexes.
    data_dir: The data folder.
    leave_out: A folder that is not looked into: the output.
    names: S16 [U]. Digests, ascending.
    folded: S16 [U]. Digests of the names in lower case.
    spelled: Gives the name itself by its number. None: no other spelling is looked for.
    """
    places = Places.empty(len(names), len(sources))
    indexes = [source.index for source in sources]
    for number, index in enumerate(indexes):
        rows, members = match(names, index.names)
        places.differing[rows] |= (places.source[rows] != NO_PLACE) & (places.content[rows] != index.content[members])
        places.enter(rows, number, index, members)
    places.sought_in_folders = bool((places.source == NO_PLACE).any())
    if places.sought_in_folders:
        folder, files = index_folder(data_dir, leave_out)
        rows, members = match(names, folder.names)
        only_there = places.source[rows] == NO_PLACE
        places.enter(rows[only_there], places.first_file, folder, members[only_there])
        resolve_case(places, folded, [*indexes, folder])
        if spelled:
            resolve_spelling(places, spelled, sources, folder)
        look_at_files(places, files, data_dir)
        if (places.source == NO_PLACE).any():
            names = (os.fsdecode(files[number]) for number in range(len(files)))
            places.unread = name_unread_below(names, data_dir, [source.path for source in sources])
    return places


def match(wanted: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds what two arrays of digests share.

    wanted: S16. Different values, ascending.
    digests: S16. In any order.

    Returns int64 [2, shared]: the places in `wanted`, and those in `digests`.
    """
    if not len(wanted):
        return np.zeros((2, 0), np.int64)
    rows = np.minimum(np.searchsorted(wanted, digests), len(wanted) - 1)
    members = np.flatnonzero(wanted[rows] == digests)
    return rows[members], members


def resolve_case(places: Places, folded: np.ndarray, indexes: list[Index]) -> None:
    """Find the names that are still missing in another letter case, where just one file's name agrees."""
    missing = np.flatnonzero(places.source == NO_PLACE)
    hits = [np.flatnonzero(np.isin(index.folded, folded[missing])) for index in indexes]
    numbers = np.repeat(np.arange(len(indexes)), [len(hit) for hit in hits])
    members = np.concatenate(hits)
    names = np.concatenate([index.names[hit] for index, hit in zip(indexes, hits)])
    of = np.concatenate([index.folded[hit] for index, hit in zip(indexes, hits)])
    _, from_end = np.unique(names[::-1], return_index=True)
    last = len(names) - 1 - from_end  # of several files of one name
    found, first, counts = np.unique(of[last], return_index=True, return_counts=True)
    choice = last[first[counts == 1]]
    chosen, rows = match(found[counts == 1], folded[missing])
    rows, chosen = missing[rows], choice[chosen]
    for number, index in enumerate(indexes):
        here = numbers[chosen] == number
        places.enter(rows[here], number, index, members[chosen[here]])
    places.repair[rows] = OTHER_CASE


def resolve_spelling(places: Places, spelled: Callable[[int], str], sources: list[TarSource], folder: Index) -> None:
    """Find the names that are still missing as they may have been meant: in another spelling, then within the tar that
    has the name of their first folder."""
    missing = np.flatnonzero(places.source == NO_PLACE).tolist()
    everywhere = dict(enumerate([*(source.index for source in sources), folder]))
    others = [other_spellings(spelled(row)) for row in missing]
    for number in range(MOST_SPELLINGS):
        candidates = [(row, names[number]) for row, names in zip(missing, others) if len(names) > number]
        enter_candidates(places, candidates, everywhere, OTHER_SPELLING)
    of_folder: dict[str, list[tuple[int, str]]] = {}
    for row, names in zip(missing, others):
        for first, rest in within_folders(spelled(row), names):
            of_folder.setdefault(first, []).append((row, rest))
    for number, source in enumerate(sources):
        enter_candidates(places, of_folder.get(folder_of(source.path), []), {number: source.index}, TAR_AS_FOLDER)


def enter_candidates(places: Places, candidates: list[tuple[int, str]], indexes: dict[int, Index], repair: int) -> None:
    """Enters the files of some names for rows that have none yet.

    places: Changed in place.
    candidates: (row, name of a file).
    indexes: By their number in `places.source`.
    repair: Number in NAME_REPAIRS.
    """
    candidates = [(row, name) for row, name in candidates if places.source[row] == NO_PLACE]
    if not candidates:
        return
    rows = np.array([row for row, _ in candidates], np.int64)
    digests, which = np.unique(np.array([digest_name(name) for _, name in candidates], DIGEST), return_inverse=True)
    found = Places.empty(len(digests), places.first_file)
    for number, index in indexes.items():
        of_index, members = match(digests, index.names)
        is_new = (found.source[of_index] == NO_PLACE) | (number < places.first_file)  # tars come before folders
        found.enter(of_index[is_new], number, index, members[is_new])
    is_found = found.source[which] != NO_PLACE
    rows, which = rows[is_found], which[is_found]
    for name in ("source", "offset", "size", "content"):
        getattr(places, name)[rows] = getattr(found, name)[which]
    places.repair[rows] = repair


def find_neighbour(name: str, data_dir: Path, sources: list[TarSource]) -> str:
    """A file that is there, to show beside a name that leads to no file. "" if there is none.

    name: As the entry has it.
    data_dir: Folder of the raw data.
    sources: The tars in it.

    A file with another ending comes first, then a member of a tar, then a file whose name ends so, then any file.
    """
    wanted = data_dir / name
    folder = next(path for path in wanted.parents if path.is_dir())
    inside = [] if folder == data_dir else sorted(path for path in folder.iterdir() if path.is_file())
    alike = [path for path in inside if wanted.name in (path.stem, f"{path.stem}{wanted.suffix}")]
    elsewhere = "" if alike else find_nearest(name, sources) or find_deeper(name, data_dir)
    return elsewhere or next((str(path.relative_to(data_dir)) for path in alike or inside), "")


def find_deeper(name: str, data_dir: Path) -> str:
    """The first plain file that has a name within a folder of the data folder, and what to type. "" without one."""
    ending = os.sep + name
    found = min((file for file in walk_folder(str(data_dir), "") if file.endswith(ending)), default="")
    if not found:
        return ""
    folder = data_dir / found.removesuffix(ending)
    return f"{found}: if names begin in {folder}, give --data-dir {folder} and the whole path of --metadata"


def why_unread(path: Path) -> str:
    """Why a file of the data folder is not read although there is something of its name. "" if there is nothing.

    path: As the entry has it, below the data folder.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the locale cannot write the name
        return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else ""
    except OSError as error:
        return f"not readable ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "a folder: name the files in it"
    if not stat.S_ISREG(mode):
        return "no file, but a pipe, a socket or a device"
    may_read = all(os.access(each, os.R_OK, effective_ids=True) for each in (path, path.parent))
    return "" if may_read else "there, but you may not read it or its folder: give yourself the right with chmod"


def find_nearest(name: str, sources: list[TarSource]) -> str:
    """The member of a tar that shares the longest end of a name, as "1.jpg in coco.tar". Otherwise any member, or ""
    without one.

    name: A name that no file has.
    sources: The tars, with their indexes.
    """
    for shorter in shorter_names(name):
        for source in sources:
            if len(match(np.array([digest_name(shorter)], DIGEST), source.index.names)[0]):
                return f"{shorter} in {source.path.name}"
    return next(filter(None, map(first_name, sources)), "")


def first_name(source: TarSource) -> str:
    """The name of the first member, as its header has it."""
    if not source.members:
        return ""
    packed = is_gzip(source.readable)
    with open_gzip(source.readable) if packed else source.readable.open("rb") as stream:
        name = next((member.name for member in walk_tar(stream, None) if not member.refused), b"")
    return f"{name.decode('utf-8', 'backslashreplace')} in {source.path.name}"


def look_at_files(places: Places, files: NameList, data_dir: Path) -> None:
    """Number the plain files that are used; enter size and content."""
    root = os.fsencode(data_dir)

    def look(rows: list[int]) -> list[tuple[int, bytes] | None]:
        return [look_at_file(root, files[int(places.offset[row])]) for row in rows]

    rows = np.flatnonzero(places.source == places.first_file).tolist()
    parts = [rows[start : start + 1000] for start in range(0, len(rows), 1000)]
    with ThreadPoolExecutor(READERS) as pool:
        seen = [found for part in pool.map(look, parts) for found in part]
    for row, found in zip(rows, seen):
        enter_file(places, row, files, found)


def enter_file(places: Places, row: int, files: NameList, seen: tuple[int, bytes] | None) -> None:
    if seen is None:
        places.source[row] = NO_PLACE
        return
    places.source[row] = places.first_file + len(places.files)
    places.files.append(files[int(places.offset[row])])
    places.offset[row], (places.size[row], places.content[row]) = 0, seen
