"""Expected share of cells that are kept with --skip-db, by source, measured on a few samples of each.

    python -m dct_qwen2vl.preparation.report.kept O MIN_PIXELS MAX_PIXELS SEED    prints it as JSON

The report calls that as a process of its own: the rule needs torch, which the report and data preparation do without.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dct_qwen2vl.data.media import BadSample, PixelFit, as_array, resize_frames
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS, VideoSampling, YUVFrames
from dct_qwen2vl.preparation.report.samples import read_parts
from dct_qwen2vl.preparation.report.statistics import Statistics, read_statistics

PRESET = "x4"
SAMPLES_OF_A_SOURCE, MOST_SOURCES = 6, 20
MEDIA_OF_A_SAMPLE = 2
MOST_MEDIA = {"image": SAMPLES_OF_A_SOURCE, "video": 2}  # of a source
MOST_SECONDS = 30  # of a video; longer ones take too long to decode
MOST_PIXELS = {"image": 1 << 20, "video": 1 << 18}  # of an image, of a frame
Counts = dict[str, tuple[int, int, int]]  # kind -> cells kept, cells, media


@dataclass(frozen=True)
class KeptShares:
    """skip_db: dB. by_source: source -> what was counted there. fault: why nothing was, or ""."""

    skip_db: float
    by_source: dict[str, Counts]
    fault: str = ""


def measure_kept(output_dir: Path, pixel_bounds: tuple[int, int], seed: int) -> KeptShares:
    """Measures the shares in a process of its own.

    output_dir: Folder of the prepared set.
    pixel_bounds: min_pixels and max_pixels of training, pixels of an image or frame.
    seed: Of the choice of samples.
    """
    command = [sys.executable, "-m", __name__, str(output_dir.resolve()), *map(str, (*pixel_bounds, seed))]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), "its process ended early")
        return KeptShares(0.0, {}, reason)
    found = json.loads(done.stdout)
    return KeptShares(found["skip_db"], {name: counts_of(counts) for name, counts in found["by_source"].items()})


def counts_of(found: dict[str, list[int]]) -> Counts:
    return {kind: tuple(numbers) for kind, numbers in found.items()}


def choose_by_source(statistics: Statistics, seed: int) -> dict[str, list[int]]:
    """Numbers of a few samples with media of each of the first sources, ascending. Long videos are left out."""
    seconds = np.bincount(statistics.owner, statistics.seconds, minlength=len(statistics))
    usable, rng, chosen = (statistics.media > 0) & (seconds <= MOST_SECONDS), random.Random(seed), {}
    for number, name in enumerate(statistics.sources[:MOST_SOURCES]):
        own = np.flatnonzero((statistics.source == number) & usable).tolist()
        if own:
            chosen[name] = sorted(rng.sample(own, min(SAMPLES_OF_A_SOURCE, len(own))))
    return chosen


def read_media(output_dir: Path, statistics: Statistics, positions: list[int]) -> Iterator[tuple[int, str, bytes]]:
    """Number of the sample, kind and file of the first media of samples with these numbers, ascending."""
    firsts = np.array([shard.first for shard in statistics.shards])
    for number, group in groupby(positions, lambda p: int(np.searchsorted(firsts, p, side="right")) - 1):
        shard, chosen = statistics.shards[number], list(group)
        parts = read_parts(output_dir / shard.name, [position - shard.first for position in chosen])
        for position, (_, files) in zip(chosen, parts):
            names = sorted(name for name in files if name != "json")[:MEDIA_OF_A_SAMPLE]
            for name in names:
                is_video = name.rsplit(".", 1)[-1].lower() in VIDEO_EXTENSIONS
                yield position, "video" if is_video else "image", files[name]


def count_kept(kind: str, data: bytes, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Cells of a medium that are kept, and all. Raises MediaError, BadSample."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.skipping_dct import kept_cells
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    config, sampling = DCTConfig.preset(PRESET), VideoSampling()
    most = max(min_pixels, min(max_pixels, MOST_PIXELS[kind]))
    fit = PixelFit(config.block[1] * config.merge, min_pixels, most, sampling)
    frames = as_array(kind, data, sampling, fit, planes=True, threads=1)
    tokenizer = DCTTokenizer(config)
    if isinstance(frames, YUVFrames):
        tokens, grid = tokenizer.encode_planes(*frames.parts)
    else:
        frames = resize_frames(kind, frames, fit)
        tokens, grid = tokenizer.encode(frames[None] if kind == "image" else frames)
    kept = kept_cells(tokens, grid, config)
    return int(kept.sum()), kept.numel()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output_dir", type=Path, help="what data_preparation.py wrote")
    parser.add_argument("min_pixels", type=int, help="least pixels of an image")
    parser.add_argument("max_pixels", type=int, help="most pixels of an image")
    parser.add_argument("seed", type=int, help="of the choice of samples")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    statistics = read_statistics(arguments.output_dir)
    chosen = choose_by_source(statistics, arguments.seed)
    import torch  # after the statistics, whose reading takes memory that is free again

    from dct_qwen2vl.dct.skipping_dct import SKIP_DB

    torch.set_num_threads(1)
    source_of = {position: name for name, positions in chosen.items() for position in positions}
    found = {name: {kind: [0, 0, 0] for kind in MOST_MEDIA} for name in chosen}
    for position, kind, data in read_media(arguments.output_dir, statistics, sorted(source_of)):
        counts = found[source_of[position]]
        if counts[kind][2] < MOST_MEDIA[kind]:
            with suppress(MediaError, BadSample):  # training leaves it out, too
                numbers = (*count_kept(kind, data, arguments.min_pixels, arguments.max_pixels), 1)
                counts[kind] = [one + more for one, more in zip(counts[kind], numbers)]
    print(json.dumps({"skip_db": SKIP_DB, "by_source": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
