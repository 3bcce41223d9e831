"""The study of dense reading on small inputs: cells by hand, variants that start as the same function, a tiny run."""

import json

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from benchmarks.quality.dense import report, train
from benchmarks.quality.dense.dinov2 import CONFIG, make_backbone, positions_for
from benchmarks.quality.dense.inputs import (
    BLOCK,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PATCH,
    VARIANTS,
    Inputs,
    blocks,
    resized_patch,
    shrunk,
)
from benchmarks.quality.dense.pages import (
    CLASSES,
    OTHER,
    SHARED,
    PageStore,
    cell_labels,
    label_of,
    text_bounds,
    write_pages,
)
from benchmarks.quality.dense.prepare import WEIGHTS
from benchmarks.quality.result_files import read_file, write_file

LEVEL = 0.9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embedding() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 14, 14, generator=generator), torch.randn(5, generator=generator)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 56, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def first_outputs(name: str, embedding, images, **options) -> torch.Tensor:
    inputs = Inputs(VARIANTS[name], *embedding, LEVEL, **options)
    return inputs(images) @ inputs.weight.T + inputs.bias


# Cells


def test_labels_of_characters():
    assert [label_of(c) for c in "! ~"] == [1, 0, 94] and label_of("é") == label_of("ﬁ") == OTHER == CLASSES - 1


def test_a_cell_has_the_character_whose_middle_lies_in_it():
    characters = torch.tensor([[[5, 103.0, 203.6], [6, 103.0, 200.0], [7, 113.9, 202.0], [8, 99.0, 200.0], [0, 0, 0]]])
    labels = cell_labels(characters, torch.tensor([[100, 200]]), 14)
    assert labels.tolist() == [[[6, 5, 0, 0], [7, 0, 0, 0]]]


def test_a_cell_with_two_characters_does_not_count():
    characters = torch.tensor([[[5, 1.0, 1.0], [6, 6.0, 3.0], [7, 8.0, 1.0]]])
    assert cell_labels(characters, torch.tensor([[0, 0]]), 14).tolist() == [[[SHARED, 0, 0, 0], [7, 0, 0, 0]]]


# Variants


def test_blocks_stand_row_by_row():
    values = torch.arange(16.0).view(1, 4, 4)
    assert blocks(values, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_patch_of_7_px_sees_what_one_of_14_px_sees_enlarged(embedding):
    small = np.random.default_rng(0).normal(size=(PATCH, PATCH))
    enlarged = idctn(np.pad(dctn(small, norm="ortho"), (0, PATCH)), norm="ortho") * 2
    ours = torch.einsum("epyx,yx->e", resized_patch(embedding[0]), torch.from_numpy(small))
    theirs = torch.einsum("epyx,yx->e", embedding[0].double(), torch.from_numpy(enlarged))
    torch.testing.assert_close(ours, theirs)


def test_one_channel_starts_as_three_equal_ones(embedding, images):
    one, three = (first_outputs(name, embedding, images) for name in ("half", "half-rgb"))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def test_three_channels_are_normalised_as_imagenet(embedding):
    inputs = Inputs(VARIANTS["half-rgb"], *embedding, LEVEL)
    numbers = inputs(torch.full((1, 14, 14), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    torch.testing.assert_close(numbers.view(3, 49).mean(dim=1), torch.tensor(expected))


@pytest.mark.parametrize("options", [{}, {"gain": 10.0}, {"measured": torch.randn(500, BLOCK**2)}])
@pytest.mark.parametrize("name", ["half-dct", "x4", "x4-588", "pixel"])
def test_variants_of_a_block_start_as_the_embedding_of_the_block_downscaled(name, options, embedding, images):
    if name == "pixel":
        options = {key: value for key, value in options.items() if key != "gain"}
    coefficients = dctn(images.double().numpy().reshape(2, 4, 14, 4, 14) / 255, axes=(2, 4), norm="ortho")
    small = idctn(coefficients[:, :, :7, :, :7], axes=(2, 4), norm="ortho") / 2
    small = torch.from_numpy(small).permute(0, 1, 3, 2, 4).reshape(2, 16, 49)
    values = torch.cat([(small - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)], dim=-1)
    expected = values @ resized_patch(embedding[0]).flatten(1).T + embedding[1].double()
    torch.testing.assert_close(
        first_outputs(name, embedding, images, **options).double(), expected, rtol=1e-4, atol=1e-3
    )


def test_detail_starts_at_zero_and_a_gain_makes_it_louder(embedding, images):
    plain, loud = (Inputs(VARIANTS["x4"], *embedding, LEVEL, gain=gain) for gain in (1.0, 10.0))
    detail = plain.weight.abs().amax(dim=0) == 0
    assert detail.sum() == BLOCK**2 - PATCH**2
    ratio = loud(images)[..., detail] / plain(images)[..., detail]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 10.0), rtol=1e-3, atol=0)
    assert torch.equal(loud(images)[..., ~detail], plain(images)[..., ~detail])


def test_scales_from_pages_make_pages_of_unit_spread(embedding, images):
    measured = blocks(images.float() / 255 - LEVEL, BLOCK).flatten(0, 1)
    numbers = Inputs(VARIANTS["x4"], *embedding, LEVEL, measured)(images)
    torch.testing.assert_close(numbers.square().mean(dim=(0, 1)), torch.ones(BLOCK**2), rtol=1e-3, atol=0)


def test_numbers_of_a_token(embedding):
    numbers = {name: Inputs(variant, *embedding, LEVEL).numbers for name, variant in VARIANTS.items()}
    same = {"all": 49, "half": 49, "half-rgb": 147, "half-dct": 49, "x4": 196, "x4-588": 147, "pixel": 196}
    assert numbers == same


def test_a_smaller_crop_is_rounded_to_8_bits():
    small = shrunk(torch.rand(1, 14, 14), 2)
    assert small.shape == (1, 7, 7)
    torch.testing.assert_close(small * 255, (small * 255).round(), rtol=0, atol=1e-4)


def test_positions_of_the_pretrained_grid_are_its_own():
    table = torch.randn(1, 1 + 37**2, 4)
    torch.testing.assert_close(positions_for(table, 37), table[:, 1:])


# A tiny run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> object:
    """Two pages with one letter in a grid, as `prepare` writes them, and random weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("dense")
    pages = []
    for number in range(2):
        grey = np.full((120, 130), 255, np.uint8)
        places = [(row, column) for row in range(10, 110, 12) for column in range(10, 120, 9)]
        for row, column in places:
            grey[row - 3 : row + 3, column - 2 : column + 2] = 0
        pages.append((grey, np.array([(34 + number, row, column) for row, column in places], np.float32)))
    for dpi in (60, 75):
        write_pages(folder, dpi, pages)
    (folder / "pages.json").write_text(json.dumps({"dpi": [60, 75], "manuals": ["R-exts", "R-intro"]}))
    torch.manual_seed(0)
    weights = {name: weight.to(torch.bfloat16) for name, weight in make_backbone(None).state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    return folder


def test_pages_are_split_by_manual_and_cut_with_their_labels(data):
    store = PageStore(data, "test", CPU)
    assert store.names == ["R-intro"]
    crops = store.draw(60, 3, 56, torch.Generator().manual_seed(0))
    assert crops.images.shape == (3, 56, 56) and crops.labels.shape == (3, 8, 16)
    assert set(crops.labels.unique().tolist()) == {0, 35}
    dark = torch.nn.functional.avg_pool2d((crops.images < 128).float()[:, None], (7, 7))[:, 0] > 0
    assert dark[(crops.labels > 0).unflatten(2, (8, 2)).any(dim=3)].all()


def test_crops_lie_where_text_is(data):
    bounds = text_bounds(np.array([[[0, 9, 9], [5, 30, 40], [6, 90, 50]], [[0, 0, 0]] * 3], np.float32))
    assert bounds.tolist() == [[[23, 33], [97, 57]], [[0, 0], [0, 0]]]
    store = PageStore(data, "test", CPU)
    store.text[60][:] = torch.tensor([[40.0, 50.0], [120.0, 130.0]])
    ends = store.crops(60, torch.zeros(2, dtype=torch.long), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 56)
    grey = store.grey[60][0]
    assert torch.equal(ends.images[0], grey[40:96, 50:106]) and torch.equal(ends.images[1], grey[64:120, 74:130])


@pytest.mark.parametrize("beside", ["norm", "mlp"])
def test_a_path_beside_the_first_layer_starts_at_zero_and_learns(beside, data):
    weights = train.read_weights(data)
    first = "embeddings.patch_embeddings.projection"
    inputs = Inputs(VARIANTS["x4"], weights[f"{first}.weight"], weights[f"{first}.bias"].float(), LEVEL)
    images = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, more = (train.DenseReader(inputs, weights, 28, kind) for kind in ("nothing", beside))
    more.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(plain(inputs(images)), more(inputs(images)))
    more(inputs(images)).square().mean().backward()
    assert more.beside[-1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_say_as_many_cells(variant, data):
    weights = train.read_weights(data)
    first = "embeddings.patch_embeddings.projection"
    inputs = Inputs(VARIANTS[variant], weights[f"{first}.weight"], weights[f"{first}.bias"].float(), LEVEL)
    model = train.DenseReader(inputs, weights, 56)
    assert model.grid == (8 if variant == "all" else 4)
    with torch.no_grad():
        assert model(inputs(torch.zeros(2, 56, 56, dtype=torch.uint8))).shape == (2, 8, 16, CLASSES)
    assert model.first.weight.shape == (CONFIG["hidden_size"], inputs.numbers)


def test_scores_stand_where_their_cells_are(data):
    """The head of one token, made to shout, is heard in the token's cells alone."""
    weights = train.read_weights(data)
    first = "embeddings.patch_embeddings.projection"
    inputs = Inputs(VARIANTS["x4"], weights[f"{first}.weight"], weights[f"{first}.bias"].float(), LEVEL)
    model = train.DenseReader(inputs, weights, 56)
    model.head.weight.data.zero_()
    model.head.bias.data.copy_(torch.arange(float(model.head.bias.numel())))
    with torch.no_grad():
        cells = model(inputs(torch.zeros(1, 56, 56, dtype=torch.uint8)))[0, ..., 0] / CLASSES
    assert cells[:2, :4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(cells[2:4, 4:8], cells[:2, :4])


def test_a_tiny_run_is_recorded_and_read_again(data, tmp_path, capsys):
    command = ["--data", str(data), "--output", str(tmp_path), "--variants", "x4", "--steps", "2", "--batch", "4"]
    command += ["--side", "56", "--test", "4", "--every", "1", "--device", "cpu"]
    assert train.main(command) == 0
    ((name, result),) = read_file(tmp_path / "dense.jsonl").items()
    assert name == "dense_x4_natural_rate0.0003_steps2_seed0" and result["tokens"] == 16
    assert [point["step"] for point in result["curve"]] == [1, 2]
    assert set(result["accuracy"]) == {"60", "75", "all"} and result["by_page"]["pages"] == ["R-intro"]
    before = (tmp_path / "dense.jsonl").stat().st_mtime_ns
    assert train.main(command) == 0 and (tmp_path / "dense.jsonl").stat().st_mtime_ns == before
    assert "right" in capsys.readouterr().out


def test_no_run_begins_after_the_time_is_up(data, tmp_path, capsys):
    command = ["--data", str(data), "--output", str(tmp_path / "late"), "--steps", "2", "--device", "cpu"]
    assert train.main([*command, "--seconds", "0"]) == 0
    assert "the time is up" in capsys.readouterr().out and not (tmp_path / "late").exists()


def test_what_is_missing_is_one_line(tmp_path, capsys):
    assert train.main(["--data", str(tmp_path), "--output", str(tmp_path)]) == 1
    assert "python -m benchmarks.quality.dense.prepare" in capsys.readouterr().err
    assert train.main(["--data", str(tmp_path), "--output", str(tmp_path), "--side", "50"]) == 1


# The report


def result(variant: str, seed: int, right: list[int], rate: float = 1e-3, steps: int = 20) -> dict:
    """Of three pages of 10, 20 and 0 characters at one resolution."""
    accuracy = {"60": sum(right) / 30, "all": sum(right) / 30}
    settings = {"variant": variant, "rate": rate, "seed": seed, "steps": steps, "scales": "pages", "gain": 1.0}
    return {
        "name": f"dense_{variant}_{rate}_{steps}_{seed}",
        "finished": True,
        "dense": {**settings, "beside": "nothing"},
        "last_loss": rate,
        "tokens": 16,
        "numbers_a_token": 49,
        "curve": [{"step": steps, **accuracy}],
        "accuracy": accuracy,
        "by_page": {"pages": ["a", "a", "b"], "60": {"right": right, "characters": [10, 20, 0]}},
    }


def test_the_report_pairs_seeds_and_pages(tmp_path, capsys):
    results = [result("half", seed, [4, 8 + seed, 0]) for seed in (0, 1, 2)]
    results += [result("x4", seed, [6, 13 + seed, 0]) for seed in (0, 1, 2)]
    results += [result("x4", 0, [0, 0, 0], steps=5), result("x4", 0, [9, 19, 0], rate=2e-3)]  # a search's; another rate
    write_file(tmp_path / "dense.jsonl", results)
    figure = tmp_path / "dense.png"
    assert report.main(["--results", str(tmp_path), "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "| x4, pages scales | 16 | 49 | 0.001 | 20 | 3 | 66.7 | 66.7 ± 3.3 |" in out
    assert "x4 against the half-size image (pages scales): over 3 seeds and 2 pages: +23.3 points" in out
    assert figure.stat().st_size > 1000
    for option, value, right in (("--steps", "5", "0.0"), ("--rate", "2e-3", "93.3")):
        assert report.main(["--results", str(tmp_path), option, value]) == 0
        out = capsys.readouterr().out
        assert f"| 1 | {right} | {right} |" in out and "half" not in out


def test_runs_tested_on_other_pages_are_not_compared(tmp_path, capsys):
    results = [result(variant, seed, [4, 8, 0]) for seed in (0, 1) for variant in ("half", "x4")]
    for one in results[::2]:
        one["by_page"]["60"]["characters"] = [11, 20, 0]
    write_file(tmp_path / "dense.jsonl", results)
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "--test" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path / "none")]) == 1
