"""The tower's patch embedding, forward and backward: the convolution of transformers against one matrix product.

    python -m benchmarks.speed.patch_embedding --json patch_embedding.json

Both read the same tokens [N, K] and have the same weight [1280, K]. `conv3d` is what Qwen2-VL's tower does: a
convolution whose kernel is the whole patch. `product` is what the automodel engine puts in its place. The difference is
the largest of outputs and weight gradients, relative.
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

WIDTH = 1280  # of Qwen2-VL's tower
HEADER = f"{'tokens':<10}{'numbers':>9}{'data type':>11}{'conv3d':>12}{'product':>12}{'ratio':>8}{'difference':>12}"


def convolution(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, weight = inputs
    kernel = weight[:, :, None, None, None]
    return functional.conv3d(tokens[:, :, None, None, None], kernel).flatten(1)


def product(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.linear(*inputs)


def compare(preset: str, dtype: torch.dtype, arguments: argparse.Namespace, device: str) -> dict:
    """One line: both ways on the same inputs."""
    numbers = DCTConfig.preset(preset).num_coefficients
    generator = torch.Generator(device).manual_seed(arguments.seed)
    shapes = ((arguments.tokens, numbers), (WIDTH, numbers), (arguments.tokens, WIDTH))
    tokens, weight, upstream = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    inputs = (tokens.requires_grad_(), weight.requires_grad_())
    times, outputs = {}, {}
    for way in (convolution, product):
        outputs[way] = with_gradients(way, inputs, upstream)
        times[way] = milliseconds(partial(with_gradients, way, inputs, upstream), arguments.repeats)
    line = {
        "preset": preset,
        "numbers": numbers,
        "dtype": str(dtype).removeprefix("torch."),
        "conv3d_ms": times[convolution],
        "product_ms": times[product],
        "ratio": times[convolution] / times[product],
        "difference": error(outputs[convolution], outputs[product]),
    }
    print(
        f"{preset:<10}{numbers:>9}{line['dtype']:>11}{line['conv3d_ms']:>9.2f} ms{line['product_ms']:>9.2f} ms"
        f"{line['ratio']:>8.1f}{line['difference']:>12.1e}",
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
