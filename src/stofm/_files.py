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
import platform
import re
import secrets
import shutil
import stat
import time
import zlib
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
_HOST: Final = f"{zlib.crc32(platform.node().encode()):08x}"
#: What another machine has not finished in this time was given up.
_WEEK: Final = 7 * 24 * 3600
_DISK_ERRORS: Final = {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS} | (
    {errno.EDQUOT} if hasattr(errno, "EDQUOT") else set()
)
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
        _refuse_fixed(place, path)
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            _require_writable(place.parent)
            return
        if not overwrite:
            msg = f"{path} exists; pass overwrite=True to replace it."
            raise FileExistsError(msg)
        if not self.is_one(place):
            msg = f"{path} holds something else than {self.name} and is not replaced."
            raise FileExistsError(msg)
        if others := self._others(place):
            msg = (
                f"{path} holds more than {self.name}, for example {others[:3]}, and is not "
                "replaced. Move that elsewhere, or write to another place."
            )
            raise FileExistsError(msg)
        _require_writable(place.parent)

    def _others(self, folder: Path) -> list[str]:
        files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        names = (path.relative_to(folder).as_posix() for path in files if path.name not in TRIFLES)
        return sorted(name for name in names if not self.has(name))


def put_in_place(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file or folder beside `path`, then put it there.

    Interrupted, it leaves what was there, or the new one. A symbolic link stays, and what it leads
    to is replaced, with its permissions.
    """
    place = take_back(path)
    _refuse_fixed(place, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(place.parent.glob(f"{glob.escape(_prefix(place))}*"))
    if place.exists():
        _discard_old(place)
    part = _new_part(place)
    try:
        with _explained(path):
            fill(part)
            _reach_disk(part)
            _keep_mode(part, place)
            _swap(part, place)
            _sync(place.parent)
    finally:
        _remove(part)
        if place.exists():
            _discard_old(place)


def local(path: str | os.PathLike[str]) -> Path:
    """Path that a user gave, with the home folder in place of ``~``."""
    # That of pathlib fails for names such as "~draft.h5ad".
    return Path(os.path.expanduser(path))  # noqa: PTH111


def take_back(path: Path) -> Path:
    """Follow links, and give an old folder its name back if a kill left only that.

    Whoever reads or writes a file or folder of stofm calls this first.
    """
    place = Path(os.path.realpath(local(path)))
    if place.is_symlink():
        msg = f"{path} is a symbolic link that leads back to itself: make it anew."
        raise OSError(errno.ELOOP, msg)
    if _restore_old(place):
        _logger.warning(
            "%s was not there, but an older one that an interrupted write had set aside: it has its "
            "name back. If you had deleted it, delete it again.",
            path,
        )
    return place


def _restore_old(place: Path) -> bool:
    is_left = not place.exists() and _old(place).exists()
    if is_left:
        _old(place).rename(place)
    return is_left


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
        msg = (
            f"{path} can't be read ({type(error).__name__}: {first}): it is damaged, or no "
            f"{expected}. Get or write it again."
        )
        raise ValueError(msg) from error


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
        place = take_back(folder / old.name[1 : -len(_OLD)])
        _discard_old(place)
    _remove_left(folder.glob(f".*{_NEW}*"))


def _remove_left(parts: Iterable[Path]) -> None:
    for part in parts:
        if _is_left(part):
            _remove(part)


def _keep_mode(part: Path, place: Path) -> None:
    # Some file systems have no permissions.
    with contextlib.suppress(OSError):
        part.chmod(stat.S_IMODE(place.stat().st_mode))


def _swap(part: Path, place: Path) -> None:
    if not part.is_dir() and not place.is_dir():
        part.replace(place)
        return
    try:
        while part.exists():
            if place.exists():
                place.rename(_old(place))
            try:
                part.rename(place)
            except OSError:
                # A reader may have taken the old one back meanwhile.
                if not place.exists():
                    raise
    except BaseException:
        _restore_old(place)
        raise


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}{_OLD}")


def _prefix(place: Path) -> str:
    return f".{place.name[:150]}{_NEW}"


def _new_part(place: Path) -> Path:
    """Name beside `place` that says whose it is."""
    name = f"{_prefix(place)}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(name)
    return place.with_name(name)


def _is_left(part: Path) -> bool:
    """Whether nobody is writing it any more."""
    host, pid, _ = part.name.rpartition(_NEW)[2].split("-")
    if host == _HOST and int(pid) == os.getpid():
        return part.name not in _in_use
    if host == _HOST:
        import psutil

        return not psutil.pid_exists(int(pid))
    with contextlib.suppress(FileNotFoundError):
        return time.time() - part.lstat().st_mtime > _WEEK
    return False


def _discard_old(place: Path) -> None:
    """Delete an old folder; under another name first, so that half of it is never taken back."""
    if not _old(place).exists():
        return
    part = _new_part(place)
    try:
        with contextlib.suppress(FileNotFoundError):
            _old(place).rename(part)
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    _in_use.discard(part.name)
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _refuse_fixed(place: Path, path: Path) -> None:
    """Refuse a folder that can't be renamed."""
    if not place.is_dir():
        return
    here = Path.cwd()
    if place == here or place in here.parents:
        msg = f"{str(path)!r} is the current folder, which can't be replaced: name a folder in it."
    elif place.is_mount():
        msg = f"{str(path)!r} is a mounted disk, which can't be replaced: name a folder in it."
    else:
        return
    raise OSError(errno.EBUSY, msg)


def _require_writable(folder: Path) -> None:
    """Refuse a folder that can't be made or written to."""
    found = next(place for place in (folder, *folder.parents) if place.exists())
    if not found.is_dir():
        msg = f"{found} is a file, so nothing can be written into {folder}."
        raise NotADirectoryError(errno.ENOTDIR, msg)
    if not os.access(found, os.W_OK | os.X_OK):
        msg = f"{found} can't be written to: change its permissions, or write elsewhere."
        raise PermissionError(errno.EACCES, msg)


def _reach_disk(part: Path) -> None:
    """Have the system write all now: the name must not get to the disk before the content."""
    paths = [part, *part.rglob("*")] if part.is_dir() else [part]
    for path in paths:
        if path.is_dir():
            _sync(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    # Windows can't open folders, and some file systems can't sync them.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which file does not fit on the disk, whoever noticed it."""
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        free = _free(path)
        msg = f"{path} can't be written: {os.strerror(number)}{free}. What was there is unchanged."
        raise OSError(number, msg) from error


def _disk_error(error: BaseException) -> int | None:
    """Number of the system's error behind one of h5py, zarr or safetensors; None for others."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"(?:os error |[Ee]rrno (?:= )?)(\d+)", str(error))):
        number = int(found[1])
    if number in _DISK_ERRORS:
        return number
    cause = error.__cause__ or error.__context__
    return None if cause is None else _disk_error(cause)


def _free(path: Path) -> str:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.resolve().parent).free
        return f" ({free / 1e6:,.0f} MB are free there)"
    return ""
