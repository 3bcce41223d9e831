"""Energon's loader as a Lightning data module: the same for every engine.

Exact resume: the state of the loader is saved with every checkpoint and names the batches that training has consumed,
not those that were read ahead. A restore that does not fit raises; it is never a warning.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.utilities import rank_zero_only
from megatron.energon import (
    SavableDataLoader,
    SavableDataset,
    TaskEncoder,
    WorkerConfig,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
)
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetMergedState, SavableDatasetWrapper
from torch.utils.data import DataLoader

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.energon_files import count_samples, read_splits
from dct_qwen2vl.data.samples import DATASET_OPTIONS, QwenBatch


class LoaderStateError(UserError):
    """A saved state of the loader cannot be restored. The message is one line: what, where, what to type next."""


class CountedLoader:
    """An endless Energon loader with a length, and the time that training waited for it.

    Without a length Lightning reads one batch ahead, and the saved state would be one batch too far.
    """

    def __init__(self, loader: SavableDataLoader, batches: int) -> None:
        self.loader = loader
        self.batches = batches
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - start
            yield batch


class ValidationLoader:
    """The micro-batches of a split in order, each once, in the same number of steps on every process.

    dataset: Energon's dataset of this process's micro-batches.
    most: Micro-batches of all processes together. None: all there are.
    blank: A micro-batch without samples. A process gets it while others still have some of their own.
    group: Processes that validate together. None: all.

    Each validation makes a loader of its own: a loader that was not read to its end would continue from there. This
    class has no length, because Energon's is an estimate and Lightning would stop there.
    """

    def __init__(self, dataset: SavableDataset, most: int | None, blank: Any, group: Any = None) -> None:
        self.dataset = dataset
        self.most = most
        self.blank = blank
        self.group = group

    def __iter__(self) -> Iterator[Any]:
        _hide_objects_from_loader_processes()
        self.dataset.restore_state(None)  # without loader processes it is where the last validation has left it
        loader = get_loader(self.dataset)
        try:
            yield from self._in_step(iter(loader))
        finally:
            end_loader_processes(loader)

    def _in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Collective."""
        left = math.inf if self.most is None else self.most
        while left > 0:
            batch = next(batches, None)
            before, total = self._count_over_processes(batch is not None)
            if not total:
                return
            yield batch if batch is not None and before < left else self.blank
            left -= total

    def _count_over_processes(self, has_one: bool) -> tuple[int, int]:
        """How many of the processes before this one, and how many of all, have a micro-batch. Collective."""
        if not torch.distributed.is_initialized():
            return 0, int(has_one)
        device = "cuda" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        flags = torch.zeros(torch.distributed.get_world_size(self.group), dtype=torch.int64, device=device)
        rank = torch.distributed.get_rank(self.group)
        flags[rank] = has_one
        torch.distributed.all_reduce(flags, group=self.group)
        return int(flags[:rank].sum()), int(flags.sum())


class EnergonDataModule(pl.LightningDataModule):
    """Train and validation loaders over a prepared folder of shards.

    path: The folder with `.nv-meta`.
    task_encoder: `task_encoder.QwenTaskEncoder`.
    micro_batch_size: Samples of one forward pass of one process.
    global_batch_size: Samples of one optimizer step.
    total_batches: Micro-batches of one process in the whole run.
    num_workers: Loader processes of one process. 0 loads in the training process.
    rank: Of this process, among processes that train on different samples.
    world_size: How many such processes there are.
    seed: Of shuffling.
    val_batches: Most micro-batches of one validation, over all processes together. None: the whole split.
    shuffle_buffer_size: Samples among which a worker shuffles.
    packing_buffer_size: Samples among which a worker chooses those of a packed sequence, which is a micro-batch. The
        task encoder is then a `PackingTaskEncoder`. None: a micro-batch is `micro_batch_size` samples.
    data_parallel_group: Called before loading. Gives the group of the processes that train on different samples. None:
        all.
    restart_data: Whether a saved state is ignored, so that the data begin from the start.
    restarts: How often the data of the run were begun again. A saved state from before the last time is ignored, too.
    """

    def __init__(
        self,
        path: Path,
        task_encoder: TaskEncoder,
        micro_batch_size: int,
        global_batch_size: int,
        total_batches: int,
        num_workers: int,
        rank: int,
        world_size: int,
        seed: int,
        val_batches: int | None = None,
        shuffle_buffer_size: int = 1000,
        packing_buffer_size: int | None = None,
        data_parallel_group: Callable[[], Any] | None = None,
        restart_data: bool = False,
        restarts: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.task_encoder = task_encoder
        self.tokenizer = task_encoder.tokenizer  # NeMo's entry point reads these three
        self.seq_length = task_encoder.seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.total_batches = total_batches
        self.val_batches = val_batches
        self.shuffle_buffer_size = shuffle_buffer_size
        self.packing_buffer_size = packing_buffer_size
        self.batch_size = 1 if packing_buffer_size else micro_batch_size
        self.worker_config = WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=seed)
        self.train_loader: CountedLoader | None = None
        self.data_parallel_group = data_parallel_group
        self.restart_data = restart_data
        self.restarts = restarts
        self._restored: list | None = None

    def train_dataloader(self) -> CountedLoader:
        """Endless, shuffled, split over processes and workers."""
        self._settle_group()
        _hide_objects_from_loader_processes()
        dataset = get_train_dataset(
            self.path,
            worker_config=self.worker_config,
            batch_size=self.batch_size,
            packing_buffer_size=self.packing_buffer_size,
            shuffle_buffer_size=self.shuffle_buffer_size,
            max_samples_per_sequence=100,
            task_encoder=self.task_encoder,
            **DATASET_OPTIONS,
        )
        loader = get_savable_loader(dataset, checkpoint_every_sec=5, n_checkpoints=4)
        restored, self._restored = self._restored, None
        if restored is not None:
            self._restore(loader, restored)
        make_exact(loader, restored and restored[self.worker_config.rank])
        self.train_loader = CountedLoader(loader, self.total_batches)
        return self.train_loader

    def _restore(self, loader: SavableDataLoader, states: list) -> None:
        """Raises LoaderStateError."""
        try:
            loader.restore_state_global(states)
        except Exception as error:  # Energon has no error of its own for it
            raise LoaderStateError(
                f"the checkpoint does not fit the shards of {self.path} ({type(error).__name__}: {error}), perhaps "
                "because they were prepared again: add --restart-data to begin them from the start"
            ) from error

    @property
    def validates(self) -> bool:
        """Whether there is a sample to validate on."""
        return self._val_samples > 0

    def val_dataloader(self) -> ValidationLoader:
        """The val split once, in order: every sample is seen by exactly one process."""
        self._settle_group()
        encoder = self.task_encoder.for_validation()
        dataset = get_val_dataset(
            self.path,
            worker_config=self.worker_config,
            batch_size=self.packing_buffer_size or self.micro_batch_size,
            task_encoder=encoder,
            **DATASET_OPTIONS,
        )
        group = self.worker_config.data_parallel_group
        return ValidationLoader(dataset, self.val_batches, encoder.blank_batch(), group)

    def transfer_batch_to_device(self, batch: QwenBatch, device: torch.device, dataloader_idx: int) -> QwenBatch:
        """As Lightning does it; the batch of the host is kept beside.

        batch: As the loader gives it.
        device: Where the model is.
        dataloader_idx: As in Lightning.
        """
        return replace(super().transfer_batch_to_device(batch, device, dataloader_idx), on_host=batch)

    def count_left_out(self, samples: int) -> int:
        """How many samples of the val split a validation has missed. 0 if it was to see only a part.

        samples: Samples that it has seen.
        """
        if self.val_batches is not None:
            return 0
        return self._val_samples - samples

    @cached_property
    def _val_samples(self) -> int:
        return count_samples(self.path, read_splits(self.path, ("val",))["val"])

    def _settle_group(self) -> None:
        if self.data_parallel_group:
            self.worker_config.data_parallel_group = self.data_parallel_group()

    def state_dict(self) -> dict[str, Any]:
        """Collective: every process calls it; process 0 gets the states of all that train on different samples."""
        if self.train_loader is None or not self._trains_beside_process_0():
            return {}
        states = self.train_loader.loader.save_state_global(global_dst_rank=0) or []
        return {"energon": states, "restarts": self.restarts}

    def _trains_beside_process_0(self) -> bool:
        """Under tensor or pipeline parallelism several processes train on the same samples; one group of those that
        train on different ones holds process 0, and its states are enough."""
        group = self.worker_config.data_parallel_group
        return group is None or 0 in torch.distributed.get_process_group_ranks(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the loader is built. Raises LoaderStateError where another number of processes made it."""
        if self.restart_data:
            return
        if state_dict.get("restarts", 0) != self.restarts:
            rank_zero_only(print)(
                "The checkpoint was saved before --restart-data: the data begin from the start", flush=True
            )
            return
        states = state_dict["energon"]
        if len(states) != self.worker_config.world_size:
            raise LoaderStateError(
                f"the checkpoint holds loader states of {len(states)} processes, this run has "
                f"{self.worker_config.world_size}: resume with the same number, or add --restart-data"
            )
        self._restored = states


class RestoredFirst(SavableDatasetWrapper):
    """Energon's part of a loader process, which is restored before it says where it is.

    Its thread of commands is started before that (Energon 5.2.0). So a process that begins slowly had no state yet.
    """

    def get_checkpoint(self, last_sample_indexes: list[int]) -> Any:
        if self._restore_from:  # the caller holds the lock in which Energon restores
            self._restore_state(self._restore_from)
            self._restore_from = None
        return super().get_checkpoint(last_sample_indexes)


def make_exact(loader: SavableDataLoader, state: SavableDataLoaderState | None) -> None:
    """Corrects three errors of Energon 5.2.0, so that a loader continues exactly where a state was saved.

    loader: Not started yet.
    state: What this process's loader was restored from. None at the start of a run.

    Energon assumes that each loader process has given a micro-batch before a state is saved, also after a restore.
    Otherwise the state leaves one out, or cannot be saved. It also begins with a wrong process if there are more than
    two (`WorkerConfig.rank_worker_id` subtracts the offset). The third is that of `RestoredFirst`.
    """
    processes = loader.num_workers
    if not processes:
        return
    loader.dataset.__class__ = RestoredFirst
    if state is None:
        loader._worker_sample_counters = [-1] * processes  # numbers of the last micro-batches
        fresh = {name: [None] * processes for name in ("torch_rng", "numpy_rng", "rng")}  # seeded as otherwise
        loader.dataset._restore_from = SavableDatasetMergedState(**fresh, sample_index=[0] * processes)
    else:
        saved = state.dataset_state
        counters = [index + offset - 1 for index, offset in zip(saved.state.sample_index, saved.offset, strict=True)]
        loader._worker_sample_counters = counters
        loader._next_worker_id = state.next_worker_id
        loader.dataset._worker_offset = -state.next_worker_id % processes


def end_loader_processes(loader: DataLoader) -> None:
    """Now: PyTorch has no public name for it, and leaves it to the garbage collector, from which they may be hidden."""
    if hasattr(loader._iterator, "_shutdown_workers"):
        loader._iterator._shutdown_workers()


def _hide_objects_from_loader_processes() -> None:
    """Energon's loader processes look at every object that the collector tracks, and without TransformerEngine NeMo
    leaves some behind on which even isinstance() raises. Frozen objects are out of sight."""
    gc.freeze()


def energon_state_classes() -> list[Any]:
    """What a saved loader state is made of, for torch.load(weights_only=True): Energon's dataclasses, and the path of
    each open shard, which Energon keeps as an fsspec object."""
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.spec import make_instance
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.base_dataset import MergedState, State
    from megatron.energon.flavors.webdataset.structs import ShardInfo, ShardState
    from megatron.energon.rng import SystemRngState

    def subclasses(cls: type) -> list[type]:
        return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]

    states = dict.fromkeys([*subclasses(State), *subclasses(MergedState)])  # diamonds would come twice
    paths = [EPath, PurePosixPath, LocalFileSystem, make_instance]
    return [*states, ShardInfo, ShardState, SystemRngState, *paths]
