"""Locks of files that end with the process that holds them, however it ends."""

import errno
import fcntl
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from flock, on file systems that have none


def flock(file: IO, operation: int) -> None:
    """`fcntl.flock`, which does nothing where the file system has no locks.

    file: Open file.
    operation: Flags of `fcntl.flock`, such as fcntl.LOCK_EX.

    Raises BlockingIOError if another process has the lock and `operation` has fcntl.LOCK_NB.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
