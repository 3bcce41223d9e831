"""Qwen2.5-VL on the automodel engine: two real processes with adapters, their merging, counted operations."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from pipeline import metrics, run
from safetensors.torch import load_file
from samples_by_hand import answer, conversation_sample
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import convert_checkpoint
import finetune_qwen2vl
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.training.automodel import QwenAutoModel
from dct_qwen2vl.training.flops import language_flops, vision_flops
from dct_qwen2vl.training.lora import LoRA
from task_encoder import QwenTaskEncoder


@pytest.fixture(scope="module")
def model_dir(qwen2_5_vl_directory, tmp_path_factory) -> Path:
    """A tiny Qwen2.5-VL over x4 tokens."""
    folder = tmp_path_factory.mktemp("x4") / "model"
    assert convert_checkpoint.main(["--model-dir", str(qwen2_5_vl_directory), "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(model_dir, prepared, tmp_path_factory) -> Path:
    """The folder of a run of two processes with adapters in the language model."""
    output = tmp_path_factory.mktemp("runs")
    values = {
        "EXPERIMENT_NAME": "lora", "OUTPUT_DIR": output, "MODEL_DIR": model_dir, "DATASET_DIR": prepared.shards,
        "ENGINE": "automodel", "NUM_PROC_PER_NODE": 2, "MAXPIXELS": 112 * 112, "SEQ_LENGTH": 512, "MBS": 2, "GBS": 8,
        "MAX_STEPS": 4, "LR": "1e-3", "WARMUP_STEPS": 1, "VAL_INTERVAL": 4, "SAVE_INTERVAL": 4, "NUM_WORKERS": 1,
        "OMP_NUM_THREADS": 1, "PYTHON": sys.executable,
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in values.items()}}
    done = run(["bash", "qwen_launch.sh", "--log-interval", "1", "--lora-rank", "4"], check=False, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return output / "lora"


@pytest.mark.launch
def test_two_processes_train_adapters_and_the_vision_tower(trained, model_dir):
    steps = [line for line in metrics(trained) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and {line["samples"] for line in steps} == {8}
    assert steps[-1]["loss"] < steps[0]["loss"] and all(line["tflops"] > 0 for line in steps)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir, trained / "hf_dct"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if not name.startswith("visual.")} == {
        name for name in before
        if re.fullmatch(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight", name)
    }  # fmt: skip
    assert {name for name in before if name.startswith("visual.")} <= moved


@pytest.mark.launch
def test_what_it_leaves_is_a_qwen2_5_vl_in_both_forms(trained):
    patches = {}
    for name in ("hf_dct", "hf"):
        model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained / name, output_loading_info=True)
        assert not any(loading.values())
        patches[name] = tuple(model.visual.patch_embed.proj.weight.shape[1:])
    assert patches == {"hf_dct": (1764, 1, 1, 1), "hf": (3, 2, 28, 28)}
    assert json.loads((trained / "hf" / "config.json").read_text())["model_type"] == "qwen2_5_vl"


@pytest.mark.launch
def test_an_export_of_its_last_checkpoint_has_the_same_bytes(trained, model_dir):
    known = ["--model-dir", str(model_dir), "--data-dir", "/nowhere", "--output-dir", str(trained.parent)]
    assert finetune_qwen2vl.main([*known, "--experiment-name", trained.name, "--export"]) == 0
    for form in ("hf", "hf_dct"):
        written = trained / "exported" / "step000004" / form
        assert {path.name for path in written.iterdir()} == {path.name for path in (trained / form).iterdir()}
        for path in written.iterdir():
            assert path.read_bytes() == (trained / form / path.name).read_bytes(), path


def test_merged_adapters_compute_what_the_adapted_model_does(model_dir, natural_frames, image_file, tmp_path):
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(model_dir), DCTImageProcessor.from_pretrained(model_dir))
    image = image_file(natural_frames(1, 112, 168, 1)[0], "PNG")
    entry = answer("<image>\nWhat colour is the circle?", "The circle is red.")
    batch = encoder.batch([encoder.encode(conversation_sample(entry, ("image", image)))])
    module = QwenAutoModel(model_dir, lora=LoRA(4, 8, 1))
    module.configure_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        plain = module.eval()(batch)
        for name, parameter in module.named_parameters():
            if ".lora_b." in name:
                parameter.normal_(std=0.05, generator=generator)
        adapted = module(batch)
    module.save_hf(tmp_path / "hf")
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        found = merged(**batch.model_inputs()).logits
    assert float((found - adapted).norm()) < 1e-5 * float(adapted.norm()) < float((adapted - plain).norm())


@pytest.fixture(scope="module")
def counted_model(model_dir) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig.from_pretrained(model_dir)
    # eager: the counter does not know every fused attention
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 16, 24)])
def test_operations_of_the_tower_are_those_that_are_counted(grid, counted_model):
    """transformers' attention computes all pairs of a time step and masks those outside a window."""
    vision = counted_model.config.vision_config
    tokens = torch.randn(grid[1] * grid[2], vision.in_channels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted_model.visual(tokens, grid_thw=torch.tensor([grid]))
    masked = len(tokens) ** 2 - len(tokens) * (vision.window_size // vision.patch_size) ** 2
    masked *= 4 * vision.hidden_size * (vision.depth - len(vision.fullatt_block_indexes))
    assert vision_flops(vision, torch.tensor([grid])) + masked == counter.get_total_flops()


def test_operations_of_the_language_model_are_those_that_are_counted(counted_model):
    config, length = counted_model.config, 12
    ids = torch.randint(0, 90, (1, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted_model(input_ids=ids, position_ids=torch.arange(length).expand(3, 1, length))
    causal_half = config.num_hidden_layers * 4 * (length**2 / 2) * config.hidden_size
    head = config.hidden_size // config.num_attention_heads
    angles = 2 * 3 * (head // 2) * length
    assert language_flops(config, torch.tensor([length])) + causal_half + angles == counter.get_total_flops()
