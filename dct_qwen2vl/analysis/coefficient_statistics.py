"""Images and videos -> the table of coefficient statistics by which dct_tokenizer.py chooses and scales coefficients.

    python -m dct_qwen2vl.analysis.coefficient_statistics      # coefficient_table.json, from installed photographs
    python -m dct_qwen2vl.analysis.coefficient_statistics --images ~/photos --videos ~/films --output mine.json

Stills say how a frame looks, videos how frames follow each other. Every file counts the same, whatever its size: it is
resized to each of --pixels as for training (target_size), but never enlarged. Small sizes are in on purpose: a
photograph at full size is soft, one resized to a training budget is sharp, and one table serves both. Without --videos,
videos are made from the images: pans of 1/8 to 32 px a frame in all directions, zooms and cuts. Without any path the
images are natural_images.TABLE_IMAGES; the other installed photographs are held out for the benchmarks. Rows and
columns are treated alike, unless --directions: how they differ in a few photographs says nothing of others.

Measured is the mean square of every coefficient of BLOCK. Stored is the power spectrum that explains it, on few
frequencies (dct_config.CoefficientTable); from it follows the variance of the coefficients of any block.

Values are 0..1, less the CLIP mean colour, in Y, Cb, Cr. Letters: T H W, frames, rows and columns in frames and px.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.common.files import write_text
from dct_qwen2vl.common.scripts import UserError, run_main

if TYPE_CHECKING:
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CoefficientTable

PLANES = ("Y", "Cb", "Cr")
BLOCK = (16, 112, 112)  # frames, rows, columns of the block that is measured
SUMMARY_BLOCK = (2, 28, 28)  # of which statistics are printed and plotted
FRAME_LINES = (0, 1, 2, 3, 5, 8, 12, 16)  # frequencies for which power is stored, in pi/16 radians a frame
SIDE_LINES = (0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 85, 112)  # and in pi/112 radians a pixel
FIT_STEPS = 20
# What rounding to 8 bits leaves in a coefficient, (1/255)^2 / 12, less a margin: nothing measured is below it but what
# is absent (the colour of grey images, the motion of a fixed camera), and of that a table needs the logarithm.
LEAST_VARIANCE = 2.0**-24
DEFAULT_PIXELS = (448 * 448, 320 * 320, 224 * 224)
DEFAULT_OUTPUT = Path("dct_qwen2vl/dct/coefficient_table.json")


class StatisticsError(UserError):
    """Nothing could be measured. The message is one line: what, where, what to type next."""


@dataclass
class Moments:
    """Weighted sums over files of the mean squares and the means of coefficients over a file's blocks."""

    block: tuple[int, int, int]
    weight: float = 0.0
    blocks: int = 0
    square_sum: "np.ndarray | float" = 0.0  # float64 [3, bt, bh, bw]
    dc_sum: "np.ndarray | float" = 0.0  # float64 [3]

    def add(self, frames: "np.ndarray", weight: float) -> None:
        """frames: uint8 [T, H, W, 3], multiples of the block's sides; frames that fill no block are left out."""
        frames = frames[: len(frames) // self.block[0] * self.block[0]]
        coefficients = coefficients_of(frames, self.block)
        self.square_sum += weight * (coefficients**2).mean(axis=0)
        self.dc_sum += weight * coefficients[:, :, 0, 0, 0].mean(axis=0)
        self.weight += weight
        self.blocks += len(coefficients)

    @property
    def square(self) -> "np.ndarray":
        """Mean square of every coefficient about the CLIP mean, float64 [3, bt, bh, bw]."""
        return self.square_sum / self.weight

    @property
    def dc_variance(self) -> "np.ndarray":
        """Variance of the DC coefficient about its own mean, float64 [3]. That of all others is their mean square."""
        return self.square[:, 0, 0, 0] - (self.dc_sum / self.weight) ** 2


def coefficients_of(frames: "np.ndarray", block: tuple[int, int, int]) -> "np.ndarray":
    """uint8 [T, H, W, 3], multiples of the sides of `block` -> all coefficients of its blocks, float64 [N,3,*block]."""
    import numpy as np
    from transformers.image_utils import OPENAI_CLIP_MEAN

    from dct_qwen2vl.dct.configuration_dct import RGB_TO_YCBCR, dct_matrix

    planes = (frames / 255 - np.array(OPENAI_CLIP_MEAN)) @ RGB_TO_YCBCR.T
    t, h, w = (side // own for side, own in zip(frames.shape, block))
    blocks = planes.reshape(t, block[0], h, block[1], w, block[2], 3)
    matrices = (dct_matrix(side) for side in block)
    return np.einsum("tahbwcp,ia,jb,kc->thwpijk", blocks, *matrices, optimize=True).reshape(-1, 3, *block)


@dataclass
class Measurement:
    """Moments of stills and of videos, for BLOCK and for SUMMARY_BLOCK, and what became of the files."""

    stills: Moments = field(default_factory=lambda: Moments((1, *BLOCK[1:])))
    videos: Moments = field(default_factory=lambda: Moments(BLOCK))
    summary_stills: Moments = field(default_factory=lambda: Moments((1, *SUMMARY_BLOCK[1:])))
    summary_videos: Moments = field(default_factory=lambda: Moments(SUMMARY_BLOCK))
    images_read: int = 0
    videos_read: int = 0
    skipped: list[str] = field(default_factory=list)

    def add_stills(self, frames: "np.ndarray", weight: float) -> None:
        """frames: uint8 [T, H, W, 3], each taken for itself."""
        self.stills.add(frames, weight)
        self.summary_stills.add(frames, weight)

    def add_video(self, frames: "np.ndarray", weight: float) -> None:
        """frames: uint8 [T, H, W, 3] in their order."""
        self.videos.add(frames, weight)
        self.summary_videos.add(frames, weight)

    def square(self, directions: bool) -> "np.ndarray":
        """Mean square of every coefficient of BLOCK, float64 [3, *BLOCK]: a frame's energy as in the stills, spread
        over frame frequencies as it is in the videos for the same frequency in rows and columns.

        directions: False counts everything once more transposed.
        """
        import numpy as np

        videos, stills = (np.maximum(moments.square, LEAST_VARIANCE) for moments in (self.videos, self.stills))
        square = videos * stills / videos.mean(axis=1, keepdims=True)
        return square if directions else (square + square.swapaxes(2, 3)) / 2


# Reading


def files_of(paths: list[Path], extensions: tuple[str, ...]) -> tuple[list[Path], int]:
    """Files named, and those in named folders that have one of the extensions, sorted; how many others lie there."""
    found, others = [], 0
    for path in paths:
        if not path.exists():
            raise StatisticsError(f"{path} does not exist")
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
        fitting = [file for file in inside if file.suffix.lower().lstrip(".") in extensions]
        found += fitting if path.is_dir() else [path]
        others += len(inside) - len(fitting)
    return found, others


def spread(files: list[Path], most: int) -> list[Path]:
    """At most `most` of the files, evenly spread."""
    return [files[i * len(files) // most] for i in range(most)] if len(files) > most else files


def read_images(files: list[Path], skipped: list[str]) -> Iterator["np.ndarray"]:
    """uint8 [H, W, 3]; a file that cannot be used is noted in `skipped` with the reason."""
    from dct_qwen2vl.data.images import decode_image
    from dct_qwen2vl.data.reading import MediaError

    for file in files:
        try:
            image = decode_image(file.read_bytes())
        except (MediaError, OSError) as error:
            skipped.append(f"{file}: {error}")
            continue
        if min(image.shape[:2]) < BLOCK[1]:
            skipped.append(f"{file}: {image.shape[1]} x {image.shape[0]} px, smaller than a block of {BLOCK[1]} px")
            continue
        yield image


def read_videos(files: list[Path], skipped: list[str]) -> Iterator["np.ndarray"]:
    """uint8 [T, H, W, 3], two frames a second, but not fewer than a block has and at most four blocks."""
    from dct_qwen2vl.data.reading import MediaError
    from dct_qwen2vl.data.videos import VideoSampling, decode_video

    sampling = VideoSampling(fps=2.0, min_frames=BLOCK[0], max_frames=4 * BLOCK[0])
    for file in files:
        try:
            video = decode_video(file.read_bytes(), sampling)
        except (MediaError, OSError) as error:
            skipped.append(f"{file}: {error}")
            continue
        if len(video) < BLOCK[0] or min(video.shape[1:3]) < BLOCK[1]:
            size = f"{len(video)} frames of {video.shape[2]} x {video.shape[1]} px"
            skipped.append(f"{file}: {size}, smaller than a block of {BLOCK[0]} frames of {BLOCK[1]} px")
            continue
        yield video


# Measuring


def sizes_of(height: int, width: int, pixels: tuple[int, ...]) -> list[tuple[int, int]]:
    """The sizes to which an image is resized: multiples of the block, of at most each number of pixels."""
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    factor = BLOCK[1]
    sizes = (target_size(height, width, factor, factor**2, min(most, height * width)) for most in pixels)
    return list(dict.fromkeys(sizes))


def resized(frames: "np.ndarray", size: tuple[int, int]) -> "np.ndarray":
    """uint8 [T, H, W, 3] -> [T, *size, 3], bicubic with low-pass as the image processor does it."""
    import numpy as np
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], bicubic)) for frame in frames])


def measure_images(
    images: Iterator["np.ndarray"],
    found: Measurement,
    pixels: tuple[int, ...],
    rng: "np.random.Generator",
    with_motion: bool,
) -> None:
    """Adds every image at every size and, `with_motion`, videos made from it, which cut to the image before it."""
    from dct_qwen2vl.analysis.natural_images import videos_of

    other = None
    for image in images:
        found.images_read += 1
        sizes = sizes_of(*image.shape[:2], pixels)
        for size in sizes:
            found.add_stills(resized(image[None], size), 1 / len(sizes))
            if with_motion:
                for video in videos_of(image, image if other is None else other, size, BLOCK[0], rng):
                    found.add_video(video, 1 / len(sizes))
        other = image


def measure_videos(videos: Iterator["np.ndarray"], found: Measurement, pixels: tuple[int, ...]) -> None:
    """Adds every video at every size, its frames as stills, too."""
    for video in videos:
        found.videos_read += 1
        sizes = sizes_of(*video.shape[1:3], pixels)
        for size in sizes:
            frames = resized(video, size)
            found.add_video(frames, 1 / len(sizes))
            found.add_stills(frames, 1 / len(sizes))


def fit_table(square: "np.ndarray") -> "CoefficientTable":
    """The spectrum that explains mean squares [3, *BLOCK].

    Richardson-Lucy iteration, which keeps power positive, on interpolated instead of single lines: each stored line is
    multiplied by the mean of measured over expected, over the coefficients to which it contributes.
    """
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CoefficientTable, line_response, line_weights

    lines = (FRAME_LINES, SIDE_LINES, SIDE_LINES)
    shares = [line_response(side, side) / side for side in BLOCK]  # columns sum to 1
    weights = [line_weights(axis, side) for axis, side in zip(lines, BLOCK)]
    back = [weight / weight.sum(axis=0) for weight in weights]
    onto_lines = [share @ weight for share, weight in zip(shares, back)]  # [coefficients, stored lines]
    log2_power = np.zeros((3, *(len(axis) for axis in lines)))
    for _ in range(FIT_STEPS):
        ratio = square / CoefficientTable(BLOCK, lines, log2_power).variance(BLOCK)
        log2_power = log2_power + np.log2(np.einsum("ptyx,ta,yb,xc->pabc", ratio, *onto_lines, optimize=True))
    return CoefficientTable(BLOCK, lines, log2_power.round(2))


# Results


def statistics_of(moments: Moments) -> dict:
    """DC and AC apart, by plane, in plain JSON types; `ac_variance` by frame frequency, the mean over the others."""
    ac = moments.square.reshape(3, moments.block[0], -1).copy()
    ac[:, 0, 0] = 0
    counts = [ac.shape[2] - (frequency == 0) for frequency in range(moments.block[0])]
    result = {"block": list(moments.block), "blocks": moments.blocks}
    for plane, name in enumerate(PLANES):
        result[name] = {
            "dc_mean_energy": float(f"{moments.square[plane, 0, 0, 0]:.4g}"),
            "dc_variance": float(f"{moments.dc_variance[plane]:.4g}"),
            "ac_variance": [float(f"{row.sum() / count:.4g}") for row, count in zip(ac[plane], counts)],
        }
    return result


def table_text(found: Measurement, table: "CoefficientTable", made_by: str) -> str:
    """The JSON file: `CoefficientTable.from_file` reads block, lines and log2_power, the rest says where it is from."""
    lines = dict(zip(("frames", "rows", "columns"), (list(axis) for axis in table.lines)))
    values = {
        "made_by": made_by,
        "images": found.images_read,
        "videos": found.videos_read,
        "skipped": len(found.skipped),
        "stills": statistics_of(found.summary_stills),
        "motion": statistics_of(found.summary_videos),
        "planes": list(PLANES),
        "block": list(table.block),
        "lines": lines,
        "log2_power": table.log2_power.tolist(),
    }
    innermost = re.compile(r"\[\s+([^][{}]+?)\s+\]")  # a list of numbers or words: on one line
    return innermost.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(values, indent=1)) + "\n"


def report(found: Measurement) -> str:
    """What was read, and the statistics as a table."""
    lines = [
        f"read {found.images_read} images and {found.videos_read} videos; "
        f"measured {found.summary_stills.blocks} blocks of stills and {found.summary_videos.blocks} blocks in motion",
        "",
        "mean square of a coefficient, values 0..1   DC      DC about   AC of the   AC of the",
        "(blocks of 28 x 28 px)           plane  mean energy  its mean  frame mean  frame difference",
    ]
    for name, moments in (("stills", found.summary_stills), ("videos, 2 frames", found.summary_videos)):
        statistics = statistics_of(moments)
        for plane in PLANES:
            of = statistics[plane]
            ac = "  ".join(f"{value:10.3g}" for value in of["ac_variance"])
            lines.append(f"{name:32} {plane:5} {of['dc_mean_energy']:12.4g}  {of['dc_variance']:8.4g}  {ac}")
    return "\n".join(lines)


def plot(found: Measurement, table: "CoefficientTable", path: Path) -> None:
    """Log variance over frequencies: by plane, of the frames' mean and of their difference, measured and as tabled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    measured, tabled = found.summary_videos.square, table.variance(SUMMARY_BLOCK)
    figure, axes = plt.subplots(3, 3, figsize=(12, 10.5), layout="constrained")
    for plane, name in enumerate(PLANES):
        plot_over_radius(axes[0, plane], measured[plane], tabled[plane], 2 * found.summary_stills.square[plane, 0])
        axes[0, plane].set_title(f"{name}: mean over directions")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    ac = np.log10(np.where(np.arange(measured[0].size).reshape(measured[0].shape) == 0, np.nan, measured))
    for frequency, label in enumerate(("mean of two frames", "difference of two frames")):
        for plane, name in enumerate(PLANES):
            axis = axes[1 + frequency, plane]
            image = axis.imshow(ac[plane, frequency], vmin=np.nanmin(ac[plane]), vmax=np.nanmax(ac[plane]))
            axis.set(title=f"{name}: {label}", xlabel="column frequency", ylabel="row frequency")
            figure.colorbar(image, ax=axis, label="log10 variance")
    figure.suptitle(
        f"Variance of the DCT coefficients of {SUMMARY_BLOCK[0]} x {SUMMARY_BLOCK[1]} x {SUMMARY_BLOCK[2]} blocks, "
        f"values 0..1 about the CLIP mean ({found.summary_videos.blocks} blocks; DC blank in the maps)"
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def plot_over_radius(axis, measured: "np.ndarray", tabled: "np.ndarray", still: "np.ndarray") -> None:
    """Means over rings of one frequency step. measured, tabled: one plane, [2, side, side]; still: [side, side]."""
    import numpy as np

    side = len(still)
    radius = np.hypot(*np.indices(still.shape)).round().astype(int)
    members = np.bincount(radius.ravel())[1:side]
    cycles = np.arange(1, side) / (2 * side)

    def rings(square: "np.ndarray") -> "np.ndarray":
        return np.bincount(radius.ravel(), square.ravel())[1:side] / members

    for frequency, label in enumerate(("mean of two frames", "difference of two frames")):
        colour = f"C{frequency}"
        axis.plot(cycles, rings(measured[frequency]), "o", ms=3, color=colour, label=f"{label}, measured")
        axis.plot(cycles, rings(tabled[frequency]), color=colour, label=f"{label}, table")
        axis.plot(cycles[0] / 2, measured[frequency, 0, 0], "D", color=colour, mfc="none")
        axis.plot(cycles[0] / 2, tabled[frequency, 0, 0], "_", ms=12, color=colour)
    axis.plot(cycles, rings(still), ".", ms=3, color="0.4", label="stills (one frame, twice), measured")
    axis.plot([], [], "D", color="0.4", mfc="none", label="frequency 0 in rows and columns")
    axis.set(xscale="log", yscale="log", xlabel="cycles per pixel", ylabel="variance")
    axis.grid(alpha=0.3)


# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Without --images and --videos: the photographs of natural_images.TABLE_IMAGES.",
    )
    parser.add_argument("--images", type=Path, nargs="+", default=[], metavar="PATH", help="image files and folders")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], metavar="PATH", help="video files and folders")
    parser.add_argument("--seed", type=int, default=0, help="of the motion made from images (default: %(default)s)")
    parser.add_argument(
        "--pixels",
        type=int,
        nargs="+",
        default=list(DEFAULT_PIXELS),
        help="most pixels of a frame, one size or several (default: %(default)s)",
    )
    parser.add_argument("--directions", action="store_true", help="tell rows from columns (for hundreds of files)")
    parser.add_argument(
        "--max-files", type=int, default=200, help="of each kind, evenly spread over those given (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="table to write, .json (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="figure to write, .png")
    parser.add_argument("--force", action="store_true", help="replace --output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if min(arguments.pixels) < BLOCK[1] * BLOCK[2]:
        parser.error(f"argument --pixels: at least {BLOCK[1] * BLOCK[2]}, one block, got {min(arguments.pixels)}")
    if arguments.max_files < 1 or arguments.seed < 0:
        parser.error(f"--max-files must be at least 1 and --seed 0, got {arguments.max_files} and {arguments.seed}")
    return arguments


def made_by(arguments: argparse.Namespace) -> str:
    """The command that makes the same table: every argument that changes it."""
    words = ["python", "-m", "dct_qwen2vl.analysis.coefficient_statistics"]
    for name in ("images", "videos"):
        if getattr(arguments, name):
            words += [f"--{name}", *map(str, getattr(arguments, name))]
    if tuple(arguments.pixels) != DEFAULT_PIXELS:
        words += ["--pixels", *map(str, arguments.pixels)]
    if arguments.directions:
        words.append("--directions")
    if (arguments.images or arguments.videos) and arguments.max_files != 200:
        words += ["--max-files", str(arguments.max_files)]
    return shlex.join([*words, "--seed", str(arguments.seed)])


def choose_files(arguments: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Images and videos to read; says what is left out."""
    from dct_qwen2vl.analysis.natural_images import TABLE_IMAGES, image_path
    from dct_qwen2vl.data.images import IMAGE_EXTENSIONS
    from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS

    if not arguments.images and not arguments.videos:
        return [image_path(name) for name in TABLE_IMAGES], []
    chosen = []
    for kind, extensions in (("images", IMAGE_EXTENSIONS), ("videos", VIDEO_EXTENSIONS)):
        files, others = files_of(getattr(arguments, kind), extensions)
        if others:
            print(f"--{kind}: {others} files do not end in .{', .'.join(extensions)} and are left out")
        if len(files) > arguments.max_files:
            print(f"--{kind}: reading {arguments.max_files} of {len(files)} files (--max-files)")
        chosen.append(spread(files, arguments.max_files))
    return chosen[0], chosen[1]


def measure(images: list[Path], videos: list[Path], pixels: tuple[int, ...], seed: int) -> Measurement:
    """Reads and measures all files. Raises StatisticsError if none is left."""
    import numpy as np

    found = Measurement()
    measure_images(
        read_images(images, found.skipped), found, pixels, np.random.default_rng(seed), with_motion=not videos
    )
    measure_videos(read_videos(videos, found.skipped), found, pixels)
    if not found.videos.blocks:
        reasons = f", the first: {found.skipped[0]}" if found.skipped else ""
        raise StatisticsError(f"nothing to measure: none of {len(images) + len(videos)} files could be used{reasons}")
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("coefficient_statistics.py", lambda: make_table(arguments), arguments.debug)


def make_table(arguments: argparse.Namespace) -> int:
    if arguments.output.exists() and not arguments.force:
        raise StatisticsError(f"{arguments.output} exists: choose another --output, or --force to replace it")
    found = measure(*choose_files(arguments), tuple(arguments.pixels), arguments.seed)
    for line in found.skipped:
        print(f"skipped {line}")
    table = fit_table(found.square(arguments.directions))
    print(report(found))
    write_text(arguments.output, table_text(found, table, made_by(arguments)))
    if arguments.plot:
        plot(found, table, arguments.plot)
    print(f"wrote {' and '.join(str(path) for path in (arguments.output, arguments.plot) if path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
