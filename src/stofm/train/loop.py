"""The training loop: batches in, a better model and its history out. There is only this one."""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import nn

from stofm._logging import logger
from stofm.nn.device import reseed, seeded
from stofm.train.optimizer import learning_rate, make_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.train.checkpoint import Progress
    from stofm.train.config import OptimizerConfig, RunConfig
    from stofm.train.processes import Processes, RowGatherer
    from stofm.train.protocols import Recorder, Samples, Stage

    Item = TypeVar("Item")
    Loaded = TypeVar("Loaded")

#: Seconds between checkpoints, where no number of steps is asked for.
_BETWEEN_CHECKPOINTS = 600.0


def load_ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], n_threads: int
) -> Generator[Loaded, None, None]:
    """Load items in threads, two for each ahead, and hand them out in order.

    Without threads each is loaded when it is asked for.
    """
    if not n_threads:
        yield from map(load, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(n_threads, "stofm-load") as threads:
        pending = deque(threads.submit(load, item) for item in islice(left, 2 * n_threads))
        try:
            while pending:
                loaded = pending.popleft().result()
                pending.extend(threads.submit(load, item) for item in islice(left, 1))
                yield loaded
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


class _Share(NamedTuple):
    """A process's part of a batch; one that gets none runs a sample that does not count."""

    inputs: Any
    is_active: bool


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
        self.n_steps = self._count_steps(max_steps)
        self.optimizer = make_optimizer(stage.objective, optimizer)
        module = _Losses(stage.objective)
        self.names = module.names
        self._weights = cast("Mapping[str, float]", stage.objective.weights)
        self._module, self._placed = processes.set_up(module, self.optimizer)
        self._gradient_norm = math.nan

    def _count_steps(self, max_steps: int | None) -> int:
        """Optimiser steps of the stage; the last one of an epoch may have fewer batches."""
        total = n_of_epoch = 0
        for epoch in range(self._n_epochs):
            if epoch == 0 or self.stage.epochs_differ_in_length:
                n_of_epoch = -(-len(self.stage.epoch(epoch)) // self._config.accumulation)
            total += n_of_epoch
            if max_steps is not None and total >= max_steps:
                return max_steps
        return total

    def train(self, recorder: Recorder) -> None:
        """Train to the end of the stage, or until the held-out loss no longer falls.

        Raises
        ------
        FloatingPointError
            The loss is NaN or infinite.
        """
        self._recorder = recorder
        self._saved_at = time.monotonic()
        self._module.train()
        with seeded(self._run.seed, self._processes.device):
            while not self._is_done():
                self._train_epoch()

    def _is_done(self) -> bool:
        progress, patience = self.progress, self._run.patience
        return (
            progress.step >= self.n_steps
            or progress.epoch >= self._n_epochs
            or (patience is not None and progress.n_without_improvement >= patience)
        )

    def _train_epoch(self) -> None:
        """Train to the end of an epoch, in runs between which the stage is refreshed."""
        progress, every = self.progress, self.stage.refresh_every
        batches, at_once = self.stage.epoch(progress.epoch), self._config.accumulation
        starts = range(progress.position, len(batches), at_once)
        steps = [batches[start : start + at_once] for start in starts]
        steps = steps[: self.n_steps - progress.step]
        while steps and not self._is_done():
            if every is not None and progress.step and progress.step % every == 0:
                self.stage.refresh()
            n_run = len(steps) if every is None else every - progress.step % every
            batches_of_run = [batch for step in steps[:n_run] for batch in step]
            with self._loading(self.stage, batches_of_run, progress.epoch) as loaded:
                for step in steps[:n_run]:
                    self._take_step(step, loaded)
                    self._come_forward(len(step), len(batches))
                    if self._is_done():
                        break
            steps = steps[n_run:]

    def _loading(
        self, samples: Samples, batches: Sequence[NDArray[np.int64]], epoch: int
    ) -> closing[Generator[_Share, None, None]]:
        rank, count = self._processes.rank, self._processes.count

        def load(batch: NDArray[np.int64]) -> _Share:
            own = batch[rank::count]
            return _Share(samples.load(own if len(own) else batch[:1], epoch), len(own) > 0)

        return closing(load_ahead(load, batches, self._run.n_threads))

    def _take_step(
        self, batches: Sequence[NDArray[np.int64]], loaded: Generator[_Share, None, None]
    ) -> None:
        """Take one optimiser step: the mean over the batches, each weighted by its samples."""
        start = time.perf_counter()
        self._rate = learning_rate(self.progress.step, self.n_steps, self._config)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        n_samples = sum(len(batch) for batch in batches)
        found = []
        for number, batch in enumerate(batches):
            asked = time.perf_counter()
            share = next(loaded)
            self.progress.waited += time.perf_counter() - asked
            self._seed_dropout(number)
            is_last = number == len(batches) - 1
            with self._processes.without_sync(self._module, enabled=not is_last):
                found.append(self._go_back(share, len(batch) / n_samples))
        limit = self._config.max_norm
        norm = self._processes.fabric.clip_gradients(
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
        self._count(sums.sum(axis=0), time.perf_counter() - start)

    def _go_back(self, share: _Share, share_of_step: float) -> Tensor:
        """Forward and backward pass of one batch; returns what :meth:`_forward` sums."""
        totals, sums = self._forward(self.stage, share)
        n = len(self.names)
        # The weights of what was asked may be small; where nothing was there is no gradient.
        counts = torch.where(sums[n : 2 * n] > 0, sums[n : 2 * n], 1.0)
        weights = totals.new_tensor([self._weights[name] for name in self.names])
        # Gradients are averaged over the processes: their number takes that back.
        scale = weights * (share_of_step * self._processes.count) / counts
        self._processes.fabric.backward((totals * scale).sum())
        return sums

    def _forward(self, samples: Samples, share: _Share) -> tuple[Tensor, Tensor]:
        """Own sums with gradient, and those of all: sums, counts, cells, tokens, operations."""
        inputs, is_active = share
        gather = self._processes.gather_rows(is_active=is_active)
        totals, counts = self._module(_Work(inputs.to(self._processes.device), gather))
        if not is_active:
            totals, counts = totals * 0, counts * 0
        n_operations = cast("Any", self.stage.objective).count_operations(inputs)
        size = [samples.n_cells(inputs), samples.n_tokens(inputs), n_operations]
        seen = totals.new_tensor([float(n) * is_active for n in size])
        return totals, self._processes.sum(torch.cat([totals.detach(), counts, seen]))

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

    def _count(self, sums: NDArray[np.float64], seconds: float) -> None:
        progress, n = self.progress, len(self.names)
        before = np.array([progress.totals or [0.0] * n, progress.counts or [0.0] * n])
        progress.totals, progress.counts = (before + sums[: 2 * n].reshape(2, n)).tolist()
        progress.n_cells += int(sums[2 * n])
        progress.n_tokens += int(sums[2 * n + 1])
        progress.n_operations += int(sums[2 * n + 2])
        progress.seconds += seconds

    def _come_forward(self, n_done: int, n_batches: int) -> None:
        """Note that a step is done; log, validate and save where it is time."""
        progress, run = self.progress, self._run
        progress.step += 1
        progress.position += n_done
        self._recorder.advance()
        epoch, ends_epoch = progress.epoch, progress.position >= n_batches
        is_last = progress.step >= self.n_steps
        if progress.step % run.log_every == 0 or is_last:
            row = self._row("train", epoch, np.array([progress.totals, progress.counts]))
            row |= {"learning_rate": self._rate, "gradient_norm": self._gradient_norm}
            progress.totals, progress.counts = [], []
            self._recorder.record(row)
        if ends_epoch:
            progress.epoch, progress.position = epoch + 1, 0
        every = run.validate_every
        is_time = is_last or (ends_epoch if every is None else progress.step % every == 0)
        if self.stage.validation is not None and is_time and self._validate(epoch):
            self._recorder.keep()
        every, since = run.checkpoint_every, time.monotonic() - self._saved_at
        is_time = since >= _BETWEEN_CHECKPOINTS if every is None else progress.step % every == 0
        if self._is_done() or is_time:
            self._recorder.save()
            self._saved_at = time.monotonic()

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
        batches = samples.epoch(0)
        sums = np.zeros(2 * len(self.names))
        self._module.eval()
        with torch.no_grad(), self._loading(samples, batches, 0) as loaded:
            for share in loaded:
                found = self._forward(samples, share)[1]
                sums += found[: len(sums)].cpu().numpy().astype(np.float64)
        self._module.train()
        return sums.reshape(2, -1)
