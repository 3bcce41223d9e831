"""Draw the sample data's images and videos, and encode them in every form that a real data set comes in.

Letters: T frames, H W pixels; a cell is the 56x56 px square that one visual token of the language model covers.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Full-range RGB, about 60 degrees of hue apart, so that a jitter of COLOUR_JITTER leaves no doubt.
COLOURS = {
    "red": (250, 70, 60),
    "yellow": (240, 215, 50),
    "green": (60, 205, 80),
    "cyan": (60, 210, 225),
    "blue": (85, 120, 255),
    "purple": (200, 85, 230),
}
COLOUR_JITTER = 14  # per channel, uniform
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("1", "2", "3", "4")
DIGITS = tuple("0123456789")
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (rows, columns)

CELL = 56  # pixels; a multiple of the resize factor of the x4 preset (28x28 px blocks, merged 2x2)
OVERSAMPLING = 4  # masks are drawn this much larger and averaged down: smooth edges
RADIUS_RANGE = (17, 22)  # pixels, half the side of a shape
CENTRE_JITTER = 3  # pixels, of a shape in its cell; with the largest radius it stays inside
DIGIT_JITTER = 2  # pixels, of a digit and its plate
GLYPH_SIZE_RANGE = (30, 35)  # font size, upper end excluded; the digits are about 0.7 of it high: 21-24 px
VIDEO_TRAVEL = 44  # pixels from the first to the last frame
VIDEO_JITTER = 6  # pixels, of the middle of the path


@dataclass(frozen=True)
class Scene:
    """What an image or video shows.

    digit: of printed digits.
    motion: direction, of videos.
    count: of equal shapes, where neither is given.
    """

    colour: str
    shape: str | None = None
    count: str | None = None
    digit: str | None = None
    motion: str | None = None

    def answers(self) -> dict[str, str]:
        """The right answer for each question type that can be asked about this scene."""
        # a moving shape is small next to the two-frame blocks it crosses: its direction is asked, its form is not
        facts = {"colour": self.colour, "shape": None if self.motion else self.shape, "count": self.count}
        facts |= {"digits": self.digit, "motion": self.motion}
        return {question_type: answer for question_type, answer in facts.items() if answer is not None}


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A muted, uneven, grainy surface, float32 [H, W, 3] in 0..255.

    It is darker than every colour in COLOURS. With light and dark backgrounds mixed, a model this small needs more
    images
    than a minute on a CPU gives it before it tells a shape from its negative.
    """
    import numpy as np
    from PIL import Image

    coarse = 12.0 * rng.standard_normal((height // 14 + 2, width // 14 + 2), dtype=np.float32)
    blotches = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    slope_down, slope_right = rng.uniform(-12.0, 12.0, 2)
    slope = np.linspace(-slope_down, slope_down, height)[:, None] + np.linspace(-slope_right, slope_right, width)
    level = (rng.uniform(25.0, 75.0) + slope).astype(np.float32) + blotches
    level += 4.0 * rng.standard_normal((height, width), dtype=np.float32)
    return level[..., None] + rng.uniform(-10.0, 10.0, 3).astype(np.float32)


def shape_mask(shape: str, radius: float, offset: tuple[float, float]) -> np.ndarray:
    """Coverage of one shape in a cell, float32 [CELL, CELL] in 0..1.

    offset: (y, x) of its centre, px.
    """
    from PIL import Image, ImageDraw

    scale = OVERSAMPLING
    image = Image.new("L", (CELL * scale, CELL * scale))
    draw = ImageDraw.Draw(image)
    y, x, r = (CELL / 2 + offset[0]) * scale, (CELL / 2 + offset[1]) * scale, radius * scale
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=255)
    else:
        draw.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=255)
        draw.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=255)
    return _to_coverage(image)


def glyph_mask(digit: str, size: int, offset: tuple[float, float]) -> np.ndarray:
    """Coverage of one printed digit in a cell, float32 [CELL, CELL] in 0..1. The font is Pillow's own."""
    from PIL import Image, ImageDraw

    scale = OVERSAMPLING
    image = Image.new("L", (CELL * scale, CELL * scale))
    centre = ((CELL / 2 + offset[1]) * scale, (CELL / 2 + offset[0]) * scale)
    ImageDraw.Draw(image).text(centre, digit, font=_font(size * scale), fill=255, anchor="mm")
    return _to_coverage(image)


@functools.cache
def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _to_coverage(image: Image.Image) -> np.ndarray:
    import numpy as np

    return np.asarray(image.reduce(OVERSAMPLING), dtype=np.float32) / 255.0


def blend(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray, top: int, left: int) -> None:
    """Paints a mask into an image, in place. What lies outside of the image is cut off.

    canvas: [H, W, 3].
    mask: [h, w].
    colour: [3].
    """
    area = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    area += mask[..., None] * (colour - area)


def jitter_colour(rng: np.random.Generator, name: str) -> np.ndarray:
    """The named colour, a little off: float32 [3] in 0..255."""
    import numpy as np

    return (np.array(COLOURS[name]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)).astype(np.float32)


def draw_scene(
    rng: np.random.Generator, scene: Scene, height: int = 2 * CELL, width: int = 2 * CELL, transparent: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene in random cells of a grid in the middle of the image.

    rng: Random numbers for places, colours and the background.
    scene: What to draw.
    height: Of the image, pixels.
    width: Of the image, pixels.
    transparent: Whether the image is opaque only in the cells that show something.

    Returns the image, uint8 [H, W, 3], and where it is opaque, bool [H, W].
    """
    import numpy as np

    canvas, opaque = draw_background(rng, height, width), np.full((height, width), not transparent)
    rows, columns = height // CELL, width // CELL
    top, left = (height - rows * CELL) // 2, (width - columns * CELL) // 2
    for cell in rng.permutation(rows * columns)[: int(scene.count or 1)]:
        row, column = divmod(int(cell), columns)
        y, x = top + row * CELL, left + column * CELL
        _draw_thing(rng, canvas, scene, y, x)
        opaque[y : y + CELL, x : x + CELL] = True
    return _to_uint8(canvas), opaque


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.clip(canvas.round(), 0, 255).astype(np.uint8)


def _draw_thing(rng: np.random.Generator, canvas: np.ndarray, scene: Scene, top: int, left: int) -> None:
    import numpy as np

    jitter = CENTRE_JITTER if scene.digit is None else DIGIT_JITTER
    offset = rng.uniform(-jitter, jitter, 2)
    colour = jitter_colour(rng, scene.colour)
    if scene.digit is None:
        blend(canvas, shape_mask(scene.shape, rng.uniform(*RADIUS_RANGE), offset), colour, top, left)
        return
    blend(canvas, shape_mask("square", 23.0, offset), colour, top, left)
    ink = np.full(3, 12.0, dtype=np.float32)
    blend(canvas, glyph_mask(scene.digit, int(rng.integers(*GLYPH_SIZE_RANGE)), offset), ink, top, left)


def draw_video(rng: np.random.Generator, scene: Scene, frames: int) -> np.ndarray:
    """Draws one shape that moves in the direction `scene.motion` at even speed, uint8 [T, H, W, 3].

    rng: Random numbers for place, speed, colours and the background.
    scene: What to draw.
    frames: Number of frames.

    The middle of its path is the middle of the image, off by at most VIDEO_JITTER.
    """
    import numpy as np

    height = width = 2 * CELL
    background = draw_background(rng, height, width)
    colour, radius = jitter_colour(rng, scene.colour), rng.uniform(*RADIUS_RANGE)
    mask = shape_mask(scene.shape, radius, (0.0, 0.0))
    direction = np.array(DIRECTIONS[scene.motion])
    middle = np.array([height, width]) / 2 + rng.uniform(-VIDEO_JITTER, VIDEO_JITTER, 2)
    video = []
    for progress in np.linspace(-0.5, 0.5, frames):
        top, left = np.round(middle + direction * progress * VIDEO_TRAVEL - CELL / 2).astype(int)
        canvas = background.copy()
        blend(canvas, mask, colour, top, left)
        video.append(canvas)
    return _to_uint8(np.stack(video))


JPEG_QUALITY = 92
# How often each kind occurs, per 1,000 images; the others are plain JPEG. Every kind occurs at least once.
FILE_KINDS = {
    "png": 40,
    "exif_jpeg": 28,  # orientations 2 to 8 in turn
    "grey_jpeg": 20,
    "palette_png": 15,
    "rgba_png": 15,
    "cmyk_jpeg": 15,
    "grey16_png": 8,
    "animated_gif": 8,
}
COLOURLESS = ("grey_jpeg", "grey16_png")
EXTENSIONS = {"png": "png", "palette_png": "png", "rgba_png": "png", "grey16_png": "png", "animated_gif": "gif"}
ORIENTATIONS = (2, 3, 4, 5, 6, 7, 8)  # values of EXIF tag 274 (CIPA DC-008) that a viewer has to undo
VIDEO_FORMS = ((4, 8), (4, 12), (2, 8), (8, 16))  # (frames per second, frames): 2, 3, 4, 2 seconds


def encode_image(rng: np.random.Generator, pixels: np.ndarray, kind: str, orientation: int, mask: np.ndarray) -> bytes:
    """The file of an image.

    rng: Random numbers that some kinds of files need.
    pixels: uint8 [H, W, 3], as a viewer should see them.
    kind: One of FILE_KINDS, or "jpeg".
    orientation: EXIF value of an "exif_jpeg".
    mask: bool [H, W], False where an "rgba_png" is transparent.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    if kind == "png":
        return _save(image, "PNG")
    if kind == "grey_jpeg":
        return _save(image.convert("L"), "JPEG", quality=JPEG_QUALITY)
    if kind == "cmyk_jpeg":
        return _save(image.convert("CMYK"), "JPEG", quality=JPEG_QUALITY)
    if kind == "palette_png":
        return _save(image.quantize(128), "PNG")
    if kind == "rgba_png":
        image.putalpha(Image.fromarray(mask.astype("uint8") * 255))
        return _save(image, "PNG")
    if kind == "grey16_png":
        return _save(_to_grey16(image), "PNG")
    if kind == "animated_gif":
        frames = [Image.fromarray(_flicker(rng, pixels)).quantize(128) for _ in range(3)]
        return _save(image.quantize(128), "GIF", save_all=True, append_images=frames, duration=250, loop=0)
    if kind == "exif_jpeg":
        return _save_rotated(image, orientation)
    return _save(image, "JPEG", quality=JPEG_QUALITY)


def _save(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _to_grey16(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)  # 255 * 257 = 65535


def _flicker(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.clip(pixels + rng.normal(0.0, 6.0, pixels.shape), 0, 255).astype(np.uint8)


def _save_rotated(image: Image.Image, orientation: int) -> bytes:
    """A JPEG whose stored pixels are turned so that undoing `orientation` gives `image`."""
    from PIL import Image

    move = Image.Transpose
    inverses = {
        2: move.FLIP_LEFT_RIGHT,
        3: move.ROTATE_180,
        4: move.FLIP_TOP_BOTTOM,
        5: move.TRANSPOSE,
        6: move.ROTATE_90,
        7: move.TRANSVERSE,
        8: move.ROTATE_270,
    }
    exif = Image.Exif()
    exif[274] = orientation
    return _save(image.transpose(inverses[orientation]), "JPEG", quality=JPEG_QUALITY, exif=exif)


def encode_video(frames: np.ndarray, frames_per_second: int, codec: str) -> bytes:
    """An mp4 file, with the same bytes every time.

    frames: uint8 [T, H, W, 3].
    frames_per_second: Frame rate.
    codec: Name of FFmpeg's encoder.

    It uses one thread, no code of x264 that rounds differently on another CPU, and no date.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"qscale": "2"}
        if codec == "libx264":
            options = {"preset": "veryfast", "crf": "16", "x264-params": "cpu-independent=1"}
        stream = container.add_stream(codec, rate=frames_per_second, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
