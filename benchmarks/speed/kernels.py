"""What a step's time on the device goes to: torch's profile of it, sorted into kinds of kernels."""

import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

# The first pattern that a kernel's name has decides. Names: torch 2.11, TransformerEngine 2.11, flash-attn-4 4.0.
COMMUNICATION = "communication"
KINDS = {
    COMMUNICATION: r"nccl",
    "attention of the tower": r"flash_(fwd|bwd).*?(96|_80[,_])",
    "attention of the language model": r"flash_(fwd|bwd).*?128",
    "attention": r"flash|fmha|FlashAttention",
    "matrix products": r"nvjet|gemm|cutlass.*(sm90|sm80)|xmma|splitK|cublas",
    "norms": r"normalization|layer_?norm|rms_?norm|_ln_|ln_(fwd|bwd)",
    "rotary": r"rope|rotary",
    "loss": r"cross_entropy|online_softmax|element_mul_kernel",
    "optimizer": r"multi_tensor|adam|l2norm",
    "activations": r"gelu|silu|swiglu|sigmoid|gated",
    "casts to FP8": r"cast_transpose|amax_kernel",
    "copies": r"memcpy|memset|copy|CatArray|direct_copy",
    "element by element": r"elementwise|triton_poi|reduce|triton_red|index|scatter|gather|fill",
}


def kind_of(name: str) -> str:
    """Key of KINDS, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def record(step: Callable[[], object], steps: int = 1) -> tuple[list[tuple[str, float, float]], float]:
    """Runs steps under torch's profiler.

    step: an optimizer step.
    steps: how many, one after the other. The device is idle at the start of the first, and when the last has ended.

    Returns:
        Name, start and end in microseconds of everything that ran on the device, and the seconds of the steps.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type.name == "CUDA"
    ]
    return spans, seconds


def busy_seconds(spans: list[tuple[str, float, float]]) -> float:
    """Seconds in which at least one of the spans runs."""
    busy, reached = 0.0, float("-inf")
    for begin, end in sorted((begin, end) for _, begin, end in spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / 1e6


def shares(spans: list[tuple[str, float, float]], seconds: float) -> dict[str, float]:
    """Share of the step's time by kind, the largest first, then "gaps", in which nothing ran. Kernels that run side by
    side count both; "waits for communication" is the time in which nothing else ran."""
    spent: Counter = Counter()
    for name, begin, end in spans:
        spent[kind_of(name)] += end - begin
    by_kind = {kind: time / 1e6 / seconds for kind, time in spent.most_common()}
    if COMMUNICATION in by_kind:
        other = [span for span in spans if kind_of(span[0]) != COMMUNICATION]
        by_kind["waits for communication"] = (busy_seconds(spans) - busy_seconds(other)) / seconds
    return {**by_kind, "gaps": 1 - busy_seconds(spans) / seconds}


def trace_shares(file: Path) -> dict[str, float]:
    """`shares` of a trace (.json.gz) that `--profile` of a run wrote, from its first kernel to the end of its last."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        events = json.load(lines)["traceEvents"]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in on_device]
    if not spans:
        return {}
    seconds = (max(end for *_, end in spans) - min(begin for _, begin, _ in spans)) / 1e6
    return shares(spans, seconds)


def longest(spans: list[tuple[str, float, float]], seconds: float, count: int = 40) -> list[dict]:
    """The kernels that take the most of the step: name, kind, share of the time, calls."""
    spent: Counter = Counter()
    calls = Counter(name for name, _, _ in spans)
    for name, begin, end in spans:
        spent[name] += end - begin
    return [
        {"kernel": name[:300], "kind": kind_of(name), "share": time / 1e6 / seconds, "calls": calls[name]}
        for name, time in spent.most_common(count)
    ]


def print_kinds(columns: dict[str, dict[str, float]]) -> None:
    """What steps' time goes to, in %, a column each.

    columns: `shares` by the name of a column.
    """
    first = next(iter(columns.values()))
    kinds = sorted({kind for found in columns.values() for kind in found}, key=lambda kind: -first.get(kind, 0))
    print("\n" + f"{'%':<33}" + "".join(f"{name:>10}" for name in columns))
    for kind in kinds:
        print(f"{kind:<33}" + "".join(f"{100 * found.get(kind, 0):>10.1f}" for found in columns.values()))
