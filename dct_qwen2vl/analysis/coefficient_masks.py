"""Masks of the coefficients that a token keeps: a panel for each plane and frame frequency.

Letters used for shapes in this file: (bt, bh, bw) a block.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from dct_qwen2vl.analysis.sheet_canvas import DPI, FAINT, LINE, SMALL, Canvas
from dct_qwen2vl.analysis.token_measures import PIXEL_PATCH

if TYPE_CHECKING:
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

PANEL = 132  # side of a mask of one plane and frame frequency, where there is room for it
PANEL_GAP = 12
AXIS = 52  # for the labels of an axis
PLANES = ("Y", "Cb", "Cr")
PLANE_COLOURS = ("#3c3c3c", "#2f6db5", "#c2452f")
DROPPED, ABSENT, CORNER = "#e4e4e4", "#ffffff", "#e8a200"


def panel_layout(config: "DCTConfig", cell: int) -> tuple[int, int]:
    """Side of one mask and gap to the next, px. The masks of all frame frequencies stand side by side in a cell."""
    bt = config.block[0]
    gap = PANEL_GAP if bt <= 8 else 3
    return max(1, min(PANEL, (cell - AXIS - (bt - 1) * gap) // bt)), gap


def mask_height(configs: list["DCTConfig"], cell: int, keys: int) -> int:
    """Height that `draw_masks` needs below its y, px.

    configs: Formats that are drawn side by side.
    cell: Width of one format's column, px.
    keys: Height of the keys beside the masks, px. The least result.
    """
    return max(keys, LINE + max(3 * sum(panel_layout(config, cell)) for config in configs) + AXIS)


def draw_masks(canvas: Canvas, x: int, y: int, config: "DCTConfig", cell: int, still: bool) -> None:
    """Draws which coefficients are kept: planes from top to bottom, frame frequencies from left to right.

    canvas: Drawn on.
    x: Left edge, px.
    y: Top edge, px.
    config: The token format.
    cell: Width of the column, px.
    still: Whether the source is an image.
    """
    bt, bh, bw = config.block
    side, gap = panel_layout(config, cell)
    colours = mask_colours(config)
    for plane, frequency in np.ndindex(3, bt):
        left, top = x + AXIS + frequency * (side + gap), y + LINE + plane * (side + gap)
        axes = canvas.axes(left, top, side, side)
        axes.imshow(colours[plane, frequency], interpolation="nearest", extent=(0, bw, bh, 0), aspect="auto")
        if frequency < PIXEL_PATCH[0] and bh > PIXEL_PATCH[1]:
            corner = PIXEL_PATCH[1]
            axes.plot([0, corner, corner], [corner, corner, 0], color=CORNER, linewidth=1.5)
        _ticks(axes, side, bh, bw, plane, frequency)
        if frequency == 0:
            canvas.text(x, top + side / 2, PLANES[plane], va="center", color=PLANE_COLOURS[plane], weight="bold")
        if plane == 0 and (bt <= 2 or frequency == 0):
            zero = " (0 in a still)" if still and frequency else ""
            words = f"frame freq. {frequency}{zero}" if bt <= 2 else f"frame frequencies 0 to {bt - 1}"
            canvas.text(left, y, words, SMALL, color=FAINT)
    words = "column frequency; row frequency downwards"
    canvas.text(x + AXIS, y + LINE + 3 * side + 2 * gap + 26, words, SMALL, color=FAINT)


def mask_colours(config: "DCTConfig") -> np.ndarray:
    """float [3, bt, bh, bw, rgb]: the plane's colour where a coefficient is kept."""
    from matplotlib.colors import to_rgb

    bt, bh, bw = config.block
    kept = np.zeros((3, bt, bh, bw), dtype=bool)
    kept.ravel()[list(config.kept)] = True
    colours = np.tile(to_rgb(DROPPED), (3, bt, bh, bw, 1))
    if config.chroma == "420":
        colours[1:, :, bh // 2 :], colours[1:, :, :, bw // 2 :] = to_rgb(ABSENT), to_rgb(ABSENT)
    for plane, colour in enumerate(PLANE_COLOURS):
        colours[plane][kept[plane]] = to_rgb(colour)
    return colours


def _ticks(axes: Any, side: int, rows: int, columns: int, plane: int, frequency: int) -> None:
    """Labels on the outer panels alone, and few where there is little room. The zero stands on the first, as it would
    run into the neighbour's last."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns // 2, columns], yticks=[0, rows // 2, rows])
    half_column, half_row = ("", "") if side < 70 else (columns // 2, rows // 2)
    below = ["" if frequency else "0", half_column, "" if side < 70 and frequency else columns]
    axes.set_xticklabels([] if plane < 2 else below)
    axes.set_yticklabels([] if frequency else ["" if plane else "0", half_row, rows])
    axes.tick_params(labelsize=SMALL * 72 / DPI, length=3, pad=2)
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color=FAINT)


def draw_mask_key(canvas: Canvas, x: int, y: int) -> None:
    """Draws what the colours of the masks mean.

    canvas: Drawn on.
    x: Left edge, px.
    y: Top edge, px.
    """
    keys = [
        (PLANE_COLOURS, "kept: Y, Cb, Cr"),
        ((DROPPED,), "dropped"),
        ((ABSENT,), "not there: 4:2:0 has colour at half the size"),
    ]
    for number, (colours, words) in enumerate(keys):
        top = y + number * (LINE + 4)
        for place, colour in enumerate(colours):
            swatch = canvas.axes(x + place * 18, top, 14, 14)
            swatch.set(xticks=[], yticks=[], facecolor=colour)
            for spine in swatch.spines.values():
                spine.set(linewidth=0.6, color=FAINT)
        canvas.text(x + 62, top - 2, words)
    line = canvas.axes(x, y + 3 * (LINE + 4), 50, 14)
    line.plot([0, 1], [0, 0], color=CORNER, linewidth=1.5)
    line.set_axis_off()
    canvas.text(x + 62, y + 3 * (LINE + 4) - 2, "inside: what as many tokens of pixels show")
