"""What the device's memory holds while the megatron engine trains, counted from the model's configuration.

    peak of a step = fixed + tokens * text + vision tokens * vision + what the backward pass adds at its widest place

Letters of this file, of the language model and of the vision tower:

    h f q k    width, inner width of the MLP, width of all queries, width of all keys
    e g        width, inner width of the MLP (its queries, keys and values are e wide)
    V R        words of the vocabulary, rank of adapters
    K m        floats of a vision token, merge size of the tower

A number of the model in bf16 takes 2 bytes. Activations that stay until the backward pass are what each layer needs
there: TransformerEngine's fused layers keep the input of a norm and its output, attention keeps queries, keys, values,
its output and one float32 a head, a gated MLP keeps both halves before the gate and their product after it. The output
of a norm and of a gate is kept for the gradient of the weights behind it alone, so not where these are frozen and have
no adapters. With recompute a block keeps its input.

`Corrections` has one factor for each term, from a run of benchmarks/speed/memory.py.
"""

from dataclasses import dataclass, replace
from typing import Any

from dct_qwen2vl.training.config import TrainingConfig

HALF, FLOAT = 2, 4  # bytes of a number in bf16 and in float32
GRADIENT, OPTIMIZER = FLOAT, 3 * FLOAT  # of a trained weight: Megatron's gradient; float32 weight and two moments
GIB = 1 << 30


@dataclass(frozen=True)
class Corrections:
    """Factors of the derived terms, 1.0 where they need none, and what is kept free.

    fixed, text, vision, head, working: factors of the terms of `Stage` with these names; fixed also of waiting.
    reserve: bytes. Workspaces of libraries, buffers of NCCL, kernels that are loaded later.
    reserve_share: share of the free memory that is left to fragments.
    """

    fixed: float = 1.0
    text: float = 1.0
    vision: float = 1.0
    head: float = 1.0
    working: float = 1.0
    reserve: int = 1 * GIB
    reserve_share: float = 0.02

    def room(self, free: float) -> float:
        """Bytes that a step may take of the free ones."""
        return free * (1 - self.reserve_share) - self.reserve


MEASURED = Corrections()


@dataclass(frozen=True)
class Training:
    """What is trained, and how the model is spread over processes.

    vision, projector, language: whether all weights of the part are trained.
    lora_rank: of adapters in the language model's blocks; 0: none.
    recompute: activations of blocks are computed again in the backward pass.
    """

    vision: bool = True
    projector: bool = True
    language: bool = True
    lora_rank: int = 0
    recompute: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1

    @classmethod
    def of(cls, config: TrainingConfig) -> "Training":
        """As the command line has it."""
        return cls(
            vision="vision" not in config.freeze,
            projector="projector" not in config.freeze,
            language="language" not in config.freeze and not config.lora_rank,
            lora_rank=config.lora_rank,
            recompute=config.recompute,
            tensor_parallel=config.tensor_parallel,
            pipeline_parallel=config.pipeline_parallel,
            data_parallel=config.data_parallel,
        )


@dataclass(frozen=True)
class Stage:
    """Bytes of one process of a pipeline stage. Without pipeline parallelism there is one stage.

    fixed: weights, gradients, optimizer.
    waiting: the head's share of a tied embedding's gradient, which waits for the other end of the backward pass.
    text: kept by a token of a packed sequence.
    vision: kept by a token of the vision tower.
    head: of a token that is learned: its logits, in which the loss puts their gradient.
    working_text, working_vision: added by a token while the backward pass is in a block.
    merge: vision tokens of a visual token.
    """

    fixed: float
    waiting: float
    text: float
    vision: float
    head: float
    working_text: float
    working_vision: float
    merge: int

    def peak(self, tokens: int, vision_tokens: int, learned: int | None = None) -> float:
        """Bytes at the widest place of a step over one packed sequence.

        tokens: of the packed sequence.
        vision_tokens: of the vision tower in it.
        learned: tokens; None: all that are not visual.
        """
        learned = tokens - vision_tokens // self.merge if learned is None else learned
        kept = tokens * self.text + vision_tokens * self.vision
        behind_head = max(learned * self.head, tokens * self.working_text)
        in_tower = vision_tokens * self.working_vision - tokens * self.text
        return self.fixed + self.waiting + kept + max(behind_head, in_tower)


@dataclass(frozen=True)
class Weights:
    """How many weights each part has."""

    vision: int
    projector: int
    block: int
    blocks: int
    embedding: int
    tied: bool

    @property
    def total(self) -> int:
        embeddings = self.embedding * (1 if self.tied else 2)
        return self.vision + self.projector + self.blocks * self.block + embeddings


def widths(config: Any) -> tuple[int, int, int, int]:
    """h, f, q, k of a Qwen2VLConfig."""
    head = config.hidden_size // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    return config.hidden_size, config.intermediate_size, query, key


def tower_widths(vision: Any) -> tuple[int, int, int]:
    """e, g, K of its vision_config."""
    token = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), token


def count_weights(config: Any) -> Weights:
    """Of a Qwen2-VL, by its configuration; the last norm (h) is counted with the projector.

    Block of the language model: Q, K, V with biases (h + 1)(q + 2k), output qh, MLP 3hf, two norms 2h.
    Block of the tower: four matrices 4e^2 with biases 4e, MLP 2eg + g + e, two norms with biases 4e. Before them Ke.
    Projector: norm 2e, then over n = e m^2: n^2 + n, nh + h.
    """
    h, f, q, k = widths(config)
    e, g, token = tower_widths(config.vision_config)
    merged = e * config.vision_config.spatial_merge_size**2
    return Weights(
        vision=token * e + config.vision_config.depth * (4 * e * e + 4 * e + 2 * e * g + g + e + 4 * e),
        projector=2 * e + merged * merged + merged + merged * h + h + h,
        block=(h + 1) * (q + 2 * k) + q * h + 3 * h * f + 2 * h,
        blocks=config.num_hidden_layers,
        embedding=config.vocab_size * h,
        tied=config.tie_word_embeddings,
    )


def count_adapters(config: Any, rank: int) -> int:
    """Weights of a block's adapters, R (in + out) for each of Megatron's four linear layers: the fused Q, K, V; the
    output; the fused gate and up; down."""
    h, f, q, k = widths(config)
    return rank * ((h + q + 2 * k) + (q + h) + (h + 2 * f) + (f + h))


def text_activations(config: Any, training: Training) -> float:
    """Bytes that a block keeps of a token, without recompute.

    Inputs of two norms 2h; Q, K, V as one (q + 2k), Q and K turned (q + k), attention's output q; gate and up 2f; for
    gradients of weights or adapters the norms' outputs 2h and the gated product f; 4 bytes a head; 4R of adapters.
    """
    h, f, q, k = widths(config)
    learns = training.language or training.lora_rank
    split = (q + 2 * k) + (q + k) + q + 2 * f + (f if learns else 0)
    whole = 2 * h + (2 * h if learns else 0) + 4 * training.lora_rank
    size = training.tensor_parallel
    return HALF * (whole + split / size) + FLOAT * config.num_attention_heads / size


def vision_activations(vision: Any, training: Training) -> float:
    """Bytes that a block of the trained tower keeps of a vision token, without recompute.

    Inputs and outputs of two norms 4e; Q, K, V 3e, Q and K turned 2e, attention's output e; the MLP before and after
    its activation 2g; 4 bytes a head.
    """
    e, g, _ = tower_widths(vision)
    size = training.tensor_parallel
    return HALF * (4 * e + (6 * e + 2 * g) / size) + FLOAT * vision.num_heads / size


def stages(config: Any, training: Training, corrections: Corrections = MEASURED) -> list[Stage]:
    """The first and the last pipeline stage, or the only one.

    config: Qwen2VLConfig.
    training: what is trained, on how many processes.
    corrections: factors of the terms.
    """
    numbers = (0,) if training.pipeline_parallel == 1 else (0, training.pipeline_parallel - 1)
    return [_stage(config, training, number, corrections) for number in numbers]


def peak(of_stages: list[Stage], tokens: int, vision_tokens: int) -> float:
    """Bytes of the process that takes most.

    of_stages: as `stages` gives them.
    tokens: of the packed sequence.
    vision_tokens: of the vision tower in it.
    """
    return max(stage.peak(tokens, vision_tokens) for stage in of_stages)


def _stage(config: Any, training: Training, number: int, corrections: Corrections) -> Stage:
    first, last = number == 0, number == training.pipeline_parallel - 1
    blocks = config.num_hidden_layers / training.pipeline_parallel
    in_flight = training.pipeline_parallel - number  # packed sequences whose activations a stage holds
    return Stage(
        fixed=corrections.fixed * _fixed(config, training, blocks, first, last),
        waiting=corrections.fixed * _waiting(config, training) if last else 0.0,
        text=corrections.text * in_flight * _text(config, training, blocks, first, last),
        vision=corrections.vision * in_flight * _vision(config, training) if first else 0.0,
        head=corrections.head * HALF * (config.vocab_size / training.tensor_parallel + config.hidden_size) * last,
        working_text=corrections.working * _working_text(config, training),
        working_vision=corrections.working * _working_vision(config, training) if first else 0.0,
        merge=config.vision_config.spatial_merge_size**2,
    )


def _fixed(config: Any, training: Training, blocks: float, first: bool, last: bool) -> float:
    """Weights 2 bytes; of those trained also the gradient 4 and the optimizer 12, which data-parallel processes
    share."""
    weights = count_weights(config)
    embeddings = first + (last and (training.pipeline_parallel > 1 or not weights.tied))
    frozen = trained = 0.0
    parts = [
        (weights.block * blocks, training.language),
        (weights.embedding * embeddings, training.language),
        (count_adapters(config, training.lora_rank) * blocks, True),
        *([(weights.vision, training.vision), (weights.projector, training.projector)] if first else []),
    ]
    for count, learns in parts:
        trained += count * learns
        frozen += count * (not learns)
    each = HALF + GRADIENT + OPTIMIZER / training.data_parallel
    return (HALF * frozen + each * trained) / training.tensor_parallel


def _waiting(config: Any, training: Training) -> float:
    """Vh in bf16, where the embedding is trained; of an untied head it is the whole gradient, on its way."""
    return HALF * config.vocab_size * config.hidden_size * training.language / training.tensor_parallel


def _text(config: Any, training: Training, blocks: float, first: bool, last: bool) -> float:
    """Blocks; in the first stage the embedding and what stands in its place (3h); in the last the last norm (2h); the
    angles of rotary embedding, float32."""
    h, *_ = widths(config)
    block = HALF * h if training.recompute else text_activations(config, training)
    angles = FLOAT * h / config.num_attention_heads
    return blocks * block + HALF * h * (3 * first + 2 * last) + angles


def _vision(config: Any, training: Training) -> float:
    """Tokens K; blocks of a trained tower; the projector's norm and activation 4e and its output h / m^2."""
    vision = config.vision_config
    e, _, token = tower_widths(vision)
    kept = HALF * token + FLOAT * e / vision.num_heads
    if training.vision:
        kept += vision.depth * (HALF * e if training.recompute else vision_activations(vision, training))
    if training.vision or training.projector:
        kept += HALF * (4 * e + config.hidden_size / vision.spatial_merge_size**2)
    return kept


def _working_text(config: Any, training: Training) -> float:
    """Gradients in an MLP: of its input and output 2h, of the gated product f, of both halves 2f. With recompute also
    all activations of one block."""
    h, f, _, _ = widths(config)
    gradients = HALF * (2 * h + 3 * f / training.tensor_parallel)
    return gradients + (text_activations(config, training) if training.recompute else 0)


def _working_vision(config: Any, training: Training) -> float:
    """The same in the trained tower: 2e and 2g."""
    vision = config.vision_config
    if not training.vision:
        return 0.0
    e, g, _ = tower_widths(vision)
    gradients = HALF * (2 * e + 2 * g / training.tensor_parallel)
    return gradients + (vision_activations(vision, training) if training.recompute else 0)


# The packed sequence that fits


GRAIN = 256  # tokens by which budgets are rounded down
MOST_TOKENS = 32768  # of a packed sequence: longer ones are no faster, and loaders hold several


@dataclass(frozen=True)
class Chosen:
    """Budgets of a packed sequence, and what they are expected to take.

    fixed, peak: bytes, of the process that takes most.
    """

    tokens: int
    vision_tokens: int
    recompute: bool
    fixed: float
    peak: float


def choose(
    config: Any,
    training: Training,
    free: float,
    seq_length: int,
    most: int = MOST_TOKENS,
    vision_tokens: int | None = None,
    corrections: Corrections = MEASURED,
) -> Chosen | None:
    """The largest packed sequence that fits. None where not even the longest sample does.

    Blocks are computed again where a sequence of `seq_length` tokens does not fit otherwise.

    config: Qwen2VLConfig.
    training: what is trained, on how many processes.
    free: bytes.
    seq_length: tokens of the longest sample, all of which may be visual.
    most: tokens of a packed sequence, where the longest sample has no more.
    vision_tokens: where they are given; None: twice the tokens.
    corrections: factors of the terms, and what is kept free.
    """
    most = max(most, -(-seq_length // GRAIN) * GRAIN)
    for recompute in (False, True)[training.recompute :]:
        found = _largest(
            stages(config, replace(training, recompute=recompute), corrections),
            corrections.room(free), seq_length, most, vision_tokens, recompute,
        )  # fmt: skip
        if found:
            return found
    return None


def longest_sample(of_stages: list[Stage], seq_length: int) -> float:
    """Bytes of a step over one sample that is as long as it may be, and all visual.

    of_stages: as `stages` gives them.
    seq_length: tokens of the sample.
    """
    return peak(of_stages, seq_length, of_stages[0].merge * seq_length)


def _largest(
    of_stages: list[Stage], room: float, seq_length: int, most: int, vision_tokens: int | None, recompute: bool
) -> Chosen | None:
    if longest_sample(of_stages, seq_length) > room:
        return None
    for tokens in range(most // GRAIN * GRAIN, 0, -GRAIN):
        if tokens < seq_length:
            return None
        beside = vision_tokens or 2 * tokens
        needed = peak(of_stages, tokens, min(beside, of_stages[0].merge * tokens))
        if needed <= room:
            return Chosen(tokens, beside, recompute, max(stage.fixed for stage in of_stages), needed)
    return None
