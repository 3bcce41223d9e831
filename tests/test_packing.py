"""Rows of packed samples: which samples share one, and what stands in it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer

from dct_tokenizer import DCTImageProcessor
from packing import PackingTaskEncoder, fit_rows, vision_positions
from task_encoder import IGNORE_INDEX


@pytest.fixture(scope="module")
def encoder(converted) -> PackingTaskEncoder:
    folder = converted("x4")
    processor = DCTImageProcessor.from_pretrained(folder)
    return PackingTaskEncoder(AutoTokenizer.from_pretrained(folder), processor, pack_tokens=400)


@pytest.fixture(scope="module")
def samples(encoder, natural_frames, image_file, clip_file) -> list:
    """Text, one picture, a clip, two pictures and a clip between them."""
    picture = [image_file(natural_frames(1, 112, 168, seed)[0], "PNG") for seed in range(3)]
    clip = clip_file(natural_frames(8, 112, 112, 5))
    made = [
        conversation_sample(answer("What colour is the circle?", "Red."), key="text"),
        conversation_sample(answer("<image>What is this?", "A square."), ("image", picture[0]), key="picture"),
        conversation_sample(answer("<video>Where does it go?", "Left."), ("video", clip), key="clip"),
        conversation_sample(
            answer("<image><video>and<image>?", "Three."),
            *(("image", picture[1]), ("video", clip), ("image", picture[2])),
            key="mixed",
        ),
    ]
    return [encoder.encode(sample) for sample in made]


def test_a_row_holds_its_samples_one_after_the_other(encoder, samples):
    row = encoder.batch(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert row.sample_starts.tolist() == [0, *np.cumsum(lengths)]
    assert row.sample_starts.dtype == row.step_starts.dtype == torch.int32
    assert row.longest_sample == max(lengths) and row.keys == ["text", "picture", "clip", "mixed"]
    for sample, start, stop in zip(samples, row.sample_starts[:-1], row.sample_starts[1:]):
        assert torch.equal(row.input_ids[start:stop], sample.input_ids)
        assert torch.equal(row.position_ids[:, start:stop], sample.position_ids)
        assert sample.position_ids[:, 0].tolist() == [0, 0, 0]


def test_what_is_learned_never_crosses_a_sample(encoder, samples):
    row = encoder.batch(samples)
    assert len(row.learned) == len(row.targets) == sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples)
    assert torch.equal(row.input_ids[row.learned + 1], row.targets)
    ends = set((row.sample_starts[1:] - 1).tolist())
    assert not ends & set(row.learned.tolist())


def test_tokens_come_in_the_order_of_their_placeholders(encoder, samples):
    mixed = samples[3]
    row = encoder.batch([mixed])
    images, clips = mixed.image_grid_thw.tolist(), mixed.video_grid_thw.tolist()
    assert row.grid_thw.tolist() == [images[0], clips[0], images[1]]
    first = int(np.prod(images[0]))
    stored = torch.cat([mixed.pixel_values[:first], mixed.pixel_values_videos, mixed.pixel_values[first:]])
    assert torch.equal(row.tokens, stored.to(torch.bfloat16))
    assert len(row.visual) * encoder.image_processor.merge_size**2 == len(row.tokens) == len(row.token_positions)
    assert set(row.input_ids[row.visual].tolist()) == set(encoder._pad.values())
    time = clips[0][0]
    assert len(row.step_starts) == 1 + 1 + time + 1 and row.step_starts[-1] == len(row.tokens)


def test_a_row_of_text_has_a_blank_picture(encoder, samples):
    row = encoder.batch(samples[:1])
    merge = encoder.image_processor.merge_size
    assert row.tokens.shape == (merge**2, encoder.image_processor.dct_config.num_coefficients)
    assert not row.tokens.any() and row.step_starts.tolist() == [0, merge**2]
    assert len(row.visual) == 0 and row.grid_thw.shape == (0, 3)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 4, 6), (2, 8, 2)])
def test_positions_are_those_of_transformers(grid):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    class Recorder:
        """In place of the rotary table: rot_pos_emb indexes it with the positions."""

        spatial_merge_size = 2

        def rotary_pos_emb(self, size):
            return torch.arange(int(size))[:, None]

    found = Qwen2VisionTransformerPretrainedModel.rot_pos_emb(Recorder(), torch.tensor([grid]))
    assert vision_positions(grid, 2).tolist() == found.tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(10, 60))
def test_rows_hold_every_sample_once_within_the_budget(lengths, budget):
    rows = fit_rows(lengths, budget)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[number] for number in row) <= budget
        assert row == sorted(row)
    fullness = [sum(lengths[number] for number in row) for row in rows]
    small = sorted(full for full in fullness if full <= budget)
    assert len(small) < 2 or small[0] + small[1] > budget  # no two rows would fit in one


def packed_data(prepared, num_workers: int):
    """The data module of the Megatron engine on the prepared set."""
    from data_module import EnergonDataModule

    processor = DCTImageProcessor.from_pretrained(prepared.model)
    encoder = PackingTaskEncoder(AutoTokenizer.from_pretrained(prepared.model), processor, pack_tokens=600)
    return EnergonDataModule(
        prepared.shards,
        encoder,
        micro_batch_size=1,
        global_batch_size=1,
        total_batches=12,
        num_workers=num_workers,
        rank=0,
        world_size=1,
        seed=1,
        packing_buffer_size=16,
    )


def test_energon_packs_a_prepared_set(prepared):
    data = packed_data(prepared, num_workers=0)
    rows = [row for row, _ in zip(data.train_dataloader(), range(12))]
    assert all(row.sample_starts[-1] <= 600 or len(row.keys) == 1 for row in rows)
    assert any(len(row.keys) > 2 for row in rows)
    validation = list(data.val_dataloader())
    keys = [key for row in validation for key in row.keys]
    assert len(keys) == len(set(keys)) > 10


def test_a_packed_loader_goes_on_where_its_state_was_saved(prepared):
    first = packed_data(prepared, num_workers=2)
    rows = iter(first.train_dataloader())
    for _ in range(4):
        next(rows)
    state = first.state_dict()
    expected = [next(rows) for _ in range(5)]
    again = packed_data(prepared, num_workers=2)
    again.load_state_dict(state)
    for row, wanted in zip(again.train_dataloader(), expected):
        assert row.keys == wanted.keys and torch.equal(row.tokens, wanted.tokens)


def test_a_state_of_other_processes_is_refused_unless_data_begin_anew(prepared):
    state = {"energon": [None, None]}
    with pytest.raises(ValueError, match=r"loader states of 2 processes, this run has 1: .* --restart-data"):
        packed_data(prepared, num_workers=0).load_state_dict(state)
    data = packed_data(prepared, num_workers=0)
    data.start_anew = True
    data.load_state_dict(state)
    assert next(iter(data.train_dataloader())).keys
