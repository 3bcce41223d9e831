"""A raw data folder: one JSON list of entries, and the media in tars or plain folders, read in place.

Sized for 700,000 entries: the metadata is read in one pass that never holds the whole file, and the place of each
media file is kept as numbers in columns.
"""

import json
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from media_conversion import UnusableSample

METADATA_NAME = "cambrian737k.json"
READ_CHARACTERS = 1 << 20
MAXIMUM_ENTRY_CHARACTERS = 1 << 28
LONGEST_ESCAPE = len("\\ud83d\\ude00")
LONGEST_EXPONENT = len("e+5")  # to its first digit
WHITESPACE = re.compile(r"[ \t\r\n\ufeff]*")  # and the byte order mark that some editors put first


class PreparationError(Exception):
    """Data or environment is wrong: one line that says what, where and what to do."""


@dataclass(frozen=True)
class MediaLocation:
    """Bytes [offset, offset + size) of the file `path`; size -1: the whole file."""

    path: str
    offset: int
    size: int


def find_metadata(data_dir: Path) -> Path:
    """The metadata file of a data folder, its name in any letter case. Raises PreparationError for none or several."""
    if not data_dir.is_dir():
        raise PreparationError(f"{data_dir} is not a folder; --data-dir takes the folder that holds {METADATA_NAME}")
    found = sorted(path for path in data_dir.iterdir() if path.name.lower() == METADATA_NAME)
    if not found:
        raise PreparationError(f"{data_dir} holds no {METADATA_NAME} (or Cambrian737k.json); put it beside the tars")
    if len(found) > 1:
        raise PreparationError(f"{data_dir} holds both {found[0].name} and {found[1].name}; leave one of them there")
    return found[0]


class TextWindow:
    """A cursor that moves over a long UTF-8 file and knows its byte offset."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = ""
        self.cursor = 0
        self.offset = 0

    def grow(self) -> bool:
        """Drop what lies behind the cursor and read on, twice as much each time; False, and no change, at the end."""
        kept = self.text[self.cursor :]
        added = self.file.read(max(READ_CHARACTERS, len(kept)))
        if added:
            self.text, self.cursor = kept + added, 0
        return bool(added)

    def move_to(self, end: int) -> int:
        """Move the cursor to character `end` of the window; returns the number of bytes passed."""
        passed = self.text[self.cursor : end]
        length = len(passed) if passed.isascii() else len(passed.encode())
        self.cursor = end
        self.offset += length
        return length

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self.move_to(WHITESPACE.match(self.text, self.cursor).end())
            if self.cursor < len(self.text):
                return self.text[self.cursor]
            if not self.grow():
                return ""

    def take(self) -> str:
        """As peek, and move behind it."""
        character = self.peek()
        self.move_to(self.cursor + len(character))
        return character

    def take_value(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The JSON value at the cursor and its length in bytes. Raises ValueError if it is not JSON."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.cursor)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_ESCAPE
                is_long = len(self.text) - self.cursor > MAXIMUM_ENTRY_CHARACTERS
                if not is_cut or is_long or not self.grow():
                    raise
            else:
                # "12" at the end of the window may be the beginning of "12e+5"; the end of the file settles it.
                if end + LONGEST_EXPONENT <= len(self.text) or not self.grow():
                    return value, self.move_to(end)


def iterate_metadata(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (byte offset, byte length, entry) of each element of a file that is one JSON list.

    Raises PreparationError where the file is not a JSON list in UTF-8.
    """
    count = 0
    with path.open(encoding="utf-8", newline="") as file:
        window = TextWindow(file)
        try:
            for element in iterate_list(window):
                yield element
                count += 1
        except UnicodeDecodeError as error:
            raise PreparationError(f"{path} is not UTF-8 text: {error.reason}, after entry {count}") from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            place = f"in or after entry {count}, byte {window.offset}"
            raise PreparationError(f"{path} is not a JSON list of entries: {reason}, {place}") from error


def iterate_list(window: TextWindow) -> Iterator[tuple[int, int, Any]]:
    """The elements of the JSON list that fills the rest of the window's file. Raises ValueError."""
    decoder = json.JSONDecoder()
    if window.take() != "[":
        raise ValueError("it does not begin with '['")
    separator = window.take() if window.peek() == "]" else ","
    while separator == ",":
        window.peek()
        offset = window.offset
        value, length = window.take_value(decoder)
        yield offset, length, value
        separator = window.take()
    if separator != "]":
        raise ValueError(f"'{separator}' where ',' or ']' must follow" if separator else "the list is not closed")
    if window.peek():
        raise ValueError("something follows the list")


class MediaIndex:
    """Where each media file lies; nothing is extracted. 700,000 members take about 150 MB."""

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir
        self.rows: dict[str, int] = {}
        self.paths: list[str] = []
        self.source, self.offset, self.size = array("l"), array("q"), array("q")

    def append(self, name: str, offset: int, size: int) -> int:
        """Enter a file that lies in the source file added last; returns its row."""
        self.source.append(len(self.paths) - 1)
        self.offset.append(offset)
        self.size.append(size)
        self.rows[name] = len(self.source) - 1
        return self.rows[name]

    def add_tar(self, path: Path) -> None:
        """Enter the regular files of an uncompressed tar. The last one of a name counts, as it would on extraction."""
        self.paths.append(str(path))
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    if member.isreg() and not member.issparse():
                        self.append(posixpath.normpath(member.name), member.offset_data, member.size)
                    tar.members.clear()  # tarfile would keep every header
        except tarfile.TarError as error:
            remedy = "fetch it again or take it out of the folder"
            raise PreparationError(f"{path} cannot be read as a tar ({error}); {remedy}") from error

    def find(self, name: str) -> int:
        """The row of a media file in the tars, or else of a plain file below the data folder. Raises UnusableSample."""
        row = self.rows.get(name)
        if row is not None:
            return row
        path = os.path.join(self.data_dir, name)
        if not os.path.isfile(path):
            raise UnusableSample("missing_media", f"{name} is in no tar and no folder")
        self.paths.append(path)
        return self.append(name, 0, -1)

    def location(self, row: int) -> MediaLocation:
        return MediaLocation(self.paths[self.source[row]], self.offset[row], self.size[row])


def check_conversations(entry: Any) -> None:
    """LLaVA (from, value) or OpenAI (role, content) turns, at least one. Raises UnusableSample."""
    if not isinstance(entry, dict):
        raise UnusableSample("malformed_entry", f"the entry is a {type(entry).__name__}, not an object")
    turns = entry.get("conversations") or entry.get("messages")
    if not isinstance(turns, list) or not turns:
        raise UnusableSample("no_conversations", "conversations is missing, empty or no list")
    for number, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        is_llava = isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        is_openai = isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | list)
        if not is_llava and not is_openai:
            raise UnusableSample("malformed_turn", f"turn {number} has neither from and value nor role and content")


def list_media(entry: dict) -> list[tuple[str, str]]:
    """The ("image" | "video", name) of an entry: images first, each in the entry's order. Raises UnusableSample."""
    media = []
    for kind in ("image", "video"):
        names = entry.get(kind)
        if names is not None:
            media += [(kind, clean_name(name)) for name in (names if isinstance(names, list) else [names])]
    return media


def clean_name(name: Any) -> str:
    """The name as tars are indexed by: "a/b.jpg" for "./a//b.jpg".

    Raises UnusableSample for what is no name or leads out of the data folder.
    """
    if not isinstance(name, str) or posixpath.normpath(name) == ".":
        raise UnusableSample("malformed_entry", f"{name!r:.100} is not the name of a media file")
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise UnusableSample("unsafe_path", f"{name!r:.300} is not a path below the data folder")
    return posixpath.normpath(name)
