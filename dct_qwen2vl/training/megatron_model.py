"""Qwen2-VL on Megatron-core, on top of NeMo's `Qwen2VLConfig` and `MCoreQwen2VLModel`, for packed sequences.

What differs from NeMo 2.4.1's model: the patch embedding is a matrix product over tokens of any width; positions come
from the loader, so that no step waits for the device; both rotary embeddings are applied to all tokens of a sequence at
once; attention of the tower and of the language model stays within time steps and samples; and the vocabulary is
projected to at learned positions only. Weights and names of parameters are those of NeMo's model, but for the patch
embedding's shape.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.jit import jit_fuser
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections import llm
from nemo.collections.vlm import MultimodalProjectorConfig
from nemo.collections.vlm.layer_specs import get_layer_spec_te, get_mlp_module_spec
from nemo.collections.vlm.qwen2vl.model.base import MCoreQwen2VLModel, Qwen2VLConfig, Qwen2VLVisionConfig
from nemo.collections.vlm.qwen2vl.model.vision import Qwen2VisionModel

from dct_qwen2vl.data.packing import PackedBatch
from dct_qwen2vl.training.patch_embedding import PatchEmbedding

VISION_ROTARY_BASE = 10000.0  # fixed in Qwen2-VL's vision tower


@jit_fuser
def biased_quick_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y * sigmoid(1.702 y) of y = x + bias, the activation of Qwen2-VL's vision tower, as one kernel."""
    y = x + bias
    return y * torch.sigmoid(1.702 * y)


@jit_fuser
def biased_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The exact GELU of x + bias, of towers whose `hidden_act` is "gelu", as one kernel."""
    return torch.nn.functional.gelu(x + bias)


BIASED_ACTIVATIONS = {"quick_gelu": biased_quick_gelu, "gelu": biased_gelu}  # those of `checks.TOWER_ACTIVATIONS`


class VisionMLP(MLP):
    """Megatron-core's MLP with bias and activation of the vision tower in one kernel."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: None = None):
        hidden, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(BIASED_ACTIVATIONS[self.config.hidden_act](hidden, bias))


class PackedCoreAttention(torch.nn.Module):
    """Attention within each part of a packed sequence, by the FlashAttention-2 kernel that PyTorch carries.

    cuDNN's kernel for packed sequences, which TransformerEngine takes on Hopper, spent half of a training step in its
    backward pass on the empty part of a grid of (samples x tokens of the sequence). This one works on tokens alone.
    flash-attn-4 was tried: see benchmarks/speed/attention.py.
    """

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **unused) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(self, query, key, value, attention_mask=None, packed_seq_params=None, **unused) -> torch.Tensor:
        """[L, heads, width] each; key and value may have fewer heads. -> [L, heads * width]."""
        starts, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        output, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, longest, longest, 0.0, self.causal, False
        )
        return output.flatten(1)


def mrope_frequencies(position_ids: torch.Tensor, head_width: int, base: float, sections: list[int]) -> torch.Tensor:
    """Angles of Qwen2-VL's M-RoPE: position_ids int64 [3, L] -> float32 [L, 1, 1, head_width].

    The first sections[0] of the head_width / 2 frequencies turn with time, the next sections[1] with the row, the last
    sections[2] with the column (arXiv 2409.12191, section 2.1).
    """
    device = position_ids.device
    steps = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    angles = position_ids[:, :, None].float() * base ** (-steps / head_width)
    half = torch.cat([part[axis] for axis, part in enumerate(angles.split(sections, dim=-1))], dim=-1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def vision_frequencies(token_positions: torch.Tensor, head_width: int) -> torch.Tensor:
    """Angles of the tower's rotary embedding: int64 [N, 2] (row, column) -> float32 [N, 1, 1, head_width]."""
    steps = torch.arange(0, head_width // 2, 2, dtype=torch.float32, device=token_positions.device)
    angles = token_positions[:, :, None].float() * VISION_ROTARY_BASE ** (-steps / (head_width // 2))
    half = angles.flatten(1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [L, 1, heads, width] by angles [L, 1, 1, width]: one kernel of TransformerEngine on a GPU."""
    if x.is_cuda:
        return rope_utils.fused_apply_rotary_pos_emb(x, frequencies)
    return rope_utils._apply_rotary_pos_emb_bshd(x, frequencies)


class PackedAttention(SelfAttention):
    """Self-attention over a packed sequence with an angle for each token.

    Megatron-core takes the angles by a token's place in its sample and loops over the samples. Here they are applied
    to the sequence as a whole, before attention.
    """

    def forward(self, hidden_states, attention_mask, *arguments, rotary_pos_emb=None, **options):
        self._frequencies = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *arguments, rotary_pos_emb=None, **options)
        finally:
            self._frequencies = None

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None):
        query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states)
        return rotate(query, self._frequencies), rotate(key, self._frequencies), value


@dataclass(frozen=True)
class Layers:
    """Parts of the model: transformer layers with `PackedAttention`, and the projector's two linear layers."""

    vision: ModuleSpec
    language: ModuleSpec
    projector: MLPSubmodules


def transformer_engine_layers() -> Layers:
    """NeMo's layers for Qwen2-VL, with `PackedAttention`."""
    vision, language = get_layer_spec_te(is_vit=True), get_layer_spec_te(is_vit=False)
    for spec in (vision, language):
        spec.submodules.self_attention.module = PackedAttention
        spec.submodules.self_attention.submodules.core_attention = PackedCoreAttention
    vision.submodules.mlp.module = VisionMLP
    return Layers(vision, language, get_mlp_module_spec(use_te=True).submodules)


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Weight gradients are added to Megatron's fp32 buffer by the matrix product that makes them, wherever
    TransformerEngine has the layer. To be called before the model is wrapped in Megatron's DDP."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _packed(starts: torch.Tensor, longest: int) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class PackedVisionModel(Qwen2VisionModel):
    """The tower for tokens of any width; takes a packed sequence's tokens, positions and time steps from the loader."""

    def __init__(self, config: "PackedVisionConfig", spec: ModuleSpec) -> None:
        super().__init__(config, spec, spatial_merge_size=config.spatial_merge_size)
        self.conv1 = PatchEmbedding(config.token_width, config.hidden_size, bias=False, device=self.conv1.weight.device)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """-> [N / m^2, m^2 * hidden]."""
        hidden = self.conv1(batch.tokens)[:, None]
        frequencies = vision_frequencies(batch.token_positions, self.config.kv_channels)
        steps = _packed(batch.step_starts, batch.longest_step)
        hidden = self.decoder(hidden, None, rotary_pos_emb=frequencies, packed_seq_params=steps)
        return hidden.view(-1, self.merge_hidden_size)


@dataclass
class PackedVisionConfig(Qwen2VLVisionConfig):
    """token_width: floats of a vision token, K. hidden_act: as transformers names it."""

    token_width: int = 1176
    hidden_act: str = "quick_gelu"

    def configure_model(self) -> PackedVisionModel:
        return PackedVisionModel(self, self.transformer_layer_spec)


@dataclass
class PackedProjectionConfig(MultimodalProjectorConfig):
    """linear_layers: what the projector is built from."""

    linear_layers: MLPSubmodules | None = None

    def configure_model(self) -> MultimodalProjector:
        self.add_bias_linear = self.bias
        return MultimodalProjector(self, self.linear_layers, "mlp", self.input_size)


@dataclass
class PackedQwen2VLConfig(Qwen2VLConfig):
    """rope_sections: of M-RoPE, halves of a head's width."""

    rope_sections: list[int] = field(default_factory=lambda: [16, 24, 24])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language_transformer_config is not None:
            self.language_transformer_config.position_embedding_type = "none"  # the angles are given to the decoder
            self.language_transformer_config.mrope_section = None

    def configure_model(self, tokenizer=None, vp_stage: int | None = None) -> "PackedQwen2VL":
        language = self.language_transformer_config
        language.scatter_embedding_sequence_parallel = False
        for config in (language, self.vision_transformer_config, self.vision_projection_config):
            config.tensor_model_parallel_size = self.tensor_model_parallel_size
        language.pipeline_model_parallel_size = self.pipeline_model_parallel_size
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        return PackedQwen2VL(
            self, pre_process=first, post_process=last, add_encoder=first, add_decoder=True, vp_stage=vp_stage or 0
        )


@functools.cache
def fused_cross_entropy() -> Callable | None:
    """TransformerEngine's, made not to compare its upstream gradient with 1 on the host, which waits for the device.

    None where TransformerEngine is missing or older than the argument."""
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
    except ImportError:
        return None
    if "is_cg_capturable" not in inspect.signature(parallel_cross_entropy).parameters:
        return None
    return functools.partial(parallel_cross_entropy, is_cg_capturable=True)


def token_losses(language: LanguageModule, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits [T, 1, vocabulary], or this process's part of it, and targets int64 [T] -> loss of each, float32 [T]."""
    fused = fused_cross_entropy() if language.config.cross_entropy_loss_fusion else None
    if fused is None:
        return language.compute_language_model_loss(targets[None], logits)[0]
    group = parallel_state.get_tensor_model_parallel_group()
    return fused(logits, targets[:, None], 0.0, False, group)[:, 0]


class PackedQwen2VL(MCoreQwen2VLModel):
    """Qwen2-VL over one packed sequence. In a pipeline the first stage holds the vision tower and the embedding."""

    def forward(self, batch: PackedBatch, return_logits: bool = False) -> torch.Tensor:
        """The loss of each learned token, float32 [T].

        batch: A packed sequence.
        return_logits: Whether to return the logits [T, vocabulary] instead. Under tensor parallelism, this process's
            part.

        Pipeline stages before the last return hidden states [L, 1, hidden].
        """
        language = self.language_model
        hidden = language.decoder(
            hidden_states=self._embed(batch) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=mrope_frequencies(
                batch.position_ids,
                language.config.kv_channels,
                language.config.rotary_base,
                self.config.rope_sections,
            ),
            packed_seq_params=_packed(batch.sample_starts, batch.longest_sample),
        )
        if not self.post_process:
            return hidden
        tied = language.share_embeddings_and_output_weights
        weight = language.shared_embedding_or_output_weight() if tied else None
        logits, _ = language.output_layer(hidden.index_select(0, batch.learned), weight=weight)
        if return_logits:
            return logits[:, 0]
        return token_losses(language, logits, batch.targets)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        """-> [L, 1, hidden]: text embeddings, visual tokens in their places."""
        text = self.language_model.embedding(input_ids=batch.input_ids[None], position_ids=None)
        visual = self.vision_projection(self.vision_model(batch))
        count = len(batch.visual)
        placed = text.index_copy(0, batch.visual, visual[:count, None].to(text.dtype))
        hidden = placed + 0.0 * visual[count:].sum()  # a blank image changes nothing but has a gradient
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # recomputed layers pass gradients to adapters only if their input takes one
        return hidden


def model_config(
    hf_config,
    seq_length: int,
    dtype: torch.dtype = torch.bfloat16,
    layers: Layers | None = None,
    language: dict[str, Any] | None = None,
    **options: Any,
) -> PackedQwen2VLConfig:
    """NeMo's configuration of a model, from transformers'.

    hf_config: Qwen2VLConfig, of pixels or of DCT tokens.
    seq_length: Tokens of the longest sequence.
    dtype: Of the weights.
    layers: Classes of the layers. None: TransformerEngine's.
    language: Further fields of Megatron-core's TransformerConfig, for the language model alone.
    options: Further fields of Megatron-core's TransformerConfig, for all three parts.
    """
    layers = layers or transformer_engine_layers()
    numbers = {
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bias_dropout_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **options,
    }
    return PackedQwen2VLConfig(
        language_transformer_config=_language_config(
            hf_config, seq_length, layers.language, {**numbers, **(language or {})}
        ),
        vision_transformer_config=_vision_config(hf_config.vision_config, layers.vision, numbers),
        vision_projection_config=_projection_config(hf_config.vision_config, layers.projector, numbers),
        rope_sections=list(hf_config.rope_scaling["mrope_section"]),
        **numbers,
    )


def _language_config(hf_config, seq_length: int, spec: ModuleSpec, numbers: dict[str, Any]) -> llm.Qwen2Config:
    return llm.Qwen2Config(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=hf_config.hidden_size // hf_config.num_attention_heads,
        layernorm_epsilon=hf_config.rms_norm_eps,
        rotary_base=hf_config.rope_theta,
        vocab_size=hf_config.vocab_size,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        seq_length=seq_length,
        bias_activation_fusion=True,
        transformer_layer_spec=spec,
        **numbers,
    )


def _vision_config(vision, spec: ModuleSpec, numbers: dict[str, Any]) -> PackedVisionConfig:
    return PackedVisionConfig(
        token_width=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        num_layers=vision.depth,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        embed_dim=vision.embed_dim,
        hidden_size=vision.embed_dim,
        kv_channels=vision.embed_dim // vision.num_heads,
        ffn_hidden_size=int(vision.embed_dim * vision.mlp_ratio),
        spatial_merge_size=vision.spatial_merge_size,
        hidden_act=vision.hidden_act,
        transformer_layer_spec=spec,
        **numbers,
    )


def _projection_config(vision, layers: MLPSubmodules, numbers: dict[str, Any]) -> PackedProjectionConfig:
    merged = vision.embed_dim * vision.spatial_merge_size**2
    return PackedProjectionConfig(
        linear_layers=layers,
        input_size=merged,
        ffn_hidden_size=merged,
        hidden_size=vision.hidden_size,
        bias_activation_fusion=False,  # the fused one is the tanh approximation, Qwen2-VL has the exact GELU
        **numbers,
    )
