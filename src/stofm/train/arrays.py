"""Arrays on disk, and the number of files that a process may have open."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

#: Open files that are asked for: three for each of 20,000 slices, and some for all else.
_N_FILES = 65_536


def open_array(path: Path) -> NDArray[Any]:
    """Memory-map an .npy file, as a plain read-only array.

    A map keeps its file open, and a corpus can have more files than a process may have open at
    first (often 1,024). That limit is therefore raised, as far as the system allows it.

    Raises
    ------
    OSError
        The limit is reached.
    """
    with explained_file_limit():
        _allow_many_files()
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


@contextlib.contextmanager
def explained_file_limit() -> Iterator[None]:
    """Say what to do about too many open files."""
    try:
        yield
    except OSError as error:
        if not is_file_limit(error):
            raise
        msg = (
            "Too many files are open: each prepared slice needs up to three. Raise the limit "
            f"(`ulimit -n {_N_FILES}` in the shell, before Python starts), or train on fewer slices. "
            f"Nothing is damaged. {error}"
        )
        raise OSError(error.errno, msg) from error


def is_file_limit(error: BaseException) -> bool:
    """Whether an error means that too many files are open."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _allow_many_files() -> None:
    """Raise the process's limit of open files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _N_FILES if hard == resource.RLIM_INFINITY else min(_N_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    # Some systems have a lower limit than they say; then this one stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
