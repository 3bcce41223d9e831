"""The lines of a printed page, word by word, each word with its place.

The study of legibility reads whole lines of running text (ocr/pages.py). Crops cut through lines, so they need words.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from benchmarks.quality.ocr.errors import plain
from benchmarks.quality.ocr.pages import Box, lines_of_characters

DIVIDED = "\x02"  # pdfium's sign for the hyphen of a divided word; it leaves the end of the line out
LARGER = 1.15  # times the usual height of a line: a heading
LEADERS = (". . .", "....")  # dots that lead to a page number


@dataclass(frozen=True)
class Word:
    """text: as `plain` gives it. left, right: points from the left edge of the page."""

    text: str
    left: float
    right: float


@dataclass(frozen=True)
class PrintedLine:
    """top, bottom: points from the top of the page. heading: whether it is larger than most lines of the page.

    usable: whether it stands alone in its place, in plain characters.
    """

    words: tuple[Word, ...]
    top: float
    bottom: float
    heading: bool = False
    usable: bool = True

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def printed_lines(text: Any, page_height: float) -> list[PrintedLine]:
    """All lines of a page, from top to bottom.

    text: pdfium's text layer.
    page_height: Points.
    """
    lines = [
        line
        for characters, boxes in lines_of_characters(text)
        for part in undivided(characters, boxes)
        if (line := line_of(*part, page_height))
    ]
    return marked(sorted(lines, key=lambda line: line.top))


def undivided(characters: list[str], boxes: list[Box]) -> Iterator[tuple[list[str], list[Box]]]:
    """Cuts a line of the text layer where a divided word holds two printed lines together."""
    start = 0
    for place, character in enumerate(characters):
        if character == DIVIDED:
            yield [*characters[start:place], "-"], boxes[start : place + 1]
            start = place + 1
    yield characters[start:], boxes[start:]


def line_of(characters: list[str], boxes: list[Box], page_height: float) -> PrintedLine | None:
    """None without any word. boxes: left, bottom, right, top, from the page's foot on."""
    places = range(len(characters))
    groups = [list(group) for space, group in groupby(places, lambda place: characters[place].isspace()) if not space]
    if not groups:
        return None
    words = tuple(word_of([characters[i] for i in group], [boxes[i] for i in group]) for group in groups)
    inked = [boxes[i] for group in groups for i in group]
    top, bottom = page_height - max(box[3] for box in inked), page_height - min(box[1] for box in inked)
    return PrintedLine(words, top, bottom)


def word_of(characters: list[str], boxes: list[Box]) -> Word:
    return Word(plain("".join(characters)), min(box[0] for box in boxes), max(box[2] for box in boxes))


def marked(lines: list[PrintedLine]) -> list[PrintedLine]:
    """The same lines, told which are headings and which are usable. lines: from top to bottom."""
    usual = median(line.bottom - line.top for line in lines) if lines else 0.0
    return [
        PrintedLine(line.words, line.top, line.bottom, line.bottom - line.top > LARGER * usual, is_usable(line, lines))
        for line in lines
    ]


def is_usable(line: PrintedLine, lines: list[PrintedLine]) -> bool:
    text = line.text
    clean = text.isascii() and text.isprintable() and not any(dots in text for dots in LEADERS)
    return clean and not any(share_height(line, other) for other in lines if other is not line)


def share_height(line: PrintedLine, other: PrintedLine) -> bool:
    """Whether two lines share a third of a line's height: they stand side by side, or one is a superscript."""
    shared = min(line.bottom, other.bottom) - max(line.top, other.top)
    return shared > min(line.bottom - line.top, other.bottom - other.top) / 3
