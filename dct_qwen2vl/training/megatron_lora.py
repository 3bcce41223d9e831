"""Adapters (lora.py) in the Megatron model. An adapted layer is `to_wrap`, beside it stands `adapter`; both are split
as the layer is."""

import torch
from megatron.core import parallel_state
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear

from dct_qwen2vl.training.lora import LoRA, merge

MEGATRON_LAYERS = {"self_attention": ("linear_qkv", "linear_proj"), "mlp": ("linear_fc1", "linear_fc2")}


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
