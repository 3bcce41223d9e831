"""DCT-coefficient tokens for Qwen2-VL: the transform, its presets, the folding of pretrained weights, the processor.

A token of stock Qwen2-VL is a patch of 2 frames x 14 x 14 pixels. Here a token is the orthonormal DCT-II of a larger
block of pixels, of which K coefficients are kept in a fixed order. The map is linear, so a pretrained patch embedding
is carried over exactly: `fold_patch_embedding` turns its weight into one that reads coefficients.

Letters used for shapes in this file:

    T H W     frames, rows and columns of the pictures, in frames and pixels
    bt bh bw  frames, rows and columns of one block, in frames and pixels
    t h w     the grid of blocks: t = T/bt, h = H/bh, w = W/bw
    m         spatial merge size: m x m tokens become one token of the language model (2 in Qwen2-VL)
    K         coefficients kept for each token
    N         tokens: t*h*w
    E         width of the vision tower

Analysis of one block, every step linear, in this order:

    RGB uint8 -> /255, minus CLIP mean -> Y, Cb, Cr -> DCT-II over frames, rows, columns -> keep K -> divide by scale

The file depends on torch, numpy and transformers only and is saved beside the weights of a converted checkpoint
(`save_pretrained` copies it), from where `AutoImageProcessor.from_pretrained(..., trust_remote_code=True)` loads it.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from transformers import Qwen2VLImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_transforms import convert_to_rgb, resize, to_channel_dimension_format
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    make_batched_videos,
    make_flat_list_of_images,
    to_numpy_array,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

PIXEL_PATCH = (2, 14, 14)  # frames, rows, columns of the patch that Qwen2-VL's Conv3d was trained on
CHROMA_FORMATS = ("444", "420")
PRESETS = ("exact", "x4", "x16")

# ITU-R BT.601 full range (JFIF), without the offset of 128: rows Y, Cb, Cr; columns R, G, B.
_LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YCBCR = np.stack([_LUMA, (np.eye(3)[2] - _LUMA) / 1.772, (np.eye(3)[0] - _LUMA) / 1.402])
# The same for BT.709 (ITU-R BT.709-6, item 3), which HD video is coded in.
_LUMA_709 = np.array([0.2126, 0.7152, 0.0722])
RGB_TO_YCBCR_709 = np.stack([_LUMA_709, (np.eye(3)[2] - _LUMA_709) / 1.8556, (np.eye(3)[0] - _LUMA_709) / 1.5748])
YCBCR_MATRICES = {"bt601": RGB_TO_YCBCR, "bt709": RGB_TO_YCBCR_709}

CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 26  # samples encoded at once, which stay in a CPU's cache or fill a GPU
Frames = np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor]

# First-order Markov model of pictures (Ahmed, Natarajan, Rao, IEEE Trans. Computers 1974): the correlation of
# neighbours along one axis, and the variance of a centred Y, Cb, Cr value in units of the 0..1 range squared.
PIXEL_CORRELATION = 0.95
FRAME_CORRELATION = 0.80
PLANE_VARIANCE = (0.06, 0.006, 0.006)


@lru_cache(maxsize=64)
def dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II as a matrix, float64 [size, size]: row f holds the cosine of frequency f.

    `dct_matrix(n) @ x` equals `scipy.fft.dct(x, type=2, norm="ortho")`.
    """
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def coefficient_variance(block: tuple[int, int, int]) -> np.ndarray:
    """Expected variance of every coefficient of a block, float64 [3, bt, bh, bw], planes in the order Y, Cb, Cr."""

    def along(size: int, correlation: float) -> np.ndarray:
        covariance = correlation ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
        basis = dct_matrix(size)
        return np.einsum("fi,ij,fj->f", basis, covariance, basis)

    frames, rows, columns = (
        along(size, rho) for size, rho in zip(block, (FRAME_CORRELATION, PIXEL_CORRELATION, PIXEL_CORRELATION))
    )
    return np.einsum("p,t,y,x->ptyx", np.array(PLANE_VARIANCE), frames, rows, columns)


def _available(block: tuple[int, int, int], chroma: str) -> np.ndarray:
    """Which coefficients the chroma format has at all, bool [3, bt, bh, bw]: 4:2:0 has the low quarter of Cb and Cr."""
    mask = np.ones((3, *block), dtype=bool)
    if chroma == "420":
        mask[1:, :, block[1] // 2 :] = False
        mask[1:, :, :, block[2] // 2 :] = False
    return mask


@dataclass(frozen=True)
class DCTConfig:
    """What a token holds. It is saved with the checkpoint; a model only understands tokens of its own config.

    block: (bt, bh, bw), frames and pixels of a block; 4:2:0 needs even bh and bw.
    chroma: "444", or "420" for colour at half the resolution in both directions.
    kept: K flat indices into the [3, bt, bh, bw] coefficients (Y, Cb, Cr; frame, row, column frequency), in the order
        in which they stand in a token.
    scale: K positive numbers by which the coefficients are divided, so that inputs have about unit variance.
    merge: m, tokens of the vision tower along one side that become one token of the language model.
    name: for messages and logs.

    Raises ValueError for a configuration that contradicts itself.
    """

    block: tuple[int, int, int]
    chroma: str
    kept: tuple[int, ...]
    scale: tuple[float, ...]
    merge: int = 2
    name: str = "custom"

    def __post_init__(self) -> None:
        if len(self.block) != 3 or not all(isinstance(side, int) and side >= 1 for side in self.block):
            raise ValueError(f"DCTConfig.block must be three positive whole numbers (bt, bh, bw), got {self.block!r}")
        if self.chroma not in CHROMA_FORMATS:
            raise ValueError(f"DCTConfig.chroma must be one of {', '.join(CHROMA_FORMATS)}, got {self.chroma!r}")
        if self.chroma == "420" and (self.block[1] % 2 or self.block[2] % 2):
            raise ValueError(f"DCTConfig.chroma 420 needs an even block height and width, got block {self.block}")
        available = np.flatnonzero(_available(self.block, self.chroma))
        if not self.kept or len(set(self.kept)) != len(self.kept) or not set(self.kept) <= set(available.tolist()):
            raise ValueError(
                f"DCTConfig.kept must be distinct indices of the {available.size} coefficients that block {self.block} "
                f"has in {self.chroma}, got {len(self.kept)} entries, {len(set(self.kept))} of them distinct"
            )
        if len(self.scale) != len(self.kept) or not all(math.isfinite(s) and s > 0 for s in self.scale):
            raise ValueError(
                f"DCTConfig.scale must be {len(self.kept)} positive numbers, one for each kept coefficient"
            )
        if self.merge < 1:
            raise ValueError(f"DCTConfig.merge must be at least 1, got {self.merge}")

    @property
    def num_coefficients(self) -> int:
        """K, the floats of one token."""
        return len(self.kept)

    @property
    def resize_factor(self) -> tuple[int, int]:
        """Pixels (rows, columns) of which a picture's height and width must be multiples: (bh*m, bw*m)."""
        return self.block[1] * self.merge, self.block[2] * self.merge

    @classmethod
    def preset(cls, name: str) -> "DCTConfig":
        """A named configuration: "exact", "x4" (a quarter of the tokens) or "x16" (a sixteenth)."""
        if name == "exact":
            return cls.select((2, 14, 14), "444", name=name)
        if name == "x4":
            block = (2, 28, 28)
            first = np.zeros((3, *block), dtype=bool)
            first[:, 0] = True  # the mean of the two frames, whole: a still loses no luma
            first[:, 1, :14, :14] = True  # of their difference what the half-size picture shows
            return cls.select(block, "420", 1764, first=first, name=name)
        if name == "x16":
            block = (2, 56, 56)
            first = np.zeros((3, *block), dtype=bool)
            first[:, :, :14, :14] = True
            return cls.select(block, "420", 2352, first=first, name=name)
        raise ValueError(f"unknown DCT preset {name!r}: choose one of {', '.join(PRESETS)}, or give a JSON file")

    @classmethod
    def select(
        cls,
        block: tuple[int, int, int],
        chroma: str,
        num_coefficients: int | None = None,
        first: np.ndarray | None = None,
        merge: int = 2,
        name: str = "custom",
    ) -> "DCTConfig":
        """Keeps `num_coefficients` (all of them if None): those marked in `first`, bool [3, bt, bh, bw], then the rest
        by falling expected variance, ties in index order. The token holds them in index order."""
        available = _available(block, chroma)
        variance = coefficient_variance(block).ravel()
        marked = np.zeros(variance.size, dtype=bool) if first is None else (first & available).ravel()
        order = np.lexsort((np.arange(variance.size), -variance, ~marked))
        order = order[available.ravel()[order]]
        count = order.size if num_coefficients is None else num_coefficients
        if not 1 <= count <= order.size:
            raise ValueError(f"block {block} in {chroma} has 1 to {order.size} coefficients to keep, asked for {count}")
        kept = np.sort(order[:count])
        scale = np.sqrt(variance[kept])
        return cls(block, chroma, tuple(kept.tolist()), tuple(float(f"{s:.6g}") for s in scale), merge, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DCTConfig":
        """Inverse of `to_dict`. Raises ValueError when a field is missing or unknown."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or not {"block", "chroma", "kept", "scale"} <= set(values) <= known:
            given = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a DCT configuration has the fields {', '.join(sorted(known))}, got {given}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "DCTConfig":
        """Reads what `save` wrote."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error

    @classmethod
    def resolve(cls, dct: Union["DCTConfig", dict, str, os.PathLike]) -> "DCTConfig":
        """From a config, its dict, a preset's name or the path of a JSON file."""
        if isinstance(dct, cls):
            return dct
        if isinstance(dct, dict):
            return cls.from_dict(dct)
        if str(dct).endswith(".json"):
            return cls.from_file(dct)
        return cls.preset(str(dct))


@dataclass(frozen=True)
class _Box:
    """The low corner of one plane at one frame frequency: where the product with `_Layer.columns` has it, where a token
    has it."""

    columns: slice
    corner: tuple[int, int]  # rows and columns of the corner in a token; a source may fill a part of it
    place: slice
    inverse_scale: torch.Tensor  # [fy, fx]
    add: bool  # to what stands there, instead of replacing it


@dataclass(frozen=True)
class _Layer:
    """One frame frequency of one source of samples."""

    frequency: int  # its place among the frequencies in use
    rows: torch.Tensor  # [fy, y]
    columns: torch.Tensor  # [samples in a row of a block, columns of all boxes]: DCT and colour in one
    boxes: tuple[_Box, ...]


@dataclass(frozen=True)
class _Source:
    """Samples to transform: one list of T frames [H, W, 3] (interleaved), or S lists of T frames [H, W]."""

    planes: list[list[torch.Tensor]]
    layers: tuple[_Layer, ...]
    rows: int  # of a block


class DCTTokenizer:
    """Turns frames into tokens and back. Arithmetic runs in `dtype` (torch.float32 or torch.float64) on `device`.

    Token order is Qwen2-VL's: frames, then groups of m x m tokens row by row, then the tokens of a group. For one
    frame, h = 4, w = 4, m = 2:

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15

    Encoding goes through the clip in chunks that stay in a CPU's cache, each by three matrix products: over the frames
    of a block, over its rows, over its columns with the colour matrix folded in. Only rows and columns that hold a kept
    coefficient are computed. Beside the tokens it needs a few MB (on a GPU some hundred), whatever the clip's length.
    """

    def __init__(
        self, config: DCTConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        # A token is first filled with boxes: of each plane and frame frequency the corner that holds all kept.
        index = np.stack(np.unravel_index(np.array(config.kept), (3, *config.block)))  # [(plane, ft, fy, fx), K]
        self._corners = _corners(index)
        self._starts, self._boxed = {}, 0
        for key, corner in self._corners.items():
            self._starts[key] = self._boxed
            self._boxed += math.prod(corner)
        kept = np.array([self._starts[p, ft] + fy * self._corners[p, ft][1] + fx for p, ft, fy, fx in index.T.tolist()])
        self._inverse_scale = np.ones(self._boxed)
        self._inverse_scale[kept] /= config.scale
        whole = np.array_equal(kept, np.arange(self._boxed))  # then boxes are written where they stay
        self._kept = None if whole else torch.from_numpy(kept).to(self.device)
        # Times sqrt(bt), which the row matrices take back: two frames are then added and subtracted exactly.
        self._frequencies = sorted({ft for _, ft in self._corners})
        self._frames = self._tensor(dct_matrix(config.block[0])[self._frequencies] * math.sqrt(config.block[0]))
        # The mean of the centred picture is subtracted from the coefficients: only frequency 0 has any of it.
        constant = np.flatnonzero(~index[1:].any(axis=0))
        self._constant, self._constant_plane = torch.from_numpy(constant).to(self.device), index[0, constant]
        self._scale = self._tensor(np.array(config.scale))
        self._layers: dict[Any, list[tuple[_Layer, ...]]] = {}  # made when first needed

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def encode(self, frames: Frames) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Frames [T, H, W, 3], or a list of T frames [H, W, 3], values 0..255 (uint8, or float for finer steps) ->
        tokens [N, K], grid (t, h, w).

        H and W must be multiples of `config.resize_factor`. The last frame is repeated until bt divides T, so a lone
        image becomes bt equal frames. Raises ValueError for any other shape.
        """
        frames = self._frame_list(frames, "frames [T, H, W, 3]", (3,))
        _, bh, bw = self.config.block
        if "rgb" not in self._layers:
            self._layers["rgb"] = [self._build_layers(RGB_TO_YCBCR / 255, bh, bw, interleaved=True)]
        source = _Source([frames], *self._layers["rgb"], bh)
        return self._encode([source], RGB_TO_YCBCR @ np.array(OPENAI_CLIP_MEAN))

    def encode_planes(
        self, luma: Frames, cb: Frames, cr: Frames, matrix: str = "bt601", full_range: bool = False
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Planes of 4:2:0 video, uint8 luma [T, H, W], cb and cr [T, H/2, W/2] -> tokens [N, K], grid (t, h, w): those
        of `encode` for the same clip in RGB, without the way over RGB.

        matrix: "bt601" or "bt709" (ITU-R BT.601-7, BT.709-6). full_range: luma is 0..255 instead of 16..235.
        Chroma becomes the low quarter of its block's DCT, as if a sample lay amid its 2 x 2 luma samples. Values that
        are no RGB colour are not clipped. Blocks must have an even height and width. Raises ValueError.
        """
        _, bh, bw = self.config.block
        if matrix not in YCBCR_MATRICES:
            raise ValueError(f"matrix must be one of {', '.join(YCBCR_MATRICES)}, got {matrix!r}")
        if bh % 2 or bw % 2:
            raise ValueError(f"encode_planes needs blocks of even height and width, got {bh} x {bw} px: use encode")
        luma = self._frame_list(luma, "luma [T, H, W]")
        chroma = [self._frame_list(plane, "chroma [T, H/2, W/2]") for plane in (cb, cr)]
        half = (luma[0].shape[0] / 2, luma[0].shape[1] / 2)
        if any(len(plane) != len(luma) or tuple(plane[0].shape) != half for plane in chroma):
            given = ", ".join(str([len(plane), *plane[0].shape]) for plane in (luma, *chroma))
            raise ValueError(f"encode_planes expects luma [T, H, W], cb and cr [T, H/2, W/2], got {given}")
        luma_range, chroma_range, black = (255, 255, 0) if full_range else (219, 224, 16 / 219)
        to_jfif = RGB_TO_YCBCR @ np.linalg.inv(YCBCR_MATRICES[matrix])
        if (matrix, full_range) not in self._layers:
            # A DCT of half the size, times 2, is the low quarter of the block's. What BT.709 calls chroma has a share
            # in BT.601's luma, which is added to luma's low quarter.
            self._layers[matrix, full_range] = [
                self._build_layers(to_jfif[:, :1] / luma_range, bh, bw),
                self._build_layers(to_jfif[:, 1:] / chroma_range * 2, bh // 2, bw // 2),
            ]
        luma_layers, chroma_layers = self._layers[matrix, full_range]
        sources = [_Source([luma], luma_layers, bh), _Source(chroma, chroma_layers, bh // 2)]
        offset = RGB_TO_YCBCR @ np.array(OPENAI_CLIP_MEAN) + to_jfif @ [black, *[128 / chroma_range] * 2]
        return self._encode(sources, offset)

    def _frame_list(self, frames: Frames, expected: str, channels: tuple[int, ...] = ()) -> list[torch.Tensor]:
        """Frames as tensors on the device, nothing copied that is there already. Raises ValueError."""
        whole = list(frames.shape) if hasattr(frames, "shape") else None
        if whole and self.device.type != "cpu":
            frames = self._as_tensor(frames)  # one transfer
        frames = [] if whole == [] else [self._as_tensor(frame) for frame in frames]
        shapes = sorted({tuple(frame.shape) for frame in frames})
        if len(shapes) != 1 or len(shapes[0]) != 2 + len(channels) or shapes[0][2:] != channels or 0 in shapes[0]:
            several = f"{len(frames)} frames of {' and '.join(str(list(shape)) for shape in shapes) or 'no size'}"
            raise ValueError(f"encode expects {expected}, got {whole or several}")
        return frames

    def _as_tensor(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(array, np.ndarray):  # torch takes no mirrored arrays, and warns of read-only ones
            array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return torch.as_tensor(array).to(self.device)

    def _build_layers(
        self, colour: np.ndarray, rows: int, columns: int, interleaved: bool = False
    ) -> tuple[_Layer, ...]:
        """Matrices for samples of which colour [3, S] makes Y, Cb, Cr; a block has rows x columns of each."""
        row_matrix, column_matrix = dct_matrix(rows) / math.sqrt(self.config.block[0]), dct_matrix(columns)
        layers = []
        for number, ft in enumerate(self._frequencies):
            boxes, products, width = [], [], 0
            for plane in np.flatnonzero(np.abs(colour).max(axis=1) > 1e-9).tolist():
                if (plane, ft) not in self._corners:
                    continue
                corner, start = self._corners[plane, ft], self._starts[plane, ft]
                fy, fx = min(corner[0], rows), min(corner[1], columns)
                order = "fx,s->xsf" if interleaved else "fx,s->sxf"
                products.append(np.einsum(order, column_matrix[:fx], colour[plane]).reshape(-1, fx))
                place = slice(start, start + math.prod(corner))
                inverse_scale = self._tensor(self._inverse_scale[place].reshape(corner)[:fy, :fx])
                add = plane == 0 and colour.shape[1] == 2
                boxes.append(_Box(slice(width, width + fx), corner, place, inverse_scale, add))
                width += fx
            if boxes:
                height = max(len(box.inverse_scale) for box in boxes)
                matrices = self._tensor(row_matrix[:height]), self._tensor(np.hstack(products))
                layers.append(_Layer(number, *matrices, tuple(boxes)))
        return tuple(layers)

    @torch.no_grad()
    def _encode(self, sources: list[_Source], offset: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """offset [3]: Y, Cb, Cr that the samples give where the centred picture is zero."""
        grid = t, h, w = self._grid(sources[0].planes[0])  # of the whole picture: luma comes first
        tokens = torch.zeros(t * h * w, self.config.num_coefficients, dtype=self.dtype, device=self.device)
        buffers = _Buffers(self.dtype, self.device)
        sources = [source for source in sources if source.layers]  # of chroma there may be nothing that is kept
        for blocks, bands in self._chunks(grid):
            first, count = (blocks.start * h + bands.start) * w, len(blocks) * len(bands) * w
            chunk = tokens[first : first + count]
            boxed = chunk if self._kept is None else buffers("boxed", count, self._boxed)
            for source in sources:
                self._transform(source, blocks, bands, w, boxed, buffers)
            if self._kept is not None:
                torch.index_select(boxed, 1, self._kept, out=chunk)
        level = self._tensor(offset[self._constant_plane] * math.sqrt(math.prod(self.config.block)))
        tokens[:, self._constant] -= level / self._scale[self._constant]
        return tokens, grid

    def _grid(self, frames: list[torch.Tensor]) -> tuple[int, int, int]:
        """(t, h, w). Raises ValueError for sides that are no multiple of the resize factor."""
        (height, width), (rows, columns) = frames[0].shape[:2], self.config.resize_factor
        if height % rows or width % columns:
            raise ValueError(
                f"preset {self.config.name} needs a height that is a multiple of {rows} px and a width that is a "
                f"multiple of {columns} px, got {height} x {width}"
            )
        bt, bh, bw = self.config.block
        return -(-len(frames) // bt), height // bh, width // bw

    def _chunks(self, grid: tuple[int, int, int]) -> Iterator[tuple[range, range]]:
        """Ranges of t and of h whose tokens stand one after another, about `CPU_CHUNK` or `GPU_CHUNK` samples each."""
        (t, h, w), m = grid, self.config.merge
        budget = CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK
        budget = max(1, budget // (3 * math.prod(self.config.block) * w * m))
        blocks, bands = max(1, budget // (h // m)), min(h, budget * m)
        for first_block in range(0, t, blocks):
            for first_band in range(0, h, bands):
                yield (
                    range(first_block, min(first_block + blocks, t)),
                    range(first_band, min(first_band + bands, h)),
                )

    def _transform(
        self, source: _Source, blocks: range, bands: range, w: int, boxed: torch.Tensor, buffers: "_Buffers"
    ) -> None:
        """One chunk of one source -> its boxes in `boxed` [tokens, floats]."""
        m, count = self.config.merge, len(blocks) * len(bands)
        boxed = boxed.view(len(blocks), len(bands) // m, w // m, m, m, -1)
        by_frequency = self._over_frames(source, blocks, bands, w, buffers)  # [ft, block, y, w*x]
        for layer in source.layers:
            if layer.frequency >= len(by_frequency):  # a still has no others
                break
            fy, y = layer.rows.shape
            samples, fx = layer.columns.shape
            x = by_frequency[layer.frequency].view(count, y, w * samples)
            x = torch.bmm(layer.rows.expand(count, fy, y), x, out=buffers("rows", count, fy, w * samples))
            x = torch.mm(x.view(-1, samples), layer.columns, out=buffers("columns", count * fy * w, fx))
            x = x.view(len(blocks), len(bands) // m, m, fy, w // m, m, fx).permute(0, 1, 4, 2, 5, 3, 6)
            for box in layer.boxes:
                rows, columns = box.inverse_scale.shape
                target = boxed[..., box.place].unflatten(-1, box.corner)[..., :rows, :columns]
                value = x[..., :rows, box.columns]
                if box.add:
                    target.addcmul_(value, box.inverse_scale)
                else:
                    torch.mul(value, box.inverse_scale, out=target)

    def _over_frames(
        self, source: _Source, blocks: range, bands: range, w: int, buffers: "_Buffers"
    ) -> torch.Tensor:
        """Samples of a chunk, transformed over the frames of each block: [ft, samples].

        A lone image gives frequency 0 alone, as the others are zero for equal frames.
        """
        bt, last = self.config.block[0], len(source.planes[0]) - 1
        still = last == 0 and self._frequencies[0] == 0
        rows = range(bands.start * source.rows, bands.stop * source.rows)
        width = source.layers[0].columns.shape[0] // len(source.planes)  # of a row of a block in one plane
        shape = (1 if still else bt, len(blocks), len(rows), w, len(source.planes), width)
        samples = buffers("samples", *shape)
        for number, place, s in np.ndindex(shape[0], len(blocks), len(source.planes)):
            frame = source.planes[s][min(blocks[place] * bt + number, last)]
            samples[number, place, :, :, s].copy_(frame[rows.start : rows.stop].reshape(len(rows), w, width))
        samples = samples.view(shape[0], -1)
        if still:
            return samples.mul_(bt)
        return torch.mm(self._frames, samples, out=buffers("frames", len(self._frequencies), samples.shape[1]))

    def energies(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [N, K] -> [N, 2]: energy of a block's detail (frame frequency 0, the mean colour left out) and of
        its motion (all other frame frequencies), summed over the block's Y, Cb, Cr values, of a picture in 0..1."""
        _, ft, fy, fx = np.unravel_index(np.array(self.config.kept), (3, *self.config.block))
        groups = np.stack([(ft == 0) & (fy + fx > 0), ft > 0], axis=1)
        return (tokens * self._scale.to(tokens)).square() @ torch.from_numpy(groups).to(tokens)

    def positions(self, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        """Block that each token shows, int64 [N, 3]: its t, h, w, in token order."""
        (t, h, w), m = grid_thw, self.config.merge
        order = torch.stack(torch.meshgrid(*(torch.arange(side) for side in (t, h, w)), indexing="ij"), dim=-1)
        return order.view(t, h // m, m, w // m, m, 3).transpose(2, 3).reshape(-1, 3)

    def decode(self, tokens: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        """Tokens [N, K], grid (t, h, w) -> uint8 frames [t*bt, h*bh, w*bw, 3]: what the model receives, as a picture.

        Coefficients that were not kept count as zero.
        """
        return self.decode_float(tokens, grid_thw).round_().clamp_(0, 255).to(torch.uint8)

    def decode_float(self, tokens: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        """As `decode`, without rounding and clipping: [t*bt, h*bh, w*bw, 3] in 0..255, of this tokenizer's dtype."""
        (bt, bh, bw), m = self.config.block, self.config.merge
        t, h, w = (int(side) for side in grid_thw)
        tokens = torch.as_tensor(tokens, device=self.device).to(self.dtype)
        if tokens.shape != (t * h * w, self.config.num_coefficients):
            raise ValueError(
                f"decode expects tokens [{t * h * w}, {self.config.num_coefficients}] for the grid {(t, h, w)} of "
                f"preset {self.config.name}, got {list(tokens.shape)}"
            )
        x = tokens.new_zeros(t * h * w, 3 * bt * bh * bw)
        x[:, torch.tensor(self.config.kept, device=self.device)] = tokens * self._scale
        x = x.view(t, h // m, w // m, m, m, 3, bt, bh, bw).permute(6, 0, 1, 3, 7, 2, 4, 8, 5).reshape(bt, -1)
        frames, rows, columns = (self._tensor(dct_matrix(side)) for side in (bt, bh, bw))
        x = (frames.T @ x).view(bt * t * h, bh, w * bw * 3)
        x = rows.T @ x
        colour = self._tensor(np.linalg.inv(RGB_TO_YCBCR) * 255)
        x = x.view(-1, bw * 3) @ torch.kron(columns, colour.T.contiguous())
        x = x.view(bt, t, h * bh, w * bw, 3).transpose(0, 1).reshape(t * bt, h * bh, w * bw, 3)
        return x + self._tensor(np.array(OPENAI_CLIP_MEAN) * 255)


class _Buffers:
    """Memory by name that all chunks of a call share: touching fresh pages costs more than the arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """Zeros at first, then what the last user left."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = self._like.new_zeros(size)
        return self._memory[name][:size].view(shape)


def _corners(index: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """index [(plane, ft, fy, fx), K] -> for each plane and ft in use, rows and columns of the corner that holds all."""
    corners = {}
    for plane, ft in sorted(set(zip(index[0].tolist(), index[1].tolist()))):
        inside = index[2:, (index[0] == plane) & (index[1] == ft)]
        corners[plane, ft] = tuple((inside.max(axis=1) + 1).tolist())
    return corners


def synthesis_matrix(config: DCTConfig) -> np.ndarray:
    """S, float64 [K, 3*2*14*14]: from a token to the normalised RGB patch (channel, frame, row, column) that Qwen2-VL's
    Conv3d expects.

    The patch is the block, downscaled in the DCT domain: its lowest (2, 14, 14) coefficients, times
    sqrt(2*14*14 / (bt*bh*bw)) so that a constant picture keeps its value, transformed back. Rows of other coefficients
    are zero. For a block of (2, 14, 14) this is the inverse transform.
    """
    plane, ft, fy, fx = np.unravel_index(np.array(config.kept), (3, *config.block))
    inside = (ft < PIXEL_PATCH[0]) & (fy < PIXEL_PATCH[1]) & (fx < PIXEL_PATCH[2])
    frames, rows, columns = (dct_matrix(side) for side in PIXEL_PATCH)
    colour = np.linalg.inv(RGB_TO_YCBCR) / np.array(OPENAI_CLIP_STD)[:, None]  # [rgb, plane]
    gain = np.array(config.scale) * math.sqrt(math.prod(PIXEL_PATCH) / math.prod(config.block))
    synthesis = np.zeros((config.num_coefficients, 3, *PIXEL_PATCH))
    synthesis[inside] = np.einsum(
        "k,ck,kt,ky,kx->kctyx",
        gain[inside],
        colour[:, plane[inside]],
        frames[ft[inside]],
        rows[fy[inside]],
        columns[fx[inside]],
        optimize=True,
    )
    return synthesis.reshape(config.num_coefficients, -1)


def fold_patch_embedding(weight: torch.Tensor, config: DCTConfig) -> torch.Tensor:
    """W' = W S: a Conv3d weight for pixels [E, 3, 2, 14, 14] -> one for tokens [E, K, 1, 1, 1], of the same dtype.

    Columns of coefficients that the pixel model never saw start at zero: at step 0 the folded model computes what the
    pixel model computes on the picture downscaled in the DCT domain. Raises ValueError for any other shape.
    """
    if weight.ndim != 5 or tuple(weight.shape[1:]) != (3, *PIXEL_PATCH):
        raise ValueError(f"fold_patch_embedding expects a weight [E, 3, 2, 14, 14], got {list(weight.shape)}")
    synthesis = torch.from_numpy(synthesis_matrix(config)).to(weight.device)
    folded = weight.reshape(weight.shape[0], -1).to(torch.float64) @ synthesis.T
    return folded.to(weight.dtype).reshape(weight.shape[0], -1, 1, 1, 1)


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels: multiples of `factor`, near the picture's aspect ratio, H*W within the two bounds.

    Qwen2-VL's `smart_resize`, which refuses sides below `factor`; here these are enlarged to it. One factor x factor
    square is the least, whatever max_pixels says. Raises ValueError for an aspect ratio over 200.
    """
    enlarge = max(1.0, factor / min(height, width))
    height, width = smart_resize(
        max(factor, round(height * enlarge)), max(factor, round(width * enlarge)), factor, min_pixels, max_pixels
    )
    # smart_resize rounds the short side of a long strip to nothing; with one factor there, the long side must give way.
    longest = max(factor, max_pixels // factor**2 * factor)
    return min(max(factor, height), longest), min(max(factor, width), longest)


class DCTImageProcessor(Qwen2VLImageProcessor):
    """Qwen2-VL's image processor with DCT tokens: the same call, the same outputs, other numbers in `pixel_values`.

    dct: a preset's name, a `DCTConfig`, its dict, or the path of a JSON file.
    min_pixels, max_pixels: bounds of H*W after resizing, for an image and for each frame of a video.
    do_resize: turn off for pictures whose height and width already are multiples of the resize factor.

    Output: `pixel_values` float32 [N, K] and `image_grid_thw` int64 [images, 3], or `pixel_values_videos` and
    `video_grid_thw`. Values that are not 0..255 (do_rescale=False) are taken as 0..1. The stock processor's mean, std
    and do_normalize have no place here: the token format fixes them.
    """

    def __init__(
        self,
        dct: str | dict | DCTConfig = "x4",
        min_pixels: int = 56 * 56,
        max_pixels: int = 28 * 28 * 1280,
        do_resize: bool = True,
        do_rescale: bool = True,
        resample: PILImageResampling = PILImageResampling.BICUBIC,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        config = DCTConfig.resolve(dct)
        if config.block[1] != config.block[2]:
            raise ValueError(f"DCTImageProcessor needs square blocks, got {config.block[1]} x {config.block[2]} px")
        kwargs.update(patch_size=config.block[1], temporal_patch_size=config.block[0], merge_size=config.merge)
        kwargs.pop("size", None)  # says the same as min_pixels and max_pixels
        super().__init__(
            do_resize=do_resize,
            do_rescale=do_rescale,
            resample=resample,
            do_convert_rgb=do_convert_rgb,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            **kwargs,
        )
        self.dct = config.to_dict()
        self._tokenizer: DCTTokenizer | None = None

    @property
    def dct_config(self) -> DCTConfig:
        """The token format."""
        return self.tokenizer.config

    @property
    def tokenizer(self) -> DCTTokenizer:
        """The transform, in float32 on the CPU."""
        if self._tokenizer is None:
            self._tokenizer = DCTTokenizer(DCTConfig.from_dict(self.dct))
        return self._tokenizer

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but the transform's matrices, which follow from `dct`."""
        return {name: value for name, value in super().to_dict().items() if name != "_tokenizer"}

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
        do_rescale: bool | None = None,
        return_tensors: str | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **unused: Any,
    ) -> BatchFeature:
        """Images: one or a list of PIL, numpy or torch pictures. Videos: one or a list of arrays [T, H, W, 3] (or
        [T, 3, H, W]) or of lists of frames. Either may be None. `return_tensors`: "pt" or "np" (the default)."""
        if images is None and videos is None:
            raise ValueError("DCTImageProcessor needs images or videos, got neither")
        if size is not None:
            min_pixels, max_pixels = size["shortest_edge"], size["longest_edge"]
        options = {
            "do_resize": self.do_resize if do_resize is None else do_resize,
            "min_pixels": self.min_pixels if min_pixels is None else min_pixels,
            "max_pixels": self.max_pixels if max_pixels is None else max_pixels,
            "do_rescale": self.do_rescale if do_rescale is None else do_rescale,
            "input_data_format": input_data_format,
        }
        data = {}
        if images is not None:
            clips = [[image] for image in make_flat_list_of_images(images)]
            data["pixel_values"], data["image_grid_thw"] = self._encode_all(clips, options)
        if videos is not None:
            clips = [list(video) for video in make_batched_videos(videos)]
            data["pixel_values_videos"], data["video_grid_thw"] = self._encode_all(clips, options)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _encode_all(self, clips: list[list], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self.tokenizer.encode(self._frames(clip, **options)) for clip in clips]
        tokens = torch.cat([tokens for tokens, _ in encoded]).numpy()
        return tokens, np.array([grid_thw for _, grid_thw in encoded], dtype=np.int64)

    def _frames(
        self,
        clip: list,
        do_resize: bool,
        min_pixels: int,
        max_pixels: int,
        do_rescale: bool,
        input_data_format: str | ChannelDimension | None,
    ) -> np.ndarray:
        """One clip as an array [T, H, W, 3] with values 0..255, resized."""
        frames = [to_numpy_array(convert_to_rgb(frame) if self.do_convert_rgb else frame) for frame in clip]
        layout = input_data_format or infer_channel_dimension_format(frames[0], num_channels=(1, 3))
        frames = [to_channel_dimension_format(frame, ChannelDimension.LAST, layout) for frame in frames]
        frames = [np.repeat(frame, 3, axis=-1) if frame.shape[-1] == 1 else frame for frame in frames]
        if do_resize:
            factor = self.dct_config.resize_factor[0]
            size = target_size(*frames[0].shape[:2], factor, min_pixels, max_pixels)
            frames = [frame if frame.shape[:2] == size else self._resize(frame, size) for frame in frames]
        frames = np.stack(frames)
        return frames if do_rescale else frames * 255.0  # after resizing, which tells 0..1 from 0..255 by the values

    def _resize(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize(frame, size, self.resample, data_format=ChannelDimension.LAST, input_data_format="channels_last")


DCTImageProcessor.register_for_auto_class("AutoImageProcessor")
