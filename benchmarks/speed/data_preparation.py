"""Speed and memory of data preparation against the plain way and against copying, side by side in one run.

    python -m benchmarks.speed.data_preparation --json preparation.json

The same generated raw data (tars of 640x480 photographs, conversations of two turns) go through all ways in turns,
round after round; a table shows images a second, and the median over the rounds of how many times faster ours is.

    ours         data_preparation.py with its defaults, without the report: from the raw data to the last fsync
    plain        what a user would write: extract the tars to disk, open every image with PIL, convert to RGB,
                 encode as JPEG in a multiprocessing.Pool, webdataset.ShardWriter
    copy         the same media and JSON text into tars of 1,000, from a list of their places that is made beforehand:
                 nothing is parsed, checked, shuffled or hashed; one process
    copies       the same with as many processes as ours
    ... synced   with an fsync of every tar, as ours has it; without, the bytes are still on their way to the disk

Three mixes: 90 % JPEG and 10 % PNG; all PNG, half as many; all JPEG, four times as many, since copying is so quick, and
without the plain way. What a way's first process imports is not timed; the page cache is warm, and flushed before every
way. Peak memory: proportional set size (smaps_rollup) of all processes of a run over
700,000 entries in 600 MB of metadata and one tar of very small images, so that next to none of it is images.
"""

import argparse
import io
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dct_qwen2vl.common.files import write_json

if TYPE_CHECKING:
    from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 480, 640
DIFFERENT = 48  # images; each file has a comment of its own, so that no two are the same
TARS = 4
PER_SHARD = 1000
WAYS = ("ours", "plain", "copy", "copy synced", "copies", "copies synced")


class Mix(NamedTuple):
    """jpeg_share: of the images; images: times --images; bar: how many times as fast as `way` ours shall be."""

    jpeg_share: float
    images: float
    ways: tuple[str, ...]
    way: str
    bar: float


MIXES = {
    "90 % JPEG": Mix(0.9, 1, WAYS, "plain", 8.0),
    "all PNG": Mix(0.0, 0.5, WAYS, "plain", 2.0),
    "all JPEG": Mix(1.0, 4, tuple(way for way in WAYS if way != "plain"), "copy synced", 1 / 1.5),
}
ANSWER = "It shows a building behind a lake, and some trees; the light comes from the left. "


# Raw data


def draw_images(count: int, seed: int) -> Iterator["Image.Image"]:
    """Views of photographs that installed packages carry, each another part at another scale."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width = int(rng.uniform(0.7, 1) * photograph.width)
        height = min(width * HEIGHT // WIDTH, photograph.height)
        left, top = int(rng.integers(photograph.width - width + 1)), int(rng.integers(photograph.height - height + 1))
        view = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        noise = rng.normal(0, 4, (HEIGHT, WIDTH, 1))  # as a sensor's: what has been enlarged is too smooth
        yield Image.fromarray((np.asarray(view) + noise).round().clip(0, 255).astype(np.uint8))


def encode(image: "Image.Image", file_format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **({"quality": 90} if file_format == "JPEG" else {}))
    return stream.getvalue()


def add_comment(data: bytes, text: bytes) -> bytes:
    """The same image in another file: with a JPEG comment or a PNG text chunk."""
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]
    chunk = b"tEXtComment\0" + text
    end_of_header = 33
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:end_of_header] + framed + data[end_of_header:]


def make_entry(name: str, number: int, answer: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is in the picture?"}, {"from": "gpt", "value": answer}]
    return {"id": f"{number:012d}", "image": name, "conversations": turns}


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def make_raw_data(folder: Path, images: int, jpeg_share: float, encoded: dict[str, list[bytes]], seed: int) -> None:
    """`images` entries, each with an image of its own, in TARS tars."""
    folder.mkdir(parents=True)
    rng, entries = random.Random(seed), []
    for source in range(TARS):
        with tarfile.open(folder / f"source{source}.tar", "w") as tar:
            for number in range(source, images, TARS):
                file_format = "JPEG" if rng.random() < jpeg_share else "PNG"
                name = f"source{source}/{number:012d}.{'jpg' if file_format == 'JPEG' else 'png'}"
                add_file(tar, name, add_comment(encoded[file_format][number % DIFFERENT], b"%012d" % number))
                entries.append(make_entry(name, number, ANSWER * 3))
    (folder / "cambrian737k.json").write_text(json.dumps(entries))


# The ways


def run_ours(data: Path, output: Path, workers: int) -> None:
    import data_preparation

    arguments = ["--data-dir", str(data), "--output-dir", str(output), "--num-workers", str(workers), "--no-report"]
    if data_preparation.main(arguments):
        raise SystemExit("data_preparation.py failed")


def encode_anew(path: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def run_plain(data: Path, output: Path, workers: int) -> None:
    from webdataset import ShardWriter

    extracted = output / "extracted"
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.extractall(extracted, filter="data")
    entries = json.loads((data / "cambrian737k.json").read_text())
    random.Random(0).shuffle(entries)
    names = [str(extracted / entry["image"]) for entry in entries]
    pattern = str(output / "pretrain-%06d.tar")
    with Pool(workers) as pool, ShardWriter(pattern, maxcount=PER_SHARD, verbose=0) as writer:
        for entry, jpeg in zip(entries, pool.imap(encode_anew, names, chunksize=16)):
            writer.write({"__key__": entry["id"], "jpg": jpeg, "json": entry})


def list_places(data: Path) -> list[list[tuple[str, int, int, bytes]]]:
    """(tar, offset, size, JSON text) of every image, in lists of PER_SHARD."""
    entries = {entry["image"]: entry for entry in json.loads((data / "cambrian737k.json").read_text())}
    places = []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                text = json.dumps(entries[member.name]).encode()
                places.append((str(path), member.offset_data, member.size, text))
    return [places[start : start + PER_SHARD] for start in range(0, len(places), PER_SHARD)]


def copy_shard(synced: bool, task: tuple[str, list[tuple[str, int, int, bytes]]]) -> None:
    output, places = task
    sources: dict[str, int] = {}
    with open(output, "wb", buffering=1 << 20) as stream:
        for number, (path, offset, size, text) in enumerate(places):
            if path not in sources:
                sources[path] = os.open(path, os.O_RDONLY)
            for ending, content in (("jpg", os.pread(sources[path], size, offset)), ("json", text)):
                header = tarfile.TarInfo(f"{number:09d}.{ending}")
                header.size = len(content)
                stream.write(header.tobuf(tarfile.USTAR_FORMAT))
                stream.write(content)
                stream.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.flush()
        if synced:
            os.fsync(stream.fileno())
    for descriptor in sources.values():
        os.close(descriptor)


def run_copy(tasks: list, workers: int, synced: bool) -> None:
    copy = partial(copy_shard, synced)
    if workers == 1:
        for task in tasks:
            copy(task)
        return
    with Pool(workers) as pool:
        for _ in pool.imap_unordered(copy, tasks):
            pass


def time_way(way: str, data: Path, output: Path, workers: int) -> float:
    """Seconds of one way, in this process; what it imports is imported before."""
    output.mkdir(parents=True)
    if way == "ours":
        import data_preparation  # noqa: F401

        run = partial(run_ours, data, output, workers)
    elif way == "plain":
        import PIL.JpegImagePlugin  # noqa: F401
        import webdataset  # noqa: F401

        run = partial(run_plain, data, output, workers)
    else:
        tasks = [(str(output / f"{number:06d}.tar"), places) for number, places in enumerate(list_places(data))]
        run = partial(run_copy, tasks, workers if "copies" in way else 1, "synced" in way)
    os.sync()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_in_process(way: str, data: Path, output: Path, workers: int) -> float:
    """The same in a process of its own; removes what was written."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.data_preparation",
        "--way",
        way,
        str(data),
        str(output),
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(data.parent / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def compare_ways(folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Time all ways on all mixes; prints the tables."""
    drawn = list(draw_images(DIFFERENT, arguments.seed))
    encoded = {file_format: [encode(image, file_format) for image in drawn] for file_format in ("JPEG", "PNG")}
    results = {}
    for name, mix in MIXES.items():
        images = max(1, int(arguments.images * mix.images))
        make_raw_data(folder / "raw", images, mix.jpeg_share, encoded, arguments.seed)
        size = sum(path.stat().st_size for path in (folder / "raw").glob("*.tar")) / images
        rounds = [
            {way: time_in_process(way, folder / "raw", folder / "out", arguments.workers) for way in mix.ways}
            for _ in range(arguments.rounds)
        ]
        shutil.rmtree(folder / "raw")
        results[name] = describe_mix(name, images, size, rounds)
    return results


def describe_mix(name: str, images: int, size: float, rounds: list[dict[str, float]]) -> dict:
    """Print and return the rates and ratios of one mix."""
    mix = MIXES[name]
    print(f"\n{name}: {images} images of {size / 1000:.0f} kB")
    result = {"images": images, "bytes_of_an_image": round(size), "ways": {}}
    for way in mix.ways:
        rate = statistics.median(images / times[way] for times in rounds)
        ratios = sorted(times[way] / times["ours"] for times in rounds)
        ratio = statistics.median(ratios)
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {way:<16}{rate:8.0f} images/s   ours is {ratio:6.2f} times as fast {spread}")
        result["ways"][way] = {"images_per_second": rate, "ours_times_as_fast": ratio, "of_rounds": ratios}
    reached = result["ways"][mix.way]["ours_times_as_fast"]
    print(f"  bar: {mix.bar:.2f} times as fast as {mix.way}: {'reached' if reached >= mix.bar else 'NOT reached'}")
    return result


# Memory


def make_large_metadata(folder: Path, entries: int, size: int, jpeg: bytes) -> None:
    """`entries` entries in about `size` bytes, and a tar with a very small image for each."""
    folder.mkdir(parents=True)
    blank = len(json.dumps(make_entry(f"coco/train2017/{0:012d}.jpg", 0, "")))
    answer = (ANSWER * (size // entries // len(ANSWER) + 1))[: max(1, size // entries - blank)]
    with (folder / "cambrian737k.json").open("w") as metadata, tarfile.open(folder / "coco.tar", "w") as tar:
        for number in range(entries):
            name = f"coco/train2017/{number:012d}.jpg"
            add_file(tar, name, add_comment(jpeg, b"%012d" % number))
            tar.members = []
            metadata.write(("[" if number == 0 else ",") + json.dumps(make_entry(name, number, answer)))
        metadata.write("]")


def tree_memory(root: int) -> int:
    """Proportional set size of a process and all its descendants, bytes."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(path.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measure_memory(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak of a whole run over large metadata, and when its phases ended."""
    from PIL import Image

    jpeg = encode(Image.new("RGB", (16, 16), "grey"), "JPEG")
    make_large_metadata(folder / "raw", arguments.metadata_entries, arguments.metadata_bytes, jpeg)
    size = (folder / "raw" / "cambrian737k.json").stat().st_size
    command = [sys.executable, str(REPOSITORY / "data_preparation.py"), "--maxcount", "5000"]
    command += ["--data-dir", str(folder / "raw"), "--output-dir", str(folder / "out")]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ends = {"planning": "Samples: ", "writing": "Conversion done: ", "report": "Report: "}  # what is said then
    peaks, said = dict.fromkeys(ends, 0), []
    reader = threading.Thread(target=lambda: said.extend((line, time.perf_counter()) for line in process.stdout))
    reader.start()
    while process.poll() is None:
        over = [phase for phase, end in ends.items() if any(line.startswith(end) for line, _ in said)]
        phase = list(ends)[min(len(over), len(ends) - 1)]
        peaks[phase] = max(peaks[phase], tree_memory(process.pid))
        time.sleep(0.05)
    reader.join()
    planned = next(when for line, when in said if line.startswith("Samples: ")) - start
    result = {
        "entries": arguments.metadata_entries,
        "metadata_bytes": size,
        "planning_seconds": planned,
        "all_seconds": time.perf_counter() - start,
        **{f"peak_bytes_{phase}": peak for phase, peak in peaks.items()},
    }
    print(f"\nmemory: {arguments.metadata_entries} entries in {size / 1e6:.0f} MB of metadata")
    print(f"  planned after {planned:.1f} s, complete after {result['all_seconds']:.1f} s")
    print("  peak of all processes: " + ", ".join(f"{phase} {peak / 1e6:.0f} MB" for phase, peak in peaks.items()))
    reached = "reached" if max(peaks.values()) <= 600e6 and process.returncode == 0 else "NOT reached"
    print(f"  bar: at most 600 MB: {reached}")
    return result


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--images", type=int, default=4000, metavar="N", help="of the first mix (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: the cores, %(default)s)")
    add(
        "--metadata-entries",
        type=int,
        default=700_000,
        metavar="N",
        help="for the memory; 0: none (default: %(default)s)",
    )
    add("--metadata-bytes", type=int, default=600_000_000, metavar="N", help="for the memory (default: %(default)s)")
    add("--work-dir", type=Path, metavar="DIR", help="where data are written and removed (default: a temporary folder)")
    add("--seed", type=int, default=0, help="of the generated data (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--way", nargs=3, metavar=("WAY", "DATA", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.way:
        way, data, output = arguments.way
        print(time_way(way, Path(data), Path(output), arguments.workers))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        print(f"{arguments.workers} processes on {len(os.sched_getaffinity(0))} cores, data in {folder}")
        results = {"mixes": compare_ways(Path(folder), arguments)} if arguments.images else {}
        if arguments.metadata_entries:
            results["memory"] = measure_memory(Path(folder), arguments)
    if arguments.json:
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
