"""The gradient of one step of the automodel engine: by micro-batches of one process, or as one process of several.

    torchrun --nproc-per-node 2 tests/gradient_process.py MODEL_DIR OUTPUT_DIR

writes OUTPUT_DIR/MICRO_BATCHES.pt for two and for four micro-batches of the same four samples, shared by the processes.
"""

import sys
from pathlib import Path

ANSWERS = (
    "a",
    "b",
    "c",
    "a red circle, a blue square",
)  # the last one has more tokens to learn than the others together


def gradient_of_a_step(model_dir: Path, folder: Path, per_micro_batch: int, processes: int = 1, rank: int = 0):
    """float32 [weights]: what the optimizer gets. per_micro_batch: samples of one."""
    import torch
    from lightning.pytorch import Trainer
    from samples_by_hand import answer, conversation_sample
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from dct_qwen2vl.training.automodel import QwenAutoModel, build_strategy
    from dct_qwen2vl.training.config import TrainingConfig
    from dct_qwen2vl.training.log import StepGuard
    from task_encoder import QwenTaskEncoder

    class Recorded(QwenAutoModel):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def configure_gradient_clipping(self, *arguments, **options) -> None:
            super().configure_gradient_clipping(*arguments, **options)
            self.recorded = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])

    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(model_dir), DCTImageProcessor.from_pretrained(model_dir))
    samples = [encoder.encode(conversation_sample(answer("What is there?", text))) for text in ANSWERS]
    starts = range(rank * per_micro_batch, len(samples), per_micro_batch * processes)
    micro_batches = [encoder.batch(samples[start : start + per_micro_batch]) for start in starts]
    module = Recorded(model_dir, max_gradient_norm=0, guard=StepGuard(folder / "refused.json"))
    config = TrainingConfig(model_dir=model_dir, data_dir=folder, devices=processes)
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy=build_strategy(config), max_steps=1, logger=False,
        accumulate_grad_batches=len(micro_batches), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=DataLoader(micro_batches, batch_size=None))
    return module.recorded


def main() -> None:
    import os

    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from dct_qwen2vl.common.imports import importing

    with importing():
        import torch

        import dct_qwen2vl.training.automodel  # noqa: F401

    model_dir, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    for per_micro_batch in (2, 1):
        gradient = gradient_of_a_step(model_dir, folder, per_micro_batch, int(os.environ["WORLD_SIZE"]), rank)
        if rank == 0:
            torch.save(gradient, folder / f"{len(ANSWERS) // per_micro_batch}.pt")


if __name__ == "__main__":
    main()
