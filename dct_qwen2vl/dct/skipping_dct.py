"""Which merge cells of a video or image need no token, because a kept cell already shows them.

The DCT is orthonormal, so the difference of two blocks' coefficients is the error of copying one over the other
(Parseval). A cell is left out where that error stays below a threshold. No model is involved.

    T  after the first step: the cell is about what its place has shown since its last kept cell
    S  in the first step, or in an image: the cell shows one colour, and its left neighbour shows the same

In column 0, S compares with the cell above. So a hole has one meaning: copy the place's last kept cell, and in the
first step the neighbour's. The top left cell of the first step is always kept. Whole later steps may keep nothing.

The file is saved beside converted checkpoints, with image_processing_dct.py.

Letters used for shapes in this file:

    t h w     the grid of blocks, as in transform_dct.py
    r c       rows and columns of cells: r = h/m, c = w/m
    B         blocks of a cell: m*m, 4 in Qwen2-VL
    N K       tokens, t*h*w; coefficients of a token
    M         cells that are kept
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .configuration_dct import DCTConfig

SKIP_DB = 38.0  # of a study: 36 saves more, 40 also keeps small and faint text
CHROMA_WEIGHT = 0.25  # of a squared difference in Cb or Cr, next to 1 in luma
NOISE_LIMIT_DB = 33.0  # the noise floor never lowers the quality below it
NOISE_SHARE = 0.125  # of the luma coefficients, those of the highest frequencies show the noise
NOISE_QUANTILE = 0.25  # of the cells of a step: the stillest quarter has noise and nothing else
FIRST_PART = 8  # the share of a token, as a divisor, that is compared first
CHUNK = 1 << 17  # numbers compared at once, which stay in a CPU's cache


def check_skip_db(skip_db: float) -> float:
    """The threshold as a float. Raises ValueError for what is no positive number of dB; infinity skips nothing."""
    value = float(skip_db)
    if math.isnan(value) or value <= 0:
        raise ValueError(f"skip_db must be a positive number of dB, such as {SKIP_DB:g}, got {skip_db}")
    return value


def squared_error(decibels: float) -> float:
    """Mean squared difference in levels of 0..255 at a PSNR in dB; 0 at infinity."""
    return 255**2 / 10 ** (decibels / 10)


@dataclass(frozen=True, eq=False)
class _Measures:
    """What turns differences of tokens into errors. Errors are mean squares of a block, in levels of 0..255.

    weights: float32 [K]. What the squared difference in each number of a token adds to a block's error.
    means: float32 [K], 1 for the numbers that hold the mean of a plane, else 0.
    highest: int64 [n], places in a token of the highest luma frequencies.
    noise: float32 [n]. What the squared differences there add to the error that white noise as strong gives a block.
    first: numbers of a token that are compared first.
    """

    weights: torch.Tensor
    means: torch.Tensor
    highest: torch.Tensor
    noise: torch.Tensor
    first: int


@lru_cache(maxsize=8)
def _measures(config: DCTConfig) -> _Measures:
    plane, ft, fy, fx = np.unravel_index(np.array(config.kept), (3, *config.block))
    size = math.prod(config.block)
    by_plane = np.where(plane == 0, 1.0, CHROMA_WEIGHT) / size
    squares = np.square(np.array(config.scale) * 255)
    luma = np.flatnonzero(plane == 0)
    frequency = (fy[luma] / config.block[1]) ** 2 + (fx[luma] / config.block[2]) ** 2
    highest = luma[np.argsort(-frequency, kind="stable")[: max(1, round(luma.size * NOISE_SHARE))]]
    return _Measures(
        weights=torch.from_numpy(by_plane * squares).float(),
        means=torch.from_numpy(ft + fy + fx == 0).float(),
        highest=torch.from_numpy(highest),
        noise=torch.from_numpy(squares[highest] * by_plane.sum() / highest.size).float(),
        first=max(1, config.num_coefficients // FIRST_PART),
    )


def error_weights(config: DCTConfig) -> torch.Tensor:
    """What the squared difference in each number of a token adds to the error of a block (`block_errors`), float32
    [K]."""
    return _measures(config).weights


def block_errors(tokens: torch.Tensor, others: torch.Tensor, config: DCTConfig) -> torch.Tensor:
    """Error of each block when the other one is shown in its place, float32 [N], in levels of 0..255, squared.

    tokens: float [N, K].
    others: float [N, K].
    config: The format of both.

    It is the mean squared difference of luma, plus a quarter of that of Cb and of Cr.
    """
    return (tokens.float() - others.float()).square_() @ _measures(config).weights


def kept_cells(
    tokens: torch.Tensor,
    grid_thw: tuple[int, int, int],
    config: DCTConfig,
    skip_db: float = SKIP_DB,
    noise_floor: bool = False,
) -> torch.Tensor:
    """Which merge cells of one image or video are kept, bool [t, r, c].

    tokens: float [N, K], in the order of `DCTTokenizer.encode`. On the CPU.
    grid_thw: (t, h, w), blocks.
    config: the format of the tokens.
    skip_db: dB. The error of a block that is copied is below that of this PSNR (`block_errors`).
    noise_floor: adds the noise between two steps to that error, up to the error of `NOISE_LIMIT_DB`.

    Raises ValueError if tokens and grid do not fit.
    """
    cells = _as_cells(tokens, grid_thw, config)
    kept = torch.ones(cells.shape[:3], dtype=torch.bool)
    limit, measures = squared_error(check_skip_db(skip_db)), _measures(config)
    if limit > 0:
        shown = _first_step(cells[0], limit, measures)  # number of the cell that each place shows, int64 [r, c]
        kept[0] = shown == torch.arange(shown.numel()).view_as(shown)
        _later_steps(cells.flatten(1, 2), shown.flatten(), kept.flatten(1, 2), limit, measures, noise_floor)
    return kept


def _later_steps(
    cells: torch.Tensor, shown: torch.Tensor, kept: torch.Tensor, limit: float, measures: _Measures, noise_floor: bool
) -> None:
    """Rule T, written into `kept` [t, n]. cells: [t, n, B, K]; shown: by each place in the first step, int64 [n]."""
    own, everything = torch.arange(len(shown)), cells.flatten(0, 1)
    for step in range(1, len(cells)):
        highest = _with_noise(cells[step], everything, shown, limit, measures) if noise_floor else limit
        torch.logical_not(_is_copy(cells[step], everything, shown, highest, measures), out=kept[step])
        shown = torch.where(kept[step], own + step * len(own), shown)


def keep_tokens(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tokens of the kept cells, [M * B, K], in the same order.

    tokens: [N, K], of all cells.
    kept: bool [t, r, c]. Cells that are kept.
    """
    return tokens.view(kept.numel(), -1, tokens.shape[-1])[kept.flatten()].flatten(0, 1)


def fill_tokens(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Inverse of `keep_tokens`: tokens of all cells, [N, K]. Cells that were left out get what they show.

    tokens: [M * B, K], of the kept cells.
    kept: bool [t, r, c]. Cells that were kept.

    Raises ValueError if the first cell was left out, or if the number of tokens does not fit.
    """
    count = int(kept.sum())
    if not kept.numel() or not kept[0, 0, 0] or len(tokens) % count:
        raise ValueError(
            f"{len(tokens)} tokens do not fit {count} kept cells of {list(kept.shape)}, the first one kept"
        )
    number = kept.flatten().cumsum(0) - 1  # of each kept cell among the kept
    return tokens.view(count, -1, tokens.shape[-1])[number[shown_cells(kept).flatten()]].flatten(0, 1)


def shown_cells(kept: torch.Tensor) -> torch.Tensor:
    """Number of the kept cell that each cell shows, int64 [t, r, c]. A kept cell shows itself.

    kept: bool [t, r, c].
    """
    own = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
    shown = torch.where(kept, own, -1)
    first = shown[0]  # a view
    first[:, 0] = first[:, 0].cummax(0).values
    first.copy_(first.cummax(1).values)
    return shown.cummax(0).values


def _as_cells(tokens: torch.Tensor, grid_thw: tuple[int, int, int], config: DCTConfig) -> torch.Tensor:
    """[N, K] -> float32 [t, r, c, B, K], a view where it can be one."""
    (t, h, w), m = grid_thw, config.merge
    if tokens.shape != (t * h * w, config.num_coefficients) or h % m or w % m or not len(tokens):
        raise ValueError(
            f"tokens of preset {config.name} for the grid {(t, h, w)} must be [{t * h * w}, {config.num_coefficients}] "
            f"in whole cells of {m} x {m}, got {list(tokens.shape)}"
        )
    return tokens.float().view(t, h // m, w // m, m * m, -1)


def _is_copy(
    cells: torch.Tensor, everything: torch.Tensor, other: torch.Tensor, limit: float, measures: _Measures
) -> torch.Tensor:
    """Whether others can be shown in place of `cells` [n, B, K]: the error of the worst block is below `limit`, bool
    [n]. everything: [all, B, K]; other: numbers of cells in it, int64 [n]. What is no number is no copy.

    Most cells that differ do so in the first numbers of a token, so that the others need not be read.
    """
    first = measures.first
    error = _errors(cells[..., :first], everything[..., :first], other, measures.weights[:first])
    copies = error.amax(1) < limit
    alike = copies.nonzero().flatten()
    if len(alike):
        if len(alike) < len(cells):
            cells, other, error = cells.index_select(0, alike), other[alike], error[alike]
        error += _errors(cells[..., first:], everything[..., first:], other, measures.weights[first:])
        copies[alike] = error.amax(1) < limit
    return copies


def _errors(cells: torch.Tensor, everything: torch.Tensor, other: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared difference of each block, float32 [n, B]; a chunk that stays in a CPU's cache at a time."""
    errors = torch.empty(cells.shape[:2])
    size = max(1, CHUNK // math.prod(cells.shape[1:]))
    for start in range(0, len(cells), size):
        place = slice(start, start + size)
        difference = everything.index_select(0, other[place]).sub_(cells[place]).square_()
        torch.mv(difference.flatten(0, 1), weights, out=errors[place].view(-1))
    return errors


def _with_noise(
    cells: torch.Tensor, everything: torch.Tensor, other: torch.Tensor, limit: float, measures: _Measures
) -> float:
    """The limit plus the error that the noise between two steps gives a block, within `NOISE_LIMIT_DB`."""
    difference = cells[..., measures.highest] - everything[..., measures.highest][other]
    noise = (difference.square_() @ measures.noise).mean(1).quantile(NOISE_QUANTILE)
    return max(limit, min(limit + float(noise), squared_error(NOISE_LIMIT_DB)))


def _first_step(cells: torch.Tensor, limit: float, measures: _Measures) -> torch.Tensor:
    """Rule S for one step [r, c, B, K]: number of the cell that each cell shows, int64 [r, c].

    A cell is compared with what its neighbour shows, which may be a copy itself: errors do not pile up.
    """
    rows, columns = cells.shape[:2]
    shown = torch.arange(rows * columns).view(rows, columns)
    candidates, cells = _may_be_flat(cells, limit, measures), cells.flatten(0, 1)
    flat = torch.zeros(len(cells), dtype=torch.bool)  # as far as it has been asked
    for row in candidates[1:, 0].nonzero().flatten().tolist():
        _copy_neighbours(shown[row + 1], shown[row], torch.tensor([0]), cells, flat, limit, measures)
    for column in range(1, columns):
        chosen = candidates[:, column].nonzero().flatten()
        if len(chosen):
            _copy_neighbours(shown[:, column], shown[:, column - 1], chosen, cells, flat, limit, measures)
    return shown


def _copy_neighbours(
    shown: torch.Tensor,
    neighbours: torch.Tensor,
    chosen: torch.Tensor,
    cells: torch.Tensor,
    flat: torch.Tensor,
    limit: float,
    measures: _Measures,
) -> None:
    """Where a neighbour is flat and about the same, `shown` [n] becomes what it shows. chosen: places in `shown` that
    are asked. flat: bool [all], the cells that are known to show one colour, added to."""
    own, other = shown[chosen], neighbours[chosen]
    same = _is_copy(cells.index_select(0, own), cells, other, limit, measures)
    asked = other[same & ~flat[other]]
    if len(asked):
        flat[asked] = _is_flat(cells.index_select(0, asked), limit, measures)
    shown[chosen] = torch.where(same & flat[other], other, own)


def _may_be_flat(cells: torch.Tensor, limit: float, measures: _Measures) -> torch.Tensor:
    """Whether a cell can be a copy of a flat one, by its first numbers: [..., B, K] -> bool [...]. Two errors below the
    limit make one below four times the limit (triangle inequality of roots), and no constant is nearer than the mean.
    """
    first = measures.first
    weights = (measures.weights * (1 - measures.means))[:first]
    return (cells[..., :first].square() @ weights).amax(-1) < 4 * limit


def _is_flat(cells: torch.Tensor, limit: float, measures: _Measures) -> torch.Tensor:
    """Whether each cell [n, B, K] shows one colour, bool [n]: its mean colour is a copy of it."""
    difference = cells - cells.mean(1, keepdim=True) * measures.means
    return (difference.square_() @ measures.weights).amax(1) < limit
