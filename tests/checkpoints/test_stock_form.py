"""The stock form of a DCT model: a plain Qwen2-VL that computes the same, and the way back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import edit_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

import convert_checkpoint
from dct_qwen2vl.checkpoints.hf_folder import load_processor, write_reading
from dct_qwen2vl.checkpoints.inspection import PROCESSOR, note_on_all_cells, note_on_saved_again, recorded_skipping
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.dct.configuration_dct import CLIP_MEAN, CLIP_STD
from dct_qwen2vl.dct.folding import distance_from_format, fold_block_embedding, unfold_patch_embedding
from dct_qwen2vl.training.checks import RunError, check_model
from dct_tokenizer import DCTConfig, DCTTokenizer, fold_patch_embedding

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
OWN = ("--block", "2", "28", "28", "--num-coefficients", "1176", "--detail-gain", "10")
FORMATS = {"exact": ("--dct", "exact"), "x4": ("--dct", "x4"), "x16": ("--dct", "x16"), "own": OWN}
PROMPTS = {"text": [], "image": ["image"], "two images": ["image", "image"], "video": ["video"]}


def run(model_dir: Path, output_dir: Path, *options: str) -> int:
    return convert_checkpoint.main(["--model-dir", str(model_dir), "--output-dir", str(output_dir), *options])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def train(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As if training had moved the patch embedding, all columns alike."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}
    weight = tensors[PATCH_EMBEDDING].float()
    moved = weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, PATCH_EMBEDDING: moved.to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(qwen2vl_directory, tmp_path_factory) -> Callable[[str], Path]:
    """trained("x4"): a coefficient form whose patch embedding has been trained."""
    parent = tmp_path_factory.mktemp("trained")

    def make(name: str) -> Path:
        if not (parent / name).exists():
            assert run(qwen2vl_directory, parent / name, *FORMATS[name]) == 0
            train(parent / name)
        return parent / name

    return make


@pytest.fixture(scope="module")
def stock(trained, tmp_path_factory) -> Callable[[str], Path]:
    """stock("x4"): the stock form of trained("x4")."""
    parent = tmp_path_factory.mktemp("stock")

    def make(name: str) -> Path:
        if not (parent / name).exists():
            assert run(trained(name), parent / name, "--to", "stock") == 0
        return parent / name

    return make


@pytest.fixture
def copy_of(stock, tmp_path) -> Callable[[str], Path]:
    """copy_of("x4"): a copy of stock("x4") that a test may damage."""
    return lambda name: Path(shutil.copytree(stock(name), tmp_path / "copy"))


def ask(folder: Path, kinds: list[str], natural_frames) -> tuple[dict, torch.Tensor]:
    """What AutoProcessor makes of a question with media, and the logits of the model."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=not (folder / "dct_format.json").exists())
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "What colour is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media = {}
    if "image" in kinds:
        media["images"] = [natural_frames(1, 224, 336 - 112 * n, seed=n)[0] for n in range(kinds.count("image"))]
    if "video" in kinds:
        media["videos"] = [list(natural_frames(6, 224, 224, seed=5))]
    inputs = processor(text=[text], return_tensors="pt", **media)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return inputs, model(**inputs).logits


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def test_who_converts_a_model_that_skips_is_told_once_what_the_stock_form_does(trained, tmp_path, capsys):
    plain, skipping = trained("x4"), Path(shutil.copytree(trained("x4"), tmp_path / "skipping"))
    capsys.readouterr()
    for folder, share, notes in ((plain, None, 0), (skipping, 0.8, 0), (skipping, 0.81, 1), (skipping, None, 1)):
        if folder == skipping:
            edit_json(folder / PROCESSOR, skip_db=38.0, skip_share=share)
        assert run(folder, tmp_path / "stock", "--to", "stock", "--force") == 0
        printed = capsys.readouterr().out
        assert printed.count("Note:") == printed.count("reads all cells") == notes
    assert f"Note: {skipping} was trained with --skip-db 38, but its stock form reads all cells. This can" in printed
    assert f"evaluate_qwen2vl.py --skip-db 0 --model-dir {skipping} --data-dir" in printed
    assert "skip_db" not in (tmp_path / "stock" / PROCESSOR).read_text()


# What it was trained without

SKIPPINGS = {
    "all": {"skip_db": 38.0, "skip_noise_floor": True, "skip_share": 0.5},
    "every sample": {"skip_db": 38.0, "skip_share": 1.0},
    "before shares were recorded": {"skip_db": 36.5},
    "nothing": {},
}


@pytest.mark.parametrize("skipping", SKIPPINGS.values(), ids=SKIPPINGS)
def test_skipping_is_recorded_and_comes_back(skipping, trained, stock, tmp_path):
    """Without it, the files are those of a model that never skipped. Other loaders find nothing new in theirs."""
    folder = Path(shutil.copytree(trained("x4"), tmp_path / "x4"))
    edit_json(folder / PROCESSOR, **skipping)
    assert run(folder, tmp_path / "stock", "--to", "stock") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    same = {path.name for path in stock("x4").iterdir() if files.get(path.name) == path.read_bytes()}
    assert files.keys() == {path.name for path in stock("x4").iterdir()}
    assert files.keys() - same == ({"dct_format.json"} if skipping else set())
    saved = json.loads(files["dct_format.json"])
    assert {name: value for name, value in saved.items() if name.startswith("skip")} == skipping
    processor = AutoProcessor.from_pretrained(tmp_path / "stock").image_processor
    assert type(processor) is Qwen2VLImageProcessor and "skip" not in processor.to_json_string()
    assert run(tmp_path / "stock", tmp_path / "back", "--to", "dct") == 0
    assert json.loads((tmp_path / "back" / PROCESSOR).read_text()) == json.loads((folder / PROCESSOR).read_text())
    remote = AutoProcessor.from_pretrained(tmp_path / "back", trust_remote_code=True).image_processor
    for read in (remote, load_processor(tmp_path / "back").image_processor):
        assert {name: getattr(read, name) for name in skipping} == skipping and (read.skip_db is None) == (not skipping)


def test_the_record_survives_other_bounds_and_goes_when_all_cells_are_trained(trained, tmp_path):
    folder = Path(shutil.copytree(trained("x4"), tmp_path / "x4"))
    edit_json(folder / PROCESSOR, **SKIPPINGS["all"])
    assert run(folder, tmp_path / "stock", "--to", "stock") == 0
    assert run(tmp_path / "stock", tmp_path / "smaller", "--to", "stock", "--max-pixels", "50176") == 0
    assert recorded_skipping(tmp_path / "smaller") == SKIPPINGS["all"] == recorded_skipping(tmp_path / "stock")
    write_reading(tmp_path / "smaller", {}, None)  # as a run with --dct none leaves it
    assert recorded_skipping(tmp_path / "smaller") == {} and note_on_all_cells(tmp_path / "smaller") is None
    assert run(tmp_path / "smaller", tmp_path / "back", "--to", "dct") == 0
    assert "skip" not in (tmp_path / "back" / PROCESSOR).read_text()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("skip_db", -1, "has skip_db -1, which is no PSNR in dB over 0: take it out"),
        ("skip_db", "38", "has skip_db '38', which is no PSNR in dB over 0: take it out"),
        ("skip_noise_floor", 1, "has skip_noise_floor 1, which is no true or false: take it out"),
        ("skip_share", 0, "has skip_share 0, which is no share over 0 and at most 1: take it out"),
        ("skip_share", 1.5, "has skip_share 1.5, which is no share over 0 and at most 1: take it out"),
    ],
)
def test_a_record_that_cannot_be_is_one_line(copy_of, tmp_path, one_line_error, name, value, says):
    folder = copy_of("x4")
    edit_json(folder / "dct_format.json", **{"skip_db": 38.0, name: value})
    assert run(folder, tmp_path / "back", "--to", "dct") == 1
    assert one_line_error().endswith(f"{folder / 'dct_format.json'} {says}")
    assert not (tmp_path / "back").exists()


# It computes the same


@pytest.mark.parametrize("kinds", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_coefficient_form(name, kinds, trained, stock, natural_frames):
    inputs, logits = ask(stock(name), kinds, natural_frames)
    expected_inputs, expected = ask(trained(name), kinds, natural_frames)
    for key in {"input_ids", "image_grid_thw", "video_grid_thw"} & set(expected_inputs):
        assert torch.equal(inputs[key], expected_inputs[key])
    if kinds:
        key = "pixel_values_videos" if "video" in kinds else "pixel_values"
        frames, rows, columns = json.loads((stock(name) / "dct_format.json").read_text())["dct"]["block"]
        assert inputs[key].shape[1] == 3 * frames * rows * columns
    assert relative(logits, expected) < 1e-5


def test_what_was_trained_matters(stock, qwen2vl_directory, tmp_path, natural_frames):
    """Or the test above would hold for a form that forgot it."""
    assert run(qwen2vl_directory, tmp_path / "x4", "--dct", "x4") == 0
    _, untrained = ask(tmp_path / "x4", ["image"], natural_frames)
    _, logits = ask(stock("x4"), ["image"], natural_frames)
    assert relative(logits, untrained) > 0.01


def test_bfloat16_costs_no_more_than_it_costs_the_coefficient_form(trained, stock, natural_frames):
    """Only the patch embedding is rounded."""
    errors = {}
    for folder in (trained("x4"), stock("x4")):
        inputs, exact = ask(folder, ["image", "image"], natural_frames)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()
        weight = model.visual.patch_embed.proj.weight
        weight.data.copy_(weight.to(torch.bfloat16))
        with torch.no_grad():
            errors[folder] = relative(model(**inputs).logits, exact)
    of_coefficients, of_pixels = errors.values()
    assert 1e-5 < of_pixels < 3 * of_coefficients < 0.03, errors


# There and back


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_in_fp32(name, trained, stock, tmp_path):
    """float64 arithmetic, rounded to fp32 once each way: no column moves by more than a unit in its last place."""
    assert run(stock(name), tmp_path / "back", "--to", "dct") == 0
    before, after = tensors_of(trained(name)), tensors_of(tmp_path / "back")
    first, second = (tensors.pop(PATCH_EMBEDDING).flatten(1).double() for tensors in (before, after))
    assert ((first - second).norm(dim=0) <= 2**-20 * first.norm(dim=0)).all()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    files = {path.name for path in trained(name).iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == files | {"video_preprocessor_config.json"}
    for file in files - {"model.safetensors"}:
        one, other = (folder / file for folder in (trained(name), tmp_path / "back"))
        same = one.read_bytes() == other.read_bytes()
        assert same or json.loads(one.read_text()) == json.loads(other.read_text()), file


def test_there_and_back_in_bfloat16(qwen2vl_directory, tmp_path):
    """The weight over pixels is kept in fp32, so rounding to bf16 gives nearly every number back."""
    assert run(qwen2vl_directory, tmp_path / "x4") == 0
    train(tmp_path / "x4", torch.bfloat16)
    assert run(tmp_path / "x4", tmp_path / "stock", "--to", "stock") == 0
    types = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "stock").items()}
    assert types.pop(PATCH_EMBEDDING) == torch.float32 and set(types.values()) == {torch.bfloat16}
    assert run(tmp_path / "stock", tmp_path / "back", "--to", "dct") == 0
    before, after = (tensors_of(tmp_path / name)[PATCH_EMBEDDING] for name in ("x4", "back"))
    assert after.dtype == torch.bfloat16
    assert float((before != after).float().mean()) < 1e-3 and relative(after.float(), before.float()) < 1e-4


def test_shards_give_the_same(trained, stock, tmp_path):
    from dct_qwen2vl.checkpoints.stock_form import to_dct, to_stock

    to_stock(trained("x4"), tmp_path / "stock", shard_bytes=200_000)
    assert len(list((tmp_path / "stock").glob("model-*.safetensors"))) > 3
    whole, parts = tensors_of(stock("x4")), tensors_of(tmp_path / "stock")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    to_dct(tmp_path / "stock", tmp_path / "back", shard_bytes=200_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert relative(tensors_of(tmp_path / "back")[PATCH_EMBEDDING], tensors_of(trained("x4"))[PATCH_EMBEDDING]) < 1e-6


def test_without_its_format_file_a_preset_is_recognised_by_its_patch(copy_of, trained, tmp_path, one_line_error):
    folder = copy_of("x16")
    (folder / "dct_format.json").unlink()
    assert run(folder, tmp_path / "none") == 1
    assert "reads patches of 2x56x56 px: if it is the stock form of a DCT model, add --to dct" in one_line_error()
    with pytest.raises(RunError, match=r"stock form of a DCT model: python convert_checkpoint\.py --to dct"):
        check_model(folder, None)
    assert run(folder, tmp_path / "back", "--to", "dct") == 0
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["dct"]["name"] == "x16"
    assert relative(tensors_of(tmp_path / "back")[PATCH_EMBEDDING], tensors_of(trained("x16"))[PATCH_EMBEDDING]) < 1e-6


@pytest.mark.parametrize("name", ["x4", "own"])
def test_what_transformers_does_not_save_again_is_told(name, stock, trained, tmp_path, capsys):
    folder, back = tmp_path / "again", tmp_path / "back"
    AutoModelForImageTextToText.from_pretrained(stock(name), torch_dtype="auto").save_pretrained(folder)
    AutoProcessor.from_pretrained(stock(name)).save_pretrained(folder)
    lost = {"dct_format.json", "video_preprocessor_config.json"}
    assert {path.name for path in stock(name).iterdir()} - {path.name for path in folder.iterdir()} == lost
    assert note_on_saved_again(stock(name)) is None is note_on_saved_again(trained(name))
    assert run(folder, back) == run(folder, back, "--to", "stock") == 1 and not back.exists()
    told = capsys.readouterr().err
    assert (
        "if it is the stock form of a DCT model, add --to dct" in told and "is the stock form of a DCT model al" in told
    )
    assert run(folder, back, "--to", "dct") == (name == "own")
    told = capsys.readouterr()
    if name == "own":
        assert "; copy its dct_format.json from the folder that it was loaded from, or --block 2 28 28" in told.err
    else:
        assert told.out.count("Note: ") == 1 and f"Note: {folder} has patches of 28 px" in told.out
    assert "no dct_format.json and no video_preprocessor_config.json: tr" in note_on_saved_again(folder)
    shutil.copy(stock(name) / "video_preprocessor_config.json", folder)
    assert "no dct_format.json: tr" in (note := note_on_saved_again(folder)) and "sampled" not in note
    shutil.copy(stock(name) / "dct_format.json", folder)
    assert note_on_saved_again(folder) is None and run(folder, back, "--to", "dct", "--force") == 0
    moved = relative(tensors_of(back)[PATCH_EMBEDDING], tensors_of(trained(name))[PATCH_EMBEDDING])
    assert moved < 1e-6 and "Note" not in capsys.readouterr().out


def test_a_pixel_model_is_an_unfolded_exact_model(qwen2vl_directory, tmp_path):
    assert run(qwen2vl_directory, tmp_path / "dct", "--to", "dct") == 0
    expected = fold_patch_embedding(tensors_of(qwen2vl_directory)[PATCH_EMBEDDING], DCTConfig.preset("exact"))
    assert relative(tensors_of(tmp_path / "dct")[PATCH_EMBEDDING], expected) < 1e-6


# The files


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_of_this_repository_is_needed(name, stock):
    folder = stock(name)
    assert not list(folder.glob("*.py"))
    for path in folder.glob("*.json"):
        if path.name not in ("dct_format.json", "tokenizer.json", "vocab.json"):
            assert "auto_map" not in path.read_text() and "DCT" not in path.read_text(), path.name
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor.image_processor) is Qwen2VLImageProcessor
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert type(model) is Qwen2VLForConditionalGeneration


def test_configuration_as_servers_read_it(stock, trained):
    read = {name: json.loads((stock("x16") / f"{name}.json").read_text()) for name in (
        "config", "preprocessor_config", "video_preprocessor_config", "dct_format")}  # fmt: skip
    vision = read["config"]["vision_config"]
    assert (vision["in_channels"], vision["in_chans"]) == (3, 3)
    assert (vision["temporal_patch_size"], vision["patch_size"], vision["spatial_patch_size"]) == (2, 56, 56)
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    for name in ("preprocessor_config", "video_preprocessor_config"):
        values = read[name]
        assert (values["patch_size"], values["temporal_patch_size"], values["merge_size"]) == (56, 2, 2)
        assert (values["min_pixels"], values["max_pixels"], values["size"]) == (56 * 56, 448 * 448, bounds)
        assert (values["image_mean"], values["image_std"]) == (list(CLIP_MEAN), list(CLIP_STD))
        assert values["processor_class"] == "Qwen2VLProcessor"
    assert read["preprocessor_config"]["image_processor_type"] == "Qwen2VLImageProcessor"
    videos = read["video_preprocessor_config"]
    assert videos["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert (videos["fps"], videos["min_frames"], videos["max_frames"]) == (2.0, 4, 768)
    assert DCTConfig.from_dict(read["dct_format"]["dct"]) == DCTConfig.preset("x16")
    for name in ("generation_config.json", "chat_template.json", "tokenizer.json", "tokenizer_config.json"):
        assert (stock("x16") / name).read_bytes() == (trained("x16") / name).read_bytes()


def test_pixel_bounds_and_sampling_are_kept(trained, tmp_path):
    folder = Path(shutil.copytree(trained("x4"), tmp_path / "x4"))
    edit_json(folder / "preprocessor_config.json", min_pixels=6272, max_pixels=100352, do_convert_rgb=False)
    own = {"fps": 1.0, "patch_size": 14, "total_pixels": 10**6, "video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(own))
    assert run(folder, tmp_path / "stock", "--to", "stock") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "stock").image_processor
    assert (processor.min_pixels, processor.max_pixels, processor.do_convert_rgb) == (6272, 100352, False)
    assert processor.size == {"shortest_edge": 6272, "longest_edge": 100352}
    videos = json.loads((tmp_path / "stock" / "video_preprocessor_config.json").read_text())
    assert (videos["fps"], videos["patch_size"], videos["max_pixels"]) == (1.0, 28, 100352)
    assert saved_sampling(tmp_path / "stock") == {"fps": 1.0, "min_frames": 4, "max_frames": 768, "total_pixels": 10**6}
    assert run(tmp_path / "stock", tmp_path / "back", "--to", "dct") == 0
    assert saved_sampling(tmp_path / "back") == saved_sampling(tmp_path / "stock")
    videos = json.loads((tmp_path / "back" / "video_preprocessor_config.json").read_text())
    assert videos["video_processor_type"] == "DCTVideoProcessor", "the stock one makes pixel patches"
    assert videos["auto_map"]["AutoVideoProcessor"] == "image_processing_dct.DCTVideoProcessor"
    assert run(tmp_path / "back", tmp_path / "again", "--to", "stock") == 0
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "config.json", "dct_format.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    assert run(folder, tmp_path / "other", "--to", "stock", "--max-pixels", "50176") == 0
    assert AutoProcessor.from_pretrained(tmp_path / "other").image_processor.max_pixels == 50176


def test_processors_in_one_file_do_not_win_over_the_stock_ones(trained, tmp_path):
    """transformers 5 saves all of them in processor_config.json."""
    folder = Path(shutil.copytree(trained("x4"), tmp_path / "x4"))
    own = {"processor_class": "Qwen2VLProcessor", "image_processor": {"dct": {}}, "video_processor": {}, "auto_map": {}}
    (folder / "processor_config.json").write_text(json.dumps(own))
    assert run(folder, tmp_path / "stock", "--to", "stock") == 0
    assert json.loads((tmp_path / "stock" / "processor_config.json").read_text()) == {
        "processor_class": "Qwen2VLProcessor"
    }


def test_what_it_says(trained, stock, tmp_path, capsys):
    assert run(trained("x4"), tmp_path / "stock", "--to", "stock") == 0
    assert "x4 is a plain Qwen2-VL with patches of 2 frames x 28 x 28 px" in capsys.readouterr().out
    assert run(stock("x4"), tmp_path / "back", "--to", "dct") == 0
    said = capsys.readouterr().out
    assert "x4, 1764 coefficients a token, leaves out " in said
    assert float(said.split("leaves out ")[1].split(" of")[0]) < 1e-6


# What is refused


def test_forms_that_are_there_already(trained, stock, qwen2vl_directory, tmp_path, one_line_error):
    cases = (
        (stock("x4"), ("--to", "stock"), "is the stock form of x4 already: use it as it is"),
        (qwen2vl_directory, ("--to", "stock"), "reads pixels: it is a stock Qwen2-VL: use it as it is"),
        (trained("x4"), ("--to", "dct"), "is the coefficient form of x4 already: use it as it is"),
        (stock("x4"), (), "is the stock form of a DCT model (x4): add --to dct to make its coefficient form"),
    )
    for folder, options, message in cases:
        capture = run(folder, tmp_path / "out", *options)
        assert capture == 1
        assert message in one_line_error()
    assert not list(tmp_path.iterdir())


def test_another_model_is_told_how_far_it_is(copy_of, tmp_path, one_line_error):
    """x4 keeps 1,764 of a patch's 4,704 numbers. Left out of a random one is about sqrt(1 - 1764 / 4704) = 79 %."""
    folder = copy_of("x4")
    tensors = tensors_of(folder)
    shape = tensors[PATCH_EMBEDDING].shape
    tensors[PATCH_EMBEDDING] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(folder, tmp_path / "out", "--to", "dct") == 1
    error = one_line_error()
    assert "is no unfolded x4 model: " in error and error.endswith("--block 2 28 28 --chroma 444 keeps all")
    assert 75 < float(error.split("model: ")[1].split("%")[0]) < 83
    assert os.listdir(tmp_path) == ["copy"]
    assert run(folder, tmp_path / "out", "--to", "dct", "--block", "2", "28", "28", "--chroma", "444") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"]["in_channels"] == 4704


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dct", "x16"), "has patches of 2 x 28 x 28, merged 2 x 2, the format x16 blocks of 2 x 56 x 56"),
        (("--block", "4", "28", "28"), "blocks of 4 x 28 x 28, merged 2 x 2: name the format with --dct or --block"),
    ],
)
def test_another_format_is_refused(options, message, stock, tmp_path, one_line_error):
    assert run(stock("x4"), tmp_path / "out", "--to", "dct", *options) == 1
    assert message in one_line_error()


def test_a_pixel_model_is_not_folded_by_to_dct(qwen2vl_directory, tmp_path, one_line_error):
    assert run(qwen2vl_directory, tmp_path / "out", "--to", "dct", "--dct", "x4") == 1
    assert one_line_error().endswith("leave out --to dct to fold a pixel model")


DAMAGES = {
    "dct_format.json is not JSON": lambda folder: (folder / "dct_format.json").write_text("{"),
    "has no token format in its field dct": lambda folder: (folder / "dct_format.json").write_text("{}"),
    "DCTConfig.chroma must be a text": lambda folder: edit_json(
        folder / "dct_format.json",
        dct={**json.loads((folder / "dct_format.json").read_text())["dct"], "chroma": 420},
    ),
    "makes tokens of 3 x 2 x 14 x 14": lambda folder: edit_json(folder / "preprocessor_config.json", patch_size=14),
    "(ValueError: mean must have 3 elements": lambda folder: edit_json(
        folder / "preprocessor_config.json", image_mean="CLIP"
    ),
    "lacks preprocessor_config.json": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "no preset has its patches of 3 x 28 x 28": lambda folder: another_patch(folder),
}


def another_patch(folder: Path) -> None:
    (folder / "dct_format.json").unlink()
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "temporal_patch_size": 3})
    edit_json(folder / "preprocessor_config.json", temporal_patch_size=3)
    tensors = tensors_of(folder)
    tensors[PATCH_EMBEDDING] = torch.zeros(128, 3, 3, 28, 28)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_directories(message, copy_of, tmp_path, one_line_error):
    folder = copy_of("x4")
    DAMAGES[message](folder)
    assert run(folder, tmp_path / "out", "--to", "dct") == 1
    assert message in one_line_error()
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "stock", "--dct", "x4"), "not allowed with --to stock"),
        (("--to", "stock", "--block", "2", "28", "28"), "not allowed with --to stock"),
        (("--to", "dct", "--detail-gain", "2"), "argument --detail-gain: not allowed with --to dct"),
        (("--to", "dct", *OWN[:4], "--order", "weighted"), "argument --order: weighted needs a pixel model"),
        (("--to", "pixels"), "argument --to: invalid choice"),
    ],
)
def test_flags_that_do_not_go_together(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "out", *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# The arithmetic, at the size of a real model


@pytest.mark.parametrize("name", ["x4", "x16"])
def test_the_fold_of_a_real_size(name, natural_frames):
    """[1280, ...], against tokens and normalised pixels of the same blocks."""
    config, generator = DCTConfig.preset(name), torch.Generator().manual_seed(0)
    folded = fold_patch_embedding(torch.randn(1280, 3, 2, 14, 14, generator=generator) * 0.02, config)
    weight = folded + 0.02 * torch.randn(folded.shape, generator=generator)
    pixels = unfold_patch_embedding(weight, config, dtype=torch.float64)
    _, rows, columns = config.block
    assert pixels.shape == (1280, 3, 2, rows, columns)
    frames = natural_frames(2, 2 * rows, 2 * columns)
    tokens, _ = DCTTokenizer(config, dtype=torch.float64).encode(frames)
    normalised = torch.from_numpy((frames / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).permute(3, 0, 1, 2)
    blocks = [normalised[:, :, y : y + rows, x : x + columns] for y in (0, rows) for x in (0, columns)]
    embedded = torch.stack(blocks).flatten(1) @ pixels.flatten(1).T
    torch.testing.assert_close(embedded, tokens @ weight.flatten(1).double().T, rtol=1e-9, atol=1e-9)
    back = fold_block_embedding(pixels, config, dtype=torch.float32)
    assert ((back - weight).abs() <= 1e-12 + 2**-23 * weight.abs()).all(), "bit for bit but for ties of rounding"
    assert distance_from_format(pixels, config) < 1e-12
    assert distance_from_format(pixels.bfloat16(), config) < 0.002


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"unfold_patch_embedding expects a weight \[E, 1764, 1, 1, 1\], got \[4, 3,"):
        unfold_patch_embedding(torch.zeros(4, 3, 2, 28, 28), DCTConfig.preset("x4"))
    with pytest.raises(ValueError, match=r"fold_block_embedding expects a weight \[E, 3, 2, 28, 28\], got \[4, 1764,"):
        fold_block_embedding(torch.zeros(4, 1764, 1, 1, 1), DCTConfig.preset("x4"))


def test_weights_stay_memory_mapped(stock):
    with safe_open(stock("x4") / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice(PATCH_EMBEDDING).get_shape() == [128, 3, 2, 28, 28]
