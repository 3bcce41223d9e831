"""How large libraries are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For the import of large libraries: nothing is collected inside the block. What an import makes stays, and the
    garbage collector would go through all of it again and again, which is a fifth of the time of NeMo's import."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
