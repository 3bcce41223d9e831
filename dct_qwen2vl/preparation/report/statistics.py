"""What data_preparation.py counted and measured of a prepared set, read back from its stats files into columns.

    O/stats.json                    counts of the whole set
    O/pretrain-000000.stats.json    one beside each shard; its columns hold one value for each sample, or each medium
    O/skipped.jsonl                 the entries left out

Letters used for shapes: N, the samples of the set, in the order of the shards and within them; M, their media in a row.
"""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dct_qwen2vl.common.files import read_object
from dct_qwen2vl.preparation.data_splits import SPLITS
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.output_folder import SKIPPED_NAME, STATS_NAME, TOOL, stats_path, with_new_names

TOTALS = ("read", "copies", "written", "thinned")
SAMPLE_COLUMNS = ("source", "media", "text")
MEDIA_COLUMNS = ("height", "width", "frames", "seconds")
AGAIN = "run data_preparation.py on the folder again"


@dataclass(frozen=True)
class Shard:
    """One tar of the set.

    first: number of its first sample in the set.
    """

    name: str
    split: str
    first: int
    written: int


@dataclass(frozen=True)
class Statistics:
    """A prepared set.

    stats: the object in stats.json.
    sources: names of the source datasets, the one with most entries read first.
    split: int8 [N]. Index in SPLITS.
    source: int32 [N]. Index in `sources`.
    media: int32 [N]. Images and videos of the sample.
    text: int64 [N]. Characters of all turns.
    height, width: int32 [M], px.
    frames: int32 [M]. 1 for an image.
    seconds: float32 [M]. 0 for an image.
    """

    stats: dict[str, Any]
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    split: np.ndarray
    source: np.ndarray
    media: np.ndarray
    text: np.ndarray
    height: np.ndarray
    width: np.ndarray
    frames: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    @property
    def is_video(self) -> np.ndarray:
        """bool [M]: the medium has more than one frame."""
        return self.frames > 1

    @property
    def owner(self) -> np.ndarray:
        """int64 [M]: the sample that a medium is of."""
        return np.repeat(np.arange(len(self)), self.media)

    def media_of(self, sample: int) -> slice:
        """Where the media of a sample are."""
        first = int(self.media[:sample].sum(dtype=np.int64))
        return slice(first, first + int(self.media[sample]))

    def skipped_of(self, source: str) -> dict[str, int]:
        """Entries of a source that were left out, by reason."""
        return self.stats["sources"][source]["skipped"]

    def left_out_of(self, source: str) -> tuple[int, int]:
        """Entries of a source that were skipped, and that a weight below 1 left out."""
        return sum(self.skipped_of(source).values()), self.stats["sources"][source]["thinned"]

    def source_by_split(self) -> np.ndarray:
        """int64 [sources, splits]: samples written."""
        cells = self.source.astype(np.int64) * len(SPLITS) + self.split
        return np.bincount(cells, minlength=len(self.sources) * len(SPLITS)).reshape(-1, len(SPLITS))


def read_statistics(output_dir: Path) -> Statistics:
    """A prepared set.

    Raises PreparationError for a file that is missing, is no stats file or contradicts another one.
    """
    path = output_dir / STATS_NAME
    stats = read_object(path, AGAIN, PreparationError, with_new_names)
    check_stats(stats, path)
    sources = tuple(sorted(stats["sources"], key=lambda name: (-stats["sources"][name]["read"], name)))
    numbers = {name: number for number, name in enumerate(sources)}
    names = sorted(stats["shards"])
    parts = [read_shard(output_dir / name, stats["shards"][name], numbers) for name in names]
    firsts = accumulate((stats["shards"][name] for name in names), initial=0)
    shards = tuple(
        Shard(name, split, first, stats["shards"][name]) for name, (split, _), first in zip(names, parts, firsts)
    )
    columns = {
        name: np.concatenate([columns[name] for _, columns in parts]) for name in (*SAMPLE_COLUMNS, *MEDIA_COLUMNS)
    }
    split = np.repeat([SPLITS.index(shard.split) for shard in shards], [shard.written for shard in shards])
    statistics = Statistics(stats, shards, sources, split.astype(np.int8), **columns)
    check_sources(statistics, path)
    return statistics


def check_stats(stats: dict[str, Any], path: Path) -> None:
    """The fields of stats.json that are read here, and their sums."""
    if stats.get("tool") != TOOL:
        raise PreparationError(f"{path} was not written by data_preparation.py; name its --output-dir")
    if not stats.get("complete"):
        raise PreparationError(f"{path} says that the set is not complete; {AGAIN} to finish it")
    if not all(is_count(stats.get(field)) for field in TOTALS):
        raise PreparationError(f"{path}: {', '.join(TOTALS)} must be counts; {AGAIN}")
    for field in ("skipped", "parts", "repairs", "shards"):
        if not is_counts(stats.get(field)):
            raise PreparationError(f"{path}: {field} must be an object of counts; {AGAIN}")
    sources = stats.get("sources")
    if not isinstance(sources, dict) or not all(map(is_source, sources.values())):
        raise PreparationError(f"{path}: sources must hold {', '.join(TOTALS)} and skipped of each source; {AGAIN}")
    agree(path, "written", stats["written"], "the sum of its shards", sum(stats["shards"].values()))
    for field in TOTALS:
        agree(path, field, stats[field], "the sum of its sources", sum(source[field] for source in sources.values()))
    for reason in {*stats["skipped"], *(reason for source in sources.values() for reason in source["skipped"])}:
        by_source = sum(source["skipped"].get(reason, 0) for source in sources.values())
        agree(path, f"skipped {reason}", stats["skipped"].get(reason, 0), "the sum of its sources", by_source)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_count, value.values()))


def is_source(value: Any) -> bool:
    is_object = isinstance(value, dict) and is_counts(value.get("skipped"))
    return is_object and all(is_count(value.get(field)) for field in TOTALS)


def agree(path: Path, what: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise PreparationError(f"{path}: {what} is {value}, {other} {expected}; {AGAIN}")


def read_shard(shard: Path, written: int, sources: dict[str, int]) -> tuple[str, dict[str, np.ndarray]]:
    """The split of a shard and its columns, `source` as index in the set's sources."""
    path = stats_path(shard)
    stats = read_object(path, AGAIN, PreparationError, with_new_names)
    samples, media, names = stats.get("samples"), stats.get("media"), stats.get("sources")
    if stats.get("split") not in SPLITS:
        raise PreparationError(f"{path}: split must be one of {', '.join(SPLITS)}; {AGAIN}")
    if not isinstance(samples, dict) or not isinstance(media, dict) or not isinstance(names, list):
        raise PreparationError(f"{path}: samples, media and sources are missing; {AGAIN}")
    if not is_count(stats.get("written")):
        raise PreparationError(f"{path}: written must be a count; {AGAIN}")
    agree(path, "written", stats["written"], STATS_NAME + " says", written)
    columns = {name: read_column(path, name, samples.get(name), written) for name in SAMPLE_COLUMNS}
    parts = int(columns["media"].sum(dtype=np.int64))
    columns |= {name: read_column(path, name, media.get(name), parts) for name in MEDIA_COLUMNS}
    unknown = [name for name in names if name not in sources]
    if unknown or (written and columns["source"].max() >= len(names)):
        raise PreparationError(f"{path}: its sources are not those of {STATS_NAME}; {AGAIN}")
    numbers = np.array([sources[name] for name in names], np.int32)
    return stats["split"], {**columns, "source": numbers[columns["source"]]}


def read_column(path: Path, name: str, values: Any, count: int) -> np.ndarray:
    """`count` numbers. Seconds may be fractions; sizes and frames are 1 or more. Raises PreparationError."""
    whole = name != "seconds"
    dtype = np.int64 if name == "text" else np.int32 if whole else np.float32
    if count == 0 and values == []:
        return np.zeros(0, dtype)
    try:
        column = np.asarray(values) if isinstance(values, list) else np.zeros(0)
    except ValueError:  # lists in it
        column = np.zeros(0)
    if column.shape != (count,):
        raise PreparationError(f"{path}: {name} must be a list of {count} numbers, as its counts say; {AGAIN}")
    numeric = column.dtype.kind == "i" or (not whole and column.dtype.kind == "f")
    least = int(whole and name in MEDIA_COLUMNS)
    if not numeric or not least <= column.min() <= column.max() <= (np.iinfo(dtype).max if whole else 1e9):
        raise PreparationError(f"{path}: {name} holds something that is no {'whole ' * whole}number of {least} or more")
    return column.astype(dtype)


def check_sources(statistics: Statistics, path: Path) -> None:
    """Raises PreparationError unless each source has as many samples in the columns as stats.json says."""
    counts = np.bincount(statistics.source, minlength=len(statistics.sources)).tolist()
    for name, count in zip(statistics.sources, counts):
        agree(
            path, f"written of source {name!r}", statistics.stats["sources"][name]["written"], "the shards say", count
        )


def read_examples(output_dir: Path, skipped: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The first line of skipped.jsonl for each reason.

    output_dir: The folder of shards.
    skipped: Entries left out, by reason. Reasons without entries are left out.

    Raises PreparationError if the file is missing or has no line for a reason.
    """
    path, found = output_dir / SKIPPED_NAME, {}
    missing = {reason for reason, count in skipped.items() if count}
    try:
        with path.open(encoding="utf-8") as file:
            while missing and (line := file.readline()):
                entry = json.loads(line, object_hook=with_new_names)
                found.setdefault(entry["reason"], entry)
                missing.discard(entry["reason"])
    except FileNotFoundError:
        raise PreparationError(f"{path} is missing; {AGAIN}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PreparationError(f"{path} is not what data_preparation.py writes ({error}); {AGAIN}") from error
    if missing:
        raise PreparationError(f"{path} has no entry skipped as {min(missing)}, {STATS_NAME} has; {AGAIN}")
    return found
