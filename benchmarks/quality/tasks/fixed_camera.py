"""Tasks for skipping: what happens, happens in a part of the frame and for a while; a page has margins.

The video tasks, before a fixed camera: an event in a window of a longer and larger video of a still photograph, under a
sensor's noise. And reading on a page: digits in a part of white paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.quality.tasks.cells import DIGITS, NOT_SCORED, TOKEN, Batch, constant, words
from benchmarks.quality.tasks.drawing import GlyphAtlas, Random, compose, ink_on, paint
from benchmarks.quality.tasks.reading import SMALL, Reading, Tools
from benchmarks.quality.tasks.scenes import SceneTask
from benchmarks.quality.tasks.videos import Flashes, Motion, Order, Ticker
from dct_qwen2vl.common.scripts import UserError

START_STEP = 4  # frames; events begin at a multiple of it


def placed(part: torch.Tensor, side: int) -> torch.Tensor:
    """Coverage [B, T, s, s] in larger frames, a third of the margin above and left of it: [B, T, side, side].

    The place is not random: models find what happens where the question names it, as in the other tasks.
    """
    margin = side - part.shape[-1]
    first, last = margin // 3, margin - margin // 3
    return torch.nn.functional.pad(part, (first, last, first, last))


class FixedCamera(SceneTask):
    """Base of these video tasks; `size` and `frames` are those of the event, of which a video shows one.

    whole: side of a frame, pixels.
    seconds: half frames of the video, at two frames a second.
    noise: standard deviation of the sensor's noise, of 255, independent in every pixel, colour and frame.
    stays: what the event has drawn stays afterwards.
    """

    stays: ClassVar[bool] = False
    size: int
    whole: int
    seconds: int
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_video()

    def check_video(self) -> None:
        """Raises UserError for a video that does not hold the event."""
        if self.whole < self.size or self.duration < self.frames:
            raise UserError(
                f"{self.name}: a video of {self.duration} frames of {self.whole} px must hold an event of "
                f"{self.frames} frames of {self.size} px"
            )

    @property
    def side(self) -> int:
        return self.whole

    @property
    def duration(self) -> int:
        return 2 * self.seconds

    def finish(self, tools: Tools, random: Random, coverage: torch.Tensor) -> torch.Tensor:
        """Coverage [B, T, s, s] of the event -> uint8 [B, duration, whole, whole, 3]."""
        covered = placed(self._in_time(coverage, random), self.whole)
        ground, lightness = self.ground(tools, random, len(covered))
        ink = ink_on(random, lightness)
        mixed = torch.lerp(ground[:, None], ink[:, None, None, None], covered[..., None])
        mixed += self.noise * random.normal(*mixed.shape)
        return mixed.round_().clamp_(0, 255).to(torch.uint8)

    def ground(self, tools: Tools, random: Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands still: float32 [B, whole, whole, 3], and its lightness [B]."""
        return tools[-1].draw(random, count)

    def _in_time(self, coverage: torch.Tensor, random: Random) -> torch.Tensor:
        """The event begins at some time: [B, T, s, s] -> [B, duration, s, s]."""
        count, frames = coverage.shape[:2]
        begin = START_STEP * random.integers((self.duration - frames) // START_STEP + 1, count)
        since = torch.arange(self.duration, device=coverage.device) - begin[:, None]
        seen = (since >= 0) & ((since < frames) | self.stays)
        sample = torch.arange(count, device=coverage.device)[:, None]
        return coverage[sample, since.clamp(0, frames - 1)] * seen[..., None, None]


@dataclass(frozen=True)
class StillMotion(FixedCamera, Motion):
    """`Motion` of groups that are seen for 8 frames of the video."""

    name: ClassVar[str] = "still-motion"
    whole: int = 112
    seconds: int = 12
    noise: float = 2.0


@dataclass(frozen=True)
class StillOrder(FixedCamera, Order):
    """`Order` of dots that appear within 8 frames of the video, and stay."""

    name: ClassVar[str] = "still-order"
    stays: ClassVar[bool] = True
    cells: int = 3
    whole: int = 112
    seconds: int = 12
    noise: float = 2.0


@dataclass(frozen=True)
class StillFlashes(FixedCamera, Flashes):
    """`Flashes` within 16 frames of the video."""

    name: ClassVar[str] = "still-flashes"
    cells: int = 2
    whole: int = 112
    seconds: int = 12
    noise: float = 2.0


@dataclass(frozen=True)
class StillTicker(FixedCamera, Ticker):
    """`Ticker` that runs for 8 frames of the video."""

    name: ClassVar[str] = "still-ticker"
    whole: int = 112
    seconds: int = 12
    noise: float = 2.0


@dataclass(frozen=True)
class StillBoard(FixedCamera):
    """Reads a board of one colour, each cell of which shows four digits one after the other, for three time steps each.
    Some are blank: with these a model learns where and when to look.

    heights: of the digits in pixels. blank: share of them that are not shown.
    """

    name: ClassVar[str] = "still-board"
    frames: ClassVar[int] = 24
    answers: ClassVar[int] = 4
    chance: ClassVar[float] = 1 / len(DIGITS)
    size: int = 48
    cells: int = 2
    heights: tuple[int, ...] = (6, 7, 8, 10, 12, 14, 16)
    blank: float = 0.3
    whole: int = 112
    seconds: int = 12
    noise: float = 2.0

    def __post_init__(self) -> None:
        self.check(max(self.heights) + 4 <= self.cell, f"digits of {max(self.heights)} px")
        self.check_video()

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(height for height in self.heights if height <= SMALL) or self.heights

    def prepare(self, device: torch.device | str) -> Tools:
        return GlyphAtlas(DIGITS, self.heights, device), *super().prepare(device)

    def ground(self, tools: Tools, random: Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        ground, lightness = super().ground(tools, random, count)
        board = slice(begin := (self.whole - self.size) // 3, begin + self.size)
        ground[:, board, board] = lightness[:, None, None, None]
        return ground, lightness

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        atlas, device = tools[0], random.device
        digits = random.integers(len(DIGITS), self.answers, count, self.count)
        height = random.integers(len(self.heights), count, self.count)
        filled = random.uniform(0, 1, *digits.shape) >= self.blank
        pixels, widest = constant(self.heights, device)[height], atlas.widths.amax(0)[height]
        top, left = self.corners(device)
        y = top + 1 + random.uniform(0, 1, count, self.count) * (self.cell - 2 - pixels)
        x = left + 1 + random.uniform(0, 1, count, self.count) * (self.cell - 2 - widest)
        coverage = torch.zeros(count, self.answers, self.size, self.size, device=device)
        for turn, (digit, shown) in enumerate(zip(digits, filled)):
            masks, *corner = atlas.place(digit, height, y, x)
            paint(coverage[:, turn], masks * shown[..., None, None], *corner)
        frames = self.finish(tools, random, coverage.repeat_interleave(self.frames // self.answers, dim=1))
        said = torch.where(filled, words(DIGITS, device)[digits], TOKEN["blank"])
        level = torch.where(filled, pixels, NOT_SCORED)
        return self.batch(frames, said.permute(1, 2, 0), level.permute(1, 2, 0))


@dataclass(frozen=True)
class Page(Reading):
    """`Reading` in a part of a page of white paper, `whole` px high and wide."""

    name: ClassVar[str] = "page-reading"
    whole: int = 196
    noise: float = 0.0

    @property
    def side(self) -> int:
        return self.whole

    def finish(self, tools: Tools, random: Random, coverage: torch.Tensor) -> torch.Tensor:
        level = random.uniform(235, 255, len(coverage))
        paper = level[:, None, None, None].expand(-1, self.whole, self.whole, 3)
        return compose(random, paper, placed(coverage, self.whole), ink_on(random, level), self.noise)


TASKS = (StillMotion, StillOrder, StillFlashes, StillTicker, StillBoard, Page)
