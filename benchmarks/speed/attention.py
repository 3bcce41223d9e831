"""Attention over packed sequences: PyTorch's FlashAttention-2 against flash-attn-4, forward and backward, in one run.

    python -m benchmarks.speed.attention --json attention.json

Random queries, keys and values in bf16, sequences of --tokens tokens in parts of equal length: the tower's heads (16 of
80, no mask) and the language model's (12 of 128 over 2 of keys and values, causal). The error is of output and
gradients against attention in fp32, relative, over both kernels. `SHORTEST` in dct_qwen2vl/training/attention.py comes
from here.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from dct_qwen2vl.training import attention

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


def packed(inputs: Inputs, length: int, causal: bool, shortest: float) -> torch.Tensor:
    """shortest: mean tokens of a part from which flash-attn-4 is taken."""
    attention.SHORTEST = {causal: shortest}
    tokens = len(inputs[0])
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    return attention.packed_attention(*inputs, starts, length, causal)


def reference(inputs: Inputs, length: int, causal: bool) -> torch.Tensor:
    """Attention in fp32."""
    parts = [x.float().unflatten(0, (-1, length)).transpose(1, 2) for x in inputs]
    out = functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def with_gradients(compute: Callable[[], torch.Tensor], inputs: Inputs, upstream: torch.Tensor) -> list[torch.Tensor]:
    output = compute()
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest relative difference in norm, of the output and the three gradients."""
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
    few = max(1, 4096 // length) * length  # as much is computed in fp32
    short = tuple(x.detach()[:few].requires_grad_() for x in inputs)
    true = with_gradients(lambda: reference(short, length, shape.causal), short, upstream[:few])
    line = {"shape": shape.name, "length": length, "tokens": tokens}
    for name, shortest in (("torch", math.inf), ("flash-attn-4", 0)):

        def run(chosen: Inputs, shortest: float = shortest) -> list[torch.Tensor]:
            compute = partial(packed, chosen, length, shape.causal, shortest)
            return with_gradients(compute, chosen, upstream[: len(chosen[0])])

        line[name] = {"ms": milliseconds(partial(run, inputs), repeats), "error": error(run(short), true)}
    line["ratio"] = line["torch"]["ms"] / line["flash-attn-4"]["ms"]
    print(
        f"{shape.name:<16}{length:>7}{line['torch']['ms']:>10.2f}{line['flash-attn-4']['ms']:>14.2f}"
        f"{line['ratio']:>8.2f}{line['torch']['error']:>12.1e}{line['flash-attn-4']['error']:>10.1e}",
        flush=True,
    )
    return line


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
    if attention.flash_attention_4() is None:
        print(f"benchmarks/speed/attention.py: {attention.why_not()}", file=sys.stderr)
        return 1
    print(f"{'ms':<16}{'length':>7}{'torch':>10}{'flash-attn-4':>14}{'ratio':>8}{'error torch':>12}{'fa4':>10}")
    lines = [
        compare(shape, length, arguments.tokens, arguments.seed, arguments.repeats)
        for shape in SHAPES
        for length in arguments.lengths
    ]
    if arguments.json:
        results = {"device": torch.cuda.get_device_name(), "attention": attention.kernel_names(), "lines": lines}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
