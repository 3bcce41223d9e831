"""Paired comparison of two series of scores."""

import math
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


def crossed_difference(gains: np.ndarray, sizes: np.ndarray | None = None) -> Difference:
    """Mean difference of two variants that were trained with the same S seeds and tested on the same I items, with what
    would change with other seeds and with other items both in its interval.

    gains: by how much more the one scored than the other, summed over what counts in an item: float [S, I]. sizes:
    what counts in each item, float [I]; 1 if None. Seeds and items are crossed random effects: the variance is that of
    the mean over seeds plus that over items, which counts their interaction twice and so errs on the safe side;
    degrees of freedom by Satterthwaite (1946, doi:10.2307/3002019). pairs: S.

    Raises ValueError below two seeds or two items.
    """
    from scipy.stats import t

    seeds, items = gains.shape
    if seeds < 2 or items < 2:
        raise ValueError(f"crossed_difference needs at least 2 seeds and 2 items, got {seeds} and {items}")
    sizes = np.ones(items) if sizes is None else sizes
    by_seed = gains.sum(axis=1) / sizes.sum()
    mean = float(by_seed.mean())
    residual = (gains.mean(axis=0) - mean * sizes) / sizes.mean()  # of a ratio of sums, linearised
    of_seeds, of_items = by_seed.var(ddof=1) / seeds, residual.var(ddof=1) / items
    variance = of_seeds + of_items
    if not variance > 0:  # without spread the t value is undefined
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, seeds)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_items**2 / (items - 1))
    error = math.sqrt(variance)
    reach = float(t.ppf(0.975, freedom)) * error
    return Difference(mean, mean - reach, mean + reach, float(2 * t.sf(abs(mean) / error, freedom)), seeds)


def verdict_over_seeds(gains: np.ndarray, sizes: np.ndarray | None, items: str) -> str:
    """The verdict on two variants. items: what they are called; the others as for `crossed_difference`."""
    over = crossed_difference(gains, sizes)
    word = "no difference shown" if over.p >= LEVEL else ("better" if over.mean > 0 else "worse")
    return f"over {over.pairs} seeds and {gains.shape[1]} {items}: {describe(over)}: {word}"


def describe(difference: Difference) -> str:
    points = [100 * value for value in (difference.mean, difference.low, difference.high)]
    p = f"= {difference.p:.2g}" if difference.p >= LEAST_P else f"< {LEAST_P:.0g}"
    return f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f}), p {p}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    mean = 100 * float(np.mean(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * float(np.std(values, ddof=1)):.1f}"
