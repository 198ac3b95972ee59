"""A whole run: stage after stage, from a model and prepared slices to a trained model."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from stofm._files import read_table, tidy
from stofm._logging import logger, step_bar
from stofm._messages import warn
from stofm._version import __version__
from stofm.corpus.storage import write_json
from stofm.train.checkpoint import (
    Progress,
    Trained,
    load_checkpoint,
    read_progress,
    write_checkpoint,
)
from stofm.train.loop import TrainingLoop
from stofm.train.objectives import make_objectives
from stofm.train.stages import Setup, make_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from stofm.nn import Stofm
    from stofm.train.config import StageConfig
    from stofm.train.gene_embeddings import Initializer


@dataclass(frozen=True)
class TrainResult:
    """The result of training.

    Attributes
    ----------
    model
        The trained model, on the CPU.
    history
        Losses over the steps: columns ``stage``, ``split`` (``"train"``, the mean since the
        previous row, or ``"validation"``), ``epoch``, ``step``, ``loss``, one for each loss part,
        ``learning_rate``, ``gradient_norm``, ``cells`` and ``tokens`` seen, ``seconds``.
    best, last
        Checkpoints of the last stage: the one with the lowest loss on held-out slices (the last if
        there are none), and the last.
    run
        Content of ``run.json``: settings, and for each stage weights, cells, tokens, seconds, share
        of time spent waiting for data, and memory.
    """

    model: Stofm
    history: pd.DataFrame
    best: Path
    last: Path
    run: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pretraining(Setup):
    """A run of training."""

    stages: Sequence[StageConfig]  # what is trained, one after the other
    #: Called before the first stage to set first weights from the slices; None leaves the model's.
    #: Must give the same result in every process.
    initialize: Initializer | None
    #: Name and fingerprint of the file with gene embeddings, if any; for the record.
    gene_table: str

    def train(self, *, resume: bool, overwrite: bool) -> TrainResult:
        """Train the model.

        `resume` continues the run in the folder, if there is one; `overwrite` discards it.
        """
        self._check_validation()
        settings, model = self._settings(), self.model
        model.config = replace(model.config, trained=True)
        trained = Trained(model, make_objectives(model, self.stages, seed=self.run.seed))
        report, newest = self._open(trained, settings, resume=resume, overwrite=overwrite)
        if newest is not None:
            logger.info("Continuing from %s.", newest)
            load_checkpoint(newest, trained)
        elif self.initialize is not None:
            self.initialize(self.corpus, model)
        progress = Progress() if newest is None else read_progress(newest)
        for number in range(progress.stage, len(self.stages)):
            if not progress.is_finished:
                self._run_stage(trained, progress, newest, report)
            self._note(trained, progress, report)
            progress = Progress(stage=number + 1, scaler=progress.scaler)
        model.to("cpu").eval()
        if self.processes.is_first and not self.folder.model.is_dir():
            model.save_pretrained(self.folder.model)
        self._write(report, status="finished")
        return TrainResult(
            model=model,
            history=read_table(self.folder.history),
            best=self.folder.checkpoints / report["best"],
            last=self.folder.checkpoints / report["last"],
            run=report,
        )

    def _check_validation(self) -> None:
        if self.validation is None:
            given = {name: getattr(self.run, name) for name in ("patience", "validate_every")}
            if idle := [f"{name}={value}" for name, value in given.items() if value is not None]:
                what = ", ".join(idle)
                warn(f"{what}: has no effect without held-out slices; pass `validation`.")
            return
        trained_on = {one.digest: one.name for one in self.corpus.slices}
        for one in self.validation.slices:
            if one.digest in trained_on:
                raise ValueError(
                    f"Slice {one.name!r} is held out and also trained on (as "
                    f"{trained_on[one.digest]!r}): its loss would mean nothing. Remove it from one."
                )

    def _settings(self) -> dict[str, Any]:
        model, config = self.model, self.model.config.to_dict()
        for label in ("name", "provenance", "stofm_version", "trained"):
            config.pop(label)
        trained_on, held_out = (
            [f"{one.name} {one.digest}" for one in (corpus.slices if corpus else ())]
            for corpus in (self.corpus, self.validation)
        )
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "run": self.run.settings(),
            "model": {**config, "weights": model.fingerprint},
            "vocabulary": model.vocabulary.fingerprint,
            "initialized": self.initialize is not None,
            **({"gene_table": self.gene_table} if self.gene_table else {}),
            "slices": trained_on,
            "held_out_slices": held_out,
        }

    def _open(
        self, trained: Trained, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> tuple[dict[str, Any], Path | None]:
        """Return the report and newest checkpoint of the run in the folder, or the report of a new run."""
        folder, newest = self.folder, None
        if not self.processes.is_first:
            return self.processes.agree(({}, newest))
        folder.check(resume=resume, overwrite=overwrite)
        report = {} if overwrite else folder.read_report()
        if report:
            folder.check_settings(report["settings"], settings)
            newest = folder.newest()
        else:
            device = self.processes.device
            is_cuda, n_threads = device.type == "cuda", torch.get_num_threads()
            described = torch.cuda.get_device_name(device) if is_cuda else f"{n_threads} threads"
            report = {
                "stofm_version": __version__,
                "status": "begun",
                "name": trained.model.name,
                "n_weights": sum(w.numel() for w in trained.model.parameters()),
                "n_cells": self.corpus.n_cells,
                "n_slices": len(self.corpus.slices),
                "device": f"{device} ({described})",
                "n_processes": self.processes.count,
                "stages": [],
                "settings": settings,
            }
            folder.clear()
            folder.checkpoints.mkdir(parents=True)
            write_json(folder.report, report)
        tidy(folder.checkpoints)
        folder.remove_later(newest)
        folder.begin_history(trained.loss_parts, newest)
        return self.processes.agree((report, newest))

    def _run_stage(
        self,
        trained: Trained,
        progress: Progress,
        newest: Path | None,
        report: Mapping[str, Any],
    ) -> None:
        """Train one stage to its end, from where it was stopped."""
        config, objective = self.stages[progress.stage], trained.heads[progress.stage]
        stage = make_stage(objective, self, config, progress.stage)
        loop = TrainingLoop(
            stage, config, run=self.run, processes=self.processes, progress=progress
        )
        if progress.scaler:
            self.processes.fabric.strategy.precision.load_state_dict(progress.scaler)
        if progress.step:
            assert newest is not None
            load_checkpoint(newest, trained, (loop.optimizer, objective))
            if stage.embeddings is not None:
                stage.embeddings.restore(progress.stage_state)
        else:
            stage.refresh()
        recorder = RunRecorder(self, loop, trained, report)
        try:
            loop.train(recorder)
        except FloatingPointError as error:
            if (good := self.folder.newest()) is None:
                raise
            raise FloatingPointError(
                f"{error} The last checkpoint is good: begin a new run with it, train(data, "
                f"{str(good)!r}, out_dir=<a new folder>), and with the stages that are left."
            ) from error
        finally:
            recorder.close()
        # The first process may still be writing.
        self.processes.wait()
        if self.run.keep == "best" and progress.best_checkpoint:
            load_checkpoint(self.folder.checkpoints / progress.best_checkpoint, trained)
        progress.is_finished = True
        recorder.save()

    def _note(self, trained: Trained, progress: Progress, report: dict[str, Any]) -> None:
        """Report a finished stage, and delete the files that only it needed.

        Cells and tokens (nodes count as such) are those seen by all processes, counted each time;
        memory is the most in use so far, on a CUDA device or by the process.
        """
        number = progress.stage
        if len(report["stages"]) == number:
            weights = [w.numel() for w in trained.heads[number].parameters() if w.requires_grad]
            report["stages"].append(
                {
                    "stage": self.stages[number].name,
                    "steps": progress.step,
                    "n_weights": sum(weights),
                    "cells": progress.n_cells,
                    "tokens": progress.n_tokens,
                    "seconds": round(progress.seconds, 3),
                    "share_waiting": round(progress.waited / max(progress.seconds, 1e-9), 4),
                    "peak_memory_bytes": peak_memory(self.processes.device),
                    "best_loss": progress.best_loss,
                }
            )
        if self.processes.is_first:
            self.folder.remove(self.folder.refreshed)
        self._write(
            report,
            status=f"stage {number + 1} of {len(self.stages)} is finished",
            best=progress.best_checkpoint or progress.last_checkpoint,
            last=progress.last_checkpoint,
        )

    def _write(self, report: dict[str, Any], **changes: str) -> None:
        report.update(changes)
        if self.processes.is_first:
            write_json(self.folder.report, report)
        self.processes.wait()


class RunRecorder:
    """Writes history and checkpoints as the loop reports; only the first process writes."""

    def __init__(
        self, run: Pretraining, loop: TrainingLoop, trained: Trained, report: Mapping[str, Any]
    ) -> None:
        self._folder, self._processes = run.folder, run.processes
        self._loop, self._trained, self._report = loop, trained, report
        stage, step = loop.stage, loop.progress.step
        self._board: Any = None
        if run.processes.is_first and run.run.tensorboard:
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            # Entries of repeated steps are hidden, also those of a run without a checkpoint.
            place = (run.folder.path, run.folder.tensorboard.name, f"{stage.number}-{stage.name}")
            self._board = TensorBoardLogger(*place, purge_step=step + 1)
        show = run.show_progress_bar
        self._bar = step_bar(stage.name, total=loop.n_steps, done=step, show=show)

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to the history."""
        if self._processes.is_first:
            self._folder.append(row)
        if self._board is not None:
            numbers = {f"{row['split']}/{k}": v for k, v in row.items() if isinstance(v, float)}
            self._board.log_metrics(numbers, row["step"])
            self._board.save()
        if row["split"] == "train":
            shown = ("loss", *self._loop.names)
            parts = {name: f"{row[name]:.4g}" for name in shown if name in row}
            self._bar.set_postfix(parts, refresh=False)

    def advance(self) -> None:
        """Count one optimiser step."""
        self._bar.update()

    def keep(self) -> None:
        """Write the current weights as the best so far."""
        progress = self._loop.progress
        target = self._path(progress.step)
        progress.best_checkpoint = target.name
        if self._processes.is_first:
            write_checkpoint(target, self._trained, progress, None, report=self._report)

    def save(self) -> None:
        """Write a checkpoint of this step or, without the optimiser, at the end of the stage.

        Processes may call it at different steps.
        """
        loop, progress, optimizer = self._loop, self._loop.progress, None
        target = self._path(None if progress.is_finished else progress.step)
        if not progress.is_finished:
            progress.last_checkpoint = target.name
            optimizer = loop.optimizer, loop.stage.objective
        if not self._processes.is_first:
            return
        embeddings = loop.stage.embeddings
        progress.stage_state = {} if embeddings is None else embeddings.state()
        progress.scaler = dict(self._processes.fabric.strategy.precision.state_dict())
        beside: dict[str, Any] = {"report": self._report, "history": self._folder.history}
        write_checkpoint(target, self._trained, progress, optimizer, **beside)
        self._folder.prune(target, {progress.last_checkpoint, progress.best_checkpoint})

    def close(self) -> None:
        """Close the progress bar and files."""
        self._bar.close()
        if self._board is not None:
            self._board.finalize("success")

    def _path(self, step: int | None) -> Path:
        stage = self._loop.stage
        return self._folder.checkpoint(stage.number, stage.name, step)


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
