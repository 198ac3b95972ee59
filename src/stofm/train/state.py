"""The folder of a run, and which of its checkpoints training goes on from."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from typing import TYPE_CHECKING, Any, Final, get_args

from stofm._files import TRIFLES, local, put_in_place, tidy
from stofm._messages import warn
from stofm.nn.checkpoint import FILES
from stofm.train.config import StageName
from stofm.train.logs import is_history
from stofm.train.run_checkpoint import (
    FINAL,
    TRAINING_FILES,
    can_go_on,
    find_damage,
    read_stored_report,
)
from stofm.train.run_lock import LOCK

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

_WORK = "work"
_STAGE: Final = rf"\d+-(?:{'|'.join(get_args(StageName))})"
_CHECKPOINT: Final = re.compile(rf"{_STAGE}-(?:\d{{8,}}|{FINAL})")
_MODEL_FILES: Final = "|".join(map(re.escape, FILES))
#: Files that a run writes into the folders that it clears, and what a killed write has left.
_WRITTEN: Final = re.compile(
    "|".join(
        (
            rf"checkpoints/{_CHECKPOINT.pattern}/(?:{_MODEL_FILES}|{'|'.join(map(re.escape, TRAINING_FILES))})",
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
        self._work_name = self._name_inside(self.work)

    def _name_inside(self, work: Path) -> str | None:
        """Name of the folder in this one that `work` is in, or is; None if it is elsewhere."""
        path, place = self.path.resolve(), work.resolve()
        if not place.is_relative_to(path):
            return None
        name = place.relative_to(path).parts[:1]
        if not name or name[0] in {p.name for p in self._cleared}:
            msg = (
                f"work_dir {str(work)!r} is the run's own folder or one that the run clears; "
                f"choose another, such as {str(self.path / _WORK)!r} (the default)."
            )
            raise ValueError(msg)
        return name[0]

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
        if not self._may_hold_run():
            msg = f"{self.path} holds something else than a run of stofm; take another folder."
            raise FileExistsError(msg)
        self._refuse_folders()
        if overwrite and (others := self._others()):
            msg = (
                f"{self.path} holds a run, and files that are none of its own, for example "
                f"{others[:3]}: overwrite=True would delete them. Move them elsewhere, or take "
                "another folder."
            )
            raise FileExistsError(msg)
        if (report := self.read_report()) and not (resume or overwrite):
            msg = (
                f"{self.path} holds a run ({report.get('status', 'unknown')}): pass "
                "resume=True to go on with it, overwrite=True to throw it "
                "away, or take another folder."
            )
            raise FileExistsError(msg)

    def _may_hold_run(self) -> bool:
        """Whether all that is in the folder is a run, or what one that was hardly begun leaves."""
        if not self.path.exists() or self.read_report():
            return True
        # A run that was stopped before its first checkpoint has left at most these, some empty.
        mine = {_WORK, self._work_name, LOCK}
        others = [p for p in self.path.iterdir() if p.name not in mine and not _is_part(p)]
        empty = (self.report, self.checkpoints, self.history)
        return all(
            (p in empty and _is_empty(p)) or (p == self.history and is_history(p)) for p in others
        )

    def _refuse_folders(self) -> None:
        """Refuse folders where the run writes files."""
        for path in (self.history, self.report, self.path / LOCK):
            if path.is_dir():
                msg = f"{path} is a folder, and a run has a file there; take another folder."
                raise FileExistsError(msg)

    def _others(self, within: Path | None = None) -> list[str]:
        """Files that no run has written, in what the run clears or in a folder of that."""
        folders = self._cleared if within is None else (within,)
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
        if changed := _differences(begun, plain_json(settings)):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            msg = (
                f"The run in {self.path} was begun with other settings: {'; '.join(changed[:5])}"
                f"{more}. Go on with those, or take another folder."
            )
            raise ValueError(msg)

    def read_report(self) -> dict[str, Any]:
        """Return what ``run.json`` says, or else the newest checkpoint that can; nothing if there is no run."""
        try:
            entries: Any = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = None
        if _is_report(entries):
            report: dict[str, Any] = entries
            return report
        for folder in reversed(self._to_go_on()):
            with contextlib.suppress(ValueError):
                if _is_report(stored := read_stored_report(folder)):
                    return stored
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


def plain_json(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What `entries` are after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(entries))
    return plain


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


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and ".stofm-" in path.name


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _age(folder: Path) -> tuple[int, str]:
    # Digits sort before "final".
    return int(folder.name.split("-")[0]), folder.name.rsplit("-", 1)[1]


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Say in which entries two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for name in sorted({*old, *new})
            for text in _differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            text
            for k, (a, b) in enumerate(zip(old, new, strict=True))
            for text in _differences(a, b, f"{where}[{k}]")
        ]
    return [] if old == new else [f"{where} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
