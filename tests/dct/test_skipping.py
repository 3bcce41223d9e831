"""Which cells are kept: guarantees that hold whatever the video, and literal cases of each rule.

Letters as in skipping_dct.py. Errors are measured on decoded pixels, by another way than the rule's own.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dct_qwen2vl.dct.configuration_dct import RGB_TO_YCBCR, DCTConfig
from dct_qwen2vl.dct.skipping_dct import block_errors, fill_tokens, keep_tokens, kept_cells, shown_cells, squared_error
from dct_qwen2vl.dct.transform_dct import DCTTokenizer

# Small blocks, so that videos of many cells stay small; every third frequency dropped, so that not all is kept.
ALL = DCTConfig.select((2, 4, 4), "444", name="all")
SOME = DCTConfig.select((2, 4, 4), "420", 40, name="some")
LONG = DCTConfig.select((3, 2, 2), "444", 20, name="long")
ONE_BLOCK = DCTConfig.select((1, 4, 4), "444", merge=1, name="one block")
CONFIGS = (ALL, SOME, LONG, ONE_BLOCK)


@st.composite
def videos(draw) -> tuple[DCTConfig, np.ndarray]:
    """Frames uint8 [T, H, W, 3] of odd grids too: margins, static parts, slow fades, noise and sudden changes."""
    config = draw(st.sampled_from(CONFIGS))
    steps, rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    side = config.block[1] * config.merge
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (config.block[0] * steps, rows * side, columns * side, 3)
    background = rng.integers(0, 256, 3) + rng.normal(0, draw(st.sampled_from([0, 1, 3, 60])), shape[1:])
    gradient = np.linspace(0, draw(st.sampled_from([0, 4, 30, 255])), shape[2])[:, None]
    fade = np.linspace(0, draw(st.sampled_from([0, 6, 40, 200])), shape[0])[:, None, None, None]
    noise = rng.normal(0, draw(st.sampled_from([0, 0.5, 2, 4, 20])), shape)
    sudden = (rng.random((shape[0], rows, columns, 1)) < draw(st.sampled_from([0, 0.1, 0.5]))) * rng.normal(0, 40)
    frames = background + gradient + fade + noise + sudden.repeat(side, 1).repeat(side, 2)
    return config, frames.clip(0, 255).round().astype(np.uint8)


def errors_in_pixels(found: torch.Tensor, expected: torch.Tensor, grid: tuple, config: DCTConfig) -> np.ndarray:
    """Mean squared error of luma plus a quarter of chroma's, of each block [t, h, w], from decoded frames."""
    tokenizer, (t, h, w), (bt, bh, bw) = DCTTokenizer(config, torch.float64), grid, config.block
    difference = tokenizer.decode_float(found, grid) - tokenizer.decode_float(expected, grid)
    squares = np.square(difference.numpy() @ RGB_TO_YCBCR.T) @ [1, 0.25, 0.25]
    return squares.reshape(t, bt, h, bh, w, bw).mean((1, 3, 5))


@settings(max_examples=150, deadline=None)
@given(videos(), st.sampled_from([24.0, 30.0, 38.0, 45.0]), st.booleans())
def test_the_error_of_every_block_is_bounded(video, decibels, noise_floor):
    config, frames = video
    tokens, grid = DCTTokenizer(config).encode(frames)
    kept = kept_cells(tokens, grid, config, decibels, noise_floor)
    filled = fill_tokens(keep_tokens(tokens, kept), kept)
    limit = squared_error(min(decibels, 33.0) if noise_floor else decibels)
    assert errors_in_pixels(filled, tokens, grid, config).max() < limit * (1 + 1e-4)
    assert torch.equal(keep_tokens(filled, kept), keep_tokens(tokens, kept)), "what is kept is not touched"


@settings(max_examples=50, deadline=None)
@given(videos(), st.booleans())
def test_nothing_is_skipped_at_infinity(video, noise_floor):
    config, frames = video
    tokens, grid = DCTTokenizer(config).encode(frames)
    kept = kept_cells(tokens, grid, config, math.inf, noise_floor)
    assert kept.all() and kept.shape == (grid[0], grid[1] // config.merge, grid[2] // config.merge)
    assert torch.equal(keep_tokens(tokens, kept), tokens) and torch.equal(fill_tokens(tokens, kept), tokens)


@settings(max_examples=100, deadline=None)
@given(videos(), st.data())
def test_a_change_elsewhere_never_changes_a_kept_cell(video, data):
    """A place that its first step keeps is decided by its own tokens alone, in every step."""
    config, frames = video
    tokens, grid = DCTTokenizer(config).encode(frames)
    kept = kept_cells(tokens, grid, config)
    place = data.draw(st.integers(0, kept[0].numel() - 1))
    other = tokens.view(len(kept), kept[0].numel(), -1).clone()
    other[:, place] += torch.randn(other[:, place].shape, generator=torch.Generator().manual_seed(place))
    changed = kept_cells(other.view_as(tokens), grid, config)
    own = kept[0] & changed[0]
    own.view(-1)[place] = False
    assert torch.equal(kept[:, own], changed[:, own])
    before, after = (fill_tokens(keep_tokens(x.view_as(tokens), k), k) for x, k in ((tokens, kept), (other, changed)))
    before, after = (x.view(*kept.shape, -1)[:, own] for x in (before, after))
    assert torch.equal(before, after)


@settings(max_examples=25, deadline=None)
@given(videos(), st.booleans())
def test_the_rule_is_deterministic(video, noise_floor):
    config, frames = video
    tokens, grid = DCTTokenizer(config).encode(frames)
    first, second = (kept_cells(tokens.clone(), grid, config, 38, noise_floor) for _ in range(2))
    assert torch.equal(first, second)


def kept_by_plain_loops(tokens: torch.Tensor, grid: tuple, config: DCTConfig, decibels: float) -> torch.Tensor:
    """The rule as its words have it, a cell after another."""
    t, r, c = grid[0], grid[1] // config.merge, grid[2] // config.merge
    cells, means = tokens.view(t, r, c, config.merge**2, -1), np.array(config.kept) % math.prod(config.block) == 0

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return bool(block_errors(one, other, config).max() < squared_error(decibels))

    def flat(cell: torch.Tensor) -> bool:
        return same(cell, cell.mean(0, keepdim=True) * torch.from_numpy(means))

    kept, shown = torch.ones(t, r, c, dtype=torch.bool), {}
    for step, row, column in np.ndindex(t, r, c):
        cell = cells[step, row, column]
        if step:
            before = shown[row, column]
            kept[step, row, column] = not same(cell, before)
        elif row or column:
            before = shown[row, column - 1] if column else shown[row - 1, column]
            kept[step, row, column] = not (same(cell, before) and flat(before))
        shown[row, column] = cell if kept[step, row, column] else before
    return kept


@settings(max_examples=100, deadline=None)
@given(videos(), st.sampled_from([30.0, 38.0]))
def test_shortcuts_change_nothing(video, decibels):
    config, frames = video
    tokens, grid = DCTTokenizer(config).encode(frames)
    assert torch.equal(kept_cells(tokens, grid, config, decibels), kept_by_plain_loops(tokens, grid, config, decibels))


def test_a_copy_of_a_flat_cell_may_have_a_little_more_grain():
    """Grain of 3 levels is flat at 38 dB, 3.2 levels; grain of 5 is not, but the flat cell is a copy of it."""
    grain = np.where(np.indices((8, 8))[1] % 2, 1, -1)  # stripes are in the first numbers of a token
    rows = [np.concatenate([100 + first * grain, 100 + second * grain], axis=1) for first, second in ((3, 5), (5, 3))]
    for row, expected in zip(rows, ([True, False], [True, True])):
        frames = np.repeat(row[None, ..., None], 3, axis=-1).astype(np.float32)
        tokens, grid = DCTTokenizer(ALL).encode(frames)
        assert kept_cells(tokens, grid, ALL).tolist() == [[expected]]


def cells_of(levels: list, config: DCTConfig = ALL) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Tokens of a video whose cells have one grey level each, [t][r][c] of 0..255."""
    side = config.block[1] * config.merge
    grey = np.array(levels, dtype=np.float32).repeat(config.block[0], 0).repeat(side, 1).repeat(side, 2)
    return DCTTokenizer(config).encode(np.repeat(grey[..., None], 3, axis=-1))


def test_an_error_is_the_mean_square_of_luma():
    tokens, _ = cells_of([[[10]], [[17]]])
    torch.testing.assert_close(block_errors(tokens[:4], tokens[4:], ALL), torch.full((4,), 49.0))


def test_a_hole_shows_the_last_kept_cell_of_its_place():
    """38 dB are 3.2 levels. A fade of 2 levels a step is kept every second step, not never."""
    tokens, grid = cells_of([[[level, 200]] for level in (10, 12, 14, 16, 18, 10)])
    kept = kept_cells(tokens, grid, ALL)
    assert kept[:, 0, 0].tolist() == [True, False, True, False, True, True]
    assert kept[:, 0, 1].tolist() == [True, False, False, False, False, False]
    assert shown_cells(kept)[:, 0].tolist() == [[0, 1], [0, 1], [4, 1], [4, 1], [8, 1], [10, 1]]


def test_the_worst_block_decides():
    """One block of four differs by 5 levels: 38 dB for it, 44 dB for the mean of the cell."""
    tokens, grid = cells_of([[[100]], [[100]]])
    tokens[5] = cells_of([[[105]]])[0][0]
    assert kept_cells(tokens, grid, ALL).tolist() == [[[True]], [[True]]]
    assert block_errors(tokens[:4], tokens[4:], ALL).mean() < squared_error(38)


def test_whole_steps_may_keep_nothing():
    tokens, grid = cells_of([[[10, 200], [90, 40]]] * 3)
    kept = kept_cells(tokens, grid, ALL)
    assert kept.sum((1, 2)).tolist() == [4, 0, 0]
    assert torch.equal(fill_tokens(keep_tokens(tokens, kept), kept), tokens)


def test_flat_cells_of_a_first_step_copy_their_left_neighbour_and_in_column_0_the_upper_one():
    levels = [[255, 255, 30, 30], [255, 30, 30, 255], [90, 255, 255, 255]]
    tokens, grid = cells_of([levels])
    kept = kept_cells(tokens, grid, ALL)
    assert kept[0].tolist() == [[True, False, True, False], [False, True, False, True], [True, True, False, False]]
    assert shown_cells(kept)[0].tolist() == [[0, 0, 2, 2], [0, 5, 5, 7], [8, 9, 9, 9]]


def test_a_slow_gradient_is_no_margin():
    """Levels 2 apart: each equals its neighbour, but what the neighbour shows moves away."""
    tokens, grid = cells_of([[[100, 102, 104, 106, 108, 110]]])
    assert kept_cells(tokens, grid, ALL)[0, 0].tolist() == [True, False, True, False, True, False]


def test_cells_that_are_equal_but_not_flat_are_kept_in_a_first_step():
    texture = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tokens, grid = DCTTokenizer(ALL).encode(np.tile(texture, (2, 1, 3, 1)))
    assert kept_cells(tokens, grid, ALL).tolist() == [[[True] * 3], [[False] * 3]]


def test_four_blocks_of_different_colours_are_not_flat():
    quarters = np.array([[0, 60], [120, 180]], dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.repeat(np.tile(quarters, (2, 1, 2))[..., None], 3, axis=-1)
    tokens, grid = DCTTokenizer(ALL).encode(frames)
    assert kept_cells(tokens, grid, ALL).all()


def test_a_hole_of_the_first_step_is_compared_with_what_it_shows():
    tokens, grid = cells_of([[[200, 200]], [[200, 200]], [[200, 90]]])
    kept = kept_cells(tokens, grid, ALL)
    assert kept[:, 0].tolist() == [[True, False], [False, False], [False, True]]
    assert shown_cells(kept)[:, 0].tolist() == [[0, 0], [0, 0], [0, 5]]


def test_chroma_counts_a_quarter():
    """A change of Cb alone. 6 levels are 32.6 dB in Cb, and 38.6 with a quarter of the weight."""
    colour = np.linalg.inv(RGB_TO_YCBCR) @ [0, 6, 0]
    frames = np.full((4, 8, 8, 3), 120.0, dtype=np.float32)
    frames[2:] += colour.astype(np.float32)
    tokens, grid = DCTTokenizer(ALL).encode(frames)
    assert block_errors(tokens[:4], tokens[4:], ALL).tolist() == pytest.approx([9.0] * 4, rel=1e-3)
    assert [int(kept_cells(tokens, grid, ALL, decibels).sum()) for decibels in (38, 39)] == [1, 2]


@pytest.mark.parametrize("name", ["exact", "x4", "x16"])
def test_the_noise_floor_skips_still_cells_under_noise_and_keeps_what_moves(name):
    """Noise of 4.5 levels is above 38 dB. One cell of eight also turns dark half-way."""
    config, rng = DCTConfig.preset(name), np.random.default_rng(0)
    side = config.resize_factor[0]
    scene = rng.integers(40, 216, (2, 4, 1)).repeat(side, 0).repeat(side, 1)
    frames = np.stack([scene] * 12).astype(float)
    frames[6:, :side, :side] -= 30
    noisy = (frames + rng.normal(0, 4.5, (12, *scene.shape[:2], 3))).clip(0, 255).round().astype(np.uint8)
    tokens, grid = DCTTokenizer(config).encode(noisy)
    floor = kept_cells(tokens, grid, config, 38, noise_floor=True)
    if name != "x16":  # which holds so little of the noise that 38 dB stand it
        assert kept_cells(tokens, grid, config, 38).float().mean() > 0.9
    assert floor[1:].sum() == 1 and floor[3, 0, 0]


def test_the_noise_floor_is_that_of_the_stillest_cells():
    """Two of eight cells change by fine grain of 7 levels, the others have no noise: nothing is taken for noise."""
    config, side = DCTConfig.preset("x4"), 56
    frames = np.full((4, 2 * side, 4 * side, 3), 120.0, dtype=np.float32)
    frames[2:, :, :side] += np.random.default_rng(0).normal(0, 7, (2, 2 * side, side, 3)).astype(np.float32)
    tokens, grid = DCTTokenizer(config).encode(frames)
    assert kept_cells(tokens, grid, config, 38, noise_floor=True)[1].tolist() == [[True, False, False, False]] * 2


def test_what_is_no_number_is_kept():
    tokens, grid = cells_of([[[100, 100]]] * 2)
    tokens[-1, 0] = math.nan
    assert kept_cells(tokens, grid, ALL)[1, 0].tolist() == [False, True]


def test_decode_fills_what_was_skipped():
    frames = np.zeros((6, 16, 24, 3), dtype=np.uint8)
    frames[:, :8, 8:], frames[4:, 8:, :8] = (40, 90, 200), (250, 128, 3)
    tokenizer = DCTTokenizer(ALL)
    tokens, grid = tokenizer.encode(frames)
    kept = kept_cells(tokens, grid, ALL)
    assert kept.sum((1, 2)).tolist() == [2, 0, 1]
    assert np.array_equal(tokenizer.decode(keep_tokens(tokens, kept), grid, kept).numpy(), frames)


def test_decode_refuses_what_is_kept_elsewhere():
    tokens, grid = cells_of([[[1, 2]]])
    with pytest.raises(
        ValueError, match=r"kept \[1, 1, 2\] with 4 tokens for each cell that is kept, got kept \[1, 1, 2\]"
    ):
        DCTTokenizer(ALL).decode(tokens, grid, torch.tensor([[[True, False]]]))


def test_shown_cells_by_plain_loops():
    rng = np.random.default_rng(0)
    for _ in range(30):
        kept = torch.from_numpy(rng.random(rng.integers(1, 5, 3)) < 0.4)
        kept[0, 0, 0] = True
        shown = {}
        for t, r, c in np.ndindex(*kept.shape):
            left = (0, r, c - 1) if c else (0, r - 1, 0)
            source = (t, r, c) if kept[t, r, c] else shown[(t - 1, r, c) if t else left]
            shown[t, r, c] = shown.get(source, source)
        numbers = [int(np.ravel_multi_index(shown[place], kept.shape)) for place in np.ndindex(*kept.shape)]
        assert shown_cells(kept).flatten().tolist() == numbers


@pytest.mark.parametrize("skip_db", [0, -1, math.nan])
def test_a_threshold_is_a_positive_number(skip_db):
    with pytest.raises(ValueError, match="skip_db must be a positive number of dB"):
        kept_cells(*cells_of([[[1]]]), ALL, skip_db)


def test_tokens_and_grid_must_fit():
    tokens, _ = cells_of([[[1, 2]]])
    with pytest.raises(ValueError, match=r"preset all for the grid \(1, 3, 3\) must be \[9, 96\]"):
        kept_cells(tokens, (1, 3, 3), ALL)


def test_what_is_filled_must_fit():
    tokens, _ = cells_of([[[1, 2]]])
    with pytest.raises(ValueError, match=r"8 tokens do not fit 1 kept cells of \[1, 1, 2\]"):
        fill_tokens(tokens, torch.tensor([[[False, True]]]))
    with pytest.raises(ValueError, match="7 tokens do not fit 2 kept cells"):
        fill_tokens(tokens[:7], torch.tensor([[[True, True]]]))
