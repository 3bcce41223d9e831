"""What variants read of real pages: characters wrong by resolution, and questions answered.

    python -m benchmarks.quality.manuals.score pixels=work/runs/pixels/evaluation half=work/runs/half/evaluation \
        x4=work/runs/x4/evaluation --data-dir work/shards/test --output work/scores.json

Each folder is what evaluate_qwen2vl.py wrote on the test set of make_samples.py, all of it one split. Characters are
compared without white space, and quotes and dashes alike (ocr/errors.py). Intervals are of 95 %, over pages. The last
lines compare the last variant with each other one, on the same pages.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.ocr.errors import INTERVAL, RESAMPLES, bootstrap, compared, edit_distance, error_rate
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main

TRANSCRIBE = "transcribe"
ALL = "all resolutions"


@dataclass(frozen=True)
class Reading:
    """Transcriptions by page, of one resolution or of all. pages: names, sorted. wrong, characters: int [pages]."""

    pages: tuple[str, ...]
    wrong: np.ndarray
    characters: np.ndarray


def read_answers(folder: Path) -> list[dict[str, Any]]:
    path = folder / "predictions.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no {path}: python evaluate_qwen2vl.py ... --output-dir {folder}") from error
    return [json.loads(line) for line in lines]


def kind_and_dpi(answer: dict[str, Any]) -> tuple[str, int]:
    """ "next word, 75 dpi" -> ("next word", 75)."""
    kind, _, dpi = answer["question_type"].rpartition(", ")
    return kind, int(dpi.removesuffix(" dpi"))


def read_pages(data_dir: Path) -> dict[str, str]:
    """Key of each sample of the test set -> manual and page that its crop is from."""
    from dct_qwen2vl.data.samples import parse_entry, read_samples

    return {sample.__key__: page_of(parse_entry(sample.entry)["image"]) for sample in read_samples(data_dir, "train")}


def page_of(image: str) -> str:
    """R-FAQ/0002-100dpi-000.png -> R-FAQ/0002"""
    return image.rsplit("-", 2)[0]


def readings(answers: list[dict[str, Any]], pages: dict[str, str], name: str = "prediction") -> dict[str, Reading]:
    """By resolution, "60 dpi" first, then of ALL. pages: of each sample. name: under which the answers stand."""
    found: dict[float, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for answer in answers:
        kind, dpi = kind_and_dpi(answer)
        if kind == TRANSCRIBE:
            true = compared(answer["answer"])
            wrong = edit_distance(compared(answer[name]), true)
            for resolution in (dpi, math.inf):  # the second stands for ALL
                counts = found[resolution][pages[answer["key"]]]
                counts[0] += wrong
                counts[1] += len(true)
    return {ALL if dpi == math.inf else f"{dpi} dpi": reading_of(pages) for dpi, pages in sorted(found.items())}


def reading_of(pages: dict[str, list[int]]) -> Reading:
    names = tuple(sorted(pages))
    wrong, characters = (np.array([pages[name][place] for name in names]) for place in (0, 1))
    return Reading(names, wrong, characters)


def questions(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kind -> exact answers, blind ones, questions."""
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for answer in answers:
        kind, _ = kind_and_dpi(answer)
        if kind != TRANSCRIBE:
            found[kind].append((answer["correct"], is_same(answer["blind_prediction"], answer["answer"])))
    return {
        kind: {"exact": mean(seen for seen, _ in pairs), "blind": mean(b for _, b in pairs), "questions": len(pairs)}
        for kind, pairs in sorted(found.items())
    }


def is_same(prediction: str, answer: str) -> bool:
    from dct_qwen2vl.evaluation.scoring import same_answer

    return same_answer(prediction, answer)


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def score(answers: list[dict[str, Any]], pages: dict[str, str]) -> dict[str, Any]:
    """Of one variant. pages: of each sample."""
    seen, blind = readings(answers, pages), readings(answers, pages, "blind_prediction")
    return {
        "characters_wrong": {
            place: {
                "rate": error_rate(reading.wrong, reading.characters),
                "interval": bootstrap(reading.wrong, reading.characters),
                "blind": error_rate(blind[place].wrong, blind[place].characters),
                "pages": len(reading.pages),
                "characters": int(reading.characters.sum()),
                "by_page": {
                    page: [int(wrong), int(characters)]
                    for page, wrong, characters in zip(reading.pages, reading.wrong, reading.characters)
                },
            }
            for place, reading in seen.items()
        },
        "questions": questions(answers),
    }


def scored_readings(found: dict[str, Any]) -> dict[str, Reading]:
    """What `score` counted, as `readings` gives it."""
    return {place: reading_of(counts["by_page"]) for place, counts in found["characters_wrong"].items()}


def difference(one: Reading, other: Reading, seed: int = 0) -> tuple[float, float, float]:
    """Characters wrong, `other` less `one`: below 0 where `other` reads better. Then the interval, over the same pages
    drawn again."""
    if one.pages != other.pages:
        raise UserError("the variants have answered questions on other pages: give both the same test set")
    more = other.wrong - one.wrong
    pages = np.random.default_rng(seed).integers(len(more), size=(RESAMPLES, len(more)))
    low, high = np.percentile(more[pages].sum(axis=1) / one.characters[pages].sum(axis=1), INTERVAL)
    return float(more.sum() / one.characters.sum()), float(low), float(high)


def compare(one: dict[str, Reading], other: dict[str, Reading]) -> dict[str, tuple[float, float, float]]:
    """By resolution, and of ALL."""
    return {place: difference(one[place], other[place]) for place in one}


def table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: a row for each resolution, then one for each kind of question."""
    names = list(scores)
    lines = [f"| {' | '.join(['', *names])} |", f"| {' | '.join(['---'] * (len(names) + 1))} |"]
    for place in scores[names[0]]["characters_wrong"]:
        cells = [characters_cell(scores[name]["characters_wrong"][place]) for name in names]
        lines.append(f"| characters wrong, {place} | {' | '.join(cells)} |")
    for kind in scores[names[0]]["questions"]:
        cells = [question_cell(scores[name]["questions"][kind]) for name in names]
        lines.append(f"| {kind}, exact | {' | '.join(cells)} |")
    return lines


def characters_cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['rate']:.1%} ({low:.1%} to {high:.1%}; blind {found['blind']:.0%})"


def question_cell(found: dict[str, Any]) -> str:
    return f"{found['exact']:.1%} (blind {found['blind']:.1%}; {found['questions']} questions)"


def named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got {text}")
    return name, Path(folder)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("variants", type=named_folder, nargs="+", metavar="NAME=FOLDER", help="what evaluate_qwen2vl.py wrote")
    add("--data-dir", type=Path, required=True, metavar="DIR", help="the prepared test set")
    add("--output", type=Path, metavar="FILE", help="JSON file to write")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def score_and_say(arguments: argparse.Namespace) -> int:
    answers = {name: read_answers(folder) for name, folder in arguments.variants}
    pages = read_pages(arguments.data_dir)
    scores = {name: score(given, pages) for name, given in answers.items()}
    print("\n".join(table(scores)))
    found: dict[str, Any] = {"variants": scores}
    *others, last = scores
    for other in others:
        found[f"{last} - {other}"] = differences = compare(*(scored_readings(scores[name]) for name in (other, last)))
        for place, (value, low, high) in differences.items():
            print(f"characters wrong, {place}, {last} - {other}: {value:+.1%} ({low:+.1%} to {high:+.1%})")
    if arguments.output:
        write_json(arguments.output, found)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("score.py", lambda: score_and_say(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
