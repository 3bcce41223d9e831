"""Results of runs: read from result files, grouped into experiments, and what their numbers are."""

import json
import math
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.result_files import Result, read_results
from benchmarks.quality.settings import TOWER_SPREADS

STARTED = ", start"  # after the variant's name: a model that warm starts began from
NOT_COMPARED = ("variant", "seed", "save", "start_from")
COSTS = ("task", "variant", "batch", "patch", "size")  # the settings that decide, with SHAPES, what a step costs
SHAPES = ("size", "cells")  # the knobs on which the length of a sample depends; all others change only what is drawn
OLD_PATCH = 14  # px, of results that do not say

Variants = dict[str, list[Result]]  # {variant: its runs by seed}
Limits = dict[str, dict[int, float]]  # {variant: {level: percent that digit_classifier.py reads}}
Times = dict[str, dict[str, float]]  # {cost_key: milliseconds of each part of a step}


def load(*places: Path) -> list[Result]:
    """Results of runs, finished or not, of result files and of folders with them, in the order of their names.

    Each name occurs once: read_results says which result counts. Raises UserError for a damaged file.
    """
    results = [result for result in read_results(*places).values() if "settings" in result]
    for result in results:
        result["settings"].setdefault("patch", OLD_PATCH)
        result["settings"].setdefault("tower_spread", TOWER_SPREADS[0])
    return results


def load_limits(place: Path | None) -> Limits:
    """Means over seeds of what digit_classifier.py wrote to a file or folder. Raises UserError for a damaged file."""
    read: Variants = {}
    for result in read_results(place).values() if place else ():
        if "classifier" in result:
            read.setdefault(result["classifier"]["variant"], []).append(result)
    return {
        variant: {level: 100 * level_accuracy(runs, level) for level in levels_of(runs)}
        for variant, runs in read.items()
    }


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def experiment(result: Result, runs: dict[str, Result]) -> str:
    """What must be equal for two runs to be compared, as text: settings, but for the variant and the seed, and the test
    images, which a kind of device draws in its own way. runs: by name, for those that others start from."""
    settings, start = result["settings"], result["settings"]["start_from"]
    if start in runs:
        begun = runs[start]["settings"]
        start = {**compared(begun), "variant": begun["variant"]}
    elif start is not None:  # its result is elsewhere, but its name says TASK_VARIANT_seedN_DIGEST
        start = {"variant": start.partition("_seed")[0]}
    return json.dumps({**compared(settings), "start": start, "test": test_set(result)}, sort_keys=True)


def test_set(result: Result) -> str:
    """A digest of how much there is to answer in each test image of a finished run, in all and of hard levels."""
    asked = [result["by_image"][key] for key in ("all", "hard_all")]
    return blake2b(json.dumps(asked).encode(), digest_size=4).hexdigest()


def experiments(results: list[Result]) -> dict[str, Variants]:
    """{experiment: {variant: its finished runs by seed}}, variants in the order of variants.VARIANTS; before warm
    starts the models that they began from, as "VARIANT, start".

    Of runs that differ in nothing but `save` the first counts: more would look like more seeds.
    """
    from benchmarks.quality.variants import VARIANTS

    order = {name: number for number, name in enumerate(VARIANTS)}
    runs = {result["name"]: result for result in results}
    grouped: dict[str, dict[str, dict[int, Result]]] = {}
    finished = [result for result in results if result["finished"]]
    for result in sorted(
        finished, key=lambda r: (order.get(r["settings"]["variant"], len(order)), r["settings"]["seed"])
    ):
        variant, seed = result["settings"]["variant"], result["settings"]["seed"]
        variants = grouped.setdefault(experiment(result, runs), {})
        start = runs.get(result["settings"]["start_from"])
        if start is not None and start["finished"] and test_set(start) == test_set(result):
            begun = start["settings"]
            variants.setdefault(begun["variant"] + STARTED, {}).setdefault(begun["seed"], start)
        variants.setdefault(variant, {}).setdefault(seed, result)
    return {
        name: {variant: [seeds[seed] for seed in sorted(seeds)] for variant, seeds in variants.items()}
        for name, variants in grouped.items()
    }


def without_starts(variants: Variants) -> Variants:
    """The variants that an experiment trained, not the models that they began from."""
    return {variant: runs for variant, runs in variants.items() if not variant.endswith(STARTED)}


def title(name: str) -> str:
    settings = json.loads(name)
    knobs = ", ".join(f"{key} {value}" for key, value in settings["knobs"].items())
    size, start = settings["size"], settings["start"]
    vision, language = (size.get(f"{part}_width") or size["width"] for part in ("vision", "language"))
    warm = f", from {start['variant']}" if start else ""
    if start and "steps" in start:
        warm += f" of {start['steps']} steps"
    if settings.get("tower_spread", TOWER_SPREADS[0]) != TOWER_SPREADS[0]:
        warm = f", tower drawn by its {settings['tower_spread']}{warm}"
    return (
        f"{settings['task']}{f' ({knobs})' if knobs else ''}, patches of {settings['patch']} px, {settings['steps']} "
        f"steps of {settings['batch']}, layers {size['vision_layers']} x {vision} + {size['language_layers']} x "
        f"{language}, learning rate {settings['learning_rate']:g}{warm}"
    )


def cost_key(result: Result) -> str:
    """What decides the times of a step, as text. Learning rate, seed and number of steps do not."""
    device, settings = result.get("environment", {}).get("device"), result["settings"]
    shapes = {knob: value for knob, value in settings["knobs"].items() if knob in SHAPES}
    return json.dumps([device, shapes, *(settings[key] for key in COSTS)], sort_keys=True)


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


def levels_of(runs: Iterable[Result]) -> list[int]:
    """Those that occur, rising."""
    return sorted({int(level) for run in runs for level in run["by_level"]})


def level_accuracy(runs: list[Result], level: int) -> float:
    """Mean over seeds; NaN where the level did not occur."""
    shares = [run["by_level"].get(str(level), (0, 0)) for run in runs]
    return float(np.mean([right / count if count else math.nan for right, count in shares]))


def image_accuracy(run: Result, hard: bool) -> np.ndarray:
    """Share of answers that are right, for each test image: float64 [images]; NaN where none counts."""
    right, count = (np.array(run["by_image"][f"{'hard_' * hard}{key}"], dtype=float) for key in ("right", "all"))
    return np.divide(right, count, out=np.full(len(count), np.nan), where=count > 0)


def image_counts(paired: list[tuple[Result, Result]], hard: bool) -> tuple[np.ndarray, np.ndarray]:
    """Answers that are right, of S pairs of runs in each of I test images, and how many there are: float64 [S, 2, I],
    [I]."""
    right, count = (f"{'hard_' * hard}{key}" for key in ("right", "all"))
    rights = [[run["by_image"][right] for run in pair] for pair in paired]
    return np.array(rights, dtype=float), np.array(paired[0][0]["by_image"][count], dtype=float)


def pairs_of(variants: Variants, ours: str, theirs: str) -> list[tuple[Result, Result]]:
    """Runs of two variants with the same seeds."""
    seeds = {run["settings"]["seed"]: run for run in variants.get(ours, [])}
    others = [run for run in variants.get(theirs, []) if run["settings"]["seed"] in seeds]
    return [(seeds[run["settings"]["seed"]], run) for run in others]


def learning_curves(runs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which all runs of a variant were tested, and their accuracies in percent then: [points], [runs,
    points]."""
    tested = [{point["step"]: point["accuracy"] for point in run["curve"]} for run in runs]
    steps = sorted(set(tested[0]).intersection(*tested[1:]))
    return np.array(steps), 100 * np.array([[run[step] for step in steps] for run in tested])
