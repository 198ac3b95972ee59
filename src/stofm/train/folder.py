"""The folder of a run: its lock, settings, history and checkpoints."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import re
import shutil
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from stofm._files import TRIFLES, local, put_in_place
from stofm._messages import warn
from stofm.nn import checkpoint
from stofm.train.checkpoint import FILES, HISTORY, OPTIMIZER, STATE, find_damage, read_state

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

#: Columns of the history that every run has, before those of the loss parts.
HISTORY_COLUMNS = (
    *("stage", "split", "epoch", "step", "loss"),
    *("learning_rate", "gradient_norm", "cells", "tokens", "seconds"),
)
#: The lock file, by which a process has the folder to itself.
LOCK: Final = "run.lock"
#: Suffix of the name of a checkpoint at the end of a stage.
_FINAL: Final = "final"
_CHECKPOINT: Final = re.compile(rf"\d+-[a-z_]+-(?:\d{{8,}}|{_FINAL})")
#: Suffixes of the paths of files that a run writes into the folders that it clears.
_WRITTEN: Final = re.compile(
    rf"/(?:{'|'.join([*checkpoint.FILES, *FILES])}|digests\.json"
    r"|(?:features|coordinates)\.npy|events\.out\.tfevents\..*|.*\.stofm-(?:old|new).*)$"
)


class RunFolder:
    """The folder of a run: ``run.json``, ``history.csv``, ``checkpoints/``, ``model/``.

    Prepared slices and cell embeddings are kept in `work`, by default ``work/`` in it; several runs
    may share it. A work folder that the run would clear raises ValueError.
    """

    def __init__(
        self, path: str | os.PathLike[str], work: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = local(path)
        if self.path.is_file():
            msg = f"{self.path} is a file, and a run needs a folder: choose another path."
            raise NotADirectoryError(errno.ENOTDIR, msg)
        self.history, self.report = self.path / "history.csv", self.path / "run.json"
        #: The last one is for what the current stage recomputes as it proceeds.
        self._cleared = [
            self.path / name for name in ("checkpoints", "model", "tensorboard", "refreshed")
        ]
        self.checkpoints, self.model, self.tensorboard, self.refreshed = self._cleared
        self.work = self.path / "work" if work is None else local(work)
        place, cleared = self.work.resolve(), [one.resolve() for one in self._cleared]
        if place == self.path.resolve() or any(map(place.is_relative_to, cleared)):
            raise ValueError(
                f"work_dir {str(self.work)!r} is the run's own folder or one that the run clears; "
                f"choose another, such as {str(self.path / 'work')!r} (the default)."
            )

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise FileExistsError if the folder must not be written to.

        `resume` continues an existing run; `overwrite` discards it.
        """
        if resume and overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: continue the run, or begin again?"
            )
        report = self.read_report()
        if not report and (others := self._others()):
            raise FileExistsError(
                f"{self.path} holds something other than a run of stofm ({', '.join(others[:3])}); "
                "take another folder."
            )
        if overwrite and (others := self._foreign(*self._cleared)):
            raise FileExistsError(
                f"{self.path} holds a run, and other files, for example "
                f"{others[:3]}: overwrite=True would delete them. Move them elsewhere, or take "
                "another folder."
            )
        if report and not (resume or overwrite):
            raise FileExistsError(
                f"{self.path} holds a run ({report['status']}): pass resume=True to continue it, "
                "overwrite=True to throw it away, or take another folder."
            )

    def _others(self) -> list[str]:
        """Names in the folder that do not come from a run that has just begun."""
        return [
            path.name
            for path in (self.path.iterdir() if self.path.is_dir() else ())
            if path.name != LOCK
            and not self.work.resolve().is_relative_to(path.resolve())
            and not path.name.startswith(".")
            and not (path == self.checkpoints and not any(path.iterdir()))
        ]

    def _foreign(self, *folders: Path) -> list[str]:
        """Files in folders that no run has written."""
        files = [path for folder in folders for path in folder.rglob("*") if not path.is_dir()]
        names = [one.relative_to(self.path).as_posix() for one in files if one.name not in TRIFLES]
        return sorted(name for name in names if not _WRITTEN.search(name))

    def remove(self, folder: Path) -> None:
        """Delete a folder of the run unless it holds other files."""
        if not self._foreign(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def check_settings(self, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the run was begun with other settings."""
        old, new = _flat(dict(begun)), _flat(json.loads(json.dumps(settings)))
        changed = [
            f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
            for name in sorted(old | new)
            if old.get(name) != new.get(name)
        ]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ValueError(
                f"The run in {self.path} was begun with other settings: {'; '.join(changed[:5])}"
                f"{more}. Use those, or choose another folder."
            )

    def read_report(self) -> dict[str, Any]:
        """Read the report from ``run.json`` or the newest checkpoint; empty if there is no run."""
        found: list[Any] = []
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(self.report.read_text(encoding="utf-8")))
        found += (read_state(folder).get("report") for folder in reversed(self._to_go_on()))
        own = {"stofm_version", "status", "settings"}
        return next((one for one in found if isinstance(one, dict) and own <= set(one)), {})

    def clear(self) -> None:
        """Delete a run, but not its work folder."""
        for folder in self._cleared:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.history, self.report):
            file.unlink(missing_ok=True)

    def begin_history(self, parts: Sequence[str], earlier: Path | None = None) -> None:
        """Begin a history with these loss parts, or continue that of a checkpoint."""
        header = ",".join([*HISTORY_COLUMNS, *parts]) + "\n"
        content = header if earlier is None else (earlier / HISTORY).read_text(encoding="utf-8")
        put_in_place(self.history, lambda part: part.write_text(content, encoding="utf-8"))

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the history; numbers are written exactly."""
        with self.history.open("r+", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, next(csv.reader(file)), lineterminator="\n")
            file.seek(0, 2)
            writer.writerow(row)

    def checkpoint(self, stage: int, name: str, step: int | None) -> Path:
        """Folder of a stage's checkpoint after `step` steps, or at its end."""
        at = _FINAL if step is None else f"{step:08d}"
        return self.checkpoints / f"{stage}-{name}-{at}"

    def newest(self) -> Path | None:
        """Return the newest undamaged checkpoint, or None.

        Those that are damaged are named in a warning.
        """
        for folder in reversed(self._to_go_on()):
            if not (damage := find_damage(folder)):
                return folder
            warn(
                f"{damage} The run goes on from the checkpoint before {folder}, which is made again."
            )
        return None

    def prune(self, current: Path, keep: set[str]) -> None:
        """Delete checkpoints that are no longer needed.

        Kept are those to keep, the ends of stages, the current one, and the one before in case the
        current one is damaged.
        """
        found = self._to_go_on()
        at = found.index(current)
        needed = {*keep, *(folder.name for folder in found[max(0, at - 1) : at + 1])}
        for folder in self._all():
            if folder.name not in needed and not folder.name.endswith(_FINAL):
                self.remove(folder)

    def remove_later(self, than: Path | None) -> None:
        """Delete the checkpoints after this one, whose steps will be repeated."""
        for folder in self._all():
            if than is None or _age(folder) > _age(than):
                self.remove(folder)

    def _all(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("*") if _CHECKPOINT.fullmatch(p.name)]

    def _to_go_on(self) -> list[Path]:
        """Checkpoints that training can resume from; others hold weights only."""
        return sorted(
            (
                folder
                for folder in self._all()
                if (folder / STATE).is_file()
                and (folder.name.endswith(_FINAL) or (folder / OPTIMIZER).is_file())
            ),
            key=_age,
        )


def _age(folder: Path) -> tuple[int, str]:
    # Digits sort before "final".
    return int(folder.name.split("-")[0]), folder.name.rsplit("-", 1)[1]


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Entries of nested JSON by their path, such as ``stages[0].epochs``."""
    if isinstance(value, dict):
        parts = {f"{where}.{name}".lstrip("."): one for name, one in value.items()}
    elif isinstance(value, list):
        parts = {f"{where}[{k}]": one for k, one in enumerate(value)}
    else:
        return {where: value}
    return {name: leaf for place, one in parts.items() for name, leaf in _flat(one, place).items()}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process, also across machines; make it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"{folder} is in use: another process trains into it. Wait until it has ended, or choose "
            f"another out_dir. If that process no longer exists, delete {folder / LOCK}."
        ) from None
    try:
        yield
    finally:
        # Not on systems where a locked file can't be deleted.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()
