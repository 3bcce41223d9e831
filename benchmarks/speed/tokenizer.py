"""Speed and memory of DCT tokens against transformers' own image processors, side by side in one run.

    python -m benchmarks.speed.tokenizer --json tokenizer.json

Every case gives all its ways the same input and the same output size in pixels. The ways take turns, round after round;
a table shows each way's median time and the median over the rounds of (its time / ours): how many times faster ours is.

    image array     uint8 [448, 448, 3] in memory
    video array      16 of them
    video planes     the same 16 frames as 4:2:0 planes; the others need RGB
    jpeg 2x, 4x     a file of 896 x 896 and of 1792 x 1792 pixels, to 448 x 448
    video dense     an H.264 file of 16 frames, 896 x 1344, all of them to 448 x 672
    video sparse    8 s at 24 frames a second, 16 frames of it: the decoder has to go through them all

slow and fast are Qwen2VLImageProcessor and its Fast twin, files read by Pillow and by PyAV as rgb24. The image
is scikit-learn's china.jpg, mirrored at its borders to fill the size; in videos a window wanders over it.

Peak memory: growth of the process over 64 frames of 448 x 448, in a process of its own. On a machine with a CUDA device
the transform of 1080p frames there is timed against copying the pixels to it.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dct_qwen2vl.common.files import write_json

SIDE, FRAMES = 448, 16
VIDEO_SIZE, VIDEO_TARGET = (896, 1344), (448, 672)  # height, width
GPU_FRAME = (1120, 2016)  # 1080 x 1920, rounded up to what all presets take
Ways = dict[str, Callable[[], object]]


def image(height: int, width: int) -> np.ndarray:
    """A photograph, mirrored at its borders, uint8 [height, width, 3]."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg")
    padding = [(0, max(0, side - has)) for side, has in zip((height, width), photograph.shape)]
    return np.ascontiguousarray(np.pad(photograph, [*padding, (0, 0)], mode="symmetric")[:height, :width])


def video(frames: int, height: int, width: int, step: int = 3) -> np.ndarray:
    """A window that wanders over a larger image, uint8 [frames, height, width, 3]."""
    scene = image(height + frames * step, width + 2 * frames * step)
    windows = [scene[n * step : n * step + height, 2 * n * step : 2 * n * step + width] for n in range(frames)]
    return np.stack(windows)


def jpeg_file(side: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image(side, side)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def video_file(frames: int) -> bytes:
    """H.264 in mp4, 24 frames a second, the encoder's default groups of pictures."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
        stream.height, stream.width = VIDEO_SIZE
        stream.pix_fmt = "yuv420p"
        for frame in video(frames, *VIDEO_SIZE, step=1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return data.getvalue()


def read_rgb(data: bytes, indices: np.ndarray) -> list[np.ndarray]:
    """The usual way: PyAV's rgb24 at full size."""
    import av

    wanted = set(indices.tolist())
    with av.open(io.BytesIO(data)) as container:
        frames = enumerate(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted]


def processors(pixels: int) -> dict:
    """All processors, bound to an output of `pixels` pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorFast

    from dct_qwen2vl.dct.configuration_dct import PRESETS
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

    bounds = {"min_pixels": pixels, "max_pixels": pixels}
    stock = {"slow": Qwen2VLImageProcessor(**bounds), "fast": Qwen2VLImageProcessorFast(**bounds)}
    return stock | {name: DCTImageProcessor(name, **bounds) for name in PRESETS}


def array_cases() -> dict[str, Ways]:
    ways = processors(SIDE * SIDE)
    photograph, frames = image(SIDE, SIDE), list(video(FRAMES, SIDE, SIDE))
    # Cheap to get, and as good as real planes for timing: luma from green, chroma from every other red and blue sample.
    still = np.stack(frames)
    planes = [np.ascontiguousarray(part) for part in (still[..., 1], still[:, ::2, ::2, 2], still[:, ::2, ::2, 0])]
    cases = {
        "image array": {name: partial(way, images=photograph, return_tensors="pt") for name, way in ways.items()},
        "video array": {
            name: partial(way, images=None, videos=[frames], return_tensors="pt") for name, way in ways.items()
        },
    }
    cases["video planes"] = {name: cases["video array"][name] for name in ("slow", "fast")} | {
        name: partial(way.tokenizer.encode_planes, *planes)
        for name, way in ways.items()
        if name not in ("slow", "fast")
    }
    return cases


def jpeg_case(side: int) -> Ways:
    from PIL import Image

    from dct_qwen2vl.data.images import decode_image
    from dct_qwen2vl.dct.image_sizes_dct import target_size

    data, ways = jpeg_file(side), processors(SIDE * SIDE)

    def usual(processor) -> object:
        return processor(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")

    def ours(processor) -> object:
        factor = processor.dct_config.resize_factor[0]
        image = decode_image(data, lambda height, width, _: target_size(height, width, factor, SIDE**2, SIDE**2))
        return processor(images=image, return_tensors="pt", input_data_format="channels_last")

    return {name: partial(usual if name in ("slow", "fast") else ours, way) for name, way in ways.items()}


def video_case(frames: int) -> Ways:
    from dct_qwen2vl.data.videos import VideoSampling, decode_video

    sampling = VideoSampling(fps=24 * FRAMES / frames, min_frames=FRAMES, max_frames=FRAMES)
    data, ways = video_file(frames), processors(VIDEO_TARGET[0] * VIDEO_TARGET[1])
    indices = np.linspace(0, frames - 1, FRAMES).round().astype(int)

    def usual(processor) -> object:
        return processor(images=None, videos=[read_rgb(data, indices)], return_tensors="pt")

    def ours(processor) -> object:
        planes = decode_video(data, sampling, lambda *_: VIDEO_TARGET, planes=True)
        return processor.tokenizer.encode_planes(*planes.parts)

    return {name: partial(usual if name in ("slow", "fast") else ours, way) for name, way in ways.items()}


def check(case: str, ways: Ways) -> None:
    """All ways of a case must give as many pixels; a benchmark of different work is worth nothing."""

    def pixels(name: str, result: object) -> int:
        grid = result[1] if isinstance(result, tuple) else next(v for k, v in result.items() if k.endswith("_thw"))[0]
        return int(np.prod([int(side) for side in grid])) * {"x4": 4, "x16": 16}.get(name, 1)

    counts = {name: pixels(name, way()) for name, way in ways.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"benchmarks/speed/tokenizer.py: {case}: the ways differ in their output size: {counts}")


def measure(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds by way, the ways taking turns; one round beforehand is not counted."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict:
    """Median milliseconds by way, and for each preset how many times the others' time it goes into."""
    result = {"ms": {name: round(statistics.median(times) * 1e3, 3) for name, times in seconds.items()}}
    for ours in (name for name in seconds if name not in ("slow", "fast")):
        result[ours] = {
            f"{other} / {ours}": round(statistics.median(a / b for a, b in zip(seconds[other], seconds[ours])), 2)
            for other in ("slow", "fast")
        }
    return result


def run_cpu(rounds: int, threads: int) -> dict[str, dict]:
    """All cases on as many cores as threads; FFmpeg's threads keep to these cores, too."""
    import torch

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(allowed)[:threads]))
    torch.set_num_threads(threads)
    try:
        cases = array_cases()
        cases |= {"jpeg 2x": jpeg_case(2 * SIDE), "jpeg 4x": jpeg_case(4 * SIDE)}
        cases |= {"video dense": video_case(FRAMES), "video sparse": video_case(8 * 24)}
        results = {}
        for case, ways in cases.items():
            check(case, ways)
            results[case] = summary(measure(ways, rounds if "video" not in case else max(3, rounds // 3)))
            print_case(case, threads, results[case])
        return results
    finally:
        os.sched_setaffinity(0, allowed)


def print_case(case: str, threads: int, result: dict) -> None:
    times = "  ".join(f"{name} {ms:8.2f}" for name, ms in result["ms"].items())
    ratios = "  ".join(f"{name} {value:5.1f}" for name, value in result["x4"].items())
    print(f"{case:13} {threads} thr   ms: {times}   {ratios}", flush=True)


MEMORY_FRAMES = 64


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_growth(way: Callable[[], object]) -> tuple[object, int]:
    """-> what `way` returns, and by how many bytes the process grew at the peak, looked up every half millisecond."""
    before, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return way(), max(*seen, resident() - before)
    finally:
        done.set()
        watcher.join()


def memory_probe(name: str) -> None:
    """In a process of its own: prints bytes of input, of output and of growth at the peak."""
    way = processors(SIDE * SIDE)[name]
    small = list(video(2, SIDE, SIDE))
    way(images=None, videos=[small], return_tensors="pt")  # loads what is loaded once
    frames = list(video(MEMORY_FRAMES, SIDE, SIDE, step=1))
    result, growth = peak_growth(partial(way, images=None, videos=[frames], return_tensors="pt"))
    output = result["pixel_values_videos"]
    print(json.dumps({"input": sum(frame.nbytes for frame in frames), "output": output.nbytes, "growth": growth}))


def run_memory() -> dict[str, dict]:
    """The input is there already; `growth` is the output and what is needed to make it."""
    results = {}
    for name in ("slow", "fast", "exact", "x4", "x16"):
        command = [sys.executable, "-m", "benchmarks.speed.tokenizer", "--memory-probe", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sizes = json.loads(done.stdout.splitlines()[-1])
        sizes["peak / (input + output)"] = round(
            (sizes["input"] + sizes["growth"]) / (sizes["input"] + sizes["output"]), 2
        )
        results[name] = sizes
        megabytes = "  ".join(f"{key} {value / 1e6:6.1f} MB" for key, value in sizes.items() if "/" not in key)
        print(
            f"memory {name:6} {megabytes}   peak / (input + output) {sizes['peak / (input + output)']:.2f}", flush=True
        )
    return results


def run_gpu(rounds: int) -> dict[str, dict]:
    """Milliseconds for one frame: the transform of frames on the GPU, and copying their pixels there."""
    import torch

    from dct_qwen2vl.dct.configuration_dct import PRESETS, DCTConfig
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    pageable = torch.from_numpy(video(FRAMES, *GPU_FRAME))
    pinned, frames = pageable.pin_memory(), pageable.cuda()
    tokenizers = {name: DCTTokenizer(DCTConfig.preset(name), device="cuda") for name in PRESETS}
    ways: Ways = {"copy, pageable": lambda: pageable.cuda(), "copy, pinned": lambda: pinned.cuda(non_blocking=True)}
    ways |= {name: partial(tokenizer.encode, frames) for name, tokenizer in tokenizers.items()}

    def finished(way: Callable) -> None:
        way()
        torch.cuda.synchronize()

    seconds = measure({name: partial(finished, way) for name, way in ways.items()}, rounds)
    results = {name: {"ms a frame": round(statistics.median(s) * 1e3 / FRAMES, 4)} for name, s in seconds.items()}
    for name in PRESETS:
        for copy in ("copy, pageable", "copy, pinned"):
            pairs = zip(seconds[copy], seconds[name])
            results[name][f"{copy} / {name}"] = round(statistics.median(a / b for a, b in pairs), 2)
    for name, result in results.items():
        print(f"gpu {GPU_FRAME[0]} x {GPU_FRAME[1]}  {name:15}", *(f"{k} {v}" for k, v in result.items()), sep="  ")
    return results


def hardware() -> dict[str, str | int]:
    import torch
    import transformers

    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        names = [line.split(":")[1].strip() for line in stream if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case; a third of it for files of video")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to try")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--memory-probe", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_probe:
        memory_probe(arguments.memory_probe)
        return 0

    import torch

    figures = {"hardware": hardware()}
    print(*(f"{key}: {value}" for key, value in figures["hardware"].items()), sep="   ")
    for threads in arguments.threads:
        figures[f"threads {threads}"] = run_cpu(arguments.rounds, threads)
    figures["memory"] = run_memory()
    if torch.cuda.is_available():
        figures["gpu"] = run_gpu(arguments.rounds)
    else:
        print("gpu: no CUDA device, skipped")
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
