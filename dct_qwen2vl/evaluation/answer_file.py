"""The answers of an evaluation as it goes (predictions.jsonl.part), from which the same command goes on.

    {"settings": {...}}                      what the answers depend on
    {"key": ..., "prediction": ..., ...}     an answer, as in predictions.jsonl
    {"read": {...}}                          the end of a round of answers, and how far the questions have been read

What stands behind the last end of a round, such as half a line, is what a killed run left: it is cut off and the round
asked again as a whole, so that its batches, and with them its answers, are those of a run that was never stopped.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.locks import flock
from dct_qwen2vl.common.scripts import UserError

ANSWER_TEXTS = ("key", "question_type", "question", "answer", "prediction", "blind_prediction")
READING_COUNTS = ("entries", "questions", "turns")


class AnswerFile:
    """Holds the file until it is closed, or this process ends.

    answers: of the rounds that are in it. read: what was said at the end of the last of these, None where there is
    none. refused: why the answers that were found are not used, "" if they are or there were none.
    """

    def __init__(self, path: Path, settings: dict[str, dict[str, Any]]) -> None:
        """Opens the file and reads the answers that can be used.

        path: File.
        settings: Named values that the answers depend on, by kind. Those of the kind "files" say nothing to a reader.

        Raises UserError if another process has the file.
        """
        self.path = path
        self.file = path.open("a+b")
        try:
            flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{path} is being written by another evaluation: wait for it or end it") from None
        self.file.seek(0)
        data = self.file.read()
        lines = parse_lines(data)
        header, end = next(lines, ({}, 0))
        settings = json.loads(json.dumps(settings))
        self.refused = describe_difference(header.get("settings"), settings) if data else ""
        self.answers, self.read, end = take_rounds(lines, end) if data and not self.refused else ([], None, 0)
        self.end, self.header = end, [] if end else [{"settings": settings}]

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.file.close()
        except OSError:  # what could not be written once
            if error[0] is None:
                raise

    def add_round(self, answers: list[dict[str, Any]], read: dict[str, Any]) -> None:
        """Adds answers to the file. The first call replaces what cannot be used.

        answers: Lines for the file, in order.
        read: How far the split was read, as `Reading.as_dict` gives it.

        Until the first call, the old file stays: it may be hours of work, and the new run may fail.
        """
        if self.end is not None:
            self.file.truncate(self.end)
            self.end = None
        self.write([*self.header, *answers, {"read": read}])
        self.header = []
        self.answers += answers
        self.read = read

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Writes lines to the disk at once. Raises UserError where that is not possible."""
        try:
            self.file.write(as_lines(lines))
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room, then the same command continues"
            ) from error

    def remove(self) -> None:
        """At the end, when the answers are elsewhere."""
        self.path.unlink(missing_ok=True)


def as_lines(values: Iterable[dict[str, Any]]) -> bytes:
    """Half a surrogate pair, which the name of a sample may hold, is written as JSON spells it: \\udc80."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return text.encode("utf-8", "backslashreplace")


def parse_lines(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """(object, offset behind it) of each line, up to one that has no end or holds no object."""
    start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        try:
            value = json.loads(data[start:stop])
        except (ValueError, RecursionError):
            return
        if not isinstance(value, dict):
            return
        start = stop + 1
        yield value, start


def take_rounds(
    lines: Iterable[tuple[dict[str, Any], int]], end: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, int]:
    """The answers of all whole rounds, what the last of them says was read, and the offset behind it (`end` if there
    are none). They end where a line is neither an answer nor the end of a round that has all its answers."""
    answers, of_round, read = [], [], None
    for value, stop in lines:
        if is_answer(value):
            of_round.append(value)
        elif is_reading(value.get("read")) and value["read"]["questions"] == len(answers) + len(of_round):
            answers += of_round
            of_round, read, end = [], value["read"], stop
        else:
            break
    return answers, read, end


def is_answer(value: dict[str, Any]) -> bool:
    return all(isinstance(value.get(name), str) for name in ANSWER_TEXTS)


def is_reading(value: Any) -> bool:
    """Whether a value is what `Reading.as_dict` gives."""
    if not isinstance(value, dict) or value.keys() != {*READING_COUNTS, "left_out"}:
        return False
    left_out = value["left_out"]
    counts = [value[name] for name in READING_COUNTS] + [*left_out.values()] if isinstance(left_out, dict) else [None]
    return all(type(count) is int and 0 <= count < 1 << 62 for count in counts)


def describe_difference(earlier: Any, settings: dict[str, dict[str, Any]]) -> str:
    """ "--batch-size was 32, now is 16, other files in --model-dir"; "" where there is no difference."""
    if not isinstance(earlier, dict) or not all(isinstance(values, dict) for values in earlier.values()):
        return "does not say what its answers depend on"
    found = []
    for kind, now in settings.items():
        before = earlier.get(kind, {})
        for name in [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            values = f"{name} was {before.get(name)}, now is {now.get(name)}"
            found.append(f"other files in {name}" if kind == "files" else values)
    return ", ".join(found)


def digest_files(folder: Path, *patterns: str) -> str:
    """SHA-256 of the names, sizes and times of files. Their content is not read, because weights are large.

    folder: Holds the files.
    patterns: As in `Path.glob`.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    states = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return sha256(repr(states).encode("utf-8", "surrogateescape")).hexdigest()
