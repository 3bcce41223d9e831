"""An image or a video as a file of tokens, and back.

    python dct_tokenizer.py encode photo.jpg --output tokens.safetensors
    python dct_tokenizer.py decode tokens.safetensors --output photo.png

A file of tokens is safetensors: `tokens` float32 [N, K], `grid_thw` int64 [3], and in its metadata the token format
(`dct`), the kind of media and, of a video, its frames per second. Media are read as training reads them.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.analysis.output_file import check_output, naming
from dct_qwen2vl.common.files import replacing, write_bytes
from dct_qwen2vl.common.scripts import UserError, run_main

if TYPE_CHECKING:
    import numpy as np

IMAGES, VIDEOS = (".png",), (".mp4",)
VIDEO_QUALITY = "18"  # x264's constant rate factor; 0 is lossless


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dct_tokenizer.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="image or video -> tokens")
    encode.add_argument("file", type=Path, help="an image or a video")
    encode.add_argument("--preset", default="x4", metavar="NAME", help="exact, x4, x16 or a DCT configuration as .json "
                        "(default: %(default)s)")  # fmt: skip
    encode.add_argument("--min-pixels", type=int, help="least pixels of an image or frame (default: the processor's)")
    encode.add_argument("--max-pixels", type=int, help="most pixels of an image or frame (default: the processor's)")
    decode = commands.add_parser("decode", help="tokens -> image or video")
    decode.add_argument("file", type=Path, help="a file that encode wrote")
    for command, files in ((encode, ".safetensors"), (decode, ".png of an image, .mp4 of a video")):
        command.add_argument("--output", type=Path, required=True, help=f"file to write: {files}")
        command.add_argument("--force", action="store_true", help="replace the output file")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    endings = (".safetensors",) if arguments.command == "encode" else IMAGES + VIDEOS
    if arguments.output.suffix.lower() not in endings:
        parser.error(f"argument --output: the file ends in {' or '.join(endings)}, got {arguments.output}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    work = {"encode": encode_file, "decode": decode_file}[arguments.command]
    return run_main("dct_tokenizer.py", lambda: work(arguments), arguments.debug)


def encode_file(arguments: argparse.Namespace) -> int:
    """Writes the tokens of a file. Raises UserError, OSError."""
    check_output(arguments.output, arguments.force)
    import torch
    from safetensors.torch import save

    from dct_qwen2vl.data.media import VIDEO_EXTENSIONS, VideoSampling
    from dct_qwen2vl.data.media_encoder import MediaEncoder
    from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor

    kind = "video" if arguments.file.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS else "image"
    data, sampling = arguments.file.read_bytes(), VideoSampling()
    with naming(arguments.file):
        processor = DCTImageProcessor(arguments.preset, arguments.min_pixels, arguments.max_pixels)
        encoder = MediaEncoder(processor, sampling)
        tokens, grid = encoder.encode(kind, encoder.read(kind, data))
    metadata = {"dct": json.dumps(processor.dct_config.to_dict()), "kind": kind, "frames_per_second": str(sampling.fps)}
    tensors = {"tokens": tokens.contiguous(), "grid_thw": torch.tensor(grid)}
    write_bytes(arguments.output, save(tensors, metadata))
    print(f"Wrote {arguments.output}: {len(tokens)} tokens of {tokens.shape[1]} numbers, a grid of "
          f"{' x '.join(map(str, grid))} (time, rows, columns), {processor.dct_config.name}.")  # fmt: skip
    return 0


def decode_file(arguments: argparse.Namespace) -> int:
    """Writes the image or video of a file of tokens. Raises UserError, OSError."""
    check_output(arguments.output, arguments.force)
    from dct_qwen2vl.dct.configuration_dct import DCTConfig
    from dct_qwen2vl.dct.transform_dct import DCTTokenizer

    tensors, metadata = read_tokens(arguments.file)
    kind = metadata.get("kind")
    wanted = IMAGES if kind == "image" else VIDEOS
    if arguments.output.suffix.lower() not in wanted:
        raise UserError(
            f"{arguments.file} holds the tokens of one {kind}: give --output a file that ends in {wanted[0]}"
        )
    with naming(arguments.file):
        config = DCTConfig.from_dict(json.loads(metadata["dct"]))
        frames = DCTTokenizer(config).decode(tensors["tokens"], tuple(tensors["grid_thw"].tolist())).numpy()
    if kind == "image":
        write_image(arguments.output, frames[0])
    else:
        write_video(arguments.output, frames, float(metadata["frames_per_second"]))
    print(f"Wrote {arguments.output}: {frames.shape[2]} x {frames.shape[1]} px, {len(frames)} frame(s).")
    return 0


def read_tokens(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of what `encode_file` wrote. Raises UserError, OSError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no file {path}: python dct_tokenizer.py encode IMAGE --output {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): give a file that encode wrote") from error
    if not {"tokens", "grid_thw"} <= tensors.keys() or not {"dct", "kind", "frames_per_second"} <= metadata.keys():
        raise UserError(f"{path} holds no tokens of dct_tokenizer.py: give a file that encode wrote")
    return tensors, metadata


def write_image(path: Path, image: "np.ndarray") -> None:
    """uint8 [H, W, 3] as PNG."""
    from PIL import Image

    with replacing(path) as stream:
        Image.fromarray(image).save(stream, "PNG")


def write_video(path: Path, frames: "np.ndarray", frames_per_second: float) -> None:
    """uint8 [T, H, W, 3] as H.264 in an mp4 file."""
    from fractions import Fraction

    import av

    with replacing(path) as stream, av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        video.options = {"crf": VIDEO_QUALITY}
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
