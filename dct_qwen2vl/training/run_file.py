"""run.json: the settings of a run, and which of them a start that goes on from a checkpoint may change."""

import re
import zipfile
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from dct_qwen2vl.checkpoints.inspection import CheckpointError, open_tensors, read_json, safetensors_files
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.settings import flag_of, plain
from dct_qwen2vl.data.energon_files import fingerprint_of_shards
from dct_qwen2vl.training.config import DATA, DERIVED, SAME, ModelInfo, RunError, TrainingConfig, metadata_of

PUT_BACK = "put back what the run was started with, or another --experiment-name"
# What runs did that are older than a setting, where that is not the setting's default.
BEFORE = {"skip_share": 1.0}
CHECKPOINT_NAME = re.compile(r"step(\d{6,})")
TRAINER_FILE = "trainer.pt"  # of the automodel engine's checkpoints: all but the weights, a zip archive


def earlier_settings(config: TrainingConfig) -> dict[str, Any]:
    """run.json of a run that can go on, empty where there is none: one that left no checkpoint has nothing to continue.
    A setting that is newer than the run has its default, or what runs did before. Raises CheckpointError for a run.json
    that cannot be used."""
    path = config.run_dir / "run.json"
    begun = (config.run_dir / "finished").is_file() or any((config.run_dir / "checkpoints").glob("step*"))
    if not path.is_file() or not begun:
        return {}
    defaults = {each.name: plain(each.default) for each in fields(config) if each.default is not MISSING}
    earlier = {**defaults, **BEFORE, **read_json(path, PUT_BACK)}
    count = earlier["data_restarts"]
    if not isinstance(count, int):
        raise CheckpointError(f"{path} has data_restarts {count!r}, which is no whole number: {PUT_BACK}")
    return earlier


def check_run_folder(config: TrainingConfig) -> None:
    """A folder of another run is not continued. Raises RunError naming what differs, or CheckpointError for a run.json
    that cannot be used."""
    earlier = earlier_settings(config)
    if not earlier:
        return
    metadata = metadata_of(type(config))
    for rule in (SAME,) if config.restart_data else (SAME, DATA):
        for name, about in metadata.items():
            now = plain(getattr(config, name))
            if about["resume"] == rule and earlier.get(name) != now:
                again = ", --restart-data to begin the data again" if rule == DATA else ""
                raise RunError(
                    f"{difference(config, name, earlier)}: use the same value to resume{again}, or another "
                    "--experiment-name"
                )
    begun_with = earlier.get("train_shards")  # a run may be older than this key
    if begun_with and not config.restart_data and begun_with != fingerprint_of_shards(config.data_dir):
        raise RunError(
            f"the train shards in {config.data_dir} are not those that {config.run_dir} was started with: add "
            "--restart-data to begin them from the start, or take another --experiment-name"
        )


def difference(config: TrainingConfig, name: str, earlier: dict[str, Any]) -> str:
    """Says what a setting was and what it is now. The beginning of a message.

    config: The settings.
    name: Of the setting.
    earlier: As `earlier_settings` gives them.
    """
    flag = metadata_of(type(config))[name].get("flag") or flag_of(name)
    begun, now = words(earlier.get(name)), words(plain(getattr(config, name)))
    return (
        f"{config.run_dir} was started {f'with {flag} {begun}' if begun else f'without {flag}'}, now it is "
        f"{now or 'left out'}"
    )


def words(value: Any) -> str:
    """A setting as it is typed after its flag. "" for one that is left out."""
    if value is None or value is False:
        return ""
    if value is True:
        return "given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_same_model(config: TrainingConfig, info: ModelInfo) -> None:
    """Raises RunError where model_dir holds a model of another token format than when the run began.

    config: The settings.
    info: The checkpoint's token format.
    """
    begun = earlier_settings(config).get("token_format", info.dct_name)
    if begun != info.dct_name:
        raise RunError(
            f"{config.run_dir} was started with the token format {begun}, now the model in {config.model_dir} has "
            f"{info.dct_name}: put that model back, or take another --experiment-name"
        )


def checkpoints_by_step(folder: Path) -> list[Path]:
    """The whole checkpoints, the newest last; what a killed run left half-written has another name."""
    found = [path for path in folder.glob("step*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    return next(reversed(checkpoints_by_step(folder)), None)


def check_newest_checkpoint(config: TrainingConfig) -> None:
    """Raises RunError where the checkpoint that a run of the automodel engine goes on from lacks a file, or has one
    that is cut short. Only headers are read."""
    *earlier, newest = [None, *checkpoints_by_step(config.run_dir / "checkpoints")]
    if newest is None or config.chosen_engine != "automodel":
        return
    why = damage(newest)
    if why:
        goes_on = f"go on from {earlier[-1].name}" if earlier[-1] else "begin from the start"
        raise RunError(f"{newest} is damaged ({why}): remove this folder to {goes_on}, or take another "
                       "--experiment-name")  # fmt: skip


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of the automodel engine. None for a whole one."""
    trainer = checkpoint / TRAINER_FILE
    if not trainer.is_file():
        return f"no {TRAINER_FILE}"
    if not zipfile.is_zipfile(trainer):  # an archive's table is at its end
        return f"{TRAINER_FILE} is cut short"
    return damage_of_weights(checkpoint)


def damage_of_weights(checkpoint: Path) -> str | None:
    """What is wrong with the weights in a checkpoint of the automodel engine. None for whole ones."""
    try:
        for _ in open_tensors(safetensors_files(checkpoint / "hf"), "np"):
            pass
    except CheckpointError:
        return "weights in hf are missing or cut short"
    return None


def count_data_restarts(config: TrainingConfig) -> int:
    """How often the run has begun its data again, this start included. run.json says it as soon as the run begins, a
    checkpoint when there is one of those data: where they differ, the run ended in between, and the data begin again
    once more, with the flag or without. (With it, a process may read what the first one has just written, and be one
    too high: only the number of the first is stored, and none of them restores a state.)"""
    return earlier_settings(config).get("data_restarts", 0) + config.restart_data


def write_run_file(config: TrainingConfig, info: ModelInfo) -> None:
    """Writes run.json: the settings, the numbers derived from them, and the token format.

    config: Resolved for an engine.
    info: The checkpoint's token format.
    """
    recorded = {each.name for each in fields(config) if each.metadata["recorded"]}
    values = {name: value for name, value in asdict(config).items() if name in recorded}
    values |= {name: getattr(config, name) for name in DERIVED}
    values = {name: plain(value) for name, value in values.items()}
    config.run_dir.mkdir(parents=True, exist_ok=True)
    values["token_format"] = info.dct_name
    if config.train_shards:
        values["train_shards"] = config.train_shards
    write_json(config.run_dir / "run.json", values)
