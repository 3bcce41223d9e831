"""One question through one model: its greedy answer, its logits, and a trace of every stage, small enough to keep.

Two models are compared by these, so that only one of them is in memory at a time.

Letters used for shapes in this file:

    L  tokens of the prompt
    A  tokens of the answer that is followed
    V  the vocabulary
    R  rows of a stage: vision tokens, or tokens of the language model
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dct_qwen2vl.evaluation.answering import Answerer
from dct_qwen2vl.evaluation.questions import Question

# In the order in which they are computed; newer transformers have them under other parents.
STAGES = re.compile(
    r"(model\.)?(visual\.(patch_embed|blocks\.\d+|merger)|(language_model\.)?(model\.)?(layers\.\d+|norm)|lm_head)"
)
SAME = 1e-4  # relative difference below which float32 results of one model count as equal


@dataclass(frozen=True)
class Trace:
    """A stage's output [R, width]: its product with a fixed random vector, and its norm, both float64 [R]."""

    product: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, output: torch.Tensor) -> "Trace":
        rows = output.detach().reshape(-1, output.shape[-1]).double().cpu()
        vector = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return cls(rows @ vector, rows.norm(dim=-1))

    def difference(self, other: "Trace") -> float:
        """About the norm of the difference of two outputs over that of this one; infinite for other shapes."""
        if self.product.shape != other.product.shape:
            return math.inf
        return finite((self.product - other.product).norm() / self.norm.norm())


@dataclass(frozen=True)
class Pass:
    """A model's answer to a question, and its forward pass over an answer of A tokens.

    prompt_tokens: Tokens of the prompt.
    tokens: Of the greedy answer.
    text: The greedy answer.
    logits: float32 [A, vocabulary], of the answer that was followed.
    traces: By stage, in order.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    logits: torch.Tensor
    traces: dict[str, Trace]


@dataclass(frozen=True)
class Difference:
    """How far two passes that followed the same answer differ.

    largest: Largest difference of logits, relative to the largest logit.
    mean: Mean difference of logits, relative to the largest logit.
    first_token: Number of the first token in which the greedy answers differ. None: they are equal.
    first_stage: Name of the first stage that differs by more than SAME. None: there is none.
    """

    largest: float
    mean: float
    first_token: int | None
    first_stage: str | None


def finite(value: torch.Tensor) -> float:
    """What is no number is an infinite difference."""
    number = float(value)
    return number if math.isfinite(number) else math.inf


def difference(one: Pass, other: Pass) -> Difference:
    """How far two passes on the same question differ, relative to the first one's largest logit.

    one: The pass that is compared with.
    other: The pass that is compared.
    """
    stages = [name for name, trace in one.traces.items() if name not in other.traces
              or trace.difference(other.traces[name]) > SAME]  # fmt: skip
    longest = max(len(one.tokens), len(other.tokens))
    tokens = [place for place in range(longest) if one.tokens[place : place + 1] != other.tokens[place : place + 1]]
    largest = mean = math.inf
    if one.logits.shape == other.logits.shape:
        relative = (one.logits - other.logits).abs() / one.logits.abs().max()
        largest, mean = finite(relative.max()), finite(relative.mean())
    return Difference(largest, mean, next(iter(tokens), None), next(iter(stages), None))


@torch.inference_mode()
def ask(answerer: Answerer, question: Question, follow: list[int] | None = None) -> Pass:
    """A model's greedy answer to a question, and the logits and traces of one forward pass.

    answerer: The model.
    question: To be asked.
    follow: Tokens of the answer whose logits are taken. None: the model's own answer.
    """
    inputs = answerer.model_inputs([question])
    length = inputs["input_ids"].shape[1]
    tokens = answerer.generate(inputs)[0].tolist()
    follow = tokens if follow is None else follow
    ids = torch.cat([inputs["input_ids"], torch.tensor([follow[:-1]], dtype=torch.int64)], dim=1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = {name: tensor.to(answerer.model.device) for name, tensor in inputs.items()}
    with traced(answerer.model) as traces:
        logits = answerer.model(**inputs, **answerer.time_inputs(inputs), use_cache=False).logits
    return Pass(length, tokens, answerer.text_tokens.decode(tokens), logits[0, length - 1 :].float().cpu(), traces)


@contextmanager
def traced(model: torch.nn.Module) -> Iterator[dict[str, Trace]]:
    """Fills a dict with the trace of each stage while the model runs."""
    traces: dict[str, Trace] = {}

    def keep(name: str):
        def hook(module, inputs, output) -> None:
            traces[name] = Trace.of(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [each.register_forward_hook(keep(name)) for name, each in model.named_modules() if STAGES.fullmatch(name)]
    try:
        yield traces
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, which rounds factors to 10 bits on a GPU: convolutions have it by default, and the patch embedding
    over pixels is one."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
