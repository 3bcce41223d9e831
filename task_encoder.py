"""Energon task encoder for Qwen2-VL: shards of conversations and media -> batches of ids, labels, positions, tokens.

    cook    the parts of a crude sample (json, jpg, mp4, ...), raw or already decoded by Energon -> ConversationSample
    encode  conversation -> ids by segments, labels, M-RoPE positions; media -> DCT tokens -> EncodedSample
    batch   right padding, labels shifted by one -> QwenBatch

Letters used for shapes in this file:

    B L    samples of a batch, tokens of its longest sample
    N K    vision tokens of all media of a batch, floats of one token
    M      media (images, or clips) of a sample or a batch
"""

import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Batch,
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    Sample,
    SkipSample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import FatalSampleError

from media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaError, VideoSampling, part_order
from media_encoder import BadSample, MediaEncoder, stack_media
from media_encoder import PixelFit as PixelFit  # for users of this file
from turns import DEFAULT_SYSTEM, LONE_SURROGATE, ROLES, content_of, names_media, put_first, split_turns, text_of

# Shards hold file bytes and decoding is done here, in media.py; this is what a dataset.yaml that does not say gets.
DATASET_OPTIONS = {"auto_decode": False}
IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default: positions that are not learned


class TooManyBadSamples(FatalSampleError):
    """So many samples in a row were bad that the data set, not a sample, is the problem. Energon passes it on."""


@dataclass
class ConversationSample(Sample):
    """entry: the json part. media: (kind, content) in order, kind "image" or "video", content as found in the shard."""

    entry: dict[str, Any]
    media: list[tuple[str, Any]] = field(repr=False)  # Energon writes a sample that failed into its messages


@dataclass
class EncodedSample(Sample):
    """One conversation.

    input_ids int64 [L]; labels int64 [L], aligned with input_ids, IGNORE_INDEX where not learned; position_ids int64
    [3, L] (time, row, column); pixel_values float32 [N, K] and image_grid_thw int64 [M, 3] of its images, the other
    two of its clips (N and M may be 0).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor


@dataclass
class QwenBatch(Batch):
    """A micro-batch. `keys` are the samples' keys.

    labels int64 [B, L] are already shifted: labels[b, i] is the token that position i has to predict. position_ids
    int64 [3, B, L]. attention_mask int64 [B, L]. pixel_values float32 [N, K] of all images in order, image_grid_thw
    int64 [M, 3]; likewise for clips. skipped: samples left out since the previous batch of the same worker, by reason.

    A batch without keys stands for none: its one learned token is not to be counted (`QwenTaskEncoder.blank_batch`).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor
    keys: list[str]
    skipped: dict[str, int] = field(default_factory=dict)

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of Qwen2VLForConditionalGeneration.forward, without labels; absent media are left out."""
        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}
        if len(self.image_grid_thw):
            inputs.update(pixel_values=self.pixel_values, image_grid_thw=self.image_grid_thw)
        if len(self.video_grid_thw):
            inputs.update(pixel_values_videos=self.pixel_values_videos, video_grid_thw=self.video_grid_thw)
        return inputs


def cook(crude: dict[str, Any]) -> ConversationSample:
    """Sorts the parts of a crude sample. Part names: `json`, `jpg`, `0.jpg`, `1.png`, `mp4`, ...; only the last
    extension counts, so `jpg.jpg` + `jpg.json` (keys that held a file ending) are read as well. Media come in the order
    of `part_order`; those of one number, or of none, in that of the shard."""
    entry, media = None, []
    for name, content in crude.items():
        if name.startswith("__"):
            continue
        extension = name.lower().split(".")[-1]
        if extension == "json":
            entry = content
        elif extension in IMAGE_EXTENSIONS:
            media.append((part_order(name), "image", content))
        elif extension in VIDEO_EXTENSIONS:
            media.append((part_order(name), "video", content))
    media.sort(key=lambda part: part[0])
    return ConversationSample(
        **basic_sample_keys(crude), entry=entry, media=[(kind, content) for _, kind, content in media]
    )


def parse_entry(entry: Any) -> Any:
    """The json part, raw bytes or already decoded -> its value. Raises BadSample."""
    if not isinstance(entry, (bytes, str)):
        return entry
    try:
        return json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error


def parse_messages(entry: Any, has_media: bool) -> list[tuple[str, list[str]]]:
    """(role, pieces) of the turns of an entry, LLaVA (`from`/`value`) or OpenAI (`role`/`content`), roles "system",
    "user", "assistant"; pieces as in turns.py, those of a system turn one text. has_media: whether the sample has
    any. Raises BadSample."""
    turns = entry.get("conversations") or entry.get("messages") if isinstance(entry, dict) else entry
    if not isinstance(turns, list) or not turns:
        raise BadSample("no_conversation", "the json part holds no list of turns")
    roles = [check_turn(turn) for turn in turns]
    expected = ["user", "assistant"] * len(roles)
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != expected[: len(spoken)]:
        raise BadSample("bad_roles", f"user and assistant must take turns, got {', '.join(roles)[:80]}")
    contents = [content_of(turn) for turn in turns]
    split = split_turns(list(zip(roles, contents)), has_media or names_media(entry))
    if any(role == "assistant" and len(pieces) > 1 for role, pieces in zip(roles, split)):
        raise BadSample("placeholder_in_answer")
    return [
        (role, [text_of(content)] if role == "system" else pieces)
        for role, content, pieces in zip(roles, contents, split)
    ]


def check_turn(turn: Any) -> str:
    """The role of a turn. Raises BadSample for a turn without a known role or text."""
    role = ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
    text = text_of(content_of(turn)) if role else None
    if text is None or LONE_SURROGATE.search(text):
        raise BadSample("bad_turn", f"a turn needs a known role and text, got {str(turn)[:80]!r}")
    return role


def mrope_positions(runs: list[int | tuple[int, int, int]]) -> np.ndarray:
    """M-RoPE position ids, int64 [3, L], of a sequence of runs: an int n is n text tokens, a tuple (t, h, w) is a
    visual run of t*h*w language-model tokens (grid after the spatial merge).

    Text advances all three axes together; a visual run counts time, row and column from where the text stopped, and
    the next text starts after its largest index (Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index`).
    """
    columns, start = [], 0
    for run in runs:
        if isinstance(run, tuple):
            columns.append(np.indices(run, dtype=np.int64).reshape(3, -1) + start)
            start += max(run)
        else:
            columns.append(np.broadcast_to(np.arange(start, start + run, dtype=np.int64), (3, run)))
            start += run
    return np.concatenate(columns, axis=1) if columns else np.zeros((3, 0), np.int64)


class _SampleReader(DefaultTaskEncoder):
    """Cooks and does nothing else."""

    cookers = (Cooker(cook),)

    @stateless
    def batch(self, samples: list[ConversationSample]) -> list[ConversationSample]:
        return samples


def read_samples(data_dir: Path, split: str) -> Iterator[ConversationSample]:
    """The samples of a split once, in the order of its shards, media as file bytes."""
    dataset = get_val_dataset(
        data_dir,
        split_part=split,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=_SampleReader(),
        **DATASET_OPTIONS,
    )
    for samples in get_loader(dataset):
        yield from samples


class QwenTaskEncoder(DefaultTaskEncoder[ConversationSample, EncodedSample, QwenBatch, QwenBatch]):
    """Stateless but for its counters, which change no sample.

    tokenizer: Qwen2-VL's, with its special tokens. image_processor: `DCTImageProcessor`, or any processor with
    Qwen2VLImageProcessor's interface. seq_length: samples with more tokens are skipped and counted, never cut.
    max_bad_in_a_row: that many consecutive failures in one worker stop the run.
    """

    cookers = (Cooker(cook),)

    def __init__(
        self,
        tokenizer,
        image_processor,
        seq_length: int = 2048,
        video_sampling: VideoSampling | None = None,
        max_bad_in_a_row: int = 100,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.seq_length = seq_length
        self.video_sampling = video_sampling or VideoSampling()
        self.max_bad_in_a_row = max_bad_in_a_row
        self._begin_counting()
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        ids = tokenizer.convert_tokens_to_ids(list(names))
        missing = [name for name, token_id in zip(names, ids) if token_id is None or token_id == tokenizer.unk_token_id]
        if missing:
            raise ValueError(f"the tokenizer lacks Qwen2-VL's special tokens {', '.join(missing)}")
        self._media = MediaEncoder(image_processor, self.video_sampling)
        self._im_start, self._im_end, self._vision_start, self._vision_end, *pads = ids
        self._pad = {"image": pads[0], "video": pads[1]}

    def _begin_counting(self) -> None:
        self.skipped: Counter[str] = Counter()
        self._told: Counter[str] = Counter()  # those of `skipped` that earlier batches have reported
        self._bad_in_a_row: Counter[str] = Counter()  # by what was done with them

    def take_skipped(self) -> dict[str, int]:
        """Samples left out since the last call, by reason. Each batch takes them along, so that their sum is right
        also where a loader that goes on after a restart makes some batches a second time."""
        new = self.skipped - self._told
        self._told = self.skipped.copy()
        return dict(new)

    def for_validation(self) -> "QwenTaskEncoder":
        """The same encoder with counters of its own, for a split that is read once."""
        return self._copied(type(self))

    def _copied(self, encoder_class: type["QwenTaskEncoder"]) -> "QwenTaskEncoder":
        encoder = encoder_class.__new__(encoder_class)
        vars(encoder).update(vars(self))
        encoder._begin_counting()
        return encoder

    def blank_batch(self) -> "QwenBatch":
        """A batch of no sample, for a process that has no more of them while others still have some. It has two text
        tokens, one of them learned, and no keys."""
        return replace(self.batch([self._blank_sample()]), keys=[], skipped={})

    def _blank_sample(self) -> EncodedSample:
        return EncodedSample(
            __key__="blank",
            __subflavor__=None,
            __subflavors__={},
            __restore_key__=(),
            input_ids=torch.tensor([self._im_start, self._im_end]),
            labels=torch.tensor([IGNORE_INDEX, self._im_end]),
            position_ids=torch.arange(2).expand(3, 2),
            **self._stack("image", [], "pixel_values", "image_grid_thw"),
            **self._stack("video", [], "pixel_values_videos", "video_grid_thw"),
        )

    @stateless
    def cook_crude_sample(self, sample: CrudeSample) -> ConversationSample:
        """Raises as `encode_sample`: Energon would print what a cooker raises and leave the sample out uncounted."""
        return self._or_skip(super().cook_crude_sample, sample)

    @stateless
    def encode_sample(self, sample: ConversationSample) -> EncodedSample:
        """Raises SkipSample for a bad sample, TooManyBadSamples after `max_bad_in_a_row` of them in a row."""
        return self._or_skip(self.encode, sample)

    def _or_skip(self, function: Callable[[Any], Any], sample: ConversationSample | CrudeSample) -> Any:
        """function(sample), with a bad sample counted, also one that trips over a mistake of this program, which is
        shown once: Energon would leave it out, and nobody would count it. Raises as `encode_sample`."""
        key = sample["__key__"] if isinstance(sample, dict) else sample.__key__
        try:
            result = function(sample)
        except (BadSample, MediaError) as error:
            self._skip(function.__name__, getattr(error, "reason", "undecodable_media"), key, str(error))
            raise SkipSample from error
        except Exception as error:
            if not self.skipped["unexpected_error"]:
                traceback.print_exception(error)
            self._skip(function.__name__, "unexpected_error", key, f"{type(error).__name__}: {error}")
            raise SkipSample from error
        self._bad_in_a_row[function.__name__] = 0
        return result

    def _skip(self, action: str, reason: str, key: str, why: str) -> None:
        self._bad_in_a_row[action] += 1
        self.skipped[reason] += 1
        if self._bad_in_a_row[action] >= self.max_bad_in_a_row:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.skipped.items()))
            raise TooManyBadSamples(
                f"{self._bad_in_a_row[action]} samples in a row could not be used ({counts}); the last was {key}: "
                f"{why}. Check the shards, or raise --max-bad-in-a-row"
            )

    def encode(self, sample: ConversationSample) -> EncodedSample:
        """As `encode_sample`, but raises BadSample or MediaError and counts nothing."""
        messages = self._messages(sample)
        media = [self._encode_media(kind, content) for kind, content in sample.media]
        ids, learned, runs = self._segments(messages, [(kind, grid) for kind, _, grid in media])
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return EncodedSample.derive_from(
            sample,
            input_ids=input_ids,
            labels=input_ids.masked_fill(~torch.tensor(learned), IGNORE_INDEX),
            position_ids=torch.from_numpy(mrope_positions(runs)),
            **self._stack("image", media, "pixel_values", "image_grid_thw"),
            **self._stack("video", media, "pixel_values_videos", "video_grid_thw"),
        )

    def measure(self, sample: ConversationSample) -> tuple[int, int]:
        """Tokens of the sample and vision tokens of its media, without decoding these. Raises as `encode`."""
        grids = [(kind, self._media.expected_grid(kind, content)) for kind, content in sample.media]
        ids, _, _ = self._segments(self._messages(sample), grids)
        return len(ids), sum(math.prod(grid) for _, grid in grids)

    def _messages(self, sample: ConversationSample) -> list[tuple[str, list[str]]]:
        messages = parse_messages(parse_entry(sample.entry), bool(sample.media))
        return self._place_media(messages, [kind for kind, _ in sample.media])

    @staticmethod
    def _place_media(messages: list[tuple[str, list[str]]], kinds: list[str]) -> list[tuple[str, list[str]]]:
        """Checks that placeholders and media agree; media that no turn mentions go before the first question."""
        placed = [kind for _, pieces in messages for kind in pieces[1::2]]
        if not placed and kinds:
            first = next(i for i, (role, _) in enumerate(messages) if role == "user")
            return [*messages[:first], ("user", put_first(kinds, messages[first][1])), *messages[first + 1 :]]
        if placed != kinds:
            raise BadSample("placeholder_mismatch", f"placeholders {placed}, media {kinds}: they must agree")
        return messages

    def _encode_media(self, kind: str, content: Any) -> tuple[str, torch.Tensor, tuple[int, int, int]]:
        """-> kind, tokens [N, K], grid (t, h, w)."""
        # A loader process has one thread for torch; decoders in it get no more.
        frames = self._media.read(kind, content, torch.get_num_threads())
        return kind, *self._media.encode(kind, frames)

    def _segments(
        self, messages: list[tuple[str, list[str]]], media: list[tuple[str, tuple[int, int, int]]]
    ) -> tuple[list[int], list[bool], list[int | tuple[int, int, int]]]:
        """-> ids, whether each is learned, runs for `mrope_positions`.

        The sequence is the one of Qwen2-VL's chat template: `<|im_start|>role\\n text <|im_end|>\\n` for each turn.
        Raises BadSample if it is over seq_length.
        """
        ids: list[int] = []
        learned: list[bool] = []
        runs: list[int | tuple[int, int, int]] = []

        def add(segment: list[int], learn: bool = False, grid: tuple[int, int, int] | None = None) -> None:
            ids.extend(segment)
            learned.extend([learn] * len(segment))
            runs.append(grid or len(segment))

        remaining = iter(media)
        if messages[0][0] != "system":
            messages = [("system", [DEFAULT_SYSTEM]), *messages]
        for role, pieces in messages:
            add([self._im_start])
            if role == "assistant":
                add(self._ids("assistant\n"))
                add([*self._ids(pieces[0]), self._im_end], learn=True)
            else:
                add(self._ids(f"{role}\n{pieces[0]}"))
                for piece in pieces[2::2]:
                    kind, (t, h, w) = next(remaining)
                    grid = (t, h // self.image_processor.merge_size, w // self.image_processor.merge_size)
                    add([self._vision_start])
                    add([self._pad[kind]] * (grid[0] * grid[1] * grid[2]), grid=grid)
                    add([self._vision_end, *self._ids(piece)])
                add([self._im_end])
            add(self._ids("\n"))
        if len(ids) > self.seq_length:
            raise BadSample("too_long", f"{len(ids)} tokens, the limit is {self.seq_length}")
        return ids, learned, runs

    def _ids(self, text: str) -> list[int]:
        """Plain text only: special tokens that stand in the data are spelled out, they open no turn and no picture."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def _stack(self, kind: str, media: list, tokens_name: str, grid_name: str) -> dict[str, torch.Tensor]:
        """Tokens [N, K] and grids [M, 3] of all media of a kind, empty tensors if there are none."""
        return dict(zip((tokens_name, grid_name), stack_media(kind, media)))

    @stateless
    def batch(self, samples: list[EncodedSample]) -> QwenBatch:
        """Pads on the right with <|endoftext|>, position 0 and IGNORE_INDEX; shifts the labels."""
        length = max(len(sample.input_ids) for sample in samples)
        pad_id = self.tokenizer.pad_token_id
        return QwenBatch(
            input_ids=torch.stack([_pad_right(s.input_ids, length, pad_id) for s in samples]),
            labels=torch.stack([_pad_right(s.labels[1:], length, IGNORE_INDEX) for s in samples]),
            attention_mask=torch.stack([_pad_right(torch.ones_like(s.input_ids), length, 0) for s in samples]),
            position_ids=torch.stack([_pad_right(s.position_ids, length, 0) for s in samples], dim=1),
            pixel_values=_cat([s.pixel_values for s in samples]),
            image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
            pixel_values_videos=_cat([s.pixel_values_videos for s in samples]),
            video_grid_thw=torch.cat([s.video_grid_thw for s in samples]),
            keys=[s.__key__ for s in samples],
            skipped=self.take_skipped(),
        )


def _pad_right(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[-1]), value=value)


def _cat(tokens: list[torch.Tensor]) -> torch.Tensor:
    """[N, K] of the samples that have any."""
    present = [t for t in tokens if len(t)]
    return torch.cat(present) if present else torch.zeros(0, 0)
