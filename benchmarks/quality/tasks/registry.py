"""All tasks, and where their batches come from.

Batches are drawn on the device, in one go, from (task, split, seed, step): every variant of an experiment gets the same
samples in the same order, and the test set has a split of its own that no seed reaches.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.quality.tasks import fixed_camera
from benchmarks.quality.tasks.cells import Batch, CellTask
from benchmarks.quality.tasks.drawing import Random, generator_for
from benchmarks.quality.tasks.reading import Numbers, OddOne, Reading, ShortWords
from benchmarks.quality.tasks.scenes import Chart, Counting, Texture
from benchmarks.quality.tasks.videos import Flashes, Motion, Order, Ticker
from dct_qwen2vl.common.scripts import UserError

TASKS: dict[str, type[CellTask]] = {
    task.name: task
    for task in (
        *(Reading, Numbers, ShortWords, OddOne, Counting, Texture, Chart, Motion, Order, Flashes, Ticker),
        *fixed_camera.TASKS,
    )
}


def make_task(name: str, knobs: dict[str, Any] | None = None) -> CellTask:
    """A task by name, with some of its fields changed. Raises UserError for a name or field that it has not."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    known = TASKS[name].__dataclass_fields__
    for knob in knobs or {}:
        if knob not in known:
            raise UserError(f"task {name} has no knob {knob!r}: it has {', '.join(known)}")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in (knobs or {}).items()}
    return TASKS[name](**fields)


@dataclass
class Source:
    """Draws the batches of a task on a device."""

    task: CellTask
    device: torch.device | str
    tools: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tools = self.task.prepare(self.device)

    def batch(self, split: str, seed: int, step: int, count: int) -> Batch:
        """split: "train", "test" or "fit" (what variants measure scales and bases on)."""
        generator = generator_for(self.device, self.task.name, asdict(self.task), split, seed, step)
        with torch.no_grad():
            return self.task.draw(self.tools, Random(generator), count)
