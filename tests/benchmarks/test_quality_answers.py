"""Variants compared question by question: scores, tests and questions are those of the files; misfits are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.quality.analysis import compare_answers
from benchmarks.quality.analysis.compare_answers import mcnemar, read_answers, sample_files, scores_of


def write(folder: Path, task: str, scores: list, metric: str = "exact_match", date: str = "20260101_000000") -> Path:
    """Samples as lmms-eval 0.7.3 logs them."""
    folder = folder / "model__x4"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}_samples_{task}.jsonl"
    samples = [
        {
            "doc_id": number,
            "target": "red",
            "filtered_resps": "red",
            "token_counts": [None],
            "doc_hash": "0",
            "input": "?",
        }
        | {metric: score}
        for number, score in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in reversed(samples)))
    return path


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    status = compare_answers.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_scores_of_one_and_zero_are_tested_by_mcnemar(tmp_path, capsys):
    quarter = [1] * 60 + [0] * 40
    x4 = [0] * 2 + [1] * 58 + [1] * 10 + [0] * 30  # 10 questions won, 2 lost
    for variant, scores in (("pixels", [1] * 80 + [0] * 20), ("quarter", quarter), ("x4", x4)):
        write(tmp_path / variant, "gqa", scores)
    given = [f"{variant}={tmp_path / variant}" for variant in ("pixels", "quarter", "x4")]
    status, said, _ = run(capsys, "--answers", *given, "--json", tmp_path / "out.json")
    assert status == 0
    assert said.splitlines()[:3] == [
        "| task | questions | pixels | quarter | x4 | x4 keeps of pixels, % |",
        "| --- | --- | --- | --- | --- | --- |",
        "| gqa | 100 | 80.0 | 60.0 | 68.0 | 85.0 |",
    ]
    assert "gqa, x4 - quarter, over 100 questions: +8.0 points (+1.3 to +14.7), p = 0.039" in said
    found = json.loads((tmp_path / "out.json").read_text())["gqa"]["quarter"]
    assert found["scores"] == [0.6] and found["last_minus_this"]["p"] == pytest.approx(79 / 2048)


def test_mcnemar_counts_only_what_one_of_two_got_right():
    both = np.array([1.0, 1, 0, 0, 1])
    assert mcnemar(both, both) == 1
    assert mcnemar(np.ones(6), np.zeros(6)) == pytest.approx(2 / 2**6)


def test_other_scores_are_tested_by_a_paired_t_test(tmp_path, capsys):
    generator = np.random.default_rng(0)
    ours, theirs = generator.uniform(0.4, 1, 50), generator.uniform(0.3, 1, 50)
    for variant, scores in (("quarter", theirs), ("x4", ours)):
        write(tmp_path / variant, "docvqa_val", scores.tolist(), "anls")
    _, said, _ = run(capsys, "--answers", *(f"{variant}={tmp_path / variant}" for variant in ("quarter", "x4")))
    assert f"p = {ttest_rel(ours, theirs).pvalue:.2g}" in said


def test_questions_on_one_video_are_one_pair(tmp_path, capsys):
    def on_videos(scores):
        return [{"score": score, "videoID": f"video{number // 3}"} for number, score in enumerate(scores)]

    write(tmp_path / "quarter", "videomme", on_videos([0, 0, 1] * 4), "videomme_perception_score")
    write(tmp_path / "x4", "videomme", on_videos([1, 0, 1] * 3 + [0, 0, 1]), "videomme_perception_score")
    given = [f"{variant}={tmp_path / variant}" for variant in ("quarter", "x4")]
    _, said, _ = run(capsys, "--answers", *given, "--json", tmp_path / "out.json")
    assert "| videomme | 12 | 33.3 | 58.3 | 175.0 |" in said
    assert json.loads((tmp_path / "out.json").read_text())["videomme"]["quarter"]["last_minus_this"]["pairs"] == 4


def test_three_seeds_decide(tmp_path, capsys):
    given = []
    for variant, rights in (("quarter", (50, 52, 51)), ("x4", (60, 61, 62))):
        for seed, right in enumerate(rights):
            write(
                tmp_path / f"{variant}-{seed}",
                "pope",
                [{"score": float(n < right)} for n in range(100)],
                "pope_accuracy",
            )
            given.append(f"{variant}={tmp_path / f'{variant}-{seed}'}")
    _, said, _ = run(capsys, "--answers", *given)
    assert "| pope | 100 | 51.0 ± 1.0 | 61.0 ± 1.0 |" in said
    assert "over 3 seeds and 100 questions or videos: +10.0 points" in said and said.rstrip().endswith(": better")


def test_a_task_evaluated_again_counts_as_it_was_last(tmp_path):
    write(tmp_path, "gqa", [0, 0], date="20260101_000000")
    newest = write(tmp_path, "gqa", [1, 1], date="20260102_000000")
    assert sample_files(tmp_path) == {"gqa": newest}


def test_tasks_that_not_all_have_are_left_out_and_named(tmp_path, capsys):
    for variant in ("quarter", "x4"):
        write(tmp_path / variant, "gqa", [1, 0])
    write(tmp_path / "x4", "chartqa", [1.0, 0.0], "relaxed_overall")
    status, said, warned = run(
        capsys, "--answers", *(f"{variant}={tmp_path / variant}" for variant in ("quarter", "x4"))
    )
    assert status == 0 and "chartqa" not in said
    assert warned == "compare_answers.py: left out of x4, as others have not: chartqa\n"


def test_a_metric_may_be_chosen_or_be_the_only_one(tmp_path):
    path = write(tmp_path, "mine", [0.5, 1.0], "accuracy")
    assert read_answers(path, "mine").mean == 0.75
    sample = json.loads(path.read_text().splitlines()[0])
    assert scores_of({**sample, "other": 1.0}) == ["accuracy", "other"]
    lines = [json.dumps({**json.loads(line), "other": 0.0}) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert read_answers(path, "mine", "other").mean == 0
    with pytest.raises(ValueError, match="has the scores accuracy, other: choose one by --metric TASK=NAME"):
        read_answers(path, "mine")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", ":1 is no sample of lmms-eval: expected JSON with doc_id"),
        ("[1]", ":1 is no sample of lmms-eval: expected JSON with doc_id"),
        ('{"doc_id": 0, "anls": 1.0}', ":1 has no score 'exact_match', only anls: try --metric gqa=NAME"),
        ('{"doc_id": 0, "exact_match": 1}\n' * 2, ":2 answers question 0 again: evaluate the task once"),
        ("", " is empty: run lmms-eval with --log_samples again"),
    ],
)
def test_a_file_that_is_no_log_is_one_line(line, says, tmp_path, capsys):
    path = write(tmp_path / "x4", "gqa", [1, 0])
    write(tmp_path / "quarter", "gqa", [1, 0])
    path.write_text(line)
    status, _, said = run(capsys, "--answers", f"quarter={tmp_path / 'quarter'}", f"x4={tmp_path / 'x4'}")
    assert (status, said) == (1, f"compare_answers.py: {path}{says}\n")


def test_other_questions_are_one_line(tmp_path, capsys):
    write(tmp_path / "quarter", "gqa", [1, 0, 1])
    write(tmp_path / "x4", "gqa", [1, 0])
    status, _, said = run(capsys, "--answers", f"quarter={tmp_path / 'quarter'}", f"x4={tmp_path / 'x4'}")
    assert status == 1
    assert said == (
        "compare_answers.py: gqa, x4 and quarter: other questions were answered: 2 and 3, of which 2 are the same\n"
    )


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    write(tmp_path / "quarter", "gqa", [1, 0])
    status, _, said = run(capsys, "--answers", f"quarter={tmp_path / 'quarter'}", f"x4={tmp_path / 'x4'}")
    assert status == 1
    assert said.startswith(f"compare_answers.py: no *_samples_*.jsonl in {tmp_path / 'x4'}: run lmms-eval with")


@pytest.mark.parametrize(
    ("given", "says"), [(["x4"], "expected VARIANT=DIR"), (["x4=a"], "expected at least two variants")]
)
def test_arguments_that_cannot_be_are_refused(given, says, capsys):
    with pytest.raises(SystemExit):
        compare_answers.main(["--answers", *given])
    assert says in capsys.readouterr().err
