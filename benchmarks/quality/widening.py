"""Widens a trained vision tower: at first the wider one computes the same (Net2Net, Chen et al. 2016, arXiv:1511.05641;
bert2BERT, Chen et al. 2022, arXiv:2110.07143).

All features become `times` copies, heads among them, so norms and attention see what they saw. A matrix over copies has
weights W / times + D for each copy. D is drawn, and its sum over the copies of a feature is zero: the outputs stay, but
each copy gets a gradient of its own, so the copies grow apart.

Letters used for shapes: E width of the narrower tower, m times.
"""

import torch

from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.common.scripts import UserError

TOWER = "visual."
MERGED = 4  # tokens side by side in the merger's input
PARTS_OUT = {"attn.qkv.weight": 3, "attn.qkv.bias": 3}  # queries, keys, values: each is copied by itself
PARTS_IN = {"merger.mlp.0.weight": MERGED}
KEPT_OUT = ("merger.mlp.2.weight", "merger.mlp.2.bias")  # the language model's width


def widened_tower(state: dict[str, torch.Tensor], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a model with a wider vision tower that computes the same.

    state: {name: tensor} of a whole model, its patch embedding [E, K, 1, 1, 1].
    width: m * E, of the wider tower. E gives `state` back.
    seed: Of what is drawn.
    Raises UserError if `width` is no multiple of E.
    """
    narrow = len(state[PATCH_EMBEDDING])
    if width % narrow:
        raise UserError(f"a tower {narrow} wide cannot become {width} wide: choose a multiple of {narrow} as --vision")
    if width == narrow:
        return state
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _widened(name, value, width // narrow, generator) if name.startswith(TOWER) else value
        for name, value in state.items()
    }


def _widened(name: str, value: torch.Tensor, times: int, generator: torch.Generator) -> torch.Tensor:
    """One tensor of the tower: outputs along dimension 0, inputs along dimension 1."""
    if not name.endswith(KEPT_OUT):
        value = _copied(value, times, 0, _parts(name, PARTS_OUT))
    if value.ndim != 2:  # gains, biases, and the patch embedding, whose inputs are a token's numbers
        return value
    parts = _parts(name, PARTS_IN)
    return _copied(value, times, 1, parts) / times + _apart(value, times, parts, generator)


def _parts(name: str, parts: dict[str, int]) -> int:
    return next((number for ending, number in parts.items() if name.endswith(ending)), 1)


def _copied(value: torch.Tensor, times: int, dimension: int, parts: int) -> torch.Tensor:
    """Each of the `parts` along a dimension `times` times, copies side by side."""
    split = value.unflatten(dimension, (parts, 1, -1))
    return split.repeat_interleave(times, dim=dimension + 1).flatten(dimension, dimension + 2)


def _apart(value: torch.Tensor, times: int, parts: int, generator: torch.Generator) -> torch.Tensor:
    """What tells copies apart: as large as a drawn matrix of the wider tower, its sum over the copies of an input zero.

    value: float [outputs of the wider tower, inputs of the narrower]. Returns float [outputs, m * inputs].
    """
    outputs, inputs = value.shape
    drawn = torch.randn(outputs, parts, times, inputs // parts, generator=generator).to(value)
    drawn -= drawn.mean(dim=2, keepdim=True)
    return drawn.flatten(1) * (times * inputs) ** -0.5
