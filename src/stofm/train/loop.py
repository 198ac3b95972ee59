"""The training loop: batches in, a better model and its history out. There is only this one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from stofm._logging import logger
from stofm.nn.device import reseed, seeded
from stofm.train.optimizer import count_steps, learning_rate, make_optimizer, set_learning_rate
from stofm.train.prefetch import Prefetch

#: Seconds between checkpoints, where no number of steps is asked for.
_BETWEEN_CHECKPOINTS = 600.0

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.train.config import RunConfig
    from stofm.train.optimizer import OptimizerConfig
    from stofm.train.processes import Processes, RowGatherer
    from stofm.train.protocols import Recorder, Samples, Stage
    from stofm.train.run_checkpoint import Progress


@dataclass(frozen=True)
class _Share:
    """A process's part of a batch; one that gets none computes a sample that does not count."""

    samples: NDArray[np.int64]
    is_active: bool

    @classmethod
    def of(cls, batch: NDArray[np.int64], processes: Processes) -> _Share:
        own = batch[processes.rank :: processes.count]
        return cls(own, is_active=True) if len(own) else cls(batch[:1], is_active=False)


class _Work:
    """One forward pass's input; opaque to Fabric, which would cast coordinates to bfloat16."""

    def __init__(self, inputs: Any, gather: RowGatherer | None) -> None:
        self.inputs = inputs
        self.gather = gather


class _Losses(nn.Module):
    """Sums and counts of an objective's loss parts as tensors: what DistributedDataParallel sees."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.names = tuple(cast("Mapping[str, float]", objective.weights))
        if not self.names:
            msg = "All losses have the weight 0: nothing would be trained. Raise one of `weights`."
            raise ValueError(msg)

    def forward(self, work: _Work) -> tuple[Tensor, Tensor]:
        parts = self.objective(work.inputs, work.gather)
        totals = torch.stack([parts[name].total.float() for name in self.names])
        return totals, totals.new_tensor([float(parts[name].count) for name in self.names])


class TrainingLoop:
    """Trains the objective of one stage.

    Parameters
    ----------
    stage
        Samples and objective.
    optimizer
        Optimiser, batch, schedule.
    run
        Seed, validation, checkpoints, loading.
    n_epochs, max_steps
        Length of the stage: epochs, and the most optimiser steps if not None.
    processes
        Those that train together.
    progress
        Where to begin; brought up to date step by step.

    Attributes
    ----------
    names
        Loss parts.
    n_steps
        Optimiser steps of the stage.
    optimizer
        The optimiser, of the weights of ``stage.objective``.
    """

    _recorder: Recorder
    _weight: Tensor

    def __init__(
        self,
        stage: Stage,
        optimizer: OptimizerConfig,
        *,
        run: RunConfig,
        n_epochs: int,
        max_steps: int | None,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.stage = stage
        self._config = optimizer
        self._run = run
        self._n_epochs = n_epochs
        self._processes = processes
        self.progress = progress
        self.n_steps = count_steps(stage, optimizer, n_epochs=n_epochs, max_steps=max_steps)
        self.optimizer = make_optimizer(stage.objective, optimizer)
        module = _Losses(stage.objective)
        self.names = module.names
        self._weights = cast("Mapping[str, float]", stage.objective.weights)
        self._module, self._placed = processes.set_up(module, self.optimizer)
        self._gradient_norm = math.nan

    def train(self, recorder: Recorder) -> None:
        """Train to the end of the stage, or until the held-out loss no longer falls.

        Raises
        ------
        FloatingPointError
            The loss is NaN or infinite.
        """
        self._recorder = recorder
        self._saved_at = time.monotonic()
        progress = self.progress
        device = self._processes.device
        self._weight = torch.tensor([self._weights[n] for n in self.names], device=device)
        self._module.train()
        with seeded(self._run.seed, device):
            while not self._is_done():
                batches = self.stage.epoch(progress.epoch)
                for steps in self._segments(batches):
                    self._train_segment(steps, n_batches=len(batches))
                    if self._is_done():
                        break

    def _is_done(self) -> bool:
        progress, patience = self.progress, self._run.patience
        return (
            progress.step >= self.n_steps
            or progress.epoch >= self._n_epochs
            or (patience is not None and progress.n_without_improvement >= patience)
        )

    def _segments(
        self, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[list[Sequence[NDArray[np.int64]]]]:
        """Batches of each optimiser step, in runs between which the stage is refreshed."""
        at_once, every = self._config.accumulation, self.stage.refresh_every
        steps = [
            batches[start : start + at_once]
            for start in range(self.progress.position, len(batches), at_once)
        ]
        steps = steps[: self.n_steps - self.progress.step]
        while steps:
            length = len(steps) if every is None else every - self.progress.step % every
            yield steps[:length]
            steps = steps[length:]

    def _train_segment(self, steps: list[Sequence[NDArray[np.int64]]], *, n_batches: int) -> None:
        progress, every = self.progress, self.stage.refresh_every
        if every is not None and progress.step and progress.step % every == 0:
            self.stage.refresh()
        shares = (_Share.of(batch, self._processes) for batches in steps for batch in batches)
        with self._loading(self.stage, shares, progress.epoch) as loaded:
            for batches in steps:
                self._take_step(batches, loaded)
                self._come_forward(len(batches), n_batches)
                if self._is_done():
                    return

    def _loading(
        self, samples: Samples, shares: Iterator[_Share], epoch: int
    ) -> Prefetch[_Share, tuple[_Share, Any]]:
        n_threads = self._run.n_threads
        return Prefetch(
            lambda share: (share, samples.load(share.samples, epoch)),
            shares,
            n_threads=n_threads,
            n_ahead=2 * n_threads,
        )

    def _take_step(
        self,
        batches: Sequence[NDArray[np.int64]],
        loaded: Prefetch[_Share, tuple[_Share, Any]],
    ) -> None:
        """Take one optimiser step: the mean over the batches, each weighted by its samples."""
        start, waited = time.perf_counter(), loaded.waited
        set_learning_rate(self.optimizer, self._learning_rate())
        n_samples = sum(len(batch) for batch in batches)
        found = []
        for number, batch in enumerate(batches):
            share, inputs = next(loaded)
            self._seed_dropout(number)
            is_last = number == len(batches) - 1
            with self._processes.without_sync(self._module, enabled=not is_last):
                found.append(self._go_back(share, inputs, len(batch) / n_samples))
        fabric, limit = self._processes.fabric, self._config.max_norm
        norm = fabric.clip_gradients(
            self._module,
            self._placed,
            max_norm=math.inf if limit is None else limit,
            error_if_nonfinite=False,
        )
        self._gradient_norm = float(cast("Tensor", norm))
        sums = torch.stack(found).cpu().numpy().astype(np.float64)
        self._require_finite(sums, batches)
        self._placed.step()
        self._placed.zero_grad()
        self._count(sums.sum(axis=0), time.perf_counter() - start, loaded.waited - waited)

    def _go_back(self, share: _Share, inputs: Any, weight: float) -> Tensor:
        """Forward and backward pass of one batch; returns what :meth:`_forward` sums."""
        totals, sums = self._forward(self.stage, share, inputs)
        n = len(self.names)
        # The weights of what was asked may be small; where nothing was there is no gradient.
        counts = torch.where(sums[n : 2 * n] > 0, sums[n : 2 * n], 1.0)
        # Gradients are averaged over the processes: their number takes that back.
        scale = self._weight * (weight * self._processes.count) / counts
        self._processes.fabric.backward((totals * scale).sum())
        return sums

    def _forward(self, samples: Samples, share: _Share, inputs: Any) -> tuple[Tensor, Tensor]:
        """Own sums with gradient, and those of all: sums, counts, cells, tokens, operations."""
        gather = self._processes.gather_rows(is_active=share.is_active)
        totals, counts = self._module(_Work(inputs.to(self._processes.device), gather))
        if not share.is_active:
            totals, counts = totals * 0, counts * 0
        n_operations = cast("Any", self.stage.objective).count_operations(inputs)
        size = [samples.n_cells(inputs), samples.n_tokens(inputs), n_operations]
        seen = totals.new_tensor([float(n) * share.is_active for n in size])
        return totals, self._processes.sum(torch.cat([totals.detach(), counts, seen]))

    def _learning_rate(self) -> float:
        return learning_rate(self.progress.step, self.n_steps, self._config)

    def _seed_dropout(self, number: int) -> None:
        """Give each batch random numbers of its own, so that no generator's state is to be kept."""
        key = [self._run.seed, self.stage.number, self.progress.step, number]
        sequence = np.random.SeedSequence([*key, self._processes.rank])
        reseed(int(sequence.generate_state(1, np.uint64)[0]) >> 1, self._processes.device)

    def _require_finite(
        self, sums: NDArray[np.float64], batches: Sequence[NDArray[np.int64]]
    ) -> None:
        is_bad = np.asarray(~np.isfinite(sums[:, : len(self.names)]))
        uses_scaler = self._run.precision == "16-mixed"
        if not is_bad.any() and (math.isfinite(self._gradient_norm) or uses_scaler):
            # A scaler skips steps whose gradients overflow, and lowers the scale.
            return
        at_fault = [batches[int(k)] for k in np.flatnonzero(is_bad.any(axis=1))]
        where = self.stage.describe(np.concatenate(at_fault or list(batches)))
        names = [self.names[int(k)] for k in np.flatnonzero(is_bad.any(axis=0))]
        what = f"The loss ({', '.join(names)})" if names else "The gradient"
        msg = (
            f"{what} is not finite at step {self.progress.step + 1} of stage "
            f"{self.stage.name!r} (epoch {self.progress.epoch}), in a batch from {where}. Nothing "
            f"of this step was kept. Look at these slices. {self._advice()}"
        )
        raise FloatingPointError(msg)

    def _advice(self) -> str:
        """What can be done; a run can't go on with other settings than its own."""
        newest, config, precision = self._recorder.newest, self._config, self._run.precision
        calmer = "" if precision == "32" else f" or precision='32' (now {precision!r})"
        change = (
            f"a lower learning_rate (now {config.learning_rate:g}), a longer warm-up (now "
            f"{config.warmup_steps} steps){calmer}."
        )
        if newest is None:
            return f"There is no checkpoint yet: begin again with {change}"
        return (
            "The last checkpoint is good: begin a new run with it, train(data, "
            f"{str(newest)!r}, out_dir=<a new folder>), and with the stages that are left, {change}"
        )

    def _count(self, sums: NDArray[np.float64], seconds: float, waited: float) -> None:
        progress, n = self.progress, len(self.names)
        before = np.array([progress.totals or [0.0] * n, progress.counts or [0.0] * n])
        after = before + sums[: 2 * n].reshape(2, n)
        progress.totals, progress.counts = after.tolist()
        progress.n_cells += int(sums[2 * n])
        progress.n_tokens += int(sums[2 * n + 1])
        progress.n_operations += int(sums[2 * n + 2])
        progress.seconds += seconds
        progress.waited += waited

    def _come_forward(self, n_done: int, n_batches: int) -> None:
        """Note that a step is done; log, validate and save where it is time."""
        progress, run = self.progress, self._run
        rate = self._learning_rate()
        progress.step += 1
        progress.position += n_done
        self._recorder.advance()
        epoch, ends_epoch = progress.epoch, progress.position >= n_batches
        is_last = progress.step >= self.n_steps
        if progress.step % run.log_every == 0 or is_last:
            self._record_training(epoch, rate)
        if ends_epoch:
            progress.epoch, progress.position = epoch + 1, 0
        validates = self._is_time_to_validate(ends_epoch=ends_epoch, is_last=is_last)
        if validates and self._validate(epoch):
            self._recorder.keep()
        if self._is_done() or self._is_time_to_save():
            self._recorder.save()
            self._saved_at = time.monotonic()

    def _is_time_to_save(self) -> bool:
        every = self._run.checkpoint_every
        if every is not None:
            return self.progress.step % every == 0
        return time.monotonic() - self._saved_at >= _BETWEEN_CHECKPOINTS

    def _is_time_to_validate(self, *, ends_epoch: bool, is_last: bool) -> bool:
        if self.stage.validation is None:
            return False
        every = self._run.validate_every
        return is_last or (ends_epoch if every is None else self.progress.step % every == 0)

    def _record_training(self, epoch: int, rate: float) -> None:
        progress = self.progress
        row = self._row("train", epoch, np.array([progress.totals, progress.counts]))
        row |= {"learning_rate": rate, "gradient_norm": self._gradient_norm}
        progress.totals, progress.counts = [], []
        self._recorder.record(row)

    def _row(self, split: str, epoch: int, sums: NDArray[np.float64]) -> dict[str, Any]:
        progress = self.progress
        # A part that had nothing to recover has no mean.
        means = {
            name: float(total / count)
            for name, total, count in zip(self.names, *sums, strict=True)
            if count
        }
        return {
            "stage": self.stage.name,
            "split": split,
            "epoch": epoch,
            "step": progress.step,
            "loss": sum(self._weights[name] * mean for name, mean in means.items()),
            "cells": progress.n_cells,
            "tokens": progress.n_tokens,
            "seconds": round(progress.seconds, 3),
            **means,
        }

    def _validate(self, epoch: int) -> bool:
        """Measure the loss on the held-out slices; whether it is the lowest so far."""
        progress = self.progress
        row = self._row("validation", epoch, self.evaluate())
        if not math.isfinite(row["loss"]):
            msg = (
                f"The loss on the held-out slices is not finite after step {progress.step} of stage "
                f"{self.stage.name!r}: {row}. Look at these slices. {self._advice()}"
            )
            raise FloatingPointError(msg)
        self._recorder.record(row)
        is_best = progress.best_loss is None or row["loss"] < progress.best_loss
        progress.n_without_improvement = 0 if is_best else progress.n_without_improvement + 1
        if is_best:
            progress.best_loss = row["loss"]
        if self._is_done() and progress.step < self.n_steps:
            logger.info(
                "Stage %r stops at step %d: the loss on held-out slices has not fallen in %d "
                "validations.",
                self.stage.name,
                progress.step,
                progress.n_without_improvement,
            )
        return is_best

    def evaluate(self) -> NDArray[np.float64]:
        """Sums and counts (2, parts) of the loss parts over all held-out samples."""
        samples = self.stage.validation
        assert samples is not None
        shares = (_Share.of(batch, self._processes) for batch in samples.epoch(0))
        sums = np.zeros(2 * len(self.names))
        self._module.eval()
        with torch.no_grad(), self._loading(samples, shares, 0) as loaded:
            for share, inputs in loaded:
                found = self._forward(samples, share, inputs)[1]
                sums += found[: len(sums)].cpu().numpy().astype(np.float64)
        self._module.train()
        return sums.reshape(2, -1)
