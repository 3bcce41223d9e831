"""The device's memory, for training and evaluation."""

import gc

import torch


def free_memory() -> None:
    """Gives back what nothing refers to any more: a model that was used, or what a failed pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
