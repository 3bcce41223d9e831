"""The Megatron engine through qwen_launch.sh: real torchrun, layouts of two processes, checkpoints, exports, kill -9.

On GPUs with TransformerEngine everything; on CPUs, by tests/megatron_on_cpu.py, short launches of the same engine.
Layouts of four processes are tried on four GPUs, and on CPUs with FOUR_PROCESSES=1 (six launches, ten minutes).
Two processes are one node where there are two GPUs, and two nodes of this machine where they share one.
Nearly all of a launch is NeMo's import.
"""

import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import REPOSITORY, is_running, metrics
from safetensors.torch import load_file
from stand_in_python import write_interpreter

import finetune_qwen2vl

GPUS = torch.cuda.device_count() if importlib.util.find_spec("transformer_engine") else 0
pytestmark = pytest.mark.launch
gpu_only = pytest.mark.skipif(GPUS == 0, reason="needs CUDA and TransformerEngine")
cpu_only = pytest.mark.skipif(GPUS > 0, reason="GPUs run a longer form of it")

# Differences of bf16 between layouts: of losses; gradient norms may differ five times as much.
STEPS, SAVE_INTERVAL, PACK_TOKENS, LR, TOLERANCE = (20, 5, 512, "3e-4", 0.02) if GPUS else (8, 4, 256, "1e-3", 0.004)
PACKING_BUFFER = "8"  # samples; fewer than a loader process has of the val split
VAL = 30  # samples of the val split
ONE_NODE, TWO_NODES = {"NUM_PROC_PER_NODE": 2}, {"NNODES": 2}
TWO = TWO_NODES if GPUS == 1 else ONE_NODE
LAYOUTS = {
    "TP": {**TWO, "TP": 2},
    "PP": {**TWO, "PP": 2},
    # One loader process each, where a single process has two: the same sequences a step.
    "DP": {**(TWO if GPUS else TWO_NODES), "NUM_WORKERS": 1},
}
# As many loader processes together, so that all see the same sequences in a step.
FOUR = {
    "DP x 4": {"NUM_PROC_PER_NODE": 4, "NUM_WORKERS": 1},
    "TP x DP": {"NUM_PROC_PER_NODE": 4, "TP": 2, "NUM_WORKERS": 2},
    "PP x DP": {"NUM_PROC_PER_NODE": 4, "PP": 2, "NUM_WORKERS": 2},
}
four_only = pytest.mark.skipif(
    GPUS < 4 if GPUS else not os.environ.get("FOUR_PROCESSES"), reason="needs four GPUs, or FOUR_PROCESSES=1 on CPUs"
)
# The size of packed sequences is left open; the device is full at the first sizes that are tried.
OPEN_SIZE = {"PACK_TOKENS": "", "PACK_VISION_TOKENS": 2 * PACK_TOKENS, "ROOM_FOR": 300}
LIMIT = ("--memory-limit", "1.05614")  # GiB
FULL = "The device's memory is full at a packed sequence of {} tokens, 512 vision tokens"
FITS = "A full packed sequence fits: 256 tokens, 512 vision tokens"
NOT_COMPARED = ("--compare-samples", "0")  # the two forms of the model, which `whole` compares
FAULT_STEP = 6


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


@pytest.fixture(scope="module")
def environment(prepared, model_dir, tmp_path_factory):
    """environment(run folder, **settings): the variables of qwen_launch.sh for a short run."""
    python = sys.executable if GPUS else write_interpreter(tmp_path_factory.mktemp("python"), "megatron_on_cpu")
    devices = {} if GPUS else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}

    def variables(run_dir: Path, **settings) -> dict[str, str]:
        values = {
            "EXPERIMENT_NAME": run_dir.name, "OUTPUT_DIR": run_dir.parent, "MODEL_DIR": model_dir,
            "DATASET_DIR": prepared.shards, "MAXPIXELS": 112 * 112, "NUM_PROC_PER_NODE": 1, "PACK_TOKENS": PACK_TOKENS,
            "GBS": 4, "SEQ_LENGTH": 256, "MAX_STEPS": STEPS, "LR": LR, "WARMUP_STEPS": 2, "VAL_INTERVAL": STEPS // 2,
            "SAVE_INTERVAL": SAVE_INTERVAL, "NUM_WORKERS": 2, "ENGINE": "megatron", "PYTHON": python,
            "PYTHON_EXEC": python, "PYTHONWARNINGS": "ignore", **devices, **settings,
        }  # fmt: skip
        return {**os.environ, **{key: str(value) for key, value in values.items()}}

    return variables


def start(variables: dict[str, str], *arguments: str) -> subprocess.Popen:
    """Starts one node."""
    log = Path(variables["OUTPUT_DIR"]) / f"{variables['EXPERIMENT_NAME']}.log"
    with log.open("a") as file:
        options = ["--log-interval", "1", "--packing-buffer", PACKING_BUFFER]
        command = ["bash", "qwen_launch.sh", *options, *arguments]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def nodes_of(variables: dict[str, str]) -> list[dict[str, str]]:
    """The variables of each node. NCCL takes nodes of different NCCL_HOSTID for different hosts; of one host it refuses
    two processes on one GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_PORT": str(free.getsockname()[1]), "NCCL_SOCKET_IFNAME": "lo"}
    return [
        {**variables, **shared, "NODE_RANK": str(rank), "NCCL_HOSTID": f"node{rank}"}
        for rank in range(int(variables.get("NNODES", 1)))
    ]


def launch(variables: dict[str, str], *arguments: str, code: int = 0) -> str:
    """Runs all nodes to the end; returns the log."""
    nodes = [start(node, *arguments) for node in nodes_of(variables)]
    try:
        found = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    log = (Path(variables["OUTPUT_DIR"]) / f"{variables['EXPERIMENT_NAME']}.log").read_text()
    assert any(found) == (code != 0), log[-4000:]
    return log


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory) -> Path:
    """The folder of a run of one process that nothing has stopped; waits of its third step are recorded. On a CPU it
    chooses the size of its packed sequences, which the others are given."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    size, limit = ({}, ()) if GPUS else (OPEN_SIZE, LIMIT)
    launch(environment(run_dir, WAITS=run_dir.with_name("waits.json"), **size), "--profile", "2", *limit)
    return run_dir


@pytest.fixture(scope="module")
def trained(environment, whole):
    """trained("DP"): the folder of a run of two or four processes from the start."""

    @functools.cache
    def run(layout: str) -> Path:
        run_dir = whole.with_name(layout)
        launch(environment(run_dir, **(LAYOUTS | FOUR)[layout]), *NOT_COMPARED)
        return run_dir

    return run


def copy_run(source: Path, target: Path, step: int) -> None:
    """The folder of a run that was killed after the checkpoint of `step`, in the middle of writing the next."""
    name = f"checkpoints/step{step:06d}"
    shutil.copytree(source / name, target / name)
    for file in ("run.json", "metrics.jsonl"):
        shutil.copyfile(source / file, target / file)
    (target / "checkpoints" / f".step{step + 1:06d}.tmp").mkdir()


def go_on(environment, source: Path, step: int, layout: str, *arguments: str, **settings: str) -> Path:
    """The folder of a run that goes on under `layout` from a copy of the checkpoint of `step`."""
    run_dir = source.with_name(f"{layout}-from-{source.name}")
    copy_run(source, run_dir, step)
    log = launch(
        environment(run_dir, **(LAYOUTS | FOUR)[layout], SAVE_INTERVAL=2, **settings), *NOT_COMPARED, *arguments
    )
    assert f"Resuming from {run_dir}/checkpoints/step{step:06d}\n" in log
    return run_dir


@pytest.fixture(scope="module")
def tensor_parallel(environment, whole) -> Path:
    """From the middle of `whole`. The size of packed sequences and of a step is left to what that had."""
    return go_on(environment, whole, STEPS // 2, "TP", "--memory-limit", "1.2", PACK_TOKENS="", GBS="")


@pytest.fixture(scope="module")
def pipeline_parallel(environment, tensor_parallel) -> Path:
    """The last two steps, from what two tensor-parallel processes have saved."""
    return go_on(environment, tensor_parallel, STEPS - 2, "PP")


def steps_of(run_dir: Path) -> list[dict]:
    return [line for line in metrics(run_dir) if "loss" in line]


def validation_of(run_dir: Path) -> dict[int, float]:
    """Validation losses by step."""
    return {line["step"]: line["val_loss"] for line in metrics(run_dir) if "val_loss" in line}


def samples_of(lines: list[dict]) -> list[tuple[int, ...]]:
    """What tells a step's samples apart from those of another."""
    return [(line["step"], line["samples"], line["visual_tokens"], line["text_tokens"]) for line in lines]


def assert_same_training(found: Path, wanted: Path, after: int = 0) -> None:
    """Two runs saw the same samples and learned the same from them, in the steps after `after`."""
    lines, expected = ([line for line in steps_of(folder) if line["step"] > after] for folder in (found, wanted))
    assert samples_of(lines) == samples_of(expected)
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE), ours["step"]
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=5 * TOLERANCE), ours["step"]
    assert validation_of(found) == pytest.approx(validation_of(wanted), rel=TOLERANCE)


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in (run_dir / "hf_dct").glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def assert_close_weights(found: Path, wanted: Path, model_dir: Path) -> set[str]:
    """Tensors differ by less than half of what training has changed in them. Where a gradient is all rounding (the
    bias of keys changes no attention), Adam makes steps of it all the same. Returns the names of those that changed."""
    before, ours, theirs = load_file(model_dir / "model.safetensors"), exported(found), exported(wanted)
    assert ours.keys() == theirs.keys()
    changed = {name for name in theirs if not torch.equal(theirs[name], before[name])}
    for name, tensor in theirs.items():
        change, difference = tensor.float() - before[name].float(), ours[name].float() - tensor.float()
        assert difference.norm() <= 0.5 * change.norm(), name
    return changed


def test_it_learns_and_writes_a_model_that_transformers_loads(whole, model_dir):
    from transformers import Qwen2VLForConditionalGeneration

    lines = steps_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["padding_share"] == 0 and line["gradient_norm"] > 0 for line in lines)
    assert all(0 < line["sequence_fill"] <= 1 for line in lines) and lines[0]["sequence_fill"] > 0.5
    assert {"data_wait_share", *(("mfu", "peak_memory_gib") if GPUS else ())} <= lines[-1].keys()
    assert list(validation_of(whole)) == [STEPS // 2, STEPS]
    assert {(line["val_samples"], line["val_left_out"]) for line in metrics(whole) if "val_loss" in line} == {(VAL, 0)}
    before, after = load_file(model_dir / "model.safetensors"), exported(whole)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight"} <= changed
    _, loading = Qwen2VLForConditionalGeneration.from_pretrained(whole / "hf", output_loading_info=True)
    assert not any(loading.values())


@cpu_only
def test_a_step_waits_for_the_device_once(whole):
    """It has four packed sequences, and a gradient that is clipped."""
    assert metrics(whole)[2]["gradient_norm"] > 1
    found = json.loads(whole.with_name("waits.json").read_text())
    assert found == {"dct_qwen2vl/training/megatron_step.py:read_norm tolist": 1}


@gpu_only
def test_a_step_waits_for_the_gpu_less_often_than_it_has_packed_sequences(whole):
    """It has four."""
    found = (whole / "profile" / "rank0.waits.txt").read_text()
    print(found)
    assert 1 <= int(found.split()[0]) <= 4, found


@cpu_only
def test_two_tensor_parallel_processes_go_on_from_a_checkpoint_of_one(tensor_parallel, whole, model_dir):
    assert_same_training(tensor_parallel, whole, after=STEPS // 2)
    assert_close_weights(tensor_parallel, whole, model_dir)


@cpu_only
def test_two_pipeline_stages_go_on_from_a_checkpoint_of_tensor_parallel_processes(pipeline_parallel, whole, model_dir):
    assert_same_training(pipeline_parallel, whole, after=STEPS - 2)
    assert_close_weights(pipeline_parallel, whole, model_dir)


@pytest.mark.parametrize("layout", LAYOUTS if GPUS else ["DP"])
def test_two_processes_learn_what_one_learns(layout, trained, whole, model_dir):
    assert_same_training(trained(layout), whole)
    if not GPUS:  # at the lower learning rate of the long runs, bf16 rounds away what norms learn
        assert_close_weights(trained(layout), whole, model_dir)


def assert_export_is_the_end(run_dir: Path, model_dir: Path, folder: Path) -> None:
    """One process without shards, Megatron's parallel state or a GPU writes what the processes of the run have written
    at their end. Weights of pipeline stages, which were in a file each, are in one."""
    name = f"step{STEPS:06d}"
    copy_run(run_dir, folder / "run", STEPS)
    known = ["--model-dir", str(model_dir), "--data-dir", "/nowhere", "--output-dir", str(folder)]
    assert finetune_qwen2vl.main([*known, "--experiment-name", "run", "--export"]) == 0
    written = folder / "run" / "exported" / name
    found, expected = exported(written), exported(run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for form in ("hf", "hf_dct"):
        for file in (run_dir / form).iterdir():
            if form == "hf" or "safetensors" not in file.name:
                assert (written / form / file.name).read_bytes() == file.read_bytes(), file


def test_an_export_is_what_one_process_has_written(whole, model_dir, tmp_path):
    assert_export_is_the_end(whole, model_dir, tmp_path)


@cpu_only
def test_an_export_is_what_two_tensor_parallel_processes_have_written(tensor_parallel, model_dir, tmp_path):
    assert_export_is_the_end(tensor_parallel, model_dir, tmp_path)


@cpu_only
def test_an_export_is_what_two_pipeline_stages_have_written(pipeline_parallel, model_dir, tmp_path):
    assert_export_is_the_end(pipeline_parallel, model_dir, tmp_path)
    kept = {path.name for path in (pipeline_parallel / "checkpoints").iterdir()}
    assert kept == {f".step{STEPS - 1:06d}.tmp", f"step{STEPS - 2:06d}", f"step{STEPS:06d}"}  # the first by `copy_run`


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:1000], "(weights/__0_0.distcp is missing or cut short): export another step"),
        (lambda data: bytes(len(data)), "(its weights cannot be read): export another step"),
    ],
)
def test_a_damaged_checkpoint_is_not_exported(damage, said, whole, model_dir, tmp_path, one_line_error):
    copy_run(whole, tmp_path / "run", STEPS)
    file = tmp_path / "run" / "checkpoints" / f"step{STEPS:06d}" / "weights" / "__0_0.distcp"
    file.write_bytes(damage(file.read_bytes()))
    known = ["--model-dir", str(model_dir), "--data-dir", "/nowhere", "--output-dir", str(tmp_path)]
    assert finetune_qwen2vl.main([*known, "--experiment-name", "run", "--export"]) == 1
    assert one_line_error().endswith(said) and not list(tmp_path.glob("run/exported/step*"))


@gpu_only
@pytest.mark.parametrize("writer, reader", [("TP", "PP"), ("PP", "DP"), ("DP", "TP")])
def test_a_checkpoint_exports_the_same_under_another_layout(writer, reader, trained, environment, tmp_path):
    assert_exported_the_same(trained(writer), environment(tmp_path / reader, **LAYOUTS[reader]))


@four_only
@pytest.mark.parametrize("layout", ["TP x DP", "PP x DP"])
def test_four_processes_learn_the_same_under_each_layout(layout, trained, model_dir):
    assert_same_training(trained(layout), trained("DP x 4"))
    if not GPUS:
        assert_close_weights(trained(layout), trained("DP x 4"), model_dir)


@four_only
def test_four_processes_go_on_from_a_checkpoint_of_another_layout(environment, trained):
    found = go_on(environment, trained("TP x DP"), STEPS - SAVE_INTERVAL, "PP x DP")
    assert_same_training(found, trained("TP x DP"), after=STEPS - SAVE_INTERVAL)


@gpu_only
@four_only
@pytest.mark.parametrize("writer, reader", [("TP x DP", "PP x DP"), ("PP x DP", "DP x 4"), ("DP x 4", "TP x DP")])
def test_a_checkpoint_of_four_exports_the_same_under_another_layout(writer, reader, trained, environment, tmp_path):
    assert_exported_the_same(trained(writer), environment(tmp_path / reader, **FOUR[reader]))


def assert_exported_the_same(run_dir: Path, variables: dict[str, str]) -> None:
    """The run is at its end: under other variables it trains no more, it only exports."""
    folder = Path(variables["OUTPUT_DIR"]) / variables["EXPERIMENT_NAME"]
    copy_run(run_dir, folder, STEPS)
    launch(variables, "--restart-data", *NOT_COMPARED)
    found, expected = exported(folder), exported(run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_go_on_in_two_tensor_parallel_processes_and_are_merged(environment, model_dir, tmp_path):
    flags = ("--lora-rank", "4", "--freeze", "projector")
    launch(environment(tmp_path / "adapters"), *NOT_COMPARED, *flags)
    both = go_on(environment, tmp_path / "adapters", STEPS - SAVE_INTERVAL, "TP", *flags)
    assert_same_training(both, tmp_path / "adapters", after=STEPS - SAVE_INTERVAL)
    changed = assert_close_weights(both, tmp_path / "adapters", model_dir)
    for number, run_dir in enumerate((tmp_path / "adapters", both)):
        assert_export_is_the_end(run_dir, model_dir, tmp_path / f"export{number}")
    language = {name for name in changed if name.startswith("model.")}
    assert len(language) == 7 * 4 and all(name.endswith("_proj.weight") for name in language)
    assert "visual.patch_embed.proj.weight" in changed and not any("merger" in name for name in changed)


@cpu_only
def test_the_size_that_fits_is_chosen_tried_and_kept(whole):
    """`test_two_processes_learn_what_one_learns` compares the run with one that was given the size."""
    lines = packed_lines(whole)
    assert lines[0] == (
        "Packed sequences of up to 768 tokens, 512 vision tokens: expected to take 0.0 of 1.1 GiB, model and optimizer "
        "0.0"
    )
    assert lines[1:] == [FULL.format(768), FULL.format(512), FITS]
    settings = json.loads((whole / "run.json").read_text())
    assert (settings["pack_tokens"], settings["pack_vision_tokens"], settings["global_batch_size"]) == (256, 512, 4)


@cpu_only
def test_a_run_goes_on_with_the_size_that_was_chosen(tensor_parallel, whole):
    """It does not choose again. Each step has the same samples in as full sequences."""
    assert packed_lines(tensor_parallel) == []
    names = ("step", "samples", "sequence_fill")
    assert figures(tensor_parallel, names) == figures(whole, names)


def packed_lines(run_dir: Path) -> list[str]:
    """What a launch has said about the size of packed sequences."""
    log = run_dir.with_name(f"{run_dir.name}.log").read_text()
    return [line for line in log.splitlines() if "packed sequence" in line.lower()]


@cpu_only
def test_data_parallel_processes_shrink_together(faulty, trained):
    """Two nodes of a process each, of which each says alone whether its memory is full."""
    lines = packed_lines(faulty)
    assert lines.count(FULL.format(768)) == 1 and lines.count(FITS) == 1
    names = ("step", "loss", "gradient_norm", "samples", "sequence_fill")
    assert figures(faulty, names) == figures(trained("DP"), names)[: FAULT_STEP - 1]


def figures(run_dir: Path, names: tuple[str, ...]) -> list[list]:
    return [[line[name] for name in names] for line in steps_of(run_dir)]


@gpu_only
def test_killed_run_goes_on_with_the_same_samples(environment, whole, tmp_path):
    run_dir = tmp_path / "killed"
    process = start(environment(run_dir))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 8:
            break
        time.sleep(0.05)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    log = launch(environment(run_dir))
    assert "Resuming from" in log
    assert_same_training(run_dir, whole)


@four_only
def test_four_processes_of_which_one_is_killed_go_on_with_the_same_samples(environment, trained, tmp_path):
    variables = environment(tmp_path / "killed", **FOUR["TP x DP"])
    launcher = start(variables, *NOT_COMPARED)
    file, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and launcher.poll() is None:
        if file.exists() and len(metrics(file.parent)) > SAVE_INTERVAL:
            break
        time.sleep(0.05)
    family = psutil.Process(launcher.pid).children(recursive=True)
    trains = [member for member in family if member.environ().get("RANK") == "2" and "LOCAL_RANK" in member.environ()]
    trains[0].send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not is_running(trains[0].pid)
    assert "Resuming from" in launch(variables, *NOT_COMPARED)
    assert_same_training(tmp_path / "killed", trained("TP x DP"))


@gpu_only
def test_a_damaged_checkpoint_stops_the_run(environment, whole, tmp_path):
    run_dir = tmp_path / "damaged"
    copy_run(whole, run_dir, STEPS)
    file = max((run_dir / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])
    launch(environment(run_dir), code=1)
    assert not (run_dir / "finished").exists() and not (run_dir / "hf").exists()


@gpu_only
def test_a_loss_that_is_no_number_stops_the_run_and_names_samples(environment, tmp_path):
    log = launch(environment(tmp_path / "wild", LR="1e30", MIN_LR="1e30", WARMUP_STEPS=0), code=1)
    assert "which has changed no weight; its samples: " in log and "lower --lr" in log
    assert not list((tmp_path / "wild" / "checkpoints").glob(f"step{STEPS:06d}*"))


@pytest.fixture(scope="module")
def faulty(environment, tmp_path_factory) -> Path:
    """Two processes, of which one has a gradient that is no number in FAULT_STEP. On a CPU they choose a size first."""
    folder = tmp_path_factory.mktemp("faulty")
    fault = {"FAULT_STEP": FAULT_STEP, "SAVE_INTERVAL": FAULT_STEP - 1, **LAYOUTS["DP"]}
    if GPUS:
        fault |= dict.fromkeys(("PYTHON", "PYTHON_EXEC"), write_interpreter(folder, "faulty_gradient"))
    size, limit = ({}, ()) if GPUS else (OPEN_SIZE, LIMIT)
    launch(environment(folder / "faulty", **fault, **size), *NOT_COMPARED, *limit, code=1)
    return folder / "faulty"


def test_a_gradient_that_is_no_number_stops_the_run_and_is_never_saved(faulty):
    log = faulty.with_name("faulty.log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("finetune_qwen2vl.py: ")]
    assert f"the gradient norm is nan at step {FAULT_STEP}, which has changed no weight; its samples: " in line
    assert [path.name for path in (faulty / "checkpoints").iterdir()] == [f"step{FAULT_STEP - 1:06d}"]
    assert [line["step"] for line in steps_of(faulty)] == list(range(1, FAULT_STEP))
    seen = json.loads((faulty / "non_finite_step.json").read_text())["samples"]
    assert len(seen) == len(set(seen)) > 4  # more than one of each of four sequences
