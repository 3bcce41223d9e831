"""Asks a fine-tuned model the questions of a split. Prints its accuracy and that of the blind baseline.

    python evaluate_qwen2vl.py --model-dir experiments/E/hf --data-dir SHARDS --output-dir experiments/E/evaluation

Stock transformers loads the model. Images and videos become the same tokens as in training (media_encoder.py). Every
question of a conversation is asked separately, with the entry's media. The blind baseline is the same model on the same
questions with all images and frames grey: it shows what can be answered without looking. An answer is right if it
equals the reference; case, white space and a final full stop do not count. If the program is killed, the same command
continues (answer_file.py).

    python evaluate_qwen2vl.py --compare experiments/E/hf_dct experiments/E/hf --data-dir SHARDS --output-dir COMPARED

compares two forms of a model (comparison.py): logits and greedy answers on a few samples, and how media were read.
"""

import argparse
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import (
    check_checkpoint,
    note_on_all_cells,
    note_on_old_code,
    note_on_saved_again,
    note_on_threshold,
    where_it_is,
)
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.common.files import write_bytes, write_json
from dct_qwen2vl.common.imports import importing
from dct_qwen2vl.common.scripts import UserError, run_main, run_program
from dct_qwen2vl.common.settings import DefaultsFormatter, add_flags, check_ranges, flag_of
from dct_qwen2vl.common.video_sampling import PREFIX, VideoSampling
from dct_qwen2vl.data.energon_files import count_samples, read_splits
from dct_qwen2vl.evaluation.answer_file import AnswerFile, as_lines, digest_files
from dct_qwen2vl.evaluation.answerers import Answerers
from dct_qwen2vl.evaluation.answering import Reader
from dct_qwen2vl.evaluation.comparison import compare
from dct_qwen2vl.evaluation.comparison import table as table_of_comparison
from dct_qwen2vl.evaluation.questions import ASKED_AT_ONCE, Reading, in_rounds, read_questions
from dct_qwen2vl.evaluation.scoring import accuracies, describe_answers, table

ANSWERS_VERSION = 6  # raised when other answers would be given by the same model to the same questions
LIMIT_TO_COMPARE = 4  # questions
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.py")  # not what else may be put beside them
# What the answers depend on, and which questions there are.
OPTIONS = ("split", "limit", "batch_size", "max_new_tokens", *(PREFIX + each.name for each in fields(VideoSampling)))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line as a Namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=DefaultsFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--model-dir", type=Path, help="Hugging Face directory of the model, such as a run's hf")
    asked.add_argument("--compare", type=Path, nargs=2, metavar=("DIR_A", "DIR_B"), help="two forms of a model: are "
                       "their logits and answers equal? The exit status is 1 if not")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of prepared shards")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets predictions.jsonl and accuracy.json, "
                        "or comparison.json and comparison.jsonl")  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="part of the data whose questions are asked"
    )
    parser.add_argument("--limit", type=int, help="most questions (default: all; to compare: 4)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered at a time")
    parser.add_argument("--processes", type=int, default=1, help="that answer side by side, on a GPU each")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, tokens")
    parser.add_argument("--skip-db", type=float, metavar="DB", help="leave out cells that a kept cell already shows "
                        "with this PSNR, 0: none (default: as the model was trained)")  # fmt: skip
    as_trained = parser.add_argument_group("videos", "defaults: as the model was trained, according to its files")
    add_flags(as_trained, VideoSampling, PREFIX, default=None)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError or OSError with one line. Makes the output folder, so that no answer is in vain."""
    for name in ("limit", "batch_size", "max_new_tokens", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} must be at least 1, got {value}")
    check_ranges(VideoSampling(**given_sampling(arguments)), PREFIX)
    check_skipping(arguments)
    if arguments.compare and arguments.processes > 1:
        raise UserError("--processes does not go with --compare, which asks a few questions: leave one out")
    models = arguments.compare or [arguments.model_dir]
    for model_dir in models:
        if not (model_dir / "config.json").is_file():
            flag = "--compare" if arguments.compare else "--model-dir"
            where = where_it_is(model_dir, "hf", flag) or f"give {flag} a run's hf folder"
            raise UserError(f"no model in {model_dir} (no config.json): {where}")
        dct = check_checkpoint(model_dir)
        if arguments.skip_db and dct is None:
            raise UserError(f"--skip-db needs DCT tokens, {model_dir} reads pixels: give --model-dir the run's hf_dct")
        check_ranges(sampling_of(model_dir, arguments), PREFIX)
    if not read_splits(arguments.data_dir, (arguments.split,))[arguments.split]:
        raise UserError(f"the {arguments.split} split of {arguments.data_dir} holds no shard: choose another --split")
    check_with_libraries(arguments, models)
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be made ({error.strerror})"
        raise UserError(f"--output-dir {arguments.output_dir} {why}: name another") from error


def check_with_libraries(arguments: argparse.Namespace, models: list[Path]) -> None:
    """What only torch and transformers know, whose import takes seconds. Raises UserError; prints what to know of the
    models."""
    with importing():
        from dct_qwen2vl.checkpoints.loading import check_directory

    check_processes(arguments)
    all_cells = arguments.compare or arguments.skip_db is not None  # which was asked for
    for model_dir in models:
        check_directory(model_dir)
        for note in filter(None, (note_on_old_code(model_dir), note_on_saved_again(model_dir))):
            print(f"Note: {note}")
        if not all_cells and (note := note_on_all_cells(model_dir)):
            print(f"Note: {note}")


def check_processes(arguments: argparse.Namespace) -> None:
    """Raises UserError for more processes than GPUs, or than processors where there is no GPU."""
    if arguments.processes == 1:
        return
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if arguments.processes > (gpus or cores):
        each, there = ("GPU", gpus) if gpus else ("processor", cores)
        raise UserError(f"--processes {arguments.processes}: each takes a {each}, and there are {there}")


def check_skipping(arguments: argparse.Namespace) -> None:
    """Raises UserError for a --skip-db that cannot be; prints a note on one that was probably not meant."""
    if arguments.skip_db is None:
        return
    if arguments.compare:
        raise UserError("--skip-db does not go with --compare, which reads all cells: leave one out")
    if not 0 <= arguments.skip_db < math.inf:
        raise UserError(f"--skip-db must be a finite number of dB, at least 0, got {arguments.skip_db:g}")
    if note := note_on_threshold(arguments.skip_db):
        print(f"Note: {note}")


def skipping_of(arguments: argparse.Namespace) -> dict[str, float | None]:
    """What the image processor has otherwise than the model's files say."""
    return {} if arguments.skip_db is None else {"skip_db": arguments.skip_db or None}


def sampling_of(model_dir: Path, arguments: argparse.Namespace) -> VideoSampling:
    """What is read of a video: what was given, else what the model's files say, else Qwen2-VL's. Raises
    CheckpointError."""
    return VideoSampling(**{**saved_sampling(model_dir), **given_sampling(arguments)})


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `VideoSampling` that have a flag on the command line."""
    given = {each.name: getattr(arguments, PREFIX + each.name) for each in fields(VideoSampling)}
    return {name: value for name, value in given.items() if value is not None}


def describe_settings(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the answers depend on, by kind. A run continues only with answers that it would have given itself."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers")}
    files = {
        "--model-dir": digest_files(arguments.model_dir, *MODEL_FILES),
        "--data-dir": digest_files(arguments.data_dir, "**/*.tar", ".nv-meta/*.yaml"),
    }
    sampling = {PREFIX + name: value for name, value in vars(sampling_of(arguments.model_dir, arguments)).items()}
    options = {flag_of(name): {**vars(arguments), **sampling}[name] for name in OPTIONS}
    if arguments.skip_db is not None:
        options["--skip-db"] = arguments.skip_db
    return {"options": options, "files": files, "others": {"version": ANSWERS_VERSION, "device": device, **versions}}


def say_beginning(file: AnswerFile) -> None:
    if file.refused:
        print(f"evaluate_qwen2vl.py: {file.path} is not used ({file.refused}): starting again", file=sys.stderr)
    elif file.answers:
        print(f"Continuing after the {len(file.answers)} questions answered in {file.path}")


def evaluate(arguments: argparse.Namespace) -> dict:
    """Answers everything twice, seeing and blind; returns what accuracy.json holds."""
    path = arguments.output_dir / "predictions.jsonl"
    with AnswerFile(path.with_suffix(".jsonl.part"), describe_settings(arguments)) as file:
        say_beginning(file)
        reading = Reading.of(file.read)
        reader = ask(arguments, file, reading)
        if not file.answers:
            where = f"the {arguments.split} split of {arguments.data_dir}"
            raise UserError(f"{where} has no questions to ask ({reading}): choose another --split")
        summary = summarise(arguments, file.answers, reading, reader.media.skip_db)
        write_bytes(path, as_lines(file.answers))  # earlier results stay whole until there are new ones
        write_json(arguments.output_dir / "accuracy.json", summary)
        file.remove()
    print(table(summary))
    print(reading)
    if long := reader.count_longer([answer["answer"] for answer in file.answers]):
        of_all = f"{long} of {len(file.answers)} right answers"
        print(f"{of_all} are longer than the model's may be, {arguments.max_new_tokens} tokens: raise --max-new-tokens")
    return summary


def ask(arguments: argparse.Namespace, file: AnswerFile, reading: Reading) -> Reader:
    """Asks what has not been answered yet, with one progress bar: every question has two answers, seeing and blind.
    Returns what the questions were read with."""
    from tqdm import tqdm

    sampling, skipping = sampling_of(arguments.model_dir, arguments), skipping_of(arguments)
    source = (arguments.data_dir, arguments.split, arguments.limit)
    most, begun = arguments.limit and 2 * arguments.limit, 2 * len(file.answers)
    entries = count_samples(arguments.data_dir, read_splits(arguments.data_dir, (arguments.split,))[arguments.split])
    total = most or expected_answers(reading, entries) or None
    model = (arguments.model_dir, arguments.max_new_tokens, sampling)
    with (
        Answerers(arguments.processes, *model, **skipping) as answerers,
        tqdm(desc="Answering", total=total, initial=begun, unit="answer") as bar,
    ):
        reader = answerers.reader
        if reader.media.skip_db:
            chosen_by = "as the model's files say" if arguments.skip_db is None else "as --skip-db says"
            tqdm.write(f"Cells that a kept one shows to {reader.media.skip_db:g} dB are left out, {chosen_by}")
        questions = read_questions(*source, reader.media.read, reader.text_tokens.stay_text, reading)
        rounds = in_rounds(questions, max(ASKED_AT_ONCE, arguments.batch_size))
        states = ((chosen, reading.as_dict()) for chosen in rounds)
        for chosen, read in read_ahead(states) if arguments.processes > 1 else states:
            seen, blind = answerers.answer_all(chosen, arguments.batch_size, bar.update)
            file.add_round(describe_answers(chosen, seen, blind), read)
            bar.total = most or expected_answers(Reading.of(read), entries)
        bar.total = bar.n
    return reader


def expected_answers(reading: Reading, entries: int) -> int:
    """Of all entries, if they have as many questions as those that were read.

    reading: How far the entries were read.
    entries: Of the split. How many questions they have is known at the end.
    """
    return round(2 * reading.questions * max(1.0, entries / max(1, reading.entries_read)))


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items. Each is read while the one before it is worked on."""
    thread = ThreadPoolExecutor(1)
    try:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
    finally:
        thread.shutdown(wait=False)  # after Ctrl-C nobody waits for what is being read


def summarise(
    arguments: argparse.Namespace, answers: list[dict[str, Any]], reading: Reading, skip_db: float | None
) -> dict[str, Any]:
    """What accuracy.json holds.

    skip_db: With which cells were left out, dB. None: all were read.
    """
    return {
        "model_dir": str(arguments.model_dir),
        "split": arguments.split,
        "skip_db": skip_db,
        "questions": len(answers),
        "entries_read": reading.entries_read,
        "entries_asked": reading.entries,
        "entries_left_out": dict(sorted(reading.left_out.items())),
        "questions_by_type": {**Counter(answer["question_type"] for answer in answers), "overall": len(answers)},
        "accuracy": accuracies(answers, "prediction"),
        "blind_accuracy": accuracies(answers, "blind_prediction"),
    }


def compare_forms(arguments: argparse.Namespace) -> int:
    """Prints and writes what two models have in common. Returns 1 where their logits differ."""
    models, limit = tuple(arguments.compare), arguments.limit or LIMIT_TO_COMPARE
    source = (arguments.data_dir, arguments.split, limit, arguments.max_new_tokens)
    found = compare(models, *source, given_sampling(arguments))
    found.write(arguments.output_dir)
    print(table_of_comparison(found))
    return int(not found.equal)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("evaluate_qwen2vl.py", lambda: answer(arguments), arguments.debug, goes_on=True)


def answer(arguments: argparse.Namespace) -> int:
    check(arguments)
    if arguments.compare:
        return compare_forms(arguments)
    if arguments.processes > 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which ends the other processes first
    evaluate(arguments)
    print(f"Predictions are in {arguments.output_dir / 'predictions.jsonl'}")
    return 0


if __name__ == "__main__":
    run_program("evaluate_qwen2vl.py", main)
