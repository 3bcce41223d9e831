"""Writes small prepared sets as data_preparation.py leaves them, for the tests of what reads them."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StoredSample:
    """parts: media by file ending. shapes: height, width, frames, seconds of each of them."""

    turns: Sequence[tuple[str, str]]
    source: str = "coco"
    parts: dict[str, bytes] = field(default_factory=dict)
    shapes: Sequence[tuple[int, int, int, float]] = ()

    @property
    def entry(self) -> dict:
        names = {"images": [name for name in self.parts if not name.endswith("mp4")]}
        names["videos"] = [name for name in self.parts if name.endswith("mp4")]
        return {"id": "a", **names, "conversations": [{"from": role, "value": text} for role, text in self.turns]}


def write_set(
    folder: Path, shards: dict[str, list[list[StoredSample]]], skipped: Sequence[tuple[str, str, str]] = ()
) -> Path:
    """shards: split -> its shards, each a list of samples. skipped: (source, reason, detail) of each entry left out."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = [(split, samples) for split, group in shards.items() for samples in group]
    written, key = {}, 0
    for number, (split, samples) in enumerate(ordered):
        name = f"pretrain-{number:06d}.tar"
        write_tar(folder / name, samples, key)
        write_json(folder / f"pretrain-{number:06d}.stats.json", shard_stats(name, split, samples))
        written[name] = len(samples)
        key += len(samples)
    lines = [
        {"index": key + number, "id": None, "reason": reason, "detail": detail}
        for number, (_, reason, detail) in enumerate(skipped)
    ]
    (folder / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "stats.json", set_stats(written, [s for _, samples in ordered for s in samples], skipped))
    return folder


def write_tar(path: Path, samples: list[StoredSample], first_key: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, first_key):
            for ending, data in {**sample.parts, "json": json.dumps(sample.entry).encode()}.items():
                header = tarfile.TarInfo(f"{number:09d}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def shard_stats(name: str, split: str, samples: list[StoredSample]) -> dict:
    sources = sorted({sample.source for sample in samples})
    columns = {
        "source": [sources.index(sample.source) for sample in samples],
        "media": [len(sample.parts) for sample in samples],
        "text": [sum(len(text) for _, text in sample.turns) for sample in samples],
    }
    shapes = [shape for sample in samples for shape in sample.shapes]
    media = {name: [shape[n] for shape in shapes] for n, name in enumerate(("height", "width", "frames", "seconds"))}
    head = {"name": name, "split": split, "written": len(samples), "sources": sources}
    return {**head, "samples": columns, "media": media}


def set_stats(shards: dict[str, int], samples: list[StoredSample], skipped: Sequence[tuple[str, str, str]]) -> dict:
    written = Counter(sample.source for sample in samples)
    left_out = Counter((source, reason) for source, reason, _ in skipped)
    sources = {
        source: {
            "copies": 0,
            "thinned": 0,
            "read": written[source] + sum(count for (name, _), count in left_out.items() if name == source),
            "written": written[source],
            "skipped": {reason: count for (name, reason), count in left_out.items() if name == source},
        }
        for source in sorted({*written, *(source for source, _ in left_out)})
    }
    return {
        "tool": "data_preparation",
        "complete": True,
        "metadata": "cambrian737k.json",
        "read": len(samples) + len(skipped),
        "copies": 0,
        "thinned": 0,
        "written": len(samples),
        "skipped": dict(Counter(reason for _, reason, _ in skipped)),
        "parts": {"images_copied": sum("jpg" in sample.parts for sample in samples)},
        "repairs": {"missing_placeholder": 2},
        "tars": {
            "a.tar": {"members": 9, "refused": {"absolute_path": 2}, "damage": "unexpected end of data"},
            "b.tar": {"members": 5, "refused": {}, "damage": ""},
        },
        "shards": shards,
        "sources": sources,
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))
