"""Images and videos as a shard stores them: bytes from anywhere in, checked bytes out. Files are judged by what they
are, never by their names.

Nothing is decoded or encoded again that training reads as it is. So these keep their bytes:

    JPEG    8-bit, grey or RGB, no EXIF rotation, after a look at its structure (image_structure.py)
    PNG     8-bit, grey, RGB or palette, no transparency, no animation, no EXIF rotation, after the same
    videos   mp4, mov, mkv, webm, avi: packets counted, a first, a middle and a last part decoded

What looks unusual in an image's structure is decoded to find out. All other images, and those with more than
`max_pixels`, become JPEGs without chroma subsampling: first frame, EXIF rotation applied, transparency on white (white
writing on black), 16 bits scaled to 8. Colour values are taken as they are (an ICC profile is neither applied nor
kept). Videos in other containers are put into an mp4, mkv or avi with the same packets. A video that is given as image
files becomes an mp4 of those JPEGs.

What training could not read raises `UnusableSample`, with one of these reasons to count by:

    broken_image, broken_video            cut short, damaged, or nothing of the kind
    image_too_large                      over 89,478,485 pixels, or 65,500 a side
    video_too_large, video_too_long        frames of over 8192 x 4320 pixels; over a million frames
    extreme_aspect_ratio                 one side over 200 times the other: Qwen2-VL takes none
    unsupported_image                    pixels of no known range; 16 bits of which 12 or fewer are used; a format that
                                         is not read, such as HEIC or ICO
    unsupported_video                     a format or codec that FFmpeg lacks; frames of several sizes; an uneven rate
                                         where only avi, which has one rate, takes the codec
"""

import io
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError, features

from dct_qwen2vl.data.images import EXIF_ORIENTATION, decode_image, open_image, to_rgb
from dct_qwen2vl.data.reading import PYTHON_OBJECT
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.file_kinds import name_medium
from dct_qwen2vl.preparation.image_structure import read_layout
from dct_qwen2vl.preparation.video_conversion import (
    MAXIMUM_ASPECT_RATIO,
    Probe,
    mux_jpegs,
    probe_video,
    refuse_other_times,
    remux,
)

OPTIONAL_FORMATS = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # by the feature of Pillow's that reads them
# Bitmap formats only: Pillow would hand EPS to Ghostscript, and vector formats have no size of their own.
IMAGE_FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"),
    *(name for name, feature in OPTIONAL_FORMATS.items() if features.check(feature)),
)
OTHER_FORMATS = {  # by how their files begin
    "AVIF": rb".{4}ftypavi[fs]",
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "HEIC": rb".{4}ftyp(hei|hev|mif|msf)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "ICO": rb"\0\0\x01\0",
    "PSD": rb"8BPS",
    "EPS": rb"%!PS",
    "PDF": rb"%PDF",
    "SVG": rb"\s*(<\?xml.{,500})?<svg",
}
MAXIMUM_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB
MAXIMUM_JPEG_SIDE = 65_500  # px, libjpeg's JPEG_MAX_DIMENSION
MAKE_SMALLER = "make it smaller first"
LEAST_CONTRAST = 16  # of 255: how much darker than white something of a transparent image must be to lie on white
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF 6.0 and one of its values
TWELVE_BITS = 1 << 12  # values that cameras and scanners write into 16 bits as they are
NOT_UPRIGHT = range(2, 9)  # of the EXIF orientations

BITS_OF_PNG = 24  # where its header says how many bits a value has
METADATA_NAMES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # under which Pillow keeps orientations
TREATMENTS = (
    "images_copied",
    "images_converted",
    "images_downsized",
    "videos_copied",
    "videos_remuxed",
    "videos_of_frames",
)


@dataclass(frozen=True)
class ConversionOptions:
    """How media are stored.

    max_pixels: images with more (height times width) are made smaller, at the same aspect ratio.
    jpeg_quality: of what is encoded.
    check_images: decodes every image and every frame of a video, even where the structure is sound.
    """

    max_pixels: int | None = None
    jpeg_quality: int = 95
    check_images: bool = False


@dataclass(frozen=True)
class StoredMedia:
    """One media part of a shard sample.

    part: file ending in the shard, "jpg", "png", "mp4", "mov", "mkv", "webm" or "avi".
    treatment: one of TREATMENTS.
    height, width: as displayed, px.
    frames: 1 for an image.
    seconds: of a video, 0 for an image.
    """

    part: str
    data: bytes
    treatment: str
    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0


DEFAULTS = ConversionOptions()


def convert_media(kind: str, name: str, data: bytes, options: ConversionOptions = DEFAULTS) -> StoredMedia:
    """Checks one image or video. Returns what the shard stores.

    kind: "image" or "video".
    name: Named in the detail of an error.
    data: The file.
    options: How it is stored.

    Raises UnusableSample with a reason of the table above.
    """
    with saying_which(kind, name):
        return convert_image(data, options) if kind == "image" else convert_video(data, options)


def convert_all(
    media: Iterable[tuple[str, str]], files: Iterable[bytes], options: ConversionOptions = DEFAULTS
) -> list[StoredMedia]:
    """Checks all media of an entry. Returns the parts of its sample, in order.

    media: (kind, name), as in `entries.CheckedEntry`. Adjacent media of kind "frame" become one video.
    files: The file of each medium.
    options: How they are stored.

    Raises UnusableSample with a reason of the table above.
    """
    stored: list[StoredMedia] = []
    frames: list[StoredMedia] = []
    place, first = 0, ""
    for (kind, name), data in zip(media, files, strict=True):
        if kind != "frame":
            stored.append(convert_media(kind, name, data, options))
            continue
        if not frames:
            place, first = len(stored), name
        with saying_which("image", name):
            frames.append(convert_image(data, options, parts=("jpg",)))
    if frames:
        with saying_which("video", first):
            stored.insert(place, join_frames(frames, options))
    return stored


@contextmanager
def saying_which(kind: str, name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into an UnusableSample with the medium's name."""
    try:
        yield
    except UnusableSample as unusable:
        raise UnusableSample(unusable.reason, f"{name}: {unusable.detail}") from None
    except Image.DecompressionBombError as error:
        raise UnusableSample("image_too_large", f"{name}: {MAKE_SMALLER} ({error})") from error
    except Exception as error:
        # The decoders meet bytes from anywhere and raise whatever they like (struct.error, KeyError, SyntaxError, ...).
        reason = "broken_image" if kind == "image" else "broken_video"
        fault = PYTHON_OBJECT.sub("", f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise UnusableSample(reason, f"{name}: {fault:.500}") from error


# Images


def convert_image(data: bytes, options: ConversionOptions, parts: tuple[str, ...] = ("jpg", "png")) -> StoredMedia:
    """The same bytes, if training reads the image as it is and `parts` has its ending; otherwise a JPEG."""
    layout = read_layout(data)
    if layout and layout.part in parts and not (layout.has_metadata or options.check_images):
        refuse_size(layout.height, layout.width)
        if not exceeds(layout.height, layout.width, options):
            return StoredMedia(layout.part, data, "images_copied", layout.height, layout.width)
    with open_known(data) as image:
        width, height = image.size
        refuse_size(height, width)
        orientation = read_orientation(image)
        if exceeds(height, width, options):
            return downsize(image, data, orientation, options)
        part = copied_part(image, data, orientation)
        if part not in parts:
            return encode_jpeg(load_rgb(image, orientation), "images_converted", options)
        if not layout or options.check_images:
            decode_whole(image, options.check_images)
        return StoredMedia(part, data, "images_copied", height, width)


def open_known(data: bytes) -> Image.Image:
    """Raises UnusableSample for formats that are not read, and whatever Pillow raises."""
    try:
        return open_image(data, IMAGE_FORMATS)
    except UnidentifiedImageError:
        for name, beginning in OTHER_FORMATS.items():
            if name not in IMAGE_FORMATS and re.match(beginning, data, re.DOTALL):
                raise UnusableSample("unsupported_image", f"{name}, which is not read here") from None
        raise UnusableSample("broken_image", name_medium(data, "image")) from None


def refuse_size(height: int, width: int) -> None:
    """Raises UnusableSample for more pixels, longer sides and longer strips than can be used."""
    if min(height, width) < 1:
        raise UnusableSample("broken_image", f"{height} x {width} px (height, width)")
    if width * height > MAXIMUM_PIXELS or max(width, height) > MAXIMUM_JPEG_SIDE:
        limits = f"{MAXIMUM_PIXELS} px in all and {MAXIMUM_JPEG_SIDE} px a side"
        what = f"{height} x {width} px (height, width), the limits are {limits}"
        raise UnusableSample("image_too_large", f"{what}: {MAKE_SMALLER}")
    if max(height, width) > MAXIMUM_ASPECT_RATIO * min(height, width):
        limit = f"one side is over {MAXIMUM_ASPECT_RATIO} times the other"
        raise UnusableSample("extreme_aspect_ratio", f"{height} x {width} px (height, width): {limit}")


def exceeds(height: int, width: int, options: ConversionOptions) -> bool:
    return options.max_pixels is not None and height * width > options.max_pixels


def read_orientation(image: Image.Image) -> int | None:
    """Of the EXIF or XMP block. 1, upright, without one; None for a block that cannot be read.

    A PNG is read to its end, where such blocks may lie. Other images are left unread.
    """
    if image.format == "PNG":
        image.load()
    try:
        if "exif" in image.info:  # getexif() complains but once, and that may have been when the file was opened
            Image.Exif().load(image.info["exif"])
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:
        return None


def copied_part(image: Image.Image, data: bytes, orientation: int | None) -> str | None:
    """The file ending of an image that training reads as it is.

    An image with an EXIF block that cannot be read is none: training would stumble over it.
    """
    if orientation is None or orientation in NOT_UPRIGHT:
        return None
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        return "jpg"
    if image.format != "PNG":
        return None
    is_plain = image.mode in ("L", "P", "RGB") and data[BITS_OF_PNG] == 8 and "transparency" not in image.info
    return "png" if is_plain and not getattr(image, "is_animated", False) else None


def decode_whole(image: Image.Image, every_pixel: bool) -> None:
    """Reads an image to its end, after which it may have another size. Raises whatever Pillow raises."""
    if not every_pixel:
        # At 1/8 size libjpeg reads every Huffman code, so a cut file is found, but skips most of the inverse DCT.
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def load_rgb(image: Image.Image, orientation: int | None) -> Image.Image:
    """Any opened image as displayed, RGB. A damaged EXIF block is ignored, as browsers do."""
    image.load()
    if image.mode == "F":
        raise UnusableSample("unsupported_image", "floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        lowest, highest = image.getextrema()
        is_narrow = image.mode == "I" and image.format == "TIFF" and highest < 256  # its 16 bits are "I;16"
        if lowest < 0 or highest > 65_535 or is_narrow:
            raise UnusableSample("unsupported_image", f"integer pixels from {lowest} to {highest} have no known range")
        if 0 < highest < TWELVE_BITS:
            what = f"16-bit pixels from {lowest} to {highest} use hardly any of their range"
            raise UnusableSample("unsupported_image", f"{what}: stretch them to 0..65535")
    if orientation is None:
        image = image.copy()
        for name in METADATA_NAMES:
            image.info.pop(name, None)
    rgb = to_rgb(image)
    if image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        rgb = ImageOps.invert(rgb)  # Pillow does so for 8 bits alone
    return put_on_black(image, rgb) if image.has_transparency_data else rgb


def put_on_black(image: Image.Image, on_white: Image.Image) -> Image.Image:
    """The image on black if hardly anything of it is to be seen on white, as of white writing. Otherwise on white.

    image: Opened, with transparency.
    on_white: The same as RGB, as displayed.
    """
    contrast = 255 - min(low for low, _ in on_white.getextrema())
    if contrast >= LEAST_CONTRAST:
        return on_white
    shown = ImageOps.exif_transpose(image).convert("RGBA")
    on_black = Image.alpha_composite(Image.new("RGBA", shown.size, "black"), shown).convert("RGB")
    is_seen = contrast < max(high for _, high in on_black.getextrema()) and shown.getextrema()[3][0] < 255
    return on_black if is_seen else on_white


def downsize(image: Image.Image, data: bytes, orientation: int | None, options: ConversionOptions) -> StoredMedia:
    """A new JPEG with at most `max_pixels`. A much larger JPEG is decoded at a fraction of its size (images.py)."""

    def fit(height: int, width: int, _frames: int = 1) -> tuple[int, int]:
        shrink = math.sqrt(options.max_pixels / (height * width))
        sides = max(1, math.floor(height * shrink)), max(1, math.floor(width * shrink))
        longest = MAXIMUM_ASPECT_RATIO * min(sides)  # which a short side that was rounded down may make too short
        return min(sides[0], longest), min(sides[1], longest)

    if image.format == "JPEG" and orientation is not None:
        smaller = Image.fromarray(decode_image(data, fit))
    else:
        smaller = load_rgb(image, orientation)
        height, width = fit(smaller.height, smaller.width)
        smaller = smaller.resize((width, height), Image.Resampling.BICUBIC)
    return encode_jpeg(smaller, "images_downsized", options)


def encode_jpeg(image: Image.Image, treatment: str, options: ConversionOptions) -> StoredMedia:
    """RGB image -> JPEG file; the same bytes for the same pixels and the same libjpeg."""
    image.info.clear()  # Pillow would write a GIF's comment into the JPEG
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=options.jpeg_quality, subsampling=0)
    return StoredMedia("jpg", stream.getvalue(), treatment, image.height, image.width)


# Videos


def convert_video(data: bytes, options: ConversionOptions) -> StoredMedia:
    """Any video -> the same bytes, or the same packets in another container."""
    probe, treatment = probe_video(data, options.check_images), "videos_copied"
    if probe.part is None:
        source, data, treatment = (data, probe), remux(data), "videos_remuxed"
        probe = probe_video(data, options.check_images)
        if probe.part == "avi":
            refuse_other_times(source, (data, probe))
    return store_video(data, probe, treatment)


def join_frames(frames: list[StoredMedia], options: ConversionOptions) -> StoredMedia:
    """JPEGs of one size -> a video of them, as they are."""
    sizes = {(frame.height, frame.width) for frame in frames}
    if len(sizes) > 1:
        raise UnusableSample(
            "unsupported_video", f"its frames have {len(sizes)} sizes, from {min(sizes)} to {max(sizes)}"
        )
    data = mux_jpegs([frame.data for frame in frames], *sizes.pop())
    return store_video(data, probe_video(data, options.check_images), "videos_of_frames")


def store_video(data: bytes, probe: Probe, treatment: str) -> StoredMedia:
    return StoredMedia(probe.part, data, treatment, probe.height, probe.width, probe.frames, probe.seconds)
