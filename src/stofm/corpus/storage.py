"""Folders and arrays on disk: digests of files, memory maps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from stofm._files import put_in_place
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_DIGESTS = "digests.json"
#: Number of open files needed: six for each of 10,000 shards, and some for everything else.
_N_FILES = 65_536


def digest_json(*parts: Any) -> str:
    """16 hexadecimal digits that change with the JSON content."""
    described = json.dumps(parts if len(parts) != 1 else parts[0], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def write_json(path: Path, entries: Any) -> None:
    """Write a JSON file, completely or not at all."""
    text = json.dumps(entries, indent=2) + "\n"
    put_in_place(path, lambda part: part.write_text(text, encoding="utf-8"))


def digest_files(folder: Path) -> dict[str, str]:
    """Digest of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest_file(path) for path in files}


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def find_change(folder: Path, digests: Mapping[str, str]) -> str:
    """Describe the first file that differs from what was written; empty if none does."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing."
        if _digest_file(path) != digest:
            return f"{path} is damaged: its content has changed."
    return ""


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write the files of a folder, completely or not at all, and record their digests.

    Nothing is written if the folder exists, because another run that shares it was faster.
    """

    def fill_and_note(place: Path) -> None:
        place.mkdir()
        fill(place)
        text = json.dumps(digest_files(place), indent=2) + "\n"
        (place / _DIGESTS).write_text(text, encoding="utf-8")

    if not folder.exists():
        put_in_place(folder, fill_and_note)


def find_damage(folder: Path) -> str:
    """Describe how a folder differs from what was written; empty if it does not."""
    try:
        return find_change(folder, json.loads((folder / _DIGESTS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, AttributeError) as error:
        return f"{folder} is damaged ({error})."


def is_there(folder: Path) -> bool:
    """Whether a folder is intact; a damaged one is removed with a warning."""
    if not folder.is_dir():
        return False
    if damage := find_damage(folder):
        warn(f"{damage} It is made again.")
        shutil.rmtree(folder)
    return not damage


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock file, also across machines; it is freed if the process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"{path.parent} is in use: another process writes to it. Wait until it has ended, or give "
            "each process a share of its own (shard='1/4')."
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_array(path: Path) -> NDArray[Any]:
    """Memory-map an array of an .npy file, read-only.

    A map keeps its file open, and a corpus can have more files than a process may have open by
    default (often 1,024). That limit is therefore raised as far as the system allows.
    """
    _allow_many_files()
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _allow_many_files() -> None:
    """Raise the process's limit of open files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _N_FILES if hard == resource.RLIM_INFINITY else min(_N_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a lower limit than they report; then the limit stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
