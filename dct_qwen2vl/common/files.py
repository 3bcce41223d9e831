"""Files that are whole or not there, and JSON."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dct_qwen2vl.common.scripts import UserError

UNFINISHED = r"\.[0-9a-f]{8}\.tmp"  # at the end of the name of a file that is being written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Writes a file under a temporary name of its own.

    At the end of the block it takes its name, complete and on the disk. After an error it is removed.
    Raises UserError where the disk does not take it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        if error.filename not in (None, str(temporary)):
            raise
        why = f"{path} could not be written ({error.strerror}); what is finished stays"
        raise UserError(f"{why}; make room, then the same command goes on") from error
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Removes a file where that is possible."""
    with contextlib.suppress(OSError):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises UserError."""
    with replacing(path) as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all. Raises UserError."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON, indented by two, in ASCII, with a line break at the end. Raises UserError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """The value of a JSON file. None where it is missing or is no JSON.

    object_hook: as `json.loads` has it.
    """
    try:
        return json.loads(path.read_bytes(), object_hook=object_hook)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_object(
    path: Path,
    advice: str,
    error: type[UserError] = UserError,
    object_hook: Callable[[dict], Any] | None = None,
) -> dict[str, Any]:
    """The object in a JSON file that has to be there. Raises `error`.

    advice: what to do, the end of the message.
    object_hook: as `json.loads` has it.
    """
    try:
        value = json.loads(path.read_bytes(), object_hook=object_hook)
    except OSError as why:
        raise error(f"{path} cannot be read ({why.strerror}): {advice}") from why
    except (ValueError, RecursionError) as why:
        raise error(f"{path} is not JSON ({why}): {advice}") from why
    if not isinstance(value, dict):
        raise error(f"{path} is JSON, but no object with fields: {advice}")
    return value
