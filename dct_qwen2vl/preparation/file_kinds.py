"""What a file is that is not what its name says, by how it begins, and what to do about it."""

import re

BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of git-lfs: type git lfs pull in its folder"),
    (b"PK\3\4", "it is a zip archive: unzip it"),
    (b"\x1f\x8b", "it is compressed: gunzip it"),
    (b"BZh", "it is compressed: bunzip2 it"),
    (b"\xfd7zXZ\0", "it is compressed: unxz it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed: unzstd it"),
    (b"\0\5\x16\7", "macOS keeps notes on another file in it: remove such files, find . -name '._*' -delete"),
    (b"PAR1", "it is Parquet: write its rows as JSON lines"),
    (b"\xff\xfe\0\0", "it is UTF-32: write it as UTF-8"),
    (b"\xff\xfe", "it is UTF-16: write it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16: write it as UTF-8"),
)
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")
IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0|II\*\0|MM\0\*|P[1-6]\s|RIFF.{4}WEBP|.{4}ftypavi[fs]", re.DOTALL
)
VIDEO = re.compile(
    rb".{4}(ftyp|moov|mdat)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\1|\0\0\1\xba|OggS|\x30\x26\xb2\x75", re.DOTALL
)


def name_kind(beginning: bytes) -> str:
    """One of the things above, or "" for any other.

    beginning: The first 32 bytes of a file, or more.
    """
    text = beginning.lstrip()[:32]
    if text.lower().startswith(WEB_PAGES):
        return "it is a web page, perhaps of an error: fetch it again"
    return next((said for start, said in BEGINNINGS if text.startswith(start)), "")


def name_medium(data: bytes, wanted: str) -> str:
    """What a file is that cannot be opened as an image or as a video, and what to do about it.

    data: The file.
    wanted: "image" or "video".
    """
    if not data.strip(b"\0"):
        return f"it is empty ({len(data)} bytes, all zero): fetch it again" if data else "it is empty: fetch it again"
    if wanted == "image" and VIDEO.match(data) and not IMAGE.match(data):
        return "it is a video: name it in video"
    if wanted == "video" and IMAGE.match(data):
        return "it is an image: name it in image, or make an mp4 of it with ffmpeg"
    if (IMAGE if wanted == "image" else VIDEO).match(data):
        return "it cannot be opened: it is damaged, or of a kind that is not read here"
    return name_kind(data[:64]) or f"it is no {wanted} of a format that is read here, it begins with {data[:16]!r}"
