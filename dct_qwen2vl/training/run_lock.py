"""Who trains into a run folder: one start at a time."""

import fcntl
import os
import socket
from pathlib import Path

from dct_qwen2vl.common.locks import flock
from dct_qwen2vl.common.scripts import UserError

LOCK_NAME = ".lock"


class RunFolderError(UserError):
    """The run folder cannot be used. The message is one line: what, where, what to do."""


def lock(run_dir: Path) -> None:
    """Holds the run folder until this process ends, however it ends. Raises RunFolderError if another start has it.
    Where the file system knows no locks, there is none."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK_NAME).open("a+", encoding="utf-8")
    try_lock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    # A loader process that outlives this one must not hold the lock. The reference also keeps the file open.
    os.register_at_fork(after_in_child=file.close)


def check_unlocked(run_dir: Path) -> None:
    """Raises RunFolderError if another process holds the run folder; writes nothing."""
    try:
        with (run_dir / LOCK_NAME).open(encoding="utf-8") as file:
            try_lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return


def try_lock(file, kind: int) -> None:
    try:
        flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunFolderError(
            f"{Path(file.name).parent} is being trained by another process ({file.read().strip() or 'pid unknown'}): "
            f"wait or end it"
        ) from None
