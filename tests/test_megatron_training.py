"""The Megatron engine through qwen_launch.sh: real torchrun, kill -9, layouts of two GPUs. Needs TransformerEngine."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import REPOSITORY, metrics
from safetensors.torch import load_file

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs TransformerEngine"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
STEPS = 20


@pytest.fixture(scope="module")
def model_dir(prepared, tmp_path_factory) -> Path:
    """A small x4 model that two processes can share: two key-value heads, four layers, random weights."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("model") / "small-x4"
    shutil.copytree(prepared.model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads, config.num_hidden_layers = 2, 4
    torch.manual_seed(5)
    model = Qwen2VLForConditionalGeneration._from_config(config, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def environment(prepared, model_dir: Path, output_dir: Path, name: str, **settings) -> dict[str, str]:
    values = {
        "EXPERIMENT_NAME": name, "MODEL_DIR": model_dir, "DATASET_DIR": prepared.shards, "OUTPUT_DIR": output_dir,
        "MAXPIXELS": 112 * 112, "NUM_PROC_PER_NODE": 1, "PACK_TOKENS": 512, "GBS": 4, "SEQ_LENGTH": 256,
        "MAX_STEPS": STEPS, "LR": "3e-4", "WARMUP_STEPS": 2, "VAL_INTERVAL": 10, "SAVE_INTERVAL": 5,
        "NUM_WORKERS": 2, "ENGINE": "megatron", "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **settings,
    }  # fmt: skip
    return {**os.environ, **{key: str(value) for key, value in values.items()}}


def start(settings: dict[str, str], *arguments: str) -> subprocess.Popen:
    log = Path(settings["OUTPUT_DIR"]) / f"{settings['EXPERIMENT_NAME']}.log"
    with log.open("a") as file:
        command = ["bash", "qwen_launch.sh", "--log-interval", "1", *arguments]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def launch(settings: dict[str, str], *arguments: str, code: int = 0) -> str:
    """Runs to the end; returns the log."""
    process = start(settings, *arguments)
    found = process.wait(timeout=300)
    log = (Path(settings["OUTPUT_DIR"]) / f"{settings['EXPERIMENT_NAME']}.log").read_text()
    assert (found == 0) == (code == 0), log[-4000:]
    return log


def steps_of(run_dir: Path) -> list[dict]:
    return [line for line in metrics(run_dir) if "loss" in line]


def samples_of(lines: list[dict]) -> list[tuple[int, ...]]:
    """What tells a step's samples apart from those of another."""
    return [(line["samples"], line["visual_tokens"], line["text_tokens"]) for line in lines]


@pytest.fixture(scope="module")
def whole(prepared, model_dir, tmp_path_factory) -> Path:
    """The folder of a run on one GPU that nothing has stopped."""
    output = tmp_path_factory.mktemp("runs")
    launch(environment(prepared, model_dir, output, "whole"))
    return output / "whole"


def assert_same_losses(found: list[dict], wanted: list[dict], tolerance: float = 0.02) -> None:
    assert samples_of(found) == samples_of(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), ours["step"]


def test_it_learns_and_writes_a_model_that_transformers_loads(whole, model_dir):
    from transformers import Qwen2VLForConditionalGeneration

    lines = steps_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["padding_share"] == 0 and line["gradient_norm"] > 0 for line in lines)
    assert {"mfu", "peak_memory_gib", "data_wait_share"} <= lines[-1].keys()
    assert [line["step"] for line in metrics(whole) if "val_loss" in line] == [10, 20]
    before, after = load_file(model_dir / "model.safetensors"), load_file(whole / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight"} <= set(changed)
    Qwen2VLForConditionalGeneration.from_pretrained(whole / "hf")


def test_killed_run_goes_on_with_the_same_samples(prepared, model_dir, whole, tmp_path):
    settings = environment(prepared, model_dir, tmp_path, "killed")
    process = start(settings)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        run_dir = tmp_path / "killed"
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 8:
            break
        time.sleep(0.05)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    half = tmp_path / "killed" / "checkpoints" / ".step000019.tmp"
    half.mkdir()
    log = launch(settings)
    assert "Resuming from" in log and "step000019" not in log
    assert_same_losses(steps_of(tmp_path / "killed"), steps_of(whole))


def test_a_damaged_checkpoint_stops_the_run(prepared, model_dir, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "damaged")
    (tmp_path / "damaged" / "finished").unlink()
    newest = max((tmp_path / "damaged" / "checkpoints").glob("step*"))
    file = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])
    launch(environment(prepared, model_dir, tmp_path, "damaged", MAX_STEPS=STEPS), code=1)
    assert not (tmp_path / "damaged" / "finished").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_samples(prepared, model_dir, tmp_path):
    settings = environment(prepared, model_dir, tmp_path, "wild", LR="1e30", MIN_LR="1e30", WARMUP_STEPS=0)
    log = launch(settings, code=1)
    assert "samples of the batch: " in log and "Lower --lr" in log
    assert not list((tmp_path / "wild" / "checkpoints").glob("step000020*"))


@two_gpus
@pytest.mark.parametrize("layout", ["TP", "PP", "DP"])
def test_two_gpus_learn_what_one_learns(layout, prepared, model_dir, whole, tmp_path):
    """With DP the two processes have one loader process each, where the single one has two: the same rows a step."""
    settings = {"NUM_WORKERS": 1} if layout == "DP" else {layout: 2}
    name = f"{layout.lower()}2"
    launch(environment(prepared, model_dir, tmp_path, name, NUM_PROC_PER_NODE=2, **settings))
    assert_same_losses(steps_of(tmp_path / name), steps_of(whole))
    validation = [line["val_loss"] for line in metrics(whole) if "val_loss" in line]
    assert [line["val_loss"] for line in metrics(tmp_path / name) if "val_loss" in line] == pytest.approx(
        validation, rel=0.02
    )


@two_gpus
def test_a_checkpoint_of_one_layout_is_read_by_the_others(prepared, model_dir, tmp_path):
    short = {"MAX_STEPS": 5, "VAL_INTERVAL": 5}
    launch(environment(prepared, model_dir, tmp_path, "tp2", NUM_PROC_PER_NODE=2, TP=2, **short))
    expected = load_file(tmp_path / "tp2" / "hf" / "model.safetensors")
    layouts = {"one": {}, "pp2": {"NUM_PROC_PER_NODE": 2, "PP": 2}, "dp2": {"NUM_PROC_PER_NODE": 2, "NUM_WORKERS": 1}}
    for name, layout in layouts.items():
        shutil.copytree(tmp_path / "tp2", tmp_path / name)
        (tmp_path / name / "finished").unlink()
        shutil.rmtree(tmp_path / name / "hf")
        launch(environment(prepared, model_dir, tmp_path, name, **short, **layout), "--restart-data")
        found = {}
        for file in (tmp_path / name / "hf").glob("*.safetensors"):
            found.update(load_file(file))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
