"""A widened tower computes what the narrower one computes, and learns on as a wider one. Drawn towers have values of
the same size at any width. The suites of real sizes."""

from dataclasses import replace

import pytest
import test_quality_runs
import torch

from benchmarks.quality import run_experiments, runs
from benchmarks.quality.model import Layout, answer_logits, build_model, encode_vision
from benchmarks.quality.result_files import Output
from benchmarks.quality.run_experiments import chosen, part_of, to_do
from benchmarks.quality.settings import ModelSize, Settings
from benchmarks.quality.suites import SEEDS, Plan, real, wide
from benchmarks.quality.trainer import Trainer
from benchmarks.quality.variants import make_variant
from benchmarks.quality.widening import widened_tower

GRID = (2, 4, 4)
NARROW = ModelSize(160, 2, 128, 1)  # two heads
TINY = replace(test_quality_runs.TINY, variant="exact", steps=2, generated=0, save=True)


def trained_like(size: ModelSize):
    """A model whose gains and biases are no longer those that every model begins with."""
    model = build_model(size, 12, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.visual.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def of_state(size: ModelSize, state):
    model = build_model(size, 12, seed=9).double()
    model.load_state_dict(state)
    return model


def a_batch(model):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 32, 12, generator=generator, dtype=torch.float64)
    question, answer = (torch.randint(9, 40, (2, length), generator=generator) for length in (1, 5))
    return Layout.build(model, GRID, True, 1, 5), tokens, question, answer


@pytest.mark.parametrize("times", [2, 3, 4])
def test_a_widened_tower_computes_the_same(times):
    narrow = trained_like(NARROW)
    size = replace(NARROW, vision_width=times * NARROW.vision_width)
    wider = of_state(size, widened_tower(narrow.state_dict(), size.vision_width))
    assert wider.visual.blocks[0].attn.num_heads == times * narrow.visual.blocks[0].attn.num_heads
    layout, tokens, question, answer = a_batch(narrow)
    seen = encode_vision(narrow, tokens, layout)
    torch.testing.assert_close(encode_vision(wider, tokens, layout), seen, rtol=1e-9, atol=1e-9)
    logits = [answer_logits(model, layout, tokens, question, answer) for model in (narrow, wider)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    assert seen.std() > 0.1


def test_the_same_holds_within_each_block():
    narrow = trained_like(NARROW)
    wider = of_state(replace(NARROW, vision_width=320), widened_tower(narrow.state_dict(), 320))
    inside = {}
    for model in (narrow, wider):
        for block in model.visual.blocks:
            block.register_forward_hook(
                lambda module, given, said, model=model: inside.setdefault(model, []).append(said)
            )
        _, tokens, _, _ = a_batch(model)
        pixels, grid = tokens.flatten(0, 1), torch.tensor([GRID] * 2)
        model.visual(pixels, grid)
    for one, two in zip(inside[narrow], inside[wider], strict=True):
        torch.testing.assert_close(two, one.repeat(1, 2), rtol=1e-9, atol=1e-9)  # head by head, copies side by side


def test_copies_grow_apart():
    wider = of_state(replace(NARROW, vision_width=320), widened_tower(trained_like(NARROW).state_dict(), 320))
    layout, tokens, question, answer = a_batch(wider)
    answer_logits(wider, layout, tokens, question, answer).logsumexp(-1).sum().backward()
    for name, parameter in wider.visual.named_parameters():
        if name not in ("merger.mlp.2.bias", "merger.mlp.2.weight"):
            parts = 3 if "qkv" in name else 1
            one, two = parameter.grad.unflatten(0, (parts, 2, -1)).unbind(1)
            assert (one - two).norm() > 1e-3 * one.norm(), name


def test_a_tower_as_wide_stays_and_one_that_is_no_multiple_is_refused():
    state = trained_like(NARROW).state_dict()
    assert widened_tower(state, 160) is state
    with pytest.raises(
        ValueError, match="a tower 160 wide cannot become 240 wide: choose a multiple of 160 as --vision"
    ):
        widened_tower(state, 240)


def test_a_run_goes_on_with_a_wider_tower(tmp_path):
    output = Output.at(tmp_path, "wide")
    narrow = runs.run(TINY, output)
    wider = replace(TINY, size=ModelSize(240, 1, 64, 1), start_from=TINY.name)
    curve = runs.run(wider, output)["curve"]
    assert (curve[0]["step"], curve[0]["accuracy"]) == (0, narrow["curve"][-1]["accuracy"])
    embedding = torch.load(output.model(wider.name), weights_only=True)["visual.patch_embed.proj.weight"]
    assert embedding.shape[:2] == (240, 3 * 2 * 7**2)
    assert torch.linalg.matrix_rank(embedding.flatten(1)) > 80  # no longer copies


@pytest.mark.parametrize("width", [160, 320, 640])
def test_drawn_by_inputs_a_tower_of_any_width_gives_values_of_the_same_size(width):
    sizes = {}
    for spread in ("inputs", "language"):
        trainer = Trainer(replace(TINY, size=ModelSize(width, 1, 64, 1), tower_spread=spread))
        tokens = trainer.encoder.encode(next(trainer._fit_frames()))
        seen = encode_vision(trainer.model, tokens, trainer.layout)
        sizes[spread] = seen.square().mean().sqrt().item()
    assert 0.4 < sizes["inputs"] < 1
    assert sizes["language"] / sizes["inputs"] == pytest.approx(4 * width / 64, rel=0.3)  # the merger's two matrices


def test_a_later_field_leaves_the_names_of_finished_results():
    assert Settings(task="reading", variant="x4").name == "reading_x4_seed0_765fe249"
    assert replace(TINY, tower_spread="inputs").name != TINY.name


def test_x4_588_has_as_many_floats_as_the_half_size_image_and_all_vary_in_a_still():
    for patch in (7, 14):
        config = make_variant("x4-588", patch).config
        assert config.num_coefficients == 3 * patch**2 and config.block == (2, 2 * patch, 2 * patch)
        assert all(index % (2 * (2 * patch) ** 2) < (2 * patch) ** 2 for index in config.kept)


@pytest.mark.parametrize("tiny", [True, False])
def test_the_suites_of_real_sizes_share_their_pixel_model(tiny):
    plan = Plan(3, tiny=tiny)
    scratch, narrow, widened, loud = wide(plan)
    start, *tuned = real(plan)
    assert start == scratch and narrow.size.vision_width * (2 if tiny else 4) == scratch.size.vision_width
    assert (widened.start_from, loud.tower_spread) == (narrow.name, "language")
    assert replace(widened, start_from=None, steps=6) == scratch and loud == replace(
        scratch, tower_spread="language", save=False
    )
    assert {run.start_from for run in tuned} == {start.name} and not any(run.save for run in tuned)
    assert [run.variant for run in tuned] == ["quarter", "x4", "x4-588"] * 3 + ["exact"] * 3
    assert [run.seed for run in tuned] == [0, 0, 0, 1, 1, 1, 2, 2, 2, *SEEDS]
    assert len({run.name for run in (*wide(plan), *tuned)}) == 4 + len(tuned)


def test_what_starts_from_a_start_brings_both(tmp_path):
    _, narrow, widened, _ = wide(Plan(3, tiny=True))
    tuned = replace(widened, variant="x4", start_from=widened.name, save=False)
    suite = (narrow, widened, tuned)
    assert chosen((*suite, replace(narrow, seed=1)), {"variant": ["x4"]}) == list(suite)
    assert [part_of(suite, part, 2) for part in (1, 2)] == [list(suite), []]
    output = Output.at(tmp_path, "wide")
    for settings in (narrow, widened):  # results alone, no models
        output.record({"name": settings.name, "finished": True})
    assert to_do(suite, output) == list(suite)
    assert to_do(suite[:2], output) == []


def test_the_suite_runs_from_the_command_line_and_goes_on(tmp_path, capsys):
    command = ["--suite", "wide", "--tiny", "--steps", "1", "--batch", "2", "--part", "2/3"]
    command += ["--device", "cpu", "--output", str(tmp_path)]
    assert run_experiments.main(command) == 0
    said = capsys.readouterr().out
    assert "| step 2/2 |" in said and "| step 1/1 |" in said  # the narrow tower, then the widened one
    assert run_experiments.main(command) == 0
    assert "step 1/1" not in capsys.readouterr().out
