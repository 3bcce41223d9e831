"""The vision tower's attention without a mask, against transformers' with one."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from dct_qwen2vl.data.vision_attention import attend_each_step_alone

SIZES = {"depth": 2, "patch_size": 2, "num_heads": 4}
TOWERS = {
    "qwen2_vl": (
        Qwen2VisionTransformerPretrainedModel, Qwen2VLConfig,
        {**SIZES, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 16},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLConfig,
        {**SIZES, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 16, "window_size": 8,
         "fullatt_block_indexes": [1]},
    ),
}  # fmt: skip


def new_tower(kind: str) -> torch.nn.Module:
    """Of a few random weights, in float32."""
    tower, config, sizes = TOWERS[kind]
    torch.manual_seed(0)
    return tower._from_config(config(vision_config=sizes).vision_config).eval()


def new_tokens(tower: torch.nn.Module, grids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of media with these grids, and the grids."""
    grid = torch.tensor(grids)
    floats = tower.patch_embed.proj.weight[0].numel()
    return torch.randn(int(grid.prod(dim=1).sum()), floats, generator=torch.Generator().manual_seed(1)), grid


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_those_of_the_masked_attention(kind):
    """Images of several sizes, equal ones beside each other and apart, and a video."""
    tower = new_tower(kind)
    tokens, grid = new_tokens(tower, [[1, 8, 6], [1, 8, 6], [3, 4, 10], [1, 2, 2], [1, 8, 6]])
    expected = tower(tokens, grid)
    attend_each_step_alone(tower)
    torch.testing.assert_close(tower(tokens, grid), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_image_of_a_large_batch_is_lost_on_a_gpu():
    """200 images of 384 tokens. A mask for all of them has 1.4 times 2^32 elements, and the last images were wrong."""
    tower = new_tower("qwen2_vl").cuda()
    attend_each_step_alone(tower)
    tokens, grid = (tensor.cuda() for tensor in new_tokens(tower, [[1, 8, 48]] * 200))
    found = tower(tokens, grid).chunk(200)
    for place in (0, 100, 180, 199):
        alone = tower(tokens[384 * place : 384 * (place + 1)], grid[:1])
        torch.testing.assert_close(found[place], alone, rtol=1e-3, atol=1e-3)
