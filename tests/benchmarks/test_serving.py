"""benchmarks/serving.py on a CPU: its stages with a tiny model, and its questions to a server of this test's own.

The server takes the same requests as vLLM and answers by transformers. So does the example of docs/serving.md.
"""

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import REPOSITORY

import convert_checkpoint
from benchmarks import serving
from dct_qwen2vl.evaluation.served_media import MediaReader


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A tiny model with random weights, by the commands that the module names, but for its training."""
    folder = tmp_path_factory.mktemp("serving")
    pixels, dct, stock = (folder / name for name in ("pixels", "dct", "stock"))
    assert serving.main(["folder", "--output-dir", str(pixels), "--tiny"]) == 0
    assert serving.main(["weights", "--model-dir", str(pixels)]) == 0
    known = ["--model-dir", str(pixels), "--output-dir", str(dct), "--dct", "x4"]
    assert convert_checkpoint.main(known) == 0
    assert convert_checkpoint.main(["--to", "stock", "--model-dir", str(dct), "--output-dir", str(stock)]) == 0
    return stock


@pytest.fixture(scope="module")
def answers(stock) -> Path:
    path = stock.parent / "answers.json"
    assert serving.main(["answer", "--model-dir", str(stock), "--output", str(path)]) == 0
    return path


class Chat(BaseHTTPRequestHandler):
    """/v1/models and /v1/chat/completions for one question on one image or on the frames of a video."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "x4"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        part, question = request["messages"][0]["content"]
        kind = part["type"].removesuffix("_url")
        start, *coded = part[part["type"]]["url"].split(",")
        assert start.startswith(f"data:{kind}/") and start.endswith(";base64")
        frames = [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in coded]
        self.server.requests.append((request, frames))
        model, processor = self.server.loaded
        turns = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question["text"]}]}]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        media = {"images": frames} if kind == "image" else {"videos": [np.stack([np.asarray(f) for f in frames])]}
        inputs = processor(text=[text], **media, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=request["max_tokens"], do_sample=False)
        length = inputs["input_ids"].shape[1]
        said = processor.tokenizer.decode(made[0, length:], skip_special_tokens=True)
        self.reply({"usage": {"prompt_tokens": length}, "choices": [{"message": {"content": said}}]})

    def reply(self, value: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


@pytest.fixture
def server(stock):
    server = ThreadingHTTPServer(("localhost", 0), Chat)
    server.loaded, server.requests = serving.load(stock, torch.bfloat16), []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_and_tokens_of_a_server_are_compared(server, answers, tmp_path, capsys):
    told = json.loads(answers.read_text())["answers"]
    assert {name: row["prompt_tokens"] for name, row in told.items() if "yellow" not in name} == {
        **{f"{colour} {shape}": 133 for colour in ("red", "green", "blue") for shape in ("circle", "square")},
        "moving right": 133, "moving left": 133,
    }, "docs/serving.md has these"  # fmt: skip
    command = ["ask", "--url", f"http://localhost:{server.server_port}", "--output", str(tmp_path / "asked.json")]
    assert serving.main([*command, "--answers", str(answers)]) == 0
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert {name: row["answer"] for name, row in asked.items()} == {name: row["answer"] for name, row in told.items()}
    assert capsys.readouterr().out.count(" equal") == 10
    other = {"answers": {**told, "red circle": {**told["red circle"], "answer": "none", "lead": 7.0}}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert serving.main([*command, "--answers", str(tmp_path / "other.json")]) == 1
    other["answers"]["red circle"]["lead"] = 0.1
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert serving.main([*command, "--answers", str(tmp_path / "other.json")]) == 0
    assert "tie: 'none'" in capsys.readouterr().out


def test_training_ends_at_its_goal_and_saves_the_weights(stock, capsys):
    folder = stock.parent / "dct"
    before = (folder / "model.safetensors").read_bytes()
    assert serving.main(["train", "--model-dir", str(folder), "--goal", "100"]) == 0
    assert 5 < float(re.search(r"step 1 \| loss ([\d.]+)", capsys.readouterr().out)[1]) < 20
    after = (folder / "model.safetensors").read_bytes()
    assert len(after) == len(before) and after != before


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_pages_example_sends_what_training_reads(server, stock, tmp_path, video_file, image_file, natural_frames,
                                                     capsys, monkeypatch, kind):  # fmt: skip
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "urlopen" in block]
    name = "video.mp4" if kind == "video" else "photo.jpg"
    data = video_file(natural_frames(80, 112, 168), rate=4) if kind == "video" else image_file(
        natural_frames(1, 300, 420)[0], "JPEG")  # fmt: skip
    (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    for before, after in (
        ("/models/2b-x4-stock", str(stock)),
        ("localhost:8000", f"localhost:{server.server_port}"),
        ("video.mp4", name),
    ):
        assert before in code
        code = code.replace(before, after)
    exec(compile(code, "docs/serving.md", "exec"), {})
    ((request, frames),) = server.requests
    reader = MediaReader.of(stock)
    expected = reader.frames(data) if kind == "video" else [reader.image(data)]
    assert len(frames) == (40 if kind == "video" else 1)
    assert np.array_equal(np.stack(frames), np.stack(expected))
    assert request["media_io_kwargs"] == {"video": {"num_frames": -1}}, "vLLM would take 32 frames"
    assert capsys.readouterr().out.strip("\n") != ""
