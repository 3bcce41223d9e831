"""A sheet that shows what DCT tokens keep of an image or a video.

    python dct_tokenizer.py show photo.jpg --output sheet.png
    python dct_tokenizer.py show video.mp4 --presets x4 mine.json --frames 8
    python dct_tokenizer.py show video.mp4 --skip-db 38

For each preset: what its tokens decode to, where that differs from the source, how many tokens and floats it takes, and
which coefficients it keeps. With --skip-db, also which cells a kept cell already shows. The source is the file resized
as the image processor does it, to a size that suits all presets of the sheet, so that their figures can be compared.

Letters used for shapes in this file: T H W frames, rows and columns of the source, S frames of it that are shown,
(bt, bh, bw) a block.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dct_qwen2vl.analysis.skipped_cells import skip, tint_skipped
from dct_qwen2vl.common.files import replacing
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.media import VIDEO_EXTENSIONS, MediaError, VideoSampling, decode_image, decode_video

if TYPE_CHECKING:
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

# Most pixels of an image and of one frame of a video: Qwen2-VL's processor, and its utilities for videos.
MAX_PIXELS, MAX_FRAME_PIXELS = 28 * 28 * 1280, 28 * 28 * 768
# 32 frames are enough to measure; at 1080p they already take 200 MB.
SAMPLING = VideoSampling(fps=2.0, min_frames=4, max_frames=32)

# Layout, in px.
DPI = 100
CELL = 400  # side of an image
FRAME_CELL = 160  # width of a frame of a video where many are shown
DETAIL = 100  # side of the window of the source that is shown enlarged
GAP = 18
LINE = 19
PANEL = 132  # side of a mask of one plane and frame frequency, where there is room for it
PANEL_GAP = 12
STRIP_GAP = 6
AXIS = 52  # for the labels of an axis
TEXT_SIZE, SMALL, TITLE = 14, 12, 20  # px
INK, FAINT = "#1a1a1a", "#5f5f5f"

PIXEL_PATCH = (2, 14, 14)  # frames, rows, columns of a patch of Qwen2-VL

PLANES = ("Y", "Cb", "Cr")
PLANE_COLOURS = ("#3c3c3c", "#2f6db5", "#c2452f")
DROPPED, ABSENT, CORNER = "#e4e4e4", "#ffffff", "#e8a200"
ERROR_COLOURS = "inferno"
SKIPPED_WORDS = ["cells that skipping leaves out are blue:", "a kept cell already shows them"]
ERROR_WORDS = ["error: absolute difference from the source, in", "levels of 0 to 255, mean of R, G and B"]


class SheetError(UserError):
    """The sheet cannot be drawn. The message is one line: what, where, what to type next."""


@dataclass(frozen=True)
class Result:
    """What the tokens of one configuration hold of a video of T frames.

    decoded: uint8 [S, H, W, 3], the frames shown. error: float32 [S, H, W], the absolute difference from the source,
    in levels of 0..255, mean of R, G and B. psnr, pixels_psnr: dB over all T frames, infinite where nothing is lost;
    the second of as many tokens of pixels, that is, of the source at a smaller size. kept: bool [S, rows, columns], the
    merge cells of the frames shown that skipping keeps, or None without it; then tokens are those of kept cells, and
    the others are decoded as what they are a copy of.
    """

    config: "DCTConfig"
    tokens: int
    decoded: np.ndarray
    error: np.ndarray
    psnr: float
    pixels_psnr: float
    kept: np.ndarray | None = None
    share: float = 1.0  # of all cells that are kept


# Measuring


def common_factor(configs: list["DCTConfig"], max_pixels: int) -> int:
    """Pixels of which height and width must be multiples to suit all. Raises SheetError if there is no sensible one."""
    for config in configs:
        if config.block[1] != config.block[2]:
            raise SheetError(
                f"{config.name} has blocks of {config.block[1]} x {config.block[2]} px: only squares are shown"
            )
    factors = [config.resize_factor[0] for config in configs]
    factor = math.lcm(*factors)
    needs = f"{', '.join(config.name for config in configs)} need multiples of {', '.join(map(str, factors))} px"
    if factor > 2 * max(factors):  # would stretch images
        raise SheetError(f"{needs}, together of {factor} px, too coarse to compare them: show them on separate sheets")
    if factor**2 > max_pixels:
        raise SheetError(f"{needs}: --max-pixels must be at least {factor**2}, got {max_pixels}")
    return factor


def read_frames(path: Path, factor: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 RGB [T, H, W, 3] of an image (T = 1) or video, and the height and width it has in the file.

    Raises MediaError, OSError.
    """
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    original = (0, 0)

    def fit(height: int, width: int, frames: int) -> tuple[int, int]:
        nonlocal original
        original = height, width
        return target_size(height, width, factor, min(56 * 56, max_pixels), max_pixels)

    data = path.read_bytes()
    frames = decode_video(data, SAMPLING, fit=fit) if is_video(path) else decode_image(data, fit=fit)[None]
    return frames, original


def is_video(path: Path) -> bool:
    """By its extension."""
    return path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS


def measure(frames: np.ndarray, config: "DCTConfig", shown: list[int], skip_db: float | None = None) -> Result:
    """frames: uint8 [T, H, W, 3]; shown: the S frame numbers to keep decoded; skip_db: None for no skipping."""
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    tokenizer, bt = DCTTokenizer(config), config.block[0]
    scale = math.sqrt(math.ceil(len(frames) / bt) / math.ceil(len(frames) / PIXEL_PATCH[0]))
    filled, kept_cells = skip(frames, config, skip_db) if skip_db else (None, None)
    share = 1.0 if kept_cells is None else float(kept_cells.mean())
    scale *= math.sqrt(share)
    tokens, squares, pixels_squares, kept = 0, 0.0, 0.0, {}
    step = bt * max(1, 8 // bt)  # frames at once: videos are long
    for start in range(0, len(frames), step):
        chunk = frames[start : start + step]
        encoded, grid = tokenizer.encode(chunk)
        if filled is not None:
            encoded = filled[tokens : tokens + len(encoded)]
        decoded = tokenizer.decode(encoded, grid).numpy()[: len(chunk)]
        tokens += len(encoded)
        squares += _squares(decoded, chunk)
        pixels_squares += sum(_squares(_as_few_pixels(frame, config, scale), frame) for frame in chunk)
        kept.update((number, decoded[number - start]) for number in shown if start <= number < start + len(chunk))
    decoded = np.stack([kept[number] for number in shown])
    error = np.abs(decoded.astype(np.float32) - frames[shown]).mean(axis=-1)
    psnr, pixels_psnr = (_psnr(value / frames.size) for value in (squares, pixels_squares))
    if kept_cells is not None:
        tokens = int(kept_cells.sum()) * config.merge**2
        kept_cells = kept_cells[[number // bt for number in shown]]
    return Result(config, tokens, decoded, error, psnr, pixels_psnr, kept_cells, share)


def _squares(found: np.ndarray, expected: np.ndarray) -> float:
    """Sum of squared differences of uint8 arrays."""
    return float(np.square(found.astype(np.int32) - expected).sum(dtype=np.int64))


def _psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def _as_few_pixels(frame: np.ndarray, config: "DCTConfig", scale: float) -> np.ndarray:
    """A frame [H, W, 3] at the size at which Qwen2-VL's patches of pixels are as many as the tokens of `config`, by
    Lanczos, enlarged again by bicubic interpolation. scale: what differing numbers of frames in a token add to it."""
    (height, width), (_, bh, bw) = frame.shape[:2], config.block
    small = round(width * scale * PIXEL_PATCH[2] / bw), round(height * scale * PIXEL_PATCH[1] / bh)
    if small[0] >= width:
        return frame
    image = Image.fromarray(frame).resize((max(1, small[0]), max(1, small[1])), Image.Resampling.LANCZOS)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def worst_window(error: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the side x side window of `error` [H, W] with the greatest sum, the first of equal ones."""
    sums = np.zeros((error.shape[0] + 1, error.shape[1] + 1))
    sums[1:, 1:] = error.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(windows.round(6).argmax(), windows.shape)
    return int(top), int(left)


def error_scale(results: list[Result]) -> float:
    """Levels of 0..255 at the end of the colour scale: a round number that one pixel in two hundred is above."""
    most = max(float(np.quantile(result.error, 0.995)) for result in results)
    return next(step for step in (4, 8, 16, 32, 64, 128, 255) if step >= most)


# Words


def describe(result: Result, frames: int, height: int, width: int) -> list[str]:
    """The lines above what a preset keeps of `frames` frames of height x width px."""
    config, floats = result.config, result.tokens * result.config.num_coefficients
    bt, bh, bw = config.block
    unit = "an image" if frames == 1 else "a video"
    constant = sum(index // (bh * bw) % bt == 0 for index in config.kept)
    zeros = f" ({1 - constant / config.num_coefficients:.0%} are 0)" if frames == 1 < bt else ""
    skipped = "" if result.kept is None or frames == 1 else f" ({result.share:.0%} kept)"
    lost = "every byte is kept" if math.isinf(result.psnr) else f"PSNR {result.psnr:.1f} dB"
    lines = [
        f"{bt} x {bh} x {bw} blocks, {':'.join(config.chroma)}, {config.num_coefficients:,} floats a token",
        f"{result.tokens:,} tokens {unit}, {result.tokens // config.merge**2:,} in the language model{skipped}",
        f"{floats:,} floats {unit}, {floats / (frames * height * width):.2f} a pixel{zeros}",
    ]
    if math.isinf(result.pixels_psnr):
        return [*lines, lost]
    return [*lines, f"{lost} (as many tokens of pixels: {result.pixels_psnr:.1f} dB)"]


# Drawing


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
        """The top left corner of the words is at x, y, unless `ha` or `va` say otherwise. size: px of the font."""
        style = {"va": "top", "color": INK, **style}
        self.figure.text(x / self.width, 1 - y / self.height, words, fontsize=size * 72 / DPI, **style)

    def lines(self, x: float, y: float, lines: list[str], **style: Any) -> None:
        for number, words in enumerate(lines):
            self.text(x, y + number * LINE, words, **style)

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        """uint8 [h, w, 3], pixel for pixel."""
        self.figure.figimage(pixels, x, self.height - y - pixels.shape[0], origin="upper")

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def save(self, path: Path) -> None:
        """Writes a PNG, whole or not at all; the same sheet gives the same bytes."""
        with replacing(path) as stream:
            self.figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})


def fit_cell(height: int, width: int, cell: int) -> tuple[int, int]:
    """Height and width that fill a cell of `cell` px."""
    scale = cell / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> [*size, 3]: smooth when made smaller, square pixels when enlarged."""
    height, width = size
    smaller = height < pixels.shape[0]
    method = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((width, height), method))


def framed(pixels: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """uint8 [H, W, 3] with a white and black rectangle round (top, left, bottom, right)."""
    from PIL import ImageDraw

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    top, left, bottom, right = (round(side) for side in box)
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="black")
    draw.rectangle((left - 1, top - 1, right, bottom), outline="white")
    return np.asarray(image)


def error_image(error: np.ndarray, scale: float) -> np.ndarray:
    """float [H, W] in levels -> uint8 [H, W, 3] in the colours of the scale.

    The colours go by the square root, so that small errors stay visible beside large ones.
    """
    from matplotlib import colormaps

    return (colormaps[ERROR_COLOURS](np.sqrt(np.clip(error / scale, 0, 1)))[..., :3] * 255).round().astype(np.uint8)


def draw_error_scale(canvas: Canvas, x: int, y: int, width: int, scale: float) -> None:
    """A colour bar with its levels below."""
    canvas.image(x, y, error_image(np.tile(np.linspace(0, 1, width) ** 2 * scale, (16, 1)), scale))
    for place, alignment in ((0, "left"), (0.25, "center"), (0.5, "center"), (1, "right")):
        words = f"{scale:g} or more" if place == 1 and scale < 255 else f"{place**2 * scale:.3g}"
        canvas.text(x + width * place, y + 22, words, SMALL, ha=alignment)


def panel_layout(config: "DCTConfig", cell: int) -> tuple[int, int]:
    """px of the side of one mask and of the gap to the next, so that those of all frame frequencies stand side by side
    in a cell."""
    bt = config.block[0]
    gap = PANEL_GAP if bt <= 8 else 3
    return max(1, min(PANEL, (cell - AXIS - (bt - 1) * gap) // bt)), gap


def mask_height(configs: list["DCTConfig"], cell: int, keys: int) -> int:
    """px that `draw_masks` needs below its y, at least the height of the keys beside it."""
    return max(keys, LINE + max(3 * sum(panel_layout(config, cell)) for config in configs) + AXIS)


def draw_masks(canvas: Canvas, x: int, y: int, config: "DCTConfig", cell: int, still: bool) -> None:
    """Which coefficients are kept: planes from top to bottom, frame frequencies from left to right."""
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
    """What the colours of the masks mean."""
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


def shorten(name: str, most: int = 60) -> str:
    """At most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 3]}..."


def draw_image_sheet(name: str, original: tuple[int, int], frames: np.ndarray, results: list[Result]) -> Canvas:
    """Columns: source and presets. Rows: whole, detail, error, masks. frames: [1, H, W, 3]; original: height and width
    in the file."""
    source = frames[0]
    height, width = source.shape[:2]
    cell_size = fit_cell(height, width, CELL)
    scale, side = error_scale(results), min(DETAIL, height, width)
    lost = sum(result.error[0] for result in results)
    top, left = worst_window(lost, side)
    where = ", where most is lost" if lost.any() else ""
    zoom = CELL // side
    shrink = cell_size[0] / height
    box = (top * shrink, left * shrink, (top + side) * shrink, (left + side) * shrink)
    configs = [result.config for result in results]

    rows = [GAP + TITLE + 2 * GAP]
    steps = [5 * LINE + 12 + cell_size[0], LINE + 8 + zoom * side, LINE + 8 + max(cell_size[0], 5 * LINE)]
    if results[0].kept is not None:
        steps.append(LINE + 8 + max(cell_size[0], 3 * LINE))
    for step in steps:
        rows.append(rows[-1] + step + GAP)
    canvas = Canvas(
        GAP + (len(results) + 1) * (CELL + GAP), rows[-1] + LINE + mask_height(configs, CELL, 7 * LINE) + GAP
    )
    canvas.text(GAP, GAP, f"{shorten(name)}: what DCT tokens keep of it", TITLE, weight="bold")
    xs = [GAP + number * (CELL + GAP) for number in range(len(results) + 1)]
    below_words = rows[0] + 5 * LINE + 12

    canvas.text(xs[0], rows[0], "source", weight="bold")
    canvas.lines(
        xs[0],
        rows[0] + LINE,
        [_sizes(original, height, width), f"multiples of {_multiple(configs)} px suit all presets"],
    )
    canvas.image(xs[0], below_words, framed(scaled(source, cell_size), box))
    canvas.text(xs[0], rows[1], f"detail, {zoom} times{where}")
    window = np.s_[top : top + side, left : left + side]
    canvas.image(xs[0], rows[1] + LINE + 8, scaled(source[window], (zoom * side, zoom * side)))
    canvas.lines(xs[0], rows[2] + LINE + 8, ERROR_WORDS)
    draw_error_scale(canvas, xs[0], rows[2] + 4 * LINE, CELL * 3 // 4, scale)
    canvas.text(xs[0], rows[-1], "coefficients kept, of each block")
    draw_mask_key(canvas, xs[0], rows[-1] + 2 * LINE)
    if results[0].kept is not None:
        canvas.lines(xs[0], rows[3] + LINE + 8, SKIPPED_WORDS)
    for x, result in zip(xs[1:], results):
        canvas.text(x, rows[0], shorten(result.config.name, 40), weight="bold")
        canvas.lines(x, rows[0] + LINE, describe(result, 1, height, width))
        canvas.image(x, below_words, framed(scaled(result.decoded[0], cell_size), box))
        canvas.image(x, rows[1] + LINE + 8, scaled(result.decoded[0][window], (zoom * side, zoom * side)))
        canvas.text(x, rows[2], f"mean {result.error.mean():.2f}, most {result.error.max():.0f}", color=FAINT)
        canvas.image(x, rows[2] + LINE + 8, scaled(error_image(result.error[0], scale), cell_size))
        if result.kept is not None:
            canvas.text(x, rows[3], f"{result.share:.0%} of the cells are kept", color=FAINT)
            tinted = tint_skipped(result.decoded[:1], result.kept)[0]
            canvas.image(x, rows[3] + LINE + 8, scaled(tinted, cell_size))
        draw_masks(canvas, x, rows[-1], result.config, CELL, still=True)
    return canvas


def _sizes(original: tuple[int, int], height: int, width: int) -> str:
    if original == (height, width):
        return f"{height} x {width} px (height x width)"
    return f"{original[0]} x {original[1]} px, resized to {height} x {width}"


def _multiple(configs: list["DCTConfig"]) -> int:
    return math.lcm(*(config.resize_factor[0] for config in configs))


def draw_video_sheet(
    name: str, original: tuple[int, int], frames: np.ndarray, results: list[Result], shown: list[int]
) -> Canvas:
    """Rows: a strip of frames of the source, then of each preset decoded, its error and, with skipping, the cells it
    keeps; masks below."""
    height, width = frames.shape[1:3]
    scale, configs = error_scale(results), [result.config for result in results]
    columns = (len(results) + 1) * (CELL + GAP) - GAP
    frame_width = min(CELL, max(FRAME_CELL, (columns + STRIP_GAP) // len(shown) - STRIP_GAP))
    cell_size = fit_cell(height, width, min(CELL, max(frame_width, round(frame_width * height / width))))
    strip, strips = cell_size[0] + STRIP_GAP, 2 if results[0].kept is None else 3
    rows = [GAP + TITLE + 2 * GAP]
    rows.append(rows[0] + 3 * LINE + 8 + strip + GAP)
    for _ in results:
        rows.append(rows[-1] + 3 * LINE + 8 + strips * strip + GAP)
    columns = max(columns, len(shown) * (cell_size[1] + STRIP_GAP))
    canvas = Canvas(2 * GAP + columns, rows[-1] + 2 * LINE + mask_height(configs, CELL, 16 * LINE) + GAP)
    xs = [GAP + number * (cell_size[1] + STRIP_GAP) for number in range(len(shown))]

    canvas.text(GAP, GAP, f"{shorten(name)}: what DCT tokens keep of it", TITLE, weight="bold")
    canvas.text(GAP, rows[0], "source", weight="bold")
    sizes = f"{_sizes(original, height, width)}; multiples of {_multiple(configs)} px suit all presets"
    canvas.text(GAP, rows[0] + LINE, f"{len(frames)} frames read, {sizes}")
    for x, number in zip(xs, shown):
        canvas.text(x, rows[0] + 2 * LINE + 4, f"frame {number}", SMALL, color=FAINT)
        canvas.image(x, rows[0] + 3 * LINE + 8, scaled(frames[number], cell_size))
    for y, result in zip(rows[1:], results):
        lines, top = describe(result, len(frames), height, width), y + 3 * LINE + 8
        canvas.text(GAP, y, shorten(result.config.name), weight="bold")
        canvas.lines(GAP, y + LINE, ["; ".join(lines[:2]), "; ".join(lines[2:])])
        for place, x in enumerate(xs):
            canvas.image(x, top, scaled(result.decoded[place], cell_size))
            canvas.image(x, top + strip, scaled(error_image(result.error[place], scale), cell_size))
        if result.kept is not None:
            for x, tinted in zip(xs, tint_skipped(result.decoded, result.kept)):
                canvas.image(x, top + 2 * strip, scaled(tinted, cell_size))
    _draw_video_masks(canvas, rows[-1], configs, scale, strips == 3)
    return canvas


def _draw_video_masks(canvas: Canvas, y: int, configs: list["DCTConfig"], scale: float, skips: bool) -> None:
    """The last row: keys on the left, then the masks of each preset."""
    canvas.text(GAP, y, "coefficients kept, of each block")
    draw_mask_key(canvas, GAP, y + 2 * LINE)
    canvas.lines(GAP, y + 8 * LINE, ERROR_WORDS)
    draw_error_scale(canvas, GAP, y + 10 * LINE + 8, CELL * 3 // 4, scale)
    if skips:
        canvas.lines(GAP, y + 13 * LINE, SKIPPED_WORDS)
    for number, config in enumerate(configs, start=1):
        x = GAP + number * (CELL + GAP)
        canvas.text(x, y, shorten(config.name, 40), weight="bold")
        draw_masks(canvas, x, y + 2 * LINE, config, CELL, still=False)


# Command line


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list["DCTConfig"]]:
    """Unknown presets are usage errors."""
    parser = argparse.ArgumentParser(prog="dct_tokenizer.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["show"], help="draw the sheet")
    parser.add_argument("file", type=Path, help=f"an image, or a video ({', '.join(VIDEO_EXTENSIONS)})")
    parser.add_argument("--output", type=Path, default=Path("sheet.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["exact", "x4", "x16"],
        metavar="NAME",
        help="exact, x4, x16 or DCT configurations as .json (default: exact x4 x16)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        help=f"most pixels of an image, or of each frame (default: {MAX_PIXELS}, for videos {MAX_FRAME_PIXELS})",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=6,
        help="frames of a video to show, spread over the 4 to 32 that are read at 2 a second (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-db",
        type=float,
        metavar="DB",
        help="leave out cells that a kept cell already shows with this PSNR, 38 for example (default: keep all)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.frames < 1:
        parser.error(f"argument --frames: must be at least 1, got {arguments.frames}")
    if arguments.max_pixels is not None and arguments.max_pixels < 1:
        parser.error(f"argument --max-pixels: must be at least 1, got {arguments.max_pixels}")
    if arguments.skip_db is not None and not arguments.skip_db > 0:
        parser.error(f"argument --skip-db: must be above 0, got {arguments.skip_db:g}")
    if arguments.output.suffix.lower() != ".png":
        parser.error(f"argument --output: the sheet is a PNG, got {arguments.output}")
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    try:
        configs = [DCTConfig.resolve(name) for name in arguments.presets]
        files = [Path(name).stem if name.endswith(".json") else "" for name in arguments.presets]
        configs = [replace(config, name=stem or config.name) for config, stem in zip(configs, files)]
    except (ValueError, OSError) as error:
        parser.error(f"argument --presets: {error}")
    return arguments, configs


def make_sheet(
    path: Path, configs: list["DCTConfig"], max_pixels: int | None, most_frames: int, skip_db: float | None = None
) -> tuple[Canvas, list[str]]:
    """The sheet of a file, and its figures as lines. Raises MediaError, SheetError, OSError."""
    max_pixels = max_pixels or (MAX_FRAME_PIXELS if is_video(path) else MAX_PIXELS)
    frames, original = read_frames(path, common_factor(configs, max_pixels), max_pixels)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(most_frames, len(frames))).round().astype(int)).tolist()
    results = [measure(frames, config, shown, skip_db) for config in configs]
    if is_video(path):
        canvas = draw_video_sheet(path.name, original, frames, results, shown)
    else:
        canvas = draw_image_sheet(path.name, original, frames, results)
    return canvas, [f"{r.config.name}: {'; '.join(describe(r, *frames.shape[:3]))}" for r in results]


def main(argv: list[str] | None = None) -> int:
    arguments, configs = parse_arguments(argv)
    try:
        if arguments.output.exists() and not arguments.force:
            raise SheetError(f"{arguments.output} is there already: choose another --output, or add --force")
        if not arguments.output.parent.is_dir():
            raise SheetError(f"there is no folder {arguments.output.parent} for --output: make it first")
        sheet = (arguments.file, configs, arguments.max_pixels, arguments.frames, arguments.skip_db)
        with plain_style():
            canvas, lines = make_sheet(*sheet)
            canvas.save(arguments.output)
    except (MediaError, SheetError, OSError, ValueError) as error:
        if arguments.debug:
            raise
        where = f"{arguments.file}: " if isinstance(error, MediaError) else ""
        print(f"dct_tokenizer.py: {where}{error}", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    print(f"Wrote {arguments.output} ({canvas.width} x {canvas.height} px).")
    return 0
