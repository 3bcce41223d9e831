"""Seconds from `bash qwen_launch.sh` to the end of the first step, by part.

    python -m benchmarks.speed.start_up --json start_up.json                    the demo's tiny model, on a CPU or a GPU
    python -m benchmarks.speed.start_up --size 2b --processes 1                 Qwen2-VL-2B with random weights

    launcher     the shell, torchrun, until the first process begins
    imports      of the first process, those that no other import waits for
    comparison   of the coefficient form with its stock form, before training
    model        from there to the end of the trial of a full packed sequence: weights, optimizer, trial. Part of rest
                 where the size of packed sequences was given, or the engine has none
    loader       until the first batch is there
    step         the first, without the wait for its batch
    rest         checks, the rehearsal of the save, what else comes before the first step
    cpu          processor time of all processes of the launch, to its end after two steps

Settings of qwen_launch.sh may be set in the environment; its further arguments stand behind --launch. Nothing else
should run beside it. The median of several launches counts, after one that fills the file cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from dct_qwen2vl.common.files import write_json

REPOSITORY = Path(__file__).resolve().parents[2]
TRACE = Path(__file__).parent / "import_trace"
PARTS = ("launcher", "imports", "comparison", "model", "loader", "step", "rest", "total", "cpu")
NAME = "start_up"
MARKS = {
    "engine": "Engine ", "compared": " and its stock form on ", "tried": "A full packed sequence", "step": "step 1/",
}  # fmt: skip
SPANS = {"comparison": ("engine", "compared"), "model": ("compared", "tried")}  # parts by the marks around them
LISTED = 0.3  # seconds of an import that is printed


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """The demo's model in x4 tokens, and a small set: the first stages of the demo."""
    sample, shards, model = folder / "sample", folder / "shards", folder / "model"
    python = [sys.executable]
    run([*python, "-m", "dct_qwen2vl.toy.sample_data", "--output-dir", str(sample), "--num-images", "600"])
    prepare = ["data_preparation.py", "--data-dir", str(sample / "data"), "--output-dir", str(shards)]
    run([*python, *prepare, "--maxcount", "30", "--no-report", "--energon-prepare"])
    source = str(sample / "model" / "tiny-qwen2-vl")
    run([*python, "convert_checkpoint.py", "--model-dir", source, "--output-dir", str(model)])
    return model, shards


def make_2b(folder: Path) -> tuple[Path, Path]:
    """Qwen2-VL-2B in x4 tokens with random weights, and drawn images."""
    from benchmarks.speed.training_run import make_model, make_shards

    shards = make_shards("mix", 200, folder / "data", 0)
    (folder / "models").mkdir()
    return make_model("x4", folder / "models", 0), shards


def run(command: list[str]) -> None:
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def launch(model: Path, shards: Path, processes: int, folder: Path, further: list[str]) -> dict[str, float]:
    """One launch of two steps. Returns the seconds of each part, and of the first process's imports by name.

    Prints what the run says of the size of its packed sequences.
    """
    (folder / "trace").mkdir(parents=True)
    settings = {
        "MODEL_DIR": model, "DATASET_DIR": shards, "OUTPUT_DIR": folder, "EXPERIMENT_NAME": NAME, "MAX_STEPS": 2,
        "NUM_PROC_PER_NODE": processes, "WARMUP_STEPS": 1, "SAVE_INTERVAL": 0, "PYTHON": sys.executable,
        "IMPORT_TRACE": folder / "trace", "PYTHONPATH": os.pathsep.join([str(TRACE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    start, before, seen, said = time.time(), processor_seconds(), {}, []
    process = subprocess.Popen(
        ["bash", "qwen_launch.sh", "--log-interval", "1", *further],
        cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        said.append(line)
        if "packed sequence" in line.lower():
            print(line.rstrip(), flush=True)
        for name, mark in MARKS.items():
            if mark in line:
                seen.setdefault(name, time.time())
    if process.wait():
        raise RuntimeError("".join(said[-30:]))
    steps = (folder / NAME / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = parts(start, seen, read_trace(folder / "trace"), json.loads(steps[0]))
    return {**found, "cpu": processor_seconds() - before}


def processor_seconds() -> float:
    """Of all processes that have ended, which this one or they have started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_trace(folder: Path) -> dict:
    """Of the first process that trains. Its children have its rank, too: among them are those that compile."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return min((each for each in found if each["rank"] == "0"), key=lambda each: each["begun"])


def parts(start: float, seen: dict[str, float], trace: dict, step: dict) -> dict[str, float]:
    """Seconds by part.

    start: of the launch, seconds since 1970.
    seen: when the lines of MARKS came, likewise.
    step: the first line of metrics.jsonl.

    Raises RuntimeError for the trace of a process that began after training.
    """
    if trace["begun"] > seen["engine"]:
        raise RuntimeError("the process that trains has left no trace of its imports; was it killed?")
    imports = [(name, begun, ended) for name, begun, ended in trace["imports"] if ended <= seen["step"]]
    importing = sum(ended - begun for _, begun, ended in imports)
    spans = dict.fromkeys(SPANS, 0.0)
    for part, (first, last) in SPANS.items():
        if first in seen and last in seen:
            within = sum(ended - begun for _, begun, ended in imports if seen[first] <= begun <= seen[last])
            spans[part] = seen[last] - seen[first] - within
    waited = step["seconds"] * step["data_wait_share"]
    known = {
        "launcher": trace["begun"] - start,
        "imports": importing,
        **spans,
        "loader": waited,
        "step": step["seconds"] - waited,
    }
    total = seen["step"] - start
    listed = {f"import {name}": ended - begun for name, begun, ended in imports if ended - begun >= LISTED}
    return {**known, "rest": total - sum(known.values()), "total": total, **listed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "2b"), default="tiny", help="of the model, where none is given")
    parser.add_argument("--model-dir", type=Path, help="a converted model, in place of one that is made")
    parser.add_argument("--data-dir", type=Path, help="prepared shards, likewise")
    parser.add_argument("--processes", type=int, default=2, help="that train")
    parser.add_argument("--repeats", type=int, default=3, help="counted launches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--launch", nargs=argparse.REMAINDER, default=[], help="further arguments of qwen_launch.sh")
    arguments = parser.parse_args(argv)
    if bool(arguments.model_dir) != bool(arguments.data_dir):
        parser.error("--model-dir and --data-dir belong together")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = (arguments.model_dir, arguments.data_dir)
        model, shards = given if all(given) else {"tiny": make_tiny, "2b": make_2b}[arguments.size](folder)
        once = partial(launch, model, shards, arguments.processes, further=arguments.launch)
        once(folder / "warm")
        runs = [once(folder / f"run{number}") for number in range(arguments.repeats)]
    print(f"seconds until the first step is done, {arguments.processes} process(es), median of {len(runs)}")
    for part in (*PARTS, *(name for name in runs[0] if name.startswith("import "))):
        print(f"{part:<44}{median(each.get(part, 0.0) for each in runs):6.2f}")
    if arguments.json:
        write_json(arguments.json, {"processes": arguments.processes, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
