"""Training that skips cells in a share of the samples, through Energon's own loader: the others keep all cells."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from data_modules import data_module
from transformers import AutoTokenizer

from dct_qwen2vl.data.loader import EnergonDataModule, end_loader_processes
from dct_qwen2vl.data.packing import PackedBatch
from dct_qwen2vl.data.sample_encoder import SkippingShare
from dct_qwen2vl.data.samples import EncodedSample, read_samples
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from task_encoder import PackingTaskEncoder, QwenTaskEncoder

SKIP_DB = 15.0  # the images of the sample data are small and full of texture
HALF = SkippingShare(0.5, seed=3)
FIRST_OF_SEED_42 = "0101011101000111"  # of the first shard, half of the samples
KEPT = ("image_kept", "video_kept")


def make_encoder(prepared, skipping: SkippingShare | None, skip_db: float | None = SKIP_DB, **packing):
    processor = DCTImageProcessor.from_pretrained(prepared.model, skip_db=skip_db)
    kind = PackingTaskEncoder if packing else QwenTaskEncoder
    return kind(AutoTokenizer.from_pretrained(prepared.model), processor, skipping=skipping, **packing)


def make_data(prepared, skipping: SkippingShare | None, num_workers: int, packed: bool, **options) -> EnergonDataModule:
    packing = {"pack_tokens": 600, "pack_vision_tokens": 1200, **options} if packed else {}
    settings = {"micro_batch_size": 1, "packing_buffer_size": 4} if packed else {}
    encoder = make_encoder(prepared, skipping, **packing)
    return data_module(prepared.shards, encoder, num_workers, shuffle_buffer_size=8, **settings)


def take(data: EnergonDataModule, count: int, after: int = 0) -> tuple[list, dict]:
    """Micro-batches of training, and the state of the loader after the first few of them."""
    batches = iter(data.train_dataloader())
    first = list(islice(batches, after))
    state = data.state_dict()
    found = first + list(islice(batches, count - after))
    end_loader_processes(data.train_loader.loader)
    return found, state


def tensors_of(batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def assert_equal(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys
        values, wanted = tensors_of(one), tensors_of(other)
        assert values.keys() == wanted.keys()
        assert all(torch.equal(values[name], wanted[name]) for name in values)


@pytest.fixture(scope="module")
def both_ways(prepared) -> dict[str, dict[bool, EncodedSample]]:
    """Key -> the sample with all cells (False) and with skipping (True), each from an encoder that knows no share."""
    plain, skipping = (make_encoder(prepared, None, skip_db) for skip_db in (None, SKIP_DB))
    found = {}
    for sample in read_samples(prepared.shards, "train"):
        both = {skips: encoder.encode_sample(sample) for skips, encoder in ((False, plain), (True, skipping))}
        whole = {name: torch.ones_like(getattr(both[True], name)) for name in KEPT}
        found[sample.__key__] = {**both, False: replace(both[False], **whole)}
    assert sum(len(both[True].input_ids) < len(both[False].input_ids) for both in found.values()) > 10
    return found


def test_the_choice_is_of_seed_and_key_alone():
    keys = [f"pretrain-{shard:06d}.tar/{number:09d}" for shard in range(4) for number in range(1000)]
    chosen = {share: [SkippingShare(share, 42).includes(key) for key in keys] for share in (1.0, 0.8, 0.5, 0.01)}
    for share, included in chosen.items():
        assert sum(included) / len(keys) == pytest.approx(share, abs=0.025)
    assert all(large or not small for large, small in zip(chosen[0.8], chosen[0.5])), "a smaller share is a part"
    other = [SkippingShare(0.5, 43).includes(key) for key in keys]
    assert 0.4 < sum(one == two for one, two in zip(chosen[0.5], other)) / len(keys) < 0.6
    first = [SkippingShare(0.5, 42).includes(f"pretrain-000000.tar/{number:09d}") for number in range(16)]
    assert "".join("01"[one] for one in first) == FIRST_OF_SEED_42, "runs that go on choose as they began"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_padded_batches_hold_some_samples_whole(prepared, both_ways, num_workers):
    """Whatever the number of loader processes, in every repetition of the data."""
    data = make_data(prepared, HALF, num_workers, packed=False)
    batches, _ = take(data, 140)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys)) < len(keys) and {HALF.includes(key) for key in keys} == {True, False}
    for batch in batches:
        expected = data.task_encoder.batch([both_ways[key][HALF.includes(key)] for key in batch.keys])
        assert_equal([batch], [expected])


@pytest.mark.parametrize(("num_workers", "held_bytes"), [(0, 1 << 30), (2, 1 << 18)])
def test_packed_sequences_hold_some_samples_whole(prepared, both_ways, num_workers, held_bytes):
    data = make_data(prepared, HALF, num_workers, packed=True, held_bytes=held_bytes)
    sequences, _ = take(data, 16)
    read = {HALF.includes(key) for sequence in sequences for key in sequence.keys}
    assert read == {True, False} and any(len(sequence.keys) > 1 for sequence in sequences)
    for sequence in sequences:
        assert isinstance(sequence, PackedBatch)
        expected = data.task_encoder.make_sequence([both_ways[key][HALF.includes(key)] for key in sequence.keys])
        assert_equal([sequence], [expected])


@pytest.mark.parametrize("packed", [False, True])
def test_a_share_of_one_is_what_there_was_before(prepared, packed):
    found, before = (
        take(make_data(prepared, skipping, 0, packed), 12)[0] for skipping in (SkippingShare(1.0, 3), None)
    )
    assert_equal(found, before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_that_goes_on_repeats_the_choice(prepared, packed, num_workers):
    whole, state = take(make_data(prepared, HALF, num_workers, packed), 14, after=5)
    again = make_data(prepared, HALF, num_workers, packed)
    again.load_state_dict(state)
    assert_equal(take(again, 9)[0], whole[5:])


@pytest.mark.parametrize("packed", [False, True])
def test_validation_skips_in_all_samples(prepared, packed):
    few, all_ = (make_data(prepared, skipping, 0, packed) for skipping in (SkippingShare(1e-9), None))
    found, expected = (list(data.val_dataloader()) for data in (few, all_))
    assert_equal(found, expected)
    assert few.task_encoder.samples.skipping == SkippingShare(1e-9), "training keeps its own"
