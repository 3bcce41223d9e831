"""Energon's loader as a Lightning data module: the same for every engine.

Exact resume: the state of the loader is saved with every checkpoint and names the batches that training has consumed,
not those that were read ahead. A restore that does not fit raises; it is never a warning.
"""

import gc
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import lightning.pytorch as pl
from megatron.energon import (
    SavableDataLoader,
    WorkerConfig,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
)

from task_encoder import DATASET_OPTIONS, QwenBatch, QwenTaskEncoder


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

    def __iter__(self) -> Iterator[QwenBatch]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - start
            yield batch


class EnergonDataModule(pl.LightningDataModule):
    """Train and validation loaders over a prepared folder of shards.

    path: the folder with `.nv-meta`. total_batches: micro-batches of one process in the whole run. num_workers: loader
    processes of one process; 0 loads in the training process. val_batches: micro-batches of one validation, over all
    processes together at most; None for the whole split.
    """

    def __init__(
        self,
        path: Path,
        task_encoder: QwenTaskEncoder,
        micro_batch_size: int,
        global_batch_size: int,
        total_batches: int,
        num_workers: int,
        rank: int,
        world_size: int,
        seed: int,
        val_batches: int | None = None,
        shuffle_buffer_size: int = 1000,
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
        self.worker_config = WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=seed)
        self.train_loader: CountedLoader | None = None
        self._restored: list | None = None

    def train_dataloader(self) -> CountedLoader:
        """Endless, shuffled, split over processes and workers."""
        # Energon's loader processes look at every object that the collector tracks, and without TransformerEngine
        # NeMo leaves some behind on which even isinstance() raises. Frozen objects are out of sight.
        gc.freeze()
        dataset = get_train_dataset(
            self.path,
            worker_config=self.worker_config,
            batch_size=self.micro_batch_size,
            shuffle_buffer_size=self.shuffle_buffer_size,
            max_samples_per_sequence=100,
            task_encoder=self.task_encoder,
            **DATASET_OPTIONS,
        )
        loader = get_savable_loader(dataset, checkpoint_every_sec=5, n_checkpoints=4)
        if self._restored is not None:
            loader.restore_state_global(self._restored)
            self._restored = None
        self.train_loader = CountedLoader(loader, self.total_batches)
        return self.train_loader

    def val_dataloader(self) -> Any:
        """The val split once, in order, without a partial count: every sample is seen by exactly one process."""
        limit = None
        if self.val_batches is not None:
            limit = max(1, self.val_batches // (self.worker_config.world_size * max(1, self.worker_config.num_workers)))
        dataset = get_val_dataset(
            self.path,
            worker_config=self.worker_config,
            batch_size=self.micro_batch_size,
            task_encoder=self.task_encoder,
            limit=limit,
            **DATASET_OPTIONS,
        )
        return get_loader(dataset)

    def state_dict(self) -> dict[str, Any]:
        """Collective: every process calls it; process 0 gets the states of all."""
        if self.train_loader is None:
            return {}
        return {"energon": self.train_loader.loader.save_state_global(global_dst_rank=0) or []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the loader is built. Raises ValueError where the state was made by another number of processes."""
        states = state_dict["energon"]
        if len(states) != self.worker_config.world_size:
            raise ValueError(
                f"the checkpoint holds loader states of {len(states)} processes, this run has "
                f"{self.worker_config.world_size}: resume with the same number, or start a new experiment"
            )
        self._restored = states


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
