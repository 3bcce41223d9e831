"""What it costs to read a large JPEG faithfully: dB against decoding all of it, and time.

    python -m benchmarks.speed.jpeg_scaling

Ways: `once`, libjpeg scales down to no less than the target; `twice`, to no less than twice the target, then bicubic;
`whole`, bicubic alone, as the stock image processor. Photographs of scikit-image and scikit-learn, quality 92, 4:2:0.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from dct_qwen2vl.data import images

WAYS = {"once": 1, "twice": 2, "whole": 0}  # DRAFT_FACTOR; 0: no draft
FACTORS = (1.5, 2, 3, 4, 6, 8, 12)  # of the sides of the file to those of the target


class Wanted:
    """A `Fit` of one size."""

    def __init__(self, height: int, width: int, whole: bool) -> None:
        self.size, self.whole = (height, width), whole

    def __call__(self, *_: int) -> tuple[int, int]:
        return self.size


def photographs() -> dict[str, np.ndarray]:
    """RGB images uint8 [H, W, 3] that installed packages carry."""
    import skimage.data
    import sklearn.datasets

    found = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")}
    return found | {name: sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}


def jpeg_of(pixels: np.ndarray, enlarge: int = 1) -> bytes:
    """enlarge: the photograph stands so many times side by side and one above the other, for times of large files."""
    stream = io.BytesIO()
    Image.fromarray(np.tile(pixels, (enlarge, enlarge, 1))).save(stream, "JPEG", quality=92, subsampling=2)
    return stream.getvalue()


def reader(data: bytes, size: tuple[int, int], way: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        images.DRAFT_FACTOR = WAYS[way] or 1
        return images.decode_image(data, Wanted(*size, whole=way == "whole"))

    return read


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio; infinite for equal arrays."""
    error = np.mean((one.astype(float) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def quality(factor: float) -> dict[str, list[float]]:
    """Way -> dB of each photograph against `whole`."""
    found: dict[str, list[float]] = {"once": [], "twice": []}
    for pixels in photographs().values():
        data, size = jpeg_of(pixels), tuple(int(side / factor) for side in pixels.shape[:2])
        whole = reader(data, size, "whole")()
        for way, values in found.items():
            values.append(decibels(reader(data, size, way)(), whole))
    return found


def times(factor: float, enlarge: int, rounds: int) -> dict[str, float]:
    """Way -> median milliseconds of processor time for one large photograph, the ways taking turns."""
    pixels = photographs()["china"]
    data, size = jpeg_of(pixels, enlarge), tuple(int(side * enlarge / factor) for side in pixels.shape[:2])
    readers, seconds = {way: reader(data, size, way) for way in WAYS}, {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, read in readers.items():
            start = time.process_time()  # other programs may use the cores
            read()
            if number:
                seconds[way].append(time.process_time() - start)
    return {way: statistics.median(values) * 1e3 for way, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="times of each way, beside one that is not counted")
    parser.add_argument("--enlarge", type=int, default=4, help="the timed photograph is 640 x 427 px times this")
    arguments = parser.parse_args(argv)
    for factor in FACTORS:
        dB = quality(factor)
        row = {
            "factor": factor,
            "dB": {way: [round(min(values), 1), round(max(values), 1)] for way, values in dB.items()},
            "ms": {way: round(ms, 1) for way, ms in times(factor, arguments.enlarge, arguments.rounds).items()},
        }
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
