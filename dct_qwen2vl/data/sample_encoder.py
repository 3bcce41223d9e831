"""A conversation with its media -> ids by segments, labels, M-RoPE positions and vision tokens of one sample.

Letters used for shapes in this file:

    N K    vision tokens of all media of a kind, floats of one token
    M      media (images, or videos) of a sample
"""

import math
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from dct_qwen2vl.data.conversations import DEFAULT_SYSTEM, Message, put_first
from dct_qwen2vl.data.media import TOO_LONG, BadSample
from dct_qwen2vl.data.media_encoder import Encoded, MediaEncoder, stack_kept, stack_media
from dct_qwen2vl.data.positions import Grid, KeptRun, Run, mrope_positions
from dct_qwen2vl.data.samples import IGNORE_INDEX, ConversationSample, EncodedSample, parse_entry, parse_messages
from dct_qwen2vl.data.text_tokens import TextTokens
from dct_qwen2vl.data.videos import VideoSampling


def place_media(messages: list[Message], kinds: list[str]) -> list[Message]:
    """Checks that placeholders and media agree; media that no turn mentions go before the first question.

    messages: Of a conversation.
    kinds: "image" or "video" for each medium, in order.

    Raises BadSample.
    """
    placed = [kind for message in messages for kind in message.pieces[1::2]]
    if not placed and kinds:
        first = next(i for i, message in enumerate(messages) if message.role == "user")
        return [
            *messages[:first],
            Message("user", put_first(kinds, messages[first].pieces)),
            *messages[first + 1 :],
        ]
    if placed != kinds:
        raise BadSample("placeholder_mismatch", f"placeholders {placed}, media {kinds}: they must agree")
    return messages


@dataclass(frozen=True)
class SkippingShare:
    """In which samples cells are skipped, where the image processor skips any; the others keep all their cells.

    share: Of the samples, over 0 and at most 1.
    seed: Another seed chooses other samples.

    The key of a sample decides: Energon hands on no number of the repetition, and numbers of its own depend on how many
    loader processes there are. So the choice is the same in each repetition, after a restart, and where a sample that
    waits for its packed sequence is encoded a second time.
    """

    share: float = 1.0
    seed: int = 0

    def includes(self, key: str) -> bool:
        """Whether cells of this sample are skipped.

        key: Of the sample.
        """
        if self.share >= 1:
            return True
        digest = blake2b(f"{self.seed}/{key}".encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64


class SampleEncoder:
    """One sample as the model reads it. It has no state.

    tokenizer: Qwen2-VL's, with its special tokens.
    image_processor: `DCTImageProcessor`, or any processor with Qwen2VLImageProcessor's interface.
    seq_length: Most tokens of a sample.
    video_sampling: Frames that are read of a video.
    time_step: Of a video's positions, as `inspection.time_step` gives it.
    skipping: In which samples cells are skipped. None: in all.

    Raises ValueError for a tokenizer without Qwen2-VL's special tokens.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        seq_length: int,
        video_sampling: VideoSampling | None = None,
        time_step: float = 1.0,
        skipping: SkippingShare | None = None,
    ) -> None:
        self.skipping = skipping or SkippingShare()
        self.image_processor = image_processor
        self.seq_length = seq_length
        self.time_step = time_step
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        ids = tokenizer.convert_tokens_to_ids(list(names))
        missing = [name for name, token_id in zip(names, ids) if token_id is None or token_id == tokenizer.unk_token_id]
        if missing:
            raise ValueError(f"the tokenizer lacks Qwen2-VL's special tokens {', '.join(missing)}")
        self._im_start, self._im_end, self._vision_start, self._vision_end, *pads = ids
        self.pads = {"image": pads[0], "video": pads[1]}
        self._text_tokens = TextTokens(tokenizer)
        self._media = MediaEncoder(image_processor, video_sampling)

    @property
    def skips(self) -> bool:
        """Whether some cells get no token."""
        return self._media.skip_db is not None

    def skipping_always(self) -> "SampleEncoder":
        """The same encoder, with cells skipped in all samples."""
        encoder = copy(self)
        encoder.skipping = SkippingShare()
        return encoder

    @property
    def token_width(self) -> int:
        """K: floats of a vision token."""
        processor = self.image_processor
        config = getattr(processor, "dct_config", None)
        return (
            3 * processor.temporal_patch_size * processor.patch_size**2 if config is None else config.num_coefficients
        )

    def blank(self) -> EncodedSample:
        """Two text tokens, one of them learned, without media."""
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
            image_kept=self._stack_kept("image", [], []),
            video_kept=self._stack_kept("video", [], []),
        )

    def encode(self, sample: ConversationSample) -> EncodedSample:
        """Ids, labels and positions of a conversation, and the tokens of its media. Raises BadSample or MediaError."""
        messages = self._messages(sample)
        skips = self.skips and self.skipping.includes(sample.__key__)
        found = [self._encode_media(kind, content, skips) for kind, content in sample.media]
        media, masks = [medium for medium, _ in found], [mask for _, mask in found]
        ids, learned, runs = self._segments(
            messages, [(kind, grid, mask) for (kind, _, grid), mask in zip(media, masks)]
        )
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return EncodedSample.derive_from(
            sample,
            input_ids=input_ids,
            labels=input_ids.masked_fill(~torch.tensor(learned), IGNORE_INDEX),
            position_ids=torch.from_numpy(mrope_positions(runs)),
            **self._stack("image", media, "pixel_values", "image_grid_thw"),
            **self._stack("video", media, "pixel_values_videos", "video_grid_thw"),
            image_kept=self._stack_kept("image", media, masks),
            video_kept=self._stack_kept("video", media, masks),
        )

    def measure(self, sample: ConversationSample) -> tuple[int, int]:
        """Tokens of the sample and vision tokens of its media, without decoding these, nor with skipping. Raises as
        `encode`."""
        grids = [(kind, self._media.expected_grid(kind, content), None) for kind, content in sample.media]
        ids, _, _ = self._segments(self._messages(sample), grids)
        return len(ids), sum(math.prod(grid) for _, grid, _ in grids)

    def _messages(self, sample: ConversationSample) -> list[Message]:
        messages = parse_messages(parse_entry(sample.entry), bool(sample.media))
        return place_media(messages, [kind for kind, _ in sample.media])

    def _encode_media(self, kind: str, content: Any, skips: bool) -> tuple[Encoded, torch.Tensor | None]:
        """-> kind, tokens [N, K] and grid (t, h, w); with skipping, also the cells that have tokens. skips: whether
        cells of this sample are skipped."""
        # A loader process has one thread for torch; decoders in it get no more.
        frames = self._media.read(kind, content, torch.get_num_threads())
        if skips:
            return self._media.encode_kept(kind, frames)
        tokens, grid = self._media.encode(kind, frames)
        return (kind, tokens, grid), self._all_cells(grid) if self.skips else None

    def _segments(
        self, messages: list[Message], media: list[tuple[str, Grid, torch.Tensor | None]]
    ) -> tuple[list[int], list[bool], list[Run]]:
        """-> ids, whether each is learned, runs for `mrope_positions`. media: kind, grid, kept cells (None: all).

        The sequence is the one of Qwen2-VL's chat template: `<|im_start|>role\\n text <|im_end|>\\n` for each turn.
        Raises BadSample if it is over seq_length.
        """
        ids: list[int] = []
        learned: list[bool] = []
        runs: list[Run] = []

        def add(segment: list[int], learn: bool = False, run: Run | None = None) -> None:
            ids.extend(segment)
            learned.extend([learn] * len(segment))
            runs.append(run or len(segment))

        remaining = iter(media)
        if messages[0].role != "system":
            messages = [Message("system", [DEFAULT_SYSTEM]), *messages]
        for role, pieces, is_learned in messages:
            add([self._im_start])
            if role == "assistant":
                add(self._ids("assistant\n"))
                add([*self._ids(pieces[0]), self._im_end], learn=is_learned)
            else:
                add(self._ids(f"{role}\n{pieces[0]}"))
                for piece in pieces[2::2]:
                    kind, grid, kept = next(remaining)
                    add([self._vision_start])
                    add([self.pads[kind]] * self._cells(grid, kept), run=self._visual_run(kind, grid, kept))
                    add([self._vision_end, *self._ids(piece)])
                add([self._im_end])
            add(self._ids("\n"))
        if len(ids) > self.seq_length:
            raise BadSample(TOO_LONG, f"{len(ids)} tokens, the limit is {self.seq_length}")
        return ids, learned, runs

    def _all_cells(self, grid: Grid) -> torch.Tensor:
        """bool [t, r, c]"""
        return torch.ones(self._in_cells(grid), dtype=torch.bool)

    def _in_cells(self, grid: Grid) -> Grid:
        """(t, r, c): steps, rows and columns of merge cells."""
        merge = self.image_processor.merge_size
        return grid[0], grid[1] // merge, grid[2] // merge

    def _cells(self, grid: Grid, kept: torch.Tensor | None) -> int:
        """Tokens of the language model of a medium."""
        return math.prod(self._in_cells(grid)) if kept is None else int(kept.sum())

    def _visual_run(self, kind: str, grid: Grid, kept: torch.Tensor | None) -> Run:
        cells = self._in_cells(grid)
        time_step = 1 if kind == "image" else self.time_step
        if kept is not None:
            return KeptRun(cells, kept.numpy(), time_step)
        return cells if time_step == 1 else (*cells, time_step)

    def _ids(self, text: str) -> list[int]:
        """Of a text in which turns and media are plain text: `TextTokens`."""
        return self._text_tokens.encode(text)

    def _stack(self, kind: str, media: list, tokens_name: str, grid_name: str) -> dict[str, torch.Tensor]:
        """Tokens [N, K] and grids [M, 3] of all media of a kind, empty tensors if there are none."""
        return dict(zip((tokens_name, grid_name), stack_media(kind, media)))

    def _stack_kept(self, kind: str, media: list[Encoded], masks: list) -> torch.Tensor | None:
        """Cells of all media of a kind that have tokens, bool [cells]; None without skipping."""
        return stack_kept(kind, media, masks) if self.skips else None
