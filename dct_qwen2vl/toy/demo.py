"""The whole pipeline on drawn sample data, on a CPU: every stage by the README's command, then the images.

    python -m dct_qwen2vl.toy.demo --output-dir demo          (`make demo` sets up first)

Leaves summary.json, loss.png, samples.png, accuracy.txt, the shards, both checkpoints and a log of every stage.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main

MARKER = ".made_by_demo"
REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENT = "demo"
SAMPLE_DATA = "dct_qwen2vl.toy.sample_data"
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
    "make test": "all tests, 10 to 15 minutes on two cores",
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
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

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
    answer = ["evaluate_qwen2vl.py", "--model-dir", str(run / "hf"), "--data-dir", shards]
    return [
        Stage("sample_data", [*python, "-m", SAMPLE_DATA, "--output-dir", str(folder / "sample"), "--seed", str(seed)]),
        Stage("data_preparation", [*python, *prepare, "--maxcount", "200", "--seed", str(seed), "--energon-prepare"]),
        Stage("convert_checkpoint", [*python, "convert_checkpoint.py", "--model-dir", source, "--output-dir", model]),
        Stage("training", ["bash", "qwen_launch.sh", *TRAINING_ARGUMENTS], launch),
        Stage("evaluation", [*python, *answer, "--output-dir", str(folder / "evaluation")]),
    ]


def run_stage(stage: Stage, log: Path) -> float:
    """Runs a stage. Returns the seconds it took. Raises StageError.

    log: gets its output. The screen gets it without noise.
    """
    print(f"\n=== {stage.name}\n$ {stage.shown()}", flush=True)
    start, screen = time.perf_counter(), Screen()
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
            screen.show(line)
    screen.end_bar()
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


def summarise(folder: Path, seconds: dict[str, float], images: dict[str, Path], tokens: dict[str, float]) -> dict:
    """What summary.json holds; paths are relative to the folder."""
    run = folder / "experiments" / EXPERIMENT
    stats = json.loads((folder / "shards" / "stats.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "evaluation" / "accuracy.json").read_text(encoding="utf-8"))
    files = {
        **images,
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
        "tokens_per_image": tokens,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "files": {name: str(path.relative_to(folder)) for name, path in files.items()},
    }


def draw_images(folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Loss curve, sheet of samples, table of accuracies; and the tokens of an image for pixels and DCT."""
    # PyTorch imports it, and NeMo requires it.
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
    from dct_qwen2vl.toy.demo_figures import draw_loss, draw_samples, tokens_per_image, write_table

    run = folder / "experiments" / EXPERIMENT
    images = {
        "loss_curve": draw_loss(run / "metrics.jsonl", folder / "loss.png"),
        "sample_sheet": draw_samples(run / "hf_dct", folder / "shards", folder / "samples.png"),
        "accuracy_table": write_table(folder / "evaluation" / "accuracy.json", folder / "accuracy.txt"),
    }
    return images, tokens_per_image(folder / "sample" / "model" / "tiny-qwen2-vl", run / "hf_dct", folder / "shards")


def last_words(folder: Path, summary: dict) -> list[str]:
    """What the demo has shown, where to look, what to run next."""
    accuracy, blind = summary["accuracy"]["overall"], summary["blind_accuracy"]["overall"]
    pixels, dct = (summary["tokens_per_image"][name] for name in ("pixels", "dct"))
    seconds = sum(summary["seconds"].values())
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
        f"It took {seconds:.0f} s.",
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
    """All stages, then the images and the summary. Raises StageError, OSError."""
    folder, seconds = output_dir.resolve(), {}
    fresh_folder(folder)
    named = folder.relative_to(REPOSITORY) if folder.is_relative_to(REPOSITORY) else folder
    for stage in stages(named, seed):
        seconds[stage.name] = run_stage(stage, folder / "logs" / f"{stage.name}.log")
    print("\n=== images", flush=True)
    start = time.perf_counter()
    images, tokens = draw_images(folder)
    seconds["images"] = time.perf_counter() - start
    summary = summarise(folder, seconds, images, tokens)
    write_json(folder / "summary.json", summary)
    print("Drew samples.png and loss.png")
    print("\n".join(last_words(output_dir, summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
