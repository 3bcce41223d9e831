"""Qwen2.5-VL: windows of attention and time in seconds, on the way to tokens and back to a stock form."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import convert_checkpoint
from dct_qwen2vl.checkpoints.conversion import converted_config
from dct_qwen2vl.checkpoints.inspection import check_checkpoint, time_step
from dct_qwen2vl.checkpoints.stock_form import stock_config
from dct_qwen2vl.data.positions import mrope_positions
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.dct.configuration_dct import CLIP_MEAN, synthesis_matrix
from dct_qwen2vl.dct.folding import bias_for_mean, fold_block_embedding, unfold_patch_embedding
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.evaluation.answering import Answerer
from dct_qwen2vl.training import checks
from dct_tokenizer import DCTConfig, DCTTokenizer, fold_patch_embedding

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
SIDES = {"exact": (224, 336), "x4": (336, 448), "x16": (672, 896)}  # more than one window a side


def run(model_dir: Path, output_dir: Path, *options: str) -> int:
    return convert_checkpoint.main(["--model-dir", str(model_dir), "--output-dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def forms(qwen2_5_vl_directory, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """forms("x4"): coefficient and stock form."""
    parent = tmp_path_factory.mktemp("forms")

    def make(name: str) -> tuple[Path, Path]:
        if not (parent / name).exists():
            assert run(qwen2_5_vl_directory, parent / name, "--dct", name, "--max-pixels", "1000000") == 0
            assert run(parent / name, parent / f"{name}-stock", "--to", "stock") == 0
        return parent / name, parent / f"{name}-stock"

    return make


def question(folder: Path, kind: str, frames: np.ndarray, fps: float = 2.0) -> dict:
    """What AutoProcessor makes of a question with one medium."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    content = [{"type": kind}, {"type": "text", "text": "What colour is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media = {"images": [frames[0]]} if kind == "image" else {"videos": [list(frames)], "fps": fps}
    return dict(processor(text=[text], return_tensors="pt", **media))


def logits(folder: Path, inputs: dict) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    with torch.no_grad():
        return model(**inputs).logits


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", SIDES)
def test_before_training_it_is_the_pixel_model_on_the_downscaled_input(
    name, kind, forms, qwen2_5_vl_directory, natural_frames
):
    frames = natural_frames(4, *SIDES[name])
    inputs = question(forms(name)[0], kind, frames)
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    pixels = inputs[key].double() @ torch.from_numpy(synthesis_matrix(DCTConfig.preset(name)))
    expected = logits(qwen2_5_vl_directory, {**inputs, key: pixels.float()})
    assert relative(logits(forms(name)[0], inputs), expected) < 1e-5
    if name == "exact":
        stock = question(qwen2_5_vl_directory, kind, frames)
        torch.testing.assert_close(stock[key], pixels.float(), rtol=1e-4, atol=1e-4)


def test_windows_matter(forms, tmp_path, natural_frames):
    """Or the test above would hold for windows of another size."""
    folder = Path(shutil.copytree(forms("x4")[0], tmp_path / "x4"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["window_size"] == 8
    inputs = question(folder, "image", natural_frames(1, *SIDES["x4"]))
    right = logits(folder, inputs)
    config["vision_config"]["window_size"] = 112
    (folder / "config.json").write_text(json.dumps(config))
    assert relative(logits(folder, inputs), right) > 1e-3


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", SIDES)
def test_stock_form(name, kind, forms, tmp_path, natural_frames):
    coefficients = Path(shutil.copytree(forms(name)[0], tmp_path / "trained"))
    tensors = load_file(coefficients / "model.safetensors")
    weight = tensors[PATCH_EMBEDDING]
    moved = weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, PATCH_EMBEDDING: moved}, coefficients / "model.safetensors", metadata={"format": "pt"})
    assert run(coefficients, tmp_path / "stock", "--to", "stock") == 0
    frames = natural_frames(4, *SIDES[name])
    inputs = question(tmp_path / "stock", kind, frames, fps=1.0)
    found = logits(tmp_path / "stock", inputs)
    answerer = Answerer(coefficients, 1)
    answerer.become(tmp_path / "stock")
    with torch.no_grad():
        assert relative(answerer.model(**inputs).logits, found) < 1e-5, "the forms differ in the patch embedding alone"
    assert relative(found, logits(coefficients, question(coefficients, kind, frames, fps=1.0))) < 1e-5
    vision = json.loads((tmp_path / "stock" / "config.json").read_text())["vision_config"]
    assert vision["window_size"] == 8 * vision["patch_size"] and vision["in_chans"] == vision["in_channels"] == 3
    assert run(tmp_path / "stock", tmp_path / "back", "--to", "dct") == 0
    assert relative(load_file(tmp_path / "back" / "model.safetensors")[PATCH_EMBEDDING], moved) < 1e-6
    for folder in (coefficients, tmp_path / "back"):
        assert json.loads((folder / "config.json").read_text())["vision_config"]["window_size"] == 8
        assert check_checkpoint(folder)["name"] == name


def test_names_with_model_in_front(qwen2_5_vl_directory, tmp_path):
    """As later transformers save them; 4.51 would leave the vision tower at random."""
    folder = Path(shutil.copytree(qwen2_5_vl_directory, tmp_path / "named"))
    tensors = load_file(folder / "model.safetensors")
    named = {re.sub(r"^visual\.", "model.visual.", name): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(folder, tmp_path / "x4") == 0 and run(tmp_path / "x4", tmp_path / "stock", "--to", "stock") == 0
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    assert stock.keys() == tensors.keys() and stock[PATCH_EMBEDDING].shape == (128, 3, 2, 28, 28)


# Positions


@pytest.mark.parametrize("fps", [0.3, 1.0, 2.0, 3.0])
def test_positions_are_those_of_the_model(fps, forms, natural_frames):
    inputs = question(forms("x4")[0], "video", natural_frames(6, 224, 336), fps=fps)
    model = AutoModelForImageTextToText.from_pretrained(forms("x4")[0])
    names = ("input_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    expected, _ = model.get_rope_index(**{name: inputs[name] for name in names})
    t, h, w = inputs["video_grid_thw"][0].tolist()
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(model.config.video_token_id)
    tokens = t * h * w // 4
    step = time_step(json.loads((forms("x4")[0] / "config.json").read_text()), 2, fps)
    assert step == 4 / fps
    found = mrope_positions([start, (t, h // 2, w // 2, step), len(ids) - start - tokens])
    np.testing.assert_array_equal(found, expected[:, 0])


def test_training_and_evaluation_count_time_alike(forms, natural_frames, video_file):
    from transformers import AutoTokenizer

    from dct_qwen2vl.data.samples import ConversationSample
    from dct_qwen2vl.evaluation.questions import Question
    from task_encoder import QwenTaskEncoder

    folder, sampling = forms("x4")[0], VideoSampling(fps=1.0, min_frames=4)
    processor = DCTImageProcessor.from_pretrained(folder)
    step = time_step(json.loads((folder / "config.json").read_text()), 2, sampling.fps)
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(folder), processor, video_sampling=sampling, time_step=step)
    video = video_file(natural_frames(16, 224, 224))
    turns = [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", "value": "It."}]
    sample = ConversationSample(
        __key__="a", __restore_key__=(), __subflavor__=None, __subflavors__={},
        entry={"conversations": turns}, media=[("video", video)],
    )  # fmt: skip
    encoded = encoder.encode(sample)
    assert encoded.position_ids[0].max() - encoded.position_ids[1].max() == 0
    where = encoded.input_ids == encoder.samples.pads["video"]
    times = encoded.position_ids[0][where].unique()
    assert (times - times[0]).tolist() == [0, 4]
    answerer = Answerer(folder, 2, sampling)
    question_on = Question(
        "a", 0, "", ("", "video", "What moves?"), "It.", (("video", answerer.media.read("video", video)),)
    )
    inputs = answerer.model_inputs([question_on])
    assert answerer.time_inputs(inputs) == {"second_per_grid_ts": [2.0]}  # two frames at one a second
    positions, _ = answerer.model.get_rope_index(**{
        **{name: inputs[name] for name in ("input_ids", "video_grid_thw", "attention_mask")},
        **answerer.time_inputs(inputs),
    })  # fmt: skip
    assert positions[0][inputs["input_ids"] == encoder.samples.pads["video"]].unique().diff().tolist() == [4]
    assert len(answerer.answer([question_on])) == 1


# What is refused, and what is prepared for other models


def test_megatron_is_refused(forms):
    assert checks.unknown_to_megatron(forms("x4")[0]).startswith("--engine megatron has no Qwen2.5-VL")
    assert checks.unknown_to_megatron(Path("nowhere")) is None


def test_the_fold_of_a_tower_of_real_width(natural_frames):
    """1280 wide, 16 heads; 4 of its 32 blocks, of which one sees the whole image."""
    config = DCTConfig.preset("x4")
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "depth": 4,
              "window_size": 112, "fullatt_block_indexes": [3]}  # fmt: skip
    values = {"model_type": "qwen2_5_vl", "vision_config": vision}
    tower = {}
    for form, changed in (
        ("pixels", values),
        ("dct", converted_config(values, 1764)),
        ("stock", stock_config(values, config)),
    ):
        torch.manual_seed(0)
        tower[form] = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(**changed["vision_config"])
        ).double()
    weight = tower["pixels"].patch_embed.proj.weight.data
    weights = {name: value for name, value in tower["pixels"].state_dict().items() if "patch_embed" not in name}
    folded = fold_patch_embedding(weight, config)
    for form, embedding in (("dct", folded), ("stock", unfold_patch_embedding(folded, config))):
        tower[form].load_state_dict({**weights, "patch_embed.proj.weight": embedding})
    frames = natural_frames(2, 448, 336)
    tokens, grid = DCTTokenizer(config, dtype=torch.float64).encode(frames)
    # With all coefficients the block's pixels come back, as far as x4 holds them: what the stock form is given.
    pixels = tokens @ torch.from_numpy(synthesis_matrix(config, config.block))
    grid = torch.tensor([grid])
    with torch.no_grad():
        seen = tower["pixels"](tokens @ torch.from_numpy(synthesis_matrix(config)), grid)
        assert relative(tower["dct"](tokens, grid), seen) < 1e-6  # its norms and rotations are in fp32
        assert relative(tower["stock"](pixels, grid), seen) < 1e-6


def test_the_fold_of_a_patch_of_16_with_a_bias_and_another_mean(natural_frames):
    """As in Qwen3-VL: patch 16, mean and deviation 0.5, a bias."""
    patch, mean, std = (2, 16, 16), (0.5,) * 3, (0.5,) * 3
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 3, *patch, generator=generator, dtype=torch.float64)
    bias = torch.randn(32, generator=generator, dtype=torch.float64)
    for name in ("exact", "x4", "x16"):
        config = DCTConfig.preset(name, patch)
        folded = fold_patch_embedding(weight, config, patch, std)
        folded_bias = bias_for_mean(weight, bias, mean, CLIP_MEAN, std)
        rows, columns = config.resize_factor
        tokens, _ = DCTTokenizer(config, dtype=torch.float64).encode(natural_frames(2, rows, columns))
        embedded = tokens @ folded.flatten(1).T + folded_bias
        # The stock form reads pixels that its own processor has normalised.
        unfolded = unfold_patch_embedding(folded, config, std)
        unfolded_bias = bias_for_mean(unfolded, folded_bias, CLIP_MEAN, mean, std)
        pixels = torch.from_numpy((natural_frames(2, rows, columns) / 255 - 0.5) / 0.5).permute(3, 0, 1, 2)
        _, bh, bw = config.block
        blocks = [pixels[:, :, y : y + bh, x : x + bw] for y in (0, bh) for x in (0, bw)]
        stock = torch.stack(blocks).flatten(1) @ unfolded.flatten(1).T + unfolded_bias
        torch.testing.assert_close(stock, embedded, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(unfolded_bias, bias, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fold_block_embedding(unfolded, config, std), folded, rtol=1e-9, atol=1e-9)
        if name == "exact":
            original = torch.stack(blocks).flatten(1) @ weight.flatten(1).T + bias
            torch.testing.assert_close(embedded, original, rtol=1e-9, atol=1e-9)
