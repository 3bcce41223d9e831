"""Turn a Cambrian-style data set (a JSON list of conversations, tars of media) into shards for Megatron-Energon.

    python data_preparation.py --data-dir D --output-dir O --energon-prepare

In:  D/cambrian737k.json           list of {"id", "image" or "video", "conversations", ...}; either letter case
     D/*.tar                       the media, under the names that the entries use; plain folders in D serve as well
Out: O/pretrain-000000.tar, ...    WebDataset samples: KEY.jpg, KEY.mp4 or KEY.0.jpg, KEY.1.jpg, ...; KEY.json
     O/cambrian737k_filtered.json  the entries that were written, in their old order
     O/stats.json                  read = written + skipped by reason; the samples of each shard
     O/skipped.jsonl               a line for each entry left out: index, id, reason, detail

First the place of every media file is looked up (raw_data.py), then the plan is made: which entries have all their
media, in which seeded order, in which shard. Then workers write the shards (shard_writing.py, media_conversion.py).
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from media_conversion import UnusableSample
from raw_data import (
    METADATA_NAME,
    MediaIndex,
    PreparationError,
    check_conversations,
    find_metadata,
    iterate_metadata,
    list_media,
)
from shard_writing import PlannedSample, ShardReport, ShardTask, SkippedEntry, describe_skip, replacing, write_shards

SHARD_NAME = "pretrain-{:06d}.tar"
FILTERED_NAME = "cambrian737k_filtered.json"
STATS_NAME = "stats.json"
SKIPPED_NAME = "skipped.jsonl"
# What an earlier run, and `energon prepare` after it, may have left in an output folder.
OWN_FILE = re.compile(r"(pretrain-\d{6}\.tar(\.idx)?|cambrian737k_filtered\.json|stats\.json|skipped\.jsonl)(\.tmp)?")
ENERGON_FOLDER = ".nv-meta"
ENERGON_FILES = (".info.yaml", "split.yaml", "dataset.yaml")

# Energon 5.2.0 (flavors/webdataset/prepare.py) cuts the sorted list of shards at int(n * 0.8) and int(n * 0.9):
# whole shards, and with fewer than ten of them val or test would be empty.
SPLIT = "8,1,1"
MINIMUM_SHARDS = 10
CRUDE_SAMPLE = "11"  # "Crude sample (plain dict for cooking)" in the dialogue of Energon 5.2.0
DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\nauto_decode: false\n"


@dataclass
class Plan:
    """The entries to write, in columns and in the order of the metadata. `skipped` accounts for the others read."""

    media: MediaIndex
    read: int = 0
    skipped: list[SkippedEntry] = field(default_factory=list)
    index: array = field(default_factory=lambda: array("q"))
    offset: array = field(default_factory=lambda: array("q"))
    length: array = field(default_factory=lambda: array("q"))
    first_media: array = field(default_factory=lambda: array("q", [0]))
    media_rows: array = field(default_factory=lambda: array("q"))

    def append(self, offset: int, length: int, media_rows: list[int]) -> None:
        self.index.append(self.read)
        self.offset.append(offset)
        self.length.append(length)
        self.media_rows.extend(media_rows)
        self.first_media.append(len(self.media_rows))

    def sample(self, position: int) -> PlannedSample:
        rows = self.media_rows[self.first_media[position] : self.first_media[position + 1]]
        media = tuple(self.media.location(row) for row in rows)
        return PlannedSample(self.index[position], self.offset[position], self.length[position], media)

    def positions(self) -> list[int]:
        """The positions of all entries that have not been skipped."""
        skipped = {entry.index for entry in self.skipped}
        return [position for position, index in enumerate(self.index) if index not in skipped]


def index_media(data_dir: Path) -> MediaIndex:
    """Look up the members of D/*.tar."""
    media = MediaIndex(data_dir)
    for path in sorted(data_dir.glob("*.tar")):
        media.add_tar(path)
    print(f"Found {len(media.rows)} files in {len(media.paths)} tars")
    compressed = sorted(path.name for pattern in ("*.tar.gz", "*.tgz") for path in data_dir.glob(pattern))
    if compressed:
        print(f"Not read, because compressed (gunzip first): {', '.join(compressed)}", file=sys.stderr)
    return media


def make_plan(metadata: Path, media: MediaIndex) -> Plan:
    """Keep every entry whose conversations are sound and whose media are there."""
    plan = Plan(media)
    for offset, length, entry in iterate_metadata(metadata):
        try:
            check_conversations(entry)
            plan.append(offset, length, [media.find(name) for _, name in list_media(entry)])
        except UnusableSample as unusable:
            plan.skipped.append(describe_skip(plan.read, entry, unusable))
        plan.read += 1
    return plan


def cut_shards(plan: Plan, seed: int, maxcount: int) -> list[list[int]]:
    """Shuffle the plan's positions and cut them into max(10, ceil(n / maxcount)) shards of sizes that differ by at most
    one. Raises PreparationError where there are fewer than ten."""
    positions = plan.positions()
    count = max(MINIMUM_SHARDS, -(-len(positions) // maxcount))
    if len(positions) < count:
        why = f"of {plan.read} entries read, {say_reasons(plan.skipped) or 'none skipped'}"
        example = f"; the first skipped: {plan.skipped[0].detail}" if plan.skipped else ""
        need = f"the split {SPLIT} is cut by whole shards and needs {MINIMUM_SHARDS} of them"
        raise PreparationError(f"only {len(positions)} usable samples ({why}{example}); {need}")
    random.Random(seed).shuffle(positions)
    return [positions[len(positions) * n // count : len(positions) * (n + 1) // count] for n in range(count)]


def make_tasks(plan: Plan, shards: list[list[int]], metadata: Path, output_dir: Path) -> Iterator[ShardTask]:
    """One task a shard, built when it is asked for."""
    for number, positions in enumerate(shards):
        samples = tuple(plan.sample(position) for position in positions)
        yield ShardTask(str(output_dir / SHARD_NAME.format(number)), str(metadata), samples)


def write_data_set(plan: Plan, metadata: Path, arguments: argparse.Namespace) -> list[ShardReport]:
    """Cut and write the shards; adds what the workers skip to the plan. Where broken media leave a shard empty, cut and
    write again without them, because Energon drops an empty shard and may then find no val split."""
    shards = cut_shards(plan, arguments.seed, arguments.maxcount)
    samples = sum(map(len, shards))
    print(
        f"Keeping {samples} of {plan.read} conversations: {len(shards)} shards of up to {max(map(len, shards))} samples"
    )
    if samples < MINIMUM_SHARDS * arguments.maxcount:
        print(f"(fewer than --maxcount {arguments.maxcount} a shard: the split {SPLIT} needs {MINIMUM_SHARDS} shards)")
    clear_output(arguments.output_dir)
    tasks = make_tasks(plan, shards, metadata, arguments.output_dir)
    reports = write_shards(tasks, samples, arguments.num_workers)
    plan.skipped += [entry for report in reports for entry in report.skipped]
    if all(report.written for report in reports):
        return reports
    print("A shard came out empty, for all its media are broken; starting again without them")
    clear_output(arguments.output_dir)
    return write_data_set(plan, metadata, arguments)


def check_output(output_dir: Path, force: bool) -> None:
    """Raise PreparationError unless the folder is new or empty, or `force` and its shards are an earlier run's."""
    existing = sorted(output_dir.iterdir()) if output_dir.exists() else []
    if not existing:
        return
    other = "or name another folder"
    if not force:
        raise PreparationError(f"{output_dir} is not empty; add --force to replace what an earlier run wrote, {other}")
    own = [path for path in existing if OWN_FILE.fullmatch(path.name)]
    if own and not is_own_stats(output_dir / STATS_NAME):
        raise PreparationError(f"{output_dir} holds {own[0].name}, which this tool did not write; move it {other}")
    foreign = [path for pattern in ("*.tar", "*.tgz") for path in output_dir.rglob(pattern) if path not in own]
    if foreign:
        raise PreparationError(
            f"{foreign[0]} is not this tool's, and energon would take it for a shard; move it {other}"
        )


def is_own_stats(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["tool"] == "data_preparation"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def clear_output(output_dir: Path) -> None:
    """Remove what this tool and `energon prepare` wrote, nothing else; mark the folder as this tool's, not complete."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / STATS_NAME, {"tool": "data_preparation", "complete": False})
    for path in sorted(output_dir.iterdir()):
        if OWN_FILE.fullmatch(path.name) and path.name != STATS_NAME:
            path.unlink()
    for name in ENERGON_FILES:
        (output_dir / ENERGON_FOLDER / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (output_dir / ENERGON_FOLDER).rmdir()  # stays where someone put a file of their own


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as stream:
        stream.write((json.dumps(value, indent=2) + "\n").encode())


def write_filtered_metadata(path: Path, plan: Plan, metadata: Path) -> None:
    """Copy the text of every written entry into a new JSON list."""
    separator = b"[\n"
    with metadata.open("rb") as source, replacing(path) as stream:
        for position in plan.positions():
            source.seek(plan.offset[position])
            stream.write(separator + source.read(plan.length[position]))
            separator = b",\n"
        stream.write(b"\n]\n")


def write_skipped(path: Path, skipped: list[SkippedEntry]) -> None:
    with replacing(path) as stream:
        for entry in sorted(skipped, key=lambda entry: entry.index):
            stream.write((json.dumps(asdict(entry)) + "\n").encode())


def make_stats(plan: Plan, reports: list[ShardReport], metadata: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What stats.json holds: no times, folders or worker counts, so that equal data and settings give an equal file."""
    parts = Counter()
    for report in reports:
        parts.update(report.parts)
    written = sum(report.written for report in reports)
    if plan.read != written + len(plan.skipped):
        raise RuntimeError(f"lost count: read {plan.read}, written {written}, skipped {len(plan.skipped)}")
    return {
        "tool": "data_preparation",
        "complete": True,
        "metadata": metadata.name,
        "seed": arguments.seed,
        "maxcount": arguments.maxcount,
        "read": plan.read,
        "written": written,
        "skipped": count_reasons(plan.skipped),
        "parts": {name: parts[name] for name in ("images_copied", "images_converted", "clips_copied", "text_only")},
        "shards": {report.name: report.written for report in reports},
    }


def count_reasons(skipped: list[SkippedEntry]) -> dict[str, int]:
    return dict(sorted(Counter(entry.reason for entry in skipped).items()))


def say_reasons(skipped: list[SkippedEntry]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in count_reasons(skipped).items())


def say_result(plan: Plan, stats: dict[str, Any], output_dir: Path, seconds: float) -> None:
    reasons = f" ({say_reasons(plan.skipped)})" if plan.skipped else ""
    print(f"Filtered metadata with {stats['written']} conversations: {output_dir / FILTERED_NAME}")
    print(f"read {stats['read']} = written {stats['written']} + skipped {len(plan.skipped)}{reasons}")
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in stats["parts"].items()))
    rate = f"{seconds:.1f} s, {stats['written'] / seconds:.0f} samples/s"
    print(f"Conversion done: {len(stats['shards'])} shards in {output_dir} ({rate})")


def dialogue_command(output_dir: Path) -> str:
    """The dialogue with `energon prepare` as one line to type."""
    beside_python = Path(sys.executable).with_name("energon")
    energon = str(beside_python) if shutil.which("energon") is None and beside_python.exists() else "energon"
    return f"printf '{SPLIT}\\ny\\n{CRUDE_SAMPLE}\\n' | {shlex.quote(energon)} prepare {shlex.quote(str(output_dir))}"


def energon_prepare(output_dir: Path, num_workers: int) -> None:
    """Answer this interpreter's `energon prepare`, then write a dataset.yaml that leaves the media as bytes."""
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", f"--num-workers={max(1, num_workers)}"]
    answers = f"{SPLIT}\ny\n{CRUDE_SAMPLE}\n"
    done = subprocess.run([*command, str(output_dir)], input=answers, capture_output=True, text=True)
    folder = output_dir / ENERGON_FOLDER
    if done.returncode != 0 or not (folder / "split.yaml").is_file():
        last_line = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise PreparationError(f"energon prepare failed: {last_line}; to see it whole: {dialogue_command(output_dir)}")
    with replacing(folder / "dataset.yaml") as stream:
        stream.write(DATASET_YAML.encode())
    splits = ", ".join(f"{name} {count}" for name, count in count_splits(output_dir).items())
    print(f"Energon metadata in {folder}; samples: {splits}")


def count_splits(output_dir: Path) -> dict[str, int]:
    """The samples of each split, as Energon counts them. Raises PreparationError if one is empty."""
    import yaml

    folder = output_dir / ENERGON_FOLDER
    counts = yaml.safe_load((folder / ".info.yaml").read_text())["shard_counts"]
    splits = yaml.safe_load((folder / "split.yaml").read_text())["split_parts"]
    samples = {name: sum(counts[shard] for shard in splits.get(name, [])) for name in ("train", "val", "test")}
    for name, count in samples.items():
        if not count:
            raise PreparationError(
                f"the {name} split of {output_dir} is empty; prepare again with a smaller --maxcount"
            )
    return samples


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    workers = "worker processes; 0: work in this process (default: the cores, %(default)s)"
    maxcount = "samples a shard at most, fewer where ten shards need it (default: %(default)s)"
    add("--data-dir", type=Path, required=True, metavar="D", help=f"folder with {METADATA_NAME} and the tars")
    add("--output-dir", type=Path, required=True, metavar="O", help="folder for the shards, new or empty")
    add("--num-workers", type=int, default=cores, metavar="N", help=workers)
    add("--seed", type=int, default=0, metavar="N", help="seed of the shuffle before sharding (default: %(default)s)")
    add("--maxcount", type=int, default=1000, metavar="N", help=maxcount)
    add("--force", action="store_true", help="replace what an earlier run wrote in the output folder")
    add("--energon-prepare", action="store_true", help=f"also run `energon prepare` (split {SPLIT}, crude samples)")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.num_workers < 0:
        parser.error(f"--num-workers must be 0 or more, not {arguments.num_workers}")
    if arguments.maxcount < 1:
        parser.error(f"--maxcount must be 1 or more, not {arguments.maxcount}")
    output_dir, data_dir = arguments.output_dir.resolve(), arguments.data_dir.resolve()
    if output_dir == data_dir or output_dir in data_dir.parents:
        parser.error("--output-dir must not be or contain --data-dir: energon would take the source tars for shards")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """All of the work. Raises PreparationError or OSError."""
    output_dir = arguments.output_dir
    metadata = find_metadata(arguments.data_dir)
    check_output(output_dir, arguments.force)
    plan = make_plan(metadata, index_media(arguments.data_dir))
    start = time.perf_counter()
    reports = write_data_set(plan, metadata, arguments)
    seconds = time.perf_counter() - start
    write_filtered_metadata(output_dir / FILTERED_NAME, plan, metadata)
    write_skipped(output_dir / SKIPPED_NAME, plan.skipped)
    stats = make_stats(plan, reports, metadata, arguments)
    write_json(output_dir / STATS_NAME, stats)
    say_result(plan, stats, output_dir, seconds)
    if arguments.energon_prepare:
        energon_prepare(output_dir, arguments.num_workers)
    else:
        print(f"Next: {dialogue_command(output_dir)}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        prepare(arguments)
    except (PreparationError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"data_preparation.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("data_preparation.py: interrupted; start again with --force", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
