"""The size that an image or frame is resized to, and the bounds that it keeps to. Needs the standard library only.

The file is saved beside converted checkpoints, with image_processing_dct.py.
"""

import math

PIXEL_BOUNDS = 56 * 56, 28 * 28 * 1280  # min_pixels and max_pixels where nothing says others: Qwen2-VL's
LONGEST_ASPECT = 200  # of the sides; Qwen2-VL refuses longer ones


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels that an image is resized to.

    height: Pixels of the image.
    width: Pixels of the image.
    factor: Both sides of the result are multiples of it, pixels.
    min_pixels: Least height * width of the result.
    max_pixels: Most height * width of the result.

    It is the `smart_resize` of transformers 4.57 wherever its result keeps to the bounds and to an aspect ratio of 200.
    Otherwise max_pixels holds where both bounds cannot. The least result is one square of factor x factor, whatever
    max_pixels says. A target size is its own target size.

    Raises ValueError for an aspect ratio over 200 and for an image without pixels.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image must have at least one pixel, got {height} x {width}")
    size = height, width
    while (target := _nearest_size(*size, factor, min_pixels, max_pixels)) != size:
        size = target
    return size


def _nearest_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """One step of `target_size`, which repeats it: rounding can change the aspect ratio, and with it what fits best."""
    rows, columns = _stock_size(height, width, factor, min_pixels, max_pixels)
    if rows * columns > max_pixels:  # no multiple between the bounds: the largest below the upper one
        shrink = math.sqrt(max_pixels / (height * width))
        rows, columns = (math.floor(side * shrink / factor) * factor for side in (height, width))
    # A long strip's short side is rounded to nothing, or to so little that the long one must give way.
    rows, columns = max(factor, rows), max(factor, columns)
    longest = max(factor, max_pixels // (min(rows, columns) * factor) * factor)
    longest = min(longest, LONGEST_ASPECT * min(rows, columns))
    return min(rows, longest), min(columns, longest)


def _stock_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that Qwen2-VL's `smart_resize` gives (transformers 4.57.6, image_processing_qwen2_vl.py).

    4.51.3 gives the same, but refuses sides below `factor`. Raises ValueError for an aspect ratio over LONGEST_ASPECT.
    """
    aspect = max(height, width) / min(height, width)
    if aspect > LONGEST_ASPECT:
        raise ValueError(f"absolute aspect ratio must be smaller than {LONGEST_ASPECT}, got {aspect}")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if rows * columns < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * enlarge / factor) * factor for side in (height, width))
    return rows, columns


def bounds_in(size: dict[str, int]) -> tuple[int, int]:
    """min_pixels and max_pixels as the stock processor's `size` names them."""
    if not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} <= set(size):
        raise ValueError(f"size must hold shortest_edge (min_pixels) and longest_edge (max_pixels), got {size}")
    return size["shortest_edge"], size["longest_edge"]


def pixel_bounds(low: int | None, high: int | None, own_low: int, own_high: int) -> tuple[int, int]:
    """min_pixels and max_pixels: those given, otherwise the processor's own.

    low: The min_pixels that was given, or None.
    high: The max_pixels that was given, or None.
    own_low: The processor's own min_pixels. Lowered to `high` if it is above it.
    own_high: The processor's own max_pixels.

    Raises ValueError unless 1 <= min_pixels <= max_pixels.
    """
    high = own_high if high is None else high
    low = min(own_low, high) if low is None else low
    if not 1 <= low <= high:
        raise ValueError(f"expected 1 <= min_pixels <= max_pixels, got min_pixels {low} and max_pixels {high}")
    return low, high
