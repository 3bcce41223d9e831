"""The vision tower's attention. transformers (4.51) compares all tokens of a batch with each other and masks those of
other time steps. Here each step is computed alone.

The mask has N * N elements. With PyTorch 2.11 on an H200, values past its 2^32nd element were wrong, without an error
(docs/experiment_log.md, 2026-11-30, "all tokens answered wrongly in large batches").

Letters used for shapes:

    N E    vision tokens of all media of a batch, width of the tower
    n L    time steps of equal length that follow each other, tokens of one
    H D    heads, width of a head
"""

from itertools import groupby
from types import MethodType

import torch
from torch.nn import functional
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def attend_each_step_alone(tower: torch.nn.Module) -> None:
    """From now on `attend_within_steps` is the attention of a vision tower.

    tower: Of Qwen2-VL, or of Qwen2.5-VL.
    """
    for block in tower.blocks:
        block.attn.forward = MethodType(attend_within_steps, block.attn)


def attend_within_steps(
    attention: torch.nn.Module,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rotary_pos_emb: None = None,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """In place of the attention's own `forward`: [N, E] -> [N, E]. Up to rounding it gives the same.

    attention: Of a block of Qwen2-VL's tower, or of Qwen2.5-VL's.
    hidden: [N, E].
    cu_seqlens: int. Where time steps begin, or windows, and where the last one ends.
    rotary_pos_emb: Not used. transformers gives it as well.
    position_embeddings: Cosines and sines of each token, [N, D] twice.
    """
    query, key, value = attention.qkv(hidden).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(cu_seqlens.diff().tolist())]
    parts = zip(*(tensor.split([length * count for length, count in runs]) for tensor in (query, key, value)))
    seen = [_attend(*part, length) for part, (length, _) in zip(parts, runs)]
    return attention.proj(torch.cat(seen).flatten(1))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int) -> torch.Tensor:
    """Attention within steps of `length` tokens, [n * L, H, D] -> same."""
    steps = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(*steps).transpose(1, 2).flatten(0, 1)
