"""metrics.jsonl of a run: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.files import write_text
from dct_qwen2vl.training.run_lock import RunFolderError


class MetricsFile:
    """Appends JSON lines; keeps what is older than the step that a run starts from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start_from(self, step: int) -> None:
        """Drops lines of later steps, and one that a killed run left half-written."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Writes one more line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, [] where there is none. Raises RunFolderError for one that is broken."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise RunFolderError(f"{path} is broken in line {number}: take that line out, or move the file away")
        lines.append(line)
    return lines
