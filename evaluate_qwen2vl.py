"""Answers the questions of a split with a fine-tuned model and counts what is right, beside the blind baseline.

    python evaluate_qwen2vl.py --model-dir experiments/E/hf --data-dir SHARDS --output-dir experiments/E/evaluation

The model is loaded by stock transformers. Media become tokens as in training (media_encoder.py), so that sizes, grids
and numbers are the same. Every question of a conversation is asked on its own, with the entry's media. Blind: the same
model and questions, every picture and frame grey; what it still gets right needs no eyes. An answer is right if it
equals the reference but for case, white space and a final full stop. If it is killed, the same command goes on
(answer_file.py).
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answer_file import AnswerFile, as_lines, digest_files, replace_file
from checkpoint_files import check_checkpoint, read_processor, token_format
from energon_files import read_splits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Qwen2VLProcessor

    from media import VideoSampling
    from media_encoder import Encoded, Frames

GREY = 128  # of 0..255
ASKED_AT_ONCE = 256  # questions whose media are in memory together, at most
MEDIA_AT_ONCE = 2 << 30  # bytes of them
ANSWERS_VERSION = 2  # raised when other answers would be given by the same model to the same questions
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.py")  # not what else may be put beside them
MEDIA_INPUTS = {  # of the model, by kind: tokens and grids
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
PAD = re.compile(r"<\|(image|video)_pad\|>")  # what the chat template writes for a medium
# What the answers depend on, and which questions there are.
OPTIONS = (
    "split",
    "limit",
    "batch_size",
    "max_new_tokens",
    "video_fps",
    "video_min_frames",
    "video_max_frames",
    "video_total_pixels",
)


@dataclass(frozen=True)
class Question:
    """One question.

    pieces: text, with "image" or "video" between texts where a medium stands.
    media: (kind, frames) in the order of the entry; frames as `media_encoder.MediaEncoder.read` gives them.
    system: the entry's own system turn, None for the default.
    """

    key: str
    turn: int
    question_type: str
    pieces: tuple[str, ...]
    answer: str
    media: tuple[tuple[str, "Frames"], ...]
    system: str | None = None

    @property
    def text(self) -> str:
        """The question without its media."""
        return "".join(self.pieces[::2])


@dataclass
class Reading:
    """How far a split has been read. entries: those asked, the last one perhaps in part; questions: of these; turns:
    questions of the last entry, 0 once there are no more of it; left_out: entries that cannot be used, by reason."""

    entries: int = 0
    questions: int = 0
    turns: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "left_out": dict(self.left_out)}

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> "Reading":
        """What `as_dict` gave; None: nothing has been read."""
        return cls(**{**values, "left_out": Counter(values["left_out"])}) if values else cls()

    @property
    def entries_read(self) -> int:
        return self.entries + self.left_out.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
        left_out = f"{self.left_out.total()}{f' ({reasons})' if reasons else ''}"
        return f"read {self.entries_read} entries = asked {self.entries} + left out {left_out}"


def read_questions(
    data_dir: Path,
    split: str,
    limit: int | None,
    sampling,
    fit=None,
    special: Iterable[str] = (),
    reading: Reading | None = None,
    planes: bool = False,
) -> Iterator[Question]:
    """Questions of a split in the order of its shards; entries that cannot be used are reported on stderr.

    sampling, fit, planes: how media are read, as for `media.as_array`. special: the tokenizer's special tokens, which
    the chat template takes for what they stand for when a text spells them out. reading: where to begin; it is kept up
    to date.
    """
    from media import MediaError, as_array
    from task_encoder import BadSample, parse_entry, parse_messages, read_samples

    reading = Reading() if reading is None else reading
    begun = reading.entries_read - (reading.turns > 0)
    for sample in islice(read_samples(data_dir, split), begun, None):
        if limit is not None and reading.questions >= limit:
            return
        try:
            entry = parse_entry(sample.entry)
            messages = parse_messages(entry, bool(sample.media))
            refuse_special(messages, special)
            media = tuple((kind, as_array(kind, content, sampling, fit, planes)) for kind, content in sample.media)
        except (BadSample, MediaError) as error:
            reading.left_out[getattr(error, "reason", "undecodable_media")] += 1
            print(f"evaluate_qwen2vl.py: {sample.__key__} left out: {error}", file=sys.stderr)
            continue
        system = messages[0][1][0] if messages[0][0] == "system" else None
        spoken = [pieces for role, pieces in messages if role != "system"]
        types = entry.get("question_type", [])
        reading.entries += not reading.turns
        for turn, (question, (answer,)) in enumerate(zip(spoken[::2], spoken[1::2], strict=True)):
            if turn < reading.turns:
                continue
            if limit is not None and reading.questions >= limit:
                return
            reading.questions += 1
            reading.turns += 1
            kind = types[turn] if turn < len(types) else "all"
            yield Question(sample.__key__, turn, kind, place_media(question, media), answer, media, system)
        reading.turns = 0


def refuse_special(messages: list[tuple[str, list[str]]], special: Iterable[str]) -> None:
    """Raises BadSample for a question or system turn with a special token in its text: training learns it as text,
    which the chat template cannot say."""
    from task_encoder import BadSample

    for role, pieces in messages:
        for token in special if role != "assistant" else ():
            if any(token in text for text in pieces[::2]):
                raise BadSample("special_token", f"its text spells out {token}")


def place_media(pieces: list[str], media: tuple) -> tuple[str, ...]:
    """The media of an entry stand where this turn has placeholders for all of them, or else before its text."""
    if pieces[1::2] == [kind for kind, _ in media]:
        return tuple(pieces)
    before = [part for kind, _ in media for part in ("", kind)]
    return (*before, "".join(pieces[::2]))


def blinded(question: Question) -> Question:
    """The same question with grey media of the same size."""
    return replace(question, media=tuple((kind, grey_frames(frames)) for kind, frames in question.media))


def grey_frames(frames: "Frames") -> "np.ndarray":
    """Grey RGB of the size of an image, a video or its planes: uint8 [H, W, 3] or [T, H, W, 3]."""
    import numpy as np

    shape = frames.shape if isinstance(frames, np.ndarray) else (*frames.luma.shape, 3)
    return np.full(shape, GREY, np.uint8)


def same_answer(prediction: str, answer: str) -> bool:
    """Equal but for case, white space and a final full stop."""

    def normalised(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".")

    return normalised(prediction) == normalised(answer)


class Answerer:
    """A model, loaded by stock transformers, its tokenizer and its chat template; media are encoded as in training.

    sampling: frames that are read of a video. pixel_bounds: min_pixels, max_pixels in place of the checkpoint's. Raises
    CheckpointError.
    """

    def __init__(
        self, model_dir: Path, max_new_tokens: int, sampling: "VideoSampling | None" = None, **pixel_bounds: int
    ) -> None:
        import torch
        from transformers import Qwen2VLForConditionalGeneration

        from media_encoder import MediaEncoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(model_dir, torch_dtype=dtype).to(device).eval()
        self.processor = load_processor(model_dir, **pixel_bounds)
        self.media = MediaEncoder(self.processor.image_processor, sampling)
        self.max_new_tokens = max_new_tokens

    def answer(self, questions: list[Question]) -> list[str]:
        """Greedy answers to a batch of questions."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in self.model_inputs(questions).items()}
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        return self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def model_inputs(self, questions: list[Question]) -> dict[str, "torch.Tensor"]:
        """What the model reads of a batch. L: tokens of its longest question; N, K, M: as in media_encoder.py.

        input_ids, attention_mask: int64 [B, L], padded on the left.
        pixel_values, pixel_values_videos: float32 [N, K] of all images, of all videos; left out where there are none.
        image_grid_thw, video_grid_thw: int64 [M, 3], likewise.
        """
        from media_encoder import stack_media

        texts, media = [], []
        for question in questions:
            encoded = [(kind, *self.media.encode(kind, frames)) for kind, frames in question.media]
            texts.append(self._expand(self._prompt(question), encoded))
            media += encoded
        inputs = dict(self.processor.tokenizer(texts, padding=True, return_tensors="pt"))
        for kind, names in MEDIA_INPUTS.items():
            if any(part[0] == kind for part in media):
                inputs.update(zip(names, stack_media(kind, media)))
        return inputs

    def _expand(self, prompt: str, media: list["Encoded"]) -> str:
        """A prompt with as many pads for each medium as the language model has tokens of it. Raises ValueError."""
        places, kinds = PAD.findall(prompt), [kind for kind, _, _ in media]
        if places != kinds:
            raise ValueError(f"a prompt has places for {places}, its question has {kinds}: does its text spell a pad?")
        merge = self.media.image_processor.merge_size
        counts = iter([t * h * w // merge**2 for _, _, (t, h, w) in media])
        return PAD.sub(lambda pad: pad[0] * next(counts), prompt)

    def _prompt(self, question: Question) -> str:
        content = [
            {"type": piece} if number % 2 else {"type": "text", "text": piece}
            for number, piece in enumerate(question.pieces)
            if piece
        ]
        messages = [{"role": "user", "content": content}]
        if question.system is not None:
            messages.insert(0, {"role": "system", "content": question.system})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def load_processor(model_dir: Path, **pixel_bounds: int) -> "Qwen2VLProcessor":
    """A checkpoint's tokenizer, which pads on the left, chat template and image processor, all but the template as
    training loads them. pixel_bounds: of the image processor. Raises CheckpointError."""
    from transformers import AutoTokenizer, Qwen2VLProcessor

    from media_encoder import load_image_processor

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    dct = token_format(model_dir, read_processor(model_dir))
    image_processor = load_image_processor(model_dir, dct, **pixel_bounds)
    configuration, of_own_file = Qwen2VLProcessor.get_processor_dict(model_dir)
    template = of_own_file.get("chat_template") or configuration.get("chat_template") or tokenizer.chat_template
    return Qwen2VLProcessor(image_processor, tokenizer, chat_template=template)


def in_rounds(questions: Iterable[Question], most: int) -> Iterator[list[Question]]:
    """Lists of up to `most` questions, fewer where their media fill MEDIA_AT_ONCE."""
    chosen, size = [], 0
    for question in questions:
        chosen.append(question)
        size += sum(frames.nbytes for _, frames in question.media)
        if len(chosen) >= most or size >= MEDIA_AT_ONCE:
            yield chosen
            chosen, size = [], 0
    if chosen:
        yield chosen


def answer_all(answerer: Answerer, questions: list[Question], batch_size: int, blind: bool) -> list[str]:
    """Predictions in the order of `questions`; batches hold questions of like length, so little is padded."""
    from tqdm import tqdm

    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].media), len(questions[i].text)))
    predictions = [""] * len(questions)
    label = "Answering blind" if blind else "Answering"
    for start in tqdm(range(0, len(order), batch_size), desc=label, unit="batch"):
        chosen = order[start : start + batch_size]
        batch = [blinded(questions[i]) if blind else questions[i] for i in chosen]
        for i, prediction in zip(chosen, answerer.answer(batch), strict=True):
            predictions[i] = prediction
    return predictions


def accuracies(answers: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Share of right answers by question type, and "overall". answers: as in predictions.jsonl; name: under which the
    predictions stand there."""
    right: dict[str, list[bool]] = {"overall": []}
    for answer in answers:
        correct = same_answer(answer[name], answer["answer"])
        right.setdefault(answer["question_type"], []).append(correct)
        right["overall"].append(correct)
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def table(results: dict) -> str:
    """What accuracy.json holds as text, in percent: a line for each question type, overall last."""
    accuracy, blind, asked = (results[name] for name in ("accuracy", "blind_accuracy", "questions_by_type"))
    lines = [f"{'question type':<14} {'questions':>9} {'accuracy':>9} {'blind':>9}"]
    for kind in sorted(accuracy, key=lambda name: (name == "overall", name)):
        lines.append(f"{kind:<14} {asked[kind]:>9} {accuracy[kind]:>8.1%} {blind[kind]:>8.1%}")
    return "\n".join(lines)


def describe_answers(
    questions: list[Question], predictions: list[str], blind_predictions: list[str]
) -> list[dict[str, Any]]:
    """What predictions.jsonl holds, one object for each question."""
    return [
        {
            "key": question.key,
            "turn": question.turn,
            "question_type": question.question_type,
            "question": question.text,
            "answer": question.answer,
            "prediction": prediction,
            "blind_prediction": blind,
            "correct": same_answer(prediction, question.answer),
        }
        for question, prediction, blind in zip(questions, predictions, blind_predictions, strict=True)
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="fine-tuned Hugging Face directory")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of prepared shards")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets predictions.jsonl and accuracy.json")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="which part is asked")
    parser.add_argument("--limit", type=int, help="most questions (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered at a time")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer, tokens")
    parser.add_argument("--video-fps", type=float, default=2.0, help="frames read from a second of a clip")
    parser.add_argument("--video-min-frames", type=int, default=4, help="least frames read from a clip that has them")
    parser.add_argument("--video-max-frames", type=int, default=768, help="most frames read from a clip")
    parser.add_argument(
        "--video-total-pixels",
        type=int,
        default=24_576 * 28 * 28,
        help="most pixels of a clip, two frames counted as one",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError or OSError with one line. Makes the output folder, so that no answer is in vain."""
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("video_fps", "video_min_frames", "video_max_frames", "video_total_pixels"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be over 0, got {getattr(arguments, name)}")
    if not (arguments.model_dir / "config.json").is_file():
        raise ValueError(f"no model in {arguments.model_dir} (no config.json): give --model-dir a run's hf folder")
    check_checkpoint(arguments.model_dir)
    if not read_splits(arguments.data_dir, (arguments.split,))[arguments.split]:
        raise ValueError(f"the {arguments.split} split of {arguments.data_dir} holds no shard: choose another --split")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)


def describe_settings(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What answers depend on, by kind: a run goes on only from answers that it would have given itself."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers")}
    files = {
        "--model-dir": digest_files(arguments.model_dir, *MODEL_FILES),
        "--data-dir": digest_files(arguments.data_dir, "**/*.tar", ".nv-meta/*.yaml"),
    }
    options = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in OPTIONS}
    return {"options": options, "files": files, "others": {"version": ANSWERS_VERSION, "device": device, **versions}}


def say_beginning(file: AnswerFile) -> None:
    if file.refused:
        print(f"evaluate_qwen2vl.py: {file.path} is not used ({file.refused}): starting anew", file=sys.stderr)
    elif file.answers:
        print(f"Going on after the {len(file.answers)} questions answered in {file.path}")


def evaluate(arguments: argparse.Namespace) -> dict:
    """Answers everything twice, seeing and blind; returns what accuracy.json holds."""
    path = arguments.output_dir / "predictions.jsonl"
    with AnswerFile(path.with_suffix(".jsonl.part"), describe_settings(arguments)) as file:
        say_beginning(file)
        reading = Reading.of(file.read)
        ask(arguments, file, reading)
        if not file.answers:
            where = f"the {arguments.split} split of {arguments.data_dir}"
            raise ValueError(f"{where} has no questions to ask ({reading}): choose another --split")
        summary = summarise(arguments, file.answers, reading)
        replace_file(path, as_lines(file.answers))  # earlier results stay whole until there are new ones
        replace_file(arguments.output_dir / "accuracy.json", (json.dumps(summary, indent=2) + "\n").encode())
        file.remove()
    print(table(summary))
    print(reading)
    return summary


def ask(arguments: argparse.Namespace, file: AnswerFile, reading: Reading) -> None:
    """Ask what has not been answered yet."""
    from media import VideoSampling

    sampling = VideoSampling(
        arguments.video_fps, arguments.video_min_frames, arguments.video_max_frames, arguments.video_total_pixels
    )
    answerer = Answerer(arguments.model_dir, arguments.max_new_tokens, sampling)
    special, media = answerer.processor.tokenizer.get_added_vocab(), answerer.media
    source = (arguments.data_dir, arguments.split, arguments.limit)
    questions = read_questions(*source, sampling, media.fit, special, reading, media.reads_planes)
    for chosen in in_rounds(questions, max(ASKED_AT_ONCE, arguments.batch_size)):
        seen, blind = (answer_all(answerer, chosen, arguments.batch_size, blind) for blind in (False, True))
        file.add_round(describe_answers(chosen, seen, blind), reading.as_dict())


def summarise(arguments: argparse.Namespace, answers: list[dict[str, Any]], reading: Reading) -> dict[str, Any]:
    """What accuracy.json holds."""
    return {
        "model_dir": str(arguments.model_dir),
        "split": arguments.split,
        "questions": len(answers),
        "entries_read": reading.entries_read,
        "entries_asked": reading.entries,
        "entries_left_out": dict(sorted(reading.left_out.items())),
        "questions_by_type": {**Counter(answer["question_type"] for answer in answers), "overall": len(answers)},
        "accuracy": accuracies(answers, "prediction"),
        "blind_accuracy": accuracies(answers, "blind_prediction"),
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        check(arguments)
        evaluate(arguments)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"evaluate_qwen2vl.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate_qwen2vl.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"Predictions are in {arguments.output_dir / 'predictions.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
