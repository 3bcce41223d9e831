"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the language model's blocks, by NeMo's own layers.

    y = W x + alpha / R * B A x      W [out, in] is frozen, A [R, in] begins random, B [out, R] as zeros

So step 0 is the model without adapters. Megatron's fused layers (Q, K and V; gate and up) have one A for their parts.
"""

import math
import zlib
from typing import NamedTuple

import torch

from dct_qwen2vl.training.config import TrainingConfig

HF_LAYERS = tuple(f".{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


class LoRA(NamedTuple):
    """The adapters of a run (arXiv 2106.09685).

    rank: R.
    alpha: What the adapters add is multiplied by alpha / rank.
    seed: Of every A.
    """

    rank: int
    alpha: int
    seed: int

    @classmethod
    def of(cls, config: TrainingConfig) -> "LoRA | None":
        """As the command line has it; None where all weights are trained."""
        return cls(config.lora_rank, config.lora_alpha, config.seed) if config.lora_rank else None

    def initial(self, layer: str, width: int) -> torch.Tensor:
        """A of a layer, float32 [R, width], uniform within 1 / sqrt(width) as in the paper's own code. The same on
        every process and under every layout."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {layer}".encode()))
        return torch.empty(self.rank, width).uniform_(-1, 1, generator=generator) / math.sqrt(width)


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B A, in the data type of W. Summed in float64, so that any part of W comes out as it does in the
    whole.

    weight: W [out, in].
    a: A [R, in].
    b: B [out, R].
    scale: alpha / R.
    """
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)


# The Hugging Face model. Adapters are `lora_a` and `lora_b` inside the layer, whose own names stay.


def adapt_hf(model: torch.nn.Module, lora: LoRA) -> None:
    """Puts adapters into a Qwen2VLForConditionalGeneration.

    model: Changed in place.
    lora: Rank, scale and seed of the adapters.
    """
    from nemo.collections.llm.peft.lora import patch_linear_module

    for name, layer in list(model.named_modules()):
        if name.startswith("model.layers.") and name.endswith(HF_LAYERS):
            patch_linear_module(layer, lora.rank, lora.alpha)
            layer.lora_a.weight.data.copy_(lora.initial(name, layer.in_features))


def adapters_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters among the weights of `adapt_hf`'s model; {} where it has none."""
    return {name: tensor for name, tensor in state.items() if ".lora_a." in name or ".lora_b." in name}


def adapted_weights(adapters: dict[str, torch.Tensor]) -> list[str]:
    """Names of the frozen weights that the adapters belong to."""
    return [name.replace(".lora_a.", ".") for name in adapters if ".lora_a." in name]


def merged_hf(state: dict[str, torch.Tensor], lora: LoRA | None) -> dict[str, torch.Tensor]:
    """The weights of the plain model that computes the same as a model with adapters.

    state: Weights of a model that `adapt_hf` has changed.
    lora: Rank, scale and seed of the adapters. None: there are none.
    """
    adapters = adapters_of(state)
    plain = {name: tensor for name, tensor in state.items() if name not in adapters}
    for name in adapted_weights(adapters):
        layer = name.removesuffix(".weight")
        a, b = adapters[f"{layer}.lora_a.weight"], adapters[f"{layer}.lora_b.weight"]
        plain[name] = merge(plain[name], a, b, lora.alpha / lora.rank)
    return plain
