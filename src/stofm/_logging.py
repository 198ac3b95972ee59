"""The package's logger and its progress bars."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

T = TypeVar("T")

logger = logging.getLogger("stofm")

#: Seconds that are worth a line, and from which on they are told in minutes.
_LONG, _MINUTES = 20.0, 120.0


class _FallbackHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints to stderr unless the application has set up logging of its own.

    Lines that are shown as a warning are left out.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and not getattr(record, "is_shown", False):
            super().emit(record)


if not logger.handlers:
    _handler = _FallbackHandler()
    _handler.setFormatter(logging.Formatter("stofm: %(message)s"))
    logger.addHandler(_handler)
    if logger.level == logging.NOTSET:
        # Whoever set a level before this module was imported keeps it.
        logger.setLevel(logging.INFO)


def bars_can_be_seen() -> bool:
    """Whether stderr is a terminal or this is a notebook; in a file a bar is a heap of lines."""
    in_notebook = "ipykernel" in sys.modules and "IPKernelApp" in _ipython_config()
    return in_notebook or bool(sys.stderr and sys.stderr.isatty())


def _ipython_config() -> Any:
    shell = sys.modules["IPython"].get_ipython()
    return {} if shell is None else shell.config


def _bar(items: Iterable[T] | None, *, show: bool, leave: bool = False, **options: Any) -> Any:
    """Give a bar, which is mute if it is not to be shown or can't be seen."""
    from tqdm.auto import tqdm

    if not (show and bars_can_be_seen()):
        options["disable"] = True  # what is not passed is read from TQDM_DISABLE
    return tqdm(items, leave=leave, **options)


def progress(items: Collection[T], description: str, unit: str, *, show: bool) -> Iterable[T]:
    """Wrap `items` in a progress bar."""
    bar: Iterable[T] = _bar(items, desc=description, unit=unit, show=show)
    return bar


@contextmanager
def counter(
    total: int, description: str, unit: str, *, show: bool
) -> Iterator[Callable[[int], object]]:
    """Give a function that moves a bar on.

    Where no bar can be seen, and it takes long, a line tells after the first step how long it will take.
    """
    started, done = time.perf_counter(), 0
    with _bar(None, total=total, desc=description, unit=unit, show=show) as bar:

        def advance(n: int) -> None:
            nonlocal done
            bar.update(n)
            left = (time.perf_counter() - started) / n * (total - n)
            if not done and show and bar.disable and left > _LONG:
                took = f"{left:.0f} seconds" if left < _MINUTES else f"{left / 60:.0f} minutes"
                logger.info("%s: about %s to go.", description.capitalize(), took)
            done += n

        yield advance


def step_bar(name: str, *, total: int, done: int, show: bool) -> Any:
    """Give a bar of the steps of training, which stays when it is closed."""
    return _bar(None, total=total, initial=done, desc=name, unit="step", leave=True, show=show)
