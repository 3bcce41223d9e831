"""What would images gain if cells differed in size, at the tokens of `x4`? No model is run.

    python -m benchmarks.quality.analysis.mixed_picture --json mixed_picture.json

Photographs that packages carry or that are given (--images), and drawn pages. The table says, for `x4` and for as many
cells of 28, 56 and 112 px (`mixed_cells.py`):

    step 0      PSNR of what a folded model sees before training: the low corner of each block
    held        PSNR of what tokens hold: in a block of 28 px all luma and the corner of each chroma plane, in one of
                56 px as many coefficients, in one of 14 px everything
    exact-skip  cells of the preset exact (28 px) that skipping leaves at 38 dB, in budgets of `x4`: below 1, that
                way has all detail for fewer tokens

PSNR is of RGB; 60 dB stands for more. Sides are cut to multiples of 112 px.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import run_main

if TYPE_CHECKING:
    import numpy as np
    import torch

PATCH = 14  # px
LARGEST = 112  # px, side of the largest cell
MOST_PSNR = 60.0
PAGE = (1120, 896)  # height and width, px
SLIDE = (896, 1344)
PAPER, INK = (252, 251, 248), (30, 30, 40)
WORDS = ("one", "two", "three", "four", "five", "total", "amount", "paid", "date", "invoice", "number", "balance")


@dataclass(frozen=True)
class Gain:
    """What an image gains. Shares are of the area, under cells of 28, 56 and 112 px."""

    kind: str  # photograph, sparse page, dense page
    name: str
    size: tuple[int, int]  # px
    tokens: int
    shares: tuple[float, float, float]
    step0_x4: float  # dB
    step0_mixed: float
    held_x4: float
    held_mixed: float
    exact_skip: float


# Images


def photographs(files: list[Path]) -> dict[str, "np.ndarray"]:
    """Those of the packages and those in files and folders, uint8 [H, W, 3]; says which files cannot be used."""
    from dct_qwen2vl.analysis.media_files import files_of, read_images
    from dct_qwen2vl.analysis.natural_images import IMAGES, load
    from dct_qwen2vl.data.images import IMAGE_EXTENSIONS

    images, skipped = {name: load(name) for name in IMAGES}, []
    for file in files_of(files, IMAGE_EXTENSIONS)[0]:
        for image in read_images([file], skipped):
            images[file.name] = image
    for line in skipped:
        print(f"skipped {line}")
    return images


def printed(size: tuple[int, int], area: tuple[int, int, int, int], height: int, spacing: int) -> "np.ndarray":
    """Lines of words in a part of a white page: uint8 [H, W, 3].

    size: height and width of the page, pixels.
    area: left, top, right, bottom of the print, pixels.
    height: of the font, pixels.
    spacing: from line to line, pixels.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rng, font = np.random.default_rng(0), ImageFont.load_default(size=height)
    page = Image.new("RGB", size[::-1], PAPER)
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = area
    for y in range(top, bottom - spacing + 1, spacing):
        line = ""
        while draw.textlength(longer := f"{line}{rng.choice(WORDS)} {rng.integers(1000)} ", font=font) < right - left:
            line = longer
        draw.text((left, y), line, font=font, fill=INK)
    return np.asarray(page)


def pages() -> dict[str, tuple[str, "np.ndarray"]]:
    """{name: (kind, uint8 [H, W, 3])}"""
    height, width = PAGE
    return {
        "receipt, 1/5 printed": ("sparse page", printed(PAGE, (310, 90, 590, 810), 13, 18)),
        "receipt, 1/10 printed": ("sparse page", printed(PAGE, (310, 90, 590, 450), 13, 18)),
        "slide, 5 lines": ("sparse page", printed(SLIDE, (120, 200, 1200, 620), 40, 80)),
        "slide, 3 small lines": ("sparse page", printed(SLIDE, (120, 400, 1000, 520), 20, 36)),
        "letter, half printed": ("page with margins", printed(PAGE, (110, 120, 790, 860), 14, 20)),
        "dense page": ("dense page", printed(PAGE, (10, 8, width - 10, height - 8), 13, 18)),
    }


# Measuring


def held(images: "torch.Tensor", block: int) -> "torch.Tensor":
    """What tokens hold of blocks of `block` px, float [B, H, W, 3] -> same."""
    import torch

    from benchmarks.quality.mixed_cells import low_corner
    from dct_qwen2vl.dct.configuration_dct import RGB_TO_YCBCR

    if block <= PATCH:
        return images
    to_planes = torch.from_numpy(RGB_TO_YCBCR).to(images)
    planes = images @ to_planes.T
    kept = [low_corner(planes[..., :1], block, 2 * PATCH), low_corner(planes[..., 1:], block, PATCH)]
    return torch.cat(kept, dim=3) @ to_planes.inverse().T


def psnr(image: "torch.Tensor", shown: "torch.Tensor") -> float:
    """dB, of values of 0..255; `shown` is clipped to these."""
    import torch

    error = (image - shown.clamp(0, 255)).square().mean()
    return min(MOST_PSNR, float(10 * torch.log10(255**2 / error.clamp_min(1e-9))))


def exact_skip(image: "torch.Tensor", budget: int) -> float:
    """Cells of `exact` that skipping leaves, in budgets. image: float [1, H, W, 3]."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.skipping_dct import kept_cells
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    config = DCTConfig.preset("exact")
    tokens, grid = DCTTokenizer(config).encode(image.byte().numpy())
    return int(kept_cells(tokens, grid, config).sum()) / budget


def gain_of(kind: str, name: str, image: "np.ndarray") -> Gain:
    """Measures one image, uint8 [H, W, 3]."""
    import torch

    from benchmarks.quality.mixed_cells import MERGE, SIDES, CellTree, cell_errors, choose_cells, low_corner
    from benchmarks.quality.mixed_cells import sides_by_place as places

    height, width = (side // LARGEST * LARGEST for side in image.shape[:2])
    pixels = torch.tensor(image[None, :height, :width], dtype=torch.float64)
    cell = MERGE * PATCH
    tree = CellTree(height // cell, width // cell)
    chosen = choose_cells(cell_errors(pixels, PATCH), tree, least=0.0)[0]
    sides = places(chosen, tree)
    of_pixel = sides.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[None, ..., None]

    def mixed(shown) -> torch.Tensor:
        return sum(torch.where(of_pixel == side, shown(side * PATCH), 0.0) for side in SIDES)

    def corner(block: int) -> torch.Tensor:
        return low_corner(pixels, block, PATCH)

    def holding(block: int) -> torch.Tensor:
        return held(pixels, block)

    return Gain(
        kind,
        name,
        (height, width),
        int(chosen.sum()),
        tuple(float((sides == side).double().mean()) for side in reversed(SIDES)),
        psnr(pixels, corner(2 * PATCH)),
        psnr(pixels, mixed(corner)),
        psnr(pixels, holding(2 * PATCH)),
        psnr(pixels, mixed(holding)),
        exact_skip(pixels, tree.budget),
    )


def table(gains: list[Gain]) -> list[str]:
    """Markdown lines."""
    head = ["kind", "image", "px", "tokens", "28 / 56 / 112 px, % of the area", "step 0: x4", "mixed", "gain"]
    head += ["held: x4", "mixed", "gain", "exact-skip"]
    rows = [
        [
            *(gain.kind, gain.name, " x ".join(map(str, gain.size)), str(gain.tokens)),
            " / ".join(f"{100 * share:.0f}" for share in gain.shares),
            *(f"{gain.step0_x4:.1f}", f"{gain.step0_mixed:.1f}", f"{gain.step0_mixed - gain.step0_x4:+.1f}"),
            *(f"{gain.held_x4:.1f}", f"{gain.held_mixed:.1f}", f"{gain.held_mixed - gain.held_x4:+.1f}"),
            f"{gain.exact_skip:.2f}",
        ]
        for gain in gains
    ]
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="+", type=Path, default=[], metavar="PATH", help="more photographs: files or folders")
    add("--json", type=Path, metavar="FILE", help="writes the figures there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("mixed_picture.py", lambda: measure(arguments.images, arguments.json))


def measure(images: list[Path], file: Path | None) -> int:
    """Measures all images, prints the table, writes the figures to a file. Raises UserError, OSError."""
    material = [("photograph", name, image) for name, image in photographs(images).items()]
    material += [(kind, name, image) for name, (kind, image) in pages().items()]
    gains = [gain_of(*one) for one in material]
    print("\n".join(table(gains)))
    if file is not None:
        write_json(file, [asdict(gain) for gain in gains])
    return 0


if __name__ == "__main__":
    sys.exit(main())
