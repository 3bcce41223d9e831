"""Images and videos for any server, with the pixels that training reads. Needs numpy, Pillow and PyAV alone.

    reader = MediaReader.of("/models/2b-x4-stock")
    reader.image("photo.jpg")     # an upright RGB image of the size that the model reads
    reader.frames("video.mp4")    # the sampled frames, likewise
    reader.part("video.mp4")      # a part of an OpenAI-style chat request

The sizes are the server's own, so its processor has nothing left to resize. docs/serving.md has a whole request.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dct_qwen2vl.checkpoints.inspection import QWEN2_VL_PATCH, STOCK_FORM, own_pixel_bounds, read_processor
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.images import IMAGE_EXTENSIONS
from dct_qwen2vl.data.media import PixelFit, as_array
from dct_qwen2vl.data.videos import VideoSampling, decode_video

KINDS, FORMATS = ("image", "video"), ("PNG", "JPEG")
Source = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class MediaReader:
    """Reads media as one model was trained to see them.

    fit: Sizes and bounds of its images and videos.
    """

    fit: PixelFit

    @classmethod
    def of(cls, model_dir: str | Path) -> "MediaReader":
        """From the files of a model, of either form. Raises CheckpointError."""
        model_dir = Path(model_dir)
        processor = read_processor(model_dir)
        factor = processor.get("patch_size", 14) * processor.get("merge_size", 2)
        saved_again = processor.get("patch_size", QWEN2_VL_PATCH) > QWEN2_VL_PATCH  # without its STOCK_FORM
        reads_dct = processor.get("dct") is not None or (model_dir / STOCK_FORM).is_file() or saved_again
        sampling = VideoSampling(**saved_sampling(model_dir))
        return cls(PixelFit(factor, *own_pixel_bounds(model_dir), sampling, whole=not reads_dct))

    def image(self, source: Source) -> Image.Image:
        """An upright RGB image at the size that the model reads.

        source: A path, a file's bytes or a PIL image.

        Raises MediaError or BadSample.
        """
        return Image.fromarray(as_array("image", content_of(source), self.fit.sampling, self.fit))

    def frames(self, source: str | Path | bytes) -> list[Image.Image]:
        """The sampled frames of a video, upright RGB. A token holds two frames, so the last of an odd number comes
        twice.

        source: A path or a file's bytes.

        Raises MediaError or BadSample.
        """
        pixels = decode_video(content_of(source), self.fit.sampling, self.fit)
        if len(pixels) % 2:
            pixels = np.concatenate([pixels, pixels[-1:]])
        return [Image.fromarray(frame) for frame in pixels]

    def part(self, source: Source, kind: str | None = None, file_format: str = "PNG") -> dict[str, Any]:
        """A part of the content of a chat request: {"type": "image_url", ...} or {"type": "video_url", ...}.

        kind: "image" or "video". None: by the end of a path.
        file_format: of image and frames. PNG keeps every pixel, JPEG is a tenth of its size.

        vLLM reads a video's frames one after another, with commas between them. It takes the first 32 unless the
        request has "media_io_kwargs": {"video": {"num_frames": -1}}. Raises UserError for another kind or format.
        """
        kind = kind or kind_of(source)
        if kind not in KINDS or file_format not in FORMATS:
            raise UserError(f"there is no {kind} as {file_format}: kind is {' or '.join(KINDS)}, file_format is "
                            f"{' or '.join(FORMATS)}")  # fmt: skip
        images = [self.image(source)] if kind == "image" else self.frames(source)
        coded = ",".join(base64.b64encode(encoded(image, file_format)).decode() for image in images)
        media_type = f"image/{file_format.lower()}" if kind == "image" else "video/jpeg"  # its name for frames
        return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{media_type};base64,{coded}"}}

    def mp4(self, source: str | Path | bytes) -> bytes:
        """The same frames as a video file, two a second, coded without loss in RGB, for servers that take no frames.

        The server must be told to read all of them.
        """
        return lossless_mp4([np.asarray(frame) for frame in self.frames(source)])


def content_of(source: Source) -> bytes | Image.Image:
    """Raises UserError for a path that cannot be read."""
    if not isinstance(source, str | Path):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): give a file") from error


def kind_of(source: Source) -> str:
    """ "image" or "video". Raises UserError for bytes, which do not say."""
    if isinstance(source, Image.Image):
        return "image"
    if not isinstance(source, str | Path):
        raise UserError('bytes do not say what they are: give kind="image" or kind="video"')
    return "image" if Path(source).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS else "video"


def encoded(image: Image.Image, file_format: str) -> bytes:
    """An image file. JPEG: quality 95, colours at full resolution."""
    stream = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    image.save(stream, file_format, **options)
    return stream.getvalue()


def lossless_mp4(frames: list[np.ndarray]) -> bytes:
    """Frames uint8 RGB [H, W, 3] -> an H.264 file, 2 frames a second."""
    import av

    stream = io.BytesIO()
    height, width, _ = frames[0].shape
    with av.open(stream, "w", format="mp4") as file:
        video = file.add_stream("libx264rgb", rate=2, width=width, height=height, options={"qp": "0"})
        video.pix_fmt = "rgb24"
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(video.encode())
    return stream.getvalue()
