"""Questions and answers of the sample data, and the entries of its metadata that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.toy.drawing import COLOURLESS
from dct_qwen2vl.toy.sample_plan import Item, shuffle

if TYPE_CHECKING:
    import numpy as np

QUESTIONS = {
    "colour": ("What colour do you see?", "Which colour is it?", "Name the colour.", "What is the main colour?"),
    "shape": ("What shape do you see?", "Which shape is it?", "Name the shape.", "What kind of shape is drawn?"),
    "count": ("How many shapes are there?", "Count the shapes.", "How many do you see?"),
    "digits": ("What digit is printed?", "Which digit do you see?", "Read the digit."),
    "motion": ("Which way does it move?", "In which direction does it move?", "Where is it going?"),
}
# The answers stay English, so that they stay balanced.
NON_ASCII_QUESTIONS = {
    "colour": ("这是什么颜色？", "¿De qué color es?", "Какого это цвета?"),
    "shape": ("这是什么形状？", "¿Qué forma tiene?", "Welche Form könnte das sein – „rund“ oder „eckig“?"),
    "count": ("有多少个形状？", "¿Cuántas figuras hay?", "Combien de formes — où qu’elles soient ?"),
    "digits": ("这是哪个数字？", "¿Qué número está impreso?", "Какая это цифра?"),
    "motion": ("它往哪边移动？", "¿Hacia dónde se mueve?", "Où va-t-il ? ➡️⬅️"),
}
PAIR_QUESTIONS = {
    "colour": ("What colour do both pictures show?", "Which colour is in both pictures?"),
    "shape": ("What shape do both pictures show?", "Which shape is in both pictures?"),
}
TEXT_ONLY = (
    ("What is two plus two?", "4"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of up?", "down"),
    ("Which shape has three corners?", "triangle"),
    ("Which shape has no corners?", "circle"),
    ("What colour is a ripe tomato?", "red"),
    ("What colour is grass?", "green"),
    ("How many sides has a square?", "4"),
    ("¿De qué color es un limón maduro?", "yellow"),
    ("晴天的天空是什么颜色？", "blue"),
)
SYSTEM_TURNS = ("Answer with one word.", "You look at pictures and answer briefly.")


def choose_turns(rng: np.random.Generator, item: Item) -> list[tuple[str, str, str]]:
    """(question type, question, answer) of each turn, in random order.

    rng: Random numbers for order and phrasing.
    item: What is drawn.
    """
    answers = item.scene.answers()
    if item.file_kind in COLOURLESS:
        del answers["colour"]
    questions = NON_ASCII_QUESTIONS if item.dialogue_kind == "non_ascii" else QUESTIONS
    if item.dialogue_kind == "two_images":
        questions = PAIR_QUESTIONS
        answers = {question_type: answers[question_type] for question_type in PAIR_QUESTIONS}
    types = shuffle(rng, list(answers))
    if item.dialogue_kind == "one_turn":
        types = types[:1]
    return [(kind, questions[kind][rng.integers(len(questions[kind]))], answers[kind]) for kind in types]


def make_entry(
    rng: np.random.Generator, item: Item, names: list[str], turns: list[tuple[str, str, str]]
) -> dict[str, Any]:
    """One entry of the JSON file.

    rng: Random numbers for phrasing.
    item: What is drawn.
    names: Of its image, images or video.
    turns: (question type, question, answer) each.
    """
    is_video = item.scene.motion is not None
    placeholders = "\n".join(["<video>" if is_video else "<image>"] * len(names))
    conversations = []
    if item.dialogue_kind == "system":
        conversations.append(("system", SYSTEM_TURNS[rng.integers(len(SYSTEM_TURNS))]))
    for number, (_, question, answer) in enumerate(turns):
        if number == 0:
            after = rng.random() < 0.1  # Cambrian has both orders
            question = f"{question}\n{placeholders}" if after else f"{placeholders}\n{question}"
        conversations += [("human", question), ("gpt", answer)]
    return {
        "id": f"{item.number:012d}",
        "video" if is_video else "image": names if len(names) > 1 else names[0],
        "conversations": _format_turns(conversations, item.dialogue_kind == "openai"),
        "source": names[0].split("/", 1)[0],
        "question_type": [question_type for question_type, _, _ in turns],
        "file_kind": item.file_kind,
        "dialogue_kind": item.dialogue_kind,
    }


def text_only_entry(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """An entry without media.

    rng: Random numbers for the choice of the question.
    number: Of the entry, part of its id.
    """
    question, answer = TEXT_ONLY[rng.integers(len(TEXT_ONLY))]
    return {
        "id": f"text-{number:06d}",
        "conversations": _format_turns([("human", question), ("gpt", answer)], openai=False),
        "source": "text",
        "question_type": ["text"],
        "file_kind": "text_only",
        "dialogue_kind": "turns",
    }


def _format_turns(turns: list[tuple[str, str]], openai: bool) -> list[dict[str, str]]:
    if not openai:
        return [{"from": speaker, "value": text} for speaker, text in turns]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [{"role": roles[speaker], "content": text} for speaker, text in turns]


def entry_answers(entry: dict[str, Any]) -> list[str]:
    """The answers of an entry, turn by turn."""
    turns = entry["conversations"]
    return [t.get("value", t.get("content")) for t in turns if t.get("from", t.get("role")) in ("gpt", "assistant")]


def conversation_texts(entries: list[dict[str, Any]]) -> Iterator[str]:
    """What the tokenizer is trained on: every turn with the words that ChatML puts around it."""
    for entry in entries:
        yield "system\nYou are a helpful assistant."
        for turn in entry["conversations"]:
            yield turn.get("value", turn.get("content"))
            yield "user\nassistant\n"
