"""Tables and the figure of what OCR engines read: characters wrong, by way to fewer tokens.

    python -m benchmarks.quality.analysis.ocr_report --results benchmarks/results/cpu_ocr --figure legibility.png

It needs the results of ocr_legibility.py alone, no engine and no pages. Intervals are of 95 %, over pages (bootstrap).
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis.compare import place
from benchmarks.quality.analysis.figures import pyplot
from benchmarks.quality.result_files import Result, read_results, result_files
from dct_qwen2vl.common.scripts import UserError, run_main

TOKENS = {1: "all visual tokens", 4: "1/4 of the visual tokens", 16: "1/16 of the visual tokens"}
# view: (label, share of the tokens, colour and marker). Colours of Okabe and Ito, told apart by the colour-blind.
STYLES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "as-is": ("the page as it is", 1, {"color": "#000000", "marker": "s", "markersize": 9, "markerfacecolor": "none"}),
    "half-size": ("half-size page", 4, {"color": "#0072B2", "marker": "o"}),
    "x4": ("x4", 4, {"color": "#D55E00", "marker": "^"}),
    "x4-588": ("x4, 588 coefficients", 4, {"color": "#E69F00", "marker": "v", "linestyle": "--"}),
    "quarter-size": ("quarter-size page", 16, {"color": "#56B4E9", "marker": "D"}),
    "x16": ("x16", 16, {"color": "#CC79A7", "marker": "P"}),
}
ENGINES = {"pp-ocrv4": "PP-OCRv4", "tesseract": "Tesseract 5.3"}
UNITS = {"pages": "dpi", "drawn": "px"}


def load(results: Path) -> list[Result]:
    """Finished results of ocr_legibility.py. Raises UserError if there are none."""
    found = [result for result in read_results(results).values() if "ocr" in result and result["finished"]]
    if not result_files(results) or not found:
        raise UserError(f"no results in {results}: expected .jsonl files of ocr_legibility.py")
    return found


def order(result: Result) -> tuple:
    """Of tables: pages first, by size, then inks and compressions, then engines."""
    ocr = result["ocr"]
    kind = (ocr["source"] != "pages", ocr["size"], ocr["ink"], ocr["compression"])
    return (*kind, ocr["engine"], ocr["seed"])


def table(results: list[Result]) -> list[str]:
    """Markdown lines: one for each sheet and engine, a column for each view."""
    views = [view for view in STYLES if any(result["ocr"]["view"] == view for result in results)]
    lines = [
        f"| what is read | engine | {' | '.join(STYLES[view][0] for view in views)} |",
        "| --- " * (len(views) + 2) + "|",
    ]
    for _, group in groupby(sorted(results, key=order), key=order):
        by_view = {result["ocr"]["view"]: result for result in group}
        ocr = next(iter(by_view.values()))["ocr"]
        what = f"{ocr['source']}, {ocr['size']} {UNITS[ocr['source']]}, {ocr['ink']}, {ocr['compression']}"
        cells = [cell(by_view[view]) if view in by_view else "" for view in views]
        lines.append(f"| {what} | {ENGINES[ocr['engine']]} | {' | '.join(cells)} |")
    return lines


def cell(result: Result) -> str:
    """Percent wrong with its interval."""
    low, high = (100 * value for value in result["interval"])
    return f"{100 * result['error_rate']:.1f} ({low:.1f} to {high:.1f})"


def draw(results: list[Result], path: Path) -> None:
    """Characters wrong over dots per inch of clean black pages, a panel for each engine."""
    chosen = [result for result in results if (result["ocr"]["source"], result["ocr"]["ink"]) == ("pages", "black")]
    chosen = [result for result in chosen if result["ocr"]["compression"] == "clean"]
    figure, axes = pyplot().subplots(1, len(ENGINES), figsize=(9, 4.8), layout="constrained", sharey=True)
    for axis, (engine, name) in zip(axes, ENGINES.items()):
        of_engine = [result for result in chosen if result["ocr"]["engine"] == engine]
        for view in STYLES:
            draw_view(axis, [result for result in of_engine if result["ocr"]["view"] == view], view)
        sizes = sorted({result["ocr"]["size"] for result in of_engine})
        axis.set(title=f"read by {name}", xlabel="dots per inch of the page", xticks=sizes, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("characters wrong, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot().close(figure)


def draw_view(axis: Any, results: list[Result], view: str) -> None:
    """A line with its intervals."""
    if not results:
        return
    results = sorted(results, key=lambda result: result["ocr"]["size"])
    name, share, style = STYLES[view]
    rates = [100 * result["error_rate"] for result in results]
    reach = [[abs(100 * r["interval"][end] - rate) for r, rate in zip(results, rates)] for end in (0, 1)]
    sizes = [result["ocr"]["size"] for result in results]
    axis.errorbar(sizes, rates, reach, capsize=2, label=f"{name}: {TOKENS[share]}", **style)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=place, required=True, metavar="PATH", help="a result file, or its folder")
    parser.add_argument("--figure", type=Path, help="file to draw, .png")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def report(arguments: argparse.Namespace) -> int:
    """Prints the table and draws the figure."""
    results = load(arguments.results)
    print("\n".join(table(results)))
    if arguments.figure:
        draw(results, arguments.figure)
        print(f"figure: {arguments.figure}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main(
        "ocr_report.py", lambda: report(arguments), arguments.debug, errors=(UserError, ValueError, OSError)
    )


if __name__ == "__main__":
    sys.exit(main())
