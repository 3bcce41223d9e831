"""One process of several that validate: prints the keys of its micro-batches.

    torchrun --nproc-per-node 3 tests/validation_process.py MODEL_DIR '[["DATA_DIR", {"num_workers": 2}], ...]'

Each case is validated twice. The last line is JSON: keys by process, case, validation and micro-batch.
"""

import json
import sys
from pathlib import Path


def data_module(model_dir: Path, data_dir: Path, rank: int = 0, world_size: int = 1, **options):
    """An `EnergonDataModule` of text-only samples. options: its own; pack_tokens and packing_buffer_size to pack."""
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from transformers import AutoTokenizer

    from dct_qwen2vl.data.loader import EnergonDataModule
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import PackingTaskEncoder, QwenTaskEncoder

    tools = AutoTokenizer.from_pretrained(model_dir), DCTImageProcessor.from_pretrained(model_dir)
    pack_tokens = options.pop("pack_tokens", None)
    if pack_tokens is None:
        encoder = QwenTaskEncoder(*tools)
    else:
        encoder = PackingTaskEncoder(*tools, pack_tokens=pack_tokens, pack_vision_tokens=2 * pack_tokens)
    numbers = {"micro_batch_size": 1, "global_batch_size": 8, "total_batches": 100, "num_workers": 2, "seed": 1}
    return EnergonDataModule(data_dir, encoder, rank=rank, world_size=world_size, **{**numbers, **options})


def main() -> None:
    model_dir, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    from dct_qwen2vl.common.imports import importing

    with importing():
        import torch.distributed

        import task_encoder  # noqa: F401

    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    steps = []
    for data_dir, options in cases:
        loader = data_module(model_dir, Path(data_dir), rank, world_size, **options).val_dataloader()
        steps.append([[batch.keys for batch in loader] for _ in range(2)])
    gathered = [None] * world_size
    torch.distributed.all_gather_object(gathered, steps)
    if rank == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    main()
