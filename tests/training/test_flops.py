"""The counted operations against PyTorch's own counter, on a small model with random weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from dct_qwen2vl.training.flops import device_peak, find_peak, language_flops, vision_flops

VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 4, "in_channels": 60,
          "patch_size": 1, "temporal_patch_size": 1}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(
        vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]}, vision_config=VISION,
    )  # fmt: skip
    # eager: the counter does not know every fused attention
    return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 2, 6)])
def test_vision_tower(model, grid):
    t, h, w = grid
    tokens, grids = torch.randn(t * h * w, 60), torch.tensor([grid])
    assert vision_flops(model.config.vision_config, grids) == counted(lambda: model.visual(tokens, grid_thw=grids))


def test_attention_of_a_video_stays_within_a_time_step(model):
    vision = model.config.vision_config
    apart = 3 * vision_flops(vision, torch.tensor([[1, 4, 4]]))
    assert vision_flops(vision, torch.tensor([[3, 4, 4]])) == apart
    assert vision_flops(vision, torch.zeros(0, 3, dtype=torch.int64)) == 0


def test_language_model(model):
    length = 12
    ids = torch.randint(0, 90, (1, length))
    positions = torch.arange(length).expand(3, 1, length)
    total = counted(lambda: model(input_ids=ids, position_ids=positions))
    causal_half = 3 * 4 * (length**2 / 2) * 48  # the counter takes masked positions for work
    angles = 2 * 3 * (12 // 2) * length  # rotary angles come from a small matrix product
    assert language_flops(model.config, torch.tensor([length])) + causal_half + angles == total


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 SXM5 80GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),  # drivers before 470
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A10", None),
        ("NVIDIA B200", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_names_of_devices(name, teraflops, monkeypatch):
    assert find_peak(name) == (teraflops and teraflops * 1e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak() == find_peak(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_no_peak():
    assert device_peak() is None
