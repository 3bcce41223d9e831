"""Which runs make up which experiment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.settings import ModelSize, Settings

SEEDS = (0, 1, 2)
CORE = ("quarter", "x4", "pixels")  # the cheapest first
CONTROLS = ("x4-corner", "quarter-pca", "x4-floor", "pca28", "raw28")
CONDITIONING = (
    *CORE,
    "quarter-unit",
    "quarter-pca",
    "raw28",
    "pca28",
    "x4-flat",
    "x4-floor",
    "pixels-unit",
    "pixels-pca",
    "exact",
)
INFORMATION = (*CORE, "quarter-pca", "x4-floor", "x4-corner", "x4-half", "pca28")
FORMATS = ("x4", "x4-corner", "x4-half", "x4-variance", "x4-zigzag", "x4-all", "x4-444")
BUDGETS = ("sixteenth", "sixteenth-pca", "x16", "quarter", "quarter-pca", "x4", "pixels", "exact")
WARM = ("quarter", "x4", "pixels", "x4-floor", "x4-corner", "x4-half", "x4-weighted", "exact")
STILLS = ("reading", "numbers", "words", "odd-one", "counting", "texture", "chart")
CLIPS = ("motion", "order", "flashes", "ticker")
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
WARM_SHARE = 8  # a warm start takes 1/8 of the steps that the pixel model took
LARGE = (9, 10, 11, 12)  # digits of this height are whole at half the sides, too
WIDE = {"size": 224, "cells": 5}  # pictures of which a sixteenth is four visual tokens
TINY = {"size": ModelSize(128, 2, 2), "batch": 32, "probe": 32, "test": 64, "fit": 128, "generated": 4}


@dataclass(frozen=True)
class Suite:
    """runs: in the order in which they are done. core: how many of them share the time that --minutes gives; the rest
    follows while time is left."""

    runs: tuple[Settings, ...]
    core: int


@dataclass(frozen=True)
class Plan:
    """What all runs of a suite share. batch: None for the default."""

    steps: int
    tiny: bool = False
    batch: int | None = None

    def base(self, task: str = "reading", **changes: Any) -> Settings:
        settings = Settings(task=task, steps=self.steps)
        if self.tiny:
            settings = replace(settings, **TINY)
        return replace(settings, batch=self.batch or settings.batch, **changes)


def _runs(base: Settings, arms: tuple[str, ...], seeds: tuple[int, ...] = SEEDS) -> tuple[Settings, ...]:
    return tuple(replace(base, arm=arm, seed=seed) for seed in seeds for arm in arms)


def first(plan: Plan) -> Suite:
    """Does x4 read better than a picture of half the sides, at equal tokens and steps? With controls; seed by seed."""
    return Suite(_runs(plan.base(), (*CORE, *CONTROLS)), len(CORE))


def fidelity(plan: Plan) -> Suite:
    """What is lost for good? Each arm with the steps and with twice as many: where doubling adds less than half a
    point, training has stopped improving."""
    runs = [_runs(plan.base(), INFORMATION), _runs(replace(plan.base(), steps=2 * plan.steps), INFORMATION)]
    return Suite((*runs[0], *runs[1]), len(INFORMATION))


def speed(plan: Plan) -> Suite:
    """How fast is it learned? Digits that are whole at half the sides, too: what differs is conditioning."""
    return Suite(_runs(plan.base(knobs={"heights": list(LARGE)}), CONDITIONING), len(CONDITIONING))


def formats(plan: Plan) -> Suite:
    """Which coefficients, how many, with how much colour?"""
    return Suite(_runs(plan.base(), FORMATS), len(FORMATS))


def tokens(plan: Plan) -> Suite:
    """Accuracy against the number of visual tokens."""
    return Suite(_runs(plan.base(knobs=WIDE), BUDGETS), len(BUDGETS))


def rates(plan: Plan) -> Suite:
    """Is the learning rate fair to all? Each of the core arms at four rates."""
    runs = [run for rate in RATES for run in _runs(plan.base(learning_rate=rate), CORE, (0,))]
    return Suite(tuple(runs), len(runs))


def stills(plan: Plan) -> Suite:
    """All tasks of pictures."""
    return Suite(tuple(run for task in STILLS for run in _runs(plan.base(task), CORE)), len(CORE))


def clips(plan: Plan) -> Suite:
    """All tasks of clips."""
    return Suite(tuple(run for task in CLIPS for run in _runs(plan.base(task), (*CORE, "exact"))), len(CORE) + 1)


def warm(plan: Plan) -> Suite:
    """What users of pretrained weights do: a pixel model is trained, folded to each arm, fine-tuned for few steps."""
    runs: list[Settings] = []
    for seed in SEEDS:
        pixels = plan.base(arm="pixels", seed=seed, save=True)
        few = replace(pixels, steps=max(1, plan.steps // WARM_SHARE), save=False, start_from=pixels.name)
        runs += [pixels, *_runs(few, WARM, (seed,))]
    return Suite(tuple(runs), 1 + len(WARM))


SUITES: dict[str, Callable[[Plan], Suite]] = {
    suite.__name__: suite for suite in (first, fidelity, speed, formats, tokens, rates, stills, clips, warm)
}
STEPS = {
    "first": 4000,
    "fidelity": 8000,
    "speed": 3000,
    "formats": 6000,
    "tokens": 6000,
    "rates": 3000,
    "stills": 4000,
    "clips": 4000,
    "warm": 8000,
}
