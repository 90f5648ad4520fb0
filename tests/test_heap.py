"""Garbage collection around imports."""

import gc

import pytest

from amp.heap import loading


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_pauses_and_then_ignores_what_was_loaded(enabled):
    frozen = gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with loading():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.enable()
        gc.unfreeze()
