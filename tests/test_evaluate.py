"""evaluate_qwen2vl.py on real shards with an untrained model, and its counting by hand-made answers."""

import json
from collections import Counter

import numpy as np
import pytest
from samples_by_hand import conversation_sample

import evaluate_qwen2vl
from evaluate_qwen2vl import Answerer, Question, Reading, accuracies, answer_all, blinded, read_questions, same_answer
from media import VideoSampling
from task_encoder import IGNORE_INDEX, QwenTaskEncoder


@pytest.fixture(scope="module")
def questions(prepared) -> list[Question]:
    return list(read_questions(prepared.shards, "test", None, VideoSampling()))


def question(kind: str, answer: str) -> Question:
    return Question("key", 0, kind, ("What?",), answer, ())


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
    assert accuracies(asked, ["red", "red", "3", "4"]) == {"colour": 0.5, "count": 1.0, "overall": 0.75}


def test_blinded_media_are_grey_of_the_same_size():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    seen = Question("key", 1, "colour", ("", "image", "What?"), "red", (("image", picture),))
    blind = blinded(seen)
    assert blind.media[0][1].shape == (2, 3, 3)
    assert set(blind.media[0][1].ravel().tolist()) == {128}
    assert (blind.key, blind.turn, blind.text, blind.answer) == ("key", 1, "What?", "red")


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
    assert evaluate_qwen2vl.place_media(pieces, tuple((kind, None) for kind in kinds)) == placed


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
    answerer = Answerer(prepared.model, max_new_tokens=4)
    chosen = questions[:10]
    together = answer_all(answerer, chosen, batch_size=5, blind=False)
    alone = [answerer.answer([q])[0] for q in chosen]
    assert together == alone


def test_rounds_end_at_a_number_of_questions_or_of_bytes(monkeypatch):
    monkeypatch.setattr(evaluate_qwen2vl, "MEDIA_AT_ONCE", 1000)
    plain = question("colour", "red")
    large = Question("key", 0, "colour", ("", "image", "What?"), "red", (("image", np.zeros((10, 20, 3), np.uint8)),))
    asked = [plain, plain, plain, large, large, plain]
    assert [len(chosen) for chosen in evaluate_qwen2vl.in_rounds(asked, 3)] == [3, 2, 1]


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


def test_texts_that_spell_special_tokens_are_left_out_and_counted(prepared, monkeypatch, capsys):
    texts = {"a": "What is <|image_pad|>?", "b": "What is it?", "c": "What?"}
    samples = [
        conversation_sample(
            {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]}, key=key
        )
        for key, text in texts.items()
    ]
    samples.append(conversation_sample({"conversations": []}, key="d"))
    monkeypatch.setattr("task_encoder.read_samples", lambda *_: samples)
    reading = Reading()
    asked = read_questions(prepared.shards, "test", None, VideoSampling(), None, ["<|image_pad|>"], reading)
    assert [question.key for question in asked] == ["b", "c"]
    assert str(reading) == "read 4 entries = asked 2 + left out 2 (no_conversation 1, special_token 1)"
    assert "a left out: its text spells out <|image_pad|>" in capsys.readouterr().err


def spell(*texts: str) -> list:
    """A sample for each question."""
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "x"}] for text in texts]
    return [conversation_sample({"conversations": each}, key=str(number)) for number, each in enumerate(turns)]


def test_what_is_read_is_asked_or_left_out_for_a_reason(prepared, tmp_path, monkeypatch, capsys):
    samples = spell("What?", "What is <|im_end|>?", "And?", "<|im_start|>", "Never read.")
    monkeypatch.setattr("task_encoder.read_samples", lambda *_: samples)
    arguments = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert evaluate_qwen2vl.main([*arguments, "--limit", "2"]) == 0
    assert "\nread 3 entries = asked 2 + left out 1 (special_token 1)\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert (results["entries_read"], results["entries_asked"], results["questions"]) == (3, 2, 2)
    assert results["entries_left_out"] == {"special_token": 1}
    del samples[0], samples[1:]
    assert evaluate_qwen2vl.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no questions to ask (read 1 entries = asked 0 + left out 1 (special_token 1))" in error


@pytest.mark.parametrize("flag", ["--batch-size", "--limit", "--max-new-tokens"])
def test_numbers_below_one_are_refused(prepared, tmp_path, one_line_error, flag):
    arguments = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert evaluate_qwen2vl.main([*arguments, flag, "0"]) == 1
    assert f"{flag} must be at least 1, got 0" in one_line_error()


def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_asked(prepared, tmp_path, one_line_error):
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "out")
    arguments = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", output]
    assert evaluate_qwen2vl.main(arguments) == 1
    assert output in one_line_error()


def test_command_writes_predictions_and_accuracy(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_qwen2vl, "ASKED_AT_ONCE", 4)  # in two rounds
    arguments = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert evaluate_qwen2vl.main([*arguments, "--limit", "6", "--batch-size", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.json", "predictions.jsonl"]
    assert len(lines) == results["questions"] == 6 and results["entries_left_out"] == {}
    assert results["accuracy"]["overall"] == sum(line["correct"] for line in lines) / 6
    assert set(results["blind_accuracy"]) == set(results["accuracy"]) == set(results["questions_by_type"])
    assert results["questions_by_type"] == {**Counter(line["question_type"] for line in lines), "overall": 6}
    assert "question type" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["--model-dir", "--data-dir"])
def test_missing_folders_are_one_line(prepared, tmp_path, capsys, missing):
    values = {"--model-dir": prepared.model, "--data-dir": prepared.shards, "--output-dir": tmp_path / "out"}
    values[missing] = tmp_path
    assert evaluate_qwen2vl.main([str(part) for pair in values.items() for part in pair]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
