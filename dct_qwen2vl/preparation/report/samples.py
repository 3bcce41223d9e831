"""Random samples of a prepared set for the report: read from the shards by offset, images reduced to thumbnails."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.media import part_order
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS, VideoSampling, decode_video
from dct_qwen2vl.preparation.conversion import PYTHON_OBJECT
from dct_qwen2vl.preparation.entries import Turn, UnusableSample, read_turns
from dct_qwen2vl.preparation.metadata import PreparationError
from dct_qwen2vl.preparation.report.statistics import Shard, Statistics

IMAGE_SIDE, FRAME_SIDE = 320, 160  # px of the longer side of an image and of a video's frame, at most
SHOWN_FRAMES = 6  # of a video
MOST_MEDIA = 4  # of a sample that are shown
JPEG_QUALITY = 80
VERIFY = "look at it with data_preparation.py --verify"


@dataclass(frozen=True)
class Thumbnail:
    """A medium made small.

    name: its file ending in the shard.
    images: JPEG files, several frames of a video. Empty where it cannot be decoded, as `fault` says.
    height, width: of each, px.
    """

    name: str
    images: tuple[bytes, ...] = ()
    height: int = 0
    width: int = 0
    fault: str = ""


@dataclass(frozen=True)
class ShownSample:
    """One sample of the report.

    position: number in the set.
    more_media: how many media have no thumbnail here.
    """

    position: int
    key: str
    shard: Shard
    turns: list[Turn]
    thumbnails: list[Thumbnail]
    more_media: int


def choose_samples(statistics: Statistics, count: int, seed: int) -> list[int]:
    """Numbers of random samples of the set, ascending. All samples if there are fewer.

    statistics: Of the set.
    count: Samples to choose.
    seed: Of the choice.
    """
    return sorted(random.Random(seed).sample(range(len(statistics)), min(count, len(statistics))))


def read_shown_samples(output_dir: Path, statistics: Statistics, positions: list[int]) -> Iterator[ShownSample]:
    """Reads samples from the shards.

    output_dir: The folder of shards.
    statistics: Of the set.
    positions: Numbers of the samples, ascending.

    Raises PreparationError if a shard lacks one.
    """
    firsts = np.array([shard.first for shard in statistics.shards])
    for number, group in groupby(positions, lambda p: int(np.searchsorted(firsts, p, side="right")) - 1):
        shard = statistics.shards[number]
        wanted = [position - shard.first for position in group]
        path = output_dir / shard.name
        for position, (key, parts) in zip(wanted, read_parts(path, wanted)):
            yield show_sample(shard.first + position, path, shard, key, parts)


@contextmanager
def open_shard(path: Path) -> Iterator[tarfile.TarFile]:
    """Raises PreparationError where the file is missing or no tar, at any point of the block."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except FileNotFoundError:
        raise PreparationError(f"{path} is missing, but its stats are there; {VERIFY}") from None
    except tarfile.TarError as error:
        raise PreparationError(f"{path} cannot be read as a tar ({error}); {VERIFY}") from error


def iterate_members(tar: tarfile.TarFile) -> Iterator[tuple[int, str, str, tarfile.TarInfo]]:
    """(number of the sample in the shard, its key, file ending, header) of each member, in order."""
    number, last = -1, None
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep every header
        key, _, ending = member.name.partition(".")
        number += key != last
        last = key
        yield number, key, ending, member


def read_parts(path: Path, wanted: list[int]) -> list[tuple[str, dict[str, bytes]]]:
    """Key, and parts by file ending, of some samples of a shard. No others are read, only passed.

    path: The shard.
    wanted: Numbers of the samples in the shard, ascending.
    """
    found: dict[int, tuple[str, dict[str, bytes]]] = {}
    with open_shard(path) as tar:
        for number, key, ending, member in iterate_members(tar):
            if number > wanted[-1]:
                break
            if number in wanted:
                found.setdefault(number, (key, {}))[1][ending] = tar.extractfile(member).read()
    if len(found) < len(wanted):
        raise PreparationError(f"{path} holds fewer samples than its stats say; {VERIFY}")
    return [found[number] for number in wanted]


def read_conversations(output_dir: Path, statistics: Statistics) -> Iterator[list[list[Turn]]]:
    """The turns of all samples, a list for each shard.

    output_dir: The folder of shards.
    statistics: Of the set.

    Raises PreparationError if a shard has another number of samples.
    """
    for shard in statistics.shards:
        path = output_dir / shard.name
        with open_shard(path) as tar:
            conversations = [
                parse_turns(path, key, tar.extractfile(member).read())
                for _, key, ending, member in iterate_members(tar)
                if ending == "json"
            ]
        if len(conversations) != shard.written:
            count = f"{len(conversations)} conversations, its stats say {shard.written}"
            raise PreparationError(f"{path} holds {count}; {VERIFY}")
        yield conversations


def parse_turns(path: Path, key: str, data: bytes) -> list[Turn]:
    """The turns of a sample's json part. Raises PreparationError."""
    try:
        return read_turns(json.loads(data))
    except (ValueError, RecursionError, AttributeError, UnusableSample) as error:
        raise PreparationError(f"{path}: the conversation of {key} cannot be read ({error}); {VERIFY}") from error


def show_sample(position: int, path: Path, shard: Shard, key: str, parts: dict[str, bytes]) -> ShownSample:
    turns = parse_turns(path, key, parts.get("json", b""))
    media = sorted((part for part in parts if part != "json"), key=lambda name: (part_order(name), name))
    thumbnails = [make_thumbnail(name, parts[name]) for name in media[:MOST_MEDIA]]
    return ShownSample(position, key, shard, turns, thumbnails, len(media) - len(thumbnails))


def make_thumbnail(name: str, data: bytes) -> Thumbnail:
    """An image, or some frames of a video, made small."""
    try:
        if name.rsplit(".", 1)[-1].lower() in VIDEO_EXTENSIONS:
            frames = decode_video(data, VideoSampling(min_frames=SHOWN_FRAMES, max_frames=SHOWN_FRAMES), fit_frame)
        else:
            frames = decode_image(data, fit_image)[None]
    except MediaError as error:
        return Thumbnail(name, fault=PYTHON_OBJECT.sub("", str(error)))
    return Thumbnail(name, tuple(map(encode_jpeg, frames)), *frames.shape[1:3])


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] -> JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return stream.getvalue()


def fit_image(height: int, width: int, frames: int) -> tuple[int, int]:
    return fit_within(height, width, IMAGE_SIDE)


def fit_frame(height: int, width: int, frames: int) -> tuple[int, int]:
    return fit_within(height, width, FRAME_SIDE)


def fit_within(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width, px, with the longer one at most `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
