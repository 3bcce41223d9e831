"""The last step of a set: what the stats beside the shards say together, and the lists of what is in and what is not.

O/stats.json              read + copies = written + skipped + thinned; by source, by split, by reason
O/NAME_filtered.json      the entries that were written, in their old order, as they stood in the metadata
O/skipped.jsonl           a line for each entry left out: index, id, source, reason, detail
O/refused_members.jsonl   a line for each member of a tar that was not used; only where there are any
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dct_qwen2vl.common.files import replacing, write_json
from dct_qwen2vl.preparation.data_splits import SPLITS, Layout
from dct_qwen2vl.preparation.media_index import TarSource, count_refused
from dct_qwen2vl.preparation.metadata import METADATA_NAME, read_range
from dct_qwen2vl.preparation.output_folder import (
    REFUSED_NAME,
    SHARD_NAME,
    SKIPPED_NAME,
    STATS_NAME,
    TOOL,
    stats_path,
    with_new_names,
)
from dct_qwen2vl.preparation.plan import Plan, SkipList, SkippedEntry

# Always said, even where there are none.
USUAL_PARTS = ("images_copied", "images_converted", "videos_copied", "text_only")


@dataclass
class SetCounts:
    """The sums over all shards, and all entries left out.

    written: samples by (source, split).
    """

    skipped: SkipList
    shards: dict[str, int] = field(default_factory=dict)
    parts: Counter = field(default_factory=lambda: Counter(dict.fromkeys(USUAL_PARTS, 0)))
    repairs: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    broken: set[int] = field(default_factory=set)

    def add(self, stats: dict[str, Any]) -> None:
        """Adds what one shard's stats say."""
        self.shards[stats["name"]] = stats["written"]
        self.parts.update(stats["parts"])
        self.repairs.update(stats["repairs"])
        for source, count in Counter(stats["samples"]["source"]).items():
            self.written[stats["sources"][source], stats["split"]] += count
        for entry in stats["skipped"]:
            self.broken.add(entry["index"])
            self.skipped.add(SkippedEntry(**entry))


def summarise(
    output_dir: Path, plan: Plan, layout: Layout, metadata: list[Path], tars: list[TarSource], run: dict[str, Any]
) -> dict[str, Any]:
    """Writes the files named above from the shards' stats. Returns what stats.json holds.

    output_dir: The folder of shards.
    plan: Which entries are written.
    layout: In which order.
    metadata: Files of the metadata.
    tars: The tars of the data folder.
    run: What run.json holds.
    """
    counts = SetCounts(plan.skipped)
    for number in range(len(layout.split_of)):
        data = stats_path(output_dir / SHARD_NAME.format(number)).read_bytes()
        counts.add(json.loads(data, object_hook=with_new_names))
    stats = make_stats(plan, layout, metadata, tars, run, counts)
    write_filtered_metadata(output_dir / filtered_name(metadata), plan, layout, metadata, counts.broken)
    with replacing(output_dir / SKIPPED_NAME) as stream:
        stream.writelines(counts.skipped.in_order())
    write_refused(output_dir / REFUSED_NAME, tars)
    write_json(output_dir / STATS_NAME, stats)
    return stats


def filtered_name(metadata: list[Path]) -> str:
    """Name of the file of filtered metadata."""
    is_usual = len(metadata) == 1 and metadata[0].name.lower() == METADATA_NAME
    return "cambrian737k_filtered.json" if is_usual else "metadata_filtered.json"


def make_stats(
    plan: Plan,
    layout: Layout,
    metadata: list[Path],
    tars: list[TarSource],
    run: dict[str, Any],
    counts: SetCounts,
) -> dict[str, Any]:
    """What stats.json holds. Equal data and settings give an equal file, so it has no times, folders or worker counts.

    plan: Which entries are written.
    layout: In which order.
    metadata: Files of the metadata.
    tars: The tars of the data folder.
    run: What run.json holds.
    counts: Of all shards.
    """
    sources = count_sources(plan, layout, counts)
    totals = {
        name: sum(source[name] for source in sources.values()) for name in ("read", "copies", "thinned", "written")
    }
    for name, count in [*sources.items(), ("all sources", {**totals, "skipped": counts.skipped.reasons()})]:
        if count["read"] + count["copies"] != count["written"] + sum(count["skipped"].values()) + count["thinned"]:
            raise RuntimeError(f"lost count of {name}: {count}")
    return {
        "tool": TOOL,
        "complete": True,
        "fingerprint": run["fingerprint"],
        "metadata": ", ".join(path.name for path in metadata),
        **run["settings"],
        **totals,
        "skipped": counts.skipped.reasons(),
        "repairs": dict(sorted(counts.repairs.items())),
        "parts": dict(counts.parts),
        "splits": {split: sum(source["splits"][split] for source in sources.values()) for split in SPLITS},
        "sources": sources,
        "tars": {tar.path.name: describe_tar(tar) for tar in tars},
        "shards": counts.shards,
    }


def count_sources(plan: Plan, layout: Layout, counts: SetCounts) -> dict[str, dict[str, Any]]:
    """What became of the entries of each source."""
    copies = np.bincount(plan.entries["source"][layout.row[layout.copy > 0]], minlength=len(plan.sources))
    thinned = np.bincount(plan.entries["source"][layout.thinned], minlength=len(plan.sources))
    skipped: dict[str, dict[str, int]] = {name: {} for name in plan.sources}
    for (source, reason), count in sorted(counts.skipped.counts.items()):
        skipped[source][reason] = count
    sources = {}
    for number, name in enumerate(plan.sources):
        splits = {split: counts.written[name, split] for split in SPLITS}
        weighted = {"copies": int(copies[number]), "thinned": int(thinned[number])}
        written = {"written": sum(splits.values()), "skipped": skipped[name], "splits": splits}
        sources[name] = {"read": plan.read[name], **weighted, **written}
    return sources


def describe_tar(tar: TarSource) -> dict[str, Any]:
    return {"members": tar.members, "refused": count_refused(tar), "damage": tar.damage}


def write_filtered_metadata(path: Path, plan: Plan, layout: Layout, metadata: list[Path], broken: set[int]) -> None:
    """Copies the text of every written entry into a new JSON list."""
    written = np.zeros(len(plan), bool)
    written[layout.row] = True
    written &= ~np.isin(plan.entries["index"], np.array(sorted(broken), np.int64))
    separator = b"[\n"
    with replacing(path) as stream:
        for number, source in enumerate(metadata):
            rows = np.flatnonzero(written & (plan.entries["file"] == number))
            with source.open("rb") as file:
                for start, stop in plan.entries[["start", "stop"]][rows].tolist():
                    stream.write(separator + read_range(file.fileno(), source, start, stop).strip())
                    separator = b",\n"
        stream.write(b"\n]\n")


def write_refused(path: Path, tars: list[TarSource]) -> None:
    if not any(tar.refused for tar in tars):
        path.unlink(missing_ok=True)
        return
    with replacing(path) as stream:
        for tar in tars:
            for line in tar.refused.splitlines():
                stream.write((json.dumps({"tar": tar.path.name, **json.loads(line)}) + "\n").encode())
