"""Loading ahead in threads, with the time that was spent waiting."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Prefetch(Generic[Item, Loaded]):
    """Loads items in threads, a few ahead, and hands them out in order.

    Parameters
    ----------
    load
        Loads one item.
    items
        What to load.
    n_threads
        Threads; 0 loads each item when it is asked for.
    n_ahead
        Items that are loaded or being loaded before they are asked for.

    Attributes
    ----------
    waited
        Seconds that :meth:`__next__` has waited so far.
    """

    def __init__(
        self,
        load: Callable[[Item], Loaded],
        items: Iterable[Item],
        *,
        n_threads: int,
        n_ahead: int,
    ) -> None:
        self._load = load
        self._items = iter(items)
        self._pending: deque[Future[Loaded]] = deque()
        self._threads = ThreadPoolExecutor(n_threads, "stofm-load") if n_threads else None
        self._n_ahead = n_ahead
        self.waited = 0.0

    def __enter__(self) -> Prefetch[Item, Loaded]:
        self._fill()
        return self

    def __iter__(self) -> Prefetch[Item, Loaded]:
        return self

    def __next__(self) -> Loaded:
        start = time.perf_counter()
        try:
            if self._threads is None:
                return self._load(next(self._items))
            if not self._pending:
                raise StopIteration
            return self._pending.popleft().result()
        finally:
            self._fill()
            self.waited += time.perf_counter() - start

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while self._threads is not None and len(self._pending) < self._n_ahead:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._pending.append(self._threads.submit(self._load, item))
