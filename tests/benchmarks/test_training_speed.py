"""What the training benchmark makes of a profile."""

import pytest

from benchmarks.speed.kernels import busy_seconds, kind_of, longest, shares

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


def test_a_sequence_is_padded_by_a_sample_that_learns_nothing(converted):
    import torch
    from transformers import Qwen2VLConfig

    from benchmarks.speed.training import pad
    from dct_qwen2vl.training.full_sequence import full_sequence

    sequence = full_sequence(Qwen2VLConfig.from_pretrained(converted("x4")), (300, 400), seq_length=150)
    padded = pad(sequence)
    assert padded.input_ids.shape == (384,) and padded.position_ids.shape == (3, 384)
    assert padded.sample_starts.tolist() == [0, 150, 300, 384] and padded.longest_sample == 150
    assert torch.equal(padded.learned, sequence.learned) and torch.equal(padded.input_ids[:300], sequence.input_ids)
    assert pad(padded) is padded
