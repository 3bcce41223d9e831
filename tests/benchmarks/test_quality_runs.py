"""Runs of a suite, one at a time and several at once: the same results, each after the one it starts from, failures
named; what a run writes down."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from benchmarks.quality import run_experiments, runs
from benchmarks.quality.result_files import Output, read_file, write_file
from benchmarks.quality.run_experiments import Here, Work, chosen, do_runs, part_of
from benchmarks.quality.settings import ModelSize, Settings
from benchmarks.quality.suites import CORE, SEEDS, Plan, first, stills, warm

TINY = Settings(
    steps=4,
    batch=4,
    knobs={"size": 112, "cells": 4, "heights": [22], "noise": 0.0},
    size=ModelSize(80, 1, 64, 1),
    probe=8,
    test=16,
    fit=16,
    generated=2,
)
PIXELS = replace(TINY, variant="pixels", save=True)
WARM = replace(TINY, steps=2, start_from=PIXELS.name)
ALONE = replace(TINY, variant="quarter")
UNSAVABLE = replace(TINY, variant="x4-raw", save=True)
LOST = replace(TINY, start_from=UNSAVABLE.name)
WORK = Work(Output.at(Path("unused"), "suite"), "cpu", "", True, None, True)


@pytest.fixture
def output(tmp_path) -> Output:
    return Output.at(tmp_path, "suite")


def few(plan) -> tuple[Settings, ...]:
    """A start, one that waits for it, one that does not, one that fails and one that starts from that."""
    return PIXELS, WARM, ALONE, UNSAVABLE, LOST


def pair(plan) -> tuple[Settings, ...]:
    """Two that do not wait for each other."""
    return PIXELS, ALONE


def kept(path: Path, settings: Settings) -> dict:
    """What a run wrote to a result file, without times."""
    result = read_file(path)[settings.name]
    for point in result["curve"]:
        del point["seconds"]
    del result["milliseconds"], result["seconds"], result["alone"]
    return result


def test_runs_at_once_give_what_runs_in_turn_give(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_experiments, "SUITES", {"first": few})
    command = ["--suite", "first", "--device", "cpu", "--output"]
    for jobs in ("1", "2"):
        assert run_experiments.main([*command, str(tmp_path / jobs), "--jobs", jobs]) == 1
        said, wrong = capfd.readouterr()
        assert all(f"{settings.name} | step " in said for settings in (PIXELS, WARM, ALONE))
        assert f"{UNSAVABLE.name}: a model of variant x4-raw cannot be saved" in wrong
        assert f"{LOST.name}: left out, as {UNSAVABLE.name} failed" in wrong
        assert ("no times of" in said) == (jobs == "2")
    for settings in (PIXELS, WARM, ALONE):
        one, two = (kept(tmp_path / jobs / "first.jsonl", settings) for jobs in ("1", "2"))
        assert one == two and one["finished"] and one["by_image"]["right"]
        for jobs in ("1", "2"):
            assert read_file(tmp_path / jobs / "first.jsonl")[settings.name]["alone"] == (jobs == "1")
    assert [point["step"] for point in kept(tmp_path / "2" / "first.jsonl", WARM)["curve"]] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == ["first.jsonl", f"{PIXELS.name}.pt"]
    done = sorted(settings.name for settings in (PIXELS, WARM, ALONE))  # nothing of those that failed
    assert list(read_file(tmp_path / "2" / "first.jsonl")) == done


def test_a_warm_start_is_tested_before_it_is_trained(output):
    start = runs.run(PIXELS, output)
    warm = runs.run(replace(WARM, variant="pixels"), output)
    assert [point["step"] for point in start["curve"]] == [1, 2, 3, 4]
    first = warm["curve"][0]
    assert (first["step"], first["seconds"], first["loss"]) == (0, 0.0, None)
    assert first["accuracy"] == start["curve"][-1]["accuracy"]  # the model is the one that was saved


def test_a_model_is_there_when_its_run_is_finished(output, monkeypatch):
    monkeypatch.setattr(runs, "save", lambda trainer, path: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        runs.run(PIXELS, output)
    assert output.finished(PIXELS.name) is None and not read_file(output.file)[PIXELS.name]["finished"]


def test_a_start_is_done_again_where_its_model_is_gone_and_needed(output):
    for settings in (PIXELS, WARM):
        runs.run(settings, output)
    assert run_experiments.to_do((PIXELS, WARM, ALONE), output) == [ALONE]
    output.model(PIXELS.name).unlink()  # a folder with results alone
    assert run_experiments.to_do((PIXELS, WARM), output) == []
    write_file(output.file, [read_file(output.file)[PIXELS.name]])
    assert run_experiments.to_do((PIXELS, WARM), output) == [PIXELS, WARM]


def test_a_suite_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch, capsys, pytestconfig):
    program = """
import os, signal, sys
sys.path.append(sys.argv.pop(1))
from benchmarks.quality import run_experiments, runs
from test_quality_runs import ALONE, pair
measure = runs.curve_point

def measure_or_end(trainer, step, *rest):
    if trainer.settings == ALONE and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(trainer, step, *rest)

runs.curve_point = measure_or_end
run_experiments.SUITES = {"first": pair}
run_experiments.main(sys.argv[1:])
"""
    command, file = ["--suite", "first", "--device", "cpu", "--output", str(tmp_path)], tmp_path / "first.jsonl"
    here = str(Path(__file__).parent)
    python = [sys.executable, "-c", program, here]
    assert subprocess.run([*python, *command], cwd=pytestconfig.rootpath, timeout=120).returncode == -signal.SIGKILL
    before = read_file(file)
    assert {name: result["finished"] for name, result in before.items()} == {PIXELS.name: True, ALONE.name: False}
    assert [point["step"] for point in before[ALONE.name]["curve"]] == [1, 2]
    monkeypatch.setattr(run_experiments, "SUITES", {"first": pair})
    assert run_experiments.main(command) == 0
    said, after = capsys.readouterr().out, read_file(file)
    assert "1 runs to do" in said and f"{PIXELS.name} | step" not in said
    assert after[PIXELS.name] == before[PIXELS.name] and after[ALONE.name]["finished"]
    assert [point["step"] for point in after[ALONE.name]["curve"]] == [1, 2, 3, 4]
    assert file.read_text() == "".join(f"{json.dumps(after[name])}\n" for name in sorted(after))


def test_a_file_as_output_holds_the_suite_and_counts_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_experiments, "SUITES", {"first": pair})
    for path in (tmp_path, tmp_path / "mine.jsonl"):
        command = ["--suite", "first", "--variants", ALONE.variant, "--device", "cpu", "--output", str(path)]
        assert run_experiments.main(command) == 0
    assert capsys.readouterr().out.count(f"{ALONE.name} | step 4/4") == 2
    one, two = (kept(tmp_path / f"{name}.jsonl", ALONE) for name in ("first", "mine"))
    assert one == two


def test_a_damaged_result_file_is_one_line(tmp_path, one_line_error):
    (tmp_path / "warm.jsonl").write_text('{"name": "reading_x4')
    assert run_experiments.main(["--suite", "warm", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert one_line_error() == (
        f"run_experiments.py: {tmp_path / 'warm.jsonl'}:1 is not a result: expected a JSON object with a name"
    )


def test_a_run_waits_for_its_start_and_others_go_ahead(monkeypatch):
    went_ahead, order = Event(), []

    def attempt(settings: Settings, work: Work) -> None:
        if settings == PIXELS:
            assert went_ahead.wait(10)
            time.sleep(0.2)  # with a worker idle
        order.append(settings.name)
        if settings == ALONE:
            went_ahead.set()

    monkeypatch.setattr(run_experiments, "attempt", attempt)
    workers = [ThreadPoolExecutor(1) for _ in range(2)]
    assert do_runs((WARM, PIXELS, ALONE, PIXELS), WORK, workers, Here) == set()
    assert order == [ALONE.name, PIXELS.name, WARM.name]  # each once


class Ending(Executor):
    """A process that ends in every run."""

    def submit(self, *_) -> Future:
        future = Future()
        future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return future


def test_a_process_that_ends_is_replaced_and_its_run_named(monkeypatch, one_line_error):
    done = []
    monkeypatch.setattr(run_experiments, "attempt", lambda settings, work: done.append(settings.variant))
    assert do_runs((PIXELS, ALONE), WORK, [Ending()], Here) == {PIXELS.name}
    assert done == ["quarter"]
    assert f"{PIXELS.name}: its process ended abruptly" in one_line_error()


def test_a_bug_is_not_taken_for_a_failed_run(monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        do_runs((PIXELS, ALONE), WORK, [Here()], Here)


def test_no_run_begins_after_the_deadline(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(run_experiments, "attempt", lambda settings, work: begun.append(settings) or time.sleep(0.2))
    late = replace(WORK, deadline=time.monotonic() + 0.1)
    assert do_runs((PIXELS, WARM, ALONE), late, [Here()], Here) == set()
    assert begun == [PIXELS] and "no time left for 2 more runs" in capsys.readouterr().out
    monkeypatch.setattr(run_experiments, "SUITES", {"first": few})
    assert run_experiments.main(["--suite", "first", "--minutes", "0", "--output", str(tmp_path)]) == 1
    assert "no time left for 5 more runs" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_failure_is_one_line_and_a_failed_capture_says_what_to_try(monkeypatch):
    def fails() -> None:
        raise RuntimeError("operation not permitted\nwhen a stream is captured")

    monkeypatch.setattr(runs, "run", lambda *_: runs.capture(SimpleNamespace(capture=fails)))
    why = run_experiments.attempt(TINY, WORK)
    assert why == "no CUDA graph of the step, try --graphs off: operation not permitted"


def test_processes_end_with_the_command(tmp_path):
    program = """
import os, signal, sys, time
from benchmarks.quality.run_experiments import new_process
worker = new_process("cpu")
print(worker.submit(os.getpid).result(), flush=True)
worker.submit(time.sleep, 60)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    with open(tmp_path / "said", "w+") as said:  # a pipe would be waited for as long as the worker has it open
        ended = subprocess.run([sys.executable, "-c", program], cwd=root, stdout=said, timeout=60).returncode
        said.seek(0)
        process = int(said.read())
    assert ended == -signal.SIGKILL
    for _ in range(100):
        if not is_running(process):
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    pytest.fail("the worker goes on")


def is_running(process: int) -> bool:
    """Not gone, and not merely unclaimed by its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_parts_keep_together_what_starts_from_a_model():
    suite = warm(Plan(3))
    parts = [part_of(suite, number, 2) for number in (1, 2)]
    assert sorted(s.name for part in parts for s in part) == sorted(s.name for s in suite)
    assert [{s.seed for s in part} for part in parts] == [{0, 2}, {1}]
    alone = first(Plan(3))
    assert part_of(alone, 2, 4) == list(alone[1::4])


def test_a_choice_keeps_what_its_runs_start_from():
    kept = chosen(warm(Plan(3)), {"task": None, "variant": ["x4"], "seed": [0, 2]})
    assert [(s.variant, s.seed, s.start_from is None) for s in kept] == [
        ("exact", 0, True),
        ("exact", 2, True),
        ("x4", 0, False),
        ("x4", 2, False),
    ]
    assert {s.start_from for s in kept[2:]} == {s.name for s in kept[:2]}


def test_the_tasks_beside_reading_are_tuned_three_times_from_one_model():
    texture = [settings for settings in stills(Plan(3)) if settings.task == "texture"]
    assert [(s.variant, s.seed) for s in texture if s.start_from is None] == [("exact", 0)]
    tuned = [s for s in texture if s.start_from is not None]
    assert {s.start_from for s in tuned} == {texture[0].name} and not any(s.save for s in tuned)
    assert [(s.variant, s.seed) for s in tuned] == [(variant, seed) for variant in CORE for seed in SEEDS]
    assert len({s.name for s in texture}) == len(texture)


def test_a_tuning_rate_leaves_the_models_to_start_from_alone(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(run_experiments, "do_runs", lambda runs, *rest: done.extend(runs) or set())
    command = ["--suite", "warm", "--device", "cpu", "--output", str(tmp_path), "--tuning-rate", "0.5"]
    assert run_experiments.main(command) == 1  # no results
    assert {(s.start_from is None, s.learning_rate) for s in done} == {(True, Settings().learning_rate), (False, 0.5)}


def test_a_choice_that_no_run_has_is_refused(tmp_path, capsys):
    assert run_experiments.main(["--suite", "warm", "--output", str(tmp_path), "--variants", "x4", "x9"]) == 1
    said = capsys.readouterr().err
    assert said == "run_experiments.py: the suite has no variant x9: choose from exact, quarter, x4, x4-corner\n"


def test_a_number_of_jobs_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit):
        run_experiments.main(["--suite", "first", "--output", "x", "--jobs", "0"])
    assert "argument --jobs: expected at least 1, got 0" in capsys.readouterr().err
