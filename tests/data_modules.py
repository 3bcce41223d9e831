"""Data modules of one process, for tests of what Energon's loader gives."""

from pathlib import Path

from dct_qwen2vl.data.loader import EnergonDataModule
from task_encoder import QwenTaskEncoder

SETTINGS = {"micro_batch_size": 2, "global_batch_size": 2, "total_batches": 100, "rank": 0, "world_size": 1, "seed": 1}


def data_module(path: Path, encoder: QwenTaskEncoder, num_workers: int, **options) -> EnergonDataModule:
    """options: of EnergonDataModule, in place of SETTINGS or beside them."""
    return EnergonDataModule(path, encoder, num_workers=num_workers, **(SETTINGS | options))
