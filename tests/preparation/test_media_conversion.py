"""Images and videos: what keeps its bytes, what is converted and how, what is refused."""

import io
import re
import struct
import zlib

import av
import numpy as np
import pytest
from media_files import (
    COLOURS,
    RED,
    WHITE,
    audio_file,
    encode,
    insert_chunk,
    insert_segment,
    noise,
    png_header,
    quadrants,
    rotated_exif,
    video_file,
)
from PIL import Image, features

from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, decode_video
from dct_qwen2vl.preparation import image_structure
from dct_qwen2vl.preparation.conversion import ConversionOptions, StoredMedia, convert_all, convert_media
from dct_qwen2vl.preparation.entries import UnusableSample
from dct_qwen2vl.preparation.image_structure import find_end_of_scan, list_chunks, read_layout
from dct_qwen2vl.preparation.video_conversion import probe_video

ALL_FRAMES = VideoSampling(fps=1000, min_frames=1)


def pixels(data: bytes) -> np.ndarray:
    """The JPEG's pixels, int [H, W, 3]; fails if it is no RGB JPEG without EXIF."""
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, len(image.getexif())) == ("JPEG", "RGB", 0)
    return np.asarray(image).astype(int)


def convert(image_file: bytes) -> np.ndarray:
    """What an image file becomes, decoded; fails if it was copied."""
    stored = convert_media("image", "name", image_file)
    assert (stored.part, stored.treatment) == ("jpg", "images_converted")
    image = pixels(stored.data)
    assert (stored.height, stored.width, stored.frames, stored.seconds) == (*image.shape[:2], 1, 0)
    return image


def assert_copied(data: bytes, part: str, options: ConversionOptions = ConversionOptions()) -> None:  # noqa: B008
    stored = convert_media("image", "name", data, options)
    assert (stored.part, stored.treatment, stored.data == data) == (part, "images_copied", True)
    assert (stored.height, stored.width) == decode_image(data).shape[:2]


def reason_of(kind: str, data: bytes, name: str = "a/x", options: ConversionOptions = ConversionOptions()) -> str:  # noqa: B008
    """The reason for which a medium is refused, which names it."""
    with pytest.raises(UnusableSample, match=name) as caught:
        convert_media(kind, name, data, options)
    return caught.value.reason


def assert_quadrants(image: np.ndarray, names: str, tolerance: int = 4) -> None:
    height, width = image.shape[:2]
    centres = image[[height // 4, height // 4, -height // 4, -height // 4], [width // 4, -width // 4] * 2]
    np.testing.assert_allclose(centres, [COLOURS[name] for name in names], atol=tolerance)


# Images that keep their bytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True, "quality": 70},
        {"optimize": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"exif": rotated_exif(1)},
        {"icc_profile": bytes(3000)},
        {"comment": b"a comment"},
        {"restart_marker_blocks": 2},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_keep_their_bytes(options, mode):
    data = encode(noise().convert(mode), "JPEG", **options)
    assert_copied(data, "jpg")
    assert read_layout(data) is not None


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_plain_pngs_keep_their_bytes(mode, interlaced):
    data = encode(noise(300, 300).convert(mode), "PNG", dpi=(72, 72), icc_profile=bytes(3000), bits=8)
    data = insert_chunk(data, b"tEXt", b"Software\0drawn") if interlaced else data
    assert data.count(b"IDAT") >= (2 if mode == "RGB" else 1)
    assert_copied(data, "png")
    assert read_layout(data) == ("png", 300, 300, False)


def test_what_is_unusual_but_sound_keeps_its_bytes_after_decoding():
    jpeg, png = encode(noise(), "JPEG"), encode(noise(), "PNG")
    for data, part in (
        (jpeg + b"garbage", "jpg"),
        (jpeg[:2] + b"\xff" + jpeg[2:], "jpg"),  # a fill byte
        (insert_chunk(png, b"prIv", b"anything"), "png"),
        (insert_chunk(png, b"tEXt", b"Unknown\0anything"), "png"),
        (png + b"garbage", "png"),
    ):
        assert read_layout(data) is None
        assert_copied(data, part)


def test_files_are_stored_by_what_they_are_not_by_their_names():
    assert convert_media("image", "a.jpg", encode(noise(), "PNG")).part == "png"
    assert convert_media("image", "a.png", encode(noise(), "JPEG")).part == "jpg"
    assert convert_media("video", "a.avi", video_file("matroska")).part == "mkv"


def test_every_image_is_decoded_if_asked_for():
    damaged = bytearray(encode(noise(64, 64), "PNG"))
    place = damaged.index(b"IDAT") + 200
    damaged[place : place + 50] = bytes(50)
    length = int.from_bytes(damaged[damaged.index(b"IDAT") - 4 : damaged.index(b"IDAT")], "big")
    end = damaged.index(b"IDAT") + 4 + length
    damaged[end : end + 4] = struct.pack(">I", zlib.crc32(damaged[damaged.index(b"IDAT") : end]))
    assert convert_media("image", "x", bytes(damaged)).treatment == "images_copied"
    options = ConversionOptions(check_images=True)
    assert reason_of("image", bytes(damaged), options=options) == "broken_image"
    assert_copied(encode(noise(), "JPEG"), "jpg", options)
    assert_copied(encode(noise(), "PNG"), "png", options)


# The structural check


def test_structure_of_a_jpeg_is_followed_to_its_end():
    for progressive in (False, True):
        data = encode(noise(64, 64), "JPEG", progressive=progressive, restart_marker_blocks=3)
        assert read_layout(data) == ("jpg", 64, 64, False)
        for stop in range(len(data)):
            assert read_layout(data[:stop]) is None, stop


def test_structure_of_a_png_is_followed_to_its_end():
    data = encode(noise(16, 16).convert("P"), "PNG")
    assert read_layout(data) == ("png", 16, 16, False)
    for stop in range(len(data)):
        assert read_layout(data[:stop]) is None, stop
    for place in range(8, len(data)):  # every byte behind the signature is under a CRC or is one
        assert read_layout(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None, place


@pytest.mark.parametrize("search_bytes", [1, 2, 7, 1 << 18])
def test_a_scan_ends_at_the_first_marker_that_is_no_restart(monkeypatch, search_bytes):
    monkeypatch.setattr(image_structure, "SEARCH_BYTES", search_bytes)
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 40, 400):
        usual, markers = rng.choice([0, 0xD0, 0xD7, 0xFF], length), rng.choice([0xCF, 0xD8, 0xFF, 1], length)
        data = np.where(rng.random(length) < 0.02, markers, usual).astype(np.uint8).tobytes()
        for start in range(0, length, 3):
            found = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL).search(data, start)
            assert find_end_of_scan(data, start) == (found.start() if found else length)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xff\xc0\x00\x11\x08", b"\xff\xc9\x00\x11\x08"),  # arithmetic coding
        (b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        (b"\x01\x22\x00\x02\x11\x01", b"\x01\x33\x00\x02\x21\x01"),  # fractional sampling
        (b"\x01\x22\x00\x02\x11\x01", b"\x01\x22\x03\x02\x11\x01"),  # a quantization table that is not there
        (b"\xff\xda\x00\x0c\x03\x01\x00", b"\xff\xda\x00\x0c\x03\x01\x30"),  # a Huffman table that is not there
        (b"\xff\xda\x00\x0c\x03\x01\x00\x02", b"\xff\xda\x00\x0c\x03\x01\x00\x09"),  # an unknown component
        (b"\xff\xc4\x00\x1f\x00\x00\x01\x05", b"\xff\xc4\x00\x1f\x00\x03\x01\x05"),  # no prefix code
        (b"\xff\xdb\x00\x43\x00", b"\xff\xdb\x00\x43\x07"),  # the eighth quantization table
    ],
)
def test_structure_that_decoders_refuse(old, new):
    data = encode(noise(64, 64), "JPEG")
    assert data.count(old) == 1
    assert read_layout(data.replace(old, new)) is None


def test_a_second_scan_of_the_same_components_is_left_to_the_decoder():
    """libjpeg expects the end there, and gives up on the whole image."""
    data = encode(noise(64, 64), "JPEG")
    twice = data[:-2] + data[data.index(b"\xff\xda") : -2] + data[-2:]
    assert read_layout(data) and read_layout(twice) is None
    assert reason_of("image", twice) == "broken_image"


def test_every_copied_part_of_a_png_that_may_turn_or_break_it_is_left_to_the_decoder():
    png = encode(noise(), "PNG")
    for kind, content in (
        (b"eXIf", rotated_exif(6).tobytes()[6:]),
        (b"tRNS", bytes(6)),
        (b"acTL", bytes(8)),
        (b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 21))),
        (b"gAMA", b"\0"),
        (b"tEXt", b"transparency\0yes"),
        (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="6"'),
    ):
        assert list_chunks(insert_chunk(png, kind, content))
        assert read_layout(insert_chunk(png, kind, content)) is None


# Images that are converted


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [(2, "grwb"), (3, "wbgr"), (4, "bwrg"), (5, "rbgw"), (6, "brwg"), (7, "wgbr"), (8, "gwrb")],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, shown, file_format):
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    image = convert(encode(quadrants("rgbw"), file_format, exif=rotated_exif(orientation), **options))
    assert image.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert_quadrants(image, shown, tolerance=8)


def test_xmp_orientation_is_applied():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    data = insert_segment(encode(quadrants("rgbw"), "JPEG", quality=95, subsampling=0), 0xE1, xmp)
    assert_quadrants(convert(data), "brwg", tolerance=8)


@pytest.mark.parametrize("options", [{}, {"dpi": (72, 72)}])
def test_damaged_exif_does_not_reach_training(options):
    data = encode(quadrants("rgbw"), "JPEG", quality=95, **options)
    damaged = insert_segment(data, 0xE1, b"Exif\0\0" + b"garbage that is no TIFF header")
    assert_quadrants(decode_image(convert_media("image", "name", damaged).data).astype(int), "rgbw")
    small = convert_media("image", "name", damaged, ConversionOptions(max_pixels=400))
    assert (small.height, small.width) == (16, 24)
    assert_quadrants(decode_image(small.data).astype(int), "rgbw", tolerance=12)


def test_transparency_lies_on_white():
    half = quadrants("rgbw").convert("RGBA")
    half.putalpha(128)
    np.testing.assert_allclose(convert(encode(half, "PNG"))[4, 4], (255, 127, 127), atol=4)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    np.testing.assert_allclose(convert(encode(clear, "WEBP", lossless=True)), 255, atol=2)
    grey = Image.new("LA", (16, 16), (100, 0))
    np.testing.assert_allclose(convert(encode(grey, "PNG")), 255, atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("value", "seen"), [(255, (0, 255)), (248, (0, 248)), (0, (255, 0)), (200, (255, 200))])
def test_white_writing_on_nothing_lies_on_black(mode, value, seen):
    image = Image.new("L", (48, 32), value).convert(mode)
    image.putalpha(Image.fromarray(np.pad(np.full((8, 24), 255, np.uint8), ((0, 24), (0, 24)))))
    turned = convert(encode(image, "PNG", exif=rotated_exif(6)))
    assert turned.shape == (48, 32, 3)
    np.testing.assert_allclose([turned[40, 4], turned[4, 28]], np.repeat(seen, 3).reshape(2, 3), atol=4)


@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (16, np.uint16)])
def test_a_tiff_in_which_0_is_white(bits, kind):
    values = np.linspace(0, 2**bits - 1, 32).astype(kind)[None].repeat(16, axis=0)
    black_is_zero = encode(Image.fromarray(values), "TIFF")
    tags = [struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0)]
    assert black_is_zero.count(tags[0]) == 1
    shown = convert(black_is_zero).astype(int)
    white_is_zero = black_is_zero.replace(*tags)
    np.testing.assert_allclose(convert(white_is_zero).astype(int), 255 - shown, atol=4)
    assert shown[0, 0, 0] < 8 and shown[0, -1, 0] > 247


def test_palette_with_a_transparent_colour():
    palette = quadrants("rgbw").quantize(4)
    assert_quadrants(convert(encode(palette, "GIF")), "rgbw")
    red = palette.getpixel((2, 2))
    assert_quadrants(convert(encode(palette, "PNG", transparency=red, bits=8)), "wgbw")
    assert_quadrants(convert(encode(palette, "GIF", transparency=red)), "wgbw")


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.repeat(np.array([[0, 40 * 257, 200 * 257, 65_535]], np.uint16), 16, axis=0).repeat(16, axis=1)
    for file_format in ("PNG", "TIFF"):
        image = convert(encode(Image.fromarray(levels), file_format))
        np.testing.assert_allclose(image[8, 8::16], [(0,) * 3, (40,) * 3, (200,) * 3, (255,) * 3], atol=3)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_refused_before_they_are_almost_black(file_format):
    levels = np.linspace(0, 4095, 32, dtype=np.uint16)[None].repeat(16, axis=0)
    said = "^unsupported_image: .*16-bit pixels from 0 to 4095 use hardly any of their range: stretch them to 0..65535$"
    with pytest.raises(UnusableSample, match=said):
        convert(encode(Image.fromarray(levels), file_format))
    assert not convert(encode(Image.fromarray(levels * 0), file_format)).any()
    assert convert(encode(Image.fromarray(levels * 2), file_format)).max() > 28


def test_pixels_of_unknown_range_are_refused():
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70_000, np.int32), np.full((8, 8), 255, np.int32)):
        assert reason_of("image", encode(Image.fromarray(values), "TIFF")) == "unsupported_image"


def test_cmyk_and_bilevel():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(convert(encode(cmyk, "JPEG", quality=95))[8, 8], RED, atol=4)
    np.testing.assert_allclose(convert(encode(cmyk, "TIFF"))[8, 8], RED, atol=4)
    np.testing.assert_allclose(convert(encode(Image.new("1", (16, 16), 1), "PNG"))[8, 8], WHITE, atol=2)
    np.testing.assert_allclose(convert(encode(quadrants("rgbw").quantize(4), "PNG", bits=2))[4, 4], RED, atol=4)


@pytest.mark.parametrize(("file_format", "feature"), [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_formats_that_not_every_pillow_reads(file_format, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow reads no {file_format}")
    image = quadrants("rgbw", 64, 96)
    data = encode(image, file_format)
    np.testing.assert_allclose(
        convert(data)[[8, 8, 56, 56], [8, 88, 8, 88]], [COLOURS[name] for name in "rgbw"], atol=6
    )
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    np.testing.assert_allclose(convert(encode(clear, file_format)), 255, atol=2)
    assert reason_of("image", data[: len(data) // 2]) == "broken_image"


def test_an_avif_whose_pixels_are_damaged():
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = bytearray(encode(noise(), "AVIF"))
    data[data.index(b"mdat") + 4 :] = bytes(len(data) - data.index(b"mdat") - 4)
    assert reason_of("image", bytes(data)) == "broken_image"
    with pytest.raises(MediaError, match="not a readable image"):
        decode_image(bytes(data))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(file_format):
    frames = [quadrants("rgbw"), quadrants("wbgr"), quadrants("bbbb")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert_quadrants(convert(data), "rgbw")


def test_first_image_of_an_mpo():
    data = encode(quadrants("rgbw"), "MPO", save_all=True, append_images=[quadrants("bbbb")], quality=95, subsampling=0)
    assert_quadrants(convert(data), "rgbw", tolerance=8)


@pytest.mark.parametrize("quality", [95, 60])
def test_conversion_is_without_chroma_subsampling(quality):
    gif = encode(quadrants("rgbw"), "GIF", comment=b"not for the shard")
    stored = convert_media("image", "a.gif", gif, ConversionOptions(jpeg_quality=quality))
    image = Image.open(io.BytesIO(stored.data))
    assert [(component[1], component[2]) for component in image.layer] == [(1, 1)] * 3
    assert image.quantization == Image.open(io.BytesIO(encode(image, "JPEG", quality=quality))).quantization
    assert b"not for the shard" not in stored.data


# max_pixels


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("max_pixels", [20_000, 60_000])  # a JPEG is decoded at a half of its size for the first
def test_images_above_max_pixels_are_made_smaller(file_format, max_pixels):
    data = encode(quadrants("rgbw", 300, 400), file_format, **({"quality": 95} if file_format == "JPEG" else {}))
    stored = convert_media("image", "a", data, ConversionOptions(max_pixels=max_pixels))
    image = pixels(stored.data)
    assert (stored.treatment, stored.part) == ("images_downsized", "jpg")
    assert (stored.height, stored.width) == image.shape[:2]
    assert 0.98 * max_pixels < stored.height * stored.width <= max_pixels
    assert stored.width / stored.height == pytest.approx(400 / 300, rel=0.01)
    assert_quadrants(image, "rgbw")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(10, 1990), (1990, 10)])
def test_a_long_image_made_smaller_keeps_an_aspect_ratio_that_training_takes(file_format, height, width):
    options = ConversionOptions(max_pixels=9000)
    stored = convert_media("image", "name", encode(Image.new("RGB", (width, height)), file_format), options)
    assert stored.treatment == "images_downsized"
    sides = pixels(stored.data).shape[:2]
    assert max(sides) == 200 * min(sides) == 1200
    assert (sides[0] > sides[1]) == (height > width)


def test_images_within_max_pixels_stay_as_they_are():
    assert_copied(encode(noise(40, 50), "JPEG"), "jpg", ConversionOptions(max_pixels=2000))
    assert_copied(encode(noise(40, 50), "PNG"), "png", ConversionOptions(max_pixels=2000))


def test_a_turned_image_is_made_smaller_as_displayed():
    data = encode(quadrants("rgbw", 300, 400), "JPEG", exif=rotated_exif(6), quality=95)
    stored = convert_media("image", "a", data, ConversionOptions(max_pixels=30_000))
    assert (stored.height, stored.width) == (200, 150)
    assert_quadrants(pixels(stored.data), "brwg")


def test_what_cannot_be_made_smaller():
    options = ConversionOptions(max_pixels=100)
    cut = encode(noise(64, 64), "JPEG")[:-500]
    assert reason_of("image", cut, options=options) == "broken_image"
    tiff = encode(Image.fromarray(np.full((64, 64), 0.5, np.float32)), "TIFF")
    assert reason_of("image", tiff, options=options) == "unsupported_image"


# Images that are refused


@pytest.mark.parametrize("cut", [2, 40, 1000])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_found(cut, progressive):
    data = encode(noise(64, 64), "JPEG", progressive=progressive)
    with pytest.raises(UnusableSample, match=r"a/x\.jpg.*truncated") as caught:
        convert_media("image", "a/x.jpg", data[:-cut])
    assert caught.value.reason == "broken_image"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (30_000, 30_000, "image_too_large"),
        (10_000, 10_000, "image_too_large"),
        (1, 70_000, "image_too_large"),
        (200, 50_000, "extreme_aspect_ratio"),
        (2001, 10, "extreme_aspect_ratio"),
    ],
)
def test_images_beyond_the_limits_are_refused_unread(height, width, reason):
    assert reason_of("image", png_header(height, width)) == reason


@pytest.mark.parametrize(
    "data", [encode(noise(), "ICO"), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\0\x18ftypheic", b"8BPS\0\1", b"<svg></svg>"]
)
def test_formats_that_are_not_read_have_a_reason_of_their_own(data):
    assert reason_of("image", data) == "unsupported_image"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", bytes(range(200))])
def test_what_is_no_image(data):
    assert reason_of("image", data) == "broken_image"


# Videos


@pytest.mark.parametrize(
    ("container", "codec", "part"),
    [
        ("mp4", "libx264", "mp4"),
        ("mov", "libx264", "mov"),
        ("matroska", "libx264", "mkv"),
        ("webm", "libvpx-vp9", "webm"),
        ("avi", "mpeg4", "avi"),
    ],
)
def test_videos_that_training_reads_keep_their_bytes(container, codec, part):
    data = video_file(container, codec)
    stored = convert_media("video", "name", data)
    assert (stored.part, stored.treatment, stored.data == data) == (part, "videos_copied", True)
    assert (stored.height, stored.width, stored.frames) == (96, 64, 12)
    assert stored.seconds == pytest.approx(1.5, abs=0.01)


def test_the_index_of_an_mp4_may_come_first(tmp_path):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        video = target.add_stream("mpeg4", rate=8, width=64, height=96)
        video.pix_fmt = "yuv420p"
        for _ in range(4):
            target.mux(video.encode(av.VideoFrame(64, 96, "yuv420p")))
        target.mux(video.encode())
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert convert_media("video", "name", data).data == data
    assert reason_of("video", data[:-100]) == "broken_video"


@pytest.mark.parametrize(
    ("container", "codec", "part"),
    [
        ("mpegts", "libx264", "mp4"),
        ("mpegts", "mpeg2video", "mp4"),
        ("flv", "libx264", "mp4"),
        ("mpeg", "mpeg2video", "mp4"),
        ("ogg", "libvpx", "mkv"),
        ("flv", "flv1", "avi"),
        ("asf", "wmv2", "avi"),
    ],
)
def test_other_containers_give_their_packets_to_one_that_training_reads(container, codec, part):
    data = video_file(container, codec)
    stored = convert_media("video", "name", data)
    assert (stored.part, stored.treatment) == (part, "videos_remuxed")
    assert (stored.height, stored.width, stored.frames) == (96, 64, 12)
    assert stored.seconds == pytest.approx(1.5, abs=0.1)
    np.testing.assert_array_equal(decode_video(stored.data, ALL_FRAMES), decode_video(data, ALL_FRAMES))
    assert convert_media("video", "name", data).data == stored.data


@pytest.mark.parametrize(("container", "codec"), [("flv", "flv1"), ("asf", "wmv1"), ("asf", "wmv2")])
def test_a_video_in_an_avi_keeps_its_rate(container, codec):
    data = video_file(container, codec, frames=80)
    stored = convert_media("video", "name", data)
    assert (stored.part, stored.frames, stored.seconds) == ("avi", 80, pytest.approx(10.0))
    with av.open(io.BytesIO(stored.data)) as video:
        assert video.streams.video[0].average_rate == 8
    assert len(decode_video(stored.data, VideoSampling())) == len(decode_video(data, VideoSampling())) == 20


def test_a_video_of_uneven_rate_is_not_put_into_an_avi():
    data, stretched_video = video_file("flv", "flv1", frames=80), io.BytesIO()
    stamps = [125 * (number + 3 * min(30, max(0, number - 40))) for number in range(80)]
    with av.open(io.BytesIO(data)) as source, av.open(stretched_video, "w", format="flv") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet, pts in zip(source.demux(video=0), stamps, strict=False):
            packet.pts = packet.dts = pts
            packet.stream = copy
            target.mux(packet)
    assert reason_of("video", stretched_video.getvalue()) == "unsupported_video"


def test_a_video_that_begins_between_key_frames():
    data = video_file("mpegts", "mpeg2video", frames=40, g=16, bf=0)
    stored = convert_media("video", "name", data[len(data) // 2 // 188 * 188 :])
    assert stored.treatment == "videos_remuxed"
    assert len(decode_video(stored.data, ALL_FRAMES)) == stored.frames // 2 * 2 > 0


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), (64, 96)),
        ((0, -1, 1, 0), (64, 96)),
        ((-1, 0, 0, -1), (96, 64)),
        ((0.9, 0.4, -0.4, 0.9), (96, 64)),
    ],
)
def test_size_of_a_turned_video_is_as_displayed(matrix, shown):
    data = video_file()
    at = data.index(b"tkhd") + 4 + 40  # behind version and flags: 40 bytes, then the matrix (ISO 14496-12, 8.3.2)
    a, b, c, d = (round(value * 65_536) for value in matrix)
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    stored = convert_media("video", "name", data[:at] + packed + data[at + 36 :])
    assert (stored.height, stored.width) == shown
    assert decode_video(stored.data, ALL_FRAMES).shape[1:3] == shown


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_cut_video_is_found(container):
    data = video_file(container, "mpeg4", frames=40)
    for stop in (0, 20, len(data) // 2, len(data) - 300):
        assert reason_of("video", data[:stop]) == "broken_video"


def test_damage_in_the_middle_is_found_by_decoding_everything():
    data = bytearray(video_file("mp4", "mpeg4", frames=300, g=300, bf=0))
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][200]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    damaged = bytes(data)
    assert convert_media("video", "a", damaged).frames == 300
    with pytest.raises(UnusableSample):
        convert_media("video", "a", damaged, ConversionOptions(check_images=True))


def test_what_is_no_video():
    for data in (b"", b"no video", audio_file("mp4", "aac"), audio_file("matroska", "aac"), video_file(frames=0)):
        assert reason_of("video", data) == "broken_video"
    for file_format in ("GIF", "PNG", "JPEG"):
        assert reason_of("video", encode(quadrants("rgbw"), file_format)) == "unsupported_video"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    for data in (playlist, b"ffconcat version 1.0\nfile x.mp4\n"):
        assert reason_of("video", data) == "broken_video"


# Videos given as images


def frames_of(sizes: list[tuple[int, int]], file_format: str = "JPEG") -> list[bytes]:
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    return [
        encode(Image.new("RGB", (width, height), (40 * number, 100, 200 - 40 * number)), file_format, **options)
        for number, (height, width) in enumerate(sizes)
    ]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_images_become_one_video(file_format):
    files = frames_of([(32, 48)] * 4, file_format)
    media = [("frame", f"video/{number}.jpg") for number in range(4)]
    (stored,) = convert_all(media, files)
    assert (stored.part, stored.treatment) == ("mp4", "videos_of_frames")
    assert (stored.height, stored.width, stored.frames, stored.seconds) == (32, 48, 4, 2.0)
    if file_format == "JPEG":
        assert all(data in stored.data for data in files)
    shown = decode_video(stored.data, VideoSampling()).astype(int)  # at training's default rate: all of them
    expected = [[40 * number, 100, 200 - 40 * number] for number in range(4)]
    np.testing.assert_allclose(shown[:, 16, 24], expected, atol=4)
    assert convert_all(media, files)[0].data == stored.data


def test_frames_stand_where_their_placeholder_does():
    image, video = encode(noise(), "JPEG"), video_file()
    media = [("image", "a.jpg"), ("frame", "0.jpg"), ("frame", "1.jpg"), ("image", "b.jpg"), ("video", "c.mp4")]
    stored = convert_all(media, [image, *frames_of([(32, 48)] * 2), image, video])
    treatments = ["images_copied", "videos_of_frames", "images_copied", "videos_copied"]
    assert [part.treatment for part in stored] == treatments
    assert convert_all([], []) == []


def test_frames_that_make_no_video():
    media = [("frame", "video/0.jpg"), ("frame", "video/1.jpg")]
    for files, reason, name in (
        (frames_of([(32, 48), (32, 64)]), "unsupported_video", "video/0.jpg"),
        ([*frames_of([(32, 48)]), b"no image"], "broken_image", "video/1.jpg"),
    ):
        with pytest.raises(UnusableSample, match=name) as caught:
            convert_all(media, files)
        assert caught.value.reason == reason


def test_frames_are_made_smaller_too():
    (stored,) = convert_all([("frame", "0.jpg")], frames_of([(100, 200)]), ConversionOptions(max_pixels=5000))
    assert (stored.height, stored.width) == (50, 100)
    assert isinstance(stored, StoredMedia) and probe_video(stored.data).frames == 1
