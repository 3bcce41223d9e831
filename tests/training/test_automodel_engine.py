"""The automodel engine's step: whose mean the gradient is."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from gradient_process import ANSWERS, gradient_of_a_step
from pipeline import run
from torch.nn import functional


@pytest.fixture(scope="module")
def in_one(converted, tmp_path_factory) -> torch.Tensor:
    """The gradient of one micro-batch of all samples."""
    return gradient_of_a_step(converted("x4"), tmp_path_factory.mktemp("one"), len(ANSWERS))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("per_micro_batch", [1, 2])
def test_the_gradient_is_the_mean_over_the_tokens_of_all_micro_batches(per_micro_batch, in_one, converted, tmp_path):
    found = gradient_of_a_step(converted("x4"), tmp_path, per_micro_batch)
    assert relative_difference(found, in_one) < 1e-5


def test_the_gradient_is_that_of_the_model_s_own_mean_loss(in_one, converted):
    """transformers' loss over one batch without media is the mean over its learned tokens."""
    from samples_by_hand import answer, conversation_sample
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import QwenTaskEncoder

    folder = converted("x4")
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(folder), DCTImageProcessor.from_pretrained(folder))
    batch = encoder.batch([encoder.encode(conversation_sample(answer("What is there?", text))) for text in ANSWERS])
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).train()
    labels = torch.nn.functional.pad(batch.labels[:, :-1], (1, 0), value=-100)
    model(**batch.model_inputs(), labels=labels).loss.backward()
    own = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert relative_difference(in_one[-len(own) :], own) < 1e-5
    assert not in_one[: -len(own)].any()  # of the vision tower, which comes first and has seen a blank image


@pytest.mark.parametrize("skip_db", [math.inf, 30.0])
def test_the_model_reads_kept_cells(skip_db, converted, natural_frames, video_file):
    """With nothing skipped the logits are those without skipping, bit for bit."""
    from samples_by_hand import answer, conversation_sample
    from transformers import AutoTokenizer

    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.log import count_tokens
    from task_encoder import QwenTaskEncoder

    folder, video = converted("x4"), video_file(natural_frames(1, 112, 112).repeat(8, axis=0), rate=2)
    sample = conversation_sample(answer("<video>What is there?", "A square."), ("video", video))
    module, logits, counts = QwenAutoModel(folder), {}, {}
    module.configure_model()
    for threshold in (None, skip_db):
        processor = DCTImageProcessor.from_pretrained(folder, skip_db=threshold)
        encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(folder), processor)
        batch = encoder.batch([encoder.encode(sample)])
        logits[threshold] = module(batch)
        counts[threshold] = count_tokens(batch, 2)
        steps = batch.step_grids(2).prod(dim=1).tolist()
        assert steps == ([64] if threshold is None else [16] * 4 if threshold == math.inf else [16])
    if skip_db == math.inf:
        assert torch.equal(logits[None], logits[skip_db]) and counts[None] == counts[skip_db]
    else:
        assert logits[skip_db].shape[1] == logits[None].shape[1] - 12
        assert counts[skip_db]["visual_tokens"] == 4 and counts[None]["visual_tokens"] == 16
        assert counts[skip_db]["cells"] == counts[None]["cells"] == 16
        assert counts[skip_db]["text_tokens"] == counts[None]["text_tokens"]


@pytest.mark.launch
def test_the_gradient_is_the_mean_over_the_tokens_of_all_processes(in_one, converted, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).parents[1] / "gradient_process.py")
    run([*launcher, script, str(converted("x4")), str(tmp_path)], OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    for micro_batches in (2, 4):
        found = torch.load(tmp_path / f"{micro_batches}.pt", weights_only=True)
        assert relative_difference(found, in_one) < 1e-5


@pytest.mark.parametrize("preset", ["x4", None], ids=["coefficients", "pixels"])
def test_the_patch_embedding_is_one_matrix_product_that_equals_the_convolution(preset, converted, qwen2vl_directory):
    """Up to the order of a sum, in values and gradients."""
    from transformers import Qwen2VLForConditionalGeneration

    from dct_qwen2vl.training.automodel import QwenAutoModel

    folder = converted(preset) if preset else qwen2vl_directory
    module = QwenAutoModel(folder)
    module.configure_model()
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).visual.patch_embed
    ours = module.model.visual.patch_embed
    tokens = torch.randn(64, stock.proj.weight[0].numel(), generator=torch.Generator().manual_seed(1))
    results = []
    for patches in (ours, stock):
        embedded = patches(tokens)
        embedded.square().sum().backward()
        results.append((embedded.detach(), patches.proj.weight.grad))
    for found, expected in zip(*results):
        assert found.shape == expected.shape and relative_difference(found, expected) < 1e-6


@pytest.fixture(params=["qwen2vl_directory", "qwen2_5_vl_directory"])
def attentions(request) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first block's attention as the engine has it, and transformers' own, with the same weights."""
    from transformers import AutoModelForImageTextToText

    from dct_qwen2vl.training.automodel import QwenAutoModel

    folder = request.getfixturevalue(request.param)
    module = QwenAutoModel(folder)
    module.configure_model()
    stock = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32)
    ours, stock = (model.visual.blocks[0].attn for model in (module.model, stock))
    assert ours.forward.__func__ is not type(ours).forward and stock.forward.__func__ is type(stock).forward
    return ours, stock


def vision_tokens(attention: torch.nn.Module, count: int) -> dict:
    """Drawn arguments of its forward, without where steps begin."""
    generator = torch.Generator().manual_seed(1)
    width = attention.proj.in_features
    angles = torch.rand(count, width // attention.num_heads, generator=generator) * 6
    hidden = torch.randn(count, width, generator=generator).requires_grad_()
    return {"hidden": hidden, "position_embeddings": (angles.cos(), angles.sin())}


@pytest.mark.parametrize("lengths", [[64], [4, 16, 16, 16, 8, 4], [4] * 16], ids=["one step", "media", "a video"])
def test_attention_of_each_step_alone_is_that_behind_transformers_mask(lengths, attentions):
    """In values and gradients, up to rounding."""
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    results = []
    for attention in attentions:
        inputs = vision_tokens(attention, 64)
        hidden = inputs.pop("hidden")
        seen = attention(hidden, cu_seqlens=starts, **inputs)
        seen.square().sum().backward()
        results.append((seen.detach(), hidden.grad, attention.qkv.weight.grad, attention.proj.weight.grad))
    for found, expected in zip(*results):
        assert found.shape == expected.shape and relative_difference(found, expected) < 1e-5


def test_attention_computes_no_pairs_of_different_steps(attentions):
    """16 steps of 4 tokens: the products of pairs are a sixteenth."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    starts = torch.arange(0, 65, 4, dtype=torch.int32)
    counts = []
    for attention in attentions:
        inputs = vision_tokens(attention, 64)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
            attention(inputs.pop("hidden"), cu_seqlens=starts, **inputs)
        linear = 2 * 64 * (attention.qkv.weight.numel() + attention.proj.weight.numel())
        counts.append(counter.get_total_flops() - linear)
    assert 0 < counts[0] * 16 == counts[1]


@pytest.fixture
def engine(converted):
    """The engine with its model. PyTorch's choice of attention is restored afterwards."""
    from dct_qwen2vl.training.automodel import QwenAutoModel

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    engine = QwenAutoModel(converted("x4"))
    engine.configure_model()
    yield engine
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_training_does_without_the_attention_of_cudnn(engine):
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
def test_gradients_of_low_scores_are_finite_on_a_gpu(engine, tokens):
    """Scores near -100. Of 64 and of 192, cuDNN's attention (PyTorch 2.11, an H200) makes gradients that are nan."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 16, tokens, 80, device="cuda", dtype=torch.bfloat16).unbind()
    query[..., 0], key[..., 0] = (100 * 80**0.5) ** 0.5, -((100 * 80**0.5) ** 0.5)
    parts = [part.requires_grad_() for part in (query, key, value)]
    functional.scaled_dot_product_attention(*parts).sum().backward()
    assert all(part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize("numbers", [1764, 1176, 15])
def test_zeros_up_to_a_multiple_of_eight_numbers_change_nothing(numbers):
    """Whole numbers leave no rounding. The weight keeps its shape, and so does its gradient."""
    from dct_qwen2vl.training.patch_embedding import GRAIN, PatchEmbedding, product_with_zeros

    generator = torch.Generator().manual_seed(1)
    tokens, upstream = (torch.randint(-8, 9, (24, size), generator=generator).float() for size in (numbers, 40))
    patches = PatchEmbedding(numbers, 40, bias=False)
    torch.nn.init.trunc_normal_(patches.weight.data, std=20).round_()
    results = []
    for product in (product_with_zeros, lambda inputs, weight: torch.nn.functional.linear(inputs, weight)):
        found = product(tokens, patches.weight)
        (gradient,) = torch.autograd.grad(found, patches.weight, upstream)
        results.append((found, gradient))
    for found, expected in zip(*results):
        assert torch.equal(found, expected)
    assert results[0][1].shape == (40, numbers) and GRAIN == 8
    assert torch.equal(patches(tokens.double()), results[1][0])


def test_the_model_at_the_end_has_the_data_types_that_it_began_with(converted, tmp_path):
    """A checkpoint on the way has float32, which training goes on from."""
    from safetensors.torch import load_file, save_file

    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.automodel_weights import dtypes_of

    folder = Path(shutil.copytree(converted("x4"), tmp_path / "model"))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["visual.patch_embed.proj.weight"] = tensors["visual.patch_embed.proj.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    module = QwenAutoModel(folder)
    module.configure_model()
    module.export_hf(tmp_path / "hf")
    module.save_hf(tmp_path / "checkpoint")
    exported, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "checkpoint"))
    assert exported.keys() == kept.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    assert dtypes_of(tmp_path / "hf") == {name: tensor.dtype for name, tensor in tensors.items()}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
