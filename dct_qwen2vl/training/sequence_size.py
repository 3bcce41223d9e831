"""The size of packed sequences where the command line leaves it open: what fits the device, or what the run began with.

memory.py says how much a size takes; full_sequence.py tries it.
"""

import os
from dataclasses import replace

from dct_qwen2vl.training.config import SEQUENCE_TOKENS, STEP_TOKENS, RunError, TrainingConfig
from dct_qwen2vl.training.memory import GIB, MOST_TOKENS, Training, choose, longest_sample, stages
from dct_qwen2vl.training.run_file import earlier_settings


def leaves_size_open(config: TrainingConfig, engine: str) -> bool:
    """Whether a run packs sequences and the command line does not say how long they are.

    config: of the command line.
    engine: "megatron" or "automodel".
    """
    return engine == "megatron" and config.micro_batch_size is None and config.pack_tokens is None


def as_begun(config: TrainingConfig) -> TrainingConfig:
    """With the size, the batch and the recomputation that a run began with which now goes on."""
    earlier = {} if config.restart_data else earlier_settings(config)
    if not earlier.get("pack_tokens"):
        return config
    names = ("pack_tokens", "pack_vision_tokens", "global_batch_size")
    taken = {name: earlier[name] for name in names if getattr(config, name) is None}
    return replace(config, recompute=config.recompute or earlier["recompute"], **taken)


def choose_size(config: TrainingConfig) -> tuple[TrainingConfig, str | None]:
    """With the largest size that fits, and a line that says so. Collective. Raises RunError where none fits.

    Without a device to measure it returns the configuration as it is.
    """
    from transformers import Qwen2VLConfig

    free = least_of_all(config, free_bytes(config.memory_limit))
    if free is None:
        return config, None
    model = Qwen2VLConfig.from_pretrained(config.model_dir)
    training = Training.of(config)
    found = choose(model, training, free, config.seq_length, most_tokens(config), config.pack_vision_tokens)
    if found is None:
        of_stages = stages(model, replace(training, recompute=True))
        needed, fixed = longest_sample(of_stages, config.seq_length), max(stage.fixed for stage in of_stages)
        error = RunError(
            f"{config.model_dir} does not train in {free / GIB:.1f} GiB of device memory: model and optimizer take "
            f"{fixed / GIB:.1f}, with a sample of --seq-length {config.seq_length} tokens {needed / GIB:.1f}: "
            f"{advice(config)}"
        )
        error.told = config.rank > 0
        raise error
    why = ""
    if found.recompute and not config.recompute:
        why = f"; --recompute is on, since a sample of {config.seq_length} tokens does not fit without it"
    line = (
        f"Packed sequences of up to {found.tokens} tokens, {found.vision_tokens} vision tokens: expected to take "
        f"{found.peak / GIB:.1f} of {free / GIB:.1f} GiB, model and optimizer {found.fixed / GIB:.1f}{why}"
    )
    chosen = {"pack_tokens": found.tokens, "pack_vision_tokens": found.vision_tokens}
    names = tuple(name for name in chosen if getattr(config, name) is None)
    return replace(config, chosen_sizes=names, recompute=found.recompute, **chosen), line


def most_tokens(config: TrainingConfig) -> int:
    """A step of all processes keeps to STEP_TOKENS where that leaves each the usual sequence."""
    return min(MOST_TOKENS, max(SEQUENCE_TOKENS, STEP_TOKENS // config.data_parallel))


def advice(config: TrainingConfig) -> str:
    """What a user can lower."""
    more = "" if config.lora_rank else "add --lora-rank 16, "
    return f"{more}lower --seq-length, or spread the model with --tensor-parallel"


def free_bytes(limit: float | None) -> int | None:
    """Of this process's device, its own context taken off; None without one and without a limit.

    limit: GiB.
    """
    import torch

    limited = None if limit is None else int(limit * GIB)
    if not torch.cuda.is_available():
        return limited
    free, _ = torch.cuda.mem_get_info(own_device())
    return free if limited is None else min(free, limited)


def own_device() -> int:
    """Number of this process's device, which Lightning takes as well; the only one where a process sees one alone."""
    import torch

    return min(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() - 1)


def limit_memory(limit: float | None) -> None:
    """PyTorch takes no more of this process's device. limit: GiB."""
    import torch

    if limit is not None and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info(own_device())
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total), own_device())


def least_of_all(config: TrainingConfig, value: int | None) -> int | None:
    """The least of all processes. Collective where torchrun has started several."""
    import torch.distributed

    if value is None or config.world_size == 1 or not torch.distributed.is_torchelastic_launched():
        return value
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore("free_memory", store)
    store.set(f"of{rank}", str(value))
    return min(int(store.get(f"of{each}")) for each in range(processes))
