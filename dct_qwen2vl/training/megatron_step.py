"""A step of the Megatron engine, so that the host waits for the device once: for the gradient's norm.

A wait lets the device run out of work: it has nothing to do until the host has launched the next kernels. Megatron-core
0.13.1 waits for the count of tokens three times, twice for the norm, and once to clip. Results are the same, bit for
bit.
"""

from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import clip_grads
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from dct_qwen2vl.data.packing import PackedBatch


class DeviceCopies:
    """Copies packed sequences to the device in a stream of their own, while it computes the one before."""

    def __init__(self) -> None:
        self._before: torch.cuda.Event | None = None  # where the device comes to the sequence before

    def __call__(self, sequence: PackedBatch) -> PackedBatch:
        """The sequence on the device. The host waits until the one before is being computed: further ahead, more of
        them would take memory, and nothing would be faster."""
        if not torch.cuda.is_available():
            return sequence.to("cuda")  # the tests have a stand-in
        compute = torch.cuda.current_stream()
        if self._before:
            self._before.synchronize()
        self._before = compute.record_event()
        with torch.cuda.stream(self._stream):
            copied = sequence.to("cuda")
        compute.wait_stream(self._stream)
        for value in vars(copied).values():
            if isinstance(value, torch.Tensor):
                value.record_stream(compute)  # its memory is not given away before
        return copied

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Made on first use, when the process has its device."""
        return torch.cuda.Stream()


def average_gradients(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> None:
    """Sums the gradients of a step over the processes, and divides them by its learned tokens. Collective.

    chunks: in Megatron's DDP.
    tokens: int32 scalar on the device. Learned tokens of this process; in the last pipeline stage if there are several.
        Afterwards of all processes.
    """
    finalize_model_grads(chunks)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(tokens, last, parallel_state.get_pipeline_model_parallel_group())
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    scale = 1.0 / tokens.clamp(min=1)
    for chunk in chunks:
        chunk.scale_gradients(scale)


class TokenMeanOptimizer(MegatronOptimizerModule):
    """NeMo's optimizer with `average_gradients`."""

    def finalize_model_grads(self, chunks: list[torch.nn.Module], num_tokens: torch.Tensor) -> None:
        """Megatron-core's hook between backward passes and optimizer.

        chunks: As `average_gradients` has them.
        num_tokens: Likewise.
        """
        average_gradients(chunks, num_tokens)


def squared_norm(optimizer: Any) -> torch.Tensor:
    """The square of the gradient's norm over all processes, float32 [1], on the device. Collective.

    optimizer: Megatron-core's ChainedOptimizer, with gradients ready.
    """
    parts = (part.get_main_grads_for_grad_norm() for part in optimizer.chained_optimizers)
    gradients = list(chain.from_iterable(parts))
    square = torch.zeros(1, device="cuda")
    if gradients:
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
        square = norm**2.0
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square


def read_norm(square: torch.Tensor, *others: torch.Tensor) -> tuple[float, list[float]]:
    """The norm, and the values of other tensors of the device, by one wait.

    square: of `squared_norm`.
    others: float32.
    """
    values = torch.cat([square.flatten(), *(other.flatten() for other in others)]).tolist()
    return values[0] ** 0.5, values[1:]


def clip_gradients(optimizer: Any, norm: float, most: float) -> None:
    """Makes the gradient's norm `most` if it is larger. Soon: the device has nothing to do meanwhile.

    optimizer: Megatron-core's ChainedOptimizer, whose own clipping is off.
    norm: over all processes.
    most: 0 for no clipping.
    """
    factor = most / (norm + 1.0e-6)  # as Megatron-core has it
    if 0 < factor < 1:
        weights = chain.from_iterable(part.get_parameters() for part in optimizer.chained_optimizers)
        torch._foreach_mul_([weight.grad for weight in weights if weight.grad is not None], factor)
