"""Turns a LLaVA-style data set (JSON metadata of conversations, tars or folders of media) into shards for Energon.

    python data_preparation.py --data-dir D --output-dir O --energon-prepare

In:  D/cambrian737k.json           list of {"id", "image" or "video", "conversations", ...}, or JSON lines; --metadata
     D/*.tar, D/*.tar.gz           the media, under the names that the entries use; plain folders in D serve as well
Out: O/pretrain-000000.tar, ...    WebDataset samples: KEY.jpg, KEY.mp4 or KEY.0.jpg, KEY.1.png, ...; KEY.json
     O/pretrain-000000.stats.json  what is in the shard, its SHA-256, and what was left out of it
     O/cambrian737k_filtered.json  the entries that were written, in their old order
     O/stats.json                  read + copies = written + skipped + thinned, by source and reason
     O/skipped.jsonl               a line for each entry left out
     O/report.html                 the same as a page with figures and samples

The same data and settings give the same bytes, for any number of workers, in one run, in several after crashes, or in
parts on several machines (--part 1/4 ... --part 4/4, then the same command without --part; prepare_slurm.sh).

The work is done in dct_qwen2vl/preparation/. First everything is planned (metadata.py, entries.py, media_index.py,
plan.py, data_splits.py). Then workers write the shards (shards.py, conversion.py). Then the counts are put together
(summary.py).
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dct_qwen2vl.common.files import read_json, remove
from dct_qwen2vl.common.scripts import UserError, run_main, run_program
from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.preparation import data_splits
from dct_qwen2vl.preparation.config import PreparationConfig, parse_arguments
from dct_qwen2vl.preparation.conversion import ConversionOptions
from dct_qwen2vl.preparation.data_splits import Layout, say_shares
from dct_qwen2vl.preparation.energon_metadata import dialogue_command, energon_prepare, is_cut_alike
from dct_qwen2vl.preparation.fingerprint import describe_run, is_complete
from dct_qwen2vl.preparation.media_index import TarSource, index_tars, make_readable
from dct_qwen2vl.preparation.messages import own_shards, say_dry_run, say_part, say_plan, say_result, say_tars
from dct_qwen2vl.preparation.metadata import MetadataReader, PreparationError, find_metadata
from dct_qwen2vl.preparation.output_folder import (
    REPORT_NAME,
    SHARD_NAME,
    SKIPPED_NAME,
    STATS_NAME,
    WORK_FOLDER,
    check_output,
    claim,
    is_finished,
    list_leftovers,
    locked,
    read_stats,
    remove_conclusions,
    remove_leftovers,
    remove_work,
    stats_path,
)
from dct_qwen2vl.preparation.plan import Collector, Plan, check_all, make_plan
from dct_qwen2vl.preparation.shards import make_task, write_shard
from dct_qwen2vl.preparation.summary import filtered_name, summarise


def prepare(config: PreparationConfig) -> int:
    """All of the work. Returns the exit status. Raises PreparationError or OSError."""
    metadata = find_metadata(config.data_dir, config.metadata)
    check_output(config.output_dir, config.force)
    if is_complete(config, metadata):
        print(f"{config.output_dir} is complete, nothing is left to do; to write it again, add --force")
        stats = read_stats(config.output_dir / STATS_NAME)
    else:
        stats = write_set(config, metadata)
    if stats and config.strict:
        refuse_findings(config.output_dir, stats)
    return finish(config, stats) if stats else 0


def write_set(config: PreparationConfig, metadata: list[Path]) -> dict[str, Any] | None:
    """Plans, writes and sums up.

    Returns the set's stats. After a dry run or a part the set is not complete: returns None.
    """
    with WorkerPool(config.num_workers) as pool:
        reader = MetadataReader(metadata, config.limit)
        with tqdm(desc="Checking entries", unit="entry", leave=False) as bar:
            collector = check_all(reader, pool, config.strict, bar.update)
        with run_lock(config):
            tars, plan, layout, run = plan_set(pool, config, reader, collector)
            if config.dry_run:
                say_dry_run(plan, layout)
                return None
            seconds, samples = write_missing(pool, config, metadata, tars, plan, layout)
            if config.part:
                say_part(config, layout, seconds, samples)
                return None
            stats = summarise(config.output_dir, plan, layout, metadata, tars, run)
            remove_work(config.output_dir)
    say_result(stats, config.output_dir / filtered_name(metadata), seconds, samples)
    return stats


def refuse_findings(output_dir: Path, stats: dict[str, Any]) -> None:
    """Raises PreparationError for findings that --strict would have stopped at, in a set that was written without it.

    stats: of the set. Shards that --strict wrote have no findings.
    """
    kinds = {"skipped": stats["skipped"], "repaired": stats["repairs"]}
    findings = [f"{kind}: {what} {count}" for kind, counts in kinds.items() for what, count in counts.items()]
    findings += [f"not read whole: {name}" for name, tar in stats["tars"].items() if tar["damage"] or tar["refused"]]
    if findings:
        remedy = f"see {output_dir / SKIPPED_NAME}, repair the data and add --force, which names the first of them"
        raise PreparationError(f"--strict: {output_dir} was written without it ({', '.join(findings)}); {remedy}")


# Planning


def plan_set(
    pool: WorkerPool, config: PreparationConfig, reader: MetadataReader, collector: Collector
) -> tuple[list[TarSource], Plan, Layout, dict[str, Any]]:
    """Finds the media, decides what goes where, and marks the output folder. A dry run does not mark it."""
    data_dir, output_dir = config.data_dir, config.output_dir
    with planning_lock(config) as work:
        tars = index_tars(data_dir, work, pool)
        say_tars(tars, config)
        plan = make_plan(collector, reader.paths, tars, data_dir, output_dir, config.strict)
        tars = [replace(tar, index=None) for tar in tars]
        layout = lay_out(plan, config)
        say_plan(plan, layout, config)
        run = describe_run(config, reader, tars, plan, layout)
        if not config.dry_run:
            claim(output_dir, run, config.force)
    return tars, plan, layout, run


def lay_out(plan: Plan, config: PreparationConfig) -> Layout:
    """Splits, weighs, shuffles and cuts. Raises PreparationError where that is not possible."""
    names = {name: number for number, name in enumerate(plan.sources)}
    unknown = [name for name, _ in config.source_weight if name not in names]
    if unknown:
        raise PreparationError(
            f"--source-weight {unknown[0]}: no such source; the sources are {', '.join(sorted(names))}"
        )
    weights = {names[name]: weight for name, weight in config.source_weight}
    shares, seed = config.split, config.seed
    source, digest = plan.entries["source"], plan.entries["digest"]
    group = data_splits.group_entries(plan.media_start, plan.content, digest)
    identity = data_splits.identify(plan.media_start, plan.content, digest)
    split = data_splits.split_entries(group, source, identity, shares, seed)
    copies = data_splits.count_copies(split, source, digest, weights, seed)
    try:
        return data_splits.lay_out(split, copies, digest, shares, config.maxcount, seed)
    except UserError as error:
        reasons = ", ".join(f"{reason} {count}" for reason, count in plan.skipped.reasons().items()) or "none skipped"
        example = f"; the first skipped: {plan.skipped.first_detail()}" if len(plan.skipped) else ""
        read = sum(plan.read.values())
        if not len(plan):
            raise PreparationError(f"none of the {read} entries read can be used ({reasons}{example})") from error
        raise PreparationError(
            f"{error} (of {read} entries read, {len(plan)} are usable: {reasons}{example})"
        ) from error


# Writing


@contextlib.contextmanager
def run_lock(config: PreparationConfig) -> Iterator[None]:
    """Keeps other runs from this folder. Parts keep the same part from it, and a run of the whole."""
    if config.dry_run:
        yield
        return
    work = config.output_dir / WORK_FOLDER
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(work / "run.lock", shared=bool(config.part)))
        if config.part:
            locks.enter_context(locked(work / "part-{}-of-{}.lock".format(*config.part)))
        yield


@contextlib.contextmanager
def planning_lock(config: PreparationConfig) -> Iterator[Path | None]:
    """The folder for indexes and unpacked tars, None in a dry run, which writes nothing.

    One part at a time works in it. The others wait for what it finds.
    """
    if config.dry_run:
        yield None
        return
    work = config.output_dir / WORK_FOLDER
    with locked(work / "planning.lock", wait=True):
        yield work


@contextlib.contextmanager
def finish_lock(config: PreparationConfig, is_due: bool) -> Iterator[None]:
    """Keeps other runs from this folder and clears what killed ones left, where there is something to write or to
    clear.

    is_due: whether there is something to write.
    A part may meet others here and does without the lock.
    """
    output_dir = config.output_dir
    if config.part or not (is_due or list_leftovers(output_dir)):
        yield
        return
    with run_lock(config):
        for path in list_leftovers(output_dir):
            remove(path)  # not .work, where the lock lies
        try:
            yield
        finally:
            remove_work(output_dir)


def write_missing(
    pool: WorkerPool,
    config: PreparationConfig,
    metadata: list[Path],
    tars: list[TarSource],
    plan: Plan,
    layout: Layout,
) -> tuple[float, int]:
    """Writes the shards of this part that are not finished. Returns the seconds it took and the number of samples."""
    output_dir, start = config.output_dir, time.perf_counter()
    shards = {number: output_dir / SHARD_NAME.format(number) for number in own_shards(layout, config.part)}
    missing = [number for number, shard in shards.items() if not is_finished(shard)]
    samples = int(sum(layout.bounds[number + 1] - layout.bounds[number] for number in missing))
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are finished already")
    remove_leftovers(output_dir, tuple(f"{path.stem}." for path in shards.values()) if config.part else ("",))
    if missing:
        remove_conclusions(output_dir)
        make_readable(tars, config.num_workers)
    files = (config.data_dir, tuple(metadata), tuple(tar.readable for tar in tars))
    options = ConversionOptions(config.max_pixels, config.jpeg_quality, config.check_images)
    tasks = (make_task(plan, layout, number, shards[number], files, options, config.strict) for number in missing)
    with tqdm(total=samples, desc="Processing images", unit="sample") as bar:
        for _ in pool.map(write_shard, tasks, bar.update):
            pass
    return time.perf_counter() - start, samples


def finish(config: PreparationConfig, stats: dict[str, Any]) -> int:
    """What may follow a complete set: the report, and Energon's metadata. Returns the exit status."""
    output_dir, split = config.output_dir, say_shares(config.split)
    wants_report = not config.no_report and not (output_dir / REPORT_NAME).exists()
    with finish_lock(config, wants_report or config.energon_prepare), ThreadPoolExecutor(1) as beside:
        if config.energon_prepare:  # while the report is drawn: neither reads what the other writes
            shards = [output_dir / name for name in stats["shards"]]
            split_of = tuple(read_json(stats_path(shard))["split"] for shard in shards)
            prepared = beside.submit(energon_prepare, output_dir, split, split_of, config.num_workers)
        if wants_report:
            from dct_qwen2vl.preparation.report.writing import write_report

            print(f"Report: {write_report(output_dir, say=print)}")
        if config.energon_prepare:
            print(prepared.result())
    if config.energon_prepare:
        return 0
    if is_cut_alike(config.split, len(stats["shards"])):
        print(f"Next: {dialogue_command(output_dir, split)}")
    else:
        print(f"Next: run the same command with --energon-prepare (energon's dialogue does not cut {split} exactly)")
    return 0


def verify_set(config: PreparationConfig) -> int:
    """Reads the set back. Returns the exit status."""
    from dct_qwen2vl.preparation.verification import verify

    problems = verify(config.output_dir, config.num_workers)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    config = parse_arguments(argv)
    work = verify_set if config.verify else prepare
    return run_main("data_preparation.py", lambda: work(config), config.debug, goes_on=True)


if __name__ == "__main__":
    run_program("data_preparation.py", main)
