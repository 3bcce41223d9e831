"""qwen_launch.sh and finetune_qwen2vl.py: real torchrun with one and two processes, a real kill -9, the refusals.

The launches are shared by the tests: nearly all of their time is NeMo's import.
"""

import gzip
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import REPOSITORY, Prepared, edit_json, metrics, run, write_checkpoint
from safetensors.torch import load_file
from stand_in_python import SCRIPT, write_interpreter

import finetune_qwen2vl
from dct_qwen2vl.checkpoints.inspection import PROCESSOR, CheckpointError, recorded_skipping
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.training import checks, config, processes, run_file, run_lock

STEPS, SAVE_INTERVAL, VAL_INTERVAL = 24, 8, 12
KILL_AFTER = 14  # steps: well past a checkpoint, before the next
SEQ_LENGTH = 66  # tokens; one sample in eight is longer
CODE = "image_processing_dct.py"  # beside the weights
FAULT_STEP, SAMPLES_PER_STEP = 4, 8
NOT_COMPARED = ("--compare-samples", "0")  # the two forms of the model, which other launches compare


def launch_environment(prepared: Prepared, output_dir: Path, name: str, processes: int) -> dict[str, str]:
    """The variables of qwen_launch.sh for a short run."""
    values = {
        "EXPERIMENT_NAME": name, "MODEL_DIR": prepared.model, "DATASET_DIR": prepared.shards, "OUTPUT_DIR": output_dir,
        "MAXPIXELS": 112 * 112, "NUM_PROC_PER_NODE": processes, "MBS": 2, "GBS": 8, "SEQ_LENGTH": SEQ_LENGTH,
        "MAX_STEPS": STEPS, "LR": "1e-3", "WARMUP_STEPS": 2, "VAL_INTERVAL": VAL_INTERVAL,
        "SAVE_INTERVAL": SAVE_INTERVAL, "NUM_WORKERS": 1, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1,
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    return {**os.environ, **{key: str(value) for key, value in values.items()}}


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    log = Path(environment["OUTPUT_DIR"]) / f"{environment['EXPERIMENT_NAME']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            ["bash", "qwen_launch.sh", "--log-interval", "1", *arguments],
            cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen, environment: dict[str, str]) -> str:
    """Waits for a launch; returns its log."""
    code = process.wait(timeout=390)
    log = (Path(environment["OUTPUT_DIR"]) / f"{environment['EXPERIMENT_NAME']}.log").read_text()
    assert code == 0, log[-3000:]
    return log


def wait_until_under_way(process: subprocess.Popen, run_dir: Path) -> None:
    """Until KILL_AFTER steps are logged."""
    deadline = time.monotonic() + 390
    while not any(line["step"] >= KILL_AFTER for line in whole_lines(run_dir)):
        assert process.poll() is None, "the launch ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_when_under_way(process: subprocess.Popen, run_dir: Path) -> None:
    """kill -9 of every process of a launch."""
    wait_until_under_way(process, run_dir)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family[:-1], timeout=20)
    process.wait(timeout=20)


def whole_lines(run_dir: Path) -> list[dict]:
    """What a run that is still going, or was killed, has logged."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


@pytest.fixture(scope="module")
def broken_shards(prepared: Prepared, tmp_path_factory) -> Path:
    """Prepared shards whose every image has been overwritten."""
    shards = tmp_path_factory.mktemp("broken") / "shards"
    shutil.copytree(prepared.shards, shards)
    for tar in shards.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data = data.replace(b'"conversations"', b'"conversationz"')  # same length: offsets stay
        tar.write_bytes(data)
    return shards


@pytest.fixture(scope="module")
def one_process(prepared, broken_shards, tmp_path_factory) -> dict:
    """An uninterrupted run, a run killed and started again, and a run on unusable data; one process each."""
    output = tmp_path_factory.mktemp("one")
    whole = launch_environment(prepared, output, "whole", 1)
    killed = launch_environment(prepared, output, "killed", 1)
    unusable = {**launch_environment(prepared, output, "unusable", 1), "DATASET_DIR": str(broken_shards)}
    first, second = start(killed, *NOT_COMPARED), start(whole, "--profile", "3")
    kill_when_under_way(first, output / "killed")
    finish(second, whole)
    third, fourth = start(killed, *NOT_COMPARED), start(unusable, "--max-bad-in-a-row", "20", *NOT_COMPARED)
    log = finish(third, killed)
    code = fourth.wait(timeout=390)
    return {"output": output, "log": log, "unusable": (code, (output / "unusable.log").read_text()), "whole": whole}


@pytest.fixture(scope="module")
def two_processes(prepared, tmp_path_factory) -> dict:
    """A run killed and started again, and what it had logged when it was killed; two processes, adapters in the
    language model, projector frozen."""
    output = tmp_path_factory.mktemp("two")
    killed = launch_environment(prepared, output, "killed", 2)
    parts = ("--lora-rank", "4", "--freeze", "projector")
    kill_when_under_way(start(killed, *parts), output / "killed")
    before = whole_lines(output / "killed")
    log = finish(start(killed, *parts), killed)
    return {"output": output, "log": log, "before": before}


def figures(lines: list[dict]) -> list[list]:
    """Everything of a run that must not depend on an interruption, bit for bit."""
    keys = (
        *("step", "loss", "learning_rate", "gradient_norm", "samples", "visual_tokens", "text_tokens"),
        *("skipped_samples", "val_loss", "val_samples", "val_left_out"),
    )
    return [[line.get(key) for key in keys] for line in lines]


def resumed_step(log: str) -> int:
    """The step of the checkpoint from which the second launch went on."""
    return int(re.search(r"Resuming from .*step(\d{6})", log)[1])


@pytest.mark.launch
def test_killed_run_goes_on_bit_for_bit_one_process(one_process):
    whole, killed = (metrics(one_process["output"] / name) for name in ("whole", "killed"))
    assert SAVE_INTERVAL <= resumed_step(one_process["log"]) < STEPS
    assert figures(killed) == figures(whole)


@pytest.mark.launch
def test_killed_run_goes_on_bit_for_bit_two_processes(two_processes):
    before, after = two_processes["before"], metrics(two_processes["output"] / "killed")
    repeated = [line for line in before if line["step"] > resumed_step(two_processes["log"])]
    assert len(repeated) >= 3, "the launch was killed too early to compare anything"
    assert figures(after[: len(before)]) == figures(before)


@pytest.mark.launch
@pytest.mark.parametrize("launched", ["one_process", "two_processes"])
def test_log_is_complete_and_finite(launched, request):
    lines = metrics(request.getfixturevalue(launched)["output"] / "killed")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [VAL_INTERVAL, STEPS]
    assert all(math.isfinite(line.get("loss", line.get("val_loss"))) for line in lines)
    assert {line["samples"] for line in lines if "loss" in line} == {SAMPLES_PER_STEP}


@pytest.mark.launch
@pytest.mark.parametrize("launched", ["one_process", "two_processes"])
def test_validation_sees_the_whole_split(launched, request, prepared):
    val = {"val_samples": 0, "val_left_out": 0}
    lines = [line for line in metrics(request.getfixturevalue(launched)["output"] / "killed") if "val_loss" in line]
    too_long = sum(length > SEQ_LENGTH for length in lengths_of(prepared, "val"))
    assert too_long > 0
    for line in lines:
        seen, left_out = (line[name] for name in val)
        assert left_out == too_long and seen + left_out == len(lengths_of(prepared, "val"))


@pytest.mark.launch
@pytest.mark.parametrize("launched", ["one_process", "two_processes"])
def test_skipped_samples_are_those_of_all_processes_and_starts(launched, request):
    run = request.getfixturevalue(launched)
    lines = [line for line in metrics(run["output"] / "killed") if "loss" in line]
    counts = [line["skipped_samples"] for line in lines]
    assert counts == sorted(counts) and counts[-1] > counts[resumed_step(run["log"]) - 1] > 0
    assert re.findall(r"^Skipped (\d+) samples: too_long (\d+)$", run["log"], re.MULTILINE) == [(str(counts[-1]),) * 2]
    first = next(count for count in counts if count)
    said = re.findall(r"^Note: (\d+) samples so far have more tokens than --seq-length", run["log"], re.MULTILINE)
    assert len(said) == 2 and said[0] == str(first)  # once in each start


def lengths_of(prepared: Prepared, split: str) -> list[int]:
    """Tokens of every sample."""
    from transformers import AutoTokenizer

    from dct_qwen2vl.data.samples import read_samples
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import QwenTaskEncoder

    processor = DCTImageProcessor.from_pretrained(prepared.model, max_pixels=112 * 112)
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(prepared.model), processor, seq_length=10_000)
    return [encoder.measure(sample)[0] for sample in read_samples(prepared.shards, split)]


@pytest.fixture(scope="module")
def faulty(prepared, tmp_path_factory) -> dict:
    """Two processes, of which one has a gradient that is no number in FAULT_STEP; checkpoints every two steps."""
    output = tmp_path_factory.mktemp("faulty")
    python = str(write_interpreter(output, "faulty_gradient"))
    environment = launch_environment(prepared, output, "faulty", 2) | {"PYTHON": python, "PYTHON_EXEC": python}
    process = start(environment | {"FAULT_STEP": str(FAULT_STEP), "SAVE_INTERVAL": "2"}, *NOT_COMPARED)
    code = process.wait(timeout=390)
    return {"run_dir": output / "faulty", "code": code, "log": (output / "faulty.log").read_text()}


@pytest.mark.launch
def test_a_gradient_that_is_no_number_stops_the_run_and_names_the_samples_of_its_step(faulty):
    (line,) = [line for line in faulty["log"].splitlines() if line.startswith("finetune_qwen2vl.py: ")]
    assert faulty["code"] != 0
    assert f"the gradient norm is nan at step {FAULT_STEP}, which has changed no weight; its samples: " in line
    samples = json.loads((faulty["run_dir"] / "non_finite_step.json").read_text())["samples"]
    assert len(set(samples)) == SAMPLES_PER_STEP and ", ".join(samples) in line


@pytest.mark.launch
def test_a_gradient_that_is_no_number_is_never_saved(faulty):
    (checkpoint,) = (faulty["run_dir"] / "checkpoints").iterdir()
    assert checkpoint.name == f"step{FAULT_STEP - 2:06d}"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "hf" / "model.safetensors").values())
    assert [line["step"] for line in metrics(faulty["run_dir"])] == list(range(1, FAULT_STEP))


@pytest.mark.launch
def test_weights_of_both_runs_are_equal(one_process):
    whole, killed = (
        load_file(one_process["output"] / name / "hf_dct" / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.launch
def test_training_moved_every_part(one_process, prepared):
    before = load_file(prepared.model / "model.safetensors")
    after = load_file(one_process["output"] / "whole" / "hf_dct" / "model.safetensors")
    assert before.keys() == after.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []


@pytest.mark.launch
def test_adapters_and_the_vision_tower_move_what_they_should_and_nothing_else(two_processes, prepared):
    run_dir = two_processes["output"] / "killed"
    before, after = (load_file(folder / "model.safetensors") for folder in (prepared.model, run_dir / "hf_dct"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {
        name for name in before
        if (name.startswith("visual.") and not name.startswith("visual.merger."))
        or re.fullmatch(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight", name)
    }  # fmt: skip
    settings = json.loads((run_dir / "run.json").read_text())
    assert (settings["lora_rank"], settings["lora_alpha"], settings["freeze"]) == (4, 32, ["projector"])


@pytest.mark.launch
def test_a_checkpoint_s_model_is_the_one_with_its_adapters(two_processes):
    run_dir = two_processes["output"] / "killed"
    newest = load_file(run_dir / "checkpoints" / f"step{STEPS:06d}" / "hf" / "model.safetensors")
    final = load_file(run_dir / "hf_dct" / "model.safetensors")
    assert newest.keys() == final.keys() and all(torch.equal(newest[name], final[name]) for name in final)


@pytest.mark.launch
@pytest.mark.parametrize("launched", [("one_process", "whole"), ("two_processes", "killed")], ids=["weights", "lora"])
def test_an_export_has_the_bytes_that_the_end_of_the_run_has_written(launched, request, prepared, tmp_path):
    """One process, without shards; the settings of the model are left out."""
    ended = request.getfixturevalue(launched[0])["output"] / launched[1]
    shutil.copytree(ended / "checkpoints" / f"step{STEPS:06d}", tmp_path / "run" / "checkpoints" / f"step{STEPS:06d}")
    shutil.copyfile(ended / "run.json", tmp_path / "run" / "run.json")
    known = ["--model-dir", str(prepared.model), "--data-dir", "/nowhere", "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*known, "--experiment-name", "run", "--export"]) == 0
    for form in ("hf", "hf_dct"):
        found, expected = files_of(tmp_path / "run" / "exported" / f"step{STEPS:06d}" / form), files_of(ended / form)
        assert found.keys() == expected.keys() and [name for name in found if found[name] != expected[name]] == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.launch
def test_run_with_other_adapters_is_not_continued(two_processes, refused):
    folder = {"OUTPUT_DIR": str(two_processes["output"]), "EXPERIMENT_NAME": "killed"}
    line = refused("--lora-rank", "8", "--freeze", "projector", **folder)
    assert "was started with --lora-rank 4, now it is 8" in line


@pytest.mark.launch
def test_result_to_train_further_is_a_complete_hf_directory(one_process, prepared):
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    folder = one_process["output"] / "whole" / "hf_dct"
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    assert model.visual.patch_embed.proj.weight.shape[1:] == (1764, 1, 1, 1)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    assert processor.image_processor.dct["name"] == "x4"
    assert processor.image_processor.max_pixels == 112 * 112  # of the run, not of the checkpoint it started from
    assert (folder / CODE).read_bytes() == (prepared.model / CODE).read_bytes()
    assert checks.check_model(folder, None).dct_name == "x4"


@pytest.mark.launch
@pytest.mark.parametrize("launched", [("one_process", "whole"), ("two_processes", "killed")], ids=["weights", "lora"])
def test_result_to_take_along_is_a_plain_qwen2_vl_that_computes_the_same(launched, request, natural_frames):
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    run_dir = request.getfixturevalue(launched[0])["output"] / launched[1]
    assert not list((run_dir / "hf").glob("*.py"))
    logits = []
    for folder in (run_dir / "hf_dct", run_dir / "hf"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=folder.name == "hf_dct", use_fast=False)
        content = [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[natural_frames(1, 112, 112)[0]], return_tensors="pt")
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert type(processor.image_processor) is Qwen2VLImageProcessor
    assert (processor.image_processor.patch_size, processor.image_processor.max_pixels) == (28, 112 * 112)
    assert inputs["pixel_values"].shape == (16, 4704)
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 1e-5
    videos = json.loads((run_dir / "hf" / "video_preprocessor_config.json").read_text())
    assert (videos["fps"], videos["min_frames"], videos["max_frames"], videos["patch_size"]) == (2.0, 4, 768, 28)
    assert videos["total_pixels"] == 24_576 * 28 * 28
    checkpoints = sorted((run_dir / "checkpoints").glob("step*/hf"))
    assert all(
        saved_sampling(folder) == saved_sampling(run_dir / "hf") for folder in [run_dir / "hf_dct", *checkpoints]
    )


@pytest.mark.launch
@pytest.mark.parametrize("launched", [("one_process", "whole"), ("two_processes", "killed")])
def test_the_two_forms_are_compared_before_and_after(launched, request):
    output = request.getfixturevalue(launched[0])["output"]
    run_dir = output / launched[1]
    for when, form in (("before", None), ("after", run_dir / "hf")):
        folder = run_dir / "comparison" / when
        summary = json.loads((folder / "comparison.json").read_text())
        assert summary["equal"] and summary["same"]["largest"] < 1e-5 and summary["questions"] == 3
        assert form is None or summary["models"] == [str(run_dir / "hf_dct"), str(form)]
        lines = [json.loads(line) for line in (folder / "comparison.jsonl").read_text().splitlines()]
        assert all(m["a"]["height"] * m["a"]["width"] <= 112 * 112 for line in lines for m in line["media"])
        assert not (folder / ".stock").exists()
    said = (output / f"{launched[1]}.log").read_text()
    assert said.count("and its stock form on 3 samples, largest difference of logits: ") == 2


@pytest.mark.launch
def test_a_stock_form_is_not_trained_on(one_process, refused):
    folder = one_process["output"] / "whole" / "hf"
    line = refused(MODEL_DIR=str(folder)).rstrip()
    assert (
        "is the stock form of a DCT model (x4), but training needs its coefficient form: give a run's hf_dct, or "
        in line
    )
    assert line.endswith(f"python convert_checkpoint.py --to dct --model-dir {folder} --output-dir {folder}-dct")
    assert checks.check_model(folder, "none").dct is None


@pytest.mark.launch
def test_only_the_newest_checkpoints_are_kept_and_whole(one_process):
    folder = one_process["output"] / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step000016", "step000024"]
    assert (folder / "step000016" / "hf" / "model.safetensors").is_file()


@pytest.mark.launch
def test_weights_can_be_read_by_others(one_process):
    """safetensors lets the owner only."""
    files = sorted((one_process["output"] / "whole").rglob("*.safetensors"))
    assert len(files) == 4  # hf/, hf_dct/ and two checkpoints
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


@pytest.fixture(scope="module")
def restarted(one_process, prepared) -> dict:
    """A checkpoint of steps of four micro-batches goes on with three a step and the data again; 16 x 4 is no multiple
    of 3. Killed before its first checkpoint, and started again without the flag. None is saved on the way."""
    whole, run_dir = (one_process["output"] / name for name in ("whole", "restarted"))
    shutil.copytree(whole / "checkpoints" / "step000016", run_dir / "checkpoints" / "step000016")
    shutil.copyfile(whole / "run.json", run_dir / "run.json")
    environment = launch_environment(prepared, one_process["output"], "restarted", 1)
    environment |= {"GBS": "6", "VAL_INTERVAL": "3", "SAVE_INTERVAL": "0"}
    kill_when_under_way(start(environment, "--restart-data", *NOT_COMPARED), run_dir)
    before = whole_lines(run_dir)
    log = finish(start(environment, *NOT_COMPARED), environment)
    return {"run_dir": run_dir, "before": before, "log": log}


@pytest.mark.launch
def test_data_begun_anew_in_other_batches_come_in_whole_steps(restarted):
    lines = metrics(restarted["run_dir"])
    assert resumed_step(restarted["log"]) == 16
    steps = [(line["step"], line["samples"]) for line in lines if "loss" in line]
    assert steps == [(step, 6) for step in range(17, STEPS + 1)]
    assert [line["step"] for line in lines if "val_loss" in line] == [18, 21, 24]
    assert [path.name for path in (restarted["run_dir"] / "checkpoints").iterdir()] == ["step000016"]


@pytest.mark.launch
def test_data_begun_anew_begin_anew_once_more_after_a_kill_before_a_checkpoint(restarted):
    before, after = restarted["before"], metrics(restarted["run_dir"])
    assert len(re.findall(r"Resuming from .*step000016", restarted["log"])) == 2
    assert restarted["log"].count("The checkpoint was saved before --restart-data: the data begin from the start") == 1
    assert before and figures(after[: len(before)]) == figures(before)


@pytest.mark.launch
def test_unusable_data_stops_the_run_with_one_clear_line(one_process):
    code, log = one_process["unusable"]
    assert code != 0
    lines = [line for line in log.splitlines() if line.startswith("finetune_qwen2vl.py: ")]
    assert len(lines) == 1
    assert "20 samples in a row could not be used (no_conversation 20)" in lines[0]


@pytest.mark.launch
def test_finished_run_is_not_repeated(one_process):
    environment = one_process["whole"]
    log = finish(start(environment), environment)
    assert log.splitlines()[-1].endswith(f"its model is in {one_process['output'] / 'whole' / 'hf'}")


@pytest.mark.launch
@pytest.mark.parametrize("there", [True, False])
def test_a_finished_run_whose_model_was_moved_says_how_to_write_it_again(there, prepared, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "hf" if there else folder).mkdir(parents=True)
    (folder / "finished").touch()
    folders = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*folders, "--experiment-name", "run", "--engine", "automodel"]) == 0
    moved = f", but its model is no longer in {folder}/hf: remove {folder}/finished and run the same command"
    assert f"{folder} is finished{f': its model is in {folder}/hf' if there else moved}" in capsys.readouterr().out


def test_run_folder_of_other_settings_is_refused(one_process, refused):
    folder = {"OUTPUT_DIR": str(one_process["output"]), "EXPERIMENT_NAME": "whole"}
    assert "was started with --lr 0.001, now it is 0.0005" in refused(LR="5e-4", **folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--precision", "bf16-mixed"], "was started with --precision 32, now it is bf16-mixed: use the same value"),
        (["--engine", "megatron"], "was started with --engine automodel, now it is megatron: use the same value"),
    ],
)
def test_precision_and_engine_stay_when_a_run_goes_on(changed, said, prepared, tmp_path, monkeypatch, one_line_error):
    monkeypatch.setattr(checks, "megatron_refusal", lambda: None)
    monkeypatch.setattr(finetune_qwen2vl, "train", run_file.write_run_file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    begun = [*known, "--engine", "automodel"]
    assert finetune_qwen2vl.main(begun) == 0
    assert finetune_qwen2vl.main([*begun, "--precision", "32", "--check"]) == 0
    assert finetune_qwen2vl.main([*begun, *changed, "--restart-data"]) == 1
    assert said in one_line_error()


def test_run_that_is_being_trained_is_not_started_twice(prepared, tmp_path):
    run_lock.lock(tmp_path / "refused")
    assert f"is being trained by another process (pid {os.getpid()} on" in refused_by_launcher(prepared, tmp_path)


@pytest.mark.parametrize("number", ["0", "two"])
def test_a_number_of_processes_that_is_none_is_refused(prepared, tmp_path, number):
    said = refused_by_launcher(prepared, tmp_path, NUM_PROC_PER_NODE=number, DEVICES=number)
    assert said == f"qwen_launch.sh: NUM_PROC_PER_NODE={number}: give the number of processes of this node, 1 or more\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"NNODES": "0"}, "NNODES=0: give the number of nodes, 1 or more"),
        ({"NNODES": "two"}, "NNODES=two: give the number of nodes, 1 or more"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2, but NNODES=2: number the nodes from 0 to 1"),
        ({"NNODES": "2", "MASTER_PORT": "65536"}, "MASTER_PORT=65536: give a port from 1 to 65535"),
        ({"SKIP_NOISE_FLOOR": "yes"}, "SKIP_NOISE_FLOOR=yes: give 1, or leave it out"),
    ],
)
def test_settings_that_torchrun_would_end_in_a_traceback_for_are_refused(settings, said, prepared, tmp_path):
    assert refused_by_launcher(prepared, tmp_path, **settings) == f"qwen_launch.sh: {said}\n"


@pytest.mark.parametrize(("typed", "passed_on"), [("", False), ("0", False), ("1", True)])
def test_the_noise_floor_is_measured_where_it_is_asked_for(typed, passed_on, tmp_path):
    (tmp_path / "shows_arguments").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "shows_arguments").chmod(0o755)
    asked = {"PYTHON": str(tmp_path / "shows_arguments"), "SKIP_DB": "38", "SKIP_NOISE_FLOOR": typed}
    words = run(["bash", "qwen_launch.sh"], **asked).stdout.splitlines()
    assert ("--skip-noise-floor" in words) is passed_on


def refused_by_launcher(prepared: Prepared, tmp_path: Path, **settings: str) -> str:
    """The one line with which qwen_launch.sh refuses to start two processes."""
    environment = {**launch_environment(prepared, tmp_path, "refused", 2), **settings}
    result = run(["bash", "qwen_launch.sh"], check=False, **environment)
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.fixture
def refused(prepared, tmp_path, monkeypatch, one_line_error) -> Callable[..., str]:
    """refused("--dct", "x16", GBS="10"): the one line with which the first of two processes refuses what qwen_launch.sh
    makes of arguments and settings. It is called here, without torchrun, which takes longer than all checks."""
    shows_arguments = tmp_path / "shows_arguments"
    shows_arguments.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    shows_arguments.chmod(0o755)
    for name, value in {processes.TORCHRUN: "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def refuse(*arguments: str, **settings: str) -> str:
        environment = launch_environment(prepared, tmp_path, "refused", 2) | settings | {"PYTHON": str(shows_arguments)}
        words = run(["bash", "qwen_launch.sh", *arguments], **environment).stdout.splitlines()
        assert words[:6] == ["-m", "dct_qwen2vl.training.launch", "--standalone", "--nproc-per-node", "2", SCRIPT]
        assert finetune_qwen2vl.main([*words[6:], "--check"]) == 1
        return one_line_error()

    return refuse


def test_indivisible_batch_is_refused(prepared, tmp_path):
    assert "GBS 10 is not divisible by MBS 2 x 2 processes = 4" in refused_by_launcher(prepared, tmp_path, GBS="10")


def test_flags_of_the_other_engine_are_refused(refused):
    line = refused(PP="2")
    assert "--pipeline-parallel belongs to the megatron engine, but --engine megatron needs" in line
    assert "--pack-tokens belongs to the megatron engine" in refused(PACK_TOKENS="512", MBS="")


@pytest.mark.parametrize(
    ("engine", "typed", "expected"),
    [
        ("automodel", [], (1, 0, 0, 32)),
        ("automodel", ["--micro-batch-size", "4", "--global-batch-size", "8"], (4, 0, 0, 8)),
        ("megatron", [], (1, 8192, 16384, 18)),  # sequences, a multiple of three data-parallel processes
        ("megatron", ["--pack-tokens", "4096", "--global-batch-size", "6"], (1, 4096, 8192, 6)),
        ("megatron", ["--micro-batch-size", "2"], (2, 0, 0, 32)),
        ("megatron", ["--pack-tokens", "0"], (1, 0, 0, 32)),
    ],
)
def test_what_the_command_line_leaves_open_of_a_batch(engine, typed, expected):
    known = ["--model-dir", "m", "--data-dir", "d", "--devices", "3"]
    resolved = config.parse_arguments([*known, *typed]).resolved(engine, "32")
    names = ("micro_batch_size", "pack_tokens", "pack_vision_tokens", "global_batch_size")
    assert tuple(getattr(resolved, name) for name in names) == expected


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--pack-tokens", "4096", "--micro-batch-size", "2"], "so --micro-batch-size is 1, got 2"),
        (["--pack-vision-tokens", "4096", "--micro-batch-size", "1"], "sequences as --pack-tokens 0: both must be"),
        (["--pack-tokens", "4096", "--pack-vision-tokens", "0"], "--pack-vision-tokens 0 bounds the same sequences"),
        (["--tensor-parallel", "3"], "--tensor-parallel 3 x --pipeline-parallel 1 = 3 does not divide 4 processes"),
        (["--tensor-parallel", "2", "--global-batch-size", "3"], "GBS 3 is not divisible by MBS 1 x 2 processes"),
    ],
)
def test_numbers_of_the_megatron_engine_that_do_not_fit(typed, said):
    known = ["--model-dir", "m", "--data-dir", "d", "--devices", "4"]
    resolved = config.parse_arguments([*known, *typed]).resolved("megatron", "bf16-mixed")
    with pytest.raises(checks.RunError, match=re.escape(said)):
        checks.check_numbers(resolved)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["--freeze", "vision", "language"],
            "--lora-rank 4 trains adapters of the language model, but --freeze language ",
        ),
        (["--tensor-parallel", "8"], "--lora-rank 4 is not divisible by --tensor-parallel 8: change one of them"),
        (
            ["--pipeline-parallel", "2"],
            "cannot resume --lora-rank 4 under --pipeline-parallel 2: use --tensor-parallel",
        ),
    ],
)
def test_adapters_that_cannot_be(typed, said):
    known = ["--model-dir", "m", "--data-dir", "d", "--lora-rank", "4"]
    with pytest.raises(checks.RunError, match=re.escape(said)):
        checks.check_lora(config.parse_arguments([*known, *typed]))
    checks.check_lora(config.parse_arguments([*known, "--tensor-parallel", "2"]))
    checks.check_lora(config.parse_arguments([*known[:4], "--freeze", "language"]))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--lora-rank", "-1"], "--lora-rank must be at least 0, got -1"),
        (["--lora-alpha", "0"], "--lora-alpha must be at least 1, got 0"),
        (["--tensor-parallel", "0"], "--tensor-parallel must be at least 1, got 0"),
        (["--max-pixels", "0"], "--max-pixels must be at least 1, got 0"),
        (["--min-pixels", "-1"], "--min-pixels must be at least 1, got -1"),
        (["--val-batches", "0"], "--val-batches must be at least 1, got 0"),
        (["--save-interval", "-1"], "--save-interval must be at least 0, got -1"),
        (["--max-gradient-norm", "-1"], "--max-gradient-norm must be at least 0, got -1.0"),
        (["--experiment-name", ".."], "--experiment-name must name a folder below --output-dir, got '..'"),
        (["--experiment-name", "/tmp"], "--experiment-name must name a folder below --output-dir, got '/tmp'"),
        (["--experiment-name", ""], "--experiment-name must name a folder below --output-dir, got ''"),
        (["--num-workers", "255"], "holds 254 samples, fewer than there are loader processes (255): lower"),
        (["--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        (["--weight-decay", "inf"], "--weight-decay must be a finite number, at least 0, got inf"),
        (["--lr", "nan"], "--lr must be a finite number, over 0, got nan"),
        (["--lr", "0"], "--lr must be over 0, got 0.0"),
        (["--adam-beta2", "1"], "--adam-beta2 must be below 1, got 1.0"),
        (["--min-lr", "1"], "--min-lr 1.0 is over --lr 1e-05: change one of them"),
        (["--video-min-frames", "800"], "--video-min-frames 800 is over --video-max-frames 768"),
        (["--profile", "2000"], "--profile 2000 is over --max-steps 1000"),
        (["--devices", "2"], "2 processes must be started by torchrun: bash qwen_launch.sh"),
        (["--recompute"], "--recompute belongs to the megatron engine, but --engine automodel was asked for"),
        (["--freeze", "vision", "language", "--freeze", "projector"], "leaves nothing to train"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(typed, said, prepared, tmp_path, monkeypatch, one_line_error):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*known, "--engine", "automodel", "--global-batch-size", "8", *typed]) == 1
    assert said in one_line_error()
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_may_start_with_other_settings(prepared, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text('{"lr": 5.0}')
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    command = [*known, "--experiment-name", "e", "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main(command) == 0
    (tmp_path / "e" / "checkpoints" / "step000005").mkdir(parents=True)
    assert finetune_qwen2vl.main(command) == 1


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_run_file_is_refused_in_one_line(content, prepared, tmp_path, one_line_error):
    (tmp_path / "e" / "checkpoints" / "step000005").mkdir(parents=True)
    (tmp_path / "e" / "run.json").write_text(content)
    known = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    command = [*known, "--experiment-name", "e", "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main(command) == 1
    line = one_line_error()
    assert f"{tmp_path / 'e' / 'run.json'} is " in line and line.endswith(", or another --experiment-name")
    with pytest.raises(CheckpointError):
        finetune_qwen2vl.main([*command, "--debug"])


def test_another_token_format_in_the_place_of_the_model_is_refused(tmp_path):
    known = ["--model-dir", "m", "--data-dir", "d", "--output-dir", str(tmp_path), "--experiment-name", "e"]
    settings = config.parse_arguments(known).resolved("automodel", "32")
    run_file.write_run_file(settings, checks.ModelInfo("x4", None))
    run_file.check_same_model(settings, checks.ModelInfo("x16", None))  # there is nothing to go on from
    write_checkpoint(settings.run_dir / "checkpoints" / "step000005")
    run_file.check_same_model(settings, checks.ModelInfo("x4", None))
    with pytest.raises(checks.RunError, match=r"was started with the token format x4, now the model in m has x16: put"):
        run_file.check_same_model(settings, checks.ModelInfo("x16", None))


def test_each_beginning_of_the_data_has_its_number(tmp_path):
    def number(*typed: str) -> int:
        """What this start counts, and leaves in run.json."""
        known = ["--model-dir", "m", "--data-dir", "d", "--output-dir", str(tmp_path), "--experiment-name", "e"]
        settings = config.parse_arguments([*known, *typed]).resolved("automodel", "32")
        settings = replace(settings, data_restarts=run_file.count_data_restarts(settings))
        run_file.write_run_file(settings, checks.ModelInfo("x4", None))
        return settings.data_restarts

    assert [number("--restart-data"), number("--restart-data"), number()] == [1, 1, 0]  # there is nothing to go on from
    (tmp_path / "e" / "checkpoints" / "step000005").mkdir(parents=True)
    counted = [number(), number("--restart-data"), number(), number("--restart-data"), number()]
    assert counted == [0, 1, 1, 2, 2]
    (tmp_path / "e" / "run.json").write_text('{"lr": 1.0}')  # of before there were numbers
    assert [number(), number("--restart-data")] == [0, 1]
    (tmp_path / "e" / "run.json").write_text('{"data_restarts": "1"}')
    with pytest.raises(CheckpointError, match=r"run.json has data_restarts '1', which is no whole number: put back"):
        number()


def test_parts_frozen_one_by_one_are_all_frozen():
    known = ["--model-dir", "m", "--data-dir", "d"]
    for typed in (["--freeze", "vision", "language"], ["--freeze", "vision", "--freeze", "language"]):
        assert config.parse_arguments([*known, *typed]).freeze == ("language", "vision")


def test_stages_with_nothing_to_train_are_refused():
    known = ["--model-dir", "m", "--data-dir", "d", "--freeze", "language", "--pipeline-parallel", "2"]
    with pytest.raises(checks.RunError, match="nothing to train, got --pipeline-parallel 2: use --tensor"):
        checks.check_parts(config.parse_arguments(known))


def test_a_file_where_the_run_folder_should_be_is_refused(prepared, tmp_path, one_line_error):
    file, folders = tmp_path / "file", ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards)]
    file.touch()
    for place in ((str(file / "runs"), "run"), (str(tmp_path), "file")):
        named = ["--output-dir", place[0], "--experiment-name", place[1], "--engine", "automodel", "--check"]
        assert finetune_qwen2vl.main([*folders, *named]) == 1
        assert f"{file} is a file, the run folder {file}" in one_line_error()


def test_a_run_folder_that_may_not_be_written_to_is_refused(prepared, one_line_error):
    folders = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", "/proc/self"]
    assert finetune_qwen2vl.main([*folders, "--experiment-name", "run", "--engine", "automodel", "--check"]) == 1
    assert "/proc/self may not be written to, so the run folder /proc/self/run cannot be used" in one_line_error()


def test_what_is_given_in_place_of_a_model_is_named(prepared, tmp_path, one_line_error):
    """A model of Hugging Face by its name, a run's folder."""
    known = ["--data-dir", str(prepared.shards), "--engine", "automodel", "--check", "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main(["--model-dir", "Qwen/Qwen2-VL-2B-Instruct", *known]) == 1
    fetched = "git clone https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct) and give --model-dir its folder"
    assert fetched in one_line_error()
    for form in ("hf", "hf_dct"):
        shutil.copytree(prepared.model, tmp_path / "run" / form)
    assert finetune_qwen2vl.main(["--model-dir", str(tmp_path / "run"), *known]) == 1
    assert one_line_error().rstrip().endswith(f"give --model-dir {tmp_path / 'run' / 'hf_dct'}")


def test_missing_model_is_refused(refused):
    assert "no model in /nowhere" in refused(MODEL_DIR="/nowhere")


def test_relative_folders_are_those_of_the_caller(tmp_path):
    """Only the default of OUTPUT_DIR is a folder of the repository."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    folders = {"MODEL_DIR": "models/x4", "DATASET_DIR": "/data/set", "PYTHON": str(tmp_path / "python")}

    def launched(folder: Path, **settings: str) -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"], **folders, **settings}
        command = ["bash", os.path.relpath(REPOSITORY / "qwen_launch.sh", folder)]
        words = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return dict(re.findall(r"--(model-dir|data-dir|output-dir) (\S+)", words.stdout.splitlines()[-1]))

    data = {"data-dir": "/data/set"}
    assert launched(tmp_path) == {"model-dir": f"{tmp_path}/models/x4", **data, "output-dir": "experiments"}
    assert launched(tmp_path, OUTPUT_DIR="runs")["output-dir"] == f"{tmp_path}/runs"
    assert launched(REPOSITORY, OUTPUT_DIR="r") == {"model-dir": "models/x4", **data, "output-dir": "r"}


def test_unprepared_data_is_refused(prepared, tmp_path, refused):
    assert "no shards in" in refused(DATASET_DIR=str(tmp_path))
    shutil.copy(next(prepared.shards.glob("*.tar")), tmp_path)
    assert "is not prepared" in refused(DATASET_DIR=str(tmp_path))


def test_contradicting_dct_flag_is_refused_naming_both(refused):
    line = refused("--dct", "x16")
    assert "--dct x16 contradicts the checkpoint" in line
    assert "converted with x4" in line


def test_pixel_checkpoint_is_refused_unless_asked_for(prepared, refused):
    line = refused(MODEL_DIR=str(prepared.pixel_model))
    assert "reads pixels, not DCT tokens" in line
    info = checks.check_model(prepared.pixel_model, "none")
    assert (info.dct_name, info.dct) == ("none", None)


def test_unequal_devices_are_refused(prepared, tmp_path):
    assert "DEVICES=3, but NUM_PROC_PER_NODE=2" in refused_by_launcher(prepared, tmp_path, DEVICES="3")


def test_pixel_bounds_the_wrong_way_round_are_refused(refused):
    said = "got min_pixels 200000 and max_pixels 100000: change --min-pixels or --max-pixels"
    assert said in refused(MINPIXELS="200000", MAXPIXELS="100000")


def test_the_checkpoint_s_least_gives_way_to_lower_most_pixels(prepared, tmp_path, capsys, monkeypatch):
    """As in conversion; what is saved says both numbers."""
    ready = []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(finetune_qwen2vl, "train", lambda settings, info: ready.append((settings, info)))
    folders = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    (tmp_path / "qwen2vl_dct").mkdir()
    assert finetune_qwen2vl.main([*folders, "--engine", "automodel", "--max-pixels", "2000"]) == 0
    said = "Note: --max-pixels 2000 is below the checkpoint's min_pixels 3136, which becomes 2000"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    ((settings, info),) = ready
    assert settings.pixel_bounds == {"min_pixels": 2000, "max_pixels": 2000}
    _, processor = finetune_qwen2vl.load_processor(settings, info)
    assert (processor.min_pixels, processor.max_pixels) == (2000, 2000)


@pytest.mark.parametrize("form", ["pixels", "x4"])
def test_every_loader_of_processors_lets_the_least_give_way(prepared, form):
    from dct_qwen2vl.checkpoints.hf_folder import load_processor

    model_dir = prepared.pixel_model if form == "pixels" else prepared.model
    processor = load_processor(model_dir, max_pixels=2000).image_processor
    assert (processor.min_pixels, processor.max_pixels) == (2000, 2000)


def test_skipping_needs_tokens_that_can_be_skipped(prepared, tmp_path, refused):
    pixels = {"MODEL_DIR": str(prepared.pixel_model), "SKIP_DB": "38"}
    assert "--skip-db 38 needs DCT tokens" in refused("--dct", "none", **pixels)
    assert "--skip-db must be at least 0, got -1.0" in refused(SKIP_DB="-1")
    assert "--skip-share must be over 0, got 0.0" in refused(SKIP_DB="38", SKIP_SHARE="0")
    assert "--skip-share must be at most 1, got 1.5" in refused(SKIP_DB="38", SKIP_SHARE="1.5")
    model = shutil.copytree(prepared.model, tmp_path / "other")
    info, values = checks.check_model(model, None), {"model_dir": model, "data_dir": prepared.shards}
    checks.check_skipping(config.TrainingConfig(**values, skip_db=38.0, skip_noise_floor=True), info)
    with pytest.raises(config.RunError, match="--skip-noise-floor goes with --skip-db"):
        checks.check_skipping(config.TrainingConfig(**values, skip_noise_floor=True), info)
    with pytest.raises(config.RunError, match="--skip-noise-floor goes with --skip-db"):
        checks.check_skipping(config.TrainingConfig(**values, skip_db=0.0, skip_noise_floor=True), info)
    for without in ({}, {"skip_db": 0.0}):
        with pytest.raises(config.RunError, match=r"--skip-share 0\.5 goes with --skip-db, and this run skips no"):
            checks.check_skipping(config.TrainingConfig(**values, **without, skip_share=0.5), info)
        checks.check_skipping(config.TrainingConfig(**values, **without), info)
    checks.check_skipping(config.TrainingConfig(**values, skip_db=38.0, skip_share=0.5), info)
    edit_json(model / "preprocessor_config.json", skip_db=36.0)
    checks.check_skipping(config.TrainingConfig(**values, skip_share=0.5), info)
    checks.check_skipping(config.TrainingConfig(**values, skip_noise_floor=True), info)
    edit_json(model / "config.json", model_type="qwen2_5_vl")
    checks.check_skipping(config.TrainingConfig(**values, skip_db=38.0, sharding="fsdp2"), info)


@pytest.mark.parametrize(("skip_db", "saved"), [(None, 36.0), (38.0, 38.0), (0.0, None)])
def test_the_processor_that_is_saved_says_what_was_skipped(prepared, tmp_path, skip_db, saved):
    """Trained further without the setting, a checkpoint keeps its own; 0 turns it off."""
    from dct_qwen2vl.checkpoints.hf_folder import write_processor_settings

    model = shutil.copytree(prepared.model, tmp_path / "model")
    edit_json(model / "preprocessor_config.json", skip_db=36.0)
    settings = config.TrainingConfig(model_dir=model, data_dir=prepared.shards, skip_db=skip_db)
    _, processor = finetune_qwen2vl.load_processor(settings, checks.check_model(model, None))
    write_processor_settings(model, settings.processor_settings)
    assert not processor.skip_noise_floor
    assert processor.skip_db == saved == json.loads((model / "preprocessor_config.json").read_text()).get("skip_db")


@pytest.mark.parametrize(
    ("skip_db", "typed", "floor"), [(None, False, True), (38.0, False, False), (38.0, True, True), (None, True, True)]
)
def test_a_threshold_that_is_given_brings_its_own_noise_floor(prepared, tmp_path, skip_db, typed, floor):
    """The checkpoint has both. What is saved says it where it is on, and nothing where it is off."""
    from dct_qwen2vl.checkpoints.hf_folder import write_processor_settings

    model = shutil.copytree(prepared.model, tmp_path / "model")
    edit_json(model / "preprocessor_config.json", skip_db=36.0, skip_noise_floor=True)
    folders = {"model_dir": model, "data_dir": prepared.shards}
    settings = config.TrainingConfig(**folders, skip_db=skip_db, skip_noise_floor=typed)
    _, processor = finetune_qwen2vl.load_processor(settings, checks.check_model(model, None))
    write_processor_settings(model, settings.processor_settings)
    saved = json.loads((model / "preprocessor_config.json").read_text())
    assert bool(processor.skip_noise_floor) == floor == saved.get("skip_noise_floor", False)
    processor.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert again.get("skip_noise_floor", False) == floor and (floor or "skip_noise_floor" not in again)


@pytest.mark.parametrize(
    ("typed", "before", "saved"),
    [
        ({"skip_db": 38.0}, None, 0.8),
        ({"skip_db": 38.0, "skip_share": 1.0}, None, 1.0),
        ({}, 0.5, 0.8),
        ({"skip_share": 0.5}, None, 0.5),
        ({"skip_db": 0.0}, 0.5, None),
    ],
)
def test_the_share_that_is_saved_is_that_of_the_last_run(prepared, tmp_path, typed, before, saved):
    """A checkpoint that skips at 36 dB; its own share is no default of further training."""
    from dct_qwen2vl.checkpoints.hf_folder import write_processor_settings

    model = shutil.copytree(prepared.model, tmp_path / "model")
    edit_json(model / PROCESSOR, skip_db=36.0, **({"skip_share": before} if before else {}))
    settings = config.TrainingConfig(model_dir=model, data_dir=prepared.shards, output_dir=tmp_path, **typed)
    settings = replace(settings, skip_share=checks.choose_skip_share(settings))
    _, processor = finetune_qwen2vl.load_processor(settings, checks.check_model(model, None))
    write_processor_settings(model, settings.processor_settings)
    assert json.loads((model / PROCESSOR).read_text()).get("skip_share") == saved
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / PROCESSOR).read_text()).get("skip_share") == saved


@pytest.mark.parametrize("form", ["pixels", "x4"])
def test_a_run_without_skipping_leaves_the_processor_as_it_is(prepared, tmp_path, form):
    from dct_qwen2vl.checkpoints.hf_folder import write_processor_settings

    model = Path(shutil.copytree(prepared.model if form == "x4" else prepared.pixel_model, tmp_path / "model"))
    before = (model / PROCESSOR).read_bytes()
    settings = config.TrainingConfig(model_dir=model, data_dir=prepared.shards, output_dir=tmp_path)
    settings = replace(settings, skip_share=checks.choose_skip_share(settings))
    assert settings.skip_share == 1
    finetune_qwen2vl.load_processor(settings, checks.check_model(model, "none" if form == "pixels" else None))
    write_processor_settings(model, settings.processor_settings)
    assert (model / PROCESSOR).read_bytes() == before


def test_a_run_that_began_with_another_share_goes_on_with_it(prepared, tmp_path, monkeypatch, one_line_error):
    """The default was 1 once. The same command goes on; another share is refused and says what to type."""
    seen = []

    def train(settings, info) -> None:
        run_file.write_run_file(settings, info)
        write_checkpoint(settings.run_dir / "checkpoints" / f"step{len(seen):06d}")
        seen.append(settings.skip_share)

    monkeypatch.setattr(finetune_qwen2vl, "train", train)
    folders = ["--model-dir", str(prepared.model), "--data-dir", str(prepared.shards), "--output-dir", str(tmp_path)]
    command = [*folders, "--engine", "automodel", "--skip-db", "38"]
    finished = tmp_path / "qwen2vl_dct" / "finished"
    for typed in (["--skip-share", "1"], [], ["--restart-data"], ["--skip-share", "0.8", "--restart-data"], []):
        assert finetune_qwen2vl.main([*command, *typed]) == 0
        finished.unlink()
    assert seen == [1.0, 1.0, 1.0, 0.8, 0.8]
    assert finetune_qwen2vl.main([*command, "--skip-share", "1"]) == 1
    line = one_line_error()
    assert "was started with --skip-share 0.8, now it is 1.0: use the same value to resume, --restart-data to" in line
    assert finetune_qwen2vl.main([*command, "--experiment-name", "new"]) == 0 and seen[-1] == 0.8


def launch_with_skipping(
    command: list[str], prepared: Prepared, folder: Path, name: str, share: str, **settings: str
) -> dict:
    """Two steps of eight samples: the share of cells that has tokens, and what was printed. 15 dB, since the images of
    the sample data are small and full of texture."""
    environment = launch_environment(prepared, folder, name, 1) | {"ENGINE": "automodel", "SEQ_LENGTH": "2048"}
    environment |= {"MAX_STEPS": "2", "VAL_INTERVAL": "2", "SAVE_INTERVAL": "0", "SKIP_DB": "15", "SKIP_SHARE": share}
    done = run([*command, "--log-interval", "1"], check=False, **(environment | settings))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in metrics(folder / name) if "loss" in line]
    assert [line["samples"] for line in lines] == [8, 8]
    assert all(0 < line["kept_share"] < 1 for line in lines) and "| cells kept " in done.stdout
    assert f", cells left out at 15 dB in {float(share):.0%} of the samples\n" in done.stdout
    assert done.stdout.count("Note: --skip-db 15 is a PSNR in dB") == 1
    assert "Done: the fine-tuned model is in" in done.stdout
    assert done.stdout.count("but its stock form reads all cells") == (share == "1")
    written = json.loads((folder / name / "run.json").read_text())
    skipping = {"skip_db": 15, "skip_share": float(share)}
    assert skipping.items() <= written.items() and recorded_skipping(folder / name / "hf") == skipping
    return {"kept_share": sum(line["kept_share"] for line in lines) / len(lines), "said": done.stdout}


FAKE_SRUN = """#!/usr/bin/env bash
# Two nodes on one machine: the command of srun twice, each with a number of its own.
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 "$@" > "$OUTPUT_DIR/node1.log" 2>&1 &
SLURM_NODEID=0 "$@"
code=$?
wait $! && exit $code
"""


@pytest.fixture(scope="module")
def two_nodes(prepared, tmp_path_factory) -> dict:
    """A run of two nodes through Slurm, which leaves out cells in half of the samples."""
    output = tmp_path_factory.mktemp("nodes")
    folder = output / "bin"
    folder.mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": "#!/usr/bin/env bash\nprintf '127.0.0.1\\nother\\n'\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(os.getpid())}
    command, path = ["bash", "slurm/train_slurm.sh"], f"{folder}:{os.environ['PATH']}"
    launched = launch_with_skipping(command, prepared, output, "nodes", "0.5", PATH=path, **job)
    return {"run_dir": output / "nodes", **launched}


@pytest.mark.launch
def test_two_nodes_through_slurm(two_nodes):
    assert "2 process(es)" in two_nodes["said"]
    assert not (two_nodes["run_dir"] / "checkpoints").exists() and (two_nodes["run_dir"] / "hf").is_dir()


@pytest.mark.launch
def test_a_run_with_skipping_is_evaluated_with_skipping(prepared, two_nodes, tmp_path):
    """Fewer visual tokens, the same number of samples, and more so in all than in half; the model that is written says
    so, and is asked alike."""
    from dct_qwen2vl.evaluation.answering import Answerer

    skips = launch_with_skipping(["bash", "qwen_launch.sh"], prepared, tmp_path, "skips", "1")
    assert skips["kept_share"] < two_nodes["kept_share"]
    assert Answerer(tmp_path / "skips" / "hf_dct", 4).media.skip_db == 15
    assert "skip_db" not in (tmp_path / "skips/hf/preprocessor_config.json").read_text(), "the stock form takes all"


def test_slurm_s_task_has_the_cores_of_its_processes_and_loaders(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$SRUN_CPUS_PER_TASK"\n')
    (tmp_path / "srun").chmod(0o755)
    (asked,) = re.findall(
        r"^#SBATCH --cpus-per-task=(\d+)$", (REPOSITORY / "slurm/train_slurm.sh").read_text(), re.MULTILINE
    )
    defaults = dict(re.findall(r"^(\w+)=\$\{\1:-(\d+)\}", (REPOSITORY / "qwen_launch.sh").read_text(), re.MULTILINE))
    assert int(asked) == int(defaults["NUM_PROC_PER_NODE"]) * (1 + int(defaults["NUM_WORKERS"]))
    job = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "SLURM_CPUS_PER_TASK": asked}
    assert run(["bash", "slurm/train_slurm.sh"], PATH=f"{tmp_path}:{os.environ['PATH']}", **job).stdout == f"{asked}\n"


def test_a_slurm_job_from_another_folder_is_told_in_one_line(tmp_path):
    job = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    ended = run(["bash", "slurm/train_slurm.sh"], check=False, **job)
    said = f"train_slurm.sh: no qwen_launch.sh in {tmp_path}: submit the job from the repository's folder, or set"
    assert ended.returncode == 1 and ended.stderr.startswith(said)


def test_profile_is_a_trace_of_one_step(one_process):
    trace = json.loads(gzip.decompress((one_process["output"] / "whole" / "profile" / "rank0.json.gz").read_bytes()))
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("backward" in name.lower() for name in names) and "aten::addmm" in names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_megatron_without_cuda_is_refused(refused):
    assert "--engine megatron needs a CUDA device" in refused(ENGINE="megatron")


def test_unknown_argument_is_a_usage_error(prepared, tmp_path):
    environment = launch_environment(prepared, tmp_path, "usage", 1)
    result = run(["bash", "qwen_launch.sh", "--no-such-flag"], check=False, **environment)
    assert result.returncode == 2


def test_too_many_bad_samples_are_explained_with_and_without_loader_processes():
    from dct_qwen2vl.data.samples import TooManyBadSamples

    wrapped = ValueError("Sample failed")  # as Energon leaves it without loader processes
    wrapped.__context__ = TooManyBadSamples("20 samples in a row")
    from_process = RuntimeError("Caught it in process 0.\ntask_encoder.TooManyBadSamples: 20 samples in a row\nmore")
    assert finetune_qwen2vl.explain(wrapped) == "20 samples in a row"
    assert finetune_qwen2vl.explain(from_process) == "20 samples in a row"
    assert finetune_qwen2vl.explain(KeyError("a bug")) is None


def test_a_shard_that_is_no_tar_any_more_is_explained(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    with pytest.raises(tarfile.ReadError) as caught, tarfile.open(tmp_path / "a.tar"):
        pass
    told = finetune_qwen2vl.explain(caught.value)
    assert re.fullmatch(r"a shard is damaged \(.+\): python data_preparation\.py --output-dir SHARDS --verify .*", told)


class Ending(torch.utils.data.Dataset):
    """Ends the loader process that reads it.

    number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "ended by SIGTERM; run the same command again"),
        (signal.SIGKILL, "a loader process has ended (Killed) (is the machine's memory full?); run the same command"),
        (signal.SIGBUS, "the shared memory /dev/shm is full: raise it (docker run --shm-size 16g), then run the same"),
        (signal.SIGSEGV, "a loader process has ended (Segmentation fault); run the same command again"),
    ],
)
def test_the_end_of_a_loader_process_is_explained(number, said):
    with pytest.raises(RuntimeError) as caught:
        next(iter(torch.utils.data.DataLoader(Ending(number), num_workers=1)))
    assert finetune_qwen2vl.explain(caught.value).startswith(said)
    caught.value.add_note("ConnectionResetError: [Errno 104] Connection reset by peer")  # what was asked of it
    assert finetune_qwen2vl.explain(caught.value).startswith(said)


def write_to_full_disk(data: bytearray, folder: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(data)


def save_to_full_disk(data: bytearray, folder: Path) -> None:
    """PyTorch's own writer does not say why it failed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        torch.save(torch.frombuffer(data, dtype=torch.uint8), folder / "trainer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [write_to_full_disk, save_to_full_disk])
def test_a_full_disk_is_explained(write, tmp_path):
    with pytest.raises((OSError, RuntimeError)) as caught:
        write(bytearray(1_000_000), tmp_path)
    said = "a disk is full, most likely that of the run's folder: make room, then run the same command again"
    assert finetune_qwen2vl.explain(caught.value).startswith(said)
    assert finetune_qwen2vl.explain(FileNotFoundError(2, "No such file or directory")) is None
    shared = RuntimeError("unable to write to file </torch_4711_0_0>: No space left on device (28)")  # PyTorch 2.7
    assert finetune_qwen2vl.explain(shared).startswith("the shared memory /dev/shm is full")
