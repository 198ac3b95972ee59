"""What happens to a loop's reports: history, progress bar, checkpoints."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stofm.train.logs import History, ProgressBar, TensorBoard
from stofm.train.state import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stofm.train.loop import TrainingLoop
    from stofm.train.processes import Processes
    from stofm.train.state import RunFolder, Trained


class RunRecorder:
    """Writes a loop's history and checkpoints; only the first process does.

    Parameters
    ----------
    loop
        The loop.
    trained
        What checkpoints hold.
    folder
        Of the run.
    processes
        Those that train together.
    tensorboard
        Write TensorBoard's files too.
    show_progress_bar
        Show a bar.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        trained: Trained,
        folder: RunFolder,
        processes: Processes,
        *,
        tensorboard: bool,
        show_progress_bar: bool,
    ) -> None:
        self._loop = loop
        self._trained = trained
        self._folder = folder
        self._processes = processes
        self._stage = loop.stage
        self._history: History | None = None
        self._board: TensorBoard | None = None
        progress = loop.progress
        if processes.is_first:
            self._history = History(folder.history, progress.n_history_rows)
            if tensorboard:
                where = folder.path / "tensorboard" / f"{self._stage.number}-{self._stage.name}"
                self._board = TensorBoard(where, progress.step)
        self._bar = ProgressBar(
            self._stage.name,
            total=loop.n_steps,
            done=progress.step,
            show=show_progress_bar and processes.is_first,
        )
        self._since = (time.perf_counter(), progress.n_cells)

    @property
    def newest(self) -> Path | None:
        """The run's newest checkpoint; None if there is none."""
        return self._folder.newest()

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a row of the history."""
        self._loop.progress.n_history_rows += 1
        if self._history is not None:
            self._history.append(row)
        if self._board is not None:
            self._board.append(row)
        if row["split"] == "train":
            now, n_cells = time.perf_counter(), self._loop.progress.n_cells
            seconds, seen = now - self._since[0], n_cells - self._since[1]
            self._since = (now, n_cells)
            self._bar.show_row(row, self._loop.names, seen / max(seconds, 1e-9))

    def advance(self) -> None:
        """One more optimiser step is done."""
        self._bar.advance()

    def save(self, *, is_best: bool) -> None:
        """Write a checkpoint of the stage's present step, and delete the one before."""
        progress = self._loop.progress
        target = self._path(progress.step)
        progress.last_checkpoint = target.name
        if is_best:
            progress.best_checkpoint = target.name
        self._write(target)

    def save_end(self) -> None:
        """Write the checkpoint of the stage's end, without the optimiser."""
        self._loop.progress.is_finished = True
        self._write(self._path(None))

    def close(self) -> None:
        """Close bar and files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _path(self, step: int | None) -> Path:
        return self._folder.checkpoint(self._stage.number, self._stage.name, step)

    def _write(self, target: Path) -> None:
        progress = self._loop.progress
        progress.stage_state = self._stage.state()
        progress.scaler = self._processes.scaler_state()
        if self._processes.is_first:
            optimizer = None
            if not progress.is_finished:
                optimizer = (self._loop.optimizer, self._stage.objective)
            write_checkpoint(target, self._trained, progress, optimizer)
            self._folder.prune({progress.last_checkpoint, progress.best_checkpoint})
        self._processes.wait()
