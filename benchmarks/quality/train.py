"""Trains one variant on one task from one seed, and writes what came out as one line of a result file.

    python -m benchmarks.quality.train --task reading --variant x4 --seed 0 --steps 2000 --output results

The line goes to results/train.jsonl; --output FILE.jsonl names the file itself. A finished run is skipped. Steps,
samples and their order depend on the settings alone; on a CUDA device the step is captured in a CUDA graph
(--graphs off: not), as models this small otherwise wait for launches.
"""

import argparse
import json
import sys

from benchmarks.quality.result_files import Output
from benchmarks.quality.settings import FAILURES, TOWER_SPREADS, ModelSize, Settings, add_run_flags, first_line
from dct_qwen2vl.common.scripts import UserError, run_main


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, default = parser.add_argument, Settings()
    add_run_flags(parser, experiment="train")
    add("--task", default=default.task, help="(default: %(default)s)")
    add("--variant", default=default.variant, help="(default: %(default)s)")
    add("--seed", type=int, default=default.seed, help="of weights and samples (default: %(default)s)")
    add("--steps", type=int, default=default.steps, help="(default: %(default)s)")
    add("--batch", type=int, default=default.batch, help="samples of a step (default: %(default)s)")
    add("--learning-rate", type=float, default=default.learning_rate, help="highest (default: %(default)s)")
    add("--knobs", type=json.loads, default={}, metavar="JSON", help="""of the task, as in '{"heights": [9, 12]}'""")
    add("--patch", type=int, default=default.patch, help="side of a pixel model's patch (default: %(default)s)")
    for part in ("vision", "language"):
        width, layers = (getattr(default.size, f"{part}_{what}") for what in ("width", "layers"))
        text = f"width and layers of the {part} part (default: {width} {layers})"
        add(f"--{part}", type=int, nargs=2, default=(width, layers), metavar=("WIDTH", "LAYERS"), help=text)
    add("--test", type=int, default=default.test, help="samples tested at the end (default: %(default)s)")
    add("--unseen", choices=("zero", "random"), default=default.unseen, help="see Settings (default: %(default)s)")
    text = "of the vision tower's matrices: 1 / sqrt(width of the language model, or of their inputs)"
    add("--tower-spread", choices=TOWER_SPREADS, default=default.tower_spread, help=f"{text} (default: %(default)s)")
    text = "name of a run of variant pixels or exact in the output folder, with --save; a narrower tower is widened"
    add("--start-from", metavar="RUN", help=text)
    add("--save", action="store_true", help="keep the trained model beside the result")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("train.py", lambda: train(arguments))


def train(arguments: argparse.Namespace) -> int:
    """Raises UserError for a run that fails."""
    from benchmarks.quality.runs import chosen_device, run

    settings = Settings(
        task=arguments.task,
        variant=arguments.variant,
        seed=arguments.seed,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        knobs=arguments.knobs,
        patch=arguments.patch,
        size=ModelSize(*arguments.vision, *arguments.language),
        test=arguments.test,
        start_from=arguments.start_from,
        unseen=arguments.unseen,
        save=arguments.save,
        tower_spread=arguments.tower_spread,
    )
    output, device = Output.at(arguments.output, "train"), chosen_device(arguments.device)
    try:
        result = run(settings, output, device, arguments.commit, arguments.graphs == "on")
    except FAILURES as error:
        raise UserError(first_line(error)) from error
    print(f"{settings.name}: right {result['accuracy']:.1%}, hard {result['hard_accuracy']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
