"""The tensors of a checkpoint by their headers: where they lie, how other tools name them, what they are called here.

Names are those of transformers 4.51: `visual.…`, `model.…` and `lm_head.weight`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import (
    INDEX,
    CheckpointError,
    is_lfs_pointer,
    open_tensors,
    read_json,
    safetensors_files,
    whole_shards,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of what is trained
# Modules that wrap others: DDP, torch.compile, FSDP, activation checkpoints, DeepSpeed.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# The tails of all tensors of Qwen2-VL and Qwen2.5-VL, after what newer transformers put in front.
TAILS = (
    (re.compile(r"(.*?)(?:model\.)?(visual\.(?:patch_embed|blocks|merger|rotary_pos_emb)\..+)"), ""),
    (
        re.compile(
            r"(.*?)(?:model\.)?(?:language_model\.)?(?:model\.)?"
            r"(layers\.\d+\..+|embed_tokens\.weight|norm\.weight|rotary_emb\.inv_freq)"
        ),
        "model.",
    ),
    (re.compile(r"(.*?)(?:model\.)?(?:language_model\.)?(lm_head\.weight)"), ""),
)
COMPUTED = re.compile(r".*rotary(_pos)?_emb\.inv_freq")  # older versions saved them; config.json has what they need
ADAPTERS = re.compile(r".*(\.lora_|\.base_layer\.|\.modules_to_save\.|\.original_module\.|\.lora_magnitude).*")
QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|scales|SCB|weight_packed|weight_scale|weight_scale_inv|weight_format"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))"
)
SEEN = 3  # names in a message


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it.

    file, name: where it lies.
    shape: as the header has it.
    dtype: safetensors' name of it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def source_files(model_dir: Path) -> tuple[list[Path], list[str]]:
    """The weight files of any tool's directory and what is to be said of them. Raises CheckpointError."""
    try:
        return safetensors_files(model_dir), []
    except CheckpointError:
        index = (model_dir / INDEX).is_file()
        if index and not isinstance(read_json(model_dir / INDEX).get("weight_map"), dict):
            raise
        shards, others = whole_shards(model_dir), lone_file(model_dir)
        if shards:
            why = "names files that are not there" if index else "is missing"
            return shards, [f"{INDEX} {why}: the tensors of all {len(shards)} shards are read from their headers"]
        if index or not others:
            raise
        return others, [f"the weights are in {others[0].name}, not in model.safetensors: that file is read"]


def lone_file(model_dir: Path) -> list[Path]:
    """The only safetensors file, whatever its name, unless it is a part of something; else []."""
    files = [path for path in model_dir.glob("*.safetensors") if path.is_file()]
    whole = [path for path in files if not path.name.startswith("adapter_") and "-of-" not in path.name]
    return whole if len(files) == 1 else []


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Every tensor by its name. Raises CheckpointError, also for one that stands in two files."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensors in open_tensors([file], "np"):
            if name in found:
                raise CheckpointError(f"{name} is in {found[name].file.name} and in {file.name} of {file.parent}: "
                                      "remove the files of another save")  # fmt: skip
            view = tensors.get_slice(name)
            found[name] = Stored(file, name, tuple(view.get_shape()), str(view.get_dtype()))
    return found


def with_model_names(model_dir: Path, stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors under the names that the model has for them, without computed buffers, and lines for the user.

    model_dir: Hugging Face directory, named in the message.
    stored: Tensors by their names in the files.

    Raises CheckpointError for tensors of several models.
    """
    named: dict[str, Stored] = {}
    prefixes = defaultdict(list)
    for name, tensor in stored.items():
        if COMPUTED.fullmatch(name):
            continue
        prefix, own = model_name(name)
        prefixes[prefix].append(name)
        if own in named:
            raise CheckpointError(f"{model_dir} holds {own} twice, as {named[own].name} and as {name}: keep the "
                                  "tensors of one model")  # fmt: skip
        named[own] = tensor
    known = {prefix: names for prefix, names in prefixes.items() if prefix is not None}
    if len(known) > 1:
        several = " and ".join(names[0] for names in list(known.values())[:SEEN])
        raise CheckpointError(f"{model_dir} holds tensors of several models, such as {several}: keep those of one")
    return named, _renaming(named)


def model_name(name: str) -> tuple[str | None, str]:
    """What another tool put in front of a tensor's name, and the name without it; (None, name) for no tensor of the
    model."""
    plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for pattern, front in TAILS:
        found = pattern.fullmatch(plain)
        if found:
            parts = [part for part in found[1].split(".") if part]
            while parts and parts[-1] == "model":
                parts.pop()
            return ".".join(parts), front + found[2]
    return None, name


def _renaming(named: Mapping[str, Stored]) -> list[str]:
    changed = [(tensor.name, own) for own, tensor in named.items() if tensor.name != own]
    if not changed:
        return []
    return [f"{len(changed)} tensors get the names of transformers 4.51: {changed[0][0]} is {changed[0][1]}"]


def check_index(model_dir: Path, stored: Mapping[str, Stored]) -> None:
    """Checks that an index that is read names the tensors that the files hold.

    model_dir: Hugging Face directory.
    stored: Tensors by their names in the files.

    Raises CheckpointError.
    """
    if (model_dir / "model.safetensors").is_file() or not (model_dir / INDEX).is_file():
        return
    named = read_json(model_dir / INDEX)["weight_map"]
    wrong = [name for name in stored if name not in named] + [name for name in named if name not in stored]
    if wrong:
        raise CheckpointError(f"{model_dir / INDEX} names other tensors than the shards hold ({some(wrong)}): get the "
                              "file again")  # fmt: skip


def quantisation(config: Mapping[str, Any]) -> str | None:
    """What config.json says the weights are quantised by; None where it says nothing."""
    said = config.get("quantization_config")
    if said is None:
        return None
    return str(said.get("quant_method", "quantised")) if isinstance(said, dict) else "quantised"


def check_trainable(model_dir: Path, stored: Mapping[str, Stored], method: str | None = None) -> None:
    """Checks that the tensors of a checkpoint can be trained.

    model_dir: Hugging Face directory, named in the message.
    stored: Tensors by their names in the files.
    method: How config.json says that they are quantised. None: it does not say so.

    Raises CheckpointError.
    """
    adapters = [name for name in stored if ADAPTERS.fullmatch(name)]
    if adapters:
        raise CheckpointError(f"{model_dir} holds adapters that are not merged, such as {adapters[0]}: "
                              "merge_and_unload() the model of PEFT, save it, and convert that")  # fmt: skip
    quantised = [name for name, tensor in stored.items() if QUANTISED.fullmatch(name) or tensor.dtype not in FLOATS]
    if quantised:
        kind = f"{method or 'quantised'}, {quantised[0]} is {stored[quantised[0]].dtype}"
        raise CheckpointError(f"{model_dir} holds quantised weights ({kind}): give --model-dir the model in 16 or 32 "
                              "bit that it was made from")  # fmt: skip


def missing_and_left(
    expected: Mapping[str, tuple[int, ...]], named: Mapping[str, Stored], tied: bool
) -> tuple[list[str], list[str], list[str]]:
    """Names of tensors that a model lacks, names that it has no place for, and names of another shape.

    expected: Shapes of the model's tensors.
    named: The checkpoint's tensors, by the names that the model has for them.
    tied: Whether lm_head.weight may be missing.
    """
    optional = {HEAD} if tied else set()
    lacking = [name for name in expected if name not in named and name not in optional]
    left = [name for name in named if name not in expected and name not in optional]
    shapes = [name for name, tensor in named.items() if name in expected and tensor.shape != expected[name]]
    return lacking, left, shapes


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    names = list(names)
    more = f" and {len(names) - SEEN} more" if len(names) > SEEN else ""
    return ", ".join(names[:SEEN]) + more


def check_no_pointers(model_dir: Path) -> None:
    """Raises CheckpointError where git has left the addresses of files in place of the files."""
    pointers = [path.name for path in sorted(model_dir.iterdir()) if path.is_file() and is_lfs_pointer(path)]
    if pointers:
        raise CheckpointError(f"{model_dir} holds git-lfs pointers in place of {some(pointers)}: git -C {model_dir} "
                              "lfs pull")  # fmt: skip
