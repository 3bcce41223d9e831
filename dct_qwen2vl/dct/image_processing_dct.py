"""Qwen2-VL's image processor with DCT tokens.

The file needs torch, numpy, transformers and Pillow only, and the files that it imports from its own folder.
`save_pretrained` copies them all beside the weights of a converted checkpoint, from where
`AutoImageProcessor.from_pretrained(..., trust_remote_code=True)` loads them. It imports each of them itself, since
loading from a folder follows direct imports only.

Letters as in transform_dct.py.
"""

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.utils import TensorType

from .configuration_dct import DCTConfig
from .image_colours_dct import pil_to_rgb
from .image_inputs_dct import (
    as_array,
    channels_last,
    flat_images,
    flat_videos,
    height_width,
    resize,
    to_levels,
    to_three_channels,
)
from .image_sizes_dct import PIXEL_BOUNDS, bounds_in, pixel_bounds, target_size
from .skipping_dct import check_skip_db
from .transform_dct import DCTTokenizer

try:
    from transformers.video_processing_utils import BaseVideoProcessor
except ImportError:  # before transformers 4.52 the image processor is given the videos
    BaseVideoProcessor = None


class DCTImageProcessor(BaseImageProcessor):
    """Qwen2-VL's image processor with DCT tokens: the same call, the same outputs, other numbers in `pixel_values`.

    dct: a preset's name, a `DCTConfig`, its dict, or the path of a JSON file.
    min_pixels, max_pixels: bounds of H*W after resizing, for an image and for each frame of a video. `size`,
        {"shortest_edge": min_pixels, "longest_edge": max_pixels}, is the stock processor's second name for them.
    do_resize: turn off for images whose height and width already are multiples of the resize factor.
    do_rescale: turn off for floats in 0..1; with it, floats are in 0..255.
    resample: Pillow's filter; what is resized has 8 bits, as in the stock processor, and gets the same pixels.
    do_convert_rgb: turn off to have PIL images refused that are neither RGB nor grey.
    skip_db: dB, None for no skipping. Which cells the model was trained without (skipping_dct.py). This repository's
        training and evaluation follow it. The processor itself always gives all tokens, which stock models expect.
    skip_noise_floor: bool. Whether the noise of a video was measured and added to that threshold.
    skip_share: float or None. In which share of the training samples cells were left out. None: not known.

    Images are PIL, numpy or torch; grey ([H, W], or one channel), RGB or RGBA; channels first or last; uint8, uint16
    (0..65535), bool, other whole numbers in 0..255, or floats. Transparent images are composed with white, as files
    are in `images.to_rgb`, and 16-bit grey is scaled to 8 bits. The stock processor drops alpha, which shows what lies
    under it, and clips 16-bit grey. If the frames of a video differ in size, all are resized to the target size of the
    first one.

    Output: `pixel_values` float32 [N, K] and `image_grid_thw` int64 [images, 3], or `pixel_values_videos` and
    `video_grid_thw`, on the device of the images. The token format fixes mean, std and do_normalize of the stock
    processor.
    """

    _auto_class = "AutoImageProcessor"
    model_input_names = ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"]  # noqa: RUF012

    def __init__(
        self,
        dct: str | dict | DCTConfig = "x4",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        do_resize: bool = True,
        do_rescale: bool = True,
        resample: PILImageResampling = PILImageResampling.BICUBIC,
        do_convert_rgb: bool = True,
        size: dict[str, int] | None = None,
        skip_db: float | None = None,
        skip_noise_floor: bool | None = None,
        skip_share: float | None = None,
        **kwargs: Any,
    ) -> None:
        config = DCTConfig.resolve(dct)
        if config.block[1] != config.block[2]:
            raise ValueError(f"DCTImageProcessor needs square blocks, got {config.block[1]} x {config.block[2]} px")
        fixed = self._take_fixed(kwargs, config)
        if size is not None:
            low, high = bounds_in(size)
            min_pixels = low if min_pixels is None else min_pixels
            max_pixels = high if max_pixels is None else max_pixels
        min_pixels, max_pixels = pixel_bounds(min_pixels, max_pixels, *PIXEL_BOUNDS)
        # Qwen2VLImageProcessor is no base: its constructor has another form in each of 4.51, 4.57 and 5.
        BaseImageProcessor.__init__(self, **kwargs)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.do_resize, self.do_rescale, self.do_convert_rgb = do_resize, do_rescale, do_convert_rgb
        self.resample = resample
        for name, value in fixed.items():
            setattr(self, name, value)
        self.dct = config.to_dict()
        self.skip_db = None if skip_db is None else check_skip_db(skip_db)
        self.skip_noise_floor = bool(skip_noise_floor)
        self.skip_share = skip_share
        self._tokenizers: dict[torch.device, DCTTokenizer] = {}

    @property
    def size(self) -> dict[str, int]:
        """The two bounds as the stock processor calls them. Not saved: `min_pixels` and `max_pixels` say it."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    @size.setter
    def size(self, size: dict[str, int]) -> None:
        """The two bounds in pixels, as the stock processor calls them. Not saved: `min_pixels` and `max_pixels` are."""
        self.min_pixels, self.max_pixels = bounds_in(size)

    @property
    def dct_config(self) -> DCTConfig:
        """The token format."""
        return self.tokenizer.config

    @property
    def tokenizer(self) -> DCTTokenizer:
        """The transform, in float32 on the CPU."""
        return self._tokenizer_on(torch.device("cpu"))

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        """vLLM hands the text tokenizer to every processor, and counts visual tokens by the pixel model's patch."""
        raise ValueError(
            "this server cannot make DCT tokens: serve the stock form, which convert_checkpoint.py --to stock writes"
        )

    def _tokenizer_on(self, device: torch.device) -> DCTTokenizer:
        if device not in self._tokenizers:
            self._tokenizers[device] = DCTTokenizer(DCTConfig.from_dict(self.dct), device=device)
        return self._tokenizers[device]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: without the transform's matrices, which follow from `dct`."""
        return {**self.__dict__, "_tokenizers": {}}

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        values = super(DCTImageProcessor, copy.copy(self)).to_dict()
        del values["_tokenizers"]
        if self.skip_db is None:
            values.pop("skip_db", None)  # transformers 5 leaves out what is None
        if not self.skip_noise_floor:
            values.pop("skip_noise_floor", None)
        if self.skip_db is None or self.skip_share is None:
            values.pop("skip_share", None)
        if "AutoImageProcessor" in values.get("auto_map", {}):  # transformers 4.52 and later ask for both
            name = values["auto_map"]["AutoImageProcessor"].replace("ImageProcessor", "VideoProcessor")
            values["auto_map"] = {**values["auto_map"], "AutoVideoProcessor": name}
        return values

    def __repr__(self) -> str:
        """Short: the stock form would print every kept coefficient on a line of its own."""
        config = self.dct_config
        return (
            f"DCTImageProcessor(dct={config.name!r}, block={config.block}, coefficients={config.num_coefficients}, "
            f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}, do_resize={self.do_resize}, "
            f"do_rescale={self.do_rescale})"
        )

    def __call__(self, images: Any = None, **kwargs: Any) -> BatchFeature:
        """See `preprocess`; a call with videos alone needs no images=None."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any = None,
        videos: Any = None,
        do_resize: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: dict[str, int] | None = None,
        resample: PILImageResampling | None = None,
        do_rescale: bool | None = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | TensorType | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **fixed: Any,
    ) -> BatchFeature:
        """Images and videos, either of which may be None -> tokens and grids; the rest for this call alone.

        images: an image, a batch [N, ...], or lists of these.
        videos: a video, an array [T, H, W, C] or [T, C, H, W] or a list of T frames; or lists of these. The last frame
            is repeated until bt divides T.
        return_tensors: "pt", "np" (the default), or another of transformers' names.
        input_data_format: "channels_first" or "channels_last"; inferred for each image if None.
        device: where the transform runs and tokens of "pt" lie; where the images are if None.
        fixed: further arguments of the stock processor, of which only the values that the token format has are taken.
        """
        if images is None and videos is None:
            raise ValueError("DCTImageProcessor needs images or videos, got neither")
        self._take_fixed(fixed, self.dct_config)
        fixed.pop("data_format", None)  # tokens have no layout
        if fixed:
            raise TypeError(f"DCTImageProcessor has no argument {', '.join(fixed)}")
        if size is not None:
            min_pixels, max_pixels = bounds_in(size)
        tensor_type = None if return_tensors is None else TensorType(return_tensors)
        options = {
            "bounds": pixel_bounds(min_pixels, max_pixels, self.min_pixels, self.max_pixels),
            "do_resize": self.do_resize if do_resize is None else do_resize,
            "resample": self.resample if resample is None else resample,
            "do_rescale": self.do_rescale if do_rescale is None else do_rescale,
            "do_convert_rgb": self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb,
            "layout": None if input_data_format is None else ChannelDimension(input_data_format),
        }
        data = {}
        if images is not None:
            sequences = [[image] for image in flat_images(images)]
            data["pixel_values"], data["image_grid_thw"] = self._encode_all(sequences, device, options)
        if videos is not None:
            sequences = flat_videos(videos)
            data["pixel_values_videos"], data["video_grid_thw"] = self._encode_all(sequences, device, options)
        if tensor_type is not TensorType.PYTORCH:
            data = {name: value.cpu().numpy() for name, value in data.items()}
        return BatchFeature(data=data, tensor_type=tensor_type)

    @staticmethod
    def _take_fixed(arguments: dict[str, Any], config: DCTConfig) -> dict[str, Any]:
        """Takes out of `arguments` what the stock processor can be told and the token format fixes. Returns the fixed
        values. Raises ValueError where they contradict."""
        fixed = {
            "patch_size": config.block[1],
            "temporal_patch_size": config.block[0],
            "merge_size": config.merge,
            "do_normalize": True,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
            "rescale_factor": 1 / 255,
        }
        for name, value in fixed.items():
            given = arguments.pop(name, None)
            if given is not None and (list(given) if isinstance(given, tuple) else given) != value:
                raise ValueError(f"{name} is {value} in the token format {config.name}, got {given}")
        return fixed

    def _encode_all(
        self, videos: list, device: str | torch.device | None, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos -> tokens [N, K] of all, grids int64 [videos, 3]."""
        if not videos:
            raise ValueError("expected at least one image, got an empty list: give None where there is none")
        encoded = []
        for video in videos:
            where = (
                getattr(video[0] if isinstance(video, list) else video, "device", "cpu") if device is None else device
            )
            encoded.append(self._tokenizer_on(torch.device(where)).encode(self._frames(video, **options)))
        tokens = encoded[0][0] if len(encoded) == 1 else torch.cat([tokens for tokens, _ in encoded])
        return tokens, torch.tensor([grid_thw for _, grid_thw in encoded])

    def _frames(
        self,
        video: np.ndarray | torch.Tensor | list,
        bounds: tuple[int, int],
        do_resize: bool,
        resample: PILImageResampling,
        do_rescale: bool,
        do_convert_rgb: bool,
        layout: ChannelDimension | None,
    ) -> np.ndarray | torch.Tensor | list:
        """One video as an array [T, H, W, 3] or a list of T arrays [H, W, 3], uint8 or float in 0..255, of a size that
        `encode` takes. Nothing is copied that can be used as it is."""
        images = video if isinstance(video, list) else [video]
        images = [self._rgb(image, do_rescale, do_convert_rgb, layout) for image in images]
        size = height, width = height_width(images[0])
        factor = self.dct_config.resize_factor[0]
        if do_resize:
            size = target_size(height, width, factor, *bounds)
        elif height % factor or width % factor:
            raise ValueError(
                f"without do_resize, preset {self.dct_config.name} needs a height and a width that are multiples of "
                f"{factor} px, got {height} x {width}"
            )
        if all(height_width(image) == size for image in images):
            frames = [np.array(image) if isinstance(image, Image.Image) else image for image in images]
            return frames if isinstance(video, list) else frames[0]
        if not do_resize:
            sizes = sorted({"{} x {}".format(*height_width(image)) for image in images})
            raise ValueError(f"without do_resize, all frames of a video need one size, got {', '.join(sizes)}")
        frames = images if isinstance(video, list) else images[0]
        return [resize(frame, size, resample, do_rescale) for frame in frames]

    @staticmethod
    def _rgb(
        image: Image.Image | np.ndarray | torch.Tensor,
        do_rescale: bool,
        do_convert_rgb: bool,
        layout: ChannelDimension | None,
    ) -> Image.Image | np.ndarray | torch.Tensor:
        """A PIL image in mode RGB, or an array [..., H, W, 3], uint8 or float in 0..255."""
        if not isinstance(image, Image.Image):
            return to_three_channels(to_levels(channels_last(as_array(image), layout), do_rescale))
        if not do_convert_rgb and image.mode not in ("RGB", "L"):
            raise ValueError(f"without do_convert_rgb, PIL images must be RGB or L, got {image.mode}")
        return pil_to_rgb(image)


if BaseVideoProcessor is not None:

    class DCTVideoProcessor(DCTImageProcessor, BaseVideoProcessor):
        """The same processor as transformers 4.52 and later ask for it: videos come first, and frames are not sampled.

        AutoProcessor makes it from the settings of `DCTImageProcessor`; its name follows from that one's.
        """

        _auto_class = "AutoVideoProcessor"
        model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012

        def __call__(self, videos: Any = None, **kwargs: Any) -> BatchFeature:
            """See `DCTImageProcessor.preprocess`."""
            return self.preprocess(videos=videos, **kwargs)
