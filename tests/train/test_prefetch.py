from __future__ import annotations

import threading
import time

import pytest

from stofm.train.prefetch import Prefetch


@pytest.mark.parametrize("n_threads", [0, 1, 4])
def test_items_come_in_order(n_threads):
    def load(item):
        time.sleep(0.002 * (5 - item % 5))
        return item * 10

    with Prefetch(load, range(17), n_threads=n_threads, n_ahead=5) as loaded:
        assert list(loaded) == [10 * k for k in range(17)]


def test_only_so_many_are_loaded_ahead():
    started = []
    with Prefetch(started.append, range(50), n_threads=2, n_ahead=4) as loaded:
        for k in range(10):
            next(loaded)
            time.sleep(0.005)
            assert len(started) <= k + 1 + 4
    # Leaving does not load the rest.
    assert len(started) <= 14


def test_threads_end_with_the_block():
    before = threading.active_count()
    with Prefetch(time.sleep, [0.001] * 9, n_threads=3, n_ahead=6) as loaded:
        next(loaded)
    assert threading.active_count() == before


@pytest.mark.parametrize("n_threads", [0, 2])
def test_an_error_comes_where_the_item_is_asked_for(n_threads):
    def load(item):
        if item == 2:
            raise OSError("gone")
        return item

    with Prefetch(load, range(5), n_threads=n_threads, n_ahead=4) as loaded:
        assert [next(loaded), next(loaded)] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            next(loaded)


def test_waiting_is_what_was_not_loaded_ahead():
    def load(item):
        time.sleep(0.02)
        return item

    with Prefetch(load, range(3), n_threads=0, n_ahead=0) as slow:
        assert list(slow) == [0, 1, 2]
    assert slow.waited >= 0.06
    done = []
    with Prefetch(done.append, range(3), n_threads=3, n_ahead=3) as fast:
        while len(done) < 3:
            time.sleep(0.001)
        list(fast)
    assert fast.waited < slow.waited / 2
