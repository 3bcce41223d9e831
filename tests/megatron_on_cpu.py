"""Stands in for Python in qwen_launch.sh: `finetune_qwen2vl.py --engine megatron` then runs on a CPU.

`stand_in_python.write_interpreter` makes the program. All but a few pieces is the real engine: NeMo's strategy,
Megatron-core's model, gradients, distributed optimizer and checkpoints, tensor, pipeline and data parallelism (over
gloo). Replaced is what has no CPU form: the name of the device, TransformerEngine's layers (by those of
tests/megatron_cpu.py) and its Adam, and the refusal to start. numpy is without `product`, as numpy 2 is.

FAULT_STEP=N: a gradient of step N is NaN (tests/faulty_gradient.py).
ROOM_FOR=N: the memory is full at a packed sequence of more than N tokens.
WAITS=FILE: the file gets the places where the third step would make the host wait for a GPU.
"""

import json
import os
from pathlib import Path

from stand_in_python import run_as_python


def replace_device() -> None:
    """Whoever asks for a CUDA device gets the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def on_cpu(value):
        return cpu if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

    class OnCPU(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.cuda:
                return args[0]
            kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
            result = func(*map(on_cpu, args), **kwargs)
            if func is torch.Tensor.type and isinstance(result, str):
                return result.replace("torch.", "torch.cuda.")  # Megatron's optimizer takes parameters of these only
            return result

    OnCPU().__enter__()
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *device: None


def replace_optimizer() -> None:
    """Megatron-core 0.13.1 takes TransformerEngine's Adam; with PyTorch's it cannot resume."""
    import megatron.core.optimizer
    import torch
    from megatron.core.optimizer import distrib_optimizer

    class Adam(torch.optim.Optimizer):
        """AdamW that counts its steps once for each group of parameters, as TransformerEngine's."""

        def __init__(self, params, lr, betas, eps, weight_decay, **unused) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for parameter in group["params"]:
                    self._update(parameter, **group)

        def _update(self, parameter, step, lr, betas, eps, weight_decay, **unused) -> None:
            state = self.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(parameter))
            state["exp_avg"].lerp_(parameter.grad, 1 - betas[0])
            state["exp_avg_sq"].lerp_(parameter.grad**2, 1 - betas[1])
            mean, square = state["exp_avg"] / (1 - betas[0] ** step), state["exp_avg_sq"] / (1 - betas[1] ** step)
            parameter.mul_(1 - lr * weight_decay).sub_(lr * mean / (square.sqrt() + eps))

    load = distrib_optimizer.DistributedOptimizer.load_state_dict

    def load_state_dict(self, state: dict) -> None:
        """Megatron-core matches groups of parameters by their number. Plain layers begin with a norm, which has no
        weight decay, and TransformerEngine's do not: a stage without the embedding would have them the wrong way
        round."""
        of_decay = {group["pre_wd_mult"]: group for group in state["optimizer"]["param_groups"]}
        own = (group.get("pre_wd_mult", group.get("wd_mult")) for group in self.optimizer.param_groups)
        state["optimizer"]["param_groups"] = [of_decay[decay] for decay in own]
        load(self, state)

    distrib_optimizer.DistributedOptimizer.load_state_dict = load_state_dict
    megatron.core.optimizer.Adam = distrib_optimizer.Adam = Adam
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True


def replace_layers() -> None:
    """Plain layers for TransformerEngine's, and Lightning's CPU for its GPU."""
    from functools import partial

    import nemo.collections.llm.peft.utils
    import nemo.lightning.io.pl
    import numpy
    from megatron_cpu import CPU_OPTIONS, plain_layers

    del numpy.product  # numpy 2 has none, and Megatron-core 0.13 calls it
    from dct_qwen2vl.training import megatron

    megatron.model_config = partial(megatron.model_config, layers=plain_layers(), **CPU_OPTIONS)
    trainer = megatron.nl.Trainer
    megatron.nl.Trainer = lambda **options: trainer(**{**options, "accelerator": "cpu"})
    nemo.collections.llm.peft.utils.HAVE_TE = False  # it asks for instances of what stands in for TransformerEngine
    nemo.lightning.io.pl._fix_tensors_device = lambda checkpoint: checkpoint  # asserts that CUDA is there


def limit_memory(most: int) -> None:
    """The model fails at longer packed sequences, as on a device whose memory is full."""
    import torch

    from dct_qwen2vl.training.megatron_model import PackedQwen2VL

    forward = PackedQwen2VL.forward

    def limited(self, batch, *arguments, **options):
        if len(batch.input_ids) > most:
            raise torch.OutOfMemoryError(f"{len(batch.input_ids)} tokens are over {most}")
        return forward(self, batch, *arguments, **options)

    PackedQwen2VL.forward = limited


def record_waits(file: Path, step: int) -> None:
    """Writes where the host would wait, from the beginning of a step to the beginning of the next."""
    from waits_on_cpu import Waits

    from dct_qwen2vl.training.megatron import QwenMegatronModel

    recorded = []

    def on_train_batch_start(module, batch, batch_index: int) -> None:
        if module.trainer.global_step == step - 1 and not recorded:
            recorded.append(Waits(on_device(module)).__enter__())
        elif module.trainer.global_step == step and recorded:
            waits = recorded.pop()
            waits.__exit__(None, None, None)
            file.write_text(json.dumps({place: count for place, count in waits.found.items() if is_real(place)}))

    def on_device(module) -> list:
        (chunk,) = module.trainer.strategy.model
        groups = module.trainer.optimizers[0].param_groups
        gradients = (buffer.grad_data for buffer in chunk.buffers)
        return [*module.parameters(), *gradients, *(parameter for group in groups for parameter in group["params"])]

    QwenMegatronModel.on_train_batch_start = on_train_batch_start


def is_real(place: str) -> bool:
    """Whether TransformerEngine's layers and kernels would wait there, too."""
    return not place.startswith(("tests/megatron_cpu.py", "megatron/core/utils.py:local_multi_tensor"))


def fine_tune(arguments: list[str]) -> int:
    """Imports come late: a process that Megatron-core starts for a checkpoint imports this file, too."""
    import finetune_qwen2vl
    from dct_qwen2vl.training import checks

    checks.megatron_refusal = lambda: None
    if "--check" not in arguments:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile C++ for minutes, or find no compiler
        replace_device()
        replace_optimizer()
        replace_layers()
        if "ROOM_FOR" in os.environ:
            limit_memory(int(os.environ["ROOM_FOR"]))
        if "FAULT_STEP" in os.environ:
            from faulty_gradient import break_gradient

            from dct_qwen2vl.training import megatron

            break_gradient(megatron.QwenMegatronModel, int(os.environ["FAULT_STEP"]))
        if "WAITS" in os.environ:
            record_waits(Path(os.environ["WAITS"]), step=3)
    return finetune_qwen2vl.main(arguments)


if __name__ == "__main__":
    run_as_python(fine_tune)
