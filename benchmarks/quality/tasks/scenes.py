"""Tasks of images without print: counting, fine textures, charts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.quality.tasks.cells import DIGITS, TILTS, Batch, CellTask, constant, words
from benchmarks.quality.tasks.drawing import Backgrounds, Random, compose, discs, ink_on, paint
from benchmarks.quality.tasks.reading import Tools


class SceneTask(CellTask):
    """Drawn on backgrounds, without glyphs."""

    def prepare(self, device: torch.device | str) -> Tools:
        """What `draw` needs, made once."""
        return (Backgrounds((self.side, self.side), device),)

    def finish(self, tools: Tools, random: Random, coverage: torch.Tensor) -> torch.Tensor:
        """Coverage [B, T, H, W] in ink on backgrounds, with grain: uint8 [B, T, H, W, 3]."""
        ground, lightness = tools[-1].draw(random, len(coverage))
        return compose(random, ground, coverage, ink_on(random, lightness), self.noise)

    def by_cell(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each cell, [B, C], -> for each pixel, [B, H, W]."""
        grid = values.unflatten(1, (self.cells, self.cells))
        return grid.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)


@dataclass(frozen=True)
class Counting(SceneTask):
    """How many dots, 1 to 9, are in each cell? They lie on some of 5 x 5 places, a little off.

    diameters: of the dots, in pixels; all dots of a cell are equal.
    """

    name: ClassVar[str] = "counting"
    chance: ClassVar[float] = 1 / 9
    places: ClassVar[int] = 5
    size: int = 112
    cells: int = 3
    diameters: tuple[int, ...] = (2, 3, 4)
    noise: float = 6.0

    def __post_init__(self) -> None:
        self.check(self.cell // self.places >= max(self.diameters) + 3, f"5 x 5 dots of {max(self.diameters)} px")

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(diameter for diameter in self.diameters if diameter <= 3) or self.diameters

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device, dots, pitch = random.device, self.places**2, self.cell // self.places
        number = random.integers(9, count, self.count) + 1
        diameter = constant(self.diameters, device)[random.integers(len(self.diameters), count, self.count)]
        rank = random.permutations(count * self.count, dots).view(count, self.count, dots)
        place = torch.arange(dots, device=device)
        top, left = self.corners(device)
        off = random.uniform(-0.5, 0.5, 2, count, self.count, dots)
        y = top[:, None] + (place // self.places + 0.5) * pitch + off[0]
        x = left[:, None] + (place % self.places + 0.5) * pitch + off[1]
        radius = (diameter / 2)[..., None].expand(y.shape)
        masks, first_row, first_column = discs(*(part.flatten(1) for part in (y, x, radius)), max(self.diameters))
        coverage = torch.zeros(count, self.size, self.size, device=device)
        paint(coverage, masks * (rank < number[..., None]).flatten(1)[..., None, None], first_row, first_column)
        frames = self.finish(tools, random, coverage[:, None])
        return self.batch(frames, words(DIGITS, device)[number][..., None], diameter)


@dataclass(frozen=True)
class Texture(SceneTask):
    """Do the fine stripes of each cell rise or fall to the right? By 45 degrees, give or take 15.

    periods: of the stripes, in pixels. Below 4 they are near the limit of an image of half the sides, or beyond: at 45
        degrees it shows none below 2.8, along an axis none below 4.
    """

    name: ClassVar[str] = "texture"
    chance: ClassVar[float] = 1 / 2
    size: int = 112
    cells: int = 7
    periods: tuple[int, ...] = (3, 4, 5, 6, 8)
    noise: float = 6.0

    def __post_init__(self) -> None:
        fits = self.size % self.cells == 0 and self.cell >= 2 * max(self.periods)
        self.check(fits, f"two stripes of {max(self.periods)} px, and divide the image")

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(period for period in self.periods if period <= 4) or self.periods

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        falls = random.integers(2, count, self.count)
        period = constant(self.periods, device)[random.integers(len(self.periods), count, self.count)]
        angle = random.uniform(math.radians(30), math.radians(60), count, self.count)
        phase = random.uniform(0, 2 * math.pi, count, self.count)
        sign = torch.where(falls.bool(), -1.0, 1.0)
        row_rate, column_rate = 2 * math.pi * angle.sin() / period, 2 * math.pi * angle.cos() * sign / period
        place = torch.arange(self.size, device=device, dtype=torch.float32)
        wave = self.by_cell(row_rate) * place[:, None] + self.by_cell(column_rate) * place + self.by_cell(phase)
        frames = self.finish(tools, random, (0.35 + 0.35 * wave.sin())[:, None])
        return self.batch(frames, words(TILTS, device)[falls][..., None], period)


@dataclass(frozen=True)
class Chart(SceneTask):
    """How high is each bar of a chart? 00 to 49; lines at every ten, the first at the foot. A cell is a bar.

    cells: bars. units: pixels of one, the same in an image.
    """

    name: ClassVar[str] = "chart"
    chance: ClassVar[float] = (1 / 5 + 1 / 10) / 2
    answers: ClassVar[int] = 2
    foot: ClassVar[int] = 10  # pixels below the bars
    size: int = 112
    cells: int = 7
    units: tuple[int, ...] = (1, 2)
    noise: float = 6.0

    def __post_init__(self) -> None:
        fits = self.size % self.cells == 0 and 50 * max(self.units) + self.foot <= self.size
        self.check(fits, f"a bar of 50 x {max(self.units)} px, and divide the image")

    @property
    def count(self) -> int:
        return self.cells

    @property
    def hard(self) -> tuple[int, ...]:
        return tuple(unit for unit in self.units if unit <= 1) or self.units

    def draw(self, tools: Tools, random: Random, count: int) -> Batch:
        device = random.device
        value = random.integers(50, count, self.cells)
        unit = constant(self.units, device)[random.integers(len(self.units), count, 1)]
        above = self.size - self.foot - 1 - torch.arange(self.size, device=device)  # rows above the foot
        column = torch.arange(self.size, device=device)
        bar, within = column // self.cell, column % self.cell
        filled = (above >= 0)[:, None] & (above[:, None] < (value * unit)[:, None, bar])
        filled &= (within >= self.cell // 5) & (within < self.cell * 4 // 5)
        line = (above % (10 * unit) == 0) & (above >= 0) & (above <= 50 * unit)
        coverage = torch.maximum(filled.float(), 0.5 * line[:, :, None].float())
        frames = self.finish(tools, random, coverage[:, None])
        said = words(DIGITS, device)[torch.stack([value // 10, value % 10], dim=2)]
        return self.batch(frames, said, unit.expand(-1, self.cells))
