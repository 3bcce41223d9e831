"""The DCT tokens: scipy's DCT as reference, literals, properties, folded weights against stock Qwen2-VL.

Letters as in dct_tokenizer.py: T H W frames and pixels, (bt, bh, bw) a block, (t, h, w) the grid, m merge, K kept.
"""

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from dct_qwen2vl.dct.configuration_dct import coefficient_variance, dct_matrix
from dct_qwen2vl.dct.image_processing_dct import DCTImageProcessor
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_tokenizer import DCTConfig, fold_patch_embedding

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
ALL_PRESETS = ("exact", "x4", "x16")


@lru_cache
def preset(name: str) -> DCTConfig:
    return DCTConfig.preset(name)


@lru_cache
def tokenizer(name: str, dtype: torch.dtype = torch.float32) -> DCTTokenizer:
    return DCTTokenizer(preset(name), dtype)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def blocks_in_order(pixels: np.ndarray, config: DCTConfig) -> list[np.ndarray]:
    """[T, H, W, 3] -> blocks [bt, bh, bw, 3] in Qwen2-VL's token order, by plain loops."""
    (bt, bh, bw), m = config.block, config.merge
    t, h, w = (side // block for side, block in zip(pixels.shape, config.block, strict=False))
    return [
        pixels[i * bt : (i + 1) * bt, y * bh : (y + 1) * bh, x * bw : (x + 1) * bw]
        for i in range(t)
        for group_y in range(0, h, m)
        for group_x in range(0, w, m)
        for y in range(group_y, group_y + m)
        for x in range(group_x, group_x + m)
    ]


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, full range, without offset, as its text defines it: [..., 3] -> [..., 3]."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402], axis=-1)


def coefficients(block: np.ndarray) -> np.ndarray:
    """One block of 0..255 RGB [bt, bh, bw, 3] -> [3, bt, bh, bw], by scipy."""
    planes = ycbcr(block / 255 - np.array(CLIP_MEAN))
    return np.stack([dctn(planes[..., plane], type=2, norm="ortho") for plane in range(3)])


def reference(pixels: np.ndarray, config: DCTConfig) -> np.ndarray:
    """What `encode` has to return for frames that fill whole blocks, float64 [N, K]."""
    rows = [coefficients(block).ravel()[list(config.kept)] for block in blocks_in_order(pixels, config)]
    return np.stack(rows) / np.array(config.scale)


@st.composite
def configs(draw, square: bool = False) -> DCTConfig:
    """Any valid configuration of small blocks: kept coefficients in any order, any scale."""
    chroma = draw(st.sampled_from(["444", "420"]))
    side = st.integers(1, 5).map(lambda n: 2 * n) if chroma == "420" else st.integers(1, 9)
    height = draw(side)
    block = (draw(st.integers(1, 4)), height, height if square else draw(side))
    whole = DCTConfig.select(block, chroma, merge=draw(st.integers(1, 3)))
    count = draw(st.integers(1, whole.num_coefficients))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = tuple(rng.permutation(whole.kept)[:count].tolist())
    return replace(whole, kept=kept, scale=tuple(rng.uniform(0.05, 3, count).tolist()))


@st.composite
def configs_with_frames(draw) -> tuple[DCTConfig, np.ndarray]:
    config = draw(configs())
    rows, columns = config.resize_factor
    frames = draw(st.integers(1, 2)) * config.block[0]
    shape = (frames, rows * draw(st.integers(1, 2)), columns * draw(st.integers(1, 3)), 3)
    return config, noise(*shape, seed=draw(st.integers(0, 2**32 - 1)))


def index(config: DCTConfig, plane: int, ft: int, fy: int, fx: int) -> int:
    """Where a coefficient stands in a token."""
    return config.kept.index(np.ravel_multi_index((plane, ft, fy, fx), (3, *config.block)))


# The transform


@pytest.mark.parametrize("size", [1, 2, 7, 14, 28, 56])
def test_dct_matrix_is_scipys_orthonormal_dct(size):
    np.testing.assert_allclose(dct_matrix(size), dctn(np.eye(size), axes=[0], norm="ortho"), atol=1e-13)
    np.testing.assert_allclose(dct_matrix(size) @ dct_matrix(size).T, np.eye(size), atol=1e-13)


@given(configs_with_frames())
@settings(max_examples=80, deadline=None)
def test_encode_agrees_with_scipy_in_float64(case):
    config, frames = case
    tokens, grid = DCTTokenizer(config, torch.float64).encode(frames)
    assert grid == tuple(side // block for side, block in zip(frames.shape, config.block, strict=False))
    assert tokens.dtype == torch.float64 and tokens.shape == (math.prod(grid), len(config.kept))
    np.testing.assert_allclose(tokens.numpy(), reference(frames, config), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL_PRESETS)
def test_presets_agree_with_scipy(name, natural_frames):
    frames = natural_frames(4, 112, 224)
    expected = reference(frames, preset(name))
    tokens, grid = tokenizer(name, torch.float64).encode(frames)
    assert grid == {"exact": (2, 8, 16), "x4": (2, 4, 8), "x16": (2, 2, 4)}[name]
    np.testing.assert_allclose(tokens.numpy(), expected, rtol=0, atol=1e-10)
    single, _ = tokenizer(name).encode(frames)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-4)


def test_a_lone_image_is_the_frame_repeated():
    image = noise(1, 56, 112, 3)
    for name in ("exact", "x4"):
        tokens, (t, _, _) = tokenizer(name).encode(image)
        twice, _ = tokenizer(name).encode(image.repeat(2, axis=0))
        assert t == 1
        assert torch.equal(tokens, twice)
        frame_frequency = np.unravel_index(np.array(preset(name).kept), (3, *preset(name).block))[1]
        assert tokens[:, frame_frequency == 1].abs().max() < 1e-4, "two equal frames have no difference"


@given(frames=st.integers(1, 9), bt=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_last_frame_is_repeated_to_whole_blocks(frames, bt):
    config = DCTConfig.select((bt, 4, 4), "444")
    video = noise(frames, 8, 16, 3)
    padded = np.concatenate([video, video[-1:].repeat(-frames % bt, axis=0)])
    tokens, grid = DCTTokenizer(config, torch.float64).encode(video)
    assert grid == (math.ceil(frames / bt), 2, 4)
    np.testing.assert_allclose(tokens.numpy(), reference(padded, config), atol=1e-9)


def test_value_of_a_constant_image():
    white = np.full((2, 56, 56, 3), 255)
    tokens, _ = tokenizer("x4", torch.float64).encode(white)
    values = tokens.numpy() * np.array(preset("x4").scale)
    constant = [index(preset("x4"), plane, 0, 0, 0) for plane in range(3)]
    # sqrt(2*28*28) = 39.59798 times (1 - 0.4592357, 0.0287951, -0.0158483): white less the mean colour, as Y, Cb, Cr.
    np.testing.assert_allclose(values[:, constant], [[21.413174, 1.140228, -0.627560]] * 4, atol=1e-5)
    assert np.abs(np.delete(values, constant, axis=1)).max() < 1e-12
    mean = np.full((2, 56, 56, 3), np.array(CLIP_MEAN) * 255)
    assert tokenizer("x4", torch.float64).encode(mean)[0].abs().max() < 1e-12, "the mean colour is zero"


def test_grey_has_no_chroma_detail():
    grey = noise(2, 56, 56, 1).repeat(3, axis=-1)
    tokens, _ = tokenizer("exact", torch.float64).encode(grey)
    chroma = tokens.reshape(16, 3, 392)[:, 1:, 1:]
    assert chroma.abs().max() < 1e-10
    assert tokens.reshape(16, 3, 392)[:, 0, 1:].abs().max() > 0.1


@given(configs_with_frames(), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_encode_is_affine(case, a, b):
    """encode(a x + b y) = a encode(x) + b encode(y), once the token of a black image is taken off each."""
    config, frames = case
    other = noise(*frames.shape, seed=1)
    encode = DCTTokenizer(config, torch.float64)
    black = encode.encode(np.zeros(frames.shape))[0]
    mixed = encode.encode(a * frames + b * other)[0] - black
    expected = a * (encode.encode(frames)[0] - black) + b * (encode.encode(other)[0] - black)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-8)


@given(configs_with_frames())
@settings(max_examples=30, deadline=None)
def test_energy_is_kept_and_never_made(case):
    """Parseval: the squares of unscaled coefficients add up to those of the pixels; a dropped one only takes away."""
    config, frames = case
    encode = DCTTokenizer(config, torch.float64)
    energy = ((encode.encode(frames)[0].numpy() * np.array(config.scale)) ** 2).sum()
    pixels = (ycbcr(frames / 255 - np.array(CLIP_MEAN)) ** 2).sum()
    assert energy <= pixels * (1 + 1e-9)
    whole = DCTTokenizer(DCTConfig.select(config.block, "444", merge=config.merge), torch.float64)
    energy = ((whole.encode(frames)[0].numpy() * np.array(whole.config.scale)) ** 2).sum()
    assert energy == pytest.approx(pixels, rel=1e-9)


def as_grid(tokens: torch.Tensor, grid: tuple[int, int, int], config: DCTConfig) -> np.ndarray:
    """Tokens of a configuration that keeps all, unscaled, in raster order: [t, h, w, 3, bt, bh, bw]."""
    m, (t, h, w) = config.merge, grid
    values = tokens.numpy() * np.array(config.scale)
    return values.reshape(t, h // m, w // m, m, m, -1).transpose(0, 1, 3, 2, 4, 5).reshape(*grid, 3, *config.block)


def test_a_turned_image_has_turned_coefficients():
    """Mirroring flips the sign of odd frequencies along that axis alone, transposing swaps rows and columns."""
    config = DCTConfig.select((2, 6, 6), "444")
    encode = DCTTokenizer(config, torch.float64)
    frames = noise(4, 24, 36, 3)
    plain = as_grid(*encode.encode(frames), config)
    sign = (-1.0) ** np.arange(6)
    mirrored = as_grid(*encode.encode(frames[:, :, ::-1].copy()), config)
    np.testing.assert_allclose(mirrored, plain[:, :, ::-1] * sign, atol=1e-9)
    upside_down = as_grid(*encode.encode(frames[:, ::-1].copy()), config)
    np.testing.assert_allclose(upside_down, plain[:, ::-1] * sign[:, None], atol=1e-9)
    reversed_video = as_grid(*encode.encode(frames[::-1].copy()), config)
    np.testing.assert_allclose(reversed_video, plain[::-1] * sign[:2, None, None], atol=1e-9)
    transposed = as_grid(*encode.encode(frames.transpose(0, 2, 1, 3).copy()), config)
    np.testing.assert_allclose(transposed, plain.transpose(0, 2, 1, 3, 4, 6, 5), atol=1e-9)
    for other in (mirrored, upside_down, reversed_video):
        assert np.abs(other - plain).max() > 0.5, "an asymmetric image must not look symmetric"


# Token order


def raster_image(side: int) -> np.ndarray:
    """[1, 4*side, 4*side, 3]: every block has the grey level 10 times its number in reading order."""
    levels = (np.arange(16, dtype=np.uint8) * 10).reshape(4, 4)
    return levels.repeat(side, axis=0).repeat(side, axis=1)[None, :, :, None].repeat(3, axis=-1)


# Block numbers in reading order, in the order of the tokens: written by hand from Qwen2-VL's 2x2 groups.
TOKEN_ORDER = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize(("name", "side"), [("exact", 14), ("x4", 28), ("x16", 56)])
def test_token_order_is_the_hand_written_one(name, side):
    tokens, _ = tokenizer(name).encode(raster_image(side))
    assert tokens[:, 0].argsort().argsort().tolist() == TOKEN_ORDER


def test_token_order_is_that_of_the_drawing():
    lines = [line for line in DCTTokenizer.__doc__.splitlines() if "|" in line]
    drawing = np.array([[int(number) for number in line.replace("|", " ").split()] for line in lines])
    assert drawing.shape == (4, 4)
    assert drawing.ravel().argsort().tolist() == TOKEN_ORDER


def test_token_order_is_that_of_the_stock_processor():
    stock = Qwen2VLImageProcessor(do_resize=False)(images=raster_image(14)[0], return_tensors="pt")
    ours, _ = tokenizer("exact").encode(raster_image(14))
    assert stock["pixel_values"][:, 0].argsort().tolist() == ours[:, 0].argsort().tolist()
    assert stock["pixel_values"][:, 0].argsort().argsort().tolist() == TOKEN_ORDER


def test_frames_come_first():
    video = np.concatenate([raster_image(14).repeat(2, axis=0) // 2, raster_image(14).repeat(2, axis=0) // 2 + 100])
    tokens, grid = tokenizer("exact").encode(video)
    assert grid == (2, 4, 4)
    assert tokens[:, 0].argsort().argsort().tolist() == [*TOKEN_ORDER, *(16 + place for place in TOKEN_ORDER)]


# Back to pixels


@given(
    bt=st.integers(1, 4), side=st.integers(1, 16), groups=st.tuples(*[st.integers(1, 2)] * 3), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_decode_is_the_exact_inverse_where_nothing_is_dropped(bt, side, groups, seed):
    config = DCTConfig.select((bt, side, side), "444")
    frames = noise(groups[0] * bt, groups[1] * 2 * side, groups[2] * 2 * side, 3, seed=seed)
    encode = DCTTokenizer(config)
    decoded = encode.decode(*encode.encode(frames))
    assert decoded.dtype == torch.uint8
    np.testing.assert_array_equal(decoded.numpy(), frames)


def test_exact_preset_gives_back_every_byte():
    frames = noise(4, 112, 84, 3)
    np.testing.assert_array_equal(tokenizer("exact").decode(*tokenizer("exact").encode(frames)).numpy(), frames)


@given(configs_with_frames())
@settings(max_examples=30, deadline=None)
def test_encoding_what_was_decoded_changes_nothing(case):
    config, frames = case
    encode = DCTTokenizer(config, torch.float64)
    tokens, grid = encode.encode(frames)
    again, _ = encode.encode(encode.decode_float(tokens, grid))
    torch.testing.assert_close(again, tokens, rtol=0, atol=1e-8)


def psnr(decoded: np.ndarray, frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10 * math.log10(255**2 / np.mean((decoded.astype(float) - frames) ** 2))


def box_downscaled(frames: np.ndarray, factor: int) -> np.ndarray:
    """Fewer pixels, shown at the old size: every factor x factor square has its mean."""
    t, height, width, _ = frames.shape
    small = frames.reshape(t, height // factor, factor, width // factor, factor, 3).mean((2, 4))
    return small.repeat(factor, axis=1).repeat(factor, axis=2)


@pytest.mark.parametrize(
    ("name", "moving", "least"), [("x4", False, 38), ("x4", True, 25), ("x16", False, 22.5), ("x16", True, 21.5)]
)
def test_what_is_dropped_is_little(name, moving, least, natural_frames, record_property):
    frames = natural_frames(2 if moving else 1, 224, 224)
    decoded = tokenizer(name).decode(*tokenizer(name).encode(frames)).numpy()[: len(frames)]
    pixels = box_downscaled(frames, preset(name).block[1] // 14)  # the usual way to as few tokens
    found, usual = psnr(decoded, frames), psnr(pixels, frames)
    record_property("psnr_db", round(found, 2))
    print(f"{name}, {'video' if moving else 'still'}: {found:.1f} dB; as many tokens of pixels: {usual:.1f} dB")
    assert least < found < least + 3
    assert found > usual + 2


def test_x4_keeps_all_luma_of_a_still():
    grey = noise(1, 56, 112, 1).repeat(3, axis=-1)
    decoded = tokenizer("x4").decode(*tokenizer("x4").encode(grey))
    np.testing.assert_array_equal(decoded.numpy(), grey.repeat(2, axis=0))


def test_mirrored_and_read_only_arrays_are_taken(recwarn):
    image = noise(1, 56, 112, 3)
    mirrored = tokenizer("x4").encode(image[:, :, ::-1])[0]
    assert torch.equal(mirrored, tokenizer("x4").encode(image[:, :, ::-1].copy())[0])
    read_only = np.asarray(Image.fromarray(image[0]))[None]
    assert not read_only.flags.writeable
    assert torch.equal(tokenizer("x4").encode(read_only)[0], tokenizer("x4").encode(image)[0])
    assert not recwarn.list


def test_decode_says_what_it_expects():
    with pytest.raises(
        ValueError, match=r"decode expects tokens \[4, 1764\] for the grid \(1, 2, 2\) of preset x4, got"
    ):
        tokenizer("x4").decode(torch.zeros(4, 1176), (1, 2, 2))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((56, 56, 3), r"encode expects frames \[T, H, W, 3\], got \[56, 56, 3\]"),
        ((1, 56, 56, 4), r"encode expects frames"),
        ((0, 56, 56, 3), r"encode expects frames"),
        ((1, 57, 56, 3), r"preset x4 needs a height that is a multiple of 56 px .* got 57 x 56"),
        ((1, 56, 84, 3), r"a multiple of 56 px, got 56 x 84"),
    ],
)
def test_encode_refuses_other_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        tokenizer("x4").encode(np.zeros(shape, np.uint8))


# Configurations


def test_coefficients_of_the_presets():
    assert [preset(name).num_coefficients for name in ALL_PRESETS] == [1176, 1764, 2352]
    assert [preset(name).block for name in ALL_PRESETS] == [(2, 14, 14), (2, 28, 28), (2, 56, 56)]
    assert [preset(name).chroma for name in ALL_PRESETS] == ["444", "420", "420"]
    assert [preset(name).resize_factor for name in ALL_PRESETS] == [(28, 28), (56, 56), (112, 112)]
    assert preset("exact").kept == tuple(range(1176))


def corner(plane: int, ft: int, side: int) -> set[tuple[int, int, int, int]]:
    return {(plane, ft, fy, fx) for fy in range(side) for fx in range(side)}


def kept_places(config: DCTConfig) -> set[tuple[int, int, int, int]]:
    return {tuple(int(i) for i in np.unravel_index(k, (3, *config.block))) for k in config.kept}


def test_what_x4_keeps():
    mean = corner(0, 0, 28) | corner(1, 0, 14) | corner(2, 0, 14)
    difference = corner(0, 1, 14) | corner(1, 1, 14) | corner(2, 1, 14)
    assert (len(mean), len(difference)) == (784 + 196 + 196, 588)
    assert kept_places(preset("x4")) == mean | difference


def test_what_x16_keeps():
    kept = kept_places(preset("x16"))
    corners = set().union(*(corner(plane, ft, 14) for plane in range(3) for ft in range(2)))
    assert corners <= kept
    assert not any(plane and max(fy, fx) >= 28 for plane, _, fy, fx in kept), "4:2:0 has no more chroma"
    variance = coefficient_variance((2, 56, 56))
    available = {place for place in np.ndindex(3, 2, 56, 56) if not (place[0] and max(place[2:]) >= 28)}
    least = min(variance[place] for place in kept - corners)
    assert least >= max(variance[place] for place in available - kept)


@pytest.mark.parametrize("block", [(2, 28, 28), (1, 8, 6)])
def test_420_has_the_low_quarter_of_chroma(block):
    config = DCTConfig.select(block, "420")
    bt, bh, bw = block
    assert config.num_coefficients == bt * bh * bw * 3 // 2
    expected = {
        place for place in np.ndindex(3, *block) if place[0] == 0 or (place[2] < bh // 2 and place[3] < bw // 2)
    }
    assert kept_places(config) == expected


def test_420_is_the_dct_of_the_chroma_at_half_size():
    """A chroma plane that was enlarged from half size in the DCT domain comes through 4:2:0 unchanged."""
    small = np.random.default_rng(0).normal(size=(2, 4, 4)) * 0.05
    spectrum = np.zeros((2, 8, 8))
    spectrum[:, :4, :4] = dctn(small, norm="ortho") * 2
    chroma = idctn(spectrum, norm="ortho")
    red_less_luma = 1.402 * chroma
    rgb = np.stack([red_less_luma, -0.299 / 0.587 * red_less_luma, np.zeros_like(chroma)], axis=-1)  # Y = 0, Cb = 0
    config = DCTConfig.select((2, 8, 8), "420", merge=1)
    encode = DCTTokenizer(config, torch.float64)
    tokens, grid = encode.encode((rgb + np.array(CLIP_MEAN)) * 255)
    values = tokens.numpy()[0] * np.array(config.scale)
    np.testing.assert_allclose(values[128 + 32 :].reshape(2, 4, 4) / 2, dctn(small, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(encode.decode_float(tokens, grid) / 255 - np.array(CLIP_MEAN), rgb, atol=1e-12)


def test_inputs_have_about_unit_variance(natural_frames):
    for name in ALL_PRESETS:
        tokens = torch.cat([tokenizer(name).encode(natural_frames(2, 448, 448, seed))[0] for seed in range(3)])
        assert 0.1 < tokens.std() < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": (2, 14)}, r"block must be three positive whole numbers"),
        ({"block": (2, 0, 14)}, r"block must be three positive whole numbers .* got \(2, 0, 14\)"),
        ({"block": (2, 14.0, 14)}, r"block must be three positive whole numbers"),
        ({"chroma": "422"}, r"chroma must be one of 444, 420, got '422'"),
        ({"chroma": "420", "block": (1, 3, 4)}, r"chroma 420 needs an even block height and width"),
        ({"kept": (), "scale": ()}, r"kept must be distinct indices of the 12 coefficients"),
        ({"kept": (0, 0), "scale": (1.0, 1.0)}, r"got 2 entries, 1 of them distinct"),
        ({"kept": (12,), "scale": (1.0,)}, r"kept must be distinct indices"),
        ({"kept": (-1,), "scale": (1.0,)}, r"kept must be distinct indices"),
        ({"chroma": "420", "kept": (5,), "scale": (1.0,)}, r"of the 6 coefficients that block \(1, 2, 2\) has in 420"),
        ({"scale": (1.0,)}, r"scale must be 2 positive numbers"),
        ({"scale": (1.0, 0.0)}, r"scale must be 2 positive numbers"),
        ({"scale": (1.0, math.nan)}, r"scale must be 2 positive numbers"),
        ({"scale": (1.0, math.inf)}, r"scale must be 2 positive numbers"),
        ({"merge": 0}, r"merge must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes, message):
    valid = {"block": (1, 2, 2), "chroma": "444", "kept": (0, 4), "scale": (1.0, 2.0)}
    DCTConfig(**valid)
    with pytest.raises(ValueError, match=message):
        DCTConfig(**{**valid, **changes})


def test_unknown_presets_and_counts_are_refused():
    with pytest.raises(ValueError, match="unknown DCT preset 'x5': choose one of exact, x4, x16, or give a JSON file"):
        DCTConfig.preset("x5")
    for count in (0, 1177):
        with pytest.raises(ValueError, match=f"has 1 to 1176 coefficients to keep, asked for {count}"):
            DCTConfig.select((2, 14, 14), "444", count)


@given(configs())
@settings(max_examples=30, deadline=None)
def test_round_trips_of_a_configuration(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "dct.json"
    config.save(path)
    assert DCTConfig.from_file(path) == config
    path.write_text(json.dumps({"dct": config.to_dict(), "min_pixels": 3136}))  # preprocessor_config.json of a model
    assert DCTConfig.from_file(path) == config
    config.save(path)
    assert DCTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DCTConfig.resolve(str(path)) == DCTConfig.resolve(config.to_dict()) == DCTConfig.resolve(config) == config


def test_bad_configuration_files_are_refused(tmp_path):
    path = tmp_path / "dct.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"dct\.json is not a JSON file"):
        DCTConfig.from_file(path)
    for values in ([], {}, {"block": [1, 2, 2]}, {**preset("exact").to_dict(), "colour": 1}):
        path.write_text(json.dumps(values))
        with pytest.raises(
            ValueError, match="a DCT configuration has the fields block, chroma, kept, mean, merge, name, scale, std"
        ):
            DCTConfig.from_file(path)


@given(configs(), st.integers(1, 10**6))
@settings(max_examples=30, deadline=None)
def test_select_keeps_the_coefficients_of_highest_variance(config, count):
    total = len(DCTConfig.select(config.block, config.chroma).kept)
    count = 1 + count % total
    chosen = DCTConfig.select(config.block, config.chroma, count)
    variance = coefficient_variance(config.block).ravel()
    dropped = set(DCTConfig.select(config.block, config.chroma).kept) - set(chosen.kept)
    assert len(chosen.kept) == count and list(chosen.kept) == sorted(chosen.kept)
    assert not dropped or min(variance[list(chosen.kept)]) >= max(variance[list(dropped)]) * (1 - 1e-12)
    np.testing.assert_allclose(np.square(chosen.scale), variance[list(chosen.kept)], rtol=1e-4)


# Folding


def test_shapes_and_types_of_folded_weights():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.randn(5, 3, 2, 14, 14).to(dtype)
        for name, count in (("exact", 1176), ("x4", 1764), ("x16", 2352)):
            folded = fold_patch_embedding(weight, preset(name))
            assert folded.shape == (5, count, 1, 1, 1) and folded.dtype == dtype
    for shape in ((5, 1176), (5, 1176, 1, 1, 1), (5, 3, 14, 14), (5, 3, 2, 16, 16)):
        with pytest.raises(ValueError, match=r"fold_patch_embedding expects a weight \[E, 3, 2, 14, 14\], got \["):
            fold_patch_embedding(torch.zeros(shape), preset("x4"))


def test_columns_of_what_the_pixel_model_never_saw_are_zero():
    folded = fold_patch_embedding(torch.randn(8, 3, 2, 14, 14), preset("x4")).reshape(8, -1)
    seen = torch.tensor(
        [max(place[2:]) < 14 for place in map(tuple, np.transpose(np.unravel_index(preset("x4").kept, (3, 2, 28, 28))))]
    )
    assert seen.sum() == 1176
    assert (folded[:, ~seen] == 0).all()
    assert (folded[:, seen].abs().amax(dim=0) > 0).all()


@given(configs(square=True))
@settings(max_examples=20, deadline=None)
def test_a_constant_colour_keeps_its_value_in_every_block_size(config):
    """W x = W' token for a flat colour, whatever the block: the gain of the downscaling is right."""
    config = DCTConfig.select(config.block, config.chroma, merge=config.merge)
    colour = np.array([200, 30, 90])
    tokens, _ = DCTTokenizer(config, torch.float64).encode(np.full((1, *config.resize_factor, 3), colour))
    weight = torch.randn(4, 3, 2, 14, 14, dtype=torch.float64)
    normalised = (colour / 255 - CLIP_MEAN) / np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.einsum("ectyx,c->e", weight, torch.from_numpy(normalised))
    found = tokens[0] @ fold_patch_embedding(weight, config).reshape(4, -1).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # scales are rounded to six digits in both places


@pytest.mark.parametrize("kind", ["image", "video"])
def test_exact_equals_stock_patch_embedding_at_the_real_size(kind, natural_frames):
    """Qwen2-VL's vision tower is 1280 wide; weights are random, as large as a trained patch embedding's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = PatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=1280)
        torch.nn.init.normal_(stock.proj.weight, std=0.05)
    folded = PatchEmbed(patch_size=1, temporal_patch_size=1, in_channels=1176, embed_dim=1280)
    folded.proj.weight.data = fold_patch_embedding(stock.proj.weight.data, preset("exact"))
    frames = natural_frames(1 if kind == "image" else 5, 150, 200)
    arguments = {"images": frames[0]} if kind == "image" else {"images": None, "videos": [list(frames)]}
    tokens_name, grid_name = (
        ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    )
    pixels = Qwen2VLImageProcessor()(**arguments, return_tensors="pt")
    tokens = DCTImageProcessor("exact")(**arguments, return_tensors="pt")
    assert torch.equal(pixels[grid_name], tokens[grid_name])
    with torch.no_grad():
        expected, found = stock(pixels[tokens_name]), folded(tokens[tokens_name])
    assert expected.shape == found.shape == (tokens[grid_name].prod(), 1280)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# The whole model


def load_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def stock_model(qwen2vl_directory):
    return load_model(qwen2vl_directory)


IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
PROMPTS = {
    "image": (f"user\n{IMAGE}What colour is the circle?", 1, 0),
    "video": (f"user\n{VIDEO}Which way?", 0, 1),
    "mixed": (f"user\n{IMAGE}one, {VIDEO}two, and {IMAGE}three", 2, 1),
}


def prompt_inputs(processor, prompt: str, natural_frames) -> dict:
    text, images, videos = PROMPTS[prompt]
    arrays = [natural_frames(1, 100 + 60 * n, 170, seed=n)[0] for n in range(images)]
    sequences = [list(natural_frames(5, 80, 120, seed=9)) for _ in range(videos)]
    return processor(text=[text], images=arrays or None, videos=sequences or None, return_tensors="pt")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_exact_model_gives_the_stock_logits(prompt, qwen2vl_directory, stock_model, converted, natural_frames):
    stock_inputs = prompt_inputs(AutoProcessor.from_pretrained(qwen2vl_directory), prompt, natural_frames)
    processor = AutoProcessor.from_pretrained(converted("exact"), trust_remote_code=True)
    inputs = prompt_inputs(processor, prompt, natural_frames)
    assert torch.equal(inputs["input_ids"], stock_inputs["input_ids"])
    with torch.no_grad():
        expected = stock_model(**stock_inputs).logits
        found = load_model(converted("exact"))(**inputs).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def downscaled(frames: np.ndarray) -> np.ndarray:
    """[T, H, W, 3] at half the height and width, each (2, 28, 28) block in the DCT domain, by scipy."""
    half = np.empty((len(frames), frames.shape[1] // 2, frames.shape[2] // 2, 3))
    for t, y, x, c in np.ndindex(len(frames) // 2, frames.shape[1] // 28, frames.shape[2] // 28, 3):
        block = frames[2 * t : 2 * t + 2, 28 * y : 28 * y + 28, 28 * x : 28 * x + 28, c].astype(np.float64)
        low = dctn(block, norm="ortho")[:2, :14, :14] * math.sqrt(2 * 14 * 14 / (2 * 28 * 28))
        half[2 * t : 2 * t + 2, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14, c] = idctn(low, norm="ortho")
    return half


@pytest.mark.parametrize("kind", ["image", "video"])
def test_x4_model_at_step_0_is_the_stock_model_on_the_downscaled_image(
    kind, qwen2vl_directory, stock_model, converted, natural_frames
):
    frames = natural_frames(1 if kind == "image" else 4, 112, 168)
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_directory)
    small = downscaled(frames.repeat(2, axis=0) if kind == "image" else frames)
    pixel_processor = Qwen2VLImageProcessor(do_resize=False)
    if kind == "image":
        stock_media = pixel_processor(images=small[0], return_tensors="pt")
        media = DCTImageProcessor("x4")(images=frames[0], return_tensors="pt")
    else:
        stock_media = pixel_processor(images=None, videos=[list(small)], return_tensors="pt")
        media = DCTImageProcessor("x4")(videos=[list(frames)], return_tensors="pt")
    grid_name = f"{kind}_grid_thw"
    assert media[grid_name].tolist() == stock_media[grid_name].tolist() == [[len(small) // 2, 4, 6]]
    pads = f"<|{kind}_pad|>" * (len(small) // 2 * 2 * 3)
    text = tokenizer(f"user\n<|vision_start|>{pads}<|vision_end|>What colour is the circle?", return_tensors="pt")
    model = load_model(converted("x4"))
    with torch.no_grad():
        expected = stock_model(
            **text,
            **{name: value.float() if value.is_floating_point() else value for name, value in stock_media.items()},
        ).logits
        found = model(**text, **media).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_mean_and_deviation_are_those_of_transformers():
    """They are written out, since the format needs no transformers."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from dct_qwen2vl.dct import configuration_dct

    assert list(configuration_dct.CLIP_MEAN) == OPENAI_CLIP_MEAN
    assert list(configuration_dct.CLIP_STD) == OPENAI_CLIP_STD
