"""Runs a suite of experiments on one device, one JSON file per run, and prints the comparison.

    python benchmarks/quality/run_experiments.py --suite first --output results --minutes 8

Without --minutes every run of the suite is done, with the suite's steps. With it, the steps are chosen, the same for
all arms, so that the core runs fit in, and more runs follow while time is left. What is finished in the output folder
is not done again, so the same command goes on where it was stopped. --part 1/4 ... 4/4 spread a suite over devices.
"""

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts of the repository

from benchmarks.quality.settings import add_run_flags
from benchmarks.quality.suites import STEPS, SUITES, Plan, Suite

if TYPE_CHECKING:
    import torch

START = time.monotonic()
RUN_OVERHEAD = 20.0  # seconds of a run beside its steps: tests, bases, generation
CORE_SHARE = 0.65  # of the time, for the core runs
LEAST_STEPS = 20


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add_run_flags(parser)
    add("--suite", choices=tuple(SUITES), required=True)
    add("--minutes", type=float, help="for everything, from the start of this command (default: as long as it takes)")
    add("--steps", type=int, help="of each run (default: the suite's, fewer if --minutes asks for it)")
    add("--part", default="1/1", metavar="I/N", help="do every N-th run, from the I-th on; not for `warm`")
    add("--batch", type=int, help="samples of a step (default: the suite's)")
    add("--tiny", action="store_true", help="small pictures, models and tests, to try everything on a CPU")
    arguments = parser.parse_args(argv)
    try:
        part, parts = (int(number) for number in arguments.part.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        parser.error(f"argument --part: expected I/N with I from 1 to N, got {arguments.part!r}")
    arguments.part = (part, parts)
    return arguments


def choose_steps(suite: Suite, most: int, device: "torch.device", graphs: bool, seconds: float) -> int:
    """Steps with which the core runs take their share of `seconds`, by what a step of each takes on this device."""
    from benchmarks.quality.runs import seconds_per_step

    cost = 0.0  # seconds for a step of each
    for settings in suite.runs[: suite.core]:
        step = seconds_per_step(replace(settings, start_from=None), device, graphs)
        print(f"{settings.task} {settings.arm}: {1000 * step:.1f} ms a step", flush=True)
        cost += step * settings.steps / most
    left = seconds * CORE_SHARE - (time.monotonic() - START) - suite.core * RUN_OVERHEAD
    return min(most, max(LEAST_STEPS, int(left / cost) // LEAST_STEPS * LEAST_STEPS))


def planned_steps(arguments: argparse.Namespace, device: "torch.device") -> int:
    """Of --steps; of an earlier start of this command, so that it goes on; chosen now; or the suite's."""
    path, most = arguments.output / f"{arguments.suite}.plan.json", STEPS[arguments.suite]
    if arguments.steps or arguments.minutes is None:
        return arguments.steps or most
    if path.is_file():
        return json.loads(path.read_text())["steps"]
    suite = SUITES[arguments.suite](Plan(most, arguments.tiny, arguments.batch))
    steps = choose_steps(suite, most, device, arguments.graphs == "on", 60 * arguments.minutes)
    path.write_text(json.dumps({"steps": steps, "minutes": arguments.minutes}) + "\n")
    return steps


def restart_without_graphs(arguments: argparse.Namespace) -> None:
    """Goes on in a fresh process, as a failed capture leaves CUDA in a state that cannot be trusted."""
    argv = [value for value in sys.argv if value not in ("--graphs", "on")]
    if arguments.minutes is not None:
        place = next(number for number, value in enumerate(argv) if value.startswith("--minutes"))
        left = arguments.minutes - (time.monotonic() - START) / 60
        argv[place : place + (1 if "=" in argv[place] else 2)] = [f"--minutes={left:.2f}"]
        (arguments.output / f"{arguments.suite}.plan.json").unlink(missing_ok=True)
    print("going on without CUDA graphs", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, *argv, "--graphs=off"])


def do_runs(arguments: argparse.Namespace, device: "torch.device") -> None:
    """All runs of the part, or as many as there is time for."""
    from benchmarks.quality.runs import run, seconds_per_step

    build, graphs = SUITES[arguments.suite], arguments.graphs == "on"
    print(" ".join(build.__doc__.split()), flush=True)
    suite = build(Plan(planned_steps(arguments, device), arguments.tiny, arguments.batch))
    part, parts = arguments.part
    mine = suite.runs[part - 1 :: parts]
    deadline = None if arguments.minutes is None else START + 60 * arguments.minutes
    for number, settings in enumerate(mine):
        if deadline is not None and number >= suite.core:
            left = deadline - time.monotonic()
            if left < RUN_OVERHEAD:
                print(f"no time left for {len(mine) - number} more runs")
                return
            step = seconds_per_step(replace(settings, start_from=None), device, graphs)
            if step * settings.steps + RUN_OVERHEAD > left:
                print(f"{settings.name}: left out, needs {step * settings.steps:.0f} s, {left:.0f} are left")
                continue
        run(settings, arguments.output, device, arguments.commit, graphs, deadline)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from benchmarks.quality import compare
    from benchmarks.quality.runs import chosen_device

    device = chosen_device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        do_runs(arguments, device)
    except RuntimeError:
        if device.type != "cuda" or arguments.graphs == "off":
            raise
        traceback.print_exc()
        restart_without_graphs(arguments)
    except (ValueError, OSError) as error:
        print(f"run_experiments.py: {error}", file=sys.stderr)
        return 1
    return compare.main(["--results", str(arguments.output)])


if __name__ == "__main__":
    sys.exit(main())
