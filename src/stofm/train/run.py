"""A whole run: one stage after the other, from a model and prepared slices to a trained model."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stofm._logging import logger
from stofm._messages import warn
from stofm._version import __version__
from stofm.train.checkpoint import (
    Progress,
    Trained,
    find_damage,
    load_checkpoint,
    read_progress,
    restore_history,
)
from stofm.train.epochs import Draws
from stofm.train.folder import write_json
from stofm.train.log import RunRecorder, count_weights, peak_memory, read_history
from stofm.train.loop import TrainingLoop
from stofm.train.stages import StageSetup, make_objectives, make_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from stofm.nn import Stofm
    from stofm.train.config import RunConfig, StageConfig
    from stofm.train.corpus import Corpus
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
        of time spent waiting for data, operations, memory.
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
    stages
        What is trained, one after the other.
    run
        How.
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
    initialize: Initializer | None = None
    gene_table: str = ""
    show_progress_bar: bool = True

    def train(self, model: Stofm, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
        """Train a copy of a model.

        Parameters
        ----------
        model
            Stays as it is.
        resume
            Go on with the run in the folder, if there is one.
        overwrite
            Throw it away instead.

        Raises
        ------
        FileExistsError
            There is a run and neither was asked for, or the folder holds something else.
        ValueError
            The run to go on with has other settings, or a slice is trained on and held out.
        FloatingPointError
            A loss is NaN or infinite.
        """
        self._refuse_shared_slices()
        self._say_what_has_no_effect()
        settings = self._settings(model)
        report, newest = self.processes.agree(
            self._find_run(settings, resume=resume, overwrite=overwrite)
        )
        model = copy.deepcopy(model)
        model.config = replace(model.config, trained=True)
        if report:
            self._write(report)
        else:
            report = self._begin(settings, model)
        objectives = make_objectives(model, self.stages, seed=self.run.seed)
        trained = Trained(model, nn.ModuleList(objectives))
        progress = self._start(trained, newest)
        for number in range(progress.stage, len(self.stages)):
            if not progress.is_finished:
                self._run_stage(objectives[number], trained, progress, newest, report)
            self._note(objectives[number], progress, report)
            if number + 1 < len(self.stages):
                progress = Progress(stage=number + 1, scaler=progress.scaler)
        return self._finish(model, report)

    def _refuse_shared_slices(self) -> None:
        if self.validation is None:
            return
        trained_on = {one.digest: one.name for one in self.corpus.slices}
        for one in self.validation.slices:
            if one.digest in trained_on:
                msg = (
                    f"Slice {one.name!r} is held out and also trained on (as "
                    f"{trained_on[one.digest]!r}): its loss would say nothing. Take it out of one."
                )
                raise ValueError(msg)

    def _say_what_has_no_effect(self) -> None:
        given = {name: getattr(self.run, name) for name in ("patience", "validate_every")}
        if self.validation is None and (idle := {n: v for n, v in given.items() if v is not None}):
            text = ", ".join(f"{name}={value}" for name, value in idle.items())
            warn(f"{text}: has no effect without held-out slices; pass `validation`.")

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

    def _begin(self, settings: Mapping[str, Any], model: Stofm) -> dict[str, Any]:
        """Clear the folder and write the first report."""
        report = {
            "stofm_version": __version__,
            "status": "begun",
            "name": model.name,
            "n_weights": sum(w.numel() for w in model.parameters()),
            "n_cells": self.corpus.n_cells,
            "n_slices": len(self.corpus.slices),
            "device": _describe(self.processes.device),
            "n_processes": self.processes.count,
            "stages": [],
            "settings": settings,
        }
        if self.processes.is_first:
            self.folder.clear()
            self.folder.checkpoints.mkdir(parents=True)
            write_json(self.folder.report, report)
        self.processes.wait()
        return report

    def _find_run(
        self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> tuple[dict[str, Any], Path | None]:
        """Report and newest checkpoint of the run to go on with; the first process looks."""
        if not self.processes.is_first:
            return {}, None
        self.folder.check(resume=resume, overwrite=overwrite)
        report = self.folder.read_report()
        if overwrite or not report:
            return {}, None
        self.folder.check_settings(report["settings"], settings)
        return report, self.folder.newest()

    def _start(self, trained: Trained, newest: Path | None) -> Progress:
        """Load a checkpoint, or set the first weights."""
        if self.processes.is_first:
            self.folder.remove_leftovers()
            self.folder.remove_later(newest)
            self.folder.history.unlink(missing_ok=True)
        if newest is None:
            if self.initialize is not None:
                self.initialize(self.corpus, trained.model)
            return Progress()
        logger.info("Going on from %s.", newest)
        if self.processes.is_first:
            restore_history(newest, self.folder.history)
        load_checkpoint(newest, trained)
        return read_progress(newest)

    def _run_stage(
        self,
        objective: nn.Module,
        trained: Trained,
        progress: Progress,
        newest: Path | None,
        report: Mapping[str, Any],
    ) -> None:
        """Train one stage, from where it stands to its end."""
        config = self.stages[progress.stage]
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
        self.processes.load_scaler_state(progress.scaler)
        if progress.step:
            assert newest is not None
            load_checkpoint(newest, trained, (loop.optimizer, objective))
            stage.restore(progress.stage_state)
        else:
            stage.refresh()
        recorder = RunRecorder(
            loop,
            trained,
            self.folder,
            self.processes,
            report=report,
            tensorboard=self.run.tensorboard,
            show_progress_bar=self.show_progress_bar,
        )
        try:
            loop.train(recorder)
        finally:
            recorder.close()
        # The first process may still be writing.
        self.processes.wait()
        if self.run.keep == "best" and progress.best_checkpoint:
            self._take_best(trained, self.folder.checkpoints / progress.best_checkpoint)
        recorder.save_end()

    def _take_best(self, trained: Trained, best: Path) -> None:
        damage = self.processes.agree(find_damage(best) if self.processes.is_first else "")
        if not damage:
            load_checkpoint(best, trained)
        elif self.processes.is_first:
            warn(
                f"{damage} The stage's last weights are handed on in place of the best: to have "
                "those, train again (overwrite=True)."
            )

    def _note(self, objective: nn.Module, progress: Progress, report: dict[str, Any]) -> None:
        """Write the report of a stage that is finished, and delete what it alone needed."""
        number = progress.stage
        report |= {
            "status": f"stage {number + 1} of {len(self.stages)} is finished",
            "best": progress.best_checkpoint or progress.last_checkpoint,
            "last": progress.last_checkpoint,
        }
        if len(report["stages"]) == number:
            report["stages"].append(self._describe_stage(objective, progress))
        if self.processes.is_first:
            self.folder.remove_refreshed()
        self._write(report)

    def _describe_stage(self, objective: nn.Module, progress: Progress) -> dict[str, Any]:
        """What ``run.json`` says of a stage.

        Cells and tokens (nodes count as such) are those seen by all processes, counted as often as
        seen; operations are estimated (:mod:`stofm.train.losses`); memory is the most in use so
        far, on a CUDA device or by the process.
        """
        return {
            "stage": self.stages[progress.stage].name,
            "steps": progress.step,
            "n_weights": count_weights(objective),
            "cells": progress.n_cells,
            "tokens": progress.n_tokens,
            "seconds": round(progress.seconds, 3),
            "share_waiting": round(progress.waited / max(progress.seconds, 1e-9), 4),
            "flops": float(progress.n_operations),
            "peak_memory_bytes": peak_memory(self.processes.device),
            "best_loss": progress.best_loss,
        }

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

    def _finish(self, model: Stofm, report: dict[str, Any]) -> TrainResult:
        model.to("cpu").eval()
        if self.processes.is_first and not self.folder.model.is_dir():
            model.save_pretrained(self.folder.model)
        report["status"] = "finished"
        self._write(report)
        return TrainResult(
            model=model,
            history=read_history(self.folder.history),
            best=self.folder.checkpoints / report["best"],
            last=self.folder.checkpoints / report["last"],
            run=report,
        )

    def _write(self, report: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            write_json(self.folder.report, report)
        self.processes.wait()


def _digests(corpus: Corpus | None) -> list[str]:
    return [] if corpus is None else [f"{one.name} {one.digest}" for one in corpus.slices]


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
