"""The folder of a run: who trains into it, and its checkpoints, from which it goes on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import torch
from filelock import FileLock, Timeout

from stofm._config import build_dataclass
from stofm._files import TRIFLES, local
from stofm._messages import warn
from stofm.nn import checkpoint
from stofm.nn.checkpoint import load_exactly, read_tensors, write_tensors
from stofm.train.storage import digest_files, find_change

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stofm.nn import Stofm

#: Raised when a run of this version can't be continued by an older one, or the reverse.
FORMAT_VERSION = 2

_STATE = f"{checkpoint.TRAINING}/state.json"
#: The history as it was when the checkpoint was written.
HISTORY = f"{checkpoint.TRAINING}/history.csv"
_HEADS = f"{checkpoint.TRAINING}/heads.safetensors"
_OPTIMIZER = f"{checkpoint.TRAINING}/optimizer.safetensors"
#: How the name of a checkpoint at the end of a stage ends.
FINAL = "final"
#: What AdamW keeps of each weight.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run has come.

    Attributes
    ----------
    stage
        Number of the present stage in the run.
    epoch, position
        Present epoch, and its batches that are done.
    step, is_finished
        Optimiser steps of the stage that are done, and whether the stage is.
    best_loss, best_checkpoint, n_without_improvement
        Lowest loss on the held-out slices, the checkpoint that has it, and validations since.
    last_checkpoint
        The checkpoint written last.
    n_cells, n_tokens, seconds, waited
        Cells and tokens (or nodes) seen in the stage, by all processes; time spent on its steps,
        and the part of that spent waiting for data.
    totals, counts
        Sums of the loss parts since the last row of the history, and what they are sums over.
    stage_state, scaler
        What the stage itself needs, and, in precision ``"16-mixed"``, the gradients' scale.
    """

    stage: int = 0
    epoch: int = 0
    position: int = 0
    step: int = 0
    is_finished: bool = False
    best_loss: float | None = None
    best_checkpoint: str = ""
    last_checkpoint: str = ""
    n_without_improvement: int = 0
    n_cells: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    totals: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    stage_state: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model, and what stands on it in training; that may hold parts of the model."""

    model: Stofm
    heads: nn.ModuleList

    @property
    def loss_parts(self) -> list[str]:
        """Names of the loss parts of all objectives."""
        objectives: Any = self.heads.children()
        return list(dict.fromkeys(name for one in objectives for name in one.weights))

    def head_tensors(self) -> dict[str, Tensor]:
        """Weights of the heads that are none of the model's, each once."""
        seen = {id(value) for value in self.model.state_dict(keep_vars=True).values()}
        found = {}
        for name, value in self.heads.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                found[name] = value.detach()
        return found


def write_checkpoint(
    folder: Path,
    trained: Trained,
    progress: Progress,
    optimizer: tuple[Optimizer, nn.Module] | None,
    *,
    report: Mapping[str, Any],
    history: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all; ``Stofm.from_pretrained`` can read it.

    `optimizer` goes with the module whose weights it has; there is none if the stage does not go
    on here. `report` is what ``run.json`` says.
    """

    def fill(place: Path) -> None:
        trained.model.save_pretrained(place)
        (place / checkpoint.TRAINING).mkdir()
        write_tensors(place / _HEADS, trained.head_tensors())
        if optimizer is not None:
            write_tensors(place / _OPTIMIZER, optimizer_tensors(*optimizer))
        if history is not None:
            shutil.copyfile(history, place / HISTORY)
        entries = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "report": report,
            "files": digest_files(place),
        }
        text = json.dumps(entries | {"digest": _digest_of(entries)}, indent=2)
        (place / _STATE).write_text(text + "\n", encoding="utf-8")

    checkpoint.write_atomically(folder, fill, overwrite=True, kind=checkpoint.RUN_CHECKPOINT)


def can_go_on(folder: Path) -> bool:
    """Whether training can go on from a folder: not if only its weights were kept."""
    is_end = folder.name.endswith(FINAL)
    return (folder / _STATE).is_file() and (is_end or (folder / _OPTIMIZER).is_file())


def find_damage(folder: Path) -> str:
    """Compare all files of a checkpoint with what was written; empty if they are the same."""
    entries = _read_state(folder)
    if not entries:
        return f"{folder / _STATE} is damaged: it is not what was written."
    return find_change(folder, entries["files"])


def read_progress(folder: Path) -> Progress:
    """Read how far the run had come at a sound checkpoint."""
    entries, known = _read_state(folder)["progress"], {one.name for one in fields(Progress)}
    entries = {name: value for name, value in entries.items() if name in known}
    return build_dataclass(Progress, entries, str(folder / _STATE))


def load_checkpoint(
    folder: Path, trained: Trained, optimizer: tuple[Optimizer, nn.Module] | None = None
) -> None:
    """Put a sound checkpoint's weights into model, heads and optimiser."""
    load_exactly(trained.model, read_tensors(folder / checkpoint.WEIGHTS), str(folder))
    stored = read_tensors(folder / _HEADS)
    with torch.no_grad():
        for name, value in trained.head_tensors().items():
            value.copy_(stored[name])
    if optimizer is not None:
        load_optimizer_tensors(*optimizer, read_tensors(folder / _OPTIMIZER))


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """State of AdamW by name of the weight in `module`, on the CPU."""
    return {
        f"{name}/{key}": optimizer.state[weight][key].detach().to("cpu", copy=True)
        for name, weight in module.named_parameters()
        for key in _MOMENTS
        if key in optimizer.state.get(weight, {})
    }


def load_optimizer_tensors(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    for name, weight in module.named_parameters():
        for key in _MOMENTS:
            if (value := tensors.get(f"{name}/{key}")) is not None:
                # AdamW counts its steps on the CPU.
                place = torch.device("cpu") if key == "step" else weight.device
                optimizer.state[weight][key] = value.to(place, copy=True)


def _read_state(folder: Path) -> dict[str, Any]:
    """What is noted beside the weights; nothing if that is damaged."""
    try:
        entries: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        digest, found = entries.pop("digest"), entries["format_version"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise ValueError(
            f"{folder / _STATE} has format_version {found!r}, this stofm reads {FORMAT_VERSION}: "
            "go on with the version of stofm that began the run (see run.json)."
        )
    return entries if digest == _digest_of(entries) else {}


def _digest_of(entries: Mapping[str, Any]) -> str:
    text = json.dumps(entries, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


#: The file by which a process has the folder to itself.
LOCK: Final = "run.lock"
_CHECKPOINT: Final = re.compile(rf"\d+-[a-z_]+-(?:\d{{8,}}|{FINAL})")
#: Ends of the paths of files that a run writes into the folders that it clears.
_WRITTEN: Final = re.compile(
    rf"/(?:{'|'.join([*checkpoint.FILES, _STATE, HISTORY, _HEADS, _OPTIMIZER])}|digests\.json"
    r"|(?:features|coordinates)\.npy|events\.out\.tfevents\..*|.*\.stofm-(?:old|new).*)$"
)


class RunFolder:
    """The folder of a run: ``run.json``, ``history.csv``, ``checkpoints/``, ``model/``.

    Prepared slices and cell embeddings are kept in `work`, by default ``work/`` in it; several runs
    may share that.

    Raises
    ------
    NotADirectoryError
        There is a file at `path`.
    ValueError
        The work folder is the run's folder or one that the run clears.
    """

    def __init__(
        self, path: str | os.PathLike[str], work: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = local(path)
        if self.path.is_file():
            msg = f"{self.path} is a file, and a run needs a folder: name another place."
            raise NotADirectoryError(errno.ENOTDIR, msg)
        self.history = self.path / "history.csv"
        self.report = self.path / "run.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        #: For what the present stage computes anew as it goes on.
        self.refreshed = self.path / "refreshed"
        self._cleared = (self.checkpoints, self.model, self.tensorboard, self.refreshed)
        self.work = self.path / "work" if work is None else local(work)
        place = self.work.resolve()
        if place == self.path.resolve() or any(
            place.is_relative_to(one.resolve()) for one in self._cleared
        ):
            raise ValueError(
                f"work_dir {str(self.work)!r} is the run's own folder or one that the run clears; "
                f"choose another, such as {str(self.path / 'work')!r} (the default)."
            )

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that may not be written to (FileExistsError).

        `resume` goes on with the run that is there, if one is; `overwrite` throws it away.
        """
        if resume and overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: go on with the run, or begin again?"
            )
        report = self.read_report()
        if not report and (others := self._others()):
            raise FileExistsError(
                f"{self.path} holds something else than a run of stofm ({', '.join(others[:3])}); "
                "take another folder."
            )
        if overwrite and (others := self._foreign(*self._cleared)):
            raise FileExistsError(
                f"{self.path} holds a run, and files that are none of its own, for example "
                f"{others[:3]}: overwrite=True would delete them. Move them elsewhere, or take "
                "another folder."
            )
        if report and not (resume or overwrite):
            raise FileExistsError(
                f"{self.path} holds a run ({report['status']}): pass resume=True to go on with it, "
                "overwrite=True to throw it away, or take another folder."
            )

    def _others(self) -> list[str]:
        """What is in the folder beside what a run leaves that has no report yet."""
        work = self.work.resolve()
        return [
            path.name
            for path in (self.path.iterdir() if self.path.is_dir() else ())
            if path.name != LOCK
            and not work.is_relative_to(path.resolve())
            and not path.name.startswith(".")
            and not (path == self.checkpoints and not any(path.iterdir()))
        ]

    def _foreign(self, *folders: Path) -> list[str]:
        """Files in folders that no run has written."""
        files = [path for folder in folders for path in folder.rglob("*") if not path.is_dir()]
        names = [one.relative_to(self.path).as_posix() for one in files if one.name not in TRIFLES]
        return sorted(name for name in names if not _WRITTEN.search(name))

    def remove(self, folder: Path) -> None:
        """Delete a folder that the run has written, if it holds nothing else."""
        if not self._foreign(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def check_settings(self, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run that was begun with other settings (ValueError)."""
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
                f"{more}. Go on with those, or take another folder."
            )

    def read_report(self) -> dict[str, Any]:
        """What ``run.json`` says, or else the newest checkpoint; nothing if there is no run."""
        found: list[Any] = []
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(self.report.read_text(encoding="utf-8")))
        found += (_read_state(folder).get("report") for folder in reversed(self._to_go_on()))
        own = {"stofm_version", "status", "settings"}
        return next((one for one in found if isinstance(one, dict) and own <= set(one)), {})

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
                self.remove(folder)

    def remove_later(self, than: Path | None) -> None:
        """Delete the checkpoints of steps that will be repeated: damaged ones, and weights alone."""
        for folder in self._all():
            if than is None or _age(folder) > _age(than):
                self.remove(folder)

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
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8")
        raise FileExistsError(
            f"{folder} is in use: {holder or 'another process'} trains into it. Wait until it has "
            "ended, or take another out_dir. If there is no such process any more, delete "
            f"{path}."
        ) from None
    try:
        # Not where a file that is locked can't be written to or deleted.
        with contextlib.suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()!r}", "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _age(folder: Path) -> tuple[int, str]:
    # Digits sort before "final".
    return int(folder.name.split("-")[0]), folder.name.rsplit("-", 1)[1]


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Entries of nested JSON by their place, such as ``stages[0].epochs``."""
    if isinstance(value, dict):
        parts = {f"{where}.{name}".lstrip("."): one for name, one in value.items()}
    elif isinstance(value, list):
        parts = {f"{where}[{k}]": one for k, one in enumerate(value)}
    else:
        return {where: value}
    return {name: leaf for place, one in parts.items() for name, leaf in _flat(one, place).items()}
