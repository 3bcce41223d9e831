"""Stands in for Python in qwen_launch.sh: the gradient of one weight is NaN in step FAULT_STEP on the last process.

All losses of that step are finite. `stand_in_python.write_interpreter` makes the program.
"""

import os

from stand_in_python import run_as_python


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
    run_as_python(fine_tune)
