"""What several test files share: a tiny Qwen2-VL and its converted forms, images, videos. Nothing is downloaded."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

# Read by these libraries when they are imported, and by the processes that the tests start.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that compile
# transformers copies the code of a checkpoint into this folder before it imports it.
MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")

import numpy as np
import pytest
from PIL import Image

# What the tiny tokenizer learns its words from.
TEXTS = [
    "system\nYou are a helpful assistant.",
    "user\nWhat colour is the circle?",
    "assistant\nThe circle is red.",
    "user\nHow many squares are there? Answer with a number.",
    "assistant\nThere are three squares, two red and one blue.",
] * 8


# Files of launches that take half a minute or more, the longest first. Begun before all others, they leave none of two
# processes idle at the end.
LONGEST = (
    *("test_megatron_training.py", "test_finetune.py", "test_starts_and_ends.py", "test_sharding.py"),
    *("test_quality_manuals.py", "test_training_speed.py", "test_qwen2_5_vl_training.py", "test_automodel_engine.py"),
)


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_sessionfinish() -> None:
    shutil.rmtree(MODULES_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def qwen2vl_directory(tmp_path_factory) -> Path:
    """A tiny stock Qwen2-VL with random weights: model, tokenizer, chat template, pixel image processor."""
    import torch

    from dct_qwen2vl.toy.model import write_checkpoint

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qwen2vl") / "tiny"
    write_checkpoint(TEXTS, folder, seed=3)
    return folder


@pytest.fixture(scope="session")
def qwen2_5_vl_directory(qwen2vl_directory, tmp_path_factory) -> Path:
    """A tiny stock Qwen2.5-VL with random weights and the tokenizer of the tiny Qwen2-VL. Windows of its attention are
    4 x 4 tokens of the language model, in all blocks of the vision tower but the second."""
    import json

    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen2_5_vl") / "tiny"
    shutil.copytree(qwen2vl_directory, folder)
    values = json.loads((folder / "config.json").read_text())
    vision = {
        **{"depth": 3, "hidden_size": 128, "out_hidden_size": 64, "intermediate_size": 192, "num_heads": 4},
        **{"in_channels": 3, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2},
        **{"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    }
    dropped = ("model_type", "architectures", "vision_config", "transformers_version")
    values = {name: value for name, value in values.items() if name not in dropped}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values, vision_config=vision))
    model.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    processor = {**json.loads(path.read_text()), "processor_class": "Qwen2_5_VLProcessor"}
    path.write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Raw data, shards with Energon metadata and a converted checkpoint, made by the real stages: pipeline.Prepared."""
    from pipeline import prepare

    return prepare(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def converted(qwen2vl_directory, tmp_path_factory) -> Callable[[str], Path]:
    """converted("x4"): the tiny Qwen2-VL as a directory that reads DCT tokens."""
    from dct_qwen2vl.checkpoints.conversion import convert
    from dct_tokenizer import DCTConfig

    parent, done = tmp_path_factory.mktemp("converted"), {}

    def get(preset: str) -> Path:
        if preset not in done:
            convert(qwen2vl_directory, parent / preset, DCTConfig.preset(preset))
            done[preset] = parent / preset
        return done[preset]

    return get


@pytest.fixture(scope="session")
def natural_frames() -> Callable[..., np.ndarray]:
    """natural_frames(T, H, W, seed): uint8 [T, H, W, 3] with an image's 1/f spectrum, mostly grey, slowly moving."""

    def draw(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
        frequency = np.hypot(rows, columns)
        amplitude = 1 / np.maximum(frequency, 1 / max(height, width))

        def field() -> np.ndarray:
            spectrum = np.fft.fft2(rng.standard_normal((height, width))) * amplitude
            moved = [
                np.fft.ifft2(spectrum * np.exp(-2j * np.pi * (rows + 2 * columns) * t)).real for t in range(frames)
            ]
            video = np.stack(moved)
            return (video - video.mean()) / video.std()

        luma, *colour = (field() for _ in range(4))
        video = 120 + 45 * luma[..., None] + 8 * np.stack(colour, axis=-1)
        return video.round().clip(0, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def image_file() -> Callable[..., bytes]:
    """image_file(PIL image or uint8 [H, W, 3], "PNG", **options): the bytes of an image file."""

    def encode(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
        stream = io.BytesIO()
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(stream, file_format, **options)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def video_file() -> Callable[..., bytes]:
    """video_file(uint8 [T, H, W, 3], rate): the bytes of an mp4 video of `rate` frames a second."""
    import av

    def encode(frames: np.ndarray, rate: int = 4) -> bytes:
        stream = io.BytesIO()
        with av.open(stream, "w", format="mp4") as container:
            video = container.add_stream("mpeg4", rate=Fraction(rate), width=frames.shape[2], height=frames.shape[1])
            video.pix_fmt = "yuv420p"
            video.bit_rate = 8_000_000
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video.encode())
        return stream.getvalue()

    return encode


@pytest.fixture
def one_line_error(capsys) -> Iterator[Callable[[], str]]:
    """one_line_error(): what a command wrote to stderr; fails unless that is one line."""

    def read() -> str:
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith("\n"), error
        return error.rstrip("\n")

    yield read
