"""Runs a suite of experiments on one device, writes one line for each run, and prints the comparison.

    python -m benchmarks.quality.run_experiments --suite warm --output results --minutes 30 --jobs 2

The suite `warm` writes results/warm.jsonl; --output FILE.jsonl names the file itself. Runs that are finished in the
file, or in any result file of the output folder, are not done again. So the same command continues after a stop; an
unfinished run begins again and its line is replaced. A run that fails is named on stderr and the others go on.
--part 1/4 ... 4/4 spread a suite over devices; runs that start from the same model stay together. --tasks, --variants
and
--seeds select runs; the base models that they start from are always included.

--jobs N does N runs at once, each in a process of its own. On a GPU two hide each other's start and tests; more bring
something only under NVIDIA MPS (nvidia-cuda-mps-control -d), where four do 1.3 times the steps
(docs/experiment_log.md). Times of such runs say nothing about a variant: they are marked, and compare.py takes times
from runs that had the device to themselves, as with --jobs 1.
"""

import argparse
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.result_files import Output
from benchmarks.quality.settings import FAILURES, Settings, add_run_flags, first_line, parser_of
from benchmarks.quality.suites import STEPS, SUITES, Plan
from dct_qwen2vl.common.scripts import UserError, run_main
from dct_qwen2vl.common.workers import exit_with_parent


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_run_flags(parser, experiment="SUITE")
    add("--suite", choices=tuple(SUITES), required=True)
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--minutes", type=float, help="after which no run begins and those under way stop (default: no limit)")
    add("--steps", type=int, help="of each run (default: the suite's)")
    add("--part", default="1/1", metavar="I/N", help="do the I-th of N parts of the suite")
    add("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the suite)")
    add("--variants", nargs="+", metavar="VARIANT", help="only these (default: all of the suite)")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="only these (default: all of the suite)")
    add("--batch", type=int, help="samples of a step (default: the suite's)")
    add("--tuning-rate", type=float, help="learning rate of fine-tuning (default: the suite's)")
    add("--tiny", action="store_true", help="small images, models and tests, to try everything on a CPU")
    arguments = parser.parse_args(argv)
    try:
        part, parts = (int(number) for number in arguments.part.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        parser.error(f"argument --part: expected I/N with I from 1 to N, got {arguments.part!r}")
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: expected at least 1, got {arguments.jobs}")
    arguments.part = (part, parts)
    return arguments


@dataclass(frozen=True)
class Work:
    """What a process needs beside a run's settings. deadline: of time.monotonic(), which processes share."""

    output: Output
    device: str
    commit: str
    graphs: bool
    deadline: float | None
    alone: bool

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def attempt(settings: Settings, work: Work) -> str | None:
    """Does a run; returns why it failed, in one line."""
    from benchmarks.quality.runs import run

    try:
        run(settings, work.output, work.device, work.commit, work.graphs, work.deadline, work.alone)
    except FAILURES as error:
        return first_line(error)
    return None


class Here(Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def new_process(device: str) -> Executor:
    """One that starts with the first run and is kept for more, so that it imports torch once."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=begin_process, initargs=(device,))


def begin_process(device: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if device == "cuda":
        import torch

        torch.set_num_threads(1)  # the cores are for the other processes


def do_runs(runs: Sequence[Settings], work: Work, workers: list[Executor], renew: Callable[[], Executor]) -> set[str]:
    """All runs, as many at once as there are workers, each after the one it starts from; returns the names of those
    that failed or were left out. After a failure, which may have spoilt CUDA in its process, a worker is renewed."""
    queue, failed = {settings.name: settings for settings in runs}, set()
    idle, busy = list(workers), {}
    while queue or busy:
        if work.late() and queue:
            print(f"no time left for {len(queue)} more runs", flush=True)
            queue.clear()
        leave_out(queue, failed)
        under_way = {settings.name for settings, _ in busy.values()}
        ready = [s for s in queue.values() if s.start_from not in queue and s.start_from not in under_way]
        for settings in ready[: len(idle)]:
            worker = idle.pop()
            busy[worker.submit(attempt, queue.pop(settings.name), work)] = settings, worker
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            settings, worker = busy.pop(future)
            if (why := outcome(future)) is not None:
                report(settings, why)
                failed.add(settings.name)
                worker.shutdown(wait=False)
                worker = renew()
            idle.append(worker)
    for worker in idle:
        worker.shutdown()
    return failed


def outcome(future: Future) -> str | None:
    """Why a run failed, if it did. Raises what it raised, if that is a bug."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process ended abruptly: out of memory? Try fewer --jobs"


def leave_out(queue: dict[str, Settings], failed: set[str]) -> None:
    """Moves runs from the queue to the failed ones that start from a failed one."""
    while lost := [settings for settings in queue.values() if settings.start_from in failed]:
        for settings in lost:
            report(settings, f"left out, as {settings.start_from} failed")
            failed.add(queue.pop(settings.name).name)


def part_of(runs: Sequence[Settings], part: int, parts: int) -> list[Settings]:
    """Every `parts`-th run from `part` on, counted from 1, where a model and what starts from it count as one run."""
    by_name = {settings.name: settings for settings in runs}
    chains: dict[str, list[Settings]] = {}
    for settings in runs:
        chains.setdefault(line_of_starts(settings, by_name)[-1], []).append(settings)
    return [settings for chain in list(chains.values())[part - 1 :: parts] for settings in chain]


def line_of_starts(settings: Settings, by_name: dict[str, Settings]) -> list[str]:
    """Names of a run, of the one that it starts from, of the one which that starts from, and so on."""
    names = [settings.name]
    while (settings := by_name.get(names[-1])) is not None and settings.start_from is not None:
        names.append(settings.start_from)
    return names


def chosen(runs: Sequence[Settings], choice: dict[str, Sequence[Any] | None]) -> list[Settings]:
    """Those whose fields have one of the values chosen for them, None for any, and those that they start from. Raises
    UserError for a value that no run has."""
    for field, values in choice.items():
        known = list(dict.fromkeys(getattr(settings, field) for settings in runs))
        if unknown := set(values or ()).difference(known):
            raise UserError(f"the suite has no {field} {min(unknown)}: choose from {', '.join(map(str, known))}")
    kept = [s for s in runs if all(values is None or getattr(s, field) in values for field, values in choice.items())]
    by_name = {settings.name: settings for settings in runs}
    wanted = {name for settings in kept for name in line_of_starts(settings, by_name)}
    return [settings for settings in runs if settings.name in wanted]


def to_do(runs: Sequence[Settings], output: Output) -> list[Settings]:
    """Those that are not done, and models that any of these starts from and that are not there, such as in a folder
    with results alone. Raises UserError for results of another version of a task and for a damaged result file."""
    from benchmarks.quality.runs import done

    open_runs = [settings for settings in runs if done(settings, output, model_needed=False) is None]
    names, found = {settings.name for settings in open_runs}, open_runs
    while found:
        needed = {settings.start_from for settings in found} - names
        found = [s for s in runs if s.name in needed and done(s, output, model_needed=True) is None]
        names |= {settings.name for settings in found}
    return [settings for settings in runs if settings.name in names]


def report(settings: Settings, why: str) -> None:
    print(f"run_experiments.py: {settings.name}: {why}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    arguments = parse_arguments(argv)
    return run_main("run_experiments.py", lambda: run_suite(arguments, started))


def run_suite(arguments: argparse.Namespace, started: float) -> int:
    """Does what is to do and compares. started: time.monotonic() of the start. Raises UserError, OSError."""
    from benchmarks.quality.analysis import compare
    from benchmarks.quality.runs import chosen_device

    suite, device = SUITES[arguments.suite], chosen_device(arguments.device).type
    output = Output.at(arguments.output, arguments.suite)
    output.file.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if arguments.minutes is None else started + 60 * arguments.minutes
    work = Work(output, device, arguments.commit, arguments.graphs == "on", deadline, arguments.jobs == 1)
    runs = suite(Plan(arguments.steps or STEPS[arguments.suite], arguments.tiny, arguments.batch))
    if (rate := arguments.tuning_rate) is not None:
        runs = [replace(settings, learning_rate=rate) if settings.start_from else settings for settings in runs]
    runs = chosen(runs, {"task": arguments.tasks, "variant": arguments.variants, "seed": arguments.seeds})
    runs = to_do(part_of(runs, *arguments.part), output)
    print(f"{' '.join(suite.__doc__.split())} {len(runs)} runs to do.", flush=True)
    renew = Here if arguments.jobs == 1 else (lambda: new_process(device))
    failed = do_runs(runs, work, [renew() for _ in range(arguments.jobs)], renew)
    status = compare.main(["--results", str(output.place)])
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(main())
