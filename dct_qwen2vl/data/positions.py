"""Positions of tokens: M-RoPE in the language model, rows and columns in the vision tower.

With skipping (dct/skipping_dct.py), cells that are left out have no token. All others keep their positions.

Letters used for shapes in this file:

    t h w    the grid of vision tokens of a medium
    r c      rows and columns of merge cells: r = h/m, c = w/m; each is one token of the language model
    L        tokens of a sequence
"""

from dataclasses import dataclass

import numpy as np

Grid = tuple[int, int, int]


def vision_positions(grid: Grid, merge_size: int, kept: np.ndarray | None = None) -> np.ndarray:
    """Row and column of each vision token of a medium, int64 [tokens, 2].

    grid: (t, h, w), vision tokens.
    merge_size: Side of a merge cell, vision tokens.
    kept: bool [t, r, c]. Merge cells that have tokens. None: all.

    The order is Qwen2-VL's: time steps, then merge cells row by row, then the tokens of a cell (transformers 4.51.3,
    modeling_qwen2_vl.py, `rot_pos_emb`).
    """
    steps, rows, columns = grid
    plane = np.indices((rows, columns), dtype=np.int64)
    groups = plane.reshape(2, rows // merge_size, merge_size, columns // merge_size, merge_size)
    ordered = groups.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    positions = np.tile(ordered, (steps, 1))
    if kept is None:
        return positions
    return positions.reshape(kept.size, -1, 2)[kept.ravel()].reshape(-1, 2)


def step_lengths(grid: Grid, merge_size: int, kept: np.ndarray | None = None) -> list[int]:
    """Vision tokens of each time step of a medium. Attention runs over one step. With skipping, a step may have none.

    grid: As in `vision_positions`.
    merge_size: As in `vision_positions`.
    kept: As in `vision_positions`.
    """
    steps, rows, columns = grid
    if kept is None:
        return [rows * columns] * steps
    return (kept.reshape(steps, -1).sum(axis=1) * merge_size**2).tolist()


def window_order(kept: np.ndarray, side: int) -> tuple[np.ndarray, list[int]]:
    """The order of Qwen2.5-VL's windowed attention: time steps, then windows row by row, then the cells of a window row
    by row (transformers 4.51.3, modeling_qwen2_5_vl.py, `get_window_index`).

    Windows are parts of the whole grid. One of which nothing is kept is left out.

    kept: bool [t, r, c], the merge cells that have tokens.
    side: of a window, cells.

    Returns the numbers of the kept cells in that order, int64 [kept cells], and how many cells each window has.
    """
    step, row, column = kept.nonzero()
    across = -(-kept.shape[2] // side)
    window = (step * -(-kept.shape[1] // side) + row // side) * across + column // side
    order = np.argsort(window, kind="stable")
    _, lengths = np.unique(window, return_counts=True)
    return order, lengths.tolist()


@dataclass(frozen=True, eq=False)
class KeptRun:
    """The visual run of a medium of which only some cells have tokens.

    grid: (t, r, c), of all cells.
    kept: bool [t, r, c], those that have a token.
    time_step: by how much time advances from step to step.
    """

    grid: Grid
    kept: np.ndarray
    time_step: float = 1.0


Run = int | Grid | tuple[int, int, int, float] | KeptRun  # see `mrope_positions`


def mrope_positions(runs: list[Run]) -> np.ndarray:
    """M-RoPE position ids, int64 [3, L], of a sequence of runs.

    runs: An int n is n text tokens. A tuple (t, r, c) is a visual run of t*r*c tokens of the language model (grid after
        the spatial merge). A fourth number is how far time advances from step to step, 1 if it is left out; results are
        rounded down.

    Text advances all three axes together. A visual run counts time, row and column from where the text stopped. The
    next text starts after its largest index (Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index`). Cells that a
    `KeptRun` leaves out count for that index, too: text starts where it would have, and a video keeps its duration.
    """
    columns, start = [], 0
    for run in runs:
        if isinstance(run, int):
            columns.append(np.broadcast_to(np.arange(start, start + run, dtype=np.int64), (3, run)))
            start += run
        elif isinstance(run, KeptRun):
            indices = _visual_indices(run.grid, run.time_step)
            columns.append(indices[:, run.kept.ravel()] + start)
            start += int(indices.max()) + 1
        else:
            indices = _visual_indices(run[:3], *run[3:])
            columns.append(indices + start)
            start += int(indices.max()) + 1
    return np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)


def _visual_indices(grid: Grid, time_step: float = 1.0) -> np.ndarray:
    """Time, row and column of each cell of a medium, counted from 0: int64 [3, t * r * c]."""
    indices = np.indices(grid, dtype=np.int64).reshape(3, -1)
    if time_step != 1:
        indices[0] = indices[0].astype(np.float32) * np.float32(time_step)
    return indices
