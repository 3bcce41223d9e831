"""The whole pipeline on drawn sample data, on a CPU: every stage by the README's command, and images of what it did.

    python -m dct_qwen2vl.toy.demo --output-dir demo          (`make demo` sets up first)

Leaves summary.json, loss.png, samples.png, accuracy.txt, the shards, both checkpoints and a log of every stage.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from dct_qwen2vl.common.files import read_json, write_json
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.evaluation.scoring import table

MARKER = ".made_by_demo"
REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENT = "demo"
TOKENS = "tokens_per_image.json"
SAMPLE_DATA = "dct_qwen2vl.toy.sample_data"
FIGURES = "dct_qwen2vl.toy.demo_figures"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the tiny model's operations are too small for two
# What the tiny model needs to learn to see within minutes on two cores (see README, Training output).
TRAINING = {
    "NUM_PROC_PER_NODE": "2", "MBS": "16", "GBS": "32", "MAX_STEPS": "600", "LR": "1e-3", "MIN_LR": "1e-4",
    "WARMUP_STEPS": "40", "SEQ_LENGTH": "256", "NUM_WORKERS": "1", "VAL_INTERVAL": "200", "SAVE_INTERVAL": "200",
}  # fmt: skip
TRAINING_ARGUMENTS = ["--weight-decay", "0.01", "--adam-beta2", "0.99", "--log-interval", "50"]
TO_SEE = {
    "samples.png": "images and videos as the model receives them, and the text that it learns",
    "loss.png": "training and validation loss",
    "evaluation/predictions.jsonl": "every question with its answers, seeing and blind",
    "shards/report.html": "what the prepared set holds: sources, sizes, tokens, samples",
}
TO_RUN = {
    "make test": "all tests, 12 to 32 minutes on two cores",
    "README.md, Setup Instructions": "the same stages for Qwen2-VL-2B and Cambrian-737k",
}
WIDTH = 118  # characters of a printed command
HELD = "\0"  # a space at which no line ends
CLEAR_REST = "\x1b[K"  # of the line, on a terminal
BAR = re.compile(r"\[(\d+:)?\d+:\d\d[<,].*\]\s*$")  # tqdm's: [00:01<00:02, 5.0it/s]
# What NeMo, Lightning, Energon and PyTorch say at each start of a training. Each beginning is written out: errors, also
# those that torchrun marks with [rank0]:, stay on the screen. The log of a stage has what it prints.
NOISE = re.compile(
    "|".join(
        [
            r"\[NeMo [IW] ",
            r"Cannot import zarr, ",
            r"WARNING: transformer_engine not installed",
            r"WARNING:root:The package `decord` was not installed",
            r"No CUDA runtime is found",
            r"(GPU|TPU|HPU) available: ",
            r"\[rank: \d+\] Seed set to ",
            r"Initializing distributed: GLOBAL_RANK: ",
            r"distributed_backend=",
            r"All distributed processes registered",
            r"-+$",
            r"`Trainer\.fit` stopped: `max_steps=",
            r"rank=\d+, worker=\d+: shard_range=",  # Energon, for each loader process
        ]
    )
)


class StageError(UserError):
    """A stage failed. The message names its log."""


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline.

    environment: variables on top of the caller's.
    beside: a stage that needs nothing of this one. It runs at the same time and is shown after this one.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    beside: "Stage | None" = None

    def shown(self) -> str:
        """The command as one would type it, on lines of WIDTH characters. qwen_launch.sh finds Python itself."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if name != "PYTHON"]
        command = ["python" if part == sys.executable else shlex.quote(part) for part in self.command]
        text = " ".join(part.replace(" ", HELD) for part in [*settings, *command])
        text = re.sub(r"( --[\w-]+) (?!-)", rf"\1{HELD}", text)  # a value stays on the line of its flag
        lines = textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        lines = [line.replace(HELD, " ") for line in lines]
        return " \\\n".join(lines)


class Screen:
    """Shows what a stage says, without the noise of its libraries, and of each progress bar the last state alone.

    A terminal also shows the states in between, one over the other.
    """

    def __init__(self) -> None:
        self.bar = ""
        self.is_live = sys.stdout.isatty()

    def show(self, line: str) -> None:
        if BAR.search(line):
            if line.partition(":")[0] != self.bar.partition(":")[0]:
                self.end_bar()
            self.bar = line.rstrip()
            if self.is_live:
                print(f"\r{self.bar}{CLEAR_REST}", end="", flush=True)
        elif line.isspace():
            if line != "\n":  # spaces over a bar, which its stage takes away
                self._erase()
        elif not NOISE.match(line):
            self.end_bar()
            print(line, end="", flush=True)

    def end_bar(self) -> None:
        if self.bar:
            bar = self.bar
            self._erase()
            print(bar, flush=True)

    def _erase(self) -> None:
        self.bar = ""
        if self.is_live:
            print(f"\r{CLEAR_REST}", end="", flush=True)


def stages(folder: Path, seed: int) -> list[Stage]:
    """Raw data to answers, in order.

    folder: absolute, or relative to the repository, where all stages run.
    """
    shards, model = str(folder / "shards"), str(folder / "tiny-qwen2-vl-x4")
    source = str(folder / "sample" / "model" / "tiny-qwen2-vl")
    run = folder / "experiments" / EXPERIMENT
    python = [sys.executable]
    launch = {
        **TRAINING,
        "SEED": str(seed),
        "EXPERIMENT_NAME": EXPERIMENT,
        "MODEL_DIR": model,
        "DATASET_DIR": shards,
        "OUTPUT_DIR": str(folder / "experiments"),
        "PYTHON": sys.executable,
    }
    prepare = ["data_preparation.py", "--data-dir", str(folder / "sample" / "data"), "--output-dir", shards]
    prepare += ["--maxcount", "200", "--seed", str(seed), "--energon-prepare"]
    convert = ["convert_checkpoint.py", "--model-dir", source, "--output-dir", model]
    answer = ["evaluate_qwen2vl.py", "--model-dir", str(run / "hf"), "--data-dir", shards]
    answer += ["--output-dir", str(folder / "evaluation")]
    conversion = Stage("convert_checkpoint", [*python, *convert])
    drawing = Stage("images", [*python, "-m", FIGURES, str(folder)])
    return [
        Stage("sample_data", [*python, "-m", SAMPLE_DATA, "--output-dir", str(folder / "sample"), "--seed", str(seed)]),
        Stage("data_preparation", [*python, *prepare], beside=conversion),
        Stage("training", ["bash", "qwen_launch.sh", *TRAINING_ARGUMENTS], launch),
        Stage("evaluation", [*python, *answer], ONE_THREAD, beside=drawing),
    ]


def run_stages(stages: list[Stage], logs: Path) -> dict[str, float]:
    """Runs all stages. Returns the seconds that each took, by name. Raises StageError.

    logs: gets a log of each. The screen gets them in order.
    """
    seconds = {}
    with ThreadPoolExecutor(1) as thread:
        for stage in stages:
            other, lines = stage.beside, []
            if other:
                waiting = thread.submit(execute, other, log_of(other, logs), lines.append)
            seconds[stage.name] = run_stage(stage, log_of(stage, logs))
            if other:
                wait([waiting])
                show(other, lines)
                seconds[other.name] = waiting.result()
    return seconds


def log_of(stage: Stage, logs: Path) -> Path:
    return logs / f"{stage.name}.log"


def run_stage(stage: Stage, log: Path) -> float:
    """Runs a stage. Returns the seconds it took. Raises StageError.

    log: gets its output. The screen gets it without noise.
    """
    announce(stage)
    screen = Screen()
    try:
        return execute(stage, log, screen.show)
    finally:
        screen.end_bar()


def announce(stage: Stage) -> None:
    print(f"\n=== {stage.name}\n$ {stage.shown()}", flush=True)


def show(stage: Stage, lines: list[str]) -> None:
    """What a stage said while another one had the screen."""
    announce(stage)
    screen = Screen()
    for line in lines:
        screen.show(line)
    screen.end_bar()


def execute(stage: Stage, log: Path, say: Callable[[str], None]) -> float:
    """As `run_stage`. `say` gets each line of output."""
    start = time.perf_counter()
    # Libraries warn of each other at import. What the pipeline has to say it prints.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **stage.environment}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            stage.command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for line in process.stdout:
            file.write(line)
            say(line)
    if process.wait():
        reason = find_reason(log.read_text(encoding="utf-8").splitlines())
        said = f": {reason}" if reason else ""
        raise StageError(f"the stage {stage.name} failed with exit code {process.returncode}{said}; its log: {log}")
    return time.perf_counter() - start


def find_reason(lines: list[str]) -> str:
    """Why a stage failed: its script's last message, or the first exception of a traceback. "" if there is neither."""
    messages = [line for line in lines if re.match(r"\w+\.(py|sh): ", line)]
    exceptions = [re.match(r"(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception): .+)", line) for line in lines]
    errors = [found[1] for found in exceptions if found]
    return (errors[:1] or messages[-1:] or [""])[0]


def fresh_folder(folder: Path) -> None:
    """An empty folder. One that an earlier demo made is replaced. Raises StageError for any other content."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise StageError(f"{folder} holds something that no demo made: choose another --output-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    (folder / "logs").mkdir()


def losses(run_dir: Path) -> dict[str, float]:
    """First, last and validation loss of a run."""
    from dct_qwen2vl.training.metrics_file import read_metrics

    lines = read_metrics(run_dir / "metrics.jsonl")
    training = [line["loss"] for line in lines if "loss" in line]
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    return {"first": training[0], "last": training[-1], "validation": validation[-1]}


def summarise(folder: Path, seconds: dict[str, float], total: float) -> dict:
    """What summary.json holds; paths are relative to the folder.

    seconds: of each stage. Some ran at the same time.
    total: seconds of all together.
    """
    run = folder / "experiments" / EXPERIMENT
    stats = read_json(folder / "shards" / "stats.json")
    results = read_json(folder / "evaluation" / "accuracy.json")
    files = {
        "loss_curve": folder / "loss.png",
        "sample_sheet": folder / "samples.png",
        "accuracy_table": folder / "accuracy.txt",
        "shards": folder / "shards",
        "model": run / "hf",
        "metrics": run / "metrics.jsonl",
        "tensorboard": run / "tensorboard",
        "checkpoints": run / "checkpoints",
        "predictions": folder / "evaluation" / "predictions.jsonl",
        "logs": folder / "logs",
    }
    return {
        "samples": {name: stats[name] for name in ("read", "written", "skipped")},
        "accuracy": results["accuracy"],
        "blind_accuracy": results["blind_accuracy"],
        "loss": losses(run),
        "tokens_per_image": read_json(folder / TOKENS),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(total, 1),
        "files": {name: str(path.relative_to(folder)) for name, path in files.items()},
    }


def last_words(folder: Path, summary: dict) -> list[str]:
    """What the demo has shown, where to look, what to run next."""
    accuracy, blind = summary["accuracy"]["overall"], summary["blind_accuracy"]["overall"]
    pixels, dct = (summary["tokens_per_image"][name] for name in ("pixels", "dct"))
    to_see = {str(folder / name): words for name, words in TO_SEE.items()}
    width = max(map(len, [*to_see, *TO_RUN]))
    return [
        "",
        f"Shown: a tiny model, fine-tuned on DCT tokens, answers {accuracy:.1%} of the test questions right;",
        f"blind, with every image made grey, {blind:.1%}. An image takes {dct:.1f} tokens; pixels take {pixels:.1f}.",
        "",
        "Look at:",
        *(f"  {path:{width}}  {words}" for path, words in to_see.items()),
        f"All numbers are in {folder / 'summary.json'}, what each stage printed is in {folder / 'logs'}.",
        f"It took {summary['total_seconds']:.0f} s.",
        "",
        "Next:",
        *(f"  {what:{width}}  {words}" for what, words in TO_RUN.items()),
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="replaced if an earlier demo made it")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and shuffling")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("demo.py", lambda: run_demo(arguments.output_dir, arguments.seed), arguments.debug)


def run_demo(output_dir: Path, seed: int) -> int:
    """All stages, then the summary. Raises StageError, OSError."""
    folder, start = output_dir.resolve(), time.perf_counter()
    fresh_folder(folder)
    named = folder.relative_to(REPOSITORY) if folder.is_relative_to(REPOSITORY) else folder
    seconds = run_stages(stages(named, seed), folder / "logs")
    results = read_json(folder / "evaluation" / "accuracy.json")
    (folder / "accuracy.txt").write_text(table(results) + "\n", encoding="utf-8")
    summary = summarise(folder, seconds, time.perf_counter() - start)
    write_json(folder / "summary.json", summary)
    print("\n".join(last_words(output_dir, summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
