"""What all tasks have in common: the words, and images in cells, each of which is asked about.

Letters used for shapes: B samples, C cells of an image, A words of the answer for each cell, T frames.

An image that asks one question teaches little: models trained from scratch stay at chance for thousands of steps. So
every image has many cells, and the answer names each and what is in it: cell0 7 cell1 blank cell2 3 ...; names and
blanks are learned, and do not count.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from dct_qwen2vl.common.scripts import UserError

DIGITS = "0123456789"
MOST_CELLS = 64
NOT_SCORED = -1
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "user",
    "assistant",
)
# Of three letters, most of which differ from another word in one.
SHORT_WORDS = (
    *("bad", "bag", "ban", "bar", "bat", "bed", "beg", "bet", "bid", "big", "bin", "bit", "bog", "bot", "bud", "bug"),
    *("bun", "but", "cab", "can", "cap", "car", "cat", "cob", "cod", "cog", "cop", "cot", "cub", "cup", "cut", "cue"),
)
# Clockwise from right, rows counted downwards.
DIRECTIONS = ("right", "right-down", "down", "left-down", "left", "left-up", "up", "right-up")
PLACES = ("left", "middle", "right")
TILTS = ("rising", "falling")
QUESTIONS = (
    *("reading", "numbers", "words", "odd-one", "counting", "texture", "chart"),
    *("motion", "order", "flashes", "ticker"),
    *("still-motion", "still-order", "still-flashes", "still-ticker", "page-reading", "still-board"),
)
CELL_NAMES = tuple(f"cell{number}" for number in range(MOST_CELLS))
WORDS = tuple(dict.fromkeys((*SPECIAL, *DIGITS, "blank", *CELL_NAMES, *SHORT_WORDS, *DIRECTIONS, *PLACES, *TILTS)))
WORDS = (*WORDS, *(f"question-{name}" for name in QUESTIONS))
TOKEN = {word: number for number, word in enumerate(WORDS)}


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[len(values)] on the device; made once, as a copy makes a GPU wait."""
    return torch.tensor(values, device=device)


def words(text: tuple[str, ...] | str, device: torch.device) -> torch.Tensor:
    """Ids of words, or of the characters of a string: int64 [len(text)]."""
    return constant(tuple(TOKEN[word] for word in text), device)


@dataclass(frozen=True)
class Batch:
    """frames uint8 [B, T, H, W, 3], T = 1 for images; question int64 [B, Q]; answer int64 [B, A]; level int64 [B, S]:
    the difficulty of each token at the places `scored` of the task; NOT_SCORED: learned, but not counted."""

    frames: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor
    level: torch.Tensor


class CellTask:
    """Base of the tasks, which are frozen dataclasses with at least these fields.

    name: of the task; frames: T; answers: words for each cell; chance: accuracy without eyes.
    size: side of the image in pixels; cells: along a side, or for tasks of rows their number. The defaults are such
        that what is drawn lies across borders of tokens.
    """

    name: ClassVar[str]
    frames: ClassVar[int] = 1
    answers: ClassVar[int] = 1
    chance: ClassVar[float]
    size: int
    cells: int

    @property
    def count(self) -> int:
        """C"""
        return self.cells**2

    @property
    def cell(self) -> int:
        """Side of a cell in pixels; what is left over is empty."""
        return self.size // self.cells

    @property
    def side(self) -> int:
        """Of the image as it is seen, pixels."""
        return self.size

    @property
    def duration(self) -> int:
        """Frames of the video as it is seen; 1 for an image."""
        return self.frames

    @property
    def hard(self) -> tuple[int, ...]:
        """Levels of which the image of half the sides has lost some of what the full one shows."""
        raise NotImplementedError

    question_length: ClassVar[int] = 1

    @property
    def asked(self) -> int:
        """Of how many cells, or rows of them, the answer tells."""
        return self.count

    @property
    def answer_length(self) -> int:
        return self.asked * (1 + self.answers)

    @property
    def scored(self) -> tuple[int, ...]:
        """Places in the answer that may count."""
        return tuple(place for place in range(self.answer_length) if place % (1 + self.answers))

    def check(self, fits: bool, needs: str) -> None:
        """Raises UserError for cells that are too many, or do not hold what is drawn."""
        if self.count > MOST_CELLS or not fits:
            raise UserError(
                f"{self.name}: there may be at most {MOST_CELLS} cells, and each must hold {needs}, got {self.cells} "
                f"cells along {self.size} px"
            )

    def corners(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Top and left of each cell in pixels, int64 [C] twice."""
        number = torch.arange(self.count, device=device)
        return number // self.cells * self.cell, number % self.cells * self.cell

    def batch(self, frames: torch.Tensor, said: torch.Tensor, level: torch.Tensor) -> Batch:
        """frames uint8 [B, T, H, W, 3]; said, ids of the answers, int64 [B, C, A]; level int64 [B, C] or [B, C, A]."""
        count, device = len(frames), frames.device
        names = words(CELL_NAMES[: self.asked], device).expand(count, -1)[..., None]
        level = level[..., None].expand(said.shape) if level.ndim == 2 else level
        question = words((f"question-{self.name}",), device).expand(count, -1)
        return Batch(frames, question, torch.cat([names, said], dim=2).flatten(1), level.flatten(1))
