"""Where media are found: tars of all kinds and all kinds of harm, compressed tars, folders, letter cases."""

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from raw_sets import plain_jpeg, write_tar

from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.preparation import media_index
from dct_qwen2vl.preparation.media_index import (
    DIGEST,
    NO_PLACE,
    OTHER_CASE,
    OTHER_SPELLING,
    TAR_AS_FOLDER,
    Places,
    TarSource,
    count_refused,
    digest_folded,
    digest_name,
    index_tars,
    load_index,
    locate,
    make_readable,
    open_tar,
)
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.tar_walk import EDGE_BYTES

LONG_NAME = "folder/" * 40 + "image.jpg"
FILES = {"a/1.jpg": b"one", "a/2.jpg": b"two" * 5000, "b/Ü.png": b"", LONG_NAME: b"long", "c.mp4": b"x" * 512}


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields) -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type = kind
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header, data


def pack(members: Iterable[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def raw_header(name: bytes, size: int, kind: bytes = b"0", **at: bytes) -> bytes:
    """A header with a right checksum; at_482=b"x" puts bytes anywhere."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    for place, value in at.items():
        offset = int(place.removeprefix("at_"))
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)
GOOD_ONE = raw_header(b"good/1.jpg", 3) + padded(b"one")
GOOD_TWO = raw_header(b"good/2.jpg", 3) + padded(b"two")


def index(folder: Path, data: bytes, name: str = "media.tar") -> TarSource:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return open_tar(folder / name, None)


def find(folder: Path, *names: str, work: Path | None = None) -> tuple[Places, dict[str, bytes | None]]:
    """The places of names in a data folder, and what lies there; None for what is nowhere."""
    tars = index_tars(folder, work, WorkerPool(0))
    digests = np.array([digest_name(name) for name in names], DIGEST)
    folded = np.array([digest_folded(name) for name in names], DIGEST)
    order = np.argsort(digests)
    spelled = [names[number] for number in order.tolist()]
    places = locate(tars, folder, folder / "out", digests[order], folded[order], spelled.__getitem__)
    found = {}
    for row, number in enumerate(order.tolist()):
        data = None
        if places.source[row] != NO_PLACE:
            path = places.path_of(int(places.source[row]), folder, tuple(tar.readable for tar in tars))
            offset, size = int(places.offset[row]), int(places.size[row])
            data = Path(path).read_bytes()[offset : offset + size]
        found[names[number]] = data
    return places, found


# Tars as they are found


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tars(tmp_path, tar_format):
    files = FILES if tar_format != tarfile.USTAR_FORMAT else {k: v for k, v in FILES.items() if len(k) < 100}
    folders = [member("a", kind=tarfile.DIRTYPE), member("./", kind=tarfile.DIRTYPE)]
    data = pack([*folders, *(member(f"./{name}", data) for name, data in files.items())], tar_format)
    source = index(tmp_path, data)
    assert (source.refused, source.damage) == (b"", "")
    assert find(tmp_path, *files)[1] == files


def test_prefix_of_ustar_and_times_of_gnu(tmp_path):
    ustar = raw_header(b"1.jpg", 3, at_345=b"some/folder") + padded(b"one")
    gnu = raw_header(b"2.jpg", 3, at_257=b"ustar  \0", at_345=b"14712345671") + padded(b"two")
    v7 = (
        raw_header(b"3.jpg", 5, b"\0", at_257=bytes(8))
        + padded(b"three")
        + raw_header(b"d/", 0, b"\0", at_257=bytes(8))
    )
    (tmp_path / "media.tar").write_bytes(ustar + gnu + v7 + END)
    found = find(tmp_path, "some/folder/1.jpg", "2.jpg", "3.jpg", "d")[1]
    assert found == {"some/folder/1.jpg": b"one", "2.jpg": b"two", "3.jpg": b"three", "d": None}


def test_sizes_in_base_256_and_in_pax(tmp_path):
    big = raw_header(b"1.jpg", 0, at_124=b"\x80" + (3).to_bytes(11, "big")) + padded(b"one")
    pax = raw_header(b"pax", 10, b"x") + padded(b"10 size=3\n") + raw_header(b"2.jpg", 0) + padded(b"two")
    (tmp_path / "media.tar").write_bytes(big + pax + GOOD_ONE + END)
    assert find(tmp_path, "1.jpg", "2.jpg", "good/1.jpg")[1] == {"1.jpg": b"one", "2.jpg": b"two", "good/1.jpg": b"one"}


def test_checksums_of_signed_bytes(tmp_path):
    block = bytearray(raw_header("Ü.jpg".encode(), 3))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(struct.unpack("512b", block))
    (tmp_path / "media.tar").write_bytes(bytes(block) + padded(b"one") + END)
    assert find(tmp_path, "Ü.jpg")[1] == {"Ü.jpg": b"one"}


@pytest.mark.parametrize("name", ["media.tar.gz", "media.tgz", "media.tar"])
def test_compressed_tars_whatever_their_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(pack(member(*item) for item in FILES.items())))
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    assert find(tmp_path, *FILES, work=work)[1] == FILES
    (unpacked,) = work.glob("*.unpacked")
    unpacked.unlink()
    (source,) = index_tars(tmp_path, work, WorkerPool(0))  # from the kept index
    assert not unpacked.exists()
    make_readable([source], 2)
    assert unpacked.exists()


def test_a_dry_look_at_a_compressed_tar_writes_nothing(tmp_path):
    (tmp_path / "media.tgz").write_bytes(gzip.compress(pack(member(*item) for item in FILES.items())))
    (source,) = index_tars(tmp_path, None, WorkerPool(0))
    assert len(source.index.names) == len(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["media.tgz"]


def test_the_index_is_kept_until_the_tar_changes(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "media.tar").write_bytes(pack([*(member(*item) for item in FILES.items()), member("/etc/x", b"x")]))
    (first,) = index_tars(tmp_path, work, WorkerPool(0))
    with monkeypatch.context() as patch:
        patch.setattr(media_index, "walk_tar", None)  # not walked over again
        (second,) = index_tars(tmp_path, work, WorkerPool(0))
    assert second.refused == first.refused and b"absolute_path" in first.refused
    for name in ("names", "folded", "content", "offset", "size"):
        np.testing.assert_array_equal(getattr(second.index, name), getattr(first.index, name))
    write_tar(tmp_path / "media.tar", {"new.jpg": b"new"})
    (third,) = index_tars(tmp_path, work, WorkerPool(0))
    assert len(third.index.names) == 1


def test_a_kept_index_that_is_broken_is_made_anew(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    write_tar(tmp_path / "media.tar", FILES)
    index_tars(tmp_path, work, WorkerPool(0))
    (kept,) = work.glob("*.npz")
    for data in (b"", b"PK\3\4 nothing", kept.read_bytes()[:-40]):
        kept.write_bytes(data)
        assert load_index(tmp_path, tmp_path, kept) is None
        assert len(index_tars(tmp_path, work, WorkerPool(0))[0].index.names) == len(FILES)


# Harm


def gnu_sparse() -> bytes:
    """An old GNU sparse member of 1 TB: two of its 1,300 bytes are stored, with a map that goes on in another block."""
    head = raw_header(b"sparse.jpg", 1024, b"S", at_257=b"ustar  \0", at_482=b"\1", at_483=b"17777777777\0")
    more = bytearray(512)
    return head + bytes(more) + b"s" * 1024


def pax(records: bytes) -> bytes:
    return raw_header(b"PaxHeader", len(records), b"x") + padded(records)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 2 if len(body) + 2 < 100 else len(body) + len(str(len(body) + 3))
    return b"%d" % length + body


REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "absolute name": ("absolute_path", lambda: raw_header(b"/etc/evil.jpg", 4) + padded(b"evil")),
    "parent folder": ("parent_path", lambda: raw_header(b"a/../../evil.jpg", 4) + padded(b"evil")),
    "parent in a prefix": ("parent_path", lambda: raw_header(b"evil.jpg", 4, at_345=b"../..") + padded(b"evil")),
    "parent in a pax path": ("parent_path", lambda: pax(record(b"path", b"../evil.jpg")) + raw_header(b"x", 0)),
    "parent in a long name": (
        "parent_path",
        lambda: raw_header(b"././@LongLink", 12, b"L") + padded(b"../evil.jpg\0") + raw_header(b"x.jpg", 0),
    ),
    "no name": ("no_name", lambda: raw_header(b"./", 4, at_156=b"7")[:0] + raw_header(b".", 4) + padded(b"evil")),
    "zero byte in a pax path": ("no_name", lambda: pax(record(b"path", b"a\0b.jpg")) + raw_header(b"x", 0)),
    "symbolic link": ("link", lambda: raw_header(b"evil.jpg", 0, b"2", at_157=b"/etc/hostname")),
    "hard link": ("link", lambda: raw_header(b"evil.jpg", 0, b"1", at_157=b"/etc/hostname")),
    "link with a size": ("link", lambda: raw_header(b"evil.jpg", 1 << 30, b"2", at_157=b"/etc/hostname")),
    "device": ("device", lambda: raw_header(b"evil.jpg", 0, b"3", at_329=b"0000001\0")),
    "block device": ("device", lambda: raw_header(b"evil.jpg", 0, b"4")),
    "pipe": ("device", lambda: raw_header(b"evil.jpg", 0, b"6")),
    "GNU sparse": ("sparse", gnu_sparse),
    "pax sparse": ("sparse", lambda: pax(record(b"GNU.sparse.major", b"1")) + raw_header(b"x.jpg", 3) + padded(b"map")),
    "multi-volume part": ("unknown_type", lambda: raw_header(b"evil.jpg", 3, b"M") + padded(b"abc")),
    "volume label": ("unknown_type", lambda: raw_header(b"label", 0, b"V")),
    "broken pax record": ("broken_header", lambda: pax(b"99 path=x\n") + raw_header(b"x.jpg", 3) + padded(b"abc")),
    "pax size of letters": (
        "broken_header",
        lambda: pax(record(b"size", b"12x")) + raw_header(b"x.jpg", 3) + padded(b"abc"),
    ),
    "pax header of 3 MB": (
        "giant_header",
        lambda: raw_header(b"PaxHeader", 3 << 20, b"x") + bytes(3 << 20) + raw_header(b"x.jpg", 3) + padded(b"abc"),
    ),
    "long name of 2 MB": (
        "giant_header",
        lambda: raw_header(b"@LongLink", 2 << 20, b"L") + b"n" * (2 << 20) + raw_header(b"x.jpg", 3) + padded(b"abc"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_refused_member_is_counted_and_named_and_the_others_are_used(tmp_path, case, compressed):
    reason, build = REFUSED[case]
    data = GOOD_ONE + build() + GOOD_TWO + END
    source = index(tmp_path, gzip.compress(data, 1) if compressed else data)
    assert count_refused(source) == {reason: 1}
    assert source.damage == ""
    assert len(source.index.names) == 2
    assert not list(tmp_path.rglob("*evil*"))


def test_refused_members_are_not_found_by_any_name(tmp_path):
    (tmp_path / "media.tar").write_bytes(GOOD_ONE + b"".join(build() for _, build in REFUSED.values()) + END)
    names = ["etc/evil.jpg", "evil.jpg", "x.jpg", "x", "sparse.jpg", "label", "good/1.jpg"]
    assert {name for name, data in find(tmp_path, *names)[1].items() if data is not None} == {"good/1.jpg"}
    source = open_tar(tmp_path / "media.tar", None)
    assert sum(count_refused(source).values()) == len(REFUSED)
    assert b"/etc/evil.jpg" in source.refused and b"../evil.jpg" in source.refused


def test_of_several_members_of_a_name_the_last_counts(tmp_path):
    data = pack([member("a.jpg", b"1"), member("./a.jpg", b"2"), member("b.jpg", b"b"), member("x//../a.jpg", b"3")])
    (tmp_path / "1.tar").write_bytes(data)
    source = open_tar(tmp_path / "1.tar", None)
    assert count_refused(source) == {"duplicate": 1, "parent_path": 1}
    assert b'{"member": "a.jpg", "reason": "duplicate"}' in source.refused
    assert find(tmp_path, "a.jpg")[1] == {"a.jpg": b"2"}
    write_tar(tmp_path / "2.tar", {"a.jpg": b"of the second tar"})
    assert find(tmp_path, "a.jpg", "b.jpg")[1] == {"a.jpg": b"of the second tar", "b.jpg": b"b"}


DAMAGED = {
    "cut in a member": (lambda data: data[:-1500], "cut short"),
    "cut in a header": (lambda data: data[: 4 * 512 + 100], "cut short"),
    "cut between members": (lambda data: data[: 4 * 512], "no end mark"),
    "wrong checksum": (lambda data: data[: 4 * 512] + b"X" + data[4 * 512 + 1 :], "wrong checksum at byte 2048"),
    "garbage": (lambda data: data[: 4 * 512] + b"\x17" * 5000, "wrong checksum"),
    "negative size": (lambda data: data[: 4 * 512] + raw_header(b"x", 0, at_124=b"\xff" * 12) + END, "negative size"),
    "size of letters": (lambda data: data[: 4 * 512] + raw_header(b"x", 0, at_124=b"12345x789 \0 ") + END, "a size of"),
    "size beyond the end": (lambda data: data[: 4 * 512] + raw_header(b"x", 1 << 32) + END, "cut short"),
    "size of 2^95": (
        lambda data: data[: 4 * 512] + raw_header(b"x", 0, at_124=b"\x80" + b"\xff" * 11) + END,
        "cut short",
    ),
    "endless pax header": (lambda data: data[: 4 * 512] + raw_header(b"x", 8**11 - 1, b"x") + END, "cut short"),
    "global path": (
        lambda data: data[: 4 * 512] + raw_header(b"g", 12, b"g") + padded(b"12 path=all\n") + GOOD_ONE + END,
        "global header that sets path",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("compressed", [False, True])
def test_what_comes_before_the_damage_is_used(tmp_path, case, compressed):
    damage, message = DAMAGED[case]
    whole = GOOD_ONE + GOOD_TWO + raw_header(b"good/3.jpg", 900) + padded(b"3" * 900) + END
    data = damage(whole)
    source = index(tmp_path, gzip.compress(data) if compressed else data)
    assert len(source.index.names) == 2
    assert message in source.damage or (compressed and source.damage)


def test_compressed_data_that_end_or_change(tmp_path):
    jpegs = {f"{number}.jpg": os.urandom(50_000) for number in range(6)}
    packed = gzip.compress(pack(member(*item) for item in jpegs.items()))
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    for data in (packed[:-120_000], packed[:-8] + bytes(8), packed[:200_000] + b"\xff" * 20 + packed[200_020:]):
        (tmp_path / "media.tgz").write_bytes(data)
        source = open_tar(tmp_path / "media.tgz", work)
        assert "compressed data are damaged" in source.damage
        assert 3 <= len(source.index.names) <= 6
        assert find(tmp_path, "0.jpg", work=work)[1] == {"0.jpg": jpegs["0.jpg"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no end mark"),
        (b"no tar" * 1000, "wrong checksum at byte 0"),
        (plain_jpeg() * 3, "wrong checksum at byte 0"),
        (gzip.compress(b"no tar" * 1000), "wrong checksum at byte 0"),
        (gzip.compress(GOOD_ONE + END)[:20], "end-of-stream"),
        (GOOD_ONE[:514], "cut short"),
    ],
    ids=["empty", "text", "jpeg", "compressed text", "cut gzip", "cut header"],  # gzip headers hold the time
)
def test_what_is_no_tar_at_all(tmp_path, data, message):
    with pytest.raises(
        PreparationError, match=rf"media\.tar cannot be read as a tar \(.*{message}.*\); fetch it again"
    ):
        index(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "it is a pointer of git-lfs: type git lfs",
        ),
        (b"PK\3\4" + bytes(600), "it is a zip archive: unzip it"),
        (b"\xfd7zXZ\0" + bytes(600), "it is compressed: unxz it"),
        (b"<!DOCTYPE html><title>404</title>", "it is a web page, perhaps of an error: fetch it again"),
    ],
)
def test_what_lies_in_place_of_a_tar_is_named(tmp_path, data, said):
    with pytest.raises(PreparationError, match=rf"media\.tar cannot be read as a tar \(.*\); {said}"):
        index(tmp_path, data)


def test_a_tar_that_may_not_be_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "media.tar", FILES)
    monkeypatch.setattr(media_index, "index_tar", refuse)
    with pytest.raises(PreparationError, match=r"media\.tar cannot be read \(Input/output error\)"):
        index_tars(tmp_path, None, WorkerPool(0))


def refuse(*arguments) -> None:
    raise OSError(5, "Input/output error")


# Links and joined tars


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compressed", [False, True])
def test_links_within_a_tar_stand_for_their_files(tmp_path, tar_format, compressed):
    long = "x" * 150 if tar_format != tarfile.USTAR_FORMAT else "x" * 90
    members = [
        member("a/early.jpg", kind=tarfile.SYMTYPE, linkname="../b/two.jpg"),
        member("a/one.jpg", b"one"),
        member(f"a/{long}", b"long"),
        member("hard.jpg", kind=tarfile.LNKTYPE, linkname="./a//one.jpg"),
        member("far.jpg", kind=tarfile.LNKTYPE, linkname=f"a/{long}"),
        member("a/soft.jpg", kind=tarfile.SYMTYPE, linkname="one.jpg"),
        member("chain.jpg", kind=tarfile.SYMTYPE, linkname="a/early.jpg"),
        member("b/two.jpg", b"two"),
        member("a/one.jpg", b"a later one"),
    ]
    data = pack(members, tar_format)
    (tmp_path / "media.tar").write_bytes(gzip.compress(data) if compressed else data)
    source = open_tar(tmp_path / "media.tar", None)
    assert (count_refused(source), source.damage) == ({"duplicate": 1}, "")
    expected = {"hard.jpg": b"one", "far.jpg": b"long", "a/soft.jpg": b"a later one"}
    expected |= {"chain.jpg": b"two", "a/early.jpg": b"two"}
    if compressed:
        work = tmp_path / "out" / ".work"
        work.mkdir(parents=True)
        assert find(tmp_path, *expected, work=work)[1] == expected
    else:
        assert find(tmp_path, *expected)[1] == expected


def test_a_link_has_the_content_of_its_file(tmp_path):
    members = [member("a.jpg", plain_jpeg()), member("b.jpg", kind=tarfile.LNKTYPE, linkname="a.jpg")]
    source = index(tmp_path, pack(members))
    assert len(set(source.index.content.tolist())) == 1 < len(source.index.names)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.LNKTYPE, "nowhere.jpg"),
        (tarfile.LNKTYPE, "../media.jpg"),
        (tarfile.LNKTYPE, "/etc/hostname"),
        (tarfile.LNKTYPE, "a/link.jpg"),
        (tarfile.LNKTYPE, ""),
        (tarfile.SYMTYPE, "/etc/hostname"),
        (tarfile.SYMTYPE, "../../etc/hostname"),
        (tarfile.SYMTYPE, "link.jpg"),
        (tarfile.SYMTYPE, ".."),
    ],
)
def test_a_link_that_leads_out_or_nowhere_is_refused(tmp_path, kind, target):
    (tmp_path / "media.jpg").write_bytes(b"beside the tar")
    folder = tmp_path / "data"
    source = index(folder, pack([member("a/link.jpg", kind=kind, linkname=target), member("b.jpg", b"b")]))
    assert count_refused(source) == {"link": 1}
    assert find(folder, "a/link.jpg")[1] == {"a/link.jpg": None}


def test_a_link_is_replaced_by_a_later_file_of_its_name(tmp_path):
    link = member("a.jpg", kind=tarfile.SYMTYPE, linkname="b.jpg")
    source = index(tmp_path, pack([link, member("b.jpg", b"b"), member("a.jpg", b"a")]))
    assert count_refused(source) == {"duplicate": 1}
    assert find(tmp_path, "a.jpg")[1] == {"a.jpg": b"a"}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("between", [b"", bytes(512), bytes(1 << 20)])
def test_joined_tars_are_read_to_the_last(tmp_path, between, compressed):
    parts = [pack([]), pack([member("a.jpg", b"1"), member("b.jpg", b"b")]), pack([member("a.jpg", b"2")])]
    data = between.join(parts)
    source = index(tmp_path, gzip.compress(data, 1) if compressed else data)
    assert (source.damage, count_refused(source)) == ("", {"duplicate": 1})
    if not compressed:
        assert find(tmp_path, "a.jpg", "b.jpg")[1] == {"a.jpg": b"2", "b.jpg": b"b"}


@pytest.mark.parametrize("behind", [b"not a header" * 100, b"\1"])
def test_what_lies_behind_the_end_mark_and_is_no_tar_is_said(tmp_path, behind):
    whole = pack([member("a.jpg", b"1")])
    source = index(tmp_path, whole + behind)
    assert len(source.index.names) == 1
    assert source.damage == f"what follows the end mark is no tar, at byte {len(whole)}"


def write_half(images: int, cut: float) -> bytes:
    """A tar whose file was made in its whole size and filled in part."""
    whole = pack(member(f"{number}.jpg", plain_jpeg(number)) for number in range(images))
    size = int(len(whole) * cut)
    return whole[:size] + bytes(len(whole) - size)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("images", "cut"), [(3, 0.5), (40, 0.5), (40, 0.2), (200, 0.97)])
def test_a_tar_that_ends_in_zeros_is_not_whole(tmp_path, images, cut, compressed):
    data = write_half(images, cut)
    source = index(tmp_path, gzip.compress(data, 1) if compressed else data)
    assert 0 < len(source.index.names) < images
    assert source.damage.startswith("only zeros up to its end, so perhaps not fetched whole, at byte ")


@pytest.mark.parametrize("record", [512, 10_240, 1 << 17, 1 << 20])
def test_the_zeros_of_a_last_record_are_no_damage(tmp_path, record):
    for size in (1, 5000, 60_000):
        data = (raw_header(b"a.jpg", size) + padded(b"1" * size) + END).rstrip(b"\0")
        data += bytes(-(-(len(data) + 1024) // record) * record - len(data))
        assert index(tmp_path, data).damage == ""


def test_a_file_of_zeros_is_no_tar(tmp_path):
    with pytest.raises(PreparationError, match=r"cannot be read as a tar \(only zeros up to its end"):
        index(tmp_path, bytes(50_000))


def test_an_empty_tar(tmp_path):
    assert len(index(tmp_path, END).index.names) == 0
    assert find(tmp_path, "a.jpg")[1] == {"a.jpg": None}


def test_giant_headers_take_no_memory(tmp_path):
    path = tmp_path / "media.tar"
    with path.open("wb") as file:
        file.write(GOOD_ONE + raw_header(b"pax", 4 << 30, b"x"))
        file.seek(4 << 30, os.SEEK_CUR)  # a hole, no disk
        file.write(raw_header(b"x.jpg", 3) + padded(b"abc") + GOOD_TWO + END)
    tracemalloc.start()
    source = open_tar(path, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count_refused(source) == {"giant_header": 1}
    assert len(source.index.names) == 2
    assert peak < 3_000_000


# Plain files and letter cases


def test_tars_come_before_folders(tmp_path):
    write_tar(tmp_path / "m.tar", {"a/1.jpg": b"tar"})
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.jpg", "a/b/2.jpg", "top.jpg"):
        (tmp_path / name).write_bytes(b"folder " + name.encode())
    names = ("a/1.jpg", "a/b/2.jpg", "top.jpg", "a", "a/b", "nowhere.jpg", "x" * 5000)
    found = find(tmp_path, *names)[1]
    assert found == {
        **dict.fromkeys(names),
        "a/1.jpg": b"tar",
        "a/b/2.jpg": b"folder a/b/2.jpg",
        "top.jpg": b"folder top.jpg",
    }


def test_names_that_tars_have_with_different_content_are_known(tmp_path):
    one, other, same = (bytes([n]) * 100 for n in range(3))
    write_tar(tmp_path / "coco.tar", {"images/1.jpg": one, "images/2.jpg": same, "images/3.jpg": one})
    write_tar(tmp_path / "vg.tar", {"images/1.jpg": other, "images/2.jpg": same})
    names = ("images/1.jpg", "images/2.jpg", "images/3.jpg", "coco/images/1.jpg")
    places, found = find(tmp_path, *names)
    assert found == dict(zip(names, (other, same, one, one))), "the last tar counts; a tar's name before it chooses"
    digests = sorted(names, key=digest_name)
    assert [name for name, differs in zip(digests, places.differing) if differs] == ["images/1.jpg"]


def test_the_output_folder_and_odd_files_are_no_media(tmp_path):
    for name in ("out", "real", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(name.encode())
    os.mkfifo(tmp_path / "real" / "pipe.jpg")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    names = ("out/1.jpg", "real/1.jpg", "data/1.jpg", "linked/1.jpg", "real/pipe.jpg", "broken.jpg")
    found = find(tmp_path, *names)[1]
    assert {name for name, data in found.items() if data} == {"real/1.jpg", "data/1.jpg", "linked/1.jpg"}


def test_another_letter_case_or_unicode_form_is_found_if_it_is_the_only_one(tmp_path):
    write_tar(
        tmp_path / "1.tar", {"A/One.JPG": b"one", "a/two.jpg": b"2", "A/two.jpg": b"two", "a/Ku\u0308che.png": b"k"}
    )
    write_tar(tmp_path / "2.tar", {"A/three.jpg": b"first", "STRASSE.png": b"s"})
    write_tar(tmp_path / "3.tar", {"A/three.jpg": b"last"})
    (tmp_path / "Folder").mkdir()
    (tmp_path / "Folder" / "Four.jpeg").write_bytes(b"four")
    names = ("a/one.jpg", "a/TWO.jpg", "A/two.jpg", "a/THREE.jpg", "folder/four.JPEG", "a/K\u00fcche.png", "straße.png")
    places, found = find(tmp_path, *names)
    assert found == {
        "a/one.jpg": b"one",
        "a/TWO.jpg": None,  # two files differ in letter case alone
        "A/two.jpg": b"two",
        "a/THREE.jpg": b"last",
        "folder/four.JPEG": b"four",
        "a/K\u00fcche.png": b"k",
        "straße.png": b"s",
    }
    assert (places.repair == OTHER_CASE).sum() == 5


def test_names_as_they_may_have_been_meant(tmp_path):
    write_tar(tmp_path / "media.tar", {"a/b c.jpg": b"1", "a/1%41.jpg": b"2", "a/1A.jpg": b"3", "d.jpg": b"4"})
    write_tar(tmp_path / "Coco.tar", {"train/1.jpg": b"5", "train/d e.jpg": b"6", "coco/2.jpg": b"7", "..x": b"8"})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "e f.jpg").write_bytes(b"9")
    expected = {
        "a/b c.jpg \n": b"1",
        "a\\b c.jpg": b"1",
        "a/b%20c.jpg": b"1",
        " .\\a\\b%20c.jpg": b"1",
        "a/1%41.jpg": b"2",
        "plain\\e%20f.jpg": b"9",
        "coco/train/1.jpg": b"5",
        "COCO\\train\\d%20e.jpg": b"6",
        "coco/2.jpg": b"7",
        "coco/coco/2.jpg": b"7",
        "media/train/1.jpg": None,
        "train/1.jpg": b"5",
        "..\\data\\d.jpg": None,
        "%2e%2e/d.jpg": None,
        "coco/../d.jpg": None,
        "other/d.jpg": None,
    }
    places, found = find(tmp_path, *expected)
    assert found == expected
    assert (places.repair == OTHER_SPELLING).sum() == 5
    assert (places.repair == TAR_AS_FOLDER).sum() == 3


def test_one_image_in_several_places_is_known_as_one(tmp_path):
    same, other = plain_jpeg(1), plain_jpeg(1)[:-1] + b"\xff"
    assert len(same) < 2 * EDGE_BYTES
    large = os.urandom(10 * EDGE_BYTES)
    end_differs = large[:-1] + bytes([large[-1] ^ 1])
    write_tar(tmp_path / "1.tar", {"a.jpg": same, "b.jpg": other, "l.jpg": large, "empty1.jpg": b"", "empty2.jpg": b""})
    write_tar(tmp_path / "2.tar", {"c.jpg": same, "m.jpg": large, "n.jpg": end_differs})
    (tmp_path / "d.jpg").write_bytes(same)
    (tmp_path / "o.jpg").write_bytes(large)
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "l.jpg", "m.jpg", "n.jpg", "o.jpg", "empty1.jpg", "empty2.jpg"]
    places, _ = find(tmp_path, *names)
    digests = np.array([digest_name(name) for name in names], DIGEST)
    content = dict(zip(np.array(names)[np.argsort(digests)].tolist(), places.content.tolist()))
    assert content["a.jpg"] == content["c.jpg"] == content["d.jpg"] != content["b.jpg"]
    assert content["l.jpg"] == content["m.jpg"] == content["o.jpg"] != content["n.jpg"]
    assert content["empty1.jpg"] != content["empty2.jpg"]
