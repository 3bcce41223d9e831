"""Pictures and clips as a shard stores them: bytes from anywhere in, checked bytes out.

A plain RGB JPEG and an mp4 clip keep their bytes. Every other picture becomes a JPEG of quality 95 without chroma
subsampling; its colour values are taken as they are (an ICC profile is neither applied nor kept). What cannot be
decoded raises `UnusableSample` with a reason to count by.
"""

import io
import re
from dataclasses import dataclass

from PIL import Image

from media import to_rgb

JPEG_QUALITY = 95
# Bitmap formats only: Pillow would hand EPS to Ghostscript, and vector formats have no size of their own.
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAXIMUM_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB
MAXIMUM_JPEG_SIDE = 65_500  # px, libjpeg's JPEG_MAX_DIMENSION
EXIF_ORIENTATION = 0x0112  # EXIF 2.32; 1 is upright, 2 to 8 are the other seven
TURNED = range(2, 9)
MEMORY_ADDRESS = re.compile(r" object at 0x[0-9a-f]+")  # in Pillow's messages; another one in every run


class UnusableSample(Exception):
    """A sample that cannot be used. `reason`: one of a fixed set of words; `detail`: which part, and what is wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class StoredMedia:
    """One media part of a shard sample.

    part: the file ending in the shard, "jpg" or "mp4".
    treatment: "images_copied", "images_converted" or "clips_copied", the name it is counted under.
    """

    part: str
    data: bytes
    treatment: str


def convert_media(kind: str, name: str, data: bytes) -> StoredMedia:
    """Check one picture (kind "image") or clip (kind "video") and return what the shard stores.

    Raises UnusableSample with reason broken_image, image_too_large, unsupported_image, broken_clip or unsupported_clip.
    """
    try:
        return convert_picture(data) if kind == "image" else check_clip(data)
    except UnusableSample as unusable:
        raise UnusableSample(unusable.reason, f"{name}: {unusable.detail}") from None
    except Image.DecompressionBombError as error:
        raise UnusableSample("image_too_large", f"{name}: {error}") from error
    except Exception as error:
        # The decoders meet bytes from anywhere and raise whatever they like (struct.error, KeyError, SyntaxError, ...).
        reason = "broken_image" if kind == "image" else "broken_clip"
        fault = MEMORY_ADDRESS.sub("", f"{type(error).__name__}: {error}")
        raise UnusableSample(reason, f"{name}: {fault}") from error


def convert_picture(data: bytes) -> StoredMedia:
    """Any picture -> JPEG file; the same bytes where they already are an upright RGB JPEG that decodes to its end."""
    image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    refuse_size(image.width, image.height)
    if has_damaged_exif(image):
        image.info.pop("exif")  # shown as browsers do, as if there were none
    elif image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(EXIF_ORIENTATION) not in TURNED:
        # At 1/8 size libjpeg reads every Huffman code, so a cut file is found, but skips most of the inverse DCT.
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        return StoredMedia("jpg", data, "images_copied")
    image.load()
    refuse_pixel_format(image)
    return StoredMedia("jpg", encode_jpeg(to_rgb(image)), "images_converted")


def refuse_size(width: int, height: int) -> None:
    if width * height > MAXIMUM_PIXELS or max(width, height) > MAXIMUM_JPEG_SIDE:
        limits = f"{MAXIMUM_PIXELS} px in all and {MAXIMUM_JPEG_SIDE} px a side"
        raise UnusableSample("image_too_large", f"{height} x {width} px (height, width), the limits are {limits}")


def has_damaged_exif(image: Image.Image) -> bool:
    """Training would stumble over an EXIF block that cannot be read, so such a picture is written anew without it."""
    try:
        image.getexif()
    except Exception:
        return "exif" in image.info
    return False


def refuse_pixel_format(image: Image.Image) -> None:
    """Refuse loaded pictures whose values have no known range: floating point, and integers beyond 16 bits."""
    if image.mode == "F":
        raise UnusableSample("unsupported_image", "floating-point pixels have no known range")
    if image.mode == "I":
        lowest, highest = image.getextrema()
        if lowest < 0 or highest > 65_535:
            raise UnusableSample("unsupported_image", f"integer pixels from {lowest} to {highest} have no known range")


def encode_jpeg(picture: Image.Image) -> bytes:
    """RGB picture -> JPEG file; the same bytes for the same pixels and the same libjpeg."""
    picture.info.clear()  # Pillow would write a GIF's comment into the JPEG
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def check_clip(data: bytes) -> StoredMedia:
    """An mp4 clip, byte for byte, if frames decode at its beginning and all its packets are there."""
    import av  # loads FFmpeg's libraries, which data without clips does not need

    with av.open(io.BytesIO(data)) as container:
        if "mp4" not in container.format.name.split(","):
            raise UnusableSample("unsupported_clip", f"a {container.format.name} file; only mp4 is stored")
        if not container.streams.video:
            raise UnusableSample("broken_clip", "no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # decoding it would crash the process in PyAV < 18.1
            raise UnusableSample("broken_clip", "a codec that FFmpeg does not know")
        packets = decoded = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise UnusableSample("broken_clip", f"packet {packets} is cut short")
            packets += packet.size > 0  # the last, empty packet only drains the decoder
            if not decoded:
                decoded = len(packet.decode())
        if not decoded or packets < stream.frames:
            raise UnusableSample("broken_clip", f"{packets} of {stream.frames} packets there, {decoded} frames decoded")
    return StoredMedia("mp4", data, "clips_copied")
