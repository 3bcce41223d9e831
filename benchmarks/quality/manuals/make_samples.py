"""Conversations on crops of R's manuals, in the format of Cambrian737k: one set to train on, one to test on.

    python -m benchmarks.quality.manuals.make_samples --output raw

    raw/train/cambrian737k.json, raw/train/*.tar     one question a crop; no page of the test's manuals; half of the
                                                     crops show random words of the page
    raw/test/cambrian737k.json, raw/test/*.tar       two questions a crop; pages of R-FAQ, R-data, R-intro, R-lang alone

It needs pypdfium2 (benchmarks/quality/requirements.txt) and Debian's r-doc-pdf. data_preparation.py reads the folders.
All crops have one size, so that a quarter of its pixels as max_pixels halves every side. The same arguments give the
same bytes.
"""

import argparse
import io
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.quality.dense.pages import REFERENCE, TEST, chosen, in_parts
from benchmarks.quality.manuals.crops import KINDS, Crop, PrintedPage, Question, Shape, ask, random_crop, shuffled_crop
from benchmarks.quality.manuals.lines import printed_lines
from benchmarks.quality.ocr.pages import MANUALS, POINTS_AN_INCH, add_manuals_flag, opened
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.toy.sample_data import DataSet, write_data_set

SPLITS = ("train", "test")
MULTIPLE = 56  # px. Sides are multiples, so that x4 has as many visual tokens as the half-size image.
QUESTIONS = 0.25  # share of training samples not shuffled that ask something; all others transcribe


@dataclass(frozen=True)
class Job:
    """Pages of one file. first: number of the first page among all pages of the split. crops: of each page and dpi.
    shuffled: share of the crops that show random words."""

    path: Path
    numbers: tuple[int, ...]
    first: int
    split: str
    crops: tuple[int, ...]
    dpi: tuple[int, ...]
    shape: Shape
    shuffled: float
    seed: int


# name of the image, its PNG, the entry
Sample = tuple[str, bytes, dict[str, Any]]


def make_pages(job: Job) -> list[Sample]:
    """The samples of a job."""
    with opened(job.path) as document:
        pages = [list(page_samples(document, job, place)) for place in range(len(job.numbers))]
    return list(chain.from_iterable(pages))


def page_samples(document: Any, job: Job, place: int) -> Iterator[Sample]:
    """The samples of one page, at each resolution."""
    number, index = job.numbers[place], job.first + place
    with closing(document[number]) as page, closing(page.get_textpage()) as text:
        lines = printed_lines(text, page.get_height())
        for dpi, crops in zip(job.dpi, job.crops):
            grey = np.array(page.render(scale=dpi / POINTS_AN_INCH, grayscale=True).to_pil())
            rng = np.random.default_rng([job.seed, SPLITS.index(job.split), index, dpi])
            for crop_number in range(crops):
                name = f"{job.path.stem}/{number + 1:04d}-{dpi}dpi-{crop_number:03d}.png"
                if sample := make_sample(PrintedPage(grey, lines, dpi), job, name, rng):
                    yield sample


def make_sample(page: PrintedPage, job: Job, name: str, rng: np.random.Generator) -> Sample | None:
    """None where the page has no such crop."""
    if job.shuffled and rng.random() < job.shuffled:
        crop = shuffled_crop(page, job.shape, rng)
        return (name, png(crop.image), entry(name, questions_on(crop, None, True, rng), page.dpi)) if crop else None
    kind = KINDS[rng.integers(len(KINDS))]
    asks = job.split == "test" or rng.random() < QUESTIONS
    with_heading = asks and kind == "heading" and any(line.heading and line.usable for line in page.lines)
    crop = random_crop(page, job.shape, with_heading, rng)
    if crop is None:
        return None
    questions = questions_on(crop, kind if asks else None, job.split == "test", rng)
    return name, png(crop.image), entry(name, questions, page.dpi)


def questions_on(crop: Crop, kind: str | None, also_transcribe: bool, rng: np.random.Generator) -> list[Question]:
    """The text, if it is wanted or nothing else is asked; then a question of that kind, or else of one that the crop
    has an answer to."""
    asked = kind and (ask(crop, kind, rng) or ask(crop, "next word", rng) or ask(crop, "line count", rng))
    transcribed = [ask(crop, "transcribe", rng)] if also_transcribe or not asked else []
    return [question for question in (*transcribed, asked) if question]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def entry(name: str, questions: list[Question], dpi: int) -> dict[str, Any]:
    """As Cambrian737k has them. The type of a question names its resolution."""
    turns = []
    for number, question in enumerate(questions):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    types = [f"{question.kind}, {dpi} dpi" for question in questions]
    return {"id": name.removesuffix(".png"), "image": name, "conversations": turns, "question_type": types}


def make_jobs(arguments: argparse.Namespace, split: str, wanted: int) -> list[Job]:
    """Pages of the split's manuals, in parts; `wanted` crops are spread evenly over pages and resolutions."""
    paths = [*sorted(arguments.manuals.glob(MANUALS)), *arguments.manuals.glob(f"{REFERENCE}.pdf")]
    files = [path for path in paths if (path.stem in TEST) == (split == "test")]
    if not files:
        raise UserError(
            f"no manuals to {split} in {arguments.manuals}: apt-get install r-doc-pdf, or name a folder by --manuals"
        )
    parts = [(path, part) for path in files for part in in_parts(list(chosen(path, arguments.limit)))]
    pages = sum(len(part) for _, part in parts)
    shares = len(arguments.dpi) * pages
    first = np.cumsum([0, *(len(part) for _, part in parts)]).tolist()
    crops = tuple(-(-wanted // shares) for _ in arguments.dpi)
    shape = Shape(arguments.height, arguments.width, arguments.lines)
    shuffled = arguments.shuffled if split == "train" else 0.0
    more = (split, crops, tuple(arguments.dpi), shape, shuffled, arguments.seed)
    return [Job(path, tuple(part), start, *more) for (path, part), start in zip(parts, first)]


def make_set(arguments: argparse.Namespace, split: str, wanted: int) -> int:
    """Writes a split. Returns the number of its samples, at most `wanted`."""
    jobs = make_jobs(arguments, split, wanted)
    if arguments.processes > 1:
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            made = list(chain.from_iterable(pool.map(make_pages, jobs, chunksize=1)))
    else:
        made = list(chain.from_iterable(map(make_pages, jobs)))
    kept = np.random.default_rng([arguments.seed, len(SPLITS)]).permutation(len(made))[:wanted]
    data = DataSet()
    for number in sorted(kept.tolist()):
        name, content, described = made[number]
        data.entries.append(described)
        data.add_file(name, content)
    write_data_set(data, arguments.output / split)
    return len(data.entries)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make; gets train/ and test/")
    add_manuals_flag(parser)
    add("--seed", type=int, default=0, help="of crops and questions (default: %(default)s)")
    add("--train", type=int, default=600000, help="training samples, at most (default: %(default)s)")
    add("--test", type=int, default=800, help="test samples, at most (default: %(default)s)")
    add("--dpi", type=int, nargs="+", default=[60, 75, 100, 150], help="of the pages (default: %(default)s)")
    add("--height", type=int, default=56, help=f"of a crop, px, a multiple of {MULTIPLE} (default: %(default)s)")
    add("--width", type=int, default=336, help=f"of a crop, px, a multiple of {MULTIPLE} (default: %(default)s)")
    add("--lines", type=int, default=3, help="of a crop, at most (default: %(default)s)")
    add("--shuffled", type=float, default=0.5, help="share of training crops that show random words of a page, so that "
        "they cannot be guessed (default: %(default)s)")  # fmt: skip
    add("--limit", type=int, default=2500, help="pages of a manual, at most (default: %(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    for name in ("height", "width"):
        value = getattr(arguments, name)
        if value <= 0 or value % MULTIPLE:
            raise UserError(f"--{name} {value} is no multiple of {MULTIPLE}: x4 would have other visual tokens")
    if not 0 <= arguments.shuffled <= 1:
        raise UserError(f"--shuffled {arguments.shuffled:g} is no share: give a number from 0 to 1")
    for split in SPLITS:
        if (arguments.output / split).exists():
            raise UserError(f"{arguments.output / split} exists: remove it, or name another folder with --output")


def make(arguments: argparse.Namespace) -> int:
    check(arguments)
    for split in SPLITS:
        print(f"{arguments.output / split}: {make_set(arguments, split, getattr(arguments, split))} samples")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("make_samples.py", lambda: make(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
