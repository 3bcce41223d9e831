"""Where the host waits for the device: each time the device may run out of work.

PyTorch warns of such calls if it is asked to. Counted here, by the place in the code, they show what is left.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WARNING = "called a synchronizing CUDA operation"  # torch 2.11
FRAMES = 6  # of a place, the innermost first


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts inside the block what makes the host wait for the device. It needs one."""
    with counted_warnings() as found:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counted_warnings() -> Iterator[Counter[str]]:
    """Counts PyTorch's warnings of waits by their places, of all threads. Other warnings are shown as before."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.filterwarnings("always", f".*{WARNING}")

        def count(message, *arguments, **options) -> None:
            if WARNING in str(message):
                found[place()] += 1
            else:
                show(message, *arguments, **options)

        warnings.showwarning = count
        yield found


def place() -> str:
    """The functions that are being called, without those of torch and of this file: "file:line function < ..."."""
    frames = [frame for frame in reversed(traceback.extract_stack()) if not is_inside(frame.filename)]
    return " < ".join(f"{shorten(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames[:FRAMES])


def is_inside(filename: str) -> bool:
    return filename in (__file__, warnings.__file__) or "/torch/" in filename


def shorten(filename: str) -> str:
    """A path from its package on, or its last three parts."""
    _, found, rest = filename.rpartition("/site-packages/")
    return rest if found else "/".join(filename.split("/")[-3:])


def describe(found: Counter[str], what: str) -> str:
    """Lines: how many, and each place with its count, the most frequent first.

    found: of `host_waits`.
    what: "step 3", say.
    """
    lines = [f"{found.total()} waits of the host for the device in {what}"]
    return "\n".join([*lines, *(f"{count:5d}  {where}" for where, count in found.most_common())])
