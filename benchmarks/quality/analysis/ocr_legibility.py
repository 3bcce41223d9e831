"""What do visual tokens hold of print? OCR engines that know nothing of DCT read it back.

    python -m benchmarks.quality.analysis.ocr_legibility --output ocr --commit $(git rev-parse --short HEAD)

Lines of real pages, and the same lines drawn in another font, go through each way to fewer tokens and become images
again. PP-OCRv4 and Tesseract read single lines of them. The text layer of the pages says what was to be read.

A result is one line of ocr/ocr.jsonl: edits and characters of each page under one condition. What is finished there is
skipped. All conditions of a seed have the same pages and lines. Several processes may share the work with --engines.
The figure and the tables come from ocr_report.py.

Needed packages: benchmarks/quality/requirements.txt, and Debian's r-doc-pdf, tesseract-ocr, tesseract-ocr-eng.
"""

import argparse
import functools
import importlib.metadata
import itertools
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.ocr.engines import ENGINES, Reader, enlarged
from benchmarks.quality.ocr.errors import bootstrap, compared, edit_distance, error_rate
from benchmarks.quality.ocr.pages import Manuals, Sheet, add_manuals_flag
from benchmarks.quality.ocr.shown import VIEWS, coloured, colours, compressed, visual_tokens
from benchmarks.quality.result_files import Output, Result
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import run_main

INKS = ("black", "coloured", "equal-luma")
COMPRESSIONS = ("clean", "jpeg75")
FULL = {"pages": 75, "drawn": 8}  # the size at which all inks and compressions are read; at others black, clean print
PACKAGES = ("rapidocr-onnxruntime", "onnxruntime", "pypdfium2")


@dataclass(frozen=True)
class Condition:
    """What is read and by whom.

    source: "pages", or "drawn" for their lines in Pillow's font.
    size: dots per inch of pages, height of a capital in px of drawn print.
    ink: of `INKS`. compression: of `COMPRESSIONS`. view: of `VIEWS`. engine: of `ENGINES`.
    seed: of pages, lines and colours. pages, lines: how many pages, how many lines of each.
    """

    source: str
    size: int
    ink: str
    compression: str
    view: str
    engine: str
    seed: int
    pages: int
    lines: int

    @property
    def name(self) -> str:
        """Of the result's line."""
        parts = (self.source, self.size, self.ink, self.compression, self.view, self.engine)
        return f"ocr_{'_'.join(map(str, parts))}_seed{self.seed}"


def conditions(arguments: argparse.Namespace) -> Iterator[Condition]:
    """All that are asked for."""
    sizes = [("pages", dpi) for dpi in arguments.dpi] + [("drawn", height) for height in arguments.heights]
    for (source, size), seed, engine in itertools.product(sizes, arguments.seeds, arguments.engines):
        every = list(itertools.product(INKS, COMPRESSIONS))
        for ink, compression in every if size == FULL[source] else every[:1]:
            for view in arguments.views:
                yield Condition(source, size, ink, compression, view, engine, seed, arguments.pages, arguments.lines)


def shown(sheet: Sheet, number: int, condition: Condition) -> np.ndarray:
    """A sheet as a condition shows it: uint8 [H, W, 3]. number: of the page, which has colours of its own."""
    rng = np.random.default_rng([condition.seed, number, INKS.index(condition.ink)])
    image = coloured(sheet.grey, *colours(condition.ink, rng))
    image = compressed(image) if condition.compression == "jpeg75" else image
    return VIEWS[condition.view].show(image)


def read_sheet(image: np.ndarray, sheet: Sheet, reader: Reader) -> tuple[int, int]:
    """(edits, characters) of all lines of a sheet."""
    lines = [enlarged(image[top:bottom, left:right]) for left, top, right, bottom in (line.box for line in sheet.lines)]
    wrong = sum(edit_distance(compared(read), line.text) for read, line in zip(reader(lines), sheet.lines))
    return wrong, sum(len(line.text) for line in sheet.lines)


@functools.lru_cache(maxsize=1)  # conditions of the same sheets follow each other
def sheets_of(source: str, size: int, manuals: Manuals) -> list[Sheet]:
    """What `Condition` says of source and size."""
    return list(manuals.sheets(size) if source == "pages" else manuals.drawn(size))


def run(condition: Condition, manuals: Manuals, reader: Reader, environment: dict[str, str]) -> Result:
    """Reads all pages under a condition."""
    started, sheets = time.perf_counter(), sheets_of(condition.source, condition.size, manuals)
    images = [shown(sheet, number, condition) for number, sheet in enumerate(sheets)]
    counts = np.array([read_sheet(image, sheet, reader) for image, sheet in zip(images, sheets)])
    return {
        "name": condition.name,
        "finished": True,
        "ocr": asdict(condition),
        "environment": environment,
        "visual_tokens": float(np.mean([visual_tokens(image, condition.view) for image in images])),
        "error_rate": error_rate(*counts.T),
        "interval": bootstrap(*counts.T),
        "by_page": {"pages": [sheet.name for sheet in sheets], **dict(zip(("wrong", "characters"), counts.T.tolist()))},
        "seconds": round(time.perf_counter() - started, 1),
    }


def environment_of(commit: str) -> dict[str, str]:
    """Where and with what the pages are read; without what is not installed. Tesseract's version is Debian's."""
    installed = {package.name.lower() for package in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    where = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    return {**where, **versions, "date": time.strftime("%Y-%m-%d"), "commit": commit}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="PATH", help="FILE.jsonl, or FOLDER for FOLDER/ocr.jsonl")
    add_manuals_flag(parser)
    add("--pages", type=int, default=16, help="(default: %(default)s)")
    add("--lines", type=int, default=3, help="read of each page (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="of pages, lines, colours (default: %(default)s)")
    add("--dpi", type=int, nargs="*", default=[50, 60, 75, 100], help="of pages (default: %(default)s)")
    add("--heights", type=int, nargs="*", default=[6, 8], help="of drawn capitals, px (default: %(default)s)")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="(default: %(default)s)")
    add("--views", nargs="+", choices=VIEWS, default=list(VIEWS), help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="of an engine (default: %(default)s)")
    add("--commit", default="", help="noted in the results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def study(arguments: argparse.Namespace) -> int:
    """Reads what is not read yet."""
    output, manuals = Output.at(arguments.output, "ocr"), {}
    readers = {name: ENGINES[name](arguments.threads) for name in arguments.engines}
    environment = environment_of(arguments.commit)
    torch.set_num_threads(arguments.threads)
    for condition in conditions(arguments):
        if (result := output.finished(condition.name)) is None or result["ocr"] != asdict(condition):
            seed = condition.seed
            manuals[seed] = manuals.get(seed) or Manuals(arguments.manuals, arguments.pages, arguments.lines, seed)
            result = run(condition, manuals[seed], readers[condition.engine], environment)
            output.record(result)
        print(progress(result), flush=True)
    return 0


def progress(result: dict[str, Any]) -> str:
    """A line for the screen."""
    low, high = (100 * value for value in result["interval"])
    return f"{result['name']}: {100 * result['error_rate']:.1f} % of characters wrong ({low:.1f} to {high:.1f})"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("ocr_legibility.py", lambda: study(arguments), arguments.debug, goes_on=True)


if __name__ == "__main__":
    sys.exit(main())
