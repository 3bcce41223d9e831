"""The statistics of the experiments on made-up numbers, against scipy and arithmetic by hand; tables and figures."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.quality.analysis import compare, figures, paired, run_results
from benchmarks.quality.result_files import write_file

CURVE = [{"step": step, "seconds": step / 10, "loss": 1.0, "accuracy": 0.1, "hard_accuracy": 0.1} for step in (5, 10)]


def result(variant: str, seed: int, right: list[int], hard_right: list[int], finished: bool = True, **settings) -> dict:
    """A run on images with 10 scored tokens each, 4 of them hard."""
    count = len(right)
    size = {"width": 64, "vision_layers": 1, "language_layers": 1}
    return {
        "finished": finished,
        "settings": {
            "task": "reading",
            "variant": variant,
            "seed": seed,
            "steps": 10,
            "batch": 2,
            "knobs": {},
            "size": size,
        }
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
        "by_image": {"right": right, "all": [10] * count, "hard_right": hard_right, "hard_all": [4] * count},
        "generation": {"samples": 1, "accuracy": 0.5, "agrees_with_forced": 1.0},
    }


def test_a_paired_difference_is_that_of_the_textbook():
    ours, theirs = [0.9, 0.8, 0.85, 0.95], [0.7, 0.75, 0.8, 0.7]
    gap = np.array([0.2, 0.05, 0.05, 0.25])
    error = gap.std(ddof=1) / 2
    reach = stats.t.ppf(0.975, 3) * error
    difference = paired.paired_difference(ours, theirs)
    assert difference.pairs == 4 and difference.mean == pytest.approx(0.1375)
    assert (difference.low, difference.high) == pytest.approx((0.1375 - reach, 0.1375 + reach))
    assert difference.p == pytest.approx(2 * stats.t.sf(0.1375 / error, 3))


def test_equal_series_show_nothing_and_a_constant_gap_everything():
    assert paired.paired_difference([1, 2, 3], [1, 2, 3]) == paired.Difference(0, 0, 0, 1.0, 3)
    constant = paired.paired_difference([2, 3], [1, 2])
    assert constant.p == 0.0 and paired.describe(constant) == "+100.0 points (+100.0 to +100.0), p < 1e-09"
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired.paired_difference([1, 2, 3], [1, 2])


def test_a_crossed_difference_is_a_t_test_where_only_seeds_or_only_items_differ():
    by_seed, by_item = np.array([0.1, 0.3, 0.2]), np.array([0.5, -0.2, 0.1, 0.4, 0.3])
    for scores, gains in ((by_seed, np.tile(by_seed[:, None], 5)), (by_item, np.tile(by_item, (3, 1)))):
        test = stats.ttest_1samp(scores, 0)
        low, high = test.confidence_interval(0.95)
        found = paired.crossed_difference(gains)
        assert (found.mean, found.low, found.high) == pytest.approx((scores.mean(), low, high))
        assert found.p == pytest.approx(test.pvalue) and found.pairs == 3
    assert paired.crossed_difference(np.ones((3, 4))) == paired.Difference(1, 1, 1, 0.0, 3)
    with pytest.raises(ValueError, match="got 1 and 5"):
        paired.crossed_difference(np.ones((1, 5)))


def test_a_crossed_difference_weighs_items_by_their_size():
    sizes, generator = np.array([1.0, 2.0, 5.0, 10.0] * 50), np.random.default_rng(0)
    share = np.array([0.3, -0.1, 0.2, 0.1] * 50)
    found = paired.crossed_difference(np.tile(share * sizes, (3, 1)), sizes)
    assert found.mean == pytest.approx((share * sizes).sum() / sizes.sum())
    drawn = [generator.integers(len(sizes), size=len(sizes)) for _ in range(4000)]
    error = np.std([(share * sizes)[one].sum() / sizes[one].sum() for one in drawn])  # by bootstrap
    assert (found.high - found.low) / 2 == pytest.approx(1.97 * error, rel=0.05)


def test_intervals_of_crossed_differences_hold_the_true_one_19_times_of_20_or_more():
    generator, held = np.random.default_rng(0), 0
    for _ in range(1000):
        seeds, items, both = (generator.normal(size=shape) for shape in ((3, 1), (1, 40), (3, 40)))
        found = paired.crossed_difference(0.2 + 0.1 * seeds + 0.8 * items + 0.5 * both)
        held += found.low <= 0.2 <= found.high
    assert held >= 940


def test_levels_that_no_image_has_give_no_verdict(tmp_path):
    rows = [result(variant, seed, [5, 5], [0, 0]) for seed in range(3) for variant in ("quarter", "x4")]
    for row in rows:
        row["by_image"]["hard_all"] = [0, 0]
    variants = next(iter(run_results.experiments(written(tmp_path, *rows)).values()))
    assert compare.tests(variants)[1] == "x4 - quarter, hard levels: nothing of it in two test images"


def test_runs_on_other_test_images_are_not_compared(tmp_path):
    right, other = ([5, 5], [1, 1]), result("quarter", 0, [5, 5], [1, 1])
    other["by_image"]["hard_all"] = [4, 3]
    start = {**result("exact", 0, *right, steps=80), "by_image": other["by_image"]}
    warm = result("x4", 0, *right, start_from="run00")
    grouped = run_results.experiments(written(tmp_path, start, warm, result("x4", 0, *right), other))
    assert [list(variants) for variants in grouped.values()] == [["exact"], ["quarter"], ["x4"], ["x4"]]


def test_marks_at_chance_say_nothing(results):
    variants = next(iter(run_results.experiments(run_results.load(results)).values()))
    for runs in variants.values():
        runs[0]["chance"] = 0.5
    assert compare.learning_table(variants)[0] == "| steps until right, %: | 80 | 90 | 95 | 98 |"


@pytest.fixture
def results(tmp_path):
    """x4 better than quarter by 3, 2 and 4 tokens of 10; pixels in one seed alone; one run of another experiment."""
    rows = [result("quarter", seed, [4, 5, 4, 5], [1, 1, 1, 1]) for seed in range(3)]
    rows += [result("x4", seed, [4 + g, 5 + g, 5 + g, 5 + g], [3, 3, 2, 3]) for seed, g in enumerate((3, 2, 4))]
    rows += [result("pixels", 0, [9, 9, 8, 9], [4, 3, 3, 4]), result("x4", 0, [5, 5], [1, 1], learning_rate=3e-3)]
    rows += [result("x4-raw", 0, [0, 0], [0, 0], finished=False)]
    notes = {"name": "notes", "classifier": {"variant": "x4"}}  # no result of a run
    write_file(tmp_path / "suite.jsonl", [notes, *named(*rows)])
    return tmp_path


def test_only_runs_of_one_experiment_are_compared(results):
    grouped = run_results.experiments(run_results.load(results))
    assert [list(variants) for variants in grouped.values()] == [["pixels", "quarter", "x4"], ["x4"]]
    assert [run["settings"]["seed"] for run in next(iter(grouped.values()))["x4"]] == [0, 1, 2]


def test_differences_by_level_are_over_seeds(results):
    variants = next(iter(run_results.experiments(run_results.load(results)).values()))
    row = compare.level_table(variants)[-1]
    share = [11 / 16, 11 / 16, 11 / 16], [4 / 16] * 3  # of level 4; of 9 the rest
    rest = [(right - 11) / 24 for right in (31, 27, 35)], [(18 - 4) / 24] * 3
    assert paired.paired_difference(*share).mean == pytest.approx(0.4375)
    test = stats.ttest_rel(*rest).confidence_interval(0.95)
    reach = 50 * (test.high - test.low)
    mean = 100 * np.mean(np.subtract(*rest))
    assert row == f"| x4 - quarter | +43.8 ± 0.0 | {mean:+.1f} ± {reach:.1f} |"
    few = {variant: runs[:2] for variant, runs in variants.items()}
    assert not any(line.startswith("| x4 - ") for line in compare.level_table(few))


def test_the_verdict_needs_three_seeds(results):
    variants = next(iter(run_results.experiments(run_results.load(results)).values()))
    lines = {line.split(":")[0]: line for line in compare.tests(variants)}
    line = lines["x4 - quarter, all"]
    gains = np.array([[3, 3, 4, 3], [2, 2, 3, 2], [4, 4, 5, 4]])  # of x4 over quarter, in images of 10
    expected = paired.verdict_over_seeds(gains, np.full(4, 10), "images")
    assert expected.startswith("over 3 seeds and 4 images: +32.5 points (") and expected.endswith(": better")
    assert line.endswith(f"; {expected}") and "over 4 images of seed 0: +32.5 points" in line
    assert lines["x4 - pixels, all"].endswith("no verdict below 3 seeds")


def test_tables_show_mean_and_spread_and_levels(results):
    variants = next(iter(run_results.experiments(run_results.load(results)).values()))
    times = run_results.step_times(run_results.load(results))
    lines = compare.table(variants, times)
    assert "| x4 | 16 | 10 of 20 | 77.5 ± 10.0 | 68.8 ± 0.0 | 50.0 ± 0.0 | 2.0 + 3.0 |  | 3 |" in lines
    assert "| x4 | 68.8 | 83.3 |" in compare.level_table(variants)


def named(*rows: dict) -> list[dict]:
    """Results named run00, run01, ..."""
    return [{"name": f"run{number:02}", **row} for number, row in enumerate(rows)]


def written(folder, *rows: dict) -> list[dict]:
    """Results as `load` gives them, named run00, run01, ..."""
    write_file(folder / "suite.jsonl", named(*rows))
    return run_results.load(folder)


def test_times_are_of_runs_alone_on_the_device_whatever_their_steps(tmp_path):
    right = [5, 5], [1, 1]
    rows = [result("x4", 0, *right), result("quarter", 0, *right), result("pixels", 0, *right)]
    for row in rows:
        row.update(alone=False, milliseconds={"draw": 1.0, "encode": 90.0, "train": 90.0})
    short = [result("x4", seed, *right, steps=steps, test=2) for seed, steps in ((0, 3), (1, 5), (2, 3))]
    for row, train in zip(short, (7.0, 20.0, 8.0)):
        row.update(alone=True, milliseconds={"draw": 1.0, "encode": 2.0, "train": train})
    others = [result("quarter", 0, *right, steps=3, batch=4), result("quarter", 0, *right, steps=3, knobs={"cells": 1})]
    others += [result("quarter", 0, *right, steps=3, patch=7), result("quarter", 1, *right, finished=False)]
    others += [{**result("quarter", 2, *right), "alone": False}]
    results = written(tmp_path, *rows, *short, *others, result("pixels", 0, *right, learning_rate=3e-3))
    variants, times = next(iter(run_results.experiments(results).values())), run_results.step_times(results)
    cells = {line.split(" | ")[0]: line.split(" | ")[6] for line in compare.table(variants, times)}
    assert cells == {
        "| variant": "ms a step: encode + train",
        "| ---": "---",
        "| pixels": "2.0 + 3.0",  # of a result that does not say
        "| quarter": "",
        "| x4": "2.0 + 8.0",  # the median
    }
    assert compare.untimed(variants, times) == ["no times of quarter: no such run had the device to itself"]
    assert [len(runs) for runs in variants.values()] == [1, 2, 1]  # the short runs are not averaged in


def test_what_is_drawn_changes_no_time_and_what_has_another_shape_does():
    plain = run_results.cost_key(result("x4", 0, [5], [1], patch=7))
    assert run_results.cost_key(result("x4", 1, [5], [1], patch=7, knobs={"heights": [9, 10], "noise": 0})) == plain
    assert run_results.cost_key(result("x4", 0, [5], [1], patch=7, knobs={"size": 224})) != plain


def test_steps_to_a_mark_are_medians_and_need_every_seed():
    def run(variant: str, *accuracies: float) -> dict:
        curve = [{"step": 10 * number, "accuracy": accuracy} for number, accuracy in enumerate(accuracies)]
        return {**result(variant, 0, [5], [1]), "curve": curve}

    variants = {"exact, start": [run("exact", 1.0)], "quarter": [run("quarter", 0.2, 0.6), run("quarter", 0.1, 0.4)]}
    variants["x4"] = [run("x4", 0.1, 0.5, 0.91, 0.9), run("x4", 0.6, 0.7, 0.8, 0.96), run("x4", 0.1, 0.2, 0.85, 0.97)]
    assert compare.learning_table(variants) == [
        "| steps until right, %: | 50 | 80 | 90 | 95 | 98 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| quarter | - | - | - | - | - |",
        "| x4 | 10 | 20 | 30 | - | - |",
    ]
    assert compare.learning_table({"exact, start": variants["exact, start"]}) == []


def test_variants_without_times_are_not_drawn_over_time(results, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    variants = next(iter(run_results.experiments(run_results.load(results)).values()))
    times = run_results.step_times(run_results.load(results))
    times[run_results.cost_key(variants["x4"][0])] = {"encode": 200.0, "train": 300.0}
    del times[run_results.cost_key(variants["quarter"][0])]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    figures.draw_learning(variants, times, "heading", tmp_path / "figure.png")
    over_steps, over_time = ({line.get_label(): line for line in axis.lines} for axis in drawn[0].axes)
    assert [label.partition(":")[0] for label in over_steps] == ["pixels", "quarter", "x4"]
    legend = [text.get_text().partition(":")[0] for text in drawn[0].axes[-1].get_legend().get_texts()]
    assert legend == ["pixels", "quarter", "x4"]
    drawn_at = {label.partition(":")[0]: list(line.get_xdata()) for label, line in over_time.items()}
    assert drawn_at == {"pixels": [0.025, 0.05], "x4": [2.5, 5.0]}
    figures.draw_learning(variants, {}, "heading", tmp_path / "figure.png")
    assert len(drawn[1].axes) == 1


def test_the_same_run_saved_and_not_saved_is_one_seed(tmp_path):
    rows = [result("pixels", 0, [5, 5], [1, 1], save=save) for save in (False, True)]
    (variants,) = run_results.experiments(written(tmp_path, *rows)).values()
    assert [run["name"] for run in variants["pixels"]] == ["run00"]


def test_warm_starts_are_compared_among_those_of_the_same_start(tmp_path):
    right = [5, 5], [1, 1]
    starts = [result(variant, seed, *right, steps=80, save=True) for variant in ("pixels", "exact") for seed in (0, 1)]
    warm = [
        result(variant, number % 2, *right, start_from=f"run{number:02}") | {"curve": [{**CURVE[0], "step": 0}, *CURVE]}
        for number in range(4)
        for variant in ("quarter", "x4")
    ]
    warm[0]["curve"] = CURVE  # one that was not tested at step 0
    elsewhere = result("x4", 0, *right, start_from="reading_exact_seed0_0123abcd")
    results = written(tmp_path, *starts, *warm, result("x4", 0, *right), elsewhere)
    titled = {
        run_results.title(name).partition("rate 0.001")[2]: (name, variants)
        for name, variants in results_by_title(results)
    }
    sizes = {
        ending: {variant: len(runs) for variant, runs in variants.items()} for ending, (_, variants) in titled.items()
    }
    for variant in ("pixels", "exact"):
        assert sizes[f", from {variant} of 80 steps"] == {f"{variant}, start": 2, "quarter": 2, "x4": 2}
    assert sizes[", from reading_exact"] == {"x4": 1}
    variants = titled[", from pixels of 80 steps"][1]
    header, _, _, quarter, x4 = (line.split(" | ") for line in compare.table(variants, {}))
    assert (header[3], quarter[3], x4[3]) == ("at step 0, %", "10.0", "10.0 ± 0.0")
    assert [list(run_results.learning_curves(variants[variant])[0]) for variant in ("quarter", "x4")] == [
        [5, 10],
        [0, 5, 10],
    ]
    assert "at step 0" not in compare.table(titled[", from reading_exact"][1], {})[0]


def results_by_title(results: list[dict]) -> list[tuple[str, dict]]:
    """Experiments of 10 steps."""
    return [
        (name, variants)
        for name, variants in run_results.experiments(results).items()
        if json.loads(name)["steps"] == 10
    ]


def test_a_title_names_both_widths_and_reads_older_results(tmp_path):
    size = {"vision_width": 160, "vision_layers": 2, "language_width": 64, "language_layers": 3}
    rows = [result("x4", 0, [5, 5], [1, 1]), result("x4", 0, [5, 5], [1, 1], size=size, patch=7)]
    older, newer = map(run_results.title, run_results.experiments(written(tmp_path, *rows)))
    assert older == "reading, patches of 14 px, 10 steps of 2, layers 1 x 64 + 1 x 64, learning rate 0.001"
    assert newer == "reading, patches of 7 px, 10 steps of 2, layers 2 x 160 + 3 x 64, learning rate 0.001"


def test_the_command_prints_and_draws(results, capsys):
    assert compare.main(["--results", str(results), "--figures", str(results / "figures")]) == 0
    said = capsys.readouterr().out
    assert "unfinished: reading x4-raw seed 0, 10 of 10 steps" in said and "4 test samples, chance 10 %" in said
    assert sorted(path.name for path in (results / "figures").iterdir()) == [
        f"reading_{number}_{kind}.png" for number in (0, 1) for kind in ("budgets", "learning", "levels")
    ]


def test_times_may_come_from_another_folder(tmp_path, capsys):
    runs, times = tmp_path / "runs", tmp_path / "times"
    for folder, steps, alone in ((runs, 10, False), (times, 3, True)):
        folder.mkdir()
        written(folder, {**result("x4", 0, [5, 5], [1, 1], steps=steps), "alone": alone})
    assert compare.main(["--results", str(runs)]) == 0 and "2.0 + 3.0" not in capsys.readouterr().out
    assert compare.main(["--results", str(runs), "--times", str(times)]) == 0
    said = capsys.readouterr().out
    assert "| 2.0 + 3.0 |" in said and "10 steps of 2" in said and "3 steps of 2" not in said


def test_limits_are_means_over_seeds_and_drawn(results, tmp_path, monkeypatch, capsys):
    from matplotlib.axes import Axes

    read = [
        {"classifier": {"variant": "x4", "seed": seed}, "by_level": {"4": [right, 10], "9": [9, 10]}}
        for seed, right in enumerate((4, 8))
    ]
    write_file(tmp_path / "limits.jsonl", named(*read, result("x4", 0, [5, 5], [1, 1])))
    assert run_results.load_limits(tmp_path / "limits.jsonl") == {"x4": {4: pytest.approx(60), 9: pytest.approx(90)}}
    assert run_results.load_limits(None) == {}
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, *data, **style: drawn.append((data, style)) or plot(axis, *data, **style)
    )
    flags = ["--limits", str(tmp_path / "limits.jsonl"), "--figures", str(tmp_path / "figures")]
    assert compare.main(["--results", str(results / "suite.jsonl"), *flags]) == 0
    dotted = [data for data, style in drawn if style.get("linestyle") == ":"]
    assert dotted and all(data == ((4, 9), pytest.approx((60, 90))) for data in dotted)


def test_the_limit_of_a_start_and_its_variant_is_drawn_once(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    run, limits = result("exact", 0, [5, 5], [1, 1]), {"exact": {4: 90.0, 9: 95.0}}
    for variants, limited in ((("exact, start", "exact"), "exact"), (("exact, start", "x4"), "exact, start")):
        figures.draw_by_level(
            {variant: [run] for variant in variants}, limits, "reading", "heading", tmp_path / "figure.png"
        )
        (axis,) = drawn[-1].axes
        (dotted,) = (line for line in axis.lines if line.get_linestyle() == ":")
        colours = {bars.get_label().partition(":")[0]: bars.lines[0].get_color() for bars in axis.containers}
        assert list(colours) == list(variants) and dotted.get_color() == colours[limited]


@pytest.mark.parametrize("second", ["two", "two/suite.jsonl", "two/suite"])
def test_results_may_be_in_several_places_the_first_of_which_counts(second, tmp_path, capsys):
    for folder, variants in (("one", ("x4", "quarter")), ("two", ("exact", "quarter"))):
        (tmp_path / folder).mkdir()
        right = [5, 5] if folder == "one" else [9, 9]
        write_file(
            tmp_path / folder / "suite.jsonl",
            [{"name": variant, **result(variant, 0, right, [1, 1])} for variant in variants],
        )
    assert compare.main(["--results", str(tmp_path / "one"), str(tmp_path / second)]) == 0
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "10 of 20" in line]
    assert [(row[0], row[3]) for row in cells] == [("| exact", "90.0"), ("| quarter", "50.0"), ("| x4", "50.0")]


def test_an_empty_folder_is_one_line(tmp_path, one_line_error):
    assert compare.main(["--results", str(tmp_path)]) == 1
    assert "no results in" in one_line_error()


@pytest.mark.parametrize("flag", ["--results", "--times", "--limits"])
def test_a_place_that_is_not_there_is_one_line(flag, results, one_line_error):
    assert compare.main(["--results", str(results), flag, str(results / "missing")]) == 1
    assert one_line_error().startswith(f"compare.py: no results in {results / 'missing'}: expected .jsonl files")


def test_a_damaged_file_is_one_line(results, one_line_error):
    (results / "suite.jsonl").write_text('{"name": "x4"')
    assert compare.main(["--results", str(results)]) == 1
    assert one_line_error().startswith(f"compare.py: {results / 'suite.jsonl'}:1 is not a result")


def test_the_recorded_results_are_compared(capsys, pytestconfig):
    recorded = pytestconfig.rootpath / "benchmarks" / "results"
    results = [str(recorded / f"{card}_reading.jsonl") for card in ("h200", "h100")]
    assert compare.main(["--results", *results, "--times", str(recorded / "h200_cost.jsonl")]) == 0
    assert "x4 - quarter, all: over 1024 images of seed 0" in capsys.readouterr().out
