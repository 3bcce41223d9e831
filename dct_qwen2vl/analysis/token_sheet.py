"""A sheet that shows what DCT tokens keep of an image or a video.

    python dct_tokenizer.py show photo.jpg --output sheet.png
    python dct_tokenizer.py show video.mp4 --presets x4 mine.json --frames 8
    python dct_tokenizer.py show video.mp4 --skip-db 38

For each preset: what its tokens decode to, where that differs from the source, how many tokens and floats it takes, and
which coefficients it keeps. With --skip-db, also which cells a kept cell already shows. The source is the file resized
as the image processor does it, to a size that suits all presets of the sheet, so that their figures can be compared.

Letters used for shapes in this file: T H W frames, rows and columns of the source.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dct_qwen2vl.analysis.coefficient_masks import draw_mask_key, draw_masks, mask_height
from dct_qwen2vl.analysis.output_file import check_output, naming
from dct_qwen2vl.analysis.sheet_canvas import (
    CELL,
    FAINT,
    GAP,
    LINE,
    SMALL,
    TITLE,
    Canvas,
    draw_error_scale,
    error_image,
    fit_cell,
    framed,
    plain_style,
    scaled,
    shorten,
)
from dct_qwen2vl.analysis.skipped_cells import tint_skipped
from dct_qwen2vl.analysis.token_measures import (
    Result,
    common_factor,
    describe,
    error_scale,
    is_video,
    measure,
    read_frames,
    worst_window,
)
from dct_qwen2vl.common.scripts import run_main
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS

if TYPE_CHECKING:
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

# Most pixels of an image and of one frame of a video: Qwen2-VL's processor, and its utilities for videos.
MAX_PIXELS, MAX_FRAME_PIXELS = 28 * 28 * 1280, 28 * 28 * 768
FRAME_CELL = 160  # width of a frame of a video where many are shown
DETAIL = 100  # side of the window of the source that is shown enlarged
STRIP_GAP = 6
SKIPPED_WORDS = ["cells that skipping leaves out are blue:", "a kept cell already shows them"]
ERROR_WORDS = ["error: absolute difference from the source, in", "levels of 0 to 255, mean of R, G and B"]


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
    if arguments.skip_db is not None and not 0 <= arguments.skip_db < math.inf:
        parser.error(f"argument --skip-db: must be a finite number of dB, at least 0, got {arguments.skip_db:g}")
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


def main(argv: list[str] | None = None) -> int:
    arguments, configs = parse_arguments(argv)
    return run_main("dct_tokenizer.py", lambda: draw(arguments, configs), arguments.debug)


def draw(arguments: argparse.Namespace, configs: list["DCTConfig"]) -> int:
    """Draws the sheet and prints its figures. Raises UserError, OSError."""
    check_output(arguments.output, arguments.force)
    with plain_style():
        sheet = (arguments.file, configs, arguments.max_pixels, arguments.frames, arguments.skip_db)
        canvas, lines = make_sheet(*sheet)
        canvas.save(arguments.output)
    print(*lines, sep="\n")
    print(f"Wrote {arguments.output} ({canvas.width} x {canvas.height} px).")
    return 0


def make_sheet(
    path: Path, configs: list["DCTConfig"], max_pixels: int | None, most_frames: int, skip_db: float | None = None
) -> tuple[Canvas, list[str]]:
    """The sheet of a file, and its figures as lines. Raises UserError, OSError.

    configs: one for each column.
    max_pixels: most of an image or frame. None: Qwen2-VL's.
    most_frames: of a video that are shown.
    skip_db: dB, the threshold of skipping; None keeps all cells.
    """
    max_pixels = max_pixels or (MAX_FRAME_PIXELS if is_video(path) else MAX_PIXELS)
    factor = common_factor(configs, max_pixels)
    with naming(path):
        frames, original = read_frames(path, factor, max_pixels)
        planes = read_frames(path, factor, max_pixels, planes=True)[0] if skip_db and is_video(path) else None
    shown = np.unique(np.linspace(0, len(frames) - 1, min(most_frames, len(frames))).round().astype(int)).tolist()
    results = [measure(frames, config, shown, skip_db, planes) for config in configs]
    words = [describe(result, *frames.shape[:3]) for result in results]
    if is_video(path):
        canvas = draw_video_sheet(path.name, original, frames, results, shown)
    else:
        canvas = draw_image_sheet(path.name, original, frames, results)
        if skip_db:
            words = [[*lines, words_of_kept(result)] for lines, result in zip(words, results)]
    return canvas, [f"{result.config.name}: {'; '.join(lines)}" for result, lines in zip(results, words)]


def words_of_kept(result: Result) -> str:
    """What stands over the kept cells of an image.

    result: What was measured, with skipping.
    """
    return f"{result.share:.0%} of the cells are kept"


def draw_image_sheet(name: str, original: tuple[int, int], frames: np.ndarray, results: list[Result]) -> Canvas:
    """Columns: source and presets. Rows: whole, detail, error, kept cells with skipping, masks.

    original: height and width in the file, px.
    frames: uint8 [1, H, W, 3]. The source.
    """
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
            canvas.text(x, rows[3], words_of_kept(result), color=FAINT)
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
    """Rows: a strip of frames of the source; for each preset, a strip decoded, one of its error and, with skipping, one
    of the cells it keeps; masks.

    original: height and width in the file, px.
    frames: uint8 [T, H, W, 3]. The source.
    shown: numbers of the frames in a strip.
    """
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
