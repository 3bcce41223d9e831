"""Tables and the figure of dense reading: characters read right, by variant, steps and size of print.

    python -m benchmarks.quality.dense.report --results benchmarks/results/h200_dense.jsonl --figure dense.png

It needs the results of train.py alone. Of each variant the runs with the most steps count, at the rate that has most
seeds; --steps and --rate name others. Differences are paired over seeds and test pages, as
`paired.crossed_difference` says.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.analysis.compare import place
from benchmarks.quality.analysis.figures import pyplot
from benchmarks.quality.analysis.paired import spread, verdict_over_seeds
from benchmarks.quality.result_files import Result, is_finished, read_results
from dct_qwen2vl.common.scripts import UserError, run_main

# (ours, theirs, what the difference says)
PAIRS = (
    ("x4", "half", "x4 against the half-size image"),
    ("half-dct", "half", "the basis alone: the same corner of coefficients against the half-size image"),
    ("x4", "half-dct", "the detail alone: x4 against its corner"),
    ("x4", "pixel", "the basis at equal information: x4 against the pixels of the block"),
    ("x4", "x4-588", "all coefficients against three quarters of them"),
)
# variant: (name, colour and marker). Colours of Okabe and Ito, told apart by the colour-blind.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all visual tokens", {"color": "#000000", "marker": "s"}),
    "x4": ("x4", {"color": "#D55E00", "marker": "^"}),
    "x4-588": ("x4, 3/4 of the coefficients", {"color": "#E69F00", "marker": "v", "linestyle": "--"}),
    "half-dct": ("x4, corner alone", {"color": "#009E73", "marker": "D"}),
    "pixel": ("pixels of the block", {"color": "#CC79A7", "marker": "P"}),
    "half": ("half-size page", {"color": "#0072B2", "marker": "o"}),
}


@dataclass(frozen=True)
class Kind:
    """What all seeds of a variant share."""

    variant: str
    scales: str
    gain: float
    beside: str

    @classmethod
    def of(cls, result: Result) -> "Kind":
        settings = result["dense"]
        return cls(settings["variant"], settings["scales"], settings["gain"], settings["beside"])

    @property
    def name(self) -> str:
        gain = f", detail x {self.gain:g}" if self.gain != 1 else ""
        return f"{self.variant}, {self.scales} scales{gain}" + (
            f", {self.beside} beside" if self.beside != "nothing" else ""
        )


def load(results: Path, steps: int | None = None, rate: float | None = None) -> dict[Kind, list[Result]]:
    """{kind: one result a seed}. Raises UserError if there are none.

    results: Path. A result file, or its folder.
    steps, rate: of the runs that count; None for those that `longest` chooses.
    """
    found = [result for result in read_results(results).values() if "dense" in result and is_finished(result)]
    for name, wanted in (("steps", steps), ("rate", rate)):
        found = [result for result in found if wanted is None or result["dense"][name] == wanted]
    if not found:
        raise UserError(f"no such results of benchmarks.quality.dense.train in {results}")
    return {kind: longest([r for r in found if Kind.of(r) == kind]) for kind in dict.fromkeys(map(Kind.of, found))}


def longest(results: list[Result]) -> list[Result]:
    """Those with the most steps, of the rate that most of them have or, among equals, with the least loss, in the order
    of their seeds."""
    steps = max(result["dense"]["steps"] for result in results)
    results = [result for result in results if result["dense"]["steps"] == steps]
    seeds = Counter(result["dense"]["rate"] for result in results)
    rate = max(results, key=lambda r: (seeds[r["dense"]["rate"]], -r["last_loss"]))["dense"]["rate"]
    return sorted((r for r in results if r["dense"]["rate"] == rate), key=lambda result: result["dense"]["seed"])


def table(kinds: dict[Kind, list[Result]]) -> list[str]:
    """Markdown lines, the best first."""
    resolutions = list(next(iter(kinds.values()))[0]["by_page"])[1:]
    lines = [
        f"| variant | tokens | numbers a token | rate | steps | seeds | {' dpi | '.join(resolutions)} dpi | all, % |",
        "| --- " * (7 + len(resolutions)) + "|",
    ]
    for kind, results in sorted(kinds.items(), key=lambda item: -np.mean([r["accuracy"]["all"] for r in item[1]])):
        first = results[0]
        by_size = [f"{100 * np.mean([r['accuracy'][one] for r in results]):.1f}" for one in resolutions]
        cells = [kind.name, first["tokens"], first["numbers_a_token"], f"{first['dense']['rate']:g}"]
        cells += [first["dense"]["steps"], len(results), *by_size, spread([r["accuracy"]["all"] for r in results])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def gains(ours: list[Result], theirs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Characters that ours reads more, [seeds, pages], and the characters of each page. Pages without any are left
    out."""
    right = [np.array([over_sizes(result, "right") for result in results]) for results in (ours, theirs)]
    asked = over_sizes(ours[0], "characters")
    if not np.array_equal(asked, over_sizes(theirs[0], "characters")):
        raise UserError("these runs were tested on different pages: give all the same --data, --side and --test")
    return (right[0] - right[1])[:, asked > 0], asked[asked > 0]


def over_sizes(result: Result, what: str) -> np.ndarray:
    """Summed over the resolutions: int [pages]."""
    return sum(np.array(counts[what]) for name, counts in result["by_page"].items() if name != "pages")


def comparisons(kinds: dict[Kind, list[Result]]) -> list[str]:
    """The verdict on each of `PAIRS`, with the scales that both have."""
    lines = []
    for scales in dict.fromkeys(kind.scales for kind in kinds):
        for ours, theirs, says in PAIRS:
            both = [kinds.get(Kind(name, scales, 1.0, "nothing")) for name in (ours, theirs)]
            if None in both or len(seeds := common_seeds(*both)) < 2:
                continue
            chosen = [[r for r in results if r["dense"]["seed"] in seeds] for results in both]
            lines.append(f"{says} ({scales} scales): {verdict_over_seeds(*gains(*chosen), 'pages')}")
    return lines


def common_seeds(ours: list[Result], theirs: list[Result]) -> set[int]:
    return {r["dense"]["seed"] for r in ours} & {r["dense"]["seed"] for r in theirs}


def draw(kinds: dict[Kind, list[Result]], scales: str, path: Path) -> None:
    """Accuracy over steps, and over dots per inch at the end."""
    shown = {name: kinds.get(Kind(name, scales, 1.0, "nothing")) for name in STYLES}
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 4.8), layout="constrained", sharey=True)
    for name, results in shown.items():
        if results:
            label, style = STYLES[name]
            style = style | {"label": f"{label}: {results[0]['tokens']} tokens"}
            draw_steps(left, results, style)
            draw_sizes(right, results, style)
    left.set(title="on the way", xlabel="steps", ylabel="characters read right, %")
    right.set(title="at the end", xlabel="dots per inch of the page")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot().close(figure)


def draw_steps(axis: Any, results: list[Result], style: dict[str, Any]) -> None:
    """Mean over seeds, shaded from the worst to the best."""
    steps = [point["step"] for point in results[0]["curve"]]
    right = 100 * np.array([[point["all"] for point in result["curve"]] for result in results])
    axis.plot(steps, right.mean(axis=0), markersize=4, **style)
    axis.fill_between(steps, right.min(axis=0), right.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)


def draw_sizes(axis: Any, results: list[Result], style: dict[str, Any]) -> None:
    """Mean over seeds with the spread."""
    sizes = [name for name in results[0]["by_page"] if name != "pages"]
    right = 100 * np.array([[result["accuracy"][size] for size in sizes] for result in results])
    reach = right.std(axis=0, ddof=1) if len(results) > 1 else None
    axis.errorbar(list(map(int, sizes)), right.mean(axis=0), reach, capsize=2, markersize=4, **style)
    axis.set_xticks(list(map(int, sizes)))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=place, required=True, metavar="PATH", help="a result file, or its folder")
    parser.add_argument("--figure", type=Path, help="file to draw, .png")
    parser.add_argument("--steps", type=int, help="runs of this length alone (default: the longest of each variant)")
    parser.add_argument("--rate", type=float, help="runs at this rate alone (default: the one with most seeds)")
    parser.add_argument("--scales", default="pages", help="that the figure shows (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def report(arguments: argparse.Namespace) -> int:
    """Prints the table and the verdicts, draws the figure."""
    kinds = load(arguments.results, arguments.steps, arguments.rate)
    print("\n".join([*table(kinds), "", *comparisons(kinds)]))
    if arguments.figure:
        draw(kinds, arguments.scales, arguments.figure)
        print(f"figure: {arguments.figure}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("report.py", lambda: report(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
