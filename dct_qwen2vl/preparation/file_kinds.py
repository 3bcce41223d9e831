"""What a file is that is not what its name says, by how it begins, and what to do about it."""

BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of git-lfs: type git lfs pull in its folder"),
    (b"PK\3\4", "it is a zip archive: unzip it"),
    (b"\x1f\x8b", "it is compressed: gunzip it"),
    (b"BZh", "it is compressed: bunzip2 it"),
    (b"\xfd7zXZ\0", "it is compressed: unxz it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed: unzstd it"),
    (b"PAR1", "it is Parquet: write its rows as JSON lines"),
    (b"\xff\xfe", "it is UTF-16: write it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16: write it as UTF-8"),
)
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")


def name_kind(beginning: bytes) -> str:
    """One of the things above, or "" for any other.

    beginning: The first 32 bytes of a file, or more.
    """
    text = beginning.lstrip()[:32]
    if text.lower().startswith(WEB_PAGES):
        return "it is a web page, perhaps of an error: fetch it again"
    return next((said for start, said in BEGINNINGS if text.startswith(start)), "")
