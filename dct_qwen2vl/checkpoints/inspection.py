"""What lies in a Hugging Face directory of Qwen2-VL, looked into without loading weights.

Only the headers of safetensors files are read, so it takes no longer for a large model than for a small one.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.files import read_object
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.image_sizes_dct import PIXEL_BOUNDS

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
PROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
STOCK_FORM = "dct_format.json"  # beside the stock form of a DCT model: its token format, for the way back
# Parsed when model and tokenizer are loaded; the other two, config.json and PROCESSOR, are looked into.
PARSED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "chat_template.json"),
)
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # files of one are enough
FORMAT_DEFAULTS = {"merge": 2, "name": "custom"}  # of a DCTConfig, whose other fields are needed


MODEL_TYPES = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}  # that are read: their processors


class CheckpointError(UserError):
    """A file is not what it should be. The message is one line: what, where, what to do next."""


def read_json(path: Path, advice: str = "get the file again") -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, whose message ends with `advice`."""
    return read_object(path, advice, CheckpointError)


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a Qwen2-VL, with its vision_config. Raises CheckpointError."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {model_dir}: give --model-dir a Hugging Face Qwen2-VL directory")
    config = read_json(path)
    if config.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(f"{path} is of model_type {config.get('model_type')!r}, only {' and '.join(MODEL_TYPES)} "
                              "are read: give --model-dir a Hugging Face Qwen2-VL directory")  # fmt: skip
    if not isinstance(config.get("vision_config"), dict):
        raise CheckpointError(f"{path} has no vision_config: give --model-dir a Hugging Face Qwen2-VL directory")
    return config


def tower_width(config: dict[str, Any]) -> int:
    """E. In Qwen2-VL's vision_config, `hidden_size` is the width of the language model."""
    vision = config["vision_config"]
    return vision.get("embed_dim", 1280) if config["model_type"] == "qwen2_vl" else vision.get("hidden_size", 3584)


def time_step(config: dict[str, Any], temporal_patch_size: int, fps: float) -> float:
    """By how much M-RoPE's time axis advances from one step of a video to the next. Qwen2.5-VL counts in seconds,
    which follow from the frames that are read of a second (transformers 4.51.3, `second_per_grid_ts`); Qwen2-VL counts
    the steps."""
    if config["model_type"] == "qwen2_vl":
        return 1.0
    return config["vision_config"].get("tokens_per_second", 4) * temporal_patch_size / fps


def with_patch(config: dict[str, Any], channels: int, frames: int, side: int) -> dict[str, Any]:
    """config.json of the same model with another patch embedding. Windows of Qwen2.5-VL's attention, which are in
    pixels, keep their size in tokens."""
    vision = config["vision_config"]
    changed = {"in_channels": channels, "patch_size": side, "temporal_patch_size": frames}
    if config["model_type"] == "qwen2_5_vl":
        changed["window_size"] = vision.get("window_size", 112) // vision.get("patch_size", 14) * side
    return {**config, "vision_config": {**vision, **changed}}


def reads_pixel_patches(config: dict[str, Any]) -> bool:
    """Whether a model's patch embedding is over 2 x 14 x 14 pixels, as Qwen2-VL's is; not so after a conversion."""
    return patch_of(config) == (2, 14, 14)


def patch_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of what the patch embedding reads; Qwen2-VL's where config.json says nothing."""
    vision = config["vision_config"]
    side = vision.get("patch_size", 14)
    return vision.get("temporal_patch_size", 2), side, side


def saved_pixel_bounds(model_dir: Path) -> dict[str, int | None]:
    """min_pixels and max_pixels of the processor, None where it leaves them open. Raises CheckpointError."""
    path = model_dir / PROCESSOR
    saved = read_json(path) if path.is_file() else {}
    size = saved.get("size") or {}
    if not isinstance(size, dict):
        raise CheckpointError(f"{path} has the size {size!r}, which has no fields: get the file again")
    bounds = {
        "min_pixels": saved.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": saved.get("max_pixels") or size.get("longest_edge"),
    }
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise CheckpointError(f"{path} has {name} {value!r}, which is no number: get the file again")
    return bounds


def own_pixel_bounds(model_dir: Path) -> tuple[int, int]:
    """min_pixels and max_pixels of the processor; Qwen2-VL's where it leaves them open. Raises CheckpointError."""
    saved = saved_pixel_bounds(model_dir)
    return saved["min_pixels"] or PIXEL_BOUNDS[0], saved["max_pixels"] or PIXEL_BOUNDS[1]


def safetensors_files(model_dir: Path) -> list[Path]:
    """The weight files that transformers would take, in order. Raises CheckpointError."""
    index = model_dir / INDEX
    files = [model_dir / "model.safetensors"]
    if index.is_file() and not files[0].is_file():  # save_pretrained leaves an old index beside one file
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index} does not say in which files the tensors are: get the file again")
        files = [model_dir / Path(name).name for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{model_dir} lacks {', '.join(missing)}: only whole safetensors checkpoints are read, "
                              "get what is missing")  # fmt: skip
    return files


def open_tensors(files: list[Path], framework: str) -> Iterator[tuple[str, Any]]:
    """(name, the open file that holds it) of every tensor, file by file, by their headers. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework=framework) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                    yield name, tensors
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): get the file again") from error


def no_patch_embedding(files: list[Path]) -> CheckpointError:
    return CheckpointError(f"no {PATCH_EMBEDDING} in {', '.join(path.name for path in files)} of {files[0].parent}: "
                           "get the files again")  # fmt: skip


def patch_embedding_shape(files: list[Path]) -> tuple[int, ...]:
    """[E, channels, frames, rows, columns], from the headers, all of which are read. Raises CheckpointError."""
    found = None
    for name, tensors in open_tensors(files, "np"):
        if name.endswith(PATCH_EMBEDDING):
            found = tuple(tensors.get_slice(name).get_shape())
    if found is None:
        raise no_patch_embedding(files)
    return found


def check_tokenizer(model_dir: Path) -> None:
    """Raises CheckpointError where there is none."""
    if not any(all((model_dir / name).is_file() for name in names) for names in TOKENIZERS):
        raise CheckpointError(f"{model_dir} has no tokenizer (no tokenizer.json): copy tokenizer.json and "
                              "tokenizer_config.json from the Qwen2-VL that it was made from")  # fmt: skip


def read_processor(model_dir: Path) -> dict[str, Any]:
    """The image processor's configuration. Raises CheckpointError."""
    if not (model_dir / PROCESSOR).is_file():
        raise CheckpointError(f"{model_dir} lacks {PROCESSOR}: {remedy(model_dir)}")
    return read_json(model_dir / PROCESSOR)


def token_format(model_dir: Path, processor: dict[str, Any]) -> dict[str, Any] | None:
    """The processor's DCTConfig as a dict, with "name" and "merge"; None where it reads pixels. Raises CheckpointError,
    also where other fields of the processor contradict it. Values are not looked into: DCTConfig imports torch."""
    path, dct = model_dir / PROCESSOR, processor.get("dct")
    if dct is None:
        return None
    dct = {**FORMAT_DEFAULTS, **dct} if isinstance(dct, dict) else {}
    if not _whole_numbers(dct.get("block")) or len(dct["block"]) != 3 or not _whole_numbers(dct.get("kept")):
        raise CheckpointError(f"{path} has no token format in its field dct: {remedy(model_dir)}")
    fixed = {"temporal_patch_size": dct["block"][0], "patch_size": dct["block"][1], "merge_size": dct["merge"]}
    for name, value in fixed.items():
        if processor.get(name, value) != value:
            raise CheckpointError(f"{path} has {name} {processor[name]!r}, its token format {dct['name']} has {value}: "
                                  f"{remedy(model_dir)}")  # fmt: skip
    return dct


def unfolded_format(model_dir: Path) -> dict[str, Any] | None:
    """Of the stock form of a DCT model, its token format as a dict; None for any other directory. Raises
    CheckpointError."""
    path = model_dir / STOCK_FORM
    if not path.is_file():
        return None
    dct = read_json(path).get("dct")
    if not isinstance(dct, dict):
        raise CheckpointError(f"{path} has no token format in its field dct: remove it, and name the format with --dct")
    return {**FORMAT_DEFAULTS, **dct}


def check_format(model_dir: Path, processor: dict[str, Any], dct: dict[str, Any] | None) -> None:
    """Processor, config.json and weights must be of one token format; dct: the processor's. Raises CheckpointError."""
    config, size = read_config(model_dir), processor.get("size")
    vision = config["vision_config"]
    if dct is None and size and not (isinstance(size, dict) and {"shortest_edge", "longest_edge"} <= set(size)):
        raise CheckpointError(f"{model_dir / PROCESSOR} has a size without shortest_edge and longest_edge, which "
                              "transformers does not read: take the field size out")  # fmt: skip
    sides = ("temporal_patch_size", 2), ("patch_size", 14), ("patch_size", 14)  # Qwen2-VL's, where files say nothing
    reads = [vision.get("in_channels", 3), *(vision.get(*side) for side in sides)]
    makes = [len(dct["kept"]), 1, 1, 1] if dct else [3, *(processor.get(*side) for side in sides)]
    merges = dct["merge"] if dct else processor.get("merge_size", 2), vision.get("spatial_merge_size", 2)
    if makes != reads or merges[0] != merges[1]:
        raise CheckpointError(
            f"{model_dir / PROCESSOR} makes tokens of {_by(makes)} ({dct['name'] if dct else 'pixels'}), merged "
            f"{merges[0]} x {merges[0]}, config.json beside it reads {_by(reads)}, merged {merges[1]} x {merges[1]}: "
            f"{remedy(model_dir)}"
        )
    shape = patch_embedding_shape(safetensors_files(model_dir))
    wanted = (tower_width(config), *reads)
    if shape != wanted:
        raise CheckpointError(f"{model_dir}: {PATCH_EMBEDDING} is {_by(shape)}, config.json says {_by(wanted)}: "
                              f"{remedy(model_dir)}")  # fmt: skip


def check_checkpoint(model_dir: Path) -> dict[str, Any] | None:
    """Whether processor, tokenizer and model can be loaded, as far as it is seen in advance. Returns the token format,
    None for pixels. Raises CheckpointError."""
    processor = read_processor(model_dir)
    dct = token_format(model_dir, processor)
    check_format(model_dir, processor, dct)
    check_tokenizer(model_dir)
    for name in PARSED:
        if (model_dir / name).is_file():
            read_json(model_dir / name)
    return dct


def remedy(model_dir: Path) -> str:
    """What to do with a directory whose files do not go together. A pixel model is nothing that a conversion made, and
    one into its place would replace it. Raises CheckpointError for a broken config.json."""
    if reads_pixel_patches(read_config(model_dir)):
        return "get its files again"
    return f"python convert_checkpoint.py --model-dir QWEN2_VL --output-dir {model_dir} --force"


def _by(sides: Iterable[Any]) -> str:
    return " x ".join(map(str, sides))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is int for value in values)
