"""Patch embeddings, carried over from pixels into the coefficient domain and back.

    fold_patch_embedding     pretrained, patch of 2 x 14 x 14 px -> coefficients of a larger block
    unfold_patch_embedding   coefficients of a block -> pixels of the same block
    fold_block_embedding     its inverse: pixels of a block -> coefficients of the same block

Tokens are linear in the normalised pixels: token = A x. So W' A is the same embedding over pixels, and W' = W S with
A S = I undoes it. For 4:2:0 and for few coefficients S A is a projection, and not every W is some W' A.

Letters used for shapes in this file:

    E         width of the vision tower
    K         coefficients kept for each token
    bt bh bw  frames, rows and columns of one block, in frames and pixels
"""

import math

import numpy as np
import torch

from .configuration_dct import PIXEL_PATCH, RGB_TO_YCBCR, DCTConfig, dct_matrix, synthesis_matrix, ycbcr_to_rgb

ROWS_AT_ONCE = 128  # of an embedding, so that float64 copies of a large block stay small


def fold_patch_embedding(
    weight: torch.Tensor,
    config: DCTConfig,
    patch: tuple[int, int, int] = PIXEL_PATCH,
    std: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """W' = W S: a Conv3d's weight over normalised RGB pixels [E, 3, 2, 14, 14] -> over tokens [E, K, 1, 1, 1].

    weight: float [E, 3, 2, 14, 14]. The result has its dtype.
    config: The token format.
    patch: As in `synthesis_matrix`.
    std: As in `synthesis_matrix`.

    Columns of coefficients that the pixel model never saw start at zero. So before training, the folded model computes
    what the pixel model computes on the image downscaled in the DCT domain.

    Raises ValueError for a weight of any other shape.
    """
    _check_shape("fold_patch_embedding", weight, (3, *patch))
    synthesis = torch.from_numpy(synthesis_matrix(config, patch, std)).to(weight.device)
    folded = weight.reshape(weight.shape[0], -1).to(torch.float64) @ synthesis.T
    return folded.to(weight.dtype).reshape(weight.shape[0], -1, 1, 1, 1)


def unfold_patch_embedding(
    weight: torch.Tensor, config: DCTConfig, std: tuple[float, ...] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W = W' A: a Conv3d's weight over tokens [E, K, 1, 1, 1] -> over normalised RGB pixels [E, 3, bt, bh, bw].

    weight: float [E, K, 1, 1, 1].
    config: The token format.
    std: What the pixels are divided by, channels R, G, B. None: that of `config`.
    dtype: Of the result. None: that of `weight`. The arithmetic is float64, rounded once.

    Raises ValueError for a weight of any other shape.
    """
    _check_shape("unfold_patch_embedding", weight, (config.num_coefficients, 1, 1, 1))
    axes = [_tensor(matrix) for matrix in (RGB_TO_YCBCR * np.array(std or config.std), *map(dct_matrix, config.block))]
    kept, scale = torch.tensor(config.kept), torch.tensor(config.scale, dtype=torch.float64)

    def unfold(rows: torch.Tensor) -> torch.Tensor:
        coefficients = torch.zeros(len(rows), 3 * math.prod(config.block), dtype=torch.float64)
        coefficients[:, kept] = rows.flatten(1).double() / scale
        return _along_axes(coefficients.view(len(rows), 3, *config.block), axes)

    return _by_rows(unfold, weight, dtype or weight.dtype)


def fold_block_embedding(
    weight: torch.Tensor, config: DCTConfig, std: tuple[float, ...] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W' = W S: a Conv3d's weight over normalised RGB pixels [E, 3, bt, bh, bw] -> over tokens [E, K, 1, 1, 1].

    weight: float [E, 3, bt, bh, bw].
    config: The token format.
    std: As in `unfold_patch_embedding`.
    dtype: As in `unfold_patch_embedding`.

    It undoes `unfold_patch_embedding`. Of any other weight, it keeps what tokens of this format can represent.

    Raises ValueError for a weight of any other shape.
    """
    _check_shape("fold_block_embedding", weight, (3, *config.block))
    to_rgb = ycbcr_to_rgb() / np.array(std or config.std)[:, None]
    axes = [_tensor(matrix) for matrix in (to_rgb, *(dct_matrix(side).T for side in config.block))]
    kept, scale = torch.tensor(config.kept), torch.tensor(config.scale, dtype=torch.float64)

    def fold(rows: torch.Tensor) -> torch.Tensor:
        folded = _along_axes(rows.double(), axes).flatten(1)[:, kept] * scale
        return folded.view(len(rows), -1, 1, 1, 1)

    return _by_rows(fold, weight, dtype or weight.dtype)


def bias_for_mean(
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: tuple[float, ...],
    other: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    """The bias, [E], for pixels minus `other` that gives what `bias` gives for pixels minus `mean`.

    weight: float [E, 3, frames, rows, columns] over pixels. Its patch holds a flat colour unchanged, whatever its size.
    bias: float [E]. The result has its dtype.
    mean: R, G, B that `bias` is for, 0..1.
    other: R, G, B that the result is for, 0..1.
    std: What the pixels are divided by, as in `unfold_patch_embedding`.

    Tokens are centred by CLIP's mean. A model with another mean (Qwen3-VL: 0.5) is folded with mean=its own and
    other=CLIP_MEAN, and unfolded the other way round.
    """
    shift = (torch.tensor(other, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std)
    return (bias.double() + weight.double().sum(dim=(2, 3, 4)) @ shift).to(bias.dtype)


def distance_from_format(weight: torch.Tensor, config: DCTConfig, std: tuple[float, ...] | None = None) -> float:
    """The share of a pixel embedding that no token of the format can represent, 0 to about 1.

    weight: float [E, 3, bt, bh, bw].
    config: The token format.
    std: As in `unfold_patch_embedding`.

    It is the norm of W - W S A over the norm of W. Rounding a weight to bfloat16 leaves about 0.002.
    """
    whole = weight.double()
    projected = unfold_patch_embedding(fold_block_embedding(whole, config, std), config, std)
    norm = float(whole.norm())
    return float((whole - projected).norm()) / norm if norm else 0.0


def _check_shape(function: str, weight: torch.Tensor, expected: tuple[int, ...]) -> None:
    if weight.ndim != 5 or tuple(weight.shape[1:]) != expected:
        words = ", ".join(map(str, expected))
        raise ValueError(f"{function} expects a weight [E, {words}], got {list(weight.shape)}")


def _tensor(matrix: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix))


def _along_axes(values: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """Every axis but the first, multiplied by its matrix [old, new]."""
    for matrix in matrices:
        values = torch.tensordot(values, matrix, dims=([1], [0]))  # the next axis moves to place 1, the new one is last
    return values


def _by_rows(function, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`function` of a weight [E, ...] in float64, some rows at a time."""
    return torch.cat([function(rows).to(dtype) for rows in weight.cpu().split(ROWS_AT_ONCE)]).to(weight.device)
