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

The file depends on torch, numpy, transformers and Pillow only and is saved beside the weights of a converted checkpoint
(`save_pretrained` copies it), from where `AutoImageProcessor.from_pretrained(..., trust_remote_code=True)` loads it.
"""

import copy
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
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.utils import TensorType, logging

logger = logging.get_logger(__name__)

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

CPU_CHUNK, GPU_CHUNK = 1 << 21, 1 << 28  # samples encoded at once, which stay in a CPU's cache or fill a GPU
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
        boxes = [box for source in sources for layer in source.layers for box in layer.boxes if not box.add]
        partly = len(sources[0].planes[0]) == 1 or sum(box.inverse_scale.numel() for box in boxes) < self._boxed
        new = torch.zeros if partly and self._kept is None else torch.empty
        tokens = new(t * h * w, self.config.num_coefficients, dtype=self.dtype, device=self.device)
        buffers = _Buffers(self.dtype, self.device)
        sources = [source for source in sources if source.layers]  # of chroma there may be nothing that is kept
        for blocks, bands in self._chunks(grid):
            first, count = (blocks.start * h + bands.start) * w, len(blocks) * len(bands) * w
            chunk = tokens[first : first + count]
            boxed = chunk if self._kept is None else buffers("boxed", count, self._boxed, zero=True)
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
        mixed = buffers("frames", len(self._frequencies), samples.shape[1])
        if bt != 2:
            return torch.mm(self._frames, samples, out=mixed)
        for frequency, result in zip(self._frequencies, mixed):  # a product with so small a matrix is slow on a GPU
            torch.add(*samples, alpha=-1 if frequency else 1, out=result)
        return mixed

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

    def __call__(self, name: str, *shape: int, zero: bool = False) -> torch.Tensor:
        """What the last user left there; at first anything, or zeros if asked for."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = self._like.new_zeros(size) if zero else self._like.new_empty(size)
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

    Qwen2-VL's `smart_resize` wherever its result keeps to the bounds and to an aspect ratio of 200. Beyond it: sides
    below `factor` are enlarged to it; where both bounds cannot be kept, max_pixels is; the least is one square of
    factor x factor, whatever max_pixels says. A target size is its own target size.

    Raises ValueError for an aspect ratio over 200 and for a picture without pixels.
    """
    if min(height, width) < 1:
        raise ValueError(f"a picture must have at least one pixel, got {height} x {width}")
    enlarge = max(1.0, factor / min(height, width))
    size = max(factor, round(height * enlarge)), max(factor, round(width * enlarge))
    while (target := _nearest_size(*size, factor, min_pixels, max_pixels)) != size:
        size = target
    return size


def _nearest_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """One step of `target_size`, which repeats it: rounding can change the aspect ratio, and with it what fits best."""
    rows, columns = smart_resize(height, width, factor, min_pixels, max_pixels)
    if rows * columns > max_pixels:  # no multiple between the bounds: the largest below the upper one
        shrink = math.sqrt(max_pixels / (height * width))
        rows, columns = (math.floor(side * shrink / factor) * factor for side in (height, width))
    # A long strip's short side is rounded to nothing, or to so little that the long one must give way.
    rows, columns = max(factor, rows), max(factor, columns)
    longest = max(factor, max_pixels // (min(rows, columns) * factor) * factor)
    longest = min(longest, 200 * min(rows, columns))
    return min(rows, longest), min(columns, longest)


def _dimensions(value: Any) -> int:
    """Of an array or tensor; a PIL picture counts as [H, W, C]. Raises ValueError for anything else."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim
    if isinstance(value, Image.Image):
        return 3
    hint = ": open the file first, as PIL.Image.open does" if isinstance(value, (str, bytes, os.PathLike)) else ""
    raise ValueError(f"expected PIL, numpy or torch pictures, or lists of them, got {type(value).__name__}{hint}")


def _flat_images(images: Any) -> list:
    """A picture, a batch of pictures [N, ...] or lists of these, nested or not -> the pictures, one after another."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flat_images(item)]
    dimensions = _dimensions(images)
    if dimensions in (2, 3):
        return [images]
    if dimensions == 4:
        return list(images)
    raise ValueError(f"expected an image [H, W], [H, W, C] or [C, H, W], or a batch of them, got {list(images.shape)}")


def _flat_videos(videos: Any) -> list:
    """A clip or lists of clips, nested or not -> the clips, each an array [T, ...] or a list of frames."""
    if isinstance(videos, (list, tuple)):
        if not videos:
            raise ValueError("expected clips of at least one frame, got an empty list")
        if all(not isinstance(item, (list, tuple)) and _dimensions(item) < 4 for item in videos):
            return [list(videos)]
        return [clip for item in videos for clip in _flat_videos(item)]
    dimensions = _dimensions(videos)
    if dimensions in (2, 3):  # a lone frame
        return [[videos]]
    if dimensions == 4:
        return [videos]
    if dimensions == 5:
        return list(videos)
    raise ValueError(f"expected a clip [T, H, W, C] or [T, C, H, W], or a list of frames, got {list(videos.shape)}")


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency on white, 16-bit grey scaled to 8 (of which Pillow's own convert takes no notice)."""
    if image.mode.startswith("I"):  # "I;16", and "I" as older files are read
        grey = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_array(picture: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A tensor of the CPU as an array of the same memory; what is on another device stays there."""
    if not isinstance(picture, torch.Tensor):
        return picture
    picture = picture.detach()
    if picture.dtype == torch.bfloat16:  # numpy has none
        picture = picture.float()
    return picture.numpy() if picture.device.type == "cpu" else picture


def _channels_last(array: np.ndarray | torch.Tensor, layout: str | None) -> np.ndarray | torch.Tensor:
    """[H, W], [..., H, W, C] or [..., C, H, W] -> [..., H, W, C], a view. C is 1, 3 or 4, else ValueError."""
    shape = list(array.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(f"expected a picture [H, W], [H, W, C] or [C, H, W] with H and W at least 1, got {shape}")
    if len(shape) == 2:
        return array[..., None]
    if layout is None:
        layout = _infer_layout(shape)
    axis = -1 if layout == ChannelDimension.LAST else -3
    if shape[axis] not in (1, 3, 4):
        raise ValueError(
            f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {shape[axis]}: {shape} with channels "
            f"{'last' if axis == -1 else 'first'}"
        )
    if axis == -1:
        return array
    return array.movedim(-3, -1) if isinstance(array, torch.Tensor) else np.moveaxis(array, -3, -1)


def _infer_layout(shape: list[int]) -> ChannelDimension:
    """As the stock processor an axis of 1 or 3, else one of 4. Where both ends could be it, ValueError; the stock
    processor takes the first."""
    first, last = shape[-3], shape[-1]
    if first in (1, 3) and last in (1, 3):
        raise ValueError(f"cannot tell which axis of {shape} holds the channels: give input_data_format")
    for channels in ((1, 3), (4,)):
        if first in channels or last in channels:
            return ChannelDimension.FIRST if first in channels else ChannelDimension.LAST
    raise ValueError(f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels first or last, got {shape}")


def _to_levels(array: np.ndarray | torch.Tensor, do_rescale: bool) -> np.ndarray | torch.Tensor:
    """Any number type -> uint8, or float in 0..255. Bytes, the usual case, are not looked at."""
    kind = str(array.dtype).removeprefix("torch.")
    if kind == "uint8":
        return array
    if kind.startswith("float"):
        return _float_to_levels(array, do_rescale)
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if kind == "bool":
        return array * np.uint8(255)
    if kind == "uint16":
        return (array / 257).round().astype(np.uint8)
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"expected pictures of bytes, floats or whole numbers, got {kind}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"expected values 0..255, got {kind} from {array.min()} to {array.max()}")
    return array.astype(np.uint8)


def _float_to_levels(array: np.ndarray | torch.Tensor, do_rescale: bool) -> np.ndarray | torch.Tensor:
    """0..255 (do_rescale) or 0..1 -> 0..255. Raises ValueError for values that are plainly of another range, or NaN."""
    low, high, top = float(array.min()), float(array.max()), 255 if do_rescale else 1
    if not (low >= -0.5 * top and high <= 1.5 * top):  # filters overshoot a little
        other = "0..1 needs do_rescale=False" if do_rescale else "0..255 needs do_rescale=True"
        raise ValueError(f"expected values 0..{top}, got {low:.4g} to {high:.4g}: {other}, undo any normalization")
    if not do_rescale:
        # The float32 of double products is what the stock processor makes, whose bytes depend on the last bit.
        array = array.double() * 255 if isinstance(array, torch.Tensor) else array.astype(np.float64) * 255
        return array.float() if isinstance(array, torch.Tensor) else array.astype(np.float32)
    if 0 < high <= 1:
        logger.warning_once("Pictures of values 0..1 are taken as nearly black: for 0..1 give do_rescale=False.")
    return array


def _to_three_channels(array: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """[..., H, W, C] in 0..255 -> [..., H, W, 3]: grey three times, RGBA on white."""
    channels = array.shape[-1]
    if channels == 3:
        return array
    if channels == 1:
        return array.expand(*array.shape[:-1], 3) if isinstance(array, torch.Tensor) else np.repeat(array, 3, axis=-1)
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.dtype == np.uint8:  # as Pillow composes
        colour, alpha = array[..., :3].astype(np.int32), array[..., 3:].astype(np.int32)
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    alpha = array[..., 3:] / 255
    return array[..., :3] * alpha + 255 * (1 - alpha)


def _height_width(picture: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    return picture.size[::-1] if isinstance(picture, Image.Image) else tuple(picture.shape[-3:-1])


def _resize(
    picture: Image.Image | np.ndarray | torch.Tensor, size: tuple[int, int], resample: int, do_rescale: bool
) -> np.ndarray:
    """A picture [H, W, 3] -> uint8 [*size, 3], by Pillow."""
    if not isinstance(picture, Image.Image):
        array = picture.cpu().numpy() if isinstance(picture, torch.Tensor) else picture
        if array.dtype != np.uint8:
            array = array.clip(0, 255)
            # The stock processor cuts what was given as 0..1 to bytes, and takes of 0..255 only whole numbers.
            array = (array.round() if do_rescale else array).astype(np.uint8)
        picture = Image.fromarray(array)
    return np.array(picture.resize(size[::-1], resample))


def _bounds_in(size: dict[str, int]) -> tuple[int, int]:
    """min_pixels and max_pixels as the stock processor's `size` names them."""
    if not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} <= set(size):
        raise ValueError(f"size must hold shortest_edge (min_pixels) and longest_edge (max_pixels), got {size}")
    return size["shortest_edge"], size["longest_edge"]


def _pixel_bounds(low: int | None, high: int | None, own_low: int, own_high: int) -> tuple[int, int]:
    """The bounds given or, where None, the processor's own, of which the lower one gives way to a lower upper one."""
    high = own_high if high is None else high
    low = min(own_low, high) if low is None else low
    if not 1 <= low <= high:
        raise ValueError(f"expected 1 <= min_pixels <= max_pixels, got min_pixels {low} and max_pixels {high}")
    return low, high


class DCTImageProcessor(Qwen2VLImageProcessor):
    """Qwen2-VL's image processor with DCT tokens: the same call, the same outputs, other numbers in `pixel_values`.

    dct: a preset's name, a `DCTConfig`, its dict, or the path of a JSON file.
    min_pixels, max_pixels: bounds of H*W after resizing, for an image and for each frame of a video. `size`,
        {"shortest_edge": min_pixels, "longest_edge": max_pixels}, is the stock processor's second name for them.
    do_resize: turn off for pictures whose height and width already are multiples of the resize factor.
    do_rescale: turn off for floats in 0..1; with it, floats are in 0..255.
    resample: Pillow's filter; what is resized has 8 bits, as in the stock processor, and gets the same pixels.
    do_convert_rgb: turn off to have PIL pictures refused that are neither RGB nor grey.

    Pictures are PIL, numpy or torch; grey ([H, W], or one channel), RGB or RGBA; channels first or last; uint8, uint16
    (0..65535), bool, other whole numbers in 0..255, or floats. Transparency is laid on white, as `media.to_rgb` does
    for files, and 16-bit grey is scaled to 8; the stock processor drops alpha, which shows what lies under it, and
    clips 16-bit grey. Frames of one clip that differ in size are resized to what the first one's size asks for.

    Output: `pixel_values` float32 [N, K] and `image_grid_thw` int64 [images, 3], or `pixel_values_videos` and
    `video_grid_thw`, on the device of the pictures. The stock processor's mean, std and do_normalize have no place
    here: the token format fixes them.
    """

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
        **kwargs: Any,
    ) -> None:
        config = DCTConfig.resolve(dct)
        if config.block[1] != config.block[2]:
            raise ValueError(f"DCTImageProcessor needs square blocks, got {config.block[1]} x {config.block[2]} px")
        fixed = self._take_fixed(kwargs, config)
        if size is not None:
            low, high = _bounds_in(size)
            min_pixels = low if min_pixels is None else min_pixels
            max_pixels = high if max_pixels is None else max_pixels
        min_pixels, max_pixels = _pixel_bounds(min_pixels, max_pixels, 56 * 56, 28 * 28 * 1280)
        super().__init__(
            do_resize=do_resize,
            do_rescale=do_rescale,
            resample=resample,
            do_convert_rgb=do_convert_rgb,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            **fixed,
            **kwargs,
        )
        self.dct = config.to_dict()
        self._tokenizers: dict[torch.device, DCTTokenizer] = {}

    @property
    def size(self) -> dict[str, int]:
        """The two bounds as the stock processor calls them. Not saved: `min_pixels` and `max_pixels` say it."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    @size.setter
    def size(self, size: dict[str, int]) -> None:
        self.min_pixels, self.max_pixels = _bounds_in(size)

    @property
    def dct_config(self) -> DCTConfig:
        """The token format."""
        return self.tokenizer.config

    @property
    def tokenizer(self) -> DCTTokenizer:
        """The transform, in float32 on the CPU."""
        return self._tokenizer_on(torch.device("cpu"))

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

        images: a picture, a batch [N, ...], or lists of these.
        videos: a clip, an array [T, H, W, C] or [T, C, H, W] or a list of T frames; or lists of these. The last frame
            is repeated until bt divides T.
        return_tensors: "pt", "np" (the default), or another of transformers' names.
        input_data_format: "channels_first" or "channels_last"; inferred for each picture if None.
        device: where the transform runs and tokens of "pt" lie; where the pictures are if None.
        fixed: further arguments of the stock processor, of which only the values that the token format has are taken.
        """
        if images is None and videos is None:
            raise ValueError("DCTImageProcessor needs images or videos, got neither")
        self._take_fixed(fixed, self.dct_config)
        fixed.pop("data_format", None)  # tokens have no layout
        if fixed:
            raise TypeError(f"DCTImageProcessor has no argument {', '.join(fixed)}")
        if size is not None:
            min_pixels, max_pixels = _bounds_in(size)
        tensor_type = None if return_tensors is None else TensorType(return_tensors)
        options = {
            "bounds": _pixel_bounds(min_pixels, max_pixels, self.min_pixels, self.max_pixels),
            "do_resize": self.do_resize if do_resize is None else do_resize,
            "resample": self.resample if resample is None else resample,
            "do_rescale": self.do_rescale if do_rescale is None else do_rescale,
            "do_convert_rgb": self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb,
            "layout": None if input_data_format is None else ChannelDimension(input_data_format),
        }
        data = {}
        if images is not None:
            clips = [[image] for image in _flat_images(images)]
            data["pixel_values"], data["image_grid_thw"] = self._encode_all(clips, device, options)
        if videos is not None:
            clips = _flat_videos(videos)
            data["pixel_values_videos"], data["video_grid_thw"] = self._encode_all(clips, device, options)
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
            "image_mean": OPENAI_CLIP_MEAN,
            "image_std": OPENAI_CLIP_STD,
            "rescale_factor": 1 / 255,
        }
        for name, value in fixed.items():
            given = arguments.pop(name, None)
            if given is not None and (list(given) if isinstance(given, tuple) else given) != value:
                raise ValueError(f"{name} is {value} in the token format {config.name}, got {given}")
        return fixed

    def _encode_all(
        self, clips: list, device: str | torch.device | None, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips -> tokens [N, K] of all, grids int64 [clips, 3]."""
        if not clips:
            raise ValueError("expected at least one picture, got an empty list: give None where there is none")
        encoded = []
        for clip in clips:
            where = getattr(clip[0] if isinstance(clip, list) else clip, "device", "cpu") if device is None else device
            encoded.append(self._tokenizer_on(torch.device(where)).encode(self._frames(clip, **options)))
        tokens = encoded[0][0] if len(encoded) == 1 else torch.cat([tokens for tokens, _ in encoded])
        return tokens, torch.tensor([grid_thw for _, grid_thw in encoded])

    def _frames(
        self,
        clip: np.ndarray | torch.Tensor | list,
        bounds: tuple[int, int],
        do_resize: bool,
        resample: PILImageResampling,
        do_rescale: bool,
        do_convert_rgb: bool,
        layout: ChannelDimension | None,
    ) -> np.ndarray | torch.Tensor | list:
        """One clip as an array [T, H, W, 3] or a list of T arrays [H, W, 3], uint8 or float in 0..255, of a size that
        `encode` takes. Nothing is copied that can be used as it is."""

        pictures = clip if isinstance(clip, list) else [clip]
        pictures = [self._rgb(picture, do_rescale, do_convert_rgb, layout) for picture in pictures]
        size = height, width = _height_width(pictures[0])
        factor = self.dct_config.resize_factor[0]
        if do_resize:
            size = target_size(height, width, factor, *bounds)
        elif height % factor or width % factor:
            raise ValueError(
                f"without do_resize, preset {self.dct_config.name} needs a height and a width that are multiples of "
                f"{factor} px, got {height} x {width}"
            )
        if all(_height_width(picture) == size for picture in pictures):
            frames = [np.array(picture) if isinstance(picture, Image.Image) else picture for picture in pictures]
            return frames if isinstance(clip, list) else frames[0]
        if not do_resize:
            sizes = sorted({"{} x {}".format(*_height_width(picture)) for picture in pictures})
            raise ValueError(f"without do_resize, all frames of a clip need one size, got {', '.join(sizes)}")
        frames = pictures if isinstance(clip, list) else pictures[0]
        return [_resize(frame, size, resample, do_rescale) for frame in frames]

    @staticmethod
    def _rgb(
        picture: Image.Image | np.ndarray | torch.Tensor,
        do_rescale: bool,
        do_convert_rgb: bool,
        layout: ChannelDimension | None,
    ) -> Image.Image | np.ndarray | torch.Tensor:
        """A PIL picture in mode RGB, or an array [..., H, W, 3], uint8 or float in 0..255."""
        if not isinstance(picture, Image.Image):
            return _to_three_channels(_to_levels(_channels_last(_as_array(picture), layout), do_rescale))
        if not do_convert_rgb and picture.mode not in ("RGB", "L"):
            raise ValueError(f"without do_convert_rgb, PIL pictures must be RGB or L, got {picture.mode}")
        return _pil_to_rgb(picture)


DCTImageProcessor.register_for_auto_class("AutoImageProcessor")
