"""What happens to a loop's reports: history, progress bar, checkpoints."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stofm.train.logs import History, ProgressBar, TensorBoard
from stofm.train.run_checkpoint import Trained, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stofm.train.loop import TrainingLoop
    from stofm.train.processes import Processes
    from stofm.train.run_checkpoint import Progress
    from stofm.train.state import RunFolder


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
    report
        What ``run.json`` says; checkpoints hold it too.
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
        report: Mapping[str, Any],
        tensorboard: bool,
        show_progress_bar: bool,
    ) -> None:
        self._loop = loop
        self._trained = trained
        self._folder = folder
        self._processes = processes
        self._report = report
        self._stage = loop.stage
        #: The best weights so far, until they are on disk.
        self._best: tuple[Trained, Progress] | None = None
        self._history: History | None = None
        self._board: TensorBoard | None = None
        progress = loop.progress
        if processes.is_first:
            self._history = History(folder.history)
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

    def keep(self) -> None:
        """Take the present weights as the best so far."""
        progress = self._loop.progress
        progress.best_checkpoint = self._path(progress.step).name
        if self._processes.is_first:
            vocabulary = self._trained.model.vocabulary
            kept = copy.deepcopy(self._trained, {id(vocabulary): vocabulary})
            kept.model.to("cpu")
            kept.heads.to("cpu")
            self._best = (kept, replace(progress))

    def save(self) -> None:
        """Write a checkpoint of the present step, and the best weights; only the first process does.

        The others may call it at other steps.
        """
        progress = self._loop.progress
        target = self._path(progress.step)
        progress.last_checkpoint = target.name
        if not self._processes.is_first:
            return
        if self._best is not None and progress.best_checkpoint != target.name:
            trained, then = self._best
            write_checkpoint(self._path(then.step), trained, then, None, report=self._report)
        self._best = None
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
            self._board.close()

    def _path(self, step: int | None) -> Path:
        return self._folder.checkpoint(self._stage.number, self._stage.name, step)

    def _write(self, target: Path) -> None:
        progress = self._loop.progress
        progress.stage_state = self._stage.state()
        progress.scaler = self._processes.scaler_state()
        optimizer = None
        if not progress.is_finished:
            optimizer = (self._loop.optimizer, self._stage.objective)
        write_checkpoint(
            target,
            self._trained,
            progress,
            optimizer,
            report=self._report,
            history=self._folder.history,
        )
        self._folder.prune(target, {progress.last_checkpoint, progress.best_checkpoint})
