"""The whole pipeline on drawn sample data, on a CPU: every stage by the README's command, then the pictures.

    python -m dct_qwen2vl.toy.demo --output-dir demo          (`make demo` sets up first)

Leaves summary.json, loss.png, samples.png, accuracy.txt, the shards, both checkpoints and a log of every stage.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

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


class StageError(RuntimeError):
    """A stage failed. The message names its log."""


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline. environment: variables on top of the caller's."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """The command as one would type it."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        command = ["python" if part == sys.executable else part for part in self.command]
        return " ".join([*settings, *command])


def stages(folder: Path, seed: int) -> list[Stage]:
    """Raw data to answers, in order."""
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
    """Runs it with its output on the screen and in `log`; returns seconds. Raises StageError."""
    print(f"\n=== {stage.name}\n$ {stage.shown()}", flush=True)
    start = time.perf_counter()
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
            if is_news(line):
                print(line, end="", flush=True)
    if process.wait():
        raise StageError(f"the stage {stage.name} failed with exit code {process.returncode}: see {log}")
    return time.perf_counter() - start


def is_news(line: str) -> bool:
    """NeMo, Lightning and progress bars talk a lot; the screen gets the rest, the log file all of it."""
    noise = ("[NeMo", "rank=", "WARNING:", "GPU available", "TPU available", "HPU available", "No CUDA runtime", "---")
    unfinished_bar = "%|" in line and "100%|" not in line
    return bool(line.strip()) and not unfinished_bar and not line.startswith((*noise, "[rank"))


def fresh_folder(folder: Path) -> None:
    """An empty folder; one that an earlier demo made is replaced. Raises StageError for any other content."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise StageError(f"{folder} holds something that no demo made: choose another --output-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    (folder / "logs").mkdir()


def losses(run_dir: Path) -> dict[str, float]:
    """First, last and validation loss of a run."""
    from dct_qwen2vl.training.log import read_metrics

    lines = read_metrics(run_dir / "metrics.jsonl")
    training = [line["loss"] for line in lines if "loss" in line]
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    return {"first": training[0], "last": training[-1], "validation": validation[-1]}


def summarise(folder: Path, seconds: dict[str, float], pictures: dict[str, Path], tokens: dict[str, float]) -> dict:
    """What summary.json holds; paths are relative to the folder."""
    run = folder / "experiments" / EXPERIMENT
    stats = json.loads((folder / "shards" / "stats.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "evaluation" / "accuracy.json").read_text(encoding="utf-8"))
    files = {
        **pictures,
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


def draw_pictures(folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Loss curve, sheet of samples, table of accuracies; and the tokens of an image for pixels and DCT."""
    from dct_qwen2vl.toy.demo_figures import draw_loss, draw_samples, tokens_per_image, write_table

    run = folder / "experiments" / EXPERIMENT
    pictures = {
        "loss_curve": draw_loss(run / "metrics.jsonl", folder / "loss.png"),
        "sample_sheet": draw_samples(run / "hf", folder / "shards", folder / "samples.png"),
        "accuracy_table": write_table(folder / "evaluation" / "accuracy.json", folder / "accuracy.txt"),
    }
    return pictures, tokens_per_image(folder / "sample" / "model" / "tiny-qwen2-vl", run / "hf", folder / "shards")


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
    folder = arguments.output_dir.resolve()
    seconds = {}
    try:
        fresh_folder(folder)
        for stage in stages(folder, arguments.seed):
            seconds[stage.name] = run_stage(stage, folder / "logs" / f"{stage.name}.log")
    except StageError as error:
        if arguments.debug:
            raise
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    pictures, tokens = draw_pictures(folder)
    seconds["pictures"] = time.perf_counter() - start
    summary = summarise(folder, seconds, pictures, tokens)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{(folder / 'accuracy.txt').read_text(encoding='utf-8')}")
    print(f"{sum(seconds.values()):.0f} s in all. Look at {folder / 'samples.png'} and {folder / 'loss.png'};")
    print(f"all figures are in {folder / 'summary.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
