"""Checkpoints of a run: all that is needed to go on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stofm._config import build_dataclass
from stofm._files import tidy
from stofm.nn import checkpoint
from stofm.nn.conversion import load_exactly, read_weights
from stofm.nn.tensor_files import write_tensors
from stofm.train.optimizer import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stofm.nn import Stofm

#: Raised when a run of this version can't be continued by an older one, or the reverse.
FORMAT_VERSION = 1

_TRAINING = checkpoint.TRAINING
_STATE = "state.json"
_HEADS, _OPTIMIZER = "heads", "optimizer"
_FINAL = "final"
_WORK = "work"


@dataclass
class Progress:
    """How far a run has come.

    Attributes
    ----------
    stage
        Number of the present stage in the run.
    epoch, position
        Present epoch, and its batches that are done.
    step
        Optimiser steps of the stage that are done.
    is_finished
        Whether the stage is.
    best_loss, best_checkpoint, n_without_improvement
        Lowest loss on the held-out slices, the checkpoint that has it, and validations since.
    last_checkpoint
        The checkpoint written last.
    n_cells, n_tokens
        Cells and tokens (or nodes) seen in the stage, by all processes.
    n_operations
        Estimate of the floating-point operations of the stage's steps, of all processes.
    seconds, waited
        Time spent on the stage's steps, and the part of it spent waiting for data.
    n_history_rows
        Rows of the history that belong to what is done.
    totals, counts
        Sums of the loss parts since the last row of the history, and what they are sums over.
    stage_state
        What the stage itself needs.
    scaler
        State of the gradients' scale, in precision ``"16-mixed"``.
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
    n_operations: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    n_history_rows: int = 0
    totals: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    stage_state: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds the tensors of.

    Attributes
    ----------
    model
        The model.
    heads
        What stands on it in training; may hold parts of the model, which are not stored twice.
    """

    model: Stofm
    heads: nn.Module

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
) -> None:
    """Write a checkpoint folder, whole or not at all; ``Stofm.from_pretrained`` can read it.

    Parameters
    ----------
    folder
        Must not be there.
    trained
        The weights.
    progress
        How far the run has come.
    optimizer
        The optimiser and the module whose weights it has; None at the end of a stage.
    """

    def fill(place: Path) -> None:
        trained.model.save_pretrained(place)
        (place / _TRAINING).mkdir()
        write_tensors(_file(place, _HEADS), trained.head_tensors())
        if optimizer is not None:
            write_tensors(_file(place, _OPTIMIZER), optimizer_tensors(*optimizer))
        entries = {"format_version": FORMAT_VERSION, **asdict(progress)}
        (place / _TRAINING / _STATE).write_text(json.dumps(entries, indent=2) + "\n")

    checkpoint.write_atomically(folder, fill, overwrite=True, kind=checkpoint.RUN_CHECKPOINT)


def read_progress(folder: Path) -> Progress:
    """Read how far the run had come at a checkpoint.

    Raises
    ------
    ValueError
        The checkpoint was written by a newer version of stofm, or is damaged.
    """
    path = folder / _TRAINING / _STATE
    try:
        entries: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        msg = f"{path} can't be read ({error}); delete {folder} to go on from the one before."
        raise ValueError(msg) from error
    found = entries.pop("format_version", None)
    if found != FORMAT_VERSION:
        msg = (
            f"{path} has format_version {found!r}, this stofm reads {FORMAT_VERSION}: go on with "
            "the version of stofm that began the run (see run.json)."
        )
        raise ValueError(msg)
    return build_dataclass(Progress, entries, str(path))


def load_checkpoint(
    folder: Path, trained: Trained, optimizer: tuple[Optimizer, nn.Module] | None = None
) -> None:
    """Put a checkpoint's weights into model, heads and optimiser.

    Raises
    ------
    ValueError
        The checkpoint belongs to other weights.
    """
    weights = read_weights(folder, checkpoint.WEIGHTS.removesuffix(".safetensors"))
    load_exactly(trained.model, weights, str(folder))
    stored = read_weights(folder / _TRAINING, _HEADS)
    own = trained.head_tensors()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in stored.items()}:
        differing = sorted(set(own) ^ set(stored))[:3]
        msg = f"The heads in {folder} are others than those of this run: {differing} differ."
        raise ValueError(msg)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])
    if optimizer is not None:
        load_optimizer_tensors(*optimizer, read_weights(folder / _TRAINING, _OPTIMIZER))


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
    ValueError
        The work folder is the run's folder or one that the run uses itself.
    """

    def __init__(
        self, path: str | os.PathLike[str], work: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.history = self.path / "history.csv"
        self.report = self.path / "run.json"
        self.model = self.path / "model"
        #: For what the present stage computes anew as it goes on.
        self.refreshed = self.path / "refreshed"
        self._cleared = (self.checkpoints, self.model, self.path / "tensorboard", self.refreshed)
        self.work = self.path / _WORK if work is None else Path(work)
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
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        # Of a run that was stopped while its slices were prepared there is only the work folder.
        others = {p.name for p in self.path.iterdir()} - {_WORK, self._work_name}
        if others and not self.report.is_file():
            msg = f"{self.path} holds something else than a run of stofm; take another folder."
            raise FileExistsError(msg)
        if self.report.is_file() and not (resume or overwrite):
            msg = (
                f"{self.path} holds a run ({self.read_report().get('status', 'unknown')}): pass "
                "resume=True to go on with it, overwrite=True to throw it away, or take another "
                "folder."
            )
            raise FileExistsError(msg)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run under other settings.

        Parameters
        ----------
        settings
            All that the run's result depends on, as JSON can hold it.

        Raises
        ------
        ValueError
            They differ from those that the run was begun with.
        """
        if changed := _differences(self.read_report().get("settings", {}), plain_json(settings)):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            msg = (
                f"The run in {self.path} was begun with other settings: {'; '.join(changed[:5])}"
                f"{more}. Go on with those, or take another folder."
            )
            raise ValueError(msg)

    def read_report(self) -> dict[str, Any]:
        """Return what ``run.json`` says; nothing if it is not there."""
        if not self.report.is_file():
            return {}
        entries: dict[str, Any] = json.loads(self.report.read_text())
        return entries

    def clear(self) -> None:
        """Delete a run, but not what was prepared for it in the work folder."""
        for folder in self._cleared:
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.history, self.report):
            file.unlink(missing_ok=True)

    def checkpoint(self, stage: int, name: str, step: int | None) -> Path:
        """Folder of a stage's checkpoint after `step` steps, or of its end."""
        at = _FINAL if step is None else f"{step:08d}"
        return self.checkpoints / f"{stage}-{name}-{at}"

    def newest(self) -> Path | None:
        """The checkpoint to go on from; None if there is none."""
        found = [p for p in self._all() if (p / _TRAINING / _STATE).is_file()]
        return max(found, key=_age, default=None)

    def prune(self, keep: set[str]) -> None:
        """Delete checkpoints that nothing needs: all but those to keep and the ends of stages."""
        for folder in self._all():
            if folder.name not in keep and not folder.name.endswith(_FINAL):
                shutil.rmtree(folder, ignore_errors=True)

    def remove_refreshed(self) -> None:
        """Delete what a stage that is finished has computed anew."""
        shutil.rmtree(self.refreshed, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete what an interrupted write has left."""
        tidy(self.checkpoints)

    def _all(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("*-*-*") if not p.name.startswith(".")]


def plain_json(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What `entries` are after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(entries))
    return plain


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    part = path.with_name(f".{path.name}-part")
    part.write_text(json.dumps(entries, indent=2) + "\n")
    part.replace(path)


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


def _file(place: Path, stem: str) -> Path:
    return place / _TRAINING / f"{stem}.safetensors"
