"""What the training benchmark makes of a profile, and of drawn material with and without skipping."""

import gzip
import json
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.speed.kernels import busy_seconds, kind_of, longest, print_kinds, shares, trace_shares
from benchmarks.speed.samples import make_work, pad, sequences_of
from benchmarks.speed.scenes import WORKS, kept_in
from benchmarks.speed.training import print_skipping

SPANS = [("nvjet_sm90_tst_128x248", 0.0, 4e5), ("nvjet_sm90_tst_128x248", 3e5, 6e5), ("Memcpy HtoD", 7e5, 8e5)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<96, 64, 128",
            "tower",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4", "language model"),
        ("nvjet_sm90_tss_192x192_64x3_2x1_v_badd_coopB_NTN", "matrix products"),
        ("triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0", "activations"),
        ("void transformer_engine::fused_rope_backward_kernel<__nv_bfloat16>", "rotary"),
        ("void transformer_engine::normalization::ln_bwd_general_kernel<", "norms"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4, false>", "optimizer"),
        ("cast_transpose_optimized_kernel(__nv_bfloat16 const*, float const*, __nv_fp8_e4m3*", "casts to FP8"),
        ("void transformer_engine::(anonymous namespace)::amax_kernel<16, true, __nv_bfloat16>", "casts to FP8"),
        ("something_new", "other"),
    ],
)
def test_a_kernel_is_of_a_kind(name, kind):
    assert kind_of(name).endswith(kind)


def test_kernels_side_by_side_are_busy_once():
    assert busy_seconds(SPANS) == pytest.approx(0.7)


def test_shares_are_of_the_whole_step():
    assert shares(SPANS, 1.0) == pytest.approx({"matrix products": 0.7, "copies": 0.1, "gaps": 0.3})
    assert [(line["kernel"], line["calls"]) for line in longest(SPANS, 1.0)] == [(SPANS[0][0], 2), ("Memcpy HtoD", 1)]


def test_communication_waits_where_nothing_else_runs(tmp_path):
    spans = [*SPANS, ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 5e5, 7.5e5)]
    expected = {
        "matrix products": 0.7, "communication": 0.25, "copies": 0.1, "waits for communication": 0.1, "gaps": 0.2
    }  # fmt: skip
    assert shares(spans, 1.0) == pytest.approx(expected)
    events = [{"cat": "kernel", "name": name, "ts": 1e9 + at, "dur": end - at} for name, at, end in spans]
    with gzip.open(tmp_path / "rank0.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9e9}, *events]}, file)
    found = trace_shares(tmp_path / "rank0.json.gz")
    assert found == pytest.approx({kind: share / 0.8 for kind, share in expected.items()} | {"gaps": 0.0}, abs=1e-9)


def test_kinds_are_printed_a_column_a_run(capsys):
    print_kinds({"1 GPU": {"copies": 0.1, "gaps": 0.2}, "2 GPU": {"copies": 0.3, "communication": 0.05}})
    _, *lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines == [["gaps", "20.0", "0.0"], ["copies", "10.0", "30.0"], ["communication", "0.0", "5.0"]]


@pytest.mark.parametrize(("work", "most", "ratio"), [("camera", 0.2, 3), ("screens", 0.2, 3), ("pages", 0.6, 1.4)])
def test_skipping_leaves_drawn_material_fewer_tokens_and_less_arithmetic(work, most, ratio):
    from dct_qwen2vl.training.flops import training_flops

    works, counts = make_work(work, 2, seed=0), []
    for skip_db in (0.0, 38.0):
        config, batches = sequences_of("x4", works, (16384, 32768), 0, skip_db)
        visual = sum(len(batch.visual) for batch in batches)
        assert visual * 4 == sum(len(batch.tokens) for batch in batches)
        flops = sum(training_flops(config, b.step_grids(), b.sample_starts.diff(), len(b.learned)) for b in batches)
        counts.append((visual, flops))
    masks = [kept_in(one.scene, "x4", 38.0) for one in works]
    assert [counts[0][0], counts[1][0]] == [sum(mask.size for mask in masks), sum(int(mask.sum()) for mask in masks)]
    assert np.mean([mask.mean() for mask in masks]) < most and counts[0][1] / counts[1][1] > ratio


def test_without_skipping_samples_are_those_of_before():
    """The same ids, positions and tokens, whether or not something is drawn."""
    works = make_work("pages", 1, seed=0)
    (drawn,), (plain,) = (
        sequences_of("x4", each, (4096, 8192), 3)[1] for each in (works, [replace(works[0], scene="")])
    )
    for name in ("input_ids", "position_ids", "tokens", "step_starts"):
        assert torch.equal(getattr(drawn, name), getattr(plain, name))


@torch.compiler.set_stance("force_eager")
def test_a_tiny_model_learns_from_the_sequences_of_all_scenes():
    """Megatron-core's model on the CPU, where nothing is compiled: it would be C++."""
    from megatron.core import parallel_state
    from megatron_cpu import CPU_OPTIONS, plain_layers

    from dct_qwen2vl.training.megatron_model import model_config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        for work in WORKS:
            config, batches = sequences_of("x4", make_work(work, 1, seed=0), (16384, 32768), 0, skip_db=38.0)
            config.update({"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128})
            config.update({"num_attention_heads": 1, "num_key_value_heads": 1})
            config.vision_config.update({"depth": 1, "embed_dim": 80, "num_heads": 1, "hidden_size": 128})
            model = model_config(config, 16384, torch.float32, plain_layers(), **CPU_OPTIONS).configure_model()
            (batch,) = batches
            losses = model.float()(replace(batch, tokens=batch.tokens.float()))
            losses.sum().backward()
            assert len(losses) == len(batch.learned) and losses.isfinite().all()
            assert model.vision_model.conv1.weight.grad.abs().sum() > 0
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def test_a_step_is_megatron_core_s_bit_for_bit():
    """The engine's waits less often."""
    from pipeline import REPOSITORY, run

    done = run([sys.executable, str(REPOSITORY / "tests" / "step_process.py")])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] and len({theirs for theirs, _ in found["losses"]}) == 3
    for theirs, ours in found["losses"] + found["norms"]:
        assert theirs == ours > 0


def test_the_gain_is_over_the_same_way_with_all_cells(capsys):
    lines = [
        {"way": "x4", "samples_per_second": 4.0, "skip_db": 0.0, "kept_share": 1.0},
        {"way": "x4 skip", "samples_per_second": 10.0, "skip_db": 38.0, "kept_share": 0.25},
    ]
    print_skipping(lines)
    assert "x4 skip    25% of the cells, samples/s x 2.50" in capsys.readouterr().out


def test_a_sequence_is_padded_by_a_sample_that_learns_nothing(converted):
    import torch
    from transformers import Qwen2VLConfig

    from dct_qwen2vl.training.full_sequence import full_sequence

    sequence = full_sequence(Qwen2VLConfig.from_pretrained(converted("x4")), (300, 400), seq_length=150)
    padded = pad(sequence)
    assert padded.input_ids.shape == (384,) and padded.position_ids.shape == (3, 384)
    assert padded.sample_starts.tolist() == [0, 150, 300, 384] and padded.longest_sample == 150
    assert torch.equal(padded.learned, sequence.learned) and torch.equal(padded.input_ids[:300], sequence.input_ids)
    assert pad(padded) is padded
