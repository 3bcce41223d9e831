"""What the automodel engine trains, as a Hugging Face directory: float32 in a checkpoint, at the end of a run the data
types of the initial model."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from dct_qwen2vl.checkpoints.hf_folder import copy_all_but_weights, give_name
from dct_qwen2vl.checkpoints.inspection import open_tensors, read_json, safetensors_files
from dct_qwen2vl.common.files import unnamed, write_json

# As safetensors names them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_model(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    model_dir: Path,
    output_dir: Path,
    dtypes: dict[str, torch.dtype] | None = None,
    edit: Callable[[Path], None] | None = None,
) -> None:
    """Writes a complete Hugging Face directory, or nothing.

    model: Says the configuration.
    weights: Of the model, without adapters.
    model_dir: Hugging Face directory. All other files are copied from it.
    output_dir: The directory to write.
    dtypes: Of the weights in the file. None: as they are.
    edit: Called with the folder before it gets the weights.
    """
    temporary = unnamed(output_dir)
    copy_all_but_weights(model_dir, temporary)
    if edit:
        edit(temporary)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # the embedding, which has another name
    if dtypes:
        weights = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in weights.items()}
    model.save_pretrained(temporary, state_dict=weights)
    if dtypes:
        write_dtype(temporary, dtypes)
    give_name(temporary, output_dir)


def export_checkpoint(checkpoint: Path, model_dir: Path, output_dir: Path) -> None:
    """Writes the model of a checkpoint as the end of a run at that step does. Its adapters are merged already.

    checkpoint: Folder of the checkpoint.
    model_dir: The initial model, for its data types.
    output_dir: The directory to write.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint / "hf", torch_dtype=torch.float32)
    write_model(model, model.state_dict(), checkpoint / "hf", output_dir, dtypes_of(model_dir))


def dtypes_of(model_dir: Path) -> dict[str, torch.dtype]:
    """The data type of every tensor of a Hugging Face directory, by name."""
    tensors = open_tensors(safetensors_files(model_dir), "pt")
    return {name: DTYPES[file.get_slice(name).get_dtype()] for name, file in tensors}


def write_dtype(folder: Path, dtypes: dict[str, torch.dtype]) -> None:
    """config.json names the data type that most tensors have."""
    path = folder / "config.json"
    ((dtype, _),) = Counter(dtypes.values()).most_common(1)
    write_json(path, {**read_json(path), "torch_dtype": str(dtype).removeprefix("torch.")})
