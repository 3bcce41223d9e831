"""Videos -> frames and planes: which frames, which colours, which way up, in which files. PyAV writes the videos
here."""

import io
from contextlib import contextmanager, suppress
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import vision_process
from scipy.ndimage import maximum_filter, minimum_filter

from dct_qwen2vl.data import videos
from dct_qwen2vl.data.media import media_shape
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling, YUVFrames, decode_video, frame_indices

# Of ITU-R BT.601-7, BT.709-6 and BT.2020-2: the luma weights of red and blue.
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
# Codes of ITU-T H.273, as PyAV takes them.
MATRIX_CODE = {"bt601": 6, "bt709": 1, "bt2020": 9}
RANGE_CODE = {"limited": 1, "full": 2}
COLOURS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (255, 255, 255), (0, 0, 0)]
)
EVERY_FRAME = VideoSampling(fps=1000, min_frames=1)


def to_ycbcr(rgb: np.ndarray, matrix: str, full_range: bool) -> np.ndarray:
    """RGB 0..255 [..., 3] -> Y, Cb, Cr codes of 8 bits, not rounded, by the formulas of the standards."""
    red, blue = WEIGHTS[matrix]
    r, g, b = np.moveaxis(np.asarray(rgb, np.float64) / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
    if full_range:
        return np.stack([255 * y, 255 * cb + 128, 255 * cr + 128], axis=-1)
    return np.stack([219 * y + 16, 224 * cb + 128, 224 * cr + 128], axis=-1)


def to_rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray, matrix: str, full_range: bool) -> np.ndarray:
    """Inverse of `to_ycbcr`, not clipped."""
    red, blue = WEIGHTS[matrix]
    luma_range, chroma_range, black = (255, 255, 0) if full_range else (219, 224, 16)
    y, cb, cr = (y - black) / luma_range, (cb - 128.0) / chroma_range, (cr - 128.0) / chroma_range
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return 255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1)


def video(
    frames: list[list[np.ndarray]] | np.ndarray,
    codec: str = "ffv1",
    container: str = "matroska",
    pixel_format: str = "yuv420p",
    colorspace: int | None = None,
    color_range: int | None = None,
    rate: int = 4,
    ticks: list[int] | None = None,
    rotation: tuple[int, bool, bool] | None = None,
    **options: str,
) -> bytes:
    """A video file. frames: for each its planes as they are stored, or uint8 RGB [T, H, W, 3]. ticks: time stamps in
    1/1000 s. rotation: degrees counterclockwise, then mirrored left-right, top-bottom. ffv1 and libx264 with qp=0 are
    lossless."""
    rgb = isinstance(frames, np.ndarray)
    first = frames[0] if rgb else frames[0][0]
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        video = file.add_stream(codec, rate=rate, width=first.shape[1], height=first.shape[0], options=options)
        video.pix_fmt = pixel_format
        video.codec_context.time_base = Fraction(1, 1000) if ticks else Fraction(1, rate)
        if rotation:
            video.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        tags = {"colorspace": colorspace, "color_range": color_range}
        for number, planes in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(planes) if rgb else stored_frame(planes, pixel_format)
            frame.pts, frame.time_base = ticks[number] if ticks else number, video.codec_context.time_base
            for name, value in tags.items():
                if value is not None:
                    setattr(frame, name, value)
                    setattr(video.codec_context, name, value)
            file.mux(video.encode(frame))
        file.mux(video.encode())
    return stream.getvalue()


def stored_frame(planes: list[np.ndarray], pixel_format: str) -> av.VideoFrame:
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pixel_format)
    for target, plane in zip(frame.planes, planes, strict=True):
        rows = np.zeros((target.height, target.line_size), np.uint8)
        content = np.ascontiguousarray(plane).view(np.uint8).reshape(target.height, -1)
        rows[:, : content.shape[1]] = content
        target.update(rows.tobytes())
    return frame


def flat(values: tuple, shapes: list[tuple[int, int]], dtype=np.uint8) -> list[np.ndarray]:
    return [np.full(shape, value, dtype) for value, shape in zip(values, shapes, strict=True)]


def flat_video(matrix: str, full_range: bool, pixel_format: str = "yuv420p", **tags) -> bytes:
    """One of COLOURS a frame, 32 x 48."""
    half = {"yuv420p": (16, 24), "yuvj420p": (16, 24), "yuv422p": (32, 24), "yuv444p": (32, 48)}
    bits = 10 if pixel_format.endswith("10le") else 8
    chroma = half[pixel_format.removesuffix("10le")]
    codes = (to_ycbcr(COLOURS, matrix, full_range) * 2 ** (bits - 8)).round().clip(0, 2**bits - 1)
    dtype = np.uint16 if bits == 10 else np.uint8
    return video([flat(code, [(32, 48), chroma, chroma], dtype) for code in codes], pixel_format=pixel_format, **tags)


def as_rgb(planes: YUVFrames) -> np.ndarray:
    """Planes -> float RGB [T, H, W, 3]: chroma interpolated linearly from the centres of 2x2 pixels."""
    cb, cr = (upsampled(upsampled(plane.astype(np.float64), 1), 2) for plane in (planes.cb, planes.cr))
    return to_rgb(planes.luma.astype(np.float64), cb, cr, planes.matrix, planes.full_range)


def upsampled(plane: np.ndarray, axis: int) -> np.ndarray:
    """Twice as many samples: at a quarter and three quarters between neighbours, edges repeated."""
    before, after = (
        np.take(plane, np.clip(np.arange(plane.shape[axis]) + step, 0, plane.shape[axis] - 1), axis) for step in (-1, 1)
    )
    pair = np.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis + 1)
    return pair.reshape(*plane.shape[:axis], -1, *plane.shape[axis + 1 :])


def assert_well_formed(planes: YUVFrames, frames: int, height: int, width: int) -> None:
    assert planes.luma.shape == (frames, height, width)
    assert planes.cb.shape == planes.cr.shape == (frames, height // 2, width // 2)
    for plane in (planes.luma, planes.cb, planes.cr):
        assert plane.dtype == np.uint8 and plane.flags.c_contiguous


# Colours

SIZES = [None, lambda height, width, frames: (16, 20)]


def assert_colours(data: bytes, expected: np.ndarray, matrix: str, full_range: bool, tolerance: float = 2) -> None:
    """Both ways show flat frames in the expected colours, at their own size and resized."""
    for fit in SIZES:
        rgb = decode_video(data, EVERY_FRAME, fit)
        planes = decode_video(data, EVERY_FRAME, fit, planes=True)
        assert (planes.matrix, planes.full_range) == (matrix, full_range)
        assert_well_formed(planes, *rgb.shape[:3])
        for shown in (rgb, as_rgb(planes).clip(0, 255)):
            assert np.abs(shown - expected[:, None, None]).max() <= tolerance


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
def test_saturated_colours_by_matrix_range_and_format(matrix, full_range, pixel_format):
    tags = {"colorspace": MATRIX_CODE[matrix], "color_range": 2 if full_range else 1}
    data = flat_video(matrix, full_range, pixel_format, **tags)
    # Ten bits become eight by ordered dithering, which adds up to a level.
    assert_colours(data, COLOURS, matrix, full_range, tolerance=3 if pixel_format.endswith("10le") else 2)


@pytest.mark.parametrize(
    "tags", [{}, {"colorspace": 2}, {"colorspace": 5, "color_range": 1}], ids=["none", "unknown", "PAL"]
)
def test_untagged_streams_are_bt601_of_limited_range(tags):
    assert_colours(flat_video("bt601", False, **tags), COLOURS, "bt601", False)


def test_a_wrong_matrix_would_be_seen():
    """What the tolerance above is worth: read by the other matrix, colours are off by over 20 levels."""
    data = flat_video("bt709", False, colorspace=MATRIX_CODE["bt601"], color_range=1)
    assert np.abs(decode_video(data, EVERY_FRAME) - COLOURS[:, None, None].astype(int)).max() > 20


def test_bt2020_becomes_bt709():
    data = flat_video("bt2020", False, "yuv420p10le", colorspace=MATRIX_CODE["bt2020"], color_range=1)
    assert_colours(data, COLOURS, "bt709", False, tolerance=4)  # two steps of 8 bits: RGB lies between the matrices


def test_matrices_that_are_no_matrix_are_refused():
    with pytest.raises(MediaError, match=r"^not a readable video: "):
        decode_video(flat_video("bt601", False, colorspace=14, color_range=1), EVERY_FRAME)  # ICtCp


def test_jpeg_range_of_motion_jpeg():
    frames = [
        flat(code, [(32, 48), (16, 24), (16, 24)]) for code in to_ycbcr(COLOURS, "bt601", True).round().clip(0, 255)
    ]
    data = video(frames, "mjpeg", "mp4", "yuvj420p", qmin="1", qmax="1", color_range=2)
    assert_colours(data, COLOURS, "bt601", True, tolerance=4)  # lossy


def test_range_of_formats_that_imply_it():
    """Decoders tag such frames as well, as a rule."""
    for pixel_format, expected in (("yuvj420p", 2), ("yuv420p", 1), ("gray", 2), ("rgb24", 2), ("pal8", 2)):
        assert videos._colours(av.VideoFrame(16, 16, pixel_format)) == (5, expected)


def test_rgb_streams_become_full_range_planes():
    rgb = np.tile(COLOURS.astype(np.uint8)[:, None, None], (1, 32, 48, 1))
    assert_colours(video(rgb, "libx264rgb", "mp4", "rgb24", qp="0"), COLOURS, "bt601", True)
    alpha = [[np.dstack([frame[..., ::-1], np.zeros((32, 48), np.uint8)])] for frame in rgb]
    assert_colours(video(alpha, pixel_format="bgra"), COLOURS, "bt601", True)  # alpha is dropped


@pytest.mark.parametrize(
    ("tags", "full_range", "expected"),
    [
        ({}, True, [0, 16, 128, 235]),  # as FFmpeg takes it
        ({"color_range": 2}, True, [0, 16, 128, 235]),
        ({"color_range": 1}, False, [0, 0, 130, 255]),  # (128 - 16) * 255 / 219
    ],
    ids=["untagged", "full", "limited"],
)
def test_grey_streams(tags, full_range, expected):
    data = video([flat((value,), [(32, 48)]) for value in (0, 16, 128, 235)], pixel_format="gray", **tags)
    assert_colours(data, np.array(expected)[:, None].repeat(3, axis=1), "bt601", full_range, tolerance=1)
    planes = decode_video(data, EVERY_FRAME, planes=True)
    assert (planes.cb == 128).all() and (planes.cr == 128).all()


# Planes against rgb24

SMOOTH, EDGES = "smooth", "edges"


def image(content: str, height: int, width: int, frames: int = 4) -> np.ndarray:
    """RGB [T, H, W, 3], moving left by 2 px a frame; values within 60..200, so that nothing is clipped on the way."""
    t, y, x = np.mgrid[:frames, :height, :width]
    x = x + 2 * t
    if content == SMOOTH:
        return 130 + 60 * np.stack([np.sin(x / 51 + y / 69 + phase) for phase in range(3)], axis=-1)
    # Slanted bars of saturated colours, 3 px wide at the top, 9 at the bottom.
    bars = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200)])
    return bars[(x + y // 5) // (3 + y // (height // 3) * 3) % 5]


def stored_planes(rgb: np.ndarray, matrix: str, full_range: bool) -> list[list[np.ndarray]]:
    """RGB [T, H, W, 3] -> 4:2:0 planes of each frame, odd sides allowed; chroma is the mean of 2x2 pixels."""
    codes = to_ycbcr(rgb, matrix, full_range)
    height, width = codes.shape[1:3]
    even = np.pad(codes, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    chroma = even.reshape(len(codes), -(-height // 2), 2, -(-width // 2), 2, 3).mean(axis=(2, 4))
    planes = (codes[..., 0], chroma[..., 1], chroma[..., 2])
    return [[plane[t].round().astype(np.uint8) for plane in planes] for t in range(len(rgb))]


@pytest.mark.parametrize("size", [None, (64, 96), (40, 64)], ids=["own size", "two thirds", "smaller"])
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("content", [SMOOTH, EDGES])
def test_planes_and_rgb_show_the_same(content, matrix, full_range, size):
    """Luma: the RGB of a pixel holds it whatever chroma is, so only rounding is between the two ways: half a level of
    8-bit luma (0.58 of 255), half a level of RGB, and up to one of libswscale's arithmetic.

    RGB: to that comes the rounding of chroma, half a level times 1.856 * 255 / 224 for blue, and where chroma changes
    the way it is interpolated. The scaler and this test each stay within the chroma values of the neighbourhood that
    both look at, but for the scaler's overshoot at edges (bicubic, under a fifth of the step). So the bound is the
    range of chroma in the neighbourhood, and a fifth, times its weight; where chroma is flat it is rounding alone.
    """
    rgb = image(content, 96, 144)
    tags = {"colorspace": MATRIX_CODE[matrix], "color_range": 2 if full_range else 1}
    data = video(stored_planes(rgb, matrix, full_range), **tags)
    fit = (lambda *_: size) if size else None
    frames = decode_video(data, EVERY_FRAME, fit).astype(np.float64)
    planes = decode_video(data, EVERY_FRAME, fit, planes=True)
    luma = to_ycbcr(frames, matrix, True)[..., 0]
    own = planes.luma.astype(np.float64) if full_range else (planes.luma - 16.0) * 255 / 219
    assert np.abs(own - luma).max() <= 2.1
    error = np.abs(as_rgb(planes) - frames)
    rounding = 2.1 + 0.5 * 1.856 * 255 / 224
    assert (error <= rounding + interpolation_bound(planes)).all()
    if content == SMOOTH:
        assert inner(error).max() <= rounding  # at the border both extrapolate, each in its way
    else:
        assert error.max() > 10, "the edges test nothing"


def inner(frames: np.ndarray) -> np.ndarray:
    return frames[:, 2:-2, 2:-2]


def interpolation_bound(planes: YUVFrames) -> np.ndarray:
    """What differing interpolations of chroma can make of R, G and B at most, float [T, H, W, 1]."""
    step = 0
    for plane, weight in ((planes.cb, 1.856), (planes.cr, 1.575)):  # BT.709's weights, the larger ones
        plane = plane.astype(np.float64)
        size = (1, 5, 5)
        step = step + (maximum_filter(plane, size) - minimum_filter(plane, size)) * weight
    gain = 1.2 * (1 if planes.full_range else 255 / 224)
    return gain * step.repeat(2, axis=1).repeat(2, axis=2)[..., None]


@pytest.mark.parametrize("width", [256, 128, 64])
@pytest.mark.parametrize("location", [0, 1, 2], ids=["left", "centre", "top left"])
def test_chroma_lies_at_the_centres_wherever_the_stream_has_it(width, location):
    """A ramp of chroma in an H.264 stream that says where its samples lie. If the place were ignored, the ramp would be
    shifted by half a pixel of the result."""
    slope = 0.75  # levels for one pixel of the stream
    offset = 0.5 if location == 1 else 0
    ramp = 30 + slope * (2 * np.arange(128) + offset)
    codes = [np.full((64, 256), 128), *[np.tile(ramp.round(), (32, 1))] * 2]
    planes = [code.clip(0, 255).astype(np.uint8) for code in codes]
    params = f"chromaloc={location}"
    data = video([planes] * 4, "libx264", "mp4", qp="0", preset="ultrafast", **{"x264-params": params})
    found = decode_video(data, EVERY_FRAME, lambda *_: (64 * width // 256, width), planes=True)
    step = 256 / width
    places = (2 * np.arange(width // 2) + 1) * step - 0.5  # the centre of two pixels of the result, in the stream's
    inside = slice(4, -4)
    for plane in (found.cb, found.cr):
        difference = (plane[0] - (30 + slope * places))[:, inside]
        assert abs(difference.mean()) < 0.3 * slope * step  # a shift of 0.5 * slope * step is what is looked for


# Size and orientation


@pytest.mark.parametrize("shape", [(75, 101), (74, 101), (75, 100), (1, 1), (2, 3)])
def test_odd_sizes(shape):
    rgb = image(SMOOTH, *shape)
    data = video(stored_planes(rgb, "bt601", False))
    assert decode_video(data, EVERY_FRAME).shape == (4, *shape, 3)
    even = tuple(max(2, side // 2 * 2) for side in shape)
    for fit, size in ((None, even), (lambda *_: (28, 56), (28, 56))):
        planes = decode_video(data, EVERY_FRAME, fit, planes=True)
        assert_well_formed(planes, 4, *size)
        resized = decode_video(data, EVERY_FRAME, lambda *_, size=size: size)
        error = np.abs(as_rgb(planes) - resized)
        assert (inner(error) if min(size) > 4 else error).max() <= 3.2


QUADRANTS = {"r": (220, 40, 40), "g": (40, 200, 40), "b": (40, 40, 220), "w": (230, 230, 230)}


def quadrants(names: str, height: int, width: int) -> np.ndarray:
    colours = np.array([QUADRANTS[name] for name in names]).reshape(2, 2, 3)
    return colours.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def seen(frame: np.ndarray) -> str:
    """Names of the colours nearest to the quadrants' centres."""
    height, width = frame.shape[:2]
    places = [(y, x) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]
    return "".join(
        min(QUADRANTS, key=lambda n: np.abs(frame[place] - np.array(QUADRANTS[n])).max()) for place in places
    )


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ((0, False, False), "rgbw"),
        ((-90, False, False), "brwg"),  # clockwise: a telephone held upright
        ((180, False, False), "wbgr"),
        ((90, False, False), "gwrb"),
        ((0, True, False), "grwb"),
        ((0, False, True), "bwrg"),
        ((90, True, False), "wgbr"),
        ((90, False, True), "rbgw"),
        ((-85, False, False), "brwg"),  # the nearest right angle
    ],
)
def test_the_display_matrix_is_applied(rotation, expected):
    rgb = np.stack([quadrants("rgbw", 48, 80)] * 4)
    data = video(stored_planes(rgb, "bt601", False), "mpeg4", "mp4", rotation=rotation, b="4M")
    shape = (80, 48) if abs(rotation[0]) in (85, 90) else (48, 80)
    asked = []

    def fit(height: int, width: int, frames: int) -> tuple[int, int]:
        asked.append((height, width, frames))
        return 56, 84

    for planes in (False, True):
        own = decode_video(data, EVERY_FRAME, planes=planes)
        resized = decode_video(data, EVERY_FRAME, fit, planes=planes)
        if planes:
            assert_well_formed(own, 4, *shape)
            assert_well_formed(resized, 4, 56, 84)
            own, resized = as_rgb(own), as_rgb(resized)
        assert own.shape == (4, *shape, 3) and resized.shape == (4, 56, 84, 3)
        assert {seen(frame) for frame in (*own, *resized)} == {expected}
    assert asked == [(*shape, 4)] * 2


# Which frames


def grey_ramp(frames: int, size: tuple[int, int] = (16, 16)) -> list[list[np.ndarray]]:
    """Frame i has luma 16 + 2 i."""
    half = (size[0] // 2, size[1] // 2)
    return [flat((16 + 2 * i, 128, 128), [size, half, half]) for i in range(frames)]


def numbers(data: bytes, sampling: VideoSampling) -> list[int]:
    """Which frames of a `grey_ramp` were read."""
    luma = decode_video(data, sampling, planes=True).luma
    return ((luma[:, 8, 8].astype(int) - 16) / 2).round().astype(int).tolist()


def test_a_constant_rate_is_read_by_number():
    data = video(grey_ramp(30), rate=10)
    for sampling in (VideoSampling(), VideoSampling(fps=4), VideoSampling(fps=0.1), VideoSampling(max_frames=4)):
        assert numbers(data, sampling) == sampling.indices(30, 10).tolist()
    assert numbers(data, VideoSampling(fps=2)) == [0, 6, 12, 17, 23, 29]


def test_a_varying_rate_is_read_by_time():
    """Ten frames in the first second, then one that stays for two, then ten frames in the last second."""
    ticks = [*range(0, 1000, 100), *range(3000, 4000, 100)]
    data = video(grey_ramp(20), ticks=ticks)
    # 4 s at 1.5 a second: 0, 0.78, 1.56, 2.34, 3.12, 3.9 s
    assert numbers(data, VideoSampling(fps=1.5)) == [0, 7, 9, 9, 11, 19]
    assert numbers(data, VideoSampling(fps=1.5)) != VideoSampling(fps=1.5).indices(20, 5).tolist()


@pytest.mark.parametrize(
    ("seconds", "says", "fps", "expected"),
    [
        ([0.0], 30, 2, [0]),
        ([0.0, 9.0], 30, 2, [0, 1]),
        ([0.0, 0.033, 0.067, 0.1, 0.133, 0.167, 0.2, 0.233, 0.267, 0.3], 30, 12, [0, 3, 6, 9]),  # ms of Matroska
        ([5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 1, 2, [0, 1, 2, 3, 4, 5]),  # not from 0
        ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 1000, 1, [0, 2, 5, 7]),  # a header that lies: 4 s
        ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 0, 1, [0, 2, 5, 7]),  # or says nothing
        ([0.0, 0.1, 0.2, 0.3, 0.4, 10.0], 0.6, 2, [0, 4, 4, 5]),  # a slide that stays
    ],
)
def test_frames_by_their_times(seconds, says, fps, expected):
    indices = VideoSampling(fps=fps, max_frames=4 if len(seconds) == 6 and seconds[1] == 0.1 else 768).indices_at(
        np.array(seconds), says
    )
    assert indices.tolist() == expected


@given(
    st.lists(st.floats(0.001, 5), min_size=1, max_size=60),
    st.floats(0.2, 8),
    st.integers(1, 8),
    st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_times_of_any_kind(steps, fps, low, high):
    seconds = np.cumsum(steps)
    indices = VideoSampling(fps, low, high).indices_at(seconds, 1 / steps[0])
    assert indices.dtype == np.int64
    assert len(indices) == 1 or len(indices) % 2 == 0
    assert len(indices) <= len(seconds) and (np.diff(indices) >= 0).all()
    assert indices[0] == 0 and (len(indices) == 1 or indices[-1] == len(seconds) - 1)


@given(
    total=st.integers(2, 4000),
    rate=st.floats(0.5, 120),
    fps=st.floats(0.1, 30),
    low=st.integers(1, 20),
    high=st.integers(2, 800),
)
@settings(max_examples=300, deadline=None)
def test_the_number_of_frames_is_that_of_qwen_vl_utils(total, rate, fps, low, high):
    options = {"fps": fps, "min_frames": low, "max_frames": high}
    expected = vision_process.smart_nframes(options, total, rate)
    assert VideoSampling(fps, low, high).count(total, rate) == expected


def test_defaults_are_those_of_qwen_vl_utils():
    sampling = VideoSampling()
    assert (sampling.fps, sampling.min_frames, sampling.max_frames) == (
        vision_process.FPS,
        vision_process.FPS_MIN_FRAMES,
        vision_process.FPS_MAX_FRAMES,
    )


@given(
    frames=st.integers(1, 400).map(lambda n: 2 * n),
    low=st.integers(1, 16),
    high=st.integers(16, 768),
    total=st.integers(1, 30_000),
)
@settings(max_examples=60, deadline=None)
def test_the_pixel_budget_is_that_of_qwen_vl_utils(frames, low, high, total):
    """In multiples of 28 x 28 px; 768 of them are the most that `fetch_video` allows."""
    bounds = {"min_pixels": low * 784, "max_pixels": high * 784, "total_pixels": total * 784}
    found = []

    def smart_resize(height, width, factor, min_pixels, max_pixels):
        found.append((min_pixels, int(max_pixels)))
        return 28, 28

    with pytest.MonkeyPatch.context() as patch:
        video = torch.zeros(frames, 3, 28, 28, dtype=torch.uint8)
        patch.setattr(vision_process, "VIDEO_READER_BACKENDS", {"own": lambda element: (video, {}, 2.0)})
        patch.setattr(vision_process, "get_video_reader_backend", lambda: "own")
        patch.setattr(vision_process, "smart_resize", smart_resize)
        vision_process.fetch_video({"video": "file", **bounds})
    sampling = VideoSampling(total_pixels=total * 784)
    assert found == [(low * 784, sampling.max_frame_pixels(frames, low * 784, high * 784))]


def test_the_pixel_budget_by_hand():
    sampling = VideoSampling(total_pixels=100 * 784)
    assert sampling.max_frame_pixels(4, 784, 1000 * 784) == 50 * 784
    assert sampling.max_frame_pixels(4, 784, 30 * 784) == 30 * 784
    assert sampling.max_frame_pixels(1000, 10 * 784, 30 * 784) == int(10.5 * 784)


# What is decoded


KINDS = {
    "h264": ("libx264", "mp4", {"g": "12", "bf": "3"}),
    "h264, one group": ("libx264", "mp4", {"bf": "3"}),
    "h264, open groups": ("libx264", "mp4", {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3"}),
    "h264, no key frames": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=12"}),
    "h264, transport stream": ("libx264", "mpegts", {"g": "12", "bf": "3"}),
    "h264, avi": ("libx264", "avi", {"g": "12", "bf": "3"}),
    "hevc, open groups": ("libx265", "mp4", {"x265-params": "log-level=none:keyint=12:open-gop=1"}),
    "mpeg4": ("mpeg4", "mp4", {"g": "12", "bf": "2"}),
    "mpeg4, avi": ("mpeg4", "avi", {"g": "12", "bf": "2"}),
    "vp8": ("libvpx", "webm", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
    "vp9": ("libvpx-vp9", "webm", {"g": "12", "deadline": "realtime"}),
}


@pytest.fixture(scope="module")
def moving(natural_frames):
    """moving(kind): 40 different frames of 48 x 64 in a file of one of KINDS."""
    frames, done = natural_frames(40, 48, 64, seed=1), {}

    def make(kind: str) -> bytes:
        if kind not in done:
            codec, container, options = KINDS[kind]
            done[kind] = video(frames, codec, container, rate=10, **options)
        return done[kind]

    return make


def all_frames(data: bytes) -> np.ndarray:
    """Every frame, plainly decoded."""
    return np.stack([rgb for _, rgb in stamped_frames(data)])


def stamped_frames(data: bytes) -> list[tuple[int, np.ndarray]]:
    """The same, each after its time stamp."""
    with av.open(io.BytesIO(data)) as container:
        return [
            (frame.pts, frame.to_ndarray(format="rgb24", interpolation=videos.SCALER_FLAGS))
            for frame in container.decode(video=0)
        ]


SAMPLINGS = [
    VideoSampling(fps=2),
    VideoSampling(fps=1, min_frames=1),
    VideoSampling(fps=0.1, min_frames=2),
    VideoSampling(fps=5),
    VideoSampling(fps=100),
]


@pytest.fixture
def read_by_number(monkeypatch) -> list[int]:
    """Gets an entry whenever a video can not be read by time stamps, and all of it is decoded."""
    calls, read = [], videos._read_by_number
    monkeypatch.setattr(videos, "_read_by_number", lambda *arguments: calls.append(1) or read(*arguments))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_changes_no_frame(moving, kind, read_by_number):
    """Frames are bit for bit those of plain decoding, though not all packets are decoded."""
    data = moving(kind)
    expected = all_frames(data)
    assert len(expected) == 40
    for threads, sampling in enumerate(SAMPLINGS):
        indices = sampling.indices(40, 10)
        np.testing.assert_array_equal(decode_video(data, sampling, threads=threads), expected[indices])
    assert bool(read_by_number) == ("avi" in kind or "no key frames" in kind)


def cut(data: bytes, container: str, first: int) -> tuple[bytes, int]:
    """A file of the packets from number `first` on, copied, and the time stamp of the first key frame among them."""
    stream = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(stream, "w", format=container) as target:
        copied = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in [packet for packet in source.demux(video=0) if packet.size][first:]:
            packet.stream = copied
            target.mux(packet)
    with av.open(io.BytesIO(stream.getvalue())) as source:
        return stream.getvalue(), next(packet.pts for packet in source.demux(video=0) if packet.is_keyframe)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("kind", ["h264, open groups", "hevc, open groups"])
@pytest.mark.parametrize("start", [-3, 0], ids=["before a key frame", "at a key frame"])
def test_what_is_shown_before_the_first_key_frame_of_a_cut_video_is_not_counted(
    moving, kind, container, start, read_by_number
):
    """It is predicted from frames that were cut off."""
    with av.open(io.BytesIO(moving(kind))) as source:
        keys = [n for n, packet in enumerate(p for p in source.demux(video=0) if p.size) if packet.is_keyframe]
    data, first = cut(moving(kind), container, keys[1] + start)
    with av.open(io.BytesIO(data)) as source:
        stamps = sorted(packet.pts for packet in source.demux(video=0) if packet.size)
    shown = [rgb for stamp, rgb in stamped_frames(data) if stamp >= first]
    assert stamps[0] < first, "or nothing is shown before it"
    assert len(shown) == sum(stamp >= first for stamp in stamps) > 24
    found = decode_video(data, VideoSampling(fps=100))
    assert len(found) == len(shown) // 2 * 2 == len(frame_indices(data, VideoSampling(fps=100)))
    np.testing.assert_array_equal(found, np.stack(shown)[frame_indices(data, VideoSampling(fps=100))])
    assert len(decode_video(data, VideoSampling(fps=2))) == len(frame_indices(data, VideoSampling(fps=2)))
    assert not read_by_number


def packets(text: str) -> list[SimpleNamespace]:
    """Packets in decoding order: "K4" is a key frame shown at 4, "2" another frame shown at 2."""
    return [SimpleNamespace(pts=int(word.strip("K")), is_keyframe="K" in word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "wanted", "runs"),
    [
        ("K0 1 2 K3 4 5 K6 7 8", {0, 4, 6}, [(0, 1), (3, 5), (6, 7)]),
        ("K0 1 2 K3 4 5 K6 7 8", {2, 3}, [(0, 4)]),
        ("K0 1 2 K3 4 5 K6 7 8", {1, 2, 8}, [(0, 3), (6, 9)]),
        ("K0 3 1 2 K6 4 5 9 7 8", {0, 6}, [(0, 1), (4, 5)]),
        ("K0 3 1 2 K6 4 5 9 7 8", {0, 5}, [(0, 7)]),  # shown before its key frame: from the one before
        ("K0 3 1 2 K6 4 5 9 7 8", {8}, [(4, 10)]),
        ("K0 3 1 2 K6 4 5 9 7 8", {4, 6}, [(0, 6)]),
        ("1 2 K3 4", {2}, [(0, 2)]),  # no key frame before it
    ],
)
def test_packets_that_a_frame_needs(text, wanted, runs):
    assert videos._packet_runs(packets(text), wanted) == runs


@pytest.mark.parametrize("kind", ["h264", "h264, one group", "h264, open groups", "mpeg4", "vp9"])
def test_a_video_opened_without_a_decoded_frame_has_the_same_frames(moving, kind, monkeypatch, read_by_number):
    data, sampling = moving(kind), VideoSampling(fps=3)
    assert videos.has_own_stamps(data)
    quick = decode_video(data, sampling)
    monkeypatch.setattr(videos, "has_own_stamps", lambda data: False)
    np.testing.assert_array_equal(quick, decode_video(data, sampling))
    assert not read_by_number


@pytest.mark.parametrize(("stamps", "depth"), [([0, 1, 2], 0), ([0, 3, 1, 2], 1), ([0, 4, 2, 1, 3], 2), ([], 0)])
def test_the_depth_of_reordering_is_that_of_the_stamps(stamps, depth):
    assert videos._reorder_depth([SimpleNamespace(pts=stamp) for stamp in stamps]) == depth


@pytest.mark.parametrize(("container", "own"), [("mp4", True), ("matroska", True), ("mpegts", False), ("avi", False)])
def test_containers_with_stamps_are_known_by_their_first_bytes(container, own):
    assert videos.has_own_stamps(video(grey_ramp(4), "libx264", container)) is own


def test_few_packets_are_decoded_and_few_frames_converted(moving, monkeypatch):
    """Of 40 frames in groups of 12, a frame every second and the last one."""
    decoded, converted = [], []
    decode, convert = videos._decode_wanted, videos._Video._convert

    def counted(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(videos, "_decode_wanted", counted)
    monkeypatch.setattr(videos._Video, "_convert", lambda self, frame: converted.append(1) or convert(self, frame))
    assert len(decode_video(moving("h264"), VideoSampling(fps=1))) == 4
    assert len(converted) == 4
    assert len(decoded) <= 24, decoded


def test_edit_lists_hide_frames(read_by_number):
    """An mp4 video whose first four frames are there to be decoded only."""
    frames = grey_ramp(12)
    data = video(frames, "libx264", "mp4", ticks=[250 * i - 1000 for i in range(12)], qp="0", bf="2", sc_threshold="0")
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 12, "the file lacks what it is to test"
    assert numbers(data, EVERY_FRAME) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert numbers(data, VideoSampling(fps=1, min_frames=2)) == [4, 11]
    assert not read_by_number


@pytest.mark.parametrize(
    "change",
    [lambda i, pts: None, lambda i, pts: pts if i else None, lambda i, pts: 0, lambda i, pts: pts // 2048],
    ids=["all missing", "one missing", "all equal", "some equal"],
)
def test_stamps_that_are_missing_or_equal(moving, monkeypatch, change):
    """Frame numbers take their place."""
    plain = videos._packets

    def changed(container, stream):
        found = plain(container, stream)
        return [SimpleNamespace(pts=change(i, packet.pts), is_discard=False) for i, packet in enumerate(found)]

    monkeypatch.setattr(videos, "_packets", changed)
    expected = all_frames(moving("h264"))[VideoSampling().indices(40, 10)]
    np.testing.assert_array_equal(decode_video(moving("h264"), VideoSampling()), expected)


def test_stamps_in_the_wrong_order(moving, monkeypatch, read_by_number):
    """What FFmpeg guesses for AVI, in a container of which it is not known."""
    opened = videos._open

    @contextmanager
    def disguised(*arguments):
        with opened(*arguments) as (container, stream):
            demux = container.demux
            yield SimpleNamespace(format=SimpleNamespace(name="mov"), demux=demux, decode=container.decode), stream

    monkeypatch.setattr(videos, "_open", disguised)
    data = moving("h264, avi")
    expected = all_frames(data)[VideoSampling().indices(40, 10)]
    np.testing.assert_array_equal(decode_video(data, VideoSampling()), expected)
    assert read_by_number


def test_a_false_key_frame(moving, monkeypatch, read_by_number):
    """Decoding from it fails; the whole video is decoded instead."""
    expected = all_frames(moving("vp9"))[VideoSampling().indices(40, 10)]
    monkeypatch.setattr(videos, "_packet_runs", lambda packets, wanted: [(1, len(packets))])
    np.testing.assert_array_equal(decode_video(moving("vp9"), VideoSampling()), expected)
    assert read_by_number


def test_packets_that_show_nothing(moving, monkeypatch):
    """More packets than frames: the video is read again with the right number."""
    plain = videos._packets
    more = [SimpleNamespace(pts=None, is_discard=False)] * 3
    monkeypatch.setattr(videos, "_packets", lambda *arguments: [*plain(*arguments), *more])
    expected = all_frames(moving("mpeg4"))[VideoSampling().indices(40, 10)]
    np.testing.assert_array_equal(decode_video(moving("mpeg4"), VideoSampling()), expected)


@pytest.mark.parametrize("kind", ["h264", "h264, transport stream", "mpeg4", "mpeg4, avi", "vp9"])
@pytest.mark.parametrize("fps", [0.7, 2.0, 30.0])
def test_what_is_read_is_known_before_it_is_decoded(moving, kind, fps):
    asked, sampling = [], VideoSampling(fps=fps)
    decode_video(moving(kind), sampling, lambda *shape: asked.append(shape) or (28, 56))
    assert asked == [media_shape("video", moving(kind), sampling)]


# Broken files


@pytest.mark.parametrize("kind", ["h264", "h264, transport stream", "mpeg4, avi", "vp9"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_videos_decode_or_raise_media_error(moving, kind, data):
    """Whatever stands in a shard, nothing but MediaError comes out: any other error would go uncounted."""
    file = bytearray(moving(kind))
    for _ in range(data.draw(st.integers(0, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    file = bytes(file[: data.draw(st.integers(0, len(file)))])
    planes = data.draw(st.booleans())
    with suppress(MediaError):
        media_shape("video", file, VideoSampling())
    try:
        read = decode_video(file, VideoSampling(), lambda *_: (28, 56), planes, threads=1)
    except MediaError as error:
        assert "\n" not in str(error)
        return
    assert (read.luma if planes else read).shape[1:3] == (28, 56)


def test_formats_that_open_other_files_are_refused(tmp_path, monkeypatch):
    """A list of files, as FFmpeg's concat reads it, would show whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mp4").write_bytes(video(grey_ramp(4), "mpeg4", "mp4"))
    listed = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(listed)) as container:
        assert next(container.decode(video=0)).width == 16, "FFmpeg refuses it by itself"
    with pytest.raises(MediaError):
        decode_video(listed, EVERY_FRAME)
    with pytest.raises(MediaError):
        decode_video(video(grey_ramp(4), "libx264", "h264"), EVERY_FRAME)


def test_a_video_that_ends_too_early_gives_what_it_has():
    data = video(grey_ramp(40), rate=10)
    found = numbers(data[: int(len(data) * 0.6)], VideoSampling(fps=5))
    assert 8 <= len(found) < 20 and found[0] == 0 and found == sorted(found)


def test_messages_of_decoder_threads_do_not_block(moving):
    """With messages to Python, as torchvision wants, closing a damaged video would wait for its threads for ever."""
    av.logging.set_level(av.logging.ERROR)
    file = bytearray(moving("h264"))
    file[2000:9000:50] = bytes(140)
    for _ in range(5):
        with suppress(MediaError):
            decode_video(bytes(file), VideoSampling(), threads=4)
        assert av.logging.get_level() is None


def test_what_fit_raises_is_not_taken_for_a_broken_video():
    def fit(*_):
        raise ValueError("too thin")

    with pytest.raises(ValueError, match=r"^too thin$"):
        decode_video(video(grey_ramp(4)), EVERY_FRAME, fit)


@pytest.mark.parametrize("height", [32, 38, 46])
def test_planes_hold_what_was_stored(height):
    """Lossless, at its own size, samples at the centres: bit for bit, every row, with any number of threads."""
    rng = np.random.default_rng(0)
    shapes = ((height, 50), (height // 2, 25), (height // 2, 25))
    stored = [[rng.integers(16, 236, shape, dtype=np.uint8) for shape in shapes] for _ in range(4)]
    data = video(stored)
    for threads in (0, 1, 3):
        planes = decode_video(data, EVERY_FRAME, planes=True, threads=threads)
        for name, index in (("luma", 0), ("cb", 1), ("cr", 2)):
            np.testing.assert_array_equal(getattr(planes, name), np.stack([frame[index] for frame in stored]))


def test_the_scaler_is_close_to_the_image_processors(natural_frames):
    """libswscale's bicubic against PIL's, from the same RGB; both average over what they skip."""
    frames = natural_frames(4, 240, 320)
    data = video(frames, "libx264rgb", "mp4", "rgb24", qp="0")
    for height, width in ((84, 112), (140, 224), (56, 56)):
        found = decode_video(data, EVERY_FRAME, lambda *_, size=(height, width): size)
        expected = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
        error = found.astype(float) - np.stack([np.asarray(image) for image in expected])
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 45


def test_planes_are_clipped_to_what_rgb_shows():
    """Luma over 235 is white, as in RGB; full-range planes stay."""
    shapes = [(32, 48), (16, 24), (16, 24)]
    frames = [flat(codes, shapes) for codes in ((255, 128, 128), (1, 128, 128), (120, 250, 5), (235, 240, 16))]
    limited, full = (
        decode_video(video(frames, color_range=RANGE_CODE[name]), EVERY_FRAME, planes=True)
        for name in ("limited", "full")
    )
    assert limited.luma[:, 0, 0].tolist() == [235, 16, 120, 235]
    assert limited.cb[:, 0, 0].tolist() == [128, 128, 240, 240] and limited.cr[:, 0, 0].tolist() == [128, 128, 16, 16]
    assert [plane[:, 0, 0].tolist() for plane in (full.luma, full.cb)] == [[255, 1, 120, 235], [128, 128, 250, 240]]
    white, black = decode_video(video(frames, color_range=RANGE_CODE["limited"]), EVERY_FRAME)[:2, 0, 0]
    assert white.tolist() == [255] * 3 and black.tolist() == [0] * 3
    assert_well_formed(limited, 4, 32, 48)
