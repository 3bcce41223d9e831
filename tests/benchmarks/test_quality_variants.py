"""The variants of the experiments: pixel variants are Qwen2-VL's processor, DCT variants are the tokenizer, tokens are
equal."""

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from benchmarks.quality.tasks.reading import Reading
from benchmarks.quality.tasks.registry import Source
from benchmarks.quality.variants import VARIANTS, Encoder, downscale, make_variant, preset, unfold_patch_embedding
from dct_qwen2vl.dct import folding
from dct_qwen2vl.dct.configuration_dct import PRESETS
from dct_qwen2vl.dct.folding import fold_patch_embedding
from dct_qwen2vl.dct.transform_dct import DCTTokenizer
from dct_tokenizer import DCTConfig

SIZE = (224, 224)
AT_A_QUARTER = [name for name in VARIANTS if name.startswith(("quarter", "x4-raw", "x4-pca", "x4"))]


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(Reading(size=SIZE[0], cells=7), "cpu")


@pytest.fixture(scope="module")
def stills(source) -> torch.Tensor:
    return source.batch("train", 0, 0, 2).frames


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in VARIANTS if make_variant(name).config])
@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_a_dct_variant_is_the_tokenizer(name, kind, request):
    frames = request.getfixturevalue(kind)
    variant = make_variant(name)
    encoder = Encoder(variant, SIZE, frames.shape[1])
    tokens = encoder.encode(frames)
    assert_is_the_tokenizer(variant, encoder, frames, tokens)


def test_so_is_one_for_smaller_patches(stills):
    variant = make_variant("x4", 7)
    assert variant.config.block == (2, 14, 14) and variant.config.num_coefficients == 441
    encoder = Encoder(variant, SIZE, 1)
    assert_is_the_tokenizer(variant, encoder, stills, encoder.encode(stills))


def assert_is_the_tokenizer(variant, encoder, frames, tokens):
    for sample, one in zip(frames, tokens):
        expected, grid = DCTTokenizer(variant.config, torch.float64).encode(sample)
        assert grid == encoder.grid
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_for_smaller_patches_are_the_real_ones_in_proportion(name):
    real, small = DCTConfig.preset(name), preset(name, 7)
    assert preset(name, 14).to_dict() == real.to_dict()
    assert small.block == (2, real.block[1] // 2, real.block[2] // 2) and small.chroma == real.chroma
    assert 4 * small.num_coefficients == real.num_coefficients


@pytest.mark.parametrize("patch", [7, 14])
def test_an_unfolded_patch_embedding_is_what_was_folded(patch):
    weight = torch.randn(5, 3, 2, patch, patch, generator=torch.Generator().manual_seed(0))
    folded = fold_patch_embedding(weight, preset("exact", patch), (2, patch, patch))
    torch.testing.assert_close(unfold_patch_embedding(folded, preset("exact", patch)), weight)
    with pytest.raises(ValueError, match="format 'x4' has not all coefficients"):
        unfold_patch_embedding(folded, preset("x4", patch))


@pytest.mark.parametrize("patch", [7, 14])
@pytest.mark.parametrize("name", [name for name in VARIANTS if make_variant(name).config])
def test_what_a_patch_shows_is_what_folding_gives_weight_to(name, patch):
    encoder = Encoder(make_variant(name, patch), SIZE, 1)
    weight = torch.randn(5, 3, 2, patch, patch, generator=torch.Generator().manual_seed(0))
    folded = fold_patch_embedding(weight, encoder.variant.config, (2, patch, patch)).flatten(1)
    assert torch.equal(encoder.in_patch(patch, folded.shape[1]), folded.abs().amax(dim=0) > 0)


def test_of_principal_components_a_patch_shows_the_largest(source):
    encoder = Encoder(make_variant("x4-pca", 7), SIZE, 1)
    frames = [source.batch("fit", 0, number, 8).frames for number in range(2)]
    encoder.fit(frames)
    shown = encoder.in_patch(7, encoder.matrix.shape[1])
    size = 1 / encoder.matrix.norm(dim=0)  # whitening divides by the standard deviation
    assert shown.sum() == 3 * 7**2 < len(shown) and size[shown].min() >= size[~shown].max()
    assert Encoder(make_variant("x4-raw", 7), SIZE, 1).in_patch(7, 588).all()


@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_the_pixel_variant_is_the_stock_processor(kind, request):
    frames = request.getfixturevalue(kind)
    processor = Qwen2VLImageProcessor(min_pixels=224 * 224, max_pixels=224 * 224)
    if kind == "stills":
        expected = processor(images=list(frames[:, 0].numpy()), return_tensors="pt")["pixel_values"]
    else:
        videos = [list(video) for video in frames.numpy()]
        expected = processor(images=None, videos=videos, return_tensors="pt")["pixel_values_videos"]
    tokens = Encoder(make_variant("pixels"), SIZE, frames.shape[1]).encode(frames)
    torch.testing.assert_close(tokens.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("quarter", 2), ("sixteenth", 4)])
def test_the_smaller_image_is_the_stock_processors(stills, name, factor):
    bound = (224 // factor) ** 2
    processor = Qwen2VLImageProcessor(min_pixels=bound, max_pixels=bound)
    expected = processor(images=list(stills[:, 0].numpy()), return_tensors="pt")["pixel_values"]
    tokens = Encoder(make_variant(name), SIZE, 1).encode(stills).flatten(0, 1)
    assert tokens.shape == expected.shape
    level = 1 / 255 / 0.26
    # Pillow rounds and videos between rows and columns, too
    assert (tokens - expected).abs().max() < 2.5 * level and (tokens - expected).abs().mean() < 0.3 * level


def test_downscaling_is_antialiased_as_pillows(stills):
    small = downscale(stills.float(), 2)[0, 0].numpy()
    pillow = np.asarray(Image.fromarray(stills[0, 0].numpy()).resize((112, 112), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(small - pillow).mean() < 0.2 and np.abs(small - pillow).max() <= 2
    assert (small == np.round(small)).all()


@pytest.mark.parametrize("name", AT_A_QUARTER)
def test_variants_at_a_quarter_have_a_quarter_of_the_tokens(name):
    assert Encoder(make_variant(name), SIZE, 1).tokens * 4 == Encoder(make_variant("pixels"), SIZE, 1).tokens == 256


@pytest.mark.parametrize("name", ["sixteenth", "sixteenth-pca", "x16"])
def test_variants_at_a_sixteenth_have_a_sixteenth_of_the_tokens(name):
    assert Encoder(make_variant(name), SIZE, 1).tokens * 16 == 256


@pytest.mark.parametrize("name", ["pixels-unit", "x4-raw"])
def test_unit_variance_is_that_of_the_images_it_was_measured_on(source, name):
    encoder = Encoder(make_variant(name), SIZE, 1)
    frames = [source.batch("fit", 0, number, 8).frames for number in range(2)]
    encoder.fit(frames)
    tokens = encoder.encode(torch.cat(frames)).flatten(0, 1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(tokens.shape[1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens.std(0, unbiased=False), torch.ones(tokens.shape[1]), rtol=0, atol=1e-3)


def test_whitened_pixels_are_uncorrelated_and_keep_the_pixels(source):
    encoder = Encoder(make_variant("quarter-pca"), SIZE, 1)
    frames = torch.cat([source.batch("fit", 0, number, 16).frames for number in range(2)])
    encoder.fit([frames])
    tokens = encoder.encode(frames).flatten(0, 1)
    covariance = tokens.T @ tokens / len(tokens)
    torch.testing.assert_close(covariance, torch.eye(len(covariance)), rtol=0, atol=0.02)
    plain = Encoder(make_variant("quarter"), SIZE, 1).encode(frames).flatten(0, 1)
    plain = plain - plain.mean(0)
    rebuilt = tokens @ torch.linalg.lstsq(tokens, plain).solution
    assert (rebuilt - plain).square().mean() < 1e-4 * plain.square().mean()


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of 112"):
        Encoder(make_variant("x16"), (168, 168), 1)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="x4-weighted', which needs a trained pixel model"):
        make_variant("x4-weighted")
    with pytest.raises(ValueError, match="choose from pixels"):
        make_variant("x5")


@pytest.mark.parametrize("name", ["x4", "x16"])
def test_folding_is_flexivits_resize_with_the_resampling_of_the_dct(name):
    """FlexiViT (arXiv 2212.08013): a larger patch gets the pseudo-inverse of the transposed upscaling,
    times the weight."""
    config, weight = DCTConfig.preset(name), torch.randn(4, 3, 2, 14, 14, dtype=torch.float64)
    side = config.block[1]
    frequencies = np.zeros((side, 14))
    frequencies[:14] = scipy.fft.dct(np.eye(14), axis=0, norm="ortho")
    upscaling = scipy.fft.idct(frequencies, axis=0, norm="ortho") * np.sqrt(side / 14)
    resize = torch.from_numpy(np.linalg.pinv(upscaling.T))
    np.testing.assert_allclose(upscaling @ np.ones(14), 1)
    resized = torch.einsum("yr,xc,epfrc->epfyx", resize, resize, weight)
    unfolded = folding.unfold_patch_embedding(fold_patch_embedding(weight, config), config)
    torch.testing.assert_close(unfolded, resized, rtol=0, atol=1e-9 * float(resized.abs().max()))
