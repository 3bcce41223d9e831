"""The study of skipping: its rule is the tokenizer's, masks compute what leaving out computes, tokens are equal."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.quality import run_experiments
from benchmarks.quality.model import (
    PLAIN,
    Layout,
    answer_logits,
    build_model,
    compiled_layers,
    generate_skipping,
)
from benchmarks.quality.result_files import read_file
from benchmarks.quality.settings import ModelSize, Settings
from benchmarks.quality.skipping import (
    LEFT_OUT,
    NAMES,
    CellRule,
    SkippingEncoder,
    make_encoder,
    nearest_grid,
    steps_shown,
    with_ring,
)
from benchmarks.quality.suites import SUITES, Plan
from benchmarks.quality.tasks import fixed_camera
from benchmarks.quality.tasks.registry import Source, make_task
from benchmarks.quality.trainer import Trainer
from benchmarks.quality.variants import make_variant
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.data.kept_cells import given_positions
from dct_qwen2vl.data.media_embedding import embed_media
from dct_qwen2vl.dct.skipping_dct import kept_cells

SMALL = ModelSize(80, 2, 64, 1)
SETTINGS = Settings(
    task="still-flashes", variant="x4-skip", steps=2, batch=4, size=SMALL, probe=4, test=8, fit=8, generated=2
)


def encoder_of(name: str, task, frames: torch.Tensor | None = None):
    return make_encoder(name, task, "cpu", 7, None, lambda: [frames])


@pytest.fixture(scope="module", params=[task.name for task in fixed_camera.TASKS])
def source(request) -> Source:
    return Source(make_task(request.param), "cpu")


@pytest.fixture(scope="module")
def frames(source) -> torch.Tensor:
    return source.batch("fit", 0, 0, 4).frames


def test_the_rule_is_that_of_the_tokenizer(source, frames):
    encoder = encoder_of("x4-skip", source.task)
    tokens = encoder.encode(frames)
    kept = encoder.choose(tokens)
    assert torch.equal(kept.tower, kept.language)
    expected = torch.stack([kept_cells(sample, encoder.grid, encoder.variant.config, 38.0) for sample in tokens])
    assert torch.equal(kept.tower, expected.flatten(1)) and 0.05 < expected.float().mean() < 0.7


def test_so_it_is_for_flat_and_moving_images():
    """Flat areas of several colours that end within cells, noise that lies about the threshold."""
    rng = np.random.default_rng(0)
    frames = np.full((3, 8, 112, 140, 3), 200.0) + rng.normal(0, 3.9, (3, 8, 112, 140, 3))
    frames[:, :, 50:90, 70:] = 120
    frames[:, 4:, :30, 60:100] += 40
    frames = torch.from_numpy(frames.clip(0, 255).astype(np.uint8))
    task = make_task("still-flashes", {"seconds": 8})
    encoder = SkippingEncoder("x4-skip", make_variant("x4", 7), task, "cpu")
    encoder.grid = (4, 8, 10)
    encoder.rule = CellRule(encoder.variant.config, encoder.grid, "cpu")
    tokens = encoder.encode(frames)
    expected = torch.stack([kept_cells(sample, encoder.grid, encoder.variant.config, 38.0) for sample in tokens])
    assert torch.equal(encoder.choose(tokens).tower, expected.flatten(1))
    assert 0.1 < expected[:, 0].float().mean() < 0.9 and 0.1 < expected[:, 1:].float().mean() < 0.9
    noisy = expected[:, 1:, :2, :1]  # still but for the noise, some of which is over the threshold
    assert noisy.any() and not noisy.all()


def test_evs_keeps_the_first_step_and_as_many_cells(source, frames):
    skip, late = (encoder_of(name, source.task) for name in ("x4-skip", "x4-evs"))
    tokens = skip.encode(frames)
    expected, kept = skip.choose(tokens).language, late.choose(tokens)
    assert kept.tower.all()
    if skip.still:
        assert torch.equal(kept.language, expected)
        return
    cells = math.prod(skip.grid[1:]) // 4
    assert kept.language.sum(1).tolist() == expected.sum(1).clamp(min=cells).tolist()
    assert kept.language[:, :cells].all()
    errors = late.rule.error(late.rule.cells(tokens)[:, 1:], late.rule.cells(tokens)[:, :-1]).flatten(1)
    chosen = kept.language[:, cells:]
    for error, one in zip(errors, chosen):
        assert not one.any() or error[one].min() >= error[~one].max()


def test_a_ring_and_a_refreshed_step():
    kept = torch.zeros(1, 2, 4, 5, dtype=torch.bool)
    kept[0, 0, 0, 0] = kept[0, 1, 2, 2] = True
    ring = with_ring(kept)[0]
    assert ring[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and ring[1].sum() == 9
    task = make_task("still-flashes")
    frames = Source(task, "cpu").batch("fit", 0, 0, 2).frames
    plain, refreshed = (encoder_of(name, task) for name in ("x4-skip", "x4-skip-refresh"))
    tokens = plain.encode(frames)
    before, after = (one.choose(tokens).tower.unflatten(1, (12, 16)) for one in (plain, refreshed))
    assert after[:, ::4].all() and torch.equal(after[:, [1, 2, 3, 5]], before[:, [1, 2, 3, 5]])
    third = encoder_of("x4-third", task).choose(tokens).language.unflatten(1, (12, 16))
    assert third[:, ::3].all() and third.sum() == third[:, ::3].numel()


def test_a_token_says_for_how_many_steps_it_stands():
    kept = torch.tensor([[[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    assert steps_shown(kept)[kept].tolist() == [3, 1, 2, 3, 2, 1]
    task = make_task("still-flashes")
    frames = Source(task, "cpu").batch("fit", 0, 0, 2).frames
    plain, aged = (encoder_of(name, task) for name in ("x4-skip", "x4-skip-age"))
    tokens, longer = plain.encode(frames), aged.encode(frames)
    cells = plain.choose(tokens).tower
    assert torch.equal(longer[..., :441], tokens) and torch.equal(aged.choose(longer).tower, cells)
    ages = longer[..., 441:].argmax(-1).add(1).view(2, 12, 16, 4)
    assert longer.shape[-1] == 441 + 12 and (longer[..., 441:].sum(-1) == 1).all() and (ages == ages[..., :1]).all()
    stands = (ages[..., 0] * cells.view(2, 12, 16)).sum(1)  # each place, once it is kept, is shown until the end
    first = cells.view(2, 12, 16).int().argmax(1)
    assert torch.equal(stands, torch.where(cells.view(2, 12, 16).any(1), 12 - first, 0))


def test_a_model_of_ages_begins_as_one_without():
    start = Trainer(replace(SETTINGS, variant="x4")).pixel_state()
    plain, aged = (Trainer(replace(SETTINGS, variant=name), start=start) for name in ("x4-skip", "x4-skip-age"))
    assert torch.equal(plain.test(4)[0], aged.test(4)[0]) and aged.asked_otherwise(4) is None
    embedding = aged.model.state_dict()[PATCH_EMBEDDING]
    assert not embedding[:, 441:].any() and embedding.shape[1] == 453
    aged.step(0)
    assert aged.model.state_dict()[PATCH_EMBEDDING][:, 441:].any()


@pytest.mark.parametrize("name", ["x4-slow", "x4-small"])
def test_the_usual_ways_have_about_as_many_tokens(name, source, frames):
    if source.task.duration == 1 and name == "x4-slow":
        with pytest.raises(ValueError, match="needs a video"):
            encoder_of(name, source.task, frames)
        return
    skip, other = (encoder_of(each, source.task, frames) for each in ("x4-skip", name))
    share = skip.choose(skip.encode(frames)).language.float().mean().item()
    tokens = other.encode(frames)
    assert tokens.shape[1:] == (other.tokens, skip.variant.config.num_coefficients)
    assert abs(other.tokens / skip.tokens - share) < 0.07


def test_fewer_frames_are_spread_evenly():
    task = make_task("still-flashes")
    frames = torch.arange(24, dtype=torch.uint8)[None, :, None, None, None].expand(1, 24, 112, 112, 3)
    encoder = encoder_of("x4-skip", task)
    slow = type(encoder_of("x4-slow", task, Source(task, "cpu").batch("fit", 0, 0, 1).frames))
    reduced = slow("x4-slow", encoder.variant, task, "cpu", share=0.25)
    assert reduced.frames.tolist() == [2, 6, 10, 14, 18, 22] and reduced.grid == (3, 8, 8)
    assert reduced.encode(frames).shape == (1, 192, 441)


@pytest.mark.parametrize(
    ("cells", "grid"), [(0.4, (1, 1)), (1.6, (1, 2)), (4.2, (2, 2)), (5.5, (2, 3)), (7.9, (3, 3)), (24, (5, 5))]
)
def test_the_nearest_grid(cells, grid):
    assert nearest_grid(cells) == grid


def left_out_logits(model, layout: Layout, tokens, kept, question, answer) -> torch.Tensor:
    """One sample, its cells really left out: the logits at the places of the answer and the end."""
    before, length = len(layout.prefix), kept.shape[0]
    ids = torch.cat([layout.prompt(question), answer], dim=1)[0]
    present = torch.ones_like(ids, dtype=torch.bool)
    present[before : before + length] = kept
    names = ("pixel_values_videos", "video_grid_thw", "video_kept")
    media = dict(zip(names, (tokens[0][kept.repeat_interleave(4)], torch.tensor([layout.grid]), kept)))
    inputs = embed_media(model, {"input_ids": ids[present][None], **media})
    positions = layout.positions[:, :, : len(ids)][:, :, present]
    return model(**inputs, position_ids=positions).logits[:, -answer.shape[1] - 1 :]


@torch.no_grad()
def test_masked_cells_compute_what_cells_left_out_compute():
    """Also with a step that keeps nothing."""
    random = torch.Generator().manual_seed(0)
    model = build_model(ModelSize(160, 2, 128, 2), 12, seed=1).eval()
    layout = Layout.build(model, (4, 4, 6), True, 2, 5)
    tokens = torch.randn(3, 96, 12, generator=random)
    question, answer = (torch.randint(9, 40, (3, length), generator=random) for length in (2, 5))
    kept = torch.rand(3, 24, generator=random) < 0.4
    kept[:, 0], kept[0, 12:18] = True, False
    masked = answer_logits(model, layout, tokens, question, answer, tower_kept=kept, language_kept=kept)
    for number in range(3):
        one = slice(number, number + 1)
        wanted = left_out_logits(model, layout, tokens[one], kept[number], question[one], answer[one])
        torch.testing.assert_close(masked[one], wanted, rtol=1e-4, atol=1e-4)
    whole = answer_logits(model, layout, tokens, question, answer)
    everything = torch.ones_like(kept)
    same = answer_logits(model, layout, tokens, question, answer, tower_kept=everything, language_kept=everything)
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-4)
    assert (masked - whole).abs().max() > 0.01
    late = answer_logits(model, layout, tokens, question, answer, tower_kept=everything, language_kept=kept)
    assert (late - masked).abs().max() > 0.001 and (late - whole).abs().max() > 0.01


def test_generation_leaves_cells_out():
    random = torch.Generator().manual_seed(0)
    model = build_model(SMALL, 12, seed=1).eval()
    model.generation_config.eos_token_id = None
    layout = Layout.build(model, (3, 4, 4), True, 1, 5)
    tokens, question = torch.randn(2, 48, 12, generator=random), torch.full((2, 1), 9)
    kept = torch.rand(2, 12, generator=random) < 0.5
    kept[:, 0] = True
    said = generate_skipping(model, layout, tokens, kept, question, 5)
    masked = answer_logits(model, layout, tokens, question, said, tower_kept=kept, language_kept=kept)
    assert torch.equal(masked[:, :-1].argmax(-1), said)
    with given_positions(model, layout.positions):
        assert "get_rope_index" in vars(model)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_variant_sees_goes_into_its_step(name):
    """Cells that are left out change nothing, whatever they hold."""
    trainer = Trainer(replace(SETTINGS, variant=name))
    batch = trainer.source.batch("train", 0, 0, 2)
    tokens = trainer.encoder.encode(batch.frames)
    cells = trainer.cells(tokens)
    changed = tokens.clone()
    changed[~cells[0].repeat_interleave(4, dim=1)] = 5.0
    losses = [trainer._loss(one, batch.question, batch.answer, *cells).item() for one in (tokens, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (cells[0].all() and not cells[1].all()) if name == "x4-evs" else not cells[0].all()


@pytest.mark.parametrize(
    ("name", "shares"),
    [("x4-skip", (1, 1)), ("x4-skip-half", (0.5, 0.5)), ("x4-skip-most", (0.8, 0.8)), ("x4-skip-then-all", (1, 0))],
)
def test_some_training_samples_keep_all_cells(name, shares):
    """In the first and the last of six steps, again the same in a run that begins again. Tested is what is skipped."""
    trainer, again = (Trainer(replace(SETTINGS, variant=name, steps=6)) for _ in range(2))
    tokens = trainer.encoder.encode(trainer.source.batch("train", 0, 0, 4).frames).repeat(32, 1, 1)
    skipped = trainer.cells(tokens)
    for number, share in zip((0, 5), shares):
        cells = trainer.training_cells(tokens, number)
        whole = cells[0].all(1)
        assert torch.equal(cells[0], cells[1]) and torch.equal(cells[0][~whole], skipped[0][~whole])
        assert 1 - whole.float().mean() == pytest.approx(share, abs=0.15 if 0 < share < 1 else 0)
        assert torch.equal(again.training_cells(tokens, number)[0], cells[0])
    if 0 < shares[0] < 1:
        assert not torch.equal(trainer.training_cells(tokens, 0)[0], trainer.training_cells(tokens, 1)[0])
    assert torch.equal(trainer.cells(tokens)[0], SkippingEncoder("x4-skip", *rest_of(trainer)).choose(tokens).tower)


def rest_of(trainer: Trainer) -> tuple:
    return trainer.encoder.variant, trainer.task, "cpu"


def test_what_a_step_learns_from_is_what_its_samples_keep(monkeypatch):
    trainer, seen = Trainer(replace(SETTINGS, variant="x4-skip-then-all", steps=6)), []
    monkeypatch.setattr(trainer, "_optimize", lambda *inputs: seen.append(inputs) or torch.zeros(()))
    for number in (0, 5):
        trainer.step(number)
    first, last = (inputs[3] for inputs in seen)
    assert not first.all(1).any() and last.all()


def test_layers_with_masks_are_compiled_once_for_all_that_leave_out_cells(monkeypatch):
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled(layer, backend=counter, **options))
    torch.compiler.reset()
    layers = compiled_layers.__wrapped__()  # past its cache
    for name, graphs in (("x4", 2), ("x4-skip", 4), ("x4-skip-refresh", 4), ("x4-evs", 4)):
        trainer = Trainer(replace(SETTINGS, variant=name))
        batch = trainer.source.batch("train", 0, 0, 2)
        tokens = trainer.encoder.encode(batch.frames)
        given, cells = (trainer.model, trainer.layout, tokens, batch.question, batch.answer), trainer.cells(tokens)
        plain = answer_logits(*given, PLAIN, *cells)
        torch.testing.assert_close(answer_logits(*given, layers, *cells), plain, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == graphs


def test_others_do_not_start_from_a_model_of_tokens(tmp_path):
    trainer = Trainer(replace(SETTINGS, variant="x4"))
    start = trainer.pixel_state()
    same = Trainer(SETTINGS, start=start).model.state_dict()
    assert all(torch.equal(same[name], value) for name, value in start.items())
    with pytest.raises(UserError, match="variant exact cannot start from a model of x4"):
        Trainer(replace(SETTINGS, variant="exact"), start=start)


def test_a_suite_of_skipping_tells_how_models_do_when_asked_otherwise(tmp_path, capsys):
    words = ["--suite", "skipping", "--output", str(tmp_path), "--tiny", "--steps", "2", "--tasks", "page-reading"]
    variants = ["x4", "x4-skip", "x4-skip-half"]
    assert run_experiments.main([*words, "--seeds", "0", "--variants", *variants, "--batch", "4"]) == 0
    lines = read_file(tmp_path / "skipping.jsonl").values()
    results = {line["settings"]["variant"]: line for line in lines if line["settings"]["start_from"]}
    (start,) = [line for line in lines if not line["settings"]["start_from"]]
    for result in results.values():
        assert result["curve"][0]["step"] == 0 and result["settings"]["start_from"] == start["name"]
    assert results["x4"]["curve"][0]["accuracy"] == start["curve"][-1]["accuracy"]
    for name, result in results.items():
        own = "x4" if name == "x4" else "x4-skip"
        assert result["finished"] and result["asked"][own] == pytest.approx(result["accuracy"])
        assert set(result["asked"]) == {"x4", "x4-skip"}
    assert results["x4"]["visual_tokens"] == 49 > results["x4-skip"]["visual_tokens"] > 10
    printed = capsys.readouterr().out
    table = printed[printed.index("| trained as | asked with all cells | asked with skipping |") :].splitlines()
    assert {line.split("|")[1].strip() for line in table[2:6]} == {"x4, start", *variants}
    assert "x4-skip - x4, all: over 64 images of seed 0" in printed


def test_the_suite_has_all_variants_of_all_tasks_but_a_rate_of_images():
    runs = SUITES["skipping_scratch"](Plan(1500))
    assert len(runs) == (4 * 5 + 4) * 3 and len({run.name for run in runs}) == len(runs)
    assert {run.variant for run in runs} <= {"x4", *NAMES}
    assert {(run.steps, run.batch, run.start_from) for run in runs} == {(1500, 128, None)}
    assert "x4-skip-half" not in {run.variant for run in runs}
    runs = SUITES["skipping"](Plan(600))
    starts = {run.name: run for run in runs if run.save}
    assert len(starts) == 5 and {(run.variant, run.steps) for run in starts.values()} == {("x4", 1800)}
    tuned = [run for run in runs if not run.save]
    assert len(tuned) == (4 * 8 + 7 + 4 + 3) * 3 and {run.steps for run in tuned} == {600}
    assert {run.task for run in tuned if run.variant == "x4-third"} == {"still-board"}
    assert {run.task for run in tuned if run.variant == "x4-skip-age"} == {"still-board", "still-flashes"}
    assert all(starts[run.start_from].task == run.task for run in tuned)
    long = SUITES["skipping_long"](Plan(600))
    assert {run.name for run in long if run.save} < set(starts) and len(long) == 2 + 2 * 3 * 3
    assert {(run.steps, starts[run.start_from].task == run.task) for run in long if not run.save} == {(1800, True)}
