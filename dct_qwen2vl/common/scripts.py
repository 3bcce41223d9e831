"""What every command of this repository does with errors: one line for the user's, a traceback for a bug."""

import sys
from collections.abc import Callable


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
    """
    try:
        return work()
    except errors as error:
        if debug:
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not goes_on:
            raise
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
