"""The file that a command writes, and errors that name the file that it reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dct_qwen2vl.common.scripts import UserError


def check_output(path: Path, force: bool) -> None:
    """Checks that a file can be written.

    path: The file.
    force: Whether it may be replaced.

    Raises UserError if the file exists and `force` is false, or if its folder does not exist.
    """
    if path.exists() and not force:
        raise UserError(f"{path} is there already: choose another --output, or add --force")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --output: make it first")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of reading and encoding name the file. Raises UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
