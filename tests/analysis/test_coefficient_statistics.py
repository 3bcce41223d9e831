"""The table of coefficient statistics: its spectrum, the fit, the built-in table against images, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from dct_qwen2vl.analysis import coefficient_moments, coefficient_statistics, media_files, natural_images
from dct_qwen2vl.dct.configuration_dct import (
    CoefficientTable,
    coefficient_variance,
    dct_matrix,
    line_response,
    line_weights,
)

BUILT_IN = Path(coefficient_statistics.__file__).parents[1] / "dct" / "coefficient_table.json"
VALUES = json.loads(BUILT_IN.read_text())


@pytest.fixture(scope="module")
def stills():
    """The stills of the built-in table, measured again."""
    found = coefficient_moments.Measurement()
    images = (natural_images.load(name) for name in natural_images.TABLE_IMAGES)
    coefficient_moments.measure_images(
        images, found, coefficient_statistics.DEFAULT_PIXELS, np.random.default_rng(0), with_motion=False
    )
    return found


# The spectrum


def test_responses_of_two_samples():
    """Constant, 1 0 -1 0 and 1 -1 1 -1: all in the sum, half and half, all in the difference."""
    np.testing.assert_allclose(line_response(2, 2), [[2, 1, 0], [0, 1, 2]], atol=1e-12)


@given(st.integers(1, 20), st.integers(1, 30), st.data())
@settings(max_examples=30, deadline=None)
def test_responses_are_those_of_the_sinusoids_covariance(size, count, data):
    number = data.draw(st.integers(0, count))
    lags = np.subtract.outer(np.arange(size), np.arange(size))
    covariance = np.cos(np.pi * number / count * lags)  # of a sinusoid of random phase and power 1
    expected = np.diag(dct_matrix(size) @ covariance @ dct_matrix(size).T)
    np.testing.assert_allclose(line_response(size, count)[:, number], expected, atol=1e-9)
    assert line_response(size, count).sum(axis=0) == pytest.approx(np.full(count + 1, size))


def test_weights_of_stored_lines():
    """Lines 0, 1 and 4 of 4: line 0 alone, line 2 half-way in log frequency, line 3 at log2(3) / 2."""
    third = np.log2(3) / 2
    expected = [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 1 - third, third], [0, 0, 1]]
    np.testing.assert_allclose(line_weights((0, 1, 4), 4), expected)
    finer = line_weights((0, 1, 4), 8)
    np.testing.assert_allclose(finer[::2][1:], np.array(expected)[1:])
    np.testing.assert_allclose(finer[1], [0, 1, 0])  # below the first line its value holds


def test_a_constant_image_has_dc_only():
    power = np.full((3, 2, 2, 2), -200.0)
    power[0, 0, 0, 0] = 2  # 2^2
    variance = coefficient_variance((2, 4, 8), CoefficientTable((1, 1, 1), ((0, 1),) * 3, power))
    assert variance[0, 0, 0, 0] == pytest.approx(4 * 2 * 4 * 8)
    assert variance.sum() == pytest.approx(variance[0, 0, 0, 0])


sides = st.integers(1, 112)


@given(st.tuples(st.integers(1, 16), sides, sides))
@settings(max_examples=15, deadline=None)
def test_any_block_has_positive_variances_and_the_same_energy(block):
    variance = coefficient_variance(block)
    assert variance.shape == (3, *block) and variance.dtype == np.float64
    assert np.isfinite(variance).all() and (variance > 0).all()
    per_value = variance.sum(axis=(1, 2, 3)) / np.prod(block)
    np.testing.assert_allclose(per_value, coefficient_variance((1, 1, 1)).ravel(), rtol=1e-9)


def test_blocks_above_the_measured_one():
    larger, measured = coefficient_variance((1, 224, 224)), coefficient_variance((1, 112, 112))
    assert (larger > 0).all()
    rings = larger[0, 0, 2::2, 2::2] / measured[0, 0, 1:, 1:]  # same frequencies
    assert 0.7 < np.median(rings) < 1.4


def test_variances_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        coefficient_variance((2, 2, 2))[0] = 1


# The fit


def test_fit_finds_a_spectrum_from_what_follows_of_it():
    table = CoefficientTable.from_file()
    found = coefficient_moments.fit_table(table.variance(coefficient_moments.BLOCK))
    for block in ((2, 14, 14), (2, 56, 56), (16, 8, 8)):
        assert np.abs(np.log2(found.variance(block) / table.variance(block))).max() < 0.1


# The built-in table


def test_built_in_table_is_small_and_says_where_it_is_from():
    assert BUILT_IN.stat().st_size < 60_000
    assert VALUES["made_by"] == "python -m dct_qwen2vl.analysis.coefficient_statistics --seed 0"
    assert (VALUES["images"], VALUES["videos"], VALUES["skipped"]) == (4, 0, 0)
    assert VALUES["block"] == list(coefficient_moments.BLOCK)


def test_statistics_of_stills_are_remade_exactly(stills):
    assert coefficient_statistics.statistics_of(stills.summary_stills) == VALUES["stills"]
    assert stills.images_read == VALUES["images"]


def test_the_command_measures_what_it_measured():
    """Motion, sizes and fit on the smallest setting. Where these figures change, the built-in table must be remade."""
    path = natural_images.image_path(natural_images.TABLE_IMAGES[0])
    found = coefficient_statistics.measure([path], [], (112 * 112,), seed=0)
    assert (found.stills.blocks, found.videos.blocks, found.skipped) == (1, 4, [])
    variance = coefficient_moments.fit_table(found.square(directions=False)).variance((2, 3, 3))
    expected = [
        [[1.1232, 0.053811, 0.0080496], [0.053811, 0.010481, 0.0028092], [0.0080496, 0.0028092, 0.0010127]],
        [[0.18710, 0.018063, 0.0039849], [0.018063, 0.0045869, 0.0015055], [0.0039849, 0.0015055, 0.00060215]],
    ]
    np.testing.assert_allclose(variance[0], expected, rtol=1e-3)
    np.testing.assert_allclose(variance[1:, 1, 1, 2], [5.5360e-05, 5.2850e-05], rtol=1e-3)


def test_table_agrees_with_what_was_measured(stills):
    """In powers of two; the large blocks are too few for a narrow spread."""
    for moments, spread in ((stills.summary_stills, 0.2), (stills.stills, 0.5)):
        measured = (moments.square + moments.square.swapaxes(2, 3)) / 2
        ratio = np.log2(coefficient_variance(moments.block) / measured)
        assert abs(ratio.mean()) < 0.1 and ratio.std() < spread


def test_table_fits_images_that_are_not_in_it():
    """The order is what counts: at half of 4:2:0 the table's choice loses less than 0.7 dB to the images' own."""
    moments = coefficient_moments.Moments((1, 28, 28))
    for name in natural_images.HELD_OUT_IMAGES:
        moments.add(coefficient_moments.resized(natural_images.load(name)[None], (336, 448)), 1)
    own, tabled = (variance.ravel() for variance in (moments.square, coefficient_variance((1, 28, 28))))
    lost = [own[np.argsort(-variance)[588:]].sum() for variance in (tabled, own)]
    assert 1 <= lost[0] / lost[1] < 10**0.07


def test_trends():
    variance = coefficient_variance((2, 28, 28))
    for plane in variance:
        diagonal = np.array([plane[0, f : f + 4, f : f + 4].mean() for f in range(0, 28, 4)])
        assert (np.diff(diagonal) < 0).all(), "less at higher frequencies"
        assert (plane[0, :8, :8] > plane[1, :8, :8]).all(), "frames resemble each other"
    assert (variance[0] > variance[1]).all() and (variance[0] > variance[2]).all(), "more luma than colour"
    np.testing.assert_allclose(variance, variance.swapaxes(2, 3), err_msg="rows and columns are alike")


# Reading and measuring


def test_moments_are_means_over_blocks(natural_frames):
    frames = natural_frames(5, 4, 8)
    moments = coefficient_moments.Moments((2, 4, 4))
    moments.add(frames, 0.5)
    moments.add(frames, 0.5)
    luma = (frames[:4] / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) @ np.array([0.299, 0.587, 0.114])
    blocks = [luma[t : t + 2, :, x : x + 4] for t in (0, 2) for x in (0, 4)]
    coefficients = np.stack([dctn(block, norm="ortho") for block in blocks])
    assert moments.blocks == 8
    np.testing.assert_allclose(moments.square[0], (coefficients**2).mean(axis=0))
    assert moments.dc_variance[0] == pytest.approx(coefficients[:, 0, 0, 0].var())


def test_stills_give_the_frame_and_videos_the_motion(natural_frames):
    found = coefficient_moments.Measurement()
    frames = natural_frames(16, 112, 112, seed=1)
    found.add_stills(frames[:1], 1.0)
    found.add_video(frames, 1.0)
    square = found.square(directions=True)
    least = coefficient_moments.LEAST_VARIANCE
    np.testing.assert_allclose(square.mean(axis=1), np.maximum(found.stills.square[:, 0], least), rtol=1e-9)
    videos = np.maximum(found.videos.square, least)
    expected = videos / videos.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(square / square.sum(axis=1, keepdims=True), expected, rtol=1e-9)
    both = found.square(directions=False)
    np.testing.assert_allclose(both, (square + square.swapaxes(2, 3)) / 2, rtol=1e-12)


def test_views_move_as_told():
    """A ramp that rises by 2 a column and 1 a row: panning by (3, 1) px adds 5 a frame; a still camera, nothing."""
    rows, columns = np.mgrid[0:60, 0:80]
    ramp = np.repeat((columns * 2 + rows)[..., None], 3, axis=-1).astype(np.uint8)
    moving = natural_images.moving_view(ramp[:, :60], (30, 30), 3, velocity=(1.5, 0.5)).astype(int)
    assert np.abs(np.diff(moving, axis=0)[:, 8:20, 8:20] - (1.5 * 2 * 1 + 0.5 * 2 * 2)).max() <= 1
    still = natural_images.moving_view(ramp, (30, 40), 3)
    assert (still == still[0]).all() and still.shape == (3, 30, 40, 3)


def test_a_view_beyond_the_edge_is_mirrored():
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    seen = natural_images.view(image, (0.0, 8.0), (8, 16), 1.0)
    np.testing.assert_array_equal(seen[4:], image[:4])
    np.testing.assert_array_equal(seen[:4], image[:4][::-1])


def test_zoom_and_cut():
    image, other = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
    image[24:40, 24:40] = 250
    zoomed = natural_images.moving_view(image, (32, 32), 4, zoom=1.2)
    bright = [(frame > 125).sum() for frame in zoomed]
    assert bright == sorted(bright) and bright[-1] > 1.5 * bright[0]
    *_, cut = natural_images.videos_of(image[:20, :20] * 0, other, (32, 32), 8, np.random.default_rng(0))
    means = cut.reshape(8, -1).mean(axis=1)
    assert set(means) == {0.0, 200.0} and list(means) == sorted(means)


# The command


def run(*arguments: object) -> int:
    return coefficient_statistics.main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, natural_frames) -> Path:
    """Two images, a small one, a broken one, and a text."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(natural_frames(1, 120, 150)[0]).save(folder / "a.png")
    Image.fromarray(natural_frames(1, 130, 115, seed=1)[0]).save(folder / "deeper" / "b.jpg")
    Image.fromarray(natural_frames(1, 50, 200)[0]).save(folder / "small.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_with_broken_files(folder, tmp_path, capsys):
    table, figure = tmp_path / "table.json", tmp_path / "table.png"
    assert run("--images", folder, "--pixels", 12544, "--output", table, "--plot", figure) == 0
    said = capsys.readouterr().out
    assert "--images: 1 files do not end in .jpg" in said
    assert f"skipped {folder / 'broken.png'}: not a readable image" in said
    assert f"skipped {folder / 'small.png'}: 200 x 50 px, smaller than a block of 112 px" in said
    assert "read 2 images and 0 videos" in said and f"wrote {table} and {figure}" in said
    values = json.loads(table.read_text())
    assert (values["images"], values["skipped"]) == (2, 2)
    assert (
        values["made_by"]
        == f"python -m dct_qwen2vl.analysis.coefficient_statistics --images {folder} --pixels 12544 --seed 0"
    )
    assert (coefficient_variance((2, 28, 28), CoefficientTable.from_file(table)) > 0).all()
    assert Image.open(figure).size == (1200, 1050)
    before = table.read_bytes()
    assert run("--images", folder, "--pixels", 12544, "--output", table, "--force") == 0
    assert table.read_bytes() == before, "the same input gives the same bytes"


def test_videos_are_measured_as_they_are(tmp_path, video_file, natural_frames, capsys):
    still = np.repeat(natural_frames(1, 112, 112), 16, axis=0)
    (tmp_path / "still.mp4").write_bytes(video_file(still))
    (tmp_path / "short.mp4").write_bytes(video_file(still[:5]))
    table = tmp_path / "table.json"
    assert run("--videos", tmp_path, "--output", table) == 0
    said = capsys.readouterr().out
    assert "read 0 images and 1 videos" in said
    assert f"skipped {tmp_path / 'short.mp4'}: " in said
    assert " frames of 112 x 112 px, smaller than a block of 16 frames of 112 px" in said
    variance = coefficient_variance((4, 8, 8), CoefficientTable.from_file(table))
    assert variance[0, 1:].sum() < 1e-3 * variance[0, 0].sum(), "hardly anything moves"


def test_files_are_spread_evenly():
    files = [Path(str(number)) for number in range(10)]
    assert [int(str(file)) for file in media_files.spread(files, 3)] == [0, 3, 6]
    assert media_files.spread(files, 10) == files


@pytest.mark.parametrize("broken", [True, False])
def test_nothing_to_measure(broken, tmp_path, one_line_error):
    file = tmp_path / "a.png"
    if broken:
        file.write_bytes(b"no image")
    assert run("--images", file, "--output", tmp_path / "table.json") == 1
    expected = "none of 1 files could be used, the first: " if broken else f"{file} does not exist"
    assert expected in one_line_error()
    assert not (tmp_path / "table.json").exists()


def test_an_existing_table_is_kept_without_force(tmp_path, one_line_error):
    (tmp_path / "table.json").write_text("mine")
    assert run("--output", tmp_path / "table.json") == 1
    assert "table.json exists: choose another --output, or --force to replace it" in one_line_error()
    assert (tmp_path / "table.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pixels", "12543"], "--pixels: at least 12544, one block, got 12543"),
        (["--max-files", "0"], "--max-files must be at least 1 and --seed 0, got 0 and 0"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table made by coefficient_statistics.py: JSONDecodeError"),
        ("{}", "is no table made by coefficient_statistics.py: KeyError"),
        (json.dumps({**VALUES, "block": [16, 112, 56]}), "lines must rise from 0 to"),
        (json.dumps({**VALUES, "log2_power": [1.0]}), "log2_power must be (3, 8, 13, 13) finite numbers"),
    ],
)
def test_files_that_are_no_table(text, message, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        CoefficientTable.from_file(tmp_path / "table.json")
    assert message in str(caught.value)
