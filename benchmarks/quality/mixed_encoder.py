"""The variant `x4-mixed`: as many cells as `x4`, but of three sizes (`mixed_cells.py`), for images.

Blocks of all sizes are tokens of one format, as if the DCT had enlarged or reduced a block to that of `x4`. Their low
corners then have the same weights in a folded model: step 0 is the pixel model, on a full, half or quarter-size image
of each block. Beyond the corner, a small block has nothing and a large one its next frequencies. The size itself is
three more floats of a token, one of which is 1; their weights begin at zero.

Positions are those of the middle of a block or a cell, in units of the smallest.

Letters used for shapes, beyond those of `mixed_cells.py`:

    N K     tokens of a sample, 4 * V; floats of a token that are embedded
"""

from dataclasses import replace

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.quality.mixed_cells import (
    MERGE,
    SIDES,
    CellTree,
    cell_errors,
    choose_cells,
    in_reading_order,
    whole_cells,
)
from benchmarks.quality.model import Layout
from benchmarks.quality.tasks.cells import CellTask
from benchmarks.quality.variants import FRAMES, Encoder, cut, make_variant
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.configuration_dct import RGB_TO_YCBCR, DCTConfig, dct_matrix

MIXED = "x4-mixed"
BASE = "x4"
PLACE_FLOATS = 2  # at the end of a token: its row and column, which are not embedded


def zoomed_matrix(config: DCTConfig, side: int) -> np.ndarray:
    """From a block of a still to the token of `config`, as if the block had its size: float64 [K, 3 * side * side].

    config: format of the tokens.
    side: of the block, pixels.
    """
    plane, ft, fy, fx = np.unravel_index(np.array(config.kept), (3, *config.block))
    has = (ft == 0) & (fy < side) & (fx < side)
    basis = np.concatenate([dct_matrix(side), np.zeros((config.block[1], side))])
    matrix = np.einsum("kc,ky,kx->kcyx", RGB_TO_YCBCR[plane] / 255, basis[fy], basis[fx], optimize=True)
    zoom = FRAMES**0.5 * config.block[1] / side
    matrix *= (has * zoom / np.array(config.scale))[:, None, None, None]
    return matrix.reshape(len(matrix), -1)


class MixedEncoder(Encoder):
    """Images uint8 [B, 1, H, W, 3] -> tokens float32 [B, N, K + PLACE_FLOATS], cells in reading order."""

    place_floats = PLACE_FLOATS

    def __init__(self, task: CellTask, device: torch.device | str, patch: int) -> None:
        if task.duration > 1:
            raise UserError(f"variant {MIXED} is for images, task {task.name} has videos: choose page-reading")
        super().__init__(make_variant(BASE, patch), (task.side, task.side), 1, device)
        self.patch, self.tree = patch, CellTree(*self.grid[1:])  # a block of x4 is as large as the smallest cell
        self.matrices, self.shifts = zip(*(self._analysis(side * patch) for side in SIDES))
        self.marks = torch.cat([self._sizes(), self._places()], dim=2).to(self.device)

    def _analysis(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix for values about 128, and what is added after it."""
        config = self.variant.config
        matrix = zoomed_matrix(config, block)
        mean = np.repeat(255 * np.array(config.mean), block**2)
        shift = matrix.sum(axis=1) * 128 - matrix @ mean
        return tuple(torch.from_numpy(part.copy()).to(self.device, torch.float32) for part in (matrix.T, shift))

    def _sizes(self) -> torch.Tensor:
        """Which size a cell has, for each of its tokens: float [M, 4, 3]."""
        return (self.tree.sides[:, None, None] == torch.tensor(SIDES)).float().expand(-1, MERGE**2, -1)

    def _places(self) -> torch.Tensor:
        """Row and column of each block's middle, in sides of the smallest block: float [M, 4, 2]."""
        side = self.tree.sides[:, None, None]
        block = torch.cartesian_prod(torch.arange(MERGE), torch.arange(MERGE))
        return MERGE * self.tree.corners[:, None] + block * side + (side - 1) / 2

    def in_patch(self, patch: int, floats: int) -> torch.Tensor:
        shown = super().in_patch(patch, floats)
        return torch.nn.functional.pad(shown, (0, len(SIDES)))

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        images = frames[:, 0].to(self.device, torch.float32) - 128
        chosen = choose_cells(cell_errors(images, self.patch), self.tree)
        order = in_reading_order(chosen, self.tree)
        tokens = torch.cat([self._tokens(images, *level) for level in zip(SIDES, self.matrices, self.shifts)], dim=1)
        sample = torch.arange(len(order), device=self.device)[:, None]
        return torch.cat([tokens[sample, order], self.marks[order]], dim=3).flatten(1, 2)

    def _tokens(self, images: torch.Tensor, side: int, matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """All cells of one size: float [B, cells, 4, K without the size]."""
        block = side * self.patch
        part = whole_cells(images, MERGE * block)
        return (cut(part[:, None, None], block) @ matrix + shift).unflatten(1, (-1, MERGE**2))


class MixedPlaces:
    """Where the tokens of samples stand: every sample has a layout of its own.

    model: gives the frequencies of positions.
    encoder: of the tokens.
    question_length, answer_length: words.
    """

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        encoder: MixedEncoder,
        question_length: int,
        answer_length: int,
    ) -> None:
        lengths, tree = (question_length, answer_length), encoder.tree
        smallest = Layout.build(model, (1, MERGE * tree.rows, MERGE * tree.columns), False, *lengths)
        self.layout = Layout.build(model, encoder.grid, False, *lengths)
        before = len(smallest.prefix)
        self.before = smallest.positions[:, :, :before].float()
        self.after = smallest.positions[:, :, before + tree.rows * tree.columns :].float()
        self.rates = model.visual.rotary_pos_emb.inv_freq

    def layout_of(self, tokens: torch.Tensor) -> Layout:
        """Positions float [3, B, L] and angles float [B, N, VISION_HEAD] of samples [B, N, K + PLACE_FLOATS]."""
        places = tokens[..., -PLACE_FLOATS:].float()
        angles = (places[..., None] * self.rates.float()).flatten(2).repeat(1, 1, 2)
        cells = (places.unflatten(1, (-1, MERGE**2)).mean(dim=2) - (MERGE - 1) / 2) / MERGE
        time = torch.zeros_like(cells[..., :1])
        visual = torch.cat([time, cells], dim=2).permute(2, 0, 1) + self.before.shape[2]
        ends = (part.expand(-1, len(tokens), -1) for part in (self.before, self.after))
        positions = torch.cat([next(ends), visual, next(ends)], dim=2)
        return replace(self.layout, positions=positions, vision_cos=angles.cos(), vision_sin=angles.sin())
