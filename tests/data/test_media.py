"""Media files of every awkward kind -> RGB arrays: colours, orientation, frames, one error for broken ones."""

import io
import struct
from contextlib import suppress
from types import SimpleNamespace

import av
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.media import as_array, media_shape
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, decode_video

COLOURS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "w": (255, 255, 255), "k": (0, 0, 0)}


def quadrants(names: str, height: int = 32, width: int = 48) -> Image.Image:
    """Four flat quadrants: top left, top right, bottom left, bottom right."""
    pixels = np.array([COLOURS[name] for name in names], np.uint8).reshape(2, 2, 3)
    return Image.fromarray(pixels.repeat(height // 2, axis=0).repeat(width // 2, axis=1))


def shown(pixels: np.ndarray, tolerance: int = 12) -> str:
    """The colours at the four quadrants' centres, by name; "?" where none is near."""
    height, width = pixels.shape[:2]
    places = [(y, x) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]

    def name(place: tuple[int, int]) -> str:
        value = pixels[place].astype(int)
        return next((n for n, colour in COLOURS.items() if np.abs(value - colour).max() <= tolerance), "?")

    return "".join(map(name, places))


# Images


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, "rgbw"), (2, "grwb"), (3, "wbgr"), (4, "bwrg"), (5, "rbgw"), (6, "brwg"), (7, "wgbr"), (8, "gwrb")],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(image_file, orientation, expected, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[file_format]
    pixels = decode_image(image_file(quadrants("rgbw"), file_format, exif=exif, **options))
    assert pixels.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert shown(pixels) == expected


def test_plain_image_is_unchanged(image_file, natural_frames):
    image = natural_frames(1, 40, 60)[0]
    decoded = decode_image(image_file(image, "PNG"))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


def test_transparency_lies_on_white(image_file):
    red = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.putpixel((1, 0), (255, 0, 0, 51))  # a fifth of red on white
    pixels = decode_image(image_file(red, "PNG"))
    assert pixels.shape == (6, 8, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [255, 204, 204]
    assert pixels[5, 7].tolist() == [255, 255, 255]
    grey = Image.new("LA", (8, 6), (0, 0))
    assert decode_image(image_file(grey, "PNG"))[3, 3].tolist() == [255, 255, 255]


def test_palette_with_and_without_a_transparent_colour(image_file):
    palette = quadrants("rgbw").quantize(4)
    assert shown(decode_image(image_file(palette, "PNG"))) == "rgbw"
    green = palette.getpixel((47, 0))
    assert shown(decode_image(image_file(palette, "PNG", transparency=green))) == "rwbw"
    assert shown(decode_image(image_file(palette, "GIF", transparency=green))) == "rwbw"


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(image_file, file_format):
    values = np.array([[0, 257, 128 * 257, 65_535]], np.uint16).repeat(4, axis=0)
    pixels = decode_image(image_file(Image.fromarray(values), file_format))
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_cmyk_grey_and_bilevel(image_file):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(decode_image(image_file(cyan, "TIFF"))[8, 8].astype(int) - (0, 255, 255)).max() <= 2
    assert np.abs(decode_image(image_file(cyan, "JPEG", quality=95))[8, 8].astype(int) - (0, 255, 255)).max() <= 6
    assert decode_image(image_file(Image.new("L", (5, 7), 90), "PNG")).tolist() == np.full((7, 5, 3), 90).tolist()
    assert decode_image(image_file(Image.new("1", (5, 7), 1), "PNG")).tolist() == np.full((7, 5, 3), 255).tolist()


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_shows_its_first_frame(image_file, file_format):
    frames = [quadrants(names) for names in ("rgbw", "wbgr", "kkkk")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = image_file(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert shown(decode_image(data)) == "rgbw"


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(500)])
def test_what_is_no_image_raises_media_error(data):
    with pytest.raises(MediaError, match=r"^not a readable image: ") as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_leaves_the_image_readable(image_file):
    data = image_file(quadrants("rgbw"), "JPEG", quality=95, subsampling=0)
    for block in (b"Exif\0\0", b"Exif\0\0garbage that is no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"):
        damaged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
        assert shown(decode_image(damaged)) == "rgbw"


# Images at the size that is wanted


def size_of(height: int, width: int):
    """A `Fit` that always gives this size."""
    return lambda *_: (height, width)


def plainly_resized(data: bytes, height: int, width: int) -> np.ndarray:
    """The whole file decoded, then PIL's bicubic: what the image processor would do."""
    return np.asarray(Image.fromarray(decode_image(data)).resize((width, height), Image.Resampling.BICUBIC))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_are_resized_as_the_image_processor_does(image_file, natural_frames, file_format):
    data = image_file(natural_frames(1, 90, 130)[0], file_format)
    for size in ((28, 56), (45, 65), (112, 140), (90, 130)):
        found = decode_image(data, size_of(*size))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, plainly_resized(data, *size))


@pytest.mark.parametrize("size", [(112, 140), (90, 130), (46, 65), (45, 65), (23, 32), (22, 33), (60, 10)])
def test_a_jpeg_of_less_than_four_times_the_size_is_decoded_whole(image_file, natural_frames, size):
    data = image_file(natural_frames(1, 90, 130)[0], "JPEG", quality=90)
    np.testing.assert_array_equal(decode_image(data, size_of(*size)), plainly_resized(data, *size))


@pytest.mark.parametrize(
    ("factor", "least"),
    # dB against decoding the whole file and bicubic, quality 92, less 1.5. Where libjpeg alone scales down, it is 33
    # to 48 (benchmarks/speed/jpeg_scaling.py). For comparison, Lanczos against bicubic: 40 to 57.
    [(4, 46.4), (5, 49.1), (7, 52), (8, 43.3), (10, 46.9), (16, 41.2)],
)
@pytest.mark.parametrize("subsampling", [0, 2], ids=["444", "420"])
@pytest.mark.parametrize("photograph", [skimage.data.astronaut, skimage.data.coffee])
def test_a_larger_jpeg_is_scaled_while_it_is_decoded(image_file, photograph, subsampling, factor, least):
    image = photograph()
    data = image_file(image, "JPEG", quality=92, subsampling=subsampling)
    height, width = (int(side / factor) for side in image.shape[:2])
    found, plain = decode_image(data, size_of(height, width)), plainly_resized(data, height, width)
    assert found.shape == (height, width, 3)
    assert least < psnr(found, plain) < 70, "at 70 dB nothing was scaled while decoding"
    assert np.abs(found.mean(axis=(0, 1)) - plain.mean(axis=(0, 1))).max() < 0.3


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 8])
def test_a_draft_stands_where_the_image_stands(image_file, factor):
    """A bright spot keeps its place to a fraction of a pixel, in sizes that no block divides."""
    y, x = np.mgrid[:603, :805]
    spot = 255 * np.exp(-((y - 371.3) ** 2 + (x - 214.7) ** 2) / (2 * 24**2))
    data = image_file(spot.round().astype(np.uint8), "JPEG", quality=95)
    height, width = 603 // factor, 805 // factor
    found = decode_image(data, size_of(height, width))[..., 0].astype(float)
    places = ((np.arange(height) + 0.5) * 603 / height - 0.5, (np.arange(width) + 0.5) * 805 / width - 0.5)
    found[found < 20] = 0
    assert abs((found.sum(axis=1) @ places[0]) / found.sum() - 371.3) < 0.1 * factor
    assert abs((found.sum(axis=0) @ places[1]) / found.sum() - 214.7) < 0.1 * factor


def test_a_draft_is_never_smaller_than_twice_what_is_wanted(image_file, natural_frames, monkeypatch):
    data = image_file(natural_frames(1, 250, 333)[0], "JPEG")
    drafts = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *rest, **named: drafts.append(self.size) or resize(self, *rest, **named)
    )
    sizes = [(126, 167), (63, 84), (62, 84), (62, 83), (42, 42), (31, 41), (15, 20), (15, 21), (14, 14), (7, 150)]
    for height, width in sizes:
        decode_image(data, size_of(height, width))
    whole, half, quarter, eighth = (333, 250), (167, 125), (84, 63), (42, 32)
    expected = [whole, whole, whole, half, half, quarter, eighth, quarter, eighth, whole]
    assert drafts == expected
    scaled = [(draft, size) for draft, size in zip(drafts, sizes) if draft != whole]
    assert all(w >= 2 * width and h >= 2 * height for (w, h), (height, width) in scaled)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_size_is_asked_for_as_displayed(image_file, orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    data = image_file(quadrants("rgbw", 160, 240), file_format, exif=exif, **options)
    asked = []
    found = decode_image(data, lambda *size: asked.append(size) or (60, 44))
    assert asked == [((240, 160, 1) if orientation >= 5 else (160, 240, 1))]
    assert found.shape == (60, 44, 3)
    assert shown(found) == shown(decode_image(data)) != "????"


@pytest.mark.parametrize(("mode", "file_format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_modes_of_images_that_are_resized(image_file, mode, file_format):
    image = quadrants("rgbw", 160, 240).convert(mode)
    data = image_file(image, file_format, **({"quality": 95} if file_format == "JPEG" else {}))
    found, own = decode_image(data, size_of(56, 84)), decode_image(data)
    for y, x in ((10, 10), (10, 70), (45, 10), (45, 70)):
        assert np.abs(found[y, x].astype(int) - own[y * 160 // 56, x * 240 // 84]).max() <= 3


def test_16_bit_grey_is_resized_after_scaling(image_file):
    values = np.full((60, 80), 128 * 257, np.uint16)
    assert (decode_image(image_file(Image.fromarray(values), "PNG"), size_of(28, 28)) == 128).all()


def test_what_fit_raises_is_not_taken_for_a_broken_image(image_file):
    def fit(*_):
        raise ValueError("too thin")

    with pytest.raises(ValueError, match=r"^too thin$"):
        decode_image(image_file(quadrants("rgbw"), "PNG"), fit)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_images_decode_or_raise_media_error(image_file, file_format, data):
    """Whatever stands in a shard, nothing but MediaError comes out: any other error would go uncounted."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if file_format in ("GIF", "BMP") else {"exif": exif}
    file = bytearray(image_file(quadrants("rgbw"), file_format, **options))
    for _ in range(data.draw(st.integers(0, 4))):
        file[data.draw(st.integers(0, min(len(file), 400) - 1))] = data.draw(st.integers(0, 255))
    file = bytes(file[: data.draw(st.integers(0, len(file)))])
    fit = data.draw(st.sampled_from([None, size_of(14, 10)]))
    with suppress(MediaError):
        media_shape("image", file, VideoSampling())
    try:
        pixels = decode_image(file, fit)
    except MediaError:
        return
    assert fit is None or pixels.shape[:2] == (14, 10)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


# Videos


@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [
        (1, 30, [0]),
        (2, 30, [0, 1]),
        (3, 30, [0, 2]),
        (4, 30, [0, 1, 2, 3]),
        (30, 30, [0, 10, 19, 29]),  # one second: two frames at 2 fps, four are the least
        (90, 30, [0, 18, 36, 53, 71, 89]),
        (100, 25, [0, 14, 28, 42, 57, 71, 85, 99]),
        (5, 0, [0, 1, 3, 4]),  # a file that does not say its rate: every frame, an even number
    ],
)
def test_which_frames_are_read(total, rate, expected):
    indices = VideoSampling().indices(total, rate)
    assert indices.dtype == np.int64
    assert indices.tolist() == expected


def test_sampling_bounds():
    assert VideoSampling(fps=2, min_frames=4, max_frames=6).indices(1000, 10).tolist() == [0, 200, 400, 599, 799, 999]
    assert VideoSampling(fps=1, min_frames=2).indices(50, 10).tolist() == [0, 16, 33, 49]
    assert len(VideoSampling(fps=1000).indices(10_000, 10)) == 768


@given(
    total=st.integers(1, 5000),
    rate=st.floats(0, 240, allow_nan=False),
    fps=st.floats(0.1, 60),
    low=st.integers(1, 16),
    more=st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_frames_are_spread_over_the_whole_video(total, rate, fps, low, more):
    sampling = VideoSampling(fps, low, low + more)
    indices = sampling.indices(total, rate)
    assert len(indices) == 1 or len(indices) % 2 == 0
    assert 1 <= len(indices) <= min(total, low + more)
    assert indices[0] == 0 and (np.diff(indices) > 0).all()
    assert len(indices) == 1 or indices[-1] == total - 1


def flat_video(colours: str, height: int = 48, width: int = 64) -> np.ndarray:
    """One flat colour a frame, uint8 [T, H, W, 3]."""
    return np.stack([np.full((height, width, 3), COLOURS[name], np.uint8) for name in colours])


def test_colours_and_order_of_a_video(video_file):
    frames = decode_video(video_file(flat_video("rgbwk" * 2), rate=2), VideoSampling())
    assert frames.shape == (10, 48, 64, 3) and frames.dtype == np.uint8
    assert [shown(frame)[0] for frame in frames] == list("rgbwkrgbwk")


def test_orientation_of_a_video(video_file):
    frame = np.asarray(quadrants("rgbw", 64, 96))
    frames = decode_video(video_file(np.stack([frame] * 4)), VideoSampling())
    assert frames.shape == (4, 64, 96, 3)
    assert [shown(frame) for frame in frames] == ["rgbw"] * 4


def test_only_the_wanted_frames_come_back(video_file):
    colours = "rgbwkrgbwkrgbwkrgbwk"
    data = video_file(flat_video(colours), rate=10)  # two seconds
    for sampling in (VideoSampling(), VideoSampling(fps=5), VideoSampling(max_frames=4)):
        frames = decode_video(data, sampling)
        wanted = sampling.indices(20, 10)
        assert "".join(shown(frame)[0] for frame in frames) == "".join(colours[i] for i in wanted)
    assert len(decode_video(data, VideoSampling(fps=5))) == 10


def test_what_is_no_video_raises_media_error(video_file, image_file):
    video = video_file(flat_video("rgbw"))
    for data in (b"", b"no video", video[:100], video[: len(video) // 2], bytes(1000)):
        with pytest.raises(MediaError, match=r"^not a readable video: ") as caught:
            decode_video(data, VideoSampling())
        assert "\n" not in str(caught.value)


def test_a_sound_file_is_no_video():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    with pytest.raises(MediaError, match="not a readable video: it has no video"):
        decode_video(stream.getvalue(), VideoSampling())


# Parts of a shard


def test_parts_as_bytes_or_as_energon_decodes_them(image_file, video_file, natural_frames):
    sampling = VideoSampling()
    image = natural_frames(1, 20, 30)[0]
    decoded = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    np.testing.assert_array_equal(as_array("image", image_file(image, "PNG"), sampling), image)
    np.testing.assert_array_equal(as_array("image", decoded, sampling), image)
    np.testing.assert_array_equal(as_array("image", decoded[:1], sampling), image[..., :1].repeat(3, axis=-1))
    video = video_file(flat_video("rgbw"))
    frames = decode_video(video, sampling)
    np.testing.assert_array_equal(as_array("video", video, sampling), frames)
    parts = SimpleNamespace(frames=torch.from_numpy(frames).permute(0, 3, 1, 2), info={"video_fps": 4.0})
    np.testing.assert_array_equal(as_array("video", parts, sampling), frames)


def test_parts_at_the_size_that_is_wanted(image_file, video_file, natural_frames):
    """Parts that Energon has decoded are resized as files are; a video's planes come from its file only."""
    sampling, fit = VideoSampling(), size_of(28, 56)
    image = natural_frames(1, 120, 230)[0]
    found = as_array("image", torch.from_numpy(image).permute(2, 0, 1).float() / 255, sampling, fit)
    np.testing.assert_array_equal(found, as_array("image", image_file(image, "PNG"), sampling, fit))
    frames = natural_frames(4, 120, 230)
    parts = SimpleNamespace(frames=torch.from_numpy(frames).permute(0, 3, 1, 2), info={"video_fps": 2.0})
    found = as_array("video", parts, sampling, fit, planes=True)
    expected = [plainly_resized(image_file(frame, "PNG"), 28, 56) for frame in frames]
    np.testing.assert_array_equal(found, np.stack(expected))
    planes = as_array("video", video_file(frames), sampling, fit, planes=True)
    assert planes.luma.shape == (4, 28, 56) and as_array("video", video_file(frames), sampling, fit).shape[1:3] == (
        28,
        56,
    )
    asked = []
    as_array("video", parts, sampling, lambda *size: asked.append(size) or (28, 28))
    assert asked == [(120, 230, 4)]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("content", [None, "text", 3, [], {}, torch.zeros(3)])
def test_parts_of_another_type_raise_media_error(kind, content):
    with pytest.raises(MediaError, match=f"cannot read a {kind} part of type"):
        as_array(kind, content, VideoSampling())
    with pytest.raises(MediaError, match=f"cannot read a {kind} part of type"):
        media_shape(kind, content, VideoSampling())
