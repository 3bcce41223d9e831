"""How commands end: errors and Ctrl-C in one line, at any moment."""

import signal
import subprocess
import sys

import pytest
from pipeline import REPOSITORY

from dct_qwen2vl.common.scripts import UserError, run_main

# A command that sends itself what Ctrl-C sends, at one of its moments.
COMMAND = """
import atexit, os, signal, sys
from dct_qwen2vl.common.scripts import run_main, run_program
moment = sys.argv[1]

def press(now):
    if now == moment:
        os.kill(os.getpid(), signal.SIGINT)

def main():
    press("before")
    status = run_main("tool.py", lambda: press("within") or 3, goes_on=True)
    press("after")
    return status

atexit.register(press, "end")
print("written", end="")
run_program("tool.py", main)
"""


@pytest.mark.parametrize(
    ("moment", "status", "said"),
    [
        ("never", 3, ""),
        ("before", 130, "tool.py: interrupted\n"),
        ("within", 130, "tool.py: interrupted; run the same command again to continue\n"),
        ("after", 130, "tool.py: interrupted\n"),
        ("end", 3, ""),  # nothing of Python is left that could answer
    ],
)
def test_ctrl_c_is_told_at_any_moment(moment, status, said):
    command = [sys.executable, "-c", COMMAND, moment]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "written", said)


def test_a_reader_that_has_ended_makes_no_traceback():
    command = f"PYTHONUNBUFFERED= {sys.executable} -c '{COMMAND}' never | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_errors_are_one_line_or_a_traceback(capsys):
    def work():
        raise UserError("this is wrong")

    assert run_main("tool.py", work) == 1
    assert capsys.readouterr().err == "tool.py: this is wrong\n"
    with pytest.raises(UserError):
        run_main("tool.py", work, debug=True)


def test_ctrl_c_in_work_that_does_not_go_on(capsys):
    assert run_main("tool.py", lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "tool.py: interrupted\n"
