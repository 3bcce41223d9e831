"""What one loader process delivers on real H.264 videos, with all cells and with skipping.

    python -m benchmarks.speed.loader --videos FOLDER --json loader.json

Cuts your videos into pieces and encodes these as H.264 (real_videos.py), makes shards of them, and reads them as the
Megatron engine does: Energon, task encoder, packed sequences. Nothing is trained. All figures are processor time of the
process, which works on one thread: other work on the machine hardly changes them. Ways take turns, each in a process of
its own.

    open      the container and its packets         rule      which cells are kept
    decode    FFmpeg's H.264 decoder                keep      their tokens, in bf16
    resize    planes to the size that is read       rest      text, packing, Energon
    DCT       planes to tokens

    first     until the first packed sequence is there, which includes filling the buffer
    encoded   samples encoded for each sample that was given, without those that still wait
    held      most memory of kept tokens that wait for their sequence
    resident  growth of the process
    workers   loader processes that keep a GPU busy that trains --gpu-tokens vision tokens a second, 3 % to spare
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.speed.training_run import VIDEO_RATE, VIDEO_SIDE, make_shards
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import run_main

GPU_TOKENS = 65_500  # vision tokens a second of `x4` in docs/training.md: 32 samples of 2,048
SPARE = 1.03
STAGES = ("open", "decode", "resize", "DCT", "rule", "keep", "rest")


class Stages:
    """Seconds of processor time by the name of a stage, without those of the stages inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, measured.

        name: Of the stage.
        function: Any.
        """

        @wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                whole = time.process_time() - start
                self.seconds[name] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return measured

    @contextmanager
    def watching(self, encoder: Any) -> Iterator[None]:
        """Within the block, the stages of this task encoder are measured."""
        import av

        from dct_qwen2vl.data import media_encoder, videos
        from dct_qwen2vl.dct import transform_dct

        places = [
            (av, "open", "open"), (videos, "_packets", "open"), (media_encoder, "media_shape", "open"),
            (media_encoder, "as_array", "decode"), (videos._Video, "_convert", "resize"),
            (transform_dct.DCTTokenizer, "encode_planes", "DCT"), (media_encoder, "kept_cells", "rule"),
            (media_encoder, "keep_tokens", "keep"), (encoder, "_in_token_dtype", "keep"),
        ]  # fmt: skip
        with ExitStack() as stack:
            for owner, function, name in places:
                stack.enter_context(patch.object(owner, function, self.timed(name, getattr(owner, function))))
            yield


class Counts:
    """What a task encoder did: samples read from shards, samples encoded, most bytes of samples that wait."""

    def __init__(self, encoder: Any) -> None:
        self.read = self.encoded = self.held = 0
        self._encoder, self._encode, self._hold = encoder, encoder.encode, encoder._held.hold
        encoder.encode, encoder._held.hold = self._counted_encode, self._counted_hold

    def _counted_encode(self, sample: Any) -> Any:
        self.encoded += 1
        return self._encode(sample)

    def _counted_hold(self, sample: Any) -> Any:
        held = self._hold(sample)
        self.read, self.held = self.read + 1, max(self.held, self._encoder._held.bytes)
        return held


def new_data(model_dir: Path, shards: Path, skip_db: float, arguments: argparse.Namespace) -> Any:
    """The data module of a Megatron run, read in this process.

    model_dir: Has tokenizer and image processor.
    shards: Of `make_shards`.
    skip_db: dB. 0: all cells.
    arguments: Of the command line.
    """
    from transformers import AutoTokenizer

    from dct_qwen2vl.data.loader import EnergonDataModule
    from dct_qwen2vl.data.videos import VideoSampling
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from task_encoder import PackingTaskEncoder

    processor = DCTImageProcessor.from_pretrained(model_dir, max_pixels=arguments.max_pixels, skip_db=skip_db or None)
    encoder = PackingTaskEncoder(
        AutoTokenizer.from_pretrained(model_dir),
        processor,
        seq_length=4096,
        video_sampling=VideoSampling(fps=VIDEO_RATE),
        pack_tokens=arguments.pack_tokens,
        pack_vision_tokens=2 * arguments.pack_tokens,
    )
    numbers = {"rank": 0, "world_size": 1, "num_workers": 0, "micro_batch_size": 1, "global_batch_size": 1}
    return EnergonDataModule(
        shards,
        encoder,
        total_batches=1_000_000,
        seed=0,
        shuffle_buffer_size=arguments.shuffle_buffer,
        packing_buffer_size=arguments.packing_buffer,
        **numbers,
    )


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def deliver(model_dir: Path, shards: Path, skip_db: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Reads packed sequences in this process. See the module for the figures; arguments as `new_data` has them."""
    import torch

    torch.set_num_threads(1)
    data = new_data(model_dir, shards, skip_db, arguments)
    encoder, stages, before = data.task_encoder, Stages(), memory("VmRSS")
    counts, samples, kept, cells, fills = Counts(encoder), 0, 0, 0, []
    with stages.watching(encoder):
        begin = time.process_time()
        sequences = iter(data.train_dataloader())
        next(sequences)
        first, encoded = time.process_time() - begin, counts.encoded
        stages.seconds.clear()
        begin = time.process_time()
        while samples < arguments.samples:
            sequence = next(sequences)
            samples += len(sequence.keys)
            kept += len(sequence.tokens)
            cells += int(sequence.grid_thw.prod(dim=1).sum())
            fills.append(max(len(sequence.input_ids) / encoder.budget[0], len(sequence.tokens) / encoder.budget[1]))
        seconds = time.process_time() - begin
    again = counts.encoded / counts.read if counts.read else 1.0
    ms = 1000 / (counts.encoded - encoded) * again
    stages.seconds["rest"] = seconds - stages.seconds.total()
    return {
        **{name: stages.seconds[name] * ms for name in STAGES},
        "total": seconds * ms,
        "first": first,
        "encoded": again,
        "held_mib": counts.held / 2**20,
        "resident_mib": (memory("VmHWM") - before) / 2**20,
        "kept_share": kept / cells,
        "tokens": kept / samples,
        "fill": statistics.mean(fills),
    }


def workers(line: dict[str, float], gpu_tokens: float) -> float:
    """Loader processes, each with a core of its own, that a GPU of so many vision tokens a second needs.

    line: Of `deliver`.
    gpu_tokens: That the GPU trains, tokens a second.
    """
    return SPARE * gpu_tokens / line["tokens"] * line["total"] / 1000


def described(name: str, line: dict[str, float], arguments: argparse.Namespace) -> str:
    """The figures of a way for the screen.

    name: Of the way.
    line: Of `deliver`.
    arguments: Of the command line.
    """
    rate = 1000 / line["total"]
    stages = ", ".join(f"{stage} {line[stage]:.1f}" for stage in STAGES)
    return (
        f"{name}: {line['total']:.1f} ms a sample ({stages}); {rate:.1f} samples/s, "
        f"{rate * arguments.video_seconds:.0f} video seconds/s a core\n"
        f"    {line['kept_share']:.0%} of the cells, {line['tokens']:.0f} vision tokens a sample, sequences "
        f"{line['fill']:.0%} full, first after {line['first']:.0f} s, encoded {line['encoded']:.2f} times, held "
        f"{line['held_mib']:.0f} MiB, resident + {line['resident_mib']:.0f} MiB, "
        f"workers {workers(line, arguments.gpu_tokens):.1f}"
    )


def run_all(arguments: argparse.Namespace) -> int:
    """Makes the shards, then measures. Raises UserError."""
    from benchmarks.speed.tokenizer import hardware
    from benchmarks.speed.training_run import make_tiny_model

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shards = make_shards("videos", arguments.files, folder, 0, arguments.videos, arguments.video_seconds)
        model_dir = make_tiny_model(arguments.dct, folder, 0)
        results: dict[float, list[dict[str, float]]] = {0.0: [], arguments.skip_db: []}
        for _ in range(arguments.rounds):
            for skip_db, lines in results.items():
                with get_context("spawn").Pool(1) as process:
                    lines.append(process.apply(deliver, (model_dir, shards, skip_db, arguments)))
    found = {}
    for skip_db, lines in results.items():
        name = f"skipping at {skip_db:g} dB" if skip_db else "all cells"
        found[name] = {key: statistics.median(line[key] for line in lines) for key in lines[0]}
        print(described(name, found[name], arguments), flush=True)
    if arguments.json:
        write_json(arguments.json, {"hardware": hardware(), "seconds": arguments.video_seconds, "ways": found})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="FOLDER", help="videos of your own")
    parser.add_argument("--video-seconds", type=float, default=8.0, help="of a piece")
    parser.add_argument("--max-pixels", type=int, default=VIDEO_SIDE**2, help="of a frame that is read")
    parser.add_argument("--dct", default="x4", help="token format")
    parser.add_argument("--skip-db", type=float, default=38.0, help="dB, of the way with skipping")
    parser.add_argument("--files", type=int, default=200, help="samples in the shards; pieces come repeatedly")
    parser.add_argument("--samples", type=int, default=200, help="samples measured, once the buffer is full")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways; the median counts")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="of a packed sequence; twice as many in vision")
    parser.add_argument("--packing-buffer", type=int, default=512, help="most samples that wait")
    parser.add_argument("--shuffle-buffer", type=int, default=100, help="samples that are shuffled")
    parser.add_argument("--gpu-tokens", type=float, default=GPU_TOKENS, help="vision tokens a second of the GPU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    return run_main("benchmarks/speed/loader.py", partial(run_all, arguments))


if __name__ == "__main__":
    sys.exit(main())
