"""What images and videos have in common when they are read: one error, and the size that is wanted of them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dct_qwen2vl.common.scripts import UserError

# (height, width, frames) of an image or video as displayed -> height and width to which it is resized. frames: 1 of an
# image, `counted_frames` of a video. A fit with an attribute `whole` that is true has JPEGs decoded at their own size.
Fit = Callable[[int, int, int], tuple[int, int]]

PYTHON_OBJECT = re.compile(r" <[\w.]+ object at 0x[0-9a-f]+>")  # in Pillow's messages; another address in every run


class MediaError(UserError):
    """The bytes are no readable image or video. The message says why, in one line."""


@contextmanager
def readable(kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns what a decoder raises in the block into a MediaError of one line.

    kind: "image" or "video", named in the message.
    errors: Classes of the decoder's errors.
    """
    try:
        yield
    except errors as error:
        said = PYTHON_OBJECT.sub("", " ".join(str(error).split()))
        raise MediaError(f"not a readable {kind}: {said}") from error


def displayed_size(image: Any, exchanged: bool) -> tuple[int, int]:
    """Height and width of a PIL image or a frame as it is shown, pixels.

    image: Has `height` and `width`.
    exchanged: Whether rows and columns are exchanged when it is shown.
    """
    return (image.width, image.height) if exchanged else (image.height, image.width)


def counted_frames(frames: int) -> int:
    """Frames of a video as a `Fit` is told of them: a lone frame counts as two, as a token holds a pair."""
    return max(2, frames)
