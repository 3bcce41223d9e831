"""Stands in for Python in qwen_launch.sh, so that a test can change the program before it runs.

    PYTHON=program PYTHON_EXEC=program bash qwen_launch.sh

where `write_interpreter` has made the program of a script that ends in `run_as_python(fine_tune)`; torchrun reads
PYTHON_EXEC.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = "finetune_qwen2vl.py"


def write_interpreter(folder: Path, script: str) -> Path:
    """A program that takes python's arguments and runs tests/SCRIPT.py with them."""
    program = folder / f"python_of_{script}"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS / script}.py" "$@"\n')
    program.chmod(0o755)
    return program


def run_as_python(fine_tune: Callable[[list[str]], int]) -> None:
    """Calls fine_tune with the arguments of finetune_qwen2vl.py; everything else is Python's to run."""
    if SCRIPT not in sys.argv[1:3]:  # after -u, from torchrun
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    sys.path[:0] = [str(TESTS.parent)]
    sys.exit(fine_tune(sys.argv[sys.argv.index(SCRIPT) + 1 :]))
