"""Processes that work through numbered tasks and say how far they are."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from dct_qwen2vl.common.scripts import UserError

POLL_SECONDS = 0.5

_progress: Any = None  # in a worker process: the counter that it shares with its parent
_begin: Callable[[], Any] | None = None  # in a worker process: what it does before its first task


def start_worker(progress: Any, numbers: Any, begin: Callable[[int], Any] | None) -> None:
    """Prepares a worker process.

    It ends with its parent, leaves Ctrl-C to it, and keeps Pillow's warnings to itself.

    progress: Counter that it shares with its parent.
    numbers: Counter of the workers.
    begin: As in `WorkerPool`.
    """
    global _progress, _begin
    _progress = progress
    with numbers.get_lock():
        number, numbers.value = numbers.value, numbers.value + 1
    _begin = partial(begin, number) if begin else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """In a thread: otherwise the workers of a killed run would go on and write beside those of the next one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def count_in_worker(steps: int) -> None:
    with _progress.get_lock():
        _progress.value += steps


def run_in_worker(function: Callable[[Any, Callable[[int], Any]], Any], task: Any) -> Any:
    global _begin
    if _begin:
        _begin()  # not as the process starts: what it raises is then this task's failure
        _begin = None
    return function(task, count_in_worker)


class WorkerPool:
    """Worker processes, as a context manager.

    num_workers: how many. 0: the calling process does the work.
    spawn: whether each gets an interpreter of its own, started at its first task. CUDA needs it. An error ends such
        workers in the middle of their tasks; forked ones finish theirs.
    begin: what a worker does before its first task. It takes the worker's number, from 0 on.
    remedy: for a worker that died.

    Otherwise they are forked, all at once and first of all: before this process has threads, open locks or much memory,
    and with everything imported. To start an interpreter for each would take a second.
    """

    def __init__(
        self,
        num_workers: int,
        spawn: bool = False,
        begin: Callable[[int], Any] | None = None,
        remedy: str = "try fewer --num-workers; what is finished stays",
    ) -> None:
        self.num_workers, self.spawn, self.begin, self.remedy = num_workers, spawn, begin, remedy
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "WorkerPool":
        if self.num_workers:
            self.others = set(multiprocessing.active_children())
            context = multiprocessing.get_context("spawn" if self.spawn else "fork")
            self.progress = context.Value("q", 0)
            shared = (self.progress, context.Value("q", 0), self.begin)
            # Not multiprocessing.Pool, which waits for ever when a worker is killed.
            self.pool = ProcessPoolExecutor(self.num_workers, context, start_worker, shared)
            if not self.spawn:
                self.pool.submit(os.getpid).result()
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool:
            if self.spawn and error[0]:
                for worker in set(multiprocessing.active_children()) - self.others:
                    worker.terminate()
            self.pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[[Any, Callable[[int], Any]], Any], tasks: Iterable[Any], advance: Callable[[int], Any]
    ) -> Iterator[Any]:
        """The results of function(task, count), in the order of the tasks.

        function: Called in a worker. `count` is a function that passes numbers on to `advance`.
        tasks: Built when a worker is about to be free.
        advance: Called with the numbers that the tasks count.

        After a failure no new task starts, and those that run are finished. Then the failure of the first failed task
        is raised, as it would be without processes.
        """
        if self.pool is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from (function(task, advance) for task in tasks)
            return
        try:
            yield from self.map_in_processes(function, iter(tasks), advance)
        except BrokenProcessPool as error:
            raise UserError(f"a worker process died, perhaps because the memory was full; {self.remedy}") from error

    def map_in_processes(
        self, function: Callable, tasks: Iterator[Any], advance: Callable[[int], Any]
    ) -> Iterator[Any]:
        """As `map`, for a pool of processes.

        function: As in `map`.
        tasks: As in `map`.
        advance: As in `map`.
        """
        running: dict[Future, int] = {}
        done: dict[int, Future] = {}
        submitted, yielded, failed = 0, 0, False
        while True:
            while not failed and len(running) < 2 * self.num_workers and (task := next(tasks, None)) is not None:
                running[self.pool.submit(run_in_worker, function, task)] = submitted
                submitted += 1
            if not running:
                break
            for future in wait(running, POLL_SECONDS, FIRST_COMPLETED)[0]:
                done[running.pop(future)] = future
                failed = failed or future.exception() is not None
            self.pass_progress_on(advance)
            while yielded in done and not failed:
                yield done.pop(yielded).result()
                yielded += 1
        for number in sorted(done):
            yield done[number].result()  # raises what the first failed task raised

    def pass_progress_on(self, advance: Callable[[int], Any]) -> None:
        """Calls `advance` with what the workers have counted since the last call."""
        with self.progress.get_lock():
            steps, self.progress.value = self.progress.value, 0
        if steps:
            advance(steps)
