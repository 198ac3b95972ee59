"""Reading pickled dictionaries of names and numbers, and of nothing else.

Unpickling a file can run any code that its author put in. This reader admits dictionaries,
strings, numbers and numpy's scalars, which it builds itself, and refuses whatever else a file
asks for before it happens.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: The published tables have 4 MB at most; more is not one of them.
_MAX_BYTES: Final = 64 << 20
_FORMATS: Final = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I"}
_ADMITTED: Final = (
    "Only dictionaries of names and numbers are read, because a pickle can hold any program."
)


class UnsafeTableError(ValueError):
    """A pickle asks for something other than names and numbers."""


class _ScalarType:
    """Stands for ``numpy.dtype`` while a table is read."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in _FORMATS:
            msg = f"It holds numbers of the unknown type {name!r}."
            raise UnsafeTableError(msg)
        self.format = f"<{_FORMATS[name]}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.format = f">{self.format[1:]}"


def _scalar(kind: object, content: object) -> float | int:
    """Stands for the function that makes numpy's scalars while a table is read."""
    if not isinstance(kind, _ScalarType) or not isinstance(content, bytes):
        msg = "It holds a number in an unknown form."
        raise UnsafeTableError(msg)
    value: float | int = struct.unpack(kind.format, content)[0]
    return value


def _encode(text: str, _encoding: str) -> bytes:
    """Stands for ``codecs.encode``, with which early pickle protocols write bytes."""
    return text.encode("latin-1")


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _TableReader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        stand_in = _STAND_INS.get((module_name, global_name))
        if stand_in is None:
            msg = f"It asks for {module_name}.{global_name}."
            raise UnsafeTableError(msg)
        # Wrapped anew each time, because a pickle may set attributes of what it gets.
        return lambda *arguments: stand_in(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        msg = f"It asks for an outside object ({pid!r})."
        raise UnsafeTableError(msg)


def read_pickle_table(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Read a pickled dictionary of names to names or numbers.

    Parameters
    ----------
    path
        The file.
    sha256
        Checksum that the file must have; None for any.

    Raises
    ------
    ValueError
        The checksum differs, the file is no pickle, or it holds anything else.
    """
    content = path.read_bytes()
    found = file_sha256(path)
    if sha256 is not None and found != sha256:
        msg = (
            f"{path} is not the published file: its sha256 is {found}, expected {sha256}. "
            "Download it again, or pass check_sha256=False if it is meant to differ."
        )
        raise ValueError(msg)
    if len(content) > _MAX_BYTES:
        msg = f"{path} has {len(content) >> 20} MB, more than a table of genes can have."
        raise ValueError(msg)
    try:
        table = _TableReader(io.BytesIO(content)).load()
    except UnsafeTableError as error:
        msg = f"{path} is refused. {error} {_ADMITTED}"
        raise UnsafeTableError(msg) from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        struct.error,
    ) as error:
        msg = f"{path} could not be read as a pickle: {error}"
        raise ValueError(msg) from error
    return _checked_table(path, table)


def file_sha256(path: Path) -> str:
    """Return the sha256 checksum of a file in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked_table(path: Path, table: Any) -> dict[str, Any]:
    is_table = isinstance(table, dict) and all(
        isinstance(key, str) and isinstance(value, str | int | float)
        for key, value in table.items()
    )
    if not is_table:
        msg = f"{path} is refused: it is no dictionary of names to names or numbers. {_ADMITTED}"
        raise UnsafeTableError(msg)
    return dict(table)
