"""Fixtures of the tests of ``stofm.tl``."""

from __future__ import annotations

import pytest


@pytest.fixture
def few_steps(monkeypatch):
    """Let models be tuned in a few steps where no other length is asked for."""
    from stofm.heads import tuning

    short = tuning.FineTuning(epochs=1, min_steps=4, validate_every=2)
    monkeypatch.setattr(tuning, "FineTuning", lambda: short)


@pytest.fixture
def scales_of():
    """Numbers that a network divides representations of some widths by: one for each of them."""

    def read(network, widths):
        parts = network.input_scale.split(list(widths))
        assert all(bool((part == part[0]).all()) for part in parts)
        return [float(part[0]) for part in parts]

    return read
