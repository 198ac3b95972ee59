"""Large arrays: kept in a temporary file where memory is better left to other things, and checked."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of an array from which on it goes to a temporary file.
MOST_IN_MEMORY: Final = 1 << 30
#: Bytes that are written, and of rows that are looked at, at once.
_AT_ONCE: Final = 1 << 24


class _InFile(np.memmap):
    """An array of :func:`spacious` in a temporary file, which goes with it."""


def spacious(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a float32 array of NaN to fill: in memory or, beyond 1 GB, in a temporary file.

    The file is in the folder for temporary files (``TMPDIR``), has no name, and goes with the array.
    Where there is no room for it, the array is in memory.
    """
    n_bytes = 4 * shape[0] * shape[1]
    if n_bytes > MOST_IN_MEMORY:
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
            # A full disk would end the process when the array is filled, and is an error now.
            nothing = np.full(_AT_ONCE // 4, np.nan, dtype=np.float32).tobytes()
            for start in range(0, n_bytes, _AT_ONCE):
                file.write(nothing[: n_bytes - start])
            file.flush()
            return _InFile(file, dtype=np.float32, mode="r+", shape=shape).view(np.ndarray)
    return np.full(shape, np.nan, dtype=np.float32)


def let_go(array: Any) -> None:
    """Let what is in memory of an array of :func:`spacious` go; it is read again when needed."""
    is_ours = False
    while isinstance(array, np.ndarray):
        is_ours, array = isinstance(array, _InFile), array.base
    if is_ours and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def spans(n_rows: int, n_columns: int) -> list[slice]:
    """Cut rows into runs of some 16 MB in single precision."""
    step = max(1, _AT_ONCE // (4 * max(1, n_columns)))
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def count_not_finite(values: NDArray[Any]) -> int:
    """Count rows of (n, d) with NaN or infinite values, some at a time."""
    n = 0
    for span in spans(*values.shape):
        n += int((~np.isfinite(values[span])).any(axis=1).sum())
        let_go(values)
    return n


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Arrays of the same rows, (n, d) each, as one, of which some rows are made at a time."""

    parts: tuple[NDArray[Any], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.parts[0]), sum(one.shape[1] for one in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        found = np.concatenate([one[rows] for one in self.parts], axis=1)
        for one in self.parts:
            let_go(one)
        return found

    def together(self) -> NDArray[np.float32]:
        """All rows: the array itself where there is one, else as :func:`spacious` keeps them."""
        if len(self.parts) == 1 and self.parts[0].flags.c_contiguous:
            return self.parts[0]
        found = spacious(self.shape)
        for span in spans(*self.shape):
            found[span] = self[span]
            let_go(found)
        return found
