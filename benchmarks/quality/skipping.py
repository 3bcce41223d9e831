"""Variants with fewer visual tokens than `x4` or `exact`: by skipping, and by the usual ways at about as many tokens.

    x4-skip          cells that a kept cell already shows with 38 dB are left out before the vision tower
    x4-evs           as many are left out after the tower: those that differ least from the step before (EVS-like)
    x4-slow          a lower frame rate, at about as many tokens
    x4-small         a lower max_pixels, at about as many tokens
    x4-skip-ring     x4-skip, and the neighbours of kept cells in their step
    x4-skip-refresh  x4-skip, and all cells of every fourth step
    x4-skip-age      x4-skip, and a token says for how many steps it stands, by as many more floats
    x4-third         all cells of every third step: a digit of `still-board` is seen once, not three times
    x4-skip-half     x4-skip, but half of the training samples keep all cells
    x4-skip-most     x4-skip, but a fifth of the training samples keep all cells
    x4-skip-then-all x4-skip, but all training samples of the last sixth of the steps keep all cells
    exact-skip       as x4-skip, but of the cells of `exact`, a quarter as large

x4-skip-half, x4-skip-most and x4-skip-then-all are tested as x4-skip is. All that leave out cells are also tested with
all of them.

Samples of a batch keep different cells. To train in one shape, the tokens of all cells are there and those left out are
masked: no token attends to them. That computes what leaving them out computes (a test compares the two), in the time of
all tokens.

Letters used for shapes:

    B        samples
    t r c    steps, rows and columns of cells; n = r * c
    N K      tokens of a sample, t * n * 4; floats of a token
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.quality.tasks.cells import CellTask
from benchmarks.quality.variants import FRAMES, MERGE, Encoder, Variant, make_variant
from dct_qwen2vl.dct.configuration_dct import DCTConfig
from dct_qwen2vl.dct.skipping_dct import SKIP_DB, error_weights, squared_error

BASE = "x4"
CELL_TOKENS = MERGE**2
REFRESH = 4  # steps
THIRD = 3  # steps
AGED = "x4-skip-age"
MIXED = {"x4-skip-half": 0.5, "x4-skip-most": 0.8}  # share of the training samples that leave out cells
THEN_ALL = "x4-skip-then-all"
LAST = 1 / 6  # of the steps
EXACT = "exact-skip"
LEFT_OUT = ("x4-skip", "x4-evs", "x4-skip-ring", "x4-skip-refresh", "x4-third", AGED, *MIXED, THEN_ALL, EXACT)
REDUCED = ("x4-slow", "x4-small")
NAMES = (*LEFT_OUT, *REDUCED)


@dataclass(frozen=True)
class Kept:
    """Which cells the parts of a model see, bool [B, t * n]: the vision tower, the language model."""

    tower: torch.Tensor
    language: torch.Tensor

    def __getitem__(self, chosen: slice) -> "Kept":
        return Kept(self.tower[chosen], self.language[chosen])


def share_left_out(name: str, done: float) -> float:
    """Of the samples of a training step, those of which a variant leaves out cells.

    name: Of LEFT_OUT.
    done: Share of the steps that were made before.
    """
    return float(done < 1 - LAST) if name == THEN_ALL else MIXED.get(name, 1.0)


class CellRule:
    """`skipping_dct.kept_cells` for batches of samples of one shape, on any device.

    config: format of the tokens. grid: (t, h, w), of tokens.
    """

    def __init__(self, config: DCTConfig, grid: tuple[int, int, int], device: torch.device | str) -> None:
        self.shape = (grid[0], grid[1] // MERGE, grid[2] // MERGE)
        self.weights = error_weights(config).to(device)
        kept = torch.tensor(config.kept, device=device)
        self.means = (kept % math.prod(config.block) == 0).float()  # 1 where a plane's mean stands
        self.limit = squared_error(SKIP_DB)

    def cells(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, K] -> [B, t, n, 4, K]. What follows the coefficients in a token is not read."""
        return tokens[..., : len(self.weights)].float().unflatten(1, (self.shape[0], -1, CELL_TOKENS))

    def error(self, cells: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Of the worst block where the others are shown: [..., 4, K] -> [...]"""
        return ((cells - others).square_() @ self.weights).amax(-1)

    @torch.no_grad()
    def kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [B, t, n]"""
        cells = self.cells(tokens)
        first = self._shown_first(cells[:, 0])
        kept = torch.ones(cells.shape[:3], dtype=torch.bool, device=tokens.device)
        kept[:, 0] = first == torch.arange(first.shape[1], device=tokens.device)
        shown = _chosen(cells[:, 0], first)
        for step in range(1, self.shape[0]):
            kept[:, step] = self.error(cells[:, step], shown) >= self.limit
            shown = torch.where(kept[:, step, :, None, None], cells[:, step], shown)
        return kept

    def _shown_first(self, cells: torch.Tensor) -> torch.Tensor:
        """Rule S: number of the cell of the first step that each shows, int64 [B, n]."""
        _, rows, columns = self.shape
        flat = self.error(cells, cells.mean(2, keepdim=True) * self.means) < self.limit
        shown = torch.arange(rows * columns, device=cells.device).repeat(len(cells), 1)
        own = torch.arange(rows * columns, device=cells.device).view(rows, columns)
        for row in range(1, rows):
            self._copy(shown, own[row, :1], columns, cells, flat)
        for column in range(1, columns):
            self._copy(shown, own[:, column], 1, cells, flat)
        return shown

    def _copy(
        self, shown: torch.Tensor, places: torch.Tensor, back: int, cells: torch.Tensor, flat: torch.Tensor
    ) -> None:
        """At these places, shows what the place `back` before shows, where that is flat and about the same."""
        other = shown[:, places - back]
        same = self.error(cells[:, places], _chosen(cells, other)) < self.limit
        shown[:, places] = torch.where(same & flat.gather(1, other), other, places)

    @torch.no_grad()
    def changed(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The first step and the cells that differ most from the step before, bool [B, t, n].

        counts: int64 [B], of cells of a sample; at least those of the first step are kept.
        """
        cells = self.cells(tokens)
        steps, places = cells.shape[1:3]
        kept = torch.ones(cells.shape[:3], dtype=torch.bool, device=tokens.device)
        if steps > 1:
            errors = self.error(cells[:, 1:], cells[:, :-1]).flatten(1)
            rank = errors.argsort(dim=1, descending=True).argsort(dim=1)
            kept[:, 1:] = (rank < counts[:, None] - places).unflatten(1, (steps - 1, places))
        return kept


def _chosen(cells: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[B, n, 4, K] by numbers int64 [B, m] -> [B, m, 4, K]"""
    return cells[torch.arange(len(cells), device=cells.device)[:, None], numbers]


def with_ring(kept: torch.Tensor) -> torch.Tensor:
    """And the eight neighbours of each: bool [B, t, r, c] -> same."""
    planes = kept.flatten(0, 1)[:, None].float()
    return torch.nn.functional.max_pool2d(planes, 3, stride=1, padding=1)[:, 0].bool().view(kept.shape)


def steps_shown(kept: torch.Tensor) -> torch.Tensor:
    """For how many steps a cell stands, itself included: until the next kept one at its place. bool [B, t, n] -> int64,
    same shape. Of cells that are not kept it means nothing."""
    steps = kept.shape[1]
    shown, following = torch.empty_like(kept, dtype=torch.long), torch.full_like(kept[:, 0], steps, dtype=torch.long)
    for step in reversed(range(steps)):
        shown[:, step] = following - step
        following = torch.where(kept[:, step], step, following)
    return shown


class SkippingEncoder(Encoder):
    """`x4`, or `exact`, with a choice of cells. name: of LEFT_OUT."""

    def __init__(self, name: str, base: Variant, task: CellTask, device: torch.device | str) -> None:
        super().__init__(base, (task.side, task.side), task.duration, device)
        self.name, self.rule = name, CellRule(base.config, self.grid, self.device)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, N, K], of `x4-skip-age` [B, N, K + t]"""
        tokens = super().encode(frames)
        if self.name != AGED:
            return tokens
        ages = steps_shown(self.rule.kept(tokens)).flatten(1).repeat_interleave(CELL_TOKENS, dim=1)
        return torch.cat([tokens, torch.nn.functional.one_hot(ages - 1, self.grid[0])], dim=-1)

    def in_patch(self, patch: int, floats: int) -> torch.Tensor:
        shown = super().in_patch(patch, floats)
        return torch.nn.functional.pad(shown, (0, floats - len(shown)))

    def choose(self, tokens: torch.Tensor) -> Kept:
        """tokens: float [B, N, K]."""
        kept = self.rule.kept(tokens)
        if self.name == "x4-evs":
            return Kept(torch.ones_like(kept).flatten(1), self._late(tokens, kept).flatten(1))
        if self.name == "x4-skip-ring":
            kept = with_ring(kept.unflatten(2, self.rule.shape[1:])).flatten(2)
        if self.name == "x4-skip-refresh":
            kept[:, ::REFRESH] = True
        if self.name == "x4-third":
            kept = torch.zeros_like(kept)
            kept[:, ::THIRD] = True
        return Kept(kept.flatten(1), kept.flatten(1))

    def _late(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """As many cells as `kept`, for EVS; of an image, which has no step before, the same ones."""
        return kept if self.still else self.rule.changed(tokens, kept.flatten(1).sum(1))


class ReducedEncoder(Encoder):
    """`x4` on fewer frames or smaller ones. share: of the tokens, that about remain. name: of REDUCED."""

    def __init__(self, name: str, base: Variant, task: CellTask, device: torch.device | str, share: float) -> None:
        step = base.pixels_of_token * MERGE
        self.frames, self.size = None, None
        if name == "x4-slow":
            if task.duration == 1:
                raise ValueError(f"variant {name} needs a video, task {task.name} has images")
            steps = max(1, round(share * task.duration / FRAMES))
            middles = (torch.arange(FRAMES * steps) + 0.5) * task.duration / (FRAMES * steps)
            self.frames = middles.long().to(device)
        else:
            self.size = tuple(side * step for side in nearest_grid(share * (task.side // step) ** 2))
        frames = len(self.frames) if self.frames is not None else task.duration
        super().__init__(base, self.size or (task.side, task.side), frames, device)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        frames = frames.to(self.device)
        if self.frames is not None:
            return super().encode(frames[:, self.frames])
        planes = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(
            planes, size=self.size, mode="bicubic", antialias=True, align_corners=False
        )
        small = small.round().clamp(0, 255).to(torch.uint8)
        return super().encode(small.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2]))


def nearest_grid(cells: float) -> tuple[int, int]:
    """Rows and columns, as many or one more, of the grid whose number of cells is nearest."""
    rows = max(1, math.isqrt(int(cells)))
    grids = ((rows, rows), (rows, rows + 1), (rows + 1, rows + 1))
    return min(grids, key=lambda grid: abs(math.prod(grid) - cells))


def make_encoder(
    name: str,
    task: CellTask,
    device: torch.device | str,
    patch: int,
    weight: torch.Tensor | None,
    fit_frames: Callable[[], Iterable[torch.Tensor]],
) -> Encoder:
    """The encoder of a variant, also of those of this file. weight: see `make_variant`. fit_frames: gives the images on
    which variants are measured."""
    if name not in NAMES:
        return Encoder(make_variant(name, patch, weight), (task.side, task.side), task.duration, device)
    base = make_variant("exact" if name == EXACT else BASE, patch)
    if name in LEFT_OUT:
        return SkippingEncoder(name, base, task, device)
    return ReducedEncoder(name, base, task, device, kept_share("x4-skip", base, task, device, fit_frames()))


def kept_share(
    name: str, base: Variant, task: CellTask, device: torch.device | str, batches: Iterable[torch.Tensor]
) -> float:
    """Of the cells of uint8 frames [B, T, H, W, 3], those that a variant's language model sees."""
    encoder = SkippingEncoder(name, base, task, device)
    return torch.cat([encoder.choose(encoder.encode(frames)).language for frames in batches]).float().mean().item()
