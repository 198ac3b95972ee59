"""A checkpoint of a run: all that is needed to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stofm._config import build_dataclass
from stofm._files import put_in_place
from stofm.nn import checkpoint
from stofm.nn.checkpoint import load_exactly, read_tensors, write_tensors
from stofm.train.optimizer import load_optimizer_tensors, optimizer_tensors
from stofm.train.storage import digest_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stofm.nn import Stofm

#: Raised when a run of this version can't be continued by an older one, or the reverse.
FORMAT_VERSION = 2

_TRAINING = checkpoint.TRAINING
_STATE = f"{_TRAINING}/state.json"
_HISTORY = f"{_TRAINING}/history.csv"
_HEADS = f"{_TRAINING}/heads.safetensors"
_OPTIMIZER = f"{_TRAINING}/optimizer.safetensors"
TRAINING_FILES = (_STATE, _HISTORY, _HEADS, _OPTIMIZER)
#: How the name of a checkpoint at the end of a stage ends.
FINAL = "final"


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
    totals: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    stage_state: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model, and what stands on it in training; that may hold parts of the model."""

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
    *,
    report: Mapping[str, Any] | None = None,
    history: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all; ``Stofm.from_pretrained`` can read it.

    `optimizer` goes with the module whose weights it has; there is none if the stage does not go
    on here. With `report` (what ``run.json`` says) and `history` the run needs neither from
    elsewhere.
    """

    def fill(place: Path) -> None:
        trained.model.save_pretrained(place)
        (place / _TRAINING).mkdir()
        write_tensors(place / _HEADS, trained.head_tensors())
        if optimizer is not None:
            write_tensors(place / _OPTIMIZER, optimizer_tensors(*optimizer))
        if history is not None:
            shutil.copyfile(history, place / _HISTORY)
        entries = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "report": dict(report or {}),
            "files": _digests(place),
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
    try:
        stored = _read_state(folder)["files"]
        found = _digests(folder)
    except OSError as error:
        return f"{folder} can't be read ({error})."
    except _DamagedError as error:
        return error.finding
    if missing := sorted(set(stored) - set(found)):
        return f"{folder / missing[0]} is missing."
    if changed := sorted(name for name in stored if stored[name] != found[name]):
        return f"{folder / changed[0]} is damaged: it is not what was written."
    return ""


def read_progress(folder: Path) -> Progress:
    """Read how far the run had come at a checkpoint."""
    return build_dataclass(Progress, _read_state(folder)["progress"], str(folder / _STATE))


def read_stored_report(folder: Path) -> Any:
    """Read what ``run.json`` said when a checkpoint was written."""
    return _read_state(folder)["report"]


def restore_history(folder: Path, path: Path) -> None:
    """Put the history that a checkpoint holds in the place of another."""
    put_in_place(path, lambda part: shutil.copyfile(folder / _HISTORY, part))


def load_checkpoint(
    folder: Path, trained: Trained, optimizer: tuple[Optimizer, nn.Module] | None = None
) -> None:
    """Put a checkpoint's weights into model, heads and optimiser."""
    load_exactly(trained.model, _read_tensors(folder, checkpoint.WEIGHTS), str(folder))
    stored = _read_tensors(folder, _HEADS)
    own = trained.head_tensors()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in stored.items()}:
        differing = sorted(set(own) ^ set(stored))[:3]
        msg = f"The heads in {folder} are others than those of this run: {differing} differ."
        raise ValueError(msg)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])
    if optimizer is not None:
        load_optimizer_tensors(*optimizer, _read_tensors(folder, _OPTIMIZER))


class _DamagedError(ValueError):
    """A file of a checkpoint is not what was written."""

    def __init__(self, folder: Path, finding: str) -> None:
        self.finding = finding
        super().__init__(
            f"{finding} Delete {folder} and resume: the run goes on from the checkpoint before."
        )


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _DamagedError(folder, f"{path} can't be read ({error}).") from error
    if not isinstance(entries, dict):
        raise _DamagedError(folder, f"{path} is damaged: it holds {type(entries).__name__}.")
    found = entries.get("format_version")
    if isinstance(found, int) and found != FORMAT_VERSION:
        msg = (
            f"{path} has format_version {found!r}, this stofm reads {FORMAT_VERSION}: go on with "
            "the version of stofm that began the run (see run.json)."
        )
        raise ValueError(msg)
    if entries.pop("digest", None) != _digest_of(entries):
        raise _DamagedError(folder, f"{path} is damaged: it is not what was written.")
    return entries


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read weights that training can go on from: finite float32."""
    try:
        tensors = read_tensors(folder / name)
    except (OSError, ValueError) as error:
        raise _DamagedError(folder, str(error)) from error
    for key, value in tensors.items():
        if value.dtype != torch.float32:
            raise _DamagedError(folder, f"{folder / name}: {key} is {value.dtype}, not float32.")
    return tensors


def _digests(place: Path) -> dict[str, str]:
    """Digest of every file but the state, by its path within the folder."""
    files = {p.relative_to(place).as_posix(): p for p in sorted(place.rglob("*")) if p.is_file()}
    return {name: digest_file(path) for name, path in files.items() if name != _STATE}


def _digest_of(entries: Mapping[str, Any]) -> str:
    text = json.dumps(entries, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
