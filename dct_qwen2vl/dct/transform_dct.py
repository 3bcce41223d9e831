"""Frames -> DCT-coefficient tokens, and back.

Letters used for shapes in this file:

    T H W     frames, rows and columns of the images, in frames and pixels
    bt bh bw  frames, rows and columns of one block, in frames and pixels
    t h w     the grid of blocks: t = T/bt, h = H/bh, w = W/bw
    m         spatial merge size: m x m tokens become one token of the language model (2 in Qwen2-VL)
    K         coefficients kept for each token
    N         tokens: t*h*w

Analysis of one block, every step linear, in this order:

    RGB uint8 -> /255, minus the mean -> Y, Cb, Cr -> DCT-II over frames, rows, columns -> keep K -> divide by scale

The file is saved beside converted checkpoints, with image_processing_dct.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .configuration_dct import RGB_TO_YCBCR, YCBCR_MATRICES, DCTConfig, dct_matrix, ycbcr_to_rgb
from .skipping_dct import fill_tokens

CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26  # samples encoded at once, which stay in a CPU's cache or fill a GPU
Frames = np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor]


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

    Encoding goes through the video in chunks that stay in a CPU's cache, each by three matrix products: over the frames
    of a block, over its rows, over its columns with the colour matrix folded in. Only rows and columns that hold a kept
    coefficient are computed. Beside the tokens it needs about 10 MB (on a GPU 600), whatever the video's length.
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
        # The mean of the centred image is subtracted from the coefficients: only frequency 0 has any of it.
        self._constants = [(place, index[0, place]) for place in np.flatnonzero(~index[1:].any(axis=0)).tolist()]
        self._scale = self._tensor(np.array(config.scale))
        self._layers: dict[Any, list[tuple[_Layer, ...]]] = {}  # made when first needed

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def encode(self, frames: Frames) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Frames -> tokens [N, K] and their grid (t, h, w).

        frames: [T, H, W, 3] or a list of T frames [H, W, 3], RGB in 0..255. uint8, or float for finer steps.

        H and W must be multiples of `config.resize_factor`. The last frame is repeated until bt divides T, so a lone
        image becomes bt equal frames. Raises ValueError for any other shape.
        """
        frames = self._frame_list(frames, "frames [T, H, W, 3]", (3,))
        _, bh, bw = self.config.block
        if "rgb" not in self._layers:
            self._layers["rgb"] = [self._build_layers(RGB_TO_YCBCR / 255, bh, bw, interleaved=True)]
        source = _Source([frames], *self._layers["rgb"], bh)
        return self._encode([source], RGB_TO_YCBCR @ np.array(self.config.mean))

    def encode_planes(
        self,
        luma: Frames,
        cb: Frames,
        cr: Frames,
        matrix: str = "bt601",
        full_range: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Planes of a 4:2:0 video -> tokens [N, K] and their grid (t, h, w). They equal those of `encode` for the video
        in RGB.

        luma: uint8 [T, H, W].
        cb: uint8 [T, H/2, W/2].
        cr: uint8 [T, H/2, W/2].
        matrix: "bt601" or "bt709" (ITU-R BT.601-7, BT.709-6).
        full_range: Whether luma is 0..255 instead of 16..235.
        out: float [N, K], contiguous. Takes the tokens; new memory costs a third of the time of a long video.

        Chroma becomes the low quarter of its block's DCT, as if a sample lay in the middle of its 2 x 2 luma samples.
        Values that are no RGB colour are not clipped. Blocks must have an even height and width.

        Raises ValueError for another matrix, odd blocks or shapes that do not fit.
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
        to_jfif = RGB_TO_YCBCR @ ycbcr_to_rgb(matrix)
        if (matrix, full_range) not in self._layers:
            # A DCT of half the size, times 2, is the low quarter of the block's. What BT.709 calls chroma has a share
            # in BT.601's luma, which is added to luma's low quarter.
            self._layers[matrix, full_range] = [
                self._build_layers(to_jfif[:, :1] / luma_range, bh, bw),
                self._build_layers(to_jfif[:, 1:] / chroma_range * 2, bh // 2, bw // 2),
            ]
        luma_layers, chroma_layers = self._layers[matrix, full_range]
        sources = [_Source([luma], luma_layers, bh), _Source(chroma, chroma_layers, bh // 2)]
        offset = RGB_TO_YCBCR @ np.array(self.config.mean) + to_jfif @ [black, *[128 / chroma_range] * 2]
        return self._encode(sources, offset, out)

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
    def _encode(
        self, sources: list[_Source], offset: np.ndarray, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """offset [3]: Y, Cb, Cr that the samples give where the centred image is zero."""
        grid = t, h, w = self._grid(sources[0].planes[0])  # of the whole image: luma comes first
        shape = (t * h * w, self.config.num_coefficients)
        tokens = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out.view(shape)
        buffers = _Buffers(self.dtype, self.device)
        sources = [source for source in sources if source.layers]  # of chroma there may be nothing that is kept
        for blocks, bands in self._chunks(grid, min(len(sources[0].planes[0]), self.config.block[0])):
            first, count = (blocks.start * h + bands.start) * w, len(blocks) * len(bands) * w
            chunk = tokens[first : first + count]
            boxed = chunk if self._kept is None else buffers("boxed", count, self._boxed)
            for source in sources:
                self._transform(source, blocks, bands, w, boxed, buffers)
            if self._kept is not None:
                torch.index_select(boxed, 1, self._kept, out=chunk)
        for place, plane in self._constants:
            tokens[:, place] -= offset[plane] * math.sqrt(math.prod(self.config.block)) / self.config.scale[place]
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

    def _chunks(self, grid: tuple[int, int, int], frames: int) -> Iterator[tuple[range, range]]:
        """Ranges of t and of h whose tokens stand one after another, about `CPU_CHUNK` or `GPU_CHUNK` samples each, of
        `frames` different frames in a block."""
        (t, h, w), m = grid, self.config.merge
        budget = CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK
        budget = max(1, budget // (3 * frames * self.config.block[1] * self.config.block[2] * w * m))
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
        by_frequency = self._over_frames(source, blocks, bands, w, buffers)  # [ft, block*y*w*x]
        still = self._is_still(source)
        for layer in source.layers:
            skipped = still and layer.frequency > 0
            for box in layer.boxes:
                if not box.add and (skipped or tuple(box.inverse_scale.shape) != box.corner):
                    boxed[..., box.place] = 0
            if skipped:
                continue
            x = self._over_rows_and_columns(layer, by_frequency[layer.frequency], count, w, still, buffers)
            x = x.view(len(blocks), len(bands) // m, m, -1, w // m, m, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6)
            for box in layer.boxes:
                rows, columns = box.inverse_scale.shape
                target = boxed[..., box.place].unflatten(-1, box.corner)[..., :rows, :columns]
                value = x[..., :rows, box.columns]
                if box.add:
                    target.addcmul_(value, box.inverse_scale)
                else:
                    torch.mul(value, box.inverse_scale, out=target)

    def _over_rows_and_columns(
        self, layer: _Layer, x: torch.Tensor, count: int, w: int, still: bool, buffers: "_Buffers"
    ) -> torch.Tensor:
        """Samples [count*y*w*x] of `count` rows of w blocks -> [count, fy, w, columns of all boxes]. First comes the
        product that leaves less for the other: columns, where 4:2:0 drops some, unless rows are dropped."""
        fy, y = layer.rows.shape
        samples, fx = layer.columns.shape
        rows = layer.rows * self.config.block[0] if still else layer.rows  # the sum of bt equal frames

        def over_rows(x: torch.Tensor, width: int) -> torch.Tensor:
            out = buffers("rows", count, fy, w * width)
            return torch.bmm(rows.expand(count, fy, y), x.view(count, y, w * width), out=out)

        def over_columns(x: torch.Tensor, height: int) -> torch.Tensor:
            return torch.mm(x.view(-1, samples), layer.columns, out=buffers("columns", count * height * w, fx))

        x = over_rows(over_columns(x, y), fx) if fy == y else over_columns(over_rows(x, samples), fy)
        return x.view(count, fy, w, fx)

    def _is_still(self, source: _Source) -> bool:
        """Whether all frames of the only block are one: then all but frame frequency 0 is zero."""
        return len(source.planes[0]) == 1 and self._frequencies[0] == 0

    def _over_frames(self, source: _Source, blocks: range, bands: range, w: int, buffers: "_Buffers") -> torch.Tensor:
        """Samples of a chunk, transformed over the frames of each block: [ft, samples].

        A lone image is given as it is.
        """
        bt, last, still = self.config.block[0], len(source.planes[0]) - 1, self._is_still(source)
        rows = range(bands.start * source.rows, bands.stop * source.rows)
        width = source.layers[0].columns.shape[0] // len(source.planes)  # of a row of a block in one plane
        shape = (1 if still else bt, len(blocks), len(rows), w, len(source.planes), width)
        samples = buffers("samples", *shape)
        for number, place, s in np.ndindex(shape[0], len(blocks), len(source.planes)):
            frame = source.planes[s][min(blocks[place] * bt + number, last)]
            samples[number, place, :, :, s].copy_(frame[rows.start : rows.stop].reshape(len(rows), w, width))
        samples = samples.view(shape[0], -1)
        if still:
            return samples
        mixed = buffers("frames", len(self._frequencies), samples.shape[1])
        if bt != 2:
            return torch.mm(self._frames, samples, out=mixed)
        for frequency, result in zip(self._frequencies, mixed):  # a product with so small a matrix is slow on a GPU
            torch.add(*samples, alpha=-1 if frequency else 1, out=result)
        return mixed

    def energies(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [N, K] -> [N, 2]: energy of a block's detail (frame frequency 0, the mean colour left out) and of
        its motion (all other frame frequencies), summed over the block's Y, Cb, Cr values, of an image in 0..1."""
        _, ft, fy, fx = np.unravel_index(np.array(self.config.kept), (3, *self.config.block))
        groups = np.stack([(ft == 0) & (fy + fx > 0), ft > 0], axis=1)
        return (tokens * self._scale.to(tokens)).square() @ torch.from_numpy(groups).to(tokens)

    def positions(self, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        """Block that each token shows, int64 [N, 3]: its t, h, w, in token order."""
        (t, h, w), m = grid_thw, self.config.merge
        order = torch.stack(torch.meshgrid(*(torch.arange(side) for side in (t, h, w)), indexing="ij"), dim=-1)
        return order.view(t, h // m, m, w // m, m, 3).transpose(2, 3).reshape(-1, 3)

    def decode(
        self, tokens: torch.Tensor, grid_thw: tuple[int, int, int], kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens -> uint8 frames [t*bt, h*bh, w*bw, 3], RGB: what the model receives, as an image.

        tokens: float [N, K].
        grid_thw: (t, h, w), blocks.
        kept: bool [t, h/m, w/m], of `skipping_dct.kept_cells`. `tokens` then holds only the kept cells; others show
            what they copy.

        Coefficients that were not kept count as zero. Raises ValueError if tokens and grid do not fit.
        """
        return self.decode_float(tokens, grid_thw, kept).round_().clamp_(0, 255).to(torch.uint8)

    def decode_float(
        self, tokens: torch.Tensor, grid_thw: tuple[int, int, int], kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `decode`, without rounding and clipping: [t*bt, h*bh, w*bw, 3] in 0..255, in this tokenizer's dtype.

        tokens: float [N, K].
        grid_thw: (t, h, w), blocks.
        kept: As in `decode`.

        Raises ValueError if tokens and grid do not fit.
        """
        (bt, bh, bw), m = self.config.block, self.config.merge
        t, h, w = (int(side) for side in grid_thw)
        tokens = torch.as_tensor(tokens, device=self.device).to(self.dtype)
        if kept is not None:
            tokens = self._filled(tokens, (t, h // m, w // m), kept)
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
        colour = self._tensor(ycbcr_to_rgb() * 255)
        x = x.view(-1, bw * 3) @ torch.kron(columns, colour.T.contiguous())
        x = x.view(bt, t, h * bh, w * bw, 3).transpose(0, 1).reshape(t * bt, h * bh, w * bw, 3)
        return x + self._tensor(np.array(self.config.mean) * 255)

    def _filled(self, tokens: torch.Tensor, cells: tuple[int, int, int], kept: torch.Tensor) -> torch.Tensor:
        """Tokens of the kept cells -> of all. Raises ValueError."""
        kept = torch.as_tensor(kept, device=self.device)
        if tuple(kept.shape) != cells or len(tokens) != int(kept.sum()) * self.config.merge**2:
            raise ValueError(
                f"decode expects kept {list(cells)} with {self.config.merge**2} tokens for each cell that is kept, got "
                f"kept {list(kept.shape)} with {int(kept.sum())} and {len(tokens)} tokens"
            )
        return fill_tokens(tokens, kept)


class _Buffers:
    """Memory by name that all chunks of a call share: touching fresh pages costs more than the arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._memory: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised, or with what the last user of the name left there."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = self._like.new_empty(size)
        return self._memory[name][:size].view(shape)


def _corners(index: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """index [(plane, ft, fy, fx), K] -> for each plane and ft in use, rows and columns of the corner that holds all."""
    corners = {}
    for plane, ft in sorted(set(zip(index[0].tolist(), index[1].tolist()))):
        inside = index[2:, (index[0] == plane) & (index[1] == ft)]
        corners[plane, ft] = tuple((inside.max(axis=1) + 1).tolist())
    return corners
