"""What the model of memory counts, and the size of packed sequences that is chosen by it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from dct_qwen2vl.training import memory, sequence_size
from dct_qwen2vl.training.config import RunError, parse_arguments
from dct_qwen2vl.training.memory import GIB, Corrections, Training, choose, longest_sample, peak, stages

LORA = Training(language=False, lora_rank=16)
KNOWN = ["--data-dir", "d", "--engine", "megatron"]


def qwen2_vl_2b(tied: bool = True, **patch: int) -> Qwen2VLConfig:
    """Qwen2-VL-2B-Instruct's sizes."""
    return Qwen2VLConfig(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, tie_word_embeddings=tied,
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, **patch},
    )  # fmt: skip


X4 = qwen2_vl_2b(in_channels=1764, patch_size=1, temporal_patch_size=1)


@pytest.mark.parametrize("config", [qwen2_vl_2b(), qwen2_vl_2b(tied=False), X4], ids=["pixels", "untied", "x4"])
def test_weights_are_those_of_the_model(config):
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    assert memory.count_weights(config).total == sum(parameter.numel() for parameter in model.parameters())


def test_every_weight_that_is_trained_takes_eighteen_bytes_on_one_gpu():
    (stage,) = stages(X4, Training(), Corrections())
    assert stage.fixed == 18 * memory.count_weights(X4).total
    assert stage.waiting == 2 * 151936 * 1536  # the gradient of the head, which is the embedding's as well


def test_data_parallel_processes_share_the_optimizer():
    (alone,), (shared,) = (stages(X4, Training(data_parallel=count)) for count in (1, 4))
    assert alone.fixed - shared.fixed == 9 * memory.count_weights(X4).total


def test_frozen_weights_take_two_bytes_and_adapters_eighteen():
    (stage,) = stages(X4, LORA)
    weights = memory.count_weights(X4)
    adapters = 28 * 16 * (1536 + 2048 + 1536 + 1536 + 1536 + 17920 + 8960 + 1536)
    frozen = 28 * weights.block + weights.embedding
    assert stage.fixed == 2 * frozen + 18 * (weights.vision + weights.projector + adapters)


def test_a_block_keeps_what_its_backward_pass_needs():
    # Norms in and out, Q K V, turned Q and K, attention's output, gate and up, their product; 12 heads.
    numbers = 4 * 1536 + 2048 + 1792 + 1536 + 2 * 8960 + 8960
    assert memory.text_activations(X4, Training()) == 2 * numbers + 4 * 12
    # Frozen: no outputs of norms, no product.
    assert memory.text_activations(X4, Training(language=False)) == 2 * (numbers - 2 * 1536 - 8960) + 4 * 12
    assert memory.text_activations(X4, LORA) == 2 * (numbers + 64) + 4 * 12
    tower = 4 * 1280 + 3 * 1280 + 2 * 1280 + 1280 + 2 * 5120
    assert memory.vision_activations(X4.vision_config, Training()) == 2 * tower + 4 * 16


def test_recomputed_blocks_keep_their_input():
    (stage,) = stages(X4, Training(recompute=True))
    (whole,) = stages(X4, Training())
    text, vision = whole.text - stage.text, whole.vision - stage.vision
    assert text == pytest.approx(28 * (memory.text_activations(X4, Training()) - 2 * 1536))
    assert vision == pytest.approx(32 * (memory.vision_activations(X4.vision_config, Training()) - 2 * 1280))
    assert stage.working_text - whole.working_text == memory.text_activations(X4, Training())


def test_a_frozen_tower_keeps_nothing_of_its_blocks():
    (stage,) = stages(X4, Training(vision=False))
    assert stage.vision < memory.vision_activations(X4.vision_config, Training())
    (nothing,) = stages(X4, Training(vision=False, projector=False))
    assert nothing.vision == 2 * 1764 + 4 * 80


def test_processes_of_a_layer_halve_its_weights_and_inner_activations():
    (alone,), (half,) = (stages(X4, Training(tensor_parallel=size)) for size in (1, 2))
    assert half.fixed == alone.fixed / 2
    assert alone.text / 2 < half.text < 0.65 * alone.text and half.head < 0.51 * alone.head


def test_the_first_pipeline_stage_has_the_tower_and_several_sequences():
    (alone,) = stages(X4, Training())
    first, last = stages(X4, Training(pipeline_parallel=4))
    assert first.vision == 4 * alone.vision and last.vision == 0
    assert first.head == 0 and last.head == alone.head
    assert first.text == pytest.approx(alone.text, rel=0.02) and last.text == pytest.approx(alone.text / 4, rel=0.02)


def test_a_factor_moves_its_term_alone():
    (plain,) = stages(X4, Training(), Corrections())
    for term in ("fixed", "text", "vision", "head"):
        (moved,) = stages(X4, Training(), replace(Corrections(), **{term: 1.5}))
        assert getattr(moved, term) == 1.5 * getattr(plain, term)
        assert replace(moved, **{term: getattr(plain, term), "waiting": plain.waiting}) == plain
    (moved,) = stages(X4, Training(), Corrections(working=2.0))
    assert (moved.working_text, moved.working_vision) == (2 * plain.working_text, 2 * plain.working_vision)


@pytest.mark.parametrize("training", [Training(), LORA, Training(data_parallel=8)], ids=["all", "LoRA", "eight"])
@pytest.mark.parametrize("gib", [22, 40, 80, 140])
def test_the_largest_sequence_that_fits_is_chosen(gib, training):
    found = choose(X4, training, gib * GIB, 2048, most=1 << 20)
    if found is None:
        assert longest_sample(stages(X4, replace(training, recompute=True)), 2048) > Corrections().room(gib * GIB)
        return
    of_stages, room = stages(X4, replace(training, recompute=found.recompute)), Corrections().room(gib * GIB)
    assert found.vision_tokens == 2 * found.tokens and found.tokens % 256 == 0
    assert found.peak == peak(of_stages, found.tokens, found.vision_tokens) <= room
    assert peak(of_stages, found.tokens + 256, found.vision_tokens + 512) > room


def test_all_weights_of_a_2b_do_not_train_on_24_gb_and_adapters_do():
    assert choose(X4, Training(), 22 * GIB, 2048) is None
    found = choose(X4, LORA, 22 * GIB, 2048)
    assert found.recompute and found.tokens > 8192
    assert not choose(X4, LORA, 40 * GIB, 2048).recompute


def test_the_longest_sample_alone_must_fit():
    """8,192 vision tokens, of a sample of 2,048 visual ones, are more than twice 2,048."""
    (stage,) = stages(X4, Training())
    room = stage.peak(2048, 4096) + 256 * stage.text
    free = (room + Corrections().reserve) / (1 - Corrections().reserve_share)
    assert choose(X4, Training(), free, 512).tokens == 2048
    assert choose(X4, Training(), free, 2048).recompute


def test_a_given_number_of_vision_tokens_stays():
    found = choose(X4, Training(), 140 * GIB, 2048, vision_tokens=8192, most=1 << 20)
    assert found.vision_tokens == 8192 and found.tokens > choose(X4, Training(), 140 * GIB, 2048).tokens


def test_there_is_a_largest_sequence():
    assert choose(X4, LORA, 1000 * GIB, 2048).tokens == 32768
    assert choose(X4, LORA, 1000 * GIB, 2048, most=10000).tokens == 9984
    assert choose(X4, LORA, 1000 * GIB, 40000).tokens == 40192  # which holds the longest sample


# The command line


@pytest.fixture
def typed(converted, tmp_path):
    """typed(*words): the settings of a run with a tiny model."""
    known = ["--model-dir", str(converted("x4")), "--output-dir", str(tmp_path), *KNOWN]
    return lambda *words: parse_arguments([*known, *words])


def test_without_a_device_the_size_is_the_usual_one(typed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, note = sequence_size.choose_size(typed())
    assert note is None and config == typed()
    resolved = config.resolved("megatron", "bf16-mixed")
    assert (resolved.pack_tokens, resolved.pack_vision_tokens, resolved.global_batch_size) == (8192, 16384, 16)


def test_a_limit_sets_the_size_and_a_step_keeps_its_tokens(typed):
    config, note = sequence_size.choose_size(typed("--memory-limit", "1.4", "--seq-length", "512"))
    resolved = config.resolved("megatron", "bf16-mixed")
    tokens = resolved.pack_tokens
    assert 512 <= tokens < 32768 and resolved.pack_vision_tokens == 2 * tokens
    assert config.chosen_sizes == ("pack_tokens", "pack_vision_tokens")
    assert (resolved.global_batch_size - 1) * tokens < 16 * 8192 <= resolved.global_batch_size * tokens
    assert re.fullmatch(
        rf"Packed sequences of up to {tokens} tokens, {2 * tokens} vision tokens: expected to take 0.\d of 1.4 GiB, "
        r"model and optimizer 0.\d",
        note,
    )
    more, _ = sequence_size.choose_size(typed("--memory-limit", "1.6", "--seq-length", "512"))
    assert more.pack_tokens > tokens


def test_what_cannot_fit_is_refused_in_a_line_that_names_settings(typed):
    with pytest.raises(RunError) as refusal:
        sequence_size.choose_size(typed("--memory-limit", "1.03", "--seq-length", "4096"))
    assert re.fullmatch(
        r".* does not train in 1.0 GiB of device memory: model and optimizer take 0.\d, with a sample of --seq-length "
        r"4096 tokens 0.\d: add --lora-rank 16, lower --seq-length, or spread the model with --tensor-parallel",
        str(refusal.value),
    )


def test_what_is_given_stays(typed):
    given = typed("--pack-tokens", "4096")
    assert not sequence_size.leaves_size_open(given, "megatron")
    assert not sequence_size.leaves_size_open(typed("--micro-batch-size", "2"), "megatron")
    assert not sequence_size.leaves_size_open(typed(), "automodel")
    config, _ = sequence_size.choose_size(typed("--memory-limit", "1.4", "--pack-vision-tokens", "2048"))
    assert config.pack_vision_tokens == 2048 and config.chosen_sizes == ("pack_tokens",)


@pytest.mark.parametrize(("processes", "most"), [(1, 32768), (4, 32768), (8, 16384), (16, 8192), (64, 8192)])
def test_many_processes_keep_to_the_tokens_of_a_step(processes, most, typed):
    assert sequence_size.most_tokens(typed("--devices", str(processes))) == most


def test_a_run_goes_on_with_the_size_that_it_began_with(typed, tmp_path):
    from dct_qwen2vl.training.checks import ModelInfo
    from dct_qwen2vl.training.run_file import write_run_file

    begun = replace(typed(), pack_tokens=5120, pack_vision_tokens=10240, recompute=True, chosen_sizes=("pack_tokens",))
    begun = begun.resolved("megatron", "bf16-mixed")
    assert sequence_size.as_begun(typed()) == typed()
    write_run_file(begun, ModelInfo("x4", None))
    assert sequence_size.as_begun(typed()) == typed()  # no checkpoint: nothing goes on
    (Path(begun.run_dir) / "checkpoints" / "step000005").mkdir(parents=True)
    now = sequence_size.as_begun(typed())
    assert (now.pack_tokens, now.pack_vision_tokens, now.global_batch_size, now.recompute) == (5120, 10240, 26, True)
    assert sequence_size.as_begun(typed("--restart-data")) == typed("--restart-data")


# The pass before the first step


def test_a_budget_shrinks_until_it_fits():
    from dct_qwen2vl.training.full_sequence import SIZES, settle

    tried, told = [], []

    def fits(budget: tuple[int, int]) -> bool:
        tried.append(budget)
        return budget[0] <= 4000

    assert settle(fits, (5120, 10240), 2048, SIZES, told.append) == (3584, 7168)
    assert tried == [(5120, 10240), (4608, 9216), (4096, 8192), (3584, 7168)]
    assert told[0] == "The device's memory is full at a packed sequence of 5120 tokens, 10240 vision tokens"
    assert len(told) == 3


def test_a_given_budget_does_not_shrink_and_none_is_under_the_longest_sample():
    from dct_qwen2vl.training.full_sequence import SIZES, settle

    assert settle(lambda budget: budget[0] < 2000, (2048, 1000), 512, ("pack_tokens",), print) == (1792, 1000)
    assert settle(lambda budget: False, (2048, 4096), 1024, SIZES, print) is None


@pytest.mark.parametrize("budget", [(512, 1024), (700, 256), (300, 1192), (256, 4)])
def test_a_full_sequence_fills_both_budgets(budget, converted):
    from dct_qwen2vl.training.full_sequence import full_sequence

    config = Qwen2VLConfig.from_pretrained(converted("x4"))
    sequence = full_sequence(config, budget, seq_length=256)
    tokens, vision_tokens = budget
    assert len(sequence.input_ids) == tokens and sequence.tokens.shape == (vision_tokens, 1764)
    assert len(sequence.visual) == vision_tokens // 4
    assert sequence.longest_sample <= 256 and sequence.tokens.dtype == torch.bfloat16
    # A sample does not learn its first token, and what follows an image is learned.
    assert len(sequence.learned) >= tokens - len(sequence.visual) - len(sequence.keys)
    assert int(sequence.sample_starts[-1]) == tokens and int(sequence.step_starts[-1]) == vision_tokens


def test_every_sample_of_a_full_sequence_learns_something(converted):
    from dct_qwen2vl.training.full_sequence import full_sequence

    config = Qwen2VLConfig.from_pretrained(converted("x4"))
    sequence = full_sequence(config, (512, 4096), seq_length=256)
    assert (len(sequence.learned), len(sequence.visual)) == (2, 510)
