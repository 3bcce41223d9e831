"""Gradients of PyTorch's attention kernels where all scores are low, against attention in fp32: which become nan?

    python -m benchmarks.speed.low_scores --json low_scores.json

Random queries, keys and values in bf16, one number of each so that all scores lie near the one asked for. A softmax
does not depend on a number that all scores share, so gradients stay what they are. Printed is the share of heads with
a gradient that is not finite, of queries, keys or values, and the largest error of the others, relative to the largest
gradient.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dct_qwen2vl.common.files import write_json

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_parts(length: int, width: int, score: float, samples: int, heads: int, seed: int, device: str) -> Parts:
    """Queries, keys and values, bf16 [samples, heads, length, width], whose scores lie near `score`, 0 or less."""
    torch.manual_seed(seed)
    parts = torch.randn(3, samples, heads, length, width, device=device, dtype=torch.bfloat16)
    shared = (-score * width**0.5) ** 0.5
    parts[0, ..., 0], parts[1, ..., 0] = shared, -shared
    return tuple(part.clone() for part in parts)


def gradients(parts: Parts, upstream: torch.Tensor, kernel: SDPBackend) -> list[torch.Tensor]:
    """Of queries, keys and values. Raises RuntimeError if the kernel does not take them."""
    inputs = [part.detach().requires_grad_() for part in parts]
    with sdpa_kernel([kernel]):
        output = functional.scaled_dot_product_attention(*inputs)
    return list(torch.autograd.grad(output, inputs, upstream.to(output.dtype)))


def compare(parts: Parts, kernel: SDPBackend) -> dict[str, float] | None:
    """bad: share of the heads. error: of what is finite. None for a kernel that is not there."""
    upstream = torch.randn_like(parts[0])
    expected = gradients(tuple(part.float() for part in parts), upstream, SDPBackend.MATH)
    try:
        found = gradients(parts, upstream, kernel)
    except RuntimeError:
        return None
    bad = torch.stack([~one.isfinite().all(-1).all(-1) for one in found]).any(0)
    errors = [
        ((one.float() - true).abs().nan_to_num(0, 0, 0).max() / true.abs().max()).item()
        for one, true in zip(found, expected, strict=True)
    ]
    return {"bad": bad.float().mean().item(), "error": max(errors)}


def described(result: dict[str, float] | None) -> str:
    if result is None:
        return "not there"
    return f"{result['bad']:.0%} nan" if result["bad"] else f"{result['error']:.1e}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, default=[16, 32, 64, 80, 96, 128, 192, 256], help="tokens")
    add("--widths", nargs="+", type=int, default=[64, 80, 96, 128], help="of a head")
    add("--scores", nargs="+", type=float, default=[0, -80, -90, -100, -200], help="that all lie near")
    add("--samples", type=int, default=64, help="with --heads heads each")
    add("--heads", type=int, default=16)
    add("--seed", type=int, default=0, help="of the inputs")
    add("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}: heads with a gradient of nan, or the error of the gradients")
    print(f"{'width':>6}{'length':>8}{'score':>8}", *(f"{kernel:>11}" for kernel in KERNELS))
    lines = []
    for width, length, score in product(arguments.widths, arguments.lengths, arguments.scores):
        parts = make_parts(length, width, score, arguments.samples, arguments.heads, arguments.seed, device)
        results = {kernel: compare(parts, backend) for kernel, backend in KERNELS.items()}
        lines.append({"width": width, "length": length, "score": score, **results})
        print(f"{width:>6}{length:>8}{score:>8.0f}", *(f"{described(one):>11}" for one in results.values()), flush=True)
    if arguments.json:
        write_json(arguments.json, {"device": name, "torch": torch.__version__, "lines": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main())
