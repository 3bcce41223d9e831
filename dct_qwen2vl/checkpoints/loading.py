"""Whether the transformers of this environment loads a directory, as training and evaluation will, without its weights.

The model is built on the meta device; its tensors are compared with the headers of the files. Tokenizer, processor,
chat template and generation settings are loaded for real.
"""

import contextlib
import inspect
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, PretrainedConfig

from dct_qwen2vl.checkpoints.chat_template import CHAT_TEMPLATE
from dct_qwen2vl.checkpoints.hf_folder import load_processor
from dct_qwen2vl.checkpoints.inspection import (
    CheckpointError,
    normalise,
    read_config,
    read_json,
    read_processor,
    remedy,
    safetensors_files,
    token_format,
)
from dct_qwen2vl.checkpoints.normalising import TEXT_FIELDS
from dct_qwen2vl.checkpoints.weights import (
    EMBEDDING,
    HEAD,
    Stored,
    check_index,
    check_trainable,
    missing_and_left,
    quantisation,
    read_headers,
    some,
)
from dct_qwen2vl.common.files import write_json

TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKEN_IDS.values())
SAMPLE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is 1,234?  Grüße, 世界<|im_end|>\n"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]}]
PLACES = re.compile(r"<\|vision_start\|>(<\|image_pad\|>|<\|video_pad\|>)<\|vision_end\|>|What\?")
COPY_TOKENIZER = "copy tokenizer.json and tokenizer_config.json from the Qwen2-VL that it was made from"
POSITIVE = ("rms_norm_eps", "rope_theta")
MOST = 2**53  # of a number with decimals; torch takes no integer of 2**63 in its place
NUMBERS = ("mlp_ratio", "tokens_per_second")  # whose default is whole, but need not be


@contextlib.contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
    """Any error of a library becomes one line, CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        said = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise CheckpointError(
            f"{what} cannot be loaded by transformers {transformers.__version__} ({said:.250}): {advice}"
        ) from error


def check_directory(model_dir: Path) -> None:
    """Whether training and evaluation can load a directory as it is. Raises CheckpointError."""
    pixels = token_format(model_dir, read_processor(model_dir)) is None
    try:
        stored = read_headers(safetensors_files(model_dir))
        check_trainable(model_dir, stored, quantisation(read_config(model_dir)))
        check_index(model_dir, stored)
        check_loads(model_dir, stored)
    except CheckpointError as error:
        mended = f"{normalise(model_dir)} writes it as it can be loaded, or says why not"
        advice = mended if pixels else remedy(model_dir)
        raise CheckpointError(f"{str(error).rsplit(': ', 1)[0]}: {advice}") from error


def check_loads(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Checks that transformers can load a checkpoint.

    folder: Hugging Face directory without the weights.
    tensors: The weights, by the names that the model has for them.

    Raises CheckpointError.
    """
    config = load_config(folder)
    check_token_ids(folder, config, load_tokenizer(folder))
    _check_ids(folder / "config.json", config, config.vocab_size)
    check_tensors(folder, config, tensors)
    check_processor(folder)
    check_generation(folder, config.vocab_size)


def load_config(folder: Path) -> PretrainedConfig:
    """Raises CheckpointError for one that describes no model."""
    path = folder / "config.json"
    with one_line(str(path), "get the file again"):
        config = AutoConfig.from_pretrained(folder)
    vision = config.vision_config
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path} has a quantization_config, the weights are whole: take it out")
    _check_types(path, config, {name: value for name, value in _defaults(config).items() if name in TEXT_FIELDS})
    _check_types(path, vision, _defaults(vision))
    _check_heads(path, "", config.hidden_size, config.num_attention_heads, 2)
    width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
    _check_heads(path, "the vision tower's ", width, vision.num_heads, 4)
    _check_rope(path, config)
    handed = vision.hidden_size if config.model_type == "qwen2_vl" else vision.out_hidden_size
    if handed != config.hidden_size:
        raise CheckpointError(f"{path} has a vision tower that hands on {handed} numbers, its language model takes "
                              f"{config.hidden_size}: get the file again")  # fmt: skip
    return config


def _defaults(config: PretrainedConfig) -> dict[str, Any]:
    parameters = inspect.signature(type(config).__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _check_types(path: Path, config: PretrainedConfig, defaults: Mapping[str, Any]) -> None:
    """Each field must be of the type of its default. Raises CheckpointError."""
    for name, default in defaults.items():
        value = getattr(config, name, default)
        if isinstance(default, bool):
            right = isinstance(value, bool)
        elif name in NUMBERS:
            right = type(value) in (int, float) and 0 < value < MOST
        elif isinstance(default, int):
            right = (type(value) is int and 0 < value < 2**31) or (value is None and name == "sliding_window")
        elif isinstance(default, float):
            right = type(value) in (int, float) and 0 <= value < MOST and (value > 0 or name not in POSITIVE)
        elif isinstance(default, str):
            right = isinstance(value, str)
        elif isinstance(default, list):
            right = isinstance(value, list) and all(type(each) is int for each in value)
        else:
            continue
        if not right:
            raise CheckpointError(f"{path} has {name} {value!r:.60}, where {default!r} is usual: get the file again")


def _check_heads(path: Path, whose: str, width: int, heads: int, divisor: int) -> None:
    if width % (heads * divisor):
        raise CheckpointError(f"{path} has {whose}{heads} heads, which do not divide its width {width}: get the file "
                              "again")  # fmt: skip


def _check_rope(path: Path, config: PretrainedConfig) -> None:
    scaling, half = config.rope_scaling, config.hidden_size // config.num_attention_heads // 2
    section = scaling.get("mrope_section") if isinstance(scaling, dict) else None
    whole = isinstance(section, list) and all(type(each) is int and each >= 0 for each in section)
    if not whole or len(section) != 3 or sum(section) != half:
        raise CheckpointError(f"{path} has the mrope_section {section!r:.60} in rope_scaling, not three numbers that "
                              f"add up to {half}: copy it from the Qwen2-VL that it was made from")  # fmt: skip


def check_tensors(folder: Path, config: PretrainedConfig, tensors: Mapping[str, Stored]) -> None:
    """Every tensor of the model must be there under its name, and nothing else. Raises CheckpointError."""
    _check_depth(folder, "num_hidden_layers", config.num_hidden_layers, r"model\.layers\.(\d+)\.", tensors)
    _check_depth(folder, "vision_config.depth", config.vision_config.depth, r"visual\.blocks\.(\d+)\.", tensors)
    with one_line(str(folder / "config.json"), "get the file again"):
        expected = meta_shapes(config)
    tied = config.tie_word_embeddings
    lacking, left, shapes = missing_and_left(expected, tensors, tied)
    if lacking == [HEAD]:
        raise CheckpointError(f"{folder} lacks {HEAD}, and config.json does not say tie_word_embeddings: set it to "
                              "true if the model has one matrix for both, else get the files again")  # fmt: skip
    if lacking:
        raise CheckpointError(f"{folder} lacks {len(lacking)} of the model's {len(expected)} tensors ({some(lacking)})"
                              f": {_how_to_complete(lacking)}")  # fmt: skip
    if shapes:
        name = shapes[0]
        found, wanted = (" x ".join(map(str, shape)) for shape in (tensors[name].shape, expected[name]))
        raise CheckpointError(f"{folder}: {name} is {found}, config.json says {wanted}: take config.json and weights "
                              "from one model")  # fmt: skip
    if left:
        raise CheckpointError(f"{folder} holds {len(left)} tensors that the model has no place for ({some(left)})"
                              ": give a checkpoint of Qwen2-VL or Qwen2.5-VL alone")  # fmt: skip
    if tied and HEAD in tensors and not _equal(tensors[HEAD], tensors[EMBEDDING]):
        raise CheckpointError(f"{folder} holds a {HEAD} of its own, which tie_word_embeddings of config.json drops: "
                              "set that to false, or remove the tensor")  # fmt: skip


def _how_to_complete(lacking: list[str]) -> str:
    if all(name.startswith("visual.") for name in lacking):
        return ("a frozen vision tower was left out of the save; copy these tensors from the model that was trained, "
                "then try again")  # fmt: skip
    return "get the files again"


def _check_depth(folder: Path, field: str, said: int, pattern: str, tensors: Mapping[str, Stored]) -> None:
    """Before a model of any number of layers is built. Raises CheckpointError."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(pattern, name))}
    if numbers and len(numbers) != said:
        raise CheckpointError(f"{folder} holds {len(numbers)} layers, {field} of config.json is {said}: take "
                              "config.json and weights from one model")  # fmt: skip
    if not numbers and said > 200:
        raise CheckpointError(f"{folder} holds no tensors of the {said} layers of {field}: get the files again")


def meta_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by name; no memory is taken."""
    with torch.device("meta"), transformers.modeling_utils.no_init_weights():
        model = AutoModelForImageTextToText.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors of one shape hold the same, read some rows at a time."""
    from safetensors import safe_open

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        views = first.get_slice(one.name), second.get_slice(other.name)
        rows = max(1, 2**24 // max(1, math.prod(one.shape[1:])))
        starts = range(0, one.shape[0], rows)
        return all(torch.equal(*(view[start : start + rows] for view in views)) for start in starts)


def load_tokenizer(folder: Path) -> Any:
    """As training loads it. Raises CheckpointError."""
    with one_line(f"the tokenizer of {folder}", COPY_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer(SAMPLE)
        return tokenizer


def token_ids(folder: Path) -> dict[str, int]:
    """Of the tokens that stand for media, by the names of their fields in config.json. Raises CheckpointError."""
    tokenizer = load_tokenizer(folder)
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in TOKEN_IDS.items()}


def check_token_ids(folder: Path, config: PretrainedConfig, tokenizer: Any) -> None:
    """The tokenizer must be that of the model. Raises CheckpointError."""
    advice = COPY_TOKENIZER
    for token in SPECIAL:
        if len(tokenizer(token)["input_ids"]) != 1:
            raise CheckpointError(f"the tokenizer of {folder} does not know {token}: {advice}")
    for field, token in TOKEN_IDS.items():
        own, said = tokenizer.convert_tokens_to_ids(token), getattr(config, field, None)
        if own != said:
            raise CheckpointError(f"the tokenizer of {folder} has {token} as {own}, {field} of config.json is {said}: "
                                  f"{advice}")  # fmt: skip
    last = max(tokenizer.get_vocab().values())
    if last >= config.vocab_size:
        raise CheckpointError(f"the tokenizer of {folder} has {last + 1} tokens, the weights have {config.vocab_size}: "
                              f"{advice}, or resize_token_embeddings() and save the model")  # fmt: skip
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer of {folder} has no pad_token: set it to <|endoftext|> in "
                              "tokenizer_config.json")  # fmt: skip


def check_processor(folder: Path) -> None:
    """Image processor and chat template, as evaluation loads them. Raises CheckpointError."""
    with one_line(f"the processor of {folder}", "get its files again"):
        processor = load_processor(folder)
        images = processor.image_processor
        side = images.patch_size * images.merge_size
        # A little more than one token of the language model, so that it is resized.
        image = np.zeros((side + 10, side + 20, 3), np.uint8)
        images(images=[image], min_pixels=side**2, max_pixels=16 * side**2)
    if not shows_media(processor.tokenizer, processor.chat_template):
        raise CheckpointError(f"the chat template of {folder} has no places for images and videos: remove it, or copy "
                              "chat_template.json from Qwen2-VL")  # fmt: skip


def shows_media(tokenizer: Any, template: Any) -> bool:
    """Whether a chat template renders a question with an image and a video, in their order."""
    if not isinstance(template, str):
        return False
    try:
        text = tokenizer.apply_chat_template(QUESTION, chat_template=template, tokenize=False)
        return [found[1] for found in PLACES.finditer(text)] == ["<|image_pad|>", "<|video_pad|>", None]
    except Exception:
        return False


def check_generation(folder: Path, vocabulary: int) -> None:
    """Checks that generation_config.json can be loaded, and saved with a trained model.

    folder: Hugging Face directory.
    vocabulary: Rows of the embedding.

    Raises CheckpointError.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    with one_line(str(path), "get the file again"), tempfile.TemporaryDirectory() as again:
        generation = GenerationConfig.from_pretrained(folder)
        generation.save_pretrained(again)
    _check_ids(path, generation, vocabulary)


def _check_ids(path: Path, config: Any, vocabulary: int) -> None:
    """Raises CheckpointError for special tokens that are no tokens."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(each) is int and 0 <= each < vocabulary for each in ids):
            raise CheckpointError(
                f"{path} has {name} {value!r:.60}, which is no token of {vocabulary}: get the file again"
            )


# What is completed in a directory of another tool


def give_template(folder: Path) -> list[str]:
    """Qwen2-VL's chat template, where there is none or it has no places for media. Returns lines. Raises
    CheckpointError."""
    with one_line(f"the processor of {folder}", "get its files again"):
        processor = load_processor(folder)
    if shows_media(processor.tokenizer, processor.chat_template):
        return []
    why = "there is no chat template" if not processor.chat_template else "the chat template has no places for media"
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        values = {**read_json(settings), "chat_template": CHAT_TEMPLATE}
        write_json(settings, values)
    return [f"{why}: Qwen2-VL's is written"]


def complete_tokenizer(folder: Path) -> list[str]:
    """vocab.json and merges.txt, which use_fast=False needs, where only tokenizer.json is right. Returns lines. Raises
    CheckpointError."""
    fast = load_tokenizer(folder)
    if not fast.is_fast or _slow_agrees(folder, fast):
        return []
    fast.backend_tokenizer.model.save(str(folder))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).chmod(0o644)
    if _slow_agrees(folder, fast):
        return ["vocab.json and merges.txt, which use_fast=False needs, are written from tokenizer.json"]
    return ["AutoTokenizer with use_fast=False reads this tokenizer otherwise, or not at all: leave use_fast out"]


def _slow_agrees(folder: Path, fast: Any) -> bool:
    try:
        slow = AutoTokenizer.from_pretrained(folder, use_fast=False)
        return slow(SAMPLE)["input_ids"] == fast(SAMPLE)["input_ids"]
    except Exception:
        return False


def mend_generation(folder: Path, vocabulary: int) -> list[str]:
    """Repairs a generation_config.json that transformers loads but refuses to save. Returns lines for the user.

    folder: Hugging Face directory.
    vocabulary: Rows of the embedding.

    The usual case: numbers for sampling are there, but do_sample is not.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        check_generation(folder, vocabulary)
        return []
    except CheckpointError:
        before = path.read_bytes()
        write_json(path, {**read_json(path), "do_sample": True})
    try:
        check_generation(folder, vocabulary)
    except CheckpointError:
        path.write_bytes(before)
        return []
    return ["generation_config.json names numbers of sampling without do_sample: it becomes true, or transformers "
            "saves no model with it"]  # fmt: skip
