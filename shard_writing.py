"""Writes WebDataset shards in worker processes, each shard by one worker from its task alone.

So the bytes do not depend on the number of workers, no media pass between processes, and a worker holds the media of
one sample at a time.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from media_conversion import UnusableSample, convert_media
from raw_data import MediaLocation, PreparationError, list_media


@dataclass(frozen=True)
class PlannedSample:
    """An entry to write: its number in the metadata, the place of its JSON text there, and its media in order."""

    index: int
    offset: int
    length: int
    media: tuple[MediaLocation, ...]


@dataclass(frozen=True)
class SkippedEntry:
    """An entry left out. `index`: its number in the metadata; `id`: its own, if it has one."""

    index: int
    id: Any
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    path: str
    metadata: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class ShardReport:
    """What became of a ShardTask. `parts` counts the media by treatment, and the samples without media."""

    name: str
    written: int
    parts: dict[str, int]
    skipped: tuple[SkippedEntry, ...]


def describe_skip(index: int, entry: Any, unusable: UnusableSample) -> SkippedEntry:
    identity = entry.get("id") if isinstance(entry, dict) else None
    return SkippedEntry(index, identity, unusable.reason, unusable.detail)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name; at the end of the block it takes its own name, complete, or is removed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class SourceReader:
    """Reads ranges of files and keeps the files open: a shard comes back to the same few tars all the time."""

    def __init__(self):
        self.files = contextlib.ExitStack()
        self.descriptors: dict[str, int] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size). Raises PreparationError where the file is shorter than it was."""
        if path not in self.descriptors:
            self.descriptors[path] = os.open(path, os.O_RDONLY)
            self.files.callback(os.close, self.descriptors[path])
        data = os.pread(self.descriptors[path], size, offset)
        if len(data) != size:
            raise PreparationError(f"{path} changed while it was read; start again with --force when it is complete")
        return data

    def read_media(self, place: MediaLocation) -> bytes:
        return Path(place.path).read_bytes() if place.size < 0 else self.read(place.path, place.offset, place.size)

    def close(self) -> None:
        self.files.close()


def add_tar_member(stream: BinaryIO, name: str, data: bytes) -> None:
    """Append one file to a ustar archive, with owner 0 and time 0, so that equal samples give equal bytes.

    Not webdataset.TarWriter, which imports torch into every worker (5 s), nor tarfile.addfile, which copies in pieces.
    """
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o444
    stream.write(header.tobuf(tarfile.USTAR_FORMAT))
    stream.write(data)
    stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def end_tar(stream: BinaryIO) -> None:
    stream.write(bytes(2 * tarfile.BLOCKSIZE))
    stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))


def build_sample(sample: PlannedSample, entry: dict, reader: SourceReader) -> tuple[dict[str, bytes], Counter]:
    """The parts of one sample by file ending, and what they count as. Raises UnusableSample."""
    named = zip(list_media(entry), sample.media, strict=True)
    stored = [convert_media(kind, name, reader.read_media(place)) for (kind, name), place in named]
    if len(stored) == 1:
        parts = {stored[0].part: stored[0].data}
    else:
        parts = {f"{number}.{media.part}": media.data for number, media in enumerate(stored)}
    parts["json"] = json.dumps(entry).encode()
    return parts, Counter(media.treatment for media in stored) if stored else Counter(["text_only"])


def write_shard(task: ShardTask, advance: Callable[[], Any]) -> ShardReport:
    """Write one shard; `advance` is called after every sample. Unusable samples are left out and reported."""
    counts, skipped, written = Counter(), [], 0
    with contextlib.closing(SourceReader()) as reader, replacing(Path(task.path)) as stream:
        for sample in task.samples:
            entry = json.loads(reader.read(task.metadata, sample.offset, sample.length))
            try:
                parts, kinds = build_sample(sample, entry, reader)
            except UnusableSample as unusable:
                skipped.append(describe_skip(sample.index, entry, unusable))
            else:
                for ending, data in parts.items():
                    add_tar_member(stream, f"{sample.index:09d}.{ending}", data)
                counts.update(kinds)
                written += 1
            advance()
        end_tar(stream)
    return ShardReport(Path(task.path).name, written, dict(counts), tuple(skipped))


_progress: Any = None  # in a worker process: the counter that it shares with its parent


def start_worker(progress: Any) -> None:
    """Prepare a worker process: it ends with its parent, leaves Ctrl-C to it, and keeps Pillow's warnings to itself."""
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Without this, the workers of a killed run would live on and write into the files of the next one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def count_sample() -> None:
    with _progress.get_lock():
        _progress.value += 1


def write_shard_in_worker(task: ShardTask) -> ShardReport:
    return write_shard(task, count_sample)


def write_shards(tasks: Iterable[ShardTask], total: int, num_workers: int) -> list[ShardReport]:
    """Write all shards and return their reports, by name. num_workers 0: in this process."""
    with tqdm(total=total, desc="Processing images", unit="sample") as bar:
        if num_workers == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reports = [write_shard(task, bar.update) for task in tasks]
        else:
            reports = write_shards_in_pool(iter(tasks), num_workers, bar)
    return sorted(reports, key=lambda report: report.name)


def write_shards_in_pool(tasks: Iterator[ShardTask], num_workers: int, bar: tqdm) -> list[ShardReport]:
    """Spawned workers, which inherit no state; at any time one task in hand and one waiting for each."""
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    running, reports = set(), []
    # Not multiprocessing.Pool, which waits for ever when a worker is killed.
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker, initargs=(progress,))
    try:
        while True:
            while len(running) < 2 * num_workers and (task := next(tasks, None)) is not None:
                running.add(pool.submit(write_shard_in_worker, task))
            if not running:
                return reports
            finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            reports += [future.result() for future in finished]
            bar.update(progress.value - bar.n)
    except BrokenProcessPool as error:
        raise PreparationError("a worker process died, perhaps for want of memory; try fewer --num-workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
