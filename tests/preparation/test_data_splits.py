"""Splits by image, shares of sources, weights, order and shards: what is promised holds for many entries."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from dct_qwen2vl.preparation.data_splits import (
    SPLITS,
    Layout,
    count_copies,
    group_entries,
    hash_seeded,
    identify,
    lay_out,
    parse_split,
    parse_weight,
    split_entries,
)
from dct_qwen2vl.preparation.energon_metadata import is_cut_alike
from dct_qwen2vl.preparation.media_index import DIGEST, digest_of
from dct_qwen2vl.preparation.metadata import PreparationError

SHARES = (8, 1, 1)


def digests(count: int, kind: str = "entry") -> np.ndarray:
    return np.array([digest_of(f"{kind} {number}".encode()) for number in range(count)], DIGEST)


def entries(media: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """media_start, content and digest of entries with these images."""
    images = digests(max([number for numbers in media for number in numbers], default=0) + 1, "image")
    flat = np.array([number for numbers in media for number in numbers], int)
    return np.cumsum([0, *map(len, media)]), images[flat], digests(len(media))


def divide(media: list[list[int]], source: np.ndarray, seed: int = 0, shares: tuple = SHARES) -> np.ndarray:
    columns = entries(media)
    return split_entries(group_entries(*columns), source, identify(*columns), shares, seed)


def random_media(count: int, images: int, seed: int = 0) -> list[list[int]]:
    """Most entries with one image, some with several or none."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 3], count, p=[0.1, 0.8, 0.07, 0.03])
    return [rng.integers(0, images, size).tolist() for size in sizes]


def test_entries_that_share_an_image_form_a_group():
    media = [[0], [1], [0], [], [2, 3], [3, 4], [4, 5], [], [6, 6], [1]]
    group = group_entries(*entries(media))
    members = defaultdict(set)
    for row, number in enumerate(group.tolist()):
        members[number].add(row)
    assert sorted(map(sorted, members.values())) == [[0, 2], [1, 9], [3], [4, 5, 6], [7], [8]]
    assert set(group.tolist()) == set(range(6))


def test_groups_are_the_same_with_and_without_entries_of_several_images():
    media = [numbers[:1] for numbers in random_media(500, 200)]
    single = group_entries(*entries(media))
    several = group_entries(*entries([*media, [200, 201]]))[:-1]
    assert Counter(Counter(single.tolist()).values()) == Counter(Counter(several.tolist()).values())
    assert len(set(zip(single.tolist(), several.tolist()))) == len(set(single.tolist()))


@pytest.mark.parametrize("shares", [(8, 1, 1), (18, 1, 1), (7, 2, 1), (9, 1, 0)])
def test_no_image_is_on_two_sides_and_every_source_is_divided_alike(shares):
    media = random_media(20_000, 15_000)
    source = np.random.default_rng(1).choice(5, len(media), p=[0.5, 0.3, 0.15, 0.04, 0.01])
    split = divide(media, source, shares=shares)
    sides = defaultdict(set)
    for numbers, side in zip(media, split.tolist()):
        for number in numbers:
            sides[number].add(side)
    assert all(len(side) == 1 for side in sides.values())
    for number in range(5):
        found = np.bincount(split[source == number], minlength=3) / (source == number).sum()
        np.testing.assert_allclose(found, np.array(shares) / sum(shares), atol=0.01)


def test_shares_hold_with_images_of_many_entries():
    media = [[number // 7] for number in range(7000)]
    split = divide(media, np.zeros(7000, int))
    np.testing.assert_allclose(np.bincount(split) / 7000, (0.8, 0.1, 0.1), atol=0.002)


def test_many_tiny_sources_together_have_the_right_shares():
    source = np.arange(600) // 3
    split = divide([[number] for number in range(600)], source)
    assert np.bincount(split).tolist() == [480, 60, 60]


def test_splits_depend_on_the_seed_and_not_on_the_order_of_entries():
    media, source = [[number] for number in range(1000)], np.zeros(1000, int)
    split = divide(media, source)
    assert (divide(media[::-1], source)[::-1] == split).all()
    assert (divide(media, source, seed=1) != split).mean() > 0.2


def test_weights_repeat_and_thin_training_entries_alone():
    split = np.array([0, 1, 2, 0] * 2500, np.int8)
    source = np.array([0] * 2000 + [1] * 4000 + [2] * 4000)
    copies = count_copies(split, source, digests(10_000), {0: 3.0, 1: 0.25, 2: 1.5}, seed=0)
    assert (copies[split > 0] == 1).all()
    trained = split == 0
    assert (copies[trained & (source == 0)] == 3).all()
    assert set(copies[trained & (source == 1)].tolist()) == {0, 1}
    assert copies[trained & (source == 1)].mean() == pytest.approx(0.25, abs=0.03)
    assert set(copies[trained & (source == 2)].tolist()) == {1, 2}
    assert copies[trained & (source == 2)].mean() == pytest.approx(1.5, abs=0.03)
    assert (count_copies(split, source, digests(10_000), {0: 0.0}, 0)[trained & (source == 0)] == 0).all()


def make_layout(counts: tuple[int, int, int], maxcount: int, seed: int = 0, copies: int = 1, shares=SHARES) -> Layout:
    split = np.repeat(np.arange(3), counts).astype(np.int8)
    return lay_out(split, np.full(len(split), copies, np.int32), digests(len(split)), shares, maxcount, seed)


def test_shards_come_split_by_split_in_the_proportion_and_are_even():
    layout = make_layout((801, 99, 100), 30)
    assert Counter(layout.split_of) == {"train": 32, "val": 4, "test": 4}
    assert list(layout.split_of) == sorted(layout.split_of, key=SPLITS.index)
    sizes = np.diff(layout.bounds)
    assert sizes.sum() == 1000 and sizes.max() <= 30
    for name in SPLITS:
        of_split = sizes[[split == name for split in layout.split_of]]
        assert of_split.max() - of_split.min() <= 1
    assert layout.counts == {"train": 801, "val": 99, "test": 100}
    assert sorted(layout.row[:801].tolist()) == list(range(801))
    assert layout.row[:801].tolist() != sorted(layout.row[:801].tolist())


def test_the_order_is_a_fair_shuffle_by_the_seed():
    first, second = (make_layout((8000, 1000, 1000), 100, seed).row[:8000] for seed in (0, 1))
    for order in (first, second):
        assert abs(np.corrcoef(order, np.arange(8000))[0, 1]) < 0.04
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert (make_layout((8000, 1000, 1000), 200).row[:8000] == first).all()


def test_copies_are_samples_of_their_own_spread_over_the_shards():
    layout = make_layout((800, 100, 100), 1000, copies=3)
    assert Counter(zip(layout.row.tolist(), layout.copy.tolist())) == {
        (row, copy): 1 for row in range(1000) for copy in range(3)
    }
    apart = np.abs(np.diff(np.flatnonzero(layout.row == 0)))
    assert apart.max() > 50


def test_what_cannot_be_cut():
    assert len(make_layout((8, 1, 1), 1000).split_of) == 10
    with pytest.raises(PreparationError, match=r"train 8, val 1, test 0.* needs 10 of them, none empty"):
        make_layout((8, 1, 0), 1000)
    with pytest.raises(PreparationError, match=r"shards of at most 10: .*with --maxcount 13 it can be done"):
        make_layout((800, 8, 8), 10)
    assert np.diff(make_layout((800, 8, 8), 13).bounds).max() <= 13


@pytest.mark.parametrize("shares", [(8, 1, 1), (18, 1, 1), (98, 1, 1), (6, 2, 2), (9, 1, 0), (197, 2, 1)])
def test_energon_cuts_the_shards_where_we_do(shares):
    assert all(is_cut_alike(shares, sum(shares) * rounds) for rounds in range(1, 2000))


def test_what_energon_would_cut_otherwise_is_known():
    assert not is_cut_alike((7, 2, 1), 10)  # int(10 * (0.7 + 0.2)) is 8


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("8,1,1", (8, 1, 1)),
        ("0.8, 0.1, 0.1", (8, 1, 1)),
        ("90,5,5", (18, 1, 1)),
        ("80,10,10", (8, 1, 1)),
        ("98.5,1,0.5", (197, 2, 1)),
        ("9,1,0", (9, 1, 0)),
        ("1,0,0", (1, 0, 0)),
    ],
)
def test_splits_are_the_smallest_whole_numbers(text, shares):
    assert parse_split(text) == shares


@pytest.mark.parametrize("text", ["8,1", "8,1,1,1", "a,b,c", "0,1,1", "8,-1,1", "", "99.99,0.005,0.005", "nan,1,1"])
def test_what_is_no_split(text):
    with pytest.raises(ValueError):
        parse_split(text)


def test_weights_of_sources():
    assert parse_weight("ocr_vqa=0.5") == ("ocr_vqa", 0.5)
    assert parse_weight("a=b=2") == ("a=b", 2.0)
    for text in ("ocr_vqa", "=2", "a=", "a=-1", "a=nan", "a=101", "a=x"):
        with pytest.raises(ValueError):
            parse_weight(text)


def test_hashes_are_those_of_blake2b():
    hashes = hash_seeded(7, "split", np.array([b"0123456789abcdef", b"\0" * 16], DIGEST))
    from hashlib import blake2b

    expected = blake2b(b"0123456789abcdef", digest_size=8, key=b"7", person=b"split").digest()
    assert hashes[0] == int.from_bytes(expected, "little")
    assert hashes[0] != hashes[1]
