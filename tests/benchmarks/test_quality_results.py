"""Result files: written whole, by several processes at once, and read as written; damaged ones are refused."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.result_files import Output, read_file, read_results, write_file


def run(name: str, finished: bool = True, **fields) -> dict:
    return {"name": name, "finished": finished, **fields}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def start_python(pytestconfig) -> Callable[..., subprocess.Popen]:
    """start_python(program, argument, ...): a process that runs some lines of Python."""

    def start(program: str, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=pytestconfig.rootpath)

    return start


def test_a_folder_gets_a_file_for_each_experiment_and_a_file_is_taken_as_it_is(tmp_path):
    folder = Output.at(tmp_path / "results", "warm")
    assert (folder.file, folder.place) == (tmp_path / "results" / "warm.jsonl", tmp_path / "results")
    file = Output.at(tmp_path / "mine.jsonl", "warm")
    assert file.file == file.place == tmp_path / "mine.jsonl"
    assert (folder.model("a"), file.model("a")) == (tmp_path / "results" / "a.pt", tmp_path / "a.pt")


def test_lines_are_sorted_by_name_whatever_the_order_of_writing(tmp_path):
    runs = [run("b", accuracy=0.1), run("a", curve=[1e-7, None]), run("c", finished=False)]
    for folder, order in (("one", runs), ("two", runs[::-1])):
        for result in order:
            Output.at(tmp_path / folder, "warm").record(result)
    one, two = (tmp_path / folder / "warm.jsonl" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert lines_of(one) == [runs[1], runs[0], runs[2]]
    assert [path.name for path in one.parent.iterdir()] == ["warm.jsonl"]  # neither locks nor temporary files


def test_a_run_has_one_line_which_is_replaced(tmp_path):
    output = Output.at(tmp_path, "warm")
    for result in (run("a", finished=False), run("b"), run("a", accuracy=0.5)):
        output.record(result)
    assert lines_of(output.file) == [run("a", accuracy=0.5), run("b")]


def test_runs_of_all_files_of_the_folder_are_done_unless_the_output_is_a_file(tmp_path):
    Output.at(tmp_path, "warm").record(run("a"))
    tokens = Output.at(tmp_path, "tokens")
    tokens.record(run("b", finished=False))
    assert tokens.finished("a") == run("a") and tokens.finished("b") is None and tokens.finished("c") is None
    assert Output.at(tmp_path / "tokens.jsonl", "tokens").finished("a") is None


def test_the_own_file_counts_before_others_of_the_folder(tmp_path):
    for experiment in ("first", "warm"):
        Output.at(tmp_path, experiment).record(run("a", of=experiment))
    assert Output.at(tmp_path, "warm").finished("a")["of"] == "warm"


def test_finished_runs_count_before_unfinished_ones_and_then_the_first_place(tmp_path):
    for folder, runs in (("one", [run("a", False), run("b", n=1)]), ("two", [run("a"), run("b", n=2), run("0")])):
        for result in runs:
            Output.at(tmp_path / folder, "warm").record(result)
    assert list(read_results(tmp_path / "one", tmp_path / "two" / "warm.jsonl").values()) == [
        run("0"),
        run("a"),
        run("b", n=1),
    ]
    assert read_results(tmp_path / "missing", tmp_path / "missing.jsonl") == {}


@pytest.mark.parametrize("line", ['{"name": "b", "finis', "[1]", '{"finished": true}', ""])
def test_a_damaged_file_is_refused_and_left_as_it_is(line, tmp_path):
    output = Output.at(tmp_path, "warm")
    output.record(run("a"))
    damaged = output.file.read_text() + line + "\n"
    output.file.write_text(damaged)
    for use in (lambda: read_results(tmp_path), lambda: output.finished("a"), lambda: output.record(run("c"))):
        with pytest.raises(ValueError, match=r"warm\.jsonl:2 is not a result: expected a JSON object with a name"):
            use()
    assert output.file.read_text() == damaged


def test_processes_that_write_at_once_lose_nothing(tmp_path, start_python):
    program = """
import sys
from pathlib import Path
from benchmarks.quality.result_files import Output
output, process = Output.at(Path(sys.argv[1]), "warm"), sys.argv[2]
for number in range(30):
    for finished in (False, True):
        output.record({"name": f"{process}-{number:02}", "finished": finished, "text": 9000 * process})
"""
    processes = [start_python(program, tmp_path, process) for process in "abcd"]
    assert [process.wait(120) for process in processes] == [0] * 4
    expected = [run(f"{process}-{number:02}", text=9000 * process) for process in "abcd" for number in range(30)]
    assert lines_of(tmp_path / "warm.jsonl") == expected
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_while_it_writes_leaves_the_file_whole_and_unlocked(tmp_path, start_python):
    output = Output.at(tmp_path, "warm")
    output.record(run("a"))
    program = """
import os, signal, sys
from pathlib import Path
from benchmarks.quality.result_files import Output
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # the lines are written, the file is not replaced
Output.at(Path(sys.argv[1]), "warm").record({"name": "b", "finished": True})
"""
    assert start_python(program, tmp_path).wait(60) == -signal.SIGKILL
    assert list(tmp_path.glob("warm.jsonl.*.tmp")) and lines_of(output.file) == [run("a")]
    assert read_results(tmp_path) == {"a": run("a")}
    output.record(run("b"))
    assert [path.name for path in tmp_path.iterdir()] == ["warm.jsonl"]
    assert lines_of(output.file) == [run("a"), run("b")]


def test_the_recorded_results_are_as_the_program_writes_them(tmp_path, pytestconfig):
    files = sorted((pytestconfig.rootpath / "benchmarks" / "results").iterdir())
    assert files and {path.suffix for path in files} == {".jsonl"}
    for path in files:
        write_file(tmp_path / path.name, read_file(path).values())
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
