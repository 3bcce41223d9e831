"""--export of checkpoints: what it writes, what it needs of the run's settings, what it refuses in one line.

Here the model of a checkpoint is one that no step has changed. tests/training/test_finetune.py and
test_megatron_training.py compare exports of trained models with those that their runs have written.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_qwen2vl
from dct_qwen2vl.training import checks, config, disk_space, export, run_file, run_lock


@pytest.fixture
def command(prepared, tmp_path) -> list[str]:
    """Of a run in tmp_path/run with checkpoints of steps 4 and 6, which was started with two more settings."""
    known = ["--model-dir", str(prepared.model), "--data-dir", "/nowhere", "--output-dir", str(tmp_path)]
    return [*known, "--experiment-name", write_run(prepared.model, tmp_path / "run", "x4", "--max-pixels", "12544")]


def write_run(model_dir: Path, run_dir: Path, token_format: str, *typed: str) -> str:
    """Returns its name."""
    known = ["--model-dir", str(model_dir), "--data-dir", "d", "--output-dir", str(run_dir.parent)]
    settings = config.parse_arguments([*known, "--experiment-name", run_dir.name, "--video-fps", "1", *typed])
    run_file.write_run_file(settings.resolved("automodel", "32"), checks.ModelInfo(token_format, None))
    for step in (4, 6):
        folder = run_dir / "checkpoints" / f"step{step:06d}"
        shutil.copytree(model_dir, folder / "hf")
        torch.save({"state": torch.ones(100)}, folder / "trainer.pt")
    return run_dir.name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize(("typed", "step"), [(["--export"], 6), (["--export", "4"], 4)])
def test_both_forms_are_written_beside_the_run_s_own(typed, step, command, prepared, tmp_path, capsys):
    """While another process trains the run, with other settings of training and none of data."""
    run_lock.lock(tmp_path / "run")
    assert finetune_qwen2vl.main([*command, *typed, "--lr", "1", "--tensor-parallel", "2", "--check"]) == 0
    assert capsys.readouterr().out == "" and names_in(tmp_path / "run" / "exported") == []
    assert finetune_qwen2vl.main([*command, *typed, "--lr", "1", "--tensor-parallel", "2"]) == 0
    folder = tmp_path / "run" / "exported" / f"step{step:06d}"
    said = f"Done: the model of step {step} is in {folder}/hf, in the stock form; to train it further: {folder}/hf_dct"
    assert capsys.readouterr().out.splitlines() == [f"Exporting {tmp_path}/run/checkpoints/{folder.name}", said]
    assert names_in(folder.parent) == [folder.name] and names_in(folder) == ["hf", "hf_dct"]
    before, after = (load_file(path / "model.safetensors") for path in (prepared.model, folder / "hf_dct"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert checks.check_model(folder / "hf_dct", "x4") and checks.check_model(folder / "hf", "none")


def test_an_export_that_is_there_stays(command, tmp_path, capsys):
    kept = tmp_path / "run" / "exported" / "step000006" / "hf" / "mine"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert finetune_qwen2vl.main([*command, "--export"]) == 0
    assert capsys.readouterr().out == f"{kept.parents[1]} is there already: remove it to write it again\n"
    assert names_in(kept.parent) == ["mine"]


def test_a_pixel_model_has_one_form(prepared, tmp_path):
    """--dct none is left out: the run has it."""
    write_run(prepared.pixel_model, tmp_path / "run", "none", "--dct", "none")
    known = ["--model-dir", str(prepared.pixel_model), "--data-dir", "d", "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*known, "--experiment-name", "run", "--export"]) == 0
    assert names_in(tmp_path / "run" / "exported" / "step000006") == ["hf"]


def test_what_is_left_out_of_the_model_s_settings_is_as_in_the_run(command):
    found = export.as_trained(config.parse_arguments([*command, "--dct", "x4", "--lr", "1", "--export"]))
    assert (found.max_pixels, found.video_fps, found.skip_share, found.dct) == (12544, 1.0, None, "x4")
    assert (found.chosen_engine, found.lr) == ("automodel", 1.0)
    same = export.as_trained(config.parse_arguments([*command, "--max-pixels", "12544", "--video-fps", "1"]))
    assert (same.max_pixels, same.video_fps) == (12544, 1.0)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--export", "5"], "run has no checkpoint of step 5: --export takes 4, 6, or nothing for the newest"),
        (["--export", "0"], "run has no checkpoint of step 0: --export takes 4, 6, or nothing for the newest"),
        (["--export", "-1"], "--export must be at least 0, got -1"),
        (
            ["--export", "--max-pixels", "9999"],
            "was started with --max-pixels 12544, now it is 9999: use the same value",
        ),
        (["--export", "--lora-rank", "4"], "--lora-rank 0, now it is 4: use the same value to export, or leave it out"),
        (["--export", "--model-dir", "other"], "now it is other: use the same value to export"),
        (["--export", "--dct", "x16"], "--dct x16 contradicts the checkpoint"),
        (["--export", "--experiment-name", "other"], "other has no checkpoint to export: is it the folder of the run"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(typed, said, command, tmp_path, one_line_error):
    assert finetune_qwen2vl.main([*command, *typed, "--check"]) == 1
    assert said in one_line_error()
    assert names_in(tmp_path / "run" / "exported") == []


def test_weights_that_are_cut_short_are_told(command, tmp_path, one_line_error):
    """The rest of a checkpoint, which a resumed run needs, may be missing."""
    checkpoints = tmp_path / "run" / "checkpoints"
    os.truncate(checkpoints / "step000006" / "hf" / "model.safetensors", 300)
    assert finetune_qwen2vl.main([*command, "--export"]) == 1
    assert "step000006 is damaged (weights in hf are missing or cut short): export another step" in one_line_error()
    (checkpoints / "step000004" / "trainer.pt").unlink()
    assert finetune_qwen2vl.main([*command, "--export", "4"]) == 0


def test_a_run_without_its_settings_is_told(command, tmp_path, one_line_error):
    path = tmp_path / "run" / "run.json"
    path.write_text("{")
    assert finetune_qwen2vl.main([*command, "--export"]) == 1
    assert f"{path} is not JSON" in one_line_error()
    path.unlink()
    assert finetune_qwen2vl.main([*command, "--export"]) == 1
    assert "run has no run.json, which says how the run reads images: put it back" in one_line_error()


def test_a_disk_without_room_for_the_model_is_told(command, tmp_path, monkeypatch, one_line_error):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1_000_000)
    assert finetune_qwen2vl.main([*command, "--export"]) == 1
    assert f"the model in {tmp_path}/run needs 0.00" in one_line_error()
    assert names_in(tmp_path / "run" / "exported") == []


def test_a_checkpoint_that_the_run_removes_meanwhile_leaves_nothing(command, tmp_path, monkeypatch, one_line_error):
    """Its last file is read by then."""
    checkpoint, write = tmp_path / "run" / "checkpoints" / "step000006", export.write_stock_form

    def write_late(*arguments) -> None:
        shutil.rmtree(checkpoint)
        write(*arguments)

    monkeypatch.setattr(export, "write_stock_form", write_late)
    assert finetune_qwen2vl.main([*command, "--export"]) == 1
    assert f"the run has removed {checkpoint} while it was read" in one_line_error()
    assert names_in(tmp_path / "run" / "exported") == []
