"""Stands in for Python in qwen_launch.sh: the gradient of one weight is NaN in step FAULT_STEP on the last process.

    FAULT_STEP=4 PYTHON=faulty_python PYTHON_EXEC=faulty_python bash qwen_launch.sh

where `faulty_python` is a script that runs this file (`write_interpreter`). All losses of that step are finite.
"""

import os
import sys
from pathlib import Path

SCRIPT = "finetune_qwen2vl.py"


def write_interpreter(folder: Path) -> Path:
    """A program that takes python's arguments; for PYTHON and PYTHON_EXEC."""
    program = folder / "faulty_python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    program.chmod(0o755)
    return program


def break_gradient(module_class: type, step: int) -> None:
    """Before it is reduced over processes, as a gradient that overflows would be."""
    import torch

    begin = module_class.on_train_start

    def on_train_start(module) -> None:
        begin(module)
        if module.trainer.global_rank != module.trainer.world_size - 1:
            return
        norm = next(parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim == 1)
        norm.register_hook(lambda g: torch.full_like(g, torch.nan) if module.trainer.global_step + 1 == step else g)

    module_class.on_train_start = on_train_start


def fine_tune(arguments: list[str]) -> int:
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    import finetune_qwen2vl

    if "--check" not in arguments:
        if "megatron" in arguments:
            from dct_qwen2vl.training.megatron import QwenMegatronModel as Model
        else:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            from dct_qwen2vl.training.automodel import QwenAutoModel as Model

        break_gradient(Model, int(os.environ["FAULT_STEP"]))
    return finetune_qwen2vl.main(arguments)


if __name__ == "__main__":
    if SCRIPT in sys.argv[1:3]:  # after -u, from torchrun
        sys.exit(fine_tune(sys.argv[sys.argv.index(SCRIPT) + 1 :]))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
