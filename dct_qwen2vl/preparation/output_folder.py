"""The output folder of data preparation: whose it is, what in it is finished, and how files get into it.

O/run.json                       what the bytes of the shards depend on; marks the folder as this tool's
O/pretrain-000000.tar            a finished shard, if its stats lie beside it
O/pretrain-000000.stats.json
O/*.xxxxxxxx.tmp                 a file that is being written; left over only by a run that was killed
O/report/, O/.nv-meta/           what report.html and `energon prepare` leave, and the same of each
O/.work                          indexes of the source tars, unpacked .tar.gz, locks; removed at the end
"""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.files import UNFINISHED, read_json, remove, write_json
from dct_qwen2vl.common.locks import flock
from dct_qwen2vl.data.energon_files import FOLDER as ENERGON_FOLDER
from dct_qwen2vl.preparation.metadata import PreparationError

SHARD_NAME = "pretrain-{:06d}.tar"
RUN_NAME, STATS_NAME, SKIPPED_NAME, REFUSED_NAME = "run.json", "stats.json", "skipped.jsonl", "refused_members.jsonl"
REPORT_NAME = "report.html"
WORK_FOLDER = ".work"
TOOL = "data_preparation"
# What this tool, and `energon prepare` after it, leave in an output folder.
OWN_FILE = re.compile(
    r"(pretrain-\d{6}\.(tar|tar\.idx|stats\.json)|(run|stats)\.json|(skipped|refused_members)\.jsonl"
    r"|(cambrian737k|metadata)_filtered\.json|report\.html)"
    rf"({UNFINISHED})?"
)
TEMPORARY = re.compile(rf".+{UNFINISHED}")
REPORT_FOLDER = "report"
OWN_FILE_IN = {
    ENERGON_FOLDER: re.compile(rf"(\.info|split|dataset)\.yaml({UNFINISHED})?"),
    REPORT_FOLDER: re.compile(rf".+\.png({UNFINISHED})?"),
}
# Names in the stats of sets that earlier versions wrote or began.
OLD_NAMES = {
    "broken_clip": "broken_video",
    "unsupported_clip": "unsupported_video",
    "clip_too_large": "video_too_large",
    "clip_too_long": "video_too_long",
    "clips_copied": "videos_copied",
    "clips_remuxed": "videos_remuxed",
    "clips_of_frames": "videos_of_frames",
}
NOT_HASHED = ("fingerprint", "inputs", "plain_files")  # of run.json


def stats_path(shard: Path) -> Path:
    """The file beside a shard: pretrain-000000.tar -> pretrain-000000.stats.json"""
    return shard.with_suffix(".stats.json")


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """An object of stats or of skipped.jsonl with today's names, whatever version wrote it.

    It serves `json.loads` as `object_hook`.
    """
    renamed = {OLD_NAMES.get(name, name): value for name, value in values.items()}
    if isinstance(renamed.get("reason"), str):
        renamed["reason"] = OLD_NAMES.get(renamed["reason"], renamed["reason"])
    return renamed


def read_stats(path: Path) -> Any:
    """The stats of a shard or of a set. None where the file is missing or is no JSON."""
    return read_json(path, object_hook=with_new_names)


def read_run(output_dir: Path) -> dict[str, Any] | None:
    """The object in run.json. None if this tool did not write it."""
    run = read_json(output_dir / RUN_NAME)
    return run if isinstance(run, dict) and run.get("tool") == TOOL else None


def check_output(output_dir: Path, force: bool) -> None:
    """Checks that a folder may be written to: it is new, empty or this tool's.

    output_dir: The folder.
    force: Whether it may hold other files, unless Energon would take them for shards.

    Raises PreparationError.
    """
    if not output_dir.is_dir() and (output_dir.exists() or output_dir.is_symlink()):
        raise PreparationError(f"{output_dir} is no folder; --output-dir takes the name of a folder, new or empty")
    present = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    present = [path for path in present if path.name != WORK_FOLDER and not is_leftover(path)]
    if not present or (read_run(output_dir) and not force):
        return
    if not force:
        raise PreparationError(f"{output_dir} is not empty and holds no run of this tool; add --force, or name another")
    own = [path for path in present if OWN_FILE.fullmatch(path.name)]
    if own and not read_run(output_dir):
        raise PreparationError(
            f"{output_dir} holds {own[0].name}, which this tool did not write; move it or name another folder"
        )
    foreign = [path for pattern in ("*.tar", "*.tgz") for path in output_dir.rglob(pattern) if path not in own]
    if foreign:
        raise PreparationError(
            f"{foreign[0]} is not this tool's, and energon would take it for a shard; move it or name another folder"
        )


def is_leftover(path: Path, own: re.Pattern = OWN_FILE) -> bool:
    """Whether a run of this tool was killed while it wrote the file."""
    return bool(TEMPORARY.fullmatch(path.name) and own.fullmatch(path.name))


def claim(output_dir: Path, run: dict[str, Any], force: bool) -> None:
    """Marks the folder as that of this run.

    output_dir: The folder.
    run: What run.json holds.
    force: Whether another run's shards may be removed.

    Raises PreparationError if the folder is another run's and `force` is false.
    """
    earlier = read_run(output_dir)
    if earlier and not force:
        if earlier.get("fingerprint") == run["fingerprint"]:
            return
        raise PreparationError(
            f"{output_dir} holds shards of another run (different: {describe_difference(earlier, run)}); "
            "name another folder, or add --force to replace them"
        )
    clear_output(output_dir)
    write_json(output_dir / RUN_NAME, run)


def describe_difference(earlier: dict[str, Any], run: dict[str, Any]) -> str:
    """ "seed was 0, now is 1", or the kind of input that has changed."""
    before, now = earlier.get("settings", {}), run["settings"]
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        return ", ".join(f"{name} was {before.get(name)}, now is {now.get(name)}" for name in names)
    return ", ".join(name for name in run if run[name] != earlier.get(name) and name not in NOT_HASHED)


def clear_output(output_dir: Path) -> None:
    """Removes what this tool and `energon prepare` wrote, except .work. Nothing else is removed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(output_dir.iterdir()):
        if OWN_FILE.fullmatch(path.name) and path.name != RUN_NAME:
            path.unlink()
    for name in OWN_FILE_IN:
        remove_own_folder(output_dir / name)
    remove(output_dir / RUN_NAME)  # last: until then the folder is known to be ours


def remove_own_folder(folder: Path) -> None:
    """Removes our files from a folder, and the folder. It stays where somebody put other files."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if OWN_FILE_IN[folder.name].fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_conclusions(output_dir: Path) -> None:
    """Removes what was made from the complete set."""
    for name in (STATS_NAME, REPORT_NAME):
        (output_dir / name).unlink(missing_ok=True)
    for name in OWN_FILE_IN:
        remove_own_folder(output_dir / name)


def remove_leftovers(output_dir: Path, prefixes: tuple[str, ...]) -> None:
    """Removes temporary files that a killed run left behind.

    output_dir: The folder.
    prefixes: Beginnings of the names. Other files stay.
    """
    for path in sorted(output_dir.iterdir()):
        if is_leftover(path) and path.name.startswith(prefixes):
            remove(path)


def list_leftovers(output_dir: Path) -> list[Path]:
    """What killed runs left in the folder of a complete set and in the folders within it."""
    owned = [(output_dir, OWN_FILE), *((output_dir / name, own) for name, own in OWN_FILE_IN.items())]
    folders = [(folder, own) for folder, own in owned if folder.is_dir()]
    paths = [path for folder, own in folders for path in sorted(folder.iterdir()) if is_leftover(path, own)]
    work = output_dir / WORK_FOLDER
    return [*paths, work] if work.exists() else paths


def is_finished(shard: Path) -> bool:
    """Whether a shard and its stats are there. Both are put there by a rename, the stats last."""
    stats = read_json(stats_path(shard))
    return isinstance(stats, dict) and shard.is_file() and shard.stat().st_size == stats.get("bytes")


def remove_work(output_dir: Path) -> None:
    """Removes the work folder with its indexes and unpacked tars."""
    shutil.rmtree(output_dir / WORK_FOLDER, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends. Without locks in the file system, it does nothing.

    path: File of the lock.
    shared: Whether several processes may hold it so.
    wait: Whether to wait for another process that has it.

    Raises PreparationError if another process has it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            folder = path.parent.parent
            raise PreparationError(f"another run is writing to {folder}; wait until it has ended, or end it") from None
        yield
