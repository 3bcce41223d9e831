"""What data preparation says on the screen."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dct_qwen2vl.preparation.archives import name_unread
from dct_qwen2vl.preparation.config import PreparationConfig
from dct_qwen2vl.preparation.data_splits import SPLITS, Layout, say_shares
from dct_qwen2vl.preparation.media_index import TarSource, count_refused
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.output_folder import REFUSED_NAME
from dct_qwen2vl.preparation.plan import Plan


def say_tars(tars: list[TarSource], config: PreparationConfig) -> None:
    """Prints how many files the tars have and, on stderr, which are not used.

    tars: The tars of the data folder.
    config: The settings.

    Raises PreparationError for files that are not used, with --strict.
    """
    if tars:
        print(f"Found {sum(tar.members for tar in tars)} files in {len(tars)} tars")
    else:
        print(f"Found no tars: media are looked for in the folders of {config.data_dir}")
    for line in name_unread(config.data_dir):
        print(line, file=sys.stderr)
    for tar in tars:
        findings = []
        if tar.damage:
            findings.append(f"only the {tar.members} members before its damage are used: {tar.damage}")
        if tar.refused:
            reasons = ", ".join(f"{reason} {count}" for reason, count in count_refused(tar).items())
            findings.append(f"members refused ({reasons}), by name in {REFUSED_NAME}")
        if findings and config.strict:
            raise PreparationError(f"--strict: {tar.path}: {'; '.join(findings)}")
        if findings:
            print(f"{tar.path.name}: {'; '.join(findings)}", file=sys.stderr)


def say_plan(plan: Plan, layout: Layout, config: PreparationConfig) -> None:
    """Prints what will be written.

    plan: Which entries are written.
    layout: In which order.
    config: The settings.
    """
    sizes = np.diff(layout.bounds)
    read, samples = sum(plan.read.values()), len(layout.row)
    print(f"Keeping {len(plan)} of {read} conversations: {len(sizes)} shards of up to {sizes.max()} samples")
    if samples != len(plan):
        print(f"({samples} samples, by --source-weight)")
    if sizes.max() < config.maxcount and 1 < len(sizes) == sum(config.split):
        split = say_shares(config.split)
        print(f"(fewer than --maxcount {config.maxcount} a shard: the split {split} needs {len(sizes)} shards)")
    print("Samples: " + ", ".join(f"{name} {count}" for name, count in layout.counts.items()))


def say_dry_run(plan: Plan, layout: Layout) -> None:
    """Prints the table of sources and splits. Nothing has been written.

    plan: Which entries would be written.
    layout: In which order.
    """
    split_of = np.repeat([SPLITS.index(name) for name in layout.split_of], np.diff(layout.bounds))
    print(f"{'source':<24}{'read':>10}{'usable':>10}" + "".join(f"{name:>10}" for name in SPLITS))
    usable = np.bincount(plan.entries["source"], minlength=len(plan.sources))
    source = plan.entries["source"][layout.row]
    for number, name in enumerate(plan.sources):
        splits = np.bincount(split_of[source == number], minlength=len(SPLITS))
        counts = [plan.read[name], usable[number], *splits]
        print(f"{name:<24}" + "".join(f"{count:>10}" for count in counts))
    for reason, count in plan.skipped.reasons().items():
        print(f"would be skipped: {reason} {count}")
    print("Dry run: images and videos have not been read, nothing has been written")


def own_shards(layout: Layout, part: tuple[int, int] | None) -> list[int]:
    """Numbers of the shards that a part of the work writes.

    layout: All shards.
    part: (number from 1, parts). None: all shards.
    """
    number, parts = part or (1, 1)
    return list(range(number - 1, len(layout.split_of), parts))


def say_part(config: PreparationConfig, layout: Layout, seconds: float, samples: int) -> None:
    """Prints what a part of the work has written.

    config: The settings, with their part.
    layout: All shards.
    seconds: Time that it took.
    samples: Samples that this part has written.
    """
    number, parts = config.part
    shards = len(own_shards(layout, config.part))
    print(f"Part {number} of {parts} done: {shards} of {len(layout.split_of)} shards{say_rate(seconds, samples)}")
    print("When all parts are done, run the same command without --part: it completes the set")


def say_rate(seconds: float, samples: int) -> str:
    """What follows a number of shards; nothing where they had all been there."""
    return f" ({seconds:.1f} s, {samples / max(seconds, 1e-9):.0f} samples/s)" if samples else ""


def say_result(stats: dict[str, Any], filtered: Path, seconds: float, samples: int) -> None:
    """Prints the counts of a complete set.

    stats: What stats.json holds.
    filtered: The filtered metadata.
    seconds: Time that it took.
    samples: Samples that this run has written.
    """
    reasons = ", ".join(f"{reason} {count}" for reason, count in stats["skipped"].items())
    weighted = "".join(f" {sign} {name} {stats[name]}" for sign, name in (("+", "copies"),) if stats[name])
    thinned = f" + thinned {stats['thinned']}" if stats["thinned"] else ""
    skipped = f"{sum(stats['skipped'].values())}{f' ({reasons})' if reasons else ''}"
    print(f"Filtered metadata: {filtered}")
    print(f"read {stats['read']}{weighted} = written {stats['written']} + skipped {skipped}{thinned}")
    for name in ("parts", "repairs"):
        if stats[name]:
            print(", ".join(f"{what.replace('_', ' ')} {count}" for what, count in stats[name].items()))
    print(f"Conversion done: {len(stats['shards'])} shards in {filtered.parent}{say_rate(seconds, samples)}")
