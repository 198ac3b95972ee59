"""A run's folder belongs to one process at a time, also among several machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import psutil

from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: The file in the run's folder.
LOCK: Final = "run.lock"
#: Seconds between signs of life, and after which none is to be expected from another machine.
_BEAT, _SILENCE = 5.0, 60.0
#: Seconds by which times of a process's start may differ when the clock is set.
_CLOCK: Final = 10.0
_SETTLING: Final = 0.2


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made if need be, to this process.

    Raises
    ------
    FileExistsError
        Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, pid = folder / LOCK, os.getpid()
    own = {
        "pid": pid,
        "host": socket.gethostname(),
        "started": _started(pid),
        "key": uuid.uuid4().hex,
    }
    _take(path, own)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), name="stofm-lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _take(path: Path, own: Mapping[str, Any]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(own, file)
    except FileExistsError:
        holder = _read(path)
        if _is_alive(path, holder):
            raise FileExistsError(_refusal(path, holder)) from None
    else:
        return
    logger.info("The process that had %s is gone; this one goes on.", path.parent)
    part = path.with_name(f".{LOCK}-{own['key']}-part")
    part.write_text(json.dumps(own), encoding="utf-8")
    part.replace(path)
    # Of several that find it at once, the last has it.
    time.sleep(_SETTLING)
    if (holder := _read(path)) != own:
        raise FileExistsError(_refusal(path, holder))


def _refusal(path: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']!r}" if holder else "another process"
    return (
        f"{path.parent} is in use: {who} trains into it. Wait until it has ended, or take another out_dir. If there is no such process any "
        f"more, delete {path}."
    )


def _read(path: Path) -> dict[str, Any]:
    """What the lock says; nothing if it is just being written, is none, or gone."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    own = {"pid": int, "host": str, "started": int | float}
    is_one = isinstance(found, dict) and all(isinstance(found.get(k), v) for k, v in own.items())
    return found if is_one else {}


def _is_alive(path: Path, holder: Mapping[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        return abs(_started(holder["pid"]) - float(holder["started"])) < _CLOCK
    # Who has just made the file is about to write who it is; else it is no lock.
    silence = _SILENCE if holder else 2 * _BEAT
    logger.info(
        "%s was left by %s: waiting up to %.0f s for a sign of life of it.",
        path,
        f"a process on {holder['host']!r}" if holder else "something that does not say who it is",
        silence,
    )
    before, until = _stamp(path), time.monotonic() + silence
    while time.monotonic() < until:
        time.sleep(_BEAT / 5)
        if (now := _stamp(path)) != before:
            return now is not None
    return False


def _started(pid: Any) -> float:
    """When a process began; minus infinity if there is none of that number."""
    try:
        process = psutil.Process(pid)
        return process.create_time() if process.status() != psutil.STATUS_ZOMBIE else float("-inf")
    except (psutil.Error, TypeError, ValueError):
        return float("-inf")


def _stamp(path: Path) -> int | None:
    try:
        # Opened: the properties alone may be old ones on a network's disk.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
