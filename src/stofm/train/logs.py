"""What a run reports: history as CSV, TensorBoard, a progress bar, and run.json."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stofm._files import put_in_place, read_table
from stofm._logging import bars_can_be_seen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from torch import nn

#: Columns that every row has, before those of the loss parts.
_COLUMNS = (
    "stage",
    "split",
    "epoch",
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "cells",
    "tokens",
    "seconds",
)


class History:
    """Rows of ``history.csv``, written as they come.

    Parameters
    ----------
    path
        The file; rows that it has stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns = list(_COLUMNS)
        if not path.is_file():
            self._write_all([])
            return
        with path.open(newline="") as file:
            self._columns = list(csv.DictReader(file).fieldnames or _COLUMNS)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        new = [name for name in row if name not in self._columns]
        if new:
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


def is_history(path: Path) -> bool:
    """Whether a file begins as a history does."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return file.readline().rstrip().split(",")[: len(_COLUMNS)] == list(_COLUMNS)
    except (OSError, ValueError):
        return False


def read_history(path: Path) -> pd.DataFrame:
    """Read a history; numbers are those that were written, to the last bit."""
    return read_table(path)


class TensorBoard:
    """Writes rows of the history for TensorBoard.

    Parameters
    ----------
    folder
        Where; a folder of its own for each stage.
    done
        Steps that count; entries of later ones, of an interrupted run, are hidden.

    Raises
    ------
    ImportError
        TensorBoard is not installed.
    """

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
    """Steps of a stage with loss parts, cells per second and the time left, or nothing.

    Parameters
    ----------
    name
        Of the stage.
    total, done
        Optimiser steps, in all and done before.
    show
        Whether to show anything.
    """

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


@dataclass(frozen=True)
class StageReport:
    """What ``run.json`` says of a stage.

    Attributes
    ----------
    stage
        Name of the stage.
    steps
        Optimiser steps.
    n_weights
        Weights that are trained in the stage.
    cells, tokens
        Seen, by all processes and counted as often as seen; nodes count as tokens.
    seconds
        Time spent on steps.
    share_waiting
        Share of that time spent waiting for data.
    flops
        Estimate of the floating-point operations of the steps
        (:mod:`stofm.train.operations`).
    peak_memory_bytes
        Most memory in use so far: on a CUDA device there, else of the process.
    best_loss
        Lowest loss on the held-out slices.
    """

    stage: str
    steps: int
    n_weights: int
    cells: int
    tokens: int
    seconds: float
    share_waiting: float
    flops: float
    peak_memory_bytes: int
    best_loss: float | None


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
