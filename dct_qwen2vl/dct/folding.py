"""A pretrained patch embedding, carried over into the coefficient domain.

Letters used for shapes in this file: E width of the vision tower, K coefficients kept for each token.
"""

import torch

from .configuration_dct import PIXEL_PATCH, DCTConfig, synthesis_matrix


def fold_patch_embedding(
    weight: torch.Tensor, config: DCTConfig, patch: tuple[int, int, int] = PIXEL_PATCH
) -> torch.Tensor:
    """W' = W S: a Conv3d weight for pixels [E, 3, 2, 14, 14] -> one for tokens [E, K, 1, 1, 1], of the same dtype.

    Columns of coefficients that the pixel model never saw start at zero: at step 0 the folded model computes what the
    pixel model computes on the image downscaled in the DCT domain. patch: see `synthesis_matrix`. Raises ValueError
    for a weight of any other shape.
    """
    if weight.ndim != 5 or tuple(weight.shape[1:]) != (3, *patch):
        raise ValueError(f"fold_patch_embedding expects a weight [E, 3, {str(patch)[1:-1]}], got {list(weight.shape)}")
    synthesis = torch.from_numpy(synthesis_matrix(config, patch)).to(weight.device)
    folded = weight.reshape(weight.shape[0], -1).to(torch.float64) @ synthesis.T
    return folded.to(weight.dtype).reshape(weight.shape[0], -1, 1, 1, 1)
