"""The patch embedding that a benchmark folds: a checkpoint's, or a random one of Qwen2-VL's size."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHAPE = (1280, 3, 2, 14, 14)  # of every Qwen2-VL, 2B to 72B


def patch_weight(model_dir: Path | None, seed: int) -> tuple["torch.Tensor", str]:
    """The weight [E, 3, 2, 14, 14] and where it is from, for the output. Raises CheckpointError, OSError.

    Without a checkpoint: independent normal values, as a model has them before training. A trained one prefers low
    frequencies, so what a random one says of high frequencies is too pessimistic.
    """
    import torch

    if model_dir is None:
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * (3 * 2 * 14 * 14) ** -0.5
        return weight, f"RANDOM, seed {seed} (--model-dir takes a checkpoint's)"
    from dct_qwen2vl.checkpoints.conversion import patch_embedding, read_config
    from dct_qwen2vl.checkpoints.source import opened

    read_config(model_dir)
    with opened(model_dir) as source:
        return patch_embedding(source), f"of {model_dir.name}"
