"""What a run writes while it goes: whose seconds a step's are, and how a step that is no number ends a run."""

import json
import math
import time
from types import SimpleNamespace

import pytest

from dct_qwen2vl.training.config import TrainingConfig
from dct_qwen2vl.training.log import NonFiniteStep, StepGuard, TrainingLog, ValidationSum
from dct_qwen2vl.training.run_folder import step_checkpoints


class Clock:
    """In place of time.perf_counter."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer_at(step: int, **changes) -> SimpleNamespace:
    """What TrainingLog looks at of a Lightning trainer that has made `step` steps."""
    loader = SimpleNamespace(wait_seconds=0.0)
    strategy = SimpleNamespace(root_device="cpu", broadcast=lambda value: value)
    return SimpleNamespace(
        **{
            "global_step": step, "is_global_zero": True, "world_size": 1, "accumulate_grad_batches": 1,
            "datamodule": SimpleNamespace(train_loader=loader), "strategy": strategy, "val_check_interval": 10,
            "enable_validation": True, "loggers": [], "current_epoch": 0,
            **changes,
        }
    )  # fmt: skip


MODULE = SimpleNamespace(last_learning_rate=1e-3, gradient_norm=1.0)


def test_writing_a_checkpoint_is_not_part_of_the_next_step(tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", lambda *_: setattr(clock, "now", clock.now + 50))
    log = TrainingLog(tmp_path, 3, 1, 2)
    folders = {"model_dir": tmp_path, "data_dir": tmp_path, "output_dir": tmp_path}
    config = TrainingConfig(**folders, save_interval=1, keep=1)
    (saving,) = step_checkpoints(config, log.restart_clock)
    log.on_train_start(trainer_at(0), MODULE)
    for step in (1, 2, 3):
        clock.now += step
        log._end_step(trainer_at(step), MODULE)
        saving._save_checkpoint(trainer_at(step), "step")
    assert [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("skips", [True, False])
def test_the_share_of_cells_kept_is_written_and_shown_where_some_are_left_out(skips, tmp_path, capsys):
    logged = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append(values))
    log = TrainingLog(tmp_path, 3, 1, 2, skips)
    log.on_train_start(trainer_at(0), MODULE)
    log.add(visual_tokens=3, cells=8, samples=1)
    log.add(visual_tokens=1, cells=2, samples=1)
    log._end_step(trainer_at(1, loggers=[logger]), MODULE)
    log.add(text_tokens=5, samples=1)  # no media: no share
    log._end_step(trainer_at(2, loggers=[logger]), MODULE)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("kept_share") for line in lines] == ([0.4, None] if skips else [None, None])
    assert [values.get("train/kept_share") for values in logged] == ([0.4, None] if skips else [None, None])
    assert ("text tokens/s | cells kept 40% |" in capsys.readouterr().out) == skips


@pytest.mark.parametrize(
    ("waits", "noted"),
    [
        ([0.25] * 250, {102: "25%"}),  # steps 3 to 52 and 53 to 102 are the first two blocks; told once
        ([0.0] * 70 + [0.5] * 130, {152: "50%"}),  # the loader had read ahead
        ([0.09] * 250, {}),
        ([0.0] * 60 + [0.99] + [0.0] * 190, {}),  # one slow file
        (([0.3] * 50 + [0.0] * 50) * 3, {}),
        ([0.0] * 50 + [0.3] * 50 + [0.0] * 50 + [0.3] * 100, {252: "30%"}),
    ],
)
def test_a_run_that_waits_for_data_is_told_once(waits, noted, tmp_path, monkeypatch, capsys):
    """Of seconds a step. The run goes on from step 1; the step after it is not counted, whatever it waits."""
    clock, told = Clock(), {}
    monkeypatch.setattr(time, "perf_counter", clock)
    log = TrainingLog(tmp_path, 1000, 1000, 2)
    log.on_train_start(trainer_at(1), MODULE)
    total = 0.0
    for step, share in enumerate([1.0, *waits], 2):
        total, clock.now = total + share * step, clock.now + step
        trainer = trainer_at(step)
        trainer.datamodule.train_loader.wait_seconds = total
        log._end_step(trainer, MODULE)
        if said := capsys.readouterr().out:
            told[step] = said
    assert told == {
        step: f"Note: training waited for data for {share} of the last 50 steps' time. More loader processes may help: "
        'NUM_WORKERS, see "Loader processes" in docs/training.md\n'
        for step, share in noted.items()
    }


def test_loggers_get_every_step_under_its_number_from_zero(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    log = TrainingLog(tmp_path, 3, 1, 2)
    log.on_train_start(trainer_at(0), MODULE)
    for step in (1, 2):
        log.add(loss=6.0 * step, loss_weight=2)
        log._end_step(trainer_at(step, loggers=[logger]), MODULE)
    logger.finalize("success")
    found = EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(0, 3.0), (1, 6.0)]
    assert [event.step for event in found.Scalars("epoch")] == [0, 1]
    assert "train/step" not in found.Tags()["scalars"] and "train/seconds" in found.Tags()["scalars"]


@pytest.mark.parametrize(
    ("lines", "step", "validated"),
    [
        ([{"step": 10, "loss": 1.0}], 10, True),  # ended while it validated
        ([{"step": 10, "loss": 1.0}, {"step": 10, "val_loss": 1.0}], 10, False),
        ([{"step": 10, "loss": 1.0}], 9, False),
        ([], 0, False),
    ],
)
def test_a_validation_that_was_cut_off_is_made_up_for(lines, step, validated, tmp_path, monkeypatch):
    from dct_qwen2vl.training import log

    done = []
    monkeypatch.setattr(log, "validate", done.append)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = trainer_at(step, val_check_interval=20, accumulate_grad_batches=2)
    TrainingLog(tmp_path, 100, 1, 2).on_train_start(trainer, MODULE)
    assert done == [trainer] * validated


def test_where_there_is_no_val_split_none_is_made_up_for(tmp_path, monkeypatch):
    from dct_qwen2vl.training import log

    done = []
    monkeypatch.setattr(log, "validate", done.append)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    TrainingLog(tmp_path, 100, 1, 2).on_train_start(trainer_at(10, enable_validation=False), MODULE)
    assert done == []


def test_skipped_samples_go_on_counting_after_a_restart(tmp_path):
    first = TrainingLog(tmp_path, 3, 1, 2)
    first._skipped.update({"too_long": 2})
    second = TrainingLog(tmp_path, 3, 1, 2)
    second.load_state_dict(first.state_dict())
    second._skipped.update({"too_long": 1, "broken": 4})
    assert second.state_dict() == {"skipped": {"too_long": 3, "broken": 4}}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [1.0, math.nan])
def test_a_loss_that_is_no_number_is_named_with_its_own_micro_batch(loss, norm, tmp_path):
    guard = StepGuard(tmp_path / "refused.json")
    guard.check(1, 2.5, [(1.0, ["a"]), (0.0, ["b"])])
    with pytest.raises(NonFiniteStep) as refusal:
        guard.check(7, norm, [(1.0, ["a"]), (loss, ["b", "c"])])
    assert str(refusal.value).startswith(
        f"the loss is {loss} at step 7, which has changed no weight; its samples: b, c. "
    )
    assert json.loads((tmp_path / "refused.json").read_text()) == {"step": 7, "loss": str(loss), "samples": ["b", "c"]}


@pytest.mark.parametrize(("step", "advice"), [(1, "or at the weights in --model-dir"), (2, "or lower --lr and take")])
def test_before_any_rate_was_applied_the_weights_are_named(step, advice, tmp_path):
    with pytest.raises(NonFiniteStep, match=f"its samples: a. Look at them, {advice}"):
        StepGuard(tmp_path / "refused.json").check(step, math.nan, [(math.nan, ["a"])])


def test_of_many_samples_the_first_are_named_and_all_are_listed(tmp_path):
    keys = [f"k{number}" for number in range(64)]
    with pytest.raises(NonFiniteStep, match=r"k0, k1.* k9, \.\.\. \(64 in all, listed in .*refused\.json\)") as refusal:
        StepGuard(tmp_path / "refused.json").check(7, math.inf, [(1.0, keys[:32]), (1.0, keys[32:])])
    assert "k10" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert json.loads((tmp_path / "refused.json").read_text())["samples"] == keys


def test_a_validation_s_loss_is_the_mean_over_its_tokens_without_blanks():
    import torch

    total = ValidationSum()
    total.begin("cpu")
    for loss_sum, tokens, samples in ((3.0, 2, 1), (6.0, 1, 2), (100.0, 1, 0)):
        total.add(torch.tensor(loss_sum), tokens, samples)
    total.end()
    assert (total.loss, total.samples) == (3.0, 3)
    total.begin("cpu")
    total.end()
    assert math.isnan(total.loss) and total.samples == 0
