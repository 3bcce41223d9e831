"""The mean square of DCT coefficients over images and videos, and the power spectrum that explains it.

Values are 0..1, less the CLIP mean colour, in Y, Cb, Cr. Letters: T H W, frames, rows and columns in frames and px;
(bt, bh, bw) a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CoefficientTable

PLANES = ("Y", "Cb", "Cr")
BLOCK = (16, 112, 112)  # frames, rows, columns of the block that is measured
SUMMARY_BLOCK = (2, 28, 28)  # of which statistics are printed and plotted
FRAME_LINES = (0, 1, 2, 3, 5, 8, 12, 16)  # frequencies for which power is stored, in pi/16 radians a frame
SIDE_LINES = (0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 85, 112)  # and in pi/112 radians a pixel
FIT_STEPS = 20
# What rounding to 8 bits leaves in a coefficient, (1/255)^2 / 12, less a margin: nothing measured is below it but what
# is absent (the colour of grey images, the motion of a fixed camera), and of that a table needs the logarithm.
LEAST_VARIANCE = 2.0**-24


@dataclass
class Moments:
    """Weighted sums over files of the mean squares and the means of coefficients over a file's blocks."""

    block: tuple[int, int, int]
    weight: float = 0.0
    blocks: int = 0
    square_sum: "np.ndarray | float" = 0.0  # float64 [3, bt, bh, bw]
    dc_sum: "np.ndarray | float" = 0.0  # float64 [3]

    def add(self, frames: "np.ndarray", weight: float) -> None:
        """Adds the coefficients of some frames.

        frames: uint8 [T, H, W, 3]. H and W are multiples of the block's. Frames that fill no block are left out.
        weight: Of these frames in the mean.
        """
        frames = frames[: len(frames) // self.block[0] * self.block[0]]
        coefficients = coefficients_of(frames, self.block)
        self.square_sum += weight * (coefficients**2).mean(axis=0)
        self.dc_sum += weight * coefficients[:, :, 0, 0, 0].mean(axis=0)
        self.weight += weight
        self.blocks += len(coefficients)

    @property
    def square(self) -> "np.ndarray":
        """Mean square of every coefficient about the CLIP mean, float64 [3, bt, bh, bw]."""
        return self.square_sum / self.weight

    @property
    def dc_variance(self) -> "np.ndarray":
        """Variance of the DC coefficient about its own mean, float64 [3]. That of all others is their mean square."""
        return self.square[:, 0, 0, 0] - (self.dc_sum / self.weight) ** 2


def coefficients_of(frames: "np.ndarray", block: tuple[int, int, int]) -> "np.ndarray":
    """All DCT coefficients of a video's blocks, float64 [N, 3, *block].

    frames: uint8 [T, H, W, 3]. Its sides are multiples of those of `block`.
    """
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CLIP_MEAN, RGB_TO_YCBCR, dct_matrix

    planes = (frames / 255 - np.array(CLIP_MEAN)) @ RGB_TO_YCBCR.T
    t, h, w = (side // own for side, own in zip(frames.shape, block))
    blocks = planes.reshape(t, block[0], h, block[1], w, block[2], 3)
    matrices = (dct_matrix(side) for side in block)
    return np.einsum("tahbwcp,ia,jb,kc->thwpijk", blocks, *matrices, optimize=True).reshape(-1, 3, *block)


@dataclass
class Measurement:
    """Moments of stills and of videos, for BLOCK and for SUMMARY_BLOCK, and what became of the files."""

    stills: Moments = field(default_factory=lambda: Moments((1, *BLOCK[1:])))
    videos: Moments = field(default_factory=lambda: Moments(BLOCK))
    summary_stills: Moments = field(default_factory=lambda: Moments((1, *SUMMARY_BLOCK[1:])))
    summary_videos: Moments = field(default_factory=lambda: Moments(SUMMARY_BLOCK))
    images_read: int = 0
    videos_read: int = 0
    skipped: list[str] = field(default_factory=list)

    def add_stills(self, frames: "np.ndarray", weight: float) -> None:
        """Adds frames as images.

        frames: uint8 [T, H, W, 3].
        weight: Of these frames in the mean.
        """
        self.stills.add(frames, weight)
        self.summary_stills.add(frames, weight)

    def add_video(self, frames: "np.ndarray", weight: float) -> None:
        """Adds frames as a video.

        frames: uint8 [T, H, W, 3], in their order.
        weight: Of these frames in the mean.
        """
        self.videos.add(frames, weight)
        self.summary_videos.add(frames, weight)

    def square(self, directions: bool) -> "np.ndarray":
        """Mean square of every coefficient of BLOCK, float64 [3, *BLOCK].

        directions: Whether rows and columns keep their own values. False: everything counts once more transposed.

        A frame's energy is that of the stills. It is spread over frame frequencies as in the videos, for the same
        frequency in rows and columns.
        """
        import numpy as np

        videos, stills = (np.maximum(moments.square, LEAST_VARIANCE) for moments in (self.videos, self.stills))
        square = videos * stills / videos.mean(axis=1, keepdims=True)
        return square if directions else (square + square.swapaxes(2, 3)) / 2


def sizes_of(height: int, width: int, pixels: tuple[int, ...]) -> list[tuple[int, int]]:
    """Heights and widths in pixels to which an image is resized: multiples of the block's.

    height: Of the image, pixels.
    width: Of the image, pixels.
    pixels: Most pixels of each size.
    """
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    factor = BLOCK[1]
    sizes = (target_size(height, width, factor, factor**2, min(most, height * width)) for most in pixels)
    return list(dict.fromkeys(sizes))


def resized(frames: "np.ndarray", size: tuple[int, int]) -> "np.ndarray":
    """Frames resized by the bicubic filter of the image processor, with its low-pass, uint8 [T, *size, 3].

    frames: uint8 [T, H, W, 3].
    size: Height and width of the result, pixels.
    """
    import numpy as np
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], bicubic)) for frame in frames])


def measure_images(
    images: Iterator["np.ndarray"],
    found: Measurement,
    pixels: tuple[int, ...],
    rng: "np.random.Generator",
    with_motion: bool,
) -> None:
    """Adds every image at every size.

    images: uint8 [H, W, 3] each.
    found: Gets the moments.
    pixels: Most pixels of each size.
    rng: Random numbers for motion.
    with_motion: Whether videos made from the image are added as well. Some cut to the image before it.
    """
    from dct_qwen2vl.analysis.natural_images import videos_of

    other = None
    for image in images:
        found.images_read += 1
        sizes = sizes_of(*image.shape[:2], pixels)
        for size in sizes:
            found.add_stills(resized(image[None], size), 1 / len(sizes))
            if with_motion:
                for video in videos_of(image, image if other is None else other, size, BLOCK[0], rng):
                    found.add_video(video, 1 / len(sizes))
        other = image


def measure_videos(videos: Iterator["np.ndarray"], found: Measurement, pixels: tuple[int, ...]) -> None:
    """Adds every video at every size, and its frames as stills.

    videos: uint8 [T, H, W, 3] each.
    found: Gets the moments.
    pixels: Most pixels of each size.
    """
    for video in videos:
        found.videos_read += 1
        sizes = sizes_of(*video.shape[1:3], pixels)
        for size in sizes:
            frames = resized(video, size)
            found.add_video(frames, 1 / len(sizes))
            found.add_stills(frames, 1 / len(sizes))


def fit_table(square: "np.ndarray") -> "CoefficientTable":
    """The spectrum that explains mean squares.

    square: float64 [3, *BLOCK].

    By Richardson-Lucy iteration, which keeps power positive. Each stored line is multiplied by the mean of measured
    over
    expected, over the coefficients to which it contributes.
    """
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CoefficientTable, line_response, line_weights

    lines = (FRAME_LINES, SIDE_LINES, SIDE_LINES)
    shares = [line_response(side, side) / side for side in BLOCK]  # columns sum to 1
    weights = [line_weights(axis, side) for axis, side in zip(lines, BLOCK)]
    back = [weight / weight.sum(axis=0) for weight in weights]
    onto_lines = [share @ weight for share, weight in zip(shares, back)]  # [coefficients, stored lines]
    log2_power = np.zeros((3, *(len(axis) for axis in lines)))
    for _ in range(FIT_STEPS):
        ratio = square / CoefficientTable(BLOCK, lines, log2_power).variance(BLOCK)
        log2_power = log2_power + np.log2(np.einsum("ptyx,ta,yb,xc->pabc", ratio, *onto_lines, optimize=True))
    return CoefficientTable(BLOCK, lines, log2_power.round(2))
