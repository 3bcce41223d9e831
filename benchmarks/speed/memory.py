"""Device memory of Qwen2-VL-2B training on cards of several sizes: what is expected, what is taken, what is chosen.

    python -m benchmarks.speed.memory --json memory.json

Random weights at the real size, x4 tokens, bf16, the engine's own model and optimizer. Two tables:

    terms   bytes of each term of training/memory.py, expected and measured; `MEASURED` there takes their ratio
    cards   the packed sequence chosen for a card, and two steps over the longest sample and over a full sequence

Smaller cards are made by torch.cuda.set_per_process_memory_fraction. A card has what CUDA reports there, less its
context. Without a device the expected figures are printed alone.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.samples import real_config
from benchmarks.speed.training import packed_forward, set_up
from dct_qwen2vl.common.files import write_json
from dct_qwen2vl.dct.configuration_dct import DCTConfig
from dct_qwen2vl.training.memory import GIB, MEASURED, Chosen, Corrections, Stage, Training, choose, peak, stages

# GB of its name -> GiB that CUDA reports, of the least of that name: A10 and L4, A100, L40S, A100, H200.
CARDS = {24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.7}
CONTEXT = 0.6  # GiB
WAYS = ("all", "lora")
RANK = 16  # of adapters
FEW, SHORT, LONG, VISION = 16, 2048, 4096, 8192  # tokens of the sequences from which terms are measured
SIZES = ("pack_tokens", "pack_vision_tokens")


@dataclass(frozen=True)
class Measured:
    """Bytes after the forward pass of a sequence, and at the widest place of both passes."""

    forward: int
    most: int


def way_of(name: str, recompute: bool = False) -> Training:
    if name == "lora":
        return Training(language=False, lora_rank=RANK, recompute=recompute)
    return Training(recompute=recompute)


def build(hf_config: Any, way: Training):
    """The engine's model under Megatron's DDP and optimizer."""
    from benchmarks.speed.training import Training as Trained
    from dct_qwen2vl.training.lora import LoRA
    from dct_qwen2vl.training.megatron_lora import adapt_megatron
    from dct_qwen2vl.training.megatron_model import fuse_gradient_accumulation, model_config

    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = model_config(hf_config, 65536, **(options if way.recompute else {})).configure_model()
    if way.lora_rank:
        for parameter in model.language_model.parameters():
            parameter.requires_grad = False
        adapt_megatron(model, LoRA(way.lora_rank, 32, 0))
    fuse_gradient_accumulation(model)
    return Trained(model)


def sequence_of(hf_config: Any, tokens: int, vision_tokens: int, seq_length: int, learned: int | None = None):
    """A full packed sequence in pinned memory. learned: tokens, None: all that are not visual."""
    from dct_qwen2vl.training.full_sequence import full_sequence

    sequence = full_sequence(hf_config, (tokens, vision_tokens), seq_length)
    if learned is not None:
        sequence = replace(sequence, learned=sequence.learned[:learned], targets=sequence.targets[:learned])
    return sequence.pin_memory()


def both_passes(trained, sequence) -> Measured:
    """Without an optimizer step."""
    free()
    torch.cuda.reset_peak_memory_stats()
    with trained.model.no_sync():
        loss, _ = packed_forward(trained.model, sequence)
        forward = torch.cuda.memory_allocated()
        loss.backward()
    trained.model.zero_grad_buffer()
    return Measured(forward, torch.cuda.max_memory_allocated())


def measure_terms(trained, hf_config: Any) -> dict[str, float]:
    """Bytes of each term, by differences between sequences. An optimizer step comes first: its moments are fixed."""
    merged = hf_config.vision_config.spatial_merge_size**2
    make = partial(sequence_of, hf_config, seq_length=LONG)
    trained.step([make(SHORT, VISION)], packed_forward)
    free()
    fixed = torch.cuda.memory_allocated()
    short = both_passes(trained, make(SHORT, merged, learned=FEW))
    long = both_passes(trained, make(LONG, merged, learned=FEW))
    seeing = both_passes(trained, make(SHORT, VISION - merged * FEW, learned=FEW))
    saying = both_passes(trained, make(LONG, merged, learned=FEW + SHORT))
    return {
        "fixed": fixed,
        "text": (long.forward - short.forward) / (LONG - SHORT),
        "vision": (seeing.forward - short.forward) / (VISION - merged * (FEW + 1)),
        "head": (saying.forward - long.forward) / SHORT,
        "working_text": ((long.most - long.forward) - (short.most - short.forward)) / (LONG - SHORT),
        "constant": long.forward - fixed - (long.forward - short.forward) / (LONG - SHORT) * LONG,
        "widest_constant": (short.most - short.forward) * 2 - (long.most - long.forward),
    }


def print_terms(name: str, stage: Stage, measured: dict[str, float]) -> None:
    print(f"\n{name:<24}{'expected':>14}{'measured':>14}{'ratio':>8}  (bytes)")
    for term, value in measured.items():
        expected = getattr(stage, term, 0.0)
        ratio = f"{value / expected:8.3f}" if expected else f"{'':8}"
        print(f"{term:<24}{expected:14.0f}{value:14.0f}{ratio}", flush=True)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run_card(trained, hf_config: Any, of_stages: list[Stage], chosen: Chosen, seq_length: int) -> dict[str, Any]:
    """Two steps over the longest sample, then over a full sequence; a smaller one where the memory is full."""
    from dct_qwen2vl.training.full_sequence import settle

    found: dict[str, Any] = {}

    def fits(budget: tuple[int, int]) -> bool:
        merged = of_stages[0].merge
        longest = (seq_length, merged * (seq_length - FEW))
        full = (budget[0], min(budget[1], merged * budget[0]))
        try:
            for tokens, vision_tokens in (longest, full):
                found.update(step_twice(trained, sequence_of(hf_config, tokens, vision_tokens, seq_length)))
                found["predicted_gib"] = peak(of_stages, tokens, vision_tokens) / GIB
        except torch.OutOfMemoryError:
            trained.model.zero_grad_buffer()
            return False
        return True

    def tell(line: str) -> None:
        print(line, flush=True)
        free()

    ran = settle(fits, (chosen.tokens, chosen.vision_tokens), seq_length, SIZES, tell)
    return {**found, "ran": ran, "shrunk": ran != (chosen.tokens, chosen.vision_tokens)}


def step_twice(trained, sequence) -> dict[str, float]:
    """Of the second step."""
    free()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        trained.step([sequence], packed_forward)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds": seconds,
        "tokens_per_second": len(sequence.input_ids) / seconds,
    }


def plan(hf_config: Any, name: str, free_gib: float, seq_length: int, corrections: Corrections) -> Chosen | None:
    return choose(hf_config, way_of(name), free_gib * GIB, seq_length, corrections=corrections)


def describe(line: dict[str, Any]) -> str:
    card = f"{line['card']} GB ({line['free_gib']:.1f} GiB), {line['way']}"
    if not line["tokens"]:
        return f"{card:<30} does not fit"
    chosen = (
        f"{line['tokens']:>6} + {line['vision_tokens']:>6} vision tokens{', recompute' if line['recompute'] else ''}"
    )
    text = f"{card:<30} {chosen:<36} expected {line['expected_gib']:6.1f} GiB"
    if not line.get("ran"):
        return text + (", measured: full" if "ran" in line else "")
    shrunk = f", shrunk to {line['ran'][0]} + {line['ran'][1]}" if line["shrunk"] else ""
    measured = f"measured {line['peak_gib']:6.1f}, reserved {line['reserved_gib']:6.1f}, step {line['seconds']:.2f} s"
    return f"{text}, {measured}, {line['tokens_per_second']:.0f} tokens/s{shrunk}"


def plans(hf_config: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each way and card."""
    lines = []
    for name in arguments.ways:
        for card in arguments.cards:
            free_gib = CARDS[card] - CONTEXT
            chosen = plan(hf_config, name, free_gib, arguments.seq_length, MEASURED)
            line = {"card": card, "free_gib": free_gib, "way": name, "tokens": None, "chosen": chosen}
            if chosen:
                line |= {"tokens": chosen.tokens, "vision_tokens": chosen.vision_tokens}
                line |= {"recompute": chosen.recompute, "expected_gib": chosen.peak / GIB}
            lines.append(line)
    return lines


def measure_way(hf_config: Any, name: str, recompute: bool, lines: list[dict[str, Any]], seq_length: int) -> tuple:
    """The terms of a way, and its lines with what was measured. It wants a new process: what an earlier model has left
    on the device would count."""
    set_up()
    way, total = way_of(name, recompute), torch.cuda.get_device_properties(0).total_memory
    trained = build(hf_config, way)
    terms = measure_terms(trained, hf_config)
    print_terms(titled(name, recompute), stages(hf_config, way, Corrections())[0], terms)
    for line in lines:
        free()
        torch.cuda.set_per_process_memory_fraction(min(1.0, line["free_gib"] * GIB / total))
        line |= run_card(trained, hf_config, stages(hf_config, way), line["chosen"], seq_length)
        print(describe(line), flush=True)
    return terms, lines


def titled(name: str, recompute: bool) -> str:
    return f"{name}, recompute" if recompute else name


def measure(
    hf_config: Any, lines: list[dict[str, Any]], terms: dict[str, Any], seq_length: int, save: Callable[[], None]
) -> None:
    """Fills the lines and the terms of each way. A model is built once for each, and `save` is called after it."""
    for name, recompute in sorted({(line["way"], line["recompute"]) for line in lines if line["chosen"]}):
        mine = [line for line in lines if line["chosen"] and (line["way"], line["recompute"]) == (name, recompute)]
        measured = in_new_process(measure_way, hf_config, name, recompute, mine, seq_length)
        terms[titled(name, recompute)], found = measured
        for line, filled in zip(mine, found, strict=True):
            line |= filled
        save()


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work returns. Nothing of it stays on the device."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # a pool's max_tasks_per_child needs Python 3.11
        return process.submit(work, *arguments).result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cards", nargs="+", type=int, choices=CARDS, default=list(CARDS), help="GB")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all weights, or adapters and tower"
    )
    parser.add_argument("--dct", default="x4", help="token format")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of the longest sample")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    hf_config = real_config(DCTConfig.preset(arguments.dct).num_coefficients)
    lines = plans(hf_config, arguments)
    if not torch.cuda.is_available():
        print("\n".join(describe(line) for line in lines))
        print("benchmarks/speed/memory.py: no CUDA device, so nothing is measured", file=sys.stderr)
        return 0
    results: dict[str, Any] = {"dct": arguments.dct, "seq_length": arguments.seq_length, "terms": {}}
    results["device"] = torch.cuda.get_device_name()

    def save() -> None:
        if arguments.json:
            told = [{name: value for name, value in line.items() if name != "chosen"} for line in lines]
            write_json(arguments.json, {**results, "cards": told})

    measure(hf_config, lines, results["terms"], arguments.seq_length, save)
    print("\n" + "\n".join(map(describe, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
