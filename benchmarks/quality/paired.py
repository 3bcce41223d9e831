"""Paired comparison of two series of scores."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
LEAST_P = 1e-9  # below it a t test's p says no more than that
LEAST_SEEDS = 3


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


def over_seeds(ours: list[float], theirs: list[float]) -> str:
    """The verdict on two arms, from their scores of the same seeds."""
    over = paired_difference(ours, theirs)
    word = "no difference shown" if over.p >= LEVEL else ("better" if over.mean > 0 else "worse")
    return f"over {over.pairs} seeds: {describe(over)}: {word}"


def describe(difference: Difference) -> str:
    points = [100 * value for value in (difference.mean, difference.low, difference.high)]
    p = f"= {difference.p:.2g}" if difference.p >= LEAST_P else f"< {LEAST_P:.0g}"
    return f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f}), p {p}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    mean = 100 * float(np.mean(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * float(np.std(values, ddof=1)):.1f}"
