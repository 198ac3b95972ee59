"""Files and folders that replace old ones: one of the two is there at every moment.

A folder can't take the place of another in one step on every system. The old one waits beside it as
``.NAME.stofm-old`` until the new one has the name; whoever finds that alone, after a kill, takes it back.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import logging
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pandas as pd

_logger = logging.getLogger("stofm")
#: Names of what this process is writing now.
_in_use: set[str] = set()
_OLD: Final = ".stofm-old"
_NEW: Final = ".stofm-new-"
#: What file browsers and git put into a folder, and can be made again.
TRIFLES: Final = {".DS_Store", ".gitattributes", "Thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Kind:
    """What may be replaced by another of its kind, as its content says.

    `name` has an article, for messages; `is_one` tells whether a file or folder is one; `has`
    whether a file belongs to a folder of the kind, by its path in it (``"model/config.json"``).
    """

    name: str
    is_one: Callable[[Path], bool]
    has: Callable[[str], bool] = lambda _: False

    def refuse_other(self, path: Path, *, overwrite: bool) -> None:
        """Refuse a place that can't be written to, or holds what may not be replaced."""
        place = take_back(path)
        _require_writable(place)
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
        if not self.is_one(place):
            raise FileExistsError(
                f"{path} holds something other than {self.name} and is not replaced."
            )
        files = (file for file in place.rglob("*") if file.is_symlink() or not file.is_dir())
        names = (file.relative_to(place).as_posix() for file in files if file.name not in TRIFLES)
        if others := sorted(name for name in names if not self.has(name)):
            raise FileExistsError(
                f"{path} holds more than {self.name}, for example {others[:3]}, and is not "
                "replaced. Move that elsewhere, or write to another place."
            )


def put_in_place(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file or folder beside `path`, then put it there.

    Interrupted, it leaves what was there, or the new one. A symbolic link stays, and what it leads
    to is replaced, with its permissions.
    """
    place = take_back(path)
    _require_writable(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix, old = f".{place.name[:150]}{_NEW}", _old(place)
    _remove_left(place.parent.glob(f"{glob.escape(prefix)}*"))
    if place.exists():
        _remove(old)
    part = place.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    _in_use.add(part.name)
    try:
        with _explained(path):
            fill(part)
            # The name must not get to the disk before the content.
            for file in filter(Path.is_file, [part, *part.rglob("*")]):
                with file.open("r+b") as opened:
                    os.fsync(opened.fileno())
            if place.exists():
                shutil.copymode(place, part)
            if place.is_dir() or (part.is_dir() and place.exists()):
                place.rename(old)
            part.replace(place)
    finally:
        _in_use.discard(part.name)
        take_back(place)
        _remove(part)
        if place.exists():
            _remove(old)


def local(path: str | os.PathLike[str]) -> Path:
    """Path that a user gave, with the home folder in place of ``~``."""
    # That of pathlib fails for names such as "~draft.h5ad".
    return Path(os.path.expanduser(path))  # noqa: PTH111


def take_back(path: Path) -> Path:
    """Follow links, and give an old folder its name back if a kill left only that.

    Whoever reads or writes a file or folder of stofm calls this first.
    """
    place = Path(os.path.realpath(local(path)))
    if not place.exists() and _old(place).exists():
        _old(place).rename(place)
        _logger.warning(
            "%s was not there, but an older one that an interrupted write had set aside: it has its "
            "name back. If you had deleted it, delete it again.",
            path,
        )
    return place


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Have errors name the file that a user gave, and what it should be (without an article).

    A file that may not be read gives OSError, one that is damaged or something else ValueError.
    """
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, OSError | ValueError) and str(error).startswith(str(path))
        if is_named or isinstance(error, ImportError | MemoryError):
            raise
        # Of a locked file, one that may not be read, too many open files.
        if isinstance(error, OSError) and error.errno is not None:
            msg = f"{path} can't be read: {error.strerror or error}"
            raise OSError(error.errno, msg) from error
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} can't be read ({type(error).__name__}: {first}): it is damaged, or no "
            f"{expected}. Get or write it again."
        ) from error


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table as :func:`pandas.read_csv` does; numbers are as written, to the last bit."""
    import pandas as pd

    # pandas 3.1 always reads so, and deprecates the option.
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):
        options["float_precision"] = "round_trip"
    return pd.read_csv(path, **options)


def read_text_table(path: Path, what: str) -> pd.DataFrame:
    """Read a table that tabs separate, plain or gzip, with all cells as text."""
    with reading(path, what):
        return read_table(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)


def tidy(folder: Path) -> None:
    """Take back, or delete, what writes to a folder that were killed have left."""
    for old in folder.glob(f".*{_OLD}"):
        take_back(folder / old.name[1 : -len(_OLD)])
        _remove(old)
    _remove_left(folder.glob(f".*{_NEW}*"))


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}{_OLD}")


def _remove_left(parts: Iterable[Path]) -> None:
    """Remove those that no process is writing any more."""
    import psutil

    for part in parts:
        pid = int(part.name.rpartition(_NEW)[2].split("-")[0])
        if part.name not in _in_use if pid == os.getpid() else not psutil.pid_exists(pid):
            _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _require_writable(place: Path) -> None:
    """Refuse the current folder, and a place whose folder can't be made or written to."""
    if place.is_dir() and (place == Path.cwd() or place in Path.cwd().parents):
        msg = f"{str(place)!r} is the current folder, which can't be replaced: name a folder in it."
        raise OSError(errno.EBUSY, msg)
    found = next(folder for folder in place.parents if folder.exists())
    if not found.is_dir():
        msg = f"{found} is a file, so nothing can be written into {place.parent}."
        raise NotADirectoryError(errno.ENOTDIR, msg)
    if not os.access(found, os.W_OK | os.X_OK):
        msg = f"{found} can't be written to: change its permissions, or write elsewhere."
        raise PermissionError(errno.EACCES, msg)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which file does not fit on the disk, whether the system noticed it or a library."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"(?:os error |[Ee]rrno (?:= )?)(\d+)", str(error)):
            number = int(found[1])
        if number is None:
            raise
        msg = f"{path} can't be written: {os.strerror(number)}. What was there is unchanged."
        raise OSError(number, msg) from error
