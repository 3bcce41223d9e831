"""Weights of Qwen2-VL between a Hugging Face directory and the Megatron model, under any tensor and pipeline layout.

Every parameter of the Megatron model is made from one tensor of the checkpoint, or from the three of Q, K and V, or
from gate and up. `RULES` says which; one rule serves both ways, so that export undoes import bit for bit.

    qkv     rows of query group g: its queries, its key, its value; heads are split over tensor-parallel processes
    gated   gate above up; each process has its rows of both
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from dct_qwen2vl.checkpoints.hf_folder import copy_all_but_weights, let_others_read
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.training.lora import merged_megatron

ROWS, COLUMNS, WHOLE = 0, 1, None  # the axis that tensor parallelism splits


@dataclass(frozen=True)
class Rule:
    """How a parameter of Megatron is made of a checkpoint's tensors.

    target: Pattern of the Megatron name. {} is the layer.
    sources: Patterns of the checkpoint's names.
    axis: Along which it is split under tensor parallelism: ROWS, COLUMNS or WHOLE.
    kind: "plain", "qkv", "fused_qkv" (one source holding Q, K, V), "gated" or "patch" (a Conv3d as a matrix).
    """

    target: str
    sources: tuple[str, ...]
    axis: int | None = WHOLE
    kind: str = "plain"


VISION, LANGUAGE = "vision_model.decoder.layers.{}.", "language_model.decoder.layers.{}."
BLOCK, LAYER = "visual.blocks.{}.", "model.layers.{}."


def _vision_rules() -> Iterator[Rule]:
    yield Rule("vision_model.conv1.weight", (PATCH_EMBEDDING,), kind="patch")
    for part in ("weight", "bias"):
        columns = COLUMNS if part == "weight" else WHOLE
        yield Rule(f"{VISION}self_attention.linear_qkv.layer_norm_{part}", (f"{BLOCK}norm1.{part}",))
        yield Rule(f"{VISION}self_attention.linear_qkv.{part}", (f"{BLOCK}attn.qkv.{part}",), ROWS, "fused_qkv")
        yield Rule(f"{VISION}self_attention.linear_proj.{part}", (f"{BLOCK}attn.proj.{part}",), columns)
        yield Rule(f"{VISION}mlp.linear_fc1.layer_norm_{part}", (f"{BLOCK}norm2.{part}",))
        yield Rule(f"{VISION}mlp.linear_fc1.{part}", (f"{BLOCK}mlp.fc1.{part}",), ROWS)
        yield Rule(f"{VISION}mlp.linear_fc2.{part}", (f"{BLOCK}mlp.fc2.{part}",), columns)
        yield Rule(f"vision_model.decoder.final_layernorm.{part}", (f"visual.merger.ln_q.{part}",))
        yield Rule(f"vision_projection.encoder.linear_fc1.{part}", (f"visual.merger.mlp.0.{part}",), ROWS)
        yield Rule(f"vision_projection.encoder.linear_fc2.{part}", (f"visual.merger.mlp.2.{part}",), columns)


def _language_rules() -> Iterator[Rule]:
    yield Rule("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS)
    for part in ("weight", "bias"):
        projections = tuple(f"{LAYER}self_attn.{name}_proj.{part}" for name in "qkv")
        yield Rule(f"{LANGUAGE}self_attention.linear_qkv.{part}", projections, ROWS, "qkv")
    yield Rule(f"{LANGUAGE}self_attention.linear_qkv.layer_norm_weight", (f"{LAYER}input_layernorm.weight",))
    yield Rule(f"{LANGUAGE}self_attention.linear_proj.weight", (f"{LAYER}self_attn.o_proj.weight",), COLUMNS)
    yield Rule(f"{LANGUAGE}mlp.linear_fc1.layer_norm_weight", (f"{LAYER}post_attention_layernorm.weight",))
    gate_and_up = (f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")
    yield Rule(f"{LANGUAGE}mlp.linear_fc1.weight", gate_and_up, ROWS, "gated")
    yield Rule(f"{LANGUAGE}mlp.linear_fc2.weight", (f"{LAYER}mlp.down_proj.weight",), COLUMNS)
    yield Rule("language_model.decoder.final_layernorm.weight", ("model.norm.weight",))
    yield Rule("language_model.output_layer.weight", ("lm_head.weight",), ROWS)


RULES = (*_vision_rules(), *_language_rules())
# Where layers are not TransformerEngine's, norms stand beside the linear layer that has them fused otherwise.
UNFUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Source:
    """What a parameter is made from: names of the checkpoint, and how."""

    names: tuple[str, ...]
    axis: int | None
    kind: str
    heads: int = 0
    groups: int = 0


def sources_of(model, hf_config) -> dict[str, Source]:
    """Where each parameter of this process's part of the model comes from. Adapters are left out.

    model: `PackedQwen2VL`. With tied embeddings, the output layer of a last pipeline stage is the embedding's copy.
    hf_config: transformers' Qwen2VLConfig.

    Raises KeyError for a parameter that no rule knows.
    """
    offsets = {
        "vision_model": 0,
        "language_model": model.language_model.decoder.layers[0].layer_number - 1,
    }
    names = (name for name, _ in model.named_parameters() if ".adapter." not in name)
    return {name: _source_of(name, offsets, hf_config) for name in names}


def _source_of(name: str, offsets: dict[str, int], hf_config) -> Source:
    plain = name.replace(".to_wrap.", ".")  # a layer with an adapter
    for unfused, fused in UNFUSED_NORMS.items():
        plain = plain.replace(unfused, fused)
    vision = plain.startswith("vision_model.")
    layer = re.search(r"\.layers\.(\d+)\.", plain)
    pattern = plain.replace(layer[0], ".layers.{}.") if layer else plain
    rule = next((rule for rule in RULES if rule.target == pattern), None)
    if rule is None:
        raise KeyError(f"no rule for the parameter {name}")
    number = int(layer[1]) + offsets[plain.split(".")[0]] if layer else 0
    names = tuple(source.format(number) for source in rule.sources)
    if names == ("lm_head.weight",) and hf_config.tie_word_embeddings:
        names = ("model.embed_tokens.weight",)
    if vision:
        heads = groups = hf_config.vision_config.num_heads
    else:
        heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    return Source(names, rule.axis, rule.kind, heads, groups)


# Import


def to_megatron(source: Source, tensors: list[torch.Tensor], rank: int = 0, size: int = 1) -> torch.Tensor:
    """The parameter, or process `rank`'s part of `size` of it, from the checkpoint's tensors."""
    if source.kind == "gated":
        return torch.cat([_part(tensor, ROWS, rank, size) for tensor in tensors])
    if source.kind == "patch":
        return tensors[0].flatten(1)
    if source.kind == "plain":
        return _part(tensors[0], source.axis, rank, size)
    query, key, value = tensors[0].chunk(3) if source.kind == "fused_qkv" else tensors
    width = query.shape[0] // source.heads
    grouped = [tensor.unflatten(0, (source.groups, -1, width)) for tensor in (query, key, value)]
    return _part(torch.cat(grouped, dim=1).flatten(0, 2), ROWS, rank, size)


def _part(tensor: torch.Tensor, axis: int | None, rank: int, size: int) -> torch.Tensor:
    return tensor if axis is None else tensor.chunk(size, axis)[rank]


def load_hf(model, hf_config, model_dir: Path) -> None:
    """Fills this process's part of the model, in its data type.

    model: `PackedQwen2VL`.
    hf_config: transformers' Qwen2VLConfig.
    model_dir: Hugging Face directory.

    Raises KeyError for a missing tensor, and ValueError for a tensor of another shape.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    read = open_tensors(model_dir)
    sources = sources_of(model, hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = sources[name]
            value = to_megatron(source, [read(part) for part in source.names], rank, size)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{model_dir}: {', '.join(source.names)} makes {tuple(value.shape)}, the model has "
                    f"{tuple(parameter.shape)} for {name}: is config.json of these weights?"
                )
            parameter.copy_(value)


def open_tensors(model_dir: Path) -> Callable[[str], torch.Tensor]:
    """read(name) of the safetensors files of a directory. Raises FileNotFoundError where there is none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {model_dir}")
    opened = [safe_open(file, framework="pt") for file in files]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no iterator)

    def read(name: str) -> torch.Tensor:
        if name not in where:
            raise KeyError(f"{model_dir} has no tensor {name}")
        return where[name].get_tensor(name)

    return read


# Export


def from_megatron(source: Source, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The checkpoint's tensors from the parts of all tensor-parallel processes; undoes `to_megatron`. A patch
    embedding comes as a matrix [E, K]."""
    if source.kind == "gated":
        halves = [part.chunk(2) for part in parts]
        return [torch.cat([half[number] for half in halves]) for number in (0, 1)]
    whole = parts[0] if source.axis is None or len(parts) == 1 else torch.cat(parts, source.axis)
    if source.kind in ("plain", "patch"):
        return [whole]
    per_group = source.heads // source.groups
    width = whole.shape[0] // (source.groups * (per_group + 2))
    grouped = whole.unflatten(0, (source.groups, per_group + 2, width))
    tensors = [piece.flatten(0, 2) for piece in grouped.split([per_group, 1, 1], dim=1)]
    return [torch.cat(tensors)] if source.kind == "fused_qkv" else tensors


def gather_hf(model, hf_config) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of this process's pipeline stage, adapters merged, on the CPU. Collective over
    tensor-parallel processes; {} on all but the first of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    patch = hf_config.vision_config
    tensors: dict[str, torch.Tensor] = {}
    for name, source in sources_of(model, hf_config).items():
        value = merged_megatron(model, name)
        parts = [value]
        if size > 1 and source.axis is not None:
            parts = [torch.empty_like(value) for _ in range(size)]
            torch.distributed.all_gather(parts, value.contiguous(), group=group)
        if rank:
            continue
        for hf_name, tensor in zip(source.names, from_megatron(source, parts)):
            if source.kind == "patch":
                tensor = tensor.unflatten(
                    1, (patch.in_channels, patch.temporal_patch_size, patch.patch_size, patch.patch_size)
                )
            tensors[hf_name] = tensor.to("cpu", copy=True).contiguous()
    return tensors


def save_hf(model, hf_config, model_dir: Path, output_dir: Path, edit: Callable[[Path], None] | None = None) -> None:
    """Writes a complete Hugging Face directory, or nothing. Collective over all processes.

    model: `PackedQwen2VL`.
    hf_config: transformers' Qwen2VLConfig.
    model_dir: Hugging Face directory. All files but the weights are copied from it.
    output_dir: The directory to write. One safetensors file for each pipeline stage.
    edit: Called with the folder before it gets its name.
    """
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    first = torch.distributed.get_rank() == 0
    if first:
        copy_all_but_weights(model_dir, temporary)
    torch.distributed.barrier()
    tensors = gather_hf(model, hf_config)
    if tensors and parallel_state.get_data_parallel_rank() == 0:
        if stage and hf_config.tie_word_embeddings:
            tensors.pop("model.embed_tokens.weight", None)  # the first stage's, which is the same
        _write_tensors(tensors, temporary, stage, stages)
    torch.distributed.barrier()
    if first:
        _complete(temporary, output_dir, edit)
    torch.distributed.barrier()


def rehearse_hf(model_dir: Path, output_dir: Path, edit: Callable[[Path], None] | None = None) -> None:
    """As `save_hf`, but with one weight, as `model_dir` has it. Not collective.

    model_dir: As in `save_hf`.
    output_dir: As in `save_hf`.
    edit: As in `save_hf`.
    """
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    copy_all_but_weights(model_dir, temporary)
    _write_tensors({PATCH_EMBEDDING: open_tensors(model_dir)(PATCH_EMBEDDING)}, temporary, 0, 1)
    _complete(temporary, output_dir, edit)


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path, stage: int, stages: int) -> None:
    file = f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    (folder / f".{file}.json").write_text(json.dumps(sizes))


def _complete(temporary: Path, output_dir: Path, edit: Callable[[Path], None] | None) -> None:
    """The folder gets its index and its name."""
    _write_index(temporary)
    let_others_read(temporary)
    if edit:
        edit(temporary)
    shutil.rmtree(output_dir, ignore_errors=True)
    temporary.replace(output_dir)


def _write_index(folder: Path) -> None:
    """model.safetensors.index.json of several files; a single one gets the name model.safetensors."""
    listings = sorted(folder.glob(".model-*.json"))
    sizes, where = {}, {}
    for listing in listings:
        its_sizes = json.loads(listing.read_text())
        sizes.update(its_sizes)
        where.update(dict.fromkeys(its_sizes, listing.name[1 : -len(".json")]))
        listing.unlink()
    if len(listings) == 1:
        (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
