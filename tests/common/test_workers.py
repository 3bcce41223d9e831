"""Worker processes with an interpreter of their own; the forked ones are tested with data preparation."""

import multiprocessing
import os
import time
from functools import partial

import pytest

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.workers import WorkerPool

begun = []  # in a worker: its number, once


def note(number: int) -> None:
    begun.append(number)


def say(greeting: str, task: int, count) -> tuple[str, list[int]]:
    count(task)
    return f"{greeting} {task}", begun


def sleep(seconds: float, count) -> None:
    count(1)
    time.sleep(seconds)


def die(task: int, count) -> None:
    os._exit(9)


def refuse(number: int) -> None:
    raise UserError(f"worker {number} cannot begin")


def test_spawned_workers_begin_once_and_keep_the_order():
    counted = []
    with WorkerPool(2, spawn=True, begin=note) as pool:
        said = list(pool.map(partial(say, "task"), range(1, 6), counted.append))
    assert [words for words, _ in said] == [f"task {number}" for number in range(1, 6)]
    assert {tuple(numbers) for _, numbers in said} <= {(0,), (1,)} and sum(counted) == 15


def test_an_error_ends_spawned_workers_in_the_middle_of_their_tasks():
    counted, start = [], time.monotonic()
    with pytest.raises(KeyboardInterrupt), WorkerPool(2, spawn=True) as pool:
        for _ in pool.map(sleep, [0.0, 300.0, 300.0], counted.append):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 60 and not multiprocessing.active_children()


def test_what_a_worker_raises_before_its_first_task_is_raised():
    with WorkerPool(2, spawn=True, begin=refuse) as pool, pytest.raises(UserError, match=r"^worker \d cannot begin$"):
        list(pool.map(sleep, [0.0], lambda count: None))


def test_a_worker_that_died_is_told_with_its_remedy():
    with WorkerPool(1, spawn=True, remedy="eat less") as pool, pytest.raises(UserError, match=r"died, .*; eat less$"):
        list(pool.map(die, [1], lambda count: None))
