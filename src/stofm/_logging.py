"""The package's logger and its progress bars."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

logger = logging.getLogger("stofm")


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


def progress(
    items: Iterable[T], *, total: int, description: str, unit: str, show: bool
) -> Iterable[T]:
    """Wrap `items` in a progress bar if it is to be shown and can be seen, or hand them back."""
    if not (show and bars_can_be_seen()):
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, total=total, desc=description, unit=unit, leave=False)
    return bar


@contextmanager
def counter(
    *, total: int, description: str, unit: str, show: bool
) -> Iterator[Callable[[int], object]]:
    """Give a function that moves a bar on, if one is to be shown and can be seen."""
    if not (show and bars_can_be_seen()):
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit=unit, leave=False) as bar:
        yield bar.update


def step_bar(name: str, *, total: int, done: int, show: bool) -> Any:
    """Give a bar of the steps of training, which stays when it is closed; mute if not to be shown."""
    from tqdm.auto import tqdm

    hidden = not (show and bars_can_be_seen())
    return tqdm(total=total, initial=done, desc=name, unit="step", leave=True, disable=hidden)
