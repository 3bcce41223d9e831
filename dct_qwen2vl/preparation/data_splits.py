"""Which entries go to train, val and test, how often, in which order, and into which shards.

Entries that share an image or video form a group. A group is never divided: what the model has seen in training is
not asked for in the test. The groups are gone through in the order of a seeded hash of their image. Each goes to the
split where its source datasets are furthest behind their shares, so every source is divided alike. After that, weights
of sources repeat or thin their training entries. The samples of a split are ordered by a seeded hash, too, and cut into
shards. The shards of train come first, then those of val and test, in numbers of exactly the split's proportion:
Energon cuts its splits by whole shards in the order of their names.

Letters used for shapes: N entries, M their media in a row, G groups, S samples.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b

import numpy as np

from dct_qwen2vl.preparation.metadata import PreparationError

SPLITS = ("train", "val", "test")
MOST_UNITS = 1000  # shards for one round of the proportion: "8,1,1" needs 10, "98.5,1,0.5" 200
MOST_COPIES = 100
CELLS = 1 << 16  # (group, source) at a time as Python's numbers, which take five times as much memory as numpy's


@dataclass(frozen=True)
class Layout:
    """The samples in the order of the shards.

    row: int64 [S]. Number of the sample's entry in the plan.
    copy: int32 [S]. 0, 1, ... where an entry is repeated.
    bounds: int64 [shards + 1]. Shard i holds the samples from bounds[i] to bounds[i + 1].
    split_of: name of each shard's split.
    thinned: int64. Rows of training entries that a weight below 1 leaves out.
    """

    row: np.ndarray
    copy: np.ndarray
    bounds: np.ndarray
    split_of: tuple[str, ...]
    thinned: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each split."""
        sizes = np.diff(self.bounds).tolist()
        return {name: sum(size for size, split in zip(sizes, self.split_of) if split == name) for name in SPLITS}

    @cached_property
    def ways_to_fewer(self) -> tuple[str, ...]:
        """Settings that give fewer and larger shards of the same samples; none if there is one shard."""
        shards = Counter(self.split_of)
        larger = ["a larger --maxcount"] if math.gcd(*shards.values()) > 1 else []  # else the split needs as many
        return (*larger, *(["one split: --split 1,0,0"] if len(shards) > 1 else []))


def parse_split(text: str) -> tuple[int, int, int]:
    """ "8,1,1" or "0.8, 0.1, 0.1" -> (8, 1, 1), the smallest whole numbers of that proportion. Raises ValueError."""
    try:
        shares = [Fraction(share.strip()) for share in text.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] == 0:
        raise ValueError(f"a split is three shares for train, val and test, like 8,1,1, not {text!r}")
    whole = [int(share * math.lcm(*(share.denominator for share in shares))) for share in shares]
    units = tuple(share // math.gcd(*whole) for share in whole)
    if sum(units) > MOST_UNITS:
        why = (
            f"its smallest whole numbers are {units}, and as many shards would be needed; at most {MOST_UNITS} are made"
        )
        raise ValueError(f"the split {text!r} is too uneven: {why}")
    return units


def say_shares(shares: tuple[int, int, int]) -> str:
    """(8, 1, 1) -> "8,1,1"."""
    return ",".join(map(str, shares))


def parse_weight(text: str) -> tuple[str, float]:
    """ "ocr_vqa=0.5" -> ("ocr_vqa", 0.5). Raises ValueError."""
    name, equals, weight = text.rpartition("=")
    if not equals or not name or not 0 <= float(weight) <= MOST_COPIES:
        raise ValueError(f"a weight is NAME=W with W from 0 to {MOST_COPIES}, not {text!r}")
    return name, float(weight)


def hash_seeded(seed: int, purpose: str, digests: np.ndarray) -> np.ndarray:
    """A hash of each digest, uint64 [N], another one for every seed and purpose.

    digests: S16 [N].
    """
    key, person = str(seed).encode(), purpose.encode()
    data, width, hashes = memoryview(digests.tobytes()), digests.itemsize, bytearray()
    for place in range(0, len(data), width):
        hashes += blake2b(data[place : place + width], digest_size=8, key=key, person=person).digest()
    return np.frombuffer(bytes(hashes), "<u8")


def group_entries(media_start: np.ndarray, content: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """The group of each entry, int64 [N], numbered from 0.

    media_start: int64 [N + 1]. Entry i has the media media_start[i] to media_start[i + 1].
    content: S16 [M]. Tells media apart.
    digest: S16 [N]. Stands in for entries without media.
    """
    counts = np.diff(media_start)
    alone = np.flatnonzero(counts == 0)
    _, key = np.unique(np.concatenate([content, digest[alone]]), return_inverse=True)
    entry = np.concatenate([np.repeat(np.arange(len(counts)), counts), alone])
    if counts.max(initial=0) <= 1:
        group = np.zeros(len(counts), np.int64)
        group[entry] = key
        return group
    from scipy.sparse import coo_array  # 0.5 s
    from scipy.sparse.csgraph import connected_components

    nodes = len(counts) + len(key)
    graph = coo_array((np.ones(len(key), np.int8), (entry, len(counts) + key)), shape=(nodes, nodes))
    labels = connected_components(graph, directed=False)[1][: len(counts)]
    return np.unique(labels, return_inverse=True)[1]


def identify(media_start: np.ndarray, content: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """What decides the split of each entry, S16 [N]: the content of its first medium, or its own digest without media.

    media_start: int64 [N + 1]. As in plan.Columns.
    content: S16 [M]. Digests of the media's content.
    digest: S16 [N]. Digests of the entries.
    """
    first, has_media = media_start[:-1], np.diff(media_start) > 0
    identity = digest.copy()
    identity[has_media] = content[first[has_media]]
    return identity


def split_entries(
    group: np.ndarray, source: np.ndarray, identity: np.ndarray, shares: tuple[int, int, int], seed: int
) -> np.ndarray:
    """The split of each entry, int8 [N], as number in SPLITS.

    group: int [N]. Entries of a group have an image in common, so they go to one split.
    source: int [N]. Source data set of each entry.
    identity: S16 [N]. As `identify` gives it.
    shares: Of train, val and test.
    seed: Of the order in which groups are placed.

    At any time, each split lacks some entries of every source and of all sources together. A group goes to the split
    for which the sum of squares of these numbers becomes smallest.
    """
    _, first = np.unique(group, return_index=True)
    order = np.argsort(hash_seeded(seed, "split", identity[first]), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    sources = int(source.max(initial=0)) + 1
    lacks = [[0, 0, 0] for _ in range(sources)]  # by source and split, times the sum of shares
    lacks_all, chosen = [0, 0, 0], np.zeros(len(order), np.int8)
    for number, members in iterate_groups(rank[group], source, sources):
        touched = [(lacks[name], entries) for name, entries in members]
        touched.append((lacks_all, sum(entries for _, entries in touched)))
        chosen[number] = choose_split(touched, shares)
    return chosen[rank[group]]


def iterate_groups(group: np.ndarray, source: np.ndarray, sources: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(group, the number of its entries from each source) of all groups, ascending."""
    cells, counts = np.unique(group * sources + source, return_counts=True)
    number, members = 0, []
    for start in range(0, len(cells), CELLS):
        some = slice(start, start + CELLS)
        for cell, count in zip(cells[some].tolist(), counts[some].tolist()):
            of, name = divmod(cell, sources)
            if of != number:
                yield number, members
                number, members = of, []
            members.append((name, count))
    if members:
        yield number, members


def choose_split(touched: list[tuple[list[int], int]], shares: tuple[int, int, int]) -> int:
    """The split of a group. Keeps what the sources lack up to date.

    touched: for each source with entries in the group, what it lacks in each split, and the number of these entries.
    """
    for lacks, entries in touched:
        for split, share in enumerate(shares):
            lacks[split] += share * entries
    gain = [sum(entries * lacks[split] for lacks, entries in touched) for split in range(len(shares))]
    chosen = gain.index(max(gain))
    for lacks, entries in touched:
        lacks[chosen] -= sum(shares) * entries
    return chosen


def count_copies(
    split: np.ndarray, source: np.ndarray, digest: np.ndarray, weights: dict[int, float], seed: int
) -> np.ndarray:
    """How often each entry is written, int32 [N].

    split: int8 [N]. As `split_entries` gives it.
    source: int [N]. Source data set of each entry.
    digest: S16 [N]. Digests of the entries.
    weights: Source -> how often its training entries are written, on average.
    seed: Of the choice that a fraction needs.
    """
    copies = np.ones(len(split), np.int32)
    for number, weight in weights.items():
        rows = np.flatnonzero((source == number) & (split == SPLITS.index("train")))
        share = hash_seeded(seed, "weight", digest[rows]) / 2.0**64
        copies[rows] = int(weight) + (share < weight - int(weight))
    return copies


def lay_out(
    split: np.ndarray, copies: np.ndarray, digest: np.ndarray, shares: tuple[int, int, int], maxcount: int, seed: int
) -> Layout:
    """Orders the samples and cuts them into shards.

    split: int8 [N]. As `split_entries` gives it.
    copies: int32 [N]. As `count_copies` gives it.
    digest: S16 [N]. Digests of the entries.
    shares: Of train, val and test, as Energon will cut them.
    maxcount: Most samples of a shard.
    seed: Of the order.

    Raises PreparationError if a split has too few samples for its shards.
    """
    row = np.repeat(np.arange(len(split)), copies)
    copy = (np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)).astype(np.int32)
    order = np.lexsort((hash_seeded(seed, "order", name_samples(digest, row, copy)), split[row]))
    row, copy = row[order], copy[order]
    samples = np.bincount(split[row], minlength=len(SPLITS)).tolist()
    rounds = count_rounds(samples, shares, maxcount)
    bounds, start = [0], 0
    for count, share in zip(samples, shares):
        shards = share * rounds
        bounds += [start + count * number // shards for number in range(1, shards + 1)]
        start += count
    split_of = tuple(name for name, share in zip(SPLITS, shares) for _ in range(share * rounds))
    return Layout(row, copy, np.array(bounds), split_of, np.flatnonzero(copies == 0))


def name_samples(digest: np.ndarray, row: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """Digests that tell samples apart, S20 [S]."""
    names = np.zeros(len(row), [("entry", digest.dtype), ("copy", "<i4")])
    names["entry"], names["copy"] = digest[row], copy
    return names.view(f"S{names.itemsize}")


def count_rounds(samples: list[int], shares: tuple[int, int, int], maxcount: int) -> int:
    """How often the split's proportion is repeated in numbers of shards.

    Raises PreparationError where no number fits: a shard would be empty or hold more than maxcount.
    """
    least = max(-(-count // (share * maxcount)) for count, share in zip(samples, shares) if share)
    most = min(count // share for count, share in zip(samples, shares) if share)
    rounds = max(1, least)
    if rounds <= most:
        return rounds
    proportion = ",".join(map(str, shares))
    counts = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, samples))
    why = f"the split {proportion} is cut by whole shards and needs {sum(shares)} of them, none empty"
    if most:
        larger = max(-(-count // (share * most)) for count, share in zip(samples, shares) if share)
        why += f"; with --maxcount {larger} it can be done"
    else:
        why += "; add data, or put all of it into one split (--split 1,0,0)" if sum(samples) else "; add data"
    raise PreparationError(f"the samples ({counts}) cannot be cut into shards of at most {maxcount}: {why}")
