"""What the visual tokens of an image hold, as an image again; and what is done to a sheet of print before.

Letters used for shapes: H W, rows and columns of an image in pixels, multiples of 112.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dct_qwen2vl.dct.configuration_dct import PIXEL_PATCH, DCTConfig
from dct_qwen2vl.dct.transform_dct import DCTTokenizer

SIDE = 28  # px of what one visual token of Qwen2-VL shows, 2 x 2 patches of 14 px
LUMA = np.array([0.299, 0.587, 0.114])
LEAST_CONTRAST = 80  # levels of luma between coloured ink and ground
JPEG_QUALITY = 75


@dataclass(frozen=True)
class View:
    """One way to a given number of visual tokens.

    label: for tables and figures.
    share: 1 for all tokens, 4 for a quarter of them, 16 for a sixteenth.
    show: uint8 [H, W, 3] -> what its tokens hold, uint8 [H, W, 3].
    """

    label: str
    share: int
    show: Callable[[np.ndarray], np.ndarray]


def smaller(image: np.ndarray, factor: int) -> np.ndarray:
    """Downscaled as under a lower max_pixels (bicubic, antialiased, 8 bits), then enlarged again (Lanczos)."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.LANCZOS))


@functools.cache
def tokenizer(name: str) -> DCTTokenizer:
    """name: of a preset; or "x4-588", as many coefficients of a block of 28 px as the half-size image has numbers."""
    if name != "x4-588":
        return DCTTokenizer(DCTConfig.preset(name))
    side = 2 * PIXEL_PATCH[1]
    return DCTTokenizer(DCTConfig.select((1, side, side), "420", 3 * PIXEL_PATCH[1] * PIXEL_PATCH[2], name=name))


def decoded(image: np.ndarray, name: str) -> np.ndarray:
    """Encoded as a still, two equal frames where a block has two, and decoded."""
    transform = tokenizer(name)
    frames = np.repeat(image[None], transform.config.block[0], axis=0)
    return transform.decode(*transform.encode(frames))[0].numpy()


VIEWS = {
    "as-is": View("as is", 1, lambda image: image),
    "half-size": View("half-size image", 4, lambda image: smaller(image, 2)),
    "x4": View("x4", 4, lambda image: decoded(image, "x4")),
    "x4-588": View("x4, half of its coefficients", 4, lambda image: decoded(image, "x4-588")),
    "quarter-size": View("quarter-size image", 16, lambda image: smaller(image, 4)),
    "x16": View("x16", 16, lambda image: decoded(image, "x16")),
}


def visual_tokens(image: np.ndarray, view: str) -> float:
    """Of the language model, for this image."""
    return image.shape[0] * image.shape[1] / SIDE**2 / VIEWS[view].share


def coloured(grey: np.ndarray, ink: tuple[int, int, int], ground: tuple[int, int, int]) -> np.ndarray:
    """Print in two colours: uint8 [H, W] -> uint8 [H, W, 3]."""
    share = grey[..., None] / 255
    return np.round(share * np.array(ground) + (1 - share) * np.array(ink)).astype(np.uint8)


def colours(kind: str, rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ink and ground. kind: "black" on white; "coloured", at random, at least 80 levels of luma apart;
    "equal-luma", at random, less than half a level of luma apart, so that only their colours tell them apart."""
    if kind == "black":
        return (0, 0, 0), (255, 255, 255)
    while True:
        ink, ground = rng.integers(0, 256, (2, 3))
        if kind == "equal-luma":
            ground = with_luma(ground, float(ink @ LUMA))
        if ground is not None and apart(kind, ink, ground):
            return tuple(map(int, ink)), tuple(map(int, ground))


def with_luma(colour: np.ndarray, luma: float) -> np.ndarray | None:
    """The colour made so much lighter or darker. None if that is no colour of 8 bits."""
    moved = np.round(colour + (luma - colour @ LUMA)).astype(int)
    return moved if moved.min() >= 0 and moved.max() <= 255 else None


def apart(kind: str, ink: np.ndarray, ground: np.ndarray) -> bool:
    """Whether two colours are as `colours` wants them."""
    luma, distance = abs(float((ink - ground) @ LUMA)), float(np.abs(ink - ground).max())
    return luma >= LEAST_CONTRAST if kind == "coloured" else luma < 0.5 and distance >= 2 * LEAST_CONTRAST


def compressed(image: np.ndarray) -> np.ndarray:
    """Written as JPEG of quality 75, with 4:2:0 as Pillow does by default, and read again."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file))
