"""What a run is made of. Imports nothing heavy: commands answer --help at once."""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.scripts import UserError

VISION_HEAD = 80  # width of an attention head in the vision tower, as in Qwen2-VL
LANGUAGE_HEAD = 64  # and in the language model
# Standard deviation of the vision tower's matrices as drawn. "language": 1 / sqrt(width of the language model), as
# transformers draws all matrices of Qwen2-VL; the wider the tower, the larger its values. "inputs": 1 / sqrt(inputs of
# the matrix), at any width the same size of values.
TOWER_SPREADS = ("language", "inputs")
FAILURES = (ValueError, OSError, RuntimeError, FloatingPointError)  # of a run, after which others may go on


def first_line(error: Exception) -> str:
    """Of what an error says, or else its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@dataclass(frozen=True)
class ModelSize:
    """Widths are multiples of the heads'. Qwen2-VL's vision width is 1280, for patches of 14 px."""

    vision_width: int = 320
    vision_layers: int = 4
    language_width: int = 256
    language_layers: int = 3

    def __post_init__(self) -> None:
        for name, head in (("vision_width", VISION_HEAD), ("language_width", LANGUAGE_HEAD)):
            if getattr(self, name) % head:
                raise UserError(f"ModelSize.{name} must be a multiple of {head}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result, beside the device.

    knobs: fields of the task that differ from its defaults. batch: samples of a step. patch: side of the pixel model's
    patches; the blocks of all variants go with it, and the vision width should: 320 is to the 294 floats that `x4` then
    has of a still what Qwen2-VL's 1280 is to 1176, so that no patch embedding must lose any. probe, test, fit: images
    tested during training, after it, and on which variants measure scales and bases. generated: of `test`, also
    answered by real generation. start_from: name of a run of variant `pixels` or `exact` in the same folder that saved
    its model (`save`): a model of pixels either way, whose patch embedding is folded or kept. unseen: how, without a
    start, weights of floats begin that a pixel model's patch would not show of the block: "zero", as folding leaves
    them, or "random", as the others. tower_spread: of the vision tower's drawn matrices, see TOWER_SPREADS.
    """

    task: str = "reading"
    variant: str = "x4"
    seed: int = 0
    steps: int = 2000
    batch: int = 256
    knobs: dict[str, Any] = field(default_factory=dict)
    patch: int = 7
    size: ModelSize = field(default_factory=ModelSize)
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    probe: int = 256
    test: int = 1024
    fit: int = 512
    generated: int = 64
    start_from: str | None = None
    unseen: str = "zero"
    save: bool = False
    tower_spread: str = "language"

    @property
    def name(self) -> str:
        """Of the run's files."""
        values = asdict(self)
        values["arm"] = values.pop("variant")  # the field's first name: finished results keep their names
        if self.tower_spread == TOWER_SPREADS[0]:
            del values["tower_spread"]  # a later field
        digest = blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{self.task}_{self.variant}_seed{self.seed}_{digest}"

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up over a twentieth of all steps, then half a cosine to a hundredth."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def parser_of(docstring: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with the first paragraph of a module's docstring and ends with the others.

    docstring: `__doc__` of the module. Its line breaks stay.
    """
    summary, _, rest = docstring.partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_run_flags(parser: argparse.ArgumentParser, experiment: str) -> None:
    """Adds the flags that train.py and run_experiments.py share.

    parser: Gets the flags.
    experiment: What a result file in a folder is named after.
    """
    add = parser.add_argument
    text = f"where results are written: FILE.jsonl, or FOLDER for FOLDER/{experiment}.jsonl"
    add("--output", type=Path, required=True, metavar="PATH", help=text)
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--commit", default="", help="noted in the results")
    add("--graphs", choices=("on", "off"), default="on", help="CUDA graphs (default: %(default)s)")
