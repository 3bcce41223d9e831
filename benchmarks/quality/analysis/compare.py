"""Reads the results of runs: tables, paired tests, figures.

    python -m benchmarks.quality.analysis.compare --results results --figures figures

Results are result files (.jsonl) or folders with them. PATH also stands for the file PATH.jsonl.

Runs are compared within an experiment: same task and knobs, model, batch, steps, tests and learning rate, and for warm
starts the same variant and training of the model they start from; only variant and seed differ. Times are those of
steps of runs that had the device to themselves, of whatever number of steps.

Two tests, both paired and two-sided, and both of a mean difference with its 95 % interval:

    over images             of one seed: t test on the accuracy of each test image under both variants. It says whether
                              these two trained models differ, and nothing about other seeds.
    over seeds and images   what would change with other seeds and with other test images, both
                              (paired.crossed_difference). It decides "better", and needs three seeds.

Differences by level are over seeds alone, on the one test set: mean and half the 95 % interval of a t test.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.quality.analysis.figures import draw_budgets, draw_by_level, draw_learning
from benchmarks.quality.analysis.paired import LEAST_SEEDS, describe, paired_difference, spread, verdict_over_seeds
from benchmarks.quality.analysis.run_results import (
    Limits,
    Times,
    Variants,
    cost_key,
    experiments,
    image_accuracy,
    image_counts,
    learning_curves,
    level_accuracy,
    levels_of,
    load,
    load_limits,
    pairs_of,
    step_times,
    title,
    without_starts,
)
from benchmarks.quality.result_files import SUFFIX, Result, result_files
from dct_qwen2vl.common.scripts import UserError, run_main

# What is compared with what: (variant, against).
PAIRS = (
    ("x4", "quarter"),
    ("x4", "quarter-pca"),
    ("x4", "pixels"),
    ("x4", "exact"),
    ("x4", "x4-corner"),
    ("x4", "x4-half"),
    ("x4", "x4-floor"),
    ("x4", "x4-444"),
    ("x4-loud", "x4"),
    ("x4-louder", "x4"),
    ("x4-louder", "quarter"),
    ("x4-variance", "x4-zigzag"),
    ("x4-floor", "quarter-pca"),
    ("x4", "x4-raw"),
    ("x4", "x4-pca"),
    ("x4-corner", "quarter"),
    ("quarter-unit", "quarter"),
    ("quarter-pca", "quarter"),
    ("quarter-pca", "quarter-unit"),
    ("pixels-unit", "pixels"),
    ("exact", "pixels"),
    ("x16", "sixteenth"),
    *(("x4-skip", other) for other in ("x4", "x4-slow", "x4-small", "x4-evs")),
    ("x4-skip-ring", "x4"),
    ("x4-skip-refresh", "x4"),
    ("x4-third", "x4"),
    ("x4-skip", "x4-third"),
    *(("x4-skip-age", other) for other in ("x4", "x4-skip")),
    *(("x4-mixed", other) for other in ("x4", "quarter", "exact-skip")),
    *((both, "x4-skip") for both in ("x4-skip-half", "x4-skip-most", "x4-skip-then-all")),
)
LIMITED = "reading"  # the task that digit_classifier.py reads
LEVEL_PAIRS = (("x4", "quarter"), ("x4", "x4-corner"), ("x16", "sixteenth"))  # level by level, too
MARKS = (50, 80, 90, 95, 98)  # percent right, of which the steps to them are told


def asked_table(variants: Variants) -> list[str]:
    """Markdown lines: accuracy in percent with and without skipping, whichever a variant was trained with."""
    asked = {name: [run["asked"] for run in runs if "asked" in run] for name, runs in variants.items()}
    lines = [
        f"| {name} | {spread([one['x4'] for one in runs])} | {spread([one['x4-skip'] for one in runs])} |"
        for name, runs in asked.items()
        if runs
    ]
    return (
        ["| trained as | asked with all cells | asked with skipping |", "| --- | --- | --- |", *lines] if lines else []
    )


def untimed(variants: Variants, times: Times) -> list[str]:
    """A line on the variants whose times are not known, if there are any."""
    missing = [variant for variant, runs in variants.items() if cost_key(runs[0]) not in times]
    return [f"no times of {', '.join(missing)}: no such run had the device to itself"] if missing else []


def table(variants: Variants, times: Times) -> list[str]:
    """Markdown lines: one row per variant. Floats: those that are not constant, of all in a token. Cells of what was
    not measured are empty; a column for step 0 is there if any run was tested then."""
    hard = next(iter(variants.values()))[0]["hard_levels"]
    header = [
        "variant",
        "LLM tokens",
        "floats of a token",
        "right, %",
        f"levels {hard[0]}-{hard[-1]}, %",
        "generated, %",
    ]
    header += ["ms a step: encode + train", "GB", "seeds"]
    rows = [row(variant, runs, times.get(cost_key(runs[0]))) for variant, runs in variants.items()]
    begun = [before_training(runs) for runs in variants.values()]
    if any(begun):
        for cells, cell in zip([header, *rows], ["at step 0, %", *begun]):
            cells.insert(3, cell)
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def row(variant: str, runs: list[Result], time: dict[str, float] | None) -> list[str]:
    """Cells of a variant in `table`."""
    run, generated = runs[0], [r["generation"]["accuracy"] for r in runs if r["generation"]]
    return [
        variant,
        str(run["visual_tokens"]),
        f"{run['live_floats_per_token']} of {run['floats_per_token']}",
        spread([r["accuracy"] for r in runs]),
        spread([r["hard_accuracy"] for r in runs]),
        spread(generated) if generated else "",
        f"{time['encode']:.1f} + {time['train']:.1f}" if time else "",
        f"{run['peak_memory_bytes'] / 1e9:.1f}" if "peak_memory_bytes" in run else "",
        str(len(runs)),
    ]


def before_training(runs: list[Result]) -> str:
    """Accuracy of warm starts at step 0, on the test images used during training; empty if not tested."""
    values = [point["accuracy"] for run in runs for point in run["curve"] if point["step"] == 0]
    return spread(values) if values else ""


def level_table(variants: Variants) -> list[str]:
    """Markdown lines: accuracy in percent, mean over seeds, by level of difficulty."""
    levels = levels_of(run for runs in variants.values() for run in runs)
    if len(levels) < 2:
        return []
    lines = ["| variant \\ level | " + " | ".join(map(str, levels)) + " |", "| --- " * (len(levels) + 1) + "|"]
    for variant, runs in variants.items():
        lines.append(
            f"| {variant} | " + " | ".join(f"{100 * level_accuracy(runs, level):.1f}" for level in levels) + " |"
        )
    for ours, theirs in LEVEL_PAIRS:
        paired = pairs_of(variants, ours, theirs)
        if len(paired) >= LEAST_SEEDS:
            cells = [level_difference(paired, level) for level in levels]
            lines.append(f"| {ours} - {theirs} | " + " | ".join(cells) + " |")
    return lines


def level_difference(paired: list[tuple[Result, Result]], level: int) -> str:
    """Over seeds, in points: mean and half the 95 % interval."""
    ours, theirs = ([level_accuracy([run], level) for run in runs] for runs in zip(*paired))
    difference = paired_difference(ours, theirs)
    return f"{100 * difference.mean:+.1f} ± {50 * (difference.high - difference.low):.1f}"


def learning_table(variants: Variants) -> list[str]:
    """Markdown lines: steps after which so much is right of the images tested on the way, median over seeds; "-"
    where a seed did not get there. Only tests in which all seeds took part count, and only marks above chance."""
    chance = 100 * next(iter(variants.values()))[0]["chance"]
    marks = [mark for mark in MARKS if mark > chance]
    lines = [f"| steps until right, %: | {' | '.join(map(str, marks))} |", "| --- " * (len(marks) + 1) + "|"]
    for variant, runs in without_starts(variants).items():
        steps, accuracy = learning_curves(runs)
        lines.append(f"| {variant} | {' | '.join(steps_to(mark, steps, accuracy) for mark in marks)} |")
    return lines if len(lines) > 2 else []


def steps_to(mark: float, steps: np.ndarray, accuracy: np.ndarray) -> str:
    """Median over runs of the steps until the accuracy, [runs, points], first is at the mark; "-" if one never is."""
    reached = accuracy >= mark
    return f"{np.median(steps[reached.argmax(axis=1)]):.0f}" if reached.any(axis=1).all() else "-"


def tests(variants: Variants) -> list[str]:
    """Lines on the pairs that are there."""
    lines = []
    for ours, theirs in PAIRS:
        paired = pairs_of(variants, ours, theirs)
        for hard in (False, True) if paired else ():
            lines.append(f"{ours} - {theirs}, {'hard levels' if hard else 'all'}: {verdict(paired, hard)}")
    return lines


def verdict(paired: list[tuple[Result, Result]], hard: bool) -> str:
    """Both tests on runs of the same seeds, in words."""
    ours, theirs = (image_accuracy(run, hard) for run in paired[0])
    both = ~(np.isnan(ours) | np.isnan(theirs))
    if both.sum() < 2:
        return "nothing of it in two test images"
    said = f"over {both.sum()} images of seed {paired[0][0]['settings']['seed']}: "
    said += describe(paired_difference(ours[both], theirs[both]))
    if len(paired) < LEAST_SEEDS:
        return f"{said}; no verdict below {LEAST_SEEDS} seeds"
    right, counts = image_counts(paired, hard)
    gains = (right[:, 0] - right[:, 1])[:, counts > 0]
    return f"{said}; {verdict_over_seeds(gains, counts[counts > 0], 'images')}"


def unfinished(results: list[Result]) -> list[str]:
    return [
        f"unfinished: {r['settings']['task']} {r['settings']['variant']} seed {r['settings']['seed']}, "
        f"{r['curve'][-1]['step'] if r['curve'] else 0} of {r['settings']['steps']} steps"
        for r in results
        if not r["finished"]
    ]


def draw(name: str, number: int, variants: Variants, times: Times, limits: Limits, folder: Path) -> None:
    """The figures of an experiment: TASK_NUMBER_budgets.png, _learning.png, _levels.png."""
    task, heading = json.loads(name)["task"], title(name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{task}_{number}_{kind}.png" for kind in ("budgets", "learning", "levels")}
    draw_budgets(variants, heading, paths["budgets"])
    draw_learning(variants, times, heading, paths["learning"])
    draw_by_level(variants, limits if task == LIMITED else {}, task, heading, paths["levels"])
    print(f"\nfigures: {', '.join(map(str, paths.values()))}")


def place(text: str) -> Path:
    """A result file or a folder. A path that is neither stands for the file PATH.jsonl, if that is there."""
    path, named = Path(text), Path(text + SUFFIX)
    return named if named.is_file() and not path.exists() else path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--results", type=place, nargs="+", required=True, metavar="PATH", help="result files, or folders with them")
    add("--times", type=place, nargs="+", default=[], metavar="PATH", help="more, for times alone")
    add("--limits", type=place, metavar="PATH", help="results of digit_classifier.py, for the figures")
    add("--figures", type=Path, metavar="DIR", help="draw three figures for each experiment there")
    return parser.parse_args(argv)


def read(arguments: argparse.Namespace) -> tuple[list[Result], Times, Limits]:
    """Raises UserError for places without results and for damaged files."""
    limits = [] if arguments.limits is None else [arguments.limits]
    empty = [str(path) for path in [*arguments.results, *arguments.times, *limits] if not result_files(path)]
    results = [] if empty else load(*arguments.results)
    if not results:
        where = " ".join(empty or map(str, arguments.results))
        raise UserError(f"no results in {where}: expected .jsonl files of run_experiments.py or digit_classifier.py")
    return results, step_times(results + load(*arguments.times)), load_limits(arguments.limits)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("compare.py", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    """Prints the tables and draws the figures. Raises UserError, OSError."""
    results, times, limits = read(arguments)
    for number, (name, variants) in enumerate(experiments(results).items()):
        tested = [len(runs[0]["by_image"]["right"]) for runs in variants.values()]
        chance = 100 * next(iter(variants.values()))[0]["chance"]
        print(f"\n{title(name)}; {tested[0]} test samples, chance {chance:.0f} %")
        tables = [
            "",
            *table(variants, times),
            "",
            *level_table(variants),
            "",
            *asked_table(variants),
            "",
            *learning_table(variants),
            "",
        ]
        print("\n".join([*tables, *untimed(variants, times), *tests(variants)]))
        if arguments.figures:
            draw(name, number, variants, times, limits, arguments.figures)
    print("\n".join(unfinished(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
