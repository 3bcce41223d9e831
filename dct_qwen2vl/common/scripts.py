"""What every command of this repository does with errors: one line for the user's, a traceback for a bug."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED_CODE = 130  # a shell's exit status after Ctrl-C


class UserError(ValueError):
    """Something that the user can mend. The message is one line: what, where, what to type next."""


def run_main(
    program: str,
    work: Callable[[], int],
    debug: bool = False,
    goes_on: bool = False,
    errors: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Calls `work` and returns its exit status: 1 after one of `errors`, 130 after Ctrl-C.

    program: As the user typed it. The line on stderr begins with it.
    work: The script's work. Returns the exit status.
    debug: Whether an error is raised, so that its traceback is shown.
    goes_on: Whether the same command continues an interrupted run. The message after Ctrl-C then says so.
    errors: Classes of errors that are shown in one line.

    `run_program` handles Ctrl-C before and after it.
    """
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # of each import of torch
    try:
        return work()
    except errors as error:
        if debug:
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = "; run the same command again to continue" if goes_on else ""
        print(f"{program}: interrupted{more}", file=sys.stderr)
        return INTERRUPTED_CODE


def run_program(program: str, main: Callable[[], int]) -> NoReturn:
    """Calls `main` and ends the process with its exit status. Ctrl-C ends it in one line until the last instant.

    program: As the user typed it.
    main: The script's main function. It has closed its files and its worker processes when it returns.
    """
    try:
        leave(main())
    except KeyboardInterrupt:  # outside of run_main's work
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{program}: interrupted", file=sys.stderr)
        leave(INTERRUPTED_CODE)


def leave(status: int) -> NoReturn:
    """Ends the process at once. Python's own end takes a while, and Ctrl-C would then end it without a message."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has ended, or it is closed
            stream.flush()
    os._exit(status)
