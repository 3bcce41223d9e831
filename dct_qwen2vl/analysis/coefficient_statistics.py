"""Images and videos -> the table of coefficient statistics by which dct_tokenizer.py chooses and scales coefficients.

    python -m dct_qwen2vl.analysis.coefficient_statistics      # coefficient_table.json, from installed photographs
    python -m dct_qwen2vl.analysis.coefficient_statistics --images ~/photos --videos ~/films --output mine.json

Stills say how a frame looks, videos how frames follow each other. Every file counts the same, whatever its size.
It is resized to each of --pixels as for training (target_size), but never enlarged. Small sizes are in on purpose: a
photograph at full size is soft, one resized to a training budget is sharp, and one table serves both. Without --videos,
videos are made from the images: pans of 1/8 to 32 px a frame in all directions, zooms and cuts. Without any path the
images are natural_images.TABLE_IMAGES; the other installed photographs are held out for the benchmarks. Rows and
columns are treated alike, unless --directions: how they differ in a few photographs says nothing of others.

Measured is the mean square of every coefficient of BLOCK (coefficient_moments.py). Stored is the power spectrum that
explains it, on few frequencies (configuration_dct.CoefficientTable). The variance of the coefficients of any block
follows from it.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.analysis.coefficient_moments import (
    BLOCK,
    PLANES,
    Measurement,
    Moments,
    fit_table,
    measure_images,
    measure_videos,
)
from dct_qwen2vl.analysis.coefficient_plot import plot
from dct_qwen2vl.analysis.media_files import add_media_flags, files_of, read_images, read_videos, spread
from dct_qwen2vl.common.files import write_text
from dct_qwen2vl.common.scripts import UserError, run_main

if TYPE_CHECKING:
    from dct_qwen2vl.dct.configuration_dct import CoefficientTable

DEFAULT_PIXELS = (448 * 448, 320 * 320, 224 * 224)
DEFAULT_OUTPUT = Path("dct_qwen2vl/dct/coefficient_table.json")


class StatisticsError(UserError):
    """Nothing could be measured. The message is one line: what, where, what to type next."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Without --images and --videos: the photographs of natural_images.TABLE_IMAGES.",
    )
    add_media_flags(parser)
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


def choose_files(arguments: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Images and videos to read; says what is left out."""
    from dct_qwen2vl.analysis.natural_images import TABLE_IMAGES, image_path
    from dct_qwen2vl.data.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

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


if __name__ == "__main__":
    sys.exit(main())
