"""Images and videos -> the vision tokens of a checkpoint. Training and evaluation both read media through this file.

    read      file bytes -> frames of the size that the model is trained with: RGB, or the planes of a video
    encode    frames -> tokens and grid, without resizing them a second time

Letters used for shapes in this file:

    T H W    frames of a video, rows and columns in pixels
    N K      vision tokens, floats of one token
    M        media (images, or videos)
    t h w    the grid of tokens: N = t*h*w
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from dct_qwen2vl.data.media import PixelFit, as_array, media_shape, resize_frames
from dct_qwen2vl.data.reading import counted_frames
from dct_qwen2vl.data.videos import VideoSampling, YUVFrames
from dct_qwen2vl.dct.skipping_dct import keep_tokens, kept_cells

Frames = np.ndarray | YUVFrames
Grid = tuple[int, int, int]  # t, h, w
Encoded = tuple[str, torch.Tensor, Grid]  # kind, tokens float32 [N, K], grid


class MediaEncoder:
    """The one way from a media part of a sample to what the model reads.

    image_processor: `DCTImageProcessor`, or any processor with Qwen2VLImageProcessor's interface.
    sampling: Frames that are read of a video, and their budget of pixels.
    """

    def __init__(self, image_processor, sampling: VideoSampling | None = None) -> None:
        self.image_processor = image_processor
        self.sampling = sampling or VideoSampling()
        self._memory = torch.empty(0)  # for all tokens of a video, of which only some are kept

    @property
    def fit(self) -> PixelFit:
        """The sizes of media, by the processor's bounds."""
        return PixelFit.of(self.image_processor, self.sampling)

    @property
    def reads_planes(self) -> bool:
        """Whether video files are read as planes. 4:2:0 tokens hold no more colour than these; for others RGB has more,
        once it has been made smaller."""
        return getattr(getattr(self.image_processor, "dct_config", None), "chroma", None) == "420"

    def read(self, kind: str, content: Any, threads: int = 0) -> Frames:
        """Reads a media part: an image uint8 [H, W, 3], the frames of a video uint8 [T, H, W, 3], or their planes.

        kind: "image" or "video".
        content: As in `media.as_array`.
        threads: Of a video's decoder. 0: one for each core.

        Raises MediaError or BadSample.
        """
        return as_array(kind, content, self.sampling, self.fit, self.reads_planes, threads)

    def encode(self, kind: str, frames: Frames) -> tuple[torch.Tensor, Grid]:
        """Tokens float32 [N, K] of a medium, and their grid (t, h, w).

        kind: "image" or "video".
        frames: What `read` gives. RGB of another size is resized first.

        Raises BadSample.
        """
        if isinstance(frames, YUVFrames):
            return self._encode_planes(frames)
        frames = resize_frames(kind, frames, self.fit)
        options = {"do_resize": False, "return_tensors": "pt", "input_data_format": "channels_last"}
        if kind == "image":
            output = self.image_processor(images=frames, **options)
            return output["pixel_values"], tuple(output["image_grid_thw"][0].tolist())
        output = self.image_processor(images=None, videos=[list(frames)], **options)
        return output["pixel_values_videos"], tuple(output["video_grid_thw"][0].tolist())

    @property
    def skip_db(self) -> float | None:
        """Cells that a kept cell already shows with this PSNR get no token; None: all get theirs. The processor's."""
        return getattr(self.image_processor, "skip_db", None)

    def skip(self, media: list[Encoded]) -> tuple[list[Encoded], list[torch.Tensor]]:
        """What `encode` gives of several media -> the same with the tokens of kept cells alone, and for each which
        cells these are, bool [t, h/m, w/m]."""
        config = self.image_processor.dct_config
        floor = self.image_processor.skip_noise_floor
        masks = [kept_cells(tokens, grid, config, self.skip_db, floor) for _, tokens, grid in media]
        return [(kind, keep_tokens(tokens, kept), grid) for (kind, tokens, grid), kept in zip(media, masks)], masks

    def encode_kept(self, kind: str, frames: Frames) -> tuple[Encoded, torch.Tensor]:
        """`encode` and `skip` of one medium: the tokens of kept cells alone, and which cells these are.

        kind: "image" or "video".
        frames: As in `encode`.

        All videos share the memory of the tokens that are not kept. Raises BadSample.
        """
        if isinstance(frames, YUVFrames):
            tokens, grid = self._encode_planes(frames, self._shared_memory(frames))
        else:
            tokens, grid = self.encode(kind, frames)
        (encoded,), (kept,) = self.skip([(kind, tokens, grid)])
        return encoded, kept

    def _encode_planes(self, frames: YUVFrames, out: torch.Tensor | None = None) -> tuple[torch.Tensor, Grid]:
        """`encode` of planes. out: memory for the tokens."""
        return self.image_processor.tokenizer.encode_planes(*frames.parts, out=out)

    def _shared_memory(self, frames: YUVFrames) -> torch.Tensor:
        """For the tokens of these planes, float32 [N * K]."""
        config = self.image_processor.dct_config
        steps, (rows, columns) = -(-len(frames.luma) // config.block[0]), frames.luma.shape[1:]
        size = steps * (rows // config.block[1]) * (columns // config.block[2]) * config.num_coefficients
        if len(self._memory) < size:
            self._memory = torch.empty(0)  # the older one is given back first
            self._memory = torch.empty(size)
        return self._memory[:size]

    def expected_grid(self, kind: str, content: Any) -> Grid:
        """The grid that `encode` gives for a part, found without decoding it.

        kind: "image" or "video".
        content: As in `media.as_array`.

        Raises MediaError or BadSample.
        """
        height, width, frames = media_shape(kind, content, self.sampling)
        height, width = self.fit(height, width, 1 if kind == "image" else counted_frames(frames))
        processor = self.image_processor
        steps = -(-frames // processor.temporal_patch_size)
        return steps, height // processor.patch_size, width // processor.patch_size


def stack_kept(kind: str, media: Iterable[Encoded], masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Which cells of all media of a kind have tokens, bool [cells].

    kind: "image" or "video".
    media: What was encoded, of both kinds.
    masks: bool [t, r, c] for each medium.
    """
    chosen = [mask.flatten() for (its_kind, *_), mask in zip(media, masks) if its_kind == kind]
    return torch.cat(chosen) if chosen else torch.ones(0, dtype=torch.bool)


def stack_media(kind: str, media: Iterable[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens float32 [N, K] and grids int64 [M, 3] of all media of a kind. [0, 0] and [0, 3] without any.

    kind: "image" or "video".
    media: What was encoded, of both kinds.
    """
    chosen = [(tokens, grid) for its_kind, tokens, grid in media if its_kind == kind]
    if not chosen:
        return torch.zeros(0, 0), torch.zeros(0, 3, dtype=torch.int64)
    tokens, grids = zip(*chosen)
    return torch.cat(tokens), torch.tensor(grids, dtype=torch.int64)
