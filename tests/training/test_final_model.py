"""What cannot be saved, or has no room, is found before the first step."""

import json
import shutil
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
from pipeline import edit_json

import finetune_qwen2vl
from dct_qwen2vl.checkpoints.hf_folder import write_reading
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.training import checks, config, disk_space
from dct_qwen2vl.training.config import RunError

SAMPLING = {"fps": 1.0, "min_frames": 2, "max_frames": 6, "total_pixels": 100_000}
UNSAVABLE = {"do_sample": False, "temperature": 0.5}  # transformers reads it with a warning and refuses to write it


@pytest.fixture
def model_dir(prepared, tmp_path) -> Path:
    """A copy of the tiny x4 model."""
    return Path(shutil.copytree(prepared.model, tmp_path / "model"))


def settings_of(model_dir: Path, output_dir: Path, *typed: str, engine: str = "automodel") -> config.TrainingConfig:
    known = ["--model-dir", str(model_dir), "--data-dir", "d", "--output-dir", str(output_dir)]
    return config.parse_arguments([*known, "--experiment-name", "e", *typed]).resolved(engine, "32")


def rehearsal_of(engine: str, settings: config.TrainingConfig):
    """The engine's own callback."""
    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.megatron_weights import rehearse_hf
    from dct_qwen2vl.training.rehearsal import RehearseSave

    info = checks.check_model(settings.model_dir, None)
    if engine == "megatron":
        edit = partial(write_reading, settings=settings.processor_settings, sampling=SAMPLING)
        return RehearseSave(settings, info, partial(rehearse_hf, settings.model_dir, edit=edit))
    module = QwenAutoModel(settings.model_dir, processor_settings=settings.processor_settings, sampling=SAMPLING)
    module.configure_model()
    return RehearseSave(settings, info, module.rehearse_save)


def rehearse(engine: str, settings: config.TrainingConfig) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    rehearsal_of(engine, settings).on_fit_start(trainer, None)


@pytest.mark.parametrize("engine", ["automodel", "megatron"])
def test_a_rehearsal_writes_both_forms_and_leaves_nothing(engine, model_dir, tmp_path):
    seen = {}
    settings = settings_of(model_dir, tmp_path, "--max-pixels", "12544")
    rehearsal = rehearsal_of(engine, settings)
    save = rehearsal.save

    def save_and_look(folder: Path) -> None:
        save(folder)
        seen["names"] = {path.name for path in folder.iterdir()}
        seen["bounds"] = json.loads((folder / "preprocessor_config.json").read_text())["max_pixels"]
        seen["sampling"] = saved_sampling(folder)

    rehearsal.save = save_and_look
    rehearsal.on_fit_start(pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False), None)
    assert seen["names"] >= {path.name for path in model_dir.iterdir()} and seen["bounds"] == 12544
    assert seen["sampling"] == SAMPLING
    assert list((tmp_path / "e").iterdir()) == []


def test_what_transformers_refuses_to_write_is_refused_before_the_first_step(model_dir, tmp_path):
    edit_json(model_dir / "generation_config.json", **UNSAVABLE)
    with pytest.raises(RunError) as raised:
        rehearse("automodel", settings_of(model_dir, tmp_path))
    line = str(raised.value)
    assert line.startswith(f"{model_dir} loads, but what is trained from it cannot be saved (") and "\n" not in line
    assert "`temperature`" in line and line.endswith("correct that there; no step was made")
    assert list((tmp_path / "e").iterdir()) == []


@pytest.mark.parametrize("engine", ["automodel", "megatron"])
def test_a_stock_form_that_cannot_be_made_is_refused_before_the_first_step(engine, model_dir, tmp_path):
    (model_dir / "processor_config.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot be saved \(\S*processor_config.json is not JSON"):
        rehearse(engine, settings_of(model_dir, tmp_path))
    assert list((tmp_path / "e").iterdir()) == []


def test_a_run_for_which_the_disk_is_too_small_is_refused(prepared, tmp_path, one_line_error):
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    many = ["--keep", "1000000000", "--save-interval", "1", "--max-steps", "1000000000"]
    command = [*known, "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main([*command, *many]) == 1
    line = one_line_error()
    assert "more (1000000000 checkpoints of " in line and "make room, name another --output-dir, or write less" in line
    assert finetune_qwen2vl.main([*command, *many, "--save-interval", "0"]) == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], (3, 2)),
        (["--save-interval", "0"], (0, 0)),
        (["--save-interval", "600"], (2, 2)),
        (["--save-interval", "1000", "--keep", "5"], (1, 1)),
    ],
)
def test_how_many_checkpoints_there_are_at_once(typed, expected):
    assert disk_space.checkpoints_at_once(settings_of(Path("m"), Path("o"), *typed)) == expected


@pytest.mark.parametrize(
    "typed", [[], ["--freeze", "vision", "projector"], ["--lora-rank", "4", "--freeze", "vision", "projector"]]
)
def test_numbers_that_are_trained_are_those_of_the_model(typed, prepared, tmp_path):
    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.lora import LoRA

    settings = settings_of(prepared.model, tmp_path, *typed)
    module = QwenAutoModel(settings.model_dir, settings.freeze, lora=LoRA.of(settings))
    module.configure_model()
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert disk_space.count_numbers(settings)[1] == trained


def test_a_checkpoint_is_as_large_as_was_reckoned(prepared, tmp_path):
    """The room of weights and moments, against the files of a real checkpoint's optimizer and model."""
    from dct_qwen2vl.training.automodel import QwenAutoModel

    settings = settings_of(prepared.model, tmp_path)
    weights, *_ = disk_space.count_numbers(settings)
    module = QwenAutoModel(settings.model_dir)
    module.configure_model()
    module.save_hf(tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size == pytest.approx(weights * disk_space.WEIGHT["automodel"], rel=0.02)
