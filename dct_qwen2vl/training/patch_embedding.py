"""The vision tower's patch embedding as one matrix product.

Letters used for shapes: N K E  vision tokens, numbers of one token, width of the tower.
"""

import torch
from torch.nn import functional

GRAIN = 8  # numbers. In bf16, GPUs have fast kernels for multiples of it; `x4` has 1,764.


def embed_tokens(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """-> [N, E]. On a GPU with zeros up to the next multiple of GRAIN numbers.

    tokens: [N, K].
    weight: [E, K], of the same type.
    """
    return product_with_zeros(tokens, weight) if tokens.is_cuda else functional.linear(tokens, weight)


def product_with_zeros(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of both with zeros behind their numbers. They add nothing, and have no gradient.

    tokens: [N, K].
    weight: [E, K], of the same type.
    """
    missing = -weight.shape[1] % GRAIN
    if missing:
        tokens, weight = (functional.pad(tensor, (0, missing)) for tensor in (tokens, weight))
    return functional.linear(tokens, weight)


class PatchEmbedding(torch.nn.Linear):
    """`embed_tokens` as a module: Megatron's DDP fetches weights when their own module is called."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, K] of any type -> [N, E]."""
        return embed_tokens(tokens.to(self.weight.dtype), self.weight)
