"""Nothing is collected while large libraries are imported."""

import gc

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


def test_a_collector_that_rested_before_rests_after():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
