"""Attention within the parts of a packed sequence: time steps in the tower, samples in the language model.

Two kernels compute it. PyTorch carries FlashAttention-2 (arXiv 2307.08691), which runs on every card since Ampere. The
package flash-attn-4 has kernels made for Hopper and Blackwell (`flash_attn.cute`); it is optional. It is up to twice as
fast on long parts and slower on short ones, so the length of the parts chooses: see `SHORTEST`.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import torch

# causal? -> mean tokens of a part from which flash-attn-4 is the faster one on an H200: benchmarks/speed/attention.py
SHORTEST = {True: 512, False: 128}
CAPABILITIES = (9, 10)  # major compute capabilities that it has kernels for, forward and backward


def why_not() -> str | None:
    """Why flash-attn-4 is not used at all, in one line; None if it is."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        return f"flash-attn-4 has no kernels for compute capability {major}.{minor}"
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError as error:
        return f"flash-attn-4 is not there ({error})"
    return None


@functools.cache
def flash_attention_4() -> Callable | None:
    """`flash_attn_varlen_func` of the package; None where `why_not` has a reason."""
    if why_not():
        return None
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def kernel_names() -> str:
    """What computes attention on this machine, for the log."""
    others = f"FlashAttention-2 of torch {torch.__version__}"
    reason = why_not()
    if reason:
        return f"{others}; {reason}"
    version = importlib.metadata.version("flash-attn-4")
    return f"flash-attn-4 {version} for samples of {SHORTEST[True]} tokens and more, on average; otherwise {others}"


def prefers_flash_attention_4(tokens: int, parts: int, causal: bool) -> bool:
    """Whether a sequence of so many tokens in so many parts is computed faster by flash-attn-4."""
    return tokens >= SHORTEST[causal] * parts


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, causal: bool
) -> torch.Tensor:
    """Softmax attention within each part, scaled by width ** -0.5; no step waits for the device.

    Args:
        query: bfloat16 or float16 [L, heads, width].
        key: as query [L, key-value heads, width]; each serves heads / key-value heads of the query's.
        value: as key.
        starts: int32 [P + 1]. Where the parts start; the last one is L.
        longest: Tokens of the longest part.
        causal: Whether a token sees only those before it and itself.

    Returns:
        As query.
    """
    made_for_card = flash_attention_4()
    if made_for_card is not None and prefers_flash_attention_4(len(query), len(starts) - 1, causal):
        parts = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        output, _ = made_for_card(query, key, value, **parts, causal=causal)
        return output
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, causal, False
    )
    return output
