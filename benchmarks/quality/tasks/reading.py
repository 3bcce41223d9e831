"""Tasks of print: digits, numbers, words, the odd one in a row."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.quality.tasks.cells import DIGITS, NOT_SCORED, SHORT_WORDS, TOKEN, Batch, CellTask, constant, words
from benchmarks.quality.tasks.drawing import Backgrounds, GlyphAtlas, Random, compose, ink_on, paint

LETTERS = "".join(sorted(set("".join(SHORT_WORDS))))
SMALL = 8  # pixels; print up to this height is hard: the half-size image has lost some of it
Tools = tuple[Any, ...]


class PrintTask(CellTask):
    """Something printed in most cells, at a random place, of random height. Blanks are seen early, and with them a
    model learns where to look.

    heights: of digits in pixels. noise: see `compose`. blank: share of empty cells.
    """

    heights: tuple[int, ...]
    noise: float
    blank: float
    characters: ClassVar[str] = DIGITS
    length: ClassVar[int] = 1  # characters in a cell

    def __post_init__(self) -> None:
        widest = math.ceil(0.75 * max(self.heights) * self.length)
        self.check(max(widest, max(self.heights)) + 4 <= self.cell, f"{self.length} x {max(self.heights)} px of print")

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(height for height in self.heights if height <= SMALL) or self.heights

    def prepare(self, device: torch.device | str) -> Tools:
        """What `draw` needs, made once; backgrounds last."""
        return GlyphAtlas(self.characters, self.heights, device), Backgrounds((self.side, self.side), device)

    def filled(self, random: Random, count: int) -> torch.Tensor:
        """Which cells are not left empty: bool [B, C]."""
        return random.uniform(0, 1, count, self.count) >= self.blank

    def answers_of(self, frames: torch.Tensor, said: torch.Tensor, pixels: torch.Tensor, filled: torch.Tensor) -> Batch:
        """said: ids int64 [B, C, A] of what is printed, in empty cells replaced by blanks, which do not count."""
        said = torch.where(filled[..., None], said, TOKEN["blank"])
        return self.batch(frames, said, torch.where(filled, pixels, NOT_SCORED))

    def print_cells(
        self, tools: Tools, random: Random, glyphs: torch.Tensor, shown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prints glyphs int64 [B, C, length], an index into `characters`, in a line in each cell, where `shown` [B, C].
        Returns frames uint8 [B, 1, H, W, 3] and heights in pixels, int64 [B, C]."""
        atlas = tools[0]
        count, device = len(glyphs), random.device
        height = random.integers(len(self.heights), count, self.count)
        pixels = constant(self.heights, device)[height]
        height = height[..., None].expand(glyphs.shape)
        advance = atlas.widths[glyphs, height]
        top, left = self.corners(device)
        descent = 0.3 * pixels if self.characters != DIGITS else 0  # of letters below the line
        y = top + 1 + random.uniform(0, 1, count, self.count) * (self.cell - 2 - pixels - descent)
        x = left + 1 + random.uniform(0, 1, count, self.count) * (self.cell - 2 - advance.sum(dim=2))
        x = x[..., None] + advance.cumsum(dim=2) - advance
        masks, top, left = (part.flatten(1, 2) for part in atlas.place(glyphs, height, y[..., None].expand(x.shape), x))
        if shown is not None:
            masks = masks * shown[..., None].expand(glyphs.shape).flatten(1)[..., None, None]
        coverage = torch.zeros(count, self.size, self.size, device=device)
        paint(coverage, masks, top, left)
        return self.finish(tools, random, coverage[:, None]), pixels

    def finish(self, tools: Tools, random: Random, coverage: torch.Tensor) -> torch.Tensor:
        """Coverage [B, T, H, W] in ink on backgrounds, with grain: uint8 [B, T, H, W, 3]."""
        ground, lightness = tools[-1].draw(random, len(coverage))
        return compose(random, ground, coverage, ink_on(random, lightness), self.noise)


@dataclass(frozen=True)
class Reading(PrintTask):
    """Reads one digit in most cells."""

    name: ClassVar[str] = "reading"
    chance: ClassVar[float] = 1 / len(DIGITS)
    size: int = 112
    cells: int = 5
    heights: tuple[int, ...] = (4, 5, 6, 7, 8, 10, 12, 14, 16)
    blank: float = 0.3
    noise: float = 6.0

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        digit = random.integers(len(DIGITS), count, self.count, 1)
        filled = self.filled(random, count)
        frames, pixels = self.print_cells(tools, random, digit, filled)
        return self.answers_of(frames, words(DIGITS, random.device)[digit], pixels, filled)


@dataclass(frozen=True)
class Numbers(PrintTask):
    """Reads a number of three digits in each cell."""

    name: ClassVar[str] = "numbers"
    chance: ClassVar[float] = 1 / len(DIGITS)
    answers: ClassVar[int] = 3
    length: ClassVar[int] = 3
    size: int = 112
    cells: int = 3
    heights: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    blank: float = 0.3
    noise: float = 6.0

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        digits = random.integers(len(DIGITS), count, self.count, self.length)
        filled = self.filled(random, count)
        frames, pixels = self.print_cells(tools, random, digits, filled)
        return self.answers_of(frames, words(DIGITS, random.device)[digits], pixels, filled)


@dataclass(frozen=True)
class ShortWords(PrintTask):
    """Reads a word of three letters in each cell, of 32 that differ in one or two letters. heights: of the digit 0 in
    the same font; small letters are about 0.7 of it."""

    name: ClassVar[str] = "words"
    chance: ClassVar[float] = 1 / len(SHORT_WORDS)
    characters: ClassVar[str] = LETTERS
    length: ClassVar[int] = 3
    size: int = 112
    cells: int = 3
    heights: tuple[int, ...] = (4, 5, 6, 7, 8, 10, 12)
    blank: float = 0.3
    noise: float = 6.0

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        word = random.integers(len(SHORT_WORDS), count, self.count)
        spelling = constant(tuple(LETTERS.index(letter) for letter in "".join(SHORT_WORDS)), device).view(-1, 3)
        filled = self.filled(random, count)
        frames, pixels = self.print_cells(tools, random, spelling[word], filled)
        return self.answers_of(frames, words(SHORT_WORDS, device)[word][..., None], pixels, filled)


@dataclass(frozen=True)
class OddOne(PrintTask):
    """Which digit of a row differs from the others? The answer says what the others are, the odd one, and its place,
    from 0; only the place counts. In `blank` of the rows that place is empty, which does not count.

    cells: digits of a row, and rows.
    """

    name: ClassVar[str] = "odd-one"
    answers: ClassVar[int] = 3
    size: int = 112
    cells: int = 5
    heights: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    blank: float = 0.3
    noise: float = 6.0

    @property
    def chance(self) -> float:
        return 1 / self.cells

    @property
    def asked(self) -> int:
        return self.cells

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        same = random.integers(len(DIGITS), count, self.cells, 1)
        other = (same + 1 + random.integers(len(DIGITS) - 1, count, self.cells, 1)) % len(DIGITS)
        place = random.integers(self.cells, count, self.cells, 1)
        odd = torch.arange(self.cells, device=device) == place
        whole = random.uniform(0, 1, count, self.cells, 1) >= self.blank
        digits, shown = torch.where(odd, other, same), ~odd | whole
        frames, pixels = self.print_cells(tools, random, digits.flatten(1)[..., None], shown.flatten(1))
        height = pixels.view(count, self.cells, self.cells).gather(2, place)  # of the odd one
        said = words(DIGITS, device)[torch.cat([same, other, place], dim=2)]
        said[:, :, 1:2] = torch.where(whole, said[:, :, 1:2], TOKEN["blank"])
        level = torch.full_like(said, NOT_SCORED)
        level[:, :, 2:] = torch.where(whole, height, NOT_SCORED)
        return self.batch(frames, said, level)
