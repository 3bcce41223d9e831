"""Samples, batches and packed sequences with skipped cells, against the same ones with all cells."""

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer

from dct_qwen2vl.data.media import BadSample
from dct_qwen2vl.data.packing import HeldSamples, PackedBatch
from dct_qwen2vl.data.samples import IGNORE_INDEX, ConversationSample
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import BufferPackingTaskEncoder, PackingTaskEncoder, QwenTaskEncoder

KEPT = ("image_kept", "video_kept")


@pytest.fixture(scope="module")
def new_encoder(converted):
    """new_encoder(skip_db, class, **options): with the x4 processor."""
    folder = converted("x4")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make(skip_db: float | None, encoder_class: type = QwenTaskEncoder, **options) -> QwenTaskEncoder:
        if encoder_class is not QwenTaskEncoder:
            options = {"pack_tokens": 400, "pack_vision_tokens": 800} | options
        return encoder_class(tokenizer, DCTImageProcessor.from_pretrained(folder, skip_db=skip_db), **options)

    return make


@pytest.fixture(scope="module")
def conversations(natural_frames, image_file, video_file) -> list[ConversationSample]:
    """Text; a photograph; a page with margins and a video in which nothing moves between a photograph's two places."""
    page = np.full((168, 168, 3), 255, np.uint8)
    page[60:100, 60:100] = natural_frames(1, 40, 40)[0]
    photograph = image_file(natural_frames(1, 112, 168)[0], "PNG")
    still = video_file(natural_frames(1, 112, 112, 5).repeat(12, axis=0), rate=2)
    return [
        conversation_sample(answer("What colour is the circle?", "Red."), key="text"),
        conversation_sample(answer("<image>What is this?", "A square."), ("image", photograph), key="image"),
        conversation_sample(
            answer("<image><video>and<image>?", "Three."),
            *(("image", image_file(page, "PNG")), ("video", still), ("image", photograph)),
            key="mixed",
        ),
    ]


def assert_equal(one, other, without: tuple[str, ...] = ()) -> None:
    """Of samples or batches: all fields but some."""
    for field in fields(one):
        if field.name in without:
            continue
        value, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected) and value.dtype == expected.dtype, field.name
        else:
            assert value == expected, field.name


def test_without_it_there_is_no_mask(new_encoder, conversations):
    encoder = new_encoder(None)
    samples = [encoder.encode(conversation) for conversation in conversations]
    assert all(getattr(sample, name) is None for sample in [*samples, encoder.batch(samples)] for name in KEPT)


def test_at_infinity_all_is_as_without_it(new_encoder, conversations):
    plain, skipping = new_encoder(None), new_encoder(math.inf)
    samples = [(plain.encode(c), skipping.encode(c)) for c in conversations]
    for one, other in samples:
        assert_equal(one, other, KEPT)
        assert other.image_kept.all() and other.video_kept.all()
    assert_equal(plain.batch([s for s, _ in samples]), skipping.batch([s for _, s in samples]), KEPT)
    assert_equal(plain.blank_batch(), skipping.blank_batch(), KEPT)
    packed = new_encoder(None, PackingTaskEncoder), new_encoder(math.inf, PackingTaskEncoder)
    assert_equal(*(e.make_sequence([s[n] for s in samples]) for n, e in enumerate(packed)))
    assert_equal(*(e.blank_batch() for e in packed))


@pytest.mark.parametrize("time_step", [1.0, 2.5])
def test_what_is_kept_is_as_without_skipping(new_encoder, conversations, time_step):
    """Ids, labels and M-RoPE positions of what is left are those of the whole sequence; text is left whole."""
    plain, skipping = new_encoder(None, time_step=time_step), new_encoder(38.0, time_step=time_step)
    for conversation in conversations:
        whole, kept = plain.encode(conversation), skipping.encode(conversation)
        present = torch.ones(len(whole.input_ids), dtype=torch.bool)
        for kind, mask in (("image", kept.image_kept), ("video", kept.video_kept)):
            present[whole.input_ids == plain.samples.pads[kind]] = mask
        assert torch.equal(kept.input_ids, whole.input_ids[present])
        assert torch.equal(kept.labels, whole.labels[present])
        assert torch.equal(kept.position_ids, whole.position_ids[:, present])
        for tokens, grid, mask in (
            ("pixel_values", "image_grid_thw", kept.image_kept),
            ("pixel_values_videos", "video_grid_thw", kept.video_kept),
        ):
            assert torch.equal(getattr(kept, tokens), getattr(whole, tokens)[mask.repeat_interleave(4)])
            assert torch.equal(getattr(kept, grid), getattr(whole, grid))


def test_margins_and_still_steps_have_no_tokens(new_encoder, conversations):
    encoder = new_encoder(30.0)
    sample = encoder.encode(conversations[2])
    assert sample.image_grid_thw.tolist() == [[1, 6, 6], [1, 4, 6]] and sample.video_grid_thw.tolist() == [[6, 4, 4]]
    page, photograph = sample.image_kept.split([9, 6])
    assert page.view(3, 3).tolist() == [[True, False, False], [False, True, True], [False, False, False]]
    assert photograph.all()
    assert sample.video_kept.view(6, 4).sum(1).tolist() == [4, 0, 0, 0, 0, 0]
    assert len(sample.pixel_values_videos) == 16


def test_a_padded_batch_has_the_masks_of_all_samples(new_encoder, conversations):
    encoder = new_encoder(30.0)
    samples = [encoder.encode(conversation) for conversation in conversations]
    batch = encoder.batch(samples)
    for name in KEPT:
        assert torch.equal(getattr(batch, name), torch.cat([getattr(sample, name) for sample in samples]))
    visual = sum((batch.input_ids == pad).sum() for pad in encoder.samples.pads.values())
    assert visual == batch.image_kept.sum() + batch.video_kept.sum()
    assert 4 * visual == len(batch.pixel_values) + len(batch.pixel_values_videos)


def test_a_packed_sequence_has_steps_of_kept_tokens_alone(new_encoder, conversations):
    plain, skipping = (new_encoder(skip_db, PackingTaskEncoder) for skip_db in (None, 30.0))
    whole, kept = (e.make_sequence([e.encode(c) for c in conversations]) for e in (plain, skipping))
    sample = skipping.encode(conversations[2])
    page = int(sample.image_kept[:9].sum())
    assert whole.step_starts.diff().tolist() == [24, 36, *[16] * 6, 24]
    assert kept.step_starts.diff().tolist() == [24, 4 * page, 16, 24] and kept.step_starts.dtype == torch.int32
    assert kept.longest_step == max(24, 4 * page) and kept.longest_sample == len(sample.input_ids)
    assert torch.equal(kept.grid_thw, whole.grid_thw)
    assert len(kept.tokens) == len(kept.token_positions) == 4 * len(kept.visual) == kept.step_starts[-1]
    order = torch.cat([torch.ones(6), sample.image_kept[:9], sample.video_kept, sample.image_kept[9:]]).bool()
    present = order.repeat_interleave(4)
    assert torch.equal(kept.tokens, whole.tokens[present])
    assert torch.equal(kept.token_positions, whole.token_positions[present])
    assert torch.equal(kept.input_ids[kept.learned + 1], kept.targets) and torch.equal(kept.targets, whole.targets)


def packed_by_stages(encoder: PackingTaskEncoder, conversations: list) -> list[PackedBatch]:
    measured = [encoder.encode_sample(conversation) for conversation in conversations]
    return [encoder.pack_selected_samples(samples) for samples in encoder.select_samples_to_pack(measured)]


def test_sequences_are_chosen_by_what_is_kept(new_encoder, conversations):
    """The budget holds the samples with their kept tokens; without skipping it does not."""
    encoder = new_encoder(30.0, PackingTaskEncoder)
    sizes = [encoder.encode_sample(conversation).size for conversation in conversations]
    sample = encoder.encode(conversations[2])
    assert sizes[0][1] == 0 and sizes[1][1] == 24
    assert sizes[2] == (len(sample.input_ids), len(sample.pixel_values) + len(sample.pixel_values_videos))
    budget = {"pack_tokens": sum(size[0] for size in sizes), "pack_vision_tokens": sum(size[1] for size in sizes)}
    assert len(packed_by_stages(new_encoder(30.0, PackingTaskEncoder, **budget), conversations)) == 1
    assert len(packed_by_stages(new_encoder(None, PackingTaskEncoder, **budget), conversations)) > 1


@pytest.mark.parametrize("encoder_class", [PackingTaskEncoder, BufferPackingTaskEncoder])
def test_held_samples_make_the_sequences_of_samples_decoded_again(new_encoder, conversations, encoder_class):
    holding, again = (new_encoder(30.0, encoder_class, held_bytes=limit) for limit in (1 << 30, 0))
    assert holding.encode_sample(conversations[2]).held is not None
    assert again.encode_sample(conversations[2]).held is None
    for one, other in zip(*(packed_by_stages(encoder, conversations) for encoder in (holding, again)), strict=True):
        assert_equal(one, other)
        assert one.tokens.dtype == torch.bfloat16


def test_held_bytes_are_those_of_samples_that_live(new_encoder, conversations):
    encoder = new_encoder(30.0, PackingTaskEncoder)
    sample = encoder.encode_sample(conversations[2])
    floats = sample.held.pixel_values.numel() + sample.held.pixel_values_videos.numel()
    assert 2 * floats < encoder._held.bytes < 2 * floats + 20_000, "bf16"
    del sample
    assert encoder._held.bytes == 0


def test_no_more_is_held_than_the_limit(new_encoder, conversations):
    sample = new_encoder(30.0).encode(conversations[1])
    size = sum(value.nbytes for value in vars(sample).values() if isinstance(value, torch.Tensor))
    held = HeldSamples(2 * size)
    kept = [held.hold(replace(sample)) for _ in range(3)]
    assert [one is None for one in kept] == [False, False, True] and held.bytes == 2 * size
    kept.pop(0)
    assert held.hold(replace(sample)) is not None


def test_a_sample_may_be_too_long_only_without_skipping(new_encoder, conversations):
    length = len(new_encoder(30.0).encode(conversations[2]).input_ids)
    assert len(new_encoder(30.0, seq_length=length).encode(conversations[2]).input_ids) == length
    with pytest.raises(BadSample, match="the limit is"):
        new_encoder(None, seq_length=length).encode(conversations[2])


def test_labels_are_learned_as_ever(new_encoder, conversations):
    sample = new_encoder(30.0).encode(conversations[2])
    encoder = new_encoder(30.0)
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]) == "Three.<|im_end|>"


def test_the_noise_floor_is_the_processor_s_to_ask_for(new_encoder, natural_frames):
    """A video of one photograph under noise of sigma 6: by the threshold alone nearly every cell is kept."""
    noise = np.random.default_rng(0).normal(0, 6, (8, 112, 168, 3))
    frames = (natural_frames(1, 112, 168, 5) * 0.5 + 60 + noise).clip(0, 255).astype(np.uint8)
    video = SimpleNamespace(frames=torch.from_numpy(frames).permute(0, 3, 1, 2), info={"video_fps": 2})
    sample = conversation_sample(answer("<video>What is this?", "A square."), ("video", video))
    encoder, shares = new_encoder(38.0), {}
    for floor in (False, True):
        encoder.image_processor.skip_noise_floor = floor
        shares[floor] = float(encoder.encode(sample).video_kept.float().mean())
    assert shares[False] == 1 and shares[True] < 0.5
