"""Bytes of images -> RGB arrays. The one place that decides how images are decoded and resized.

Letters used for shapes in this file: H and W rows and columns in pixels as displayed, that is, with the EXIF
orientation applied.
"""

import io

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from dct_qwen2vl.data.reading import Fit, displayed_size, readable
from dct_qwen2vl.dct.image_colours_dct import pil_to_rgb

# Names of images in shards and for servers. The second line is rare; FFmpeg would take an AVIF for a video.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("avif", "jfif", "jpe", "jp2", "mpo", "pbm", "pgm", "ppm"),
)
EXIF_ORIENTATION = 0x0112  # EXIF 2.32
TURNED = (5, 6, 7, 8)  # the orientations that exchange height and width
# Bytes to which one text chunk or colour profile of a PNG may unpack. Pillow's own limit is 1 MiB, which editors'
# histories and printers' profiles exceed; its limit of 64 MiB for all text of a file stays.
MAXIMUM_PNG_CHUNK = 16 << 20
# How many times as large as the target a JPEG must still be where libjpeg scales it down while decoding. libjpeg leaves
# out the high frequencies of its blocks; the bicubic filter behind it then hides most of that (docs/tokens.md).
DRAFT_FACTOR = 2
# PIL raises all of these for files that are broken in one way or another.
IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    RuntimeError,  # AVIF
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: first frame, EXIF rotation applied, transparency on white, 16-bit scaled to 8."""
    image.seek(0)
    return pil_to_rgb(ImageOps.exif_transpose(image))


def open_image(data: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens an image file and reads its header.

    data: The file.
    formats: Pillow's names of the formats to try. None: all.

    Raises what Pillow raises.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = MAXIMUM_PNG_CHUNK
    return Image.open(io.BytesIO(data), formats=formats)


def decode_image(data: bytes, fit: Fit | None = None) -> np.ndarray:
    """Decodes an image file to uint8 RGB [H, W, 3].

    data: The file.
    fit: Gives the size of the result. None: the image's own size.

    Resizing is PIL's bicubic filter, as in the image processor. A JPEG of at least four times the size in both
    directions is decoded at a half, a quarter or an eighth, never below DRAFT_FACTOR times the target. A fit that is
    `whole` forbids this.

    Raises MediaError.
    """
    with readable("image", IMAGE_ERRORS):
        image = open_image(data)
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    with image:
        target = fit(*displayed_size(image, turned), 1) if fit else None
        with readable("image", IMAGE_ERRORS):
            whole = getattr(fit, "whole", False)
            return np.asarray(_resize_image(image, target, turned, whole) if target else to_rgb(image))


def _resize_image(image: Image.Image, target: tuple[int, int], turned: bool, whole: bool) -> Image.Image:
    """An opened image file as RGB with the displayed height and width `target`."""
    height, width = target
    stored_size = (height, width) if turned else (width, height)  # PIL's order is width, height
    draft = None if whole else image.draft("RGB", tuple(DRAFT_FACTOR * side for side in stored_size))
    if draft is None:  # or no JPEG
        return to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    image = image if image.mode == "RGB" else image.convert("RGB")
    # The sides of a draft are rounded up; the box is what the image covers of them. Its EXIF data stay with it.
    return to_rgb(image.resize(stored_size, Image.Resampling.BICUBIC, box=draft[1]))


def image_shape(data: bytes) -> tuple[int, int, int]:
    """Height and width of an image file as it is shown, pixels, and 1 for its one frame. Raises MediaError."""
    with readable("image", IMAGE_ERRORS), open_image(data) as image:
        return *displayed_size(image, is_turned(image)), 1


def is_turned(image: Image.Image) -> bool:
    # A PNG's own getexif decodes the image, to find tags that stand behind it.
    """Whether EXIF says that an image is shown with rows and columns exchanged."""
    return Image.Image.getexif(image).get(EXIF_ORIENTATION) in TURNED
