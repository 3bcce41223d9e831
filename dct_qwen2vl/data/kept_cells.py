"""What Hugging Face's Qwen2-VL reads of media with skipped cells. Its own forward pass knows whole grids only.

    visual_features    the vision tower over kept cells, with their positions and time steps
    embed_media        a batch -> the inputs of the language model, media in their places
    find_positions     the M-RoPE positions of ids, for questions; training has them from the task encoder
    given_positions    generation that starts from such positions

Where nothing is skipped, all of these compute what transformers computes, bit for bit.

Letters used for shapes in this file:

    B L    samples of a batch, tokens of its longest sample
    N K    vision tokens of all media of a batch, floats of one token
    M      media (images, or videos)
    t r c  steps, rows and columns of merge cells
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import nn

from dct_qwen2vl.data.positions import Grid, KeptRun, Run, mrope_positions, step_lengths, vision_positions

MEDIA = (  # token id in the model's configuration; tokens, grids and kept cells in a batch
    ("image_token_id", "pixel_values", "image_grid_thw", "image_kept"),
    ("video_token_id", "pixel_values_videos", "video_grid_thw", "video_kept"),
)


def kept_by_medium(grids: torch.Tensor, kept: torch.Tensor | None, merge_size: int) -> list[np.ndarray | None]:
    """The kept cells of each medium, bool [t, r, c]. None for each if all cells are kept.

    grids: int64 [M, 3]. (t, h, w) of whole media.
    kept: bool [cells of all media]. None: all.
    merge_size: Side of a merge cell, vision tokens.
    """
    if kept is None:
        return [None] * len(grids)
    shapes = [(t, h // merge_size, w // merge_size) for t, h, w in grids.tolist()]
    pieces = kept.cpu().split([math.prod(shape) for shape in shapes])
    return [piece.view(shape).numpy() for piece, shape in zip(pieces, shapes)]


def visual_features(visual: nn.Module, tokens: torch.Tensor, grids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Qwen2-VL's vision tower over the tokens of kept cells, [kept cells, hidden].

    visual: The tower.
    tokens: [N, K], of the kept cells.
    grids: int64 [M, 3]. (t, h, w) of whole media.
    kept: bool [cells of all media]. Steps that keep nothing are left out.
    """
    merge = visual.spatial_merge_size
    media = list(zip(map(tuple, grids.tolist()), kept_by_medium(grids, kept, merge)))
    positions = torch.from_numpy(np.concatenate([vision_positions(grid, merge, mask) for grid, mask in media]))
    lengths = [length for grid, mask in media for length in step_lengths(grid, merge, mask) if length]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=tokens.device)
    hidden = visual.patch_embed(tokens)
    table = visual.rotary_pos_emb(max(max(h, w) for (_, h, w), _ in media))
    angles = table[positions.to(table.device)].flatten(1)
    angles = torch.cat((angles, angles), dim=-1)
    rotation = (angles.cos(), angles.sin())
    for block in visual.blocks:
        hidden = block(hidden, cu_seqlens=starts, position_embeddings=rotation)
    return visual.merger(hidden)


def embed_media(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts `inputs_embeds` in place of ids and media.

    model: Qwen2VLForConditionalGeneration.
    inputs: As `QwenBatch.model_inputs` gives them, with `image_kept` or `video_kept`.

    Raises ValueError for another model: Qwen2.5-VL's tower sees windows of whole grids.
    """
    if model.config.model_type != "qwen2_vl":
        raise ValueError(f"skip_db needs a Qwen2-VL, got a {model.config.model_type}: take skip_db out")
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    for token_id, tokens, grids, kept in MEDIA:
        if grids in inputs:
            features = visual_features(
                model.visual, inputs[tokens].type(model.visual.dtype), inputs[grids], inputs[kept]
            )
            places = (ids == getattr(model.config, token_id))[..., None].expand_as(embeddings)
            embeddings = embeddings.masked_scatter(places, features.to(embeddings.dtype))
    media = {name for names in MEDIA for name in names}
    rest = {name: value for name, value in inputs.items() if name not in media and name != "input_ids"}
    return {**rest, "inputs_embeds": embeddings}


def find_positions(
    ids: np.ndarray,
    present: np.ndarray,
    pads: set[int],
    media: Iterator[tuple[Grid, np.ndarray]],
) -> np.ndarray:
    """M-RoPE positions int64 [3, L] of one sequence. They are 1 where it is padded, as in transformers.

    ids: int64 [L].
    present: bool [L]. False where padded.
    pads: Token ids that stand for images and videos.
    media: For each medium in order, the grid of its cells (t, r, c) and which are kept, bool [t, r, c]. Taken from.
    """
    runs: list[Run] = []
    for pad, group in groupby(ids[present].tolist(), key=lambda token: token if token in pads else None):
        runs.append(len(list(group)) if pad is None else KeptRun(*next(media)))
    positions = np.ones((3, len(ids)), np.int64)
    positions[:, present] = mrope_positions(runs)
    return positions


@contextmanager
def given_positions(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within the block, generation starts from these positions and counts on from them.

    model: Qwen2VLForConditionalGeneration.
    positions: int64 [3, B, L].

    transformers itself computes positions from whole grids.
    """
    owner = next(module for module in model.modules() if hasattr(module, "get_rope_index"))
    after = positions.amax((0, 2))[:, None] + 1 - positions.shape[-1]  # of each sample: what to add to a place
    owner.get_rope_index = lambda *arguments, **options: (positions, after)
    try:
        yield
    finally:
        del owner.get_rope_index
