"""Positions of tokens: M-RoPE in the language model, rows and columns in the vision tower."""

import numpy as np


def vision_positions(grid: tuple[int, int, int], merge_size: int) -> np.ndarray:
    """Row and column of each vision token of a medium with grid (t, h, w), int64 [t * h * w, 2], in Qwen2-VL's order:
    time steps, then merge groups row by row, then the tokens of a group (transformers 4.51.3, modeling_qwen2_vl.py,
    `rot_pos_emb`)."""
    steps, rows, columns = grid
    plane = np.indices((rows, columns), dtype=np.int64)
    groups = plane.reshape(2, rows // merge_size, merge_size, columns // merge_size, merge_size)
    ordered = groups.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(ordered, (steps, 1))


Run = int | tuple[int, int, int] | tuple[int, int, int, float]  # see `mrope_positions`


def mrope_positions(runs: list[Run]) -> np.ndarray:
    """M-RoPE position ids, int64 [3, L], of a sequence of runs: an int n is n text tokens, a tuple (t, h, w) is a
    visual run of t*h*w language-model tokens (grid after the spatial merge). A fourth number is by how much time
    advances from step to step, 1 if it is left out; what it gives is rounded down.

    Text advances all three axes together; a visual run counts time, row and column from where the text stopped, and
    the next text starts after its largest index (Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index`).
    """
    columns, start = [], 0
    for run in runs:
        if isinstance(run, tuple):
            indices = np.indices(run[:3], dtype=np.int64).reshape(3, -1)
            if len(run) == 4:
                indices[0] = indices[0].astype(np.float32) * np.float32(run[3])
            columns.append(indices + start)
            start += int(indices.max()) + 1
        else:
            columns.append(np.broadcast_to(np.arange(start, start + run, dtype=np.int64), (3, run)))
            start += run
    return np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)
