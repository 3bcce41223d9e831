"""What the sample data show and ask: which scene each image or video has, in which kind of file and conversation.

Everything is decided before anything is drawn, so that the answers are balanced and every awkward kind is there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dct_qwen2vl.toy.drawing import COLOURS, COUNTS, DIGITS, DIRECTIONS, FILE_KINDS, ORIENTATIONS, SHAPES, Scene

if TYPE_CHECKING:
    import numpy as np

# So many of a kind in a small data set; 1 of the others.
LEAST = {"exif_jpeg": len(ORIENTATIONS), "two_entries": 2}
# Shares of what is shown, per 1,000 images and videos; the rest shows shapes.
DIGIT_SHARE, VIDEO_SHARE = 320, 130
# How often each form of a conversation occurs, per 1,000; the others ask all there is to ask, one question a turn.
DIALOGUE_KINDS = {
    "one_turn": 40,
    "openai": 30,
    "system": 30,
    "non_ascii": 25,
    "two_entries": 20,  # two entries on one image, with one id, as Cambrian has them
}
PAIR_SHARE = 20  # two images in one entry
# Entries besides those: without an image, or with one that cannot be read; per 1,000.
EXTRA_KINDS = {"text_only": 30, "missing": 8, "zero_byte": 6, "truncated": 8, "garbage": 6, "broken_video": 4}


@dataclass(frozen=True)
class Item:
    """One thing to draw and ask about.

    number: names its files and seeds its random numbers.
    orientation: of EXIF 2.32.
    """

    number: int
    scene: Scene
    file_kind: str
    dialogue_kind: str
    orientation: int = 1


def plan_items(rng: np.random.Generator, total: int) -> list[Item]:
    """Decides what to draw. Answers are balanced, and every kind of file and conversation is included.

    rng: Random numbers for the order.
    total: Items with media.
    """
    product = itertools.product
    videos, digits = round(total * VIDEO_SHARE / 1000), round(total * DIGIT_SHARE / 1000)
    shapes = total - videos - digits
    images = cycle_scenes(rng, [Scene(c, s, count=n) for c, s, n in product(COLOURS, SHAPES, COUNTS)], shapes)
    images += cycle_scenes(rng, [Scene(c, digit=d) for c, d in product(COLOURS, DIGITS)], digits)
    moving = cycle_scenes(rng, [Scene(c, s, motion=m) for c, s, m in product(COLOURS, SHAPES, DIRECTIONS)], videos)

    kinds = shuffle(rng, quota(FILE_KINDS, len(images), "jpeg"))
    kinds += shuffle(rng, quota({"mp4_mpeg4": 125}, videos, "mp4_h264"))
    dialogues = shuffle(rng, quota(DIALOGUE_KINDS, total, "turns"))
    orientations = itertools.cycle(ORIENTATIONS)
    for number in _eligible_for_pairs(rng, images, kinds, dialogues)[: max(1, round(total * PAIR_SHARE / 1000))]:
        dialogues[number] = "two_images"
    planned = enumerate(zip(images + moving, kinds, dialogues, strict=True))
    return [
        Item(number, scene, kind, dialogue, next(orientations) if kind == "exif_jpeg" else 1)
        for number, (scene, kind, dialogue) in planned
    ]


def quota(shares: dict[str, int], total: int, default: str) -> list[str]:
    """The kinds of `total` things.

    shares: kind -> how many of 1,000. There are never fewer than LEAST of a kind.
    default: kind of the rest.
    """
    kinds = []
    for kind, share in shares.items():
        kinds += [kind] * max(LEAST.get(kind, 1), round(total * share / 1000))
    return (kinds + [default] * total)[:total]


def cycle_scenes(rng: np.random.Generator, scenes: list[Scene], total: int) -> list[Scene]:
    """`total` scenes in random order. Each occurs as often as any other, give or take one."""
    rounds = -(-total // len(scenes))
    return [scenes[i] for _ in range(rounds) for i in rng.permutation(len(scenes))][:total]


def _eligible_for_pairs(
    rng: np.random.Generator, images: list[Scene], kinds: list[str], dialogues: list[str]
) -> list[int]:
    """Numbers of the plain images of shapes with a plain conversation, in random order."""
    plain = [n for n, s in enumerate(images) if s.count and kinds[n] == "jpeg" and dialogues[n] == "turns"]
    return shuffle(rng, plain)


def shuffle(rng: np.random.Generator, values: list) -> list:
    """The values in random order.

    rng: Random numbers.
    values: Any values.
    """
    return [values[i] for i in rng.permutation(len(values))]
