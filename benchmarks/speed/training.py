"""Training speed of Qwen2-VL on one GPU: NeMo's recipe as it ships against this repository's engine, in one run.

    python -m benchmarks.speed.training --json training.json
    torchrun --nproc-per-node 2 -m benchmarks.speed.training --size 7b --ways x4 --kernels

Random weights at the real size, all of them trained, bf16, Megatron-core's distributed optimizer; the tokens are random
and in memory, in the layout that the loader gives. An optimizer step sees the same samples in every way.

    videos     16 frames of 448 x 448 and 256 tokens of text, half of them learned
    mix        images of several sizes and conversations of several lengths, one in ten without an image
    camera, screens, pages   drawn, of which --skip-db leaves out cells (scenes.py); a page has 128 tokens of text

    stock 1   NeMo's model on pixels, one sample a micro-batch: the recipe as it ships, but with all weights trained
    stock N   the same at the micro-batch that is fastest
    none      this repository's engine on pixels: packed sequences up to two budgets of tokens
    exact, x4, x16   the same on DCT tokens; with --skip-db also each without the cells that a kept cell already shows

MFU counts the matrix products that a way has to do (flops.py) against the device's dense bf16 peak. Steps follow each
other as in a run: nothing waits between them but what a step itself waits for. Busy is the share of PROFILED steps in
which some kernel runs, by torch's profiler. --kernels prints what their time goes to, --waits where a step makes the
host wait for the device. The ratios are samples/s over those of stock 1 and of stock N.

Under torchrun its processes, a GPU each, share every layer (tensor parallel). The figures are of the first, MFU of all.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.kernels import busy_seconds, longest, print_kinds, record, shares
from benchmarks.speed.samples import (
    IMAGE_ID,
    LANGUAGE,
    PIXEL_BLOCK,
    PIXEL_WIDTH,
    VIDEO_ID,
    Work,
    make_samples,
    make_work,
    pad,
    real_config,
    sequences_of,
)
from benchmarks.speed.scenes import WORKS as SCENES
from dct_qwen2vl.common.files import write_json

WIDTH = 10  # of a way's name
STOCK_IMAGE, STOCK_VIDEO = -200, -300  # NeMo's ids of visual tokens
CLIP_GRAD = 1.0
PROFILED = 2  # steps in which kernels are recorded
PROFILED_STOCK = 2  # micro-batches of stock, which launches tens of thousands of kernels in each


# The two models, under the same wrapper and optimizer


class Training:
    """A model under Megatron-core's DDP and distributed optimizer, as NeMo's strategy sets them up.

    finalize: what is done to gradients before the optimizer. None: Megatron-core's own.
    clip_grad: the largest norm of a gradient. 0: the optimizer does not clip.
    """

    def __init__(self, model, finalize: Callable | None = None, clip_grad: float = CLIP_GRAD) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        model.config.calculate_per_token_loss = True
        model.config.finalize_model_grads_func = finalize or finalize_model_grads
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        model.cuda()
        self.model = DistributedDataParallel(model.config, ddp, Float16Module(model.config, model))
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=1e-6, bf16=True, use_distributed_optimizer=True, clip_grad=clip_grad), [self.model]
        )

    def step(self, batches: list, forward: Callable) -> torch.Tensor:
        """One optimizer step over micro-batches in pinned memory; forward(model, batch) -> loss sum, tokens. Returns
        the sum of the losses, on the device."""
        from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

        def forward_step(iterator, model):
            loss, tokens = forward(model, next(iterator))
            return loss, lambda output: (output, tokens, {"loss": output.detach()})

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
        )
        self.optimizer.step()
        return sum(entry["loss"] for entry in losses)


class PackedTraining(Training):
    """The same with the Megatron engine's own step (megatron_step.py)."""

    def __init__(self, model) -> None:
        from dct_qwen2vl.training.megatron_step import DeviceCopies, average_gradients

        super().__init__(model, average_gradients, clip_grad=0.0)
        self.optimizer.get_grad_norm = self._measure_and_clip
        self.copies = DeviceCopies()

    def _measure_and_clip(self) -> float:
        from dct_qwen2vl.training.megatron_step import clip_gradients, read_norm, squared_norm

        norm, _ = read_norm(squared_norm(self.optimizer))
        clip_gradients(self.optimizer, norm, CLIP_GRAD)
        return norm

    def step_packed(self, batches: list) -> torch.Tensor:
        """`step` over packed sequences."""
        return self.step(batches, lambda model, batch: packed_forward(model, self.copies(batch)))


def stock_model():
    from nemo.collections import llm, vlm

    numbers = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return vlm.Qwen2VLConfig(
        language_transformer_config=llm.Qwen2Config1P5B(
            share_embeddings_and_output_weights=True, seq_length=16384, **numbers
        ),
        vision_transformer_config=vlm.Qwen2VLVisionConfig(**numbers),
        vision_projection_config=vlm.MultimodalProjectorConfig(
            projector_type="mcore_mlp", input_size=5120, hidden_size=1536, ffn_hidden_size=5120, **numbers
        ),
        **numbers,
    ).configure_model(None)


def stock_batches(samples: list, micro_batch: int) -> list[dict]:
    """Right-padded batches with NeMo's ids, in pinned memory."""
    from dct_qwen2vl.data.samples import IGNORE_INDEX

    batches = []
    for start in range(0, len(samples), micro_batch):
        chosen = samples[start : start + micro_batch]
        length = max(len(sample.input_ids) for sample in chosen)
        ids, labels = torch.zeros(len(chosen), length, dtype=torch.int64), torch.zeros(len(chosen), length).long()
        mask = torch.zeros(len(chosen), length)
        for row, sample in enumerate(chosen):
            own = sample.input_ids.clone()
            own[own == IMAGE_ID], own[own == VIDEO_ID] = STOCK_IMAGE, STOCK_VIDEO
            ids[row, : len(own)] = own
            labels[row, : len(own) - 1] = sample.input_ids[1:]
            mask[row, : len(own) - 1] = (sample.labels[1:] != IGNORE_INDEX).float()
        batch = {"input_ids": ids, "labels": labels, "loss_mask": mask}
        for tokens, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            present = [sample for sample in chosen if len(getattr(sample, grids))]
            if present:
                batch[tokens] = torch.cat([getattr(sample, tokens) for sample in present])
                batch[grids] = torch.cat([getattr(sample, grids) for sample in present])
        batches.append({name: value.pin_memory() for name, value in batch.items()})
    return batches


def stock_forward(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    batch = {name: value.cuda(non_blocking=True) for name, value in batch.items()}
    losses, mask = model(**batch)
    mask = mask.float()
    return (losses.float() * mask).sum(), mask.sum().int()


def packed_forward(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch.to("cuda")
    losses = model(batch)
    return losses.float().sum(), torch.full((), len(batch.learned), dtype=torch.int, device="cuda")


def packed_training(hf_config, fp8: str | None = None) -> PackedTraining:
    """fp8: TransformerEngine's recipe for the language model's linear layers, as Megatron-core names it."""
    from dct_qwen2vl.training.megatron_model import fuse_gradient_accumulation, model_config

    language = {"fp8": "hybrid", "fp8_recipe": fp8} if fp8 else None
    model = model_config(hf_config, 65536, language=language, tensor_model_parallel_size=processes()).configure_model()
    fuse_gradient_accumulation(model)
    return PackedTraining(model)


# Measuring


def step_seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` steps that follow each other, on the device's clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def measure(
    name: str,
    step: Callable[[list], torch.Tensor],
    batches: list,
    works: list[Work],
    flops: float,
    visual: int,
    repeats: int,
    recorded: int | None = None,
) -> dict:
    """step(batches): an optimizer step over these micro-batches. recorded: how many of them are profiled, in one step.
    None: all, in PROFILED steps."""
    from dct_qwen2vl.training.flops import device_peak

    step(batches[:1])
    step(batches)
    freeze_objects()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    freed = freed_for_room()
    seconds = step_seconds(partial(step, batches), repeats)
    freed = freed_for_room() - freed
    loss = float(step(batches))
    best = float(np.median(seconds))
    spans, profiled = record(partial(step, batches[:recorded]), 1 if recorded else PROFILED)
    line = {
        "way": name,
        "samples_per_second": len(works) / best,
        "visual_tokens_per_second": visual / best,
        "mfu": flops / best / device_peak() / processes(),
        "busy": busy_seconds(spans) / profiled,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "freed_for_room": freed,
        "seconds": seconds,
        "loss": loss,
        "kinds": shares(spans, profiled),
        "kernels": longest(spans, profiled),
    }
    say(
        f"{name:<{WIDTH}} {line['samples_per_second']:9.2f} samples/s {line['visual_tokens_per_second']:9.0f} visual "
        f"tokens/s MFU {line['mfu']:.1%} busy {line['busy']:.0%} {line['peak_gib']:6.1f} GiB, step {best:.2f} s"
    )
    return line


def freed_for_room() -> int:
    """How often the allocator found no room and gave the device back what it had cached, which waits for the device."""
    return torch.cuda.memory_stats()["num_alloc_retries"]


def processes() -> int:
    """Of torchrun; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints in the first process."""
    if is_first():
        print(text, flush=True)


def freeze_objects() -> None:
    """As the loader of a run does: the garbage collector passes over what is there already."""
    gc.collect()
    gc.freeze()


def free() -> None:
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def measure_stock(works: list[Work], sizes: list[int], seed: int, repeats: int) -> list[dict]:
    from dct_qwen2vl.training.flops import training_flops

    samples = make_samples(works, PIXEL_BLOCK, PIXEL_WIDTH, seed)
    grids = torch.cat([torch.cat([s.image_grid_thw, s.video_grid_thw]) for s in samples])
    flops = training_flops(real_config(), grids, torch.tensor([len(s.input_ids) for s in samples]))
    visual = int(grids.prod(dim=1).sum()) // 4
    training, lines = Training(stock_model()), []
    for size in sizes:
        try:
            batches = stock_batches(samples, size)
            step = partial(training.step, forward=stock_forward)
            lines.append(measure(f"stock {size}", step, batches, works, flops, visual, repeats, PROFILED_STOCK))
        except torch.OutOfMemoryError:
            say(f"stock {size}: out of memory")
            break
    del training, step
    free()
    return lines


def measure_packed(
    name: str,
    works: list[Work],
    budget: tuple[int, int],
    seed: int,
    repeats: int,
    skip_db: float = 0.0,
    fp8: str | None = None,
    waits: bool = False,
    size: str = "2b",
) -> dict:
    """skip_db, size: as `sequences_of` has them. fp8: as `packed_training` has it. waits: print those of the host."""
    from dct_qwen2vl.training.flops import training_flops

    hf_config, batches = sequences_of(name, works, budget, seed, skip_db, size)
    if fp8:
        batches = [pad(batch).pin_memory() for batch in batches]
    flops = sum(training_flops(hf_config, b.step_grids(), b.sample_starts.diff(), len(b.learned)) for b in batches)
    visual = sum(len(batch.visual) for batch in batches)
    training = packed_training(hf_config, fp8)
    called = " ".join([name, *(["skip"] if skip_db else []), *(["fp8"] if fp8 else [])])
    line = measure(called, training.step_packed, batches, works, flops, visual, repeats)
    if waits:
        line["waits"] = print_waits(partial(training.step_packed, batches), called)
    del training
    free()
    cells = sum(int(batch.grid_thw.prod(dim=1).sum()) // 4 for batch in batches)
    return {**line, "sequences": len(batches), "budget": budget, "kept_share": visual / cells, "skip_db": skip_db}


def print_waits(step: Callable[[], object], name: str) -> dict[str, int]:
    """Where a step makes the host wait for the device, and how often."""
    from dct_qwen2vl.training.host_waits import describe, host_waits

    with host_waits() as found:
        step()
    say(describe(found, f"a step of {name}"))
    return dict(found)


def set_up() -> None:
    """torch.distributed and Megatron's groups: of torchrun's processes, or of one.

    NeMo is imported here. Something keeps an exception of its first import, and with it the frames that wait for the
    import: imported by a function that then makes a model, it would keep that model on the device.
    """
    import socket

    from megatron.core import parallel_state, tensor_parallel

    import dct_qwen2vl.training.megatron_model  # noqa: F401

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if processes() > 1:
        torch.distributed.init_process_group("nccl")
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=processes())
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def print_ratios(lines: list[dict]) -> None:
    stock = [line for line in lines if line["way"].startswith("stock")]
    if not stock:
        return
    first, best = stock[0], max(stock, key=lambda line: line["samples_per_second"])
    print(f"\n{'way':<{WIDTH}}{'x ' + first['way']:>12}{'x ' + best['way']:>12}")
    for line in lines:
        ratios = [line["samples_per_second"] / other["samples_per_second"] for other in (first, best)]
        print(f"{line['way']:<{WIDTH}}{ratios[0]:12.2f}{ratios[1]:12.2f}")


def print_skipping(lines: list[dict]) -> None:
    """What skipping brings: samples/s over those of the same way with all cells."""
    whole = {line["way"]: line for line in lines}
    for line in lines:
        if line.get("skip_db"):
            ratio = line["samples_per_second"] / whole[line["way"].replace(" skip", "")]["samples_per_second"]
            say(f"{line['way']:<{WIDTH}} {line['kept_share']:.0%} of the cells, samples/s x {ratio:.2f}")


def measure_way(way: str, works: list[Work], is_drawn: bool, arguments: argparse.Namespace) -> list[dict]:
    """The figures of a way, and of its own kinds by the options.

    way: as --ways names it.
    works: of a step.
    is_drawn: whether cells can be skipped.
    arguments: of the command line.
    """
    if way == "stock":
        return measure_stock(works, arguments.stock_sizes, arguments.seed, 1)
    budget = (arguments.pack_tokens, arguments.pack_vision_tokens)
    measure_one = partial(
        measure_packed,
        way,
        works,
        budget,
        arguments.seed,
        arguments.repeats,
        waits=arguments.waits,
        size=arguments.size,
    )
    thresholds = (0.0, arguments.skip_db) if way != "none" and is_drawn and arguments.skip_db else (0.0,)
    recipes = dict.fromkeys((None, arguments.fp8))
    return [measure_one(skip_db=skip_db, fp8=fp8) for skip_db in thresholds for fp8 in recipes]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--work", nargs="+", choices=("videos", "mix", *SCENES), default=["videos", "mix"], help="what is trained on"
    )
    parser.add_argument("--size", choices=LANGUAGE, default="2b", help="of the model; stock is always the 2b")
    parser.add_argument("--ways", nargs="+", default=["stock", "none", "exact", "x4", "x16"], help="what is measured")
    parser.add_argument("--samples", type=int, default=32, help="samples of an optimizer step")
    parser.add_argument("--stock-sizes", nargs="+", type=int, default=[1, 2, 4, 8], help="micro-batches of stock")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="most tokens of a packed sequence")
    parser.add_argument("--pack-vision-tokens", type=int, default=32768, help="and most vision tokens")
    parser.add_argument("--skip-db", type=float, default=0.0, help="dB, of drawn work: each way again with skipping")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps; the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and of the mix")
    parser.add_argument("--fp8", choices=("delayed", "tensorwise", "blockwise"), help="each way once more with this "
                        "recipe in the language model's linear layers")  # fmt: skip
    parser.add_argument("--kernels", action="store_true", help="print what a step's time goes to")
    parser.add_argument("--waits", action="store_true", help="print where a step makes the host wait for the device")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    if "stock" in arguments.ways and (processes() > 1 or arguments.size != "2b"):
        parser.error("stock is measured on one GPU at 2b only: leave it out of --ways")
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        print("benchmarks/speed/training.py needs a CUDA device for each process", file=sys.stderr)
        return 1
    set_up()
    results = {"device": torch.cuda.get_device_name(), "seed": arguments.seed, "samples": arguments.samples}
    results |= {"size": arguments.size, "tensor_parallel": processes()}
    for work in arguments.work:
        works = make_work(work, arguments.samples, arguments.seed)
        say(f"\n{work}: {len(works)} samples a step")
        results[work] = lines = []
        for way in arguments.ways:
            lines += measure_way(way, works, work in SCENES, arguments)
            if arguments.json and is_first():
                write_json(arguments.json, results)
        print_ratios(lines)
        print_skipping(lines)
        if arguments.kernels and is_first():
            print_kinds({line["way"]: line["kinds"] for line in lines})
    return 0


if __name__ == "__main__":
    sys.exit(main())
