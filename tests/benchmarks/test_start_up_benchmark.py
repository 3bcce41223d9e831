"""What the benchmark of start-up makes of a launch, and what a process notes of its imports."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.speed import memory, start_up


def test_every_second_of_a_launch_has_one_part():
    trace = {"begun": 102.0, "imports": [["torch", 102.5, 105.5], ["other", 107.0, 108.0], ["late", 120.0, 130.0]]}
    seen = {"engine": 106.0, "compared": 109.0, "step": 115.0}
    found = start_up.parts(100.0, seen, trace, {"seconds": 3.0, "data_wait_share": 0.5})
    assert found == pytest.approx({
        "launcher": 2.0, "imports": 4.0, "comparison": 2.0, "model": 0.0, "loader": 1.5, "step": 1.5, "rest": 4.0,
        "total": 15.0,
        "import torch": 3.0, "import other": 1.0,
    })  # fmt: skip
    found = start_up.parts(100.0, {**seen, "tried": 111.0}, trace, {"seconds": 3.0, "data_wait_share": 0.5})
    assert (found["model"], found["rest"]) == (2.0, 2.0)
    with pytest.raises(RuntimeError, match="left no trace"):
        start_up.parts(100.0, seen, {**trace, "begun": 107.0}, {"seconds": 3.0, "data_wait_share": 0.5})


def test_a_process_notes_the_imports_that_no_other_waits_for(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(start_up.TRACE), "IMPORT_TRACE": str(tmp_path), "RANK": "0"}
    child = "subprocess.run([sys.executable, '-c', 'import colorsys'], check=True)"
    code = f"import subprocess, sys, os\nif os.fork(): os.wait()\nimport numpy.linalg\n{child}"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert process.wait() == 0
    assert len(list(tmp_path.iterdir())) == 3, "a forked process writes nothing; both children have the rank as well"
    trace = start_up.read_trace(tmp_path)
    assert trace == json.loads((tmp_path / f"{process.pid}.json").read_text()) and trace["rank"] == "0"
    ((name, begun, ended),) = [each for each in trace["imports"] if each[0].startswith("numpy")]
    assert name == "numpy.linalg" and trace["begun"] <= begun < ended


def test_each_way_has_a_process_of_its_own():
    processes = [memory.in_new_process(os.getpid) for _ in range(2)]
    assert len({os.getpid(), *processes}) == 3


def test_without_a_device_the_memory_of_cards_is_expected_only(capsys, monkeypatch):
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    assert memory.main(["--cards", "24", "80"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("24 GB (21.4 GiB), all") and lines[0].endswith("does not fit")
    assert "vision tokens, recompute" in lines[2] and "expected" in lines[3]
    assert "nothing is measured" in said.err
