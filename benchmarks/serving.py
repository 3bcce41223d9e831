"""A model of Qwen2-VL-2B's size, served by vLLM: its prompt tokens, and its answers beside transformers'.

    python -m benchmarks.serving folder --output-dir pixels          # configuration and tokenizer, in this environment
    python -m benchmarks.serving weights --model-dir pixels          # from here on wherever the GPU is
    python convert_checkpoint.py --model-dir pixels --output-dir dct --dct x4
    python -m benchmarks.serving train --model-dir dct               # learns the answers to ten questions by heart
    python convert_checkpoint.py --to stock --model-dir dct --output-dir stock
    python -m benchmarks.serving answer --model-dir stock --output stock.json
    vllm serve stock --served-model-name x4 --dtype bfloat16
    python -m benchmarks.serving ask --url http://localhost:8000 --answers stock.json

The weights are random: what is compared is the arithmetic and the counting, not what a trained model knows. Ten drawn
images and videos are learnt by heart, so that the greedy answers are decided by more than rounding.
"""

import argparse
import base64
import io
import json
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUESTION = "What do you see?"
TEXT_TOKENS = 151643  # of Qwen2's vocabulary, before its special tokens
COLOURS = {"red": (200, 30, 30), "green": (40, 235, 70), "blue": (30, 50, 210), "yellow": (230, 210, 20)}
FRAMES = 8
NEW_TOKENS = 16
TIE = 0.25  # lead of a token's logit below which bfloat16's rounding, 0.125 between 16 and 32, decides


@dataclass(frozen=True)
class Sample:
    """One question: JPEG bytes of an image, or of the frames of a video, and the answer to learn."""

    name: str
    kind: str
    files: tuple[bytes, ...]
    answer: str

    @property
    def images(self) -> list[Image.Image]:
        """As any reader of the files sees them, RGB."""
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in self.files]


def draw(shape: str, colour: str, height: int, width: int, left: float = 0.3) -> bytes:
    """A circle or a square on grey as JPEG; its left edge lies at the share `left` of the width."""
    image = Image.new("RGB", (width, height), (120, 120, 120))
    side = min(height, width) // 2
    box = (int(left * width), side // 2, int(left * width) + side, side // 2 + side)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def make_samples() -> list[Sample]:
    """Eight images, two of them of sides that must be resized, and two videos that differ in direction alone."""
    samples = []
    for shape in ("circle", "square"):
        for colour in COLOURS:
            size = (500, 375) if colour == "yellow" else (448, 672)
            samples.append(Sample(f"{colour} {shape}", "image", (draw(shape, colour, *size),), f"a {colour} {shape}."))
    for way, places in (("right", np.linspace(0, 0.6, FRAMES)), ("left", np.linspace(0.6, 0, FRAMES))):
        frames = tuple(draw("circle", "red", 224, 336, place) for place in places)
        samples.append(Sample(f"moving {way}", "video", frames, f"it moves {way}."))
    return samples


def write_folder(folder: Path, tiny: bool) -> None:
    """Configuration, tokenizer and processor of a pixel model of 2B's size, without weights."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    from benchmarks.speed.samples import real_config
    from dct_qwen2vl.toy.model import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

    words = [QUESTION, "You are a helpful assistant.", *(sample.answer for sample in make_samples())]
    tokenizer = train_tokenizer(words * 4)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=1024 * 1024), tokenizer, chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(folder)
    spread_vocabulary(folder, SPECIAL_TOKENS)
    config = real_config()
    config.architectures, config.torch_dtype = ["Qwen2VLForConditionalGeneration"], "bfloat16"
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 151643, 151645, 151643
    if tiny:  # 1/12 of the width, for a try on a CPU
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 2
        config.num_attention_heads, config.num_key_value_heads = 2, 1
        config.vision_config.depth, config.vision_config.embed_dim, config.vision_config.hidden_size = 2, 160, 256
        config.vision_config.num_heads = 2
    config.save_pretrained(folder)
    answers = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(answers), encoding="utf-8")


def spread_vocabulary(folder: Path, special: tuple[str, ...]) -> None:
    """Gives the special tokens the ids that they have in Qwen2-VL, 151643 and on; ids between stand for no text."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = {word: place for word, place in tokenizer["model"]["vocab"].items() if word not in special}
    words.update({f"<no text {place}>": place for place in range(len(words), TEXT_TOKENS)})
    tokenizer["model"]["vocab"] = words
    ids = {token: TEXT_TOKENS + place for place, token in enumerate(special)}
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(ids), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    by_content = {token["content"]: token for token in config["added_tokens_decoder"].values()}
    config["added_tokens_decoder"] = {str(ids[word]): by_content[word] for word in special}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def write_weights(folder: Path, seed: int) -> None:
    """Random weights, bfloat16, for the configuration in the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device()):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    save_weights(model, folder)
    print(f"Wrote {model.num_parameters() / 1e6:.0f} million random weights to {folder}.")


def save_weights(model, folder: Path) -> None:
    """In bfloat16; config.json stays as transformers 4.51.3 wrote it."""
    import torch

    path = folder / "config.json"
    config = path.read_bytes()
    model.to(torch.bfloat16).save_pretrained(folder)
    path.write_bytes(config)


def load(folder: Path, dtype):
    """Model and processor by transformers' own loaders. `trust_remote_code` is for the coefficient form's processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=dtype).to(device())
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=any(folder.glob("*.py")))


def inputs_of(processor, samples: list[Sample], with_answers: bool):
    """What the processor makes of a batch of conversations, on the device."""
    texts = []
    for sample in samples:
        turns = [{"role": "user", "content": [{"type": sample.kind}, {"type": "text", "text": QUESTION}]}]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts.append(text + f"{sample.answer}<|im_end|>\n" if with_answers else text)
    images = [sample.images[0] for sample in samples if sample.kind == "image"]
    videos = [np.stack([np.asarray(frame) for frame in sample.images]) for sample in samples if sample.kind == "video"]
    batch = processor(text=texts, images=images or None, videos=videos or None, padding=True, return_tensors="pt")
    return batch.to(device())


def labels_of(input_ids, start: int, pad: int):
    """The tokens after the last `<|im_start|>assistant\\n`, -100 elsewhere."""
    labels = input_ids.clone()
    for row in labels:
        begin = (row == start).nonzero()[-1].item() + 3
        row[:begin] = -100
    labels[input_ids == pad] = -100
    return labels


def train(folder: Path, steps: int, rate: float, goal: float) -> None:
    """All weights, AdamW in float32 with bfloat16 products; stops where the mean loss is below `goal`."""
    import torch

    model, processor = load(folder, torch.float32)
    batch = inputs_of(processor, make_samples(), with_answers=True)
    start, pad = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    labels = labels_of(batch["input_ids"], start, pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 1.05 - step / steps))
    for step in range(1, steps + 1):
        with torch.autocast(device(), torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or loss.item() < goal:
            print(f"step {step} | loss {loss.item():.4f}", flush=True)
        if loss.item() < goal:
            break
    save_weights(model, folder)


def answer(folder: Path, output: Path) -> None:
    """Greedy answers of transformers in bfloat16, one question at a time, and the least lead of a chosen token."""
    import torch
    import transformers

    model, processor = load(folder, torch.bfloat16)
    answers = {}
    for sample in make_samples():
        batch = inputs_of(processor, [sample], with_answers=False)
        made = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        length = batch["input_ids"].shape[1]
        leads = [(row.topk(2).values[0, 0] - row.topk(2).values[0, 1]).item() for row in made.logits]
        text = processor.tokenizer.decode(made.sequences[0, length:], skip_special_tokens=True)
        answers[sample.name] = {"prompt_tokens": length, "answer": text, "lead": min(leads), "learnt": sample.answer}
        print(f"{sample.name}: {length} tokens, {text!r}, least lead {min(leads):.2f}")
    output.write_text(json.dumps({"transformers": transformers.__version__, "answers": answers}, indent=2))


def part_of(sample: Sample) -> dict:
    """The part of a chat request that holds an image, or a video as its JPEG frames."""
    coded = ",".join(base64.b64encode(file).decode() for file in sample.files)
    kind = f"{sample.kind}_url"
    return {"type": kind, kind: {"url": f"data:{sample.kind}/jpeg;base64,{coded}"}}


def post(url: str, request: dict) -> dict:
    """The reply to one chat completion."""
    body = json.dumps(request).encode()
    call = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=300) as reply:
        return json.load(reply)


def wait_for(url: str, seconds: float) -> str:
    """The name of the served model, once the server answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as reply:
                return json.load(reply)["data"][0]["id"]
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(2)


def ask(url: str, answers: Path | None, output: Path, wait: float) -> int:
    """Asks the server every question. Returns 1 if an answer or a count of tokens is not transformers'."""
    model = wait_for(url, wait)
    expected = json.loads(answers.read_text())["answers"] if answers else {}
    rows, wrong = {}, 0
    for sample in make_samples():
        content = [part_of(sample), {"type": "text", "text": QUESTION}]
        request = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        reply = post(url, {**request, "max_tokens": NEW_TOKENS})
        tokens, text = reply["usage"]["prompt_tokens"], reply["choices"][0]["message"]["content"]
        rows[sample.name] = {"prompt_tokens": tokens, "answer": text}
        told = expected.get(sample.name)
        equal = told is None or (told["prompt_tokens"], told["answer"]) == (tokens, text)
        tie = not equal and told["prompt_tokens"] == tokens and told["lead"] < TIE
        wrong += not (equal or tie)
        verdict = "" if told is None else "equal" if equal else f"{'tie' if tie else 'OTHER'}: {told['answer']!r}"
        print(f"{sample.name}: {tokens} prompt tokens, {text!r} {verdict}")
    output.write_text(json.dumps(rows, indent=2))
    return int(wrong > 0)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    folder = stages.add_parser("folder", help="write configuration and tokenizer")
    folder.add_argument("--output-dir", type=Path, required=True)
    folder.add_argument("--tiny", action="store_true", help="a model for a try on a CPU")
    weights = stages.add_parser("weights", help="draw random weights")
    weights.add_argument("--seed", type=int, default=0)
    training = stages.add_parser("train", help="learn the answers by heart")
    training.add_argument("--steps", type=int, default=300, help="most steps")
    training.add_argument("--rate", type=float, default=1e-4)
    training.add_argument("--goal", type=float, default=0.01, help="loss at which training stops")
    answering = stages.add_parser("answer", help="greedy answers of transformers")
    for stage in (weights, training, answering):
        stage.add_argument("--model-dir", type=Path, required=True)
    asking = stages.add_parser("ask", help="ask a server and compare")
    asking.add_argument("--url", default="http://localhost:8000")
    asking.add_argument("--answers", type=Path, help="of transformers, to compare with")
    asking.add_argument("--wait", type=float, default=300, help="seconds to wait for the server")
    for stage in (answering, asking):
        stage.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.stage == "folder":
        write_folder(arguments.output_dir, arguments.tiny)
    elif arguments.stage == "weights":
        write_weights(arguments.model_dir, arguments.seed)
    elif arguments.stage == "train":
        train(arguments.model_dir, arguments.steps, arguments.rate, arguments.goal)
    elif arguments.stage == "answer":
        answer(arguments.model_dir, arguments.output)
    else:
        return ask(arguments.url, arguments.answers, arguments.output, arguments.wait)
    return 0


if __name__ == "__main__":
    sys.exit(main())
