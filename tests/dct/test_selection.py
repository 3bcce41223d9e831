"""Which coefficients a token keeps: the orders, on tiny blocks by hand and on real ones by brute force; errors."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dct_qwen2vl.dct import configuration_dct
from dct_qwen2vl.dct.configuration_dct import ORDERS, CoefficientTable, DCTConfig, coefficient_variance, shown_in_patch
from dct_qwen2vl.dct.folding import fold_patch_embedding

WEIGHT = torch.randn(6, 3, 2, 14, 14, generator=torch.Generator().manual_seed(0))


def kept_first(count: int, order: str, block: tuple[int, int, int], chroma: str = "444") -> list[int]:
    """The `count` coefficients that come first, in their order: what each one more adds."""
    weight = WEIGHT if order == "weighted" else None
    chosen: list[int] = []
    for number in range(1, count + 1):
        kept = DCTConfig.select(block, chroma, number, order=order, weight=weight).kept
        (new,) = set(kept) - set(chosen)
        assert set(chosen) < set(kept) or number == 1, "a longer token holds the shorter one"
        chosen.append(new)
    return chosen


def places(config: DCTConfig) -> np.ndarray:
    """(plane, ft, fy, fx) of what is kept, int64 [4, K]."""
    return np.array(np.unravel_index(config.kept, (3, *config.block)))


# By hand


def test_zigzag_of_a_tiny_block():
    """One frame of 2 x 4, squared distances in units of 1/16: 0 1 4 9 in the first row, 4 5 8 13 in the second."""
    distances = np.array([0, 1, 4, 9, 4, 5, 8, 13])
    by_hand = [0, 8, 16, 1, 9, 17, 2, 4, 10, 12, 18, 20, 5, 13, 21, 6, 14, 22, 3, 11, 19, 7, 15, 23]
    assert [distances[index % 8] for index in by_hand] == sorted(list(distances) * 3)
    assert kept_first(24, "zigzag", (1, 2, 4)) == by_hand


def test_zigzag_counts_frames_like_pixels():
    """2 x 2 x 2: distance 0, then the three axes' first frequencies in index order, luma first."""
    assert kept_first(12, "zigzag", (2, 2, 2)) == [0, 8, 16, 1, 2, 4, 9, 10, 12, 17, 18, 20]


def test_box_of_a_tiny_block():
    """Three frames of 2 x 2: the corner of the first two frames, then their 2 x 2, then the third frame."""
    y = [0, 4, *[1, 2, 3, 5, 6, 7], *[8, 9, 10, 11]]  # of one plane; 12 coefficients each
    by_hand = [plane * 12 + index for part in (y[:2], y[2:8], y[8:]) for plane in range(3) for index in part]
    assert kept_first(36, "box", (3, 2, 2)) == by_hand


def test_variance_of_a_tiny_block():
    power = np.full((3, 2, 3, 3), -40.0)
    power[:, 0, 0, 0] = [0, -8, -9]
    power[0, 0, 0, 2], power[0, 0, 2, 0], power[1, 0, 0, 2] = -4, -2, -10
    table = CoefficientTable((1, 2, 2), ((0, 1), (0, 1, 2), (0, 1, 2)), power)
    variance = coefficient_variance((1, 2, 2), table)
    # Line 2 is the alternation 1 -1, of which all is in the difference: 4 pixels times 2^-2 for rows, 2^-4 for columns.
    np.testing.assert_allclose(variance[0, 0], [[4, 0.25], [1, 0]], atol=1e-9)
    for count, kept in ((1, (0,)), (2, (0, 2)), (3, (0, 1, 2)), (4, (0, 1, 2, 4)), (5, (0, 1, 2, 4, 8))):
        config = DCTConfig.select((1, 2, 2), "444", count, table=table)
        assert config.kept == kept
    assert config.scale == pytest.approx([2, 0.5, 1, 0.125, 2 * 2**-4.5])


# By brute force


def shares(block: tuple[int, int, int], chroma: str) -> np.ndarray:
    """Variance times the squared norm of the folded column, by folding every coefficient; -1 where chroma has none."""
    whole = DCTConfig.select(block, chroma)
    unscaled = DCTConfig(block, chroma, whole.kept, (1.0,) * len(whole.kept))
    result = np.full(3 * np.prod(block), -1.0)
    norms = fold_patch_embedding(WEIGHT.double(), unscaled).flatten(1).square().sum(0).numpy()
    result[list(whole.kept)] = norms * coefficient_variance(block).ravel()[list(whole.kept)]
    return result


@pytest.mark.parametrize(
    ("block", "chroma", "count"),
    [
        ((2, 28, 28), "420", 700),
        ((2, 14, 14), "444", 588),
        ((1, 28, 28), "444", 100),
        ((4, 16, 20), "420", 50),
        ((1, 8, 6), "444", 30),
    ],
)
def test_weighted_agrees_with_folding_every_coefficient(block, chroma, count):
    config = DCTConfig.select(block, chroma, count, order="weighted", weight=WEIGHT)
    expected = np.argsort(-shares(block, chroma), kind="stable")[:count]
    assert config.kept == tuple(sorted(expected.tolist()))


def test_what_the_pixel_model_never_saw_comes_last_by_variance():
    block = (4, 28, 28)
    config = DCTConfig.select(block, "444", 1176 + 500, order="weighted", weight=WEIGHT)
    _, ft, fy, fx = places(config)
    seen = (ft < 2) & (fy < 14) & (fx < 14)
    assert seen.sum() == 1176
    outside = coefficient_variance(block).copy()
    outside[:, :2, :14, :14] = 0
    assert set(np.array(config.kept)[~seen]) == set(np.argsort(-outside.ravel(), kind="stable")[:500])


def test_weighted_does_not_depend_on_the_scale_or_the_type_of_the_weight():
    first = DCTConfig.select((2, 28, 28), "420", 300, order="weighted", weight=WEIGHT)
    for other in (WEIGHT * 8, WEIGHT.double(), WEIGHT.numpy()):
        assert DCTConfig.select((2, 28, 28), "420", 300, order="weighted", weight=other) == first


@pytest.mark.parametrize("count", [294, 588])
def test_weighted_changes_the_embedding_least(count):
    """What is dropped, in expectation: the other orders drop more. In PSNR it is `variance` that loses least."""
    block = (2, 14, 14)
    share, variance = shares(block, "444"), coefficient_variance(block).ravel()
    dropped, lost = {}, {}
    for order in ORDERS:
        config = DCTConfig.select(block, "444", count, order=order, weight=WEIGHT if order == "weighted" else None)
        outside = np.setdiff1d(np.arange(share.size), config.kept)
        dropped[order], lost[order] = share[outside].sum(), variance[outside].sum()
    assert min(dropped, key=dropped.get) == "weighted"
    assert min(lost, key=lost.get) == "variance"
    assert lost["zigzag"] > 1.5 * lost["variance"] and lost["box"] > 1.5 * lost["variance"]


@pytest.mark.parametrize("block", [(2, 28, 28), (2, 56, 56), (4, 28, 28), (8, 42, 56)])
@pytest.mark.parametrize("chroma", ["444", "420"])
def test_box_is_downscaling_in_the_dct_domain(block, chroma):
    _, ft, fy, fx = places(DCTConfig.select(block, chroma, 1176, order="box"))
    assert (ft.max(), fy.max(), fx.max()) == (1, 13, 13)


def test_the_corner_of_x4_is_all_that_its_first_step_sees():
    """docs/real_models.md compares x4 with it: the same model before training."""
    x4, corner = DCTConfig.preset("x4"), DCTConfig.select((2, 28, 28), "420", 1176, order="box")
    assert set(corner.kept) < set(x4.kept)
    place = [x4.kept.index(number) for number in corner.kept]
    ours, theirs = (fold_patch_embedding(WEIGHT, config).flatten(1) for config in (x4, corner))
    torch.testing.assert_close(ours[:, place], theirs)
    ours[:, place] = 0
    assert not ours.any()


def test_box_grows_in_frames_as_in_pixels():
    for side, frames in ((14, 2), (28, 4), (42, 6)):
        _, ft, fy, fx = places(DCTConfig.select((6, 42, 42), "444", 3 * frames * side**2, order="box"))
        assert (ft.max() + 1, fy.max() + 1, fx.max() + 1) == (frames, side, side)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from(["444", "420"]),
    st.sampled_from(ORDERS),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_any_selection(block, chroma, order, number):
    block = block if chroma == "444" else (block[0], 2 * block[1], 2 * block[2])
    weight = WEIGHT if order == "weighted" else None
    whole = DCTConfig.select(block, chroma, order=order, weight=weight)
    assert whole == DCTConfig.select(block, chroma)
    count = 1 + number % (whole.num_coefficients - 1)
    smaller, larger = (DCTConfig.select(block, chroma, count + more, order=order, weight=weight) for more in range(2))
    assert len(smaller.kept) == count and set(smaller.kept) < set(larger.kept)
    np.testing.assert_allclose(np.square(smaller.scale), coefficient_variance(block).ravel()[list(smaller.kept)], 1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_marked_coefficients_come_before_any_order(order):
    first = np.zeros((3, 2, 8, 8), dtype=bool)
    first[:, 1, 7, :] = True
    weight = WEIGHT if order == "weighted" else None
    assert DCTConfig.select((2, 8, 8), "444", 24, first=first, order=order, weight=weight).kept == tuple(
        np.flatnonzero(first)
    )


# The table


@pytest.mark.parametrize("name", ["x4", "x16"])
def test_louder_detail_is_the_same_model_before_training(name):
    """What the patch shows keeps its scale, the rest is ten times as large in a token; folding gives that no weight."""
    plain = DCTConfig.preset(name)
    loud, shown = plain.with_detail_gain(10), shown_in_patch(plain)
    assert (loud.name, loud.kept, loud.block) == (f"{name}-gain10", plain.kept, plain.block)
    ratio = np.array(plain.scale) / np.array(loud.scale)
    np.testing.assert_allclose(ratio, np.where(shown, 1, 10), rtol=1e-5)
    assert 0 < shown.sum() < len(shown)
    assert torch.equal(fold_patch_embedding(WEIGHT, loud), fold_patch_embedding(WEIGHT, plain))


@pytest.mark.parametrize("gain", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gain_is_a_positive_number(gain):
    with pytest.raises(ValueError, match="the gain of detail must be a positive number"):
        DCTConfig.preset("x4").with_detail_gain(gain)


def test_exact_has_no_detail_to_make_louder():
    with pytest.raises(ValueError, match="exact has no coefficients beyond a pixel model's patch"):
        DCTConfig.preset("exact").with_detail_gain(10)


def test_another_table_gives_other_scales():
    table = CoefficientTable.from_file()
    brighter = CoefficientTable(table.block, table.lines, table.log2_power + 2)
    mine, usual = (DCTConfig.select((2, 28, 28), "420", 500, table=which) for which in (brighter, None))
    assert mine.kept == usual.kept
    np.testing.assert_allclose(np.array(mine.scale) / usual.scale, 2, rtol=1e-5)


def test_saved_configurations_need_no_table(tmp_path):
    """A converted checkpoint holds the code and the whole configuration, but not the table."""
    shutil.copy(Path(configuration_dct.__file__), tmp_path / "alone.py")
    DCTConfig.preset("x4").save(tmp_path / "x4.json")
    spec = importlib.util.spec_from_file_location("alone", tmp_path / "alone.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.DCTConfig.from_file(tmp_path / "x4.json").to_dict() == DCTConfig.preset("x4").to_dict()
    with pytest.raises(FileNotFoundError) as caught:
        alone.DCTConfig.preset("x4")
    missing = tmp_path / "coefficient_table.json"
    assert f"{missing} is missing: presets and selections need it, saved configurations do not" in str(caught.value)
    assert f"python -m dct_qwen2vl.analysis.coefficient_statistics --output {missing}" in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "energy"}, "order must be one of variance, weighted, zigzag, box, got 'energy'"),
        ({"order": "weighted"}, r"order weighted needs the patch embedding's weight \[E, 3, 2, 14, 14\]"),
        ({"order": "box", "weight": WEIGHT}, "order box takes no weight"),
        ({"weight": WEIGHT}, "order variance takes no weight"),
        ({"order": "weighted", "weight": WEIGHT[:, :, :1]}, r"expects a weight \[E, 3, 2, 14, 14\], got \[6, 3, 1"),
        ({"order": "weighted", "weight": WEIGHT * torch.nan}, "the weight has values that are not finite"),
        ({"num_coefficients": 0}, "1 to 12 coefficients to keep, asked for 0"),
        ({"num_coefficients": 13}, "1 to 12 coefficients to keep, asked for 13"),
        ({"block": (1, 3, 2)}, "420 needs an even block height and width"),
        ({"block": (0, 2, 2)}, r"block must be three positive whole numbers \(bt, bh, bw\), got \(0, 2, 2\)"),
        ({"block": (2, 2)}, "block must be three positive whole numbers"),
        ({"chroma": "422"}, "chroma must be one of 444, 420, got '422'"),
        ({"first": np.zeros((3, 2, 2), bool)}, r"first must be bool \[3, 2, 2, 2\], got bool \[3, 2, 2\]"),
    ],
)
def test_selections_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCTConfig.select(**{"block": (2, 2, 2), "chroma": "420", **arguments})
