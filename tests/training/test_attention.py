"""Attention of packed sequences on a GPU, against attention in fp32, by either kernel."""

import math

import pytest
import torch
from torch.nn import functional

from dct_qwen2vl.training import attention

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
card = pytest.mark.skipif(attention.why_not() is not None, reason=str(attention.why_not()))
LENGTHS = [300, 1, 17, 640, 64]  # of parts


def in_float32(query, key, value, causal):
    parts = [x.float().split(LENGTHS) for x in (query, key, value)]
    outputs = [
        functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=causal, enable_gqa=True)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat([x.transpose(0, 1) for x in outputs])


def with_gradients(compute, inputs, upstream):
    output = compute(*inputs)
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


@gpu
@pytest.mark.parametrize(("heads", "shared", "width", "causal"), [(16, 16, 80, False), (12, 2, 128, True)])
@pytest.mark.parametrize(
    "shortest", [pytest.param(0, marks=card, id="flash-attn-4"), pytest.param(math.inf, id="torch")]
)
def test_output_and_gradients_are_those_of_float32(heads, shared, width, causal, shortest, monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST", {causal: shortest})
    generator = torch.Generator("cuda").manual_seed(3)
    tokens = sum(LENGTHS)
    query, key, value, upstream = (
        torch.randn(tokens, count, width, generator=generator, device="cuda", dtype=torch.bfloat16)
        for count in (heads, shared, shared, heads)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    ours = with_gradients(lambda *x: attention.packed_attention(*x, starts, max(LENGTHS), causal), inputs, upstream)
    true = with_gradients(lambda *x: in_float32(*x, causal), inputs, upstream)
    for got, expected in zip(ours, true, strict=True):
        assert (got.float() - expected.float()).norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize(
    ("tokens", "parts", "causal", "chosen"),
    [(4096, 4, True, "4"), (4096, 16, True, "2"), (4096, 16, False, "4"), (4096, 64, False, "2"), (511, 1, True, "2")],
)
def test_the_length_of_the_parts_chooses_the_kernel(tokens, parts, causal, chosen):
    assert attention.prefers_flash_attention_4(tokens, parts, causal) == (chosen == "4")


def test_the_log_says_why_the_package_is_not_used(monkeypatch):
    monkeypatch.setattr(attention, "why_not", lambda: "flash-attn-4 is not there")
    assert attention.kernel_names() == f"FlashAttention-2 of torch {torch.__version__}; flash-attn-4 is not there"
