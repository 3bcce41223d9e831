"""The variants: from a grey crop to the numbers of a token, and the first layer that starts at the pretrained one.

Letters used for shapes:

    B S   crops and their side in pixels
    p     side of the pretrained model's patch here: 7 px
    N K   tokens of a crop, numbers of a token
    E     width of the model: 384

DINOv2's patch of 14 px is resized to 7 px as FlexiViT does (arXiv 2212.08013): a crop then reads as its enlargement by
two would with the original. So a block of 14 px has 196 coefficients for a width of 384, as a block of Qwen2-VL's `x4`
has 784 of luma for 1280.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from dct_qwen2vl.dct.configuration_dct import coefficient_variance, dct_matrix

PATCH = 7
BLOCK = 2 * PATCH
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """side: of a token's block in pixels of the crop. kept: of the block's DCT coefficients; 0 for pixels.

    shrink: by which the crop is made smaller first. channels: three equal ones, as the pretrained model has, or one.
    """

    name: str
    side: int
    kept: int = 0
    shrink: int = 1
    channels: int = 1


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("all", PATCH),  # four times as many tokens as the others
        Variant("half", PATCH, shrink=2),
        Variant("half-rgb", PATCH, shrink=2, channels=3),
        Variant("half-dct", BLOCK, kept=PATCH**2),
        Variant("x4", BLOCK, kept=BLOCK**2),
        Variant("x4-588", BLOCK, kept=3 * PATCH**2),  # of 196, as 588 of the 784 of a block of 28 px
        Variant("pixel", BLOCK),  # the same function as x4 at the start
    )
}


def resized_patch(weight: torch.Tensor) -> torch.Tensor:
    """float64 [E, 3, 14, 14] -> [E, 3, 7, 7], by transposed upscaling in the DCT domain."""
    up = upscaling(BLOCK)
    return torch.einsum("yr,xc,epyx->eprc", up, up, weight.double())


def upscaling(side: int) -> torch.Tensor:
    """float64 [side, 7]: a line of 7 px, enlarged in the DCT domain; constants keep their value."""
    enlarged = dct_matrix(side)[:PATCH].T @ dct_matrix(PATCH)
    return torch.from_numpy(enlarged * math.sqrt(side / PATCH))


def grey_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch embedding over three normalised channels [E, 3, p, p] -> one over grey values of 0..1 [E, p*p], and what
    the channels' means add, [E]."""
    std, mean = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_STD, IMAGENET_MEAN))
    grey = (weight / std[:, None, None]).sum(dim=1).flatten(1)
    return grey, -(weight.sum(dim=(2, 3)) * mean / std).sum(dim=1)


class Inputs:
    """Crops -> the numbers of their tokens, each of about unit spread, and the first layer's weights.

    variant: of `VARIANTS`.
    weight, bias: of the pretrained patch embedding, [E, 3, 14, 14] and [E].
    level: mean grey value of the pages in 0..1, which is subtracted.
    measured: float [S/14 * S/14 * B, 196], blocks of pages about `level`, for scales of the DCT from pages; None for
        those of natural images.
    gain: by which coefficients beyond the corner are made larger.
    device: on which crops are.
    """

    def __init__(
        self,
        variant: Variant,
        weight: torch.Tensor,
        bias: torch.Tensor,
        level: float,
        measured: torch.Tensor | None = None,
        gain: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        self.variant, self.level = variant, level
        small = resized_patch(weight)
        grey, offset = grey_weight(small)
        self.bias = (bias.double() + offset + level * grey.sum(dim=1)).float()
        self.basis = None
        if variant.channels == 3:
            self.weight, self.bias = small.flatten(1).float(), bias.float()
        elif variant.kept:
            basis, folded = dct_inputs(variant, grey, measured, gain)
            self.basis = basis.float().to(device)
            self.weight = folded.float()
        else:
            self.spread = 1.0 if measured is None else float(measured.square().mean().sqrt())
            self.weight = (grey if variant.side == PATCH else on_blocks(grey)).float() * self.spread

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S] -> float32 [B, N, K]"""
        values = images.float() / 255
        if self.variant.shrink > 1:
            values = shrunk(values, self.variant.shrink)
        if self.variant.channels == 3:
            return normalised(blocks(values, self.variant.side))
        values = blocks(values - self.level, self.variant.side)
        return values / self.spread if self.basis is None else values @ self.basis

    @property
    def numbers(self) -> int:
        """K"""
        return self.weight.shape[1]


def on_blocks(grey: torch.Tensor) -> torch.Tensor:
    """[E, 49] over pixels of the patch -> [E, 196] over those of the block, downscaled in the DCT domain."""
    down = upscaling(BLOCK).T * PATCH / BLOCK
    return torch.einsum("ry,cx,erc->eyx", down, down, grey.unflatten(1, (PATCH, PATCH))).flatten(1)


def dct_inputs(
    variant: Variant, grey: torch.Tensor, measured: torch.Tensor | None, gain: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis [196, K], each coefficient divided by its scale, and the weight over these, [E, K]."""
    matrix = torch.from_numpy(np.kron(dct_matrix(BLOCK), dct_matrix(BLOCK)))  # [coefficient, pixel]
    natural = torch.from_numpy(coefficient_variance((1, BLOCK, BLOCK))[0].reshape(-1).copy())
    variance = natural if measured is None else (measured.double().cpu() @ matrix.T).square().mean(dim=0)
    corner = torch.zeros(BLOCK, BLOCK, dtype=torch.bool)
    corner[:PATCH, :PATCH] = True
    corner = corner.flatten()
    order = torch.argsort(variance + corner * variance.sum(), descending=True)  # the corner first
    kept = order[: variant.kept].sort().values
    scale = variance[kept].sqrt() / torch.where(corner[kept], 1.0, gain)
    folded = on_blocks(grey) @ matrix[kept].T  # zero beyond the corner, but for rounding
    return (matrix[kept] / scale[:, None]).T, torch.where(corner[kept], folded * scale, 0.0)


def shrunk(values: torch.Tensor, factor: int) -> torch.Tensor:
    """float [B, S, S] in 0..1, bicubic with antialiasing, rounded to 8 bits."""
    side = values.shape[-1] // factor
    small = functional.interpolate(values[:, None], size=(side, side), mode="bicubic", antialias=True)[:, 0]
    return (small * 255).round().clamp(0, 255) / 255


def blocks(values: torch.Tensor, side: int) -> torch.Tensor:
    """[B, S, S] -> [B, N, side * side], row by row."""
    count = values.shape[-1] // side
    return values.unflatten(2, (count, side)).unflatten(1, (count, side)).transpose(2, 3).flatten(3).flatten(1, 2)


def normalised(values: torch.Tensor) -> torch.Tensor:
    """[B, N, p*p] of 0..1 -> [B, N, 3*p*p], three equal channels in ImageNet's normalisation."""
    channels = [(values - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    return torch.cat(channels, dim=-1)
