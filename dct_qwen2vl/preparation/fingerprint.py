"""What the bytes of a set depend on: its settings, its data, the libraries that encode. run.json holds it, so that a
run goes on only where its shards fit those that are there."""

import argparse
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from dct_qwen2vl.common.files import read_json
from dct_qwen2vl.preparation.archives import list_tars
from dct_qwen2vl.preparation.data_splits import Layout
from dct_qwen2vl.preparation.media_index import TarSource, are_files_older
from dct_qwen2vl.preparation.metadata import MetadataReader
from dct_qwen2vl.preparation.output_folder import RUN_NAME, STATS_NAME, TOOL, is_finished, read_run
from dct_qwen2vl.preparation.plan import Plan

SET_VERSION = 4  # raised when other bytes would be written from the same data and settings


def list_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the bytes of a set depend on, beside the data."""
    names = ("seed", "maxcount", "limit", "max_pixels", "jpeg_quality")
    settings = {name: getattr(arguments, name) for name in names}
    settings["check_pictures"] = arguments.check_images  # the flag's first name: sets begun with it go on
    return {**settings, "split": say_shares(arguments.split), "source_weight": dict(sorted(arguments.source_weight))}


def say_shares(shares: tuple[int, int, int]) -> str:
    return ",".join(map(str, shares))


def list_inputs(data_dir: Path, metadata: list[Path]) -> list[Path]:
    return [*metadata, *list_tars(data_dir)]


def list_sizes(inputs: list[Path]) -> list[list]:
    return [[path.name, path.stat().st_size] for path in inputs]


def is_complete(arguments: argparse.Namespace, metadata: list[Path]) -> bool:
    """Whether an earlier run has written all that this one would write. Where the plan looked for plain files, they are
    looked at as the tars are: none may be newer."""
    run, stats = read_run(arguments.output_dir), read_json(arguments.output_dir / STATS_NAME)
    if arguments.force or arguments.dry_run or not run or not isinstance(stats, dict):
        return False
    if stats.get("fingerprint") != run["fingerprint"] or run.get("version") != SET_VERSION:
        return False
    inputs = list_inputs(arguments.data_dir, metadata)
    if run["settings"] != list_settings(arguments) or run["inputs"] != list_sizes(inputs):
        return False
    begun = (arguments.output_dir / RUN_NAME).stat().st_mtime_ns
    is_older = all(path.stat().st_mtime_ns <= begun for path in inputs)
    if is_older and run["plain_files"]:
        is_older = are_files_older(arguments.data_dir, arguments.output_dir, begun)
    return is_older and all(is_finished(arguments.output_dir / name) for name in stats["shards"])


def describe_run(
    arguments: argparse.Namespace, reader: MetadataReader, tars: list[TarSource], plan: Plan, layout: Layout
) -> dict[str, Any]:
    """What run.json holds. The fingerprint covers all that the shards' bytes depend on."""
    metadata = [[path.name, digest] for path, digest in zip(reader.paths, reader.digests)]
    libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
    libraries = {"pillow": version("pillow"), "libjpeg": libjpeg, "av": version("av")}
    head = {"tool": TOOL, "version": SET_VERSION, "settings": list_settings(arguments)}
    run = {**head, "libraries": libraries, "metadata": metadata, "media": digest_plan(tars, plan, layout)}
    inputs = list_sizes(list_inputs(arguments.data_dir, reader.paths))
    looked_at = {"inputs": inputs, "plain_files": plan.places.sought_in_folders}
    return {**run, "fingerprint": sha256(repr(run).encode()).hexdigest(), **looked_at}


def digest_plan(tars: list[TarSource], plan: Plan, layout: Layout) -> str:
    """SHA-256 of which samples go where and of where their media lie, with their size, ends and names."""
    digest = sha256("".join(f"{tar.path.name}/" for tar in tars).encode())
    places = plan.places
    digest.update(plan.entries.tobytes())
    media = [column[plan.media] for column in (places.source, places.offset, places.size)]
    for column in (plan.media_start, *media, layout.row, layout.copy, layout.bounds):
        digest.update(np.ascontiguousarray(column, np.int64))
    digest.update(plan.content.tobytes())
    digest.update(bytes(places.files.text))
    return digest.hexdigest()
