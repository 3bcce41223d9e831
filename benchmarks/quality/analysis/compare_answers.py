"""Compares variants on public benchmarks, question by question, from what lmms-eval logged with --log_samples.

    python -m benchmarks.quality.analysis.compare_answers \
      --answers pixels=results/pixels quarter=results/quarter x4=results/x4

Prints a table: the score of each variant in each task (mean over questions, in percent) and what the last variant keeps
of the first; below it the last variant's paired difference from each other one, with a 95 % interval. A variant may be
given several times, one folder for each training seed: the table then has mean and standard deviation over seeds, and
from three seeds on the verdict is over seeds and questions (paired.crossed_difference); before, it is that of the first
seed's questions and says whether these two models differ, not the variants.

Tests are two-sided. Where all scores are 0 or 1: McNemar's exact test, a binomial test of the questions that only one
of the two got right. Else, such as for ANLS: the paired t test. Questions on one video are correlated (Video-MME has
three on each): they count as one pair, of their mean.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.analysis.paired import (
    LEAST_SEEDS,
    Difference,
    describe,
    paired_difference,
    spread,
    verdict_over_seeds,
)
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main

# The score of each task, as lmms-eval 0.7.3 names it; other tasks need --metric, if they have more than one.
METRICS = {
    "gqa": "exact_match",
    "pope": "pope_accuracy",
    "docvqa_val": "anls",
    "chartqa": "relaxed_overall",
    "ocrbench": "ocrbench_accuracy",
    "videomme": "videomme_perception_score",
}
# What a logged sample has beside its scores.
NOT_SCORES = {"doc_id", "doc_hash", "target", "input", "input_media", "resps", "filtered_resps", "token_counts"}
CLUSTER = "videoID"


@dataclass(frozen=True)
class Answers:
    """Scores of the questions of a task. ids: of the questions, sorted; clusters: what a question belongs to, itself
    or its video; scores: float64, in the order of ids."""

    ids: tuple[int, ...]
    clusters: tuple[str, ...]
    scores: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the scores of each cluster, and number of its questions, in the order of the clusters' names."""
        names, place = np.unique(self.clusters, return_inverse=True)
        return np.bincount(place, self.scores, len(names)), np.bincount(place, minlength=len(names)).astype(float)

    def by_cluster(self) -> np.ndarray:
        """Mean score of each cluster, in the order of their names."""
        scores, sizes = self.sums()
        return scores / sizes


def read_answers(path: Path, task: str, metric: str | None = None) -> Answers:
    """A file of samples that lmms-eval wrote. metric: None for the one of METRICS, or the only one that is there.

    Raises UserError, naming file and line, for what is no sample, or has no score of that name.
    """
    found: dict[int, tuple[str, float]] = {}
    metric = metric or METRICS.get(task)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            question = sample["doc_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is no sample of lmms-eval: expected JSON with doc_id") from error
        name = metric or only_score(sample, path, number)
        try:
            value = sample[name]
            score = float(value["score"] if isinstance(value, dict) else value)
        except (KeyError, TypeError, ValueError) as error:
            known = ", ".join(scores_of(sample)) or "none"
            raise UserError(f"{path}:{number} has no score {name!r}, only {known}: try --metric {task}=NAME") from error
        if question in found:
            raise UserError(f"{path}:{number} answers question {question} again: evaluate the task once")
        cluster = value.get(CLUSTER, question) if isinstance(value, dict) else question
        found[question] = str(cluster), score
    if not found:
        raise UserError(f"{path} is empty: run lmms-eval with --log_samples again")
    ids = tuple(sorted(found))
    return Answers(ids, tuple(found[i][0] for i in ids), np.array([found[i][1] for i in ids]))


def scores_of(sample: dict[str, Any]) -> list[str]:
    """Names of what may be a score: numbers, and dictionaries with one."""
    return [
        name
        for name, value in sample.items()
        if name not in NOT_SCORES and (isinstance(value, int | float) or (isinstance(value, dict) and "score" in value))
    ]


def only_score(sample: dict[str, Any], path: Path, number: int) -> str:
    names = scores_of(sample)
    if len(names) != 1:
        raise UserError(
            f"{path}:{number} has the scores {', '.join(names) or '(none)'}: choose one by --metric TASK=NAME"
        )
    return names[0]


def sample_files(folder: Path) -> dict[str, Path]:
    """{task: its samples} in a folder that was lmms-eval's --output_path; the newest, if a task was evaluated again.

    Raises UserError if there are none.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*_samples_*.jsonl"), key=lambda path: path.name):  # names begin with the date
        files[path.stem.partition("_samples_")[2]] = path
    if not files:
        raise UserError(f"no *_samples_*.jsonl in {folder}: run lmms-eval with --log_samples --output_path {folder}")
    return files


def difference(ours: Answers, theirs: Answers) -> Difference:
    """Of two models on the same questions. Raises UserError if the questions are not the same."""
    if (ours.ids, ours.clusters) != (theirs.ids, theirs.clusters):
        raise UserError(
            f"other questions were answered: {len(ours.ids)} and {len(theirs.ids)}, of which "
            f"{len(set(ours.ids) & set(theirs.ids))} are the same"
        )
    one, two = ours.by_cluster(), theirs.by_cluster()
    found = paired_difference(one, two)
    if set(np.unique([one, two])) <= {0.0, 1.0}:
        return Difference(found.mean, found.low, found.high, mcnemar(one, two), found.pairs)
    return found


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """p of McNemar's exact test (McNemar 1947, doi:10.1007/BF02295996) of two series of 0 and 1."""
    from scipy.stats import binomtest

    only_ours, only_theirs = int((ours > theirs).sum()), int((ours < theirs).sum())
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue) if only_ours + only_theirs else 1.0


Runs = dict[str, list[Answers]]  # {variant: a task's answers by seed}


def verdict(ours: list[Answers], theirs: list[Answers]) -> str:
    """In words: of the first seed's questions, and from LEAST_SEEDS seeds on over seeds."""
    said = f"over {len(ours[0].ids)} questions: {describe(difference(ours[0], theirs[0]))}"
    pairs = list(zip(ours, theirs))
    if len(pairs) < LEAST_SEEDS:
        return said
    for one, two in pairs[1:]:
        difference(one, two)  # the questions must be the same
    gains, sizes = zip(*(Answers(one.ids, one.clusters, one.scores - two.scores).sums() for one, two in pairs))
    return f"{said}; {verdict_over_seeds(np.array(gains), sizes[0], 'questions or videos')}"


def table(tasks: dict[str, Runs]) -> list[str]:
    """Markdown lines, one row per task."""
    variants = list(next(iter(tasks.values())))
    lines = [f"| task | questions | {' | '.join(variants)} | {variants[-1]} keeps of {variants[0]}, % |"]
    lines.append("| --- " * (len(variants) + 3) + "|")
    for task, runs in tasks.items():
        means = [[answers.mean for answers in runs[variant]] for variant in variants]
        first, last = (float(np.mean(values)) for values in (means[0], means[-1]))
        kept = f"{100 * last / first:.1f}" if first else ""
        lines.append(f"| {task} | {len(runs[variants[0]][0].ids)} | {' | '.join(map(spread, means))} | {kept} |")
    return lines


def gather(folders: list[tuple[str, Path]], metrics: dict[str, str]) -> dict[str, Runs]:
    """{task: {variant: answers by seed}} of the tasks that all folders have. Raises UserError if there are none."""
    files = [(variant, sample_files(folder)) for variant, folder in folders]
    shared = [task for task in files[0][1] if all(task in tasks for _, tasks in files)]
    if not shared:
        raise UserError(
            "no task was evaluated for all variants: " + "; ".join(f"{variant}: {', '.join(t)}" for variant, t in files)
        )
    for variant, tasks in files:
        if left := sorted(set(tasks) - set(shared)):
            print(f"compare_answers.py: left out of {variant}, as others have not: {', '.join(left)}", file=sys.stderr)
    gathered: dict[str, Runs] = {task: {} for task in shared}
    for task in shared:
        for variant, tasks in files:
            gathered[task].setdefault(variant, []).append(read_answers(tasks[task], task, metrics.get(task)))
    return gathered


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE"""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"expected VARIANT=DIR or TASK=NAME, got {text!r}")
    return name, value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--answers", type=pair, nargs="+", required=True, metavar="VARIANT=DIR", help="the --output_path of lmms-eval")
    add("--metric", type=pair, nargs="+", default=[], metavar="TASK=NAME", help="a task's score (default: known ones)")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args(argv)
    if len({variant for variant, _ in arguments.answers}) < 2:
        parser.error("argument --answers: expected at least two variants")
    return arguments


def differences(tasks: dict[str, Runs]) -> list[str]:
    """Lines: the last variant against each other one, by task. Raises UserError, naming them, if questions differ."""
    lines = []
    for task, runs in tasks.items():
        *others, last = runs
        for other in others:
            try:
                lines.append(f"{task}, {last} - {other}, {verdict(runs[last], runs[other])}")
            except ValueError as error:
                raise UserError(f"{task}, {last} and {other}: {error}") from error
    return lines


def figures(tasks: dict[str, Runs]) -> dict[str, Any]:
    """What is printed, for JSON. Differences are over the first seed's questions."""
    return {
        task: {
            variant: {
                "questions": len(found[0].ids),
                "scores": [answers.mean for answers in found],
                "last_minus_this": asdict(difference(runs[list(runs)[-1]][0], found[0])),
            }
            for variant, found in runs.items()
        }
        for task, runs in tasks.items()
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("compare_answers.py", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    """Prints the table and the differences. Raises UserError, OSError."""
    tasks = gather([(variant, Path(folder)) for variant, folder in arguments.answers], dict(arguments.metric))
    print("\n".join([*table(tasks), "", *differences(tasks)]))
    if arguments.json:
        write_json(arguments.json, figures(tasks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
