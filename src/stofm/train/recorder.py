"""What a run writes while it goes on: history, checkpoints, the best weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._files import put_in_place
from stofm._logging import step_bar
from stofm.train.checkpoint import (
    Trained,
    write_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stofm.train.loop import TrainingLoop
    from stofm.train.run import Pretraining

#: Columns of the history that every run has, before those of the loss parts.
HISTORY_COLUMNS = (
    *("stage", "split", "epoch", "step", "loss"),
    *("learning_rate", "gradient_norm", "cells", "tokens", "seconds"),
)


class RunRecorder:
    """Takes a loop's reports and writes history and checkpoints; only the first process does."""

    def __init__(
        self, run: Pretraining, loop: TrainingLoop, trained: Trained, report: Mapping[str, Any]
    ) -> None:
        self._folder, self._processes = run.folder, run.processes
        self._loop, self._trained, self._report = loop, trained, report
        stage, step = loop.stage, loop.progress.step
        self._board: Any = None
        if run.processes.is_first and run.run.tensorboard:
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            # Entries of steps that are repeated are hidden, also those of a run without a checkpoint.
            place = (run.folder.path, run.folder.tensorboard.name, f"{stage.number}-{stage.name}")
            self._board = TensorBoardLogger(*place, purge_step=step + 1)
        show = run.show_progress_bar and run.processes.is_first
        self._bar = step_bar(stage.name, total=loop.n_steps, done=step, show=show)

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a row of the history."""
        if self._processes.is_first:
            append_history(self._folder.history, row)
        if self._board is not None:
            numbers = {f"{row['split']}/{k}": v for k, v in row.items() if isinstance(v, float)}
            self._board.log_metrics(numbers, row["step"])
            self._board.save()
        if row["split"] == "train":
            shown = {
                name: f"{row[name]:.4g}" for name in ("loss", *self._loop.names) if name in row
            }
            self._bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        """One more optimiser step is done."""
        self._bar.update()

    def keep(self) -> None:
        """Write the present weights, the best so far."""
        progress = self._loop.progress
        target = self._path(progress.step)
        progress.best_checkpoint = target.name
        if self._processes.is_first:
            write_checkpoint(target, self._trained, progress, None, report=self._report)

    def save(self) -> None:
        """Write a checkpoint of the present step; only the first process does.

        The others may call it at other steps.
        """
        progress = self._loop.progress
        target = self._path(progress.step)
        progress.last_checkpoint = target.name
        if self._processes.is_first:
            self._write(target)

    def save_end(self) -> None:
        """Write the checkpoint of the stage's end, without the optimiser."""
        self._loop.progress.is_finished = True
        if self._processes.is_first:
            self._write(self._path(None))

    def close(self) -> None:
        """Close bar and files."""
        self._bar.close()
        if self._board is not None:
            self._board.finalize("success")

    def _path(self, step: int | None) -> Path:
        stage = self._loop.stage
        return self._folder.checkpoint(stage.number, stage.name, step)

    def _write(self, target: Path) -> None:
        loop, progress = self._loop, self._loop.progress
        embeddings = loop.stage.embeddings
        progress.stage_state = {} if embeddings is None else embeddings.state()
        progress.scaler = dict(self._processes.fabric.strategy.precision.state_dict())
        optimizer = None if progress.is_finished else (loop.optimizer, loop.stage.objective)
        beside: dict[str, Any] = {"report": self._report, "history": self._folder.history}
        write_checkpoint(target, self._trained, progress, optimizer, **beside)
        self._folder.prune(target, {progress.last_checkpoint, progress.best_checkpoint})


def begin_history(path: Path, parts: Sequence[str], earlier: Path | None = None) -> None:
    """Write the header of a history with these loss parts, and the rows that an earlier one has."""
    import pandas as pd

    rows = pd.DataFrame() if earlier is None else pd.read_csv(earlier, dtype=str)
    rows = rows.reindex(columns=[*HISTORY_COLUMNS, *parts])
    put_in_place(path, lambda part: rows.to_csv(part, index=False))


def append_history(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row of a history; numbers can be read again to the last bit."""
    import pandas as pd

    columns = pd.read_csv(path, nrows=0).columns
    pd.DataFrame([row], columns=columns).to_csv(path, mode="a", header=False, index=False)
