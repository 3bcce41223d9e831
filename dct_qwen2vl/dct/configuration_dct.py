"""The token format: how images spread over DCT coefficients, and which of them a token keeps.

Letters used for shapes in this file:

    bt bh bw  frames, rows and columns of one block, in frames and pixels
    K         coefficients kept for each token
    E         width of the vision tower

The file needs numpy only. It is saved beside converted checkpoints, with image_processing_dct.py.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import numpy as np

# Mean and standard deviation of RGB in 0..1 that Qwen2-VL normalises with: CLIP's (transformers, image_utils.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIXEL_PATCH = (2, 14, 14)  # frames, rows, columns of the patch that Qwen2-VL's Conv3d was trained on
CHROMA_FORMATS = ("444", "420")
PRESETS = ("exact", "x4", "x16")
# Of a DCTConfig in JSON: what each field is, in words, whether a list, and of which types; true is no number here.
FIELDS = {
    **dict.fromkeys(("block", "kept"), ("a list of whole numbers", True, (int,))),
    "scale": ("a list of numbers", True, (int, float)),
    "merge": ("a whole number", False, (int,)),
    **dict.fromkeys(("chroma", "name"), ("a text", False, (str,))),
    **dict.fromkeys(("mean", "std"), ("a list of numbers", True, (int, float))),
}
ORDERS = ("variance", "weighted", "zigzag", "box")  # see DCTConfig.select

# ITU-R BT.601 full range (JFIF), without the offset of 128: rows Y, Cb, Cr; columns R, G, B.
_LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YCBCR = np.stack([_LUMA, (np.eye(3)[2] - _LUMA) / 1.772, (np.eye(3)[0] - _LUMA) / 1.402])
# The same for BT.709 (ITU-R BT.709-6, item 3), which HD video is coded in.
_LUMA_709 = np.array([0.2126, 0.7152, 0.0722])
RGB_TO_YCBCR_709 = np.stack([_LUMA_709, (np.eye(3)[2] - _LUMA_709) / 1.8556, (np.eye(3)[0] - _LUMA_709) / 1.5748])
YCBCR_MATRICES = {"bt601": RGB_TO_YCBCR, "bt709": RGB_TO_YCBCR_709}


@lru_cache
def ycbcr_to_rgb(matrix: str = "bt601") -> np.ndarray:
    """Inverse of one of `YCBCR_MATRICES`, float64 [3, 3].

    matrix: Its name.

    Computed once: `np.linalg.inv` wakes a thread of NumPy's BLAS on every core, and these wait actively for more.
    """
    return np.linalg.inv(YCBCR_MATRICES[matrix])


@lru_cache(maxsize=64)
def dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II as a matrix, float64 [size, size]: row f holds the cosine of frequency f.

    `dct_matrix(n) @ x` equals `scipy.fft.dct(x, type=2, norm="ortho")`.
    """
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def line_response(size: int, count: int) -> np.ndarray:
    """The power that sinusoids of random phase and power 1 give to each coefficient along one axis, float64 [size,
    count + 1].

    size: Samples of the axis.
    count: Frequencies between 0 and pi radians a sample.

    Entry [f, i] is the mean square of coefficient f of `dct_matrix(size)` at the frequency pi*i/count radians a sample.
    A column sums to `size`: no energy is lost.
    """
    frequency = np.pi * np.arange(count + 1) / count
    return np.abs(dct_matrix(size) @ np.exp(1j * np.outer(np.arange(size), frequency))) ** 2


def line_weights(lines: tuple[int, ...], count: int) -> np.ndarray:
    """Weights that interpolate stored lines of a spectrum to count + 1 lines over the same band, float64 [count + 1,
    lines].

    lines: Numbers of the stored lines, ascending from 0.
    count: Lines that are wanted besides line 0.

    Interpolation is linear in log frequency. Line 0 stands alone. Below the first other line, that line's value holds.
    """
    weights = np.zeros((count + 1, len(lines)))
    weights[0, 0] = 1
    wanted, given = np.log2(np.arange(1, count + 1) * lines[-1] / count), np.log2(lines[1:])
    weights[1:, 1:] = np.stack([np.interp(wanted, given, unit) for unit in np.eye(given.size)], axis=-1)
    return weights


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """How the energy of images is distributed over frequencies, as dct_qwen2vl.analysis.coefficient_statistics measures
    it.

    block: (bt, bh, bw) for which the table was fitted, frames and pixels.
    lines: For each axis the numbers of the stored lines, rising, from 0 to the side of `block`. Line 0 is what does not
        change along the axis. Between two others, log power is interpolated over log frequency.
    log2_power: float64 [3, *(len(axis) for axis in lines)], planes Y, Cb, Cr. Power of a line for values of 0..1.

    Images are described as sums of sinusoids of random phase. They have frequencies of `lines[axis]` times pi /
    `block[axis]` radians a frame or pixel, from 0 to pi. The variance of any coefficient of any block follows from
    their power: the DCT is linear, and sinusoids of random phase are uncorrelated.
    """

    block: tuple[int, int, int]
    lines: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    log2_power: np.ndarray

    def __post_init__(self) -> None:
        whole = all(len(axis) > 1 and axis[0] == 0 and axis[-1] == n for axis, n in zip(self.lines, self.block))
        rising = all(list(axis) == sorted(set(axis)) for axis in self.lines)
        shape = (3, *(len(axis) for axis in self.lines))
        if len(self.block) != 3 or len(self.lines) != 3 or not whole or not rising:
            raise ValueError(f"CoefficientTable.lines must rise from 0 to {self.block} on three axes, got {self.lines}")
        if self.log2_power.shape != shape or not np.isfinite(self.log2_power).all():
            raise ValueError(f"CoefficientTable.log2_power must be {shape} finite numbers")

    @classmethod
    def from_file(cls, path: str | os.PathLike | None = None) -> "CoefficientTable":
        """Reads what dct_qwen2vl.analysis.coefficient_statistics wrote.

        path: JSON file. None: the table in this file's folder.

        Raises FileNotFoundError, or ValueError for another file.
        """
        path = Path(path or Path(__file__).with_name("coefficient_table.json"))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            lines = tuple(tuple(values["lines"][axis]) for axis in ("frames", "rows", "columns"))
            return cls(tuple(values["block"]), lines, np.array(values["log2_power"], dtype=np.float64))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is missing: presets and selections need it, saved configurations do not. Make it with "
                f"python -m dct_qwen2vl.analysis.coefficient_statistics --output {path}"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no table made by coefficient_statistics.py: {error!r}") from error

    def variance(self, block: tuple[int, int, int]) -> np.ndarray:
        """As `coefficient_variance`, from this table."""
        # Blocks above the table's need lines that lie closer together, each of less power.
        counts = [max(own, side) for own, side in zip(self.block, block)]
        weights = [line_weights(lines, count) for lines, count in zip(self.lines, counts)]
        power = np.exp2(np.einsum("pabc,ta,yb,xc->ptyx", self.log2_power, *weights, optimize=True))
        responses = [line_response(side, count) for side, count in zip(block, counts)]
        for response, own, count in zip(responses, self.block, counts):
            response[:, 1:] *= own / count
        return np.einsum("ptyx,at,by,cx->pabc", power, *responses, optimize=True)


@lru_cache(maxsize=16)
def coefficient_variance(block: tuple[int, int, int], table: CoefficientTable | None = None) -> np.ndarray:
    """Expected variance of every coefficient of a block, float64 [3, bt, bh, bw], planes in the order Y, Cb, Cr.
    Read-only.

    block: (bt, bh, bw), frames and pixels.
    table: Power spectrum of natural images. None: the built-in one.

    The variance is about the CLIP mean colour. So it is the mean square of a token's numbers before scaling, for pixel
    values of 0..1. The built-in table was measured for blocks of up to 16 frames and 112 x 112 px. For larger blocks
    the spectrum is taken to be smooth.
    """
    variance = (table or CoefficientTable.from_file()).variance(block)
    variance.flags.writeable = False
    return variance


def _available(block: tuple[int, int, int], chroma: str) -> np.ndarray:
    """Which coefficients the chroma format has at all, bool [3, bt, bh, bw]: 4:2:0 has the low quarter of Cb and Cr."""
    mask = np.ones((3, *block), dtype=bool)
    if chroma == "420":
        mask[1:, :, block[1] // 2 :] = False
        mask[1:, :, :, block[2] // 2 :] = False
    return mask


def _check_format(block: tuple[int, int, int], chroma: str) -> None:
    """Raises ValueError for a block or a chroma format that cannot be."""
    if len(block) != 3 or not all(isinstance(side, int) and side >= 1 for side in block):
        raise ValueError(f"DCTConfig.block must be three positive whole numbers (bt, bh, bw), got {block!r}")
    if chroma not in CHROMA_FORMATS:
        raise ValueError(f"DCTConfig.chroma must be one of {', '.join(CHROMA_FORMATS)}, got {chroma!r}")
    if chroma == "420" and (block[1] % 2 or block[2] % 2):
        raise ValueError(f"DCTConfig.chroma 420 needs an even block height and width, got block {block}")


def _check_field(name: str, value: Any) -> None:
    """Raises ValueError for a value that is not of the type in FIELDS."""
    expected, listed, types = FIELDS[name]
    elements = value if isinstance(value, list | tuple) else [value]
    if listed != isinstance(value, list | tuple) or any(type(element) not in types for element in elements):
        raise ValueError(f"DCTConfig.{name} must be {expected}")


def _column_energy(weight: Any, block: tuple[int, int, int], patch: tuple[int, int, int]) -> np.ndarray:
    """Squared norm of the folded patch embedding's column for every coefficient, unscaled: float64 [3, bt, bh, bw]."""
    energy = np.zeros((3, *block))
    seen = np.zeros((3, *block), dtype=bool)
    seen[:, : patch[0], : patch[1], : patch[2]] = True
    config = DCTConfig(block, "444", tuple(np.flatnonzero(seen).tolist()), (1.0,) * int(seen.sum()))
    matrix = weight.double().cpu().numpy() if hasattr(weight, "double") else np.asarray(weight, np.float64)
    if matrix.ndim != 5 or matrix.shape[1:] != (3, *patch):
        raise ValueError(f"DCTConfig.select expects a weight [E, 3, {str(patch)[1:-1]}], got {list(matrix.shape)}")
    energy[seen] = np.square(matrix.reshape(len(matrix), -1) @ synthesis_matrix(config, patch).T).sum(axis=0)
    if not np.isfinite(energy).all():
        raise ValueError("DCTConfig.select: the weight has values that are not finite")
    return energy


def _order_keys(
    order: str,
    block: tuple[int, int, int],
    variance: np.ndarray,
    weight: Any,
    patch: tuple[int, int, int],
) -> list[np.ndarray]:
    """Sort keys [3, bt, bh, bw] of an order of `DCTConfig.select`, the most significant first, low values first."""
    if order not in ORDERS:
        raise ValueError(f"DCTConfig.select: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if (weight is not None) != (order == "weighted"):
        given = "takes no weight" if order != "weighted" else "needs the patch embedding's weight [E, 3, 2, 14, 14]"
        raise ValueError(f"DCTConfig.select: order {order} {given}")
    if order == "variance":
        return [-variance]
    if order == "weighted":
        energy = _column_energy(weight, block, patch)
        return [energy == 0, -variance * energy, -variance]
    ft, fy, fx = np.indices(variance.shape)[1:]
    bt, bh, bw = block
    if order == "zigzag":  # in whole numbers, in which equal distances are equal
        return [(ft * bh * bw) ** 2 + (fy * bt * bw) ** 2 + (fx * bt * bh) ** 2]
    # The box's side in coefficients, from one patch of the pixel model on; the patch's frames are in it from the start.
    frames, side = patch[:2]
    return [np.maximum.reduce([np.where(ft < frames, 0, (ft // frames + 1) * side), fy + 1, fx + 1])]


@dataclass(frozen=True)
class DCTConfig:
    """What a token holds. It is saved with the checkpoint; a model only understands tokens of its own config.

    block: (bt, bh, bw), frames and pixels of a block. 4:2:0 needs even bh and bw.
    chroma: "444", or "420" for colour at half the resolution in both directions.
    kept: K flat indices into the [3, bt, bh, bw] coefficients (Y, Cb, Cr; frame, row, column frequency), in the order
        of the token.
    scale: K positive numbers that the coefficients are divided by, so that inputs have about unit variance.
    merge: m, tokens of the vision tower along one side that become one token of the language model.
    name: For messages and logs.
    mean: R, G, B in 0..1 that the model's own processor subtracts. Tokens are centred by it.
    std: R, G, B in 0..1 that the model's own processor divides by. Folding puts it into the weight.

    Raises ValueError for a configuration that contradicts itself.
    """

    block: tuple[int, int, int]
    chroma: str
    kept: tuple[int, ...]
    scale: tuple[float, ...]
    merge: int = 2
    name: str = "custom"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        _check_format(self.block, self.chroma)
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
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError("DCTConfig.mean and DCTConfig.std must be three finite numbers each")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError("DCTConfig.std must be three positive numbers")

    @property
    def num_coefficients(self) -> int:
        """K, the floats of one token."""
        return len(self.kept)

    @property
    def resize_factor(self) -> tuple[int, int]:
        """Pixels (rows, columns) of which an image's height and width must be multiples: (bh*m, bw*m)."""
        return self.block[1] * self.merge, self.block[2] * self.merge

    @classmethod
    def preset(cls, name: str, patch: tuple[int, int, int] = PIXEL_PATCH) -> "DCTConfig":
        """A preset: "exact", "x4" (a quarter of the tokens) or "x16" (a sixteenth).

        name: One of PRESETS.
        patch: (frames, rows, columns) of the pixel model's patch. Blocks and coefficients are in proportion to it.

        Raises ValueError for an unknown name.
        """
        frames, rows, columns = patch
        floats = math.prod(patch)  # 392, of a plane
        if name == "exact":
            return cls.select(patch, "444", name=name)
        if name == "x4":
            block = (frames, 2 * rows, 2 * columns)
            first = np.zeros((3, *block), dtype=bool)
            first[:, 0] = True  # the mean of the two frames, whole: a still loses no luma
            first[:, 1, :rows, :columns] = True  # of their difference what the half-size image shows
            return cls.select(block, "420", floats * 9 // 2, first=first, name=name)
        if name == "x16":
            block = (frames, 4 * rows, 4 * columns)
            first = np.zeros((3, *block), dtype=bool)
            first[:, :, :rows, :columns] = True
            return cls.select(block, "420", floats * 6, first=first, name=name)
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
        order: str = "variance",
        weight: Any = None,
        table: CoefficientTable | None = None,
        patch: tuple[int, int, int] = PIXEL_PATCH,
    ) -> "DCTConfig":
        """A format that keeps the first `num_coefficients` in a given order.

        block: (bt, bh, bw), frames and pixels.
        chroma: "444", or "420" for half the resolution of colour.
        num_coefficients: How many are kept. None: all.
        first: bool [3, bt, bh, bw]. Coefficients that come before all others. None: none.
        merge: Side of the square of tokens that become one token of the language model.
        name: Of the format, in messages and logs.
        order: See below. Ties are in index order.
        weight: float [E, 3, 2, 14, 14]. Patch embedding of the pixel model, for the order "weighted".
        table: As in `coefficient_variance`.
        patch: As in `synthesis_matrix`.

        Orders:
            "variance"  by falling expected variance (`coefficient_variance`)
            "weighted"  by falling share in the pixel model's embedding: variance times the squared norm of the folded
                        column of `weight`; then by variance what the embedding never saw
            "zigzag"    by rising distance from frequency 0, each axis in units of the block's side
            "box"       the low corner of every plane, growing: of 2 frames up to 14 x 14, which is what downscaling in
                        the DCT domain to the pixel model's patch holds; then of 4 frames up to 28 x 28, and so on

        The token holds the kept coefficients in index order. Raises ValueError for a format that is impossible.
        """
        _check_format(block, chroma)
        if first is not None and (first.dtype != bool or first.shape != (3, *block)):
            raise ValueError(f"first must be bool {[3, *block]}, got {first.dtype} {list(first.shape)}")
        variance = coefficient_variance(block, table)
        available = _available(block, chroma).ravel()
        marked = np.zeros(variance.size, dtype=bool) if first is None else first.ravel() & available
        keys = [key.ravel() for key in _order_keys(order, block, variance, weight, patch)]
        ranked = np.lexsort((np.arange(variance.size), *reversed(keys), ~marked))
        ranked = ranked[available[ranked]]
        count = ranked.size if num_coefficients is None else num_coefficients
        if not 1 <= count <= ranked.size:
            raise ValueError(
                f"block {block} in {chroma} has 1 to {ranked.size} coefficients to keep, asked for {count}"
            )
        kept = np.sort(ranked[:count])
        scale = np.sqrt(variance.ravel()[kept])
        return cls(block, chroma, tuple(kept.tolist()), tuple(float(f"{s:.6g}") for s in scale), merge, name)

    def with_detail_gain(self, gain: float, patch: tuple[int, int, int] = PIXEL_PATCH) -> "DCTConfig":
        """The same coefficients, with those beyond the pixel model's patch (`shown_in_patch`) `gain` times as large.

        gain: Positive number. 1 changes nothing.
        patch: As in `synthesis_matrix`.

        Folding gives these coefficients no weight, so the model is the same before training. An optimizer that moves
        all weights alike, such as Adam, learns them faster by about this factor.

        Raises ValueError if the gain is no positive number, or if there are no such coefficients.
        """
        if not (math.isfinite(gain) and gain > 0):
            raise ValueError(f"the gain of detail must be a positive number, got {gain}")
        if gain == 1:
            return self
        shown = shown_in_patch(self, patch)
        if shown.all():
            raise ValueError(
                f"{self.name} has no coefficients beyond a pixel model's patch, whose gain could be {gain:g}"
            )
        scale = tuple(value if low else float(f"{value / gain:.6g}") for value, low in zip(self.scale, shown))
        return replace(self, scale=scale, name=f"{self.name}-gain{gain:g}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. CLIP's mean and std are left out: formats of Qwen2-VL are as they were without them."""
        usual = {"mean": CLIP_MEAN, "std": CLIP_STD}
        values = {key: value for key, value in asdict(self).items() if key not in usual or value != usual[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DCTConfig":
        """Inverse of `to_dict`. Raises ValueError when a field is missing, unknown or of another type."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or not {"block", "chroma", "kept", "scale"} <= set(values) <= known:
            given = ", ".join(sorted(values))[:100] if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a DCT configuration has the fields {', '.join(sorted(known))}, got {given}")
        for name, value in values.items():
            _check_field(name, value)
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "DCTConfig":
        """Reads what `save` wrote, or a file of a model that holds it under `dct`: preprocessor_config.json,
        dct_format.json. Raises ValueError naming the file, and OSError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        if isinstance(values, dict) and isinstance(values.get("dct"), dict):
            values = values["dct"]
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def resolve(cls, dct: Union["DCTConfig", dict, str, os.PathLike]) -> "DCTConfig":
        """A configuration from one of four forms.

        dct: DCTConfig, its dict, a preset's name, or the path of a JSON file.

        Raises ValueError for an unknown preset or a wrong field, and OSError for a file that cannot be read.
        """
        if isinstance(dct, cls):
            return dct
        if isinstance(dct, dict):
            return cls.from_dict(dct)
        if str(dct).endswith(".json"):
            return cls.from_file(dct)
        return cls.preset(str(dct))


def shown_in_patch(config: DCTConfig, patch: tuple[int, int, int] = PIXEL_PATCH) -> np.ndarray:
    """Which kept coefficients the pixel model's patch holds when the block is downscaled to it, bool [K].

    config: The token format.
    patch: As in `synthesis_matrix`.

    Folding gives weight to these coefficients only.
    """
    frequencies = np.unravel_index(np.array(config.kept), (3, *config.block))[1:]
    return np.all([frequency < side for frequency, side in zip(frequencies, patch)], axis=0)


def synthesis_matrix(
    config: DCTConfig, patch: tuple[int, int, int] = PIXEL_PATCH, std: tuple[float, ...] | None = None
) -> np.ndarray:
    """S, float64 [K, 3*2*14*14]: maps a token to the normalised RGB patch that Qwen2-VL's Conv3d expects.

    config: The token format.
    patch: (frames, rows, columns) of the pixel model's patch, (2, 14, 14) in Qwen2-VL.
    std: What the model divides R, G and B by. None: that of `config`.

    The order in the patch is (channel, frame, row, column). The patch is the block downscaled in the DCT domain: its
    lowest (2, 14, 14) coefficients, times sqrt(2*14*14 / (bt*bh*bw)) so that a constant image keeps its value,
    transformed back. Rows of other coefficients are zero. For a block of (2, 14, 14), this is the inverse transform.
    """
    plane, ft, fy, fx = np.unravel_index(np.array(config.kept), (3, *config.block))
    inside = shown_in_patch(config, patch)
    frames, rows, columns = (dct_matrix(side) for side in patch)
    colour = ycbcr_to_rgb() / np.array(std or config.std)[:, None]  # [rgb, plane]
    gain = np.array(config.scale) * math.sqrt(math.prod(patch) / math.prod(config.block))
    synthesis = np.zeros((config.num_coefficients, 3, *patch))
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
