"""Folders and arrays on disk: digests of what was written, memory maps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._files import put_in_place
from stofm._messages import warn
from stofm.nn.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

_DIGESTS = "digests.json"
#: Open files that are asked for: three for each of 20,000 slices, and some for all else.
_N_FILES = 65_536


def digest_json(*parts: Any) -> str:
    """16 hexadecimal digits that change with what JSON holds."""
    described = json.dumps(parts if len(parts) != 1 else parts[0], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def write_json(path: Path, entries: Any) -> None:
    """Write a JSON file, whole or not at all."""
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
    """Compare files with what was written; empty if they are the same."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing."
        if _digest_file(path) != digest:
            return f"{path} is damaged: it is not what was written."
    return ""


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write the files of a folder, whole or not at all, and note their digests.

    Not if it is there, because another run that shares it was faster.
    """

    def fill_and_note(place: Path) -> None:
        fill(place)
        text = json.dumps(digest_files(place), indent=2) + "\n"
        (place / _DIGESTS).write_text(text, encoding="utf-8")

    with contextlib.suppress(FileExistsError):
        write_atomically(folder, fill_and_note, overwrite=False)


def is_there(folder: Path) -> bool:
    """Whether a folder is there as it was written; a damaged one goes, with a warning."""
    if not folder.is_dir():
        return False
    try:
        damage = find_change(folder, json.loads((folder / _DIGESTS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, AttributeError) as error:
        damage = f"{folder} is damaged ({error})."
    if damage:
        warn(f"{damage} It is made again.")
        shutil.rmtree(folder)
    return not damage


def open_array(path: Path, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """Memory-map an array, read-only: an .npy file, or the bare numbers of a type.

    A map keeps its file open, and a corpus can have more files than a process may have open at
    first (often 1,024). That limit is therefore raised, as far as the system allows it.
    """
    _allow_many_files()
    if dtype is None:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _allow_many_files() -> None:
    """Raise the process's limit of open files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _N_FILES if hard == resource.RLIM_INFINITY else min(_N_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a lower limit than they say; then this one stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
