"""``stofm.settings``: what is told, and how many threads compute."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Levels by scanpy's names and numbers.
_LEVELS: Final = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "hint": logging.INFO,
    "debug": logging.DEBUG,
}


class Settings:
    """Settings for all calls of a session. Folders and formats of figures are scanpy's."""

    def __init__(self) -> None:
        self._n_threads: int | None = None

    @property
    def verbosity(self) -> str:
        """How much is told: ``"error"``, ``"warning"``, ``"info"`` (as it starts) or ``"debug"``.

        scanpy's numbers from 0 to 4 can be set too. Warnings that Python shows are filtered with
        :mod:`warnings`.
        """
        return logging.getLevelName(logger.level).lower()

    @verbosity.setter
    def verbosity(self, level: str | int) -> None:
        names = list(_LEVELS)
        known: dict[str | int, int] = dict(_LEVELS.items())
        known.update(enumerate(_LEVELS.values()))
        if isinstance(level, bool) or level not in known:
            raise ValueError(f"verbosity must be one of {names} or 0 to 4, found {level!r}.")
        logger.setLevel(known[level])

    @property
    def n_threads(self) -> int | None:
        """Threads of the processor that models compute with; None: as many as torch is set to.

        Other libraries change torch's number: ``scanpy.pp.normalize_total`` does. It is set within
        calls of stofm alone. Steps that are too small for several threads take one.
        """
        return self._n_threads

    @n_threads.setter
    def n_threads(self, number: int | None) -> None:
        is_number = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if number is not None and not is_number:
            raise ValueError(
                f"n_threads must be a whole number from 1 on or None, found {number!r}."
            )
        self._n_threads = number

    def __repr__(self) -> str:
        """The settings by name."""
        return f"Settings(verbosity={self.verbosity!r}, n_threads={self.n_threads})"


settings = Settings()


@contextmanager
def keeping_threads() -> Iterator[None]:
    """Within it a library may change torch's number of threads, as scanpy does; it is set back."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else None
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(before)
