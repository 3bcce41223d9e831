"""A full packed sequence, run through model and back before the first step: does the chosen size fit the device?

The size comes from memory.py. Where the device's memory is full all the same, a smaller sequence is tried.
No weight changes, and the loader begins afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback

from dct_qwen2vl.data.device_memory import free_memory
from dct_qwen2vl.data.packing import PackedBatch, pack
from dct_qwen2vl.data.positions import mrope_positions
from dct_qwen2vl.data.samples import IGNORE_INDEX, EncodedSample
from dct_qwen2vl.training.config import ModelInfo, RunError, TrainingConfig
from dct_qwen2vl.training.memory import GIB, GRAIN, MEASURED, Training, stages, tower_widths
from dct_qwen2vl.training.run_file import write_run_file
from dct_qwen2vl.training.sequence_size import advice

SHRINK = 0.9  # of the chosen budgets, where the memory was full
SIZES = ("pack_tokens", "pack_vision_tokens")
Budget = tuple[int, int]  # most tokens, most vision tokens of a packed sequence


def shrunk(budget: Budget, chosen: tuple[str, ...] = SIZES) -> Budget:
    """The next smaller budget, in whole GRAINs. chosen: of SIZES, the others are given and stay."""
    tokens, vision_tokens = (
        int(size * SHRINK) // GRAIN * GRAIN if name in chosen else size for name, size in zip(SIZES, budget)
    )
    return tokens, vision_tokens


def settle(
    fits: Callable[[Budget], bool], budget: Budget, least: int, chosen: tuple[str, ...], tell: Callable[[str], None]
) -> Budget | None:
    """The first budget that fits, of this one and smaller ones. None where one under `least` tokens would be needed.

    fits: whether a budget does.
    budget: the first that is tried.
    least: tokens of the longest sample.
    chosen: as `shrunk` has it.
    tell: gets a line for each budget that does not fit.
    """
    while budget[0] >= max(least, GRAIN) and budget[1]:
        if fits(budget):
            return budget
        tell(f"The device's memory is full at a packed sequence of {budget[0]} tokens, {budget[1]} vision tokens")
        budget = shrunk(budget, chosen)
    return None


def full_sequence(config: Any, budget: Budget, seq_length: int, dtype: torch.dtype = torch.bfloat16) -> PackedBatch:
    """A packed sequence that fills both budgets: samples of one length, one image each, all other tokens learned.

    config: Qwen2VLConfig.
    budget: tokens, vision tokens.
    seq_length: most tokens of a sample.
    dtype: of the vision tokens.
    """
    tokens, vision_tokens = budget
    merge = config.vision_config.spatial_merge_size
    count = -(-tokens // seq_length)
    lengths = _shares(tokens, count)
    cells = _shares(min(tokens - count, vision_tokens // merge**2), count)
    *_, width = tower_widths(config.vision_config)
    samples = [_sample(config, *sizes, merge, width) for sizes in zip(lengths, cells)]
    return pack(samples, merge, width, dtype, (config.image_token_id, config.video_token_id))


def _shares(total: int, count: int) -> list[int]:
    """`count` whole numbers that differ by one at most."""
    return [stop - start for start, stop in pairwise(total * number // count for number in range(count + 1))]


def _sample(config: Any, length: int, cells: int, merge: int, width: int) -> EncodedSample:
    """length: tokens, the first `cells` of them visual."""
    text = length - cells
    ids = torch.tensor([config.image_token_id] * cells + [0] * text)
    labels = torch.tensor([IGNORE_INDEX] * cells + [0] * text)
    runs = [*([(1, 1, cells)] if cells else []), *([text] if text else [])]
    grids = torch.tensor([[1, merge, merge * cells]] if cells else [], dtype=torch.int64).reshape(-1, 3)
    none = torch.zeros(0, 3, dtype=torch.int64)
    return EncodedSample(
        __key__="full", __restore_key__=(), __subflavor__=None, __subflavors__={},
        input_ids=ids, labels=labels, position_ids=torch.from_numpy(mrope_positions(runs)),
        pixel_values=torch.zeros(merge**2 * cells, width), image_grid_thw=grids,
        pixel_values_videos=torch.zeros(0, width), video_grid_thw=none,
    )  # fmt: skip


class TryFullSequence(Callback):
    """Runs a full packed sequence before the first step, where the run has chosen its size itself.

    data: whose task encoder packs; its budget becomes the one that fits.
    log: gets the same budget.
    """

    def __init__(self, config: TrainingConfig, info: ModelInfo, data: Any, log: Any) -> None:
        self.config = config
        self.info = info
        self.data = data
        self.training_log = log  # Lightning puts a method of its own under `log`

    def on_fit_start(self, trainer, pl_module) -> None:
        """Collective. Raises RunError, in every process."""
        chosen = self.config.chosen_sizes
        if not chosen:
            return
        if self.config.pipeline_parallel > 1:
            self._tell("The full packed sequence was not tried: --pipeline-parallel has several of them in memory")
            return
        (chunk,) = trainer.strategy.model
        wanted = (self.config.pack_tokens, self.config.pack_vision_tokens)
        found = settle(lambda budget: self._fits(chunk, pl_module, budget), wanted, self._least(), chosen, self._tell)
        if found is None:
            error = RunError(f"the device's memory is full at the smallest packed sequence: {advice(self.config)}")
            error.told = self.config.rank > 0
            raise error
        self._take(found)

    def _least(self) -> int:
        """Tensor-parallel processes wait for each other inside a pass: if one fails, no second pass is possible."""
        return self.config.pack_tokens if self.config.tensor_parallel > 1 else self.config.seq_length

    def _fits(self, chunk: torch.nn.Module, pl_module: Any, budget: Budget) -> bool:
        """Collective: whether the memory of every process has room."""
        sequence = full_sequence(pl_module.hf_config, budget, self.config.seq_length)
        fitted = try_pass(chunk, sequence, self._later_bytes(pl_module.hf_config))
        free_memory()
        if not in_all(fitted is not None):
            return False
        taken = f", which takes {fitted / GIB:.1f} GiB," if fitted else ""
        self._tell(f"A full packed sequence{taken} fits: {budget[0]} tokens, {budget[1]} vision tokens")
        return True

    def _later_bytes(self, hf_config: Any) -> int:
        """What model and optimizer will take and do not take yet, and the reserve."""
        (stage,) = stages(hf_config, Training.of(self.config))
        there = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        return max(0, int(stage.fixed) - there) + MEASURED.reserve

    def _take(self, budget: Budget) -> None:
        """For the loader, which has not begun, the log, and the run when it goes on."""
        self.data.task_encoder.budget = self.training_log.budget = budget
        if self.config.rank == 0:
            write_run_file(replace(self.config, **dict(zip(SIZES, budget))), self.info)

    def _tell(self, line: str) -> None:
        if self.config.rank == 0:
            print(line, flush=True)


def try_pass(chunk: torch.nn.Module, sequence: PackedBatch, later: int = 0) -> int | None:
    """Forward and backward pass without a step. Returns the most bytes in use, 0 on a CPU; None where memory is full.

    chunk: the model in Megatron's DDP.
    later: bytes that are taken meanwhile, in place of what comes later, and counted but for the reserve.
    """
    has_device = torch.cuda.is_available()
    if has_device:
        torch.cuda.reset_peak_memory_stats()
    try:
        with held_back(later), by_itself(chunk):
            chunk(sequence.to("cuda")).float().sum().backward()
        most = torch.cuda.max_memory_allocated() - MEASURED.reserve if has_device else 0
    except torch.OutOfMemoryError:
        most = None
    chunk.zero_grad_buffer()
    if has_device:
        torch.cuda.reset_peak_memory_stats()
    return most


@contextmanager
def held_back(size: int) -> Iterator[None]:
    """So many bytes of the device are taken inside the block."""
    held = torch.empty(size, dtype=torch.uint8, device="cuda") if torch.cuda.is_available() else None
    yield
    del held


@contextmanager
def by_itself(chunk: torch.nn.Module) -> Iterator[None]:
    """Inside the block Megatron's DDP exchanges neither gradients nor weights: a process may fail alone."""
    fetches = chunk.ddp_config.use_distributed_optimizer and chunk.ddp_config.overlap_param_gather
    if fetches:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        with chunk.no_sync():
            yield
    finally:
        if fetches:
            chunk.enable_forward_pre_hook()


def in_all(value: bool) -> bool:
    """Whether it is true in every process. Collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([int(value)], device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)
