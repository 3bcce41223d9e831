"""Draw up a report on a prepared set: counts, sizes, token counts and random samples, as one page to open in a browser.

    python -m dct_qwen2vl.preparation.report O
    python -m dct_qwen2vl.preparation.report O --seq-length 2048 --tokenizer /models/Qwen2-VL-2B-Instruct

In:  O/stats.json, O/skipped.jsonl, O/pretrain-*.stats.json and the shards, as data_preparation.py leaves them
Out: O/report.html      the page; it holds its images and loads nothing
     O/report/*.png     the figures alone

The same set and settings give the same bytes.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dct_qwen2vl.checkpoints.inspection import PROCESSOR, own_pixel_bounds
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.dct.image_sizes_dct import pixel_bounds as chosen_bounds

REPORT_NAME = "report.html"
NUM_SAMPLES = 30
SEQ_LENGTHS = (1024, 2048, 4096, 8192)
# min_pixels and max_pixels in the preprocessor_config.json of Qwen2-VL-2B-Instruct. Training takes the model's.
INSTRUCT_BOUNDS = 4 * 28 * 28, 16_384 * 28 * 28


def write_report(
    output_dir: Path,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    seq_lengths: Sequence[int] = SEQ_LENGTHS,
    pixel_bounds: tuple[int, int] = INSTRUCT_BOUNDS,
    tokenizer_dir: Path | None = None,
    say: Callable[[str], object] | None = None,
) -> Path:
    """Writes report.html and the figures of a prepared set. Returns the page's path.

    output_dir: The folder of shards.
    num_samples: Samples to show.
    seed: Of their choice.
    seq_lengths: Token limits for which the share of samples that fit is shown.
    pixel_bounds: min_pixels and max_pixels of training.
    tokenizer_dir: Hugging Face directory whose tokenizer counts text tokens. None: they are estimated.
    say: Called with a line if samples are too long for training's defaults.

    Raises PreparationError for a set that is not complete.
    """
    from dct_qwen2vl.common.files import replacing
    from dct_qwen2vl.preparation.output_folder import REPORT_FOLDER
    from dct_qwen2vl.preparation.report.figures import Data, draw_figures
    from dct_qwen2vl.preparation.report.kept import measure_kept
    from dct_qwen2vl.preparation.report.page import Findings, write_page
    from dct_qwen2vl.preparation.report.samples import choose_samples, read_conversations, read_shown_samples
    from dct_qwen2vl.preparation.report.statistics import read_examples, read_statistics
    from dct_qwen2vl.preparation.report.tokens import (
        count_text_tokens,
        load_tokenizer,
        measure_lengths,
        note_on_long_samples,
    )

    statistics = read_statistics(output_dir)
    text = None
    if tokenizer_dir is not None:
        from tqdm import tqdm

        tokenizer, conversations = load_tokenizer(tokenizer_dir), read_conversations(output_dir, statistics)
        bar = tqdm(conversations, "Counting text tokens", len(statistics.shards), unit="shard")
        text = count_text_tokens(bar, tokenizer)
    lengths = measure_lengths(statistics, text, *pixel_bounds)
    if say and (note := note_on_long_samples(statistics, lengths)):
        say(note)
    # Before the figures: its process needs as much memory as all of this one.
    kept = measure_kept(output_dir, pixel_bounds, seed) if statistics.media.any() else None
    limits, folder = sorted(set(seq_lengths)), output_dir / REPORT_FOLDER
    findings = Findings(
        statistics,
        lengths,
        limits,
        pixel_bounds,
        read_examples(output_dir, statistics.stats["skipped"]),
        list(read_shown_samples(output_dir, statistics, choose_samples(statistics, num_samples, seed))),
        draw_figures(Data(statistics, lengths, limits), folder),
        folder,
        kept,
    )
    path = output_dir / REPORT_NAME
    with replacing(path) as stream:
        stream.write(write_page(findings))
    return path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dct_qwen2vl.preparation.report", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    lengths = "token limits of a sample; the report says how many samples exceed each (default: 1024 2048 4096 8192)"
    tokenizer = (
        "folder of the model: its tokenizer counts all text tokens, which takes minutes, and its bounds of pixels are "
        "taken (default: text is estimated, bounds are those of Qwen2-VL-2B-Instruct)"
    )
    low, high = INSTRUCT_BOUNDS
    add("output_dir", type=Path, metavar="O", help="prepared set: the --output-dir of data_preparation.py")
    add("--seq-length", type=int, nargs="+", default=SEQ_LENGTHS, metavar="N", help=lengths)
    add("--tokenizer", type=Path, metavar="DIR", help=tokenizer)
    add(
        "--min-pixels",
        type=int,
        metavar="N",
        help=f"least pixels of an image in training (default: the model's, {low}, or --max-pixels if that is lower)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help=f"most pixels of an image in training, its MAXPIXELS (default: the model's, {high})",
    )
    add("--num-samples", type=int, default=NUM_SAMPLES, metavar="N", help="samples shown (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of their choice (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if min(arguments.seq_length) < 1:
        parser.error(f"--seq-length must be 1 or more, not {min(arguments.seq_length)}")
    if arguments.num_samples < 0:
        parser.error(f"--num-samples must be 0 or more, not {arguments.num_samples}")
    try:
        own = own_bounds(arguments.tokenizer)
        arguments.min_pixels, arguments.max_pixels = chosen_bounds(arguments.min_pixels, arguments.max_pixels, *own)
    except (ValueError, UserError) as error:
        parser.error(f"--min-pixels, --max-pixels: {error}")
    return arguments


def own_bounds(model_dir: Path | None) -> tuple[int, int]:
    """min_pixels and max_pixels of a model; Qwen2-VL-2B-Instruct's without one. Raises CheckpointError."""
    has_own = model_dir is not None and (model_dir / PROCESSOR).is_file()
    return own_pixel_bounds(model_dir) if has_own else INSTRUCT_BOUNDS


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("dct_qwen2vl.preparation.report", lambda: write_and_say(arguments), arguments.debug)


def write_and_say(arguments: argparse.Namespace) -> int:
    path = write_report(
        arguments.output_dir,
        arguments.num_samples,
        arguments.seed,
        arguments.seq_length,
        (arguments.min_pixels, arguments.max_pixels),
        arguments.tokenizer,
        print,
    )
    print(f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
