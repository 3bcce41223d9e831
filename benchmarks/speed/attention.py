"""Attention over packed sequences: PyTorch's FlashAttention-2 against flash-attn-4, forward and backward, in one run.

    pip install --pre flash-attn-4      # for Hopper and Blackwell; only this study needs it
    python -m benchmarks.speed.attention --json attention.json

Random queries, keys and values in bf16, sequences of --tokens tokens in parts of equal length: the tower's heads (16 of
80, no mask) and the language model's (12 of 128 over 2 of keys and values, causal). The error is the largest of output
and gradients against attention in fp32, relative: at bf16 a right kernel stays under 1e-2.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from dct_qwen2vl.common.files import write_json

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HEADER = f"{'ms':<16}{'length':>7}{'torch':>10}{'flash-attn-4':>14}{'ratio':>8}{'error: torch':>14}{'flash-attn-4':>14}"


@dataclass(frozen=True)
class Shape:
    """One kind of attention. heads: of queries; shared: of keys and values; width: of a head."""

    name: str
    heads: int
    shared: int
    width: int
    causal: bool


SHAPES = (Shape("tower", 16, 16, 80, False), Shape("language model", 12, 2, 128, True))


def make_inputs(shape: Shape, tokens: int, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    heads = (shape.heads, shape.shared, shape.shared)
    return tuple(torch.randn(tokens, count, shape.width, **options).requires_grad_() for count in heads)


def starts_of(tokens: int, length: int) -> torch.Tensor:
    return torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")


def of_torch(inputs: Inputs, length: int, causal: bool) -> torch.Tensor:
    starts = starts_of(len(inputs[0]), length)
    return torch.ops.aten._flash_attention_forward(*inputs, starts, starts, length, length, 0.0, causal, False)[0]


def of_flash_attention_4(inputs: Inputs, length: int, causal: bool) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    starts = starts_of(len(inputs[0]), length)
    parts = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": length, "max_seqlen_k": length}
    return flash_attn_varlen_func(*inputs, **parts, causal=causal)[0]


KERNELS = {"torch": of_torch, "flash-attn-4": of_flash_attention_4}


def in_float32(inputs: Inputs, length: int, causal: bool) -> torch.Tensor:
    parts = [x.float().unflatten(0, (-1, length)).transpose(1, 2) for x in inputs]
    out = functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def with_gradients(compute: Callable, inputs: Inputs, upstream: torch.Tensor, *options) -> list[torch.Tensor]:
    output = compute(inputs, *options)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, theirs, strict=True))


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def compare(shape: Shape, length: int, tokens: int, seed: int, repeats: int) -> dict:
    """One line: both kernels on the same inputs."""
    tokens = max(1, tokens // length) * length
    inputs = make_inputs(shape, tokens, seed)
    upstream = torch.randn(tokens, shape.heads, shape.width, device="cuda", dtype=torch.bfloat16)
    few = max(1, 4096 // length) * length  # as many are computed in fp32
    short = tuple(x.detach()[:few].requires_grad_() for x in inputs)
    options = (length, shape.causal)
    true = with_gradients(in_float32, short, upstream[:few], *options)
    line = {"shape": shape.name, "length": length, "tokens": tokens}
    for name, kernel in KERNELS.items():
        whole = partial(with_gradients, kernel, inputs, upstream, *options)
        line[name] = {
            "ms": milliseconds(whole, repeats),
            "error": error(with_gradients(kernel, short, upstream[:few], *options), true),
        }
    line["ratio"] = line["torch"]["ms"] / line["flash-attn-4"]["ms"]
    ours, theirs = line["torch"], line["flash-attn-4"]
    print(
        f"{shape.name:<16}{length:>7}{ours['ms']:>10.2f}{theirs['ms']:>14.2f}{line['ratio']:>8.2f}"
        f"{ours['error']:>14.1e}{theirs['error']:>14.1e}",
        flush=True,
    )
    return line


def what_is_missing() -> str | None:
    """In one line; None if both kernels are there."""
    if not torch.cuda.is_available():
        return "needs a CUDA device and there is none"
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError as error:
        return f"flash-attn-4 is not there ({error}): pip install --pre flash-attn-4"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256, 512, 768, 1024, 4096], help="of parts")
    parser.add_argument("--tokens", type=int, default=16384, help="of a sequence, about")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    missing = what_is_missing()
    if missing:
        print(f"benchmarks/speed/attention.py: {missing}", file=sys.stderr)
        return 1
    print(HEADER)
    lines = [
        compare(shape, length, arguments.tokens, arguments.seed, arguments.repeats)
        for shape in SHAPES
        for length in arguments.lengths
    ]
    if arguments.json:
        results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lines": lines}
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
