"""Conversion of a whole Qwen2-VL directory: what changes, what must not, what stock transformers makes of it."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import edit_json
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import convert_checkpoint
from convert_checkpoint import CheckpointError
from dct_qwen2vl.checkpoints.conversion import convert, new_directory
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_tokenizer import DCTConfig, fold_patch_embedding

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
X4 = DCTConfig.preset("x4")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert not tensors.keys() & set(file.keys()), "a tensor stands in two shards"
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
    return tensors


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(qwen2vl_directory, tmp_path_factory) -> Path:
    """The tiny checkpoint in shards, with the licence and hidden files that a download may hold."""
    folder = tmp_path_factory.mktemp("source") / "Qwen2-VL-tiny"
    shutil.copytree(qwen2vl_directory, folder)
    (folder / "model.safetensors").unlink()
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen2vl_directory)
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    (folder / "LICENSE").write_text("licence\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".cache").mkdir()
    (folder / "old.bin").write_bytes(b"weights of another format")
    return folder


@pytest.fixture
def copy_of(source, tmp_path) -> Callable[[], Path]:
    """copy_of(): a copy of `source` that a test may damage."""

    def copy() -> Path:
        return Path(shutil.copytree(source, tmp_path / "damaged"))

    return copy


@pytest.fixture(scope="module")
def output(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("output") / "x4"
    convert(source, folder, X4, shard_bytes=150_000)
    return folder


def run(model_dir: Path, output_dir: Path, *options: str) -> int:
    return convert_checkpoint.main(["--model-dir", str(model_dir), "--output-dir", str(output_dir), *options])


# The weights


@pytest.fixture(scope="module")
def small_patches(qwen2vl_directory, tmp_path_factory) -> Path:
    """The tiny model with patches of 7 px."""
    folder = tmp_path_factory.mktemp("small") / "patches-7"
    shutil.copytree(qwen2vl_directory, folder)
    tensors = read_tensors(folder)
    tensors[PATCH_EMBEDDING] = tensors[PATCH_EMBEDDING][..., ::2, ::2].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "patch_size": 7})
    edit_json(folder / "preprocessor_config.json", patch_size=7)
    return folder


def test_blocks_are_in_proportion_to_the_patch_of_the_model(small_patches, tmp_path, capsys):
    """The folded model reads an image as the pixel model reads it at half its sides; the way back gives the pixels."""
    assert run(small_patches, tmp_path / "x4", "--dct", "x4") == 0
    assert "now covers 28x28 px of 2 frames (was 14x14 px of 2)" in capsys.readouterr().out
    processor = DCTImageProcessor.from_pretrained(tmp_path / "x4")
    assert processor.dct_config.block == (2, 14, 14) and processor.dct_config.num_coefficients == 441
    flat = torch.full((2, 3, 56, 56), 0.7)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(small_patches)
    folded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "x4")
    small = AutoProcessor.from_pretrained(small_patches, use_fast=False).image_processor
    pixels = small(flat[0, :, :28, :28], do_rescale=False, do_resize=False, return_tensors="pt")
    tokens = processor(flat[0].permute(1, 2, 0).numpy() * 255, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        wanted = stock.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        found = folded.visual(tokens["pixel_values"], grid_thw=tokens["image_grid_thw"])
    assert wanted.shape == found.shape == (4, stock.config.hidden_size)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))

    assert (
        convert_checkpoint.main(
            ["--to", "stock", "--model-dir", str(tmp_path / "x4"), "--output-dir", str(tmp_path / "stock")]
        )
        == 0
    )
    vision = json.loads((tmp_path / "stock/config.json").read_text())["vision_config"]
    assert vision["patch_size"] == 14  # as large as the patch of a pixel model
    assert run(tmp_path / "stock", tmp_path / "again") == 1
    assert "is the stock form of a DCT model (x4): add --to dct" in capsys.readouterr().err
    assert (
        convert_checkpoint.main(
            ["--to", "dct", "--model-dir", str(tmp_path / "stock"), "--output-dir", str(tmp_path / "again")]
        )
        == 0
    )
    before, after = (read_tensors(tmp_path / name)[PATCH_EMBEDDING] for name in ("x4", "again"))
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))


def test_a_model_of_all_tokens_with_another_patch_is_a_pixel_model_again(small_patches, tmp_path):
    assert run(small_patches, tmp_path / "exact", "--dct", "exact") == 0
    for target, source in (("stock", "exact"), ("x4", "stock")):
        more = ["--to", "stock"] if target == "stock" else ["--dct", "x4"]
        assert run(tmp_path / source, tmp_path / target, *more) == 0
    direct = convert(small_patches, tmp_path / "direct", DCTConfig.preset("x4", (2, 7, 7))).dct
    assert direct == DCTImageProcessor.from_pretrained(tmp_path / "x4").dct_config
    ways = [read_tensors(tmp_path / name)[PATCH_EMBEDDING] for name in ("x4", "direct")]
    assert torch.allclose(*ways, atol=1e-5 * float(ways[0].abs().max()))


def test_a_missing_processor_gets_the_patch_of_the_model(small_patches, tmp_path, capsys):
    folder = Path(shutil.copytree(small_patches, tmp_path / "alone"))
    (folder / "preprocessor_config.json").unlink()
    assert run(folder, tmp_path / "x4") == 0
    assert "Qwen2-VL's own settings are taken" in capsys.readouterr().out
    assert DCTImageProcessor.from_pretrained(tmp_path / "x4").dct_config.block == (2, 14, 14)


def test_only_the_patch_embedding_changes(source, output):
    before, after = read_tensors(source), read_tensors(output)
    assert set(before) == set(after)
    folded = after.pop(PATCH_EMBEDDING)
    assert torch.equal(folded, fold_patch_embedding(before.pop(PATCH_EMBEDDING), X4))
    assert folded.shape == (128, 1764, 1, 1, 1)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_shards_and_their_index(output):
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for file in files:
        with safe_open(output / file, framework="pt") as tensors:
            names = set(tensors.keys())
            assert tensors.metadata() == {"format": "pt"}
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert names == {name for name, its_file in index["weight_map"].items() if its_file == file}
        assert size <= 150_000 or len(names) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(output).values())


def test_a_small_model_is_one_file(qwen2vl_directory, tmp_path):
    total = convert(qwen2vl_directory, tmp_path / "x4", X4).weight_bytes
    assert [path.name for path in (tmp_path / "x4").glob("*safetensors*")] == ["model.safetensors"]
    assert total == sum(tensor.nbytes for tensor in read_tensors(tmp_path / "x4").values())


def test_sharding_does_not_matter(qwen2vl_directory, output, tmp_path):
    convert(qwen2vl_directory, tmp_path / "x4", X4)
    whole, sharded = read_tensors(tmp_path / "x4"), read_tensors(output)
    assert set(whole) == set(sharded) and all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_the_type_of_the_weights_is_kept(qwen2vl_directory, tmp_path):
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen2vl_directory, torch_dtype=torch.bfloat16)
    shutil.copytree(qwen2vl_directory, tmp_path / "bf16")
    model.save_pretrained(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "x4", X4)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "x4").values()} == {torch.bfloat16}


# The other files


def test_config_and_other_files(source, output):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert before["vision_config"].pop("in_chans") == 3
    before["vision_config"].update(in_channels=1764, patch_size=1, temporal_patch_size=1)
    assert after == before
    rewritten = {"config.json", "preprocessor_config.json"}
    before, after = all_bytes(output), {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    same = {name for name in before if before[name] == after.get(name)}
    assert {"LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= same
    weights = {name for name in before if "safetensors" in name}
    assert set(before) - same - weights == rewritten | {
        f"{module}_dct.py"
        for module in (
            *("configuration", "transform", "skipping"),
            *("image_colours", "image_inputs", "image_sizes", "image_processing"),
        )
    }
    assert not {".gitattributes", ".cache", "old.bin"} & set(before)


def test_everybody_may_read_what_was_written(output):
    assert oct(output.stat().st_mode & 0o777) == "0o755"
    assert {oct(path.stat().st_mode & 0o777) for path in output.glob("*.safetensors")} == {"0o644"}


def test_the_same_input_gives_the_same_bytes(source, output, tmp_path):
    convert(source, tmp_path / "again", X4, shard_bytes=150_000)
    assert all_bytes(tmp_path / "again") == all_bytes(output)


def test_pixel_bounds_are_the_sources_unless_given(qwen2vl_directory, output, tmp_path):
    read = json.loads((output / "preprocessor_config.json").read_text())
    assert (read["min_pixels"], read["max_pixels"]) == (56 * 56, 448 * 448)
    assert read["image_processor_type"] == "DCTImageProcessor"
    assert read["auto_map"] == {
        f"Auto{kind}Processor": f"image_processing_dct.DCT{kind}Processor" for kind in ("Image", "Video")
    }
    assert run(qwen2vl_directory, tmp_path / "x4", "--min-pixels", "6272", "--max-pixels", "50176") == 0
    read = json.loads((tmp_path / "x4" / "preprocessor_config.json").read_text())
    assert (read["min_pixels"], read["max_pixels"]) == (6272, 50176)


# What stock transformers makes of it


def test_stock_transformers_loads_every_tensor(output):
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert {name: list(found) for name, found in report.items()} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    assert type(model) is Qwen2VLForConditionalGeneration
    assert model.visual.patch_embed.proj.weight.shape == (128, 1764, 1, 1, 1)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "still tied"


def test_untied_output_weights_are_kept(qwen2vl_directory, tmp_path):
    config = Qwen2VLConfig.from_pretrained(qwen2vl_directory, tie_word_embeddings=False)
    shutil.copytree(qwen2vl_directory, tmp_path / "untied")
    before = Qwen2VLForConditionalGeneration(config)
    before.save_pretrained(tmp_path / "untied")
    convert(tmp_path / "untied", tmp_path / "x4", X4)
    after, report = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "x4", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.lm_head.weight, after.model.embed_tokens.weight)


def test_auto_processor_reads_it_and_the_model_answers(output, natural_frames):
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert type(processor.image_processor).__name__ == "DCTImageProcessor"
    assert DCTConfig.from_dict(processor.image_processor.dct) == X4
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[natural_frames(1, 112, 168)[0]], return_tensors="pt")
    model = Qwen2VLForConditionalGeneration.from_pretrained(output)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_tokenizer_is_the_sources(source, output):
    text = "<|im_start|>user\nWhat colour is the circle?<|im_end|>"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template


def test_own_configuration_from_a_file(qwen2vl_directory, tmp_path, natural_frames, capsys):
    config = DCTConfig.select((4, 28, 28), "420", 900, name="long")
    config.save(tmp_path / "long.json")
    assert run(qwen2vl_directory, tmp_path / "long", "--dct", str(tmp_path / "long.json")) == 0
    assert "long, blocks of (4, 28, 28) -> 900 coefficients" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "long", trust_remote_code=True).image_processor
    frames = natural_frames(8, 112, 112)
    expected = DCTImageProcessor(config)(images=None, videos=[list(frames)])
    found = processor(images=None, videos=[list(frames)])
    np.testing.assert_array_equal(found["pixel_values_videos"], expected["pixel_values_videos"])
    model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "long")
    assert model.visual.patch_embed.proj.in_channels == 900


OWN = ("--block", "2", "28", "28", "--chroma", "420", "--num-coefficients", "500")


@pytest.mark.parametrize("order", ["variance", "weighted", "zigzag", "box"])
def test_own_configuration_from_flags(order, source, tmp_path, capsys):
    assert run(source, tmp_path / "own", *OWN, "--order", order) == 0
    assert f"2x28x28-420-{order}-500, blocks of (2, 28, 28) -> 500 coefficients" in capsys.readouterr().out
    weight = read_tensors(source)[PATCH_EMBEDDING]
    expected = DCTConfig.select((2, 28, 28), "420", 500, order=order, weight=weight if order == "weighted" else None)
    processor = AutoProcessor.from_pretrained(tmp_path / "own", trust_remote_code=True).image_processor
    found = DCTConfig.from_dict(processor.dct)
    assert (found.kept, found.scale) == (expected.kept, expected.scale)
    assert torch.equal(read_tensors(tmp_path / "own")[PATCH_EMBEDDING], fold_patch_embedding(weight, found))


def test_own_configuration_keeps_all_in_420_unless_told(qwen2vl_directory, tmp_path, capsys):
    assert run(qwen2vl_directory, tmp_path / "own", "--block", "1", "14", "14") == 0
    assert "1x14x14-420-all, blocks of (1, 14, 14) -> 294 coefficients" in capsys.readouterr().out


def test_own_configuration_with_another_table(qwen2vl_directory, tmp_path):
    table = json.loads(
        (Path(convert_checkpoint.__file__).parent / "dct_qwen2vl/dct/coefficient_table.json").read_text()
    )
    table["log2_power"] = (np.array(table["log2_power"]) + 2).tolist()
    (tmp_path / "mine.json").write_text(json.dumps(table))
    options = (*OWN, "--coefficient-table", str(tmp_path / "mine.json"))
    assert run(qwen2vl_directory, tmp_path / "own", *options) == 0
    scale = json.loads((tmp_path / "own" / "preprocessor_config.json").read_text())["dct"]["scale"]
    np.testing.assert_allclose(scale, 2 * np.array(DCTConfig.select((2, 28, 28), "420", 500).scale), rtol=1e-5)


def test_detail_of_gain_1_is_as_it_is(qwen2vl_directory, tmp_path):
    for name in ("x4", "exact"):
        assert run(qwen2vl_directory, tmp_path / name, "--dct", name, "--detail-gain", "1") == 0
        processor = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert DCTConfig.from_dict(processor["dct"]) == DCTConfig.preset(name)


def test_weights_are_those_that_transformers_takes(source, qwen2vl_directory, tmp_path):
    """One file, beside shards and their index that were there before."""
    folder = shutil.copytree(source, tmp_path / "both")
    shutil.copyfile(qwen2vl_directory / "model.safetensors", folder / "model.safetensors")
    tensors = {**read_tensors(qwen2vl_directory)}
    tensors[PATCH_EMBEDDING] = torch.zeros_like(tensors[PATCH_EMBEDDING])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not Qwen2VLForConditionalGeneration.from_pretrained(folder).visual.patch_embed.proj.weight.any()
    assert run(folder, tmp_path / "out") == 0
    assert not read_tensors(tmp_path / "out")[PATCH_EMBEDDING].any()


@pytest.mark.parametrize("options", [(), OWN, ("--dct", "FILE")], ids=["preset", "flags", "file"])
def test_louder_detail(options, qwen2vl_directory, tmp_path, capsys):
    DCTConfig.select((2, 28, 28), "420", 900, name="mine").save(tmp_path / "mine.json")
    options = [str(tmp_path / "mine.json") if option == "FILE" else option for option in options]
    for folder, gain in (("plain", ()), ("loud", ("--detail-gain", "10"))):
        assert run(qwen2vl_directory, tmp_path / folder, *options, *gain) == 0
    assert "-gain10, blocks of (2, 28, 28)" in capsys.readouterr().out
    plain, loud = (
        DCTConfig.from_dict(json.loads((tmp_path / folder / "preprocessor_config.json").read_text())["dct"])
        for folder in ("plain", "loud")
    )
    assert loud == plain.with_detail_gain(10)
    weights = [read_tensors(tmp_path / folder)[PATCH_EMBEDDING] for folder in ("plain", "loud")]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--detail-gain", "0"), "argument --detail-gain: expected a number over 0 and at most 1000, got 0"),
        (("--detail-gain", "nan"), "argument --detail-gain: expected a number over 0 and at most 1000, got nan"),
        ((*OWN, "--dct", "x4"), "argument --block: not allowed with argument --dct"),
        (("--order", "box"), "argument --order: needs --block, as in --block 2 28 28"),
        (("--dct", "x4", "--num-coefficients", "9"), "argument --num-coefficients: needs --block"),
        (("--block", "2", "28"), "argument --block: expected 3 arguments"),
        (("--block", "2", "28", "14"), "argument --block: the image processor needs square blocks, got 28 x 14 px"),
        (("--block", "2", "0", "0"), "argument --block: DCTConfig.block must be three positive whole numbers"),
        (("--block", "2", "15", "15"), "argument --block: DCTConfig.chroma 420 needs an even block height and width"),
        ((*OWN[:-1], "2353"), "has 1 to 2352 coefficients to keep, asked for 2353"),
        ((*OWN, "--order", "weighted", "--coefficient-table", "no.json"), "no.json is missing"),
        (("--block", "2", "28", "28", "--order", "energy"), "argument --order: invalid choice: 'energy'"),
    ],
)
def test_own_configurations_that_cannot_be_exit_with_2(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "own", *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# Errors: exit code 1, one line, nothing left behind


def without_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def without_patch_embedding(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    tensors = {"lm_head.weight": torch.zeros(384, 64), "model.norm.weight": torch.zeros(64)}
    save_file(tensors, folder / "model.safetensors")


def with_another_patch_embedding(folder: Path) -> None:
    tensors = {**read_tensors(folder), PATCH_EMBEDDING: torch.zeros(4, 3, 2, 16, 16)}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def with_nan(folder: Path) -> None:
    tensors = read_tensors(folder)
    tensors[PATCH_EMBEDDING][0, 0] = float("nan")
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


DAMAGES = {
    f"{PATCH_EMBEDDING} has values that are no numbers": with_nan,
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "model_type 'qwen3_vl', only qwen2_vl and": lambda folder: edit_json(folder / "config.json", model_type="qwen3_vl"),
    "has no vision_config": lambda folder: edit_json(folder / "config.json", vision_config=None),
    "lacks model-00002-of-": without_shard,
    "is damaged": with_cut_shard,
    "lacks 68 of the model's 70 tensors (visual.patch_embed.proj.weight, ": without_patch_embedding,
    f"{PATCH_EMBEDDING} is 4 x 3 x 2 x 16 x 16, config.json says 128 x 3 x 2 x 14": with_another_patch_embedding,
    "does not say in which files the tensors are": lambda folder: edit_json(
        folder / "model.safetensors.index.json", weight_map=[]
    ),
    "config.json is JSON, but no object": lambda folder: (folder / "config.json").write_text("[]"),
    "has max_pixels 0, which is no number of pixels": lambda folder: edit_json(
        folder / "preprocessor_config.json", max_pixels=0
    ),
    "has min_pixels 'many', which is no number": lambda folder: edit_json(
        folder / "preprocessor_config.json", min_pixels="many"
    ),
    "(ValueError: mean must have 3 elements": lambda folder: edit_json(
        folder / "preprocessor_config.json", image_mean=[0.5, 0.5]
    ),
}


def with_another_merge(folder: Path) -> None:
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "spatial_merge_size": 4})


DAMAGES["visual.merger.mlp.0.weight is 512 x 512, config.json says 2048 x 2048"] = with_another_merge


@pytest.mark.parametrize("message", DAMAGES)
def test_unusable_sources(message, copy_of, tmp_path, one_line_error):
    damaged = copy_of()
    DAMAGES[message](damaged)
    assert run(damaged, tmp_path / "x4") == 1
    error = one_line_error()
    assert error.startswith("convert_checkpoint.py: ") and message in error
    assert os.listdir(tmp_path) == ["damaged"], "a failed conversion leaves nothing"


@pytest.mark.parametrize(
    ("damage", "message"), [(without_patch_embedding, "lacks 68 of the model's"), (without_shard, "lacks model-")]
)
def test_unusable_sources_of_a_weighted_order(damage, message, copy_of, tmp_path, one_line_error):
    damaged = copy_of()
    damage(damaged)
    assert run(damaged, tmp_path / "own", *OWN, "--order", "weighted") == 1
    assert message in one_line_error()
    assert os.listdir(tmp_path) == ["damaged"]


def test_a_format_of_another_merge(qwen2vl_directory, tmp_path, one_line_error):
    DCTConfig.select((2, 28, 28), "420", 900, merge=4).save(tmp_path / "own.json")
    assert run(qwen2vl_directory, tmp_path / "x4", "--dct", str(tmp_path / "own.json")) == 1
    assert "merges 2x2 tokens, --dct says 4: make them equal" in one_line_error()


def test_weights_that_cannot_be_written_are_one_line(source, tmp_path, one_line_error):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: a larger file is an error
    try:
        assert run(source, tmp_path / "x4") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"could not be written to {tmp_path} (" in (said := one_line_error())
    assert said.endswith("make room, then run the same command again")
    assert not list(tmp_path.iterdir())


def test_a_converted_checkpoint_is_not_converted_again(output, tmp_path, one_line_error):
    assert run(output, tmp_path / "again") == 1
    assert "does not read pixel patches of 2 frames: is it converted already?" in one_line_error()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block": 28}, "DCTConfig.block must be a list of whole numbers"),
        ({"block": [2.0, 28.0, 28.0]}, "DCTConfig.block must be a list of whole numbers"),
        ({"kept": None}, "DCTConfig.kept must be a list of whole numbers"),
        ({"kept": [[0]]}, "DCTConfig.kept must be a list of whole numbers"),
        ({"kept": [0.0], "scale": [1]}, "DCTConfig.kept must be a list of whole numbers"),
        ({"scale": ["1"] * 1764}, "DCTConfig.scale must be a list of numbers"),
        ({"scale": 1.0}, "DCTConfig.scale must be a list of numbers"),
        ({"merge": "2"}, "DCTConfig.merge must be a whole number"),
        ({"merge": True}, "DCTConfig.merge must be a whole number"),
        ({"chroma": 420}, "DCTConfig.chroma must be a text"),
        ({"name": ["own"]}, "DCTConfig.name must be a text"),
        ({"chroma": "422"}, "DCTConfig.chroma must be one of 444, 420"),
        ({"colour": 1}, "a DCT configuration has the fields block, chroma, kept, mean, merge, name, scale"),
    ],
)
def test_a_format_file_with_wrong_values(changes, said, qwen2vl_directory, tmp_path, one_line_error):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**X4.to_dict(), **changes}))
    assert run(qwen2vl_directory, tmp_path / "own", "--dct", str(path)) == 1
    error = one_line_error()
    assert error.startswith(f"convert_checkpoint.py: {path}: {said}")
    assert error.endswith(": give --dct a file that DCTConfig.save wrote")
    assert os.listdir(tmp_path) == ["own.json"]
    with pytest.raises(CheckpointError):
        run(qwen2vl_directory, tmp_path / "own", "--dct", str(path), "--debug")


@pytest.mark.parametrize(
    ("content", "said"), [(b"{", "is not a JSON file"), (b"\xff", "is not a JSON file"), (None, "No such file")]
)
def test_a_format_file_that_cannot_be_read(content, said, qwen2vl_directory, tmp_path, one_line_error):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    assert run(qwen2vl_directory, tmp_path / "own", "--dct", str(path)) == 1
    error = one_line_error()
    assert str(path) in error and said in error


def test_a_format_without_detail_to_make_louder(qwen2vl_directory, tmp_path, one_line_error):
    assert run(qwen2vl_directory, tmp_path / "out", "--dct", "exact", "--detail-gain", "10") == 1
    assert "exact has no coefficients beyond a pixel model's patch" in one_line_error()


def test_a_source_that_is_not_there(tmp_path, one_line_error):
    assert run(tmp_path / "nowhere", tmp_path / "x4") == 1
    assert f"no config.json in {tmp_path / 'nowhere'}: give --model-dir" in one_line_error()
    for form in ("stock", "dct"):
        assert run(tmp_path / "nowhere", tmp_path / "x4", "--to", form) == 1
        assert f"no config.json in {tmp_path / 'nowhere'}: give --model-dir" in one_line_error()


def test_same_directory(copy_of, one_line_error):
    folder = copy_of()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for options in ([], ["--force"]):
        assert run(folder, folder.parent / "other" / ".." / folder.name, *options) == 1
        assert "--output-dir must differ from --model-dir" in one_line_error()
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_pixel_bounds_that_contradict(qwen2vl_directory, tmp_path, one_line_error, capsys):
    assert run(qwen2vl_directory, tmp_path / "x4", "--min-pixels", "1000000") == 1
    assert (
        "1 <= min_pixels <= max_pixels, got min_pixels 1000000 and max_pixels 200704: change --min-" in one_line_error()
    )
    said = "Note: --max-pixels {0} is below the checkpoint's min_pixels {1}, which becomes {0}."
    for source, name, most, *options in (
        (qwen2vl_directory, "x4", 2000),
        (tmp_path / "x4", "stock", 1500, "--to", "stock"),
        (tmp_path / "stock", "dct", 1000, "--to", "dct"),
    ):
        least = json.loads((source / "preprocessor_config.json").read_text())["min_pixels"]
        assert run(source, tmp_path / name, "--max-pixels", str(most), *options) == 0, "the least gives way"
        read = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert (read["min_pixels"], read["max_pixels"]) == (most, most)
        assert said.format(most, least) in capsys.readouterr().out.splitlines()
    assert run(qwen2vl_directory, tmp_path / "x5", "--max-pixels", "0") == 1
    assert "got min_pixels 0 and max_pixels 0: change --min-pixels or --max-pixels" in one_line_error()


def test_existing_output_is_kept_without_force(qwen2vl_directory, tmp_path, one_line_error, capsys):
    folder = tmp_path / "x4"
    assert run(qwen2vl_directory, folder) == 0
    (folder / "mine.txt").write_text("mine")
    before = all_bytes(folder)
    capsys.readouterr()
    assert run(qwen2vl_directory, folder, "--dct", "exact") == 1
    assert f"{folder} is not empty: choose another --output-dir, or --force" in one_line_error()
    assert all_bytes(folder) == before
    assert run(qwen2vl_directory, folder, "--dct", "exact", "--force") == 0
    assert json.loads((folder / "config.json").read_text())["vision_config"]["in_channels"] == 1176
    assert not (folder / "mine.txt").exists(), "the old checkpoint is replaced, not mixed with the new"
    assert os.listdir(tmp_path) == ["x4"]


def test_force_replaces_checkpoints_only(qwen2vl_directory, tmp_path, one_line_error):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert run(qwen2vl_directory, tmp_path / "thesis", "--force") == 1
    assert "is not empty" in one_line_error()
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_an_empty_output_folder_is_used(qwen2vl_directory, tmp_path):
    (tmp_path / "deep" / "x4").mkdir(parents=True)
    assert run(qwen2vl_directory, tmp_path / "deep" / "x4") == 0
    assert (tmp_path / "deep" / "x4" / "model.safetensors").is_file()


def test_a_link_to_the_output_folder_stays(qwen2vl_directory, tmp_path):
    """For a folder on another disk."""
    (tmp_path / "disk" / "x4").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "x4")
    for options in ([], ["--force"]):
        assert run(qwen2vl_directory, tmp_path / "link", *options) == 0
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["x4"]
        assert (tmp_path / "disk" / "x4" / "model.safetensors").is_file()
    assert run(qwen2vl_directory, tmp_path / "link") == 1


def test_what_a_killed_conversion_has_left_is_removed_and_what_another_writes_is_not(qwen2vl_directory, tmp_path):
    for name in (".x4-12345678.unfinished", ".x4-abcdefgh", ".x16-12345678.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with new_directory(qwen2vl_directory, tmp_path / "x4") as writing:
        assert run(qwen2vl_directory, tmp_path / "x4") == 0 and writing.is_dir()
        shutil.rmtree(tmp_path / "x4")
    assert sorted(os.listdir(tmp_path)) == [".x16-12345678.unfinished", ".x4-abcdefgh", "x4"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "file is a file: choose another --output-dir"),
        ("/proc", "/proc is a mounted disk: name a folder in it"),
        ("outer", "outer/model, which is in {}: choose another --output-dir"),
    ],
)
def test_places_that_cannot_be_replaced(place, said, qwen2vl_directory, copy_of, tmp_path, one_line_error):
    (tmp_path / "file").touch()
    model = Path(shutil.copytree(qwen2vl_directory, tmp_path / "outer" / "model"))
    shutil.copyfile(model / "config.json", tmp_path / "outer" / "config.json")  # a checkpoint, which --force replaces
    assert run(model, tmp_path / place, "--force") == 1
    assert said.format(tmp_path / place) in one_line_error()
    assert (model / "model.safetensors.index.json").is_file() or (model / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "there", "said"),
    [
        ("model/model.safetensors", None, "it is a file, give --model-dir the folder that it lies in, {}/model"),
        ("q4.gguf", "q4.gguf", "GGUF files are not read; give --model-dir the model in safetensors"),
        ("ggufs", "ggufs/q4.gguf", "GGUF files are not read; give --model-dir the model in safetensors"),
        ("runs", "runs/first/hf_dct/config.json", "give --model-dir {}/runs/first/hf_dct"),
        ("run", "run/checkpoints/step000002/hf/config.json", "give --model-dir {}/run/checkpoints/step000002/hf"),
        ("run/checkpoints", "run/checkpoints/step000002/hf/config.json", "{}/run/checkpoints/step000002/hf"),
        ("killed", "killed/.hf.tmp/config.json", "give --model-dir a Hugging Face Qwen2-VL directory"),
    ],
)
def test_what_is_no_model_is_told_where_one_is(given, there, said, qwen2vl_directory, tmp_path, one_line_error):
    (tmp_path / "model").symlink_to(qwen2vl_directory)
    if there:
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).touch()
    assert run(tmp_path / given, tmp_path / "x4") == 1
    assert said.format(tmp_path) in one_line_error()


def test_a_failure_half_way_keeps_the_old_checkpoint(qwen2vl_directory, copy_of, tmp_path):
    convert(qwen2vl_directory, tmp_path / "x4", X4)
    before = all_bytes(tmp_path / "x4")
    damaged = copy_of()
    with_cut_shard(damaged)
    with pytest.raises(CheckpointError):
        convert(damaged, tmp_path / "x4", X4, force=True, shard_bytes=1000)
    assert all_bytes(tmp_path / "x4") == before
    assert sorted(os.listdir(tmp_path)) == ["damaged", "x4"]


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(CheckpointError):
        run(tmp_path, tmp_path / "x4", "--debug")


def test_missing_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main([])
    assert caught.value.code == 2
    assert "--model-dir" in capsys.readouterr().err


def test_unknown_token_format_exits_with_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main(["--model-dir", "m", "--output-dir", str(tmp_path / "x"), "--dct", "x8"])
    assert caught.value.code == 2
    assert "unknown DCT preset 'x8': choose one of exact, x4, x16" in capsys.readouterr().err
