"""How much of an image is left: DCT tokens, by order of coefficients, against downscaling at the same tokens.

    python -m benchmarks.quality.analysis.rate_distortion --plot rate_distortion.png --json rate_distortion.json

Stills and videos (pans, a zoom, a cut) are made from photographs that are not in the table of coefficient statistics.
Each is encoded and decoded with the real tokenizer, for every block side, chroma format, order and number of floats.
The other way to fewer tokens is a smaller image: downscaled, rounded to 8 bits, read in patches of 14 x 14 px without
loss and, to be compared, enlarged again with bicubic or Lanczos, whichever comes nearer to the original.

PSNR is of 8-bit RGB, by image or video, then the mean in dB; 60 dB stands for more. SSIM is of luma (Wang et al.,
IEEE Trans. Image Processing 2004: Gaussian windows), of every second frame. Floats are those that differ: a still is
encoded in blocks of one frame, as its frame differences are zero. Tokens are those of a 448 x 448 px still, or of one
frame of a video of that size.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.analysis.media_files import add_media_flags
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dct_qwen2vl.dct.configuration_dct import DCTConfig

SIDES = (14, 28, 56)  # rows and columns of a block, in pixels
# Of a frame. The half-size image has 3/4, the quarter-size image 3/16; whole blocks have 3/2 in 4:2:0.
FLOATS_PER_PIXEL = (3 / 64, 3 / 16, 3 / 8, 3 / 4, 9 / 8, 3 / 2)
SCALES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # sides of the downscaled image; 1/2 has the tokens of blocks of 28 px
FILTERS = {"bicubic": "BICUBIC", "area": "BOX", "Lanczos": "LANCZOS"}  # Pillow's names; all low-pass when downscaling
VIDEO_FRAMES = 4
STILL_PIXELS, VIDEO_PIXELS = 448 * 448, 224 * 224
MOST_PSNR = 60.0
FRAME_PIXELS = 448 * 448  # of the frame for which tokens are counted


@dataclass(frozen=True)
class Point:
    """One way of encoding, measured over all stills or all videos. floats_per_pixel and tokens are per frame."""

    material: str  # stills, videos
    method: str  # an order, a preset, or the filter of downscaling
    side: float  # of a block in pixels; for downscaling: of what a 14 x 14 patch shows, in pixels of the original
    chroma: str  # 444, 420
    floats_per_pixel: float
    tokens: float
    psnr: float  # dB
    ssim: float
    upscaling: str = ""  # the filter that enlarged it again


# Material


def held_out_material(seed: int) -> dict[str, list["np.ndarray"]]:
    """{"stills": uint8 [1, H, W, 3] each, "videos": uint8 [T, H, W, 3] each}, one video of each kind for each image."""
    import numpy as np

    from dct_qwen2vl.analysis.coefficient_moments import resized, sizes_of
    from dct_qwen2vl.analysis.natural_images import HELD_OUT_IMAGES, load, videos_of

    rng = np.random.default_rng(seed)
    images = [load(name) for name in HELD_OUT_IMAGES]
    stills = [resized(image[None], sizes_of(*image.shape[:2], (STILL_PIXELS,))[0]) for image in images]
    videos = []
    for number, image in enumerate(images):
        size = sizes_of(*image.shape[:2], (VIDEO_PIXELS,))[0]
        made = list(videos_of(image, images[number - 1], size, VIDEO_FRAMES, rng))
        videos.append(made[number % len(made)])
    return {"stills": stills, "videos": videos}


def given_material(images: list[Path], videos: list[Path]) -> dict[str, list["np.ndarray"]]:
    """As `held_out_material`, from files and folders; says what cannot be used. Raises UserError, OSError."""
    from dct_qwen2vl.analysis.coefficient_moments import resized, sizes_of
    from dct_qwen2vl.analysis.media_files import files_of, read_images, read_videos
    from dct_qwen2vl.data.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

    skipped: list[str] = []
    arrays = read_images(files_of(images, IMAGE_EXTENSIONS)[0], skipped)
    stills = [resized(array[None], sizes_of(*array.shape[:2], (STILL_PIXELS,))[0]) for array in arrays]
    films = (film[:VIDEO_FRAMES] for film in read_videos(files_of(videos, VIDEO_EXTENSIONS)[0], skipped))
    moving = [resized(film, sizes_of(*film.shape[1:3], (VIDEO_PIXELS,))[0]) for film in films]
    for line in skipped:
        print(f"skipped {line}")
    if not stills and not moving:
        raise UserError("nothing to measure: no file could be used; give --images or --videos others")
    return {"stills": stills, "videos": moving}


# Measuring


def score(material: list["np.ndarray"], decoded: Iterable["np.ndarray"]) -> tuple[float, float]:
    """Mean PSNR in dB and mean SSIM of what became of each still or video."""
    import numpy as np

    results = []
    for frames, other in zip(material, decoded):
        error = np.square(frames.astype(np.float32) - other).mean(dtype=np.float64)
        psnr = MOST_PSNR if error == 0 else min(MOST_PSNR, 10 * np.log10(255**2 / error))
        results.append((psnr, np.mean([ssim(a, b) for a, b in zip(frames[::2], other[::2])])))
    psnr, similarity = np.mean(results, axis=0)
    return float(psnr), float(similarity)


def ssim(first: "np.ndarray", second: "np.ndarray") -> float:
    """SSIM of the luma of two frames, uint8 [H, W, 3]."""
    import numpy as np
    from skimage.metrics import structural_similarity

    luma = [frame @ np.array([0.299, 0.587, 0.114], dtype=np.float32) for frame in (first, second)]
    return structural_similarity(
        *luma, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, truncate=3.5
    )


def resized_and_back(material: list["np.ndarray"], scale: float, down: str, up: str) -> Iterator["np.ndarray"]:
    """Every still or video, downscaled and enlarged again. down, up: Pillow's names of filters."""
    import numpy as np
    from PIL import Image

    down, up = Image.Resampling[down], Image.Resampling[up]

    def resize(frame: "np.ndarray") -> "np.ndarray":
        height, width = frame.shape[:2]
        small = Image.fromarray(frame).resize((round(width * scale), round(height * scale)), down)
        return np.asarray(small.resize((width, height), up))

    for frames in material:
        yield np.stack([resize(frame) for frame in frames])


def configs_of(
    block: tuple[int, int, int], floats: tuple[float, ...], weight: "torch.Tensor"
) -> Iterator[tuple[str, "DCTConfig"]]:
    """(order, configuration) for every number of floats, chroma format and order."""
    from dct_qwen2vl.dct.configuration_dct import CHROMA_FORMATS, ORDERS, DCTConfig

    for chroma in CHROMA_FORMATS:
        for per_pixel in floats:
            count = round(per_pixel * math.prod(block))
            for order in ORDERS:
                needed = weight if order == "weighted" else None
                yield order, DCTConfig.select(block, chroma, count, merge=1, order=order, weight=needed)


def measure_orders(
    name: str, material: list["np.ndarray"], side: int, floats: tuple[float, ...], weight: "torch.Tensor"
) -> Iterator[Point]:
    """Every order. Stills in blocks of one frame, videos of two."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    frames = 1 if name == "stills" else 2
    block = (frames, side, side)
    # A configuration's tokens are columns of these: the scale of a coefficient does not depend on the others.
    whole = [DCTTokenizer(DCTConfig.select(block, "444", merge=1)).encode(item) for item in material]
    known: dict[tuple[int, ...], tuple[float, float]] = {}  # orders often agree on what to keep
    for order, config in configs_of(block, floats, weight):
        if config.kept not in known:
            tokenizer, columns = DCTTokenizer(config), list(config.kept)
            decoded = (tokenizer.decode(tokens[:, columns], grid).numpy() for tokens, grid in whole)
            known[config.kept] = score(material, decoded)
        per_pixel = config.num_coefficients / math.prod(block)
        tokens = FRAME_PIXELS / math.prod(block)
        yield Point(name, order, side, config.chroma, per_pixel, tokens, *known[config.kept])


def measure_presets(name: str, material: list["np.ndarray"]) -> Iterator[Point]:
    """The presets; of a still only the coefficients of frame frequency 0 count as floats, the others being zero."""
    from dct_qwen2vl.dct.configuration_dct import PRESETS, DCTConfig
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    for preset in PRESETS:
        config = DCTConfig.preset(preset)
        tokenizer = DCTTokenizer(config)
        result = score(material, (tokenizer.decode(*tokenizer.encode(item)).numpy() for item in material))
        frames, side = config.block[:2]
        distinct = sum(index // side**2 % frames == 0 for index in config.kept)
        per_pixel = (distinct if name == "stills" else config.num_coefficients / frames) / side**2
        tokens = FRAME_PIXELS / side**2 / (1 if name == "stills" else frames)
        yield Point(name, preset, side, config.chroma, per_pixel, tokens, *result)


def measure_resizing(name: str, material: list["np.ndarray"], scales: tuple[float, ...]) -> Iterator[Point]:
    """Downscaling with every filter, enlarged with the better of two."""
    frames = 1 if name == "stills" else 2
    for method, down in FILTERS.items():
        for scale in scales:
            tried = {
                up: score(material, resized_and_back(material, scale, down, FILTERS[up]))
                for up in ("bicubic", "Lanczos")
            }
            up = max(tried, key=lambda name: tried[name][0])
            tokens = FRAME_PIXELS * scale**2 / 14**2 / frames
            yield Point(name, method, 14 / scale, "444", 3 * scale**2, tokens, *tried[up], up)


def measure(
    material: dict[str, list["np.ndarray"]],
    weight: "torch.Tensor",
    sides: tuple[int, ...] = SIDES,
    floats: tuple[float, ...] = FLOATS_PER_PIXEL,
    scales: tuple[float, ...] = SCALES,
) -> list[Point]:
    """Everything, for stills and videos."""
    points: list[Point] = []
    for name, items in material.items():
        if items:
            for side in sides:
                points += measure_orders(name, items, side, floats, weight)
            points += measure_presets(name, items)
            points += measure_resizing(name, items, scales)
    return points


# Results


def cell(point: Point | None) -> str:
    return f"{point.psnr:6.2f} {point.ssim:.3f}" if point else " " * 12


def order_table(points: list[Point], floats: tuple[float, ...], side: int) -> list[str]:
    """PSNR and SSIM over floats per pixel, for one block side: every order and chroma format, then downscaling."""
    lines = [f"blocks of {side} x {side} px: PSNR in dB and SSIM at so many floats per pixel of a frame"]
    lines.append(" " * 16 + "".join(f"{value:14.3f}" for value in floats))
    rows = list(dict.fromkeys((point.method, point.chroma) for point in points if point.side == side))
    rows += [(method, "444") for method in FILTERS if (method, "444") not in rows]
    for method, chroma in rows:
        of_row = [point for point in points if (point.method, point.chroma) == (method, chroma)]
        of_row = [point for point in of_row if point.side == side or method in FILTERS]
        found = [next((point for point in of_row if abs(point.floats_per_pixel / f - 1) < 0.03), None) for f in floats]
        if any(found):
            lines.append(f"{method:11} {chroma:4}" + "".join(f"{cell(point):>14}" for point in found))
    return lines


def token_table(points: list[Point], side: int) -> list[str]:
    """What blocks of one side keep, beside downscaling to the same tokens."""
    at_side = [point for point in points if abs(point.side - side) < 1e-9]
    at_side = [point for point in at_side if point.chroma == "420" or point.method in (*FILTERS, "exact")]
    equal = 3 * (14 / side) ** 2  # floats per pixel of the downscaled image
    wanted = [point for point in at_side if point.method in FILTERS or point.method in ("exact", "x4", "x16")]
    for factor in (1, 1.5, 2):
        for point in at_side:
            if point.method not in FILTERS and abs(point.floats_per_pixel / equal - factor) < 1e-3:
                wanted.append(point)
    lines = [f"{wanted[0].tokens:.0f} tokens a frame (blocks of {side} px):" if wanted else ""]
    for point in sorted(dict.fromkeys(wanted), key=lambda point: (point.floats_per_pixel, point.psnr)):
        note = f", enlarged with {point.upscaling}" if point.upscaling else ""
        name = f"{point.method} downscaling{note}" if point.method in FILTERS else f"DCT, {point.method}"
        lines.append(f"  {point.floats_per_pixel:6.3f} floats/px  {cell(point)}  {name}")
    return lines


def preset_table(points: list[Point]) -> list[str]:
    """One line for each preset."""
    lines = ["presets:"]
    for point in points:
        if point.method in PRESET_MARKERS:
            rate = f"{point.tokens:5.0f} tokens a frame, {point.floats_per_pixel:.3f} floats/px"
            lines.append(f"  {point.method:6} {rate}  {cell(point)}")
    return lines


def report(points: list[Point], floats: tuple[float, ...], sides: tuple[int, ...]) -> str:
    lines = []
    for material in dict.fromkeys(point.material for point in points):
        chosen = [point for point in points if point.material == material]
        lines += ["", f"== {material} ==", "", *preset_table(chosen)]
        for side in sides:
            lines += ["", *order_table(chosen, floats, side)]
        for side in sides:
            if side > 14:
                lines += ["", *token_table(chosen, side)]
    return "\n".join(lines)


PRESET_MARKERS = {"exact": "P", "x4": "*", "x16": "X"}
STYLES = {"variance": "C0", "weighted": "C1", "zigzag": "C2", "box": "C3"}
GREYS = {"bicubic": ("0.25", "s"), "area": ("0.45", "^"), "Lanczos": ("0.65", "v")}
FLOAT_TICKS, TOKEN_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2), (8, 16, 32, 64, 128, 256, 512, 1024)


def plot(points: list[Point], path: Path, weight_source: str) -> None:
    """PSNR and SSIM over floats per pixel (blocks of 28 px) and over tokens per frame; rows for stills and videos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    materials = list(dict.fromkeys(point.material for point in points))
    figure, axes = plt.subplots(len(materials), 4, figsize=(15, 3.8 * len(materials) + 1.2), layout="constrained")
    axes = axes.reshape(len(materials), 4)
    for row, material in zip(axes, materials):
        chosen = [point for point in points if point.material == material]
        for column, (measure, unit) in enumerate((("psnr", "PSNR in dB"), ("ssim", "SSIM"))):
            plot_over_floats(row[column], chosen, measure)
            plot_over_tokens(row[2 + column], chosen, measure)
            row[column].set(title=f"{material}: {unit}, blocks of 28 px", ylabel=unit)
            row[2 + column].set(title=f"{material}: {unit}, all block sizes", ylabel=unit)
    handles = {}
    for axis in axes.ravel():
        handles.update(zip(*axis.get_legend_handles_labels()[::-1]))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(f'The preset exact is lossless and not shown. Weight of the order "weighted": {weight_source}')
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def plot_over_floats(axis, points: list[Point], measure: str) -> None:
    for order, colour in STYLES.items():
        for chroma, line in (("420", "-"), ("444", ":")):
            some = [p for p in points if (p.method, p.chroma, p.side) == (order, chroma, 28)]
            label = f"{order}, 4:{chroma[1]}:{chroma[2]}"
            draw(axis, [(p.floats_per_pixel, getattr(p, measure)) for p in some], label, color=colour, ls=line)
    for method, (grey, marker) in GREYS.items():
        some = [(p.floats_per_pixel, getattr(p, measure)) for p in points if p.method == method]
        draw(axis, some, f"{method} downscaling", color=grey, marker=marker, ls="--")
    mark_presets(axis, points, measure, "floats_per_pixel")
    finish(axis, "numbers per pixel of a frame", FLOAT_TICKS)


def plot_over_tokens(axis, points: list[Point], measure: str) -> None:
    for order, factor, line in (("box", 1, "-"), ("variance", 1, "-"), ("variance", 2, "--")):
        some = [
            (p.tokens, getattr(p, measure))
            for p in points
            if (p.method, p.chroma) == (order, "420") and abs(p.floats_per_pixel * p.side**2 / 588 - factor) < 1e-2
        ]
        label = f"{order}, 4:2:0, {'as' if factor == 1 else 'twice as'} many numbers a token as pixels"
        draw(axis, some, label, color=STYLES[order], ls=line, marker="o", ms=4, lw=2)
    for method, (grey, marker) in GREYS.items():
        some = [(p.tokens, getattr(p, measure)) for p in points if p.method == method]
        draw(axis, some, f"{method} downscaling", color=grey, marker=marker, ls="--")
    mark_presets(axis, points, measure, "tokens")
    finish(axis, "tokens of a 448 x 448 px frame", TOKEN_TICKS)


def finish(axis, label: str, ticks: tuple[float, ...]) -> None:
    axis.set(xscale="log", xlabel=label)
    low, high = axis.get_xlim()
    inside = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def draw(axis, points: list[tuple[float, float]], label: str, **style) -> None:
    if points:
        axis.plot(*zip(*sorted(points)), label=label, **style)


def mark_presets(axis, points: list[Point], measure: str, over: str) -> None:
    for preset, marker in PRESET_MARKERS.items():
        for p in points:
            if p.method == preset and p.psnr < MOST_PSNR:  # a lossless one would squeeze the rest
                style = {"marker": marker, "ms": 12, "color": "k", "ls": "", "mfc": "gold"}
                axis.plot(getattr(p, over), getattr(p, measure), label=f"preset {preset}", **style)


# The command


def chosen_material(arguments: argparse.Namespace):
    """What --images and --videos name, or the held-out photographs."""
    own = arguments.images or arguments.videos
    return given_material(arguments.images, arguments.videos) if own else held_out_material(arguments.seed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Without --images and --videos: the photographs of natural_images.HELD_OUT_IMAGES.",
    )
    add_media_flags(parser)
    parser.add_argument("--model-dir", type=Path, help="pixel Qwen2-VL, for the order weighted (default: random)")
    parser.add_argument("--seed", type=int, default=0, help="of motion and random weights (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="figure to write, .png")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("rate_distortion.py", lambda: measure_and_say(arguments), arguments.debug)


def measure_and_say(arguments: argparse.Namespace) -> int:
    """Raises UserError, OSError."""
    from benchmarks.quality.analysis.patch_weights import patch_weight

    weight, source = patch_weight(arguments.model_dir, arguments.seed)
    points = measure(chosen_material(arguments), weight)
    print(f'weight of the order "weighted": {source}')
    print(report(points, FLOATS_PER_PIXEL, SIDES))
    if arguments.json:
        write_json(arguments.json, {"weight": source, "points": [asdict(point) for point in points]})
    if arguments.plot:
        plot(points, arguments.plot, source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
