"""The weights in a checkpoint of the megatron engine, read by one process on a CPU.

Megatron-core's format is that of torch.distributed.checkpoint. A tensor is whole, whatever processes have written it.
Those of all layers are one: "language_model.decoder.layers.mlp.linear_fc2.weight" is [layers, out, in].
"""

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import Qwen2VLConfig

from dct_qwen2vl.training.config import RunError
from dct_qwen2vl.training.lora import LoRA, merge
from dct_qwen2vl.training.megatron_weights import hf_tensors, source_of, write_hf

WEIGHTS = "weights"  # NeMo's folder in a checkpoint
MODEL = "module."  # what names of weights begin with; those of the optimizer's state do not


def damage_of_weights(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by their sizes. None for whole ones."""
    try:
        metadata = FileSystemReader(checkpoint / WEIGHTS).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError):
        return f"{WEIGHTS}/.metadata is missing or cut short"
    for part in metadata.storage_data.values():
        file = checkpoint / WEIGHTS / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            return f"{WEIGHTS}/{file.name} is missing or cut short"
    return None


def export_checkpoint(
    checkpoint: Path,
    model_dir: Path,
    output_dir: Path,
    lora: LoRA | None,
    edit: Callable[[Path], None] | None = None,
) -> None:
    """Writes the model of a checkpoint with the weights that the end of a run at that step writes.

    checkpoint: Folder of the checkpoint.
    model_dir: The initial model. All files but the weights are copied from it.
    output_dir: The directory to write, with one safetensors file.
    lora: The adapters of the run. They are merged.
    edit: Called with the directory before it gets its name.
    """
    hf_config = Qwen2VLConfig.from_pretrained(model_dir)
    parameters = dict(of_each_layer(read_weights(checkpoint)))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in parameters.items():
        if ".adapter." in name:
            continue
        adapter = f"{name.removesuffix('.weight')}.adapter"
        if f"{adapter}.linear_in.weight" in parameters:
            a, b = (parameters[f"{adapter}.linear_{part}.weight"] for part in ("in", "out"))
            weight = merge(weight, a, b, lora.alpha / lora.rank)
        tensors.update(hf_tensors(source_of(name, hf_config), [weight], hf_config))
    write_hf(tensors, model_dir, output_dir, edit)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in the checkpoint. The optimizer's are not read. Raises RunError."""
    reader = FileSystemReader(checkpoint / WEIGHTS)
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(MODEL) and isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # not initialized: there is one process
        try:
            torch.distributed.checkpoint.load(tensors, storage_reader=reader)
        except CheckpointException as error:  # which is no Exception
            raise RunError(f"{checkpoint} is damaged (its weights cannot be read): export another step") from error
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def of_each_layer(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the model by their names: "decoder.layers.mlp" of all layers is "decoder.layers.0.mlp", ..."""
    for name, tensor in tensors.items():
        before, layers, after = name.partition(".layers.")
        if layers:
            yield from ((f"{before}.layers.{number}.{after}", part) for number, part in enumerate(tensor))
        else:
            yield name, tensor
