"""A whole run: one stage after the other, from a model and prepared slices to a trained model."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stofm._files import read_table, tidy
from stofm._logging import logger
from stofm._messages import warn
from stofm._version import __version__
from stofm.corpus.storage import write_json
from stofm.train.checkpoint import (
    HISTORY,
    Progress,
    Trained,
    load_checkpoint,
    read_progress,
)
from stofm.train.loop import TrainingLoop
from stofm.train.recorder import RunRecorder, begin_history
from stofm.train.samples import Draws
from stofm.train.stages import StageSetup, make_objectives, make_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from stofm.corpus.reader import Corpus
    from stofm.nn import Stofm
    from stofm.train.config import RunConfig, StageConfig
    from stofm.train.folder import RunFolder
    from stofm.train.gene_embeddings import Initializer
    from stofm.train.processes import Processes


@dataclass(frozen=True)
class TrainResult:
    """What training gives.

    Attributes
    ----------
    model
        The trained model, on the CPU.
    history
        Loss parts over the steps: columns ``stage``, ``split`` (``"train"``, the mean since the
        row before, or ``"validation"``), ``epoch``, ``step``, ``loss``, one for each loss part,
        ``learning_rate``, ``gradient_norm``, ``cells`` and ``tokens`` seen, ``seconds``.
    best, last
        Checkpoints of the last stage: the one with the lowest loss on the held-out slices (the
        last, if there are none), and the last.
    run
        What ``run.json`` says: settings, and of each stage weights, cells, tokens, seconds, share
        of time spent waiting for data, memory.
    """

    model: Stofm
    history: pd.DataFrame
    best: Path
    last: Path
    run: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A run of training.

    Attributes
    ----------
    stages, run
        What is trained, one after the other, and how.
    corpus, validation
        Slices to train on, and held-out ones; None for no validation.
    folder
        Where the run's files go, and cell embeddings.
    processes
        Those that train together.
    initialize
        Called before the first stage to set first weights from the slices; None leaves the
        model's. Must give the same in every process.
    gene_table
        Name and fingerprint of the file that it takes gene embeddings from, if any; for the record.
    show_progress_bar
        Show bars.
    """

    stages: Sequence[StageConfig]
    run: RunConfig
    corpus: Corpus
    validation: Corpus | None
    folder: RunFolder
    processes: Processes
    initialize: Initializer | None
    gene_table: str
    show_progress_bar: bool

    def train(self, model: Stofm, *, resume: bool, overwrite: bool) -> TrainResult:
        """Train a copy of a model.

        `resume` goes on with the run in the folder, if there is one; `overwrite` throws it away.
        """
        self._check_validation()
        settings = self._settings(model)
        model = copy.deepcopy(model)
        model.config = replace(model.config, trained=True)
        trained = Trained(model, make_objectives(model, self.stages, seed=self.run.seed))
        report, newest = self._open(trained, settings, resume=resume, overwrite=overwrite)
        progress = self._start(trained, newest)
        for number in range(progress.stage, len(self.stages)):
            if not progress.is_finished:
                self._run_stage(trained, progress, newest, report)
            self._note(trained.heads[number], progress, report)
            progress = Progress(stage=number + 1, scaler=progress.scaler)
        model.to("cpu").eval()
        if self.processes.is_first and not self.folder.model.is_dir():
            model.save_pretrained(self.folder.model)
        report["status"] = "finished"
        self._write(report)
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
                    f"{trained_on[one.digest]!r}): its loss would say nothing. Take it out of one."
                )

    def _settings(self, model: Stofm) -> dict[str, Any]:
        config = model.config.to_dict()
        for label in ("name", "provenance", "stofm_version", "trained"):
            config.pop(label)
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "run": self.run.settings(),
            "model": {**config, "weights": model.fingerprint},
            "vocabulary": model.vocabulary.fingerprint,
            "initialized": self.initialize is not None,
            **({"gene_table": self.gene_table} if self.gene_table else {}),
            "slices": _digests(self.corpus),
            "held_out_slices": _digests(self.validation),
        }

    def _open(
        self, trained: Trained, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> tuple[dict[str, Any], Path | None]:
        """Report and newest checkpoint of the run in the folder, or the report of a new one."""
        folder, newest = self.folder, None
        if not self.processes.is_first:
            return self.processes.agree(({}, newest))
        folder.check(resume=resume, overwrite=overwrite)
        report = {} if overwrite else folder.read_report()
        if report:
            folder.check_settings(report["settings"], settings)
            newest = folder.newest()
        else:
            report = self._first_report(trained.model, settings)
            folder.clear()
            folder.checkpoints.mkdir(parents=True)
            write_json(folder.report, report)
        tidy(folder.checkpoints)
        folder.remove_later(newest)
        begin_history(folder.history, trained.loss_parts, newest and newest / HISTORY)
        return self.processes.agree((report, newest))

    def _first_report(self, model: Stofm, settings: Mapping[str, Any]) -> dict[str, Any]:
        device, described = self.processes.device, f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            described = torch.cuda.get_device_name(device)
        return {
            "stofm_version": __version__,
            "status": "begun",
            "name": model.name,
            "n_weights": sum(w.numel() for w in model.parameters()),
            "n_cells": self.corpus.n_cells,
            "n_slices": len(self.corpus.slices),
            "device": f"{device} ({described})",
            "n_processes": self.processes.count,
            "stages": [],
            "settings": settings,
        }

    def _start(self, trained: Trained, newest: Path | None) -> Progress:
        """Load a checkpoint, or set the first weights."""
        if newest is None:
            if self.initialize is not None:
                self.initialize(self.corpus, trained.model)
            return Progress()
        logger.info("Going on from %s.", newest)
        load_checkpoint(newest, trained)
        return read_progress(newest)

    def _run_stage(
        self,
        trained: Trained,
        progress: Progress,
        newest: Path | None,
        report: Mapping[str, Any],
    ) -> None:
        """Train one stage, from where it stands to its end."""
        config, objective = self.stages[progress.stage], trained.heads[progress.stage]
        stage = make_stage(objective, self._setup(trained.model, progress.stage), config)
        loop = TrainingLoop(
            stage,
            config.optimizer,
            run=self.run,
            n_epochs=config.epochs,
            max_steps=config.max_steps,
            processes=self.processes,
            progress=progress,
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
        recorder.save_end()

    def _setup(self, model: Stofm, number: int) -> StageSetup:
        device = self.processes.device
        is_bf16 = self.run.precision == "bf16-mixed" and device.type == "cuda"
        batch_size = self.stages[number].optimizer.batch_size
        return StageSetup(
            model=model,
            corpus=self.corpus,
            validation=self.validation,
            draws=Draws(seed=self.run.seed, stage=number, batch_size=batch_size),
            folder=self.folder.work / "cells",
            own_folder=self.folder.refreshed,
            processes=self.processes,
            device=device,
            dtype=torch.bfloat16 if is_bf16 else torch.float32,
            show_progress_bar=self.show_progress_bar and self.processes.is_first,
        )

    def _note(self, objective: nn.Module, progress: Progress, report: dict[str, Any]) -> None:
        """Write the report of a stage that is finished, and delete what it alone needed.

        Cells and tokens (nodes count as such) are those seen by all processes, counted as often as
        seen; memory is the most in use so far, on a CUDA device or by the process.
        """
        number = progress.stage
        report |= {
            "status": f"stage {number + 1} of {len(self.stages)} is finished",
            "best": progress.best_checkpoint or progress.last_checkpoint,
            "last": progress.last_checkpoint,
        }
        if len(report["stages"]) == number:
            trained = [w for w in objective.parameters() if w.requires_grad]
            report["stages"].append(
                {
                    "stage": self.stages[number].name,
                    "steps": progress.step,
                    "n_weights": sum(w.numel() for w in trained),
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
        self._write(report)

    def _write(self, report: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            write_json(self.folder.report, report)
        self.processes.wait()


def _digests(corpus: Corpus | None) -> list[str]:
    return [] if corpus is None else [f"{one.name} {one.digest}" for one in corpus.slices]


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
