"""FSDP2 in the automodel engine: real processes over gloo, against DDP, and each going on from the other."""

import json
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import REPOSITORY, metrics, run
from safetensors.torch import load_file
from sharding_process import CASES, MIDDLE, RUNS, STEPS
from test_finetune import (
    NOT_COMPARED,
    SAVE_INTERVAL,
    figures,
    finish,
    launch_environment,
    resumed_step,
    start,
    wait_until_under_way,
    whole_lines,
)
from test_starts_and_ends import GOES_ON, assert_no_line_is_lost

from dct_qwen2vl.data.media_embedding import blank_image, embed_media
from dct_qwen2vl.training.sharding import embed_first

TOLERANCE = (
    1e-5  # relative, float32: the two strategies add the gradients of processes and micro-batches in other order
)
SHARDED = [name for name, (sharding, _) in RUNS.items() if sharding == "fsdp2"]


@pytest.fixture(scope="module")
def models(converted, qwen2_5_vl_directory, tmp_path_factory) -> list[Path]:
    """A tiny Qwen2-VL and a tiny Qwen2.5-VL, over DCT tokens."""
    from dct_qwen2vl.checkpoints.conversion import convert
    from dct_tokenizer import DCTConfig

    folder = tmp_path_factory.mktemp("models") / "qwen2_5_vl-x4"
    convert(qwen2_5_vl_directory, folder, DCTConfig.preset("x4"))
    return [converted("x4"), folder]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> tuple[Path, dict]:
    """All runs of sharding_process: the folder of their checkpoints, and their figures."""
    folder = tmp_path_factory.mktemp("sharding")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(REPOSITORY / "tests" / "sharding_process.py")
    run([*launcher, script, *map(str, models), str(folder)], OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    return folder, json.loads((folder / "figures.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """What a run's last checkpoint has in hf/."""
    return load_file(folder / "checkpoints" / f"step{STEPS:06d}" / "hf" / "model.safetensors")


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over all weights together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.mark.launch
@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("case", list(CASES))
def test_losses_norms_and_weights_are_those_of_ddp(case, name, trained):
    folder, found = trained
    begun = MIDDLE if RUNS[name][1] else 0
    for expected, mine in zip(found[case]["ddp"], found[case][name]):
        assert mine["losses"] == pytest.approx(expected["losses"][2 * begun :], rel=TOLERANCE)
        assert mine["norms"] == pytest.approx(expected["norms"][begun:], rel=TOLERANCE)
        # A checkpoint is written before the validation of its step, so those that go on from it validate first.
        assert mine["validations"] == pytest.approx(expected["validations"], rel=TOLERANCE)
        assert len(mine["norms"]) == STEPS - begun and len(mine["validations"]) == STEPS // MIDDLE
    assert relative_difference(weights_of(folder / case / name), weights_of(folder / case / "ddp")) < TOLERANCE


@pytest.mark.launch
@pytest.mark.parametrize("case", list(CASES))
def test_a_sharded_run_goes_on_bit_for_bit(case, trained):
    folder, found = trained
    whole, again = (weights_of(folder / case / name) for name in ("sharded", "sharded_again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for one, other in zip(found[case]["sharded"], found[case]["sharded_again"]):
        assert other["losses"] == one["losses"][2 * MIDDLE :] and other["norms"] == one["norms"][MIDDLE:]


@pytest.mark.launch
@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("case", list(CASES))
def test_each_process_holds_half_of_weights_and_moments_where_they_are_sharded(case, name, trained):
    for mine in trained[1][case][name]:
        share = 0.5 if name in SHARDED else 1.0
        assert mine["weights"] / mine["weights_in_all"] == pytest.approx(share, abs=0.001)
        assert mine["moments"] / mine["moments_in_all"] == pytest.approx(share, abs=0.001)
        assert mine["moments_in_all"] > 0


@pytest.mark.launch
@pytest.mark.parametrize("case", list(CASES))
def test_a_sharded_checkpoint_has_the_form_of_the_others(case, trained):
    """The same files, settings, tensors and numbering of the optimizer's states."""
    from dct_qwen2vl.data.loader import energon_state_classes

    checkpoints = [trained[0] / case / name / "checkpoints" / f"step{STEPS:06d}" for name in ("ddp", "sharded")]
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in checkpoints]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix == ".json":
            assert (checkpoints[0] / name).read_text() == (checkpoints[1] / name).read_text()
    with torch.serialization.safe_globals(energon_state_classes()):
        states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in checkpoints]
    assert shapes(states[0]) == shapes(states[1])


def shapes(state: dict) -> tuple:
    """Of a trainer.pt: the keys, and the types and shapes of everything that the optimizer and the adapters hold."""
    (optimizer,) = state["optimizer_states"]
    moments = {
        (index, name): (type(value), value.dtype, value.shape)
        for index, of_weight in optimizer["state"].items()
        for name, value in of_weight.items()
    }
    adapters = {name: (type(value), value.shape) for name, value in state["adapters"].items()}
    return state.keys(), [group["params"] for group in optimizer["param_groups"]], moments, adapters


@pytest.mark.parametrize("process", [0, 1])
def test_cells_are_left_out_where_that_is_tried(process, models):
    from sharding_process import micro_batches

    whole, kept = (micro_batches(models[0], process, skip_db) for skip_db in (None, 30.0))
    assert whole[0].image_kept is None
    batch = kept[process]  # the one with media
    assert not batch.image_kept.all() and (process == 1 or not batch.video_kept.all())
    if process == 0:
        assert batch.video_kept.view(batch.video_grid_thw[0, 0], -1).any(dim=1).tolist() == [True, False]
    assert batch.input_ids.shape[1] < whole[process].input_ids.shape[1]


@pytest.mark.parametrize("model", [0, 1], ids=["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("process", [0, 1])
def test_one_call_of_the_tower_computes_what_the_model_s_own_calls_do(process, model, models):
    from sharding_process import micro_batches
    from transformers import AutoModelForImageTextToText

    own = AutoModelForImageTextToText.from_pretrained(models[model], torch_dtype=torch.float32).eval()
    once = AutoModelForImageTextToText.from_pretrained(models[model], torch_dtype=torch.float32).eval()
    once.register_forward_pre_hook(embed_first, with_kwargs=True)
    calls = []
    once.visual.register_forward_hook(lambda *arguments: calls.append(1))
    for number, batch in enumerate(micro_batches(models[model], process), start=1):
        with torch.no_grad():
            found, expected = (form(**batch.model_inputs(), use_cache=False).logits for form in (once, own))
        assert float((found - expected).norm() / expected.norm()) < 1e-6
        assert len(calls) == number


def test_a_medium_without_its_tokens_is_an_error(models):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(models[0], torch_dtype=torch.float32)
    pixels, grid = blank_image(model, torch.device("cpu"))
    inputs = {"input_ids": torch.tensor([[5, 6]]), "pixel_values": pixels, "image_grid_thw": grid}
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        embed_media(model, inputs)


@pytest.fixture(scope="module")
def launched(prepared, tmp_path_factory) -> dict:
    """A sharded run of which kill -9 has ended one process, started again by the launcher."""
    output = tmp_path_factory.mktemp("launched")
    environment = launch_environment(prepared, output, "killed", 2) | {"SHARDING": "fsdp2"}
    process, log = start(environment, *NOT_COMPARED), output / "killed.log"
    wait_until_under_way(process, output / "killed")
    children = psutil.Process(process.pid).children()  # of torchrun
    training = next(child for child in children if "finetune_qwen2vl.py" in child.cmdline())
    size = log.stat().st_size
    training.kill()
    first = {"code": process.wait(timeout=90), "said": log.read_text(), "lines": whole_lines(output / "killed")}
    first["last"] = [line for line in first["said"][size:].splitlines() if line and not line.startswith("step ")]
    return {"output": output, "log": finish(start(environment), environment), "first": first}


@pytest.fixture(scope="module")
def alone(launched, prepared) -> dict:
    """Its checkpoint, from which one process goes on without sharding."""
    output = launched["output"]
    alone = launch_environment(prepared, output, "alone", 1)
    (output / "alone" / "checkpoints").mkdir(parents=True)
    step = Path("checkpoints") / f"step{2 * SAVE_INTERVAL:06d}"
    shutil.copytree(output / "killed" / step, output / "alone" / step)
    shutil.copyfile(output / "killed" / "run.json", output / "alone" / "run.json")
    return {"run_dir": output / "alone", "log": finish(start(alone, "--restart-data", *NOT_COMPARED), alone)}


@pytest.mark.launch
def test_a_process_that_was_killed_is_told(launched):
    first = launched["first"]
    assert first["code"] == 128 + signal.SIGKILL
    assert f"was ended by SIGKILL (is the machine's memory full?); {GOES_ON}" in first["last"][-1]
    assert not any("Traceback" in line for line in first["last"])
    assert_no_line_is_lost(first["said"], [line["step"] for line in first["lines"] if "loss" in line])


@pytest.mark.launch
def test_a_killed_sharded_run_goes_on_bit_for_bit(launched):
    before, after = launched["first"]["lines"], metrics(launched["output"] / "killed")
    repeated = [line for line in before if line["step"] > resumed_step(launched["log"])]
    assert len(repeated) >= 3, "the launch was killed too early to compare anything"
    assert figures(after[: len(before)]) == figures(before)


@pytest.mark.launch
def test_the_model_at_the_end_of_a_sharded_run_is_that_of_its_last_checkpoint(launched):
    run_dir = launched["output"] / "killed"
    newest = max((run_dir / "checkpoints").iterdir())
    last, final = (load_file(folder / "model.safetensors") for folder in (newest / "hf", run_dir / "hf_dct"))
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in final)
    assert json.loads((run_dir / "hf_dct" / "config.json").read_text())["architectures"] == [
        "Qwen2VLForConditionalGeneration"
    ]
    assert json.loads((run_dir / "run.json").read_text())["sharding"] == "fsdp2"


@pytest.mark.launch
def test_one_process_goes_on_from_a_sharded_run(launched, alone):
    both = metrics(launched["output"] / "killed")
    assert resumed_step(alone["log"]) == 2 * SAVE_INTERVAL
    losses = [line["loss"] for line in metrics(alone["run_dir"]) if "loss" in line and line["step"] > 2 * SAVE_INTERVAL]
    first, last = (next(line["loss"] for line in both if line["step"] == step) for step in (1, 2 * SAVE_INTERVAL))
    assert len(losses) == SAVE_INTERVAL and max(losses) < last + 0.5 * (first - last)
