"""The whole of a training run at real size, on one GPU and on two: files in shards -> loader -> Megatron engine.

    python -m benchmarks.speed.training_run --work videos --gpus 1 2 --json training_run.json
    python -m benchmarks.speed.training_run --videos FOLDER --skip-db 38 --num-workers 14
    python -m benchmarks.speed.training_run --size 7b --gpus 4 --tensor-parallel 2

Makes a Qwen2-VL-2B or 7B in DCT tokens with random weights, draws images (JPEG, 640 x 480 to 1024 x 768) or videos
(H.264, 16 frames of 448 x 448) with conversations, prepares shards, and starts qwen_launch.sh as a user would. The
figures are those of metrics.jsonl without the first steps: samples/s, MFU, the share of time in which training waited
for data.
With several numbers of GPUs the packed sequences of a step are in proportion to them. The last column is the speed-up
over the first.

`--videos` takes videos of your own instead of drawn ones: cut into pieces, encoded again as H.264, with drawn
conversations. `--skip-db` launches each run once more without the cells that a kept cell already shows. `--tiny` tries
all this on a CPU with a tiny model; its figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.speed.kernels import print_kinds, trace_shares
from benchmarks.speed.real_videos import cut_videos
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.common.scripts import UserError, run_main

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = (
    "the",
    "of",
    "a",
    "to",
    "in",
    "is",
    "image",
    "shows",
    "left",
    "right",
    "red",
    "blue",
    "round",
    "large",
    "street",
)
IMAGES = ((480, 640), (600, 800), (768, 1024))  # height, width
VIDEO_FRAMES, VIDEO_SIDE, VIDEO_RATE = 16, 448, 2
SPECIAL_TOKENS = {  # by their names in config.json
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
}  # fmt: skip
WARM_UP = 5  # steps that do not count, where nothing else is said


def conversation(rng: np.random.Generator, kind: str, turns: int, words: int) -> list[dict[str, str]]:
    """Questions and answers of about `words` words each; every word is one to three tokens."""
    made = []
    for turn in range(turns):
        question, answer = (" ".join(rng.choice(WORDS, words)) for _ in range(2))
        made += [{"from": "human", "value": f"<{kind}>\n{question}?" if turn == 0 else f"{question}?"}]
        made += [{"from": "gpt", "value": f"{answer}."}]
    return made


def draw_image(number: int, folder: Path, seed: int) -> dict:
    """A crop of a photograph of its own size, as a JPEG file; returns its entry."""
    from PIL import Image

    from benchmarks.speed.tokenizer import image

    rng = np.random.default_rng((seed, number))
    height, width = IMAGES[rng.integers(len(IMAGES))]
    top, left = rng.integers(0, 200, 2)
    pixels = np.roll(image(height + 200, width + 200), rng.integers(0, 256, 3), axis=2)
    name = f"images/{number:06d}.jpg"
    Image.fromarray(pixels[top : top + height, left : left + width]).save(folder / name, quality=90)
    return {"id": str(number), "image": name, "conversations": conversation(rng, "image", int(rng.integers(1, 4)), 12)}


def draw_video(number: int, folder: Path, seed: int) -> dict:
    """A window that wanders over a photograph, as an mp4 file; returns its entry."""
    import av

    from benchmarks.speed.tokenizer import video

    rng = np.random.default_rng((seed, number))
    frames = video(VIDEO_FRAMES, VIDEO_SIDE, VIDEO_SIDE, step=int(rng.integers(1, 6)))
    name = f"images/{number:06d}.mp4"
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream("libx264", rate=VIDEO_RATE, options={"preset": "veryfast", "threads": "1"})
        stream.width = stream.height = VIDEO_SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.roll(frame, number % 50, axis=1), format="rgb24"))
            )
        container.mux(stream.encode())
    return {"id": str(number), "video": name, "conversations": conversation(rng, "video", 2, 32)}


def real_entries(count: int, folder: Path, seed: int, videos: Path, seconds: float) -> list[dict]:
    """Entries of pieces of real videos, which are repeated where there are too few. Raises UserError."""
    pieces = cut_videos(videos, folder / "images", seconds)
    entries = []
    for number in range(count):
        words = conversation(np.random.default_rng((seed, number)), "video", 2, 32)
        name = f"images/{pieces[number % len(pieces)].name}"
        entries.append({"id": str(number), "video": name, "conversations": words})
    return entries


def make_shards(
    work: str, count: int, folder: Path, seed: int, videos: Path | None = None, seconds: float = 8.0
) -> Path:
    """Draws, or cuts real videos, then prepares as a user would.

    work: "videos" or "mix", of what is drawn.
    count: Samples.
    folder: Gets the raw set and the shards.
    seed: Of what is drawn.
    videos: A folder of real videos. None: all is drawn.
    seconds: Of a piece of a real video.

    Raises UserError.
    """
    raw, shards = folder / "raw", folder / "shards"
    (raw / "images").mkdir(parents=True)
    if videos:
        entries = real_entries(count, raw, seed, videos, seconds)
    else:
        draw = partial(draw_video if work == "videos" else draw_image, folder=raw, seed=seed)
        with ProcessPoolExecutor() as pool:
            entries = list(pool.map(draw, range(count), chunksize=8))
    (raw / "cambrian737k.json").write_text(json.dumps(entries), encoding="utf-8")
    command = [sys.executable, "data_preparation.py", "--data-dir", str(raw), "--output-dir", str(shards)]
    if videos:
        command += ["--split", "1,0,0"]  # entries of one piece share a split, and there may be few pieces
    run([*command, "--maxcount", str(max(8, count // 40)), "--energon-prepare", "--no-report"])
    return shards


def make_model(preset: str, folder: Path, seed: int, size: str = "2b") -> Path:
    """A directory of a Qwen2-VL that reads `preset` tokens: random weights, the tokenizer of the sample data."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from benchmarks.speed.samples import real_config
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from dct_qwen2vl.toy.model import write_checkpoint

    tiny, model_dir = folder / "tiny", folder / "model"
    write_checkpoint([" ".join(WORDS)] * 20, tiny, seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = real_config(DCTConfig.preset(preset).num_coefficients, size)
    for name, token in SPECIAL_TOKENS.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(config, torch_dtype=torch.bfloat16)
    model.cpu().save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    DCTImageProcessor(dct=preset, max_pixels=1024 * 1024).save_pretrained(model_dir)
    return model_dir


def make_tiny_model(preset: str, folder: Path, seed: int) -> Path:
    """The sample data's model with `preset` tokens, for a try without a GPU."""
    from dct_qwen2vl.checkpoints.conversion import convert
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.toy.model import write_checkpoint

    write_checkpoint([" ".join(WORDS)] * 20, folder / "tiny", seed)
    convert(folder / "tiny", folder / "model", DCTConfig.preset(preset))
    return folder / "model"


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def settings_of(arguments: argparse.Namespace, model_dir: Path, shards: Path, folder: Path) -> dict[str, str]:
    """The environment of all launches of qwen_launch.sh.

    arguments: Of the command line.
    model_dir: The model.
    shards: Of `make_shards`.
    folder: Gets the run folders.
    """
    settings = {
        "MODEL_DIR": model_dir, "DATASET_DIR": shards, "OUTPUT_DIR": folder, "MAX_STEPS": arguments.steps,
        "VAL_INTERVAL": 10000, "SAVE_INTERVAL": 0, "LR": "1e-6", "MIN_LR": "1e-7",
        "NUM_WORKERS": arguments.num_workers, "SEQ_LENGTH": 4096, "PYTHON": sys.executable,
    }  # fmt: skip
    if arguments.tiny:
        settings |= {"ENGINE": "automodel", "MBS": 1}
    else:
        vision_tokens = arguments.pack_vision_tokens or ""
        settings |= {"ENGINE": "megatron", "PACK_TOKENS": arguments.pack_tokens, "PACK_VISION_TOKENS": vision_tokens}
        settings |= {"TP": arguments.tensor_parallel, "PP": arguments.pipeline_parallel}
    if arguments.videos:
        settings["MAXPIXELS"] = arguments.max_pixels
    return {name: str(value) for name, value in settings.items()}


def launch(arguments: argparse.Namespace, settings: dict[str, str], gpus: int, skip_db: float) -> dict:
    """One run of qwen_launch.sh; its figures.

    arguments: Of the command line.
    settings: Of `settings_of`.
    gpus: Processes, one GPU each.
    skip_db: dB. 0: all cells have tokens.
    """
    name = f"gpus{gpus}-skip" if skip_db else f"gpus{gpus}"
    run_dir = Path(settings["OUTPUT_DIR"]) / name
    own = {"EXPERIMENT_NAME": name, "NUM_PROC_PER_NODE": gpus, "GBS": arguments.sequences * gpus}
    own |= {"SKIP_DB": skip_db, "SKIP_SHARE": 1}  # cells are left out in all samples, or in none
    command = ["bash", "qwen_launch.sh", "--log-interval", "1", "--video-fps", str(VIDEO_RATE)]
    command += ["--shuffle-buffer", "100", "--compare-samples", "0"]  # the two forms of random weights say nothing here
    if arguments.kernels:
        command += ["--profile", str(WARM_UP - 1)]
    start = time.perf_counter()
    run(command, **settings, **{key: str(value) for key, value in own.items()})
    wall = time.perf_counter() - start
    kinds = trace_shares(next(run_dir.rglob("rank0.json.gz"))) if arguments.kernels else {}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = figures([line for line in lines if "loss" in line], arguments.uncounted)
    return {"gpus": gpus, "skip_db": skip_db, **found, "launch_seconds": wall, "kinds": kinds}


def figures(lines: list[dict], uncounted: int) -> dict:
    """The means over the steps past the warm-up, weighted by their time; shares of a CPU's run are 0 or left out.

    lines: Of metrics.jsonl, one for each step.
    uncounted: Steps of the warm-up.
    """
    steps = lines[uncounted:]
    seconds, visual = sum(line["seconds"] for line in steps), sum(line["visual_tokens"] for line in steps)
    cells = sum(line["visual_tokens"] / line.get("kept_share", 1.0) for line in steps if line["visual_tokens"])
    return {
        "samples_per_second": sum(line["samples"] for line in steps) / seconds,
        "visual_tokens_per_second": visual / seconds,
        "kept_share": visual / max(1.0, cells),
        "mfu": sum(line.get("mfu", 0.0) * line["seconds"] for line in steps) / seconds,
        "data_wait_share": sum(line["data_wait_share"] * line["seconds"] for line in steps) / seconds,
        "first_wait_seconds": lines[0]["data_wait_share"] * lines[0]["seconds"],
        "peak_memory_gib": steps[-1].get("peak_memory_gib", 0.0),
        "steps": len(steps),
    }


def described(line: dict, first: dict) -> str:
    """A line of the figures for the screen.

    line: Of `launch`.
    first: The run over which the speed-up is.
    """
    kept = f", {line['kept_share']:.0%} of the cells" if line["skip_db"] else ""
    return (
        f"{line['gpus']} GPU(s){kept}: {line['samples_per_second']:.1f} samples/s, "
        f"{line['visual_tokens_per_second']:.0f} visual tokens/s, MFU {line['mfu']:.1%}, data wait "
        f"{line['data_wait_share']:.1%} ({line['first_wait_seconds']:.0f} s before the first step), "
        f"{line['peak_memory_gib']:.1f} GiB, x {line['samples_per_second'] / first['samples_per_second']:.2f} "
        f"({line['launch_seconds']:.0f} s from launch to end)"
    )


def new_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", choices=("videos", "mix"), default="videos", help="drawn videos, or images")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="videos of your own instead of drawn ones")
    parser.add_argument("--video-seconds", type=float, default=8.0, help="of a piece of such a video")
    parser.add_argument("--max-pixels", type=int, default=VIDEO_SIDE**2, help="of a frame of such a video")
    parser.add_argument("--dct", default="x4", help="token format")
    parser.add_argument("--skip-db", type=float, default=0.0, help="dB: each run again with skipping")
    parser.add_argument("--size", choices=("2b", "7b"), default="2b", help="of the model")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="GPUs that share the layers")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="one launch for each number")
    parser.add_argument("--samples", type=int, default=400, help="of the data set, which is repeated")
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps")
    parser.add_argument(
        "--uncounted", type=int, default=WARM_UP, help="first steps, which do not count: the loader has read ahead"
    )
    parser.add_argument("--sequences", "--rows", type=int, default=4, help="packed sequences of a step for each GPU")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="of a packed sequence")
    parser.add_argument("--pack-vision-tokens", type=int, help="of a packed sequence (default: twice --pack-tokens)")
    parser.add_argument("--num-workers", type=int, default=8, help="loader processes for each GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--tiny", action="store_true", help="try the command with a tiny model, without a GPU")
    parser.add_argument(
        "--kernels", action="store_true", help="print what a step that does not count spends its time on"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def check_devices(arguments: argparse.Namespace) -> None:
    """Raises UserError for too few GPUs, or for numbers that a layout does not divide."""
    import torch

    each = arguments.tensor_parallel * arguments.pipeline_parallel
    if any(gpus % each for gpus in arguments.gpus):
        raise UserError(f"--gpus {' '.join(map(str, arguments.gpus))}: a copy of the model takes {each} GPUs, give "
                        "multiples")  # fmt: skip
    found, wanted = torch.cuda.device_count(), max(arguments.gpus)
    if not arguments.tiny and found < wanted:
        raise UserError(f"{found} CUDA devices, not {wanted}: lower --gpus, or try the command with --tiny")


def run_all(arguments: argparse.Namespace) -> int:
    """Makes data and model, then launches. Raises UserError."""
    check_devices(arguments)
    lines = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shards = make_shards(
            arguments.work, arguments.samples, folder, arguments.seed, arguments.videos, arguments.video_seconds
        )
        make = make_tiny_model if arguments.tiny else partial(make_model, size=arguments.size)
        model_dir = make(arguments.dct, folder, arguments.seed)
        settings = settings_of(arguments, model_dir, shards, folder / "runs")
        material = arguments.videos.resolve().name if arguments.videos else arguments.work
        for gpus in arguments.gpus:
            for skip_db in dict.fromkeys((0.0, arguments.skip_db)):
                lines.append(launch(arguments, settings, gpus, skip_db))
                print(f"{material} {arguments.dct} {arguments.size}, {described(lines[-1], lines[0])}", flush=True)
    if arguments.kernels:
        print_kinds({f"{line['gpus']} GPU{' skip' * (line['skip_db'] > 0)}": line["kinds"] for line in lines})
    if arguments.json:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        layout = {"size": arguments.size, "tensor_parallel": arguments.tensor_parallel}
        layout |= {"pipeline_parallel": arguments.pipeline_parallel}
        write_json(arguments.json, {"device": device, "work": material, "dct": arguments.dct, **layout, "runs": lines})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = new_parser()
    arguments = parser.parse_args(argv)
    if not WARM_UP <= arguments.uncounted < arguments.steps:
        parser.error(f"--uncounted must be at least {WARM_UP} and under --steps, got {arguments.uncounted} and "
                     f"{arguments.steps}")  # fmt: skip
    return run_main("benchmarks/speed/training_run.py", partial(run_all, arguments))


if __name__ == "__main__":
    sys.exit(main())
