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
    """Opens a temporary file that replaces `path` at the end of the block.

    path: File. Gets the content complete and synced to the disk. After an error, it stays as it was.

    Raises UserError where the disk refuses it.
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
        raise UserError(f"{why}; make room, then run the same command again") from error
    except BaseException:
        remove(temporary)
        raise


def unnamed(folder: Path) -> Path:
    """The name beside a folder's own that it has while it is written or removed, so that under its own it is whole.

    folder: By its own name.
    """
    return folder.with_name(f".{folder.name}.tmp")


def lowest_there(folder: Path) -> Path:
    """The folder, or else the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def remove(path: Path) -> None:
    """Removes a file where that is possible.

    path: File. It may be missing.
    """
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
    """Writes a file completely, or not at all.

    path: File. Replaced if it exists.
    data: Its content.

    Raises UserError where the disk refuses it.
    """
    with replacing(path) as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 completely, or not at all.

    path: File. Replaced if it exists.
    text: Its content.

    Raises UserError where the disk refuses it.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file completely, or not at all: indented by two, in ASCII, with a line break at the end.

    path: File. Replaced if it exists.
    value: What `json.dumps` accepts.

    Raises UserError where the disk refuses it.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """The value of a JSON file. None where it is missing or is not JSON.

    path: File.
    object_hook: As in `json.loads`.
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
    """The object in a JSON file that must exist.

    path: File.
    advice: What the user should do. The end of the message.
    error: Class of the error that is raised.
    object_hook: As in `json.loads`.

    Raises `error` if the file cannot be read or holds no JSON object.
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
