"""The image and video files that a command is given: which there are, and what they hold.

Letters used for shapes: T H W, frames, rows and columns in px.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.analysis.coefficient_moments import BLOCK
from dct_qwen2vl.common.scripts import UserError

if TYPE_CHECKING:
    import numpy as np


def add_media_flags(parser: argparse.ArgumentParser) -> None:
    """--images and --videos."""
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}s", type=Path, nargs="+", default=[], metavar="PATH", help=f"{kind} files and folders"
        )


def files_of(paths: list[Path], extensions: tuple[str, ...]) -> tuple[list[Path], int]:
    """The files to read, and how many others lie in the folders. Raises UserError for a path that is not there.

    paths: of files, which are taken whatever they are called, and of folders.
    extensions: of the files in folders, lower case, without a dot.
    """
    found, others = [], 0
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give --images and --videos files and folders")
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
        fitting = [file for file in inside if file.suffix.lower().lstrip(".") in extensions]
        found += fitting if path.is_dir() else [path]
        others += len(inside) - len(fitting)
    return found, others


def spread(files: list[Path], most: int) -> list[Path]:
    """Some of the files, evenly spread.

    files: All files.
    most: Files to return, at most.
    """
    return [files[i * len(files) // most] for i in range(most)] if len(files) > most else files


def read_images(files: list[Path], skipped: list[str]) -> Iterator["np.ndarray"]:
    """Images that hold a block, uint8 [H, W, 3].

    files: Image files.
    skipped: Gets a line for each file that cannot be used, with the reason.
    """
    from dct_qwen2vl.data.images import decode_image
    from dct_qwen2vl.data.reading import MediaError

    for file in files:
        try:
            image = decode_image(file.read_bytes())
        except (MediaError, OSError) as error:
            skipped.append(f"{file}: {error}")
            continue
        if min(image.shape[:2]) < BLOCK[1]:
            skipped.append(f"{file}: {image.shape[1]} x {image.shape[0]} px, smaller than a block of {BLOCK[1]} px")
            continue
        yield image


def read_videos(files: list[Path], skipped: list[str]) -> Iterator["np.ndarray"]:
    """Videos that hold a block, uint8 [T, H, W, 3]: two frames a second, at least a block's and at most four blocks'.

    files: Video files.
    skipped: As in `read_images`.
    """
    from dct_qwen2vl.data.reading import MediaError
    from dct_qwen2vl.data.videos import VideoSampling, decode_video

    sampling = VideoSampling(fps=2.0, min_frames=BLOCK[0], max_frames=4 * BLOCK[0])
    for file in files:
        try:
            video = decode_video(file.read_bytes(), sampling)
        except (MediaError, OSError) as error:
            skipped.append(f"{file}: {error}")
            continue
        if len(video) < BLOCK[0] or min(video.shape[1:3]) < BLOCK[1]:
            size = f"{len(video)} frames of {video.shape[2]} x {video.shape[1]} px"
            skipped.append(f"{file}: {size}, smaller than a block of {BLOCK[0]} frames of {BLOCK[1]} px")
            continue
        yield video
