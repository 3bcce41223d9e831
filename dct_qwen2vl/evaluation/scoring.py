"""Which answers are right, and the tables of accuracies."""

from typing import TYPE_CHECKING, Any

from dct_qwen2vl.evaluation.questions import Question

if TYPE_CHECKING:
    pass


def same_answer(prediction: str, answer: str) -> bool:
    """Equal but for case, white space and a final full stop."""

    def normalised(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".")

    return normalised(prediction) == normalised(answer)


def accuracies(answers: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Share of right answers, 0 to 1, by question type and "overall".

    answers: As in predictions.jsonl.
    name: Field that holds the predictions.
    """
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
    """What predictions.jsonl holds: one object for each question.

    questions: That were asked.
    predictions: The model's answers.
    blind_predictions: Its answers with all images grey.
    """
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
