"""What the tokens of a configuration keep of an image or a video, in numbers.

Letters used for shapes in this file: T H W frames, rows and columns of the source, S frames of it that are shown,
(bt, bh, bw) a block.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dct_qwen2vl.analysis.skipped_cells import skip
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.images import decode_image
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS, VideoSampling, decode_video

if TYPE_CHECKING:
    from dct_qwen2vl.data.videos import YUVFrames
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

# 32 frames are enough to measure; at 1080p they already take 200 MB.
SAMPLING = VideoSampling(fps=2.0, min_frames=4, max_frames=32)
PIXEL_PATCH = (2, 14, 14)  # frames, rows, columns of a patch of Qwen2-VL


class SheetError(UserError):
    """The sheet cannot be drawn. The message is one line: what, where, what to type next."""


@dataclass(frozen=True)
class Result:
    """What the tokens of one configuration hold of a video of T frames.

    tokens: of the vision tower.
    decoded: uint8 [S, H, W, 3]. The frames that are shown.
    error: float32 [S, H, W], levels of 0..255. Absolute difference from the source, mean of R, G and B.
    psnr: dB over all T frames, infinite where nothing is lost.
    pixels_psnr: the same of as many tokens of pixels, that is, of the source at a smaller size.
    kept: bool [S, rows, columns], the merge cells of the frames shown that skipping keeps; None without skipping. With
        it, `tokens` are those of kept cells, and the others are decoded as what they copy.
    share: of all cells that are kept.
    """

    config: "DCTConfig"
    tokens: int
    decoded: np.ndarray
    error: np.ndarray
    psnr: float
    pixels_psnr: float
    kept: np.ndarray | None = None
    share: float = 1.0


def common_factor(configs: list["DCTConfig"], max_pixels: int) -> int:
    """A number of pixels. A source whose height and width are multiples of it suits all configurations.

    configs: The token formats.
    max_pixels: Most pixels of an image or frame.

    Raises SheetError if there is no sensible one.
    """
    for config in configs:
        if config.block[1] != config.block[2]:
            raise SheetError(
                f"{config.name} has blocks of {config.block[1]} x {config.block[2]} px: only squares are shown"
            )
    factors = [config.resize_factor[0] for config in configs]
    factor = math.lcm(*factors)
    needs = f"{', '.join(config.name for config in configs)} need multiples of {', '.join(map(str, factors))} px"
    if factor > 2 * max(factors):  # would stretch images
        raise SheetError(f"{needs}, together of {factor} px, too coarse to compare them: show them on separate sheets")
    if factor**2 > max_pixels:
        raise SheetError(f"{needs}: --max-pixels must be at least {factor**2}, got {max_pixels}")
    return factor


def read_frames(
    path: Path, factor: int, max_pixels: int, planes: bool = False
) -> tuple["np.ndarray | YUVFrames", tuple[int, int]]:
    """The source, uint8 RGB [T, H, W, 3] (T = 1 for an image), and its height and width in the file, pixels.

    path: Image or video file.
    factor: Height and width of the source are multiples of it, pixels.
    max_pixels: Most pixels of an image or frame.
    planes: Whether a video is read as 4:2:0 planes, as in training.

    Raises MediaError or OSError.
    """
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    original = (0, 0)

    def fit(height: int, width: int, frames: int) -> tuple[int, int]:
        nonlocal original
        original = height, width
        return target_size(height, width, factor, min(56 * 56, max_pixels), max_pixels)

    data = path.read_bytes()
    frames = decode_video(data, SAMPLING, fit, planes) if is_video(path) else decode_image(data, fit=fit)[None]
    return frames, original


def is_video(path: Path) -> bool:
    """By its extension."""
    return path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS


def measure(
    frames: np.ndarray,
    config: "DCTConfig",
    shown: list[int],
    skip_db: float | None = None,
    planes: "YUVFrames | None" = None,
) -> Result:
    """Encodes and decodes a video.

    frames: uint8 [T, H, W, 3].
    config: The token format.
    shown: Numbers of the S frames that the result holds decoded.
    skip_db: Threshold of skipping, dB. None: all cells are kept.
    planes: The same video as training reads it, which decides what is skipped. None: the frames do.
    """
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    tokenizer, bt = DCTTokenizer(config), config.block[0]
    scale = math.sqrt(math.ceil(len(frames) / bt) / math.ceil(len(frames) / PIXEL_PATCH[0]))
    filled, kept_cells = skip(frames, config, skip_db, planes) if skip_db else (None, None)
    share = 1.0 if kept_cells is None else float(kept_cells.mean())
    scale *= math.sqrt(share)
    tokens, squares, pixels_squares, kept = 0, 0.0, 0.0, {}
    step = bt * max(1, 8 // bt)  # frames at once: videos are long
    for start in range(0, len(frames), step):
        chunk = frames[start : start + step]
        encoded, grid = tokenizer.encode(chunk)
        if filled is not None:
            encoded = filled[tokens : tokens + len(encoded)]
        decoded = tokenizer.decode(encoded, grid).numpy()[: len(chunk)]
        tokens += len(encoded)
        squares += _squares(decoded, chunk)
        pixels_squares += sum(_squares(_as_few_pixels(frame, config, scale), frame) for frame in chunk)
        kept.update((number, decoded[number - start]) for number in shown if start <= number < start + len(chunk))
    decoded = np.stack([kept[number] for number in shown])
    error = np.abs(decoded.astype(np.float32) - frames[shown]).mean(axis=-1)
    psnr, pixels_psnr = (_psnr(value / frames.size) for value in (squares, pixels_squares))
    if kept_cells is not None:
        tokens = int(kept_cells.sum()) * config.merge**2
        kept_cells = kept_cells[[number // bt for number in shown]]
    return Result(config, tokens, decoded, error, psnr, pixels_psnr, kept_cells, share)


def _squares(found: np.ndarray, expected: np.ndarray) -> float:
    """Sum of squared differences of uint8 arrays."""
    return float(np.square(found.astype(np.int32) - expected).sum(dtype=np.int64))


def _psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def _as_few_pixels(frame: np.ndarray, config: "DCTConfig", scale: float) -> np.ndarray:
    """A frame downscaled until patches of pixels are as many as tokens, by Lanczos, and enlarged again by bicubic.

    frame: uint8 [H, W, 3].
    scale: corrects the side for patches and blocks of differing numbers of frames.
    """
    (height, width), (_, bh, bw) = frame.shape[:2], config.block
    small = round(width * scale * PIXEL_PATCH[2] / bw), round(height * scale * PIXEL_PATCH[1] / bh)
    if small[0] >= width:
        return frame
    image = Image.fromarray(frame).resize((max(1, small[0]), max(1, small[1])), Image.Resampling.LANCZOS)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def worst_window(error: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the square window with the greatest sum of errors, the first of equal ones.

    error: [H, W].
    side: Of the window, pixels.
    """
    sums = np.zeros((error.shape[0] + 1, error.shape[1] + 1))
    sums[1:, 1:] = error.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(windows.round(6).argmax(), windows.shape)
    return int(top), int(left)


def error_scale(results: list[Result]) -> float:
    """Levels of 0..255 at the end of the colour scale: a round number that one pixel in two hundred is above."""
    most = max(float(np.quantile(result.error, 0.995)) for result in results)
    return next(step for step in (4, 8, 16, 32, 64, 128, 255) if step >= most)


def describe(result: Result, frames: int, height: int, width: int) -> list[str]:
    """The lines above what a preset keeps.

    result: What was measured.
    frames: Frames of the source.
    height: Of a frame, pixels.
    width: Of a frame, pixels.
    """
    config, floats = result.config, result.tokens * result.config.num_coefficients
    bt, bh, bw = config.block
    unit = "an image" if frames == 1 else "a video"
    constant = sum(index // (bh * bw) % bt == 0 for index in config.kept)
    zeros = f" ({1 - constant / config.num_coefficients:.0%} are 0)" if frames == 1 < bt else ""
    skipped = "" if result.kept is None or frames == 1 else f" ({result.share:.0%} kept)"
    lost = "every byte is kept" if math.isinf(result.psnr) else f"PSNR {result.psnr:.1f} dB"
    lines = [
        f"{bt} x {bh} x {bw} blocks, {':'.join(config.chroma)}, {config.num_coefficients:,} floats a token",
        f"{result.tokens:,} tokens {unit}, {result.tokens // config.merge**2:,} in the language model{skipped}",
        f"{floats:,} floats {unit}, {floats / (frames * height * width):.2f} a pixel{zeros}",
    ]
    if math.isinf(result.pixels_psnr):
        return [*lines, lost]
    return [*lines, f"{lost} (as many tokens of pixels: {result.pixels_psnr:.1f} dB)"]
