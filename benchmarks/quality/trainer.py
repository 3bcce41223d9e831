"""Trains a model on a task through a variant, on one device.

Letters used for shapes: B samples, N tokens of the vision tower, K floats of a token, A tokens of the answer, S scored
ones among them.
"""

import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums; read when CUDA starts

import torch
from torch.nn.functional import cross_entropy

from benchmarks.quality.analysis.scoring import share
from benchmarks.quality.mixed_encoder import MIXED, MixedEncoder, MixedPlaces
from benchmarks.quality.model import (
    PLAIN,
    Layout,
    answer_logits,
    build_model,
    compiled_layers,
    generate,
    generate_skipping,
    scale_patch_embedding,
    set_patch_embedding,
    zero_columns,
)
from benchmarks.quality.settings import Settings
from benchmarks.quality.skipping import AGED, BASE, LEFT_OUT, SkippingEncoder, make_encoder, share_left_out
from benchmarks.quality.tasks import fixed_camera
from benchmarks.quality.tasks.cells import NOT_SCORED
from benchmarks.quality.tasks.drawing import Random, generator_for
from benchmarks.quality.tasks.registry import Source, make_task
from benchmarks.quality.variants import FRAMES, Variant, unfold_patch_embedding
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.folding import fold_patch_embedding

STARTS = ("pixels", "exact", BASE)  # variants whose models others can start from
DRAWN_AT_ONCE = 64  # test samples; which they are depends on it
TESTED_AT_ONCE = 256
GENERATE_AT_ONCE = 16  # samples; the stock vision tower compares all patches of a batch with each other
BASE_INPUTS = 256  # of the matrices that learn at the learning rate; those of more inputs learn more slowly
GRAPH_TOLERANCE = 0.02  # relative difference of the first loss with and without a CUDA graph
LEAST_DIFFERENCE = 0.01  # of these losses; where a model has learned its task, rounding is a large part of a loss


class Trainer:
    """Model, optimizer and data of a run, on a device. start: the weights of a pixel model, as `pixel_state` gives."""

    def __init__(
        self, settings: Settings, device: torch.device | str = "cpu", start: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.task = make_task(settings.task, settings.knobs)
        self.source = Source(self.task, self.device)
        weight = None if start is None or is_of_tokens(start) else pixel_embedding(start, settings.patch)
        if settings.variant == MIXED:
            self.encoder = MixedEncoder(self.task, self.device, settings.patch)
        else:
            self.encoder = make_encoder(
                settings.variant, self.task, self.device, settings.patch, weight, self._fit_frames
            )
        self.encoder.fit(self._fit_frames())
        example = self.encoder.encode(next(self._fit_frames()))
        example = example[..., : example.shape[-1] - self.encoder.place_floats]
        self.live_floats = int((example.flatten(0, 1).std(dim=0) > 1e-6).sum())
        self.num_floats = example.shape[-1]
        self.model = self._build_model(start, weight, example)
        lengths = (self.task.question_length, self.task.answer_length)
        self.layout = Layout.build(self.model, self.encoder.grid, self.task.duration > 1, *lengths)
        self.places = MixedPlaces(self.model, self.encoder, *lengths) if settings.variant == MIXED else None
        self._choosers: dict[str, SkippingEncoder] = {}
        self.optimizer = self._build_optimizer()
        self.layers = PLAIN
        self.scored = torch.tensor(self.task.scored, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, ...] | None = None  # what the graph reads
        self.loss: torch.Tensor | None = None

    def _fit_frames(self) -> Iterator[torch.Tensor]:
        for number in range(math.ceil(self.settings.fit / 64)):
            yield self.source.batch("fit", 0, number, min(64, self.settings.fit)).frames

    def _build_model(self, start: dict | None, weight: torch.Tensor | None, example: torch.Tensor):
        settings = self.settings
        model = build_model(settings.size, self.num_floats, settings.seed, settings.tower_spread).to(self.device)
        if start is None:
            if self.settings.unseen == "zero":
                zero_columns(model, ~self.encoder.in_patch(self.settings.patch, self.num_floats))
            scale_patch_embedding(model, example)
        else:
            embedding = start[PATCH_EMBEDDING] if weight is None else start_embedding(self.encoder.variant, weight)
            if weight is None and self.encoder.variant.name != BASE:
                raise UserError(
                    f"variant {self.settings.variant} cannot start from a model of x4: choose pixels or exact"
                )
            more = self.num_floats - embedding.shape[1]  # of which no start knows
            embedding = torch.nn.functional.pad(embedding, (0,) * 6 + (0, more)).to(self.device)
            set_patch_embedding(model, embedding)
            model.load_state_dict({**start, PATCH_EMBEDDING: embedding})
        model.generation_config.eos_token_id = model.config.eos_token_id
        model.generation_config.pad_token_id = model.config.pad_token_id
        return model

    def pixel_state(self) -> dict[str, torch.Tensor]:
        """The weights, on the CPU, of what others start from: a model of pixels, in `exact` with its patch embedding
        over normalised pixels again. Of `x4` the model itself, for variants with its tokens."""
        config, state = (
            self.encoder.variant.config,
            {name: value.cpu() for name, value in self.model.state_dict().items()},
        )
        embedding = state[PATCH_EMBEDDING]
        if config is not None and self.settings.variant != BASE:
            embedding = unfold_patch_embedding(embedding, config)
        return {**state, PATCH_EMBEDDING: embedding.reshape(len(embedding), -1, 1, 1, 1)}

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Matrices decay; gains, biases and embeddings of ids do not. The rate of a matrix goes with 1 / its inputs
        (muP, Yang et al. 2022, arXiv:2203.03466), which for the patch embedding are the floats of a token."""
        ids = self.model.model.embed_tokens.weight
        matrices: dict[int, list[torch.nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.ndim > 1 and parameter is not ids:
                matrices.setdefault(parameter[0].numel(), []).append(parameter)
        rest = [parameter for parameter in self.model.parameters() if parameter.ndim == 1 or parameter is ids]
        groups = [{"params": rest, "weight_decay": 0.0, "share": 1.0}]
        for inputs, parameters in matrices.items():
            share = min(1.0, BASE_INPUTS / inputs)
            groups.append({"params": parameters, "weight_decay": self.settings.weight_decay, "share": share})
        if self.device.type != "cuda":
            return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
        for group in groups:
            group["lr"] = torch.zeros((), device=self.device)
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, capturable=True)

    def autocast(self) -> torch.autocast:
        """bf16 on CUDA, fp32 elsewhere. Without its cache of cast weights, which a CUDA graph must not keep."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def cells(self, tokens: torch.Tensor, variant: str | None = None) -> tuple[torch.Tensor, ...]:
        """Which cells of tokens [B, N, K] the vision tower and the language model see, bool [B, V] each; () for all.

        variant: one that leaves out others of the same tokens; None: the run's.
        """
        name = variant or self.settings.variant
        if name not in LEFT_OUT:
            return ()
        if name not in self._choosers:
            self._choosers[name] = SkippingEncoder(name, self.encoder.variant, self.task, self.device)
        kept = self._choosers[name].choose(tokens)
        return kept.tower, kept.language

    def training_cells(self, tokens: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        """`cells` of the tokens of a training step; some variants keep all cells of some of its samples.

        number: Of the step.
        """
        cells, settings = self.cells(tokens), self.settings
        share = share_left_out(settings.variant, number / settings.steps)
        if share == 1:
            return cells
        random = Random(generator_for(self.device, "share left out", settings.seed, number))
        whole = random.uniform(0, 1, len(tokens), 1) >= share
        return tuple(kept | whole for kept in cells)

    def layout_of(self, tokens: torch.Tensor) -> Layout:
        """Of samples [B, N, K]."""
        return self.layout if self.places is None else self.places.layout_of(tokens)

    def kept_share(self) -> float:
        """Of the cells of the fit images, those that the language model sees."""
        if self.settings.variant not in LEFT_OUT:
            return 1.0
        kept = [self.cells(self.encoder.encode(frames))[1] for frames in self._fit_frames()]
        return torch.cat(kept).float().mean().item()

    def _targets(self, answer: torch.Tensor) -> torch.Tensor:
        """int64 [B, A + 1]: the answer and the end after it."""
        return torch.cat([answer, self.layout.end.expand(len(answer), -1)], dim=1)

    def _loss(
        self, tokens: torch.Tensor, question: torch.Tensor, answer: torch.Tensor, *cells: torch.Tensor
    ) -> torch.Tensor:
        with self.autocast():
            layout = self.layout_of(tokens)
            logits = answer_logits(self.model, layout, tokens, question, answer, self.layers, *cells)
        return cross_entropy(logits.float().flatten(0, 1), self._targets(answer).flatten())

    def _optimize(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss. Asks the device for nothing. inputs: as of `_loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        return loss.detach()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * group["share"])
            else:
                group["lr"] = rate * group["share"]

    def capture(self) -> None:
        """Compiles the layers, captures a step in a CUDA graph, and puts weights and optimizer back to where they were.

        Raises RuntimeError if the captured step does not compute what the plain step computes.
        """
        batch = self.source.batch("train", self.settings.seed, 0, self.settings.batch)
        tokens = self.encoder.encode(batch.frames)
        self.inputs = (tokens, batch.question.clone(), batch.answer.clone(), *self.training_cells(tokens, 0))
        with torch.no_grad():
            plain = self._loss(*self.inputs).item()
        self.layers = compiled_layers()
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._optimize(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._optimize(*self.inputs)
        self._restore(before)
        self.graph.replay()
        captured = self.loss.item()
        self._restore(before)
        if not math.isclose(captured, plain, rel_tol=GRAPH_TOLERANCE, abs_tol=LEAST_DIFFERENCE):
            raise RuntimeError(f"the CUDA graph gives a loss of {captured}, the plain step {plain}")

    @torch.no_grad()
    def _restore(self, parameters: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), parameters):
            parameter.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def step(self, number: int, clock: "StepClock | None" = None) -> torch.Tensor:
        """Draws, encodes and learns one batch; returns its loss as a tensor that the next step may overwrite."""
        marks = clock or StepClock(self.device, active=False)
        marks.mark("begin")
        batch = self.source.batch("train", self.settings.seed, number, self.settings.batch)
        marks.mark("draw")
        tokens = self.encoder.encode(batch.frames)
        inputs = (tokens, batch.question, batch.answer, *self.training_cells(tokens, number))
        marks.mark("encode")
        self._set_rate(self.settings.rate(number))
        if self.graph is None:
            self.loss = self._optimize(*inputs)
        else:
            for static, value in zip(self.inputs, inputs):
                static.copy_(value)
            self.graph.replay()
        marks.mark("train")
        return self.loss

    def _test_samples(self, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Tokens, question, answer and level of the first `count` test samples, TESTED_AT_ONCE at once."""
        sizes, together = pieces(count, DRAWN_AT_ONCE), TESTED_AT_ONCE // DRAWN_AT_ONCE
        for start in range(0, len(sizes), together):
            drawn = []
            for number, size in enumerate(sizes[start : start + together], start):
                batch = self.source.batch("test", 0, number, DRAWN_AT_ONCE)
                tokens = self.encoder.encode(batch.frames[:size])
                drawn.append((tokens, *(part[:size] for part in (batch.question, batch.answer, batch.level))))
            yield tuple(torch.cat(parts) for parts in zip(*drawn))

    @torch.no_grad()
    def test(self, count: int, asked: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher-forced on the first `count` test samples: right bool [count, S], level int64 [count, S], NOT_SCORED
        where an answer does not count. asked: with the cells of this variant (`cells`)."""
        right, levels = [], []
        for tokens, question, answer, level in self._test_samples(count):
            with self.autocast():
                cells = self.cells(tokens, asked)
                logits = answer_logits(self.model, self.layout_of(tokens), tokens, question, answer, PLAIN, *cells)
            said = logits[:, :-1].argmax(dim=-1)
            right.append((said == answer)[:, self.scored])
            levels.append(level)
        return torch.cat(right).cpu(), torch.cat(levels).cpu()

    @torch.no_grad()
    def test_generation(self, count: int) -> dict[str, float] | None:
        """Real greedy answers to the first `count` test samples: the accuracy, and how often the same token is right or
        wrong when teacher-forced."""
        # Nothing but a mask leaves out cells after the tower, and stock generation knows one size of cells.
        if not count or self.settings.variant in ("x4-evs", MIXED):
            return None
        self.model.eval()
        right = []
        for tokens, question, answer, _ in self._test_samples(count):
            for some in zip(*(part.split(GENERATE_AT_ONCE) for part in (tokens, question, answer))):
                with self.autocast():
                    said = self._generated(*some)
                right.append((said == some[2])[:, self.scored])
        right = torch.cat(right).cpu()
        self.model.train()
        forced, level = self.test(count)
        counts = level != NOT_SCORED
        agreement = (right == forced)[counts].float().mean().item()
        return {"samples": count, "accuracy": share(right, counts), "agrees_with_forced": agreement}

    def _generated(self, tokens: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Greedy answers; cells that the tower does not see have no tokens."""
        cells, length = self.cells(tokens), answer.shape[1]
        if not cells:
            return generate(self.model, self.layout, tokens, question, length)
        return generate_skipping(self.model, self.layout, tokens, cells[0], question, length)

    def asked_otherwise(self, count: int) -> dict[str, float] | None:
        """Accuracy on the first `count` test samples with all cells, and with those left out that `x4-skip` leaves out,
        whichever the model was trained with. None for a task or variant without such a choice: tokens of `x4-skip-age`
        say which cells were left out."""
        asked_both_ways = {BASE, *LEFT_OUT} - {AGED}
        if type(self.task) not in fixed_camera.TASKS or self.settings.variant not in asked_both_ways:
            return None
        found = {}
        for asked in (BASE, "x4-skip"):
            right, level = self.test(count, asked)
            found[asked] = share(right, level != NOT_SCORED)
        return found


class StepClock:
    """Milliseconds of the parts of steps; on CUDA by events, which make nothing wait."""

    def __init__(self, device: torch.device, active: bool = True) -> None:
        self.cuda, self.active, self.steps = device.type == "cuda", active, []

    def mark(self, part: str) -> None:
        """Ends a part; "begin" starts a step."""
        if not self.active:
            return
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        if part == "begin":
            self.steps.append([])
        self.steps[-1].append((part, moment))

    def medians(self) -> dict[str, float]:
        """Median milliseconds of each part."""
        times: dict[str, list[float]] = {}
        for marks in self.steps:
            for (_, start), (part, end) in pairwise(marks):
                times.setdefault(part, []).append(start.elapsed_time(end) if self.cuda else 1000 * (end - start))
        return {part: sorted(values)[len(values) // 2] for part, values in times.items()}


def is_of_tokens(state: dict[str, torch.Tensor]) -> bool:
    """Whether a saved model reads the tokens of `x4`, not pixels: it is saved with their 3/2 floats."""
    floats = state[PATCH_EMBEDDING].shape[1]
    return floats % (3 * FRAMES) != 0 or math.isqrt(floats // (3 * FRAMES)) ** 2 * 3 * FRAMES != floats


def pixel_embedding(state: dict[str, torch.Tensor], patch: int) -> torch.Tensor:
    """The patch embedding [E, 3, 2, patch, patch] of a saved pixel model."""
    return state[PATCH_EMBEDDING].reshape(-1, 3, FRAMES, patch, patch).cpu()


def start_embedding(variant: Variant, weight: torch.Tensor) -> torch.Tensor:
    """The pixel model's patch embedding as a variant reads its tokens: [E, K, 1, 1, 1]. Raises UserError for a variant
    that it cannot be carried over to."""
    if variant.config is not None:
        return fold_patch_embedding(weight, variant.config, tuple(weight.shape[2:]))
    if variant.scaling != "clip":
        raise UserError(
            f"variant {variant.name} cannot start from a pixel model: choose pixels, quarter or a DCT variant"
        )
    return weight.reshape(len(weight), -1, 1, 1, 1)


def pieces(count: int, size: int) -> list[int]:
    """Sizes of the pieces of up to `size` that make up `count`."""
    return [min(size, count - start) for start in range(0, count, size)]
