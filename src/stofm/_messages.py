"""Messages that name the caller's own table, arguments and line.

A function that reads a table writes its messages about ``adata`` and about arguments by the names
that public functions have for them: ``adata.X``, ```layer```, ``layer='counts'``. A caller that has
other names for these calls it within :func:`naming`, which puts the caller's names in.
"""

from __future__ import annotations

import difflib
import re
import shlex
import sys
import traceback
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stofm._logging import logger

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable, Iterator

_PACKAGE: Final = str(Path(__file__).parent)
#: A value of an argument, if it is one word or quoted.
_VALUE: Final = r"""('[^']*'|"[^"]*"|[\w.+-]*\w|)"""
#: What changes a message, innermost call first.
_changes: ContextVar[tuple[Callable[[str], str], ...]] = ContextVar("changes", default=())
#: Warnings that are collected and not shown, if they are.
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def naming(where: str = "", **names: str) -> Iterator[None]:
    """Within it, errors, warnings and log lines speak of the caller's table and arguments.

    Parameters
    ----------
    where
        What a message that does not name the table starts with, such as ``"the reference"``.
    **names
        The caller's name for ``adata`` and for arguments: ``layer="reference_layer"``, or
        ``layer="--layer"`` on the command line.

    Examples
    --------
    >>> with naming("the reference", adata="reference", layer="reference_layer"):
    ...     raise ValueError("adata.X does not hold raw counts: pass layer='counts'.")
    Traceback (most recent call last):
    ValueError: reference.X does not hold raw counts: pass reference_layer='counts'.
    """

    def change(text: str) -> str:
        return _put_in(text, where, names)

    token = _changes.set((change, *_changes.get()))
    try:
        yield
    except Exception as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (change(error.args[0]),)
        raise
    finally:
        _changes.reset(token)


def _put_in(text: str, where: str, names: dict[str, str]) -> str:
    for name, own in names.items():
        if name == "adata":
            text = re.sub(r"\badata\b", own, text)
        elif own.startswith("--"):
            text = text.replace(f"`{name}`", own)
            text = re.sub(rf"(?<![\w.]){name}={_VALUE}", partial(_as_flag, own), text)
        else:
            text = text.replace(f"`{name}`", f"`{own}`")
            text = re.sub(rf"(?<![\w.]){name}=", f"{own}=", text)
    named = where.removeprefix("the ")
    if where and not re.search(rf"(?<!\w){re.escape(named)}(?!\w)", text, re.IGNORECASE):
        # What the user writes stays as it is.
        start = where if "[" in where else f"{where[0].upper()}{where[1:]}"
        text = f"{start}: {text}"
    return text


def _as_flag(flag: str, found: re.Match[str]) -> str:
    value = found[1].strip("'\"")
    return flag if value in ("", "True") else f"{flag} {shlex.quote(value)}"


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Within it, warnings go into a list, and they and other lines are not shown."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def warn(message: str, category: type[UserWarning] = UserWarning) -> None:
    """Tell the user of something that harms the result, at the line that called stofm.

    It is a warning of the category, and a line of level WARNING for those who keep a log.
    """
    message = changed(message)
    if (collected := _collected.get()) is not None:
        collected.append(message)
        return
    logger.warning("%s", message, extra={"is_shown": True})
    warnings.warn(message, category, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Level of the frame that called the outermost function of this package, seen from `warn`."""
    frames = traceback.walk_stack(sys._getframe(1))
    is_ours = [frame.f_code.co_filename.startswith(_PACKAGE) for frame, _ in frames]
    return len(is_ours) - is_ours[::-1].index(True) + 1


def text_of(error: BaseException) -> str:
    """What an error says; that of a KeyError is otherwise quoted."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def changed(text: str) -> str:
    """A message in the words of the caller."""
    for change in _changes.get():
        text = change(text)
    return text


def require_name(
    name: str, known: Iterable[object], text: str, error: type[Exception] = KeyError
) -> None:
    """Refuse a name that is not known; the message ends with the nearest ones."""
    if name not in known:
        raise error(text + nearest_names(name, known))


def nearest_names(name: str, names: Iterable[object]) -> str:
    """Return a hint for an error message: the names most like `name`, or all if they are few."""
    known = [str(other) for other in names]
    lower = {other.lower(): other for other in reversed(known)}
    near = difflib.get_close_matches(str(name).lower(), list(lower), n=3, cutoff=0.5)
    if near:
        return f" Nearest: {[lower[other] for other in near]}."
    return f" There are: {known[:10]}{' ...' if len(known) > 10 else ''}."


def _rename_line(record: logging.LogRecord) -> bool:
    if _collected.get() is not None:
        return False
    if _changes.get() and not getattr(record, "is_shown", False):
        record.msg, record.args = changed(record.getMessage()), ()
    return True


logger.addFilter(_rename_line)
