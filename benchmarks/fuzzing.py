"""What fuzzing has in common: mutations of bytes and JSON, and worker processes that run inputs.

Inputs of a seed are always the same. Worker processes do the work, so that a crash or a hang is seen, named, and not
the end.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


class Finding(Exception):
    """Something that must not happen."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    name: of the module in benchmarks/.
    kinds: of 100 inputs, how many are of each kind, in this order.
    runners: by kind, from random numbers to what became of an input, "stored ..." or "skipped ..."; they raise Finding,
        or whatever must not come out.
    prepare: called in each process before the clock runs.
    memory: bytes of address space of a process: what asks for more gets none.
    """

    name: str
    kinds: dict[str, int]
    runners: dict[str, Callable[[random.Random], str]]
    prepare: Callable[[], object]
    memory: int = 4 << 30

    def kind_of(self, number: int) -> str:
        """The kinds take turns, so that any run of inputs holds all of them."""
        place = number * 37 % 100  # 37 and 100 have no common divisor
        for kind, share in self.kinds.items():
            if place < share:
                return kind
            place -= share
        raise AssertionError("the shares of the kinds must add up to 100")

    def run(self, seed: int, number: int) -> tuple[str, bool]:
        """What became of one input, and whether that is a finding."""
        try:
            return self.runners[self.kind_of(number)](random.Random(f"{seed} {number}")), False
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split()):.300}", True


# ---------------------------------------------------------------------------------------------------------------------
# Mutations


def flip_bits(rng: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_number(rng: random.Random, data: bytearray, other: bytes) -> None:
    """An integer of one, two, four or eight bytes, in either order."""
    size, place = rng.choice((1, 2, 4, 8)), rng.randrange(len(data))
    value = rng.choice((*INTERESTING, rng.getrandbits(64))) % (1 << 8 * size)
    data[place : place + size] = value.to_bytes(size, rng.choice(("big", "little")))[: len(data) - place]


def change_header(rng: random.Random, data: bytearray, other: bytes) -> None:
    """A byte or two of the first 800, where most formats say how the rest is to be read."""
    for _ in range(rng.randint(1, 2)):
        data[rng.randrange(min(len(data), 800))] = rng.choice((rng.randrange(256), rng.randrange(4)))


def cut_end(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def remove_range(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = choose_range(rng, data)
    del data[start:stop]


def repeat_range(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = choose_range(rng, data)
    data[stop:stop] = data[start:stop] * rng.choice((1, 1, 2, 50))


def move_range(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = choose_range(rng, data)
    piece = data[start:stop]
    del data[start:stop]
    place = rng.randint(0, len(data))
    data[place:place] = piece


def fill_range(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = choose_range(rng, data)
    data[start:stop] = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))


def take_from_other(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = choose_range(rng, other)
    place = rng.randint(0, len(data))
    data[place : place + rng.choice((0, stop - start))] = other[start:stop]


def append_garbage(rng: random.Random, data: bytearray, other: bytes) -> None:
    data += rng.choice((bytes(100), rng.randbytes(rng.randint(1, 2000)), other))


def choose_range(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512, len(data))))


MUTATIONS = (
    flip_bits, set_number, change_header, change_header, cut_end, remove_range, repeat_range, move_range, fill_range,
    take_from_other, append_garbage,
)  # fmt: skip


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if mutated:
            rng.choice(MUTATIONS)(rng, mutated, other)
    return bytes(mutated)


JSON_WORDS = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-0", b"null", b"true", b'""', b'"\\ud800"', b'"\\u0000"', b"[]",
    b"{}", b"[" * 100_000, b'{"a":' * 5000, b'"image"', b'"video"', b'"conversations"', b'"<image>"',
    b'"<video><image>"', b'"../../etc/passwd"', b'"/etc/passwd"', b'"gpt"', b'"human"', b"\xff\xfe",
    b"\xed\xa0\x80", b"\\", b'"', b",", b"\n", b'"' + b"x" * 300_000 + b'"',
)  # fmt: skip


def mutate_json(rng: random.Random, data: bytes, other: bytes, words: tuple[bytes, ...] = JSON_WORDS) -> bytes:
    """Words put in place of values, or anywhere; or mutations of bytes."""
    if rng.random() < 0.3:
        return mutate(rng, data, other)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [place for place, byte in enumerate(data) if byte in b':,[{"']
        place = rng.choice(places or [0]) + 1
        end = place
        if rng.random() < 0.6:
            while end < len(data) and data[end] not in b",]}\n":
                end += 1
        data = data[:place] + rng.choice(words) + data[end:]
    return data


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed meanwhile."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


# ---------------------------------------------------------------------------------------------------------------------
# Workers


Run = Callable[[int, int], tuple[str, bool]]  # Target.run, or a test's


def work(pipe: Connection, seed: int, target: Target, run: Run | None) -> None:
    """Run the inputs whose numbers come through the pipe, until None does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (target.memory, target.memory))
    if run is None:
        target.prepare()
    run = run or target.run
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        outcome, is_finding = run(seed, number)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((number, outcome, is_finding, time.perf_counter() - start, memory))


@dataclass
class Worker:
    """A process and the input that it has in hand since `since`."""

    process: multiprocessing.Process
    pipe: Connection
    number: int | None = None
    since: float = 0.0


@dataclass
class Result:
    """outcomes: by kind. findings: (number, kind, what)."""

    target: Target
    outcomes: dict[str, Counter] = field(default_factory=dict)
    findings: list[tuple[int, str, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    peak_mib: float = 0.0

    def __post_init__(self) -> None:
        self.outcomes = {kind: Counter() for kind in self.target.kinds}

    def add(self, number: int, outcome: str, is_finding: bool, seconds: float = 0.0, kib: int = 0) -> None:
        kind = self.target.kind_of(number)
        self.outcomes[kind]["finding" if is_finding else outcome] += 1
        if is_finding:
            self.findings.append((number, kind, outcome))
            print(f"\ninput {number} ({kind}): {outcome}", file=sys.stderr)
        self.slowest = max(self.slowest, (seconds, number))
        self.peak_mib = max(self.peak_mib, kib / 1024)


def fuzz(target: Target, inputs: range, seed: int, num_workers: int, limit: float, run: Run | None = None) -> Result:
    """Run all inputs in processes; limit: seconds for one of them. run: in place of the target's."""
    context, result, waiting = multiprocessing.get_context("forkserver"), Result(target), iter(inputs)
    context.set_forkserver_preload([f"benchmarks.{target.name}"])
    workers = [start_worker(context, seed, target, run) for _ in range(num_workers)]
    while workers:
        ready = set(wait([worker.pipe for worker in workers], timeout=0.2))
        for place, worker in enumerate(list(workers)):
            try:
                if worker.pipe in ready:
                    take_result(worker, result)
                    give_input(worker, waiting)
                elif worker.number is not None and time.monotonic() - worker.since > limit:
                    worker.process.kill()
                    raise TimeoutError
            except (EOFError, OSError, TimeoutError) as error:
                say_death(worker, result, error, limit)
                workers[place] = start_worker(context, seed, target, run)
        workers = [worker for worker in workers if not worker.pipe.closed]
    return result


def start_worker(context: Any, seed: int, target: Target, run: Run | None) -> Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, seed, target, run), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def take_result(worker: Worker, result: Result) -> None:
    """Raises EOFError where the process has ended."""
    received = worker.pipe.recv()
    worker.number = None
    if received is not None:
        result.add(*received)
        done = sum(outcomes.total() for outcomes in result.outcomes.values())
        if done % 200 == 0:
            print(f"\r{done} inputs, {len(result.findings)} findings", end="", file=sys.stderr, flush=True)


def give_input(worker: Worker, waiting: Any) -> None:
    number = next(waiting, None)
    worker.pipe.send(number)
    worker.number, worker.since = number, time.monotonic()
    if number is None:
        worker.process.join()
        worker.pipe.close()


def say_death(worker: Worker, result: Result, error: Exception, limit: float) -> None:
    worker.process.join()
    worker.pipe.close()
    if worker.number is None:
        raise SystemExit(
            f"{result.target.name}.py: error: a worker ended with {worker.process.exitcode} while it started"
        )
    died = f"the process died (exit code {worker.process.exitcode})"
    result.add(worker.number, f"over {limit:g} s" if isinstance(error, TimeoutError) else died, True)


# ---------------------------------------------------------------------------------------------------------------------


def summarise(result: Result, inputs: range, seed: int, seconds: float) -> dict[str, Any]:
    counts = {kind: dict(sorted(outcomes.items())) for kind, outcomes in result.outcomes.items()}
    total = sum(outcomes.total() for outcomes in result.outcomes.values())
    return {
        "seed": seed,
        "first": inputs.start,
        "inputs": len(inputs),
        "lost": len(inputs) - total,
        "findings": [{"input": number, "kind": kind, "what": what} for number, kind, what in result.findings],
        "outcomes": counts,
        "seconds": round(seconds, 1),
        "slowest_input": {"input": result.slowest[1], "seconds": round(result.slowest[0], 2)},
        "peak_memory_of_a_worker_mib": round(result.peak_mib),
    }


def print_summary(summary: dict[str, Any]) -> None:
    for kind, outcomes in summary["outcomes"].items():
        print(f"{kind}: {sum(outcomes.values())}")
        for outcome, count in outcomes.items():
            print(f"    {count:6} {outcome}")
    for finding in summary["findings"]:
        print(f"FINDING input {finding['input']} ({finding['kind']}): {finding['what']}")
    slowest = summary["slowest_input"]
    print(
        f"{summary['inputs']} inputs in {summary['seconds']} s, {len(summary['findings'])} findings, "
        f"{summary['lost']} lost; slowest: input {slowest['input']}, {slowest['seconds']} s; "
        f"memory of a worker up to {summary['peak_memory_of_a_worker_mib']} MiB"
    )


def parse_arguments(argv: list[str] | None, description: str, inputs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--inputs", type=int, default=inputs, metavar="N", help="how many (default: %(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first one (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="other inputs for every seed (default: %(default)s)")
    add("--num-workers", type=int, default=cores, metavar="N", help="processes (default: the cores, %(default)s)")
    add("--limit", type=float, default=20.0, metavar="SECONDS", help="for one input (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args(argv)
    if arguments.inputs < 1 or arguments.first < 0 or arguments.num_workers < 1 or arguments.limit <= 0:
        parser.error("--inputs and --num-workers must be 1 or more, --first 0 or more, --limit more than 0")
    return arguments


def run_target(target: Target, argv: list[str] | None, description: str, inputs: int) -> int:
    """The command of a benchmark; returns its exit status. inputs: how many by default."""
    arguments = parse_arguments(argv, description, inputs)
    inputs = range(arguments.first, arguments.first + arguments.inputs)
    start = time.perf_counter()
    result = fuzz(target, inputs, arguments.seed, min(arguments.num_workers, len(inputs)), arguments.limit)
    summary = summarise(result, inputs, arguments.seed, time.perf_counter() - start)
    print(file=sys.stderr)
    print_summary(summary)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if summary["findings"] or summary["lost"] else 0
