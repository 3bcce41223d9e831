"""Validation reads its split to the end: with loader processes, with several processes, packed and not.

Buffers and batches are smaller than the split, since Energon's edges lie where they end.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
from pipeline import run
from prepared_set import StoredSample, write_set
from validation_process import data_module

from dct_qwen2vl.preparation.energon_metadata import energon_prepare

VAL = 53  # samples; a prime


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """shards(n): a prepared set with n samples of text in its val split, of different lengths."""
    made: dict[int, Path] = {}

    def make(val: int) -> Path:
        if val not in made:
            folder = tmp_path_factory.mktemp("shards")
            train, valid = (
                [StoredSample([("human", f"Question {n}?"), ("gpt", "Yes. " * (1 + n % 5))]) for n in range(count)]
                for count in (8, val)
            )
            middle = -(-val // 2)
            splits = {"train": [train], "val": [part for part in (valid[:middle], valid[middle:]) if part]}
            write_set(folder, splits)
            energon_prepare(folder, "8,1,1", ("train", *["val"] * len(splits["val"])), 1)
            made[val] = folder
        return made[val]

    return make


def numbers_of(keys: list[str]) -> list[int]:
    """Of samples in the val split, from 0."""
    return sorted(int(key.split("/")[-1]) - 8 for key in keys)


@pytest.fixture
def new_processes():
    """new_processes(): children that this test started and that still run; loaders of other tests may have theirs."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


UNPACKED, PACKED = {"micro_batch_size": 8}, {"pack_tokens": 150, "packing_buffer_size": 4}


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("form", [UNPACKED, PACKED], ids=["unpacked", "packed"])
def test_every_sample_comes_once_in_every_validation(form, num_workers, shards, converted, new_processes):
    loader = data_module(converted("x4"), shards(VAL), num_workers=num_workers, **form).val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert numbers_of([key for batch in batches for key in batch.keys]) == list(range(VAL))
        assert max(len(batch.keys) for batch in batches) > 1
        assert not new_processes()


@pytest.mark.parametrize(("asked", "done"), [(1, 1), (9, 9), (16, 16), (100, VAL)])
@pytest.mark.parametrize("num_workers", [0, 4])
def test_as_many_micro_batches_come_as_were_asked_for(asked, done, num_workers, shards, converted, new_processes):
    loader = data_module(converted("x4"), shards(VAL), num_workers=num_workers, val_batches=asked).val_dataloader()
    first, second = ([batch.keys for batch in loader] for _ in range(2))
    assert not new_processes()
    assert len(first) == done and first == second
    assert len({key for keys in first for key in keys}) == done


# name -> samples of the val split, how many are to be seen, options of the loader
CASES = {
    "unpacked": (VAL, VAL, {"num_workers": 3, **UNPACKED}),
    "packed": (VAL, VAL, {"num_workers": 3, **PACKED}),
    "one sample": (1, 1, {}),
    "two samples": (2, 2, {"num_workers": 0}),
    "a number that the processes do not divide": (VAL, 5, {"val_batches": 5}),
}


@pytest.fixture(scope="module")
def in_three_processes(shards, converted) -> dict[str, list]:
    """Case -> keys by process, validation and micro-batch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    cases = [(str(shards(val)), options) for val, _, options in CASES.values()]
    done = run([*launcher, "tests/validation_process.py", str(converted("x4")), json.dumps(cases)], OMP_NUM_THREADS="1")
    by_process = json.loads(done.stdout.splitlines()[-1])
    return {name: [process[number] for process in by_process] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_processes_take_the_same_steps_and_share_the_split(case, in_three_processes):
    val, seen, _ = CASES[case]
    first, second = zip(*in_three_processes[case])
    assert first == second
    assert len({len(steps) for steps in first}) == 1
    numbers = numbers_of([key for steps in first for keys in steps for key in keys])
    assert len(set(numbers)) == len(numbers) == seen
    if seen == val:
        assert numbers == list(range(val))


def test_a_process_without_samples_takes_blank_steps(in_three_processes):
    assert sorted(len(keys) for ((keys,), _) in in_three_processes["one sample"]) == [0, 0, 1]


def test_what_could_not_be_used_is_counted(shards, converted):
    data = data_module(converted("x4"), shards(VAL))
    assert data.count_left_out(VAL) == 0 and data.count_left_out(50) == 3
    assert data_module(converted("x4"), shards(VAL), val_batches=4).count_left_out(4) == 0


@pytest.mark.parametrize("form", [UNPACKED, PACKED], ids=["unpacked", "packed"])
def test_a_blank_micro_batch_has_a_loss_and_no_sample(form, converted, shards):
    blank = data_module(converted("x4"), shards(VAL), **form).task_encoder.blank_batch()
    assert blank.keys == [] and blank.skipped == {}
    learned = (blank.labels != -100).sum() if form is UNPACKED else len(blank.learned)
    assert int(learned) == 1
