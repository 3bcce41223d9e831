"""How many merge cells skipping keeps, and what the rule costs next to encoding.

    python -m benchmarks.speed.skipping --json skipping.json
    python -m benchmarks.speed.skipping --videos vtest.avi --fps 2

Shares: of drawn videos, 448 x 672 px, at a few thresholds in dB; with the noise floor; in "exact" only equal cells go.
`--videos` adds files, read as training reads them. Drawn videos are the ideal case: no camera, no codec.

    slides      a new page of text every 10 s, a cursor that moves now and then
    editor      a line of text that grows, a character every half second
    scrolled    a page of text that is scrolled by 90 px every 5 s
    talking     a photograph in front of which an ellipse moves, the head of a speaker
    fade        a photograph that slowly turns brighter
    panned      a window that wanders over a photograph: nothing to skip
    page        one page of text with margins, an image: rule S alone

Cost: median time of the rule and of the transform, in turns, on one thread: of videos of frames in memory; of an image
also with reading its PNG file. Quality: mean PSNR of RGB of the video that is shown by copying, against all tokens.
"""

import argparse
import io
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.speed.tokenizer import hardware, image, measure, video
from dct_qwen2vl.analysis.skipped_cells import skip, tint_skipped
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.data.media import VideoSampling, decode_image, decode_video
from dct_qwen2vl.dct.configuration_dct import PRESETS, DCTConfig
from dct_qwen2vl.dct.image_sizes_dct import target_size
from dct_qwen2vl.dct.skipping_dct import fill_tokens, keep_tokens, kept_cells
from dct_qwen2vl.dct.transform_dct import DCTTokenizer

HEIGHT, WIDTH, FRAMES = 448, 672, 60  # 30 s at 2 frames a second
THRESHOLDS = (33.0, 36.0, 38.0, 40.0, 45.0)
EXACT = 120.0  # dB: a thousandth of a level
LINE = 18  # px
WORDS = ("a", "of", "the", "to", "and", "in", "tokens", "frames", "margin", "page", "video", "shows", "threshold")


def text_page(height: int, width: int, seed: int, margin: int = 40) -> np.ndarray:
    """Lines of words on white, uint8 [height, width, 3]."""
    page, rng = Image.new("RGB", (width, height), "white"), np.random.default_rng(seed)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for top in range(margin, height - margin - LINE, LINE):
        if rng.random() < 0.85:
            words = " ".join(rng.choice(WORDS, int(rng.integers(4, max(5, (width - 2 * margin) // 52)))))
            draw.text((margin, top), words, fill="black", font=font)
    return np.asarray(page)


def slides() -> np.ndarray:
    pages = [text_page(HEIGHT, WIDTH, seed, 60) for seed in range(3)]
    frames = np.stack([pages[number // 20] for number in range(FRAMES)])
    for number in range(FRAMES):
        place = 40 * min(number % 20, 8)
        frames[number, 100 + place // 2 : 116 + place // 2, 200 + place : 210 + place] = (30, 30, 200)
    return frames


def editor() -> np.ndarray:
    page, frames = Image.fromarray(text_page(HEIGHT, WIDTH, 5)), []
    ImageDraw.Draw(page).rectangle((0, 300, WIDTH, 340), fill="white")
    for number in range(FRAMES):
        frame = page.copy()
        text = ("keeps what a kept cell shows, skips the rest " * 2)[: number + 1]
        ImageDraw.Draw(frame).text((40, 310), text, fill="black", font=ImageFont.load_default(13))
        frames.append(np.asarray(frame))
    return np.stack(frames)


def scrolled() -> np.ndarray:
    page = text_page(HEIGHT + 90 * (FRAMES // 10), WIDTH, 6)
    return np.stack([page[90 * (number // 10) :][:HEIGHT] for number in range(FRAMES)])


def talking() -> np.ndarray:
    scene, frames = Image.fromarray(image(HEIGHT, WIDTH)), []
    for number in range(FRAMES):
        frame, phase = scene.copy(), number / 5
        x, y, mouth = 336 + 9 * math.sin(phase), 224 + 4 * math.cos(2.1 * phase), 5 + 5 * math.sin(2.9 * phase)
        draw = ImageDraw.Draw(frame)
        draw.ellipse((x - 62, y - 84, x + 62, y + 84), fill=(214, 176, 148))
        draw.ellipse((x - 24, y + 40 - mouth, x + 24, y + 40 + mouth), fill=(120, 40, 40))
        frames.append(np.asarray(frame))
    return np.stack(frames)


def fade() -> np.ndarray:
    gains = np.linspace(0.6, 1, FRAMES)
    return np.stack([(image(HEIGHT, WIDTH) * gain).round().astype(np.uint8) for gain in gains])


def with_noise(frames: np.ndarray, sigma: float) -> np.ndarray:
    """White noise of RGB, levels."""
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return (frames + noise).clip(0, 255).round().astype(np.uint8)


def drawn() -> dict[str, np.ndarray]:
    """Frames uint8 [T, H, W, 3] by name."""
    clean = {
        "slides": slides(),
        "editor": editor(),
        "scrolled": scrolled(),
        "talking": talking(),
        "fade": fade(),
        "panned": video(16, HEIGHT, WIDTH),
        "page": text_page(1120, 784, 9, 90)[None],
    }
    noisy = {f"talking, sigma {sigma}": with_noise(clean["talking"], sigma) for sigma in (2, 4)}
    return clean | noisy


def read_video(path: Path, fps: float, most_frames: int) -> np.ndarray:
    """As training reads it, at the size of the drawn videos."""
    sampling = VideoSampling(fps=fps, max_frames=most_frames)
    return decode_video(path.read_bytes(), sampling, lambda h, w, _: target_size(h, w, 56, 56 * 56, HEIGHT * WIDTH))


def shares(frames: np.ndarray, config: DCTConfig) -> dict[str, float]:
    """Percent of cells kept by threshold, and what 38 dB show in dB."""
    tokens, grid = DCTTokenizer(config).encode(frames)
    rules = {"exact": (EXACT, False)} | {f"{db:g}": (db, False) for db in THRESHOLDS} | {"38 + floor": (38.0, True)}
    masks = {name: kept_cells(tokens, grid, config, *rule) for name, rule in rules.items()}
    result = {name: round(100 * float(mask.float().mean()), 1) for name, mask in masks.items()}
    result["empty steps"] = int((masks["38"].sum((1, 2)) == 0).sum())
    result["38 shows"] = round(quality(tokens, grid, masks["38"], config), 1)
    return result


def quality(tokens: torch.Tensor, grid: tuple[int, int, int], kept: torch.Tensor, config: DCTConfig) -> float:
    """PSNR in dB of RGB, what is shown with holes against what all tokens show; infinite if nothing is lost."""
    tokenizer = DCTTokenizer(config)
    difference = tokenizer.decode_float(fill_tokens(keep_tokens(tokens, kept), kept), grid)
    error = float((difference - tokenizer.decode_float(tokens, grid)).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def costs(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of encoding and of the rule, and the rule's share, by case."""
    still = np.repeat(image(HEIGHT, WIDTH)[None], 32, axis=0)
    cases = {"all moves": video(32, HEIGHT, WIDTH), "talking": talking()[:32], "nothing moves": still}
    results = {}
    for preset in PRESETS:
        config = DCTConfig.preset(preset)
        for name, frames in cases.items():
            results[f"{preset}, video, {name}"] = cost(config, partial(DCTTokenizer(config).encode, frames), rounds)
        for name, pixels in {"photograph": image(784, 1120), "page": text_page(1120, 784, 9, 90)}.items():
            results[f"{preset}, PNG, {name}"] = cost(config, partial(encode_file, config, png_file(pixels)), rounds)
    return results


def png_file(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def encode_file(config: DCTConfig, data: bytes) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An image file of a size that needs no resizing."""
    return DCTTokenizer(config).encode(decode_image(data)[None])


def cost(config: DCTConfig, encode: partial, rounds: int) -> dict[str, float]:
    tokens, grid = encode()
    seconds = measure({"encode": encode, "rule": partial(kept_cells, tokens, grid, config)}, rounds)
    ms = {name: round(statistics.median(times) * 1e3, 2) for name, times in seconds.items()}
    ratio = statistics.median(rule / whole for whole, rule in zip(seconds["encode"], seconds["rule"]))
    return ms | {"percent": round(100 * ratio, 1)}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """A table on the screen."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title:26}", *(f"{column:>11}" for column in columns))
    for name, row in rows.items():
        print(f"{name:26}", *(f"{row[column]:11g}" for column in columns), flush=True)


def draw(videos: dict[str, np.ndarray], config: DCTConfig, path: Path) -> None:
    """A strip of steps of each video, decoded, with the cells that 38 dB leave out under a tint."""
    from dct_qwen2vl.analysis.token_sheet import GAP, LINE, STRIP_GAP, Canvas, plain_style, scaled

    steps, size = range(0, 20, 4), (112, 168)
    row, column = 2 * LINE + size[0], size[1] + STRIP_GAP
    with plain_style():
        canvas = Canvas(2 * GAP + len(steps) * column, GAP + len(videos) * row)
        for top, (name, frames) in zip(range(GAP, GAP + len(videos) * row, row), videos.items()):
            filled, kept = skip(frames, config, 38.0)
            grid = (len(kept), kept.shape[1] * config.merge, kept.shape[2] * config.merge)
            shown = tint_skipped(DCTTokenizer(config).decode(filled, grid).numpy()[:: config.block[0]], kept)
            canvas.text(GAP, top, f"{name}: {kept.mean():.0%} of the cells are kept")
            for place, step in enumerate(steps):
                canvas.image(GAP + place * column, top + LINE + 4, scaled(shown[step], size))
        canvas.save(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="x4", help="of the shares (default: %(default)s)")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], metavar="FILE", help="videos to add")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second read of them (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=160, help="most frames read of them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each cost (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--figure", type=Path, help="draw the cells kept of drawn videos there, a PNG, and end")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = DCTConfig.preset(arguments.preset)
    if arguments.figure:
        draw({"slides": slides(), "talking": talking(), "fade": fade()}, config, arguments.figure)
        return 0
    videos = drawn() | {path.name: read_video(path, arguments.fps, arguments.frames) for path in arguments.videos}
    figures = {"hardware": hardware(), "kept": {name: shares(frames, config) for name, frames in videos.items()}}
    show(f"% kept at dB, {arguments.preset}", figures["kept"])
    figures["cost"] = costs(arguments.rounds)
    show("ms, one thread", figures["cost"])
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
