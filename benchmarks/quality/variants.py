"""The variants of the experiments: ways in which an image becomes tokens. Each is one linear map of blocks of pixels.

Letters used for shapes:

    B T H W   samples, their frames, rows and columns in pixels
    b         side of the block that a token covers, in pixels of the image that is cut into blocks
    N K       tokens of a sample, t*h*w in Qwen2-VL's order; floats of a token

Pixel variants cut an image, downscaled or not, into blocks and scale the values; DCT variants apply the analysis of a
`DCTConfig`, whose matrix is put together from configuration_dct.py and tested against `DCTTokenizer.encode`. What is
measured on data (unit variance, PCA) is measured on images of a split of their own, never on the test set.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.configuration_dct import PIXEL_PATCH, RGB_TO_YCBCR, DCTConfig, dct_matrix, shown_in_patch

MERGE = 2  # tokens along a side that become one of the language model
FRAMES = PIXEL_PATCH[0]
LEAST_STD = 1e-3  # of normalised values; what varies less is constant
NOISE_FLOOR = 16 / 255  # of x4-floor: 16 levels of 0..255
LOUD = {"x4-loud": 3, "x4-louder": 10}  # what their further coefficients are multiplied by


@dataclass(frozen=True)
class Variant:
    """One way from pixels to tokens.

    side: of a token's block, in pixels of the image as it is cut. shrink: by which the image's sides are divided
    before. scaling, of pixel variants: "clip", Qwen2-VL's normalisation; "unit", every float to mean 0, variance 1;
    "pca", whitened principal components, of which `most` are kept. config: the token format of DCT variants, for which
    the other fields are not asked.
    """

    name: str
    side: int
    shrink: int = 1
    scaling: str = "clip"
    config: DCTConfig | None = None
    most: int | None = None

    @property
    def pixels_of_token(self) -> int:
        """Side of what a token covers, in pixels of the image as drawn."""
        return self.side * self.shrink


def _dct(name: str, config: DCTConfig) -> Variant:
    return Variant(name, config.block[1], config=config)


def preset(name: str, patch: int) -> DCTConfig:
    """`DCTConfig.preset` for patches with a side of `patch` px."""
    return DCTConfig.preset(name, (FRAMES, patch, patch))


def _x4_like(
    name: str, patch: int, count: float | None, order: str = "variance", chroma: str = "420", **options
) -> Variant:
    """count: floats, in those of a plane of a patch; None for all that there are."""
    kept = None if count is None else int(count * patch**2)
    block = (FRAMES, 2 * patch, 2 * patch)
    patch = (FRAMES, patch, patch)
    return _dct(name, DCTConfig.select(block, chroma, kept, order=order, name=name, patch=patch, **options))


def _flat(name: str, patch: int) -> Variant:
    """x4 with one scale for all coefficients: the DCT without its conditioning."""
    config = preset("x4", patch)
    scale = math.sqrt(float(np.mean(np.square(config.scale))))
    return _dct(name, replace(config, scale=(scale,) * config.num_coefficients, name=name))


def _floor(name: str, patch: int) -> Variant:
    """x4 with a floor under its scales, so that what natural images hardly have is not made as loud as the rest."""
    config = preset("x4", patch)
    scale = tuple(math.hypot(value, NOISE_FLOOR) for value in config.scale)
    return _dct(name, replace(config, scale=scale, name=name))


def _loud(name: str, patch: int) -> Variant:
    """x4 with larger values of what the half-size image does not show (`DCTConfig.with_detail_gain`)."""
    return _dct(name, preset("x4", patch).with_detail_gain(LOUD[name], (FRAMES, patch, patch)))


def _still_half(name: str, patch: int) -> Variant:
    """As many floats as the half-size image has, 588 with patches of 14 px, those of a still that vary most."""
    block = (FRAMES, 2 * patch, 2 * patch)
    still = np.zeros((3, *block), bool)
    still[:, 0] = True  # the frequency 0 of time
    options = {"first": still, "name": name, "patch": (FRAMES, patch, patch)}
    return _dct(name, DCTConfig.select(block, "420", 3 * patch**2, **options))


def _block_pca(name: str, patch: int) -> Variant:
    """As many floats as `x4` has that are not zero in a still."""
    return Variant(name, 2 * patch, scaling="pca", most=6 * patch**2)


# name: (what it is, how it is made from its name and the side of a pixel model's patch). The order is that of tables.
VARIANTS = {
    "pixels": ("pixels, all tokens", Variant),
    "pixels-unit": ("pixels of unit variance, all tokens", lambda name, patch: Variant(name, patch, scaling="unit")),
    "pixels-pca": ("whitened pixels, all tokens", lambda name, patch: Variant(name, patch, scaling="pca")),
    "exact": ("preset exact", lambda name, patch: _dct(name, preset("exact", patch))),
    "quarter": ("lower max_pixels, 1/4", lambda name, patch: Variant(name, patch, 2)),
    "quarter-unit": ("lower max_pixels, 1/4, unit variance", lambda name, patch: Variant(name, patch, 2, "unit")),
    "quarter-pca": ("lower max_pixels, 1/4, whitened", lambda name, patch: Variant(name, patch, 2, "pca")),
    "x4-raw": (
        "raw pixels of x4's blocks, unit variance",
        lambda name, patch: Variant(name, 2 * patch, scaling="unit"),
    ),
    "x4-pca": ("whitened pixels of x4's blocks", _block_pca),
    "x4": ("preset x4", lambda name, patch: _dct(name, preset("x4", patch))),
    "x4-flat": ("x4, one scale for all", _flat),
    "x4-floor": ("x4, scales with a noise floor", _floor),
    "x4-loud": ("x4, further coefficients three times as loud", _loud),
    "x4-louder": ("x4, further coefficients ten times as loud", _loud),
    "x4-corner": ("the corner of x4: DCT downscaling", lambda name, patch: _x4_like(name, patch, 6, "box")),
    "x4-half": ("half the floats of x4, variance order", lambda name, patch: _x4_like(name, patch, 4.5)),
    "x4-588": ("half the floats of a still, variance order", _still_half),
    "x4-variance": ("two thirds, variance order", lambda name, patch: _x4_like(name, patch, 6)),
    "x4-zigzag": ("two thirds, zigzag order", lambda name, patch: _x4_like(name, patch, 6, "zigzag")),
    "x4-all": ("all floats, 4:2:0", lambda name, patch: _x4_like(name, patch, None)),
    "x4-444": ("all floats, 4:4:4", lambda name, patch: _x4_like(name, patch, None, chroma="444")),
    "sixteenth": ("lower max_pixels, 1/16", lambda name, patch: Variant(name, patch, 4)),
    "sixteenth-pca": ("lower max_pixels, 1/16, whitened", lambda name, patch: Variant(name, patch, 4, "pca")),
    "x16": ("preset x16", lambda name, patch: _dct(name, preset("x16", patch))),
}
WEIGHTED = "x4-weighted"  # needs the patch embedding of a trained pixel model


def make_variant(name: str, patch: int = PIXEL_PATCH[1], weight: torch.Tensor | None = None) -> Variant:
    """A variant by name. patch: side of the pixel model's patch. weight: its patch embedding [E, 3, 2, patch, patch],
    which x4-weighted orders by.

    Raises UserError for an unknown name, or if x4-weighted has no weight.
    """
    if name == WEIGHTED and weight is not None:
        return _x4_like(name, patch, 6, "weighted", weight=weight)
    if name not in VARIANTS:
        needs = ", which needs a trained pixel model (--start-from)" if name == WEIGHTED else ""
        raise UserError(f"unknown variant {name!r}{needs}: choose from {', '.join(VARIANTS)}")
    return VARIANTS[name][1](name, patch)


def analysis_matrix(config: DCTConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokenizer as a matrix: float64 [K, 3*bt*bh*bw] for values of 0..255 in the order (channel, frame, row,
    column), and what is subtracted afterwards, float64 [K]."""
    plane, ft, fy, fx = np.unravel_index(np.array(config.kept), (3, *config.block))
    frames, rows, columns = (dct_matrix(side) for side in config.block)
    matrix = np.einsum(
        "kc,kt,ky,kx->kctyx", RGB_TO_YCBCR[plane] / 255, frames[ft], rows[fy], columns[fx], optimize=True
    ).reshape(config.num_coefficients, 3, -1)
    matrix /= np.array(config.scale)[:, None, None]
    offset = matrix.sum(axis=2) @ (255 * np.array(OPENAI_CLIP_MEAN))
    return matrix.reshape(config.num_coefficients, -1), offset


def unfold_patch_embedding(weight: torch.Tensor, config: DCTConfig) -> torch.Tensor:
    """The inverse of `dct_config.fold_patch_embedding` for a format that has every coefficient of a pixel patch, as
    `exact` has: weights [E, K, ...] over coefficients -> float32 [E, 3, *block] over normalised pixels.

    Raises ValueError for any other format.
    """
    values = math.prod(config.block)
    if config.num_coefficients != 3 * values:
        raise ValueError(f"format {config.name!r} has not all coefficients of its block: nothing to unfold to")
    matrix, _ = analysis_matrix(config)
    normalised = matrix * np.repeat(255 * np.array(OPENAI_CLIP_STD), values)
    pixels = weight.detach().double().cpu().flatten(1) @ torch.from_numpy(normalised)
    return pixels.float().view(-1, 3, *config.block)


def cut(frames: torch.Tensor, side: int) -> torch.Tensor:
    """[B, t, f, H, W, 3] -> blocks [B, N, 3*f*b*b] in Qwen2-VL's order of tokens, values in the order (channel, frame,
    row, column)."""
    count, t, f, height, width, _ = frames.shape
    h, w = height // (side * MERGE), width // (side * MERGE)
    blocks = frames.reshape(count, t, f, h, MERGE, side, w, MERGE, side, 3)
    # to B, t, h, w, m, m, channel, f, row, column
    return blocks.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(count, t * h * w * MERGE**2, -1)


def downscale(frames: torch.Tensor, factor: int) -> torch.Tensor:
    """float32 [B, T, H, W, 3] -> [B, T, H/f, W/f, 3], bicubic with antialiasing, rounded to whole levels of 0..255:
    what Qwen2-VL's image processor does under a lower max_pixels."""
    if factor == 1:
        return frames
    count, length, height, width, _ = frames.shape
    planes = frames.flatten(0, 1).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(
        planes, size=(height // factor, width // factor), mode="bicubic", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).permute(0, 2, 3, 1).unflatten(0, (count, length))


class Encoder:
    """Applies a variant on a device: uint8 frames [B, T, H, W, 3] -> float32 tokens [B, N, K].

    A lone image (T = 1) counts as two equal frames, as in Qwen2-VL; `pixels`, `quarter` and `sixteenth` have both
    copies in a token, as it has, the variants with blocks or bases of their own have one. Variants that are measured on
    data need `fit` first.

    place_floats: at the end of a token, which say where it stands and are not embedded.
    """

    place_floats = 0

    def __init__(
        self, variant: Variant, size: tuple[int, int], length: int, device: torch.device | str = "cpu"
    ) -> None:
        self.variant, self.still, self.device = variant, length == 1, torch.device(device)
        step = variant.pixels_of_token * MERGE
        if any(side % step for side in size) or (length > 1 and length % FRAMES):
            raise ValueError(f"variant {variant.name} needs sides that are multiples of {step} px and 1 or 2n frames")
        steps = max(1, length // FRAMES)
        self.grid = (steps, size[0] // variant.pixels_of_token, size[1] // variant.pixels_of_token)
        self.one_frame = self.still and (variant.config is not None or variant.scaling != "clip")
        self.matrix: torch.Tensor | None = None
        self.mean = self.std = None
        values = variant.side**2 * (1 if self.one_frame else FRAMES)  # of a channel in a block
        self.clip_mean, self.clip_std = (
            torch.tensor(channels, device=self.device).repeat_interleave(values)
            for channels in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        if variant.config is not None:
            matrix, offset = analysis_matrix(variant.config)
            if self.still:
                matrix = matrix.reshape(len(matrix), 3, FRAMES, -1).sum(axis=2).reshape(len(matrix), -1)
            self.matrix = torch.from_numpy(matrix.T.copy()).to(self.device, torch.float32)
            # values come centred about 128, where float32 is most exact
            shift = matrix.sum(axis=1) * 128 - offset
            self.shift = torch.from_numpy(shift).to(self.device, torch.float32)

    def in_patch(self, patch: int, floats: int) -> torch.Tensor:
        """Which of the `floats` of a token the pixel model's patch would show of its block, downscaled: bool [K]. Of
        DCT variants the corner; of principal components as many of the largest; of others all."""
        if self.variant.config is not None:
            return torch.from_numpy(shown_in_patch(self.variant.config, (FRAMES, patch, patch)))
        shown = 3 * patch**2 if self.variant.scaling == "pca" else floats
        return torch.arange(floats) >= floats - shown  # eigh sorts by rising variance

    @property
    def tokens(self) -> int:
        """N, tokens of the vision tower."""
        return math.prod(self.grid)

    def _blocks(self, frames: torch.Tensor) -> torch.Tensor:
        """float32 [B, N, values of a block], about 128 for 8-bit values: [-128, 127]."""
        frames = downscale(frames.to(self.device, torch.float32), self.variant.shrink) - 128
        if not self.still:
            frames = frames.unflatten(1, (-1, FRAMES))
        else:
            frames = frames[:, :, None] if self.one_frame else frames[:, :, None].expand(-1, -1, FRAMES, -1, -1, -1)
        return cut(frames, self.variant.side)

    def _clip(self, blocks: torch.Tensor) -> torch.Tensor:
        """Qwen2-VL's normalisation of values about 128."""
        return ((blocks + 128) / 255 - self.clip_mean) / self.clip_std

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Measures means, variances and principal components on uint8 frames [B, T, H, W, 3], where the variant has
        any."""
        if self.variant.config is not None or self.variant.scaling == "clip":
            return
        blocks = torch.cat([self._clip(self._blocks(frames)).flatten(0, 1) for frames in batches])
        self.mean = blocks.mean(dim=0)
        centred = blocks - self.mean
        if self.variant.scaling == "unit":
            self.std = centred.square().mean(dim=0).sqrt().clamp_min(LEAST_STD)
            return
        covariance = (centred.T @ centred / len(centred)).double()
        variance, basis = torch.linalg.eigh(covariance)
        kept = min(self.variant.most or len(variance), int((variance > LEAST_STD**2).sum()))
        whitening = basis[:, -kept:] / variance[-kept:].sqrt()
        self.matrix = whitening.float()

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, N, K]"""
        blocks = self._blocks(frames)
        if self.variant.config is not None:
            return blocks @ self.matrix + self.shift
        blocks = self._clip(blocks)
        if self.variant.scaling == "unit":
            return (blocks - self.mean) / self.std
        if self.variant.scaling == "pca":
            return (blocks - self.mean) @ self.matrix
        return blocks
