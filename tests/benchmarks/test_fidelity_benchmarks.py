"""rate_distortion.py and feature_fidelity.py on small settings: what must hold between their figures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.quality.analysis import feature_fidelity, patch_weights, rate_distortion
from dct_qwen2vl.analysis.coefficient_moments import resized
from dct_qwen2vl.analysis.natural_images import HELD_OUT_IMAGES, load, moving_view
from dct_qwen2vl.dct import configuration_dct

WEIGHT = torch.randn(16, 3, 2, 14, 14, generator=torch.Generator().manual_seed(0)) / 34


@pytest.fixture(scope="module")
def material() -> dict[str, list[np.ndarray]]:
    """Parts of two held-out photographs, and a slow pan over one."""
    first, second = (load(name) for name in HELD_OUT_IMAGES[:2])
    stills = [resized(image[None], (112, 112)) for image in (first, second)]
    return {"stills": stills, "videos": [moving_view(second, (112, 112), 4, velocity=(1.5, 3))]}


@pytest.fixture(scope="module")
def points(material) -> dict[tuple, rate_distortion.Point]:
    measured = rate_distortion.measure(
        material, WEIGHT, sides=(28,), floats=(3 / 16, 3 / 4, 3 / 2), scales=(1 / 4, 1 / 2)
    )
    return {(p.material, p.method, p.side, p.chroma, round(p.floats_per_pixel, 4)): p for p in measured}


# Rate and distortion


@pytest.mark.parametrize("kind", ["stills", "videos"])
@pytest.mark.parametrize("floats", [3 / 16, 3 / 4])
def test_variance_is_the_best_order_at_equal_floats(points, kind, floats):
    of = {order: points[kind, order, 28, "420", round(floats, 4)] for order in ("variance", "zigzag", "box")}
    assert of["variance"].psnr > of["zigzag"].psnr + 1 and of["variance"].psnr > of["box"].psnr + 1
    assert of["variance"].ssim > of["box"].ssim


@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_downscaling_has_the_tokens_and_floats_of_the_box(points, kind):
    box = points[kind, "box", 28, "420", 0.75]
    for method in ("bicubic", "area", "Lanczos"):
        smaller = points[kind, method, 28.0, "444", 0.75]
        assert smaller.tokens == pytest.approx(box.tokens)
        assert box.psnr > smaller.psnr and smaller.psnr < points[kind, "variance", 28, "420", 0.75].psnr - 2
        assert smaller.upscaling in ("bicubic", "Lanczos")


@pytest.mark.parametrize("kind", ["stills", "videos"])
def test_more_floats_are_never_worse(points, kind):
    for order in configuration_dct.ORDERS:
        less, whole = (points[kind, order, 28, "420", floats] for floats in (0.75, 1.5))
        assert less.psnr < whole.psnr
        assert whole.psnr == points[kind, "variance", 28, "420", 1.5].psnr, "whole blocks, whatever the order"


def test_presets(points):
    assert points["stills", "exact", 14, "444", 3].psnr == rate_distortion.MOST_PSNR
    still, video = points["stills", "x4", 28, "420", 1.5], points["videos", "x4", 28, "420", 1.125]
    whole = points["stills", "variance", 28, "420", 1.5]
    assert still.psnr == pytest.approx(whole.psnr, abs=1e-3), "x4 keeps all of a still"
    assert video.psnr < points["videos", "variance", 28, "420", 1.5].psnr
    assert (still.tokens, video.tokens) == (256, 128)


def test_scores_by_hand():
    frames = np.full((2, 16, 16, 3), 100, np.uint8)
    psnr, ssim = rate_distortion.score([frames, frames], [frames + 2, frames])
    assert psnr == pytest.approx((20 * math.log10(255 / 2) + rate_distortion.MOST_PSNR) / 2)
    assert ssim == pytest.approx((1 + (2 * 100 * 102 + 6.5025) / (100**2 + 102**2 + 6.5025)) / 2, abs=1e-4)


def test_rate_distortion_writes_its_figures(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rate_distortion, "held_out_material", lambda seed: material)
    monkeypatch.setattr(rate_distortion, "measure", lambda m, w: measure_few(m))
    monkeypatch.setattr(patch_weights, "SHAPE", (4, 3, 2, 14, 14))
    files = [str(tmp_path / name) for name in ("a.json", "a.png")]
    assert rate_distortion.main(["--json", files[0], "--plot", files[1]]) == 0
    said = capsys.readouterr().out
    assert 'weight of the order "weighted": RANDOM, seed 0 (--model-dir takes a checkpoint\'s)' in said
    assert "256 tokens a frame (blocks of 28 px):" in said and "== videos ==" in said
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["weight"].startswith("RANDOM") and len(values["points"]) > 20
    assert {"material", "method", "psnr", "ssim", "tokens", "floats_per_pixel"} <= set(values["points"][0])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def measure_few(material: dict[str, list[np.ndarray]], measure=rate_distortion.measure) -> list[rate_distortion.Point]:
    few = {name: items[:1] for name, items in material.items()}
    return measure(few, WEIGHT, sides=(28,), floats=(3 / 4,), scales=(1 / 2,))


def test_rate_distortion_of_nothing(tmp_path, one_line_error):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert rate_distortion.main(["--images", str(tmp_path)]) == 1
    assert "rate_distortion.py: nothing to measure: no file could be used" in one_line_error()


# Features


@pytest.fixture(scope="module")
def rows(material) -> dict[tuple, feature_fidelity.Row]:
    measured = feature_fidelity.measure(material, WEIGHT)
    return {(row.name, row.block): row for row in measured}


PATCH, X4 = (2, 14, 14), (2, 28, 28)


def test_presets_embed_what_the_pixel_model_embeds(rows):
    for name, block in (("pixels", PATCH), ("exact", PATCH), ("x4", X4), ("x16", (2, 56, 56))):
        row = rows[name, block]
        assert row.fp32 < 2e-6, "a few roundings of fp32"
        assert 2e-4 < row.bf16 < 6e-3, "a few roundings of bf16, which has 8 bits"
    assert 1e-2 < rows["x4", X4].bicubic < 0.2, "bicubic is near, and another image"


def test_errors_of_orders(rows):
    for block in (PATCH, X4):
        of = {order: rows[order, block].fp32 for order in configuration_dct.ORDERS}
        assert of["weighted"] < of["zigzag"] and of["weighted"] < of["box"]
        assert of["variance"] < of["zigzag"] and of["variance"] < of["box"]
        assert all(1e-2 < error < 0.3 for error in of.values())
    assert rows["weighted", X4].fp32 < rows["variance", X4].fp32


def test_int8_is_the_coarsest_of_the_formats(rows):
    for row in rows.values():
        if row.name in configuration_dct.PRESETS:
            assert 5 * row.bf16 < row.int8 < 0.1
            assert row.int8_clip in feature_fidelity.CLIP_LIMITS[1:-1], "the best limit is within those tried"


def test_quantised_by_hand():
    tokens = torch.tensor([0.0, 0.4, 0.6, -1.4, 126.6, 500.0, -500.0])
    assert feature_fidelity.quantised(tokens, 127.0).tolist() == [0, 0, 1, -1, 127, 127, -127]
    assert feature_fidelity.quantised(tokens / 4, 127 / 4).tolist() == [0, 0, 0.25, -0.25, 31.75, 31.75, -31.75]


def test_patches_are_those_of_the_stock_processor(natural_frames):
    from transformers import Qwen2VLImageProcessor

    frames = natural_frames(2, 28, 28)
    stock = Qwen2VLImageProcessor(do_resize=False)(images=None, videos=[list(frames)])["pixel_values_videos"]
    ours = feature_fidelity.pixel_patches(torch.from_numpy(frames).double())
    np.testing.assert_allclose(ours, stock, atol=1e-5)  # one merge group, in raster order


def test_downscaling_keeps_a_constant_and_halves_the_sides(natural_frames):
    constant = np.full((2, 56, 112, 3), (10, 200, 90), np.uint8)
    small = feature_fidelity.dct_downscaled(constant, X4)
    assert small.shape == (2, 28, 56, 3)
    np.testing.assert_allclose(small, np.broadcast_to([10, 200, 90], small.shape), atol=1e-9)
    frames = natural_frames(2, 56, 56)
    ways = (feature_fidelity.dct_downscaled, feature_fidelity.bicubic_downscaled)
    assert np.corrcoef([way(frames, X4).flatten().numpy() for way in ways])[0, 1] > 0.97


def test_feature_fidelity_writes_its_figures(material, tmp_path, monkeypatch, qwen2vl_directory, capsys):
    monkeypatch.setattr(rate_distortion, "held_out_material", lambda seed: material)
    monkeypatch.setattr(
        feature_fidelity, "configs_of", lambda weight: [replace(configuration_dct.DCTConfig.preset("exact"), merge=1)]
    )
    options = ["--model-dir", str(qwen2vl_directory), "--json", str(tmp_path / "a.json")]
    assert feature_fidelity.main(options) == 0
    said = capsys.readouterr().out
    assert f"patch embedding [128, 3, 2, 14, 14]: of {qwen2vl_directory.name}" in said and "exact" in said
    values = json.loads((tmp_path / "a.json").read_text())
    assert [row["name"] for row in values["rows"]] == ["pixels", "exact"]
    assert feature_fidelity.main(["--seed", "1", "--images", "nowhere"]) == 1
    assert "feature_fidelity.py: nowhere does not exist" in capsys.readouterr().err


def test_random_weights_say_so(monkeypatch):
    monkeypatch.setattr(patch_weights, "SHAPE", (3, 3, 2, 14, 14))
    (first, said), (again, _), (other, _) = (patch_weights.patch_weight(None, seed) for seed in (0, 0, 1))
    assert said == "RANDOM, seed 0 (--model-dir takes a checkpoint's)"
    assert torch.equal(first, again) and not torch.equal(first, other)
