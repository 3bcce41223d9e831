"""Packed sequences: several samples one after the other without padding. The Megatron engine trains on them.

A packed sequence ("sequence" for short) is a micro-batch. Attention is told where each of its samples begins, so that
no token of one sample sees another. Everything the model needs to know of positions is computed here, in the loader's
workers.

Letters used for shapes in this file:

    L S    tokens of a sequence, samples of a sequence
    T V    learned tokens, visual tokens of the language model
    N K    vision tokens of all media of a sequence, floats of one token
    M F    media of a sequence, time steps of all of them together
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from megatron.energon import Batch, PackingDataset, Sample

from dct_qwen2vl.data.kept_cells import kept_by_medium
from dct_qwen2vl.data.positions import Grid, step_lengths, vision_positions
from dct_qwen2vl.data.samples import IGNORE_INDEX, ConversationSample, EncodedSample


@dataclass
class PackedBatch(Batch):
    """A micro-batch of the Megatron engine: one packed sequence of L tokens of S samples, with N vision tokens.

    input_ids: int64 [L].
    position_ids: int64 [3, L]. M-RoPE, from 0 in every sample.
    sample_starts: int32 [S + 1]. Where the samples begin, and where the last one ends.
    learned: int64 [T]. Positions that have to predict a token.
    targets: int64 [T]. The tokens that they have to predict.
    visual: int64 [V]. Positions that hold visual tokens.
    tokens: [N, K]. Vision tokens in the order of the sequence, in the model's data type.
    token_positions: int64 [N, 2]. Row and column of each in its time step.
    step_starts: int32 [F + 1]. Where time steps begin. Attention stays within one.
    grid_thw: int64 [M, 3]. (t, h, w) of whole media.
    longest_sample: Tokens.
    longest_step: Vision tokens.
    keys: As in `QwenBatch`. A sequence without keys stands for none.
    skipped: As in `QwenBatch`.

    With skipping, cells that are left out have no token, and steps that keep nothing are no steps.

    A sequence without media has one blank image, so that the vision tower has a gradient in every micro-batch: N is
    then m * m while V and M are 0.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_starts: torch.Tensor
    learned: torch.Tensor
    targets: torch.Tensor
    visual: torch.Tensor
    tokens: torch.Tensor
    token_positions: torch.Tensor
    step_starts: torch.Tensor
    grid_thw: torch.Tensor
    longest_sample: int
    longest_step: int
    keys: list[str]
    skipped: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same sequence with its tensors on `device`; copies from pinned memory do not wait."""
        values = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return PackedBatch(**values)

    def step_grids(self) -> torch.Tensor:
        """Each time step as a medium of its own, int64 [F, 3], for counting; none where there are no media."""
        if not len(self.grid_thw):
            return self.grid_thw
        lengths = self.step_starts.diff().long()
        return torch.stack([torch.ones_like(lengths), lengths, torch.ones_like(lengths)], dim=1)

    def without_tokens(self) -> "PackedBatch":
        """The same sequence for who does not need its vision tokens."""
        return replace(self, tokens=self.tokens[:0])


@dataclass
class MeasuredSample(Sample):
    """A conversation that waits for its packed sequence.

    conversation: With media as in the shard, files that take less memory than their vision tokens. None if `held`.
    size: Its tokens and its vision tokens.
    held: The sample as it goes into its sequence, with skipping, where memory allows (`HeldSamples`).
    """

    conversation: ConversationSample | None
    size: tuple[int, int]
    held: EncodedSample | None = None


class HeldSamples:
    """Bounds the memory of encoded samples that wait for their sequence in one loader process.

    With skipping, the size of a sample is known only once it is decoded. Holding what was decoded is cheapest: to
    count and decode again doubles the work of the loader, most of which is decoding; counts beside the shards would
    tie these to one token format and threshold. Beyond the limit samples are decoded again, which changes nothing else.
    In training that does not happen, because the buffer ends earlier (`BoundedPacking`). In a validation it may.

    limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0

    def hold(self, sample: EncodedSample) -> EncodedSample | None:
        """The sample, counted as long as it lives, or None where it is over the limit."""
        size = sum(value.nbytes for value in vars(sample).values() if isinstance(value, torch.Tensor))
        if self.bytes + size > self.limit:
            return None
        self.bytes += size
        weakref.finalize(sample, self._release, size).atexit = False
        return sample

    def _release(self, size: int) -> None:
        self.bytes -= size


class BoundedPacking(PackingDataset):
    """Energon's packing stage, whose buffer also ends where its samples reach a number of vision tokens.

    arguments: Of `PackingDataset`.
    most_vision_tokens: Of the samples that wait. The last one may exceed it.
    options: Of `PackingDataset`.

    The buffer follows from the sizes of its samples alone, so that a run continues with the same sequences.
    """

    def __init__(self, *arguments, most_vision_tokens: int, **options) -> None:
        super().__init__(*arguments, **options)
        self.most_samples = self.buffer_size
        self.most_vision_tokens = most_vision_tokens

    def _fill_reading_buffer(self, source_iter: Iterator[MeasuredSample]) -> bool:
        """As Energon's. It also names the number of samples, which Energon expects of a full buffer."""
        waiting = [*self._reading_buffer, *self._pre_packing_buffer]
        count, vision_tokens = len(waiting), sum(sample.size[1] for sample in waiting)
        while count < self.most_samples and vision_tokens < self.most_vision_tokens:
            sample = next(source_iter, None)
            if sample is None:
                return False
            self._reading_buffer.append(sample)
            count, vision_tokens = count + 1, vision_tokens + sample.size[1]
        self.buffer_size = count
        return True


def fit_sequences(sizes: list[tuple[int, ...]], budget: tuple[int, ...]) -> list[list[int]]:
    """Groups samples into packed sequences. Returns lists of indices of `sizes`.

    sizes: For each sample its size in each dimension, such as tokens and vision tokens.
    budget: Most that a sequence holds in each dimension. Only a sequence of one sample may exceed it.

    The method is best-fit decreasing: the largest sample first, each into the fullest sequence that has room for it. In
    one dimension it needs at most 11/9 of the best number of sequences (D. S. Johnson, 1973). Size and fullness are
    sums of shares of the budget. Sequences are ordered by their first sample, and so are the samples of a sequence.
    """
    shares = np.array(sizes, np.float64).reshape(len(sizes), -1) / budget
    sequences: list[list[int]] = []
    room = np.zeros((0, len(budget)), np.int64)
    for number in np.argsort(-shares.sum(axis=1), kind="stable").tolist():
        fitting = np.flatnonzero((room >= sizes[number]).all(axis=1))
        if len(fitting):
            sequence = int(fitting[(room[fitting] / budget).sum(axis=1).argmin()])
        else:
            sequence = len(sequences)
            sequences.append([])
            room = np.append(room, [budget], axis=0)
        sequences[sequence].append(number)
        room[sequence] -= sizes[number]
    return sorted(sorted(sequence) for sequence in sequences)


def pack(
    samples: list[EncodedSample],
    merge_size: int,
    token_width: int,
    token_dtype: torch.dtype,
    visual_ids: tuple[int, ...],
    skipped: dict[str, int] | None = None,
) -> PackedBatch:
    """One packed sequence of all samples.

    samples: Encoded samples, in the order of the sequence.
    merge_size: Side of the square of vision tokens that become one token of the language model.
    token_width: Numbers of a vision token, for a sequence without media.
    token_dtype: Of the vision tokens.
    visual_ids: Token ids that stand for images and for videos.
    skipped: Samples that could not be used since the last batch, by reason.
    """
    input_ids = torch.cat([sample.input_ids for sample in samples])
    following = torch.cat([torch.cat([s.labels[1:], s.labels.new_full((1,), IGNORE_INDEX)]) for s in samples])
    learned = (following != IGNORE_INDEX).nonzero().flatten()
    media = _media_in_order(samples, visual_ids, merge_size)
    grids = [grid for _, grid, _ in media]
    media = media or [(torch.zeros(merge_size**2, token_width), (1, merge_size, merge_size), None)]
    steps = [length for _, grid, kept in media for length in step_lengths(grid, merge_size, kept) if length]
    lengths = [len(sample.input_ids) for sample in samples]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=1),
        sample_starts=_starts(lengths),
        learned=learned,
        targets=following[learned],
        visual=torch.isin(input_ids, torch.tensor(visual_ids)).nonzero().flatten() if grids else input_ids[:0],
        tokens=torch.cat([tokens for tokens, _, _ in media]).to(token_dtype),
        token_positions=torch.from_numpy(np.concatenate([vision_positions(g, merge_size, k) for _, g, k in media])),
        step_starts=_starts(steps),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        longest_sample=max(lengths),
        longest_step=max(steps),
        keys=[sample.__key__ for sample in samples],
        skipped=skipped or {},
    )


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


Medium = tuple[torch.Tensor, Grid, np.ndarray | None]  # its tokens, its grid, the cells that have tokens (None: all)


def _media_in_order(samples: list[EncodedSample], visual_ids: tuple[int, ...], merge_size: int) -> list[Medium]:
    """All media of a sequence in the order in which their placeholders stand."""
    ordered = []
    image_id, video_id = visual_ids
    for sample in samples:
        media = {
            image_id: _split(sample.pixel_values, sample.image_grid_thw, sample.image_kept, merge_size),
            video_id: _split(sample.pixel_values_videos, sample.video_grid_thw, sample.video_kept, merge_size),
        }
        ordered += [media[visual_id].pop(0) for visual_id in _kinds_in_order(sample.input_ids, visual_ids)]
    return ordered


def _split(tokens: torch.Tensor, grids: torch.Tensor, kept: torch.Tensor | None, merge_size: int) -> list[Medium]:
    if not len(grids):
        return []
    masks = kept_by_medium(grids, kept, merge_size)
    counts = [sum(step_lengths(grid, merge_size, mask)) for grid, mask in zip(grids.tolist(), masks)]
    return [(piece, tuple(grid), mask) for piece, grid, mask in zip(tokens.split(counts), grids.tolist(), masks)]


def _kinds_in_order(input_ids: torch.Tensor, visual_ids: tuple[int, ...]) -> list[int]:
    """The id of each run of equal visual ids; media are parted by <|vision_end|>, so that each has a run of its own."""
    ids = input_ids.numpy()
    begins = np.flatnonzero(np.isin(ids, visual_ids) & (ids != np.concatenate([[-1], ids[:-1]])))
    return ids[begins].tolist()
