"""The pipeline up to the launch, run once for the tests that need prepared shards and a converted checkpoint."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Prepared:
    """Folders of a small run of the real stages."""

    raw: Path
    pixel_model: Path
    model: Path
    shards: Path


def edit_json(path: Path, **changes) -> None:
    """Changes fields of the object in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(command: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """A command in the repository's folder, with its output as text."""
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=check,
        timeout=600,
    )


def is_running(pid: int) -> bool:
    """Whether there is a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_checkpoint(folder: Path) -> None:
    """The files that the automodel engine's checkpoints have, with one number each."""
    import torch
    from safetensors.torch import save_file

    (folder / "hf").mkdir(parents=True)
    save_file({"weight": torch.ones(100)}, folder / "hf" / "model.safetensors")
    torch.save({"state": torch.ones(100)}, folder / "trainer.pt")


def prepare(folder: Path) -> Prepared:
    """Sample data (few images), shards with Energon metadata, the tiny model in `x4`."""
    import convert_checkpoint
    import data_preparation
    from dct_qwen2vl.toy import sample_data

    sample, shards, model = folder / "sample", folder / "shards", folder / "tiny-x4"
    assert sample_data.main(["--output-dir", str(sample), "--num-images", "300"]) == 0
    data = ["--data-dir", str(sample / "data"), "--output-dir", str(shards)]
    assert data_preparation.main([*data, "--maxcount", "20", "--energon-prepare", "--no-report"]) == 0
    source = sample / "model" / "tiny-qwen2-vl"
    assert convert_checkpoint.main(["--model-dir", str(source), "--output-dir", str(model)]) == 0
    return Prepared(sample / "data", source, model, shards)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
