"""What the bytes of a set depend on: its settings, its data, the libraries that encode.

run.json holds it. A run goes on only where its shards fit those that are there.
"""

from dataclasses import fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from dct_qwen2vl.common.files import read_json
from dct_qwen2vl.preparation.archives import list_tars
from dct_qwen2vl.preparation.config import FIRST_IN_FINGERPRINT, PreparationConfig
from dct_qwen2vl.preparation.data_splits import Layout
from dct_qwen2vl.preparation.media_index import TarSource, are_files_older
from dct_qwen2vl.preparation.metadata import MetadataReader
from dct_qwen2vl.preparation.output_folder import RUN_NAME, STATS_NAME, TOOL, is_finished, read_run
from dct_qwen2vl.preparation.plan import Plan

SET_VERSION = 5  # raised when other bytes would be written from the same data and settings


def list_settings(config: PreparationConfig) -> dict[str, Any]:
    """The settings that the bytes of a set depend on, as run.json holds them: under their first names."""
    about = {each.name: each for each in fields(config) if each.metadata["in_fingerprint"]}
    later = [name for name in about if name not in FIRST_IN_FINGERPRINT]
    changed = [name for name in later if getattr(config, name) != about[name].default]
    return {
        about[name].metadata["first_name"] or name: about[name].metadata["record"](getattr(config, name))
        for name in (*FIRST_IN_FINGERPRINT, *changed)
    }


def list_inputs(data_dir: Path, metadata: list[Path]) -> list[Path]:
    return [*metadata, *list_tars(data_dir)]


def list_sizes(inputs: list[Path]) -> list[list]:
    return [[path.name, path.stat().st_size] for path in inputs]


def is_complete(config: PreparationConfig, metadata: list[Path]) -> bool:
    """Whether an earlier run has written all that this one would write.

    config: The settings.
    metadata: Files of the metadata.

    No tar may be newer than that run. Plain files may not be newer either, if the plan looked for plain files.
    """
    run, stats = read_run(config.output_dir), read_json(config.output_dir / STATS_NAME)
    if config.force or config.dry_run or not run or not isinstance(stats, dict):
        return False
    if stats.get("fingerprint") != run["fingerprint"] or run.get("version") != SET_VERSION:
        return False
    inputs = list_inputs(config.data_dir, metadata)
    if run["settings"] != list_settings(config) or run["inputs"] != list_sizes(inputs):
        return False
    begun = (config.output_dir / RUN_NAME).stat().st_mtime_ns
    is_older = all(path.stat().st_mtime_ns <= begun for path in inputs)
    if is_older and run["plain_files"]:
        is_older = are_files_older(config.data_dir, config.output_dir, begun)
    return is_older and all(is_finished(config.output_dir / name) for name in stats["shards"])


def describe_run(
    config: PreparationConfig, reader: MetadataReader, tars: list[TarSource], plan: Plan, layout: Layout
) -> dict[str, Any]:
    """What run.json holds. The fingerprint covers all that the shards' bytes depend on.

    config: The settings.
    reader: Has read all metadata.
    tars: The tars of the data folder.
    plan: Which entries are written.
    layout: In which order.
    """
    metadata = [[path.name, digest] for path, digest in zip(reader.paths, reader.digests)]
    libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
    libraries = {"pillow": version("pillow"), "libjpeg": libjpeg, "av": version("av")}
    head = {"tool": TOOL, "version": SET_VERSION, "settings": list_settings(config)}
    run = {**head, "libraries": libraries, "metadata": metadata, "media": digest_plan(tars, plan, layout)}
    inputs = list_sizes(list_inputs(config.data_dir, reader.paths))
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
