"""evaluate_qwen2vl.py on real shards with an untrained model, and its counting by hand-made answers."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import edit_json, is_running, run
from samples_by_hand import answer, conversation_sample
from torch.nn import functional
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

import evaluate_qwen2vl
from dct_qwen2vl.checkpoints.hf_folder import load_image_processor, load_processor
from dct_qwen2vl.checkpoints.inspection import PROCESSOR, CheckpointError, note_on_all_cells
from dct_qwen2vl.checkpoints.stock_form import to_stock
from dct_qwen2vl.checkpoints.video_sampling import VIDEO_PROCESSOR, write_sampling
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.media import as_array
from dct_qwen2vl.data.samples import IGNORE_INDEX
from dct_qwen2vl.data.text_tokens import TextTokens
from dct_qwen2vl.data.videos import VideoSampling, YUVFrames
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.evaluation import questions as reading
from dct_qwen2vl.evaluation.answer_file import AnswerFile, as_lines
from dct_qwen2vl.evaluation.answerers import Answerers
from dct_qwen2vl.evaluation.answering import Answerer, answer_batch, cut_batches
from dct_qwen2vl.evaluation.questions import Question, Reading, blinded, read_questions
from dct_qwen2vl.evaluation.scoring import accuracies, describe_answers, same_answer
from task_encoder import QwenTaskEncoder


def at_own_size(kind: str, content: bytes) -> np.ndarray:
    return as_array(kind, content, VideoSampling())


@pytest.fixture(scope="module")
def questions(prepared) -> list[Question]:
    return list(read_questions(prepared.shards, "test", None, at_own_size))


def question(kind: str, answer: str) -> Question:
    return Question("key", 0, kind, ("What?",), answer, ())


def folders(prepared, output: Path) -> list[str]:
    """Arguments of evaluate_qwen2vl.py."""
    return ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(output)]


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("red", "red", True),
        (" Red.\n", "red", True),
        ("dark  red", "dark red", True),
        ("reddish", "red", False),
        ("", "red", False),
        ("3", "13", False),
    ],
)
def test_same_answer(prediction, answer, right):
    assert same_answer(prediction, answer) is right


def test_accuracies_by_type_and_overall():
    asked = [question("colour", "red"), question("colour", "blue"), question("count", "3"), question("count", "4")]
    answers = describe_answers(asked, ["red", "red", "3", "4"], ["red", "red", "5", "5"])
    assert accuracies(answers, "prediction") == {"colour": 0.5, "count": 1.0, "overall": 0.75}
    assert accuracies(answers, "blind_prediction") == {"colour": 0.5, "count": 0.0, "overall": 0.25}


def test_blinded_media_are_grey_of_the_same_size():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    seen = Question("key", 1, "colour", ("", "image", "What?"), "red", (("image", image),))
    blind = blinded(seen)
    assert blind.media[0][1].shape == (2, 3, 3)
    assert set(blind.media[0][1].ravel().tolist()) == {128}
    assert (blind.key, blind.turn, blind.text, blind.answer) == ("key", 1, "What?", "red")


def test_blinded_planes_are_grey_frames_of_the_same_size():
    planes = YUVFrames(*(np.zeros((4, *size), np.uint8) for size in ((56, 112), (28, 56), (28, 56))), "bt601", False)
    (_, frames), *_ = blinded(Question("key", 0, "all", ("", "video", "What?"), "red", (("video", planes),))).media
    assert frames.shape == (4, 56, 112, 3) and frames.dtype == np.uint8
    assert set(frames.ravel().tolist()) == {128}


@pytest.mark.parametrize(
    ("pieces", "kinds", "placed"),
    [
        (["", "image", "What?"], ["image"], ("", "image", "What?")),
        (["Where does it go?", "video", ""], ["video"], ("Where does it go?", "video", "")),
        (["And the colour?"], ["image"], ("", "image", "And the colour?")),
        (["Both?"], ["image", "image"], ("", "image", "", "image", "Both?")),
        (["What is two plus two?"], [], ("What is two plus two?",)),
        (["", "video", "What?"], ["image"], ("", "image", "What?")),
    ],
)
def test_media_stand_where_the_turn_puts_them_or_before_it(pieces, kinds, placed):
    assert reading.place_media(pieces, tuple((kind, None) for kind in kinds)) == placed


def test_questions_are_the_entries_of_the_test_split(prepared, questions):
    entries = {entry["id"]: entry for entry in json.loads((prepared.shards / "cambrian737k_filtered.json").read_text())}
    turns = {(q.text, q.answer) for q in questions}
    known = set()
    for entry in entries.values():
        spoken = [turn.get("value", turn.get("content")) for turn in entry["conversations"]]
        roles = [turn.get("from", turn.get("role")) for turn in entry["conversations"]]
        spoken = spoken[1:] if roles[0] == "system" else spoken
        known |= {
            (q.replace("<image>\n", "").replace("<video>\n", "").replace("<image>", "").strip("\n"), a)
            for q, a in zip(spoken[::2], spoken[1::2], strict=True)
        }
    assert len(questions) > 20
    assert {kind for q in questions for kind, _ in q.media} == {"image", "video"}
    assert turns <= known


def test_batches_answer_as_single_questions(prepared, questions):
    chosen = questions[:10]
    with Answerers(1, prepared.model, max_new_tokens=4) as answerers:
        together = answerers.answer_all(chosen, batch_size=5)
        alone = [answerers.reader.answer([q])[0] for q in chosen]
        blind = [answerers.reader.answer([blinded(q)])[0] for q in chosen]
    assert together == (alone, blind)


def test_one_very_long_question_is_asked_alone():
    assert list(cut_batches([*range(5)], [10, 20, 30, 40_000, 50_000], 2)) == [[0, 1], [2], [3], [4]]
    assert list(cut_batches([*range(64)], [4096] * 64, 64)) == [[*range(32)], [*range(32, 64)]]
    assert list(cut_batches([], [], 2)) == []


def test_a_batch_that_fills_the_memory_is_halved(questions):
    sizes = []

    def answer_few(batch):
        sizes.append(len(batch))
        if len(batch) > most:
            torch.empty(1 << 60, dtype=torch.uint8)  # raises what a full memory raises
        return [question.text for question in batch]

    batch, most = questions[:5], 2
    assert answer_batch(answer_few, batch) == [question.text for question in batch]
    assert sizes == [5, 2, 3, 1, 2]
    most = 0
    with pytest.raises(UserError, match=f"^the memory is full at one question, of {re.escape(batch[0].key)}: take"):
        answer_batch(answer_few, batch)
    with pytest.raises(RuntimeError, match="shape"):
        answer_batch(lambda _: torch.zeros(2).reshape(3), batch)


@pytest.mark.parametrize(("most", "longer"), [(1, 2), (3, 1), (64, 0)])
def test_who_ends_answers_before_the_right_ones_is_told(prepared, tmp_path, capsys, monkeypatch, most, longer):
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    replies = ["red", "red blue", "red blue green circle"]
    assert [len(tokenizer.encode(reply)) for reply in replies][:2] == [1, 3]
    asked = [conversation_sample(answer("What?", reply), key=reply) for reply in replies]
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: asked)
    words = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert evaluate_qwen2vl.main([*words, "--max-new-tokens", str(most)]) == 0
    told = re.findall(r"(\d+) of 3 right answers are longer than .* (\d+) tokens: raise", capsys.readouterr().out)
    assert told == ([(str(longer), str(most))] if longer else [])


def test_rounds_end_at_a_number_of_questions_or_of_bytes(monkeypatch):
    monkeypatch.setattr(reading, "MEDIA_AT_ONCE", 1000)
    plain = question("colour", "red")
    large = Question("key", 0, "colour", ("", "image", "What?"), "red", (("image", np.zeros((10, 20, 3), np.uint8)),))
    asked = [plain, plain, plain, large, large, plain]
    assert [len(chosen) for chosen in reading.in_rounds(asked, 3)] == [3, 2, 1]


def test_rounds_count_the_bytes_of_planes(monkeypatch):
    monkeypatch.setattr(reading, "MEDIA_AT_ONCE", 2 * 150)
    planes = YUVFrames(np.zeros((1, 10, 10), np.uint8), *[np.zeros((1, 5, 5), np.uint8)] * 2, "bt601", False)
    asked = [Question("key", 0, "all", ("", "video", "What?"), "red", (("video", planes),))] * 5
    assert [len(chosen) for chosen in reading.in_rounds(asked, 100)] == [2, 2, 1]


# What the model reads


@pytest.fixture(scope="module")
def forms(prepared, converted_sample_model) -> dict[str, Path]:
    """Checkpoints of one model by what they read."""
    return {"pixels": prepared.pixel_model, "x4": prepared.model, "exact": converted_sample_model}


@pytest.fixture(scope="module")
def converted_sample_model(prepared, tmp_path_factory) -> Path:
    from dct_qwen2vl.checkpoints.conversion import convert
    from dct_tokenizer import DCTConfig

    folder = tmp_path_factory.mktemp("exact") / "exact"
    convert(prepared.pixel_model, folder, DCTConfig.preset("exact"))
    return folder


@pytest.fixture
def evaluated(prepared, tmp_path, monkeypatch):
    """evaluated(model folder, sample, *options): what the model is given for its first question, seeing and blind."""

    def command(model: Path, sample, *options: str) -> list[dict[str, torch.Tensor]]:
        given, generate = [], Qwen2VLForConditionalGeneration.generate
        with monkeypatch.context() as patch:
            patch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: [sample])
            patch.setattr(
                Qwen2VLForConditionalGeneration,
                "generate",
                lambda model, **inputs: given.append(inputs) or generate(model, **inputs),
            )
            output = tmp_path / str(len(list(tmp_path.iterdir())))
            arguments = ["--data-dir", str(prepared.shards), "--output-dir", str(output), "--max-new-tokens", "1"]
            assert evaluate_qwen2vl.main(["--model-dir", str(model), *arguments, *options]) == 0
        seen, blind = given
        return [seen, blind]

    return command


def trained_on(model: Path, sample, sampling: VideoSampling | None = None):
    """What training reads of the sample."""
    processor = load_processor(model)
    encoder = QwenTaskEncoder(processor.tokenizer, processor.image_processor, 10**6, sampling)
    return encoder.encode(sample)


def assert_asked_as_trained(seen: dict[str, torch.Tensor], learned) -> None:
    length = seen["input_ids"].shape[1]
    assert seen["input_ids"][0].tolist() == learned.input_ids[:length].tolist()
    assert learned.labels[length] == learned.input_ids[length] != IGNORE_INDEX, "the answer comes next"
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        expected = getattr(learned, name)
        assert (name in seen) == bool(len(expected))
        assert name not in seen or torch.equal(seen[name], expected), name


@pytest.mark.parametrize("form", ["pixels", "exact", "x4"])
def test_media_are_read_as_training_reads_them(forms, form, evaluated, image_file, video_file, natural_frames):
    """A JPEG and a 4:2:0 video, both over the bounds, to the bit."""
    jpeg, mp4 = image_file(natural_frames(1, 500, 740)[0], "JPEG"), video_file(natural_frames(6, 300, 420), rate=2)
    sample = conversation_sample(answer("<image> <video> What?", "red"), ("image", jpeg), ("video", mp4))
    seen, blind = evaluated(forms[form], sample)
    assert_asked_as_trained(seen, trained_on(forms[form], sample))
    for name in ("input_ids", "image_grid_thw", "video_grid_thw"):
        assert torch.equal(seen[name], blind[name])
    if form != "pixels":
        transform = DCTImageProcessor.from_pretrained(forms[form]).tokenizer
        for tokens, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            assert set(transform.decode(blind[tokens], blind[grid][0].tolist()).ravel().tolist()) == {128}


def test_long_videos_have_the_grid_of_training(prepared, evaluated, video_file, natural_frames, tmp_path_factory):
    """Between the budget of a frame and min_pixels there is no size, so the frames are smaller than both."""
    model = Path(shutil.copytree(prepared.model, tmp_path_factory.mktemp("bounds") / "model"))
    edit_json(model / PROCESSOR, min_pixels=168 * 168, max_pixels=448 * 448)
    data = video_file(np.tile(natural_frames(8, 180, 320), (24, 1, 1, 1)), rate=2)
    sample = conversation_sample(answer("<video> What?", "red"), ("video", data))
    sampling = VideoSampling(total_pixels=192 // 2 * 168 * 168)
    seen, blind = evaluated(model, sample, "--video-total-pixels", str(sampling.total_pixels))
    assert seen["video_grid_thw"].tolist() == [[96, 112 // 28, 224 // 28]]
    assert_asked_as_trained(seen, trained_on(model, sample, sampling))
    assert torch.equal(blind["video_grid_thw"], seen["video_grid_thw"])


def test_videos_are_sampled_as_the_model_was_trained(prepared, evaluated, video_file, natural_frames, tmp_path, capsys):
    """Its files say it, of either form; a flag wins over them."""
    model, sampling = Path(shutil.copytree(prepared.model, tmp_path / "model")), VideoSampling(1.0, 2, 6, 6 * 112 * 112)
    write_sampling(model, vars(sampling))
    to_stock(model, tmp_path / "stock")
    sample = conversation_sample(
        answer("<video> What?", "red"), ("video", video_file(natural_frames(24, 168, 168), rate=2))
    )
    for folder, side in ((model, 28), (tmp_path / "stock", 28)):
        seen, _ = evaluated(folder, sample)
        assert seen["video_grid_thw"].tolist() == [[3, 112 // side, 112 // side]]
        assert_asked_as_trained(seen, trained_on(folder, sample, sampling))
        more, _ = evaluated(folder, sample, "--video-max-frames", "8")
        assert more["video_grid_thw"][0, 0] == 4
    plain, _ = evaluated(prepared.model, sample)
    assert plain["video_grid_thw"].tolist() == [[12, 6, 6]]
    edit_json(model / VIDEO_PROCESSOR, fps="two")
    assert evaluate_qwen2vl.main([*folders(prepared, tmp_path / "out")[2:], "--model-dir", str(model)]) == 1
    assert "has fps 'two', which is no number over 0" in capsys.readouterr().err


def test_an_image_keeps_max_pixels_whatever_the_budget_of_videos(prepared, evaluated, image_file, natural_frames):
    data = image_file(natural_frames(1, 224, 224)[0], "PNG")
    sample = conversation_sample(answer("What?", "red"), ("image", data))
    seen, _ = evaluated(prepared.model, sample, "--video-total-pixels", str(2 * 56 * 56))
    assert seen["image_grid_thw"].tolist() == [[1, 8, 8]]


@pytest.mark.parametrize("form", ["pixels", "exact"])
def test_images_are_asked_as_the_stock_processor_asks_them(forms, form, image_file, natural_frames):
    """Ids, masks, grids and pixel values of a batch, to the bit; over the bounds, within and under them."""
    answerer = Answerer(forms[form], max_new_tokens=1)
    stock = AutoProcessor.from_pretrained(forms[form], trust_remote_code=True, use_fast=False)
    stock.tokenizer.padding_side = "left"
    images = [Image.fromarray(natural_frames(1, *size)[0]) for size in ((500, 740), (112, 224), (40, 50), (90, 1000))]
    files = [image_file(image, "PNG") for image in images]
    first, second, *others = [("image", answerer.media.read("image", data)) for data in files]
    questions = [
        Question("a", 0, "all", ("", "image", "What colour is the circle?"), "red", (first,), "Answer in French."),
        Question("b", 0, "all", ("", "image", " and ", "image", "", "image", "?"), "red", (second, *others)),
        Question("c", 0, "all", ("How many squares are there?",), "red", ()),
    ]
    texts = [answerer._prompt(question) for question in questions]
    expected = stock(text=texts, images=images, padding=True, return_tensors="pt")
    found = answerer.model_inputs(questions)
    assert found.keys() == expected.keys()
    assert {name for name, value in found.items() if torch.equal(value, expected[name])} == set(found)
    assert found["attention_mask"].sum(dim=1).unique().numel() == 3, "the batch is padded"


def test_images_of_a_batch_are_looked_at_one_by_one(prepared, image_file, natural_frames, monkeypatch):
    """Stock transformers has one attention for all of them, whose mask grows with the square of the batch."""
    answerer = Answerer(prepared.model, max_new_tokens=2)
    sizes = ((112, 112), (56, 112), (112, 168), (56, 56))
    files = [image_file(natural_frames(1, *size)[0], "PNG") for size in sizes]
    frames = [answerer.media.read("image", data) for data in files]
    asked = [Question("a", 0, "all", ("", "image", "?"), "red", (("image", each),)) for each in frames]
    inputs = answerer.model_inputs(asked)
    attend, seen, tower = functional.scaled_dot_product_attention, [], answerer.model.visual

    def watched(query, *others, **more):
        seen.append((tuple(query.shape), [mask for mask in (*others[2:], *more.values()) if torch.is_tensor(mask)]))
        return attend(query, *others, **more)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", watched)
        found = tower(inputs["pixel_values"], inputs["image_grid_thw"])
        stock = type(tower)._from_config(tower.config)
        stock.load_state_dict(tower.state_dict())
        of_batch, seen = seen, []
        expected = stock(inputs["pixel_values"], inputs["image_grid_thw"])
    tokens = inputs["image_grid_thw"].prod(dim=1).tolist()
    blocks = len(tower.blocks)
    assert [shape[-2] for shape, _ in of_batch] == tokens * blocks and not any(masks for _, masks in of_batch)
    assert [shape[-2] for shape, _ in seen] == [sum(tokens)] * blocks and all(masks for _, masks in seen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_text_that_spells_a_pad_is_refused(prepared):
    answerer = Answerer(prepared.model, max_new_tokens=1)
    asked = Question("a", 0, "all", ("What is <|image_pad|>?",), "red", ())
    with pytest.raises(ValueError, match=r"a prompt has places for \['image'\], its question has \[\]: does its text"):
        answerer.model_inputs([asked])


def test_code_beside_a_checkpoint_is_not_run_and_the_template_may_be_the_tokenizers(prepared, questions, tmp_path):
    """As in training; checkpoints of before transformers 4.45 have no chat_template.json."""
    model = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    (model / "image_processing_dct.py").write_text("raise SystemExit('code of a checkpoint was run')")
    template = json.loads((model / "chat_template.json").read_text())["chat_template"]
    (model / "chat_template.json").unlink()
    edit_json(model / "tokenizer_config.json", chat_template=template)
    found, expected = (Answerer(folder, 4).answer(questions[:4]) for folder in (model, prepared.model))
    assert found == expected


def test_bounds_in_place_of_the_checkpoints(prepared, image_file, natural_frames):
    answerer = Answerer(prepared.model, 4, max_pixels=112 * 112)
    frames = answerer.media.read("image", image_file(natural_frames(1, 224, 224)[0], "PNG"))
    assert frames.shape == (112, 112, 3)
    assert load_image_processor(prepared.pixel_model, None, min_pixels=100, max_pixels=200).max_pixels == 200


def test_a_token_format_that_contradicts_itself_is_refused(prepared, tmp_path):
    model = Path(shutil.copytree(prepared.model, tmp_path / "model"))
    dct = json.loads((model / PROCESSOR).read_text())["dct"]
    edit_json(model / PROCESSOR, dct={**dct, "chroma": "422"})
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json cannot be used \(DCTConfig.chroma must be"):
        load_processor(model)


@pytest.mark.parametrize("system", [None, "Answer in French."])
def test_a_question_is_asked_as_training_asks_it(prepared, system):
    answerer = Answerer(prepared.model, max_new_tokens=4)
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
    turns = turns if system is None else [{"from": "system", "value": system}, *turns]
    encoder = QwenTaskEncoder(answerer.processor.tokenizer, answerer.processor.image_processor)
    learned = encoder.encode(conversation_sample({"conversations": turns}))
    prompt = answerer._prompt(Question("key", 0, "all", ("What is it?",), "red", (), system))
    ids = answerer.processor.tokenizer(prompt)["input_ids"]
    assert learned.input_ids[: len(ids)].tolist() == ids
    assert learned.labels[len(ids) - 1] == IGNORE_INDEX and learned.labels[len(ids)] == learned.input_ids[len(ids)]


BOX = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(110,220),(330,440)<|box_end|>"


def test_grounding_is_asked_as_training_asks_it_and_answered(prepared, tmp_path, monkeypatch, image_file):
    """Its tokens are ids, in the question as in training, and they stay in an answer."""
    data = image_file(Image.new("RGB", (112, 112), "red"), "PNG")
    sample = conversation_sample(answer(f"<image>\nWhat is at {BOX}?", BOX), ("image", data))
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: [sample])
    tokenizer = load_processor(prepared.model).tokenizer
    given = []

    def generate(model, **inputs):
        given.append(inputs["input_ids"])
        ids = tokenizer(f"{BOX}<|im_end|><|endoftext|>", return_tensors="pt")["input_ids"]
        return torch.cat([inputs["input_ids"], ids], dim=1)

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "generate", generate)
    assert evaluate_qwen2vl.main(folders(prepared, tmp_path)) == 0
    learned = trained_on(prepared.model, sample)
    assert given[0][0].tolist() == learned.input_ids[: given[0].shape[1]].tolist()
    assert tokenizer.convert_tokens_to_ids("<|box_start|>") in given[0][0].tolist()
    prediction = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert (prediction["prediction"], prediction["correct"]) == (BOX, True)


def test_ids_without_a_token_are_marked_in_an_answer(prepared):
    """The model's vocabulary is padded: an untrained model gives ids that the tokenizer does not know."""
    from transformers import Qwen2Tokenizer

    fast = load_processor(prepared.model).tokenizer
    for tokenizer in (fast, Qwen2Tokenizer.from_pretrained(prepared.model)):
        red, unknown = tokenizer("red")["input_ids"], len(tokenizer)
        assert TextTokens(tokenizer).decode([unknown, *red, unknown + 1, *red, tokenizer.eos_token_id]) == "�red�red"
    assert TextTokens(fast).decode([]) == ""


def test_texts_that_spell_special_tokens_and_lost_images_are_left_out_and_counted(prepared, monkeypatch, capsys):
    texts = {"a": "What is <|image_pad|>?", "b": "What is it?", "c": "What?"}
    samples = [
        conversation_sample(
            {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]}, key=key
        )
        for key, text in texts.items()
    ]
    samples.append(conversation_sample({"conversations": []}, key="d"))
    samples.append(conversation_sample(answer("<image>What?", "x"), key="e"))
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: samples)
    reading = Reading()
    asked = read_questions(prepared.shards, "test", None, at_own_size, ["<|image_pad|>"], reading)
    assert [question.key for question in asked] == ["b", "c"]
    left_out = "3 (no_conversation 1, placeholder_mismatch 1, special_token 1)"
    assert str(reading) == f"read 5 entries = asked 2 + left out {left_out}"
    assert "a left out: its text spells out <|image_pad|>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "types"),
    [
        ("colour", ["colour", "colour"]),
        (["colour"], ["colour", "all"]),
        (["colour", "count", "more"], ["colour", "count"]),
        ([1, None], ["1", "all"]),
        (True, ["True", "True"]),
        ({"colour": 1}, ["all", "all"]),
        ([["colour"], {}], ["all", "all"]),
        (["overall", " "], ["overall (type)", "all"]),
        (["two\nlines", "\ud800x"], ["two lines", "?x"]),
        (None, ["all", "all"]),
    ],
)
def test_types_of_questions_of_any_form(prepared, tmp_path, monkeypatch, given, types):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    sample = conversation_sample({"conversations": turns * 2, "question_type": given})
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: [sample])
    asked = list(read_questions(prepared.shards, "test", None, at_own_size))
    assert [question.question_type for question in asked] == types
    answers = describe_answers(asked, ["x", "y"], ["x", "x"])
    shares = accuracies(answers, "prediction")
    assert (shares["overall"], set(shares)) == (0.5, {"overall", *types})


def test_a_bare_list_of_turns_is_asked(prepared, monkeypatch):
    turns = [{"from": "system", "value": "Be brief."}, *answer("What?", "red")["conversations"]]
    samples = [conversation_sample(turns), conversation_sample(json.dumps(turns).encode())]
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: samples)
    asked = list(read_questions(prepared.shards, "test", None, at_own_size))
    assert [(q.text, q.answer, q.system, q.question_type) for q in asked] == [("What?", "red", "Be brief.", "all")] * 2


def spell(*texts: str) -> list:
    """A sample for each question."""
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "x"}] for text in texts]
    return [conversation_sample({"conversations": each}, key=str(number)) for number, each in enumerate(turns)]


def test_what_is_read_is_asked_or_left_out_for_a_reason(prepared, tmp_path, monkeypatch, capsys):
    samples = spell("What?", "What is <|im_end|>?", "And?", "<|im_start|>", "Never read.")
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: samples)
    arguments = folders(prepared, tmp_path)
    assert evaluate_qwen2vl.main([*arguments, "--limit", "2"]) == 0
    assert "\nread 3 entries = asked 2 + left out 1 (special_token 1)\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert (results["entries_read"], results["entries_asked"], results["questions"]) == (3, 2, 2)
    assert results["entries_left_out"] == {"special_token": 1}
    del samples[0], samples[1:]
    assert evaluate_qwen2vl.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no questions to ask (read 1 entries = asked 0 + left out 1 (special_token 1))" in error


@pytest.mark.parametrize("flag", ["--batch-size", "--limit", "--max-new-tokens", "--processes"])
def test_numbers_below_one_are_refused(prepared, tmp_path, one_line_error, flag):
    arguments = folders(prepared, tmp_path)
    assert evaluate_qwen2vl.main([*arguments, flag, "0"]) == 1
    assert f"{flag} must be at least 1, got 0" in one_line_error()


def test_processes_that_cannot_be_are_refused(prepared, tmp_path, monkeypatch, one_line_error):
    arguments = folders(prepared, tmp_path)
    assert evaluate_qwen2vl.main([*arguments, "--processes", "1000"]) == 1
    assert re.search(r"--processes 1000: each takes a processor, and there are \d+$", one_line_error())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert evaluate_qwen2vl.main([*arguments, "--processes", "3"]) == 1
    assert "--processes 3: each takes a GPU, and there are 2" in one_line_error()
    forms = ["--compare", str(prepared.model), str(prepared.model), *arguments[2:]]
    assert evaluate_qwen2vl.main([*forms, "--processes", "2"]) == 1
    assert "--processes does not go with --compare" in one_line_error()
    (tmp_path / "file").touch()
    assert evaluate_qwen2vl.main([*arguments[:-1], str(tmp_path / "file")]) == 1
    assert re.search(r"--output-dir \S+/file cannot be made \(File exists\): name another$", one_line_error())


@pytest.mark.parametrize(
    ("trained", "typed", "asked"), [(36.0, [], 36.0), (36.0, ["0"], None), (None, ["15"], 15.0), (36.0, ["20"], 20.0)]
)
def test_a_model_is_asked_with_another_skipping_than_it_was_trained(
    prepared, tmp_path, monkeypatch, capsys, trained, typed, asked
):
    """What was read says so, and answers of the other way are not gone on from."""
    model = shutil.copytree(prepared.model, tmp_path / "model")
    processor = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(processor | ({"skip_db": trained} if trained else {})))
    used = []

    class Seen(Answerer):
        def answer(self, chosen: list[Question]) -> list[str]:
            used.append(self.media.skip_db)
            return super().answer(chosen)

    monkeypatch.setattr("dct_qwen2vl.evaluation.answerers.Answerer", Seen)
    words = ["--model-dir", str(model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path / "out")]
    flag = ["--skip-db", *typed] if typed else []
    assert evaluate_qwen2vl.main([*words, "--limit", "2", "--max-new-tokens", "2", *flag]) == 0
    assert set(used) == {asked}
    written = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert written["skip_db"] == asked
    whose = "as --skip-db says" if typed else "as the model's files say"
    said = f"Cells that a kept one shows to {asked:g} dB are left out, {whose}\n" if asked else ""
    out = capsys.readouterr().out
    assert said in out and ("are left out" in out) == bool(asked)
    assert ("is a PSNR in dB" in out) == (typed in (["15"], ["20"]))
    arguments = evaluate_qwen2vl.parse_arguments([*words, *flag])
    assert evaluate_qwen2vl.describe_settings(arguments)["options"].get("--skip-db") == (
        float(*typed) if typed else None
    )


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--skip-db", "-1", "--model-dir", "MODEL"], "--skip-db must be a finite number of dB, at least 0, got -1"),
        (["--skip-db", "38", "--compare", "MODEL", "MODEL"], "--skip-db does not go with --compare"),
        (["--skip-db", "38", "--model-dir", "PIXELS"], "--skip-db needs DCT tokens"),
    ],
)
def test_skipping_that_cannot_be_is_one_line(prepared, tmp_path, one_line_error, typed, says):
    folders = {"MODEL": str(prepared.model), "PIXELS": str(prepared.pixel_model)}
    words = [folders.get(word, word) for word in typed]
    given = [*words, "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path / "out")]
    assert evaluate_qwen2vl.main(given) == 1
    assert says in one_line_error()


@pytest.fixture(scope="module")
def run_that_skipped(prepared, tmp_path_factory) -> Path:
    """A run's folder with the two forms of a model that was trained with skipping."""
    folder = tmp_path_factory.mktemp("run") / "E"
    shutil.copytree(prepared.model, folder / "hf_dct")
    edit_json(folder / "hf_dct" / PROCESSOR, skip_db=38.0, skip_share=1.0)
    to_stock(folder / "hf_dct", folder / "hf")
    return folder


def test_who_asks_the_stock_form_of_a_model_that_skipped_is_told_once(prepared, run_that_skipped, tmp_path):
    words = ["--data-dir", str(prepared.shards), "--output-dir", str(tmp_path), "--limit", "2", "--max-new-tokens", "2"]
    told = run([sys.executable, "evaluate_qwen2vl.py", "--model-dir", str(run_that_skipped / "hf"), *words])
    (line,) = (line for line in (told.stdout + told.stderr).splitlines() if "Note" in line or "cells" in line)
    hf = run_that_skipped / "hf"
    assert line == (
        f"Note: {hf} was trained with cells left out at 38 dB (share 1), but it is a stock form, "
        "which reads all cells. This can cost accuracy. To leave them out: python evaluate_qwen2vl.py --model-dir "
        f"{hf}_dct --data-dir SHARDS --output-dir SKIPPED; for both readings, train with SKIP_SHARE=0.8"
    )
    assert "Predictions are in" in told.stdout


@pytest.mark.parametrize(
    "asked",
    ["hf_dct", "hf with all cells", "old hf", "hf of a model that reads all cells", "hf of a model for both readings"],
)
def test_nothing_is_said_where_a_model_is_asked_as_it_was_trained(prepared, run_that_skipped, tmp_path, capsys, asked):
    """Or where all cells are asked for, or a stock form is too old to say it."""
    folder, flags = run_that_skipped / asked.split()[0], ["--skip-db", "0"] if asked == "hf with all cells" else []
    if "hf of" in asked:
        folder = tmp_path / "hf"
        source = Path(shutil.copytree(prepared.model, tmp_path / "source"))
        if "both" in asked:
            edit_json(source / PROCESSOR, skip_db=38.0, skip_share=0.8)
        to_stock(source, folder)
    if asked == "old hf":
        folder = Path(shutil.copytree(run_that_skipped / "hf", tmp_path / "hf"))
        saved = json.loads((folder / "dct_format.json").read_text())
        old = {name: saved[name] for name in ("patch_embedding_dtype", "dct")}
        (folder / "dct_format.json").write_text(json.dumps(old))
    words = ["--model-dir", str(folder), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path / "out")]
    assert evaluate_qwen2vl.main([*words, "--limit", "2", "--max-new-tokens", "2", *flags]) == 0
    said = capsys.readouterr()
    assert "Predictions are in" in said.out and "cells" not in said.out + said.err


def test_the_note_names_what_is_known_and_the_way_back(run_that_skipped, tmp_path):
    """A stock form that was copied elsewhere has no hf_dct beside it."""
    folder = Path(shutil.copytree(run_that_skipped / "hf", tmp_path / "hf"))
    way = f"python convert_checkpoint.py --to dct --model-dir {folder} --output-dir {folder}-dct, and ask that"
    assert f"To leave them out: {way}; for both readings" in note_on_all_cells(folder)
    edit_json(folder / "dct_format.json", skip_db=36.5, skip_share=0.9, skip_noise_floor=True)
    assert "at 36.5 dB (share 0.9, noise floor), but" in note_on_all_cells(folder)
    edit_json(folder / "dct_format.json", skip_share=None, skip_noise_floor=None)
    assert "at 36.5 dB, but" in note_on_all_cells(folder)


def test_who_asks_a_stock_form_that_was_saved_again_is_told_what_it_lost(prepared, run_that_skipped, tmp_path, capsys):
    folder = Path(shutil.copytree(run_that_skipped / "hf", tmp_path / "hf"))
    words = ["--model-dir", str(folder), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path / "out")]
    for name, lines in ((VIDEO_PROCESSOR, 1), ("dct_format.json", 1)):  # the first: that it skipped is still known
        (folder / name).unlink()
        evaluate_qwen2vl.check(evaluate_qwen2vl.parse_arguments(words))
        said = capsys.readouterr().out
        assert said.count("Note: ") == lines
    assert f"Note: {folder} has patches of 28 px, as the stock form of a DCT model, but no dct_format.json and" in said
    assert "not known whether cells were left out in training, and videos are sampled with the defaults" in said


def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_asked(prepared, tmp_path, one_line_error):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    assert evaluate_qwen2vl.main(folders(prepared, output)) == 1
    assert str(output) in one_line_error()


def test_command_writes_predictions_and_accuracy(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_qwen2vl, "ASKED_AT_ONCE", 4)  # in two rounds
    arguments = folders(prepared, tmp_path)
    assert evaluate_qwen2vl.main([*arguments, "--limit", "6", "--batch-size", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.json", "predictions.jsonl"]
    assert len(lines) == results["questions"] == 6 and results["entries_left_out"] == {}
    assert results["accuracy"]["overall"] == sum(line["correct"] for line in lines) / 6
    assert set(results["blind_accuracy"]) == set(results["accuracy"]) == set(results["questions_by_type"])
    assert results["questions_by_type"] == {**Counter(line["question_type"] for line in lines), "overall": 6}
    printed = capsys.readouterr()
    assert "question type" in printed.out and "shard_range" not in printed.out
    states = [state for state in re.split(r"[\r\n]+", printed.err) if state.startswith("Answering: ")]
    assert sum("   0%|" in state for state in states) == 1  # one bar for both rounds, seeing and blind
    assert "100%|" in states[-1] and " 12/12 [" in states[-1]


# Going on


PART = "predictions.jsonl.part"
OPTIONS = ["--limit", "18", "--batch-size", "2", "--max-new-tokens", "4"]
KILLED = """
import os, signal, sys
import evaluate_qwen2vl
from dct_qwen2vl.evaluation.answering import Answerer
evaluate_qwen2vl.ASKED_AT_ONCE, calls, answer = 4, [], Answerer.answer
def answer_or_die(self, questions):
    calls.append(questions)
    if len(calls) > 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, questions)
Answerer.answer = answer_or_die
evaluate_qwen2vl.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def interrupted(prepared, tmp_path_factory) -> bytes:
    """predictions.jsonl.part of a run that was killed in the third round of four questions."""
    output = tmp_path_factory.mktemp("interrupted")
    done = run([sys.executable, "-c", KILLED, *folders(prepared, output), *OPTIONS], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in output.iterdir()] == [PART]
    return (output / PART).read_bytes()


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> dict[str, bytes]:
    """What a run that is not interrupted writes."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_qwen2vl, "ASKED_AT_ONCE", 4)
        assert evaluate_qwen2vl.main([*folders(prepared, output), *OPTIONS]) == 0
    return files_of(output)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def go_on(prepared, tmp_path, monkeypatch):
    """go_on(bytes of predictions.jsonl.part, *options): the files that the command ends with, and how many questions it
    asked."""
    asked, answer = [], Answerer.answer
    monkeypatch.setattr(evaluate_qwen2vl, "ASKED_AT_ONCE", 4)
    monkeypatch.setattr(Answerer, "answer", lambda self, batch: asked.extend(batch) or answer(self, batch))

    def command(part: bytes, *options: str) -> tuple[dict[str, bytes], int]:
        (tmp_path / PART).write_bytes(part)
        assert evaluate_qwen2vl.main([*folders(prepared, tmp_path), *OPTIONS, *options]) == 0
        return files_of(tmp_path), len(asked) // 2  # seeing and blind

    return command


@pytest.mark.parametrize(
    ("left", "answered"),
    [
        (lambda part: part, 8),
        (lambda part: part + b'{"key": "pretrain-0', 8),  # half a line
        (lambda part: part + b'{"key": "a"}\n{"key": "b"}\n', 8),  # half a round
        (lambda part: part[:-10], 4),  # half of the last round's end
        (lambda part: part + bytes(500), 8),  # as a machine that went down leaves it
        (lambda part: b"".join(part.splitlines(keepends=True)[:3]), 0),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(go_on, interrupted, whole, capsys, left, answered):
    assert go_on(left(interrupted)) == (whole, 18 - answered)
    said = capsys.readouterr()
    assert (f"Continuing after the {answered} questions answered in" in said.out) is (answered > 0)
    assert "starting again" not in said.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--batch-size", "3"], "--batch-size was 2, now is 3"),
        (["--limit", "17"], "--limit was 18, now is 17"),
    ],
)
def test_answers_of_other_settings_are_not_used(go_on, interrupted, capsys, change, said):
    _, asked = go_on(interrupted, *change)
    assert asked >= 17
    assert f"is not used ({said}): starting again" in capsys.readouterr().err


def test_answers_of_another_model_or_other_data_or_without_settings_are_not_used(
    prepared, go_on, interrupted, whole, capsys
):
    (shard, *_) = prepared.shards.glob("*.tar")
    for path, name in ((prepared.model / "config.json", "--model-dir"), (shard, "--data-dir")):
        state = path.stat()
        os.utime(path, (1, 1))
        assert go_on(interrupted)[0] == whole
        assert f"is not used (other files in {name}): starting again" in capsys.readouterr().err
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert go_on(interrupted.split(b"\n", 1)[1])[0] == whole
    assert "is not used (does not say what its answers depend on): starting again" in capsys.readouterr().err


def test_answers_of_media_that_were_read_otherwise_are_not_used(go_on, interrupted, whole, capsys):
    """Version 1 had videos as RGB and resized long ones twice."""
    now = f'"version": {evaluate_qwen2vl.ANSWERS_VERSION}'.encode()
    assert interrupted.count(now) == 1
    assert go_on(interrupted.replace(now, b'"version": 1')) == (whole, 18)
    refused = f"is not used (version was 1, now is {evaluate_qwen2vl.ANSWERS_VERSION}): starting again"
    assert refused in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_same_command_goes_on(prepared, tmp_path, whole, go_on, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        assert evaluate_qwen2vl.main([*folders(prepared, tmp_path), *OPTIONS]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = r"jsonl\.part cannot be written \(File too large\): make room, then the same command continues$"
    assert re.search(said, capsys.readouterr().err.rstrip())
    assert go_on((tmp_path / PART).read_bytes())[0] == whole


def test_the_bar_expects_what_the_entries_so_far_have():
    half = Reading(entries=40, questions=60, left_out=Counter(broken_image=10))
    assert evaluate_qwen2vl.expected_answers(half, 100) == 240
    assert evaluate_qwen2vl.expected_answers(half, 30) == 120, "of a set that is smaller than it says"
    assert evaluate_qwen2vl.expected_answers(Reading(), 100) == 0


# Side by side


KILLED_SIDE_BY_SIDE = """
import multiprocessing, os, signal, sys
import evaluate_qwen2vl
from dct_qwen2vl.evaluation.answer_file import AnswerFile
add_round, evaluate_qwen2vl.ASKED_AT_ONCE = AnswerFile.add_round, 4
def add_or_die(self, *values):
    if len(self.answers) == 8:
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    add_round(self, *values)
AnswerFile.add_round = add_or_die
evaluate_qwen2vl.main(sys.argv[1:])
"""


def test_processes_side_by_side_write_the_same_and_end_with_a_killed_one(prepared, whole, go_on, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_SIDE_BY_SIDE, *folders(prepared, output), *OPTIONS, "--processes", "2"]
    done = run(command, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers of a killed run go on"
        time.sleep(0.1)
    part = (output / PART).read_bytes()
    shutil.rmtree(output)
    assert go_on(part, "--processes", "2") == (whole, 0), "none is asked in this process"


def test_a_gpu_that_is_full_is_told(prepared, monkeypatch):
    def full(*device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(UserError, match=r"^the memory of GPU 3 is full before the model is there: end what else uses"):
        Answerer(prepared.model, max_new_tokens=1)


def test_what_a_process_cannot_answer_is_one_error(prepared):
    asked = Question("a", 0, "all", ("What is <|image_pad|>?",), "red", ())
    with (
        Answerers(2, prepared.model, max_new_tokens=1) as answerers,
        pytest.raises(UserError, match=r"a prompt has places for \['image'\], its question has \[\]"),
    ):
        answerers.answer_all([asked] * 3, batch_size=1)


def test_a_run_killed_before_its_last_step_asks_nothing_again(prepared, go_on, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_qwen2vl, "summarise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_qwen2vl.main([*folders(prepared, tmp_path), *OPTIONS])
    assert go_on((tmp_path / PART).read_bytes()) == (whole, 18)  # asked before, all of them


def test_answers_of_other_settings_stay_until_there_are_new_ones(prepared, interrupted, tmp_path, monkeypatch, capsys):
    (tmp_path / PART).write_bytes(interrupted)
    monkeypatch.setattr(evaluate_qwen2vl, "ask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    command = [*folders(prepared, tmp_path), *OPTIONS]
    assert evaluate_qwen2vl.main([*command, "--batch-size", "3"]) == 130
    assert "starting again" in capsys.readouterr().err and (tmp_path / PART).read_bytes() == interrupted


@pytest.mark.parametrize("header", [b'{"settings": {"options": null}}', b'{"settings": 1}', b"{}", b"[]", b"\xff"])
def test_a_damaged_file_of_answers_is_not_used(header, tmp_path):
    (tmp_path / PART).write_bytes(header + b"\n" + b'{"key": "a"}\n{"read": 5}\n')
    with AnswerFile(tmp_path / PART, {"options": {"--limit": 1}}) as file:
        assert file.refused and (file.answers, file.read) == ([], None)
        file.add_round(ANSWERED, READ)
    with AnswerFile(tmp_path / PART, {"options": {"--limit": 1}}) as file:
        assert (file.refused, file.answers, file.read) == ("", ANSWERED, READ)


ANSWERED = describe_answers([question("colour", "red")], ["red"], ["blue"])
READ = Reading(entries=1, questions=1).as_dict()


@pytest.mark.parametrize(
    "change",
    [
        lambda answer, read: answer.pop("blind_prediction"),
        lambda answer, read: answer.update(question_type=["colour"]),
        lambda answer, read: answer.update(prediction=None),
        lambda answer, read: read.pop("turns"),
        lambda answer, read: read.update(more=1),
        lambda answer, read: read.update(questions=1),
        lambda answer, read: read.update(entries=-1),
        lambda answer, read: read.update(entries=True),
        lambda answer, read: read.update(left_out={"too_long": "many"}),
        lambda answer, read: read.update(left_out=[]),
    ],
)
def test_answers_from_a_damaged_round_on_are_asked_again(tmp_path, change):
    answer, read = {**ANSWERED[0]}, {**READ, "questions": 2, "entries": 2}
    change(answer, read)
    with AnswerFile(tmp_path / PART, {}) as file:
        file.add_round(ANSWERED, READ)
        file.add_round([answer], read)
    with AnswerFile(tmp_path / PART, {}) as file:
        assert (file.answers, file.read) == (ANSWERED, READ)


def test_names_with_half_a_surrogate_pair_are_written_as_json():
    assert json.loads(as_lines([{"key": "a\udc80ä"}])) == {"key": "a\udc80ä"}


def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(prepared, interrupted, tmp_path, one_line_error):
    model = shutil.copytree(prepared.model, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "merges.txt").unlink(missing_ok=True)
    (tmp_path / PART).write_bytes(interrupted)
    command = ["--model-dir", str(model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert evaluate_qwen2vl.main(command) == 1
    assert one_line_error().startswith(f"evaluate_qwen2vl.py: {model} has no tokenizer (no tokenizer.json)")
    assert (tmp_path / PART).read_bytes() == interrupted


def test_a_second_run_into_the_same_folder_is_refused(prepared, tmp_path, one_line_error):
    with AnswerFile(tmp_path / PART, {}):
        assert evaluate_qwen2vl.main(folders(prepared, tmp_path)) == 1
    assert f"{PART} is being written by another evaluation: wait for it or end it" in one_line_error()


def test_reading_goes_on_within_and_between_entries(prepared, monkeypatch):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    samples = [conversation_sample({"conversations": turns * count}, key=str(count)) for count in (0, 3, 1, 2, 0)]
    samples.insert(2, conversation_sample({"conversations": turns[:1]}, key="4"))
    monkeypatch.setattr("dct_qwen2vl.data.samples.read_samples", lambda *_: iter(samples))

    def read(reading: Reading, most: int | None = None) -> list[tuple[str, int]]:
        questions = read_questions(prepared.shards, "test", None, at_own_size, reading=reading)
        return [(question.key, question.turn) for question in islice(questions, most)]

    whole = Reading()
    expected = read(whole)
    assert len(expected) == 6 and str(whole).startswith("read 6 entries = asked 3 + left out 3 (")
    for count in range(7):
        reading = Reading()
        first = read(reading, count)
        reading = Reading.of(json.loads(json.dumps(reading.as_dict())))
        assert [*first, *read(reading)] == expected
        assert reading == whole


@pytest.mark.parametrize("missing", ["--model-dir", "--data-dir"])
def test_missing_folders_are_one_line(prepared, tmp_path, capsys, missing):
    values = {"--model-dir": prepared.model, "--data-dir": prepared.shards, "--output-dir": tmp_path / "out"}
    values[missing] = tmp_path
    assert evaluate_qwen2vl.main([str(part) for pair in values.items() for part in pair]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
