"""Planes of 4:2:0 video -> tokens, against the same samples upsampled by scipy's DCT and taken over RGB in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from dct_qwen2vl.dct import transform_dct
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_tokenizer import DCTConfig

# What a decoder does, from the standards' texts: Kr, Kb of ITU-R BT.601-7 (2.5.1) and BT.709-6 (3.2).
LUMA_SHARES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def planes(frames: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise: luma [T, H, W], Cb and Cr [T, H/2, W/2]."""
    rng = np.random.default_rng(seed)
    shapes = (frames, height, width), (frames, height // 2, width // 2), (frames, height // 2, width // 2)
    return tuple(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)


def upsampled(plane: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Twice as many rows and columns, block by block: the larger block's DCT has the smaller one's as low corner."""
    frames, height, width = plane.shape
    rows, columns = block[1] // 2, block[2] // 2
    result = np.zeros((frames, height * 2, width * 2))
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            spectrum = np.zeros((frames, 2 * rows, 2 * columns))
            square = plane[:, y : y + rows, x : x + columns].astype(float)
            spectrum[:, :rows, :columns] = 2 * dctn(square, axes=(1, 2), norm="ortho")
            result[:, 2 * y : 2 * (y + rows), 2 * x : 2 * (x + columns)] = idctn(spectrum, axes=(1, 2), norm="ortho")
    return result


def to_rgb(luma: np.ndarray, cb: np.ndarray, cr: np.ndarray, matrix: str, full_range: bool) -> np.ndarray:
    """Planes of one size -> R, G, B in 0..255, float, unclipped [T, H, W, 3]."""
    kr, kb = LUMA_SHARES[matrix]
    y, u, v = (luma / 255, (cb - 128) / 255, (cr - 128) / 255)
    if not full_range:
        y, u, v = (luma - 16.0) / 219, (cb - 128.0) / 224, (cr - 128.0) / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1) * 255


@st.composite
def even_configs(draw) -> DCTConfig:
    """Blocks with even sides, kept coefficients in any order, any scale."""
    block = (draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4)))
    whole = DCTConfig.select(block, draw(st.sampled_from(["444", "420"])), merge=draw(st.integers(1, 2)))
    count = draw(st.integers(1, whole.num_coefficients))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = tuple(rng.permutation(whole.kept)[:count].tolist())
    return replace(whole, kept=kept, scale=tuple(rng.uniform(0.05, 3, count).tolist()))


@given(even_configs(), st.integers(1, 5), st.sampled_from(["bt601", "bt709"]), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_planes_give_the_tokens_of_their_rgb(config, frames, matrix, full_range, seed):
    rows, columns = config.resize_factor
    luma, cb, cr = planes(frames, 2 * rows, columns, seed)
    rgb = to_rgb(luma, upsampled(cb, config.block), upsampled(cr, config.block), matrix, full_range)
    encode = DCTTokenizer(config, torch.float64)
    expected, grid = encode.encode(rgb)
    tokens, grid_of_planes = encode.encode_planes(luma, cb, cr, matrix, full_range)
    assert grid_of_planes == grid
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["exact", "x4", "x16"])
def test_presets_take_planes_in_single_precision(name):
    luma, cb, cr = planes(4, 112, 224)
    config = DCTConfig.preset(name)
    expected, _ = DCTTokenizer(config, torch.float64).encode_planes(luma, cb, cr, "bt709")
    tokens, _ = DCTTokenizer(config).encode_planes(luma, cb, cr, "bt709")
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("matrix", "full_range", "luma", "cb", "cr", "rgb"),
    [
        ("bt601", False, 81, 90, 240, (255, 0, 0)),  # the studio-swing codes of pure red, green and blue
        ("bt601", False, 145, 54, 34, (0, 255, 0)),
        ("bt709", False, 63, 102, 240, (255, 0, 0)),
        ("bt709", False, 32, 240, 118, (0, 0, 255)),
        ("bt601", False, 235, 128, 128, (255, 255, 255)),
        ("bt601", True, 255, 128, 128, (255, 255, 255)),
        ("bt709", True, 0, 128, 128, (0, 0, 0)),
    ],
)
def test_codes_of_known_colours(matrix, full_range, luma, cb, cr, rgb):
    encode = DCTTokenizer(DCTConfig.preset("x4"))
    flat = [
        np.full((2, *shape), value, np.uint8) for shape, value in (((56, 56), luma), ((28, 28), cb), ((28, 28), cr))
    ]
    decoded = encode.decode_float(*encode.encode_planes(*flat, matrix, full_range))
    np.testing.assert_allclose(
        decoded.numpy(), np.broadcast_to(rgb, (2, 56, 56, 3)), atol=2.1
    )  # 8-bit codes are rounded


def test_a_lone_frame_of_planes_is_repeated():
    luma, cb, cr = planes(1, 56, 56)
    encode = DCTTokenizer(DCTConfig.preset("x4"))
    once, grid = encode.encode_planes(luma, cb, cr)
    twice, _ = encode.encode_planes(*(plane.repeat(2, axis=0) for plane in (luma, cb, cr)))
    assert grid == (1, 2, 2) and torch.equal(once, twice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": "bt2020"}, "matrix must be one of bt601, bt709, got 'bt2020'"),
        (
            {"cb": np.zeros((2, 56, 56), np.uint8)},
            r"cb and cr \[T, H/2, W/2\], got \[2, 56, 56\], \[2, 56, 56\], \[2, 28,",
        ),
        ({"luma": np.zeros((2, 56, 56, 3), np.uint8)}, r"encode expects luma \[T, H, W\], got \[2, 56, 56, 3\]"),
        ({"luma": np.zeros((2, 57, 56), np.uint8)}, "expects luma"),
        ({"cr": np.zeros((1, 28, 28), np.uint8)}, r"got \[2, 56, 56\], \[2, 28, 28\], \[1, 28, 28\]"),
    ],
)
def test_planes_that_do_not_fit_are_refused(arguments, message):
    luma, cb, cr = planes(2, 56, 56)
    with pytest.raises(ValueError, match=message):
        DCTTokenizer(DCTConfig.preset("x4")).encode_planes(**{"luma": luma, "cb": cb, "cr": cr, **arguments})


def test_planes_need_even_blocks():
    encode = DCTTokenizer(DCTConfig.select((2, 7, 7), "444"))
    with pytest.raises(ValueError, match="even height and width, got 7 x 7 px: use encode"):
        encode.encode_planes(*planes(2, 28, 28))


# Chunks, lists and devices change nothing


@pytest.mark.parametrize("name", ["exact", "x4", "x16"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_size_of_chunks_changes_nothing(name, frames, monkeypatch):
    luma, cb, cr = planes(frames, 336, 224)
    rgb = np.random.default_rng(1).integers(0, 256, (frames, 336, 224, 3), dtype=np.uint8)
    encode = DCTTokenizer(DCTConfig.preset(name), torch.float64)
    results = []
    for chunk in (1, 1 << 17, 1 << 19, 1 << 24):  # a pair of bands, several, a pair of frames, all at once
        monkeypatch.setattr(transform_dct, "CPU_CHUNK", chunk)
        results.append((encode.encode(rgb)[0], encode.encode_planes(luma, cb, cr, "bt709")[0]))
    for of_rgb, of_planes in results[1:]:
        torch.testing.assert_close(of_rgb, results[0][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(of_planes, results[0][1], rtol=0, atol=1e-10)


def test_a_list_of_frames_is_a_video():
    rgb = np.random.default_rng(1).integers(0, 256, (5, 56, 112, 3), dtype=np.uint8)
    encode = DCTTokenizer(DCTConfig.preset("x4"))
    expected, grid = encode.encode(rgb)
    mixed = [torch.from_numpy(frame) if number % 2 else frame for number, frame in enumerate(rgb)]
    tokens, grid_of_list = encode.encode(mixed)
    assert grid_of_list == grid == (3, 2, 4) and torch.equal(tokens, expected)
    mirrored, _ = encode.encode([frame[:, ::-1] for frame in rgb])
    assert torch.equal(mirrored, encode.encode(rgb[:, :, ::-1].copy())[0])
    with pytest.raises(ValueError, match=r"got 2 frames of \[56, 56, 3\] and \[56, 112, 3\]"):
        encode.encode([rgb[0], rgb[0, :, :56]])
    with pytest.raises(ValueError, match="got 0 frames"):
        encode.encode([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["exact", "x4", "x16"])
def test_a_gpu_gives_the_same_tokens(name):
    luma, cb, cr = planes(5, 112, 224)
    rgb = np.random.default_rng(1).integers(0, 256, (5, 112, 224, 3), dtype=np.uint8)
    on_cpu = DCTTokenizer(DCTConfig.preset(name), torch.float64)
    on_gpu = DCTTokenizer(DCTConfig.preset(name), device="cuda")
    for expected, (tokens, grid) in [
        (on_cpu.encode(rgb), on_gpu.encode(rgb)),
        (on_cpu.encode(rgb), on_gpu.encode(torch.from_numpy(rgb).cuda())),
        (on_cpu.encode(rgb[:1]), on_gpu.encode(rgb[:1])),
        (on_cpu.encode_planes(luma, cb, cr, "bt709"), on_gpu.encode_planes(luma, cb, cr, "bt709")),
    ]:
        assert tokens.device.type == "cuda" and grid == expected[1]
        torch.testing.assert_close(tokens.double().cpu(), expected[0], rtol=0, atol=5e-4)
    tokens, grid = on_gpu.encode(rgb)
    assert (
        np.abs(on_gpu.decode(tokens, grid).cpu().numpy().astype(int) - on_cpu.decode(tokens.cpu(), grid).numpy()).max()
        <= 1
    )


# For leaving tokens out one day


def test_positions_are_the_token_order():
    encode = DCTTokenizer(DCTConfig.preset("x4"))
    positions = encode.positions((2, 4, 6))
    assert positions.shape == (48, 3) and positions.dtype == torch.int64
    assert positions[:9].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 1],
        [0, 0, 2],
        [0, 0, 3],
        [0, 1, 2],
        [0, 1, 3],
        [0, 0, 4],
    ]
    lit = np.zeros((4, 112, 168, 3), np.uint8)
    lit[2:, 28:56, 84:112] = 255  # the block at t = 1, h = 1, w = 3
    tokens, _ = encode.encode(lit)
    assert positions[(tokens - tokens[0]).abs().sum(dim=1).argmax()].tolist() == [1, 1, 3]


def test_energies_tell_detail_from_motion():
    encode = DCTTokenizer(DCTConfig.preset("exact"), torch.float64)
    rgb = np.full((2, 28, 56, 3), 90, np.uint8)
    rgb[:, :14, :7] = 200  # detail in token 0
    rgb[1, :14, 28:42] = 200  # a change in token 4
    energies = encode.energies(encode.encode(rgb)[0])
    assert energies.shape == (8, 2)
    assert energies[0, 0] > 1 and energies[0, 1] < 1e-9
    assert energies[4, 1] == pytest.approx(2 * 196 * (55 / 255) ** 2) and energies[4, 0] < 1e-9
    assert energies[[1, 2, 3, 5, 6, 7]].abs().max() < 1e-9


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_matrices_are_inverted_once_for_all_tokenizers(matrix, monkeypatch):
    """`np.linalg.inv` wakes threads that take the cores of other loader processes."""
    frames = planes(2, 56, 56)
    tokens, grid = DCTTokenizer(DCTConfig.preset("x4")).encode_planes(*frames, matrix)
    shown = DCTTokenizer(DCTConfig.preset("x4")).decode(tokens, grid)
    monkeypatch.setattr(np.linalg, "inv", None)
    again = DCTTokenizer(DCTConfig.preset("x4"))
    assert torch.equal(again.encode_planes(*frames, matrix)[0], tokens)
    assert torch.equal(again.decode(tokens, grid), shown)
