"""Which merge cells skipping keeps of an image or a video, measured and drawn.

Letters: S frames that are shown, H W their rows and columns, t r c steps, rows and columns of cells.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from dct_qwen2vl.data.videos import YUVFrames
    from dct_qwen2vl.dct.configuration_dct import DCTConfig

TINT, STRENGTH = (116, 160, 214), 0.8  # of cells that are left out: RGB, and the share of it


def skip(
    frames: np.ndarray, config: "DCTConfig", skip_db: float, planes: "YUVFrames | None" = None
) -> tuple["torch.Tensor", np.ndarray]:
    """Tokens [N, K] with skipped cells filled in, and the cells that are kept, bool [t, r, c].

    frames: uint8 [T, H, W, 3].
    config: The token format.
    skip_db: As in `skipping_dct.kept_cells`.
    planes: The same video as planes. 4:2:0 tokens of these are compared, as in training.
    """
    from dct_qwen2vl.dct.skipping_dct import fill_tokens, keep_tokens, kept_cells
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    tokenizer = DCTTokenizer(config)
    tokens, grid = tokenizer.encode(frames)
    as_trained = planes is not None and config.chroma == "420"
    compared = tokenizer.encode_planes(*planes.parts)[0] if as_trained else tokens
    kept = kept_cells(compared, grid, config, skip_db)
    return fill_tokens(keep_tokens(tokens, kept), kept), kept.numpy()


def tint_skipped(frames: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Frames with a tint over the cells that are left out, uint8 [S, H, W, 3].

    frames: uint8 [S, H, W, 3].
    kept: bool [S, r, c].
    """
    _, height, width, _ = frames.shape
    mask = kept.repeat(height // kept.shape[1], axis=1).repeat(width // kept.shape[2], axis=2)
    tinted = frames * (1 - STRENGTH) + np.array(TINT) * STRENGTH
    return np.where(mask[..., None], frames, tinted.round().astype(np.uint8))
