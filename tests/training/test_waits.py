"""Where a warm step makes the host wait for the device.

On a CPU as tests/waits_on_cpu.py finds it, on a GPU as PyTorch reports it. test_megatron_training.py has the same of
the Megatron engine.
"""

import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from waits_on_cpu import Waits

from dct_qwen2vl.training.host_waits import WARNING, counted_warnings, describe, host_waits

HAS_GPU = torch.cuda.is_available()
OWN = {"dct_qwen2vl/training/automodel.py:configure_gradient_clipping tolist": 1}  # norm and losses
MASK = "transformers/modeling_attn_mask_utils.py:_ignore_causal_mask_sdpa _local_scalar_dense"
# Of visual tokens, by transformers, or with skipping by media_embedding.py.
COUNT = "transformers/models/qwen2_vl/modeling_qwen2_vl.py:forward _local_scalar_dense"
COUNT_KEPT = "dct_qwen2vl/data/media_embedding.py:<listcomp> _local_scalar_dense"


def waits_of_a_step(model_dir, folder, skip_db: float | None, micro_batches: int) -> Counter[str]:
    """The second step of the automodel engine, with its log, to the begin of the third. Half of its micro-batches are
    text."""
    import lightning.pytorch as pl
    from sharding_process import micro_batches as two_micro_batches

    from dct_qwen2vl.data.loader import CountedLoader, EnergonDataModule
    from dct_qwen2vl.training.automodel import QwenAutoModel
    from dct_qwen2vl.training.log import StepGuard, TrainingLog
    from dct_qwen2vl.training.metrics_file import read_metrics

    class Lines(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index: int) -> None:
            """The line of a step is there as soon as the step is done, whatever ends the run then."""
            assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3][: trainer.global_step]

    class Data(EnergonDataModule):
        def __init__(self) -> None:
            pl.LightningDataModule.__init__(self)

        def train_dataloader(self) -> CountedLoader:
            batches = two_micro_batches(model_dir, 1, skip_db) * (3 * micro_batches)
            self.train_loader = CountedLoader(batches, len(batches))
            return self.train_loader

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            if HAS_GPU:
                return moved
            values = {name: value.clone() for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
            return replace(moved, **values)

    class Recorded(QwenAutoModel):
        recording, found = ExitStack(), None

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_train_batch_start(self, batch, batch_index: int) -> None:
            if batch_index == micro_batches:
                recorder = host_waits() if HAS_GPU else Waits(self.parameters())
                self.found = self.recording.enter_context(recorder)
            elif batch_index == 2 * micro_batches:
                self.recording.close()
            if isinstance(self.found, Waits):
                self.found.put([value for name, value in vars(batch).items() if name != "on_host"])

    module = Recorded(model_dir, guard=StepGuard(folder / "refused.json"))
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_steps=3, logger=False, accumulate_grad_batches=micro_batches,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[TrainingLog(folder, 3, 1, 2), Lines()],
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    return module.found if HAS_GPU else module.found.found


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU to ask")
@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("skip_db", [None, 30.0])
def test_a_step_of_the_automodel_engine_waits_once(skip_db, micro_batches, converted, tmp_path):
    """And transformers once in each micro-batch, and once more where there are media."""
    found = waits_of_a_step(converted("x4"), tmp_path, skip_db, micro_batches)
    assert found == {**OWN, MASK: micro_batches, (COUNT_KEPT if skip_db else COUNT): micro_batches // 2}


@pytest.mark.skipif(not HAS_GPU, reason="needs CUDA")
@pytest.mark.parametrize("skip_db", [None, 30.0])
def test_a_step_of_the_automodel_engine_waits_a_few_times_on_a_gpu(skip_db, converted, tmp_path):
    """For each micro-batch: the mask, the count of visual tokens, and positions that transformers copies."""
    found = waits_of_a_step(converted("x4"), tmp_path, skip_db, micro_batches=4)
    assert found.total() <= 1 + 4 * 4, describe(found, "a step")


VALUES = torch.arange(6.0)


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.max()), "_local_scalar_dense"),
        (lambda x: bool((x > 2).all()), "_local_scalar_dense"),
        (lambda x: (x * 2).tolist(), "tolist"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 2], "index"),
        (lambda x: torch.arange(6)[int(x[1]) :], "_local_scalar_dense"),
        (lambda x: torch.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: torch.tensor([1.0], device="cpu"), "tensor"),
    ],
)
def test_a_wait_is_found(act, what):
    x = VALUES.clone()
    with Waits([x]) as waits:
        act(x)
    assert waits.found == {f"tests/training/test_waits.py:<lambda> {what}": 1}


def test_what_stays_on_the_host_or_on_the_device_is_no_wait():
    x, host = VALUES.clone().requires_grad_(), VALUES.clone()
    with Waits([x]) as waits:
        (x[x.detach().long()] * 2).sum().backward()
        assert host[host > 2].tolist() == [3, 4, 5]
        assert torch.zeros(2).sum().item() == 0
    assert not waits.found and waits.has(x.grad) and not waits.has(host)


def test_waits_in_a_backward_pass_are_found():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            return gradient * gradient.sum().item()

    x = VALUES.clone().requires_grad_()
    with Waits([x]) as waits:
        Reads.apply(x).sum().backward()
    assert waits.found == {"tests/training/test_waits.py:backward _local_scalar_dense": 1}


def test_warnings_of_waits_are_counted_by_place_and_others_are_shown():
    def wait() -> None:
        warnings.warn(f"{WARNING} (Triggered internally)", stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with counted_warnings() as found:
            for _ in range(3):
                wait()
            warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]
    (where,) = found
    assert found[where] == 3 and where.split(" < ")[0].endswith(" wait") and "test_waits.py" in where
    assert describe(found, "step 3").splitlines() == ["3 waits of the host for the device in step 3", f"    3  {where}"]
