"""The settings of data preparation, and the command line that is made from them.

A new setting is one new field of `PreparationConfig`. Its metadata gives it a flag and bounds and puts it in the
fingerprint, so that a set is gone on with only if the setting is the same:

    max_pixels: int | None = setting("what is written", None, "make larger images smaller", at_least=1)
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from dct_qwen2vl.common import settings
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.settings import add_flags, check_ranges, from_flags, plain
from dct_qwen2vl.preparation.data_splits import parse_split, parse_weight, say_shares
from dct_qwen2vl.preparation.metadata import METADATA_NAME

DESCRIPTION = """Turns a LLaVA-style data set (JSON metadata of conversations, tars or folders of media) into shards for
Energon."""
MOST_SEED = 2**63 - 1
MOST_WORKERS_A_CORE = 8  # more only wait for each other and take memory
WRITTEN, RUNNING = "what is written", "how it runs"  # groups in --help


def setting(
    group: str,
    default: Any,
    help: str,
    *,
    in_fingerprint: bool = True,
    record: Callable[[Any], Any] = plain,
    **options: Any,
) -> Any:
    """A field of `PreparationConfig` with its metadata.

    in_fingerprint: whether the bytes of the set depend on it. A set is gone on with only if these are the same.
    record: gives the value as run.json holds it.
    group, default, help, options: as `common.settings.setting` has them.
    """
    return settings.setting(group, default, help, in_fingerprint=in_fingerprint, record=record, **options)


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4). Raises ValueError."""
    number, slash, parts = text.partition("/")
    if not slash or not 1 <= int(number) <= int(parts):
        raise ValueError(f"a part is I/N with I from 1 to N, not {text!r}")
    return int(number), int(parts)


def record_weights(weights: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """By name; of two weights of a source, the larger."""
    return dict(sorted(weights))


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """What data_preparation.py was told. None means that a setting was not given."""

    data_dir: Path | None = setting(
        "", None, "folder with the metadata and the media", metavar="D", in_fingerprint=False
    )
    output_dir: Path = setting("", MISSING, "folder for the shards, new or empty", metavar="O", in_fingerprint=False)
    metadata: tuple[Path, ...] | None = setting(
        "",
        None,
        f"JSON lists or JSON lines, in D or elsewhere (default: {METADATA_NAME} in D)",
        metavar="FILE",
        nargs="+",
        in_fingerprint=False,
    )

    seed: int = setting(
        WRITTEN,
        0,
        "for the split and for shuffling (default: %(default)s)",
        metavar="N",
        at_least=-MOST_SEED,
        at_most=MOST_SEED,
    )
    maxcount: int = setting(
        WRITTEN,
        1000,
        "most samples of a shard; fewer if the split needs it (default: %(default)s)",
        metavar="N",
        at_least=1,
    )
    split: tuple[int, int, int] = setting(
        WRITTEN,
        (8, 1, 1),
        "shares of train, val and test, exact in every source dataset (default: 8,1,1)",
        metavar="A,B,C",
        parse=parse_split,
        record=say_shares,
    )
    source_weight: tuple[tuple[str, float], ...] = setting(
        WRITTEN,
        (),
        "write the training entries of a source W times: 2 is twice, 0.5 is half of them (default: 1)",
        metavar="NAME=W",
        nargs="+",
        parse=parse_weight,
        record=record_weights,
    )
    max_pixels: int | None = setting(
        WRITTEN,
        None,
        "scale down images with more pixels (height times width) (default: keep them)",
        metavar="N",
        at_least=1,
    )
    jpeg_quality: int = setting(
        WRITTEN,
        95,
        "for images that are encoded again (default: %(default)s)",
        metavar="Q",
        at_least=1,
        at_most=100,
    )
    check_images: bool = setting(
        WRITTEN, False, "decode every image and every frame of a video", first_name="check_pictures"
    )
    limit: int | None = setting(WRITTEN, None, "use only the first N entries of the metadata", metavar="N", at_least=1)

    num_workers: int = setting(
        RUNNING,
        len(os.sched_getaffinity(0)),
        "worker processes; 0: work in this process (default: the cores, %(default)s)",
        metavar="N",
        at_least=0,
        in_fingerprint=False,
    )
    part: tuple[int, int] | None = setting(
        RUNNING,
        None,
        "write only part I of N parts; after all parts, the same command without --part completes the set",
        metavar="I/N",
        parse=parse_part,
        in_fingerprint=False,
    )
    force: bool = setting(
        RUNNING, False, "replace what an earlier run wrote in the output folder", in_fingerprint=False
    )
    strict: bool = setting(
        RUNNING,
        False,
        "stop at the first entry, image or tar that needs repair or skipping",
        in_fingerprint=False,
    )
    dry_run: bool = setting(
        RUNNING,
        False,
        "say what would be written, by source and split, and write nothing",
        in_fingerprint=False,
    )
    verify: bool = setting(
        RUNNING,
        False,
        "write nothing; read the set in O back, decode everything and say what is wrong (needs no --data-dir)",
        in_fingerprint=False,
    )
    energon_prepare: bool = setting(
        RUNNING, False, "also run `energon prepare` and answer its questions", in_fingerprint=False
    )
    no_report: bool = setting(RUNNING, False, "write no report.html", in_fingerprint=False)
    debug: bool = setting(RUNNING, False, "show the traceback of an error", in_fingerprint=False)


# Settings that were in the fingerprint from the first, in the order in which it has them: reordering the fields changes
# nothing. A later setting enters behind them, and only where it is not its default, so that older sets go on.
FIRST_IN_FINGERPRINT = (
    *("seed", "maxcount", "limit", "max_pixels"),
    *("jpeg_quality", "check_images", "split", "source_weight"),
)


def parse_arguments(argv: list[str] | None, kind: type[PreparationConfig] = PreparationConfig) -> PreparationConfig:
    """The settings on the command line. A wrong one is a usage error.

    argv: Arguments. None: those of the process.
    kind: `PreparationConfig`, or a subclass with more fields.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_flags(parser, kind)
    config = from_flags(kind, parser.parse_args(argv))
    try:
        check_ranges(config)
        check_config(config)
    except UserError as error:
        parser.error(str(error))
    return config


def check_config(config: PreparationConfig) -> None:
    """Raises UserError for settings that do not go together."""
    most = MOST_WORKERS_A_CORE * (os.cpu_count() or 1)
    if config.num_workers > most:
        raise UserError(f"--num-workers must be at most {most} here ({MOST_WORKERS_A_CORE} for each core), "
                        f"got {config.num_workers}")  # fmt: skip
    if config.part and config.force:
        raise UserError("--force with --part would remove what the other parts have written; remove the folder instead")
    if config.verify:
        return
    if signs := [sign for sign in "*?[" if sign in str(config.output_dir.resolve())]:
        what = f"{signs[0]} in its path, which energon prepare takes for a pattern"
        raise UserError(f"--output-dir {config.output_dir} has {what}: choose another folder")
    if config.data_dir is None:
        raise UserError("the following arguments are required: --data-dir")
    output_dir, data_dir = config.output_dir.resolve(), config.data_dir.resolve()
    if output_dir == data_dir or output_dir in data_dir.parents:
        raise UserError("--output-dir must not be or contain --data-dir: energon would take the source tars for shards")
