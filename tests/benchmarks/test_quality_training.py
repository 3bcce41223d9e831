"""The experiments' model is Qwen2-VL, whichever way it is run; a run learns, repeats itself and is done once."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.quality import run_experiments, runs, train
from benchmarks.quality.model import (
    KERNELS,
    Layout,
    answer_logits,
    build_model,
    compiled_layers,
    generate,
    scale_patch_embedding,
)
from benchmarks.quality.result_files import Output, read_file
from benchmarks.quality.runs import run
from benchmarks.quality.settings import ModelSize, Settings
from benchmarks.quality.trainer import PATCH_EMBEDDING, Trainer, pixel_embedding
from benchmarks.quality.variants import Encoder, make_variant

SMALL = ModelSize(80, 1, 64, 1)
# Large digits, nearly fixed in their cells, on a CPU in seconds.
TRIVIAL = Settings(
    steps=4,
    batch=8,
    knobs={"size": 112, "cells": 4, "heights": [22], "noise": 0.0},
    size=SMALL,
    probe=8,
    test=16,
    fit=16,
    generated=2,
)


@pytest.fixture
def output(tmp_path) -> Output:
    return Output.at(tmp_path, "single")


def line_of(output: Output, settings: Settings) -> dict:
    """What the result file holds of a run."""
    return read_file(output.file)[settings.name]


def stock_logits(model, layout: Layout, tokens, question, answer) -> torch.Tensor:
    """Of `Qwen2VLForConditionalGeneration.forward`, at the places of the answer and the end."""
    ids = torch.cat([layout.prompt(question), answer], dim=1)
    kind = ("pixel_values_videos", "video_grid_thw") if layout.video else ("pixel_values", "image_grid_thw")
    media = dict(zip(kind, (tokens.flatten(0, 1), torch.tensor([layout.grid] * len(tokens)))))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits
    return logits[:, -answer.shape[1] - 1 :]


@pytest.mark.parametrize(("grid", "video"), [((1, 4, 4), False), ((3, 4, 4), True), ((1, 4, 8), False)])
def test_the_fast_way_computes_what_the_stock_model_computes(grid, video):
    generator = torch.Generator().manual_seed(0)
    model = build_model(ModelSize(160, 2, 128, 2), 12, seed=1)
    assert type(model) is Qwen2VLForConditionalGeneration
    layout = Layout.build(model, grid, video, 2, 6)
    tokens = torch.randn(3, grid[0] * grid[1] * grid[2], 12, generator=generator)
    question, answer = (torch.randint(9, 40, (3, length), generator=generator) for length in (2, 6))
    fast = answer_logits(model, layout, tokens, question, answer)
    torch.testing.assert_close(fast, stock_logits(model, layout, tokens, question, answer), rtol=1e-4, atol=1e-4)


def test_generation_says_what_the_fast_way_would():
    model = build_model(SMALL, 12, seed=1)
    layout = Layout.build(model, (1, 4, 4), False, 1, 5)
    tokens, question = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0)), torch.full((2, 1), 9)
    model.generation_config.eos_token_id = None
    said = generate(model, layout, tokens, question, 5)
    assert torch.equal(answer_logits(model, layout, tokens, question, said)[:, :-1].argmax(-1), said)


def test_variants_start_from_the_same_weights_and_the_same_size_of_values():
    tokens = {name: 7 * torch.randn(4, 16, floats) + 3 for name, floats in (("few", 5), ("many", 300))}
    models = {name: build_model(SMALL, value.shape[-1], seed=2) for name, value in tokens.items()}
    few, many = (dict(model.named_parameters()) for model in models.values())
    different = {name for name in few if few[name].shape != many[name].shape or not torch.equal(few[name], many[name])}
    assert different == {PATCH_EMBEDDING}
    for name, model in models.items():
        scale_patch_embedding(model, tokens[name])
        outputs = tokens[name] @ model.visual.patch_embed.proj.weight.flatten(1).T
        assert outputs.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_layers_are_compiled_once_for_all_models_of_a_shape(monkeypatch):
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled(layer, backend=counter, **options))
    torch.compiler.reset()
    layers = compiled_layers.__wrapped__()  # past its cache
    for variant, graphs in (("x4", 2), ("x4-floor", 2), ("exact", 4), ("x4-corner", 4), ("sixteenth", 6), ("x4", 6)):
        trainer = Trainer(replace(TRIVIAL, variant=variant, size=ModelSize(80, 2, 64, 3)))
        batch = trainer.source.batch("train", 0, 0, 2)
        tokens = trainer.encoder.encode(batch.frames)
        given = trainer.model, trainer.layout, tokens, batch.question, batch.answer
        torch.testing.assert_close(answer_logits(*given, layers), answer_logits(*given), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == graphs


def test_compiled_layers_hold_the_choice_of_kernels(monkeypatch):
    """Whatever the process has switched on when they are compiled, or had when the cache was filled."""
    graphs, compiled = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda layer, **options: compiled(layer, backend=keep, **options))
    torch.compiler.reset()
    trainer = Trainer(replace(TRIVIAL, variant="x4", size=ModelSize(80, 2, 64, 3)))
    batch = trainer.source.batch("train", 0, 0, 2)
    tokens = trainer.encoder.encode(batch.frames)
    layers = compiled_layers.__wrapped__()
    answer_logits(trainer.model, trainer.layout, tokens, batch.question, batch.answer, layers)
    assert len(graphs) == 2
    for graph in graphs:
        before = graph[: graph.index("scaled_dot_product_attention(")]
        assert {name for name in KERNELS if name.name in before} == set(KERNELS) and "CUDNN" not in before


def test_what_the_half_size_image_does_not_show_starts_at_zero():
    zero, drawn = (Trainer(replace(TRIVIAL, variant="x4", unseen=unseen)) for unseen in ("zero", "random"))
    weights = [trainer.model.visual.patch_embed.proj.weight.flatten(1) for trainer in (zero, drawn)]
    shown = zero.encoder.in_patch(zero.settings.patch, zero.num_floats)
    assert shown.sum() == 3 * 2 * 7**2 and not weights[0][:, ~shown].any() and weights[1].abs().amax(dim=0).all()
    tokens = zero.encoder.encode(next(zero._fit_frames()))
    assert (tokens @ weights[0].T).square().mean().item() == pytest.approx(1, rel=1e-3)
    zero.step(0)
    assert zero.model.visual.patch_embed.proj.weight.flatten(1)[:, ~shown].any()  # and is learned


def test_the_rate_of_a_matrix_goes_with_one_over_its_inputs():
    trainer = Trainer(replace(TRIVIAL, variant="x4", size=ModelSize(640, 1, 64, 1)))
    trainer._set_rate(1e-3)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    parameters = dict(trainer.model.named_parameters())
    assert len(rates) == len(parameters)
    assert rates[id(parameters[PATCH_EMBEDDING])] == pytest.approx(1e-3 * 256 / 441)
    assert rates[id(parameters["visual.blocks.0.attn.qkv.weight"])] == pytest.approx(1e-3 * 256 / 640)
    assert rates[id(parameters["model.layers.0.self_attn.q_proj.weight"])] == 1e-3  # never more
    assert rates[id(parameters["visual.blocks.0.norm1.weight"])] == 1e-3


def test_a_trivial_task_is_learned(output):
    one_digit = {"size": 112, "cells": 1, "heights": [100], "noise": 0.0, "blank": 0.0}
    settings = replace(
        TRIVIAL, variant="sixteenth", knobs=one_digit, size=ModelSize(160, 1, 128, 1), learning_rate=1e-3
    )
    result = run(replace(settings, steps=100, batch=32, test=64, generated=8), output)
    assert result["finished"] and result["accuracy"] > 5 * result["chance"]
    assert result["curve"][-1]["loss"] < 0.2 * result["curve"][0]["loss"]
    assert list(result["by_level"]) == ["100"]
    assert [sum(result["by_image"][key]) for key in ("right", "all")] == result["by_level"]["100"]
    assert result["generation"]["agrees_with_forced"] == 1 and result["generation"]["accuracy"] > 0.3


def test_the_same_settings_give_the_same_result(tmp_path):
    one, two = (run(TRIVIAL, Output.at(tmp_path / name, "single")) for name in ("one.jsonl", "two.jsonl"))
    for result in (one, two):
        for point in result["curve"]:
            del point["seconds"]
        assert set(result["seconds"]) == {"prepare", "train", "test", "generation"}
        del result["milliseconds"], result["seconds"]
    assert one == two
    other = run(replace(TRIVIAL, seed=1), Output.at(tmp_path / "one.jsonl", "single"))
    assert other["curve"][0]["loss"] != one["curve"][0]["loss"]


def test_variants_see_the_same_samples_in_the_same_order():
    sources = [Trainer(replace(TRIVIAL, variant=variant)).source for variant in ("x4", "quarter")]
    for number in range(2):
        one, two = (source.batch("train", 0, number, 4) for source in sources)
        assert torch.equal(one.frames, two.frames) and torch.equal(one.answer, two.answer)


def test_a_finished_run_is_not_done_again_and_an_unfinished_one_is(output):
    first = run(TRIVIAL, output)
    output.record({**first, "note": "kept"})
    assert run(TRIVIAL, output)["note"] == "kept"
    output.record({**first, "finished": False, "note": "lost"})
    assert "note" not in run(TRIVIAL, output)
    assert "note" not in line_of(output, TRIVIAL)


def test_a_run_that_another_suite_did_in_the_same_folder_is_not_done_again(tmp_path):
    Output.at(tmp_path, "warm").record({**run(TRIVIAL, Output.at(tmp_path / "warm.jsonl", "")), "note": "kept"})
    assert run(TRIVIAL, Output.at(tmp_path, "tokens"))["note"] == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["warm.jsonl"]


def test_results_of_a_task_that_was_changed_are_refused(output):
    result = run(TRIVIAL, output)
    assert result["task"]["heights"] == [22] and result["task"]["cells"] == 4
    output.record({**result, "task": {**result["task"], "noise": 9.0}})
    with pytest.raises(ValueError, match="is of task reading as it was before a change: choose another --output"):
        run(TRIVIAL, output)


def test_a_model_to_save_that_is_gone_is_trained_again(tmp_path, output):
    saved = replace(TRIVIAL, variant="exact", save=True, steps=1)
    run(saved, output)
    model = tmp_path / f"{saved.name}.pt"
    model.unlink()
    run(saved, output)
    assert model.is_file()


def test_a_run_that_is_stopped_stays_unfinished(output):
    result = run(TRIVIAL, output, deadline=0.0)
    saved = line_of(output, TRIVIAL)
    assert saved == result and not saved["finished"] and [point["step"] for point in saved["curve"]] == [1]


def test_a_run_at_its_last_step_is_finished_whatever_the_time(output):
    assert run(replace(TRIVIAL, steps=1), output, deadline=0.0)["finished"]


def test_dct_variants_start_as_the_pixel_model_on_the_downscaled_image(output):
    pixels = replace(TRIVIAL, variant="pixels", save=True)
    run(pixels, output)
    start = torch.load(output.model(pixels.name), weights_only=True)

    def logits(variant: str) -> torch.Tensor:
        trainer = Trainer(replace(TRIVIAL, variant=variant), start=start)
        batch = trainer.source.batch("test", 0, 0, 2)
        tokens = trainer.encoder.encode(batch.frames)
        return answer_logits(trainer.model, trainer.layout, tokens, batch.question, batch.answer)

    torch.testing.assert_close(logits("exact"), logits("pixels"), rtol=1e-3, atol=1e-3)
    learned = Trainer(replace(TRIVIAL, variant="exact"), start=start)
    learned.step(0)
    start = learned.pixel_state()
    torch.testing.assert_close(logits("exact"), logits("pixels"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits("x4"), logits("x4-corner"), rtol=1e-3, atol=1e-3)
    assert (logits("x4") - logits("quarter")).abs().max() > 1e-3  # bicubic is another low-pass than the DCT's
    with pytest.raises(ValueError, match="cannot start from a pixel model"):
        logits("x4-raw")
    assert Encoder(make_variant("x4-weighted", 7, pixel_embedding(start, 7)), (112, 112), 1).tokens == 64


def test_a_warm_start_runs_from_the_name_of_a_run(output):
    pixels = replace(TRIVIAL, variant="pixels", save=True)
    warm = replace(TRIVIAL, start_from=pixels.name)
    with pytest.raises(FileNotFoundError, match="run the variant pixels or exact there with --save first"):
        run(warm, output)
    run(pixels, output)
    assert run(warm, output)["settings"]["start_from"] == pixels.name


def test_a_suite_runs_from_the_command_line_and_goes_on(tmp_path, capsys):
    command = ["--suite", "first", "--tiny", "--steps", "2", "--batch", "2", "--device", "cpu", "--part", "1/12"]
    command += ["--output", str(tmp_path)]
    assert run_experiments.main(command) == 0
    said = capsys.readouterr().out
    assert "reading_quarter_seed0_" in said and "| step 2/2 |" in said and "| quarter | " in said
    assert [path.name for path in tmp_path.iterdir()] == ["first.jsonl"]
    results = read_file(tmp_path / "first.jsonl")
    assert results and all(result["finished"] for result in results.values())
    assert run_experiments.main(command) == 0
    assert "step 2/2" not in capsys.readouterr().out


def test_a_single_run_is_written_to_the_folder_or_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda settings, output, *_: run(TRIVIAL, output))
    assert train.main(["--output", str(tmp_path)]) == 0
    assert train.main(["--output", str(tmp_path / "mine.jsonl")]) == 0
    assert "right " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "train.jsonl"]
    assert list(read_file(tmp_path / "train.jsonl")) == [TRIVIAL.name]


def test_a_part_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit):
        run_experiments.main(["--suite", "first", "--output", "x", "--part", "3/2"])
    assert "expected I/N with I from 1 to N" in capsys.readouterr().err
