"""The tower's patch embedding, forward and backward: the convolution of transformers against one matrix product.

    python -m benchmarks.speed.patch_embedding --json patch_embedding.json

Both read the same tokens [N, K] and have the same weight [1280, K]. `conv3d` is what Qwen2-VL's tower does: a
convolution whose kernel is the whole patch. `product` is one matrix product, `zeros` the same with zeros up to a
multiple of 8 numbers, which both engines use. The difference is the largest of outputs and weight gradients to those of
the convolution, relative.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.speed.attention import error, milliseconds, with_gradients
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.dct.configuration_dct import PRESETS, DCTConfig
from dct_qwen2vl.training.patch_embedding import product_with_zeros

WIDTH = 1280  # of Qwen2-VL's tower
HEADER = (
    f"{'tokens':<10}{'numbers':>9}{'data type':>11}{'conv3d':>12}{'product':>12}{'zeros':>12}{'ratio':>8}"
    f"{'difference':>12}"
)


def convolution(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, weight = inputs
    kernel = weight[:, :, None, None, None]
    return functional.conv3d(tokens[:, :, None, None, None], kernel).flatten(1)


def product(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.linear(*inputs)


def zeros(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return product_with_zeros(*inputs)


def compare(preset: str, dtype: torch.dtype, arguments: argparse.Namespace, device: str) -> dict:
    """One line: all ways on the same inputs."""
    numbers = DCTConfig.preset(preset).num_coefficients
    generator = torch.Generator(device).manual_seed(arguments.seed)
    shapes = ((arguments.tokens, numbers), (WIDTH, numbers), (arguments.tokens, WIDTH))
    tokens, weight, upstream = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    inputs = (tokens.requires_grad_(), weight.requires_grad_())
    times, outputs = {}, {}
    for way in (convolution, product, zeros):
        outputs[way] = with_gradients(way, inputs, upstream)
        times[way] = milliseconds(partial(with_gradients, way, inputs, upstream), arguments.repeats)
    line = {
        "preset": preset,
        "numbers": numbers,
        "dtype": str(dtype).removeprefix("torch."),
        "conv3d_ms": times[convolution],
        "product_ms": times[product],
        "zeros_ms": times[zeros],
        "ratio": times[convolution] / times[zeros],
        "difference": max(error(outputs[convolution], outputs[way]) for way in (product, zeros)),
    }
    print(
        f"{preset:<10}{numbers:>9}{line['dtype']:>11}{line['conv3d_ms']:>9.2f} ms{line['product_ms']:>9.2f} ms"
        f"{line['zeros_ms']:>9.2f} ms{line['ratio']:>8.1f}{line['difference']:>12.1e}",
        flush=True,
    )
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/speed/patch_embedding.py: needs a CUDA device and there is none", file=sys.stderr)
        return 1
    print(HEADER)
    lines = [
        compare(preset, dtype, arguments, "cuda") for preset in PRESETS for dtype in (torch.bfloat16, torch.float32)
    ]
    if arguments.json:
        results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lines": lines}
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
