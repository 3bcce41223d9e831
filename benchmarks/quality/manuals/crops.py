"""Crops of printed pages that show a few lines, and what can be asked about them.

Letters used for shapes:

    P Q    rows and columns of a page in pixels
    H W    rows and columns of a crop in pixels

A crop shows whole words only. What its edges would cut through becomes paper, so that its text is all that is there.
A shuffled crop shows random words of the page, some of them more than once: they have to be read, not guessed. Half of
the shuffled crops show few words, so that they are easy to begin with.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.quality.manuals.lines import PrintedLine, Word
from benchmarks.quality.ocr.pages import POINTS_AN_INCH

EDGE = 2  # px of paper around the text, at least
PAPER = 255
TRIES = 20  # places on a page at which a crop is looked for
FEW, SHARE_OF_FEW = 3, 0.5  # words of some shuffled crops, at most; how many crops these are
MANY = 1000  # words that no crop has
SPACE = 0.25  # between shuffled words, of the height of a line
SHORTEST_WORD = 3  # letters of a word that is asked for
FROM_THE_START = 0.5  # share of crops that begin where their lines begin
KINDS = ("next word", "line count", "heading")  # beside "transcribe"
PROMPTS = {
    "transcribe": ("Transcribe these lines.", "What is written here?", "Read the text."),
    "next word": ('Which word comes after "{}"?', 'What word follows "{}"?'),
    "line count": ("How many lines of text are there?", "Count the lines."),
    "heading": ("What is the heading?", "Give the heading."),
}


@dataclass(frozen=True)
class Shape:
    """height, width: of a crop in pixels. lines: at most, of a crop."""

    height: int
    width: int
    lines: int


@dataclass(frozen=True, eq=False)
class PrintedPage:
    """grey: uint8 [P, Q], 0 is ink and 255 is paper. lines: from top to bottom. dpi: at which it is rendered."""

    grey: np.ndarray
    lines: list[PrintedLine]
    dpi: int

    @property
    def scale(self) -> float:
        """Pixels of a point."""
        return self.dpi / POINTS_AN_INCH


@dataclass(frozen=True, eq=False)
class Crop:
    """image: uint8 [H, W]. lines: their words. heading: whether the first line is one."""

    image: np.ndarray
    lines: tuple[tuple[str, ...], ...]
    heading: bool

    @property
    def text(self) -> str:
        return "\n".join(" ".join(words) for words in self.lines)


@dataclass(frozen=True)
class Question:
    """kind: "transcribe" or one of `KINDS`."""

    kind: str
    text: str
    answer: str


def random_crop(page: PrintedPage, shape: Shape, heading: bool, rng: np.random.Generator) -> Crop | None:
    """None where the page has no place for one.

    page: To cut from.
    shape: Of the crop.
    heading: Whether the first line must be one.
    rng: Chooses lines, words and place.
    """
    starts = [number for number, line in enumerate(page.lines) if line.usable and (line.heading or not heading)]
    for _ in range(TRIES if starts else 0):
        lines = following(page, starts[rng.integers(len(starts))], 1 + int(rng.integers(shape.lines)), shape)
        shown = shown_words(lines, (shape.width - 2 * EDGE) / page.scale, heading, rng)
        if shown and all(shown):
            words = tuple(tuple(word.text for word in each) for each in shown)
            return Crop(cut(page, lines, shown, shape, rng), words, lines[0].heading)
    return None


def shuffled_crop(page: PrintedPage, shape: Shape, rng: np.random.Generator) -> Crop | None:
    """None where the page has no word that fits.

    page: To cut words from.
    shape: Of the crop.
    rng: Chooses the number of lines and of words, and the words.
    """
    most = 1 + int(rng.integers(FEW)) if rng.random() < SHARE_OF_FEW else MANY
    places = [(line, word) for line in page.lines if line.usable for word in line.words]
    image = np.full((shape.height, shape.width), PAPER, np.uint8)
    lines: list[tuple[str, ...]] = []
    top = EDGE
    for _ in range(1 + int(rng.integers(shape.lines)) if places else 0):
        words, tall = set_line(image[top:-EDGE, EDGE:-EDGE], page, places, most, rng)
        if not words:
            break
        lines.append(words)
        top += tall
        most -= len(words)
    return Crop(image, tuple(lines), heading=False) if lines else None


def set_line(
    room: np.ndarray, page: PrintedPage, places: list[tuple[PrintedLine, Word]], most: int, rng: np.random.Generator
) -> tuple[tuple[str, ...], int]:
    """Sets words side by side until one does not fit. Returns them, and the rows that they take.

    room: uint8 [rows, columns], part of the crop. Gets the words at its top.
    page: Has the words.
    places: The words, each with its line.
    most: Words to set.
    rng: Chooses from them.
    """
    words: list[str] = []
    left = tall = 0
    while len(words) < most:
        line, word = places[rng.integers(len(places))]
        first_row, first_column, last_row, last_column = pixel_box(line, (word,), page)
        height, width = last_row - first_row, last_column - first_column
        if height > room.shape[0] or left + width > room.shape[1]:
            break
        room[:height, left : left + width] = page.grey[first_row:last_row, first_column:last_column]
        words.append(word.text)
        left += width + max(2, round(SPACE * height))
        tall = max(tall, height)
    return tuple(words), tall


def following(page: PrintedPage, start: int, count: int, shape: Shape) -> list[PrintedLine]:
    """Up to `count` lines from `start` on: as many as fit into a crop and are usable."""
    room = (shape.height - 2 * EDGE) / page.scale - 2 / page.scale  # boxes are rounded to whole pixels
    lines: list[PrintedLine] = []
    for line in page.lines[start : start + count]:
        if not line.usable or line.bottom - page.lines[start].top > room:
            break
        lines.append(line)
    return lines


def shown_words(lines: list[PrintedLine], room: float, whole: bool, rng: np.random.Generator) -> list[tuple[Word, ...]]:
    """The words of each line between two edges `room` points apart. whole: begin where the lines begin; else at
    random."""
    if not lines:
        return []
    left = min(line.words[0].left for line in lines)
    if not whole and rng.random() >= FROM_THE_START:
        words = lines[rng.integers(len(lines))].words
        left = words[rng.integers(len(words))].left
    return [tuple(w for w in line.words if w.left >= left and w.right <= left + room) for line in lines]


def cut(
    page: PrintedPage, lines: list[PrintedLine], shown: list[tuple[Word, ...]], shape: Shape, rng: np.random.Generator
) -> np.ndarray:
    """The crop at a random place of its lines, uint8 [H, W]."""
    boxes = [pixel_box(line, words, page) for line, words in zip(lines, shown)]
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    height, width = max(box[2] for box in boxes) - top, max(box[3] for box in boxes) - left
    down, right = (
        int(rng.integers(min(EDGE, room // 2), max(room - EDGE, room // 2) + 1))
        for room in (shape.height - height, shape.width - width)
    )
    image = np.full((shape.height, shape.width), PAPER, np.uint8)
    for first_row, first_column, last_row, last_column in boxes:
        rows = slice(first_row - top + down, last_row - top + down)
        columns = slice(first_column - left + right, last_column - left + right)
        inside = page.grey[first_row:last_row, first_column:last_column]
        image[rows, columns] = np.minimum(image[rows, columns], inside)  # boxes may overlap by a row
    return image


def pixel_box(line: PrintedLine, words: tuple[Word, ...], page: PrintedPage) -> tuple[int, int, int, int]:
    """First row and column, last row and column + 1, within the page."""
    rows, columns = page.grey.shape
    first = (line.top * page.scale, words[0].left * page.scale)
    last = (line.bottom * page.scale, words[-1].right * page.scale)
    top, left = (max(0, int(np.floor(value))) for value in first)
    bottom, right = (min(most, int(np.ceil(value))) for value, most in zip(last, (rows, columns)))
    return top, left, bottom, right


def ask(crop: Crop, kind: str, rng: np.random.Generator) -> Question | None:
    """None where the crop has no answer.

    crop: That is asked about.
    kind: "transcribe" or one of `KINDS`.
    rng: Chooses the words of the question.
    """
    about, answer = "", crop.text
    if kind == "line count":
        answer = str(len(crop.lines))
    elif kind == "heading":
        if not crop.heading:
            return None
        answer = " ".join(crop.lines[0])
    elif kind == "next word":
        pairs = neighbours(crop)
        if not pairs:
            return None
        about, answer = pairs[rng.integers(len(pairs))]
    prompts = PROMPTS[kind]
    return Question(kind, prompts[rng.integers(len(prompts))].format(about), answer)


def neighbours(crop: Crop) -> list[tuple[str, str]]:
    """(word, next word) of a line, letters only. The first of the two stands in the crop once."""
    everything = [word for words in crop.lines for word in words]
    pairs = [pair for words in crop.lines for pair in pairwise(words)]
    return [pair for pair in pairs if all(map(is_word, pair)) and everything.count(pair[0]) == 1]


def is_word(text: str) -> bool:
    return text.isalpha() and len(text) >= SHORTEST_WORD
