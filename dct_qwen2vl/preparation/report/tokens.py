"""How many tokens of the language model the samples of a prepared set take: visual ones by preset, and text.

Letter used for shapes: N, samples.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dct_qwen2vl.data.conversations import DEFAULT_SYSTEM
from dct_qwen2vl.data.text_tokens import match_meant
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.preparation.entries import Turn
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.report.statistics import Statistics

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Pixels of a side that become one token: block x merge of the preset, and patch x merge of Qwen2-VL's own pixels.
FACTORS = {"pixels, exact": 28, "x4": 56, "x16": 112}
PRESET, SEQ_LENGTH = "x4", 2048  # what qwen_launch.sh takes where nothing else is said
FRAMES_OF_A_TOKEN = 2
LARGEST_ASPECT_RATIO = 200  # beyond it Qwen2-VL's processor refuses an image

# English text takes about four characters a token; names, code, digits and most other scripts take fewer.
CHARACTERS_OF_A_TOKEN = 4
# Of Qwen2-VL's chat template: the default system turn 11; a question and an answer 5 each, 2 of them special tokens.
TEMPLATE_TOKENS = 21
TURN_BOUNDS = 2  # <|im_start|>, <|im_end|>
MEDIUM_BOUNDS = 2  # <|vision_start|>, <|vision_end|>


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample.

    visual: Preset -> int64 [N]. Of all its media.
    text: int64 [N]. Everything else.
    is_counted: Whether a tokenizer counted the text; otherwise it is estimated.
    refused: bool [N]. Training leaves the sample out for its aspect ratio; its `visual` are 0.
    """

    visual: dict[str, np.ndarray]
    text: np.ndarray
    is_counted: bool
    refused: np.ndarray

    def total(self, preset: str) -> np.ndarray:
        """int64 [N]: the length of the sequence that training sees."""
        return self.visual[preset] + self.text


def measure_lengths(statistics: Statistics, text: np.ndarray | None, min_pixels: int, max_pixels: int) -> Lengths:
    """Text and visual tokens of each sample, for each preset.

    statistics: Of the set.
    text: int64 [N]. Counted text tokens. None: they are estimated.
    min_pixels: Least pixels of an image in training.
    max_pixels: Most pixels of an image in training.
    """
    frames, bounds = sampled_frames(statistics.frames, statistics.seconds, min_pixels, max_pixels)
    in_time, visual = -(-frames // FRAMES_OF_A_TOKEN), {}
    refused = np.zeros(len(statistics), bool)
    for name, factor in FACTORS.items():
        heights, widths = target_sizes(statistics.height, statistics.width, factor, min_pixels, bounds)
        refused[statistics.owner[heights == 0]] = True
        visual[name] = np.zeros(len(statistics), np.int64)
        np.add.at(visual[name], statistics.owner, in_time * (heights // factor) * (widths // factor))
    for tokens in visual.values():
        tokens[refused] = 0
    return Lengths(visual, estimate_text_tokens(statistics) if text is None else text, text is not None, refused)


def note_on_long_samples(statistics: Statistics, lengths: Lengths) -> str | None:
    """A line if training with its defaults would leave samples out. None otherwise.

    statistics: Of the set.
    lengths: Of its samples.
    """
    tokens = lengths.total(PRESET)
    long = tokens > SEQ_LENGTH
    if not long.any():
        return None
    with_video = np.bincount(statistics.owner, statistics.is_video, len(statistics)) > 0
    images = ["MAXPIXELS=1003520"] if (long & (statistics.media > 0) & ~with_video).any() else []
    videos = ["--video-total-pixels 4704000"] if (long & with_video).any() else []
    smaller = f", or make media smaller: {' '.join([*images, 'bash qwen_launch.sh', *videos])}"
    return (
        f"Note: training with its defaults leaves out {long.sum():,} of {len(long):,} samples: more than "
        f"{SEQ_LENGTH:,} tokens in {PRESET}, the longest {tokens.max():,}. Raise SEQ_LENGTH"
        f"{smaller if images or videos else ''}"
    )


def estimate_text_tokens(statistics: Statistics) -> np.ndarray:
    """int64 [N]: a fixed number of characters a token, and the tokens of the chat template around one question."""
    return -(-statistics.text // CHARACTERS_OF_A_TOKEN) + TEMPLATE_TOKENS + MEDIUM_BOUNDS * statistics.media


def sampled_frames(
    frames: np.ndarray, seconds: np.ndarray, min_pixels: int, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frames and durations of media -> frames that training reads, most pixels of each of them; int64 [media]."""
    sampling = VideoSampling()
    counts, bounds = np.ones(len(frames), np.int64), np.full(len(frames), max_pixels, np.int64)
    videos = np.flatnonzero(frames > 1)
    for i, total, duration in zip(videos.tolist(), frames[videos].tolist(), seconds[videos].tolist()):
        counts[i] = count = sampling.count(total, total / duration if duration else 0)
        bounds[i] = sampling.max_frame_pixels(count, min_pixels, max_pixels)
    return counts, bounds


def target_sizes(
    height: np.ndarray, width: np.ndarray, factor: int, min_pixels: int, max_pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`image_sizes_dct.target_size` over arrays, for millions of media. A test holds the two equal.

    height: int [M]. Pixels.
    width: int [M]. Pixels.
    factor: Both sides become multiples of it, pixels.
    min_pixels: Least pixels of an image or frame.
    max_pixels: int [M]. Most pixels of an image or frame.

    Returns heights and widths, int64 [M] each; 0 where `target_size` refuses.
    """
    sizes = np.stack([height, width]).astype(np.int64)
    changing = np.arange(sizes.shape[1])
    while changing.size:
        before = sizes[:, changing]
        sizes[:, changing] = after = nearest_sizes(before, factor, min_pixels, max_pixels[changing])
        changing = changing[(after != before).any(axis=0) & (after > 0).all(axis=0)]
    return sizes[0], sizes[1]


def nearest_sizes(sides: np.ndarray, factor: int, min_pixels: int, max_pixels: np.ndarray) -> np.ndarray:
    """One step of `target_sizes`, int64 [2, N] -> int64 [2, N]."""
    pixels = sides[0] * sides[1]
    shrink, grow = np.sqrt(pixels / max_pixels), np.sqrt(min_pixels / pixels)
    size = np.rint(sides / factor).astype(np.int64) * factor
    rounded = size[0] * size[1]
    smaller = np.maximum(factor, np.floor(sides / shrink / factor).astype(np.int64) * factor)
    larger = np.ceil(sides * grow / factor).astype(np.int64) * factor
    size = np.where(rounded > max_pixels, smaller, np.where(rounded < min_pixels, larger, size))
    below = np.floor(sides * np.sqrt(max_pixels / pixels) / factor).astype(np.int64) * factor
    size = np.maximum(factor, np.where(size[0] * size[1] > max_pixels, below, size))
    longest = np.maximum(factor, max_pixels // (size.min(axis=0) * factor) * factor)
    longest = np.minimum(longest, LARGEST_ASPECT_RATIO * size.min(axis=0))
    too_long = sides.max(axis=0) / sides.min(axis=0) > LARGEST_ASPECT_RATIO
    return np.where(too_long, 0, np.minimum(size, longest))


def text_segments(turns: list[Turn]) -> tuple[list[str], int]:
    """-> texts that are tokenized apart, number of special tokens between them: the sequence of
    `task_encoder.QwenTaskEncoder` but for its visual tokens."""
    turns = turns if turns[0].role == "system" else [Turn("system", DEFAULT_SYSTEM, {}, [DEFAULT_SYSTEM]), *turns]
    segments, special = [], 0
    for role, text, _, pieces in turns:
        if role == "assistant":
            segments += ["assistant\n", text, "\n"]
            special += TURN_BOUNDS
        else:
            first, *others = pieces[::2] if role == "user" else [text]
            segments += [f"{role}\n{first}", *others, "\n"]
            special += TURN_BOUNDS + MEDIUM_BOUNDS * len(others)
    return segments, special


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory. Raises PreparationError."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise PreparationError(
            f"{path} cannot be read as a tokenizer ({error}); --tokenizer takes a model's folder"
        ) from error
    tokenizer.encode_special_tokens = True  # as the task encoder: those that stand in the data are plain text
    return tokenizer


def count_text_tokens(shards: Iterator[list[list[Turn]]], tokenizer: "Tokenizer") -> np.ndarray:
    """Text tokens of each conversation, int64 [N], without the visual ones.

    shards: Conversations, a list for each shard.
    tokenizer: Of the model.
    """
    meant = match_meant(token.content for token in tokenizer.get_added_tokens_decoder().values())
    counts: list[int] = []
    for conversations in shards:
        sequences = [split_meant(*text_segments(turns), meant) for turns in conversations]
        texts = [text for segments, _ in sequences for text in segments]
        lengths = map(len, tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        counts += [special + sum(islice(lengths, len(segments))) for segments, special in sequences]
    return np.array(counts, np.int64)


def split_meant(segments: list[str], special: int, meant: re.Pattern[str]) -> tuple[list[str], int]:
    """As `text_segments` gives them, split once more at the tokens in a text that become their ids."""
    pieces = [piece for segment in segments for piece in meant.split(segment)[::2]]
    return pieces, special + len(pieces) - len(segments)
