"""Tensors of Qwen2-VL between a Hugging Face directory and the Megatron model. megatron_layouts.py moves them into and
out of a model that several processes share.

Every parameter of the Megatron model is made from one tensor of the checkpoint, or from the three of Q, K and V, or
from gate and up. `RULES` says which; one rule serves both ways, so that export undoes import bit for bit.

    qkv     rows of query group g: its queries, its key, its value; heads are split over tensor-parallel processes
    gated   gate above up; each process has its rows of both
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dct_qwen2vl.checkpoints.hf_folder import copy_all_but_weights, give_name
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.common.files import unnamed

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
    first_layer = model.language_model.decoder.layers[0].layer_number - 1
    names = (name for name, _ in model.named_parameters() if ".adapter." not in name)
    return {name: source_of(name, hf_config, first_layer) for name in names}


def source_of(name: str, hf_config, first_layer: int = 0) -> Source:
    """What one parameter comes from.

    name: Of the parameter in the Megatron model.
    hf_config: transformers' Qwen2VLConfig.
    first_layer: Of the language model, in this pipeline stage.

    Raises KeyError where no rule knows it.
    """
    plain = name.replace(".to_wrap.", ".")  # a layer with an adapter
    for unfused, fused in UNFUSED_NORMS.items():
        plain = plain.replace(unfused, fused)
    vision = plain.startswith("vision_model.")
    layer = re.search(r"\.layers\.(\d+)\.", plain)
    pattern = plain.replace(layer[0], ".layers.{}.") if layer else plain
    rule = next((rule for rule in RULES if rule.target == pattern), None)
    if rule is None:
        raise KeyError(f"no rule for the parameter {name}")
    number = int(layer[1]) + (0 if vision else first_layer) if layer else 0
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
    """A parameter of the Megatron model, or one process's part of it.

    source: What it is made from.
    tensors: The checkpoint's.
    rank: Of the process, among those that are tensor-parallel.
    size: How many these are.
    """
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


def hf_tensors(source: Source, parts: list[torch.Tensor], hf_config) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of the checkpoint's tensors that a parameter holds, on the CPU.

    source: What the parameter is made from.
    parts: Its parts of all tensor-parallel processes, in their order.
    hf_config: transformers' Qwen2VLConfig.
    """
    patch = hf_config.vision_config
    for name, tensor in zip(source.names, from_megatron(source, parts)):
        if source.kind == "patch":
            tensor = tensor.unflatten(
                1, (patch.in_channels, patch.temporal_patch_size, patch.patch_size, patch.patch_size)
            )
        yield name, tensor.to("cpu", copy=True).contiguous()


def from_megatron(source: Source, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The checkpoint's tensors from the parts of all tensor-parallel processes; undoes `to_megatron`. A patch
    embedding comes as a matrix [E, K].

    source: What the parameter is made from.
    parts: Its parts of all tensor-parallel processes, in their order.
    """
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


def write_hf(
    tensors: dict[str, torch.Tensor],
    model_dir: Path,
    output_dir: Path,
    edit: Callable[[Path], None] | None = None,
) -> None:
    """Writes a complete Hugging Face directory, or nothing. Not collective.

    tensors: The checkpoint's tensors, all of them, for one safetensors file.
    model_dir: Hugging Face directory. All files but the weights are copied from it.
    output_dir: The directory to write.
    edit: Called with the folder before it gets its name.
    """
    temporary = unnamed(output_dir)
    copy_all_but_weights(model_dir, temporary)
    write_tensors(tensors, temporary, 0, 1)
    complete(temporary, output_dir, edit)


def rehearse_hf(model_dir: Path, output_dir: Path, edit: Callable[[Path], None] | None = None) -> None:
    """As `write_hf`, but with one weight, as `model_dir` has it.

    model_dir: As in `write_hf`.
    output_dir: As in `write_hf`.
    edit: As in `write_hf`.
    """
    write_hf({PATCH_EMBEDDING: open_tensors(model_dir)(PATCH_EMBEDDING)}, model_dir, output_dir, edit)


def write_tensors(tensors: dict[str, torch.Tensor], folder: Path, stage: int, stages: int) -> None:
    """Writes the safetensors file of a pipeline stage, and what `complete` makes the index from.

    tensors: By their names in the checkpoint.
    folder: Where the file goes.
    stage: Number of the pipeline stage, from 0.
    stages: How many there are.
    """
    file = f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    (folder / f".{file}.json").write_text(json.dumps(sizes))


def complete(temporary: Path, output_dir: Path, edit: Callable[[Path], None] | None) -> None:
    """Gives a Hugging Face directory its index and its name.

    temporary: The directory, without an index.
    output_dir: Its name. What is there is replaced.
    edit: Called with the folder before it gets its name.
    """
    write_index(temporary)
    if edit:
        edit(temporary)
    give_name(temporary, output_dir)


def write_index(folder: Path) -> None:
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
