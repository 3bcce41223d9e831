"""Hugging Face's Qwen2-VL over kept cells: as transformers where nothing is skipped, else against plain arithmetic."""

import math

import numpy as np
import pytest
import torch
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from dct_qwen2vl.data.kept_cells import embed_media, find_positions, given_positions, kept_by_medium, visual_features
from dct_qwen2vl.data.positions import vision_positions
from dct_qwen2vl.data.samples import QwenBatch
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import QwenTaskEncoder

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.fixture(scope="module")
def model(converted) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(converted("x4")).eval()


@pytest.fixture(scope="module")
def new_batch(converted, natural_frames, image_file, video_file):
    """new_batch(skip_db): an image beside a video in which a corner moves, then text alone."""
    processor = DCTImageProcessor.from_pretrained(converted("x4"))
    tokenizer = AutoTokenizer.from_pretrained(converted("x4"))
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
        encoder = QwenTaskEncoder(tokenizer, processor)
        return encoder.batch([encoder.encode(conversation) for conversation in conversations[:samples]])

    return make


@torch.no_grad()
def test_logits_are_those_of_transformers_where_nothing_is_skipped(model, new_batch):
    expected = model(**new_batch(None).model_inputs()).logits
    assert torch.equal(model(**embed_media(model, new_batch(math.inf).model_inputs())).logits, expected)


def test_steps_that_keep_some_or_nothing(new_batch):
    batch = new_batch(30.0)
    assert batch.video_grid_thw.tolist() == [[6, 4, 6]] and batch.image_kept.tolist() == [True, False, False, True]
    assert batch.video_kept.view(6, 6).sum(1).tolist() == [6, 0, 0, 1, 0, 0]
    assert batch.video_kept.view(6, 2, 3)[3, 0, 2]


@torch.no_grad()
def test_features_are_those_of_the_stock_tower_with_positions_by_hand(model, new_batch, monkeypatch):
    """Its attention runs over rows x columns of each step: steps of 1 x n tokens are the kept ones."""
    batch, visual = new_batch(30.0), model.visual
    found = visual_features(visual, batch.pixel_values_videos, batch.video_grid_thw, batch.video_kept)
    moved = [[0, 4], [0, 5], [1, 4], [1, 5]]  # row and column of the four tokens of the cell that moves
    positions = torch.tensor([*vision_positions((1, 4, 6), 2).tolist(), *moved])
    monkeypatch.setattr(visual, "rot_pos_emb", lambda grid: visual.rotary_pos_emb(6)[positions].flatten(1))
    expected = visual(batch.pixel_values_videos, grid_thw=torch.tensor([[1, 1, 24], [1, 1, 4]]))
    assert torch.equal(found, expected) and len(found) == 7


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
        assert torch.equal(inputs["inputs_embeds"][batch.input_ids == pad], features)
    text = batch.input_ids < model.config.vision_start_token_id
    assert torch.equal(inputs["inputs_embeds"][text], model.get_input_embeddings()(batch.input_ids[text]))


def test_gradients_reach_the_tower(model, new_batch):
    model(**embed_media(model, new_batch(30.0).model_inputs())).logits.sum().backward()
    assert model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("skip_db", [30.0, math.inf])
def test_positions_found_are_those_of_the_task_encoder(model, new_batch, skip_db):
    batch, pads = new_batch(skip_db), {model.config.image_token_id, model.config.video_token_id}
    masks = [
        *kept_by_medium(batch.image_grid_thw, batch.image_kept, 2),
        *kept_by_medium(batch.video_grid_thw, batch.video_kept, 2),
    ]
    media = iter([(mask.shape, mask) for mask in masks])
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
    expected = model.generate(**plain, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY)
    inputs = left_padded(new_batch(math.inf))
    positions = inputs.pop("position_ids")
    with given_positions(model, positions):
        found = model.generate(
            **embed_media(model, inputs), max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
    assert torch.equal(found.sequences, expected.sequences[:, plain["input_ids"].shape[1] :])
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
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
