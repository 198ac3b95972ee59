"""Arrays on disk, whether they are what was written, and how many files may be open."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from stofm._messages import warn
from stofm.nn.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

#: Open files that are asked for: three for each of 20,000 slices, and some for all else.
_N_FILES = 65_536
_HEADER_BYTES = 128
_DIGESTS = "digests.json"


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


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write the files of a folder, and note their digests; not if it is there.

    Parameters
    ----------
    folder
        The folder.
    fill
        Gets an empty folder.
    """

    def fill_and_note(place: Path) -> None:
        fill(place)
        digests = {path.name: _digest(path) for path in sorted(place.iterdir())}
        (place / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    # Unless another run that shares the folder was faster.
    with contextlib.suppress(FileExistsError):
        write_atomically(folder, fill_and_note, overwrite=False)


def find_damage(folder: Path) -> str:
    """Compare the files of a folder with what was written; empty if they are the same."""
    try:
        digests: dict[str, str] = dict(json.loads((folder / _DIGESTS).read_text(encoding="utf-8")))
        changed = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, TypeError) as error:
        return f"{folder} can't be read ({error})."
    if not digests:
        return f"{folder / _DIGESTS} is damaged: it names no files."
    return f"{folder / changed[0]} is damaged: it is not what was written." if changed else ""


def is_there(folder: Path) -> bool:
    """Whether a folder is there as it was written; a damaged one goes, with a warning."""
    if not folder.is_dir():
        return False
    damage = find_damage(folder)
    if damage:
        warn(f"{damage} It is made again.")
        shutil.rmtree(folder)
    return not damage


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


class GrowingArray:
    """A one-dimensional .npy file whose length is known only when all is written.

    Parameters
    ----------
    path
        The file.
    dtype
        Of what is appended.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._file: BinaryIO | None = None
        self._hashed = hashlib.blake2b(digest_size=8)

    @property
    def digest(self) -> str:
        """Hash of all that was appended, however it was cut into blocks."""
        return self._hashed.hexdigest()

    def __enter__(self) -> GrowingArray:
        self._file = self._path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))
        return self

    def append(self, values: NDArray[np.generic]) -> None:
        """Write more at the end."""
        assert self._file is not None
        entries = np.ascontiguousarray(values, dtype=self._dtype)
        self._file.write(entries.data)
        self._hashed.update(entries.data)
        self._length += len(values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        header = BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        np.lib.format.write_array_header_1_0(header, described)
        assert len(header.getvalue()) == _HEADER_BYTES
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.close()
