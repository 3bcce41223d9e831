"""The `megatron` engine: NeMo's Qwen2-VL recipe on Megatron-core. Not built yet; this file says so in one line.

Megatron-core is bound to CUDA and NeMo's vision tower needs TransformerEngine, so there is no CPU run of it.
"""

from importlib.util import find_spec


def refusal() -> str | None:
    """Why this engine cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "--engine megatron needs a CUDA device and there is none: use --engine automodel"
    if find_spec("transformer_engine") is None:
        return "--engine megatron needs TransformerEngine: run inside the NeMo container, or use --engine automodel"
    return "--engine megatron is not part of this version yet: use --engine automodel"
