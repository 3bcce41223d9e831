"""What lies in a Hugging Face directory of Qwen2-VL, looked into without loading weights.

Only the headers of safetensors files are read, so it takes no longer for a large model than for a small one.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.files import read_object
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.image_sizes_dct import PIXEL_BOUNDS, pixel_bounds

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
LEAST_USEFUL_DB = 25.0  # of a threshold of skipping
QWEN2_VL_PATCH = 14  # px
PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
SHARED = "processor_config.json"  # transformers 5 saves all processors in it, and reads them there first
INDEX = "model.safetensors.index.json"
# Beside the stock form of a DCT model, which loaders ignore: its token format and `SKIPPING`, for the way back.
STOCK_FORM = "dct_format.json"
# Parsed when model and tokenizer are loaded; the other two, config.json and PROCESSOR, are looked into.
PARSED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "chat_template.json"),
)
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # files of one are enough
FORMAT_DEFAULTS = {"merge": 2, "name": "custom"}  # of a DCTConfig, whose other fields are needed
# Settings of an image processor: which cells a model was trained without, and what they can be.
SKIPPING = {
    "skip_db": ("PSNR in dB over 0", lambda value: type(value) in (int, float) and value > 0),
    "skip_noise_floor": ("true or false", lambda value: isinstance(value, bool)),
    "skip_share": ("share over 0 and at most 1", lambda value: type(value) in (int, float) and 0 < value <= 1),
}
# Up to this skip_share, a model also reads all cells. Small models on pages, asked either way, lost nothing that is
# shown at 0.5 and 0.8, and 36 points at 1 (docs/results.md, "Does skipping hold?": suite `skipping`, commit c4b6400).
SHARE_FOR_BOTH = 0.8


MODEL_TYPES = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}  # that are read: their processors


SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
LFS_POINTER = b"version https://git-lfs"
ADAPTER = "adapter_config.json"  # PEFT's
GGUF = ".gguf"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth", "scaler.pt")


class CheckpointError(UserError):
    """A file is not what it should be. The message is one line: what, where, what to do next."""


def read_json(path: Path, advice: str = "get the file again") -> dict[str, Any]:
    """The object in a JSON file.

    path: File.
    advice: What the user should do. The end of the message.

    Raises CheckpointError if it cannot be read or holds no object.
    """
    try:
        return read_object(path, advice, CheckpointError)
    except CheckpointError as error:
        if is_lfs_pointer(path):
            raise _pointer(path) from error
        raise


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a model of Hugging Face, in place of a folder


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a Qwen2-VL, with its vision_config. Raises CheckpointError."""
    path = model_dir / "config.json"
    if not path.is_file():
        where = where_it_is(model_dir) or "give --model-dir a Hugging Face Qwen2-VL directory"
        raise CheckpointError(f"no config.json in {model_dir}: {where}")
    config = read_json(path)
    if str(config.get("model_type")) not in MODEL_TYPES:
        raise CheckpointError(f"{path} is of model_type {config.get('model_type')!r}, only {' and '.join(MODEL_TYPES)} "
                              "are read: give --model-dir a Hugging Face Qwen2-VL directory")  # fmt: skip
    if not isinstance(config.get("vision_config"), dict):
        raise CheckpointError(f"{path} has no vision_config: give --model-dir a Hugging Face Qwen2-VL directory")
    return config


def where_it_is(model_dir: Path, form: str = "hf_dct", flag: str = "--model-dir") -> str | None:
    """What to type instead of a directory without a config.json. None if that is not known.

    model_dir: The directory that was given.
    form: Which folder of a run is wanted, "hf_dct" or "hf".
    flag: The flag that was given the directory.
    """
    if not model_dir.parent.exists() and HUB_NAME.fullmatch(str(model_dir)):
        return f"fetch it (git lfs install; git clone https://huggingface.co/{model_dir}) and give {flag} its folder"
    if (model_dir / ADAPTER).is_file():
        return how_to_merge(model_dir)
    if model_dir.is_file() and model_dir.suffix != GGUF:
        return f"it is a file, give {flag} the folder that it lies in, {model_dir.parent}"
    if (model_dir / "config.json").is_symlink():
        return "it is a link to a file that is not there; download the model again, or copy it with cp -rL"
    inside = _models_inside(model_dir, form)
    if inside:
        return f"give {flag} {model_dir / form if model_dir / form in inside else inside[-1]}"
    if model_dir.suffix == GGUF or any(model_dir.glob(f"*{GGUF}")):
        return _how_to_read_gguf(flag)
    return None


def _how_to_read_gguf(flag: str) -> str:
    return f"GGUF files are not read; give {flag} the model in safetensors that they were made from"


def _models_inside(model_dir: Path, form: str) -> list[Path]:
    """The models in a directory, in a run's folder, in the folder of a run's checkpoints or of all runs: the nearest
    ones, in order."""
    for below in ("*", "snapshots/*", f"*/{form}", "*/hf", "checkpoints/*/hf"):
        found = [path.parent for path in model_dir.glob(f"{below}/config.json")]
        shown = [path for path in found if not path.name.startswith(".")]
        if shown:
            return sorted(shown)
    return []


def how_to_merge(model_dir: Path) -> str:
    """The command that makes a model of a directory of PEFT's adapters. Raises CheckpointError."""
    base = read_json(model_dir / ADAPTER).get("base_model_name_or_path") or "QWEN2_VL"
    return (
        'it holds LoRA adapters alone, merge them first: python -c "import peft, transformers as t; '
        f"m = t.AutoModelForImageTextToText.from_pretrained('{base}', torch_dtype='auto'); "
        f"peft.PeftModel.from_pretrained(m, '{model_dir}').merge_and_unload().save_pretrained('MERGED'); "
        f"t.AutoProcessor.from_pretrained('{base}').save_pretrained('MERGED')\""
    )


def is_lfs_pointer(path: Path) -> bool:
    """Whether git has left the address of a file in its place."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _pointer(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is a git-lfs pointer, not the file: git -C {path.parent} lfs pull")


def tower_width(config: dict[str, Any]) -> int:
    """E. In Qwen2-VL's vision_config, `hidden_size` is the width of the language model."""
    vision = config["vision_config"]
    return vision.get("embed_dim", 1280) if config["model_type"] == "qwen2_vl" else vision.get("hidden_size", 3584)


def time_step(config: dict[str, Any], temporal_patch_size: int, fps: float) -> float:
    """By how much M-RoPE's time axis advances from one step of a video to the next.

    config: config.json of the model.
    temporal_patch_size: Frames of a step.
    fps: Frames that are read of a second.

    Qwen2-VL counts the steps. Qwen2.5-VL counts in seconds (transformers 4.51.3, `second_per_grid_ts`).
    """
    if config["model_type"] == "qwen2_vl":
        return 1.0
    return config["vision_config"].get("tokens_per_second", 4) * temporal_patch_size / fps


def with_patch(config: dict[str, Any], channels: int, frames: int, side: int) -> dict[str, Any]:
    """config.json of the same model with another patch embedding.

    config: config.json of the model.
    channels: Input channels of the patch embedding.
    frames: Frames of a patch.
    side: Rows and columns of a patch, pixels.

    Windows of Qwen2.5-VL's attention, which are in pixels, keep their size in tokens.
    """
    vision = config["vision_config"]
    changed = {"in_channels": channels, "patch_size": side, "temporal_patch_size": frames}
    if config["model_type"] == "qwen2_5_vl":
        changed["window_size"] = vision.get("window_size", 112) // vision.get("patch_size", 14) * side
    return {**config, "vision_config": {**vision, **changed}}


def reads_pixel_patches(config: dict[str, Any]) -> bool:
    """Whether a model's patch embedding is over 2 frames of at most 14 x 14 pixels, as Qwen2-VL's is; not so after a
    conversion."""
    frames, side, _ = patch_of(config)
    return frames == 2 and isinstance(side, int) and 2 <= side <= QWEN2_VL_PATCH


def keeps_part_of_a_block(dct: dict[str, Any]) -> bool:
    """Whether a token format, as `unfolded_format` gives it, leaves out coefficients of its block, as all presets but
    `exact` do."""
    block, kept = dct.get("block"), dct.get("kept")
    return _whole_numbers(block) and _whole_numbers(kept) and len(kept) < 3 * math.prod(block)


def reads_larger_patches(config: dict[str, Any]) -> bool:
    """Whether the patch embedding is over larger patches of pixels, as that of a stock form is."""
    side = patch_of(config)[1]
    return isinstance(side, int) and side > QWEN2_VL_PATCH


def patch_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of what the patch embedding reads; Qwen2-VL's where config.json says nothing."""
    vision = config["vision_config"]
    side = vision.get("patch_size", QWEN2_VL_PATCH)
    return vision.get("temporal_patch_size", 2), side, side


def saved_pixel_bounds(model_dir: Path) -> dict[str, int | None]:
    """min_pixels and max_pixels of a directory's image processor, None where it has none. Raises CheckpointError."""
    path = model_dir / PROCESSOR
    return pixel_bounds_in(path, read_json(path) if path.is_file() else {})


def pixel_bounds_in(path: Path, saved: dict[str, Any]) -> dict[str, int | None]:
    """min_pixels and max_pixels among the settings of an image processor, under any of their names. None where missing.

    path: File of the settings, named in the message.
    saved: The settings.

    Raises CheckpointError for a value that is no number of pixels.
    """
    size = saved.get("size") or {}
    if not isinstance(size, dict):
        raise CheckpointError(f"{path} has the size {size!r}, which has no fields: get the file again")
    bounds = {
        name: next((value for value in (saved.get(name), size.get(edge), size.get(name)) if value is not None), None)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    }
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise CheckpointError(f"{path} has {name} {value!r}, which is no number: get the file again")
        if value is not None and not 1 <= value < math.inf:
            raise CheckpointError(f"{path} has {name} {value!r}, which is no number of pixels: get the file again")
    return {name: value if value is None else int(value) for name, value in bounds.items()}


def own_pixel_bounds(model_dir: Path) -> tuple[int, int]:
    """min_pixels and max_pixels of the processor; Qwen2-VL's where it leaves them open. Raises CheckpointError."""
    saved = saved_pixel_bounds(model_dir)
    return saved["min_pixels"] or PIXEL_BOUNDS[0], saved["max_pixels"] or PIXEL_BOUNDS[1]


def chosen_bounds(model_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> tuple[int, int]:
    """min_pixels and max_pixels: those given, otherwise the checkpoint's.

    model_dir: Hugging Face directory.
    min_pixels: Least pixels of an image, or None. The checkpoint's is lowered to `max_pixels` if it is above it.
    max_pixels: Most pixels of an image, or None.

    Raises CheckpointError for bounds that contradict each other.
    """
    own = own_pixel_bounds(model_dir)
    try:
        return pixel_bounds(min_pixels, max_pixels, *own)
    except ValueError as error:
        raise CheckpointError(f"{error}: change --min-pixels or --max-pixels") from error


def notes_on_bounds(model_dir: Path, min_pixels: int | None, max_pixels: int | None) -> tuple[str, ...]:
    """A line if `chosen_bounds` lowers the checkpoint's min_pixels.

    model_dir: Hugging Face directory.
    min_pixels: As given, or None.
    max_pixels: As given, or None.

    Raises CheckpointError.
    """
    own, _ = own_pixel_bounds(model_dir)
    if min_pixels is not None or max_pixels is None or own <= max_pixels:
        return ()
    return (f"--max-pixels {max_pixels} is below the checkpoint's min_pixels {own}, which becomes {max_pixels}",)


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
        raise CheckpointError(f"{model_dir} lacks {', '.join(missing)}: {_how_to_get(model_dir, index.is_file())}")
    return files


def _how_to_get(model_dir: Path, indexed: bool) -> str:
    """What to do where weights are missing."""
    advice = "only whole safetensors checkpoints are read, get what is missing"
    if indexed:
        return advice
    if whole_shards(model_dir):
        return (f"all shards are there, their index {INDEX} is not: get it again, or convert this directory, which "
                "rebuilds it")  # fmt: skip
    if any(SHARD.fullmatch(path.name) for path in model_dir.iterdir()):
        return f"{advice}, the index {INDEX} and the shards that {_lacking_shards(model_dir)}"
    if (model_dir / ADAPTER).is_file():
        return how_to_merge(model_dir)
    if any(model_dir.glob("global_step*/*")):
        return ("the weights are DeepSpeed's, in parts: python zero_to_fp32.py . MERGED --safe_serialization "
                "there, and copy the other files to MERGED")  # fmt: skip
    pickles = [path.name for pattern in PICKLES for path in sorted(model_dir.glob(pattern))
               if not any(path.match(name) for name in NO_WEIGHTS)]  # fmt: skip
    if pickles:
        return (f"{pickles[0]} is a pickle, which is not read; write safetensors with python -c "
                f"\"import transformers as t; t.AutoModelForImageTextToText.from_pretrained('{model_dir}', "
                f"torch_dtype='auto').save_pretrained('{model_dir}')\"")  # fmt: skip
    if any(model_dir.glob(f"*{GGUF}")):
        return _how_to_read_gguf("--model-dir")
    return advice


def _sets_of_shards(model_dir: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """By stem and count of their names: files by number."""
    found: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for path in sorted(model_dir.glob("*-of-*.safetensors")):
        name = SHARD.fullmatch(path.name)
        if name and path.is_file():
            found[name["stem"], int(name["count"])][int(name["number"])] = path
    return found


def whole_shards(model_dir: Path) -> list[Path]:
    """The shards of the only set whose names say that it is complete; else []."""
    whole = [
        [path for _, path in sorted(shards.items())]
        for (_, count), shards in _sets_of_shards(model_dir).items()
        if sorted(shards) == list(range(1, count + 1))
    ]
    return whole[0] if len(whole) == 1 else []


def _lacking_shards(model_dir: Path) -> str:
    (stem, count), shards = next(iter(_sets_of_shards(model_dir).items()), (("model", 0), {}))
    lacking = [f"{stem}-{number:05d}-of-{count:05d}" for number in range(1, count + 1) if number not in shards]
    return f"are not there ({', '.join(lacking[:3]) or 'several sets are begun'})"


def open_tensors(files: list[Path], framework: str) -> Iterator[tuple[str, Any]]:
    """(name, open safetensors file) of every tensor, file by file. Only headers are read.

    files: safetensors files.
    framework: "pt" or "np", what the open file gives tensors as.

    Raises CheckpointError for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework=framework) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                    yield name, tensors
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(path):
                raise _pointer(path) from error
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
        advice = remedy(model_dir)
        if "image_processor" in (read_json(model_dir / SHARED) if (model_dir / SHARED).is_file() else {}):
            advice = f"{SHARED} has its settings; {normalise(model_dir)}"
        raise CheckpointError(f"{model_dir} lacks {PROCESSOR}: {advice}")
    return read_json(model_dir / PROCESSOR)


def token_format(model_dir: Path, processor: dict[str, Any]) -> dict[str, Any] | None:
    """The token format of an image processor: its DCTConfig as a dict, with "name" and "merge". None for pixels.

    model_dir: Hugging Face directory, named in the message.
    processor: preprocessor_config.json.

    Only types are checked, because DCTConfig imports torch. Raises CheckpointError for wrong types, or where other
    fields of the processor contradict the format.
    """
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


def note_on_old_code(model_dir: Path) -> str | None:
    """A line for a coefficient form beside whose weights the processor's code is as it was before transformers 4.52;
    None for any other directory. This repository reads it all the same. Raises CheckpointError."""
    processor = read_processor(model_dir)
    if processor.get("dct") is None or "AutoVideoProcessor" in (processor.get("auto_map") or ()):
        return None
    return (
        f"{model_dir} was converted by an earlier version: transformers after 4.51 does not load its processor. "
        f"Convert the model again for that, or {normalise(model_dir)}"
    )


def reads_both_ways(skip_share: float | None) -> bool:
    """Whether a model that skips cells reads as well with all of them.

    skip_share: float or None. Of its training. None: not known.
    """
    return skip_share is not None and skip_share <= SHARE_FOR_BOTH


def note_on_skipping(model_dir: Path) -> str | None:
    """A line for who is about to use the stock form, which reads all cells, of a coefficient form that has learned to
    read some alone. None for any other directory. Raises CheckpointError.

    model_dir: Path. Of the coefficient form.
    """
    path = model_dir / PROCESSOR
    skipping = skipping_in(path, read_json(path)) if path.is_file() else {}
    if not skipping or reads_both_ways(skipping.get("skip_share")):
        return None
    said = f"{model_dir} was trained with --skip-db {skipping['skip_db']:g}, but its stock form reads all cells"
    return f"{said}. {cost_of_all_cells(model_dir)}"


def skipping_in(path: Path, saved: dict[str, Any], advice: str = "take it out") -> dict[str, Any]:
    """`SKIPPING` among the settings of an image processor, as far as they are there. {} for a model that skips nothing.

    path: File of the settings, named in the message.
    saved: The settings.
    advice: What the user should do. The end of the message.

    Raises CheckpointError for a value that cannot be.
    """
    if not saved.get("skip_db"):
        return {}
    found = {name: saved[name] for name in SKIPPING if saved.get(name) is not None}
    for name, value in found.items():
        what, possible = SKIPPING[name]
        if not possible(value):
            raise CheckpointError(f"{path} has {name} {value!r}, which is no {what}: {advice}")
    return found


def recorded_skipping(model_dir: Path) -> dict[str, Any]:
    """`SKIPPING` of the coefficient form that a stock form was made from. {} for any other directory, for a model that
    skips nothing, and for a stock form that was made before this was recorded. Raises CheckpointError."""
    path = model_dir / STOCK_FORM
    return skipping_in(path, read_json(path)) if path.is_file() else {}


def note_on_all_cells(model_dir: Path) -> str | None:
    """A line for who is about to ask a stock form whose model has learned to read some of the cells alone. None for any
    other directory. Raises CheckpointError."""
    skipping = recorded_skipping(model_dir)
    share = skipping.get("skip_share")
    if not skipping or reads_both_ways(share):
        return None
    more = [*([] if share is None else [f"share {share:g}"]), *(["noise floor"] * skipping.get("skip_noise_floor", 0))]
    how = f"{skipping['skip_db']:g} dB" + (f" ({', '.join(more)})" if more else "")
    return (
        f"{model_dir} was trained with cells left out at {how}, but it is a stock form, which reads all cells. "
        f"This can cost accuracy. To leave them out: {_how_to_skip(model_dir)}; for both readings, train with "
        f"SKIP_SHARE={SHARE_FOR_BOTH:g}"
    )


def note_on_saved_again(model_dir: Path, named: Path | None = None) -> str | None:
    """A line for a stock form that transformers has loaded and saved again, without the files that it does not know.
    None for any other directory. Raises CheckpointError.

    transformers 4.51 saves neither file, later versions save the second.

    model_dir: Hugging Face directory.
    named: What the line calls it. None: model_dir.
    """
    config = read_config(model_dir)
    lost = [name for name in (STOCK_FORM, VIDEO_PROCESSOR) if not (model_dir / name).is_file()]
    if STOCK_FORM not in lost or not reads_larger_patches(config):
        return None
    videos = ", and videos are sampled with the defaults" if VIDEO_PROCESSOR in lost else ""
    return (
        f"{named or model_dir} has patches of {patch_of(config)[1]} px, as the stock form of a DCT model, but no "
        f"{' and no '.join(lost)}: transformers does not save this again. So it is not known whether cells were left "
        f"out in training{videos}. Copy what is missing from the folder that was loaded"
    )


def _how_to_skip(model_dir: Path) -> str:
    """The command that asks the coefficient form of a stock form; where a run has not left one, that makes it."""
    trained = model_dir.with_name("hf_dct") if model_dir.name == "hf" else None
    if trained and (trained / "config.json").is_file():
        return f"python evaluate_qwen2vl.py --model-dir {trained} --data-dir SHARDS --output-dir SKIPPED"
    return f"python convert_checkpoint.py --to dct --model-dir {model_dir} --output-dir {model_dir}-dct, and ask that"


def note_on_threshold(skip_db: float | None) -> str:
    """What to know of a threshold that was probably not meant, such as the 1 of a switch. "" for others, and for None.

    skip_db: dB.
    """
    if not skip_db or skip_db >= LEAST_USEFUL_DB:
        return ""
    return f"--skip-db {skip_db:g} is a PSNR in dB, and only what differs by very much is kept: 38 is usual"


def cost_of_all_cells(model_dir: Path) -> str:
    """What to type to see how a model that skips cells answers without skipping."""
    return (
        f"This can cost accuracy. To measure it: python evaluate_qwen2vl.py --skip-db 0 --model-dir {model_dir} "
        "--data-dir SHARDS --output-dir ALL_CELLS"
    )


def check_format(
    model_dir: Path, processor: dict[str, Any], dct: dict[str, Any] | None, shape: tuple[int, ...] | None = None
) -> None:
    """Checks that processor, config.json and weights have one token format.

    model_dir: Hugging Face directory.
    processor: preprocessor_config.json.
    dct: The processor's token format, as `token_format` gives it.
    shape: Of the patch embedding. None: read from the weights.

    Raises CheckpointError if they do not fit together.
    """
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
    shape = shape or patch_embedding_shape(safetensors_files(model_dir))
    wanted = (tower_width(config), *reads)
    if shape != wanted:
        raise CheckpointError(f"{model_dir}: {PATCH_EMBEDDING} is {_by(shape)}, config.json says {_by(wanted)}: "
                              f"{remedy(model_dir)}")  # fmt: skip


def check_checkpoint(model_dir: Path) -> dict[str, Any] | None:
    """The token format of a checkpoint, None for pixels, after checks that need no model.

    Raises CheckpointError if it is seen that processor, tokenizer or model cannot be loaded.
    """
    processor = read_processor(model_dir)
    dct = token_format(model_dir, processor)
    check_format(model_dir, processor, dct)
    saved_pixel_bounds(model_dir)
    check_tokenizer(model_dir)
    for name in PARSED:
        if (model_dir / name).is_file():
            read_json(model_dir / name)
    return dct


def normalise(model_dir: Path) -> str:
    """The command that rewrites a pixel model as transformers 4.51 reads it."""
    return f"python convert_checkpoint.py --to stock --model-dir {model_dir} --output-dir {model_dir}-stock"


def remedy(model_dir: Path) -> str:
    """What to do with a directory whose files do not fit together. The end of a message.

    A pixel model was not made by a conversion, and a conversion into its place would replace it. Raises CheckpointError
    for a broken config.json.
    """
    if reads_pixel_patches(read_config(model_dir)):
        return "get its files again"
    again = f"python convert_checkpoint.py --model-dir QWEN2_VL --output-dir {model_dir} --force"
    return f"put its files back as they were, or convert again, which loses what was trained: {again}"


def _by(sides: Iterable[Any]) -> str:
    return " x ".join(map(str, sides))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is int for value in values)
