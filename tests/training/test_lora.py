"""Adapters in the Hugging Face model, their merging and their first values; the Megatron model's are tested with it."""

import pytest
import torch
from nemo import lightning as nl
from safetensors.torch import load_file
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import QwenTaskEncoder


@pytest.fixture(scope="module")
def batch(converted, natural_frames, image_file):
    """One image, one question."""
    folder = converted("x4")
    encoder = QwenTaskEncoder(AutoTokenizer.from_pretrained(folder), DCTImageProcessor.from_pretrained(folder))
    image = image_file(natural_frames(1, 112, 168, 1)[0], "PNG")
    entry = answer("<image>\nWhat colour is the circle?", "The circle is red.")
    return encoder.batch([encoder.encode(conversation_sample(entry, ("image", image)))])


def build(folder, rank: int = 4, seed: int = 1):
    """The automodel engine's module with its model; rank 0: without adapters."""
    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.lora import LoRA

    module = QwenAutoModel(folder, lora=LoRA(rank, 8, seed) if rank else None)
    module.configure_model()
    return module.eval()


def draw_adapters(module) -> None:
    """Other values than the zeros that B begins with."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if ".lora_b." in name:
            torch.nn.init.normal_(parameter.data, std=0.05, generator=generator)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


def test_step_0_is_the_model_without_adapters(converted, batch):
    assert torch.equal(logits(build(converted("x4")), batch), logits(build(converted("x4"), rank=0), batch))


def test_adapters_and_vision_tower_learn_and_the_language_model_stays(converted, batch):
    module = build(converted("x4"))
    draw_adapters(module)
    module.trainer = nl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.training_step(batch, 0)["loss"].backward()
    learns = {name.removeprefix("model.") for name, weight in module.named_parameters() if weight.grad is not None}
    layers = module.model.config.num_hidden_layers
    assert len([name for name in learns if ".lora_" in name]) == 2 * 7 * layers
    vision = {name for name, _ in module.model.named_parameters() if name.startswith("visual.")}
    assert {name for name in learns if ".lora_" not in name} == vision


def test_saved_model_computes_what_the_adapted_one_does(converted, batch, tmp_path):
    module = build(converted("x4"))
    draw_adapters(module)
    module.save_hf(tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (converted("x4"), tmp_path / "hf"))
    assert before.keys() == after.keys()
    saved = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        found = saved(**batch.model_inputs()).logits
    wanted = logits(module, batch)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-5
    plain = logits(build(converted("x4"), rank=0), batch)
    assert float((plain - wanted).norm() / wanted.norm()) > 0.1


def test_checkpoint_brings_every_weight_back_bit_for_bit(converted, tmp_path):
    from dct_qwen2vl.training.automodel import FolderCheckpointIO

    module = build(converted("x4"))
    draw_adapters(module)
    state = {name: weight.clone() for name, weight in module.state_dict().items()}
    FolderCheckpointIO(module).save_checkpoint({"state_dict": module.state_dict()}, tmp_path / "step000001")
    fresh = build(converted("x4"), seed=2)
    fresh.load_state_dict(FolderCheckpointIO(fresh).load_checkpoint(tmp_path / "step000001")["state_dict"])
    found = fresh.state_dict()
    assert found.keys() == state.keys()
    assert [name for name in state if not torch.equal(found[name], state[name])] == []
    saved = load_file(tmp_path / "step000001" / "hf" / "model.safetensors")
    assert not torch.equal(saved["model.layers.0.mlp.up_proj.weight"], state["model.model.layers.0.mlp.up_proj.weight"])


def test_a_seed_gives_the_same_adapters_and_another_gives_others(converted):
    from dct_qwen2vl.training.lora import adapters_of

    first, same, other = (adapters_of(build(converted("x4"), seed=seed).state_dict()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name, tensor in first.items():
        if ".lora_b." in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            assert 0.5 < float(tensor.abs().max()) * tensor.shape[1] ** 0.5 <= 1
    everything = torch.stack([tensor.flatten()[:32] for name, tensor in first.items() if ".lora_a." in name])
    assert len(everything.unique(dim=0)) == len(everything), "two layers begin with the same values"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_part_gives_the_part_of_the_whole(dtype):
    from dct_qwen2vl.training.lora import merge

    torch.manual_seed(3)
    weight, a, b = (torch.randn(shape).to(dtype) for shape in ((48, 64), (6, 64), (48, 6)))
    whole = merge(weight, a, b, 2.0)
    assert whole.dtype == dtype
    assert torch.allclose(whole.double(), weight.double() + 2.0 * b.double() @ a.double(), rtol=2.0**-8)
    assert torch.equal(merge(weight[16:32], a, b[16:32], 2.0), whole[16:32])
    assert torch.equal(merge(weight[:, :32], a[:, :32], b, 2.0), whole[:, :32])
