"""Folders and arrays on disk: digests of what was written, memory maps, the limit of open files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._messages import warn
from stofm.nn.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_DIGESTS = "digests.json"
#: Open files that are asked for: three for each of 20,000 slices, and some for all else.
_N_FILES = 65_536


def digest_json(*parts: Any) -> str:
    """16 hexadecimal digits that change with what JSON holds."""
    described = json.dumps(parts if len(parts) != 1 else parts[0], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def digest_file(path: Path) -> str:
    """32 hexadecimal digits that change with a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write the files of a folder, and note their digests; not if it is there."""

    def fill_and_note(place: Path) -> None:
        fill(place)
        digests = {path.name: digest_file(path) for path in sorted(place.iterdir())}
        (place / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    write_once(folder, fill_and_note)


def write_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder, whole or not at all; not if it is there."""
    # Unless another run that shares the folder was faster.
    with contextlib.suppress(FileExistsError):
        write_atomically(folder, fill, overwrite=False)


def find_damage(folder: Path) -> str:
    """Compare the files of a folder with what was written; empty if they are the same."""
    try:
        digests: dict[str, str] = dict(json.loads((folder / _DIGESTS).read_text(encoding="utf-8")))
        changed = [name for name, digest in digests.items() if digest_file(folder / name) != digest]
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


def open_array(path: Path) -> NDArray[Any]:
    """Memory-map an .npy file, as a plain read-only array.

    A map keeps its file open, and a corpus can have more files than a process may have open at
    first (often 1,024). That limit is therefore raised, as far as the system allows it.
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
