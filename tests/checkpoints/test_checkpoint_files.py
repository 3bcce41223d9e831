"""What of a checkpoint is refused before anything heavy is imported: in one line, by finetune_qwen2vl.py --check."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline import edit_json
from safetensors.torch import load_file, save_file

import finetune_qwen2vl
from dct_qwen2vl.checkpoints.inspection import (
    PARSED,
    PATCH_EMBEDDING,
    PROCESSOR,
    CheckpointError,
    check_checkpoint,
    safetensors_files,
)
from dct_qwen2vl.training import checks, config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy_of(converted, tmp_path) -> Callable[[], Path]:
    """copy_of(): a copy of the tiny x4 checkpoint that a test may damage."""
    return lambda: Path(shutil.copytree(converted("x4"), tmp_path / "damaged"))


def in_shards(folder: Path) -> None:
    """The weights in two files, and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def without_patch_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[PATCH_EMBEDDING]
    save_file(tensors, folder / WEIGHTS)


def with_another_patch_embedding(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), PATCH_EMBEDDING: torch.zeros(128, 1176, 1, 1, 1)}, folder / WEIGHTS)


def with_another_merge(folder: Path) -> None:
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "spatial_merge_size": 4})


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):  # vocab.json alone is none
        (folder / name).unlink()


DAMAGES = {
    "lacks model.safetensors: only whole safetensors": lambda folder: (folder / WEIGHTS).unlink(),
    "lacks model-00002-of-00002.safetensors: only whole safetensors": without_a_shard,
    "model.safetensors is damaged (": cut_short,
    f"no {PATCH_EMBEDDING} in model.safetensors of": without_patch_embedding,
    f"{PATCH_EMBEDDING} is 128 x 1176 x 1 x 1 x 1, config.json says 128 x 1764 x 1 x 1 x 1": (
        with_another_patch_embedding
    ),
    "has no tokenizer (no tokenizer.json)": without_tokenizer,
    f"lacks {PROCESSOR}: put its files back as they were, or convert again": lambda folder: (
        folder / PROCESSOR
    ).unlink(),
    "merged 2 x 2, config.json beside it reads 1764 x 1 x 1 x 1, merged 4 x 4": with_another_merge,
    "is of model_type 'llava', only qwen2_vl": lambda folder: edit_json(folder / "config.json", model_type="llava"),
    f"{PROCESSOR} has no token format in its field dct": lambda folder: edit_json(folder / PROCESSOR, dct={"name": 4}),
    "has patch_size 56, its token format x4 has 28": lambda folder: edit_json(folder / PROCESSOR, patch_size=56),
}


def refused(model_dir: Path, tmp_path: Path, one_line_error) -> str:
    """The one line with which `--check` refuses a model; there is no data either."""
    command = ["--model-dir", str(model_dir), "--data-dir", str(tmp_path / "no"), "--output-dir", str(tmp_path / "o")]
    assert finetune_qwen2vl.main([*command, "--engine", "automodel", "--check"]) == 1
    line = one_line_error()
    assert line.startswith("finetune_qwen2vl.py: ") and str(model_dir) in line
    return line


@pytest.mark.parametrize("message", DAMAGES)
def test_checkpoints_that_cannot_be_loaded_are_refused_in_one_line(message, copy_of, tmp_path, one_line_error):
    damaged = copy_of()
    DAMAGES[message](damaged)
    assert message in refused(damaged, tmp_path, one_line_error)


BROKEN = {"{": "is not JSON (", "[]": "is JSON, but no object with fields", "\xff": "is not JSON ("}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["config.json", PROCESSOR, INDEX, *PARSED])
def test_files_that_are_no_json_objects_are_refused_in_one_line(name, content, copy_of, tmp_path, one_line_error):
    damaged = copy_of()
    in_shards(damaged)
    (damaged / name).write_bytes(content.encode("latin-1"))
    line = refused(damaged, tmp_path, one_line_error)
    assert f"{damaged / name} {BROKEN[content]}" in line and line.endswith(": get the file again")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (PROCESSOR, {"min_pixels": "many"}, "has min_pixels 'many', which is no number"),
        (PROCESSOR, {"max_pixels": [1]}, "has max_pixels [1], which is no number"),
        (PROCESSOR, {"size": [1]}, "has the size [1], which has no fields"),
        (PROCESSOR, {"dct": ["x4"]}, "has no token format in its field dct"),
        ("config.json", {"vision_config": 5}, "has no vision_config"),
        (INDEX, {"weight_map": None}, "does not say in which files the tensors are"),
        (INDEX, {"weight_map": {"lm_head.weight": 1}}, "does not say in which files the tensors are"),
    ],
)
def test_values_of_another_type_are_refused_in_one_line(name, changes, said, copy_of, tmp_path, one_line_error):
    damaged = copy_of()
    in_shards(damaged)
    edit_json(damaged / name, **changes)
    assert f"{damaged / name} {said}" in refused(damaged, tmp_path, one_line_error)


@pytest.mark.parametrize("content", [*BROKEN, None])
def test_a_broken_file_for_dct_is_refused_in_one_line(content, copy_of, tmp_path, one_line_error):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    command = ["--model-dir", str(copy_of()), "--data-dir", "no", "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main([*command, "--dct", str(path)]) == 1
    line = one_line_error()
    assert f"{path} {BROKEN.get(content, 'cannot be read (No such file')}" in line
    assert line.endswith(": give --dct a file that DCTConfig.save wrote")


def test_a_file_for_dct_without_the_fields_that_may_be_left_out(converted, tmp_path, capsys):
    """As convert_checkpoint.py --dct takes it."""
    dct = {**json.loads((converted("x4") / PROCESSOR).read_text())["dct"], "name": "custom"}
    model = Path(shutil.copytree(converted("x4"), tmp_path / "own"))
    edit_json(model / PROCESSOR, dct=dct)
    (tmp_path / "own.json").write_text(json.dumps({name: dct[name] for name in ("block", "chroma", "kept", "scale")}))
    assert checks.check_model(model, str(tmp_path / "own.json")).dct == dct


def test_a_token_format_that_contradicts_itself_is_refused_when_it_is_read(copy_of):
    damaged = copy_of()
    dct = json.loads((damaged / PROCESSOR).read_text())["dct"]
    edit_json(damaged / PROCESSOR, dct={**dct, "chroma": "422"})
    settings = config.TrainingConfig(model_dir=damaged, data_dir=Path("d"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json cannot be used \(DCTConfig.chroma must be"):
        finetune_qwen2vl.load_processor(settings, checks.check_model(damaged, None))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("x16", "makes tokens of 2352 x 1 x 1 x 1 (x16), merged 2 x 2, config.json beside it reads 1764 x 1 x 1 x 1"),
        (None, "makes tokens of 3 x 2 x 14 x 14 (pixels), merged 2 x 2, config.json beside it reads 1764 x 1 x 1 x 1"),
    ],
)
def test_a_processor_of_another_format_is_refused(
    other, said, copy_of, converted, qwen2vl_directory, tmp_path, one_line_error
):
    damaged = copy_of()
    shutil.copyfile((converted(other) if other else qwen2vl_directory) / PROCESSOR, damaged / PROCESSOR)
    line = refused(damaged, tmp_path, one_line_error)
    assert said in line
    assert line.endswith(f"python convert_checkpoint.py --model-dir QWEN2_VL --output-dir {damaged} --force")


def test_whole_checkpoints_are_not_refused(converted, qwen2vl_directory, copy_of, tmp_path):
    assert check_checkpoint(qwen2vl_directory) is None
    assert [check_checkpoint(converted(name))["name"] for name in ("exact", "x4", "x16")] == ["exact", "x4", "x16"]
    sharded = copy_of()
    in_shards(sharded)
    assert check_checkpoint(sharded)["name"] == "x4"


def test_an_old_index_beside_one_file_is_not_asked(copy_of, converted):
    """Saved in shards first, then in one file: save_pretrained leaves the index, and transformers does not ask it."""
    folder = copy_of()
    in_shards(folder)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    shutil.copyfile(converted("x4") / WEIGHTS, folder / WEIGHTS)
    assert check_checkpoint(folder)["name"] == "x4" and safetensors_files(folder) == [folder / WEIGHTS]


PIXEL_DAMAGES = {
    f"lacks {PROCESSOR}": lambda folder: (folder / PROCESSOR).unlink(),
    "config.json says 64 x 3 x 2 x 14 x 14": lambda folder: edit_json(
        folder / "config.json",
        vision_config={**json.loads((folder / "config.json").read_text())["vision_config"], "embed_dim": 64},
    ),
    "has a size without shortest_edge and longest_edge": lambda folder: edit_json(
        folder / PROCESSOR, size={"min_pixels": 3136, "max_pixels": 1003520}
    ),
    "has a size without shortest_edge and longest_edge, which": lambda folder: edit_json(folder / PROCESSOR, size=5),
}


@pytest.mark.parametrize("message", PIXEL_DAMAGES)
def test_nobody_is_told_to_convert_into_the_place_of_a_pixel_model(message, qwen2vl_directory, tmp_path):
    damaged = Path(shutil.copytree(qwen2vl_directory, tmp_path / "pixels"))
    PIXEL_DAMAGES[message](damaged)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(damaged)
    said = str(caught.value)
    assert message in said and "convert_checkpoint" not in said
    assert said.endswith((": get its files again", ": take the field size out"))


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_one_form_of_the_tokenizer_is_enough(names, copy_of, converted):
    from transformers import AutoTokenizer

    folder = copy_of()
    for name in names:
        (folder / name).unlink()
    check_checkpoint(folder)
    text = "<|im_start|>user\nWhat colour is the circle?<|im_end|>"
    ours, theirs = (AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (folder, converted("x4")))
    assert ours == theirs


def test_only_headers_of_weights_are_read(copy_of):
    """A file of 50 GB, nearly all of it a hole, would take longer."""
    folder = copy_of()
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, hole = json.loads(data[8 : 8 + size]), 50_000_000_000
    start = len(data) - 8 - size
    header["hole"] = {"dtype": "U8", "shape": [hole], "data_offsets": [start, start + hole]}
    words = json.dumps(header).encode()
    path.write_bytes(len(words).to_bytes(8, "little") + words + data[8 + size :])
    with path.open("r+b") as file:
        file.truncate(8 + len(words) + start + hole)
    start = time.monotonic()
    check_checkpoint(folder)
    path.unlink()
    assert time.monotonic() - start < 5
