"""How large libraries are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For the import of large libraries, which makes a million objects that stay. The garbage collector does not go
    through them, neither inside the block nor later. That is a sixth of the time of a short training run."""
    gc.collect()  # the garbage that there is would stay, too
    with collecting_nothing():
        yield
    gc.freeze()


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """The garbage collector rests inside the block."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
