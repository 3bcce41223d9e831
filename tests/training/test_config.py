"""What one field of TrainingConfig brings with it, and runs whose run.json was written before there was one."""

import json
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest

from dct_qwen2vl.checkpoints.inspection import CheckpointError
from dct_qwen2vl.training import checks, run_file
from dct_qwen2vl.training.config import DATA, GROUPS, TrainingConfig, parse_arguments, setting

KNOWN = ["--model-dir", "models/x4", "--data-dir", "/data/shards"]
INFO = checks.ModelInfo("x4", None)


@dataclass(frozen=True, kw_only=True)
class LargerConfig(TrainingConfig):
    """With fields that the program does not have."""

    label_smoothing: float = setting("how", 0.0, "what the labels lose", at_least=0, below=1)
    frame_jitter: int | None = setting("what", None, "frames moved at most", over=2, resume=DATA)
    overlap: int = setting("where", 1, "of the megatron engine", engine="megatron", not_over="devices")


def typed(*words: str) -> LargerConfig:
    return parse_arguments([*KNOWN, *words], LargerConfig)


def with_share(settings: TrainingConfig) -> TrainingConfig:
    """As finetune_qwen2vl.py resolves it."""
    return replace(settings, skip_share=checks.choose_skip_share(settings))


def test_a_new_field_has_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], LargerConfig)
    shown = capsys.readouterr().out
    what, how, where = shown.split("options:")[1].split("\n\n")[1:]
    assert "--frame-jitter FRAME_JITTER\n" in what and what.endswith(" frames moved at most")
    assert "--label-smoothing LABEL_SMOOTHING\n" in how and "what the labels lose (default: 0.0)" in how
    assert "--overlap OVERLAP" in where and "(default: None)" not in shown
    assert [group.split(":")[0] for group in (what, how, where)] == list(GROUPS.values())
    assert (typed().label_smoothing, typed().frame_jitter) == (0.0, None)
    found = typed("--label-smoothing", "0.25", "--frame-jitter", "4")
    assert (found.label_smoothing, found.frame_jitter) == (0.25, 4)
    with pytest.raises(SystemExit):
        parse_arguments([*KNOWN, "--label-smoothing", "0.25"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label-smoothing", "-1"], "--label-smoothing must be at least 0, got -1.0"),
        (["--label-smoothing", "nan"], "--label-smoothing must be a finite number, at least 0, got nan"),
        (["--label-smoothing", "1"], "--label-smoothing must be below 1, got 1.0"),
        (["--frame-jitter", "2"], "--frame-jitter must be over 2, got 2"),
        (["--overlap", "3"], "--overlap 3 is over --devices 1: change one of them"),
    ],
)
def test_a_new_field_has_bounds(words, said):
    with pytest.raises(checks.RunError) as refusal:
        checks.check_ranges(typed(*words))
    assert str(refusal.value) == said
    checks.check_ranges(typed("--label-smoothing", "0.5", "--frame-jitter", "3"))
    checks.check_ranges(typed())


def test_a_new_field_can_belong_to_one_engine():
    with pytest.raises(
        checks.RunError, match="--overlap belongs to the megatron engine, but --engine automodel was asked"
    ):
        checks.choose_engine(typed("--engine", "automodel", "--overlap", "2"))
    assert checks.choose_engine(typed("--engine", "automodel", "--overlap", "1")) == "automodel"


def begin(settings: TrainingConfig, text: str | None = None) -> None:
    """A run with a checkpoint, whose run.json is text, or what is written of its settings."""
    (settings.run_dir / "checkpoints" / "step000005").mkdir(parents=True)
    run_file.write_run_file(settings, INFO)
    if text:
        (settings.run_dir / "run.json").write_text(text)


def test_a_new_field_has_a_rule_for_a_run_that_goes_on(tmp_path):
    def settings(*words: str) -> LargerConfig:
        return typed("--output-dir", str(tmp_path), *words).resolved("automodel", "32")

    begun = settings("--label-smoothing", "0.25", "--frame-jitter", "4")
    begin(begun)
    run_file.check_run_folder(begun)
    other_labels = settings("--label-smoothing", "0.5", "--frame-jitter", "4", "--restart-data")
    with pytest.raises(checks.RunError, match=r"was started with --label-smoothing 0.25, now it is 0.5: use the same"):
        run_file.check_run_folder(other_labels)
    other_frames = ["--label-smoothing", "0.25", "--frame-jitter", "5"]
    with pytest.raises(checks.RunError, match=r"with --frame-jitter 4, now it is 5: .*, --restart-data to begin"):
        run_file.check_run_folder(settings(*other_frames))
    run_file.check_run_folder(settings(*other_frames, "--restart-data"))


def test_a_run_begun_before_there_was_a_field_goes_on_with_its_default(tmp_path):
    begin(parse_arguments([*KNOWN, "--output-dir", str(tmp_path)]).resolved("automodel", "32"))
    now = typed("--output-dir", str(tmp_path)).resolved("automodel", "32")
    run_file.check_run_folder(now)
    with pytest.raises(checks.RunError, match=r"was started with --label-smoothing 0.0, now it is 0.5"):
        run_file.check_run_folder(replace(now, label_smoothing=0.5))


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        typed().lr = 1.0


# Written by finetune_qwen2vl.py at commit 922e3c6, when its settings were an argparse.Namespace.
OLD_RUN_FILE = """{
  "model_dir": "models/x4", "data_dir": "/data/shards", "output_dir": "experiments", "experiment_name": "old",
  "dct": null, "min_pixels": null, "max_pixels": 12544, "video_fps": 2.0, "video_min_frames": 4,
  "video_max_frames": 768, "video_total_pixels": 19267584, "seq_length": 2048, "max_steps": 1000,
  "micro_batch_size": 1, "global_batch_size": 32, "lr": 1e-05, "min_lr": 1e-06, "warmup_steps": 30,
  "weight_decay": 0.05, "adam_beta2": 0.98, "max_gradient_norm": 1.0, "freeze": ["projector", "vision"],
  "lora_rank": 4, "lora_alpha": 32, "seed": 42, "engine": "automodel", "pack_tokens": 0, "pack_vision_tokens": 0,
  "packing_buffer": 512, "tensor_parallel": 1, "pipeline_parallel": 1, "recompute": false, "profile": null,
  "devices": 4, "num_nodes": 1, "precision": "32", "num_workers": 0, "shuffle_buffer": 1000,
  "max_bad_in_a_row": 100, "val_interval": 200, "val_batches": null, "save_interval": 200, "keep": 2,
  "log_interval": 10, "restart_data": true, "wandb_project": null, "world_size": 4, "rank": 0,
  "run_dir": "experiments/old", "pixel_bounds": {"max_pixels": 12544}, "data_parallel": 4,
  "chosen_engine": "automodel", "data_restarts": 1, "accumulate": 8, "token_format": "x4"
}"""
SINCE_THEN = {"sharding": "none", "skip_db": None, "skip_noise_floor": False, "skip_share": 1.0}
OLD_MEGATRON_RUN = {
    "max_pixels": None, "global_batch_size": 16, "freeze": [], "lora_rank": 0, "engine": "auto", "pack_tokens": 8192,
    "pack_vision_tokens": 16384, "tensor_parallel": 2, "recompute": True, "profile": 3, "precision": "bf16-mixed",
    "num_workers": 2, "restart_data": False, "pixel_bounds": {}, "data_parallel": 2, "chosen_engine": "megatron",
    "data_restarts": 0,
}  # fmt: skip
COMMANDS = {
    "automodel": (
        "--engine automodel --devices 4 --freeze vision projector --lora-rank 4 --max-pixels 12544 --num-workers 0 "
        "--restart-data"
    ),
    "megatron": "--devices 4 --tensor-parallel 2 --profile 3 --recompute",
}


@pytest.mark.parametrize(
    ("begun", "now", "said"),
    [
        ([], ["--max-pixels", "9"], "was started without --max-pixels, now it is 9: use"),
        (["--max-pixels", "9"], [], "was started with --max-pixels 9, now it is left out: use"),
        ([], ["--freeze", "vision", "language"], "was started without --freeze, now it is language vision: use"),
        ([], ["--skip-noise-floor"], "was started without --skip-noise-floor, now it is given: use"),
    ],
)
def test_settings_that_are_left_out_are_named_as_they_are_typed(begun, now, said, tmp_path):
    first, second = (
        with_share(typed("--output-dir", str(tmp_path), *words)).resolved("automodel", "32") for words in (begun, now)
    )
    begin(first)
    with pytest.raises(checks.RunError, match=said):
        run_file.check_run_folder(second)


@pytest.mark.parametrize(("engine", "precision"), [("automodel", "32"), ("megatron", "bf16-mixed")])
def test_a_run_begun_before_goes_on_and_keeps_the_keys_of_its_file(engine, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = json.loads(OLD_RUN_FILE) | (OLD_MEGATRON_RUN if engine == "megatron" else {})
    words = [*KNOWN, "--experiment-name", "old", *COMMANDS[engine].split()]
    settings = with_share(parse_arguments(words)).resolved(engine, precision)
    begin(settings, json.dumps(old))
    without_flag = replace(settings, restart_data=False)
    run_file.check_run_folder(without_flag)
    assert run_file.count_data_restarts(without_flag) == old["data_restarts"]
    for name, value in (("lr", 5e-5), ("seed", 1), ("precision", "16"), ("devices", 8), ("freeze", ("language",))):
        with pytest.raises(checks.RunError, match="use the same value to resume"):
            run_file.check_run_folder(replace(without_flag, **{name: value}))
    run_file.check_run_folder(replace(without_flag, keep=7, output_dir=Path.cwd() / "experiments"))
    run_file.write_run_file(replace(settings, data_restarts=old["data_restarts"]), INFO)
    assert json.loads(Path("experiments/old/run.json").read_text()) == old | SINCE_THEN


def test_the_flag_of_one_engine_is_refused_by_the_other(monkeypatch):
    monkeypatch.setattr(checks, "megatron_refusal", lambda: None)
    for engine in ("megatron", "auto"):
        with pytest.raises(checks.RunError) as refusal:
            checks.choose_engine(typed("--engine", engine, "--sharding", "fsdp2"))
        assert str(refusal.value) == (
            "--sharding belongs to the automodel engine: add --engine automodel, or leave it out"
        )
    assert checks.choose_engine(typed("--sharding", "none")) == "megatron"
    assert checks.choose_engine(typed("--engine", "automodel", "--sharding", "fsdp2")) == "automodel"


@pytest.mark.parametrize(
    ("text", "vision", "found"),
    [
        ("silu", "quick_gelu", None),
        (None, None, None),  # transformers' defaults
        ("silu", "gelu", None),
        ("silu", "gelu_pytorch_tanh", "has quick_gelu and gelu, not the hidden_act gelu_pytorch_tanh of "),
        ("gelu", "quick_gelu", "has silu, not the hidden_act gelu of "),
    ],
)
def test_megatron_refuses_an_activation_that_it_would_replace(text, vision, found, tmp_path):
    config = {"model_type": "qwen2_vl", "hidden_act": text, "vision_config": {"hidden_act": vision}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = checks.unknown_to_megatron(tmp_path)
    assert said == (found and f"--engine megatron {found}{tmp_path}: use --engine automodel")


def test_sharding_may_change_when_a_run_goes_on(tmp_path):
    def settings(*words: str) -> LargerConfig:
        return typed("--output-dir", str(tmp_path), "--devices", "2", *words).resolved("automodel", "32")

    begin(settings("--sharding", "fsdp2"))
    assert json.loads((tmp_path / "qwen2vl_dct" / "run.json").read_text())["sharding"] == "fsdp2"
    run_file.check_run_folder(settings())
    run_file.check_run_folder(settings("--sharding", "fsdp2"))


def test_a_run_goes_on_with_its_share_of_skipping_unless_the_data_begin_again(tmp_path):
    def settings(*words: str) -> LargerConfig:
        skipping = ("--skip-db", "38", *words)
        return with_share(typed("--output-dir", str(tmp_path), *skipping)).resolved("automodel", "32")

    begin(settings("--skip-share", "0.5"))
    assert json.loads((tmp_path / "qwen2vl_dct" / "run.json").read_text())["skip_share"] == 0.5
    for words in ([], ["--restart-data"], ["--skip-share", "0.5"]):
        assert settings(*words).skip_share == 0.5
        run_file.check_run_folder(settings(*words))
    with pytest.raises(checks.RunError, match=r"was started with --skip-share 0\.5, now it is 0\.8: .*--restart-data"):
        run_file.check_run_folder(settings("--skip-share", "0.8"))
    run_file.check_run_folder(settings("--skip-share", "0.8", "--restart-data"))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_begun_when_all_samples_were_skipped_goes_on_so(recorded, tmp_path):
    """Its run.json has the default of then, or is older than shares."""
    now = typed("--output-dir", str(tmp_path), "--skip-db", "38")
    assert with_share(now).skip_share == 0.8
    begin(replace(now, skip_share=1.0).resolved("automodel", "32"))
    path = tmp_path / "qwen2vl_dct" / "run.json"
    saved = json.loads(path.read_text())
    assert saved.pop("skip_share") == 1.0
    if not recorded:
        path.write_text(json.dumps(saved))
    going_on = with_share(now).resolved("automodel", "32")
    assert going_on.skip_share == 1.0
    run_file.check_run_folder(going_on)
    run_file.write_run_file(going_on, INFO)
    assert json.loads(path.read_text()) == {**saved, "skip_share": 1.0}


def test_the_share_of_a_run_that_skipped_nothing_is_none_of_its_data(tmp_path):
    """Data that begin again with skipping have the default of now; without it, run.json says what it always did."""
    plain = typed("--output-dir", str(tmp_path))
    begin(with_share(plain).resolved("automodel", "32"))
    assert json.loads((tmp_path / "qwen2vl_dct" / "run.json").read_text())["skip_share"] == 1.0
    assert with_share(replace(plain, skip_db=38.0, restart_data=True)).skip_share == 0.8
    assert with_share(replace(plain, skip_db=0.0)).skip_share == 1.0


def test_a_share_that_cannot_be_in_a_run_file_is_one_line(tmp_path):
    now = typed("--output-dir", str(tmp_path), "--skip-db", "38")
    begin(with_share(now).resolved("automodel", "32"))
    path = tmp_path / "qwen2vl_dct" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "skip_share": "most"}))
    with pytest.raises(CheckpointError) as refusal:
        checks.choose_skip_share(now)
    assert str(refusal.value) == (
        f"{path} has skip_share 'most', which is no share over 0 and at most 1: put back what the run was started "
        "with, or another --experiment-name"
    )


def test_one_process_has_nothing_to_share():
    checks.check_numbers(typed("--devices", "2", "--sharding", "fsdp2").resolved("automodel", "32"))
    with pytest.raises(checks.RunError, match=r"--sharding fsdp2 divides a model among processes, but there is one"):
        checks.check_numbers(typed("--sharding", "fsdp2").resolved("automodel", "32"))


def test_what_cannot_be_undone_by_other_data_is_named_first(tmp_path):
    """An engine changes the batch as well; --restart-data helps with the batch only."""
    before = parse_arguments([*KNOWN, "--output-dir", str(tmp_path)])
    begin(before.resolved("automodel", "32"))
    with pytest.raises(checks.RunError, match="was started with --engine automodel, now it is megatron"):
        run_file.check_run_folder(before.resolved("megatron", "bf16-mixed"))
