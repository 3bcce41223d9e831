"""The Megatron model against transformers' Qwen2-VL: weights both ways, losses, logits, gradients, packing.

With a CUDA device and TransformerEngine in bf16 on the layers that training uses; elsewhere in fp32 on the CPU, where
the layers are Megatron-core's plain ones and attention is torch's.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples_by_hand import answer, conversation_sample
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

from dct_qwen2vl.data.samples import IGNORE_INDEX
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import PackingTaskEncoder, QwenTaskEncoder

GPU = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
FORMATS = ("none", "exact", "x4")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Megatron's process groups of a single process. On a CPU nothing is compiled: it would be C++."""
    from megatron.core import parallel_state, tensor_parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("nccl" if GPU else "gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if GPU:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    with contextlib.nullcontext() if GPU else torch.compiler.set_stance("force_eager"):
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def directory(converted, qwen2vl_directory):
    """directory(name of a token format)"""
    return lambda name: qwen2vl_directory if name == "none" else converted(name)


def load_processor(folder, name):
    return (Qwen2VLImageProcessor if name == "none" else DCTImageProcessor).from_pretrained(folder)


def build(folder, dtype: torch.dtype = DTYPE, **options):
    """The Megatron model of an HF directory."""
    from dct_qwen2vl.training.megatron_layouts import load_hf
    from dct_qwen2vl.training.megatron_model import model_config

    hf_config = AutoConfig.from_pretrained(folder)
    if GPU:
        config = model_config(hf_config, 4096, dtype, gradient_accumulation_fusion=False, **options)
    else:
        from megatron_cpu import CPU_OPTIONS, plain_layers

        config = model_config(hf_config, 4096, dtype, plain_layers(), **CPU_OPTIONS, **options)
    model = config.configure_model().to(DEVICE, dtype)
    load_hf(model, hf_config, folder)
    return model


@pytest.fixture(scope="module")
def entries(natural_frames, image_file, video_file) -> dict:
    """Conversations of every kind, by name."""
    images = [image_file(natural_frames(1, 112, 168, seed)[0], "PNG") for seed in range(3)]
    video = video_file(natural_frames(8, 112, 112, 5))
    two = {
        "conversations": [
            *answer("<image>\nHow many squares?", "Three squares.")["conversations"],
            *answer("Which colour?", "Red and blue.")["conversations"],
        ]
    }
    return {
        "text": (answer("What colour is the circle?", "The circle is red."),),
        "image": (two, ("image", images[0])),
        "video": (answer("<video>Where does it go?", "Left."), ("video", video)),
        "mixed": (
            answer("<image><video>and<image>?", "Three of them."),
            *(("image", images[1]), ("video", video), ("image", images[2])),
        ),
    }


SEQUENCES = {name: (name,) for name in ("text", "image", "video", "mixed")} | {
    "all in one sequence": ("text", "image", "video", "mixed", "image", "text")
}


def encode(encoder, entries, names):
    return [
        encoder.encode(conversation_sample(*entries[name], key=f"{number}.{name}")) for number, name in enumerate(names)
    ]


def packing_encoder(folder, name, dtype=DTYPE) -> PackingTaskEncoder:
    processor = load_processor(folder, name)
    return PackingTaskEncoder(
        AutoTokenizer.from_pretrained(folder),
        processor,
        pack_tokens=4096,
        pack_vision_tokens=8192,
        token_dtype=dtype,
        seq_length=4096,
    )


def reference(folder, name, samples, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """transformers: logits [T, vocabulary] at the learned positions and losses [T], one sample after the other."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(folder), load_processor(folder, name), seq_length=4096)
    logits, losses = [], []
    for sample in samples:
        batch = encoder.batch([sample])
        inputs = {key: value.to(DEVICE) for key, value in batch.model_inputs().items()}
        labels = batch.labels[0].to(DEVICE)
        learned = labels != IGNORE_INDEX
        logits.append(model(**inputs, use_cache=False).logits[0, learned].float())
        losses.append(torch.nn.functional.cross_entropy(logits[-1], labels[learned], reduction="none"))
    return torch.cat(logits), torch.cat(losses), model


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def assert_as_near_as_transformers(found, wanted, also_rounded, what: str) -> None:
    """On the CPU equal to fp32 rounding; in bf16 not further from fp32 than transformers' own bf16."""
    bound = max(2.0 * distance(also_rounded, wanted), 2e-3) if GPU else 2e-5
    assert distance(found, wanted) <= bound, f"{what}: {distance(found, wanted):.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_comes_back_bit_for_bit(name, directory, tmp_path):
    from dct_qwen2vl.training.megatron_layouts import save_hf

    folder = directory(name)
    stored = tmp_path / "bf16"
    Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.bfloat16).save_pretrained(stored)
    model = build(stored, torch.bfloat16)
    save_hf(model, AutoConfig.from_pretrained(folder), folder, tmp_path / "out")
    before, after = load_file(stored / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], tensor), key
    again = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    weights = "model.safetensors"
    assert {p.name for p in (tmp_path / "out").iterdir()} - {weights} == {
        p.name for p in folder.iterdir() if p.is_file()
    } - {weights}


@pytest.mark.skipif(not os.environ.get("FULL_SIZE"), reason="two minutes, 18 GB of memory, 9 GB of disk: FULL_SIZE=1")
def test_every_tensor_of_the_2b_model_comes_back_bit_for_bit(converted, tmp_path):
    """With random bits, not-a-numbers among them."""
    from benchmarks.speed.samples import real_config
    from dct_qwen2vl.training.megatron_layouts import save_hf

    folder, hf_config = tmp_path / "2b", real_config(1764)
    shutil.copytree(converted("x4"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    hf_config.save_pretrained(folder)
    with torch.device("meta"):  # tied weights come once
        shapes = {name: p.shape for name, p in Qwen2VLForConditionalGeneration(hf_config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
             for name, shape in shapes.items()}  # fmt: skip
    save_file({name: bits.view(torch.bfloat16) for name, bits in drawn.items()}, folder / "model.safetensors")
    save_hf(build(folder, torch.bfloat16, perform_initialization=False), hf_config, folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(bits.numel() for bits in drawn.values()) > 2.2e9
    assert after.keys() == drawn.keys()
    assert all(torch.equal(after[name].view(torch.int16), bits) for name, bits in drawn.items())


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("name", FORMATS)
def test_logits_and_losses_are_those_of_transformers(name, sequence, directory, entries):
    folder = directory(name)
    encoder = packing_encoder(folder, name)
    samples = encode(encoder, entries, SEQUENCES[sequence])
    with torch.no_grad():
        logits, losses, _ = reference(folder, name, samples, torch.float32)
        rounded = reference(folder, name, samples, DTYPE)
        model, batch = build(folder).eval(), encoder.make_sequence(samples).to(DEVICE)
        assert_as_near_as_transformers(model(batch, return_logits=True), logits, rounded[0], "logits")
        found = model(batch)
    assert found.shape == losses.shape
    assert_as_near_as_transformers(found, losses, rounded[1], "losses")


def test_a_tower_keeps_its_own_activation(directory, entries, tmp_path):
    """The exact GELU, as in towers that started from DINOv2. It moves these logits far more than rounding does."""
    from dct_qwen2vl.training.checks import TOWER_ACTIVATIONS
    from dct_qwen2vl.training.megatron_model import BIASED_ACTIVATIONS

    assert set(BIASED_ACTIVATIONS) == set(TOWER_ACTIVATIONS)
    folder = tmp_path / "gelu"
    shutil.copytree(directory("x4"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    encoder = packing_encoder(folder, "x4")
    samples = encode(encoder, entries, ("image",))
    with torch.no_grad():
        logits, _, _ = reference(folder, "x4", samples, torch.float32)
        rounded, _, _ = reference(folder, "x4", samples, DTYPE)
        quick, _, _ = reference(directory("x4"), "x4", samples, torch.float32)
        found = build(folder).eval()(encoder.make_sequence(samples).to(DEVICE), return_logits=True)
    assert distance(quick, logits) > (1e-4 if not GPU else 1e-3)
    assert_as_near_as_transformers(found, logits, rounded, "logits")


def test_skipped_cells_give_the_logits_of_transformers_over_kept_cells(directory, natural_frames, video_file, entries):
    """A video in which one corner moves, once: two steps of five keep nothing, one keeps a cell."""
    from dct_qwen2vl.data.media_embedding import embed_media

    folder, frames = directory("x4"), natural_frames(1, 112, 168, 5).repeat(10, axis=0)
    frames[6:, :56, 112:] = 255 - frames[6:, :56, 112:]
    video = (answer("<video>Where does it go?", "Left."), ("video", video_file(frames, rate=2)))
    encoder = packing_encoder(folder, "x4")
    encoder.image_processor.skip_db = 30.0
    samples = encode(encoder, {**entries, "still": video}, ("image", "still", "text"))
    sequence = encoder.make_sequence(samples)
    assert (
        sequence.step_starts.diff().tolist()[-2:] == [24, 4]
        and len(sequence.step_grids()) == len(sequence.step_starts) - 1
    )
    hf = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).to(DEVICE)
    wanted = []
    with torch.no_grad():
        for sample in samples:
            batch = QwenTaskEncoder.batch(encoder, [sample])
            inputs = {name: value.to(DEVICE) for name, value in batch.model_inputs().items()}
            logits = hf(**embed_media(hf, inputs), use_cache=False).logits
            wanted.append(logits[0, batch.labels[0].to(DEVICE) != IGNORE_INDEX].float())
        found = build(folder).eval()(sequence.to(DEVICE), return_logits=True)
    assert distance(found, torch.cat(wanted)) < (2e-2 if GPU else 1e-5)


# One parameter per part, by its name in the checkpoint.
GRADIENTS = (
    "visual.patch_embed.proj.weight",
    "visual.blocks.1.attn.qkv.weight",
    "visual.blocks.0.norm1.weight",
    "visual.blocks.0.mlp.fc1.bias",
    "visual.merger.ln_q.weight",
    "visual.merger.mlp.0.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
)


def gradients_of(model, hf_config) -> dict[str, torch.Tensor]:
    """The Megatron model's gradients under the names of the checkpoint."""
    from dct_qwen2vl.training.megatron_weights import from_megatron, sources_of

    found = {}
    for name, source in sources_of(model, hf_config).items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None, f"{name} has no gradient"
        for hf_name, tensor in zip(source.names, from_megatron(source, [parameter.grad])):
            found[hf_name] = tensor
    return found


@pytest.mark.parametrize("sequence", ["text", "all in one sequence"])
@pytest.mark.parametrize("name", ["exact", "x4"])
def test_gradients_are_those_of_transformers(name, sequence, directory, entries):
    folder = directory(name)
    encoder = packing_encoder(folder, name)
    samples = encode(encoder, entries, SEQUENCES[sequence])
    wanted, rounded = {}, {}
    for store, dtype in ((wanted, torch.float32), (rounded, DTYPE)):
        _, losses, model = reference(folder, name, samples, dtype)
        losses.mean().backward()
        store.update({key: parameter.grad for key, parameter in model.named_parameters()})
    model = build(folder)
    model(encoder.make_sequence(samples).to(DEVICE)).mean().backward()
    found = gradients_of(model, AutoConfig.from_pretrained(folder))
    for key in GRADIENTS:
        if sequence == "text" and key.startswith("visual"):
            assert not found[key].any(), f"{key} learns from a blank image"
        else:
            pair = wanted[key].reshape(found[key].shape), rounded[key].reshape(found[key].shape)
            assert_as_near_as_transformers(found[key], *pair, key)


def test_no_token_sees_another_sample(directory, entries):
    """Other text, another image, another video before and behind: not one bit of a sample's losses changes."""
    folder = directory("x4")
    encoder = packing_encoder(folder, "x4")
    image, video, mixed = encode(encoder, entries, ("image", "video", "mixed"))
    model = build(folder).eval()

    def losses(*samples):
        with torch.no_grad():
            found = model(encoder.make_sequence(list(samples)).to(DEVICE))
        return found.split([int((sample.labels != IGNORE_INDEX).sum()) for sample in samples])

    changed = encoder.encode(conversation_sample(*entries["mixed"], key="changed"))
    changed.pixel_values, changed.pixel_values_videos = -changed.pixel_values, changed.pixel_values_videos * 0.5
    changed.input_ids = torch.where(changed.labels == IGNORE_INDEX, changed.input_ids, changed.input_ids.roll(1))
    before = losses(mixed, image, video, mixed)
    after = losses(changed, image, video, changed)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[3], after[3])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_mrope_angles_are_those_of_transformers(directory, entries):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_multimodal_rotary_pos_emb

    from dct_qwen2vl.training.megatron_model import mrope_frequencies, rotate

    config = AutoConfig.from_pretrained(directory("none"))
    positions = torch.randint(0, 3000, (3, 50), generator=torch.Generator().manual_seed(1))
    query = torch.randn(1, 2, 50, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = Qwen2VLRotaryEmbedding(config)(query, positions[:, None])
    sections = config.rope_scaling["mrope_section"]
    wanted, _ = apply_multimodal_rotary_pos_emb(query, query, cos, sin, sections)
    frequencies = mrope_frequencies(positions, 32, config.rope_theta, sections)
    found = rotate(query.permute(2, 0, 1, 3), frequencies).permute(1, 2, 0, 3)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_weights_of_another_shape_are_refused(directory, tmp_path):
    from dct_qwen2vl.training.megatron_layouts import load_hf

    model = build(directory("x4"))
    with pytest.raises(ValueError, match=r"visual\.patch_embed\.proj\.weight makes"):
        load_hf(model, AutoConfig.from_pretrained(directory("x4")), directory("exact"))
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        load_hf(model, AutoConfig.from_pretrained(directory("x4")), tmp_path)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain rows", "plain columns", "gated", "qkv", "fused_qkv"])
def test_parts_of_tensor_parallel_processes_make_the_whole_again(kind, size):
    from dct_qwen2vl.training.megatron_weights import Source, from_megatron, to_megatron

    heads, groups, width, hidden = 8, 4, 6, 16
    axis = {"plain columns": 1}.get(kind, 0)
    source = Source(("a", "b", "c"), axis, kind.split()[0], heads, heads if kind == "fused_qkv" else groups)
    shapes = {
        "plain rows": [(32, hidden)],
        "plain columns": [(hidden, 32)],
        "gated": [(32, hidden)] * 2,
        "qkv": [(heads * width, hidden), (groups * width, hidden), (groups * width, hidden)],
        "fused_qkv": [(3 * heads * width, hidden)],
    }[kind]
    tensors = [torch.randn(shape) for shape in shapes]
    parts = [to_megatron(source, tensors, rank, size) for rank in range(size)]
    assert all(part.numel() * size == sum(t.numel() for t in tensors) for part in parts)
    for found, wanted in zip(from_megatron(source, parts), tensors, strict=True):
        assert torch.equal(found, wanted)


def test_a_query_group_holds_its_queries_then_its_key_and_value():
    from dct_qwen2vl.training.megatron_weights import Source, to_megatron

    query, key, value = torch.arange(4.0)[:, None], torch.arange(10.0, 12)[:, None], torch.arange(20.0, 22)[:, None]
    found = to_megatron(Source(("q", "k", "v"), 0, "qkv", heads=4, groups=2), [query, key, value])
    assert found.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def build_with_adapters(folder, monkeypatch, **options):
    """As the engine builds it, but in DTYPE: rank 4, the language model's own weights frozen."""
    from dct_qwen2vl.training.lora import LoRA
    from dct_qwen2vl.training.megatron_lora import adapt_megatron

    if not GPU:  # NeMo takes mocks for its classes then
        monkeypatch.setattr("nemo.collections.llm.peft.utils.HAVE_TE", False)
    model = build(folder, **options)
    model.language_model.requires_grad_(False)
    adapt_megatron(model, LoRA(rank=4, alpha=8, seed=1))
    return model


def draw_adapters(model) -> None:
    """Other values than the zeros that B begins with."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".linear_out." in name:
            torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator(DEVICE).manual_seed(number))


def test_adapters_change_nothing_at_first_and_learn_beside_the_vision_tower(directory, entries, monkeypatch):
    folder = directory("x4")
    encoder = packing_encoder(folder, "x4")
    batch = encoder.make_sequence(encode(encoder, entries, SEQUENCES["mixed"])).to(DEVICE)
    model = build_with_adapters(folder, monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(batch, return_logits=True), build(folder)(batch, return_logits=True))
    draw_adapters(model)
    model(batch).mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {name for name in learns if ".adapter." in name}
    assert len(adapters) == 2 * 4 * model.config.language_transformer_config.num_layers
    assert learns - adapters == {name for name, _ in model.named_parameters() if name.startswith("vision_")}
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in adapters)


def test_the_exported_model_has_the_adapters_merged(directory, entries, monkeypatch, tmp_path):
    from dct_qwen2vl.training.megatron_layouts import save_hf

    folder = directory("x4")
    encoder = packing_encoder(folder, "x4")
    samples = encode(encoder, entries, SEQUENCES["all in one sequence"])
    model = build_with_adapters(folder, monkeypatch).eval()
    draw_adapters(model)
    save_hf(model, AutoConfig.from_pretrained(folder), folder, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    with torch.no_grad():
        batch = encoder.make_sequence(samples).to(DEVICE)
        found = model(batch, return_logits=True).float()
        logits, _, _ = reference(tmp_path / "out", "x4", samples, torch.float32)
        assert distance(found, logits) < (5e-2 if GPU else 2e-5)
        assert distance(build(folder)(batch, return_logits=True), logits) > 0.1
    again = build_with_adapters(folder, monkeypatch).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch, return_logits=True).float(), found)


def test_adapters_learn_behind_recomputed_layers_and_a_frozen_tower(directory, entries, monkeypatch):
    if not GPU:
        for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
            monkeypatch.setattr(f"megatron.core.tensor_parallel.random.{name}", lambda *unused, **options: None)
    folder = directory("x4")
    encoder = packing_encoder(folder, "x4")
    batch = encoder.make_sequence(encode(encoder, entries, SEQUENCES["image"])).to(DEVICE)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    gradients = []
    for options in ({}, recompute):
        model = build_with_adapters(folder, monkeypatch, **options).train()
        model.vision_model.requires_grad_(False)
        model.vision_projection.requires_grad_(False)
        draw_adapters(model)
        model(batch).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if ".adapter." in name})
    for name, gradient in gradients[0].items():
        assert gradient.any() and distance(gradients[1][name], gradient) < (2e-2 if GPU else 1e-6), name


os.environ.setdefault("TORCH_COMPILE_DISABLE", "0" if GPU else "1")  # small graphs on a CPU are not worth compiling
