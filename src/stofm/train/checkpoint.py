"""Checkpoints of a run: weights, optimiser, progress."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stofm._config import build_dataclass
from stofm.corpus.storage import digest_files, find_change
from stofm.nn import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stofm.nn import Stofm

#: Raised when an older version can't continue a run of this one, or the reverse.
FORMAT_VERSION = 2
#: Progress, the history as it was when the checkpoint was written, weights of heads and optimiser.
FILES = STATE, HISTORY, _HEADS, OPTIMIZER = tuple(
    f"{checkpoint.TRAINING}/{name}"
    for name in ("state.json", "history.csv", "heads.safetensors", "optimizer.safetensors")
)
#: What AdamW keeps for each weight.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The progress of a run."""

    stage: int = 0  # number of the present stage in the run
    #: Current epoch, and the number of its batches that are done.
    epoch: int = 0
    position: int = 0
    #: Optimiser steps of the stage that are done, and whether the stage is.
    step: int = 0
    is_finished: bool = False
    #: Lowest loss on the held-out slices, its checkpoint, and the number of validations since.
    best_loss: float | None = None
    best_checkpoint: str = ""
    last_checkpoint: str = ""  # the checkpoint written last
    n_without_improvement: int = 0
    #: Cells and tokens (or nodes) seen in the stage, by all processes; time spent on its steps, and
    #: the part of that spent waiting for data.
    n_cells: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    #: Sums of the loss parts since the last row of the history, and their counts.
    totals: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    #: What the stage itself needs, and, in precision ``"16-mixed"``, the gradients' scale.
    stage_state: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model and the objectives that train it, which hold parts of the model."""

    model: Stofm
    heads: nn.ModuleList

    @property
    def loss_parts(self) -> list[str]:
        """Names of the loss parts of all objectives."""
        objectives: Any = self.heads.children()
        return list(dict.fromkeys(name for one in objectives for name in one.weights))

    def head_tensors(self) -> dict[str, Tensor]:
        """Weights of the objectives that do not belong to the model, each once."""
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
    """Write a checkpoint folder, completely or not at all; ``Stofm.from_pretrained`` loads it.

    `optimizer` comes with the module whose weights it has; there is none if the stage does not
    continue from here. `report` is the content of ``run.json``.
    """

    def fill(place: Path) -> None:
        trained.model.save_pretrained(place)
        (place / checkpoint.TRAINING).mkdir()
        checkpoint.write_tensors(place / _HEADS, trained.head_tensors())
        if optimizer is not None:
            checkpoint.write_tensors(place / OPTIMIZER, optimizer_tensors(*optimizer))
        if history is not None:
            shutil.copyfile(history, place / HISTORY)
        entries = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "report": report,
            "files": digest_files(place),
        }
        text = json.dumps(entries | {"digest": _digest_of(entries)}, indent=2)
        (place / STATE).write_text(text + "\n", encoding="utf-8")

    checkpoint.write_atomically(folder, fill, overwrite=True, kind=checkpoint.RUN_CHECKPOINT)


def find_damage(folder: Path) -> str:
    """Describe the first file of a checkpoint that has changed since it was written; empty if none."""
    if not (entries := read_state(folder)):
        return f"{folder / STATE} is damaged: its content has changed."
    return find_change(folder, entries["files"])


def read_progress(folder: Path) -> Progress:
    """Read the progress of an undamaged checkpoint."""
    return build_dataclass(Progress, read_state(folder)["progress"], str(folder / STATE))


def load_checkpoint(
    folder: Path, trained: Trained, optimizer: tuple[Optimizer, nn.Module] | None = None
) -> None:
    """Load an undamaged checkpoint into model, heads and optimiser."""
    weights = checkpoint.read_tensors(folder / checkpoint.WEIGHTS)
    checkpoint.load_exactly(trained.model, weights, str(folder))
    stored = checkpoint.read_tensors(folder / _HEADS)
    with torch.no_grad():
        for name, value in trained.head_tensors().items():
            value.copy_(stored[name])
    if optimizer is not None:
        load_optimizer_tensors(*optimizer, checkpoint.read_tensors(folder / OPTIMIZER))


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
    """Restore the optimiser's state from :func:`optimizer_tensors`."""
    for name, weight in module.named_parameters():
        for key in _MOMENTS:
            if (value := tensors.get(f"{name}/{key}")) is not None:
                # AdamW counts its steps on the CPU.
                place = torch.device("cpu") if key == "step" else weight.device
                optimizer.state[weight][key] = value.to(place, copy=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state beside the weights; empty if it is damaged."""
    try:
        entries: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        digest, found = entries.pop("digest"), entries["format_version"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise ValueError(
            f"{folder / STATE} has format_version {found!r}, this stofm reads {FORMAT_VERSION}: "
            "continue with the version of stofm that began the run (see run.json)."
        )
    return entries if digest == _digest_of(entries) else {}


def _digest_of(entries: Mapping[str, Any]) -> str:
    text = json.dumps(entries, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
