"""Asks a model by stock transformers, with no code of this repository, and compares its answers with given ones.

    python evaluate_qwen2vl.py --compare RUN/hf_dct RUN/hf --data-dir TEST --split train --limit 32 \
        --max-new-tokens 128 --output-dir COMPARED
    python benchmarks/quality/manuals/stock_answers.py --model-dir RUN/hf --data-dir TEST \
        --answers COMPARED/comparison.jsonl

--answers takes comparison.jsonl, whose answers are float32's, as are those given here; or predictions.jsonl. This file
runs wherever torch, transformers and Pillow are, of any version that loads the model. It reads still images alone, one
for each question. The exit status is 1 if an answer differs.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Question = dict[str, str]  # key, question, expected


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """Of either file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        answer = json.loads(line)
        expected = answer["own"]["predictions"][1] if "own" in answer else answer["prediction"]
        found.append({"key": answer["key"], "question": answer["question"], "expected": expected})
    return found


def read_images(data_dir: Path, keys: set[str]) -> dict[str, Any]:
    """Key -> RGB image, from the shards."""
    from PIL import Image

    found = {}
    for shard in sorted(data_dir.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                name, _, kind = member.name.partition(".")
                key = f"{shard.name}/{name}"  # as Energon names a sample
                if key in keys and kind != "json":
                    found[key] = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
    return found


def answers(model_dir: Path, questions: list[Question], images: dict[str, Any], most: int) -> Iterator[tuple[str, int]]:
    """(answer, visual tokens) of each question, greedy, in float32."""
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2VLForConditionalGeneration.from_pretrained(model_dir, torch_dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    for question in questions:
        text = question["question"].removeprefix("\n")
        place = "\n" if text != question["question"] else ""
        content = [{"type": "image"}, {"type": "text", "text": place + text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[images[question["key"]]], return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=most, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        yield processor.tokenizer.decode(new, skip_special_tokens=True), tokens


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, help="a stock Qwen2-VL: a run's hf folder")
    add("--data-dir", type=Path, required=True, help="prepared shards with the images")
    add("--answers", type=Path, required=True, metavar="FILE", help="comparison.jsonl or predictions.jsonl")
    add("--limit", type=int, help="most questions (default: all)")
    add("--max-new-tokens", type=int, default=128, help="longest answer, tokens (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    questions = read_questions(arguments.answers, arguments.limit)
    images = read_images(arguments.data_dir, {question["key"] for question in questions})
    given = answers(arguments.model_dir, questions, images, arguments.max_new_tokens)
    equal, visual = 0, set()
    for question, (answer, tokens) in zip(questions, given):
        visual.add(tokens)
        equal += answer.strip() == question["expected"].strip()
        if answer.strip() != question["expected"].strip():
            print(f"{question['key']}: {answer!r} here, {question['expected']!r} in {arguments.answers}")
    import transformers

    print(f"transformers {transformers.__version__}: {equal} of {len(questions)} answers are equal; "
          f"visual tokens of an image: {', '.join(map(str, sorted(visual)))}")  # fmt: skip
    return int(equal != len(questions))


if __name__ == "__main__":
    sys.exit(main())
