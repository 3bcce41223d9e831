"""Which cells of each medium have tokens, and the M-RoPE positions of sequences in which some have none.

    kept_by_medium     cells of all media -> those of each
    find_positions     the positions of ids, for questions; training has them from the task encoder
    given_positions    generation that starts from such positions

Where nothing is skipped, these compute what transformers computes, bit for bit.

Letters used for shapes in this file:

    B L    samples of a batch, tokens of its longest sample
    M      media (images, or videos)
    t r c  steps, rows and columns of merge cells
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import nn

from dct_qwen2vl.data.positions import KeptRun, Run, mrope_positions


def kept_by_medium(grids: torch.Tensor, kept: torch.Tensor | None, merge_size: int) -> list[np.ndarray | None]:
    """The kept cells of each medium, bool [t, r, c]. None for each if all cells are kept.

    grids: int64 [M, 3]. (t, h, w) of whole media.
    kept: bool [cells of all media]. None: all.
    merge_size: Side of a merge cell, vision tokens.
    """
    if kept is None:
        return [None] * len(grids)
    shapes = [(t, h // merge_size, w // merge_size) for t, h, w in grids.tolist()]
    pieces = kept.cpu().split([math.prod(shape) for shape in shapes])
    return [piece.view(shape).numpy() for piece, shape in zip(pieces, shapes)]


def find_positions(
    ids: np.ndarray,
    present: np.ndarray,
    pads: set[int],
    media: Iterator[KeptRun],
) -> np.ndarray:
    """M-RoPE positions int64 [3, L] of one sequence. They are 1 where it is padded, as in transformers.

    ids: int64 [L].
    present: bool [L]. False where padded.
    pads: Token ids that stand for images and videos.
    media: The cells of each medium, in order. Taken from.
    """
    runs: list[Run] = []
    for pad, group in groupby(ids[present].tolist(), key=lambda token: token if token in pads else None):
        runs.append(len(list(group)) if pad is None else next(media))
    positions = np.ones((3, len(ids)), np.int64)
    positions[:, present] = mrope_positions(runs)
    return positions


@contextmanager
def given_positions(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within the block, generation starts from these positions and counts on from them.

    model: Qwen2VLForConditionalGeneration.
    positions: int64 [3, B, L].

    transformers itself computes positions from whole grids.
    """
    owner = next(module for module in model.modules() if hasattr(module, "get_rope_index"))
    after = positions.amax((0, 2))[:, None] + 1 - positions.shape[-1]  # of each sample: what to add to a place
    owner.get_rope_index = lambda *arguments, **options: (positions, after)
    try:
        yield
    finally:
        del owner.get_rope_index
