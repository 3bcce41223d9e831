"""evaluate_qwen2vl.py --compare: forms of one model are equal, and what is not equal is seen and located."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pipeline import edit_json
from safetensors.torch import load_file, save_file

import evaluate_qwen2vl
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING, PROCESSOR
from dct_qwen2vl.checkpoints.stock_form import to_stock
from dct_qwen2vl.checkpoints.video_sampling import write_sampling
from dct_qwen2vl.evaluation import comparison
from dct_qwen2vl.evaluation.comparison import compare, say_reading, table


@pytest.fixture(scope="module")
def stock(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "stock"
    to_stock(prepared.model, folder)
    return folder


def command(prepared, output: Path, one: Path, other: Path, *options: str) -> int:
    folders = ["--compare", str(one), str(other), "--data-dir", str(prepared.shards), "--output-dir", str(output)]
    return evaluate_qwen2vl.main([*folders, *options])


def strict_json(text: str):
    """Infinity and NaN are no JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_coefficient_form_and_stock_form_are_equal(prepared, stock, tmp_path, capsys):
    assert command(prepared, tmp_path, prepared.model, stock, "--limit", "5") == 0
    summary = strict_json((tmp_path / "comparison.json").read_text())
    lines = [strict_json(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert summary["equal"] and 0 < summary["same"]["largest"] < 1e-5
    assert summary["same"]["mean"] < summary["same"]["largest"]
    assert summary["same"]["first_stage"] is None and summary["same"]["equal_answers"] == 5 == summary["questions"]
    assert {len(line["media"]) for line in lines} == {0, 1, 2}, "text, an image, several images"
    assert {"key", "turn", "question_type", "question", "answer", "media", "same", "own"} == set(lines[0])
    (video,) = next(line["media"] for line in lines if line["media"] and line["media"][0]["kind"] == "video")
    assert (video["a"]["colours"], video["b"]["colours"], video["equal_rgb"]) == ("planes", "RGB", True)
    assert video["a"]["frames"] == video["b"]["frames"] and len(video["a"]["frames"]) == 2 * video["a"]["grid_thw"][0]
    assert video["a"]["height"] == 28 * video["a"]["grid_thw"][1]
    assert 1e-5 < summary["own"]["largest"] < 0.2, "planes are not the same tokens as RGB"
    assert summary["own"]["first_stage"] == "visual.patch_embed"
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + 1 + 5 + 3
    assert shown[-1] == "The models are equal: at most 1e-04"
    assert any(" planes (" in line for line in shown)


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("visual.blocks.1.mlp.fc2.weight", "visual.blocks.1"),
        ("visual.merger.mlp.0.bias", "visual.merger"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_noise_in_one_weight_is_seen_and_located(prepared, stock, tmp_path, capsys, tensor, stage):
    noisy = Path(shutil.copytree(stock, tmp_path / "noisy"))
    weights = load_file(noisy / "model.safetensors")
    noise = torch.randn(weights[tensor].shape, generator=torch.Generator().manual_seed(0))
    weights[tensor] += 0.1 * noise.to(weights[tensor].dtype)
    save_file(weights, noisy / "model.safetensors", metadata={"format": "pt"})
    assert command(prepared, tmp_path, prepared.model, noisy, "--limit", "2") == 1
    summary = strict_json((tmp_path / "comparison.json").read_text())
    assert not summary["equal"] and summary["same"]["largest"] > 1e-3
    assert summary["same"]["first_stage"] == stage
    assert capsys.readouterr().out.splitlines()[-1] == f"The models differ by more than 1e-04, first at {stage}"


def test_other_sizes_and_frames_are_shown(prepared, stock, tmp_path):
    other = Path(shutil.copytree(stock, tmp_path / "other"))
    edit_json(other / PROCESSOR, min_pixels=56 * 56, max_pixels=56 * 56, size=None)
    write_sampling(other, {"max_frames": 2})
    found = compare((prepared.model, other), prepared.shards, limit=4)
    assert found.equal, "both models are given what the first one reads"
    media = [medium for line in found.lines for medium in line["media"]]
    assert all((medium["b"]["height"], medium["b"]["width"]) == (56, 56) for medium in media)
    video = next(medium for medium in media if medium["kind"] == "video")
    assert len(video["b"]["frames"]) == 2 < len(video["a"]["frames"])
    assert video["decibels"] is None and not video["equal_rgb"]
    assert "other size" in table(found)
    assert say_reading("video", video["b"]).startswith("2 of 56x56 (0-")
    found.write(tmp_path / "out")
    strict_json((tmp_path / "out" / "comparison.json").read_text())
    flagged = compare((prepared.model, other), prepared.shards, limit=4, sampling={"max_frames": 2})
    assert all(len(m["a"]["frames"]) == 2 for line in flagged.lines for m in line["media"] if m["kind"] == "video")


def test_of_a_stock_form_that_shares_its_weights_the_patch_embedding_is_enough(prepared, stock, tmp_path):
    alone = tmp_path / "alone"
    to_stock(prepared.model, alone, only_patches=True)
    weights = load_file(alone / "model.safetensors")
    assert list(weights) == [PATCH_EMBEDDING]
    whole = compare((prepared.model, stock), prepared.shards, limit=4)
    shared = compare((prepared.model, alone), prepared.shards, limit=4, share_weights=True)
    assert shared.lines == whole.lines and shared.equal
    assert {kind for line in whole.lines for kind in (medium["kind"] for medium in line["media"])} == {"image", "video"}
    wrong = weights[PATCH_EMBEDDING].flip(-1).contiguous()
    save_file({PATCH_EMBEDDING: wrong}, alone / "model.safetensors", metadata={"format": "pt"})
    found = compare((prepared.model, alone), prepared.shards, limit=4, share_weights=True)
    assert not found.equal and found.summary["same"]["first_stage"] == "visual.patch_embed"


def test_a_model_that_skips_is_compared_on_all_cells_which_is_said(prepared, stock, tmp_path, capsys):
    skipping = Path(shutil.copytree(prepared.model, tmp_path / "skipping"))
    edit_json(skipping / PROCESSOR, skip_db=10.0)
    assert command(prepared, tmp_path, skipping, stock, "--limit", "3") == 0
    said = "All cells were read in both, although A skips at 10 dB"
    advice = f"To measure it: python evaluate_qwen2vl.py --skip-db 0 --model-dir {skipping} --data-dir SHARDS"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "cells" in line)
    assert line == f"{said}. This can cost accuracy. {advice} --output-dir ALL_CELLS"
    assert strict_json((tmp_path / "comparison.json").read_text())["skip_db"] == [10.0, None]
    lines = [strict_json(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    counts = [line["same"]["prompt_tokens"] for line in lines]
    assert all(one == other for one, other in counts), "a skipping model would have fewer"
    comparison.compare_for_run(tmp_path / "before", skipping, None, prepared.shards, 1)
    assert f"{said}. The models are equal" in capsys.readouterr().out.splitlines()[-1]
    edit_json(skipping / PROCESSOR, skip_share=0.8)
    assert command(prepared, tmp_path, skipping, stock, "--limit", "1") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "cells" in line] == [said]


def test_what_cannot_be_compared_is_one_line(prepared, tmp_path, one_line_error):
    assert command(prepared, tmp_path, prepared.model, tmp_path / "none") == 1
    assert "no model in" in (line := one_line_error()) and "give --compare a run's hf folder" in line
    shutil.copytree(prepared.model, tmp_path / "run" / "hf")
    assert command(prepared, tmp_path, prepared.model, tmp_path / "run") == 1
    assert one_line_error().rstrip().endswith(f"give --compare {tmp_path / 'run' / 'hf'}")
    with pytest.raises(SystemExit) as caught:
        command(prepared, tmp_path, prepared.model, prepared.model, "--model-dir", str(prepared.model))
    assert caught.value.code == 2


def test_a_training_run_goes_on_whatever_comes_of_the_comparison(prepared, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "before"
    comparison.compare_for_run(folder, prepared.model, None, tmp_path / "no-shards", 2)
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("Note: coefficient form and stock form were not compared (")
    assert not (folder / ".stock").exists() and not (folder / "comparison.json").exists()
    comparison.compare_for_run(folder, prepared.model, None, prepared.shards, 1, bounds={"max_pixels": 56 * 56})
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert " and its stock form on 1 samples, largest difference of logits: " in line and "models are equal" in line
    (only,) = [strict_json(line) for line in (folder / "comparison.jsonl").read_text().splitlines()]
    assert (only["media"][0]["a"]["height"], only["media"][0]["b"]["width"]) == (56, 56)
    monkeypatch.setattr(comparison, "MOST_BYTES", 1)
    comparison.compare_for_run(tmp_path / "large", prepared.model, None, prepared.shards, 1)
    said = capsys.readouterr().out
    assert "because the model has 0 GiB; to compare them: python evaluate_qwen2vl.py --compare" in said
    assert not (tmp_path / "large").exists()
