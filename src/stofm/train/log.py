"""What a run reports as it goes: history as CSV, TensorBoard, a progress bar, checkpoints."""

from __future__ import annotations

import copy
import csv
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from stofm._files import put_in_place, read_table
from stofm._logging import bars_can_be_seen
from stofm.train.checkpoint import Trained, write_checkpoint
from stofm.train.folder import HISTORY_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from torch import nn

    from stofm.train.checkpoint import Progress
    from stofm.train.folder import RunFolder
    from stofm.train.loop import TrainingLoop
    from stofm.train.processes import Processes


class History:
    """Rows of ``history.csv``, written as they come; rows that it has stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns = list(HISTORY_COLUMNS)
        if path.is_file():
            with path.open(newline="") as file:
                self._columns = list(csv.DictReader(file).fieldnames or self._columns)
        else:
            self._write_all([])

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; entries that no row had before get a column."""
        if new := [name for name in row if name not in self._columns]:
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._write_all(rows)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _write_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        def fill(part: Path) -> None:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

        put_in_place(self._path, fill)


def read_history(path: Path) -> pd.DataFrame:
    """Read a history; numbers are those that were written, to the last bit."""
    return read_table(path)


class TensorBoard:
    """Writes rows of the history for TensorBoard; entries after step `done` are hidden."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            msg = "tensorboard=True needs TensorBoard: pip install 'stofm[train]'."
            raise ImportError(msg) from error
        # A run that has no checkpoint yet may have left entries too: also for 0.
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row."""
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class ProgressBar:
    """Steps of a stage with loss parts, cells per second and the time left, or nothing."""

    def __init__(self, name: str, *, total: int, done: int, show: bool) -> None:
        self._bar: Any = None
        if show and bars_can_be_seen():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, unit="step", leave=True)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def show_row(
        self, row: Mapping[str, Any], names: Sequence[str], cells_per_second: float
    ) -> None:
        """Show the numbers of a row of the history."""
        if self._bar is not None:
            shown = {name: f"{row[name]:.4g}" for name in ("loss", *names) if name in row}
            self._bar.set_postfix(shown | {"cells/s": f"{cells_per_second:.0f}"}, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class RunRecorder:
    """Takes a loop's reports and writes history and checkpoints; only the first process does."""

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
        self._writers: list[History | TensorBoard] = []
        progress = loop.progress
        if processes.is_first:
            self._writers.append(History(folder.history))
            if tensorboard:
                where = folder.path / "tensorboard" / f"{self._stage.number}-{self._stage.name}"
                self._writers.append(TensorBoard(where, progress.step))
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
        for writer in self._writers:
            writer.append(row)
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
        for writer in self._writers:
            if isinstance(writer, TensorBoard):
                writer.close()

    def _path(self, step: int | None) -> Path:
        return self._folder.checkpoint(self._stage.number, self._stage.name, step)

    def _write(self, target: Path) -> None:
        progress = self._loop.progress
        progress.stage_state = self._stage.state()
        progress.scaler = self._processes.scaler_state()
        optimizer = (self._loop.optimizer, self._stage.objective)
        write_checkpoint(
            target,
            self._trained,
            progress,
            None if progress.is_finished else optimizer,
            report=self._report,
            history=self._folder.history,
        )
        self._folder.prune(target, {progress.last_checkpoint, progress.best_checkpoint})


def count_weights(module: nn.Module) -> int:
    """Number of weights of a module that are trained."""
    return sum(w.numel() for w in module.parameters() if w.requires_grad)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far, on a CUDA device or by the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)
