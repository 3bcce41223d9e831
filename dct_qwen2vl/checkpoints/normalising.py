"""What other versions and tools write into a checkpoint's small files, as transformers 4.51 reads it.

Each function changes what has one right reading and returns lines that say so. What has several is refused.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import (
    MODEL_TYPES,
    PARSED,
    PROCESSOR,
    QWEN2_VL_PATCH,
    SHARED,
    CheckpointError,
    patch_of,
    pixel_bounds_in,
    read_config,
    read_json,
    reads_pixel_patches,
)
from dct_qwen2vl.checkpoints.video_sampling import KEPT, VIDEO_PROCESSOR
from dct_qwen2vl.checkpoints.weights import EMBEDDING, HEAD, Stored
from dct_qwen2vl.common.files import write_json

TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("tie_word_embeddings", "rope_theta", "use_sliding_window", "sliding_window", "max_window_layers"),
    *("attention_dropout", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id", "vision_token_id"),
)
PARTS = ("text_config", "vision_config")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
BOUNDS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
NOT_OF_PROCESSOR = ("image_processor", "video_processor", "tokenizer", "auto_map", *(name for name, _ in BOUNDS))
JSON_FILES = ("config.json", PROCESSOR, SHARED, VIDEO_PROCESSOR)
TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def normal_config(
    config: dict[str, Any], tensors: Mapping[str, Stored], token_ids: Mapping[str, int]
) -> tuple[dict[str, Any], list[str]]:
    """config.json as transformers 4.51 reads it.

    config: as the directory has it, of a known model_type.
    tensors: by the names that the model has for them.
    token_ids: of the tokenizer, by the names of their fields in config.json.
    """
    notes: list[str] = []
    config = _flat(dict(config), notes)
    config = _with_old_rope(config, notes)
    config = _with_old_types(config, tensors)
    config = _without_attention(config, notes)
    if config.pop("quantization_config", None) is not None:
        notes.append("quantization_config is left out of config.json: the weights are whole")
    config.pop("auto_map", None)
    _take_from_weights(config, tensors, notes)
    for name, number in token_ids.items():
        if config.get(name) is None:
            config[name] = number
            notes.append(f"config.json has no {name}: {number}, as the tokenizer has it")
    return config, notes


def _flat(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Fields of the language model stand at the top; newer versions read text_config first where both are there."""
    text = config.pop("text_config", None)
    if not isinstance(text, dict):
        return config
    notes.append("config.json is of a newer transformers: the fields of text_config go to its top")
    lifted = {name: text[name] for name in TEXT_FIELDS if text.get(name) is not None}
    if "tie_word_embeddings" in config and "rope_parameters" in text:  # from version 5 on it is the top's
        lifted.pop("tie_word_embeddings", None)
    rope = {name: text[name] for name in ("rope_parameters",) if name in text}
    types = {name: text[name] for name in ("dtype", "torch_dtype") if name in text and not _type_of(config)}
    return {**config, **types, **rope, **lifted}


def _with_old_rope(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """rope_parameters -> rope_theta and rope_scaling."""
    parameters = config.pop("rope_parameters", None)
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        config["vision_config"] = {name: value for name, value in vision.items() if name != "rope_parameters"}
    if isinstance(parameters, dict):
        notes.append("rope_parameters of config.json becomes rope_theta and rope_scaling")
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
        config = {**config, **theta, "rope_scaling": scaling}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling and "type" not in scaling:
        config["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return config


def _type_of(config: Mapping[str, Any]) -> Any:
    return config.get("torch_dtype") or config.get("dtype")


def _with_old_types(config: dict[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """`dtype` -> `torch_dtype`; a type that is none becomes that of most weights."""
    named = str(_type_of(config)).removeprefix("torch.")
    if named not in TYPES:
        kinds = [tensor.dtype for tensor in tensors.values()]
        most = max(sorted(set(kinds)), key=kinds.count, default="F32")
        named = next(name for name, kind in TYPES.items() if kind == most)
    config.pop("dtype", None)
    vision = config["vision_config"]
    config["vision_config"] = {
        name: value for name, value in vision.items() if name != "dtype" and (name != "torch_dtype" or value in TYPES)
    }
    return {**config, "torch_dtype": named}


def _without_attention(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """No attention of a package that is not there."""
    for part in (config, config["vision_config"]):
        for name in ATTENTION:
            kind = part.get(name)
            if kind is None or kind in ("sdpa", "eager"):
                continue
            package = FLASH.get(kind) if isinstance(kind, str) else None
            if not (package and find_spec(package)):
                part.pop(name)
                notes.append(f"{name} {kind!r} is left out of config.json: its package is not there")
    return config


def _take_from_weights(config: dict[str, Any], tensors: Mapping[str, Stored], notes: list[str]) -> None:
    """vocab_size and tie_word_embeddings, where the weights leave one reading."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is None or not embedding.shape:
        return
    rows, said = embedding.shape[0], config.get("vocab_size")
    if said != rows and (head is None or head.shape == embedding.shape):
        config["vocab_size"] = rows
        notes.append(f"vocab_size of config.json is {said}, the weights have {rows} rows: these are taken")


def normalise_processor(folder: Path) -> list[str]:
    """Puts the image processor's settings into preprocessor_config.json, where older versions look for them, and takes
    those of other processors out of processor_config.json. Returns lines. Raises CheckpointError."""
    notes: list[str] = []
    path, shared = folder / PROCESSOR, folder / SHARED
    own, several = _read(path), _read(shared)
    nested = several.get("image_processor")
    there = {**(nested if isinstance(nested, dict) else {}), **_kept(several, [name for name, _ in BOUNDS])}
    if not own and there:
        notes.append(f"{PROCESSOR} is missing: the settings of {SHARED} are taken")
    if not own and not there:
        return notes + _give_processor(folder)
    settings = _with_bounds(path, own or there, shared, there, notes)
    if settings != own:
        write_json(path, settings)
    videos = several.get("video_processor")
    if isinstance(videos, dict) and not (folder / VIDEO_PROCESSOR).is_file():
        write_json(folder / VIDEO_PROCESSOR, _kept(videos, KEPT))
    left = {name: value for name, value in several.items() if name not in NOT_OF_PROCESSOR}
    if left != several:
        write_json(shared, left)
    return notes


def _give_processor(folder: Path) -> list[str]:
    """Qwen2-VL's settings where there are none and the model reads its patches."""
    config = read_config(folder)
    if not reads_pixel_patches(config):
        return []
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": MODEL_TYPES[config["model_type"]]}
    side = patch_of(config)[1]
    write_json(folder / PROCESSOR, settings if side == QWEN2_VL_PATCH else {**settings, "patch_size": side})
    return [f"{PROCESSOR} is missing: Qwen2-VL's own settings are taken"]


def _with_bounds(path: Path, own: dict, shared: Path, there: dict, notes: list[str]) -> dict[str, Any]:
    """The image processor's settings with its pixel bounds under one name. own, there: what the two files say."""
    first, second = pixel_bounds_in(path, own), pixel_bounds_in(shared, there)
    bounds = {name: second[name] if value is None else value for name, value in first.items()}
    if bounds != first:
        notes.append(f"min_pixels and max_pixels are those of {SHARED}")
    elif any(second[name] not in (None, value) for name, value in bounds.items()):
        notes.append(f"{SHARED} has other pixel bounds than {PROCESSOR}, which counts")
    size, edges = own.get("size"), {edge for _, edge in BOUNDS}
    if isinstance(size, dict) and edges <= set(size) and bounds == first:
        return own
    if size and not any(first.values()):
        raise CheckpointError(f"{path} has a size without shortest_edge and longest_edge, which are no pixel bounds of "
                              "Qwen2-VL: take the field size out")  # fmt: skip
    if size:
        notes.append("the field size of the image processor becomes min_pixels and max_pixels")
    others = {name: value for name, value in own.items() if name != "size"}
    return {**others, **{name: value for name, value in bounds.items() if value is not None}}


def normalise_tokenizer(folder: Path) -> list[str]:
    """tokenizer_config.json as transformers 4.51 reads it. Returns lines. Raises CheckpointError."""
    notes: list[str] = []
    path = folder / "tokenizer_config.json"
    before = _read(path)
    settings = dict(before)
    special = settings.get("extra_special_tokens")
    if isinstance(special, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = settings.get("additional_special_tokens") or special
        notes.append("the list extra_special_tokens of tokenizer_config.json becomes additional_special_tokens")
    if before and settings.get("tokenizer_class") not in TOKENIZER_CLASSES:
        before_it = settings.get("tokenizer_class")
        notes.append(f"tokenizer_class {before_it} of tokenizer_config.json becomes Qwen2Tokenizer")
        settings["tokenizer_class"] = "Qwen2Tokenizer"
    if settings.get("split_special_tokens"):
        settings["split_special_tokens"] = False
        notes.append("split_special_tokens of tokenizer_config.json becomes false: tokens of media stay whole")
    if before and settings.get("pad_token", "") is None:
        settings["pad_token"] = "<|endoftext|>"
        notes.append("tokenizer_config.json has no pad_token: it gets Qwen2-VL's, <|endoftext|>")
    settings.pop("auto_map", None)
    if settings != before:
        write_json(path, settings)
    return notes


def normalise_json(folder: Path) -> list[str]:
    """JSON files in plain UTF-8. Returns lines. Raises CheckpointError for what is no JSON."""
    marked = []
    for name in (*JSON_FILES, *PARSED):
        path = folder / name
        if path.is_file() and path.read_bytes()[:1] not in (b"{", b" ", b"\n", b"\r", b"\t"):
            write_json(path, read_json(path))
            marked.append(name)
    return [f"{', '.join(marked)}: the byte order mark is taken off"] if marked else []


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _kept(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
