"""Positions with skipping, against those of the same media with all cells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dct_qwen2vl.data.positions import KeptRun, mrope_positions, step_lengths, vision_positions


@st.composite
def masks(draw) -> np.ndarray:
    """Cells kept, bool [t, r, c]: the first one is; whole steps may keep nothing."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    kept[rng.random(shape[0]) < 0.3] = False
    kept[0, 0, 0] = True
    return kept


def test_by_hand():
    """Three steps of 1 x 2 cells, the second step empty. Text goes on at 2 + 3, as if all cells were there."""
    kept = np.array([[[1, 1]], [[0, 0]], [[0, 1]]], dtype=bool)
    positions = mrope_positions([2, KeptRun((3, 1, 2), kept), 2])
    assert positions.tolist() == [[0, 1, 2, 2, 4, 5, 6], [0, 1, 2, 2, 2, 5, 6], [0, 1, 2, 3, 3, 5, 6]]
    assert step_lengths((3, 2, 4), 2, kept) == [8, 0, 4]
    assert step_lengths((3, 2, 4), 2) == [8, 8, 8]


@given(st.lists(masks(), min_size=1, max_size=3), st.sampled_from([1.0, 0.5, 2.0, 3.7]))
def test_kept_cells_and_text_keep_the_positions_that_they_have_without_skipping(kept, time_step):
    whole, skipped, present = [3], [3], [np.ones(3, dtype=bool)]
    for mask in kept:
        whole += [(*mask.shape, time_step), 2]
        skipped += [KeptRun(mask.shape, mask, time_step), 2]
        present += [mask.ravel(), np.ones(2, dtype=bool)]
    np.testing.assert_array_equal(mrope_positions(skipped), mrope_positions(whole)[:, np.concatenate(present)])


@given(masks(), st.sampled_from([1, 2, 3]))
def test_vision_tokens_keep_row_and_column_and_their_step(kept, merge):
    grid = (kept.shape[0], kept.shape[1] * merge, kept.shape[2] * merge)
    present = kept.ravel().repeat(merge**2)
    whole, steps = vision_positions(grid, merge), np.arange(grid[0]).repeat(grid[1] * grid[2])[present]
    np.testing.assert_array_equal(vision_positions(grid, merge, kept), whole[present])
    assert step_lengths(grid, merge, kept) == np.bincount(steps, minlength=grid[0]).tolist()


@pytest.mark.parametrize("time_step", [1.0, 2.5])
def test_keeping_all_is_no_skipping(time_step):
    grid, everything = (3, 2, 4), np.ones((3, 2, 4), dtype=bool)
    run = (*grid, time_step)
    np.testing.assert_array_equal(mrope_positions([KeptRun(grid, everything, time_step)]), mrope_positions([run]))
    np.testing.assert_array_equal(vision_positions((3, 4, 8), 2, everything), vision_positions((3, 4, 8), 2))
