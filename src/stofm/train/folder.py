"""The folder of a run: what may be in it, who trains into it, which checkpoint it goes on from."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from typing import TYPE_CHECKING, Any, Final, get_args

from filelock import FileLock, Timeout

from stofm._files import TRIFLES, local, put_in_place, tidy
from stofm._messages import warn
from stofm.nn.checkpoint import FILES
from stofm.train.checkpoint import (
    FINAL,
    TRAINING_FILES,
    can_go_on,
    find_damage,
    read_stored_report,
)
from stofm.train.config import StageName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: Columns of the history that every row has, before those of the loss parts.
HISTORY_COLUMNS = (
    *("stage", "split", "epoch", "step", "loss"),
    *("learning_rate", "gradient_norm", "cells", "tokens", "seconds"),
)
#: The file by which a process has the folder to itself.
LOCK: Final = "run.lock"
_WORK = "work"
_STAGE: Final = rf"\d+-(?:{'|'.join(get_args(StageName))})"
_CHECKPOINT: Final = re.compile(rf"{_STAGE}-(?:\d{{8,}}|{FINAL})")
_MODEL_FILES: Final = "|".join(map(re.escape, FILES))
_RUN_FILES: Final = "|".join((_MODEL_FILES, *map(re.escape, TRAINING_FILES)))
#: Files that a run writes into the folders that it clears, and what a killed write has left.
_WRITTEN: Final = re.compile(
    "|".join(
        (
            rf"checkpoints/{_CHECKPOINT.pattern}/(?:{_RUN_FILES})",
            rf"model/(?:{_MODEL_FILES})",
            rf"tensorboard/{_STAGE}/events\.out\.tfevents\.[^/]*",
            r"refreshed/(?:cells|virtual)-[0-9a-f]{16}/[^/]*",
            r"(?:.*/)?\.[^/]*\.stofm-.*",
        )
    )
)


class RunFolder:
    """The folder of a run: ``run.json``, ``history.csv``, ``checkpoints/``, ``model/``.

    Parameters
    ----------
    path
        The folder.
    work
        Where prepared slices and cell embeddings are kept; ``work/`` in it by default. Several
        runs may share it.

    Raises
    ------
    NotADirectoryError
        There is a file at `path`.
    ValueError
        The work folder is the run's folder or one that the run uses itself.
    """

    def __init__(
        self, path: str | os.PathLike[str], work: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = local(path)
        if self.path.is_file():
            msg = f"{self.path} is a file, and a run needs a folder: name another place."
            raise NotADirectoryError(errno.ENOTDIR, msg)
        self.checkpoints = self.path / "checkpoints"
        self.history = self.path / "history.csv"
        self.report = self.path / "run.json"
        self.model = self.path / "model"
        #: For what the present stage computes anew as it goes on.
        self.refreshed = self.path / "refreshed"
        self._cleared = (self.checkpoints, self.model, self.path / "tensorboard", self.refreshed)
        self.work = self.path / _WORK if work is None else local(work)
        #: Names of what is none of the run's results: the lock, and the folder that `work` is in.
        self._beside = {_WORK, LOCK}
        place = self.work.resolve()
        if place.is_relative_to(self.path.resolve()):
            name = next(iter(place.relative_to(self.path.resolve()).parts), None)
            if name is None or name in {p.name for p in self._cleared}:
                msg = (
                    f"work_dir {str(self.work)!r} is the run's own folder or one that the run "
                    f"clears; choose another, such as {str(self.path / _WORK)!r} (the default)."
                )
                raise ValueError(msg)
            self._beside.add(name)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that may not be written to.

        Parameters
        ----------
        resume
            Go on with the run that is there, if one is.
        overwrite
            Throw away the run that is there, if one is.

        Raises
        ------
        FileExistsError
            There is a run and neither was asked for, or there is something else.
        """
        if resume and overwrite:
            msg = "resume and overwrite exclude each other: go on with the run, or begin again?"
            raise ValueError(msg)
        report = self.read_report()
        if not report and not self._is_hardly_begun():
            msg = f"{self.path} holds something else than a run of stofm; take another folder."
            raise FileExistsError(msg)
        for path in (self.history, self.report, self.path / LOCK):
            if path.is_dir():
                msg = f"{path} is a folder, and a run has a file there; take another folder."
                raise FileExistsError(msg)
        if overwrite and (others := self._others(*self._cleared)):
            msg = (
                f"{self.path} holds a run, and files that are none of its own, for example "
                f"{others[:3]}: overwrite=True would delete them. Move them elsewhere, or take "
                "another folder."
            )
            raise FileExistsError(msg)
        if report and not (resume or overwrite):
            msg = (
                f"{self.path} holds a run ({report.get('status', 'unknown')}): pass "
                "resume=True to go on with it, overwrite=True to throw it "
                "away, or take another folder."
            )
            raise FileExistsError(msg)

    def _is_hardly_begun(self) -> bool:
        """Whether there is at most what a run leaves that was stopped before its first checkpoint."""
        for path in self.path.iterdir() if self.path.exists() else ():
            is_part = path.name.startswith(".") and ".stofm-" in path.name
            is_empty = path in (self.report, self.checkpoints, self.history) and _is_empty(path)
            is_ours = is_part or is_empty or path.name in self._beside
            if not is_ours and not (path == self.history and _is_history(path)):
                return False
        return True

    def _others(self, *folders: Path) -> list[str]:
        """Files in folders that no run has written."""
        found = [path for folder in folders for path in (folder, *folder.rglob("*"))]
        files = [path for path in found if path.is_symlink() or path.is_file()]
        names = [p.relative_to(self.path).as_posix() for p in files if p.name not in TRIFLES]
        return sorted(name for name in names if not _WRITTEN.fullmatch(name))

    def check_settings(self, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run under other settings.

        Parameters
        ----------
        begun
            Settings that the run was begun with.
        settings
            All that the run's result depends on now, as JSON can hold it.

        Raises
        ------
        ValueError
            They differ.
        """
        if changed := _differences(begun, json.loads(json.dumps(settings))):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            msg = (
                f"The run in {self.path} was begun with other settings: {'; '.join(changed[:5])}"
                f"{more}. Go on with those, or take another folder."
            )
            raise ValueError(msg)

    def read_report(self) -> dict[str, Any]:
        """Return what ``run.json`` says, or else the newest checkpoint that can; nothing if there is no run."""
        report: dict[str, Any]
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(self.report.read_text(encoding="utf-8"))
            if _is_report(report):
                return report
        for folder in reversed(self._to_go_on()):
            with contextlib.suppress(ValueError):
                report = read_stored_report(folder)
                if _is_report(report):
                    return report
        return {}

    def clear(self) -> None:
        """Delete a run, but not what was prepared for it in the work folder."""
        for folder in self._cleared:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.history, self.report):
            file.unlink(missing_ok=True)

    def checkpoint(self, stage: int, name: str, step: int | None) -> Path:
        """Folder of a stage's checkpoint after `step` steps, or of its end."""
        at = FINAL if step is None else f"{step:08d}"
        return self.checkpoints / f"{stage}-{name}-{at}"

    def newest(self) -> Path | None:
        """The newest sound checkpoint, to go on from; None if there is none.

        Those that are damaged are named in a warning.
        """
        for folder in reversed(self._to_go_on()):
            damage = find_damage(folder)
            if not damage:
                return folder
            warn(
                f"{damage} The run goes on from the checkpoint before {folder}, which is made again."
            )
        return None

    def prune(self, current: Path, keep: set[str]) -> None:
        """Delete checkpoints that nothing needs.

        Left are those to keep, the ends of stages, the present one, and the one before, for which
        the present one may be damaged.
        """
        found = self._to_go_on()
        at = found.index(current)
        needed = {*keep, *(folder.name for folder in found[max(0, at - 1) : at + 1])}
        for folder in self._all():
            if folder.name not in needed and not folder.name.endswith(FINAL):
                self._remove(folder)

    def remove_later(self, than: Path | None) -> None:
        """Delete the checkpoints of steps that will be repeated: damaged ones, and weights alone."""
        for folder in self._all():
            if than is None or _age(folder) > _age(than):
                self._remove(folder)

    def remove_refreshed(self) -> None:
        """Delete what a stage that is finished has computed anew."""
        self._remove(self.refreshed)

    def remove_leftovers(self) -> None:
        """Delete what an interrupted write has left."""
        tidy(self.checkpoints)

    def _remove(self, folder: Path) -> None:
        """Delete a folder that the run has written, if it holds nothing else."""
        if not self._others(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("*") if _CHECKPOINT.fullmatch(p.name)]

    def _to_go_on(self) -> list[Path]:
        return sorted((p for p in self._all() if can_go_on(p)), key=_age)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run's folder, which is made if need be, to this process, also among machines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8") or holder
        msg = (
            f"{folder} is in use: {holder} trains into it. Wait until it has ended, or take "
            f"another out_dir. If there is no such process any more, delete {path}."
        )
        raise FileExistsError(msg) from None
    try:
        # Not where a file that is locked can't be written to or deleted.
        with contextlib.suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()!r}", "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def write_json(path: Path, entries: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(entries, indent=2) + "\n"
    put_in_place(path, lambda part: part.write_text(text, encoding="utf-8"))


def _is_report(entries: Any) -> bool:
    """Whether JSON is what a run of stofm says of itself, and not another program's."""
    own = {"stofm_version": str, "status": str, "stages": list, "settings": dict}
    return (
        isinstance(entries, dict)
        and all(isinstance(entries.get(name), kind) for name, kind in own.items())
        and {"stages", "run", "model"} <= set(entries["settings"])
    )


def _is_history(path: Path) -> bool:
    """Whether a file begins as a history does."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        return file.readline().startswith(",".join(HISTORY_COLUMNS))
    return False


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _age(folder: Path) -> tuple[int, str]:
    # Digits sort before "final".
    return int(folder.name.split("-")[0]), folder.name.rsplit("-", 1)[1]


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Say in which entries two JSON values differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{where}[{k}]", a, b) for k, (a, b) in enumerate(zip(old, new, strict=True))]
    elif isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        pairs = [(f"{where}.{n}".lstrip("."), old.get(n), new.get(n)) for n in names]
    else:
        return [] if old == new else [f"{where} was {_short(old)}, now {_short(new)}"]
    return [text for place, a, b in pairs for text in _differences(a, b, place)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
