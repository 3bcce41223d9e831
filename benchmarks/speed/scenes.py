"""Drawn videos and pages, and which of their cells skipping keeps: what `benchmarks.speed.training` trains on.

    camera     a head that moves before a photograph, under noise of sigma 2 (`talking`): a fixed camera
    screens    slides, an editor, a page that is scrolled, in turn
    pages      pages of text with margins, images

They are drawn by `benchmarks.speed.skipping`. A video has 60 frames of 448 x 672 px, 30 s; a page has 1120 x 784 px.
"""

from functools import lru_cache

import numpy as np

WORKS = {
    "camera": ("talking",),
    "screens": ("slides", "editor", "scrolled"),
    "pages": tuple(f"page {number}" for number in range(8)),
}
NOISE = 2  # levels, of the camera
MARGIN = 90  # px, of a page


def frames_of(scene: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of a name in WORKS."""
    from benchmarks.speed import skipping

    if scene.startswith("page "):
        return skipping.text_page(1120, 784, int(scene.removeprefix("page ")), MARGIN)[None]
    drawn = getattr(skipping, scene)()
    return skipping.with_noise(drawn, NOISE) if scene == "talking" else drawn


@lru_cache(maxsize=64)
def kept_in(scene: str, preset: str, skip_db: float) -> np.ndarray:
    """Which cells of a scene have tokens of a preset, bool [t, r, c]."""
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.skipping_dct import kept_cells
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    config = DCTConfig.preset(preset)
    tokens, grid = DCTTokenizer(config).encode(frames_of(scene))
    return kept_cells(tokens, grid, config, skip_db).numpy()
