"""FSDP2 (arXiv 2304.11277) for the `automodel` engine: each process keeps a share of weights, gradients and moments.

A unit of the model is gathered when it computes and dropped after it. Units are the decoder layers, the blocks of the
vision tower, and the rest. Checkpoints hold whole tensors, as those of the other strategies do.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dct_qwen2vl.data.media_embedding import embed_media


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Leaves this process its share of a model. Collective.

    model: Qwen2VLForConditionalGeneration or Qwen2.5-VL's. Changed in place.
    mesh: The processes that share it.
    """
    name = type(model).__name__
    for unit in (*model.model.layers, *model.visual.blocks):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    type(model).__name__ = name  # it now derives from the model's class; save_pretrained writes the name to config.json
    model.register_forward_pre_hook(embed_first, with_kwargs=True)


def embed_first(model: torch.nn.Module, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook. All processes call the tower once, before the language model, whatever media they have.

    The model's own forward pass calls it once for images and once for videos, and not at all for text.
    """
    return arguments, embed_media(model, inputs)


def gradient_of_ones(mesh: DeviceMesh) -> float:
    """What FSDP2 makes of gradients of 1 in every process: 1 where it averages, the number of processes where it sums.
    NCCL averages. Gloo, as of PyTorch 2.7, sums where it is told to average. Collective."""
    probe = torch.nn.Linear(1, mesh.size(), bias=False, device=mesh.device_type)
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, device=mesh.device_type)).sum().backward()
    return float(probe.weight.grad.to_local())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor; another as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state with its sharded tensors whole, in host memory, on the first process; the others get {}. Collective.

    state: of a model or optimizer. A tensor that has two names in it (tied weights) stays one tensor.
    """
    first = torch.distributed.get_rank() == 0
    seen: dict[int, torch.Tensor] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in seen:
            full = value.detach().full_tensor()
            seen[id(value)] = full.cpu() if first else None
        return seen[id(value)]

    everything = pytree.tree_map(gather, state)
    return everything if first else {}


def share_of(tensor: Any, like: torch.Tensor) -> Any:
    """This process's share of a whole tensor, sharded as `like` is. What is not as large as `like` stays as it is."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or getattr(tensor, "shape", None) != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, but the run's CheckpointIO reads and writes its checkpoints, in the order that DDP has: a model is
    restored before the callbacks start."""

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collective. Empty in all processes but the first."""
        return gathered(dict(self.lightning_module.state_dict(keep_vars=True)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {name: share_of(tensor, own.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collective. Empty in all processes but the first."""
        return gathered(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {name: share_of(value, parameters[index]) for name, value in moments.items()}
                for index, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As in Lightning, without gathering: `whole` has done it."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path)
