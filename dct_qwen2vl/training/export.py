"""--export: the model of a checkpoint in the forms that the end of a run writes. Nothing is trained.

RUN_DIR/exported/step003000/hf, hf_dct   as final_model.py has them

One process does it on a CPU, from run.json, the checkpoint and the initial model. It reads no shards. The run may train
meanwhile: a checkpoint that it removes is gone as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path

from dct_qwen2vl.common.imports import importing
from dct_qwen2vl.common.settings import plain
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.training.checks import check_model, check_writable
from dct_qwen2vl.training.config import FREE, NEWEST, ModelInfo, RunError, TrainingConfig
from dct_qwen2vl.training.disk_space import check_space_of_model
from dct_qwen2vl.training.final_model import tell_where, trained_folder, write_stock_form
from dct_qwen2vl.training.run_file import (
    CHECKPOINT_NAME,
    check_same_model,
    checkpoints_by_step,
    damage_of_weights,
    difference,
    earlier_settings,
)

EXPORTED = "exported"  # in the run folder
# Settings that the model depends on. The others may be any.
OF_MODEL = (
    *("model_dir", "dct", "lora_rank", "lora_alpha", "chosen_engine"),
    *("min_pixels", "max_pixels", "skip_db", "skip_noise_floor", "skip_share"),
    *("video_fps", "video_min_frames", "video_max_frames", "video_total_pixels"),
)


def export(config: TrainingConfig) -> int:
    """Writes the model of a checkpoint into the run folder, or nothing. With --check, only says what stands against it.

    config: As typed. `export` is the step, or NEWEST.

    Returns the exit status. Raises UserError.
    """
    checkpoint = choose_checkpoint(config)
    config = as_trained(config)
    info = check_model(config.model_dir, config.dct)
    check_same_model(config, info)
    check_writable(config)
    folder = config.run_dir / EXPORTED / checkpoint.name
    if folder.exists():
        if not config.check:
            print(f"{folder} is there already: remove it to write it again", flush=True)
        return 0
    with still_there(checkpoint):
        check_whole(config, checkpoint)
        check_space_of_model(config, forms=2 if info.dct else 1)
        if config.check:
            return 0
        print(f"Exporting {checkpoint}", flush=True)
        write_forms(config, info, checkpoint, folder)
    tell_where(f"the model of step {step_of(checkpoint)}", folder, info)
    return 0


@contextmanager
def still_there(checkpoint: Path) -> Iterator[None]:
    """Raises RunError where the run has removed the checkpoint inside the block."""
    try:
        yield
    except Exception as error:
        if checkpoint.exists():
            raise
        raise RunError(
            f"the run has removed {checkpoint} while it was read, since it keeps the newest: choose a newer step, or "
            "raise --keep"
        ) from error


def step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def choose_checkpoint(config: TrainingConfig) -> Path:
    """That of the step, or the newest. Raises RunError where it is not there."""
    found = {step_of(path): path for path in checkpoints_by_step(config.run_dir / "checkpoints")}
    if not found:
        raise RunError(
            f"{config.run_dir} has no checkpoint to export: is it the folder of the run (--output-dir, "
            "--experiment-name)? A run writes the first one after --save-interval steps"
        )
    step = max(found) if config.export == NEWEST else config.export
    if step not in found:
        raise RunError(
            f"{config.run_dir} has no checkpoint of step {step}: --export takes {', '.join(map(str, found))}, or "
            "nothing for the newest"
        )
    return found[step]


def as_trained(config: TrainingConfig) -> TrainingConfig:
    """The settings, with the run's own where the model depends on them and they are left out. Raises RunError where
    the run has another value than is given, and CheckpointError for a run.json that cannot be used."""
    earlier = earlier_settings(config)
    if not earlier:
        raise RunError(f"{config.run_dir} has no run.json, which says how the run reads images: put it back")
    changes = {}
    for each in fields(config):
        now = getattr(config, each.name)
        if each.name not in OF_MODEL or plain(now) == earlier.get(each.name):
            continue
        if now == each.default:
            changes[each.name] = earlier[each.name]
        elif each.metadata["resume"] != FREE:  # as --dct is, which `check_model` compares with the model
            otherwise = "" if each.default is MISSING else ", or leave it out"
            raise RunError(f"{difference(config, each.name, earlier)}: use the same value to export{otherwise}")
    return replace(config, **changes)


def check_whole(config: TrainingConfig, checkpoint: Path) -> None:
    """Raises RunError for a checkpoint whose weights lack a file, or have one that is cut short."""
    if config.chosen_engine == "megatron":
        with importing():
            from dct_qwen2vl.training import megatron_checkpoint
        why = megatron_checkpoint.damage_of_weights(checkpoint)
    else:
        why = damage_of_weights(checkpoint)
    if why:
        raise RunError(f"{checkpoint} is damaged ({why}): export another step")


def write_forms(config: TrainingConfig, info: ModelInfo, checkpoint: Path, folder: Path) -> None:
    """Both forms, or nothing. Raises FileNotFoundError where the checkpoint is gone at the end: the run removes it as a
    whole, so what was read is whole if it is still there."""
    with importing():
        from dct_qwen2vl.checkpoints.conversion import new_directory
        from dct_qwen2vl.checkpoints.hf_folder import write_reading
        from dct_qwen2vl.training import automodel_weights, megatron_checkpoint
        from dct_qwen2vl.training.lora import LoRA
    with new_directory(checkpoint, folder) as parent:
        trained = trained_folder(parent, info)
        if config.chosen_engine == "megatron":
            edit = partial(write_reading, settings=config.processor_settings, sampling=vars(VideoSampling.of(config)))
            megatron_checkpoint.export_checkpoint(checkpoint, config.model_dir, trained, LoRA.of(config), edit)
        else:  # the checkpoint says how the run reads
            automodel_weights.export_checkpoint(checkpoint, config.model_dir, trained)
        write_stock_form(info, parent)
        checkpoint.stat()
