"""Your own videos, cut into pieces of equal length and encoded as H.264 in mp4: material that nobody drew.

Frames keep their size and their rate, so that a loader has to decode what a camera's file would have it decode.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.videos import VIDEO_EXTENSIONS, film_of

ENCODER = {"preset": "medium", "crf": "23", "threads": "1"}  # x264's own defaults
UNKNOWN_RATE = 25  # frames a second, of a file that does not tell


def cut_videos(folder: Path, output: Path, seconds: float) -> list[Path]:
    """Cuts all videos of a folder. Returns the pieces, mp4 files in `output`, in the order of the videos' names.

    folder: With the videos.
    output: An existing folder.
    seconds: Of a piece. What is left at the end of a video is left out; a shorter video is one piece.

    Raises UserError for a folder without videos.
    """
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)
    if not videos:
        raise UserError(f"{folder} has no video ({', '.join(VIDEO_EXTENSIONS)}): name a folder with some")
    with ProcessPoolExecutor() as pool:
        return list(chain.from_iterable(pool.map(partial(cut_video, output=output, seconds=seconds), videos)))


def cut_video(video: Path, output: Path, seconds: float) -> list[Path]:
    """The pieces of one video, as `cut_videos` has them.

    video: The file.
    output: An existing folder.
    seconds: Of a piece.
    """
    import av

    pieces: list[Path] = []
    with av.open(str(video)) as container:
        stream = film_of(container)
        rate = stream.average_rate or UNKNOWN_RATE
        frames, length = container.decode(stream), max(2, round(seconds * rate))
        for number in count():
            piece = output / f"{video.name}-{number:04d}.mp4"
            written = write_h264(islice(frames, length), piece, rate)
            if written < length and (pieces or not written):
                piece.unlink(missing_ok=True)
                return pieces
            pieces.append(piece)


def write_h264(frames: Iterator[Any], path: Path, rate: Any) -> int:
    """Writes PyAV's frames to an mp4 file, if there are any. Returns their number.

    frames: Of any format; an odd row or column is left out.
    path: The file.
    rate: Frames a second.
    """
    import av

    first = next(frames, None)
    if first is None:
        return 0
    width, height = first.width // 2 * 2, first.height // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        written = 0
        for frame in chain([first], frames):
            planes = frame.to_ndarray(format="yuv420p", width=width, height=height)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))  # without its old stamp
            written += 1
        container.mux(stream.encode())
    return written
