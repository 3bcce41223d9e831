"""The garbage collector leaves large libraries alone."""

import gc
import weakref

import pytest

from dct_qwen2vl.common.imports import importing


def test_the_collector_rests_and_goes_on_after_an_error():
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_library  # noqa: F401
    assert gc.isenabled()


def test_the_collector_never_goes_through_what_was_there_at_the_end_but_through_what_comes_later():
    with importing():
        imported = [object()]
    later = [object()]
    assert gc.is_tracked(imported) and not any(each is imported for each in gc.get_objects())
    assert any(each is later for each in gc.get_objects())


def test_the_garbage_from_before_is_collected():
    loop = Loop()
    loop.itself, gone = loop, weakref.ref(loop)
    del loop
    with importing():
        assert gone() is None


class Loop:
    """Only the collector can free one that holds itself."""


def test_a_collector_that_rested_before_rests_after():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
