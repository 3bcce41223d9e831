"""Questions to a model that was trained with skipped cells: evaluation follows its processor by itself."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from samples_by_hand import answer, conversation_sample

from dct_qwen2vl.checkpoints.inspection import PROCESSOR
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.evaluation.answering import Answerer
from dct_qwen2vl.evaluation.questions import Question
from task_encoder import QwenTaskEncoder


@pytest.fixture(scope="module")
def new_answerer(converted, tmp_path_factory):
    """new_answerer(skip_db): of the tiny model, its folder as training leaves it."""

    def make(skip_db: float | None) -> Answerer:
        folder = tmp_path_factory.mktemp("skipping") / "model"
        shutil.copytree(converted("x4"), folder)
        DCTImageProcessor.from_pretrained(folder, skip_db=skip_db).save_pretrained(folder)
        return Answerer(folder, max_new_tokens=6)

    return make


@pytest.fixture(scope="module")
def media(natural_frames, image_file, video_file) -> dict[str, bytes]:
    page = np.full((168, 168, 3), 255, np.uint8)
    page[60:100, 60:100] = natural_frames(1, 40, 40)[0]
    return {
        "image": image_file(page, "PNG"),
        "video": video_file(natural_frames(1, 112, 168).repeat(12, axis=0), rate=2),
    }


def questions_of(answerer: Answerer, media: dict[str, bytes]) -> list[Question]:
    """With both media, with one, with none."""
    read = {kind: answerer.media.read(kind, content) for kind, content in media.items()}
    pieces = {
        "both": ("", "image", "What? ", "video", "Where?"),
        "one": ("", "video", "Where does it go?"),
        "none": ("Why?",),
    }
    return [
        Question(key, 0, "all", parts, "red", tuple((kind, read[kind]) for kind in parts[1::2]))
        for key, parts in pieces.items()
    ]


def test_questions_are_asked_as_training_asks_them(new_answerer, media):
    answerer = new_answerer(30.0)
    asked = answerer.model_inputs(questions_of(answerer, media)[:1])
    encoder = QwenTaskEncoder(answerer.processor.tokenizer, answerer.processor.image_processor)
    sample = conversation_sample(answer("<image>What? <video>Where?", "red"), *media.items())
    learned = encoder.encode(sample)
    length = asked["input_ids"].shape[1]
    assert asked["input_ids"][0].tolist() == learned.input_ids[:length].tolist()
    assert torch.equal(asked["position_ids"][:, 0], learned.position_ids[:, :length])
    for name in ("pixel_values", "image_grid_thw", "image_kept", "pixel_values_videos", "video_grid_thw", "video_kept"):
        assert torch.equal(asked[name], getattr(learned, name)), name
    assert asked["video_kept"].view(6, 6).sum(1).tolist() == [6, 0, 0, 0, 0, 0] and asked["image_kept"].sum() < 9


def test_answers_are_the_same_where_nothing_is_skipped(new_answerer, media):
    plain, skipping = new_answerer(None), new_answerer(math.inf)
    assert "position_ids" not in plain.model_inputs(questions_of(plain, media))
    assert plain.answer(questions_of(plain, media)) == skipping.answer(questions_of(skipping, media))


def test_batches_answer_as_single_questions(new_answerer, media):
    answerer = new_answerer(30.0)
    questions = questions_of(answerer, media)
    single = [answerer.answer([question])[0] for question in questions]
    assert answerer.answer(questions) == single and any(single)


def test_the_processor_keeps_the_threshold_and_gives_all_tokens(converted, tmp_path, natural_frames):
    processor = DCTImageProcessor.from_pretrained(converted("x4"))
    saved = json.loads((Path(converted("x4")) / PROCESSOR).read_text())
    assert processor.skip_db is None and "skip_db" not in saved
    processor.skip_db = 38.0
    processor.save_pretrained(tmp_path)
    again = DCTImageProcessor.from_pretrained(tmp_path)
    assert again.skip_db == 38.0
    assert len(again(images=np.full((112, 112, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]) == 16
    with pytest.raises(ValueError, match="skip_db must be a positive number of dB"):
        DCTImageProcessor("x4", skip_db=-1)
