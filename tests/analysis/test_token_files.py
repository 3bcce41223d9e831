"""dct_tokenizer.py encode and decode: what is written is what training reads, and comes back as what tokens keep."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dct_tokenizer
from dct_qwen2vl.data.media_encoder import MediaEncoder
from dct_qwen2vl.data.videos import VideoSampling, decode_video
from dct_tokenizer import DCTConfig, DCTImageProcessor, DCTTokenizer


@pytest.fixture
def image(tmp_path, natural_frames, image_file) -> Path:
    (tmp_path / "image.png").write_bytes(image_file(natural_frames(1, 112, 168)[0], "PNG"))
    return tmp_path / "image.png"


@pytest.fixture
def video(tmp_path, natural_frames, video_file) -> Path:
    (tmp_path / "video.mp4").write_bytes(video_file(natural_frames(12, 112, 168), rate=4))
    return tmp_path / "video.mp4"


def encode(path: Path, *arguments: str) -> Path:
    output = path.with_suffix(".safetensors")
    assert dct_tokenizer.main(["encode", str(path), "--output", str(output), *arguments]) == 0
    return output


@pytest.mark.parametrize("kind", ["image", "video"])
def test_tokens_are_those_that_training_reads(kind, request):
    path = request.getfixturevalue(kind)
    found = load_file(encode(path))
    encoder = MediaEncoder(DCTImageProcessor("x4"))
    tokens, grid = encoder.encode(kind, encoder.read(kind, path.read_bytes()))
    assert torch.equal(found["tokens"], tokens) and found["grid_thw"].tolist() == list(grid)


def test_an_image_comes_back_as_its_tokens_hold_it(image):
    tokens = encode(image, "--preset", "exact", "--max-pixels", "18816")
    assert dct_tokenizer.main(["decode", str(tokens), "--output", str(image.with_name("back.png"))]) == 0
    back, source = (np.asarray(Image.open(path).convert("RGB")) for path in (image.with_name("back.png"), image))
    assert back.shape == source.shape and np.abs(back.astype(int) - source).max() <= 1  # nothing is left out


def test_a_video_comes_back_with_its_frames_and_rate(video):
    tokens = encode(video)
    output = video.with_name("back.mp4")
    assert dct_tokenizer.main(["decode", str(tokens), "--output", str(output)]) == 0
    held = load_file(tokens)
    expected = DCTTokenizer(DCTConfig.preset("x4")).decode(held["tokens"], tuple(held["grid_thw"].tolist())).numpy()
    found = decode_video(output.read_bytes(), VideoSampling(fps=2.0))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4  # what H.264 costs


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, ["--output", "out.png"], "there is no file {file}: python dct_tokenizer.py encode"),
        (lambda path: path.write_bytes(b"no tokens"), ["--output", "out.png"], "{file} is no safetensors file"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), ["--output", "out.png"], "holds no tokens of dct_token"),
        (
            lambda path: write_tokens(path, "image"),
            ["--output", "out.mp4"],
            "tokens of one image: give --output a file",
        ),
        (
            lambda path: write_tokens(path, "image", dct="{}"),
            ["--output", "out.png"],
            "a DCT configuration has the fiel",
        ),
        (lambda path: write_tokens(path, "image"), ["--output", "nowhere/out.png"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_decoded_is_one_line(make, arguments, message, tmp_path, monkeypatch, one_line_error):
    monkeypatch.chdir(tmp_path)
    file = Path("tokens.safetensors")
    if make:
        make(file)
    assert dct_tokenizer.main(["decode", str(file), *arguments]) == 1
    line = one_line_error()
    assert line.startswith("dct_tokenizer.py: ") and message.format(file=file) in line


def write_tokens(path: Path, kind: str, **metadata: str) -> None:
    tensors = {"tokens": torch.zeros(4, 1764), "grid_thw": torch.tensor([1, 2, 2])}
    known = {"dct": json.dumps(DCTConfig.preset("x4").to_dict()), "kind": kind, "frames_per_second": "2.0"}
    save_file(tensors, path, {**known, **metadata})


def test_a_file_that_is_no_image_is_one_line_and_nothing_is_overwritten(tmp_path, image, one_line_error):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    command = ["encode", str(tmp_path / "broken.jpg"), "--output", str(tmp_path / "tokens.safetensors")]
    assert dct_tokenizer.main(command) == 1
    assert f"{tmp_path / 'broken.jpg'}: not a readable" in one_line_error()
    (tmp_path / "tokens.safetensors").write_bytes(b"before")
    assert dct_tokenizer.main(["encode", str(image), *command[2:]]) == 1
    assert "is there already: choose another --output, or add --force" in one_line_error()
    assert (tmp_path / "tokens.safetensors").read_bytes() == b"before"


def test_an_output_of_another_kind_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_status:
        dct_tokenizer.main(["encode", "image.png", "--output", "tokens.bin"])
    assert exit_status.value.code == 2 and "the file ends in .safetensors, got tokens.bin" in capsys.readouterr().err


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit) as exit_status:
        dct_tokenizer.main(["--help"])
    assert exit_status.value.code == 0 and "{show,encode,decode}" in capsys.readouterr().out
