"""One process of two that train tiny models under DDP and under FSDP2, and go on from each other's checkpoints.

    torchrun --nproc-per-node 2 tests/sharding_process.py QWEN2_VL QWEN2_5_VL OUTPUT_DIR

One process has an image and a video where the other has text only, and the reverse. OUTPUT_DIR/CASE/RUN holds the
checkpoints of a run, OUTPUT_DIR/figures.json what each process has seen of it: {case: {run: [of process 0, of 1]}}.
"""

import json
import os
import sys
from pathlib import Path

STEPS, MIDDLE = 4, 2
CASES = {
    "weights": (0, []),
    "qwen2_5": (1, []),
    "adapters": (0, ["--lora-rank", "4", "--freeze", "projector"]),
    "language": (0, ["--freeze", "vision", "projector"]),
    "vision": (0, ["--freeze", "language"]),
    "skipping": (0, ["--skip-db", "30"]),
    "skipping_2_5": (1, ["--skip-db", "30"]),
}
# How each goes on from the middle of another, or from the start.
RUNS = {
    "ddp": ("none", None),
    "sharded": ("fsdp2", None),
    "sharded_again": ("fsdp2", "sharded"),
    "sharded_to_ddp": ("none", "sharded"),
    "ddp_to_sharded": ("fsdp2", "ddp"),
}


def micro_batches(model_dir: Path, rank: int, skip_db: float | None = None) -> list:
    """Two of a step, different in each process. With skip_db, some cells of images and videos have no token."""
    from media_files import encode, quadrants, video_file
    from samples_by_hand import answer, conversation_sample
    from transformers import AutoTokenizer

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import QwenTaskEncoder

    processor = DCTImageProcessor.from_pretrained(model_dir, skip_db=skip_db)
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(model_dir), processor)
    image, video = encode(quadrants("rgbw", 112, 224), "PNG"), video_file(equal=12 if skip_db else 1)
    text_only = conversation_sample(answer("How many squares are there?", "There are three squares."))
    both = answer("<image>\n<video>\nWhat colour is the circle?", "The circle is red.")
    with_media = [
        conversation_sample(both, ("image", image), ("video", video)),
        conversation_sample(answer("<image>\nWhat is there?", "two red"), ("image", image)),
    ]
    samples = [[with_media[0]], [text_only]] if rank == 0 else [[text_only], [with_media[1], text_only]]
    return [encoder.batch([encoder.encode(sample) for sample in of_batch]) for of_batch in samples]


def train(model_dir: Path, folder: Path, typed: list[str], checkpoint: Path | None) -> dict:
    """The figures of a run in this process, from the automodel engine's own parts."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import DataLoader

    from dct_qwen2vl.training.automodel import QwenAutoModel, build_optimizer, build_trainer
    from dct_qwen2vl.training.config import parse_arguments
    from dct_qwen2vl.training.log import StepGuard
    from dct_qwen2vl.training.lora import LoRA
    from dct_qwen2vl.training.run_folder import step_checkpoints

    class Figures(Callback):
        def __init__(self) -> None:
            self.losses, self.norms, self.validations = [], [], []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            self.losses.append(float(outputs["loss_sum"]))
            if trainer.global_step > len(self.norms) + begun:
                self.norms.append(module.gradient_norm)

        def on_validation_end(self, trainer, module) -> None:
            self.validations.append(module.validation.loss)

    numbers = {"devices": 2, "max-steps": STEPS, "global-batch-size": 4, "lr": 1e-3, "warmup-steps": 1}
    intervals = {"save-interval": MIDDLE, "val-interval": MIDDLE}
    folders = {"model-dir": model_dir, "data-dir": folder, "output-dir": folder.parent, "experiment-name": folder.name}
    words = [word for name, value in {**numbers, **intervals, **folders}.items() for word in (f"--{name}", str(value))]
    config = parse_arguments([*words, *typed]).resolved("automodel", "32")
    begun = MIDDLE if checkpoint else 0
    figures = Figures()
    module = QwenAutoModel(
        model_dir, config.freeze, config.max_gradient_norm, lora=LoRA.of(config), guard=StepGuard(folder / "refused")
    )
    build_optimizer(config).connect(module)
    trainer = build_trainer(config, module, [figures, *step_checkpoints(config, lambda: None)], validates=True)
    batches = micro_batches(model_dir, trainer.global_rank, config.skip_db)
    loaders = [DataLoader(batches * STEPS, batch_size=None), DataLoader(batches, batch_size=None)]
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    seen = {name: getattr(figures, name) for name in ("losses", "norms", "validations")}
    return {**seen, **count_numbers(module, trainer)}


def count_numbers(module, trainer) -> dict[str, int]:
    """How many numbers this process holds, and how many they are in all."""
    from torch.distributed.tensor import DTensor

    def held(tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()

    weights = list(module.parameters())
    states = trainer.optimizers[0].state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": sum(map(held, weights)),
        "weights_in_all": sum(weight.numel() for weight in weights),
        "moments": sum(map(held, moments)),
        "moments_in_all": sum(moment.numel() for moment in moments),
    }


def main() -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from dct_qwen2vl.common.imports import importing

    with importing():
        import torch.distributed

        import dct_qwen2vl.training.automodel  # noqa: F401

    models, output = [Path(word) for word in sys.argv[1:3]], Path(sys.argv[3])
    rank, found = int(os.environ["RANK"]), {}
    for case, (model, typed) in CASES.items():
        found[case] = {}
        for name, (sharding, source) in RUNS.items():
            checkpoint = output / case / source / "checkpoints" / f"step{MIDDLE:06d}" if source else None
            words = [*typed, "--sharding", sharding]
            figures = [None, None]
            mine = train(models[model], output / case / name, words, checkpoint)
            torch.distributed.all_gather_object(figures, mine)
            found[case][name] = figures
    if rank == 0:
        (output / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
