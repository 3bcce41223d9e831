"""The `megatron` engine: NeMo's Qwen2-VL on Megatron-core, for GPUs with TransformerEngine.

NeMo's `llm.finetune` drives its MegatronStrategy: bf16 weights, an fp32 optimizer spread over the data-parallel
processes, tensor and pipeline parallelism. What this file adds: packed sequences instead of padded batches, a loss that
is the mean over the learned tokens of a whole step whatever the sequences and processes, checkpoints that are whole or
not there, and the log.

A checkpoint is a folder `checkpoints/step000100/` in Megatron-core's distributed format, which any layout of processes
can read. It is written under another name and renamed when whole. Part of it is a pickle, as Megatron-core writes it:
resume only from what you wrote yourself.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.vlm import Qwen2VLModel
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from transformers import Qwen2VLConfig

from dct_qwen2vl.checkpoints.hf_folder import write_reading
from dct_qwen2vl.common.files import unnamed
from dct_qwen2vl.data.loader import EnergonDataModule
from dct_qwen2vl.data.packing import PackedBatch
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.training.config import ModelInfo, TrainingConfig
from dct_qwen2vl.training.final_model import trained_folder
from dct_qwen2vl.training.flops import training_flops
from dct_qwen2vl.training.full_sequence import TryFullSequence
from dct_qwen2vl.training.log import NON_FINITE, OutOfMemory, StepGuard, TrainingLog, ValidationSum, count_cells
from dct_qwen2vl.training.lora import LoRA
from dct_qwen2vl.training.megatron_layouts import load_hf, save_hf
from dct_qwen2vl.training.megatron_lora import adapt_megatron
from dct_qwen2vl.training.megatron_model import PackedQwen2VL, fuse_gradient_accumulation, model_config
from dct_qwen2vl.training.megatron_step import (
    DeviceCopies,
    TokenMeanOptimizer,
    clip_gradients,
    read_norm,
    squared_norm,
)
from dct_qwen2vl.training.megatron_weights import rehearse_hf, sources_of
from dct_qwen2vl.training.parts import is_frozen
from dct_qwen2vl.training.rehearsal import RehearseSave
from dct_qwen2vl.training.run_folder import (
    build_loggers,
    count_batches_of_whole_steps,
    resume,
    step_checkpoints,
    sync_files,
    trainer_options,
)
from dct_qwen2vl.training.sequence_size import limit_memory

if not hasattr(np, "product"):
    np.product = np.prod  # Megatron-core 0.13 calls it to write a checkpoint, and numpy 2 has it no more
os.environ.setdefault("NEMO_LOG_TRAIN_LOSS", "0")  # TrainingLog has it, without a message between stages


class TokenLoss(MegatronLossReduction):
    """Sum over the learned tokens of a packed sequence; Megatron divides the gradients by the tokens of the whole step.

    reduced: called with float32 [sequences, 2], the sum and the tokens of each sequence.
    """

    def __init__(self, reduced: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.reduced = reduced

    def forward(self, batch: PackedBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total = losses.float().sum()
        count = torch.full((), len(batch.learned), dtype=torch.int, device=total.device)  # without a wait of the host
        return total, count, {"loss": torch.stack([total.detach(), count.float()])}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]):
        """-> mean of this process's tokens."""
        sums = torch.stack([entry["loss"] for entry in losses_reduced_per_micro_batch])
        self.reduced(sums)
        total, count = sums.sum(dim=0)
        return total / count


class SequenceSampler(MegatronDataSampler):
    """Tells Megatron how many packed sequences a step has. The loader gives them as they are. Validation has
    one a step.

    A sequence of validation is fetched before its step begins, so that all pipeline stages learn together that there is
    none.
    """

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader

    def on_megatron_step_start(self, step):
        step = super().on_megatron_step_start(step)
        if not step.forward_only:
            return step
        return replace(step, num_microbatches=1, data=iter([next(step.data)]))


class QwenMegatronModel(Qwen2VLModel):
    """Qwen2-VL as NeMo's LightningModule, over `PackedBatch`es.

    model_dir: HF directory.
    sequence_tokens: of the longest packed sequence.
    freeze: parts that are not trained.
    recompute: activations of transformer layers are computed again in the backward pass.
    pipeline: there are several pipeline stages.
    lora: adapters in place of the language model's weights.
    guard: stops at a loss or gradient that is no number; None for a model that is not trained.
    max_gradient_norm: 0 for no clipping.
    """

    def __init__(
        self,
        model_dir: Path,
        sequence_tokens: int,
        freeze: tuple[str, ...] = (),
        recompute: bool = False,
        pipeline: bool = False,
        lora: LoRA | None = None,
        guard: StepGuard | None = None,
        max_gradient_norm: float = 0.0,
    ) -> None:
        hf_config = Qwen2VLConfig.from_pretrained(model_dir)
        options: dict[str, Any] = {"calculate_per_token_loss": True}
        if recompute:
            options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if pipeline:  # lengths differ; the dispatcher, of which there is none here, is Megatron-core's condition
            options |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
        super().__init__(model_config(hf_config, sequence_tokens, **options))
        self.hf_config = hf_config
        self.model_dir = model_dir
        self.freeze = (*freeze, "language") if lora else freeze
        self.lora = lora
        self.guard = guard
        self.max_gradient_norm = max_gradient_norm
        self.gradient_norm = 0.0
        self.last_learning_rate = 0.0
        self.validation = ValidationSum()
        self.sequences: list[PackedBatch] = []  # of the step, without their tensors on the device
        self.loss_sums: torch.Tensor | None = None  # of the step: `TokenLoss`; None in stages before the last
        self.losses: list[tuple[float, float]] = []  # the same on the host, after the backward passes
        self.copies = DeviceCopies()

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this process's part and fills it from model_dir."""
        if hasattr(self, "module"):
            return
        self.module = self.config.configure_model(vp_stage=vp_stage)
        load_hf(self.module, self.hf_config, self.model_dir)
        sources = sources_of(self.module, self.hf_config)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad = not is_frozen(sources[name].names[0], self.freeze)
        if self.lora:
            adapt_megatron(self.module, self.lora)
        fuse_gradient_accumulation(self.module)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.module(batch)

    def data_step(self, dataloader_iter) -> PackedBatch:
        """The next sequence, on the device; tokens go to the first pipeline stage only."""
        sequence = next(dataloader_iter)[0]
        self.sequences.append(sequence.without_tokens())
        return self.copies(sequence if parallel_state.is_pipeline_first_stage() else self.sequences[-1])

    def forward_step(self, batch: PackedBatch) -> torch.Tensor:
        return self(batch)

    @property
    def training_loss_reduction(self) -> TokenLoss:
        return TokenLoss(self._keep_loss_sums)

    @property
    def validation_loss_reduction(self) -> TokenLoss:
        return TokenLoss(self._add_to_validation)

    def _keep_loss_sums(self, sums: torch.Tensor) -> None:
        self.loss_sums = sums

    def _add_to_validation(self, sums: torch.Tensor) -> None:
        """Validation has one sequence a step."""
        (sequence,), ((loss_sum, tokens),) = self.take_sequences(), sums
        self.validation.add(loss_sum, tokens, len(sequence.keys))

    def on_train_start(self) -> None:
        """The norm is looked at, and clipped, between gradients and step: Megatron-core has no place for it."""
        optimizer = self.trainer.optimizers[0].mcore_optimizer

        def measure_and_check() -> float:
            sums = () if self.loss_sums is None else (self.loss_sums,)
            self.gradient_norm, values = read_norm(squared_norm(optimizer), *sums)
            self.losses = list(zip(values[::2], values[1::2]))
            self._check_step()
            clip_gradients(optimizer, self.gradient_norm, self.max_gradient_norm)
            return self.gradient_norm

        optimizer.get_grad_norm = measure_and_check

    def _check_step(self) -> None:
        """Raises NonFiniteStep for a gradient, or a sequence's loss, that is no number."""
        losses = self.losses or [(0.0, 0.0)] * len(self.sequences)
        micro_batches = [(loss, sequence.keys) for (loss, _), sequence in zip(losses, self.sequences, strict=True)]
        self.guard.check(self.trainer.global_step + 1, self.gradient_norm, micro_batches)

    def log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """NeMo's strategy logs numbers of the host. Lightning would copy each to the device and back, and wait.

        name: As in Lightning.
        value: Number or tensor.
        arguments: As in Lightning.
        options: As in Lightning.
        """
        if isinstance(value, Number):
            value = torch.tensor(value, dtype=torch.get_default_dtype())
        super().log(name, value, *arguments, **options)

    def take_sequences(self) -> list[PackedBatch]:
        """The sequences since the last call."""
        sequences, self.sequences = self.sequences, []
        return sequences

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        self.last_learning_rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_validation_epoch_start(self) -> None:
        self.validation.begin("cuda")

    def on_validation_epoch_end(self) -> None:
        """Mean over all learned tokens of the split, whatever the sequences and processes."""
        self.take_sequences()
        self.validation.end(counts_here())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """NeMo stores its constructor's arguments; they come from the command line instead."""
        checkpoint.pop("hyper_parameters", None)
        checkpoint.pop("hparams_name", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count_batches_of_whole_steps(checkpoint, self.trainer.accumulate_grad_batches)
        read_earlier_log_name(checkpoint)


def read_earlier_log_name(checkpoint: dict[str, Any]) -> None:
    """Lightning finds a callback's state by the name of its class, which once was another."""
    states = checkpoint.get("callbacks", {})
    if "RowTrainingLog" in states:
        states[PackedTrainingLog.__name__] = states.pop("RowTrainingLog")


def counts_here() -> bool:
    """Whether this process's sequences are counted: of the processes that share them, one that has losses counts."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


class PackedTrainingLog(TrainingLog):
    """`TrainingLog` for packed sequences: Lightning's batch is a whole step here.

    budget: most tokens and vision tokens of a packed sequence, which is as full as the fuller of the two. (0, 0):
        sequences have a number of samples instead.
    """

    def __init__(self, *arguments, hf_config, budget: tuple[int, int], **options) -> None:
        super().__init__(*arguments, **options)
        self.hf_config = hf_config
        self.budget = budget

    def on_train_batch_end(self, trainer, pl_module: QwenMegatronModel, outputs, batch, batch_index: int) -> None:
        sequences = pl_module.take_sequences()
        if counts_here():
            for sequence, (loss, count) in zip(sequences, pl_module.losses, strict=True):
                self.add(loss=loss, loss_weight=count, **self._count(sequence))
                self._skipped.update(sequence.skipped)
        self._end_step(trainer, pl_module)

    def _count(self, sequence: PackedBatch) -> dict[str, float]:
        visual, tokens = len(sequence.visual), len(sequence.input_ids)
        lengths = sequence.sample_starts.diff()
        return {
            "flops": training_flops(self.hf_config, sequence.step_grids(), lengths, len(sequence.learned)),
            "samples": len(sequence.keys),
            "visual_tokens": visual,
            "cells": count_cells(sequence.grid_thw, self.merge_size),
            "text_tokens": tokens - visual,
            "learned_tokens": len(sequence.learned),
            "padding": 0,
            "positions": tokens,
            **({"sequences": 1, "sequence_fill": self._fill(sequence)} if any(self.budget) else {}),
        }

    def _fill(self, sequence: PackedBatch) -> float:
        sizes = (len(sequence.input_ids), len(sequence.visual) * self.merge_size**2)
        return max(size / most for size, most in zip(sizes, self.budget))


class WholeCheckpointIO(MegatronCheckpointIO):
    """Megatron-core's distributed checkpoints, renamed to their final name when every process has written its part."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = unnamed(path)
        first = torch.distributed.get_rank() == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        torch.distributed.barrier()
        super().save_checkpoint(checkpoint, temporary, storage_options)
        torch.distributed.barrier()
        if first:
            sync_files(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
        torch.distributed.barrier()


class SaveHF(Callback):
    """Writes the model at the end of training, and also where a run resumes from its last step and trains no more."""

    def __init__(self, output_dir: Path, edit: Callable[[Path], None]) -> None:
        self.output_dir = output_dir
        self.edit = edit
        self._saved = False

    def on_train_end(self, trainer, pl_module: QwenMegatronModel) -> None:
        if trainer.strategy.ddp_config.overlap_param_gather:
            trainer.strategy.megatron_parallel.force_param_sync()  # the last step's weights are still under way
        self._save(pl_module)

    def on_fit_end(self, trainer, pl_module: QwenMegatronModel) -> None:
        if not self._saved:
            pl_module.cuda()  # Lightning has moved it to the CPU
            self._save(pl_module)

    def _save(self, pl_module: QwenMegatronModel) -> None:
        model = pl_module.module
        while not isinstance(model, PackedQwen2VL):
            model = model.module
        save_hf(model, pl_module.hf_config, pl_module.model_dir, self.output_dir, self.edit)
        self._saved = True


def build_optimizer(config: TrainingConfig) -> TokenMeanOptimizer:
    """Adam with decoupled weight decay, linear warm-up, cosine down to min_lr; no decay on biases and norms."""
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=config.adam_beta2,
        clip_grad=0.0,  # `clip_gradients` does it
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    schedule = CosineAnnealingScheduler(
        max_steps=config.max_steps, warmup_steps=config.warmup_steps, constant_steps=0, min_lr=config.min_lr
    )
    return TokenMeanOptimizer(optimizer, lr_scheduler=schedule)


def build_strategy(config: TrainingConfig) -> nl.MegatronStrategy:
    several = config.data_parallel > 1
    return nl.MegatronStrategy(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        pipeline_dtype=torch.bfloat16,
        ckpt_async_save=False,
        replace_progress_bar=False,
        checkpoint_io=WholeCheckpointIO(parallel_save=True, parallel_load=True),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=several,
            overlap_param_gather=several,
            check_for_nan_in_grad=False,  # StepGuard stops the run, and names the samples
        ),
    )


def build_trainer(config: TrainingConfig, callbacks: list[Callback], validates: bool) -> nl.Trainer:
    """Lightning's Trainer as NeMo wraps it; its batch is an optimizer step."""
    return nl.Trainer(
        accelerator="gpu",
        strategy=build_strategy(config),
        plugins=[nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16, grad_reduce_in_fp32=True)],
        val_check_interval=config.val_interval,
        callbacks=callbacks,
        **trainer_options(config, validates),
    )


def run(
    config: TrainingConfig,
    info: ModelInfo,
    data: EnergonDataModule,
    merge_size: int,
    extra_callbacks: list[Callback],
) -> None:
    """Fine-tunes, resuming from the newest checkpoint, and writes the form that was trained into the run folder. Raises
    OutOfMemory."""
    limit_memory(config.memory_limit)
    sequence_tokens = max(config.seq_length * config.micro_batch_size, config.pack_tokens)
    module = QwenMegatronModel(
        config.model_dir,
        sequence_tokens,
        config.freeze,
        config.recompute,
        config.pipeline_parallel > 1,
        LoRA.of(config),
        StepGuard(config.run_dir / NON_FINITE),
        config.max_gradient_norm,
    )
    data.data_sampler = SequenceSampler(
        seq_len=sequence_tokens,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        output_log=False,
    )
    log = PackedTrainingLog(
        config.run_dir,
        config.max_steps,
        config.log_interval,
        merge_size,
        skips=data.task_encoder.skips,
        hf_config=module.hf_config,
        budget=(config.pack_tokens, config.pack_vision_tokens),
    )
    edit = partial(write_reading, settings=config.processor_settings, sampling=vars(VideoSampling.of(config)))
    callbacks = [
        RehearseSave(config, info, partial(rehearse_hf, config.model_dir, edit=edit)),
        TryFullSequence(config, info, data, log),
        log,
        *step_checkpoints(config, log.restart_clock),
        SaveHF(trained_folder(config.run_dir, info), edit),
        *extra_callbacks,
    ]
    trainer = build_trainer(config, callbacks, data.validates)
    try:
        llm.finetune(
            model=module,
            data=data,
            trainer=trainer,
            log=build_loggers(config),
            resume=resume(config),
            optim=build_optimizer(config),
            tokenizer=None,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(describe_full_memory(module.sequences, config)) from error


def describe_full_memory(sequences: list[PackedBatch], config: TrainingConfig) -> str:
    sequence = sequences[-1] if sequences else None
    what = "before the first packed sequence" if sequence is None else (
        f"at a packed sequence of {len(sequence.keys)} samples, {len(sequence.input_ids)} tokens, "
        f"{len(sequence.token_positions)} vision tokens "
        f"({', '.join(sequence.keys[:5])}{', ...' if len(sequence.keys) > 5 else ''})"
    )  # fmt: skip
    budget = f"--pack-tokens {config.pack_tokens}, --pack-vision-tokens {config.pack_vision_tokens}"
    lower = budget if config.pack_tokens else "--micro-batch-size"
    return (
        f"the device's memory is full {what}: lower {lower}, --seq-length {config.seq_length} or --max-pixels, or "
        f"add --recompute"
    )
