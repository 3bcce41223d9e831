"""Which tars of a raw data folder D are read, and which archives are not: these are named, so that nobody loses them
without being told.

Read are the tars that lie in D itself, whatever the letter case of their endings. A tar in a folder below D is not:
nothing says whether the names that entries use begin with that folder or are those within the tar, and it may be no
source at all but a shard of an earlier set. Nor are the parts of a tar that was split, of which only the first could be
made out: they are named with the command that joins them.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

FLAGS = re.IGNORECASE | re.DOTALL
TAR = r"(?:tar|tar\.gz|tgz)"
OTHER = r"(?:tar\.(?:bz2?|xz|zst|lz4?|lzma|br|z)|tbz2?|txz|tzst|zip|rar|7z)"
# As split, 7-Zip and download pages name parts: x.tar.gz.00, x.tar.001, x.tar.gzaa, x.tar.part-aa, x.tgz_1-of-3.
NUMBER = r"(?:[._-]?(?:part|split|chunk|piece|vol))?[._-]?(?:\d+(?:[._-]?of[._-]?\d+)?|[a-z]{2}|aa[a-z])"
UNFINISHED = r"\.(?:part|partial|download|crdownload|incomplete)"  # as browsers name what they still download
READ = re.compile(rf".+\.{TAR}", FLAGS)
NOT_READ = re.compile(rf".+\.(?:{OTHER}(?:{NUMBER})?|{TAR}{UNFINISHED})", FLAGS)
PART = re.compile(rf"(?P<whole>.+\.{TAR}){NUMBER}", FLAGS)  # of what READ and NOT_READ do not match
MOST_NAMED = 5  # archives in folders: there may be thousands of shards


def list_tars(data_dir: Path) -> list[Path]:
    """The tars in a data folder, by name."""
    return sorted(path for path in map(data_dir.joinpath, filter(is_tar, os.listdir(data_dir))) if path.is_file())


def is_tar(name: str) -> bool:
    return READ.fullmatch(name) is not None


def name_unread(data_dir: Path) -> list[str]:
    """A line for each thing in the data folder itself that looks like an archive and is not read."""
    names = {name for name in os.listdir(data_dir) if is_archive(name) and (data_dir / name).is_file()}
    others = sorted(name for name in names if NOT_READ.fullmatch(name) and os.path.splitext(name)[0] not in names)
    lines = [f"Not read, only .tar, .tar.gz and .tgz are: {', '.join(others)}; unpack them"] if others else []
    return lines + name_parts(names, data_dir)


def name_unread_below(names: Iterable[str], data_dir: Path, tars: Iterable[Path]) -> list[str]:
    """Lines that name the archives in folders below the data folder, which are not read.

    names: Of all plain files, relative to the data folder.
    data_dir: The data folder.
    tars: Those that are read. A link may have brought them into the data folder.
    """
    archives = {name for name in names if is_archive(name)}
    read = {os.path.realpath(tar) for tar in tars}
    below = sorted(name for name in archives if os.sep in name and os.path.realpath(data_dir / name) not in read)
    others = [name for name in below if is_tar(name) or NOT_READ.fullmatch(name)]
    named = ", ".join(others[:MOST_NAMED]) + (f" and {len(others) - MOST_NAMED} more" if others[MOST_NAMED:] else "")
    remedy = f"tars are read in {data_dir} itself alone, by the names within them: move or link them there"
    lines = [f"Not read, in folders below {data_dir}: {named}; {remedy}"] if others else []
    return lines + name_parts({name for name in archives if os.sep not in name} | set(below), data_dir, below=True)


def is_archive(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (READ, NOT_READ, PART))


def name_parts(names: Collection[str], data_dir: Path, below: bool = False) -> list[str]:
    """A line for each tar of which the parts are there, but not the whole.

    names: Of files, relative to the data folder.
    data_dir: The data folder, where the whole tar belongs.
    below: Whether to name the parts in its folders instead of those in itself.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        part = None if is_tar(name) or NOT_READ.fullmatch(name) else PART.fullmatch(name)
        if part and below == (os.sep in name):
            groups.setdefault(part["whole"], []).append(name)
    named = {whole: without_other_endings(parts) for whole, parts in groups.items()}
    return [
        f"Not read, parts of {whole}; join them: {join_command(data_dir, parts)} "
        f"> {shlex.quote(str(data_dir / os.path.basename(whole)))}"
        for whole, parts in named.items()
        if parts and whole not in names and os.path.basename(whole) not in names
    ]


def without_other_endings(parts: list[str]) -> list[str]:
    """Letters count parts from aa or aaa on: without that one, x.tar.md is a file about x.tar."""
    lettered = [name for name in parts if name[-1].isalpha()]
    if any(name.lower().endswith("aa") for name in lettered):
        return parts
    return [name for name in parts if name not in lettered]


def join_command(data_dir: Path, parts: list[str]) -> str:
    """The `cat` of all parts in their order; with a pattern, if it is that of the parts alone."""
    head, lengths = os.path.commonprefix(parts), {len(part) for part in parts}  # noqa: RUF071 - of characters
    folder, start = os.path.split(head)
    beside = (os.path.join(folder, name) for name in os.listdir(data_dir / folder) if name.startswith(start))
    alike = sorted(name for name in beside if len(name) in lengths)
    if len(lengths) == 1 and alike == parts:
        return f"cat {shlex.quote(str(data_dir / head))}{'?' * (len(parts[0]) - len(head))}"
    return shlex.join(["cat", *(str(data_dir / part) for part in sorted(parts, key=in_number_order))])


def in_number_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which x.2 comes before x.10."""
    return [(int(text), "") if text.isdecimal() else (0, text) for text in re.split(r"(\d+)", name)]
