"""What a run keeps in its folder: its lock, the checkpoint it goes on from, the loggers it was asked for."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipeline import REPOSITORY, write_checkpoint

from dct_qwen2vl.training import run_lock
from dct_qwen2vl.training.config import RunError, TrainingConfig
from dct_qwen2vl.training.run_file import check_newest_checkpoint


def settings(output_dir: Path, **changes) -> TrainingConfig:
    """Of a run in output_dir/first."""
    folders = {"model_dir": Path("m"), "data_dir": Path("d"), "output_dir": output_dir}
    return TrainingConfig(**folders, experiment_name="first", **changes)


@pytest.mark.parametrize("project", [None, "tokens"])
def test_wandb_is_written_if_asked_for(project, tmp_path, monkeypatch):
    import wandb

    from dct_qwen2vl.training.run_folder import build_loggers

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = build_loggers(settings(tmp_path, wandb_project=project))
    assert logger.tensorboard is not None
    if project is None:
        assert logger.wandb is None
        return
    logger.wandb.log_metrics({"train/loss": 1.25}, step=3)
    logger.wandb.experiment.finish()
    wandb.teardown()  # waits for what it has written
    (file,) = tmp_path.glob("first/wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"tokens" in written and b"first" in written
    assert b"train/loss" in written and b"1.25" in written


@pytest.mark.parametrize("broken", ["{", "[]", '{"loss": 1.0}', "\0\0"])
def test_a_broken_line_of_metrics_is_named(broken, tmp_path):
    from dct_qwen2vl.training.metrics_file import read_metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n{{"st')
    with pytest.raises(run_lock.RunFolderError, match=r"metrics.jsonl is broken in line 2: take that line out"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2, "loss": NaN}\n{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


# Holds a run folder, and leaves behind a process that outlives it, as a loader process may.
HOLDER = """
import os, sys, time
from pathlib import Path
from dct_qwen2vl.training import run_lock
run_lock.lock(Path(sys.argv[1]))
if not os.fork():  # it has let go of the lock by then
    print(os.getpid(), flush=True)
time.sleep(300)
"""


@pytest.fixture
def held(tmp_path):
    """A run folder, the process that holds it, and the id of that one's child."""
    folder = tmp_path / "first"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    yield folder, holder
    holder.kill()
    holder.wait(timeout=20)
    holder.stdout.close()
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("take", [run_lock.lock, run_lock.check_unlocked])
def test_run_folder_is_held_by_one_process_and_free_when_it_is_killed(take, held):
    folder, holder = held
    with pytest.raises(run_lock.RunFolderError) as refusal:
        take(folder)
    line = f"{folder} is being trained by another process (pid {holder.pid} on {socket.gethostname()}): wait or end it"
    assert str(refusal.value) == line
    holder.kill()
    holder.wait(timeout=20)
    take(folder)


def test_looking_at_a_run_folder_makes_none(tmp_path):
    run_lock.check_unlocked(tmp_path / "first")
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("save_interval", [0, 8])
def test_a_run_goes_on_from_its_checkpoint_whether_it_saves_or_not(save_interval, tmp_path):
    from nemo import lightning as nl

    from dct_qwen2vl.training.run_folder import resume, step_checkpoints, trainer_options

    checkpoint = tmp_path / "first" / "checkpoints" / "step000008"
    checkpoint.mkdir(parents=True)
    config = settings(tmp_path, save_interval=save_interval, max_steps=24)
    trainer = nl.Trainer(accelerator="cpu", callbacks=step_checkpoints(config, print), **trainer_options(config))
    resume(config).setup(trainer)
    assert Path(trainer.ckpt_path) == checkpoint
    assert (trainer.checkpoint_callback is None) is (save_interval == 0)


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Whoever reads it meanwhile finds it whole or not at all. One that the user has removed is no error."""
    from dct_qwen2vl.training import run_folder

    checkpoint, seen = tmp_path / "step000006", []
    (checkpoint / "hf").mkdir(parents=True)
    (tmp_path / ".step000006.tmp" / "hf").mkdir(parents=True)  # of a killed run
    remove = run_folder.shutil.rmtree
    monkeypatch.setattr(
        run_folder.shutil, "rmtree", lambda path, **options: seen.append(path.name) or remove(path, **options)
    )
    callback = run_folder.StepCheckpoint(tmp_path, 2, 1, print)
    for is_first in (False, True, True):
        assert checkpoint.exists() is (not seen)
        callback._remove_checkpoint(SimpleNamespace(is_global_zero=is_first), str(checkpoint))
    assert list(tmp_path.iterdir()) == [] and set(seen) == {".step000006.tmp"}


def resume_on_nodes(*folders: Path) -> list:
    """What the process of each node finds in its folder of checkpoints: a path, None or the error."""
    import torch.distributed

    from dct_qwen2vl.training.run_folder import agree_on_checkpoint

    def node(rank: int):
        try:
            return agree_on_checkpoint(folders[rank], store, rank, len(folders))
        except run_lock.RunFolderError as error:
            return error

    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=20))
    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(node, range(len(folders))))


def test_the_first_node_chooses_the_checkpoint(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("first/step000008", "second/step000008", "second/step000016"):
        (tmp_path / name).mkdir(parents=True)
    assert resume_on_nodes(first, first) == [first / "step000008"] * 2
    assert resume_on_nodes(first, second) == [first / "step000008", second / "step000008"]
    assert resume_on_nodes(tmp_path / "empty", second) == [None, None]


def test_all_nodes_end_where_one_does_not_see_the_checkpoint(tmp_path):
    (tmp_path / "first" / "step000008").mkdir(parents=True)
    said = f"{socket.gethostname()} does not see .*step000008: OUTPUT_DIR must be one folder that all nodes share"
    errors = resume_on_nodes(tmp_path / "first", tmp_path / "second", tmp_path / "first")
    assert len(errors) == 3
    assert all(re.fullmatch(said, str(error)) for error in errors)


@pytest.mark.parametrize("kept", ["step000004, step000006", "step000006"])
@pytest.mark.parametrize(
    ("file", "size", "said"),
    [
        ("trainer.pt", None, "no trainer.pt"),
        ("trainer.pt", 1000, "trainer.pt is cut short"),
        ("trainer.pt", 0, "trainer.pt is cut short"),
        ("hf/model.safetensors", None, "weights in hf are missing or cut short"),
        ("hf/model.safetensors", 300, "weights in hf are missing or cut short"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_what_goes_on_without_it(kept, file, size, said, tmp_path):
    config = settings(tmp_path, chosen_engine="automodel")
    folder = config.run_dir / "checkpoints"
    check_newest_checkpoint(config)
    for name in kept.split(", "):
        write_checkpoint(folder / name)
    check_newest_checkpoint(config)
    damaged = folder / "step000006" / file
    if size is None:
        damaged.unlink()
    else:
        os.truncate(damaged, size)
    goes_on = "go on from step000004" if "4" in kept else "begin from the start"
    message = f"{folder}/step000006 is damaged ({said}): remove this folder to {goes_on}, or take another"
    with pytest.raises(RunError, match=re.escape(message)):
        check_newest_checkpoint(config)
