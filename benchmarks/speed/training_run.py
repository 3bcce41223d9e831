"""The whole of a training run at real size, on one GPU and on two: files in shards -> loader -> Megatron engine.

    python -m benchmarks.speed.training_run --work videos --gpus 1 2 --json training_run.json

Makes a Qwen2-VL-2B in DCT tokens with random weights, draws images (JPEG, 640 x 480 to 1024 x 768) or videos (H.264,
16 frames of 448 x 448) with conversations, prepares shards, and starts qwen_launch.sh as a user would. The figures are
those of metrics.jsonl without the first steps: samples/s, MFU, the share of time in which training waited for data.
With several numbers of GPUs the packed sequences of a step are in proportion to them. The last column is the speed-up
over the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dct_qwen2vl.common.files import write_json

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
WARM_UP = 5  # steps that do not count


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


def make_shards(work: str, count: int, folder: Path, seed: int) -> Path:
    """Draws, then prepares as a user would."""
    raw, shards = folder / "raw", folder / "shards"
    (raw / "images").mkdir(parents=True)
    draw = partial(draw_video if work == "videos" else draw_image, folder=raw, seed=seed)
    with ProcessPoolExecutor() as pool:
        entries = list(pool.map(draw, range(count), chunksize=8))
    (raw / "cambrian737k.json").write_text(json.dumps(entries), encoding="utf-8")
    command = [sys.executable, "data_preparation.py", "--data-dir", str(raw), "--output-dir", str(shards)]
    run([*command, "--maxcount", str(max(8, count // 40)), "--energon-prepare", "--no-report"])
    return shards


def make_model(preset: str, folder: Path, seed: int) -> Path:
    """A directory of a Qwen2-VL-2B that reads `preset` tokens: random weights, the tokenizer of the sample data."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from benchmarks.speed.training import real_config
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
    from dct_qwen2vl.toy.model import write_checkpoint

    tiny, model_dir = folder / "tiny", folder / "model"
    write_checkpoint([" ".join(WORDS)] * 20, tiny, seed)
    config = DCTConfig.preset(preset)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(
            real_config(config.num_coefficients), torch_dtype=torch.bfloat16
        )
    model.cpu().save_pretrained(model_dir)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(model_dir)
    DCTImageProcessor(dct=preset, max_pixels=1024 * 1024).save_pretrained(model_dir)
    return model_dir


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def measure(model_dir: Path, shards: Path, gpus: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """One launch; the means over its steps past the warm-up."""
    environment = {
        "MODEL_DIR": model_dir, "DATASET_DIR": shards, "OUTPUT_DIR": folder, "EXPERIMENT_NAME": f"gpus{gpus}",
        "NUM_PROC_PER_NODE": gpus, "PACK_TOKENS": arguments.pack_tokens,
        "PACK_VISION_TOKENS": arguments.pack_vision_tokens or "", "GBS": arguments.sequences * gpus,
        "MAX_STEPS": arguments.steps, "VAL_INTERVAL": 10000, "SAVE_INTERVAL": 0, "LR": "1e-6", "MIN_LR": "1e-7",
        "NUM_WORKERS": arguments.num_workers, "SEQ_LENGTH": 4096, "ENGINE": "megatron", "PYTHON": sys.executable,
    }  # fmt: skip
    command = ["bash", "qwen_launch.sh", "--log-interval", "1", "--video-fps", str(VIDEO_RATE)]
    if arguments.trace:
        command += ["--profile", str(WARM_UP - 1)]
    run([*command, "--shuffle-buffer", "100"], **{name: str(value) for name, value in environment.items()})
    if arguments.trace:
        shutil.copyfile(next((folder / f"gpus{gpus}").rglob("rank0.json.gz")), arguments.trace)
    lines = [json.loads(line) for line in (folder / f"gpus{gpus}" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARM_UP:]
    seconds = sum(line["seconds"] for line in steps)
    return {
        "gpus": gpus,
        "samples_per_second": sum(line["samples"] for line in steps) / seconds,
        "visual_tokens_per_second": sum(line["visual_tokens"] for line in steps) / seconds,
        "mfu": sum(line["mfu"] * line["seconds"] for line in steps) / seconds,
        "data_wait_share": sum(line["data_wait_share"] * line["seconds"] for line in steps) / seconds,
        "peak_memory_gib": steps[-1]["peak_memory_gib"],
        "steps": len(steps),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", choices=("videos", "mix"), default="videos", help="videos, or images")
    parser.add_argument("--dct", default="x4", help="token format")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="one launch for each number")
    parser.add_argument("--samples", type=int, default=400, help="of the data set, which is repeated")
    parser.add_argument("--steps", type=int, default=25, help=f"optimizer steps; the first {WARM_UP} do not count")
    parser.add_argument("--sequences", "--rows", type=int, default=4, help="packed sequences of a step for each GPU")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="of a packed sequence")
    parser.add_argument("--pack-vision-tokens", type=int, help="of a packed sequence (default: twice --pack-tokens)")
    parser.add_argument("--num-workers", type=int, default=8, help="loader processes for each GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--trace", type=Path, help="write a trace here (.json.gz), of a step that does not count")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    import torch

    if torch.cuda.device_count() < max(arguments.gpus):
        print(f"benchmarks/speed/training_run.py: {torch.cuda.device_count()} CUDA devices, not {max(arguments.gpus)}",
              file=sys.stderr)  # fmt: skip
        return 1
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(arguments.work, arguments.samples, Path(folder), arguments.seed)
        model_dir = make_model(arguments.dct, Path(folder), arguments.seed)
        for gpus in arguments.gpus:
            line = measure(model_dir, shards, gpus, arguments, Path(folder) / "runs")
            lines.append(line)
            print(f"{arguments.work} {arguments.dct}, {gpus} GPU(s): {line['samples_per_second']:.1f} samples/s, "
                  f"{line['visual_tokens_per_second']:.0f} visual tokens/s, MFU {line['mfu']:.1%}, data wait "
                  f"{line['data_wait_share']:.1%}, {line['peak_memory_gib']:.1f} GiB, "
                  f"x {line['samples_per_second'] / lines[0]['samples_per_second']:.2f}", flush=True)  # fmt: skip
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "work": arguments.work, "dct": arguments.dct, "runs": lines}
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
