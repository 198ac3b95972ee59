"""The package's logger and its progress bars."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

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


def progress(
    items: Iterable[T], *, total: int, description: str, unit: str, show: bool
) -> Iterable[T]:
    """Wrap `items` in a progress bar, or hand them back as they are when `show` is false."""
    if not show:
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, total=total, desc=description, unit=unit, leave=False)
    return bar


@contextmanager
def counter(
    *, total: int, description: str, unit: str, show: bool
) -> Iterator[Callable[[int], object]]:
    """Show a bar that the returned function moves on, or nothing when `show` is false."""
    if not show:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit=unit, leave=False) as bar:
        yield bar.update
