"""How media reach the language model of a sharded Qwen2-VL or Qwen2.5-VL: through one call of the vision tower."""

from typing import Any

import torch

MEDIA = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)


def blank_image(model: torch.nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest image that the tower accepts, all zeros: its tokens [merge * merge, K] and its grid [1, 3].

    model: Qwen2VLForConditionalGeneration, or Qwen2.5-VL's.
    device: Of the result.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    floats = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = torch.zeros(merge * merge, floats, device=device, dtype=model.dtype)
    return tokens, torch.tensor([[1, merge, merge]], device=device)


def embed_media(model: torch.nn.Module, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook that puts the embeddings of text, images and videos in place of the pixels.

    model: Qwen2VLForConditionalGeneration, or Qwen2.5-VL's.
    arguments: Positional arguments of the model's forward.
    inputs: Keyword arguments of the model's forward, with position_ids.

    The model itself calls its tower once for images and once for videos, and not at all for text. Each call gathers
    sharded weights from all processes, so all of them must make the same calls in the same order. Here the tower is
    called exactly once, before the language model. A text-only micro-batch gives it one blank image.
    """
    kinds = [kind for kind in MEDIA if inputs.get(kind[0]) is not None]
    ids = inputs.pop("input_ids")
    pixels, grids = _gathered(inputs, kinds) if kinds else blank_image(model, ids.device)
    features = model.visual(pixels, grid_thw=grids)
    embeddings = model.model.embed_tokens(ids)
    features = features.to(embeddings.dtype)
    if not kinds:  # the loss depends on the tower in every process, so backward gathers the same weights
        return arguments, {**inputs, "inputs_embeds": embeddings + 0.0 * features.sum()}
    masks = [ids == getattr(model.config, token) for _, _, token in kinds]
    for mask, part in zip(masks, features.split([int(mask.sum()) for mask in masks])):
        embeddings = embeddings.masked_scatter(mask.unsqueeze(-1), part)
    return arguments, {**inputs, "inputs_embeds": embeddings}


def _gathered(inputs: dict[str, Any], kinds: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and grids of all kinds, taken out of `inputs`."""
    pixels = [inputs.pop(name) for name, _, _ in kinds]
    grids = [inputs.pop(name) for _, name, _ in kinds]
    return torch.cat(pixels), torch.cat(grids)
