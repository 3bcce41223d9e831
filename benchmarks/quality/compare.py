"""Reads the results of runs: tables, paired tests, figures.

    python benchmarks/quality/compare.py --results results --figures figures

Runs are compared within an experiment: same task and knobs, model, batch, steps, tests and learning rate, and for warm
starts the same arm and training of the model they start from; only arm and seed differ. Times are those of steps of
runs that had the device to themselves, of whatever number of steps.

Two tests, both paired and two-sided, and both of a mean difference with its 95 % interval:

    over pictures   of one seed: t test on the accuracy of each test picture under both arms. It says whether these two
                    trained models differ, and nothing about other seeds.
    over seeds      t test on the test accuracy of each seed. It decides "better", and needs three seeds.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

# What is compared with what: (arm, against).
PAIRS = (
    ("x4", "quarter"),
    ("x4", "quarter-pca"),
    ("x4", "pixels"),
    ("x4", "exact"),
    ("x4", "x4-corner"),
    ("x4", "x4-half"),
    ("x4", "x4-floor"),
    ("x4", "x4-loud"),
    ("x4-floor", "quarter-pca"),
    ("x4", "x4-raw"),
    ("x4", "x4-pca"),
    ("x4-corner", "quarter"),
    ("quarter-pca", "quarter"),
    ("exact", "pixels"),
    ("x16", "sixteenth"),
)
LIMITED = "reading"  # the task that legibility.py reads
STARTED = ", start"  # after the arm's name: a model that warm starts began from
LEVEL_PAIRS = (("x4", "quarter"), ("x4", "x4-corner"), ("x16", "sixteenth"))  # level by level, too
LEVEL = 0.05
LEAST_P = 1e-9  # below it a t test's p says no more than that
LEAST_SEEDS = 3
NOT_COMPARED = ("arm", "seed", "save", "start_from")
COSTS = ("task", "knobs", "arm", "batch", "patch", "size")  # the settings that decide what a step costs on a device
OLD_PATCH = 14  # px, of results that do not say

Result = dict[str, Any]  # of a run: what its JSON file holds, and `name`, that of the file
Arms = dict[str, list[Result]]  # {arm: its runs by seed}
Limits = dict[str, dict[int, float]]  # {arm: {level: percent that legibility.py reads}}
Times = dict[str, dict[str, float]]  # {cost_key: milliseconds of each part of a step}


@dataclass(frozen=True)
class Difference:
    """Of paired values: mean, 95 % interval, p of the two-sided paired t test, number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired_difference(ours: Iterable[float], theirs: Iterable[float]) -> Difference:
    """Paired t test of two equally long series. Raises ValueError below two pairs, or for unequal lengths."""
    from scipy.stats import ttest_rel

    ours, theirs = np.asarray(list(ours), float), np.asarray(list(theirs), float)
    if ours.shape != theirs.shape or ours.size < 2:
        raise ValueError(f"paired_difference needs two equal series of at least 2, got {ours.size} and {theirs.size}")
    mean = float((ours - theirs).mean())
    if np.ptp(ours - theirs) == 0:  # without spread the t value is undefined
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, ours.size)
    test = ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(test.pvalue), ours.size)


def load(*folders: Path) -> list[Result]:
    """All results of runs in some folders, finished or not, in the order of their names."""
    paths = {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}
    results = [{"name": name, **json.loads(path.read_text())} for name, path in sorted(paths.items())]
    results = [result for result in results if "settings" in result]
    for result in results:
        result["settings"].setdefault("patch", OLD_PATCH)
    return results


def load_limits(folder: Path | None) -> Limits:
    """Means over seeds of what legibility.py wrote in a folder."""
    read: Arms = {}
    for path in sorted(folder.glob("*.json")) if folder else ():
        result = json.loads(path.read_text())
        if "classifier" in result:
            read.setdefault(result["classifier"]["arm"], []).append(result)
    return {arm: {level: 100 * level_accuracy(runs, level) for level in levels_of(runs)} for arm, runs in read.items()}


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def experiment(result: Result, runs: dict[str, Result]) -> str:
    """What must be equal for two runs to be compared, as text. runs: by name, for those that others start from."""
    settings, start = result["settings"], result["settings"]["start_from"]
    if start in runs:
        begun = runs[start]["settings"]
        start = {**compared(begun), "arm": begun["arm"]}
    elif start is not None:  # its result is elsewhere, but its name says TASK_ARM_seedN_DIGEST
        start = {"arm": start.partition("_seed")[0]}
    return json.dumps({**compared(settings), "start": start}, sort_keys=True)


def experiments(results: list[Result]) -> dict[str, Arms]:
    """{experiment: {arm: its finished runs by seed}}, arms in the order of arms.ARMS; before warm starts the models
    that they began from, as "ARM, start".

    Of runs that differ in nothing but `save` the first counts: more would look like more seeds.
    """
    from benchmarks.quality.arms import ARMS

    order = {name: number for number, name in enumerate(ARMS)}
    runs = {result["name"]: result for result in results}
    grouped: dict[str, dict[str, dict[int, Result]]] = {}
    finished = [result for result in results if result["finished"]]
    for result in sorted(finished, key=lambda r: (order.get(r["settings"]["arm"], len(order)), r["settings"]["seed"])):
        arm, seed = result["settings"]["arm"], result["settings"]["seed"]
        arms = grouped.setdefault(experiment(result, runs), {})
        start = runs.get(result["settings"]["start_from"])
        if start is not None and start["finished"]:
            begun = start["settings"]
            arms.setdefault(begun["arm"] + STARTED, {}).setdefault(begun["seed"], start)
        arms.setdefault(arm, {}).setdefault(seed, result)
    return {
        name: {arm: [seeds[seed] for seed in sorted(seeds)] for arm, seeds in arms.items()}
        for name, arms in grouped.items()
    }


def title(name: str) -> str:
    settings = json.loads(name)
    knobs = ", ".join(f"{key} {value}" for key, value in settings["knobs"].items())
    size, start = settings["size"], settings["start"]
    vision, language = (size.get(f"{part}_width") or size["width"] for part in ("vision", "language"))
    warm = f", from {start['arm']}" if start else ""
    if start and "steps" in start:
        warm += f" of {start['steps']} steps"
    return (
        f"{settings['task']}{f' ({knobs})' if knobs else ''}, patches of {settings['patch']} px, {settings['steps']} "
        f"steps of {settings['batch']}, layers {size['vision_layers']} x {vision} + {size['language_layers']} x "
        f"{language}, learning rate {settings['learning_rate']:g}{warm}"
    )


def cost_key(result: Result) -> str:
    """What decides the times of a step, as text. Learning rate, seed and number of steps do not."""
    device = result.get("environment", {}).get("device")
    return json.dumps([device, *(result["settings"][key] for key in COSTS)], sort_keys=True)


def step_times(results: list[Result]) -> Times:
    """Medians over the finished runs that had the device to themselves, which older results do not say but had."""
    measured: dict[str, list[dict[str, float]]] = {}
    for result in results:
        if result["finished"] and result.get("alone", True):
            measured.setdefault(cost_key(result), []).append(result["milliseconds"])
    return {
        key: {part: float(np.median([run[part] for run in runs])) for part in ("encode", "train")}
        for key, runs in measured.items()
    }


def untimed(arms: Arms, times: Times) -> list[str]:
    """A line on the arms whose times are not known, if there are any."""
    missing = [arm for arm, runs in arms.items() if cost_key(runs[0]) not in times]
    return [f"no times of {', '.join(missing)}: no such run had the device to itself"] if missing else []


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    mean = 100 * float(np.mean(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * float(np.std(values, ddof=1)):.1f}"


def table(arms: Arms, times: Times) -> list[str]:
    """Markdown lines: one row per arm. Floats: those that are not constant, of all in a token. Cells of what was not
    measured are empty; a column for step 0 is there if any run was tested then."""
    hard = next(iter(arms.values()))[0]["hard_levels"]
    header = ["arm", "LLM tokens", "floats of a token", "right, %", f"levels {hard[0]}-{hard[-1]}, %", "generated, %"]
    header += ["ms a step: encode + train", "GB", "seeds"]
    rows = [row(arm, runs, times.get(cost_key(runs[0]))) for arm, runs in arms.items()]
    begun = [before_training(runs) for runs in arms.values()]
    if any(begun):
        for cells, cell in zip([header, *rows], ["at step 0, %", *begun]):
            cells.insert(3, cell)
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def row(arm: str, runs: list[Result], time: dict[str, float] | None) -> list[str]:
    """Cells of an arm in `table`."""
    run, generated = runs[0], [r["generation"]["accuracy"] for r in runs if r["generation"]]
    return [
        arm,
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
    """Accuracy of warm starts at step 0, on the test pictures used during training; empty if not tested."""
    values = [point["accuracy"] for run in runs for point in run["curve"] if point["step"] == 0]
    return spread(values) if values else ""


def level_table(arms: Arms) -> list[str]:
    """Markdown lines: accuracy in percent, mean over seeds, by level of difficulty."""
    levels = levels_of(run for runs in arms.values() for run in runs)
    if len(levels) < 2:
        return []
    lines = ["| arm \\ level | " + " | ".join(map(str, levels)) + " |", "| --- " * (len(levels) + 1) + "|"]
    for arm, runs in arms.items():
        lines.append(f"| {arm} | " + " | ".join(f"{100 * level_accuracy(runs, level):.1f}" for level in levels) + " |")
    for ours, theirs in LEVEL_PAIRS:
        paired = pairs_of(arms, ours, theirs)
        if len(paired) >= LEAST_SEEDS:
            cells = [level_difference(paired, level) for level in levels]
            lines.append(f"| {ours} - {theirs} | " + " | ".join(cells) + " |")
    return lines


def level_difference(paired: list[tuple[Result, Result]], level: int) -> str:
    """Over seeds, in points: mean and half the 95 % interval."""
    ours, theirs = ([level_accuracy([run], level) for run in runs] for runs in zip(*paired))
    difference = paired_difference(ours, theirs)
    return f"{100 * difference.mean:+.1f} ± {50 * (difference.high - difference.low):.1f}"


def levels_of(runs: Iterable[Result]) -> list[int]:
    """Those that occur, rising."""
    return sorted({int(level) for run in runs for level in run["by_level"]})


def level_accuracy(runs: list[Result], level: int) -> float:
    """Mean over seeds; NaN where the level did not occur."""
    shares = [run["by_level"].get(str(level), (0, 0)) for run in runs]
    return float(np.mean([right / count if count else math.nan for right, count in shares]))


def picture_accuracy(run: Result, hard: bool) -> np.ndarray:
    """Share of answers that are right, for each test picture: float64 [pictures]; NaN where none counts."""
    right, count = (np.array(run["by_picture"][f"{'hard_' * hard}{key}"], dtype=float) for key in ("right", "all"))
    return np.divide(right, count, out=np.full(len(count), np.nan), where=count > 0)


def pairs_of(arms: Arms, ours: str, theirs: str) -> list[tuple[Result, Result]]:
    """Runs of two arms with the same seeds."""
    seeds = {run["settings"]["seed"]: run for run in arms.get(ours, [])}
    others = [run for run in arms.get(theirs, []) if run["settings"]["seed"] in seeds]
    return [(seeds[run["settings"]["seed"]], run) for run in others]


def tests(arms: Arms) -> list[str]:
    """Lines on the pairs that are there."""
    lines = []
    for ours, theirs in PAIRS:
        paired = pairs_of(arms, ours, theirs)
        for hard in (False, True) if paired else ():
            lines.append(f"{ours} - {theirs}, {'hard levels' if hard else 'all'}: {verdict(paired, hard)}")
    return lines


def verdict(paired: list[tuple[Result, Result]], hard: bool) -> str:
    """Both tests on runs of the same seeds, in words."""
    ours, theirs = (picture_accuracy(run, hard) for run in paired[0])
    both = ~(np.isnan(ours) | np.isnan(theirs))
    said = f"over {both.sum()} pictures of seed {paired[0][0]['settings']['seed']}: "
    said += describe(paired_difference(ours[both], theirs[both]))
    if len(paired) < LEAST_SEEDS:
        return f"{said}; no verdict below {LEAST_SEEDS} seeds"
    key = "hard_accuracy" if hard else "accuracy"
    return f"{said}; {over_seeds([one[key] for one, _ in paired], [two[key] for _, two in paired])}"


def over_seeds(ours: list[float], theirs: list[float]) -> str:
    """The verdict on two arms, from their scores of the same seeds."""
    over = paired_difference(ours, theirs)
    word = "no difference shown" if over.p >= LEVEL else ("better" if over.mean > 0 else "worse")
    return f"over {over.pairs} seeds: {describe(over)}: {word}"


def describe(difference: Difference) -> str:
    points = [100 * value for value in (difference.mean, difference.low, difference.high)]
    p = f"= {difference.p:.2g}" if difference.p >= LEAST_P else f"< {LEAST_P:.0g}"
    return f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f}), p {p}"


def unfinished(results: list[Result]) -> list[str]:
    return [
        f"unfinished: {r['settings']['task']} {r['settings']['arm']} seed {r['settings']['seed']}, "
        f"{r['curve'][-1]['step'] if r['curve'] else 0} of {r['settings']['steps']} steps"
        for r in results
        if not r["finished"]
    ]


def learning_curve(runs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which all runs of an arm were tested, and their mean accuracy in percent then: [points] each."""
    tested = [{point["step"]: point["accuracy"] for point in run["curve"]} for run in runs]
    steps = sorted(set(tested[0]).intersection(*tested[1:]))
    return np.array(steps), 100 * np.array([np.mean([run[step] for run in tested]) for step in steps])


def draw_over(field: str, axis: Any, runs: list[Result], style: dict[str, Any]) -> None:
    """Mean accuracy, with the spread over seeds, at what a token or a picture is made of."""
    accuracy = [100 * run["accuracy"] for run in runs]
    error = np.std(accuracy, ddof=1) if len(runs) > 1 else 0
    axis.errorbar(runs[0][field], np.mean(accuracy), error, marker="o", capsize=3, linestyle="", **style)


def draw_levels(axis: Any, runs: list[Result], style: dict[str, Any]) -> None:
    """Mean accuracy by level, with the spread over seeds."""
    levels = levels_of(runs[:1])
    accuracy = 100 * np.array([[level_accuracy([run], level) for level in levels] for run in runs])
    error = accuracy.std(axis=0, ddof=1) if len(runs) > 1 else None
    axis.errorbar(levels, accuracy.mean(axis=0), error, marker="o", capsize=3, **style)


def draw_steps(axis: Any, runs: list[Result], style: dict[str, Any], milliseconds: float | None = None) -> None:
    """Mean accuracy on the way, over steps, or over seconds if a step takes so many milliseconds."""
    steps, accuracy = learning_curve(runs)
    axis.plot(steps if milliseconds is None else steps * milliseconds / 1000, accuracy, **style)


def draw_figure(arms: Arms, times: Times, heading: str, path: Path) -> None:
    """Accuracy against visual tokens, floats of a token, steps, seconds (of encoding and training, without drawing;
    arms whose times are not known are left out) and difficulty."""
    plt = pyplot()
    names = ("visual tokens of the language model", "floats of a token that vary", "steps", "seconds", "level")
    figure, axes = plt.subplots(1, len(names), figsize=(25, 5), layout="constrained", sharey=True)
    colours = plt.cm.tab10.colors if len(arms) <= 10 else plt.cm.tab20.colors
    for (arm, runs), colour in zip(arms.items(), cycle(colours)):
        style = {"color": colour, "label": arm}
        draw_over("visual_tokens", axes[0], runs, style)
        draw_over("live_floats_per_token", axes[1], runs, style)
        if not arm.endswith(STARTED):
            draw_steps(axes[2], runs, style)
            if time := times.get(cost_key(runs[0])):
                draw_steps(axes[3], runs, style, time["encode"] + time["train"])
        draw_levels(axes[4], runs, style)
    for axis, name in zip(axes, names):
        axis.set_xlabel(name)
    axes[0].set_xscale("log", base=2)
    tokens = sorted({runs[0]["visual_tokens"] for runs in arms.values()})
    axes[0].set_xticks(tokens, [str(number) for number in tokens])
    axes[0].set_ylabel("right, %")
    axes[4].legend(fontsize="small")
    finish_figure(figure, heading, path)


def draw_answer(arms: Arms, limits: Limits, heading: str, path: Path) -> None:
    """Accuracy by level, with the spread over seeds and, dotted, what legibility.py reads; and on the way."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (arm, runs) in enumerate(arms.items()):
        style = {"color": plt.cm.tab10(number % 10), "label": f"{arm}: {runs[0]['visual_tokens']} visual tokens"}
        draw_levels(left, runs, style)
        if not arm.endswith(STARTED):
            draw_steps(right, runs, style)
        if limit := limits.get(arm.removesuffix(STARTED)):
            label = f"{arm.removesuffix(STARTED)}: a classifier of single cells"
            left.plot(*zip(*sorted(limit.items())), linestyle=":", marker="x", color=style["color"], label=label)
    left.set(xlabel="level", ylabel="right, % (mean and spread over seeds)")
    right.set(xlabel="steps", ylabel="right, %, of the pictures tested on the way")
    left.legend(fontsize="small")
    finish_figure(figure, heading, path)


def pyplot() -> Any:
    """matplotlib.pyplot without a display; imported late, as tables need none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish_figure(figure: Any, heading: str, path: Path) -> None:
    figure.suptitle(heading, fontsize="small")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    pyplot().close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="JSON files of runs")
    parser.add_argument("--times", type=Path, nargs="+", default=[], metavar="DIR", help="more, for times alone")
    parser.add_argument("--limits", type=Path, metavar="DIR", help="results of legibility.py, for the figures")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw two figures for each experiment there")
    arguments = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts of the repository
    results = load(arguments.results)
    if not results:
        print(f"compare.py: no results in {arguments.results}: run run_experiments.py --output there", file=sys.stderr)
        return 1
    times, limits = step_times(results + load(*arguments.times)), load_limits(arguments.limits)
    for number, (name, arms) in enumerate(experiments(results).items()):
        tested = [len(runs[0]["by_picture"]["right"]) for runs in arms.values()]
        chance = 100 * next(iter(arms.values()))[0]["chance"]
        print(f"\n{title(name)}; {tested[0]} test samples, chance {chance:.0f} %")
        print("\n".join(["", *table(arms, times), "", *level_table(arms), "", *untimed(arms, times), *tests(arms)]))
        if arguments.figures:
            arguments.figures.mkdir(parents=True, exist_ok=True)
            stem = f"{json.loads(name)['task']}_{number}"
            draw_figure(arms, times, title(name), arguments.figures / f"{stem}.png")
            draw_answer(
                arms,
                limits if json.loads(name)["task"] == LIMITED else {},
                title(name),
                arguments.figures / f"{stem}_levels.png",
            )
    print("\n".join(unfinished(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
