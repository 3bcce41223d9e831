"""Result files: JSON lines, one for each run, sorted by the run's name. Imports nothing heavy."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from dct_qwen2vl.common.files import remove, write_text
from dct_qwen2vl.common.locks import flock
from dct_qwen2vl.common.scripts import UserError

SUFFIX = ".jsonl"

OLD_NAMES = {"arm": "variant", "pictures": "images", "by_picture": "by_image"}

Result = dict[str, Any]  # of a run: what its line holds; always with `name`


def result_files(place: Path) -> list[Path]:
    """The result files of a folder in the order of their names, or the file itself. Empty if there are none."""
    if place.is_dir():
        return sorted(place.glob(f"*{SUFFIX}"))
    return [place] if place.is_file() else []


def read_file(path: Path) -> dict[str, Result]:
    """Returns {name: result} of one file. Raises UserError for a line that is not a result."""
    lines = path.read_text(encoding="utf-8").splitlines()
    results = [parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return {result["name"]: result for result in results}


def parse_line(line: str, where: str) -> Result:
    """Raises UserError, with `where`, for anything but a JSON object that has a name."""
    try:
        result = json.loads(line)
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict) or not isinstance(result.get("name"), str):
        raise UserError(f"{where} is not a result: expected a JSON object with a name")
    return with_new_names(result)


def with_new_names(result: Result) -> Result:
    """A result whose fields have today's names, whatever version wrote it."""
    if not OLD_NAMES.keys().isdisjoint(result):
        result = {OLD_NAMES.get(name, name): value for name, value in result.items()}
    for part in {"settings", "classifier"} & result.keys():
        result[part] = {OLD_NAMES.get(name, name): value for name, value in result[part].items()}
    return result


def read_results(*places: Path) -> dict[str, Result]:
    """Returns {name: result} of files and of folders with files, sorted by name.

    Several results may have one name. A finished one counts before unfinished ones, an earlier place before later ones.
    """
    found: dict[str, Result] = {}
    for file in dict.fromkeys(chain.from_iterable(map(result_files, places))):
        for name, result in read_file(file).items():
            if name not in found or (is_finished(result) and not is_finished(found[name])):
                found[name] = result
    return dict(sorted(found.items()))


def is_finished(result: Result) -> bool:
    return result.get("finished", False)


def write_file(path: Path, results: Iterable[Result]) -> None:
    """Writes the whole file or nothing. The order of the results does not matter."""
    ordered = sorted(results, key=lambda result: result["name"])
    for left_over in path.parent.glob(f"{path.name}.*.tmp"):  # by a writer that was killed; the lock is held
        remove(left_over)
    write_text(path, "".join(f"{json.dumps(result)}\n" for result in ordered))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps all other writers of a file out, also those of other processes. Creates the file if it is missing."""
    while True:
        with open(path, "a", encoding="utf-8") as file:
            flock(file, fcntl.LOCK_EX)
            if is_at(file, path):  # else another writer replaced the file before this one got the lock
                yield
                return


def is_at(file: IO, path: Path) -> bool:
    """Whether an open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Output:
    """Where a command keeps its results and models.

    file: the result file that it writes.
    place: where it looks for runs that are finished: the file alone, or its whole folder.
    """

    file: Path
    place: Path

    @classmethod
    def at(cls, path: Path, experiment: str) -> "Output":
        """Of --output, which is FILE.jsonl or a folder. A folder gets the file FOLDER/EXPERIMENT.jsonl."""
        return cls(path, path) if path.suffix == SUFFIX else cls(path / f"{experiment}{SUFFIX}", path)

    def finished(self, name: str) -> Result | None:
        """The result of a run, if it is there and finished."""
        result = read_results(self.file, self.place).get(name)
        return result if result is not None and is_finished(result) else None

    def record(self, result: Result) -> None:
        """Writes a run's line, in place of its earlier line. Several processes may do so at once."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file):
            results = {**read_file(self.file), result["name"]: result}
            write_file(self.file, results.values())

    def model(self, name: str) -> Path:
        """The file of a run's saved model."""
        return self.file.parent / f"{name}.pt"
