"""The command line of data_preparation.py."""

import argparse
import os
from pathlib import Path
from typing import Any

from dct_qwen2vl.preparation import data_splits
from dct_qwen2vl.preparation.metadata import METADATA_NAME

DESCRIPTION = """Turn a LLaVA-style data set (JSON metadata of conversations, tars or folders of media) into shards for
Energon."""
MOST_SEED = 2**63 - 1
MOST_WORKERS_A_CORE = 8  # more only wait for each other and take memory


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_folders(parser)
    add_settings(parser)
    add_running(parser)
    arguments = parser.parse_args(argv)
    for name, least in (("num_workers", 0), ("maxcount", 1), ("limit", 1), ("max_pixels", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
    if abs(arguments.seed) > MOST_SEED:
        parser.error(f"--seed must be from -{MOST_SEED} to {MOST_SEED}; take a shorter number")
    most = MOST_WORKERS_A_CORE * (os.cpu_count() or 1)
    if arguments.num_workers > most:
        parser.error(f"--num-workers must be {most} or less here ({MOST_WORKERS_A_CORE} for each core)")
    if not 1 <= arguments.jpeg_quality <= 100:
        parser.error(f"--jpeg-quality must be from 1 to 100, not {arguments.jpeg_quality}")
    if arguments.part and arguments.force:
        parser.error("--force with --part would remove what the other parts have written; remove the folder instead")
    if arguments.verify:
        return arguments
    if arguments.data_dir is None:
        parser.error("the following arguments are required: --data-dir")
    output_dir, data_dir = arguments.output_dir.resolve(), arguments.data_dir.resolve()
    if output_dir == data_dir or output_dir in data_dir.parents:
        parser.error("--output-dir must not be or contain --data-dir: energon would take the source tars for shards")
    return arguments


def checked(parse: Any) -> Any:
    """An argparse type whose ValueError becomes the message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, ZeroDivisionError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4). Raises ValueError."""
    number, slash, parts = text.partition("/")
    if not slash or not 1 <= int(number) <= int(parts):
        raise ValueError(f"a part is I/N with I from 1 to N, not {text!r}")
    return int(number), int(parts)


def add_folders(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    metadata = f"JSON lists or JSON lines, in D or elsewhere (default: {METADATA_NAME} in D)"
    add("--data-dir", type=Path, metavar="D", help="folder with the metadata and the media")
    add("--output-dir", type=Path, required=True, metavar="O", help="folder for the shards, new or empty")
    add("--metadata", type=Path, nargs="+", metavar="FILE", help=metadata)


def add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is written").add_argument
    maxcount = "samples a shard at most, fewer where the split needs it (default: %(default)s)"
    split = "shares of train, val and test, exact in every source dataset (default: 8,1,1)"
    weight = "repeat or thin the training entries of a source, as 2 or 0.5 (default: 1)"
    pixels = "make images with more pixels (height times width) smaller (default: keep them)"
    quality = "of images that are encoded again (default: %(default)s)"
    limit = "use the first N entries of the metadata alone"
    add("--seed", type=int, default=0, metavar="N", help="of split and shuffle (default: %(default)s)")
    add("--maxcount", type=int, default=1000, metavar="N", help=maxcount)
    add("--split", type=checked(data_splits.parse_split), default=(8, 1, 1), metavar="A,B,C", help=split)
    add("--source-weight", type=checked(data_splits.parse_weight), nargs="+", default=[], metavar="NAME=W", help=weight)
    add("--max-pixels", type=int, metavar="N", help=pixels)
    add("--jpeg-quality", type=int, default=95, metavar="Q", help=quality)
    add("--check-images", action="store_true", help="decode every image and every frame of a video")
    add("--check-pictures", dest="check_images", action="store_true", help=argparse.SUPPRESS)  # its first name
    add("--limit", type=int, metavar="N", help=limit)


def add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how it runs").add_argument
    workers = "worker processes; 0: work in this process (default: the cores, %(default)s)"
    part = "write every N-th shard alone; after all parts, the same command without --part ends the set"
    energon = "also run `energon prepare`: splits, crude samples"
    verify = "write nothing; read the set in O back, decode everything and say what is wrong (needs no --data-dir)"
    cores = len(os.sched_getaffinity(0))
    add("--num-workers", type=int, default=cores, metavar="N", help=workers)
    add("--part", type=checked(parse_part), metavar="I/N", help=part)
    add("--force", action="store_true", help="replace what an earlier run wrote in the output folder")
    add("--strict", action="store_true", help="stop at the first entry, image or tar that needs repair or skipping")
    add("--dry-run", action="store_true", help="say what would be written, by source and split, and write nothing")
    add("--verify", action="store_true", help=verify)
    add("--energon-prepare", action="store_true", help=energon)
    add("--no-report", action="store_true", help="no report.html")
    add("--debug", action="store_true", help="show the traceback of an error")
