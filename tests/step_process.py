"""Trains a tiny model on packed sequences by Megatron-core's own step and by the engine's (megatron_step.py).

    python tests/step_process.py

Megatron-core runs on a CPU as tests/megatron_on_cpu.py has it. The last line is JSON, each a pair of theirs and ours:
"losses" of three steps, "norms", and whether all "weights" are equal.
"""

import json
import os
import socket
import sys
from pathlib import Path

TINY = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1,
        "num_key_value_heads": 1}  # fmt: skip
TINY_TOWER = {"depth": 1, "embed_dim": 80, "num_heads": 1, "hidden_size": 128}


def begin() -> None:
    """A process of Megatron's groups on the CPU."""
    import torch
    from megatron.core import parallel_state
    from megatron_on_cpu import replace_device, replace_optimizer

    replace_device()
    replace_optimizer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def main() -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from dct_qwen2vl.common.imports import importing

    with importing():
        import torch
        from megatron_cpu import CPU_OPTIONS, plain_layers

        from benchmarks.speed.samples import make_work, sequences_of
        from benchmarks.speed.training import PackedTraining, Training, packed_forward
        from dct_qwen2vl.training.megatron_model import model_config

    begin()
    config, sequences = sequences_of("x4", make_work("mix", 8, seed=0), (2048, 4096), 0)
    config.update(TINY)
    config.vision_config.update(TINY_TOWER)

    def build(kind: type[Training]) -> Training:
        torch.manual_seed(0)
        model = model_config(config, 16384, torch.bfloat16, plain_layers(), **CPU_OPTIONS).configure_model()
        with torch.no_grad():
            model.language_model.embedding.word_embeddings.weight.mul_(10)  # the gradient is clipped
        return kind(model)

    theirs, ours = build(Training), build(PackedTraining)
    losses, norms = [], []
    for _ in range(3):
        losses.append([float(theirs.step(sequences, packed_forward)), float(ours.step_packed(sequences))])
        norms.append([training.optimizer.get_grad_norm() for training in (theirs, ours)])  # of the clipped gradient
    pairs = zip(theirs.model.parameters(), ours.model.parameters(), strict=True)
    print(json.dumps({"losses": losses, "norms": norms, "weights": all(torch.equal(*pair) for pair in pairs)}))


if __name__ == "__main__":
    main()
