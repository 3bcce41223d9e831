"""Floating-point operations of a Qwen2-VL training step, counted from its shapes, and the peak of the device.

A multiply-add counts as two. Matrix products only; attention is counted within each sample and, in the vision tower,
within each time step of a medium, as if nothing were spent on padding or masked positions. The backward pass costs
twice the forward pass, also where weights are frozen and it needs less.
"""

import re

import torch

# Dense bf16 peak in FLOP/s by NVIDIA's data sheets: half of what they give with sparsity. The first row counts whose
# words all stand in the device's name; a model without a second word is the SXM form where there is one.
PEAK_BF16 = {
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
}


def device_peak() -> float | None:
    """FLOP/s of this process's CUDA device in dense bf16; None without a device or for one that is not listed."""
    return find_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def find_peak(name: str) -> float | None:
    """FLOP/s in dense bf16 of a device, by its name as nvidia-smi prints it; None for one that is not listed and for a
    MIG slice, which is a part of a device."""
    words = set(re.split(r"[\s-]+", name.lower()))
    if "mig" in words:
        return None
    return next((peak for model, peak in PEAK_BF16.items() if words >= set(model.lower().split())), None)


def vision_flops(vision, grids: torch.Tensor) -> float:
    """Forward pass of the vision tower over media with grids int64 [M, 3] (t, h, w)."""
    if not len(grids):
        return 0.0
    tokens = float(grids.prod(dim=1).sum())
    pairs = float((grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2).sum())  # attention stays within one time step
    if vision.model_type == "qwen2_5_vl":
        return _windowed_vision_flops(vision, tokens, pairs)
    width, inner = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    block = 4 * width * width + 2 * width * inner
    merged = width * vision.spatial_merge_size**2
    merger = (merged * merged + merged * vision.hidden_size) / vision.spatial_merge_size**2
    return 2 * tokens * (patch + vision.depth * block + merger) + vision.depth * 4 * pairs * width


def _windowed_vision_flops(vision, tokens: float, pairs: float) -> float:
    """Of Qwen2.5-VL's tower: gated MLPs; attention within windows in all blocks but some. Windows count as full."""
    width, merge = vision.hidden_size, vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    block = 4 * width * width + 3 * width * vision.intermediate_size
    merger = (width * merge**2) * (width * merge**2 + vision.out_hidden_size) / merge**2
    full = len(vision.fullatt_block_indexes)
    in_windows = min(pairs, tokens * (vision.window_size // vision.patch_size) ** 2)
    attention = 4 * width * (full * pairs + (vision.depth - full) * in_windows)
    return 2 * tokens * (patch + vision.depth * block + merger) + attention


def language_flops(config, lengths: torch.Tensor, heads: int | None = None) -> float:
    """Forward pass of the language model over samples of `lengths` tokens, and of its head over `heads` of them (None:
    all); causal attention is half."""
    head = config.hidden_size // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    block = config.hidden_size * (2 * query + 2 * key) + 3 * config.hidden_size * config.intermediate_size
    tokens, pairs = float(lengths.sum()), float((lengths**2).sum()) / 2
    projected = (tokens if heads is None else heads) * config.hidden_size * config.vocab_size
    return 2 * (tokens * config.num_hidden_layers * block + projected) + config.num_hidden_layers * 4 * pairs * query


def training_flops(config, grids: torch.Tensor, lengths: torch.Tensor, heads: int | None = None) -> float:
    """Floating-point operations of the forward and backward pass of a micro-batch.

    config: transformers' Qwen2VLConfig.
    grids: int64 [M, 3]. (t, h, w) of its media.
    lengths: int64 [S]. Tokens of its samples.
    heads: Positions at which logits are computed. None: all.
    """
    return 3 * (vision_flops(config.vision_config, grids) + language_flops(config, lengths, heads))
