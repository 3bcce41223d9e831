"""What the classifier is shown is what a variant's tokens hold, and it learns to read."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality.analysis import digit_classifier
from benchmarks.quality.analysis.digit_classifier import KNOBS, Rebuild, join, table
from benchmarks.quality.result_files import Output, read_file
from benchmarks.quality.tasks.registry import Source, make_task
from benchmarks.quality.variants import cut, downscale

CPU = torch.device("cpu")
LUMA = torch.tensor([0.299, 0.587, 0.114])
EASY = ["--heights", "22", "--width", "8", "--images", "8", "--test", "64", "--device", "cpu"]


def line_of(path: Path) -> dict:
    """Of the one run that a result file holds: variant x4, seed 0."""
    ((name, result),) = read_file(path).items()
    assert name == "legibility_x4_seed0"
    return result


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return Source(make_task("reading", KNOBS), "cpu").batch("test", 0, 0, 2).frames


def test_join_undoes_cut():
    frames = torch.randn(2, 1, 1, 56, 84, 3)
    assert torch.equal(join(cut(frames, 7), (1, 8, 12), 7), frames[:, 0, 0])


@pytest.mark.parametrize("variant", ["pixels", "exact", "x4-444"])
def test_variants_that_keep_everything_show_the_image(frames, variant):
    torch.testing.assert_close(Rebuild(variant, 7, 112, CPU)(frames), frames[:, 0].float(), atol=1e-3, rtol=0)


def test_x4_shows_the_luma_of_the_image_and_half_its_chroma(frames):
    error = Rebuild("x4", 7, 112, CPU)(frames) - frames[:, 0]
    assert (error @ LUMA).abs().max() < 1e-3 < 1 < error.abs().max()


def test_a_lower_max_pixels_shows_each_pixel_of_the_small_image_four_times(frames):
    shown = Rebuild("quarter", 7, 112, CPU)(frames)
    assert torch.equal(shown[:, ::2, ::2], downscale(frames.float(), 2)[:, 0])
    assert torch.equal(shown[:, ::2, ::2], shown[:, 1::2, 1::2])


def test_the_corner_of_x4_shows_less_than_x4(frames):
    errors = [
        ((Rebuild(variant, 7, 112, CPU)(frames) - frames[:, 0]) @ LUMA).std()
        for variant in ("x4", "x4-half", "x4-corner")
    ]
    assert errors[0] < 0.01 * errors[1] and errors[1] < errors[2]


def test_large_digits_are_learned_and_a_finished_run_is_kept(tmp_path, capsys):
    command = ["--variants", "x4", "--seeds", "0", "--steps", "60", *EASY, "--output", str(tmp_path)]
    assert digit_classifier.main(command) == 0
    output = Output.at(tmp_path, "legibility")
    result = line_of(output.file)
    assert result["accuracy"] > 0.5 and list(result["by_level"]) == ["22"] and result["by_level"]["22"][1] == 64 * 16
    assert f"| x4 | {100 * result['accuracy']:.1f} |" in capsys.readouterr().out
    output.record({**result, "note": "kept"})
    assert digit_classifier.main(command) == 0 and "note" in line_of(output.file)
    assert digit_classifier.main([*command, "--steps", "1"]) == 0 and "note" not in line_of(output.file)
    assert [path.name for path in tmp_path.iterdir()] == ["legibility.jsonl"]


def test_as_many_images_are_tested_as_asked_for(tmp_path):
    file = tmp_path / "mine.jsonl"
    command = ["--variants", "x4", "--seeds", "0", "--steps", "1", *EASY, "--test", "70", "--output", str(file)]
    assert digit_classifier.main(command) == 0
    assert line_of(file)["by_level"]["22"][1] == 70 * 16


def test_a_variant_that_cannot_be_rebuilt_is_one_line(tmp_path, capsys):
    assert digit_classifier.main(["--variants", "x4-pca", *EASY, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "digit_classifier.py: variant x4-pca is measured on data: choose pixels, quarter, sixteenth or a DCT variant\n"
    )


def test_the_table_has_means_over_seeds():
    runs = [
        {"classifier": {"variant": "x4"}, "accuracy": share, "by_level": {"4": [right, 10], "12": [9, 10]}}
        for share, right in ((0.6, 3), (0.8, 7))
    ]
    assert table(runs) == [
        "| what is read | 4 px | 12 px | all | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| x4 | 50.0 | 90.0 | 70.0 | 2 |",
    ]
