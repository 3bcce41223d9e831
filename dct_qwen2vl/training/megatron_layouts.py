"""The weights of a Megatron model that tensor-parallel processes and pipeline stages share: from a Hugging Face
directory into it, and back to one."""

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state

from dct_qwen2vl.checkpoints.hf_folder import copy_all_but_weights
from dct_qwen2vl.common.files import unnamed
from dct_qwen2vl.training.megatron_lora import merged_megatron
from dct_qwen2vl.training.megatron_weights import (
    complete,
    hf_tensors,
    open_tensors,
    sources_of,
    to_megatron,
    write_tensors,
)


def load_hf(model, hf_config, model_dir: Path) -> None:
    """Fills this process's part of the model, in its data type.

    model: `PackedQwen2VL`.
    hf_config: transformers' Qwen2VLConfig.
    model_dir: Hugging Face directory.

    Raises KeyError for a missing tensor, and ValueError for a tensor of another shape.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    read = open_tensors(model_dir)
    sources = sources_of(model, hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = sources[name]
            value = to_megatron(source, [read(part) for part in source.names], rank, size)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{model_dir}: {', '.join(source.names)} makes {tuple(value.shape)}, the model has "
                    f"{tuple(parameter.shape)} for {name}: is config.json of these weights?"
                )
            parameter.copy_(value)


def gather_hf(model, hf_config) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of this process's pipeline stage, adapters merged, on the CPU. Collective over
    tensor-parallel processes; {} on all but the first of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    tensors: dict[str, torch.Tensor] = {}
    for name, source in sources_of(model, hf_config).items():
        value = merged_megatron(model, name)
        parts = [value]
        if size > 1 and source.axis is not None:
            parts = [torch.empty_like(value) for _ in range(size)]
            torch.distributed.all_gather(parts, value.contiguous(), group=group)
        if not rank:
            tensors.update(hf_tensors(source, parts, hf_config))
    return tensors


def save_hf(model, hf_config, model_dir: Path, output_dir: Path, edit: Callable[[Path], None] | None = None) -> None:
    """Writes a complete Hugging Face directory, or nothing. Collective over all processes.

    model: `PackedQwen2VL`.
    hf_config: transformers' Qwen2VLConfig.
    model_dir: Hugging Face directory. All files but the weights are copied from it.
    output_dir: The directory to write. One safetensors file for each pipeline stage.
    edit: Called with the folder before it gets its name.
    """
    temporary = unnamed(output_dir)
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    first = torch.distributed.get_rank() == 0
    if first:
        copy_all_but_weights(model_dir, temporary)
    torch.distributed.barrier()
    tensors = gather_hf(model, hf_config)
    if tensors and parallel_state.get_data_parallel_rank() == 0:
        if stage and hf_config.tie_word_embeddings:
            tensors.pop("model.embed_tokens.weight", None)  # the first stage's, which is the same
        write_tensors(tensors, temporary, stage, stages)
    torch.distributed.barrier()
    if first:
        complete(temporary, output_dir, edit)
    torch.distributed.barrier()
