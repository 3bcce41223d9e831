"""Counts what is right.

Letters used for shapes: B samples, S tokens of their answers that may count.
"""

import torch

from benchmarks.quality.tasks.cells import NOT_SCORED


def share(right: torch.Tensor, counts: torch.Tensor) -> float:
    """Of what counts, how much is right; both bool [B, S]."""
    return right[counts].float().mean().item()


def accuracies(right: torch.Tensor, level: torch.Tensor, hard: tuple[int, ...]) -> dict[str, float]:
    """Over all that counts, and over the hard levels. right: bool [B, S]; level: int64 [B, S]."""
    is_hard = torch.isin(level, torch.tensor(hard))
    return {"accuracy": share(right, level != NOT_SCORED), "hard_accuracy": share(right, is_hard)}


def by_level(right: torch.Tensor, level: torch.Tensor) -> dict[str, list[int]]:
    """{level: [right, all]} over what counts."""
    return {
        str(value): [int(right[level == value].sum()), int((level == value).sum())]
        for value in sorted(set(level.flatten().tolist()) - {NOT_SCORED})
    }


def by_image(right: torch.Tensor, level: torch.Tensor, hard: tuple[int, ...]) -> dict[str, list[int]]:
    """For paired tests, for each test sample: tokens that are right, of how many; the same of the hard levels."""
    counts, is_hard = level != NOT_SCORED, torch.isin(level, torch.tensor(hard))
    return {
        "right": (right & counts).sum(1).tolist(),
        "all": counts.sum(1).tolist(),
        "hard_right": (right & is_hard).sum(1).tolist(),
        "hard_all": is_hard.sum(1).tolist(),
    }
