"""Checkpoints as other tools and versions save them: converted as a clean one is, or refused in one line."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import edit_json, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import convert_checkpoint
import finetune_qwen2vl
from dct_qwen2vl.checkpoints.hf_folder import load_processor
from dct_qwen2vl.checkpoints.inspection import CheckpointError, check_checkpoint
from dct_qwen2vl.checkpoints.loading import check_directory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR, SHARED = "preprocessor_config.json", "processor_config.json"
PATCH_EMBEDDING = "visual.patch_embed.proj.weight"


def convert(model_dir: Path, output_dir: Path, *options: str) -> int:
    return convert_checkpoint.main(["--model-dir", str(model_dir), "--output-dir", str(output_dir), *options])


@pytest.fixture
def copy_of(qwen2vl_directory, tmp_path) -> Path:
    """A copy of the tiny checkpoint, which a test changes."""
    return Path(shutil.copytree(qwen2vl_directory, tmp_path / "source"))


@pytest.fixture(scope="module")
def answer(natural_frames) -> Callable[[Path], tuple[torch.Tensor, torch.Tensor]]:
    """answer(folder): input_ids and logits for a question with an image, as evaluation makes them."""

    def ask(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        processor = load_processor(folder)
        content = [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[natural_frames(1, 224, 336)[0]], return_tensors="pt")
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            return inputs["input_ids"], model(**inputs).logits

    return ask


def assert_same(folder: Path, clean: Path, answer) -> None:
    """The converted `folder` passes the checks and computes what `clean` does."""
    assert check_checkpoint(folder)["name"] == "x4"
    check_directory(folder)
    for ours, theirs in zip(answer(folder), answer(clean), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    fast, slow = (AutoTokenizer.from_pretrained(folder, use_fast=use_fast) for use_fast in (True, False))
    text = "<|im_start|>user\n<|image_pad|>What colour is the circle?<|im_end|>"
    assert fast(text)["input_ids"] == slow(text)["input_ids"]


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def change_tensors(folder: Path, without: str = "-", **added: torch.Tensor) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if not name.startswith(without)}
    save_file({**tensors, **{name.replace("__", "."): tensor for name, tensor in added.items()}}, folder / WEIGHTS)


def newer_name(name: str) -> str:
    """transformers 4.52 and later."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def in_shards(folder: Path, count: int = 2) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number::count]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without_index(folder: Path) -> None:
    in_shards(folder)
    (folder / INDEX).unlink()


def with_stale_index(folder: Path) -> None:
    in_shards(folder)
    weight_map = dict.fromkeys(read(folder / INDEX)["weight_map"], "model-00001-of-00007.safetensors")
    edit_json(folder / INDEX, weight_map=weight_map)


TEXT = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window"),
    *("tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size"),
)


def as_transformers_4_57(folder: Path) -> None:
    """text_config beside the old fields, tie_word_embeddings in it alone, dtype, the template in a file."""
    config = read(folder / "config.json")
    text = {name: config[name] for name in TEXT} | {"model_type": "qwen2_vl_text", "dtype": "float32"}
    text |= {"layer_types": ["full_attention"] * 3, "sliding_window": None}
    del config["tie_word_embeddings"], config["torch_dtype"]
    vision = {**config["vision_config"], "dtype": "float32"}
    config |= {"text_config": text, "vision_config": vision, "dtype": "float32", "transformers_version": "4.57.6"}
    (folder / "config.json").write_text(json.dumps(config))
    template = read(folder / "chat_template.json")["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    videos = {**read(folder / PROCESSOR), "video_processor_type": "Qwen2VLVideoProcessor", "min_frames": 4}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    edit_json(folder / PROCESSOR, image_processor_type="Qwen2VLImageProcessorFast", crop_size=None, device=None)


def as_transformers_5(folder: Path) -> None:
    """All of the language model in text_config, rope_parameters, processors in one file, a short tokenizer_config."""
    as_transformers_4_57(folder)
    config = read(folder / "config.json")
    text = config["text_config"]
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    vision = {**config["vision_config"], "model_type": "qwen2_vl_vision", "rope_parameters": {"rope_type": "axial"}}
    config = {name: value for name, value in config.items() if name not in TEXT}
    config |= {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision}
    config |= {"tie_word_embeddings": text.pop("tie_word_embeddings")}
    (folder / "config.json").write_text(json.dumps(config))
    several = {"processor_class": "Qwen2VLProcessor"}
    for kind, name in (("image", PROCESSOR), ("video", "video_preprocessor_config.json")):
        settings = read(folder / name)
        bounds = {
            edge: settings.pop(old) for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
        }
        several[f"{kind}_processor"] = {**settings, "size": bounds}
        (folder / name).unlink()
    (folder / SHARED).write_text(json.dumps(several))
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    settings = read(folder / "tokenizer_config.json")
    special = settings.pop("additional_special_tokens")
    for name in ("added_tokens_decoder", "chat_template"):
        settings.pop(name, None)
    settings |= {"extra_special_tokens": special, "backend": "tokenizers", "is_local": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rename(folder, newer_name)


def with_list_of_tokens(folder: Path) -> None:
    special = read(folder / "tokenizer_config.json")["additional_special_tokens"]
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=special)


def bounds_in_processor_config(folder: Path) -> None:
    settings = read(folder / PROCESSOR)
    nested = {"image_processor": {name: settings.pop(name) for name in ("min_pixels", "max_pixels")}}
    settings.pop("size", None)
    (folder / PROCESSOR).write_text(json.dumps(settings))
    (folder / SHARED).write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **nested}))


def bounds_as_size(folder: Path, edges: tuple[str, str] = ("min_pixels", "max_pixels")) -> None:
    settings = read(folder / PROCESSOR)
    size = dict(zip(edges, (settings.pop("min_pixels"), settings.pop("max_pixels")), strict=True))
    (folder / PROCESSOR).write_text(json.dumps({**settings, "size": size}))


def without_template(folder: Path) -> None:
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = read(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_template_of_text(folder: Path) -> None:
    """As exports for language models write it: content is a text."""
    without_template(folder)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    edit_json(folder / "tokenizer_config.json", chat_template=template)


def with_larger_vocabulary(folder: Path) -> None:
    """resize_token_embeddings() without a new config.json."""
    rows = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change_tensors(folder, model__embed_tokens__weight=torch.cat([rows, torch.zeros(64, rows.shape[1])]))


def untied_in_name(folder: Path) -> None:
    """A copy of the embedding as lm_head, as zero_to_fp32 and merging tools write it."""
    change_tensors(folder, lm_head__weight=load_file(folder / WEIGHTS)["model.embed_tokens.weight"].clone())


def with_byte_order_mark(folder: Path) -> None:
    for name in ("config.json", PROCESSOR, "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def as_links(folder: Path) -> None:
    """The hub's cache: names are links to blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, folder))


def with_state_of_training(folder: Path) -> None:
    """A checkpoint-500 of the Hugging Face Trainer."""
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "zero_to_fp32.py", "latest"):
        (folder / name).write_bytes(b"state")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "global_step500").mkdir()


def without_fields_of_tokens(folder: Path) -> None:
    config = read(folder / "config.json")
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def with_attention(folder: Path) -> None:
    vision = {**read(folder / "config.json")["vision_config"], "attn_implementation": "flash_attention_3"}
    edit_json(folder / "config.json", _attn_implementation="flash_attention_2", vision_config=vision)
    edit_json(folder / "config.json", attn_implementation="flash_attention_2")


def without_slow_tokenizer(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


CASES = {
    "a PEFT merge that kept its prefix": (
        lambda f: rename(f, "base_model.model.{}".format),
        "69 tensors get the names",
    ),
    "DDP": (lambda f: rename(f, "module.{}".format), "module.model.embed_tokens.weight is model.embed_tokens.weight"),
    "torch.compile": (lambda f: rename(f, "_orig_mod.{}".format), "69 tensors get the names of transformers 4.51"),
    "any prefix": (lambda f: rename(f, "policy.actor.{}".format), "69 tensors get the names of transformers 4.51"),
    "names of newer versions": (lambda f: rename(f, newer_name), "69 tensors get the names of transformers 4.51"),
    "both": (lambda f: rename(f, lambda name: f"base_model.model.{newer_name(name)}"), "69 tensors get the names"),
    "a wrapper inside": (
        lambda f: rename(f, lambda n: n.replace(".mlp.", "._fsdp_wrapped_module.mlp.")),
        " tensors get the names",
    ),
    "transformers 4.57": (as_transformers_4_57, "the fields of text_config go to its top"),
    "transformers 5": (as_transformers_5, "rope_parameters of config.json becomes rope_theta and rope_scaling"),
    "a list of special tokens": (with_list_of_tokens, "the list extra_special_tokens of tokenizer_config.json"),
    "bounds in another file": (bounds_in_processor_config, "max_pixels are those of processor_config.json"),
    "bounds as size": (bounds_as_size, "the field size of the image processor becomes min_pixels and max_pixels"),
    "bounds as edges": (lambda f: bounds_as_size(f, ("shortest_edge", "longest_edge")), None),
    "attention of no package": (with_attention, "'flash_attention_2' is left out of config.json"),
    "no index": (without_index, f"{INDEX} is missing: the tensors of all 2 shards are read from their headers"),
    "an index of other shards": (with_stale_index, f"{INDEX} names files that are not there: the tensors of all 2"),
    "no chat template": (without_template, "there is no chat template: Qwen2-VL's is written"),
    "a template of text": (with_template_of_text, "the chat template has no places for media: Qwen2-VL's is written"),
    "a larger vocabulary": (with_larger_vocabulary, "vocab_size of config.json is 384, the weights have 448 rows"),
    "a copy of the embedding": (untied_in_name, None),
    "a byte order mark": (with_byte_order_mark, "the byte order mark is taken off"),
    "the hub's cache": (as_links, None),
    "a checkpoint of a Trainer": (with_state_of_training, None),
    "no ids of tokens": (without_fields_of_tokens, "config.json has no image_token_id: 357, as the tokenizer has it"),
    "no slow tokenizer": (without_slow_tokenizer, "vocab.json and merges.txt, which use_fast=False needs, are written"),
    "a tokenizer class of version 5": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="TokenizersBackend"),
        "tokenizer_class TokenizersBackend of tokenizer_config.json becomes Qwen2Tokenizer",
    ),
    "no padding": (lambda f: edit_json(f / "tokenizer_config.json", pad_token=None), "has no pad_token: it gets Qwen2"),
    "tokens that are split": (
        lambda f: edit_json(f / "tokenizer_config.json", split_special_tokens=True),
        "split_special_tokens of tokenizer_config.json becomes false",
    ),
    "settings that cannot be saved": (
        lambda f: edit_json(f / "generation_config.json", do_sample=False, temperature=0.1),
        "generation_config.json names numbers of sampling without do_sample: it becomes true",
    ),
    "a quantisation that is undone": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config is left out of config.json: the weights are whole",
    ),
    "another name of the file": (
        lambda f: (f / WEIGHTS).rename(f / "merged.safetensors"),
        "the weights are in merged.safetensors, not in model.safetensors: that file is read",
    ),
    "buffers of old versions": (
        lambda f: change_tensors(f, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        None,
    ),
    "no type": (lambda f: edit_json(f / "config.json", torch_dtype="auto"), None),
    "half of the settings gone": (lambda f: (f / PROCESSOR).unlink(), "is missing: Qwen2-VL's own settings are taken"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_converted_as_a_clean_one(name, copy_of, converted, tmp_path, answer, capsys):
    change, said = CASES[name]
    change(copy_of)
    before = {path: path.read_bytes() for path in copy_of.iterdir() if path.is_file()}
    assert convert(copy_of, tmp_path / "x4") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: ")]
    assert said in "\n".join(notes) if said else not notes
    assert {path: path.read_bytes() for path in before} == before
    if name == "a larger vocabulary":
        expected, found = (answer(folder)[1] for folder in (converted("x4"), tmp_path / "x4"))
        torch.testing.assert_close(found[..., :384], expected, rtol=0, atol=1e-5)
        return
    if name != "half of the settings gone":  # whose bounds are Qwen2-VL's
        kept = read(tmp_path / "x4" / PROCESSOR)
        assert (kept["min_pixels"], kept["max_pixels"]) == (56 * 56, 448 * 448)
    assert_same(tmp_path / "x4", converted("x4"), answer)


# What is refused


def quantise(folder: Path, method: str, dtype: torch.dtype, **others: str) -> None:
    """As GPTQ, AWQ, bitsandbytes and FP8 name their tensors."""
    tensors = load_file(folder / WEIGHTS)
    weight = "model.layers.0.mlp.up_proj.weight"
    tensors[others.get("name", weight)] = tensors.pop(weight).to(dtype)
    tensors[weight.replace("weight", others["scale"])] = torch.ones(3)
    save_file(tensors, folder / WEIGHTS)
    edit_json(folder / "config.json", quantization_config={"quant_method": method})


def adapters_alone(folder: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        (folder / name).unlink()
    save_file(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}))


def adapters_beside_config(folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    adapters_alone(folder)
    (folder / "config.json").write_bytes(config)


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "training_args.bin").write_bytes(b"pickled")


def as_deepspeed(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "global_step500").mkdir()
    (folder / "global_step500" / "mp_rank_00_model_states.pt").write_bytes(b"pickled")


def without_a_shard(folder: Path) -> None:
    in_shards(folder, 3)
    for name in (INDEX, "model-00002-of-00003.safetensors"):
        (folder / name).unlink()


def as_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000\n")


def with_a_head_of_its_own(folder: Path) -> None:
    change_tensors(folder, lm_head__weight=torch.zeros_like(load_file(folder / WEIGHTS)["model.embed_tokens.weight"]))


def without_head(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)


def with_other_ids(folder: Path) -> None:
    edit_json(folder / "config.json", image_token_id=5)


def with_smaller_vocabulary(folder: Path) -> None:
    rows = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change_tensors(folder, model__embed_tokens__weight=rows[:320].clone())


def in_hub_cache(folder: Path) -> None:
    inside = folder / "snapshots" / "0a1b"
    inside.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inside / path.name)


def twice(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, **{f"ema.{name}": tensor.clone() for name, tensor in tensors.items()}}, folder / WEIGHTS)


def another_save_beside(folder: Path) -> None:
    in_shards(folder)
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / "model-00001-of-00003.safetensors")
    weight_map = read(folder / INDEX)["weight_map"]
    edit_json(folder / INDEX, weight_map={**weight_map, "extra": "model-00001-of-00003.safetensors"})


REFUSED = {
    "GPTQ": (
        lambda f: quantise(f, "gptq", torch.int32, name="model.layers.0.mlp.up_proj.qweight", scale="scales"),
        "holds quantised weights (gptq, model.layers.0.mlp.up_proj.",
    ),
    "bitsandbytes": (
        lambda f: quantise(f, "bitsandbytes", torch.uint8, scale="weight.absmax"),
        "holds quantised weights (bitsandbytes, ",
    ),
    "FP8": (
        lambda f: quantise(f, "fp8", torch.float8_e4m3fn, scale="weight_scale_inv"),
        "(fp8, model.layers.0.mlp.up_proj.weight is F8_E4M3): give --model-dir the model in 16 or 32 bit that it was",
    ),
    "adapters alone": (adapters_alone, 'it holds LoRA adapters alone, merge them first: python -c "import peft'),
    "adapters and a configuration": (adapters_beside_config, "from_pretrained('Qwen/Qwen2-VL-2B-Instruct', torch_dty"),
    "adapters not merged": (
        lambda f: rename(f, lambda n: n.replace("up_proj.weight", "up_proj.base_layer.weight")),
        "holds adapters that are not merged, such as model.layers.",
    ),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle, which is not read; write safetensors with python -c"),
    "DeepSpeed": (as_deepspeed, "python zero_to_fp32.py . MERGED --safe_serialization"),
    "no index and a shard gone": (without_a_shard, "that are not there (model-00002-of-00003)"),
    "a cut file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged ("),
    "a pointer for weights": (lambda f: as_pointer(f, WEIGHTS), f"git-lfs pointers in place of {WEIGHTS}: git -C"),
    "a pointer for config.json": (
        lambda f: as_pointer(f, "config.json"),
        "config.json is a git-lfs pointer, not the file: git -C",
    ),
    "a tower left out": (lambda f: change_tensors(f, "visual."), "a frozen vision tower was left out of the save"),
    "one tensor left out": (
        lambda f: change_tensors(f, "model.norm"),
        "lacks 1 of the model's 70 tensors (model.norm.",
    ),
    "a tensor too many": (lambda f: change_tensors(f, score__weight=torch.ones(2)), "no place for (score.weight)"),
    "two models": (twice, ": keep the tensors of one model"),
    "a head of its own": (with_a_head_of_its_own, "holds a lm_head.weight of its own, which tie_word_embeddings of"),
    "no head": (without_head, "lacks lm_head.weight, and config.json does not say tie_word_embeddings: set it to true"),
    "another tokenizer": (
        with_other_ids,
        "has <|image_pad|> as 357, image_token_id of config.json is 5: copy tokenizer",
    ),
    "a larger tokenizer": (with_smaller_vocabulary, "has 359 tokens, the weights have 320: copy tokenizer.json"),
    "another depth": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "holds 3 layers, num_hidden_"),
    "no mrope": (
        lambda f: edit_json(f / "config.json", rope_scaling=None),
        "has the mrope_section None in rope_scaling",
    ),
    "a text for a number": (
        lambda f: edit_json(f / "config.json", rms_norm_eps="1e-6"),
        "has rms_norm_eps '1e-6', where",
    ),
    "a number that is too large": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=2**63),
        "has rms_norm_eps 9223372036854775808, where 1e-05 is usual: get the file again",
    ),
    "the cache's own folder": (in_hub_cache, "source/snapshots/0a1b"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "the tokenizer of "),
    "other pixels": (
        lambda f: edit_json(f / PROCESSOR, do_normalize=False),
        "has do_normalize False, but DCT tokens need",
    ),
    "pixels of 0..255": (lambda f: edit_json(f / PROCESSOR, image_mean=[127.5] * 3), "which are not of pixels in 0..1"),
    "shards of two saves": (
        another_save_beside,
        "is in model-00001-of-00002.safetensors and in model-00001-of-0000",
    ),
    "another model": (
        lambda f: edit_json(f / "config.json", model_type="qwen2_5_omni"),
        "model_type 'qwen2_5_omni', only",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name, copy_of, tmp_path, one_line_error):
    change, said = REFUSED[name]
    change(copy_of)
    assert convert(copy_of, tmp_path / "x4") == 1
    line = one_line_error()
    assert line.startswith("convert_checkpoint.py: ") and said in line and str(copy_of) in line
    assert os.listdir(tmp_path) == ["source"]


# Directories that training or evaluation is given as they are


RAW = {name: CASES[name] for name in (
    "a PEFT merge that kept its prefix", "transformers 4.57", "a list of special tokens", "attention of no package",
    "no chat template", "a byte order mark", "a quantisation that is undone", "settings that cannot be saved",
)}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_training_refuses_what_transformers_does_not_read(name, copy_of, tmp_path, one_line_error, answer):
    """And the command that the line names makes it readable."""
    RAW[name][0](copy_of)
    with pytest.raises(CheckpointError) as caught:
        check_directory(copy_of)
    line = str(caught.value)
    assert "\n" not in line and str(copy_of) in line
    assert f"python convert_checkpoint.py --to stock --model-dir {copy_of} --output-dir {copy_of}-stock" in line
    assert convert(copy_of, Path(f"{copy_of}-stock"), "--to", "stock") == 0
    check_directory(Path(f"{copy_of}-stock"))


@pytest.mark.parametrize("name", ["a PEFT merge that kept its prefix", "one tensor left out", "no chat template"])
def test_check_refuses_a_converted_directory(name, converted, tmp_path, one_line_error):
    folder = Path(shutil.copytree(converted("x4"), tmp_path / "x4"))
    {**CASES, **REFUSED}[name][0](folder)
    command = ["--model-dir", str(folder), "--data-dir", "no", "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main(command) == 1
    line = one_line_error()
    assert line.startswith("finetune_qwen2vl.py: ") and str(folder) in line
    assert line.endswith(f"python convert_checkpoint.py --model-dir QWEN2_VL --output-dir {folder} --force")


def test_an_earlier_conversion_is_told_to_convert_again(converted, tmp_path, capsys):
    folder = Path(shutil.copytree(converted("x4"), tmp_path / "x4"))
    edit_json(folder / PROCESSOR, auto_map={"AutoImageProcessor": "dct_tokenizer.DCTImageProcessor"})
    command = ["--model-dir", str(folder), "--data-dir", "no", "--engine", "automodel", "--check"]
    assert finetune_qwen2vl.main(command) == 1  # there is no data
    assert f"Note: {folder} was converted by an earlier version: transformers after 4.51" in capsys.readouterr().out
    assert convert(folder, tmp_path / "stock", "--to", "stock") == 0
    command[1] = str(converted("x4"))
    finetune_qwen2vl.main(command)
    assert "earlier version" not in capsys.readouterr().out


# The rest of what a source says


@pytest.mark.parametrize("name", ["exact", "x4"])
def test_mean_and_std_of_the_source(name, copy_of, tmp_path, natural_frames):
    """The step-0 model computes what the pixel model does with its own normalisation, and so does the stock form."""
    mean, std = [0.5, 0.45, 0.4], [0.5, 0.4, 0.3]
    edit_json(copy_of / PROCESSOR, image_mean=mean, image_std=std)
    assert convert(copy_of, tmp_path / name, "--dct", name) == 0
    assert convert(tmp_path / name, tmp_path / "stock", "--to", "stock") == 0
    assert convert(tmp_path / "stock", tmp_path / "back", "--to", "dct") == 0
    settings = read(tmp_path / name / PROCESSOR)
    assert (settings["image_mean"], settings["image_std"]) == (mean, std)
    assert (settings["dct"]["mean"], settings["dct"]["std"]) == (mean, std)
    assert read(tmp_path / "back" / PROCESSOR) == settings
    # A flat image and smooth content of which downscaling loses nothing.
    image = np.full((112, 112, 3), (200, 90, 30), np.uint8) if name == "x4" else natural_frames(1, 112, 112)[0]
    towers = {}
    for folder in (tmp_path / name, tmp_path / "stock", *([copy_of] if name == "exact" else [])):
        inputs = load_processor(folder).image_processor(images=[image], return_tensors="pt")
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
        with torch.no_grad():
            towers[folder] = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    ours, *others = towers.values()
    for theirs in others:
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_sound_qwen2_5_vl_of_newer_versions(qwen2_5_vl_directory, tmp_path):
    folder = Path(shutil.copytree(qwen2_5_vl_directory, tmp_path / "source"))
    as_transformers_5(folder)
    assert convert(folder, tmp_path / "x4") == 0
    check_directory(tmp_path / "x4")
    assert convert(qwen2_5_vl_directory, tmp_path / "clean") == 0
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("x4", "clean"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    old, new = (read(tmp_path / name / "config.json") for name in ("clean", "x4"))
    assert new["rope_scaling"]["mrope_section"] == old["rope_scaling"]["mrope_section"]
    assert new["vision_config"]["window_size"] == old["vision_config"]["window_size"]


@pytest.mark.parametrize("name", ["transformers 5"])
def test_training_and_evaluation_start_on_what_was_converted(name, prepared, tmp_path):
    source = Path(shutil.copytree(prepared.pixel_model, tmp_path / "source"))
    CASES[name][0](source)
    assert convert(source, tmp_path / "x4") == 0
    options = ["--data-dir", str(prepared.shards), "--output-dir", str(tmp_path / "runs"), "--experiment-name", "e"]
    steps = ["--max-steps", "2", "--val-interval", "2", "--val-batches", "1", "--micro-batch-size", "2"]
    command = ["--model-dir", str(tmp_path / "x4"), *options, *steps, "--global-batch-size", "2", "--num-workers", "0"]
    run([sys.executable, "finetune_qwen2vl.py", *command, "--engine", "automodel"])
    trained = tmp_path / "runs" / "e" / "hf"
    evaluation = [
        "--model-dir",
        str(trained),
        "--data-dir",
        str(prepared.shards),
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
    ]
    run([sys.executable, "evaluate_qwen2vl.py", *evaluation, "--output-dir", str(tmp_path / "evaluation")])
    assert (tmp_path / "evaluation" / "predictions.jsonl").is_file()
