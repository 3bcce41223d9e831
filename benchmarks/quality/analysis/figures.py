"""Figures of an experiment."""

from collections import Counter
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.quality.analysis.run_results import (
    STARTED,
    Limits,
    Result,
    Times,
    Variants,
    cost_key,
    learning_curves,
    level_accuracy,
    levels_of,
    without_starts,
)

# What the levels of a task are.
LEVEL_NAMES = {
    "counting": "diameter of dots, px",
    "texture": "period of stripes, px",
    "chart": "px for one",
    "motion": "px a frame",
    "order": "frames apart",
    "flashes": "diameter, px",
}
OTHER_LEVELS = "height of print, px"
MARKERS = "os^vDP*X"  # of variants whose points may cover each other
BESIDE = 0.08  # octaves between variants of equal tokens
CHARACTERS_AN_INCH = 15  # of a heading


def draw_over(axis: Any, place: float, runs: list[Result], style: dict[str, Any]) -> None:
    """Mean accuracy, with the spread over seeds, at a place of the horizontal axis."""
    accuracy = [100 * run["accuracy"] for run in runs]
    error = np.std(accuracy, ddof=1) if len(runs) > 1 else 0
    axis.errorbar(place, np.mean(accuracy), error, capsize=3, linestyle="", markerfacecolor="none", **style)


def draw_levels(axis: Any, runs: list[Result], style: dict[str, Any]) -> None:
    """Mean accuracy by level, with the spread over seeds."""
    levels = levels_of(runs[:1])
    accuracy = 100 * np.array([[level_accuracy([run], level) for level in levels] for run in runs])
    error = accuracy.std(axis=0, ddof=1) if len(runs) > 1 else None
    axis.errorbar(levels, accuracy.mean(axis=0), error, marker="o", capsize=3, **style)


def draw_curve(axis: Any, runs: list[Result], style: dict[str, Any], milliseconds: float | None = None) -> None:
    """Mean accuracy on the way and, shaded, from the worst to the best seed; over steps, or over seconds if a step
    takes so many milliseconds."""
    steps, accuracy = learning_curves(runs)
    places = steps if milliseconds is None else steps * milliseconds / 1000
    axis.plot(places, accuracy.mean(axis=0), **style)
    axis.fill_between(places, accuracy.min(axis=0), accuracy.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def styles(variants: Variants) -> dict[str, dict[str, Any]]:
    """Colour and label of each variant, the same in all figures of an experiment."""
    palette = pyplot().cm.tab10.colors if len(variants) <= 10 else pyplot().cm.tab20.colors
    return {
        variant: {"color": colour, "label": f"{variant}: {runs[0]['visual_tokens']} visual tokens"}
        for (variant, runs), colour in zip(variants.items(), cycle(palette))
    }


def draw_budgets(variants: Variants, heading: str, path: Path) -> None:
    """Accuracy against visual tokens and, of the variants with the number of tokens that most have, floats of a
    token."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    numbers = Counter(runs[0]["visual_tokens"] for runs in variants.values())
    commonest, drawn = numbers.most_common(1)[0][0], Counter()
    for (variant, runs), style, marker in zip(variants.items(), styles(variants).values(), cycle(MARKERS)):
        style, tokens = {**style, "label": variant, "marker": marker}, runs[0]["visual_tokens"]
        beside = drawn[tokens] - (numbers[tokens] - 1) / 2  # those of equal tokens stand side by side
        drawn[tokens] += 1
        draw_over(axes[0], tokens * 2 ** (BESIDE * beside), runs, style)
        if tokens == commonest:
            draw_over(axes[1], runs[0]["live_floats_per_token"], runs, style)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(sorted(numbers), [str(tokens) for tokens in sorted(numbers)])
    axes[0].set(xlabel="visual tokens of the language model", ylabel="right, % (mean and spread over seeds)")
    axes[0].legend(fontsize="small")
    axes[1].set(xlabel=f"numbers of a token that vary; variants of {commonest} visual tokens")
    finish_figure(figure, heading, path)


def draw_learning(variants: Variants, times: Times, heading: str, path: Path) -> None:
    """Accuracy on the way, against steps and, of variants whose times are known, against seconds of encoding and
    training, without drawing."""
    learning, style = without_starts(variants), styles(variants)
    timed = any(cost_key(runs[0]) in times for runs in learning.values())
    figure, axes = pyplot().subplots(
        1, 1 + timed, figsize=(5.5 + 5.5 * timed, 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for variant, runs in learning.items():
        draw_curve(axes[0, 0], runs, style[variant])
        if time := times.get(cost_key(runs[0])):
            draw_curve(axes[0, 1], runs, style[variant], time["encode"] + time["train"])
    axes[0, 0].set(xlabel="steps", ylabel="right on the way, % (mean, worst and best seed)")
    if timed:
        axes[0, 1].set(xlabel="seconds of encoding and training")
    axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), fontsize="small")  # of all, timed or not
    finish_figure(figure, heading, path)


def draw_by_level(variants: Variants, limits: Limits, task: str, heading: str, path: Path) -> None:
    """Accuracy by level, with the spread over seeds and, dotted, what digit_classifier.py reads."""
    figure, axis = pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    for (variant, runs), style in zip(variants.items(), styles(variants).values()):
        draw_levels(axis, runs, style)
        read = variant.removesuffix(STARTED)
        if (limit := limits.get(read)) and (
            read == variant or read not in variants
        ):  # once for a start and its variant
            label = f"{read}: a classifier of single cells"
            axis.plot(*zip(*sorted(limit.items())), linestyle=":", marker="x", color=style["color"], label=label)
    axis.set(xlabel=LEVEL_NAMES.get(task, OTHER_LEVELS), ylabel="right, % (mean and spread over seeds)")
    axis.legend(fontsize="small")
    finish_figure(figure, heading, path)


def pyplot() -> Any:
    """matplotlib.pyplot without a display; imported late, as tables need none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish_figure(figure: Any, heading: str, path: Path) -> None:
    figure.suptitle(fill(heading, int(CHARACTERS_AN_INCH * figure.get_figwidth())), fontsize="x-small")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot().close(figure)
