"""Tasks of videos: motion, order of events, flashes, a ticker."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.quality.tasks.cells import DIGITS, DIRECTIONS, PLACES, Batch, constant, words
from benchmarks.quality.tasks.drawing import GlyphAtlas, Random, discs, paint
from benchmarks.quality.tasks.reading import SMALL, Tools
from benchmarks.quality.tasks.scenes import SceneTask

DOTS = 6  # of a moving group


@dataclass(frozen=True)
class Motion(SceneTask):
    """Whereto, of eight directions, and how fast does the group of dots in each cell move? The speed is named by its
    place among `speeds`, in pixels per frame."""

    name: ClassVar[str] = "motion"
    frames: ClassVar[int] = 8
    answers: ClassVar[int] = 2
    size: int = 84
    cells: int = 2
    speeds: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    noise: float = 6.0

    def __post_init__(self) -> None:
        self.check(max(self.speeds) * (self.frames - 1) + 16 <= self.cell, f"paths at {max(self.speeds)} px a frame")

    @property
    def chance(self) -> float:
        return (1 / len(DIRECTIONS) + 1 / len(self.speeds)) / 2

    @property
    def hard(self) -> tuple[int, ...]:
        """Levels are places among `speeds`."""
        return tuple(place for place, speed in enumerate(self.speeds) if speed <= 1) or tuple(range(len(self.speeds)))

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        direction = random.integers(len(DIRECTIONS), count, self.count)
        fast = random.integers(len(self.speeds), count, self.count)
        angle, speed = direction * (2 * math.pi / len(DIRECTIONS)), constant(self.speeds, device)[fast]
        top, left = (corner[:, None] + self.cell / 2 for corner in self.corners(device))
        spread = random.uniform(-6, 6, 2, count, self.count, DOTS)
        radius = random.uniform(1, 2, count, self.count, DOTS)
        coverage = torch.zeros(count, self.frames, self.size, self.size, device=device)
        for frame in range(self.frames):
            way = (frame - (self.frames - 1) / 2) * speed
            y = top + (way * angle.sin())[..., None] + spread[0]
            x = left + (way * angle.cos())[..., None] + spread[1]
            paint(coverage[:, frame], *discs(*(part.flatten(1) for part in (y, x, radius)), 4))
        frames = self.finish(tools, random, coverage)
        said = torch.stack([words(DIRECTIONS, device)[direction], words(DIGITS, device)[fast]], dim=2)
        return self.batch(frames, said, fast)


@dataclass(frozen=True)
class Order(SceneTask):
    """In which order do the three dots of each cell appear? gaps: frames from one to the next."""

    name: ClassVar[str] = "order"
    frames: ClassVar[int] = 8
    answers: ClassVar[int] = 3
    chance: ClassVar[float] = 1 / 3
    size: int = 84
    cells: int = 4
    gaps: tuple[int, ...] = (1, 2, 3)
    noise: float = 6.0

    def __post_init__(self) -> None:
        self.check(2 * max(self.gaps) < self.frames and self.cell >= 21, f"dots {max(self.gaps)} frames apart")

    @property
    def hard(self) -> tuple[int, ...]:
        """Those below the two frames of a token."""
        return tuple(gap for gap in self.gaps if gap < 2) or self.gaps

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        order = random.permutations(count * self.count, 3).view(count, self.count, 3)  # places by time
        gap = constant(self.gaps, device)[random.integers(len(self.gaps), count, self.count)]
        start = (random.uniform(0, 1, count, self.count) * (self.frames - 2 * gap)).long().clamp_min(1)
        onset = (start[..., None] + order.argsort(dim=2) * gap[..., None]).flatten(1)  # by place
        top, left = self.corners(device)
        y = (top[:, None] + self.cell / 2).expand(count, -1, 3) + random.uniform(-4, 4, count, self.count, 1)
        x = left[:, None] + self.cell * (torch.arange(3, device=device) + 0.5) / 3 + random.uniform(-1, 1, *y.shape)
        masks, row, column = discs(y.flatten(1), x.flatten(1), torch.full_like(x, 2.0).flatten(1), 4)
        coverage = torch.zeros(count, self.frames, self.size, self.size, device=device)
        for frame in range(self.frames):
            paint(coverage[:, frame], masks * (frame >= onset)[..., None, None], row, column)
        frames = self.finish(tools, random, coverage)
        return self.batch(frames, words(PLACES, device)[order], gap)


@dataclass(frozen=True)
class Flashes(SceneTask):
    """How often, 0 to 7 times, does the dot of each cell flash? A flash lasts one frame. diameters: of dots, pixels."""

    name: ClassVar[str] = "flashes"
    frames: ClassVar[int] = 16
    chance: ClassVar[float] = 1 / 8
    size: int = 56
    cells: int = 3
    diameters: tuple[int, ...] = (2, 3, 4, 6)
    noise: float = 6.0

    def __post_init__(self) -> None:
        self.check(max(self.diameters) + 8 <= self.cell, f"dots of {max(self.diameters)} px")

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(diameter for diameter in self.diameters if diameter <= 3) or self.diameters

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device, slots = random.device, self.frames // 2
        number = random.integers(slots, count, self.count)
        diameter = constant(self.diameters, device)[random.integers(len(self.diameters), count, self.count)]
        chosen = random.permutations(count * self.count, slots).view(count, self.count, slots) < number[..., None]
        late = random.integers(2, count, self.count, 1).bool()  # flashes are in the odd frames, or in the even ones
        lit = torch.stack([chosen & ~late, chosen & late], dim=3).flatten(2)
        top, left = (corner + self.cell / 2 for corner in self.corners(device))
        off = random.uniform(-4, 4, 2, count, self.count)
        masks, row, column = discs(top + off[0], left + off[1], diameter / 2, max(self.diameters))
        coverage = torch.zeros(count, self.frames, self.size, self.size, device=device)
        for frame in range(self.frames):
            paint(coverage[:, frame], masks * lit[:, :, frame, None, None], row, column)
        frames = self.finish(tools, random, coverage)
        return self.batch(frames, words(DIGITS, device)[number][..., None], diameter)


@dataclass(frozen=True)
class Ticker(SceneTask):
    """Reads six digits that run from right to left through a window in which some of them fit. A cell is a line.

    cells: lines. heights: of the digits in pixels. speed: pixels per frame.
    """

    name: ClassVar[str] = "ticker"
    frames: ClassVar[int] = 8
    answers: ClassVar[int] = 6
    chance: ClassVar[float] = 1 / len(DIGITS)
    size: int = 84
    cells: int = 4
    heights: tuple[int, ...] = (5, 6, 7, 8, 9, 10)
    speed: float = 4.0
    noise: float = 6.0

    def __post_init__(self) -> None:
        self.check(max(self.heights) + 4 <= self.cell, f"digits of {max(self.heights)} px")

    @property
    def count(self) -> int:
        return self.cells

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(height for height in self.heights if height <= SMALL) or self.heights

    def prepare(self, device: torch.device | str) -> Tools:
        return GlyphAtlas(DIGITS, self.heights, device), *super().prepare(device)

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        atlas, device = tools[0], random.device
        digits = random.integers(len(DIGITS), count, self.cells, self.answers)
        height = random.integers(len(self.heights), count, self.cells, 1)
        pixels = constant(self.heights, device)[height]
        height = height.expand(digits.shape)
        advance = atlas.widths[digits, height]
        before, whole = advance.cumsum(dim=2) - advance, advance.sum(dim=2, keepdim=True)
        # As wide as needed for the first digit to be whole at the start and the last at the end.
        window = (whole - self.speed * (self.frames - 1)).clamp_min(0) + 2 * pixels
        start = random.uniform(0, 1, count, self.cells, 1) * (self.size - window - 2) + 1
        line = torch.arange(self.cells, device=device)[:, None] * self.cell
        y = line + 1 + random.uniform(0, 1, count, self.cells, 1) * (self.cell - 2 - pixels)
        coverage = torch.zeros(count, self.frames, self.size, self.size, device=device)
        column = torch.arange(self.size, device=device)  # and rows: images are square
        row = (column // self.cell).clamp_max(self.cells - 1)  # the line that a row of pixels belongs to
        visible = ((column >= start) & (column < start + window))[:, row]
        for frame in range(self.frames):
            x = start + 1 + before - self.speed * frame
            shown = x > -atlas.side  # beyond the image there is nothing to draw
            masks, top, left = atlas.place(digits, height, y.expand(x.shape), x)
            masks, top, left = (part.flatten(1, 2) for part in (masks * shown[..., None, None], top, left))
            paint(coverage[:, frame], masks, top, left)
        frames = self.finish(tools, random, coverage * visible[:, None])
        return self.batch(frames, words(DIGITS, device)[digits], pixels.expand(digits.shape))
