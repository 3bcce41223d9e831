"""Natural colour photographs that installed packages carry, and videos made by moving over them. Nothing is downloaded.

Half of the photographs are for the table of coefficient statistics, the other half is held out for the benchmarks.

Letters used for shapes: T H W, frames, rows and columns of a video, in frames and pixels.
"""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dct_qwen2vl.data.images import decode_image

# Where a photograph lies: package, path in it.
IMAGES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
TABLE_IMAGES = ("astronaut", "china", "coffee", "motorcycle_left")
HELD_OUT_IMAGES = ("chelsea", "flower", "grace_hopper", "rocket")


def image_path(name: str) -> Path:
    """The file of a photograph in `IMAGES`. Raises FileNotFoundError if its package is not installed."""
    package, path = IMAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or not (file := Path(found.origin).parent / path).is_file():
        raise FileNotFoundError(f"the photograph {name} comes with {package}, which is not installed: run make setup")
    return file


def load(name: str) -> np.ndarray:
    """A photograph in `IMAGES`, uint8 RGB [H, W, 3]."""
    return decode_image(image_path(name).read_bytes())


def view(image: np.ndarray, centre: tuple[float, float], size: tuple[int, int], scale: float) -> np.ndarray:
    """What a camera sees of an image, uint8 [*size, 3]. The image continues mirrored beyond its edges.

    image: uint8 [H, W, 3].
    centre: Row and column of the image in the middle of the view, pixels of the image. Fractions are allowed.
    size: Height and width of the view, pixels.
    scale: Pixels of the image for one pixel of the view. The image is low-passed accordingly (Pillow's bicubic filter).
    """
    margin = math.ceil(2 * max(scale, 1)) + 1  # the filter's reach
    starts = [middle - side * scale / 2 for middle, side in zip(centre, size)]
    spans = [
        np.arange(math.floor(start) - margin, math.ceil(start + side * scale) + margin)
        for start, side in zip(starts, size)
    ]
    region = image[np.ix_(*(_mirrored(span, side) for span, side in zip(spans, image.shape)))]
    top, left = (start - span[0] for start, span in zip(starts, spans))
    box = (left, top, left + size[1] * scale, top + size[0] * scale)
    return np.asarray(Image.fromarray(region).resize(size[::-1], Image.Resampling.BICUBIC, box=box))


def _mirrored(position: np.ndarray, side: int) -> np.ndarray:
    """Positions on a line of mirrored copies -> those in the copy from 0 to side - 1."""
    position = position % (2 * side)
    return np.minimum(position, 2 * side - 1 - position)


def moving_view(
    image: np.ndarray,
    size: tuple[int, int],
    frames: int,
    velocity: tuple[float, float] = (0.0, 0.0),
    zoom: float = 1.0,
    start: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """A video from a camera that moves over an image, uint8 [frames, *size, 3].

    image: uint8 [H, W, 3].
    velocity: rows and columns by which the camera moves from frame to frame, px of the video.
    zoom: by how much things grow from frame to frame. None is ever larger than in the image fitted to `size`.
    start: the first view's centre, as a fraction of the image's height and width.
    """
    scale = min(image.shape[0] / size[0], image.shape[1] / size[1])
    widest = max(1.0, zoom ** (frames - 1))
    video = []
    for number in range(frames):
        centre = tuple(
            place * side + number * speed * scale for place, side, speed in zip(start, image.shape, velocity)
        )
        video.append(view(image, centre, size, scale * widest / zoom**number))
    return np.stack(video)


def videos_of(
    image: np.ndarray, other: np.ndarray, size: tuple[int, int], frames: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Videos of one image, uint8 [frames, *size, 3]: two pans, one zoom, one cut to another image.

    image: uint8 [H, W, 3].
    other: uint8 [H, W, 3], what the cut goes to.
    size: Height and width of the videos, pixels.
    frames: Frames of each video.
    rng: Random numbers for the motion.

    Qwen2-VL reads two frames a second. In that time, a hand-held or panning camera moves by some to tens of pixels, a
    calm one by less than a pixel. So speeds are log-uniform from 1/8 to 32 px a frame, in all directions. Zooms are by
    1 to 7 % a frame, in and out. Both sides of a cut move slowly.
    """

    def pan(source: np.ndarray, length: int, fastest: float) -> np.ndarray:
        angle, speed = rng.uniform(0, 2 * math.pi), 2 ** rng.uniform(-3, math.log2(fastest))
        velocity = (speed * math.sin(angle), speed * math.cos(angle))
        return moving_view(source, size, length, velocity, start=tuple(rng.uniform(0.3, 0.7, 2)))

    yield pan(image, frames, 32)
    yield pan(image, frames, 32)
    zoom = 2 ** (rng.uniform(0.015, 0.1) * rng.choice([-1, 1]))
    yield moving_view(image, size, frames, zoom=zoom, start=tuple(rng.uniform(0.3, 0.7, 2)))
    cut = int(rng.integers(max(1, frames // 4), max(2, frames * 3 // 4)))
    yield np.concatenate([pan(image, cut, 4), pan(other, frames - cut, 4)])
