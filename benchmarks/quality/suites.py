"""Which runs make up which experiment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from benchmarks.quality.settings import VISION_HEAD, ModelSize, Settings

SEEDS = (0, 1, 2)
CORE = ("quarter", "x4", "exact")
CONTROLS = ("x4-corner", "quarter-pca", "x4-floor", "x4-pca", "x4-raw", "pixels")
CONDITIONING = (
    *("quarter", "quarter-unit", "quarter-pca", "x4-raw", "x4-pca", "x4-corner", "x4", "x4-flat", "x4-floor"),
    *("exact", "pixels", "pixels-unit", "pixels-pca"),
)
FORMATS = (
    *("x4", "x4-corner", "x4-half", "x4-variance", "x4-zigzag", "x4-weighted"),
    *("x4-loud", "x4-floor", "x4-444"),  # x4-all is x4 in stills
)
BUDGETS = ("quarter", "x4", "exact", "sixteenth", "x16", "pixels")
# Steps of the pixel model of each task, after which little is left to gain for images (docs/experiment_log.md); videos
# were not tried.
STILLS = {"texture": 1000, "words": 2000, "numbers": 4000, "counting": 1500, "odd-one": 4000, "chart": 1000}
VIDEOS = {"motion": 1500, "order": 2000, "flashes": 2000, "ticker": 4000}
SKIPPING_TASKS = ("still-board", "still-flashes", "still-order", "still-motion", "page-reading")
SKIPPING = ("x4", "x4-skip", "x4-slow", "x4-small", "x4-evs")
BOTH_READINGS = ("x4-skip-half", "x4-skip-most", "x4-skip-then-all")
# Of the tasks that lose points by skipping: what else was tried.
TRIED = {
    "still-board": ("x4-skip-ring", "x4-skip-refresh", "x4-skip-age", "x4-third"),
    "still-flashes": ("x4-skip-ring", "x4-skip-refresh", "x4-skip-age"),
}
LONG = ("x4", "x4-skip", "x4-skip-age")
# A sample has five times the tokens of one of the other suites.
SKIPPING_SETTINGS = {"batch": 128, "size": ModelSize(vision_layers=3), "probe": 64, "generated": 4}
SKIPPING_START = 3  # times the steps of fine-tuning that the model takes which it starts from
LONGER = 3  # times the steps of `skipping`, in `skipping_long`
# Pages of which a third, and a quarter, is printed; and images without margins.
MIXED_IMAGES = (("page-reading", {}), ("page-reading", {"whole": 224}), ("reading", {}))
MIXED_VARIANTS = ("quarter", "x4", "x4-mixed", "exact-skip")
MIXED_START = 3 / 2  # times the steps of fine-tuning that the pixel model takes
TUNING_RATE = 2e-3  # of fine-tuning; docs/experiment_log.md has what `rates` said
HIGHEST_RATE = 4e-3  # at which reading still gains; other tasks break
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LOW_RATES = (1e-4, 5e-4)
SCRATCH_RATES = (5e-4, 2e-3, 4e-3)  # beside the 1e-3 of `speed`
SLOW = ("quarter", "quarter-unit", "x4-raw", "x4")  # what learns slowly in `speed`, and x4
GAINS = ("quarter", "x4", "x4-loud", "x4-louder")
# In images of 224 px, in proportion to those of 112 px.
LARGER = {"size": 224, "heights": [4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32]}
LARGE = {"heights": [9, 10, 11, 12]}  # digits that are whole at half the sides, too
REAL_WIDTH = 1280
REAL_START = 2  # times the steps of fine-tuning that the pixel model takes
REAL_VARIANTS = ("quarter", "x4", "x4-588")
COST = {"test": 64, "probe": 64, "generated": 0}
COST_STEPS = 60
TINY = {"size": ModelSize(160, 2, 128, 2), "batch": 32, "probe": 32, "test": 64, "fit": 128, "generated": 4}


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


def _runs(base: Settings, variants: tuple[str, ...], seeds: tuple[int, ...] = SEEDS) -> tuple[Settings, ...]:
    """Those of variant `exact` keep their model, from which others start."""
    return tuple(
        replace(base, variant=variant, seed=seed, save=variant == "exact") for seed in seeds for variant in variants
    )


def _warm(
    base: Settings,
    variants: tuple[str, ...],
    seeds: tuple[int, ...] = SEEDS,
    start_seeds: tuple[int, ...] | None = None,
    **changes: Any,
) -> tuple[Settings, ...]:
    """Models of pixels, trained from scratch as variant `exact`; then each variant, started from them in turn and
    trained at TUNING_RATE, and with `changes`, the seeds of a variant one after the other."""
    starts = _runs(base, ("exact",), start_seeds or seeds)
    changes = {"learning_rate": TUNING_RATE, "save": False, **changes}
    tuned = (
        replace(start, variant=variant, seed=seed, start_from=start.name, **changes)
        for variant in variants
        for seed, start in zip(seeds, cycle(starts))
    )
    return (*starts, *tuned)


def first(plan: Plan) -> tuple[Settings, ...]:
    """From scratch: does x4 read better than an image of half the sides, at equal tokens and steps? With controls."""
    return _runs(plan.base(), (*CORE, *CONTROLS))


def warm(plan: Plan) -> tuple[Settings, ...]:
    """What users of pretrained weights do: a pixel model is trained, folded to each variant, and fine-tuned."""
    return _warm(plan.base(), (*CORE, "x4-corner"))


def _real(plan: Plan) -> Settings:
    """A pixel model with Qwen2-VL's patches and vision width, in images twice as wide."""
    shared = {} if plan.tiny else {"size": replace(ModelSize(), vision_width=REAL_WIDTH), "batch": plan.batch or 128}
    start = plan.base(variant="exact", steps=REAL_START * plan.steps, patch=14, knobs=LARGER)
    return replace(start, tower_spread="inputs", save=True, **shared)


def wide(plan: Plan) -> tuple[Settings, ...]:
    """Does a tower of Qwen2-VL's width learn? From scratch, widened from a narrower one, and from scratch as
    transformers draws it."""
    start = _real(plan)
    quarter = max(VISION_HEAD, start.size.vision_width // 4)
    narrow = replace(start, size=replace(start.size, vision_width=quarter))
    widened = replace(start, start_from=narrow.name, steps=plan.steps)
    return (start, narrow, widened, replace(start, tower_spread="language", save=False))


def real(plan: Plan) -> tuple[Settings, ...]:
    """As warm, with Qwen2-VL's patches, the presets themselves and its vision width, in images twice as wide. All
    variants and seeds start from one pixel model, seed by seed; `exact`, which takes longest, comes last."""
    start = _real(plan)
    tuned = replace(start, learning_rate=TUNING_RATE, start_from=start.name, steps=plan.steps)
    runs = (*_runs(tuned, REAL_VARIANTS), *_runs(tuned, ("exact",)))
    return (start, *(replace(run, save=False) for run in runs))


def fidelity(plan: Plan) -> tuple[Settings, ...]:
    """What is lost for good? Fine-tuned for twice as many steps: what doubling adds is what training still lacked."""
    return _warm(plan.base(), CORE, learning_rate=HIGHEST_RATE, steps=2 * plan.steps)


def speed(plan: Plan) -> tuple[Settings, ...]:
    """How fast is it learned from scratch? Digits that are whole at half the sides, too: conditioning differs."""
    return _runs(plan.base(knobs=LARGE), CONDITIONING)


def speed_rates(plan: Plan) -> tuple[Settings, ...]:
    """Is the rate of `speed` fair to what learns slowly there? At three more, one seed."""
    base = plan.base(knobs=LARGE)
    return tuple(run for rate in SCRATCH_RATES for run in _runs(replace(base, learning_rate=rate), SLOW, SEEDS[:1]))


def formats(plan: Plan) -> tuple[Settings, ...]:
    """Which coefficients, how many, with how much colour, how loud? Fine-tuned."""
    return _warm(plan.base(), FORMATS)


def tokens(plan: Plan) -> tuple[Settings, ...]:
    """Accuracy against the number of visual tokens, fine-tuned."""
    return _warm(plan.base(), BUDGETS)


def _at_rates(
    plan: Plan, variants: tuple[str, ...], rates: tuple[float, ...], seeds: tuple[int, ...]
) -> tuple[Settings, ...]:
    """Each variant fine-tuned at each rate."""
    return tuple(run for rate in rates for run in _warm(plan.base(), variants, seeds, learning_rate=rate))


def rates(plan: Plan) -> tuple[Settings, ...]:
    """Is the learning rate of fine-tuning fair to all? Each of the core variants at four rates, one seed."""
    return _at_rates(plan, CORE, RATES, SEEDS[:1])


def _by_task(plan: Plan, tasks: dict[str, int], variants: tuple[str, ...]) -> tuple[Settings, ...]:
    """Each task: one pixel model, from which each variant is fine-tuned with every seed."""
    runs: list[Settings] = []
    for task, steps in tasks.items():
        start = plan.base(task, steps=min(steps, 2 * plan.steps))
        runs += _warm(start, variants, start_seeds=SEEDS[:1], steps=plan.steps)
    return tuple(runs)


def gains(plan: Plan) -> tuple[Settings, ...]:
    """Pretrained weights are fine-tuned at low rates: are louder new coefficients learned sooner there?"""
    return _at_rates(plan, GAINS, LOW_RATES, SEEDS)


def stills(plan: Plan) -> tuple[Settings, ...]:
    """All tasks of images but reading, each fine-tuned three times from one pixel model."""
    return _by_task(plan, STILLS, CORE)


def videos(plan: Plan) -> tuple[Settings, ...]:
    """All tasks of videos, each fine-tuned three times from one pixel model. x4 spends floats on stills: should it?"""
    return _by_task(plan, VIDEOS, (*CORE, "x4-variance"))


def cost(plan: Plan) -> tuple[Settings, ...]:
    """Time and memory of a step, each variant with the device to itself: for `--jobs 1`."""
    from benchmarks.quality.variants import VARIANTS

    short = replace(plan, steps=min(COST_STEPS, plan.steps))
    return tuple(replace(short.base(variant=variant), **COST) for variant in VARIANTS)


def _skipping_base(plan: Plan, task: str, **changes: Any) -> Settings:
    shared = {} if plan.tiny else {**SKIPPING_SETTINGS, **({"batch": plan.batch} if plan.batch else {})}
    return replace(plan.base(task), **{**shared, **changes})


def _skipping_variants(task: str) -> tuple[str, ...]:
    """An image has no frame rate."""
    return tuple(name for name in SKIPPING if name != "x4-slow" or task != "page-reading")


def _skipping_tuned(plan: Plan, task: str, steps: int, variants: tuple[str, ...]) -> tuple[Settings, ...]:
    """A model of all cells, and the variants fine-tuned from it."""
    start = _skipping_base(plan, task, variant="x4", steps=SKIPPING_START * plan.steps, save=True)
    return start, *_runs(replace(start, steps=steps, save=False, start_from=start.name), variants)


def skipping(plan: Plan) -> tuple[Settings, ...]:
    """Does skipping hold? Against all cells and the usual ways to have as few tokens, fine-tuned from one model of all
    cells for each task. And does a model that also keeps all cells of some samples learn both readings?"""
    variants = {task: (*_skipping_variants(task), *BOTH_READINGS, *TRIED.get(task, ())) for task in SKIPPING_TASKS}
    return tuple(run for task, names in variants.items() for run in _skipping_tuned(plan, task, plan.steps, names))


def skipping_long(plan: Plan) -> tuple[Settings, ...]:
    """Where skipping loses points: is it for lack of steps? From the models of `skipping`, fine-tuned for longer."""
    return tuple(run for task in TRIED for run in _skipping_tuned(plan, task, LONGER * plan.steps, LONG))


def skipping_scratch(plan: Plan) -> tuple[Settings, ...]:
    """As skipping, each model from scratch."""
    return tuple(run for task in SKIPPING_TASKS for run in _runs(_skipping_base(plan, task), _skipping_variants(task)))


def mixed(plan: Plan) -> tuple[Settings, ...]:
    """Do cells of several sizes read more than as many of one size? One seed, fine-tuned from a pixel model for each
    kind of image. And all cells of the pixel model, but those that skipping leaves out?"""
    runs: list[Settings] = []
    for task, knobs in MIXED_IMAGES:
        start = _skipping_base(plan, task, steps=max(1, int(MIXED_START * plan.steps)), knobs=knobs)
        runs += _warm(start, MIXED_VARIANTS, SEEDS[:1], steps=plan.steps)
    return tuple(runs)


SUITES: dict[str, Callable[[Plan], tuple[Settings, ...]]] = {
    suite.__name__: suite
    for suite in (
        *(warm, wide, real, first, fidelity, speed, speed_rates, formats, tokens, rates, gains, stills, videos, cost),
        *(skipping, skipping_long, skipping_scratch, mixed),
    )
}
STEPS = dict.fromkeys(SUITES, 3000)
STEPS |= {
    "speed": 1500,
    "speed_rates": 1500,
    "stills": 2000,
    "videos": 2000,
    "wide": 1500,
    "real": 1500,
    "skipping": 600,
    "skipping_long": 600,
    "skipping_scratch": 1500,
    "mixed": 1200,
}
