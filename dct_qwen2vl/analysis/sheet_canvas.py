"""A figure on which images and words are placed by pixels, and what is drawn of images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dct_qwen2vl.common.files import replacing

# Layout, in px.
DPI = 100
CELL = 400  # side of an image
GAP = 18
LINE = 19
TEXT_SIZE, SMALL, TITLE = 14, 12, 20  # px
INK, FAINT = "#1a1a1a", "#5f5f5f"
ERROR_COLOURS = "inferno"


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's own defaults: nobody's matplotlibrc changes the sheet."""
    from matplotlib import rc_context, rcdefaults

    with rc_context():
        rcdefaults()
        yield


class Canvas:
    """A figure on which everything is placed in px from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        # The hundredth of a px keeps matplotlib, which cuts, from losing one to rounding.
        size = ((width + 0.01) / DPI, (height + 0.01) / DPI)
        self.figure = Figure(figsize=size, dpi=DPI, facecolor="white")
        self.width, self.height = width, height

    def text(self, x: float, y: float, words: str, size: int = TEXT_SIZE, **style: Any) -> None:
        """Places the top left corner of the words at x, y, unless `ha` or `va` say otherwise.

        x: From the left, px.
        y: From the top, px.
        words: The text.
        size: Of the font, px.
        style: As in matplotlib's Text.
        """
        style = {"va": "top", "color": INK, **style}
        self.figure.text(x / self.width, 1 - y / self.height, words, fontsize=size * 72 / DPI, **style)

    def lines(self, x: float, y: float, lines: list[str], **style: Any) -> None:
        """Places lines of text below each other.

        x: Left edge, px.
        y: Top of the first line, px.
        lines: The texts.
        style: As in matplotlib's Text.
        """
        for number, words in enumerate(lines):
            self.text(x, y + number * LINE, words, **style)

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Places an image, pixel for pixel.

        x: Left edge, px.
        y: Top edge, px.
        pixels: uint8 [h, w, 3].
        """
        self.figure.figimage(pixels, x, self.height - y - pixels.shape[0], origin="upper")

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes of matplotlib in a place of the sheet.

        x: Left edge, px.
        y: Top edge, px.
        width: px.
        height: px.
        """
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def save(self, path: Path) -> None:
        """Writes a PNG, whole or not at all; the same sheet gives the same bytes."""
        with replacing(path) as stream:
            self.figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})


def fit_cell(height: int, width: int, cell: int) -> tuple[int, int]:
    """Height and width in pixels that fill a square cell.

    height: Of the image, pixels.
    width: Of the image, pixels.
    cell: Side of the cell, px.
    """
    scale = cell / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image at another size, uint8 [*size, 3]. Smooth when it gets smaller, square pixels when it gets larger.

    pixels: uint8 [H, W, 3].
    size: Height and width of the result, px.
    """
    height, width = size
    smaller = height < pixels.shape[0]
    method = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((width, height), method))


def framed(pixels: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """An image with a white and black rectangle in it, uint8 [H, W, 3].

    pixels: uint8 [H, W, 3].
    box: Top, left, bottom and right, px.
    """
    from PIL import ImageDraw

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    top, left, bottom, right = (round(side) for side in box)
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="black")
    draw.rectangle((left - 1, top - 1, right, bottom), outline="white")
    return np.asarray(image)


def error_image(error: np.ndarray, scale: float) -> np.ndarray:
    """Errors in the colours of the scale, uint8 [H, W, 3].

    error: float [H, W], levels of 0..255.
    scale: Error that gets the last colour, levels.

    Colours follow the square root, so that small errors stay visible beside large ones.
    """
    from matplotlib import colormaps

    return (colormaps[ERROR_COLOURS](np.sqrt(np.clip(error / scale, 0, 1)))[..., :3] * 255).round().astype(np.uint8)


def draw_error_scale(canvas: Canvas, x: int, y: int, width: int, scale: float) -> None:
    """Draws a colour bar with its levels below.

    canvas: Drawn on.
    x: Left edge, px.
    y: Top edge, px.
    width: Of the bar, px.
    scale: As in `error_image`.
    """
    canvas.image(x, y, error_image(np.tile(np.linspace(0, 1, width) ** 2 * scale, (16, 1)), scale))
    for place, alignment in ((0, "left"), (0.25, "center"), (0.5, "center"), (1, "right")):
        words = f"{scale:g} or more" if place == 1 and scale < 255 else f"{place**2 * scale:.3g}"
        canvas.text(x + width * place, y + 22, words, SMALL, ha=alignment)


def shorten(name: str, most: int = 60) -> str:
    """A name cut to a number of characters.

    name: The name.
    most: Characters to keep, at most.
    """
    return name if len(name) <= most else f"{name[: most - 3]}..."
