"""The statistics of the experiments on made-up numbers, against scipy and arithmetic by hand; tables and figures."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.quality import compare

CURVE = [{"step": step, "seconds": step / 10, "loss": 1.0, "accuracy": 0.1, "hard_accuracy": 0.1} for step in (5, 10)]


def result(arm: str, seed: int, right: list[int], hard_right: list[int], finished: bool = True, **settings) -> dict:
    """A run on pictures with 10 scored tokens each, 4 of them hard."""
    count = len(right)
    size = {"width": 64, "vision_layers": 1, "language_layers": 1}
    return {
        "finished": finished,
        "settings": {"task": "reading", "arm": arm, "seed": seed, "steps": 10, "batch": 2, "knobs": {}, "size": size}
        | {"learning_rate": 1e-3, "start_from": None, "save": False}
        | settings,
        "visual_tokens": 16,
        "floats_per_token": 20,
        "live_floats_per_token": 10,
        "chance": 0.1,
        "hard_levels": [4, 5],
        "curve": CURVE,
        "milliseconds": {"draw": 1.0, "encode": 2.0, "train": 3.0},
        "accuracy": sum(right) / (10 * count),
        "hard_accuracy": sum(hard_right) / (4 * count),
        "by_level": {"4": [sum(hard_right), 4 * count], "9": [sum(right) - sum(hard_right), 6 * count]},
        "by_picture": {"right": right, "all": [10] * count, "hard_right": hard_right, "hard_all": [4] * count},
        "generation": {"samples": 1, "accuracy": 0.5, "agrees_with_forced": 1.0},
    }


def test_a_paired_difference_is_that_of_the_textbook():
    ours, theirs = [0.9, 0.8, 0.85, 0.95], [0.7, 0.75, 0.8, 0.7]
    gap = np.array([0.2, 0.05, 0.05, 0.25])
    error = gap.std(ddof=1) / 2
    reach = stats.t.ppf(0.975, 3) * error
    difference = compare.paired_difference(ours, theirs)
    assert difference.pairs == 4 and difference.mean == pytest.approx(0.1375)
    assert (difference.low, difference.high) == pytest.approx((0.1375 - reach, 0.1375 + reach))
    assert difference.p == pytest.approx(2 * stats.t.sf(0.1375 / error, 3))


def test_equal_series_show_nothing_and_a_constant_gap_everything():
    assert compare.paired_difference([1, 2, 3], [1, 2, 3]) == compare.Difference(0, 0, 0, 1.0, 3)
    constant = compare.paired_difference([2, 3], [1, 2])
    assert constant.p == 0.0 and compare.describe(constant) == "+100.0 points (+100.0 to +100.0), p < 1e-09"
    with pytest.raises(ValueError, match="got 3 and 2"):
        compare.paired_difference([1, 2, 3], [1, 2])


@pytest.fixture
def results(tmp_path):
    """x4 better than quarter by 3, 2 and 4 tokens of 10; pixels in one seed alone; one run of another experiment."""
    rows = [result("quarter", seed, [4, 5, 4, 5], [1, 1, 1, 1]) for seed in range(3)]
    rows += [result("x4", seed, [4 + g, 5 + g, 5 + g, 5 + g], [3, 3, 2, 3]) for seed, g in enumerate((3, 2, 4))]
    rows += [result("pixels", 0, [9, 9, 8, 9], [4, 3, 3, 4]), result("x4", 0, [5, 5], [1, 1], learning_rate=3e-3)]
    rows += [result("raw28", 0, [0, 0], [0, 0], finished=False)]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    (tmp_path / "first.plan.json").write_text('{"steps": 10}')
    return tmp_path


def test_only_runs_of_one_experiment_are_compared(results):
    grouped = compare.experiments(compare.load(results))
    assert [list(arms) for arms in grouped.values()] == [["pixels", "quarter", "x4"], ["x4"]]
    assert [run["settings"]["seed"] for run in next(iter(grouped.values()))["x4"]] == [0, 1, 2]


def test_the_verdict_needs_three_seeds(results):
    arms = next(iter(compare.experiments(compare.load(results)).values()))
    lines = {line.split(":")[0]: line for line in compare.tests(arms)}
    line = lines["x4 - quarter, all"]
    expected = stats.ttest_rel([0.775, 0.675, 0.875], [0.45] * 3)
    assert line.endswith(f"p = {expected.pvalue:.2g}: better") and "over 3 seeds: +32.5 points (+7.7 to +57.3)" in line
    assert "over 4 pictures of seed 0: +32.5 points" in line
    assert lines["x4 - pixels, all"].endswith("no verdict below 3 seeds")


def test_tables_show_mean_and_spread_and_levels(results):
    arms = next(iter(compare.experiments(compare.load(results)).values()))
    assert "| x4 | 16 | 10 of 20 | 77.5 ± 10.0 | 68.8 ± 0.0 | 50.0 ± 0.0 | 2.0 + 3.0 |  | 3 |" in compare.table(arms)
    assert "| x4 | 68.8 | 83.3 |" in compare.level_table(arms)


def test_the_command_prints_and_draws(results, capsys):
    assert compare.main(["--results", str(results), "--figures", str(results / "figures")]) == 0
    said = capsys.readouterr().out
    assert "unfinished: reading raw28 seed 0, 10 of 10 steps" in said and "4 test samples, chance 10 %" in said
    assert sorted(path.name for path in (results / "figures").iterdir()) == ["reading_0.png", "reading_1.png"]


def test_an_empty_folder_is_one_line(tmp_path, one_line_error):
    assert compare.main(["--results", str(tmp_path)]) == 1
    assert "no results in" in one_line_error()
