"""Samples: from the parts of a shard to a conversation, an encoded sample, a padded batch.

Letters used for shapes in this file:

    B L    samples of a batch, tokens of its longest sample
    N K    vision tokens of all media of a batch, floats of one token
    M      media (images, or videos) of a sample or a batch
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Batch,
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import FatalSampleError
from megatron.energon.savable_loader import BasicDataLoader

from dct_qwen2vl.data.conversations import (
    LONE_SURROGATE,
    Message,
    content_of,
    is_share,
    learning_of,
    names_media,
    role_of,
    split_turns,
    text_of,
    turns_of,
)
from dct_qwen2vl.data.energon_files import PreparedSetError, prepare_again
from dct_qwen2vl.data.images import IMAGE_EXTENSIONS
from dct_qwen2vl.data.kept_cells import kept_by_medium
from dct_qwen2vl.data.media import BadSample, part_order
from dct_qwen2vl.data.positions import step_lengths
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS

# Shards hold file bytes, which images.py and videos.py decode; this is what a dataset.yaml that does not say gets.
DATASET_OPTIONS = {"auto_decode": False}
IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default: positions that are not learned


class TooManyBadSamples(FatalSampleError):
    """So many samples in a row were bad that the data set, not a sample, is the problem. Energon passes it on."""


@dataclass
class ConversationSample(Sample):
    """A sample as the shard holds it.

    entry: The json part.
    media: (kind, content) in order. A kind is "image" or "video"; content is as found in the shard.
    """

    entry: dict[str, Any]
    media: list[tuple[str, Any]] = field(repr=False)  # Energon writes a sample that failed into its messages


@dataclass
class EncodedSample(Sample):
    """One conversation.

    input_ids int64 [L]; labels int64 [L], aligned with input_ids, IGNORE_INDEX where not learned; position_ids int64
    [3, L] (time, row, column); pixel_values float32 [N, K] and image_grid_thw int64 [M, 3] of its images, the other
    two of its videos (N and M may be 0). With skipping, image_kept and video_kept are bool [cells of all images, of all
    videos]: which merge cells have tokens. Grids are then still those of whole media.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor
    image_kept: torch.Tensor | None = None
    video_kept: torch.Tensor | None = None


@dataclass
class QwenBatch(Batch):
    """A micro-batch of B samples with up to L tokens.

    input_ids: int64 [B, L].
    labels: int64 [B, L]. Already shifted: labels[b, i] is the token that position i has to predict.
    attention_mask: int64 [B, L].
    position_ids: int64 [3, B, L].
    pixel_values: float32 [N, K]. Of all images in order.
    image_grid_thw: int64 [M, 3]. Of all images in order.
    pixel_values_videos: float32 [N, K]. Of all videos in order.
    video_grid_thw: int64 [M, 3]. Of all videos in order.
    keys: Keys of the samples.
    skipped: Samples left out since the previous batch of the same worker, by reason.
    image_kept: As in `EncodedSample`. None without skipping.
    video_kept: As in `EncodedSample`. None without skipping.
    on_host: The same batch before it was copied to a device. None: this batch itself.

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
    image_kept: torch.Tensor | None = None
    video_kept: torch.Tensor | None = None
    on_host: "QwenBatch | None" = None

    def host(self) -> "QwenBatch":
        """The batch on the host, whose values can be read without waiting for a device."""
        return self.on_host or self

    def learned_positions(self) -> torch.Tensor:
        """int64 [T], on the host. Positions that have to predict a token, counted through all samples."""
        return (self.host().labels.flatten() != IGNORE_INDEX).nonzero().flatten()

    def step_grids(self, merge_size: int) -> torch.Tensor:
        """Grids int64 [n, 3] that have as many vision tokens in as many time steps as the media of the batch: theirs,
        or with skipping each step that keeps some as a medium of its own."""
        grids = torch.cat([self.image_grid_thw, self.video_grid_thw])
        if self.image_kept is None:
            return grids
        masks = kept_by_medium(grids, torch.cat([self.image_kept, self.video_kept]), merge_size)
        media = zip(map(tuple, grids.tolist()), masks)
        lengths = [length for grid, mask in media for length in step_lengths(grid, merge_size, mask) if length]
        return torch.tensor([(1, length, 1) for length in lengths], dtype=torch.int64).view(-1, 3)

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of Qwen2VLForConditionalGeneration.forward, without labels; absent media are left out. With
        skipping, `media_embedding.embed_media` has to embed the media first.

        Grids and kept cells stay on the host. The vision tower reads them there, again in each of its layers."""
        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}
        host = self.host()
        if len(self.image_grid_thw):
            inputs.update(pixel_values=self.pixel_values, image_grid_thw=host.image_grid_thw)
            if self.image_kept is not None:
                inputs.update(image_kept=host.image_kept)
        if len(self.video_grid_thw):
            inputs.update(pixel_values_videos=self.pixel_values_videos, video_grid_thw=host.video_grid_thw)
            if self.video_kept is not None:
                inputs.update(video_kept=host.video_kept)
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


def parse_messages(entry: Any, has_media: bool) -> list[Message]:
    """The turns of an entry in the format of LLaVA (`from`/`value`) or OpenAI (`role`/`content`).

    entry: The json part of a sample, or a bare list of turns.
    has_media: Whether the sample has media.

    Raises BadSample.
    """
    turns = turns_of(entry)
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
    learned = [bool(learning_of(turn)) for turn in turns]
    if not any(learned[-len(spoken) :][1::2]):
        raise BadSample("nothing_learned", "none of its answers is to be learned")
    return [
        Message(role, [text_of(content)] if role == "system" else pieces, is_learned)
        for role, content, pieces, is_learned in zip(roles, contents, split, learned)
    ]


def check_turn(turn: Any) -> str:
    """The role of a turn. Raises BadSample for a turn without a known role or text."""
    role = role_of(turn.get("from", turn.get("role"))) if isinstance(turn, dict) else None
    text = text_of(content_of(turn)) if role else None
    if text is None or LONE_SURROGATE.search(text):
        raise BadSample("bad_turn", f"a turn needs a known role and text, got {str(turn)[:80]!r}")
    if role == "assistant" and not is_share(learning_of(turn)):
        raise BadSample("bad_turn", f"a turn is learned or not, got {learning_of(turn)!r:.80}")
    return role


class _SampleReader(DefaultTaskEncoder):
    """Cooks and does nothing else."""

    cookers = (Cooker(cook),)

    @stateless
    def batch(self, samples: list[ConversationSample]) -> list[ConversationSample]:
        return samples


def read_samples(data_dir: Path, split: str) -> Iterator[ConversationSample]:
    """The samples of a split once, in the order of its shards, with media as file bytes.

    data_dir: Prepared folder of shards.
    split: Name of the split.

    Raises PreparedSetError if Energon cannot read them.
    """
    try:
        with _quiet_energon():
            dataset = get_val_dataset(
                data_dir,
                split_part=split,
                worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
                batch_size=1,
                task_encoder=_SampleReader(),
                **DATASET_OPTIONS,
            )
            # Nothing to collect: file bytes are freed by their reference counts.
            batches = iter(BasicDataLoader(dataset, gc_collect_every_n_steps=0))
        for samples in batches:
            yield from samples
    except Exception as error:  # Energon lets through whatever tarfile, sqlite3 and its own checks raise
        raise unreadable(data_dir, split, error) from error


def unreadable(data_dir: Path, split: str, error: BaseException) -> PreparedSetError:
    """The error for a split of which a file is damaged, with what was found first."""
    while error.__cause__ is not None:
        error = error.__cause__
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    remedy = f"copy its shards and their .idx there again, or {prepare_again(data_dir)}"
    return PreparedSetError(f"the {split} split of {data_dir} cannot be read ({what:.300}): {remedy}")


@contextmanager
def _quiet_energon() -> Iterator[None]:
    """Without the line that Energon prints on each worker's shards: here one worker reads all. And without the warning
    that there is no GPU to pin memory for, which Energon always asks of PyTorch."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
        yield
