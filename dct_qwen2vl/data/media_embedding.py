"""How images and videos reach the language model of Hugging Face's Qwen2-VL or Qwen2.5-VL by one call of the tower.

    embed_media        a batch -> the inputs of the language model, media in their places
    visual_features    the vision tower over kept cells, with their positions, time steps and windows

Skipped cells need it: the model's own forward pass knows whole grids only. A sharded model needs it: each call of the
tower gathers weights from all processes, so all of them must make the same calls.

Letters used for shapes in this file:

    N K    vision tokens of all media of a batch, floats of one token
    M      media (images, or videos)
    t r c  steps, rows and columns of merge cells
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dct_qwen2vl.data.kept_cells import kept_by_medium
from dct_qwen2vl.data.positions import Grid, step_lengths, vision_positions, window_order

MEDIA = (  # token id in the model's configuration; tokens, grids and kept cells in a batch
    ("image_token_id", "pixel_values", "image_grid_thw", "image_kept"),
    ("video_token_id", "pixel_values_videos", "video_grid_thw", "video_kept"),
)


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. The host does not wait for a GPU.

    tensor: any.
    device: of the model.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def blank_image(model: nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest image that the tower accepts, all zeros: its tokens [merge * merge, K] and its grid [1, 3].

    model: Qwen2VLForConditionalGeneration, or Qwen2.5-VL's.
    device: Of the tokens. The grid is on the host, where the tower reads it.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    floats = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = torch.zeros(merge * merge, floats, device=device, dtype=model.dtype)
    return tokens, torch.tensor([[1, merge, merge]])


def embed_media(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Puts the embeddings of text, images and videos in place of ids and media.

    The tower is called exactly once, for images and videos together. A batch of text alone gives it one blank image,
    which changes no embedding. So every process has a gradient for every weight.

    model: Qwen2VLForConditionalGeneration, or Qwen2.5-VL's.
    inputs: as `QwenBatch.model_inputs` gives them, with position_ids.

    Returns the inputs with `inputs_embeds`, without ids and media.
    """
    ids = inputs["input_ids"]
    kinds = [kind for kind in MEDIA if inputs.get(kind[1]) is not None]
    features = _features(model, inputs, kinds)
    embeddings = model.get_input_embeddings()(ids)
    features = features.to(embeddings.dtype)
    if kinds:
        masks = [ids == getattr(model.config, token) for token, *_ in kinds]
        for mask, part in zip(masks, features.split([int(mask.sum()) for mask in masks])):
            embeddings = embeddings.masked_scatter(mask.unsqueeze(-1), part)
    else:
        embeddings = embeddings + 0.0 * features.sum()
    media = {name for names in MEDIA for name in names}
    rest = {name: value for name, value in inputs.items() if name not in media and name != "input_ids"}
    return {**rest, "inputs_embeds": embeddings}


def _features(model: nn.Module, inputs: dict[str, Any], kinds: list[tuple[str, ...]]) -> torch.Tensor:
    """What one call of the tower gives for all media, images first: [kept cells, hidden]."""
    if not kinds:
        tokens, grids = blank_image(model, inputs["input_ids"].device)
        return model.visual(tokens, grid_thw=grids)
    tokens, grids, kept = (
        [inputs[names[part]] for names in kinds if inputs.get(names[part]) is not None] for part in (1, 2, 3)
    )
    tokens = torch.cat(tokens).type(model.visual.dtype)
    if not kept:
        return model.visual(tokens, grid_thw=torch.cat(grids))
    return visual_features(model.visual, tokens, torch.cat(grids), torch.cat(kept))


def visual_features(visual: nn.Module, tokens: torch.Tensor, grids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The vision tower over the tokens of kept cells, [kept cells, hidden].

    visual: The tower of Qwen2-VL or of Qwen2.5-VL.
    tokens: [N, K], of the kept cells.
    grids: int64 [M, 3]. (t, h, w) of whole media.
    kept: bool [cells of all media]. Steps and windows that keep nothing are left out.
    """
    places = _Places.of(visual, grids, kept)
    rotation = _rotation(visual, places.positions)
    hidden = visual.patch_embed(tokens)
    if places.order is not None:
        hidden = _ordered(hidden, places.order, places.unit)
        rotation = tuple(_ordered(angles, places.order, places.unit) for angles in rotation)
    starts, window_starts = places.starts, places.window_starts
    if visual.config._attn_implementation == "flash_attention_2":  # others slice by them, on the host, in each layer
        starts, window_starts = starts.to(hidden.device), window_starts.to(hidden.device)
    for number, block in enumerate(visual.blocks):
        within = starts if places.sees_all(number) else window_starts
        hidden = block(hidden, cu_seqlens=within, position_embeddings=rotation)
    merged = visual.merger(hidden)
    return merged if places.order is None else merged[places.order.argsort().to(merged.device)]


def _rotation(visual: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding of each token, [N, width of a head] twice."""
    table = visual.rotary_pos_emb(int(positions.max()) + 1)
    angles = table[copy_to(positions, table.device)].flatten(1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _ordered(values: torch.Tensor, order: torch.Tensor, unit: int) -> torch.Tensor:
    """[N, ...] with its cells, of `unit` tokens each, in another order."""
    return values.unflatten(0, (-1, unit))[copy_to(order, values.device)].flatten(0, 1)


@dataclass(frozen=True)
class _Places:
    """Where kept cells stand, and which of them a block of the tower looks at together.

    positions: int64 [N, 2], row and column of each token, in the order of the tokens.
    starts: int32, where time steps begin and the last one ends.
    order: int64 [kept cells], the cells window by window; None where the tower has no windows.
    window_starts: int32, where windows begin in that order and the last one ends.
    full: numbers of the blocks that see whole steps; None: all.
    unit: tokens of a cell.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor | None
    window_starts: torch.Tensor
    full: frozenset[int] | None
    unit: int

    @classmethod
    def of(cls, visual: nn.Module, grids: torch.Tensor, kept: torch.Tensor) -> "_Places":
        merge = visual.spatial_merge_size
        media = list(zip(map(tuple, grids.tolist()), kept_by_medium(grids, kept, merge)))
        positions = np.concatenate([vision_positions(grid, merge, mask) for grid, mask in media])
        starts = _starts([length for grid, mask in media for length in step_lengths(grid, merge, mask)])
        order, windows, full = None, starts, None
        if hasattr(visual, "fullatt_block_indexes"):  # Qwen2.5-VL
            side = visual.window_size // merge // visual.patch_size
            order, lengths = _windows(media, side)
            windows, full = _starts([length * merge**2 for length in lengths]), frozenset(visual.fullatt_block_indexes)
        return cls(torch.from_numpy(positions), starts, order, windows, full, merge**2)

    def sees_all(self, block: int) -> bool:
        """Whether attention of this block runs over whole steps."""
        return self.full is None or block in self.full


def _windows(media: list[tuple[Grid, np.ndarray]], side: int) -> tuple[torch.Tensor, list[int]]:
    """Kept cells of all media window by window, and how many each window has. side: of a window, cells."""
    orders, lengths, before = [], [], 0
    for _, mask in media:
        order, of_medium = window_order(mask, side)
        orders.append(order + before)
        lengths += of_medium
        before += len(order)
    return torch.from_numpy(np.concatenate(orders)), lengths


def _starts(lengths: list[int]) -> torch.Tensor:
    """Where parts begin and the last one ends, int32; parts of no token are left out."""
    return torch.tensor([0, *np.cumsum([length for length in lengths if length])], dtype=torch.int32)
