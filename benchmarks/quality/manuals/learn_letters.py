"""Teaches the vision tower of a Qwen2-VL which character stands where, on pages that training may see.

    python -m benchmarks.quality.dense.prepare --pages-only --dpi 40 50 60 75 100 150 --output pages
    python -m benchmarks.quality.manuals.learn_letters --model models/manuals --pages pages --output models/letters

Each visual token says, for each cell of 7 x 3.5 px, which character has its middle there (dense/pages.py). Tower and
merger learn it together with a linear head, which is then dropped. So visual tokens tell the language model what is
printed, as those of a pretrained Qwen2-VL do. Without it a language model has to find letters and their order at once.

Letters used for shapes:

    B S     crops and their side in pixels
    N K     patches of a crop, numbers of a patch
    r c     rows and columns of cells: S / 7 and S / 3.5

Accuracy counts cells with one character, on manuals that training never sees.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality.dense.inputs import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.quality.dense.pages import CLASSES, COLUMNS, ROWS, SHARED, PageStore
from benchmarks.quality.dense.train import BETAS, CLIP, DECAY, share_of_rate
from benchmarks.quality.manuals.build_model import spread_of_words
from benchmarks.quality.model import PLAIN, compiled_layers, run_tower
from benchmarks.quality.runs import chosen_device
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.toy.model import save

TESTED = 64  # crops of each resolution
SHOWN = 100  # steps between two lines
FRAMES = 2  # of a patch; a still has two equal ones
MERGED = 2  # patches side by side in a visual token, in both directions


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """As Qwen2VLImageProcessor gives them for a grey still: uint8 [B, S, S] -> float32 [B, N, K].

    side: of a patch, px.
    """
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    values = (images[:, None].float() / 255 - mean) / std
    cells = values.unflatten(3, (-1, MERGED, side)).unflatten(2, (-1, MERGED, side))  # [B, 3, G, 2, p, G, 2, p]
    ordered = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [B, G, G, 2, 2, 3, 1, p, p]
    return ordered.expand(*ordered.shape[:6], FRAMES, side, side).flatten(5).flatten(1, 4)


class LetterReader(nn.Module):
    """Tower, merger, and a linear head over the cells of a visual token.

    visual: `Qwen2VisionTransformerPretrainedModel` in float32.
    side: of a crop, px.
    compiled: whether the tower's layers are compiled.
    """

    def __init__(self, visual: nn.Module, side: int, compiled: bool = False) -> None:
        super().__init__()
        self.visual, self.layers = visual, compiled_layers() if compiled else PLAIN
        self.patch = visual.config.patch_size
        covered = MERGED * self.patch
        self.grid, self.cells = side // covered, (round(covered / ROWS), round(covered / COLUMNS))
        self.head = nn.Linear(visual.config.hidden_size, math.prod(self.cells) * CLASSES)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Visual tokens, uint8 [B, S, S] -> [B, N / 4, hidden size]."""
        grid = torch.tensor([[1, MERGED * self.grid, MERGED * self.grid]], device=images.device)
        angles = self.visual.rot_pos_emb(grid).repeat(1, 2)
        return run_tower(self.visual, patches_of(images, self.patch), angles.cos(), angles.sin(), layers=self.layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S] -> scores [B, r, c, classes]"""
        scores = self.head(self.tokens(images))
        scores = scores.unflatten(2, (*self.cells, CLASSES)).unflatten(1, (self.grid, self.grid))
        return scores.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Lessons:
    """One training.

    reader: To train.
    pages: Pages of the manuals to train on.
    arguments: of the command line.
    """

    def __init__(self, reader: LetterReader, pages: PageStore, arguments: argparse.Namespace) -> None:
        self.reader, self.pages, self.arguments = reader, pages, arguments
        self.generator = torch.Generator().manual_seed(arguments.seed)
        options = {"betas": BETAS, "weight_decay": DECAY, "fused": pages.device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(reader.parameters(), arguments.rate, **options)
        share = partial(share_of_rate, steps=arguments.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def step(self) -> torch.Tensor:
        """One step of crops of all resolutions in equal shares. Returns the loss."""
        pages, arguments = self.pages, self.arguments
        count = max(1, arguments.batch // len(pages.dpi))
        images, labels = pages.draw_each(count, arguments.side, self.generator)
        scores = scores_of(self.reader, images).flatten(0, 2)
        loss = nn.functional.cross_entropy(scores, labels.flatten(), ignore_index=SHARED)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.reader.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def run(self) -> None:
        """All steps; a line every `SHOWN` of them."""
        started, losses = time.perf_counter(), []
        for step in range(1, self.arguments.steps + 1):
            losses.append(self.step())
            if step % SHOWN == 0 or step == self.arguments.steps:
                loss = float(torch.stack(losses).mean())
                print(f"step {step} | loss {loss:.4f} | {time.perf_counter() - started:.0f} s", flush=True)
                losses = []


def scores_of(reader: LetterReader, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        return reader(images).float()


@torch.no_grad()
def accuracy(reader: LetterReader, pages: PageStore, side: int) -> dict[int, float]:
    """Share of the cells with one character that are right, by resolution."""
    generator, found = torch.Generator().manual_seed(0), {}
    for dpi in pages.dpi:
        crops = pages.draw(dpi, TESTED, side, generator)
        parts = zip(crops.images.split(8), crops.labels.split(8))
        right = [(scores_of(reader, images).argmax(dim=-1) == labels)[labels > 0] for images, labels in parts]
        found[dpi] = float(torch.cat(right).float().mean())
    return found


@torch.no_grad()
def quieten(reader: LetterReader, pages: PageStore, side: int, spread: float) -> None:
    """Scales the merger's last layer so that visual tokens are as large as embedded words again.

    spread: of the latter.
    """
    images = pages.draw(pages.dpi[-1], 8, side, torch.Generator().manual_seed(0)).images
    scale = spread / float(reader.tokens(images).square().mean().sqrt())
    for parameter in reader.visual.merger.mlp[-1].parameters():
        parameter.mul_(scale)


def teach(arguments: argparse.Namespace) -> int:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    device = chosen_device(arguments.device)
    model = Qwen2VLForConditionalGeneration.from_pretrained(arguments.model, torch_dtype=torch.float32)
    check_side(arguments.side, model.config.vision_config.patch_size)
    train, test = (PageStore(arguments.pages, split, device) for split in ("train", "test"))
    torch.manual_seed(arguments.seed)
    reader = LetterReader(model.visual, arguments.side, compiled=device.type == "cuda").to(device)
    Lessons(reader, train, arguments).run()
    right = " | ".join(f"{dpi} dpi {share:.1%}" for dpi, share in accuracy(reader, test, arguments.side).items())
    print(f"Characters right on manuals that training never saw: {right}")
    quieten(reader, train, arguments.side, spread_of_words(model))
    processor = Qwen2VLImageProcessor.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    save(model.cpu().to(torch.bfloat16), tokenizer, processor, arguments.output)
    print(f"Wrote {arguments.output}")
    return 0


def check_side(side: int, patch: int) -> None:
    """Raises UserError."""
    if side % (MERGED * patch) or side <= 0:
        raise UserError(f"--side {side} is no multiple of {MERGED * patch} px, a visual token of this model")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="what build_model.py wrote")
    add("--pages", type=Path, required=True, metavar="DIR", help="what benchmarks.quality.dense.prepare wrote")
    add("--output", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    add("--steps", type=int, default=1500, help="(default: %(default)s)")
    add("--batch", type=int, default=96, help="crops of a step, of all resolutions (default: %(default)s)")
    add("--side", type=int, default=224, help="of a crop, px (default: %(default)s)")
    add("--rate", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of crops and the head (default: %(default)s)")
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("learn_letters.py", lambda: teach(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
