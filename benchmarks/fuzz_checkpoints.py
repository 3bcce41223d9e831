"""Conversion and its checks against damaged checkpoints: mutated configurations, tokenizers, processors and tensors.

    python -m benchmarks.fuzz_checkpoints --inputs 3000 --json fuzz.json

Every input must end as refused in one line, with nothing written, or as a converted directory that truly loads: all
tensors, the processor, a forward pass and generation. Directories that were converted before are mutated, too: what
passes --check must load. The model is the tiny one of the tests. The exit status is 1 if there was a finding.
"""

import copy
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import fuzzing
from benchmarks.fuzzing import Finding, Target, mutate, mutate_json, quiet
from dct_qwen2vl.common.scripts import UserError

KINDS = {"config": 30, "tokenizer": 18, "processor": 16, "tensors": 16, "files": 8, "converted": 12}
FILES = {
    "config": ("config.json", "generation_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                  "added_tokens.json"),
    "processor": ("preprocessor_config.json", "processor_config.json", "chat_template.json",
                  "video_preprocessor_config.json"),
}  # fmt: skip
WEIGHTS = "model.safetensors"
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 0.5, -0.5, 1e30, float("nan"), float("inf"), ""),
    *(
        "bfloat16",
        "gelu",
        "default",
        "yarn",
        "flash_attention_2",
        "x",
        "é\ud800",
        [],
        [1],
        [1, 2, 3],
        [None],
        {},
        {"a": 1},
    ),
)
DTYPES = ("F32", "BF16", "F16", "F64", "I32", "U8", "F8_E4M3", "BOOL", "X")
TEXTS = ["user\nWhat colour is the circle?", "assistant\nThe circle is red.", "You are a helpful assistant."] * 8
MEMORY = 32 << 30  # bytes of address space; torch alone takes several of them


@cache
def sound(form: str) -> Path:
    """A folder of this process: "pixels", or "x4", made of it."""
    import convert_checkpoint
    from dct_qwen2vl.toy.model import write_checkpoint

    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{form}-")) / form
    with quiet():
        if form == "pixels":
            write_checkpoint(TEXTS, folder, seed=3)
            several = {"processor_class": "Qwen2VLProcessor", "image_processor": {"size": {"min_pixels": 3136}}}
            (folder / "processor_config.json").write_text(json.dumps(several))
            (folder / "video_preprocessor_config.json").write_text(json.dumps({"fps": 1.0, "min_frames": 4}))
        else:
            convert_checkpoint.main(["--model-dir", str(sound("pixels")), "--output-dir", str(folder), "--dct", form])
    return folder


def copy_sound(form: str, folder: Path) -> Path:
    """Files that are not changed are links."""
    folder.mkdir()
    for path in sound(form).iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Mutations


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values in a value of JSON; of long lists some."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *places(inner, (*path, key))]]


def change_value(rng: random.Random, value: Any) -> None:
    """Replaces, removes, renames, nests or repeats something in an object."""
    path = rng.choice(places(value) or [()])
    if not path:
        return
    *outer, key = path
    holder = value
    for step in outer:
        holder = holder[step]
    kind = rng.randrange(8)
    if kind < 4:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[rng.choice((f"{key}s", f"_{key}", "text_config", "rope_parameters", "size", "dtype"))] = holder.pop(key)
    elif kind == 6:
        holder[key] = {key: holder[key]} if isinstance(key, str) else [holder[key]]
    elif type(holder[key]) in (int, float):
        holder[key] = rng.choice((holder[key] * 2, holder[key] + 1, -holder[key], holder[key] // 2, str(holder[key])))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def change_json(rng: random.Random, path: Path) -> None:
    """By its values, or by its bytes."""
    data = path.read_bytes()
    if rng.random() < 0.15:
        path.write_bytes(mutate_json(rng, data, data))
        return
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change_value(rng, value)
    path.write_text(json.dumps(value))


def change_file(rng: random.Random, folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    chance = rng.random()
    path.unlink()
    if chance < 0.05:
        return
    if chance < 0.1 or not name.endswith(".json"):
        path.write_bytes(mutate(rng, data, data))
        return
    path.write_bytes(data)
    change_json(rng, path)


def change_tensors(rng: random.Random, folder: Path) -> None:
    """Names, shapes and types in the header; the numbers stay."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 2, 5))):
        change_header(rng, header)
    words = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(words)) + words + data[8 + size :])


def change_header(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"] or ["x"])
    tensor, kind = header.get(name, {}), rng.randrange(7)
    if kind == 0:
        header[name] = {**tensor, "shape": rng.choice((tensor.get("shape", [])[::-1], [0], [-1], [2**40], "x", None))}
    elif kind == 1:
        header[name] = {**tensor, "dtype": rng.choice(DTYPES)}
    elif kind == 2:
        header.pop(name, None)
    elif kind == 3:
        prefix = rng.choice(("module.", "base_model.model.", "a.b.c.", "model.", "language_model.", "", "."))
        for old in [old for old in header if old != "__metadata__"]:
            header[prefix + old] = header.pop(old)
    elif kind == 4:
        header[rng.choice((f"x.{name}", f"{name}x", name.upper(), "é", name.replace("model.", "")))] = header.pop(
            name, {}
        )
    elif kind == 5:
        header[rng.choice((f"copy.{name}", "lm_head.weight", "extra"))] = tensor
    else:
        change_value(rng, header)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of an input


def run_mutated(kind: str, rng: random.Random) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = copy_sound("pixels", Path(name) / "source")
        for file in {rng.choice(FILES[kind]) for _ in range(rng.choice((1, 1, 2)))}:
            change_file(rng, folder, file)
        return convert(folder, sound_numbers=True)


def run_config(rng: random.Random) -> str:
    return run_mutated("config", rng)


def run_tokenizer(rng: random.Random) -> str:
    return run_mutated("tokenizer", rng)


def run_processor(rng: random.Random) -> str:
    return run_mutated("processor", rng)


def run_tensors(rng: random.Random) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = copy_sound("pixels", Path(name) / "source")
        change_tensors(rng, folder)
        return convert(folder, sound_numbers=False)


def run_files(rng: random.Random) -> str:
    """Files that are cut, empty, gone or of another kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_sound("pixels", Path(name) / "source")
        for path in rng.sample(sorted(folder.iterdir()), rng.choice((1, 1, 2))):
            data = path.read_bytes()
            path.unlink()
            kind = rng.randrange(6)
            if kind == 0:
                path.write_bytes(data[: rng.randrange(len(data) + 1)])
            elif kind == 1:
                path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
            elif kind == 2:
                path.write_bytes(b"\xef\xbb\xbf" + data)
            elif kind == 3:
                path.mkdir()
            elif kind == 4:
                path.write_bytes(mutate(rng, data, data))
        return convert(folder, sound_numbers=False)


def run_converted(rng: random.Random) -> str:
    """A directory that was converted, as training and evaluation check it."""
    from dct_qwen2vl.checkpoints.inspection import check_checkpoint
    from dct_qwen2vl.checkpoints.loading import check_directory

    with tempfile.TemporaryDirectory() as name, quiet():
        folder = copy_sound("x4", Path(name) / "x4")
        files = [file for kind in FILES.values() for file in kind if (folder / file).is_file()]
        if rng.random() < 0.3:
            change_tensors(rng, folder)
        else:
            change_file(rng, folder, rng.choice(files))
        try:
            check_checkpoint(folder)
            check_directory(folder)
        except UserError as error:
            return refused(error)
        load(folder, sound_numbers=False)
        return "stored: it passes the checks and loads"


def convert(folder: Path, sound_numbers: bool) -> str:
    """sound_numbers: the weights are whole, so logits are finite."""
    from dct_qwen2vl.checkpoints.conversion import convert as convert_directory
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

    output = folder.with_name("x4")
    with quiet():
        try:
            convert_directory(folder, output, DCTConfig.preset("x4"))
        except UserError as error:
            left = [path.name for path in folder.parent.iterdir() if path != folder]
            if left:
                raise Finding(f"a refusal leaves {left}") from error
            return refused(error)
        load(output, sound_numbers)
    return "stored: a converted directory that loads"


def refused(error: UserError) -> str:
    if "\n" in str(error) or len(str(error)) > 1200:
        raise Finding(f"an error of several lines: {error}") from error
    return "skipped: refused in one line"


def load(folder: Path, sound_numbers: bool) -> None:
    """As training and evaluation do. Raises Finding."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from dct_qwen2vl.checkpoints.hf_folder import load_processor

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    if any(report.values()):
        raise Finding(f"loaded with {dict(report)}")
    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = np.zeros((60, 70, 3), np.uint8)
    processor.image_processor.max_pixels = min(processor.image_processor.max_pixels, 200_000)
    processor.image_processor.min_pixels = min(processor.image_processor.min_pixels, 3136)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        model.generate(
            **inputs, max_new_tokens=2, do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True
        )
    if sound_numbers and not bool(torch.isfinite(logits).all()):
        raise Finding("logits that are not finite")
    with tempfile.TemporaryDirectory() as again:
        model.config.save_pretrained(again)
        model.generation_config.save_pretrained(again)
        AutoConfig.from_pretrained(again)


def prepare() -> None:
    """What is made once in a process."""
    import logging

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    load(sound("x4"), sound_numbers=True)


TARGET = Target(
    "fuzz_checkpoints",
    KINDS,
    {
        "config": run_config,
        "tokenizer": run_tokenizer,
        "processor": run_processor,
        "tensors": run_tensors,
        "files": run_files,
        "converted": run_converted,
    },
    prepare,
    MEMORY,
)


def main(argv: list[str] | None = None) -> int:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return fuzzing.run_target(TARGET, argv, __doc__, inputs=3_000)


if __name__ == "__main__":
    sys.exit(main())
