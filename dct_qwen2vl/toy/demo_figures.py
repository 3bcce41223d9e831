"""Draws what the demo leaves to look at, and counts the tokens of an image.

python -m dct_qwen2vl.toy.demo_figures DEMO_DIR          (`make demo` does it)
"""

import argparse
import sys
from pathlib import Path

from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.imports import importing
from dct_qwen2vl.common.scripts import run_main
from dct_qwen2vl.toy.demo import EXPERIMENT, TOKENS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DEMO_DIR", help="--output-dir of the demo")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def draw(folder: Path) -> int:
    """Writes loss.png, samples.png and tokens_per_image.json of a demo that was trained and evaluated."""
    with importing():
        from dct_qwen2vl.toy.demo_pictures import draw_loss, draw_samples, tokens_per_image

    run, shards = folder / "experiments" / EXPERIMENT, folder / "shards"
    draw_loss(run / "metrics.jsonl", folder / "loss.png")
    draw_samples(run / "hf_dct", shards, folder / "samples.png")
    write_json(folder / TOKENS, tokens_per_image(folder / "sample" / "model" / "tiny-qwen2-vl", run / "hf_dct", shards))
    print("Drew samples.png and loss.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main("demo_figures.py", lambda: draw(arguments.folder), arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
