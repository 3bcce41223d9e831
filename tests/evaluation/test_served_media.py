"""The reader for servers hands over the pixels that training reads, without torch and transformers."""

import base64
import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import REPOSITORY, edit_json
from samples_by_hand import answer, conversation_sample

from dct_qwen2vl.checkpoints.conversion import convert
from dct_qwen2vl.checkpoints.hf_folder import load_processor
from dct_qwen2vl.checkpoints.stock_form import to_stock
from dct_qwen2vl.checkpoints.video_sampling import write_sampling
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.media import PixelFit, as_array
from dct_qwen2vl.data.reading import MediaError
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.evaluation.served_media import MediaReader
from dct_tokenizer import DCTConfig
from task_encoder import QwenTaskEncoder

SAMPLING = VideoSampling(fps=2.0, min_frames=2, max_frames=6, total_pixels=6 * 168 * 168)


@pytest.fixture(scope="module")
def model(qwen2vl_directory, tmp_path_factory) -> Path:
    """A model of `exact`, which reads RGB of images and videos, with bounds and sampling of its own."""
    folder = tmp_path_factory.mktemp("served") / "exact"
    convert(qwen2vl_directory, folder, DCTConfig.preset("exact"), min_pixels=56 * 56, max_pixels=224 * 224)
    write_sampling(folder, vars(SAMPLING))
    return folder


@pytest.fixture(scope="module")
def learned(model):
    """learned(kind, file): vision tokens and grid of the training path."""
    processor = load_processor(model)
    encoder = QwenTaskEncoder(processor.tokenizer, processor.image_processor, 10**5, SAMPLING)

    def encode(kind: str, data: bytes) -> tuple[torch.Tensor, list]:
        sample = encoder.encode(conversation_sample(answer("What?", "red"), (kind, data)))
        if kind == "image":
            return sample.pixel_values, sample.image_grid_thw.tolist()
        return sample.pixel_values_videos, sample.video_grid_thw.tolist()

    return encode


def video(frames: np.ndarray, ticks: list[int] | None = None, matrix: int | None = None) -> bytes:
    """ticks: time stamps in 1/1000 s; None: 4 frames a second. matrix: its code in ITU-T H.273."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as file:
        target = file.add_stream("libx264", rate=4, width=frames.shape[2], height=frames.shape[1])
        target.pix_fmt, target.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        if matrix:
            target.codec_context.colorspace = matrix
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if matrix:
                frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
                frame.colorspace = matrix
            frame.pts, frame.time_base = ticks[number] if ticks else number * 250, Fraction(1, 1000)
            file.mux(target.encode(frame))
        file.mux(target.encode())
    return stream.getvalue()


def images(natural_frames, image_file) -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = natural_frames(1, 300, 420)[0]
    alpha = np.dstack([photograph, np.linspace(0, 255, 420).round().astype(np.uint8)[None].repeat(300, 0)])
    return {
        "rotated": image_file(photograph, "JPEG", exif=exif),
        "RGBA": image_file(alpha, "PNG"),
        "16-bit grey": image_file(photograph[..., 0].astype(np.uint16) * 257, "PNG"),
        "large JPEG": image_file(natural_frames(1, 1000, 1400)[0], "JPEG"),
        "small sides": image_file(natural_frames(1, 10, 30)[0], "PNG"),
    }


def videos(natural_frames) -> dict[str, bytes]:
    frames = natural_frames(12, 180, 260)
    return {
        "variable frame rate": video(frames, [0, 40, 80, 120, 160, 200, 3000, 3040, 3080, 3120, 5000, 5040]),
        "BT.709": video(frames, matrix=1),
        "one frame": video(frames[:1]),
        "odd number": video(frames[:3]),
    }


@pytest.mark.parametrize("name", ["rotated", "RGBA", "16-bit grey", "large JPEG", "small sides"])
def test_images_are_those_of_training(model, learned, natural_frames, image_file, tmp_path, name):
    data = images(natural_frames, image_file)[name]
    (tmp_path / "file").write_bytes(data)
    reader = MediaReader.of(model)
    image = reader.image(tmp_path / "file")
    assert image.mode == "RGB" and np.array_equal(image, reader.image(data))
    output = load_processor(model).image_processor(images=image, return_tensors="pt")
    tokens, grid = learned("image", data)
    assert output["image_grid_thw"].tolist() == grid
    assert torch.equal(output["pixel_values"], tokens)
    if name == "rotated":
        assert image.height > image.width


@pytest.mark.parametrize("name", ["variable frame rate", "BT.709", "one frame", "odd number"])
def test_frames_are_those_of_training(model, learned, natural_frames, name):
    data = videos(natural_frames)[name]
    frames = MediaReader.of(model).frames(data)
    assert len(frames) == {"one frame": 2, "odd number": 2}.get(name, 6)
    output = load_processor(model).image_processor(videos=[[np.asarray(f) for f in frames]], return_tensors="pt")
    tokens, grid = learned("video", data)
    assert output["video_grid_thw"].tolist() == grid
    assert torch.equal(output["pixel_values_videos"], tokens)


def test_a_stock_form_says_the_same_and_a_pixel_model_reads_jpegs_whole(model, qwen2vl_directory, tmp_path):
    to_stock(model, tmp_path / "stock")
    assert MediaReader.of(tmp_path / "stock") == MediaReader.of(model)
    assert MediaReader.of(model).fit == PixelFit(28, 56 * 56, 224 * 224, SAMPLING)
    (tmp_path / "stock" / "dct_format.json").unlink()  # as transformers saves it again
    edit_json(tmp_path / "stock" / "preprocessor_config.json", patch_size=28)
    assert not MediaReader.of(tmp_path / "stock").fit.whole
    plain = MediaReader.of(qwen2vl_directory).fit
    assert plain.whole and plain.sampling == VideoSampling()


def test_parts_of_a_request_keep_every_pixel(model, natural_frames, image_file, tmp_path):
    reader = MediaReader.of(model)
    (tmp_path / "a.JPG").write_bytes(image_file(natural_frames(1, 300, 420)[0], "JPEG"))
    (tmp_path / "a.mkv").write_bytes(video(natural_frames(12, 180, 260)))
    part = reader.part(tmp_path / "a.JPG")
    start, coded = part["image_url"]["url"].split(",")
    assert (part["type"], start) == ("image_url", "data:image/png;base64")
    assert np.array_equal(opened(coded), reader.image(tmp_path / "a.JPG"))
    part = reader.part(tmp_path / "a.mkv")
    start, *coded = part["video_url"]["url"].split(",")
    assert (part["type"], start) == ("video_url", "data:video/jpeg;base64")
    assert np.array_equal([opened(frame) for frame in coded], reader.frames(tmp_path / "a.mkv"))
    smaller = json.dumps(reader.part(tmp_path / "a.mkv", file_format="JPEG"))
    assert len(smaller) < len(json.dumps(part)) / 2


def opened(coded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))))


@pytest.mark.parametrize(("name", "file_format"), [("a.avif", "AVIF"), ("a.jfif", "JPEG"), ("a.PPM", "PPM")])
def test_images_of_other_names_are_no_videos(model, natural_frames, image_file, tmp_path, name, file_format):
    (tmp_path / name).write_bytes(image_file(natural_frames(1, 60, 80)[0], file_format))
    assert MediaReader.of(model).part(tmp_path / name)["type"] == "image_url"


def test_an_mp4_holds_the_same_frames(model, natural_frames):
    reader, data = MediaReader.of(model), video(natural_frames(12, 180, 260))
    with av.open(io.BytesIO(reader.mp4(data))) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(found, reader.frames(data))
    every = VideoSampling(fps=1000, min_frames=1)
    assert np.array_equal(as_array("video", reader.mp4(data), every), found)


def test_what_cannot_be_read_is_one_line(model, tmp_path):
    reader = MediaReader.of(model)
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): give a file"):
        reader.image(tmp_path / "none.png")
    with pytest.raises(UserError, match=r'give kind="image" or kind="video"'):
        reader.part(b"")
    for wrong in ({"kind": "audio"}, {"kind": "image", "file_format": "jpg"}):
        with pytest.raises(UserError, match=r"kind is image or video, file_format is PNG or JPEG$"):
            reader.part(b"", **wrong)
    with pytest.raises(MediaError, match=r"^not a readable video: "):
        reader.frames(b"no video")


ALONE = """
import sys
for name in ("torch", "transformers", "torchvision", "megatron", "nemo"):
    sys.modules[name] = None
from dct_qwen2vl.evaluation.served_media import MediaReader
reader = MediaReader.of(sys.argv[1])
print(reader.image(sys.argv[2]).size, len(reader.frames(sys.argv[3])), len(reader.part(sys.argv[3])["type"]))
"""


def test_it_needs_neither_torch_nor_transformers(model, natural_frames, image_file, tmp_path):
    (tmp_path / "a.png").write_bytes(image_file(natural_frames(1, 300, 420)[0], "PNG"))
    (tmp_path / "a.mkv").write_bytes(video(natural_frames(12, 180, 260)))
    command = [sys.executable, "-c", ALONE, str(model), str(tmp_path / "a.png"), str(tmp_path / "a.mkv")]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[0] == "(252, 168) 6 9"
