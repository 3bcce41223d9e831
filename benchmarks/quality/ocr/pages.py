"""Sheets of print with a known text for each line: pages of real manuals, and the same lines drawn in another font.

Letters used for shapes: H W, rows and columns of a sheet in pixels.

The manuals are PDF files with a text layer, from Debian's package r-doc-pdf. pypdfium2 draws them and says where each
character stands. Both are for this study alone, see benchmarks/quality/requirements.txt.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality.ocr.errors import compared
from dct_qwen2vl.common.scripts import UserError

MANUALS = "R-*.pdf"  # seven manuals; the reference beside them is set alike
MULTIPLE = 112  # px. Sides of a sheet are multiples, so that blocks of 28 and of 56 px fill it, two by two.
POINTS_AN_INCH = 72
LEAST_CHARACTERS = 25  # of a line that is read, without spaces
WIDEST_GAP = 30.0  # points between two characters of a line; wider ones stand in tables and running heads
MARGIN = 0.15  # of a line's height, kept above and below it
OVERSAMPLING = 8  # print is drawn this much larger and averaged down, as it would be by a camera
SPACING = 2.5  # heights of a capital from line to line
EDGE = 16  # px of empty ground around drawn print
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """text: as `compared` gives it. box: left, top, right, bottom in pixels of the sheet."""

    text: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Sheet:
    """grey: uint8 [H, W], 0 is ink and 255 is ground. H and W are multiples of 112."""

    name: str
    grey: np.ndarray
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class PageLine:
    """A line of a page as its text layer has it.

    raw: with spaces. box: left, top, right, bottom in points. widest_gap: between two characters, points.
    """

    raw: str
    box: Box
    widest_gap: float = 0.0


@dataclass(frozen=True)
class ChosenPage:
    """number: from 0 on. lines: those that are read."""

    file: Path
    number: int
    lines: tuple[PageLine, ...]

    @property
    def name(self) -> str:
        """As a reader of the file finds it."""
        return f"{self.file.stem} {self.number + 1}"


class Manuals:
    """Random pages of the manuals in a folder, each with some random lines, always the same for a seed.

    folder: Path. Where the PDF files lie.
    pages: int. Pages to read.
    lines: int. Lines of each page.
    seed: int. Another seed chooses other pages and lines.
    """

    def __init__(self, folder: Path, pages: int, lines: int, seed: int) -> None:
        self.files = sorted(folder.glob(MANUALS))
        if not self.files:
            raise UserError(f"no {MANUALS} in {folder}: apt-get install r-doc-pdf, or name the folder with --manuals")
        self.chosen = self._choose(pages, lines, np.random.default_rng(seed))

    def _choose(self, pages: int, lines: int, rng: np.random.Generator) -> list["ChosenPage"]:
        """Pages with enough lines of running text, in random order."""
        with ExitStack() as stack:
            documents = {path: stack.enter_context(opened(path)) for path in self.files}
            places = [(path, number) for path, document in documents.items() for number in range(len(document))]
            chosen: list[ChosenPage] = []
            for place in rng.permutation(len(places)):
                path, number = places[place]
                if len(found := lines_of(documents[path], number)) >= lines:
                    some = sorted(rng.choice(len(found), lines, replace=False))
                    chosen.append(ChosenPage(path, number, tuple(found[index] for index in some)))
                if len(chosen) == pages:
                    return chosen
        raise UserError(f"{len(chosen)} pages have {lines} lines of running text: lower --pages or --lines")

    def sheets(self, dpi: int) -> Iterator[Sheet]:
        """The chosen pages, drawn at so many dots per inch."""
        scale = dpi / POINTS_AN_INCH
        for page in self.chosen:
            with opened(page.file) as document:
                grey = np.array(document[page.number].render(scale=scale, grayscale=True).to_pil())
            lines = tuple(Line(compared(line.raw), pixel_box(line.box, scale)) for line in page.lines)
            yield Sheet(page.name, padded(grey), lines)

    def drawn(self, height: int) -> Iterator[Sheet]:
        """The chosen lines in Pillow's own font. height: of a capital, px."""
        for page in self.chosen:
            yield drawn_sheet(page.name, [line.raw for line in page.lines], height)


def opened(path: Path) -> AbstractContextManager[Any]:
    """A PDF file as pypdfium2's document. Raises UserError if pypdfium2 is missing."""
    try:
        import pypdfium2
    except ModuleNotFoundError as error:
        raise UserError(missing("pypdfium2")) from error
    return closing(pypdfium2.PdfDocument(path))


def add_manuals_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --manuals, the folder with the PDF files, which is Debian's by default."""
    default = Path("/usr/share/R/doc/manual")
    text = "PDF files of r-doc-pdf (default: %(default)s)"
    parser.add_argument("--manuals", type=Path, default=default, metavar="DIR", help=text)


def missing(package: str) -> str:
    """The line on a Python package that only this study needs."""
    install = "pip install --no-deps --target ocr_packages -r benchmarks/quality/requirements.txt"
    return f"{package} is not installed: {install}, then put PYTHONPATH=ocr_packages before the command"


def lines_of(document: Any, number: int) -> list[PageLine]:
    """The lines of running text of a page from top to bottom: plain characters, no wide gaps, no other line beside."""
    with closing(document[number]) as page, closing(page.get_textpage()) as text:
        lines = list(all_lines(text, page.get_height()))
    alone = [line for line in lines if not any(overlap(line, other) for other in lines if other is not line)]
    return [line for line in alone if is_running_text(line)]


def all_lines(text: Any, page_height: float) -> Iterator[PageLine]:
    """Every line of a text layer, boxes from the top of the page on."""
    for characters, boxes in lines_of_characters(text):
        yield page_line(characters, boxes, page_height)


def lines_of_characters(text: Any) -> Iterator[tuple[list[str], list[Box]]]:
    """Characters of each line of a text layer, and their boxes as pdfium gives them."""
    import pypdfium2.raw as raw

    characters: list[str] = []
    boxes: list[Box] = []
    for index in range(text.count_chars()):
        character = chr(raw.FPDFText_GetUnicode(text, index))
        if character not in "\r\n":
            characters.append(character)
            boxes.append(text.get_charbox(index, loose=character != " "))
        elif characters:
            yield characters, boxes
            characters, boxes = [], []
    if characters:
        yield characters, boxes


def page_line(characters: list[str], boxes: list[Box], page_height: float) -> PageLine:
    """The line of these characters. boxes: as pdfium gives them, left, bottom, right, top, from the page's foot on."""
    glyphs = [box for box, character in zip(boxes, characters) if character != " "] or boxes
    widest = max((after[0] - before[2] for before, after in pairwise(glyphs)), default=0.0)
    left, bottom, right, top = zip(*glyphs)
    box = (min(left), page_height - max(top), max(right), page_height - min(bottom))
    return PageLine("".join(characters), box, widest)


def is_running_text(line: PageLine) -> bool:
    """Neither a table, nor contents with dots, nor characters that a reader of English does not know."""
    text = compared(line.raw)
    plain = text.isascii() and text.isprintable() and "..." not in text
    return plain and len(text) >= LEAST_CHARACTERS and line.widest_gap <= WIDEST_GAP


def overlap(line: PageLine, other: PageLine) -> bool:
    """Whether two lines share half of a line's height, as those do that stand side by side."""
    shared = min(line.box[3], other.box[3]) - max(line.box[1], other.box[1])
    return shared > 0.5 * min(line.box[3] - line.box[1], other.box[3] - other.box[1])


def pixel_box(box: Box, scale: float) -> tuple[int, int, int, int]:
    """A box in points -> in whole pixels that hold it, with a margin."""
    left, top, right, bottom = (value * scale for value in box)
    margin = MARGIN * (bottom - top)
    low = (max(0, int(np.floor(value))) for value in (left - 2 * margin, top - margin))
    high = (int(np.ceil(value)) for value in (right + 2 * margin, bottom + margin))
    return (*low, *high)


def padded(grey: np.ndarray) -> np.ndarray:
    """More ground to the right and below, up to the next multiples of 112 px: uint8 [H, W]."""
    height, width = grey.shape
    return np.pad(grey, ((0, -height % MULTIPLE), (0, -width % MULTIPLE)), constant_values=255)


def drawn_sheet(name: str, lines: list[str], height: int) -> Sheet:
    """Lines below each other, each at its own fraction of a pixel. height: of a capital, px."""
    font = capital_font(height * OVERSAMPLING)
    step = round(SPACING * height)
    width = EDGE * 2 + max(math.ceil(font.getlength(line) / OVERSAMPLING) for line in lines)
    sides = [side + -side % MULTIPLE for side in (width, EDGE * 2 + step * len(lines))]
    fine = Image.new("L", (sides[0] * OVERSAMPLING, sides[1] * OVERSAMPLING), 255)
    marked = []
    for number, line in enumerate(lines):
        top = EDGE + step * number
        phase = number * 3 % OVERSAMPLING  # of the fine pixels, so that lines do not all meet the grid alike
        place = (EDGE * OVERSAMPLING + phase, (top + height) * OVERSAMPLING + phase)
        ImageDraw.Draw(fine).text(place, line, font=font, fill=0, anchor="ls")
        right = EDGE + math.ceil(font.getlength(line) / OVERSAMPLING)
        around = (EDGE - height // 2, top - height // 2, right + height // 2, top + 2 * height)
        marked.append(Line(compared(line), around))
    return Sheet(name, np.asarray(fine.reduce(OVERSAMPLING)), tuple(marked))


def capital_font(height: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font (Aileron Regular) at the size at which an H is `height` px high."""
    top, bottom = ImageFont.load_default(size=1000).getbbox("H", anchor="ls")[1::2]
    return ImageFont.load_default(size=height * 1000 / (bottom - top))
