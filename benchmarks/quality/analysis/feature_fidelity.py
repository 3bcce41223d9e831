"""How near the embedding of DCT tokens is to the pixel model's: per preset, order of coefficients and number format.

    python -m benchmarks.quality.analysis.feature_fidelity --json feature_fidelity.json
    python -m benchmarks.quality.analysis.feature_fidelity --model-dir Qwen2-VL-2B-Instruct

The embedding is what the vision tower's first layer makes of a token: [N, E], E = 1280. Its error is relative, in the
Frobenius norm, over stills and videos that are not in the table of coefficient statistics, against the pixel model in
float64. For blocks above 2 x 14 x 14 the pixel model sees the image downscaled in the DCT domain, which is what the
folded model starts from; how far that is from the embedding of the bicubic-downscaled image stands beside it.

fp32: tokens, weights and sums. bf16: tokens and folded weights rounded to bf16, summed in fp32. int8: all coefficients
of all tokens quantised with one step to -127..127, weights in fp32; the clipping limit, in units of the coefficients'
standard deviation, is the best of CLIP_LIMITS. The weights themselves have bf16 values, as released checkpoints have.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.analysis.media_files import add_media_flags
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import run_main

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dct_qwen2vl.dct.configuration_dct import DCTConfig

CLIP_LIMITS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # standard deviations
CLIP_TOKENS = 2000  # on which the best limit is searched
SELECTED = 588  # coefficients for which orders are compared: half of those of a pixel patch


@dataclass(frozen=True)
class Row:
    """Relative errors of one token format; None where there is nothing to measure."""

    name: str
    block: tuple[int, int, int]
    coefficients: int
    reference: str  # what the pixel model sees
    fp32: float
    bf16: float
    int8: float | None
    int8_clip: float | None  # standard deviations
    bicubic: float | None  # distance of the fp32 embedding from that of the bicubic-downscaled image


# The pixel model


def pixel_patches(frames: "torch.Tensor") -> "torch.Tensor":
    """Frames [T, H, W, 3], 0..255, T even -> normalised patches [N, 3*2*14*14] in raster order, of the same dtype."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (torch.tensor(values, dtype=frames.dtype) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    normalised = (frames / 255 - mean) / std
    t, h, w = frames.shape[0] // 2, frames.shape[1] // 14, frames.shape[2] // 14
    blocks = normalised.reshape(t, 2, h, 14, w, 14, 3).permute(0, 2, 4, 6, 1, 3, 5)
    return blocks.reshape(t * h * w, -1)


def dct_downscaled(frames: "np.ndarray", block: tuple[int, int, int]) -> "torch.Tensor":
    """uint8 [T, H, W, 3] -> the lowest 2 x 14 x 14 coefficients of every block as an image: float64, not rounded."""
    import numpy as np
    import torch

    from dct_qwen2vl.dct.configuration_dct import PIXEL_PATCH, DCTConfig
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    corner = np.zeros((3, *block), dtype=bool)
    corner[:, : PIXEL_PATCH[0], : PIXEL_PATCH[1], : PIXEL_PATCH[2]] = True
    kept = tuple(np.flatnonzero(corner).tolist())
    ones = (1.0,) * len(kept)
    tokens, grid = DCTTokenizer(DCTConfig(block, "444", kept, ones, merge=1), torch.float64).encode(frames)
    gain = math.sqrt(math.prod(PIXEL_PATCH) / math.prod(block))
    small = DCTConfig(PIXEL_PATCH, "444", tuple(range(len(kept))), ones, merge=1)
    return DCTTokenizer(small, torch.float64).decode_float(gain * tokens, grid)


def bicubic_downscaled(frames: "np.ndarray", block: tuple[int, int, int]) -> "torch.Tensor":
    """uint8 [T, H, W, 3] -> the usual smaller image, with 8 bits, in float64. Blocks of two frames only."""
    import numpy as np
    import torch

    from dct_qwen2vl.analysis.coefficient_moments import resized

    size = (frames.shape[1] * 14 // block[1], frames.shape[2] * 14 // block[2])
    return torch.from_numpy(resized(frames, size).astype(np.float64))


def relative_error(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """Frobenius norm of the difference over that of `expected`."""
    difference = found.to(expected.dtype) - expected
    return (difference.norm() / expected.norm()).item()


# Measuring


def configs_of(weight: "torch.Tensor") -> Iterator["DCTConfig"]:
    """The presets, then half a pixel patch's coefficients in every order: of a pixel patch and of an x4 block."""
    from dct_qwen2vl.dct.configuration_dct import ORDERS, PRESETS, DCTConfig

    for preset in PRESETS:
        yield replace(DCTConfig.preset(preset), merge=1)
    yield DCTConfig.select((2, 14, 14), "420", merge=1, name="all of 4:2:0")
    for block, chroma in (((2, 14, 14), "444"), ((2, 28, 28), "420")):
        for order in ORDERS:
            needed = weight if order == "weighted" else None
            yield DCTConfig.select(block, chroma, SELECTED, merge=1, name=order, order=order, weight=needed)


def quantised(tokens: "torch.Tensor", limit: float) -> "torch.Tensor":
    """Rounded to 255 levels from -limit to limit."""
    step = limit / 127
    return (tokens / step).round().clamp(-127, 127) * step


def best_clip(tokens: "torch.Tensor", folded: "torch.Tensor") -> float:
    """The limit of CLIP_LIMITS with the least error of the embedding, on evenly spread tokens."""
    some = tokens[:: max(1, len(tokens) // CLIP_TOKENS)]
    return min(CLIP_LIMITS, key=lambda limit: ((quantised(some, limit) - some) @ folded.T).norm().item())


def measure_config(config: "DCTConfig", items: list["np.ndarray"], weight: "torch.Tensor") -> Row:
    """weight: float32 [E, 3, 2, 14, 14]. items: uint8 [T, H, W, 3] each, T even."""
    import torch

    from dct_qwen2vl.dct.configuration_dct import PIXEL_PATCH
    from dct_qwen2vl.dct.folding import fold_patch_embedding
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    tokenizer = DCTTokenizer(config)
    tokens = torch.cat([tokenizer.encode(frames)[0] for frames in items])
    folded = fold_patch_embedding(weight, config).flatten(1)
    flat = weight.flatten(1).double()
    whole = config.block == PIXEL_PATCH
    seen = [torch.from_numpy(f).double() if whole else dct_downscaled(f, config.block) for f in items]
    expected = torch.cat([pixel_patches(frames) @ flat.T for frames in seen])
    embedding = tokens @ folded.T
    bicubic = None
    if not whole:
        usual = torch.cat([pixel_patches(bicubic_downscaled(frames, config.block)) @ flat.T for frames in items])
        bicubic = relative_error(embedding, usual)
    clip = best_clip(tokens, folded)
    return Row(
        name=config.name,
        block=config.block,
        coefficients=config.num_coefficients,
        reference="image" if whole else "DCT-downscaled",
        fp32=relative_error(embedding, expected),
        bf16=relative_error(tokens.bfloat16().float() @ folded.bfloat16().float().T, expected),
        int8=relative_error(quantised(tokens, clip) @ folded.T, expected),
        int8_clip=clip,
        bicubic=bicubic,
    )


def measure_pixels(items: list["np.ndarray"], weight: "torch.Tensor") -> Row:
    """The pixel model's own rounding: what no token format can be asked to undercut."""
    import torch

    flat = weight.flatten(1)
    patches = torch.cat([pixel_patches(torch.from_numpy(frames).float()) for frames in items])
    expected = torch.cat([pixel_patches(torch.from_numpy(frames).double()) for frames in items]) @ flat.double().T
    rounded = patches.bfloat16().float() @ flat.bfloat16().float().T
    fp32, bf16 = relative_error(patches @ flat.T, expected), relative_error(rounded, expected)
    return Row("pixels", (2, 14, 14), patches.shape[1], "image", fp32, bf16, None, None, None)


def two_frames(material: dict[str, list["np.ndarray"]]) -> list["np.ndarray"]:
    """Stills as two equal frames, and videos of an even number of frames: uint8 [T, H, W, 3] each."""
    import numpy as np

    stills = [np.repeat(frames, 2, axis=0) for frames in material["stills"]]
    return stills + [frames[: len(frames) // 2 * 2] for frames in material["videos"]]


def measure(material: dict[str, list["np.ndarray"]], weight: "torch.Tensor") -> list[Row]:
    """The pixel model itself, then every configuration."""
    items, weight = two_frames(material), weight.bfloat16().float()
    return [measure_pixels(items, weight), *(measure_config(c, items, weight) for c in configs_of(weight))]


# Results


def report(rows: list[Row]) -> str:
    """One line for each format."""
    lines = [
        "tokens        block        K  pixel model sees  fp32     bf16     int8 (clip, std)  from bicubic-downscaled",
    ]
    for row in rows:
        block = "x".join(map(str, row.block))
        int8 = f"{row.int8:.2e} ({row.int8_clip:g})" if row.int8 is not None else "-"
        bicubic = f"{row.bicubic:.2e}" if row.bicubic is not None else "-"
        head = f"{row.name:13} {block:8} {row.coefficients:5}  {row.reference:16}"
        lines.append(f"{head}  {row.fp32:.1e}  {row.bf16:.1e}  {int8:16}  {bicubic}")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-dir", type=Path, help="pixel Qwen2-VL (default: random weights of its size)")
    add_media_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="of motion and random weights (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("feature_fidelity.py", lambda: measure_and_say(arguments), arguments.debug)


def measure_and_say(arguments: argparse.Namespace) -> int:
    """Raises UserError, OSError."""
    from benchmarks.quality.analysis.patch_weights import patch_weight
    from benchmarks.quality.analysis.rate_distortion import chosen_material

    weight, source = patch_weight(arguments.model_dir, arguments.seed)
    rows = measure(chosen_material(arguments), weight)
    print(f"patch embedding {list(weight.shape)}: {source}")
    print("relative error of the embedding\n")
    print(report(rows))
    if arguments.json:
        write_json(arguments.json, {"weight": source, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
