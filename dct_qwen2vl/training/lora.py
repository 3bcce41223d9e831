"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the language model's blocks, by NeMo's own layers.

    y = W x + alpha / R * B A x      W [out, in] is frozen, A [R, in] begins random, B [out, R] as zeros

So step 0 is the model without adapters. Megatron's fused layers (Q, K and V; gate and up) have one A for their parts.
"""

import math
import zlib
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from nemo.collections.llm.peft.lora import LoRALinear, patch_linear_module
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear

from dct_qwen2vl.training.config import TrainingConfig

HF_LAYERS = tuple(f".{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
MEGATRON_LAYERS = {"self_attention": ("linear_qkv", "linear_proj"), "mlp": ("linear_fc1", "linear_fc2")}


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
    whole."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)


# The Hugging Face model. Adapters are `lora_a` and `lora_b` inside the layer, whose own names stay.


def adapt_hf(model: torch.nn.Module, lora: LoRA) -> None:
    """Puts adapters into a Qwen2VLForConditionalGeneration.

    model: Changed in place.
    lora: Rank, scale and seed of the adapters.
    """
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


# The Megatron model. An adapted layer is `to_wrap`, beside it stands `adapter`; both are split as the layer is.


class AdaptedLinear(LoRALinear):
    """NeMo's, which gives the state of the layer within under the layer's own names; here it can also be loaded so."""

    def _load_from_state_dict(self, state_dict, prefix: str, *arguments) -> None:
        own = [name for name in state_dict if name.startswith(prefix) and not name.startswith(f"{prefix}adapter.")]
        for name in own:
            state_dict[f"{prefix}to_wrap.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def adapt_megatron(model: torch.nn.Module, lora: LoRA) -> None:
    """Puts adapters into this process's part of a `PackedQwen2VL`.

    model: Changed in place.
    lora: Rank, scale and seed of the adapters.
    """
    for block in model.language_model.decoder.layers:
        for part, names in MEGATRON_LAYERS.items():
            module = getattr(block, part)
            for name in names:
                initial = f"layer {block.layer_number} {name}"
                setattr(module, name, _adapted(getattr(module, name), name, initial, lora))


def _adapted(linear: torch.nn.Module, name: str, initial: str, lora: LoRA) -> AdaptedLinear:
    """NeMo's `LoRA.transform` for one layer; that one needs TransformerEngine for every layer."""
    input_is_parallel, width, out_width, no_sequence_parallel, is_parallel = get_adapter_attributes_from_linear(linear)
    adapter = ParallelLinearAdapter(
        width,
        out_width,
        lora.rank,
        base_linear_name=name,
        activation="identity",
        input_is_parallel=input_is_parallel,
        model_parallel_config=linear.config,
        alpha=lora.alpha,
        disable_sequence_parallel_comm=no_sequence_parallel,
        base_linear_is_parallel=is_parallel,
    )
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    a = lora.initial(initial, width).chunk(size, dim=1 if input_is_parallel else 0)[rank]
    adapter.linear_in.weight.data.copy_(a)
    return AdaptedLinear(linear, adapter)


def merged_megatron(model: torch.nn.Module, name: str) -> torch.Tensor:
    """This process's part of a parameter, with the adapter of its layer added. Collective over tensor-parallel
    processes.

    model: `PackedQwen2VL` with adapters.
    name: Of the parameter. One without an adapter is returned as it is.
    """
    weight = model.get_parameter(name).detach()
    if not name.endswith(".to_wrap.weight"):
        return weight
    adapter = model.get_submodule(name.replace(".to_wrap.weight", ".adapter"))
    a, b = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    if adapter.input_is_parallel:  # the layer holds some columns of W, A the same columns, B some rows
        b = _whole(b)
    else:
        a = _whole(a)
    return merge(weight, a, b, adapter.alpha / adapter.dim)


def _whole(part: torch.Tensor) -> torch.Tensor:
    """The rows of all tensor-parallel processes."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts)
