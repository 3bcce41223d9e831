"""The study of cells of several sizes: they tile an image within the budget, large ones where it is flat; tokens of all
sizes are those of one folded model, at their own places."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch

from benchmarks.quality.analysis import mixed_picture
from benchmarks.quality.mixed_cells import (
    SIDES,
    CellTree,
    cell_errors,
    choose_cells,
    in_reading_order,
    low_corner,
    savings,
    sides_by_place,
)
from benchmarks.quality.mixed_encoder import MIXED, MixedEncoder, zoomed_matrix
from benchmarks.quality.model import Layout, answer_logits, compiled_layers
from benchmarks.quality.result_files import Output
from benchmarks.quality.runs import run
from benchmarks.quality.settings import ModelSize, Settings
from benchmarks.quality.suites import SUITES, Plan
from benchmarks.quality.tasks.registry import make_task
from benchmarks.quality.trainer import Trainer
from benchmarks.quality.variants import Encoder, make_variant
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.dct.folding import fold_patch_embedding

PATCH = 7  # px
SETTINGS = Settings(
    variant=MIXED, steps=2, batch=2, size=ModelSize(80, 1, 64, 1), probe=2, test=4, fit=4, generated=2, seed=1
)
TREES = [(4, 4), (8, 12), (14, 14), (6, 10), (2, 4)]


def textured(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Two images of different detail in each area, float64 [2, H, W, 3]."""
    rng = np.random.default_rng(seed)
    loudness = np.kron(rng.uniform(0, 40, (2, rows, columns)) ** 2 / 40, np.ones((1, 14, 14)))
    return torch.from_numpy(128 + rng.normal(size=(2, 14 * rows, 14 * columns, 3)) * loudness[..., None])


@pytest.mark.parametrize(("rows", "columns"), TREES)
def test_cells_tile_the_image_and_spend_the_budget(rows, columns):
    tree, images = CellTree(rows, columns), textured(rows, columns)
    errors = cell_errors(images, PATCH)
    chosen = choose_cells(errors, tree)
    assert chosen.sum(1).tolist() == [rows * columns // 4] * 2
    for one in chosen:
        places = sides_by_place(one, tree)
        assert set(places.unique().tolist()) <= set(SIDES)  # no gap, no overlap
        assert tree.sides[one].square().sum() == rows * columns
    assert torch.equal(choose_cells(errors, tree), chosen)
    assert not torch.equal(chosen[0], chosen[1]) or rows * columns < 32


@pytest.mark.parametrize(("rows", "columns", "fewest"), [(4, 4, 1), (8, 12, 6), (14, 14, 22), (6, 10, 9), (2, 4, 2)])
def test_a_flat_image_takes_the_fewest(rows, columns, fewest):
    """22 for 14 x 14: nine large cells, and 13 middle ones in a strip of half their width at the right and below."""
    tree, flat = CellTree(rows, columns), torch.full((1, 14 * rows, 14 * columns, 3), 77.0, dtype=torch.float64)
    errors = cell_errors(flat, PATCH)
    (chosen,) = choose_cells(errors, tree, least=1e-12)
    assert chosen.sum() == fewest and torch.equal(chosen, tree.first)
    assert set(sides_by_place(chosen, tree).unique().tolist()) <= {2, 4}
    assert choose_cells(errors, tree).sum() == tree.budget  # without a least error, the budget is spent all the same


def test_odd_grids_are_refused():
    with pytest.raises(UserError, match="whole cells of x4, got 4 x 5"):
        CellTree(4, 5)


@pytest.mark.parametrize(("rows", "columns"), TREES)
def test_a_divided_cell_is_its_four_children(rows, columns):
    tree = CellTree(rows, columns)
    for parent, children in enumerate(tree.children):
        one, four = (torch.zeros(len(tree.sides), dtype=torch.bool) for _ in range(2))
        one[parent], four[children] = True, True
        whole, parts = (sides_by_place(cells, tree) for cells in (one, four))
        assert torch.equal(whole, 2 * parts)
    assert len(tree.children) == (tree.sides > 1).sum()


def test_the_cell_that_saves_most_is_divided():
    """8 x 8: large cells 0 to 3, middle ones 4 to 19. Four divisions are within the budget of 16."""
    tree, errors = CellTree(8, 8), torch.zeros(2, 20)
    errors[:, :4] = torch.tensor([5.0, 9.0, 1.0, 0.5])
    errors[0, 6], errors[0, 4] = 8.0, 0.75  # a quarter of the second large cell, and of the first
    assert savings(errors, tree)[0, :8].tolist() == [4.25, 4.5, 1, 0.5, 0.75, 0, 8, 0]  # 9 saved by two divisions
    chosen = choose_cells(errors, tree)
    assert (~chosen[0, :4]).tolist() == [True, True, True, False] and not chosen[0, 6] and chosen[0, 4]
    assert (~chosen[1, :4]).tolist() == [True, True, True, True]  # no middle cell has an error
    few = choose_cells(errors, tree, least=2.0)
    assert few.sum(1).tolist() == [4 + 3 * 3, 4 + 2 * 3]
    equal = torch.cat([torch.full((1, 4), 8.0), torch.ones(1, 16)], dim=1)
    ties = choose_cells(equal, tree)[0]
    assert (~ties[:4]).all() and ties[4:20].all()  # the lower number first


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_other_division_of_as_many_cells_leaves_less(seed):
    """Against all of them: each large cell of four is whole, or some of its quarters are divided."""
    tree, errors = CellTree(8, 8), torch.from_numpy(np.random.default_rng(seed).exponential(size=(1, 20)) ** 2)
    errors[:, :4] += errors[:, tree.children[:4]].sum(2)
    options = [[(0, float(errors[0, large]))] for large in range(4)]
    for large, children in enumerate(tree.children[:4]):
        rest = sorted(errors[0, children].tolist(), reverse=True)
        options[large] += [(1 + count, sum(rest[count:])) for count in range(5)]
    left = {}
    for choice in itertools.product(*options):
        divisions = sum(count for count, _ in choice)
        left[divisions] = min(left.get(divisions, math.inf), sum(error for _, error in choice))
    chosen = choose_cells(errors, tree)[0, :20]
    found = float(errors[0][chosen].sum())
    assert left[4] - 1e-9 <= found <= left[3]
    assert found <= 1.1 * left[4]


def test_what_is_left_of_a_block_is_its_low_corner():
    images = textured(2, 4)
    found = low_corner(images, 28, PATCH)
    block = images[1, :28, 28:56].numpy()
    coefficients = scipy.fft.dctn(block, axes=(0, 1), norm="ortho")
    energy = (coefficients**2).sum()
    coefficients[PATCH:], coefficients[:, PATCH:] = 0, 0
    expected = scipy.fft.idctn(coefficients, axes=(0, 1), norm="ortho")
    np.testing.assert_allclose(found[1, :28, 28:56], expected, atol=1e-9)
    lost = (block**2).sum() - (coefficients**2).sum()
    assert 0.5 * energy > lost > 0
    assert float((images - found)[1, :28, 28:56].square().sum()) == pytest.approx(lost)
    assert low_corner(images, PATCH, PATCH) is images


def test_errors_are_energy_beyond_the_corner_of_cells_that_can_be_divided():
    """Of 6 x 10: two large cells, then 15 middle ones."""
    images = textured(6, 10)
    errors = cell_errors(images, PATCH)
    assert errors.shape == (2, 17)
    for number, side, row, column in [(1, 28, 0, 56), (2 + 5 + 3, 14, 28, 84)]:
        cell = images[1, row : row + 2 * side, column : column + 2 * side].numpy()
        blocks = cell.reshape(2, side, 2, side, 3).transpose(0, 2, 1, 3, 4)
        coefficients = scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho")
        lost = (coefficients**2).sum() - (coefficients[:, :, :PATCH, :PATCH] ** 2).sum()
        assert float(errors[1, number]) == pytest.approx(lost)


def test_small_cells_lie_on_the_detail():
    tree, image = CellTree(8, 8), torch.full((1, 112, 112, 3), 250.0)
    image[:, 60:80, 4:24] = 255 * (torch.rand(20, 20, 1, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    places = sides_by_place(choose_cells(cell_errors(image, PATCH), tree, least=1.0)[0], tree)
    assert (places[4:6, :2] == 1).all() and (places[:4] == 4).all() and (places[:, 4:] == 4).all()
    even = low_corner(torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(0)), 28, 12)
    places = sides_by_place(choose_cells(cell_errors(even, PATCH), tree)[0], tree)
    assert (places == 2).all()  # detail everywhere, about as much as x4 shows


@pytest.mark.parametrize("name", ["exact", "x4", "x16"])
def test_blocks_of_all_sizes_have_the_weights_of_one_folded_model(name):
    """Small blocks give what `exact` gives, middle ones what `x4` gives, large ones what `x16` gives."""
    variant, x4 = make_variant(name, PATCH), make_variant("x4", PATCH)
    weight = torch.randn(5, 3, 2, PATCH, PATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = torch.randint(0, 256, (1, 1, 112, 112, 3), dtype=torch.uint8)
    expected = Encoder(variant, (112, 112), 1).encode(frames).double() @ folded(weight, variant).T
    encoder = MixedEncoder(make_task("reading"), "cpu", PATCH)
    level = SIDES.index(variant.side // PATCH)
    tokens = encoder._tokens(frames[:, 0].float() - 128, SIDES[level], encoder.matrices[level], encoder.shifts[level])
    torch.testing.assert_close(tokens.flatten(1, 2).double() @ folded(weight, x4).T, expected, rtol=1e-4, atol=1e-4)


def folded(weight: torch.Tensor, variant) -> torch.Tensor:
    """float64 [E, K]"""
    return fold_patch_embedding(weight, variant.config, tuple(weight.shape[2:])).flatten(1).double()


def test_a_token_of_a_middle_block_is_that_of_x4_and_others_are_of_its_zoomed_image():
    """Blocks that a DCT has enlarged or reduced to 14 px: the same low frequencies, at the same mean."""
    config = make_variant("x4", PATCH).config
    rng = np.random.default_rng(0)
    for side in (7, 28):
        block, shared = rng.uniform(-1, 1, (3, side, side)), min(side, 14)
        zoomed = np.zeros((3, 14, 14))
        zoomed[:, :shared, :shared] = scipy.fft.dctn(block, axes=(1, 2), norm="ortho")[:, :shared, :shared] * 14 / side
        zoomed = scipy.fft.idctn(zoomed, axes=(1, 2), norm="ortho")
        assert zoomed.mean() == pytest.approx(block.mean())
        found, expected = (zoomed_matrix(config, len(one[0])) @ one.ravel() for one in (block, zoomed))
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert np.abs(found).max() > 0.01
    encoder = Encoder(make_variant("x4", PATCH), (112, 112), 1)
    np.testing.assert_allclose(zoomed_matrix(config, 14).T, encoder.matrix, atol=1e-6)


@pytest.fixture(scope="module")
def exact() -> Trainer:
    return Trainer(replace(SETTINGS, variant="exact"))


@pytest.fixture(scope="module")
def mixed(exact) -> Trainer:
    """From the pixel model."""
    return Trainer(SETTINGS, start=exact.pixel_state())


def test_tokens_say_their_size_and_place(mixed):
    tree = mixed.encoder.tree
    frames = mixed.source.batch("test", 0, 0, 2).frames
    frames[:, :, :56, :56] = 200  # flat: a large cell
    tokens = mixed.encoder.encode(frames)
    assert tokens.shape == (2, 4 * 16, 441 + 3 + 2) and mixed.num_floats == 444
    sizes, places = tokens[..., 441:444].unflatten(1, (-1, 4)), tokens[..., 444:].unflatten(1, (-1, 4))
    assert (sizes.sum(3) == 1).all() and (sizes == sizes[:, :, :1]).all()
    assert sizes[0, 0, 0].tolist() == [1, 0, 0]
    assert places[0, 0].tolist() == [[1.5, 1.5], [1.5, 5.5], [5.5, 1.5], [5.5, 5.5]]
    small = int(sizes[0, :, 0, 2].nonzero()[0])
    (top, left) = places[0, small, 0].tolist()
    assert places[0, small].tolist() == [[top, left], [top, left + 1], [top + 1, left], [top + 1, left + 1]]
    layout = mixed.layout_of(tokens)
    before, visual = len(layout.prefix), layout.positions[:, 0, len(layout.prefix) :][:, : tree.budget]
    assert (visual[0] == before).all() and (visual[1:, 0] - before).tolist() == [1.5, 1.5]
    assert (visual[1:, small] - before).tolist() == [top / 2, left / 2]
    assert layout.positions[:, 0, before + tree.budget].tolist() == [before + 8.0] * 3
    order = in_reading_order(choose_cells(cell_errors(frames[:, 0].float() - 128, PATCH), tree), tree)
    firsts = (tree.corners[order] * torch.tensor([tree.columns, 1])).sum(2)
    assert (firsts.diff(dim=1) > 0).all() and order.shape == (2, 16)


@torch.no_grad()
def test_small_cells_alone_are_the_pixel_model(exact, mixed):
    """As many as `exact` has: the same answers, so that sizes, weights, places and order are right."""
    batch = exact.source.batch("test", 0, 0, 2)
    encoder, small = mixed.encoder, SIDES.index(1)
    tokens = encoder._tokens(batch.frames[:, 0].float() - 128, 1, encoder.matrices[small], encoder.shifts[small])
    marks = encoder.marks[encoder.tree.sides == 1].expand(2, -1, -1, -1)
    tokens = torch.cat([tokens, marks], dim=3).flatten(1, 2)
    layout = replace(mixed.layout_of(tokens), grid=exact.layout.grid)
    given = (batch.question, batch.answer)
    found = answer_logits(mixed.model, layout, tokens, *given)
    expected = answer_logits(exact.model, exact.layout, exact.encoder.encode(batch.frames), *given)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    moved = tokens.clone()
    moved[..., -1] += 3 * torch.arange(tokens.shape[1])
    other = answer_logits(mixed.model, replace(mixed.layout_of(moved), grid=exact.layout.grid), moved, *given)
    assert (other - expected).abs().max() > 0.01  # places count


def test_a_size_is_learned_from_zero(exact):
    trainer = Trainer(SETTINGS, start=exact.pixel_state())
    weight = trainer.model.visual.patch_embed.proj.weight
    assert not weight[:, 441:].any() and weight.shape[1] == 444
    assert math.isfinite(trainer.step(0).item()) and weight[:, 441:].any()
    scratch = Trainer(SETTINGS)
    assert not scratch.model.visual.patch_embed.proj.weight[:, 441:].any()


def test_it_also_starts_from_a_model_of_x4():
    x4 = Trainer(replace(SETTINGS, variant="x4"))
    weight = Trainer(SETTINGS, start=x4.pixel_state()).model.visual.patch_embed.proj.weight
    assert torch.equal(weight[:, :441], x4.model.visual.patch_embed.proj.weight)


@torch.no_grad()
def test_compiled_layers_compute_the_same(mixed, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled(layer, backend="eager", **options))
    batch = mixed.source.batch("train", 0, 0, 2)
    tokens = mixed.encoder.encode(batch.frames)
    given = (mixed.model, mixed.layout_of(tokens), tokens, batch.question, batch.answer)
    found = answer_logits(*given, compiled_layers.__wrapped__())
    torch.testing.assert_close(found, answer_logits(*given), rtol=1e-4, atol=1e-4)


def test_a_run_has_as_many_tokens_as_x4(tmp_path):
    result = run(SETTINGS, Output.at(tmp_path, "single"))
    assert result["finished"] and result["visual_tokens"] == 16 and result["generation"] is None
    assert result["floats_per_token"] == 444 and isinstance(Trainer(SETTINGS).layout, Layout)


def test_videos_are_refused():
    with pytest.raises(UserError, match="is for images, task still-motion has videos"):
        Trainer(replace(SETTINGS, task="still-motion"))


def test_the_suite_starts_all_from_one_pixel_model_for_each_kind_of_image():
    runs = SUITES["mixed"](Plan(1200))
    starts = {run.name: run for run in runs if run.save}
    assert [(run.task, run.knobs) for run in starts.values()] == [
        ("page-reading", {}),
        ("page-reading", {"whole": 224}),
        ("reading", {}),
    ]
    assert {(run.variant, run.steps, run.batch) for run in starts.values()} == {("exact", 1800, 128)}
    tuned = [run for run in runs if not run.save]
    assert len(tuned) == 3 * 4 and {run.seed for run in tuned} == {0}
    assert all(starts[run.start_from].knobs == run.knobs for run in tuned)


def test_pages_gain_where_most_is_white_and_where_all_is_printed_nothing():
    """A sparse page shows all in small cells; a full one is left as x4 has it."""
    sparse, dense = (
        mixed_picture.gain_of("page", "drawn", mixed_picture.printed((336, 336), area, 13, 18))
        for area in ((20, 20, 110, 60), (2, 2, 334, 334))
    )
    assert sparse.step0_mixed - sparse.step0_x4 > 20 and sparse.tokens <= 36 and sparse.exact_skip < 1
    assert dense.step0_mixed == dense.step0_x4 and dense.tokens == 36 and dense.exact_skip > 3
    assert dense.shares == (0, 1, 0) and sum(sparse.shares) == pytest.approx(1)
    assert dense.held_mixed == dense.held_x4 > dense.step0_x4 + 10
    head, rule, *rows = mixed_picture.table([sparse, dense])
    assert {line.count("|") for line in (head, rule, *rows)} == {13} and "+0.0" in rows[1]


def test_the_study_of_images_runs(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("dct_qwen2vl.analysis.natural_images.IMAGES", {})
    monkeypatch.setattr(mixed_picture, "pages", dict)
    file = tmp_path / "photograph.png"
    Image.fromarray(textured(10, 12)[0].clamp(0, 255).byte().numpy()).save(file)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    assert mixed_picture.main(["--images", str(file), str(bad), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert f"skipped {bad}" in printed and "| photograph | photograph.png | 112 x 112 | 4 |" in printed
    (gain,) = json.loads((tmp_path / "out.json").read_text())
    assert gain["step0_mixed"] >= gain["step0_x4"] > 10
