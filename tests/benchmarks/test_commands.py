"""Commands of studies: their logs, their time, and how the study of real pages fits trainings into minutes."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
from pipeline import is_running

from benchmarks.commands import Command
from benchmarks.quality.manuals import study
from benchmarks.speed import tables
from dct_qwen2vl.common.scripts import UserError

TRAINING = """
import json, sys, time
from pathlib import Path
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True)
for step in range(1, steps + 1):
    time.sleep(0.02)
    with (folder / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": step, "seconds": 0.02}), file=file, flush=True)
"""


def test_a_command_has_a_log_and_its_exit_status(tmp_path):
    log = tmp_path / "logs/one.log"
    command = Command(["bash", "-c", "echo $WORD; echo other >&2; exit 3"], log, {"WORD": "said"})
    assert command.wait() == 3 and command.ended
    assert log.read_text().splitlines() == [
        "$ WORD=said bash -c echo $WORD; echo other >&2; exit 3", "said", "other"
    ]  # fmt: skip


@pytest.mark.parametrize("start", ["", "trap '' TERM; "], ids=["", "deaf"])
def test_what_a_command_has_started_ends_with_its_time(start, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.commands.PATIENCE", 1)
    child, script = tmp_path / "child", tmp_path / "child.sh"
    script.write_text(f"{start}echo $$ > {child}; while true; do sleep 1; done")
    command = Command(["bash", "-c", f"setsid bash {script} & wait"], tmp_path / "log", {})
    while not child.exists() or not child.read_text():
        time.sleep(0.05)
    assert command.wait(0.1) is None
    pid = int(child.read_text())
    assert not is_running(pid)


class DrawnStudy(study.Study):
    """Its trainings only sleep."""

    def train(self, name: str, steps: int) -> Command:
        return Command([sys.executable, "-c", TRAINING, str(self.folder / "runs" / name), str(steps)],
                       self.log(name), {})  # fmt: skip


def a_study(folder: Path) -> DrawnStudy:
    arguments = ["--vit", "vit.onnx", "--smollm", "model.gguf", "--output", str(folder)]
    return DrawnStudy(study.parse_arguments(arguments))


def test_trainings_get_equal_steps_that_fit_into_their_time(tmp_path, monkeypatch, capsys):
    for name, value in {"FIRST": 2, "SEEN": 8, "SPARE": 1, "LAUNCH": 0}.items():
        monkeypatch.setattr(study, name, value)
    made = a_study(tmp_path)
    made.train_in_time(("one", "two"), minutes=7 / 60, step_time=0.001)  # it takes 20 times as long
    steps = {len(study.steps_of(tmp_path / "runs" / name)) for name in ("one", "two")}
    assert len(steps) == 1 and 20 < min(steps) <= 300
    assert study.step_time_of(tmp_path / "runs/one") == pytest.approx(0.02)
    assert "begun again with" in capsys.readouterr().out
    begun = time.monotonic()
    made.train_in_time(("one", "two"), minutes=7 / 60, step_time=0.001)
    assert time.monotonic() - begun < 0.5  # done


@pytest.mark.parametrize("losses, said", [([2.5, 0.4], ""), ([2.5, 1.96], "loss is 1.96, "), ([], "loss is inf, ")])
def test_a_base_that_does_not_read_is_told(tmp_path, capsys, losses, said):
    made, run = a_study(tmp_path), tmp_path / "runs/base"
    run.mkdir(parents=True)
    lines = [{"step": 9, "loss": 3.0, "seconds": 0.1}, *({"step": 9, "val_loss": loss} for loss in losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for done in ("conversion_base", "base"):
        made.mark(done).touch()
    made.do_base()
    found = capsys.readouterr().out
    assert said in found and bool(said) == ("does not read yet" in found)


def test_a_training_that_fails_names_its_log(tmp_path):
    made = a_study(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="the training of one failed or took too long: see "):
        made.train_in_time(("one",), minutes=1, step_time=10)


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert tables.main(["--output", str(tmp_path / "tables")]) == 1
    assert capsys.readouterr().err == "tables.py: no CUDA device: these measurements say nothing of a CPU\n"
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize("name", tables.MEASUREMENTS)
def test_measurements_are_commands_that_exist(name, capsys):
    program, *rest = tables.MEASUREMENTS[name].command.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.speed.{program}").main([*rest, "--help"])
    known = capsys.readouterr().out.split()
    flags = {word for word in [*rest, "--json"] if word.startswith("--")}
    assert ended.value.code == 0 and flags <= {word.strip("[,") for word in known}
