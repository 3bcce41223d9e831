"""Megatron-core's model on the CPU: plain layers and a reference attention in place of TransformerEngine's."""

from itertools import pairwise

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional

from dct_qwen2vl.training.megatron_model import Layers, PackedAttention, VisionMLP


class ReferenceAttention(torch.nn.Module):
    """torch's attention, one packed sequence after the other."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **unused) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None, **unused):
        """[L, heads, width] each -> [L, heads * width]."""
        starts = packed_seq_params.cu_seqlens_q.tolist()
        pieces = []
        for start, stop in pairwise(starts):
            parts = [tensor[start:stop].transpose(0, 1) for tensor in (query, key, value)]
            pieces.append(
                functional.scaled_dot_product_attention(*parts, is_causal=self.causal, enable_gqa=True).transpose(0, 1)
            )
        return torch.cat(pieces).flatten(1)


def plain_layers() -> Layers:
    """Stands in for `megatron_model.transformer_engine_layers`."""
    return Layers(plain_layer(True), plain_layer(False), get_mlp_module_spec(use_te=False).submodules)


def plain_layer(is_vision: bool) -> ModuleSpec:
    mlp = get_mlp_module_spec(use_te=False)
    mlp.module = VisionMLP if is_vision else mlp.module
    mask = AttnMaskType.no_mask if is_vision else AttnMaskType.causal
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(
                module=PackedAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ReferenceAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


CPU_OPTIONS = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
}
