"""Energon task encoder for Qwen2-VL: shards of conversations and media -> batches of ids, labels, positions, tokens.

    cook    the parts of a crude sample (json, jpg, mp4, ...), raw or already decoded by Energon -> ConversationSample
    encode  conversation and media -> ids, labels, positions, DCT tokens of one sample (data/sample_encoder.py)
    batch   right padding, labels shifted by one -> QwenBatch

Letters used for shapes in this file:

    B L    samples of a batch, tokens of its longest sample
    N K    vision tokens of all media of a batch, floats of one token
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    SavableDataset,
    SkipSample,
    WorkerConfig,
    stateless,
)

from dct_qwen2vl.data.media import BadSample
from dct_qwen2vl.data.packing import BoundedPacking, HeldSamples, MeasuredSample, PackedBatch, fit_sequences, pack
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.sample_encoder import SampleEncoder, SkippingShare
from dct_qwen2vl.data.samples import (
    IGNORE_INDEX,
    ConversationSample,
    EncodedSample,
    QwenBatch,
    TooManyBadSamples,
    cook,
)
from dct_qwen2vl.data.videos import VideoSampling

TOO_LONG_REMEDY = "Raise --seq-length (SEQ_LENGTH), or lower --max-pixels (MAXPIXELS), of videos --video-total-pixels"
BAD_REMEDY = "Check the shards, or raise --max-bad-in-a-row"


class QwenTaskEncoder(DefaultTaskEncoder[ConversationSample, EncodedSample, QwenBatch, QwenBatch]):
    """Samples of a shard -> micro-batches. It has no state but counters, which change no sample.

    tokenizer: Qwen2-VL's, with its special tokens.
    image_processor: `DCTImageProcessor`, or any processor with Qwen2VLImageProcessor's interface.
    seq_length: Samples with more tokens are skipped and counted, never cut.
    video_sampling: Frames that are read of a video.
    max_bad_in_a_row: So many failures in a row in one worker stop the run.
    time_step: Of a video's positions, as `inspection.time_step` gives it.
    skipping: In which samples cells are skipped. None: in all. Validation skips them in all.

    If the image processor has a `skip_db`, cells that a kept cell already shows get no token (dct/skipping_dct.py).
    """

    cookers = (Cooker(cook),)

    def __init__(
        self,
        tokenizer,
        image_processor,
        seq_length: int = 2048,
        video_sampling: VideoSampling | None = None,
        max_bad_in_a_row: int = 100,
        time_step: float = 1.0,
        skipping: SkippingShare | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.seq_length = seq_length
        self.max_bad_in_a_row = max_bad_in_a_row
        self.samples = SampleEncoder(tokenizer, image_processor, seq_length, video_sampling, time_step, skipping)
        self._begin_counting()

    @property
    def skips(self) -> bool:
        """Whether some cells get no token."""
        return self.samples.skips

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
        """The same encoder with counters of its own, for a split that is read once. It skips cells as evaluation
        does."""
        return self._copied(type(self))

    def _copied(self, encoder_class: type["QwenTaskEncoder"]) -> "QwenTaskEncoder":
        encoder = encoder_class.__new__(encoder_class)
        vars(encoder).update(vars(self))
        encoder.samples = self.samples.skipping_always()
        encoder._begin_counting()
        return encoder

    def blank_batch(self) -> "QwenBatch":
        """A batch of no sample, for a process that has no more of them while others still have some. It has two text
        tokens, one of them learned, and no keys."""
        return replace(self.batch([self.samples.blank()]), keys=[], skipped={})

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
            most = max(self.skipped, key=self.skipped.get)
            raise TooManyBadSamples(
                f"{self._bad_in_a_row[action]} samples in a row could not be used ({counts}); the last was {key}: "
                f"{why}. {TOO_LONG_REMEDY if most == 'too_long' else BAD_REMEDY}"
            )

    def encode(self, sample: ConversationSample) -> EncodedSample:
        """As `encode_sample`, but without counting failures. Raises BadSample or MediaError."""
        return self.samples.encode(sample)

    def measure(self, sample: ConversationSample) -> tuple[int, int]:
        """Tokens of the sample and vision tokens of its media: `SampleEncoder.measure`."""
        return self.samples.measure(sample)

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
            image_kept=torch.cat([s.image_kept for s in samples]) if self.skips else None,
            video_kept=torch.cat([s.video_kept for s in samples]) if self.skips else None,
        )


def _pad_right(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, length - row.shape[-1]), value=value)


def _cat(tokens: list[torch.Tensor]) -> torch.Tensor:
    """[N, K] of the samples that have any."""
    present = [t for t in tokens if len(t)]
    return torch.cat(present) if present else torch.zeros(0, 0)


class PackingTaskEncoder(QwenTaskEncoder):
    """As `QwenTaskEncoder`, with packed sequences instead of padded batches. Media are decoded when their sequence is
    made.

    arguments: Of `QwenTaskEncoder`.
    pack_tokens: Most tokens of a sequence that several samples share.
    pack_vision_tokens: Most vision tokens of such a sequence.
    token_dtype: Of the vision tokens, the model's.
    held_bytes: With skipping, bytes of the vision tokens of samples that a worker holds until their sequence is chosen.
        The buffer of a training ends there.
    options: Of `QwenTaskEncoder`.

    A larger sample has a sequence of its own. Memory grows with both limits: in the 2B model, a vision token takes two
    thirds of what a token takes.
    """

    def __init__(
        self,
        *arguments,
        pack_tokens: int,
        pack_vision_tokens: int,
        token_dtype: torch.dtype = torch.bfloat16,
        held_bytes: int = 1 << 30,
        **options,
    ) -> None:
        super().__init__(*arguments, **options)
        self.held_bytes = held_bytes
        self._held = HeldSamples(held_bytes + held_bytes // 4)  # the last sequence still lives; ids and positions count
        self.budget = (pack_tokens, pack_vision_tokens)
        self.token_dtype = token_dtype

    @stateless
    def encode_sample(self, sample: ConversationSample) -> MeasuredSample:
        """Raises SkipSample, TooManyBadSamples."""
        if not self.skips:
            return MeasuredSample.derive_from(sample, conversation=sample, size=self._or_skip(self.measure, sample))
        encoded = self._in_token_dtype(super().encode_sample(sample))
        size = len(encoded.input_ids), len(encoded.pixel_values) + len(encoded.pixel_values_videos)
        held = self._held.hold(encoded)
        return MeasuredSample.derive_from(sample, conversation=sample if held is None else None, size=size, held=held)

    def _in_token_dtype(self, sample: EncodedSample) -> EncodedSample:
        names = ("pixel_values", "pixel_values_videos")
        return replace(sample, **{name: getattr(sample, name).to(self.token_dtype) for name in names})

    def build_batch(
        self,
        dataset: SavableDataset[MeasuredSample],
        *,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
        **options,
    ) -> SavableDataset[PackedBatch]:
        """Energon's packing and batching, with skipping by `BoundedPacking`."""
        if self.skips and packing_buffer_size is not None:
            dataset = BoundedPacking(
                dataset,
                packing_buffer_size,
                self.select_samples_to_pack,
                self.pack_selected_samples,
                final_packer_stateless=True,
                most_vision_tokens=self.held_bytes // (self.samples.token_width * self.token_dtype.itemsize),
                worker_config=worker_config,
            )
            packing_buffer_size = None
        return super().build_batch(
            dataset, packing_buffer_size=packing_buffer_size, worker_config=worker_config, **options
        )

    def select_samples_to_pack(self, samples: list[MeasuredSample]) -> list[list[MeasuredSample]]:
        """Energon's packing stage, over a full buffer. -> packed sequences within the budget."""
        sequences = fit_sequences([sample.size for sample in samples], self.budget)
        return [[samples[number] for number in sequence] for sequence in sequences]

    @stateless
    def pack_selected_samples(self, samples: list[MeasuredSample]) -> PackedBatch:
        """Raises SkipSample if no sample of the sequence can be used, TooManyBadSamples."""
        encoded = []
        for sample in samples:
            with suppress(SkipSample):
                encoded.append(sample.held or self._in_token_dtype(super().encode_sample(sample.conversation)))
        if not encoded:
            raise SkipSample
        return self.make_sequence(encoded)

    @stateless
    def batch(self, samples: list[MeasuredSample] | list[PackedBatch]) -> PackedBatch:
        """One sequence of the samples; a sequence of the packing stage comes alone and is a batch already."""
        return samples[0] if isinstance(samples[0], PackedBatch) else self.pack_selected_samples(samples)

    def make_sequence(self, samples: list[EncodedSample]) -> PackedBatch:
        """One sequence of all samples."""
        return pack(
            samples,
            merge_size=self.image_processor.merge_size,
            token_width=self.samples.token_width,
            token_dtype=self.token_dtype,
            visual_ids=tuple(self.samples.pads.values()),
            skipped=self.take_skipped(),
        )

    def blank_batch(self) -> PackedBatch:
        """A sequence of no sample: `QwenTaskEncoder.blank_batch`."""
        return replace(self.make_sequence([self.samples.blank()]), keys=[], skipped={})

    def for_validation(self) -> "PackingTaskEncoder":
        """The same encoder with counters of its own. One that chooses samples from a buffer gets them a buffer at a
        time."""
        return self._copied(BufferPackingTaskEncoder if any(self.budget) else type(self))


class BufferPackingTaskEncoder(PackingTaskEncoder):
    """As `PackingTaskEncoder`, for a split that is read once: a batch of samples becomes the sequences that hold
    them.

    Energon's own packing stage (5.2.0) is made for endless data: where a split ends while sequences wait, it fails.
    """

    @stateless
    def batch(self, samples: list[MeasuredSample]) -> Iterator[PackedBatch]:
        """The sequences of up to a buffer of samples. Raises TooManyBadSamples."""
        for sequence in self.select_samples_to_pack(samples):
            with suppress(SkipSample):
                yield self.pack_selected_samples(sequence)
