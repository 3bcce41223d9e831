"""Hugging Face's Qwen2-VL and Qwen2.5-VL over kept cells: as transformers where nothing is skipped, else against plain
arithmetic."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from samples_by_hand import answer, conversation_sample
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from dct_qwen2vl.checkpoints.conversion import convert
from dct_qwen2vl.checkpoints.inspection import time_step
from dct_qwen2vl.data.kept_cells import find_positions, given_positions, kept_by_medium
from dct_qwen2vl.data.media_embedding import embed_media, visual_features
from dct_qwen2vl.data.positions import KeptRun, vision_positions
from dct_qwen2vl.data.samples import QwenBatch
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.dct.configuration_dct import DCTConfig
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import QwenTaskEncoder

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


SAMPLING = VideoSampling(fps=2)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(request, converted, qwen2_5_vl_directory, tmp_path_factory) -> Path:
    """Of a tiny model over x4 tokens."""
    if request.param == "qwen2_vl":
        return converted("x4")
    folder = tmp_path_factory.mktemp("qwen2_5_vl") / "x4"
    convert(qwen2_5_vl_directory, folder, DCTConfig.preset("x4"))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def step_of_time(model) -> float:
    """Between steps of a video."""
    return time_step(model.config.to_dict(), 2, SAMPLING.fps)


@pytest.fixture(scope="module")
def new_batch(folder, step_of_time, natural_frames, image_file, video_file):
    """new_batch(skip_db): an image beside a video in which a corner moves, then text alone."""
    processor, tokenizer = DCTImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    frames = natural_frames(1, 112, 168, 5).repeat(12, axis=0)
    frames[6:, :56, 112:] = 255 - frames[6:, :56, 112:]
    page = np.full((112, 112, 3), 255, np.uint8)
    page[70:100, 70:100] = natural_frames(1, 30, 30)[0]
    media = ("image", image_file(page, "PNG")), ("video", video_file(frames, rate=2))
    conversations = [
        conversation_sample(answer("<image>What is this? <video>Where does it go?", "Left."), *media),
        conversation_sample(answer("What colour is the circle?", "Red.")),
    ]

    def make(skip_db: float | None, samples: int = 2) -> QwenBatch:
        processor.skip_db = skip_db
        encoder = QwenTaskEncoder(tokenizer, processor, video_sampling=SAMPLING, time_step=step_of_time)
        return encoder.batch([encoder.encode(conversation) for conversation in conversations[:samples]])

    return make


@torch.no_grad()
def test_logits_are_those_of_transformers_where_nothing_is_skipped(model, new_batch):
    expected = model(**new_batch(None).model_inputs()).logits
    found = model(**embed_media(model, new_batch(math.inf).model_inputs())).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # images and videos in one call of the tower


def test_steps_that_keep_some_or_nothing(new_batch):
    batch = new_batch(30.0)
    assert batch.video_grid_thw.tolist() == [[6, 4, 6]] and batch.image_kept.tolist() == [True, False, False, True]
    assert batch.video_kept.view(6, 6).sum(1).tolist() == [6, 0, 0, 1, 0, 0]
    assert batch.video_kept.view(6, 2, 3)[3, 0, 2]


@torch.no_grad()
def test_features_are_those_of_masked_attention(model):
    """Each token attends to the kept tokens of its step, and in Qwen2.5-VL to those of its window of 4 x 4 cells."""
    visual, random = model.visual, torch.Generator().manual_seed(3)
    grid, cells = (2, 12, 20), (2, 6, 10)
    kept = torch.rand(cells, generator=random) < 0.4
    kept[0, 0, 0], kept[1, :, 4:8], kept[1, 4:, 8:] = True, False, False  # a window of the second step keeps nothing
    step, row, column = (np.repeat(part, 4) for part in kept.numpy().nonzero())
    windows = torch.tensor(step * 100 + row // 4 * 10 + column // 4)
    positions = torch.from_numpy(vision_positions(grid, 2)[np.repeat(kept.numpy(), 4)])
    floats = visual.patch_embed.proj.weight[0].numel()
    tokens = torch.randn(len(positions), floats, generator=random)
    hidden = visual.patch_embed(tokens)
    angles = visual.rotary_pos_emb(20)[positions].flatten(1).repeat(1, 2)
    for number, block in enumerate(visual.blocks):
        is_full = number in getattr(visual, "fullatt_block_indexes", range(len(visual.blocks)))
        groups = torch.tensor(step) if is_full else windows
        hidden = hidden + attended(block.attn, block.norm1(hidden), angles, groups[:, None] == groups)
        hidden = hidden + block.mlp(block.norm2(hidden))
    found = visual_features(visual, tokens, torch.tensor([grid]), kept.flatten())
    torch.testing.assert_close(found, visual.merger(hidden), rtol=1e-4, atol=1e-4)
    assert len(found) == kept.sum()


def attended(attention, hidden: torch.Tensor, angles: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """seen: bool [N, N]."""
    query, key, value = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
    query, key = (part * angles.cos() + half_turned(part) * angles.sin() for part in (query, key))
    scores = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
    return attention.proj((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))


def half_turned(values: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@torch.no_grad()
def test_a_whole_step_has_its_features_whatever_the_others_keep(model, new_batch):
    whole, kept = new_batch(None), new_batch(30.0)
    expected = model.visual(whole.pixel_values_videos, grid_thw=whole.video_grid_thw)
    found = visual_features(model.visual, kept.pixel_values_videos, kept.video_grid_thw, kept.video_kept)
    torch.testing.assert_close(found[:6], expected[:6])
    assert not torch.allclose(found[6], expected[3 * 6 + 2]), "alone in its step it sees no neighbours"


@torch.no_grad()
def test_features_stand_where_their_ids_stand(model, new_batch):
    batch = new_batch(30.0)
    inputs = embed_media(model, batch.model_inputs())
    assert set(inputs) == {"inputs_embeds", "attention_mask", "position_ids"}
    for pad, tokens, grids, kept in (
        (model.config.image_token_id, batch.pixel_values, batch.image_grid_thw, batch.image_kept),
        (model.config.video_token_id, batch.pixel_values_videos, batch.video_grid_thw, batch.video_kept),
    ):
        features = visual_features(model.visual, tokens, grids, kept)
        torch.testing.assert_close(inputs["inputs_embeds"][batch.input_ids == pad], features, rtol=1e-5, atol=1e-5)
    text = batch.input_ids < model.config.vision_start_token_id
    assert torch.equal(inputs["inputs_embeds"][text], model.get_input_embeddings()(batch.input_ids[text]))


def test_gradients_reach_the_tower(model, new_batch):
    model(**embed_media(model, new_batch(30.0).model_inputs())).logits.sum().backward()
    assert model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("skip_db", [30.0, math.inf])
def test_positions_found_are_those_of_the_task_encoder(model, new_batch, step_of_time, skip_db):
    batch, pads = new_batch(skip_db), {model.config.image_token_id, model.config.video_token_id}
    (image,) = kept_by_medium(batch.image_grid_thw, batch.image_kept, 2)
    (video,) = kept_by_medium(batch.video_grid_thw, batch.video_kept, 2)
    media = iter([KeptRun(image.shape, image), KeptRun(video.shape, video, step_of_time)])
    for ids, mask, expected in zip(batch.input_ids, batch.attention_mask.bool(), batch.position_ids.unbind(1)):
        found = find_positions(ids.numpy(), mask.numpy(), pads, media)
        np.testing.assert_array_equal(found[:, mask], expected[:, mask])
        assert (found[:, ~mask] == 1).all()


def left_padded(batch: QwenBatch) -> dict[str, torch.Tensor]:
    """As questions are asked: padding goes to the left."""
    inputs, shift = batch.model_inputs(), (batch.attention_mask == 0).sum(1).tolist()
    for name, axis in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1)):
        rolled = [row.roll(by, -1) for row, by in zip(inputs[name].unbind(axis), shift)]
        inputs[name] = torch.stack(rolled, dim=axis)
    inputs["position_ids"] = inputs["position_ids"].where(inputs["attention_mask"][None] == 1, 1)
    return inputs


@torch.no_grad()
def test_generation_is_that_of_transformers_where_nothing_is_skipped(model, new_batch):
    plain = left_padded(new_batch(None))
    plain.pop("position_ids")
    if model.config.model_type == "qwen2_5_vl":
        plain["second_per_grid_ts"] = [2 / SAMPLING.fps]
    expected = model.generate(**plain, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY)
    inputs = left_padded(new_batch(math.inf))
    positions = inputs.pop("position_ids")
    with given_positions(model, positions):
        found = model.generate(
            **embed_media(model, inputs), max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
    assert torch.equal(found.sequences, expected.sequences[:, plain["input_ids"].shape[1] :])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
    assert "get_rope_index" not in vars(model), "as it was"


@torch.no_grad()
def test_generation_goes_on_from_the_positions_given(model, new_batch):
    """Against forward passes without a cache, each with all positions."""
    inputs = left_padded(new_batch(30.0))
    positions = inputs.pop("position_ids")
    embedded = embed_media(model, inputs)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    with given_positions(model, positions):
        found = model.generate(**embedded, **options, **GREEDY)
    embeddings, mask = embedded["inputs_embeds"], embedded["attention_mask"]
    for token, logits in zip(found.sequences.unbind(1), found.logits, strict=True):
        whole = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-4, rtol=1e-4)
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(token[:, None])], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        positions = torch.cat([positions, positions.amax((0, 2))[None, :, None].expand(3, -1, 1) + 1], dim=2)
