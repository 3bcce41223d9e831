"""Walks over the headers of a tar and says where its files lie. Nothing is extracted, and nothing is trusted.

POSIX ustar and pax, GNU long names and the old V7 format are read. Links to files of the same tar stand for these
files. A member that is nothing of that, or whose name leads out of the folder, is refused by name. Tars that were
joined are read to the last: behind an end mark comes another tar, or damage, or the zeros that fill the last record.
Where a header itself is damaged, what comes after cannot be found any more without guessing, so the walk ends and says
so.
"""

import posixpath
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAXIMUM_HEADER_BYTES = 1 << 20  # of a pax header or a long name
MAXIMUM_BYTES = 1 << 62  # of a stream of unknown length; beyond that nothing can be sought
EDGE_BYTES = 4096  # read at both ends of a member to know it again
ZEROS = bytes(BLOCK)
PLAIN, DIRECTORY = b"0\x007", b"5"  # "7": contiguous, like a plain file
REFUSED_TYPES = {b"3": "device", b"4": "device", b"6": "device", b"S": "sparse"}
HARD_LINK, SYMBOLIC_LINK = b"1", b"2"
MOST_ZEROS = 10_240 + 2 * BLOCK  # at the end of a tar: its end mark and the rest of a record of usual size
IMAGE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG")
RECORDS = tuple(1 << power for power in range(15, 25))  # bytes of a record that `tar -b` may have made
NO_DATA = b"123456"  # types whose size says nothing about what follows
LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL = b"L", b"K", b"x", b"X", b"g"
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")


class DamagedTar(Exception):
    """The walk cannot go on. `offset`: of the header at which it ended."""

    def __init__(self, offset: int, why: str):
        super().__init__(f"{why} at byte {offset}")
        self.offset = offset


class Member(NamedTuple):
    """A member that is no folder. Its data are bytes [offset, offset + size) of the tar.

    name: As "a/b.jpg", undecoded.
    offset: Bytes.
    size: Bytes.
    refused: Why it is not used; "" if it is.
    edges: Its first and last 4,096 bytes, if it is used.
    target: Of a link, the name that it stands for.
    is_symbolic: Whether the file of that name may also come later.
    """

    name: bytes
    offset: int
    size: int
    refused: str = ""
    edges: bytes = b""
    target: bytes = b""
    is_symbolic: bool = False


@dataclass
class Extension:
    """What headers before a member's own say about it."""

    name: bytes | None = None
    target: bytes | None = None
    size: int | None = None
    refused: str = ""


class Header(NamedTuple):
    """The fields of one 512-byte header that count here."""

    name: bytes
    size: int
    kind: bytes
    block: bytes


def walk_tar(stream: BinaryIO, length: int | None) -> Iterator[Member]:
    """The members of a tar, and of tars that were joined to it.

    stream: The tar. It is only moved forwards.
    length: Bytes of the stream. None: unknown.

    Raises DamagedTar if a header is wrong or the end is missing.
    """
    length = MAXIMUM_BYTES if length is None else length
    offset, extension, begin, edges = 0, Extension(), 0, b""
    while True:
        block = stream.read(BLOCK)
        if block == ZEROS:
            block, after = skip_zeros(stream, offset)
            if not block:
                check_end(begin, offset, after, edges)
                return
            begin = offset = after
            check_joined(block, offset)
        header = read_header(block, offset)
        offset += BLOCK
        stored = 0 if header.kind in NO_DATA else header.size
        if header.kind in (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL):
            extend(extension, header, read_extension(stream, header, offset), offset)
        else:
            if header.kind == b"S":
                offset = skip_sparse_map(stream, header.block, offset)
            elif extension.size is not None and header.kind not in NO_DATA:
                stored = extension.size
            for member in describe(stream, header, extension, offset, stored, length):
                edges = member.edges or edges
                yield member
            extension = Extension()
        offset += -(-stored // BLOCK) * BLOCK
        seek(stream, offset, length)


def skip_zeros(stream: BinaryIO, offset: int) -> tuple[bytes, int]:
    """Reads past an end mark. Returns the next block that is not zeros and its offset, or b"" and the end of the
    stream.

    stream: The tar.
    offset: Of the first block of the end mark, bytes.
    """
    block = ZEROS
    while block == ZEROS:
        offset += BLOCK
        block = stream.read(BLOCK)
    return (block, offset) if block.strip(b"\0") else (b"", offset + len(block))


def check_joined(block: bytes, offset: int) -> None:
    """Raises DamagedTar where no tar begins behind an end mark."""
    if len(block) < BLOCK or not is_checksum_right(block):
        raise DamagedTar(offset, "what follows the end mark is no tar,")


def check_end(begin: int, zeros: int, end: int, edges: bytes) -> None:
    """Checks that a tar that was made in its whole size before it was filled is filled to its end.

    begin: Offset of the last of the tars that were joined, bytes.
    zeros: Where the zeros behind it begin, bytes.
    end: Where they end, bytes.
    edges: First and last bytes of its last file.

    Raises DamagedTar if it is not.
    """
    is_cut = edges.startswith(IMAGE_BEGINNINGS) and edges.endswith(bytes(64))  # none of these images ends so
    fills_record = any((end - begin) % size == 0 and end - zeros < size + 2 * BLOCK for size in RECORDS)
    if is_cut or (end - zeros > MOST_ZEROS and not fills_record):
        raise DamagedTar(zeros, "only zeros up to its end, so perhaps not fetched whole,")


def read_header(block: bytes, offset: int) -> Header:
    """The header in the block at an offset. Raises DamagedTar."""
    if len(block) < BLOCK:
        raise DamagedTar(offset, "cut short" if block else "no end mark, so perhaps cut short,")
    if not is_checksum_right(block):
        raise DamagedTar(offset, "wrong checksum")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU keeps other things there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    kind = block[156:157]
    if kind == b"\0" and name.endswith(b"/"):
        kind = DIRECTORY  # as V7 wrote it
    return Header(name, read_number(block[124:136], offset), kind, block)


def is_checksum_right(block: bytes) -> bool:
    """Some old tars summed signed bytes."""
    said = block[148:156].replace(b"\0", b" ").strip()
    if not said or not said.isdigit() or b"8" in said or b"9" in said:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if total == int(said, 8):
        return True
    signed = struct.unpack("512b", block)
    return sum(signed) - sum(signed[148:156]) + 8 * ord(" ") == int(said, 8)


def read_number(text: bytes, offset: int) -> int:
    """Octal digits, or base 256 where the first bit is set (GNU). Raises DamagedTar."""
    if text[0] & 0x80:
        if text[0] != 0x80:
            raise DamagedTar(offset, "a negative size")
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise DamagedTar(offset, f"a size of {digits!r}")
    return int(digits or b"0", 8)


def read_extension(stream: BinaryIO, header: Header, offset: int) -> bytes | None:
    """The data of a header that says something about the next member; None where it is too long to be sound."""
    if header.size > MAXIMUM_HEADER_BYTES:
        return None
    data = stream.read(header.size)
    if len(data) < header.size:
        raise DamagedTar(offset, "cut short")
    return data


def extend(extension: Extension, header: Header, data: bytes | None, offset: int) -> None:
    """Note what the header says. Raises DamagedTar where a global one would rule all members."""
    if data is None:
        if header.kind == PAX_GLOBAL:
            raise DamagedTar(offset, f"a global header of {header.size} bytes")
        extension.refused = "giant_header"
    elif header.kind == LONG_NAME:
        extension.name = data.split(b"\0", 1)[0]
    elif header.kind == LONG_LINK:
        extension.target = data.split(b"\0", 1)[0]
    else:
        records = read_pax(data)
        known = {key for key in records if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse.")}
        if header.kind == PAX_GLOBAL and known:
            raise DamagedTar(offset, f"a global header that sets {min(known).decode()}")
        if header.kind != PAX_GLOBAL:
            note_pax(extension, records)


def note_pax(extension: Extension, records: dict[bytes, bytes]) -> None:
    if b"path" in records:
        extension.name = records[b"path"]
    extension.target = records.get(b"linkpath", extension.target)
    if b"size" in records:
        size = records[b"size"]
        if size.isdigit() and len(size) < 20:
            extension.size = int(size)
        else:
            extension.refused = "broken_header"
    if any(key.startswith(b"GNU.sparse.") for key in records):
        extension.refused = "sparse"
    if b"" in records:
        extension.refused = "broken_header"


def read_pax(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; the key "" says that something else is among them."""
    records, place = {}, 0
    while place < len(data) and data[place]:
        found = PAX_RECORD.match(data, place)
        end = place + int(found[1]) if found else 0
        if not found or end <= found.end() or data[end - 1 : end] != b"\n":
            return {**records, b"": b""}
        records[found[2]] = data[found.end() : end - 1]
        place = end
    return records


def skip_sparse_map(stream: BinaryIO, block: bytes, offset: int) -> int:
    """Past the further blocks of an old GNU sparse member's map; returns the offset of its data."""
    more = block[482]
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedTar(offset, "cut short")
        offset, more = offset + BLOCK, block[504]
    return offset


def describe(
    stream: BinaryIO, header: Header, extension: Extension, offset: int, stored: int, length: int
) -> Iterator[Member]:
    """The member itself, or nothing for a folder. Raises DamagedTar where its data are cut."""
    if header.kind == DIRECTORY:
        return
    name = header.name if extension.name is None else extension.name
    refused = extension.refused or REFUSED_TYPES.get(header.kind) or check_name(name)
    if not refused and header.kind in (HARD_LINK, SYMBOLIC_LINK):
        yield describe_link(header, extension, clean(name), offset)
        return
    if not refused and header.kind not in PLAIN:
        refused = "unknown_type"
    if not refused:
        name = clean(name)
    is_cut = offset + stored > length
    edges = b"" if refused or is_cut else read_edges(stream, offset, stored)
    if is_cut or edges is None:
        yield Member(name, offset, stored, refused or "cut_short")
        raise DamagedTar(offset - BLOCK, "cut short")
    yield Member(name, offset, stored, refused, edges)


def describe_link(header: Header, extension: Extension, name: bytes, offset: int) -> Member:
    """A link, refused where it leads out of the tar. A symbolic one is relative to its own folder."""
    target = header.block[157:257].split(b"\0", 1)[0] if extension.target is None else extension.target
    is_symbolic = header.kind == SYMBOLIC_LINK
    if is_symbolic and not target.startswith(b"/"):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if check_name(target):
        return Member(name, offset, 0, "link")
    return Member(name, offset, 0, target=clean(target), is_symbolic=is_symbolic)


def check_name(name: bytes) -> str:
    """Why a name is refused; "" if it is not."""
    if name.startswith(b"/"):
        return "absolute_path"
    if b".." in name and b".." in name.split(b"/"):
        return "parent_path"
    return "" if clean(name) != b"." and b"\0" not in name else "no_name"


def clean(name: bytes) -> bytes:
    """ "a/b" for "./a//b/"."""
    if name[:1] not in b"./" and name[-1:] != b"/" and b"//" not in name and b"/." not in name:
        return name
    return posixpath.normpath(name)


def read_edges(stream: BinaryIO, offset: int, size: int) -> bytes | None:
    """The first and the last 4,096 bytes of a member's data; None where they are cut."""
    wanted = min(size, 2 * EDGE_BYTES)
    edges = stream.read(min(size, EDGE_BYTES))
    if size > 2 * EDGE_BYTES:
        stream.seek(offset + size - EDGE_BYTES)
    edges += stream.read(wanted - len(edges))
    return edges if len(edges) == wanted else None


def seek(stream: BinaryIO, offset: int, length: int) -> None:
    """To a header. Raises DamagedTar beyond the end."""
    if offset > length:
        raise DamagedTar(offset, "cut short")
    stream.seek(offset)
