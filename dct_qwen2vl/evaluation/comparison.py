"""Two forms of one model beside each other: what each reads of real samples, their logits, their greedy answers.

    same pixels    both get the RGB that the first form reads; a difference is the model's
    own reading    each gets what it reads itself; a difference may also be the reading's

Of a coefficient form and its stock form, the first differs by rounding alone. The second shows what a server that reads
as this repository reads the stock form makes of it: RGB in place of a video's planes, JPEGs decoded whole.
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dct_qwen2vl.checkpoints.inspection import (
    PROCESSOR,
    chosen_bounds,
    cost_of_all_cells,
    read_processor,
    reads_both_ways,
    skipping_in,
)
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.common.files import write_bytes, write_json
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.energon_files import read_splits
from dct_qwen2vl.data.media import BadSample, as_array
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, frame_indices
from dct_qwen2vl.evaluation.answer_file import as_lines
from dct_qwen2vl.evaluation.questions import Question, read_questions

if TYPE_CHECKING:
    from dct_qwen2vl.data.media_encoder import Frames, MediaEncoder
    from dct_qwen2vl.evaluation.answering import Answerer
    from dct_qwen2vl.evaluation.forward_passes import Pass

SCANNED = 256  # questions among which some are chosen
NEW_TOKENS = 16
MOST_BYTES = 20 << 30  # of weights that a training run compares by itself: other processes wait, and it takes float32
FORMS = ("a", "b")
ALL_CELLS = {"skip_db": None}  # read by either form: a stock form cannot leave cells out
Media = tuple[tuple[str, "Frames"], ...]


@dataclass(frozen=True)
class Sample:
    """A question, and what the two models read of its media.

    question: With file bytes as its media.
    a: What the first form reads.
    b: What the second form reads.
    same: RGB that both forms get.
    media: How they were read, one object for each.
    """

    question: Question
    a: Media
    b: Media
    same: Media
    media: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found.

    summary: What comparison.json holds.
    lines: What comparison.jsonl holds, one for each question.
    """

    summary: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def equal(self) -> bool:
        """Whether the models give the same logits for the same pixels."""
        return self.summary["equal"]

    def write(self, folder: Path) -> None:
        """comparison.json and comparison.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "comparison.jsonl", as_lines(without_infinity(self.lines)))
        write_json(folder / "comparison.json", without_infinity(self.summary))


def without_infinity(value: Any) -> Any:
    """JSON has none: null stands for what cannot be compared, and for the decibels of equal pixels."""
    if isinstance(value, dict):
        return {name: without_infinity(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_infinity(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def compare(
    models: tuple[Path, Path],
    data_dir: Path,
    split: str | None = None,
    limit: int = 4,
    max_new_tokens: int = NEW_TOKENS,
    sampling: dict[str, Any] | None = None,
    bounds: dict[str, int] | None = None,
    share_weights: bool = False,
) -> Comparison:
    """Asks both models the same questions, one model at a time, in float32.

    models: The two directories, in any form.
    data_dir: Prepared folder of shards.
    split: Name of the split. None: the first of test, val and train that has a sample.
    limit: Questions, of as many kinds of media as possible.
    max_new_tokens: Longest answer, tokens.
    sampling: Fields of `VideoSampling` in place of those in the models' files.
    bounds: min_pixels and max_pixels in place of those in the models' files.
    share_weights: Whether the second is a form of the first model, of whose weights only the patch embedding is read.

    Raises UserError if there is nothing to ask.
    """
    split = split or first_split(data_dir)
    samplings = [VideoSampling(**{**saved_sampling(model), **(sampling or {})}) for model in models]
    settings = {**(bounds or {}), **ALL_CELLS}
    samples = read_all(models, samplings, data_dir, split, limit, settings)
    if not samples:
        raise UserError(f"the {split} split of {data_dir} has no questions to ask: choose another --split")
    passes = ask_all(models, samplings, samples, max_new_tokens, settings, share_weights)
    lines = [line_of(sample, *answers) for sample, answers in zip(samples, passes)]
    return Comparison(summary_of(models, split, lines), lines)


def compare_for_run(
    folder: Path, model_dir: Path, stock_dir: Path | None, data_dir: Path, limit: int, **reading: dict[str, Any]
) -> None:
    """Compares the coefficient form with its stock form for a training run. The run continues whatever the result is.

    folder: Gets comparison.json and comparison.jsonl.
    model_dir: The coefficient form.
    stock_dir: The stock form, which is loaded as a server does. None: what it has else than the coefficient form is
        made for this comparison alone.
    data_dir: Prepared folder of shards.
    limit: Questions.
    reading: sampling and bounds, as in `compare`.
    """
    size = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    if size > MOST_BYTES:
        print(f"Note: coefficient form and stock form were not compared, because the model has {size >> 30} "
              "GiB; to compare them: python evaluate_qwen2vl.py --compare", flush=True)  # fmt: skip
        return
    try:
        with stock_form(model_dir, stock_dir, folder) as stock:
            found = compare((model_dir, stock), data_dir, limit=limit, share_weights=stock_dir is None, **reading)
        found.write(folder)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        print(f"Note: coefficient form and stock form were not compared ({told})", flush=True)
        return
    *_, verdict = conclusions(found.summary)
    whole = "".join(f" {line}." for line in say_skipping(found.summary))
    print(f"{model_dir} and its stock form on {len(found.lines)} samples, largest difference of logits: "
          f"{found.summary['same']['largest']:.1e} on the same pixels, {found.summary['own']['largest']:.1e} as either "
          f"form reads them.{whole} {verdict}. Details: {folder}", flush=True)  # fmt: skip


@contextmanager
def stock_form(model_dir: Path, stock_dir: Path | None, folder: Path) -> Iterator[Path]:
    """stock_dir, or a stock form without the weights that both forms have, which is there inside the block only."""
    from dct_qwen2vl.checkpoints.stock_form import to_stock

    if stock_dir is not None:
        yield stock_dir
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / ".stock"
    try:
        to_stock(model_dir, made, force=True, only_patches=True)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def first_split(data_dir: Path) -> str:
    """Raises UserError for a set without samples."""
    for split, shards in read_splits(data_dir, ("test", "val", "train")).items():
        if shards:
            return split
    raise UserError(f"{data_dir} holds no shard: prepare it with data_preparation.py")


# Reading


def read_all(
    models: tuple[Path, Path],
    samplings: list[VideoSampling],
    data_dir: Path,
    split: str,
    limit: int,
    settings: dict[str, Any],
) -> list[Sample]:
    """Chosen questions with their media as either form reads them; what cannot be read is passed over.

    settings: of both image processors.
    """
    from dct_qwen2vl.checkpoints.hf_folder import load_processor
    from dct_qwen2vl.data.media_encoder import MediaEncoder
    from dct_qwen2vl.data.text_tokens import TextTokens

    processors = [load_processor(model, **settings) for model in models]
    encoders = [MediaEncoder(each.image_processor, sampling) for each, sampling in zip(processors, samplings)]
    samples: list[Sample] = []
    for question in choose(data_dir, split, limit, TextTokens(processors[0].tokenizer).stay_text):
        try:
            samples.append(read_sample(question, *encoders))
        except (BadSample, MediaError) as error:
            print(f"{question.key} left out: {error}")
        if len(samples) == limit:
            break
    return samples


def choose(data_dir: Path, split: str, limit: int, special: Iterable[str]) -> Iterator[Question]:
    """First questions of entries, the kinds of media taking turns: text, an image, several images, a video, ..."""
    groups: dict[tuple[str, ...], list[Question]] = {}
    for question in islice(read_questions(data_dir, split, SCANNED, lambda kind, content: content, special), SCANNED):
        kinds = tuple(sorted(kind for kind, _ in question.media))[:2]
        if question.turn == 0 and len(groups.setdefault(kinds, [])) < 2 * limit:
            groups[kinds].append(question)
    for place in range(2 * limit):
        yield from (group[place] for group in groups.values() if place < len(group))


def read_sample(question: Question, a: "MediaEncoder", b: "MediaEncoder") -> Sample:
    """Raises BadSample, MediaError."""
    read = {name: tuple((kind, encoder.read(kind, content)) for kind, content in question.media)
            for name, encoder in (("a", a), ("b", b))}  # fmt: skip
    rgb = [tuple((kind, as_array(kind, content, each.sampling, each.fit)) for kind, content in question.media)
           for each in (a, b)]  # fmt: skip
    media = []
    for place, (kind, content) in enumerate(question.media):
        pixels = [each[place][1] for each in rgb]
        how = {name: how_read(kind, content, encoder, read[name][place][1]) for name, encoder in (("a", a), ("b", b))}
        noise = decibels(*pixels)
        media.append({"kind": kind, **how, "equal_rgb": noise == math.inf, "decibels": noise})
    return Sample(question, read["a"], read["b"], rgb[0], media)


def how_read(kind: str, content: bytes, encoder: "MediaEncoder", frames: "Frames") -> dict[str, Any]:
    """Size and colours of what was read, the grid of tokens, and of a video the numbers of its frames."""
    planes = not isinstance(frames, np.ndarray)
    shape = frames.luma.shape if planes else frames.shape[:-1]
    how = {"height": shape[-2], "width": shape[-1], "colours": "planes" if planes else "RGB",
           "grid_thw": list(encoder.expected_grid(kind, content))}  # fmt: skip
    return how if kind == "image" else {**how, "frames": frame_indices(content, encoder.sampling)}


def decibels(one: np.ndarray, other: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of RGB; None where the sizes differ, infinite where the pixels are equal."""
    if one.shape != other.shape:
        return None
    error = np.mean((one.astype(np.float32) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


# Asking


def ask_all(
    models: tuple[Path, Path],
    samplings: list[VideoSampling],
    samples: list[Sample],
    max_new_tokens: int,
    settings: dict[str, Any],
    share_weights: bool = False,
) -> list[tuple[dict[str, "Pass"], dict[str, "Pass"]]]:
    """For each sample the passes of either form, on the "same" pixels and on its "own" reading. Both follow the first
    form's answer. Other arguments: as of `compare`."""
    import torch

    from dct_qwen2vl.data.device_memory import free_memory
    from dct_qwen2vl.evaluation.answering import Answerer
    from dct_qwen2vl.evaluation.forward_passes import exact_products

    found: list[list[dict[str, Pass]]] = [[] for _ in samples]
    answerer = None
    for form, model, sampling in zip(FORMS, models, samplings):
        with exact_products():
            if answerer is not None and share_weights:
                answerer.become(model, sampling, **settings)
            else:
                answerer = None
                free_memory()
                answerer = Answerer(model, max_new_tokens, sampling, torch.float32, **settings)
            ask_model(answerer, form, first_encoder(models[0], model, samplings[0], settings), samples, found)
    del answerer
    free_memory()
    return [tuple(passes) for passes in found]


def first_encoder(first: Path, model: Path, sampling: VideoSampling, settings: dict[str, Any]) -> "MediaEncoder":
    """A model's own, with the bounds and the sampling of the first form, so that nothing of what that one reads is
    resized."""
    from dct_qwen2vl.checkpoints.hf_folder import load_processor
    from dct_qwen2vl.data.media_encoder import MediaEncoder

    names = "min_pixels", "max_pixels"
    bounds = dict(zip(names, chosen_bounds(first, *map(settings.get, names))))
    return MediaEncoder(load_processor(model, **{**settings, **bounds}).image_processor, sampling)


def ask_model(
    answerer: "Answerer", form: str, same: "MediaEncoder", samples: list[Sample], found: list[list[dict[str, "Pass"]]]
) -> None:
    """Adds a model's passes to those of each sample.

    answerer: The model.
    form: "a" or "b".
    same: Encodes what the first form reads.
    samples: The questions.
    found: For each sample the passes of the forms so far.
    """
    from dct_qwen2vl.evaluation.forward_passes import ask

    media = {"own": answerer.media, "same": same}
    for sample, passes in zip(samples, found):
        follow = {name: each.tokens for name, each in passes[0].items()} if passes else {}
        own = getattr(sample, form)
        answerer.media = media["same"]
        made = {"same": ask(answerer, replace(sample.question, media=sample.same), follow.get("same"))}
        if equal_media(own, sample.same) and follow.get("own") == follow.get("same"):
            made["own"] = made["same"]
        else:
            answerer.media = media["own"]
            made["own"] = ask(answerer, replace(sample.question, media=own), follow.get("own"))
        passes.append(made)


def equal_media(one: Media, other: Media) -> bool:
    arrays = [(a, b) for (_, a), (_, b) in zip(one, other)]
    return all(isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b) for a, b in arrays)


# What was seen


def line_of(sample: Sample, a: dict[str, "Pass"], b: dict[str, "Pass"]) -> dict[str, Any]:
    """Of comparison.jsonl; the first fields are those of predictions.jsonl."""
    from dct_qwen2vl.evaluation.forward_passes import difference

    question = sample.question
    line = {name: getattr(question, name) for name in ("key", "turn", "question_type")}
    line |= {"question": question.text, "answer": question.answer, "media": sample.media}
    for reading in ("same", "own"):
        line[reading] = {
            "prompt_tokens": [each[reading].prompt_tokens for each in (a, b)],
            "predictions": [each[reading].text for each in (a, b)],
            **asdict(difference(a[reading], b[reading])),
        }
    return line


def summary_of(models: tuple[Path, Path], split: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    from dct_qwen2vl.evaluation.forward_passes import SAME

    summary: dict[str, Any] = {"models": [str(model) for model in models], "split": split, "questions": len(lines)}
    skipping = [skipping_in(model / PROCESSOR, read_processor(model)) for model in models]
    for name in ("skip_db", "skip_share"):
        summary[name] = [found.get(name) for found in skipping]
    for reading in ("same", "own"):
        found = [line[reading] for line in lines]
        worst = max(found, key=lambda each: each["largest"])
        summary[reading] = {
            "largest": worst["largest"],
            "mean": sum(each["mean"] for each in found) / len(found),
            "equal_answers": sum(each["first_token"] is None for each in found),
            "first_stage": worst["first_stage"],
        }
    return {**summary, "limit": SAME, "equal": summary["same"]["largest"] <= SAME}


def table(comparison: Comparison) -> str:
    """One row for each question, then what it comes to."""
    summary, lines = comparison.summary, comparison.lines
    rows = [("question", "A reads", "B reads", "dB", "same pixels", "own reading", "answers")]
    rows += [row_of(line) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    heading = [f"A  {summary['models'][0]}", f"B  {summary['models'][1]}"]
    return "\n".join([*heading, *drawn, *conclusions(summary)])


def row_of(line: dict[str, Any]) -> tuple[str, ...]:
    reads = [", ".join(say_reading(medium["kind"], medium[form]) for medium in line["media"]) for form in FORMS]
    noise = ", ".join(say_decibels(medium["decibels"]) for medium in line["media"])
    same, own = line["same"], line["own"]
    answers = ["equal" if each["first_token"] is None else f"token {each['first_token']}" for each in (same, own)]
    said = answers[0] if answers[0] == answers[1] else " / ".join(answers)
    return line["key"], *reads, noise, f"{same['largest']:.1e}", f"{own['largest']:.1e}", said


def say_reading(kind: str, how: dict[str, Any]) -> str:
    """ "448x672", or "8 of 448x672 planes (0-70)" of a video."""
    size = f"{how['height']}x{how['width']}"
    if kind == "image":
        return size
    frames = how["frames"]
    colours = " planes" if how["colours"] == "planes" else ""
    return f"{len(frames)} of {size}{colours} ({frames[0]}-{frames[-1]})"


def say_decibels(value: float | None) -> str:
    if value is None:
        return "other size"
    return "equal" if value == math.inf else f"{value:.0f}"


def say_skipping(summary: dict[str, Any]) -> list[str]:
    """A line where a model leaves cells out when it is used."""
    skips = [f"{form.upper()} skips at {value:g} dB" for form, value in zip(FORMS, summary["skip_db"]) if value]
    return [f"All cells were read in both, although {' and '.join(skips)}"] if skips else []


def conclusions(summary: dict[str, Any]) -> list[str]:
    asked = summary["questions"]
    trained = zip(summary["models"], summary["skip_db"], summary["skip_share"])
    costs = [cost_of_all_cells(model) for model, skip_db, share in trained if skip_db and not reads_both_ways(share)]
    said = [". ".join([line, *costs[:1]]) for line in say_skipping(summary)]
    for reading, name in (("same", "Same pixels"), ("own", "Own reading")):
        found = summary[reading]
        said.append(
            f"{name}: logits differ by {found['largest']:.1e} at most, {found['mean']:.1e} on average (relative to the "
            f"largest logit); {found['equal_answers']} of {asked} answers are equal"
        )
    if summary["equal"]:
        return [*said, f"The models are equal: at most {summary['limit']:.0e}"]
    where = f"first at {summary['same']['first_stage']}" if summary["same"]["first_stage"] else "in the logits alone"
    return [*said, f"The models differ by more than {summary['limit']:.0e}, {where}"]
