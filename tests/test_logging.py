from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from stofm._logging import counter, progress, step_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def draw_bars():
    """Draw a bar of each kind, and count the states that stderr was given."""
    list(progress(range(9), "a", "step", show=True))
    with counter(9, "b", "step", show=True) as advance:
        advance(9)
    bar = step_bar("c", total=9, done=0, show=True)
    bar.update()
    bar.close()
    return sys.stderr.getvalue().count("\r")


def test_bars_are_drawn_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert draw_bars() > 3


def test_a_file_gets_no_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert draw_bars() == 0


@pytest.mark.parametrize("config", [{}, {"IPKernelApp": {}}])
def test_a_notebook_shows_bars_though_it_is_no_terminal(monkeypatch, config):
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert (draw_bars() > 3) == bool(config)


def test_without_stderr_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress([1], "a", "step", show=True)) == [1]
