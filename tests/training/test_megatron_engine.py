"""Parts of the Megatron engine that need no GPU: losses, sequences of validation, the log, what it says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from dct_qwen2vl.data.packing import PackedBatch


def sequence(losses: int, keys: tuple[str, ...] = ("a", "b"), tokens: int = 40, visual: int = 8) -> PackedBatch:
    """A sequence of two samples with one image of `visual` language-model tokens."""
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.zeros(3, tokens, dtype=torch.int64),
        sample_starts=torch.tensor([0, 15, tokens], dtype=torch.int32),
        learned=torch.arange(losses),
        targets=torch.zeros(losses, dtype=torch.int64),
        visual=torch.arange(visual),
        tokens=torch.zeros(4 * visual, 6, dtype=torch.bfloat16),
        token_positions=torch.zeros(4 * visual, 2, dtype=torch.int64),
        step_starts=torch.tensor([0, 4 * visual], dtype=torch.int32),
        grid_thw=torch.tensor([[1, 4, visual]]),
        longest_sample=tokens - 15,
        longest_step=4 * visual,
        keys=list(keys),
        skipped={"too_long": 2},
    )


def test_a_step_s_loss_is_the_mean_over_its_tokens_not_over_its_sequences():
    from dct_qwen2vl.training.megatron import TokenLoss

    kept = []
    reduction, outputs = TokenLoss(kept.append), []
    for losses in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])):
        reduction.setup(sequence(len(losses)))
        total, count, entry = reduction(losses)
        assert total == losses.sum() and count == len(losses) and count.dtype == torch.int
        outputs.append(entry)
    assert float(reduction.reduce(outputs)) == 16 / 4
    assert [sequences.tolist() for sequences in kept] == [[[6.0, 3.0], [10.0, 1.0]]]


def step_of(data, forward_only: bool):
    from nemo.lightning.megatron_parallel import MegatronStep

    return MegatronStep(pipeline=None, data=data, forward_step_func=None, forward_only=forward_only)


def test_validation_takes_one_sequence_a_step_and_ends_before_a_step_begins(monkeypatch):
    from dct_qwen2vl.training.megatron import SequenceSampler

    sampler = SequenceSampler(seq_len=64, micro_batch_size=1, global_batch_size=4)
    monkeypatch.setattr(SequenceSampler, "num_microbatches", 4)
    sequences = iter(["first", "second"])
    for expected in ("first", "second"):
        step = sampler.on_megatron_step_start(step_of(sequences, forward_only=True))
        assert step.num_microbatches == 1 and list(step.data) == [expected]
    with pytest.raises(StopIteration):
        sampler.on_megatron_step_start(step_of(sequences, forward_only=True))
    training = sampler.on_megatron_step_start(step_of(sequences, forward_only=False))
    assert training.num_microbatches == 4 and training.data is sequences
    assert sampler.transform_dataloader(sequences) is sequences


def test_sequences_are_counted_as_they_are(converted, tmp_path):
    from dct_qwen2vl.training.flops import training_flops
    from dct_qwen2vl.training.megatron import PackedTrainingLog

    config = AutoConfig.from_pretrained(converted("x4"))
    log = PackedTrainingLog(tmp_path, 10, 1, 2, hf_config=config, budget=(0, 0))
    one = sequence(5)
    counts = log._count(one)
    assert counts.pop("flops") == training_flops(config, one.grid_thw, torch.tensor([15, 25]), 5)
    assert counts == {
        "samples": 2, "visual_tokens": 8, "cells": 8, "text_tokens": 32, "learned_tokens": 5, "padding": 0,
        "positions": 40,
    }  # fmt: skip


@pytest.mark.parametrize(("budget", "fill"), [((50, 128), 0.8), ((80, 40), 0.8), ((40, 32), 1.0)])
def test_a_sequence_is_as_full_as_the_fuller_of_its_two_budgets(budget, fill, converted, tmp_path):
    from dct_qwen2vl.training.megatron import PackedTrainingLog

    config = AutoConfig.from_pretrained(converted("x4"))
    counts = PackedTrainingLog(tmp_path, 10, 1, 2, hf_config=config, budget=budget)._count(sequence(5))
    assert (counts["sequences"], counts["sequence_fill"]) == (1, fill)


def test_sequences_for_later_stages_leave_the_vision_tokens_behind():
    later = sequence(3).without_tokens()
    assert len(later.tokens) == 0 and len(later.input_ids) == 40 and later.keys == ["a", "b"]


def test_full_memory_names_the_sequence_and_what_to_lower():
    from dct_qwen2vl.training.config import TrainingConfig
    from dct_qwen2vl.training.megatron import describe_full_memory

    config = TrainingConfig(model_dir=Path("m"), data_dir=Path("d")).resolved("megatron", "bf16-mixed")
    said = describe_full_memory([sequence(3), sequence(3, keys=tuple("cdefghi"), tokens=50)], config)
    assert "a packed sequence of 7 samples, 50 tokens, 32 vision tokens (c, d, e, f, g, ...)" in said
    assert "lower --pack-tokens 8192, --pack-vision-tokens 16384, --seq-length 2048 or --max-pixels, or add" in said
    assert "\n" not in said
    assert "before the first packed sequence" in describe_full_memory([], config)


def test_a_model_in_two_files_has_an_index(tmp_path, qwen2vl_directory):
    """What two pipeline stages write, put together by the first process."""
    import json

    from safetensors.torch import save_file
    from transformers import Qwen2VLForConditionalGeneration

    from dct_qwen2vl.training.megatron_weights import copy_all_but_weights, write_index

    folder = tmp_path / "hf"
    copy_all_but_weights(qwen2vl_directory, folder)
    tensors = load_file(qwen2vl_directory / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in part}
        (folder / f".{file}.json").write_text(json.dumps(sizes))
    write_index(folder)
    assert not list(folder.glob(".model-*"))
    found = Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_a_checkpoint_of_before_the_log_was_renamed_keeps_its_counts(tmp_path):
    from dct_qwen2vl.training.megatron import PackedTrainingLog, read_earlier_log_name

    checkpoint = {"callbacks": {"RowTrainingLog": {"skipped": {"too_long": 3}}, "StepCheckpoint": {}}}
    read_earlier_log_name(checkpoint)
    log = PackedTrainingLog(tmp_path, 10, 1, 2, hf_config=None, budget=(0, 0))
    log.load_state_dict(checkpoint["callbacks"][log.state_key])
    assert log._skipped == {"too_long": 3}
