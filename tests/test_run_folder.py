"""What a run keeps in its folder: the loggers that the command line asks for."""

from argparse import Namespace
from pathlib import Path

import pytest


def arguments(folder: Path, **changes) -> Namespace:
    return Namespace(**{"run_dir": folder, "experiment_name": "first", "wandb_project": None, **changes})


@pytest.mark.parametrize("project", [None, "tokens"])
def test_wandb_is_written_if_asked_for(project, tmp_path, monkeypatch):
    import wandb

    from run_folder import build_loggers

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = build_loggers(arguments(tmp_path, wandb_project=project))
    assert logger.tensorboard is not None
    if project is None:
        assert logger.wandb is None
        return
    logger.wandb.log_metrics({"train/loss": 1.25}, step=3)
    logger.wandb.experiment.finish()
    wandb.teardown()  # waits for what it has written
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"tokens" in written and b"first" in written
    assert b"train/loss" in written and b"1.25" in written
