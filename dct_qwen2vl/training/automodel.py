"""The `automodel` engine: NeMo AutoModel on the Hugging Face model, one or more processes, CPU or GPU.

What NeMo's class leaves open is done here: validation, a checkpoint that can be loaded again, text-only micro-batches.
A checkpoint is a folder `checkpoints/step000100/`: `hf/` is a complete Hugging Face directory in float32, as the
weights are trained. The model at the end has the data types that it began with. `trainer.pt` holds
optimizer, schedule, loops and loader. With --lora-rank the adapters are merged into `hf/` and stand in `trainer.pt`;
the frozen weights behind them are read from where the run began. It is written under another name and renamed when
whole, so a killed run leaves no half ones.
"""

import math
import os
import shutil
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.vlm import HFAutoModelForImageTextToText
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, PytorchOptimizerModule
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from dct_qwen2vl.checkpoints.hf_folder import write_reading
from dct_qwen2vl.checkpoints.inspection import PATCH_EMBEDDING
from dct_qwen2vl.common.files import unnamed
from dct_qwen2vl.data.loader import EnergonDataModule, energon_state_classes
from dct_qwen2vl.data.media_embedding import blank_image, copy_to, embed_media
from dct_qwen2vl.data.samples import QwenBatch
from dct_qwen2vl.data.videos import VideoSampling
from dct_qwen2vl.data.vision_attention import attend_each_step_alone
from dct_qwen2vl.training.automodel_weights import dtypes_of, write_model
from dct_qwen2vl.training.config import ModelInfo, TrainingConfig
from dct_qwen2vl.training.final_model import trained_folder
from dct_qwen2vl.training.log import NON_FINITE, StepGuard, TrainingLog, ValidationSum
from dct_qwen2vl.training.lora import LoRA, adapt_hf, adapted_weights, adapters_of, merged_hf
from dct_qwen2vl.training.parts import is_frozen
from dct_qwen2vl.training.patch_embedding import embed_tokens
from dct_qwen2vl.training.rehearsal import RehearseSave
from dct_qwen2vl.training.run_file import TRAINER_FILE
from dct_qwen2vl.training.run_folder import (
    build_loggers,
    count_batches_of_whole_steps,
    resume,
    step_checkpoints,
    sync_files,
    trainer_options,
)
from dct_qwen2vl.training.sharding import ShardedStrategy, gradient_of_ones, shard, whole


class QwenAutoModel(HFAutoModelForImageTextToText):
    """Qwen2-VL or Qwen2.5-VL as a LightningModule that takes `QwenBatch`es.

    Args:
        model_dir: Hugging Face directory.
        freeze: Parts that are not trained. "vision" is the tower without its projector.
        max_gradient_norm: 0 for no clipping.
        processor_settings: min_pixels, max_pixels and skipping of this run, where they are not those of `model_dir`.
            They are saved with the weights.
        lora: Adapters in place of the language model's weights.
        guard: Stops at a loss or gradient that is not finite. None for a model that is not trained.
        sampling: Fields of `VideoSampling`. They are saved with the weights, too.
    """

    def __init__(
        self,
        model_dir: Path,
        freeze: tuple[str, ...] = (),
        max_gradient_norm: float = 1.0,
        processor_settings: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        guard: StepGuard | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model_name=str(model_dir))
        self.processor_settings = processor_settings or {}
        self.sampling = sampling
        self.model_dir = model_dir
        self.freeze = (*freeze, "language") if lora else freeze
        self.lora = lora
        self.max_gradient_norm = max_gradient_norm
        self.guard = guard
        self.gradient_norm = 0.0
        self.gradient_of_ones = 1.0
        self.last_learning_rate = 0.0
        self.validation = ValidationSum()
        self.losses: list[tuple[float, int]] = []  # of the step's micro-batches: sum, learned tokens
        self._learned: torch.Tensor | None = None  # of the micro-batch: positions whose logits are wanted
        self._step: list[tuple[torch.Tensor, int, list[str]]] = []  # loss, tokens, keys of its micro-batches

    def configure_model(self) -> None:
        """Loads the weights in fp32: the optimizer's copy; lower precision is the Trainer's autocast. `ShardedStrategy`
        has set the mesh that they are spread over."""
        if self.model is not None:
            return
        # Its gradients become nan where the logsumexp of a row of 64 or 192 scores is under about -88: exp(88.7) is the
        # largest float32 (benchmarks/speed/low_scores.py).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = AutoModelForImageTextToText.from_pretrained(self.model_dir, torch_dtype=torch.float32)
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = not is_frozen(name, self.freeze)
        if self.lora:
            adapt_hf(self.model, self.lora)
        patches = self.model.visual.patch_embed
        patches.forward = MethodType(embed_patches, patches)
        attend_each_step_alone(self.model.visual)
        self.model.lm_head.register_forward_pre_hook(self._choose_positions)
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard(self.model, mesh)
            self.gradient_of_ones = gradient_of_ones(mesh)

    def _choose_positions(self, head: torch.nn.Module, hidden: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """The vocabulary is projected to where a token is learned only: [B, L, hidden] -> [T, hidden]."""
        return hidden if self._learned is None else (hidden[0].flatten(0, 1).index_select(0, self._learned),)

    def forward(self, batch: QwenBatch, learned: torch.Tensor | None = None) -> torch.Tensor:
        """-> logits [B, L, vocabulary], or [T, vocabulary] of the positions `learned`, int64 [T], of all samples."""
        self._learned = learned
        inputs = batch.model_inputs()
        if batch.image_kept is not None and self.device_mesh is None:  # a sharded model does it by itself
            inputs = embed_media(self.model, inputs)
        return self.model(**inputs, use_cache=False).logits

    def training_step(self, batch: QwenBatch, batch_index: int) -> dict[str, torch.Tensor]:
        """The sum of the losses of the learned tokens; `configure_gradient_clipping` divides by the tokens of the step.

        "loss" is multiplied by the micro-batches of a step and by the processes: Lightning divides by the first, and
        DDP averages over the second (`gradient_of_ones` says whether FSDP2 does). "loss_sum" is the micro-batch's own.
        """
        loss_sum, tokens = self._loss(batch)
        self._step.append((loss_sum.detach(), tokens, batch.keys))
        processes = self.trainer.world_size / self.gradient_of_ones
        loss = loss_sum * (self.trainer.accumulate_grad_batches * processes)
        if self.device_mesh is None and len(batch.image_grid_thw) + len(batch.video_grid_thw) == 0:
            loss = loss + 0.0 * self._idle_vision()
        return {"loss": loss, "loss_sum": loss_sum.detach()}

    def _loss(self, batch: QwenBatch) -> tuple[torch.Tensor, int]:
        learned = copy_to(batch.learned_positions(), batch.labels.device)
        logits = self.forward(batch, learned)
        targets = batch.labels.flatten().index_select(0, learned)
        return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(learned)

    def _idle_vision(self) -> torch.Tensor:
        """A text-only micro-batch still runs the vision tower on one blank image: in data-parallel training every
        process must have a gradient for every weight, or the others wait for ever."""
        tokens, grid = blank_image(self.model, self.device)
        return self.model.visual(tokens, grid_thw=grid).sum()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Makes the gradient the mean over the learned tokens of the step, whatever its micro-batches and processes.
        Clips it to max_gradient_norm (0: not at all). Keeps the norm and the rate of this step for the log. Raises
        NonFiniteStep."""
        step, self._step = self._step, []
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, float(max(1, self._over_processes(sum(tokens for _, tokens, _ in step)))))
        limit = self.max_gradient_norm or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters(), limit))
        self.gradient_norm, *losses = torch.stack([norm, *(loss_sum for loss_sum, _, _ in step)]).tolist()
        self.losses = [(loss, tokens) for loss, (_, tokens, _) in zip(losses, step)]
        micro_batches = [(loss, keys) for loss, (_, _, keys) in zip(losses, step)]
        self.guard.check(self.trainer.global_step + 1, self.gradient_norm, micro_batches)
        self.last_learning_rate = optimizer.param_groups[0]["lr"]

    def _over_processes(self, tokens: int) -> int:
        """Their sum. With several processes, the host waits for the device."""
        if not torch.distributed.is_initialized():
            return tokens
        total = torch.full((), tokens, device=self.device)
        torch.distributed.all_reduce(total)
        return int(total)

    def on_validation_epoch_start(self) -> None:
        self.validation.begin(self.device)

    def validation_step(self, batch: QwenBatch, batch_index: int) -> None:
        self.validation.add(*self._loss(batch), len(batch.keys))

    def on_validation_epoch_end(self) -> None:
        """Mean over all learned tokens of the split, whatever the number of processes."""
        if self.device_mesh is not None:
            self.model.reshard()  # backward does it in training; here the root's weights would stay gathered
        self.validation.end()
        self.log("val_loss", self.validation.loss, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """NeMo stores its constructor's arguments, functions among them; they come from the command line instead."""
        checkpoint.pop("hyper_parameters", None)
        checkpoint.pop("hparams_name", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count_batches_of_whole_steps(checkpoint, self.trainer.accumulate_grad_batches)

    def save_hf(
        self,
        output_dir: Path,
        state_dict: dict[str, torch.Tensor] | None = None,
        dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        """A complete HF directory: weights, config, tokenizer, and processor with this run's settings. Atomic.

        state_dict: the model's own if None; adapters in it are merged.
        dtypes: of the weights in the file; None: as they are trained, in float32.
        """
        weights = self.model.state_dict() if state_dict is None else state_dict
        edit = partial(write_reading, settings=self.processor_settings, sampling=self.sampling)
        write_model(self.model, merged_hf(weights, self.lora), self.model_dir, output_dir, dtypes, edit)

    def export_hf(self, output_dir: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """`save_hf` in the data types of model_dir: what a run leaves to take along."""
        self.save_hf(output_dir, state_dict, dtypes_of(self.model_dir))

    def rehearse_save(self, output_dir: Path) -> None:
        """`export_hf` with one weight."""
        shape = self.model.get_parameter(PATCH_EMBEDDING).shape  # its values may be shared among the processes
        self.export_hf(output_dir, {PATCH_EMBEDDING: torch.zeros(shape)})


def embed_patches(patches: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The tower's patch embedding, a convolution whose kernel is the whole patch, as one matrix product: tokens [N, K]
    -> [N, E]. `patches` keeps its weight and the name of it."""
    weight = patches.proj.weight.flatten(1)
    return embed_tokens(tokens.view(-1, weight.shape[1]).to(weight.dtype), weight)


def names_in_hf(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of `QwenAutoModel` by their names in its Hugging Face model."""
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes the checkpoint folders described at the top of this file; nothing is unpickled but plain data,
    tensors and Energon's own state classes."""

    def __init__(self, module: QwenAutoModel) -> None:
        self.module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = unnamed(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = names_in_hf(checkpoint.pop("state_dict"))
        self.module.save_hf(temporary / "hf", weights)
        torch.save({**checkpoint, "adapters": adapters_of(weights)}, temporary / TRAINER_FILE)
        sync_files(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)

    def load_checkpoint(self, path: str | os.PathLike, map_location: Any = None, **unused: Any) -> dict[str, Any]:
        path = Path(path)
        with torch.serialization.safe_globals(energon_state_classes()):
            checkpoint = torch.load(path / TRAINER_FILE, map_location="cpu", weights_only=True)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted((path / "hf").glob("*.safetensors")):
            weights.update(load_file(file))
        if self.module.model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        adapters = checkpoint.pop("adapters", {})
        frozen = self.module.model.state_dict()  # as model_dir has it; hf/ has it merged with the adapters
        weights |= adapters | {name: frozen[name] for name in adapted_weights(adapters)}
        checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in weights.items()}
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        shutil.rmtree(path, ignore_errors=True)


def build_optimizer(config: TrainingConfig) -> PytorchOptimizerModule:
    """AdamW, linear warm-up, cosine down to min_lr; no decay on biases and norms."""
    optimizer = partial(
        torch.optim.AdamW,
        lr=config.lr,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=config.sharding == "none",  # one pass over the weights; a tiny model's step on a CPU takes a third
    )
    schedule = CosineAnnealingScheduler(
        max_steps=config.max_steps, warmup_steps=config.warmup_steps, constant_steps=0, min_lr=config.min_lr
    )
    return PytorchOptimizerModule(
        optimizer, lr_scheduler=schedule, no_weight_decay_cond=lambda name, parameter: parameter.ndim < 2
    )


def build_strategy(config: TrainingConfig) -> str | DDPStrategy | ShardedStrategy:
    """How the processes of the run share the model. Buffers are constants, so they are not sent in each micro-batch;
    gradients are sent from where they stand, without a copy."""
    if config.sharding == "fsdp2":
        return ShardedStrategy(config.world_size)
    if config.world_size == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def build_trainer(
    config: TrainingConfig, module: QwenAutoModel, callbacks: list[Callback], validates: bool
) -> nl.Trainer:
    """Lightning's Trainer as NeMo wraps it. Steps are optimizer steps; Lightning counts validation in micro-batches."""
    return nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        strategy=build_strategy(config),
        precision=config.precision,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.val_interval * config.accumulate,
        callbacks=callbacks,
        plugins=[FolderCheckpointIO(module)],
        **trainer_options(config, validates),
    )


def run(
    config: TrainingConfig,
    info: ModelInfo,
    data: EnergonDataModule,
    merge_size: int,
    extra_callbacks: list[Callback],
) -> None:
    """Fine-tunes, from the newest checkpoint if there is one, and writes the form that was trained into the run folder.

    config: Resolved for this engine.
    info: The checkpoint's token format.
    data: Loaders.
    merge_size: Side of the square of vision tokens that become one token of the language model.
    extra_callbacks: Called besides this engine's own.
    """
    module = QwenAutoModel(
        config.model_dir,
        config.freeze,
        config.max_gradient_norm,
        config.processor_settings,
        LoRA.of(config),
        StepGuard(config.run_dir / NON_FINITE),
        vars(VideoSampling.of(config)),
    )
    log = TrainingLog(config.run_dir, config.max_steps, config.log_interval, merge_size, data.task_encoder.skips)
    callbacks = [
        RehearseSave(config, info, module.rehearse_save),
        log,
        *step_checkpoints(config, log.restart_clock),
        *extra_callbacks,
    ]
    trainer = build_trainer(config, module, callbacks, data.validates)
    llm.finetune(
        model=module,
        data=data,
        trainer=trainer,
        log=build_loggers(config),
        resume=resume(config),
        optim=build_optimizer(config),
        tokenizer=None,  # the loader has it; NeMo would store it in a field that this class does not have
    )
    weights = trainer.strategy.lightning_module_state_dict()  # collective, where they are sharded
    if trainer.is_global_zero:
        module.export_hf(trained_folder(config.run_dir, info), names_in_hf(weights))
