"""Packed sequences: which samples share one, and what stands in it."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import media_files
import numpy as np
import pytest
import torch
from data_modules import data_module
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.energon import SkipSample
from PIL import Image
from prepared_set import StoredSample, write_set
from samples_by_hand import answer, conversation_sample
from transformers import AutoTokenizer, Qwen2VLImageProcessor

from dct_qwen2vl.data.loader import LoaderStateError, end_loader_processes
from dct_qwen2vl.data.packing import fit_sequences
from dct_qwen2vl.data.positions import vision_positions
from dct_qwen2vl.data.samples import IGNORE_INDEX, TooManyBadSamples
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.preparation.energon_metadata import energon_prepare
from task_encoder import PackingTaskEncoder

TOKEN_BYTES = 1764 * 2  # of x4 in bf16


@pytest.fixture(scope="module")
def encoder(converted) -> PackingTaskEncoder:
    folder = converted("x4")
    processor = DCTImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return PackingTaskEncoder(tokenizer, processor, pack_tokens=400, pack_vision_tokens=800)


@pytest.fixture(scope="module")
def samples(encoder, natural_frames, image_file, video_file) -> list:
    """Text, one image, a video, two images and a video between them."""
    image = [image_file(natural_frames(1, 112, 168, seed)[0], "PNG") for seed in range(3)]
    video = video_file(natural_frames(8, 112, 112, 5))
    made = [
        conversation_sample(answer("What colour is the circle?", "Red."), key="text"),
        conversation_sample(answer("<image>What is this?", "A square."), ("image", image[0]), key="image"),
        conversation_sample(answer("<video>Where does it go?", "Left."), ("video", video), key="video"),
        conversation_sample(
            answer("<image><video>and<image>?", "Three."),
            *(("image", image[1]), ("video", video), ("image", image[2])),
            key="mixed",
        ),
    ]
    return [encoder.encode(sample) for sample in made]


def test_a_sequence_holds_its_samples_one_after_the_other(encoder, samples):
    sequence = encoder.make_sequence(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert sequence.sample_starts.tolist() == [0, *np.cumsum(lengths)]
    assert sequence.sample_starts.dtype == sequence.step_starts.dtype == torch.int32
    assert sequence.longest_sample == max(lengths) and sequence.keys == ["text", "image", "video", "mixed"]
    for sample, start, stop in zip(samples, sequence.sample_starts[:-1], sequence.sample_starts[1:]):
        assert torch.equal(sequence.input_ids[start:stop], sample.input_ids)
        assert torch.equal(sequence.position_ids[:, start:stop], sample.position_ids)
        assert sample.position_ids[:, 0].tolist() == [0, 0, 0]


def test_what_is_learned_never_crosses_a_sample(encoder, samples):
    sequence = encoder.make_sequence(samples)
    assert len(sequence.learned) == len(sequence.targets) == sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples)
    assert torch.equal(sequence.input_ids[sequence.learned + 1], sequence.targets)
    ends = set((sequence.sample_starts[1:] - 1).tolist())
    assert not ends & set(sequence.learned.tolist())


def test_tokens_come_in_the_order_of_their_placeholders(encoder, samples):
    mixed = samples[3]
    sequence = encoder.make_sequence([mixed])
    images, videos = mixed.image_grid_thw.tolist(), mixed.video_grid_thw.tolist()
    assert sequence.grid_thw.tolist() == [images[0], videos[0], images[1]]
    first = int(np.prod(images[0]))
    stored = torch.cat([mixed.pixel_values[:first], mixed.pixel_values_videos, mixed.pixel_values[first:]])
    assert torch.equal(sequence.tokens, stored.to(torch.bfloat16))
    visual_tokens = len(sequence.visual) * encoder.image_processor.merge_size**2
    assert visual_tokens == len(sequence.tokens) == len(sequence.token_positions)
    assert set(sequence.input_ids[sequence.visual].tolist()) == set(encoder.samples.pads.values())
    time = videos[0][0]
    assert len(sequence.step_starts) == 1 + 1 + time + 1 and sequence.step_starts[-1] == len(sequence.tokens)


def test_a_sequence_of_text_has_a_blank_image(encoder, samples):
    sequence = encoder.make_sequence(samples[:1])
    merge = encoder.image_processor.merge_size
    assert sequence.tokens.shape == (merge**2, encoder.image_processor.dct_config.num_coefficients)
    assert not sequence.tokens.any() and sequence.step_starts.tolist() == [0, merge**2]
    assert len(sequence.visual) == 0 and sequence.grid_thw.shape == (0, 3)


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


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(sizes, st.tuples(st.integers(10, 60), st.integers(20, 90)))
def test_sequences_hold_every_sample_once_within_the_budget(sizes, budget):
    def fits(numbers: list[int]) -> bool:
        return bool((np.array([sizes[number] for number in numbers]).sum(axis=0) <= budget).all())

    sequences = fit_sequences(sizes, budget)
    assert sorted(number for sequence in sequences for number in sequence) == list(range(len(sizes)))
    assert sequences == sorted(sorted(sequence) for sequence in sequences)
    assert all(len(sequence) == 1 or fits(sequence) for sequence in sequences)
    assert not any(fits(one + other) for one, other in combinations(sequences, 2))  # no two sequences would fit in one


def test_few_sequences_are_nearly_empty():
    """Conversations with images of a quarter to a whole megapixel: 256 wait, a sequence takes about 40."""
    rng = np.random.default_rng(0)
    visual = rng.integers(80, 330, 256)
    waiting = [(int(seen + said), int(4 * seen)) for seen, said in zip(visual, rng.lognormal(5.2, 0.7, 256))]
    sequences = fit_sequences(waiting, (16384, 32768))
    share = sum(tokens for tokens, _ in waiting) / 16384
    assert len(sequences) <= np.ceil(1.1 * share)


def measurable(natural_frames, image_file, video_file) -> dict:
    """name -> (kind, content) of many shapes and makes."""
    frames = natural_frames(9, 90, 130, 1)
    image = Image.fromarray(frames[0])
    turned = image.getexif()
    turned[0x0112] = 6
    return {
        "png": ("image", image_file(frames[0], "PNG")),
        "turned jpeg": ("image", image_file(frames[0], "JPEG", exif=turned)),
        "thin": ("image", image_file(frames[0, :8], "PNG")),
        "large": ("image", image_file(np.tile(frames[0], (9, 9, 1)), "JPEG")),
        "tensor": ("image", torch.rand(3, 70, 200)),
        "video": ("video", video_file(frames)),
        "one frame": ("video", video_file(frames[:1])),
        "avi": ("video", media_files.video_file("avi", "mpeg4")),
        "turned": ("video", media_files.video_file("mov", rotation=90)),
        "frames": ("video", SimpleNamespace(frames=torch.zeros(7, 3, 60, 90).byte(), info={"video_fps": 4.0})),
    }


@pytest.mark.parametrize("name", ["x4", "exact", "none"])
def test_what_is_measured_is_what_is_encoded(
    name, converted, qwen2vl_directory, natural_frames, image_file, video_file
):
    folder = qwen2vl_directory if name == "none" else converted(name)
    processor = (Qwen2VLImageProcessor if name == "none" else DCTImageProcessor).from_pretrained(folder)
    encoder = PackingTaskEncoder(
        AutoTokenizer.from_pretrained(folder), processor, pack_tokens=1, pack_vision_tokens=1, seq_length=100_000
    )
    for what, medium in measurable(natural_frames, image_file, video_file).items():
        sample = conversation_sample(answer("What is this?", "A square."), medium, medium)
        encoded = encoder.encode(sample)
        vision = encoded.image_grid_thw.prod(dim=1).sum() + encoded.video_grid_thw.prod(dim=1).sum()
        assert encoder.measure(sample) == (len(encoded.input_ids), int(vision)), what


def test_samples_that_cannot_be_decoded_are_left_out_of_their_sequence(encoder, natural_frames, image_file):
    whole = image_file(natural_frames(1, 112, 168)[0], "PNG")
    question = answer("<image>What is this?", "A square.")
    good = conversation_sample(question, ("image", whole), key="good")
    cut = conversation_sample(question, ("image", whole[: len(whole) // 2]), key="cut")
    first, second = (encoder.encode_sample(sample) for sample in (cut, good))
    assert first.size == second.size
    before = encoder.skipped["undecodable_media"]
    sequence = encoder.pack_selected_samples([first, second])
    assert sequence.keys == ["good"] and sequence.skipped["undecodable_media"] == before + 1
    with pytest.raises(SkipSample):
        encoder.pack_selected_samples([first])
    with pytest.raises(SkipSample):
        encoder.encode_sample(conversation_sample(question, ("image", b"no image"), key="none"))
    assert encoder.skipped["undecodable_media"] == before + 3


def test_a_set_of_images_that_cannot_be_decoded_stops_the_run(converted, natural_frames, image_file):
    """Their headers can be read, which must not count as success."""
    folder = converted("x4")
    encoder = PackingTaskEncoder(
        AutoTokenizer.from_pretrained(folder),
        DCTImageProcessor.from_pretrained(folder),
        pack_tokens=400,
        pack_vision_tokens=800,
        max_bad_in_a_row=3,
    )
    whole = image_file(natural_frames(1, 112, 168)[0], "PNG")
    cut = conversation_sample(answer("<image>What is this?", "A square."), ("image", whole[: len(whole) // 2]))
    for _ in range(2):
        with pytest.raises(SkipSample):
            encoder.pack_selected_samples([encoder.encode_sample(cut)])
    with pytest.raises(TooManyBadSamples, match="3 samples in a row could not be used"):
        encoder.pack_selected_samples([encoder.encode_sample(cut)])


@pytest.fixture
def packed_data():
    """packed_data(prepared, num_workers, ...): the data module of the Megatron engine on a prepared set.

    Its loader processes are ended after the test. The garbage collector waits five seconds for each that is left.
    """
    made = []

    def make(
        prepared,
        num_workers: int,
        packing_buffer_size: int = 16,
        skip_db: float | None = None,
        held_bytes: int = 1 << 30,
    ):
        processor = DCTImageProcessor.from_pretrained(prepared.model, skip_db=skip_db)
        encoder = PackingTaskEncoder(
            AutoTokenizer.from_pretrained(prepared.model),
            processor,
            pack_tokens=600,
            pack_vision_tokens=1200,
            held_bytes=held_bytes,
        )
        settings = {"micro_batch_size": 1, "global_batch_size": 1, "total_batches": 12}
        settings["packing_buffer_size"] = packing_buffer_size
        made.append(data_module(prepared.shards, encoder, num_workers, **settings))
        return made[-1]

    yield make
    for data in made:
        if data.train_loader is not None:
            end_loader_processes(data.train_loader.loader)


def test_energon_packs_a_prepared_set(packed_data, prepared):
    data = packed_data(prepared, num_workers=0)
    sequences = [sequence for sequence, _ in zip(data.train_dataloader(), range(12))]
    assert all(sequence.sample_starts[-1] <= 600 or len(sequence.keys) == 1 for sequence in sequences)
    assert any(len(sequence.keys) > 2 for sequence in sequences)
    validation = list(data.val_dataloader())
    keys = [key for sequence in validation for key in sequence.keys]
    assert len(keys) == len(set(keys)) > 10


@pytest.mark.parametrize("skipping", [{}, {"skip_db": 38.0}, {"skip_db": 38.0, "held_bytes": TOKEN_BYTES * 300}])
@pytest.mark.parametrize(("num_workers", "packing_buffer_size"), [(0, 4), (2, 16), (3, 4)])
def test_a_packed_loader_goes_on_where_its_state_was_saved(
    packed_data, num_workers, packing_buffer_size, skipping, prepared
):
    first = packed_data(prepared, num_workers, packing_buffer_size, **skipping)
    sequences = iter(first.train_dataloader())
    for _ in range(4):
        next(sequences)
    state = first.state_dict()
    expected = [next(sequences) for _ in range(5)]
    again = packed_data(prepared, num_workers, packing_buffer_size, **skipping)
    again.load_state_dict(state)
    for sequence, wanted in zip(again.train_dataloader(), expected):
        assert sequence.keys == wanted.keys and torch.equal(sequence.tokens, wanted.tokens)


def test_with_skipping_a_buffer_ends_at_its_bytes_and_nothing_is_decoded_again(packed_data, prepared, monkeypatch):
    most, buffers, encoded = 300, [], []
    data = packed_data(prepared, num_workers=0, skip_db=38.0, held_bytes=TOKEN_BYTES * most)
    encoder = data.task_encoder
    whole_encode, whole_select = encoder.encode, encoder.select_samples_to_pack

    def encode(sample):
        encoded.append(sample.__key__)
        return whole_encode(sample)

    def select(samples):
        assert all(sample.held is not None and sample.conversation is None for sample in samples)
        buffers.append([sample.size[1] for sample in samples])
        return whole_select(samples)

    monkeypatch.setattr(encoder, "encode", encode)
    monkeypatch.setattr(encoder, "select_samples_to_pack", select)
    given = [key for sequence, _ in zip(data.train_dataloader(), range(12)) for key in sequence.keys]
    assert all(sum(sizes[:-1]) < most <= sum(sizes) or len(sizes) == 16 for sizes in buffers)
    assert min(map(len, buffers)) < 16, "the bytes end a buffer before its number of samples does"
    assert set(given) <= set(encoded) and len(encoded) < len(given) + 16


def test_a_state_of_other_processes_is_refused_unless_data_begin_anew(packed_data, prepared):
    state = {"energon": [None, None]}
    with pytest.raises(ValueError, match=r"loader states of 2 processes, this run has 1: .* --restart-data"):
        packed_data(prepared, num_workers=0).load_state_dict(state)
    data = packed_data(prepared, num_workers=0)
    data.restart_data = True
    data.load_state_dict(state)
    assert next(iter(data.train_dataloader())).keys


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_of_other_shards_names_the_flag_that_helps(packed_data, num_workers, prepared, tmp_path):
    """The data were prepared again, in shards of other names and sizes."""
    first = packed_data(prepared, num_workers)
    next(iter(first.train_dataloader()))
    state = first.state_dict()
    folder = write_set(tmp_path / "shards", {"train": [[StoredSample([("human", "Who?"), ("gpt", "I.")])] * 4]})
    energon_prepare(folder, "1,0,0", ("train",), 1)
    again = packed_data(replace(prepared, shards=folder), num_workers)
    again.load_state_dict(state)
    with pytest.raises(LoaderStateError, match=r"does not fit the shards of .*: add --restart-data"):
        again.train_dataloader()


def test_a_state_of_before_data_were_begun_anew_is_not_restored(packed_data, prepared, capsys):
    first = packed_data(prepared, num_workers=0)
    sequences = iter(first.train_dataloader())
    begin, following = next(sequences).keys, next(sequences).keys
    state = first.state_dict()
    for restarts, goes_on in ((0, True), (1, False)):
        again = packed_data(prepared, num_workers=0)
        again.restarts = restarts
        again.load_state_dict(state)
        sequence = next(iter(again.train_dataloader()))
        assert (sequence.keys == begin) is not goes_on and sequence.keys not in ([], following)
        assert ("before --restart-data: the data begin from the start" in capsys.readouterr().out) is not goes_on
