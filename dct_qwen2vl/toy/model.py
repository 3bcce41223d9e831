"""Makes a tiny, untrained Qwen2-VL and its tokenizer: a Hugging Face directory that stock transformers loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dct_qwen2vl.checkpoints.chat_template import CHAT_TEMPLATE
from dct_qwen2vl.common.imports import importing

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY_SIZE = 640
# Qwen2's pre-tokenisation (arXiv 2407.10671): contractions, words, single digits, punctuation, white space.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_PIXELS, MAX_PIXELS = 56 * 56, 448 * 448
INITIALIZER_RANGE = 0.1  # about 1 / sqrt(width); with the 0.02 of large models the first hundreds of steps are lost


def load_libraries() -> None:
    """Imports what `write_checkpoint` needs, which takes a few seconds."""
    with importing():
        import torch  # noqa: F401
        from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor  # noqa: F401


def train_tokenizer(texts: Iterable[str]):
    """A byte-level BPE of VOCABULARY_SIZE tokens and Qwen2-VL's special tokens, as a `Qwen2TokenizerFast`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split_as_qwen2(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return qwen2_tokenizer(tokenizer)


def split_as_qwen2(tokenizer) -> None:
    """Makes a BPE of the package tokenizers normalise and split text as Qwen2's does."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()


def qwen2_tokenizer(tokenizer, model_max_length: int = 32768):
    """A `Qwen2TokenizerFast` with Qwen2-VL's special tokens and chat template.

    tokenizer: A byte-level BPE of the package tokenizers. It gets the special tokens.
    model_max_length: Of a sequence, tokens.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2TokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        padding_side="left",
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
    )


def token_ids(tokenizer) -> dict[str, int]:
    """The fields of `Qwen2VLConfig` that name a token."""
    named = {
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "vision_token_id": "<|vision_pad|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in named.items()}


def build_config(tokenizer):
    """The tiny `Qwen2VLConfig`: every size small, every id that of `tokenizer`."""
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=32768,
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},  # sums to half of head_dim 32; t : h : w as in 2B
        tie_word_embeddings=True,
        use_sliding_window=False,
        **token_ids(tokenizer),
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 3,
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        torch_dtype="float32",
    )


def write_checkpoint(texts: Iterable[str], folder: Path, seed: int) -> int:
    """Trains the tokenizer, draws the weights and saves both. Returns the number of parameters.

    texts: What the tokenizer is trained on.
    folder: Hugging Face directory to write.
    seed: Of the weights.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    tokenizer = train_tokenizer(texts)
    config = build_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    save(model, tokenizer, Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS), folder)
    return model.num_parameters()


def save(model, tokenizer, image_processor, folder: Path) -> None:
    """Writes a Hugging Face directory that answers greedily.

    model: `Qwen2VLForConditionalGeneration`. Its generation settings are replaced.
    tokenizer: As `qwen2_tokenizer` makes it.
    image_processor: Of pixels.
    folder: Hugging Face directory to write.
    """
    from transformers import GenerationConfig, Qwen2VLProcessor

    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        do_sample=False,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    Qwen2VLProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
