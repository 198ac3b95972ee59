"""The training loop, the only one."""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from stofm._logging import logger
from stofm.nn.device import reseed, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.train.checkpoint import Progress
    from stofm.train.config import OptimizerConfig, RunConfig, StageConfig
    from stofm.train.objectives import LossPart
    from stofm.train.processes import Processes
    from stofm.train.stages import Samples, Stage

    Item = TypeVar("Item")
    Loaded = TypeVar("Loaded")
    #: A process's part of a batch, and whether it counts: a process without one runs another
    #: sample.
    Share = tuple[Any, bool]

#: Seconds between checkpoints, if no number of steps is given.
_BETWEEN_CHECKPOINTS = 600.0


def load_ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], n_threads: int
) -> Generator[Loaded, None, None]:
    """Load items in threads, two per thread in advance, and yield them in order.

    Without threads, each is loaded when it is needed.
    """
    if not n_threads:
        yield from map(load, items)
        return
    pending: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(n_threads, "stofm-load") as threads:
        try:
            for item in items:
                pending.append(threads.submit(load, item))
                if len(pending) > 2 * n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


class _Losses(nn.Module):
    """Sums and counts of an objective's loss parts as tensors: what DistributedDataParallel sees."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.weights = cast("Mapping[str, float]", objective.weights)
        if not self.weights:
            raise ValueError(
                "All losses have the weight 0: nothing would be trained. Raise one of `weights`."
            )

    def forward(self, compute: Callable[[], Mapping[str, LossPart]]) -> tuple[Tensor, Tensor]:
        """Call the objective; Fabric would cast all tensors to bfloat16, including coordinates."""
        parts = compute()
        totals = torch.stack([parts[name].total.float() for name in self.weights])
        return totals, totals.new_tensor([float(parts[name].count) for name in self.weights])


class TrainingLoop:
    """Trains the objective of one stage from `progress` on, which it updates."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        *,
        run: RunConfig,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.stage, self._n_epochs, self._config = stage, config.epochs, config.optimizer
        self._run, self._processes, self.progress = run, processes, progress
        self.n_steps = self._count_steps(config.max_steps)
        self.optimizer = make_optimizer(stage.objective, config.optimizer)
        losses = _Losses(stage.objective)
        self._weights, self.names = losses.weights, tuple(losses.weights)
        processes.wait()
        placed = cast("tuple[Any, Any]", processes.fabric.setup(losses, self.optimizer))
        self._module, self._placed = placed

    def _count_steps(self, max_steps: int | None) -> int:
        n_steps = 0
        for epoch in range(self._n_epochs):
            n_steps += -(-len(self.stage.samples.epoch(epoch)) // self._config.accumulation)
            if max_steps is not None and n_steps >= max_steps:
                return max_steps
        return n_steps

    def train(self, recorder: Any) -> None:
        """Train to the end of the stage, or until the held-out loss stops falling.

        The recorder is told of a row of the history (``record(row)``), that a step is done
        (``advance()``), that weights are the best so far (``keep()``) and that it is time for a
        checkpoint (``save()``), which processes may do at different steps, but all do at the end.
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
        batches, at_once = self.stage.samples.epoch(progress.epoch), self._config.accumulation
        last = min(len(batches), progress.position + at_once * (self.n_steps - progress.step))
        steps = range(progress.position, last, at_once)
        while steps and not self._is_done():
            if every is not None and progress.step and progress.step % every == 0:
                self.stage.refresh()
            n_run = len(steps) if every is None else every - progress.step % every
            run, steps = steps[:n_run], steps[n_run:]
            ahead = (batches[k] for k in range(run[0], steps[0] if steps else last))
            with self._loading(self.stage.samples, ahead, progress.epoch) as loaded:
                for start in run:
                    step = batches[start : min(start + at_once, last)]
                    norm = self._take_step(step, loaded)
                    self._come_forward(len(step), len(batches), norm)
                    if self._is_done():
                        break

    def _loading(
        self, samples: Samples, batches: Iterable[NDArray[np.int64]], epoch: int
    ) -> closing[Generator[Share, None, None]]:
        rank, count = self._processes.rank, self._processes.count

        def load(batch: NDArray[np.int64]) -> Share:
            own = batch[rank::count]
            return samples.load(own if len(own) else batch[:1], epoch), len(own) > 0

        return closing(load_ahead(load, batches, self._run.n_threads))

    def _take_step(
        self, batches: Sequence[NDArray[np.int64]], loaded: Generator[Share, None, None]
    ) -> float:
        """Take one optimiser step: the mean over the batches, each weighted by its samples.

        Returns the norm of the gradient.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.n_steps, self._config)
        n_samples = sum(len(batch) for batch in batches)
        fabric, is_alone = self._processes.fabric, self._processes.count == 1
        found, n = [], len(self.names)
        weights = torch.tensor(list(self._weights.values()))
        for number, batch in enumerate(batches):
            asked = time.perf_counter()
            share = next(loaded)
            self.progress.waited += time.perf_counter() - asked
            # Each batch has random numbers of its own, so that no generator's state has to be kept.
            key = [self._run.seed, self.stage.number, self.progress.step, number]
            sequence = np.random.SeedSequence([*key, self._processes.rank])
            reseed(int(sequence.generate_state(1, np.uint64)[0]) >> 1, self._processes.device)
            is_last = is_alone or number == len(batches) - 1
            # Gradients are averaged over the processes once, in the backward pass of the last batch.
            with fabric.no_backward_sync(self._module, enabled=not is_last):
                totals, sums = self._forward(share)
                # The weights of the targets may be small; without targets there is no gradient.
                counts = torch.where(sums[n : 2 * n] > 0, sums[n : 2 * n], 1.0)
                # Gradients are averaged over the processes; multiplying by their number undoes
                # that.
                scale = weights.to(totals) * (len(batch) / n_samples * self._processes.count)
                fabric.backward((totals * (scale / counts)).sum())
                found.append(sums)
        limit = self._config.max_norm
        norm = fabric.clip_gradients(
            self._module,
            self._placed,
            max_norm=math.inf if limit is None else limit,
            error_if_nonfinite=False,
        )
        gradient_norm = float(cast("Tensor", norm))
        all_sums = torch.stack(found).cpu().numpy().astype(np.float64)
        self._require_finite(all_sums, gradient_norm, batches)
        self._placed.step()
        self._placed.zero_grad()
        step, progress = all_sums.sum(axis=0), self.progress
        before = np.array([progress.totals or [0.0] * n, progress.counts or [0.0] * n])
        progress.totals, progress.counts = (before + step[: 2 * n].reshape(2, n)).tolist()
        progress.n_cells += int(step[2 * n])
        progress.n_tokens += int(step[2 * n + 1])
        progress.seconds += time.perf_counter() - start
        return gradient_norm

    def _forward(self, share: Share) -> tuple[Tensor, Tensor]:
        """Own sums with gradient, and those of all processes: sums, counts, cells, tokens."""
        inputs, is_active = share
        gather = self._processes.gather_rows(is_active=is_active)
        on_device = inputs.to(self._processes.device)
        totals, counts = self._module(partial(self.stage.objective, on_device, gather))
        if not is_active:
            totals, counts = totals * 0, counts * 0
        seen = totals.new_tensor([float(n) * is_active for n in (inputs.n_cells, inputs.n_tokens)])
        return totals, self._processes.sum(torch.cat([totals.detach(), counts, seen]))

    def _require_finite(
        self, sums: NDArray[np.float64], gradient_norm: float, batches: Sequence[NDArray[np.int64]]
    ) -> None:
        is_bad: NDArray[np.bool_] = ~np.isfinite(sums[:, : len(self.names)])
        # In 16 bits a scaler skips steps whose gradients overflow, and lowers the scale.
        gradient_counts = self._run.precision != "16-mixed"
        if not is_bad.any() and (math.isfinite(gradient_norm) or not gradient_counts):
            return
        at_fault = [batches[k] for k in range(len(batches)) if is_bad[k].any()]
        where = self.stage.samples.describe(np.concatenate(at_fault or list(batches)))
        names = [name for k, name in enumerate(self.names) if is_bad[:, k].any()]
        what = f"The loss ({', '.join(names)})" if names else "The gradient"
        raise FloatingPointError(
            f"{what} is not finite at step {self.progress.step + 1} of stage "
            f"{self.stage.name!r} (epoch {self.progress.epoch}), in a batch from {where}. Nothing "
            f"of this step was kept. {self._advice()}"
        )

    def _advice(self) -> str:
        rate, warmup = self._config.learning_rate, self._config.warmup_steps
        calmer = "" if self._run.precision == "32" else ", or precision='32'"
        return (
            f"Look at these slices, or take a lower learning_rate (now {rate:g}), a longer warm-up "
            f"(now {warmup} steps){calmer}."
        )

    def _come_forward(self, n_done: int, n_batches: int, gradient_norm: float) -> None:
        """Count a step; log, validate and save when due."""
        progress, run = self.progress, self._run
        progress.step += 1
        progress.position += n_done
        self._recorder.advance()
        epoch, ends_epoch = progress.epoch, progress.position >= n_batches
        is_last = progress.step >= self.n_steps
        if progress.step % run.log_every == 0 or is_last:
            row = self._row("train", epoch, np.array([progress.totals, progress.counts]))
            rate = self.optimizer.param_groups[0]["lr"]
            progress.totals, progress.counts = [], []
            self._recorder.record(row | {"learning_rate": rate, "gradient_norm": gradient_norm})
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
        # A part without anything to recover has no mean.
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
        """Measure the loss on held-out slices; return whether it is the lowest so far."""
        progress = self.progress
        row = self._row("validation", epoch, self.evaluate())
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"The loss on the held-out slices is not finite after step {progress.step} of stage "
                f"{self.stage.name!r}: {row}. {self._advice()}"
            )
        self._recorder.record(row)
        is_best = progress.best_loss is None or row["loss"] < progress.best_loss
        progress.n_without_improvement = 0 if is_best else progress.n_without_improvement + 1
        if is_best:
            progress.best_loss = row["loss"]
        if self._is_done() and progress.step < self.n_steps:
            logger.info(
                f"Stage {self.stage.name!r} stops at step {progress.step}: the loss on held-out "
                f"slices has not fallen in {progress.n_without_improvement} validations."
            )
        return is_best

    def evaluate(self) -> NDArray[np.float64]:
        """Sums and counts (2, parts) of the loss parts over all held-out samples."""
        samples = self.stage.validation
        assert samples is not None
        sums = np.zeros(2 * len(self.names))
        self._module.eval()
        with torch.no_grad(), self._loading(samples, samples.epoch(0), 0) as loaded:
            for share in loaded:
                found = self._forward(share)[1]
                sums += found[: len(sums)].cpu().numpy().astype(np.float64)
        self._module.train()
        return sums.reshape(2, -1)


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW for the trainable weights of a module."""
    plain = {
        id(weight)
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.LayerNorm)
        for weight in part.parameters(recurse=False)
    }
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("There are no weights to train: all are frozen.")
    decayed = [w for w in weights if w.ndim > 1 and id(w) not in plain]
    others = [w for w in weights if w.ndim < 2 or id(w) in plain]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of an optimiser step, counted from 0: a linear rise, then a linear fall."""
    warmup = min(config.warmup_steps, n_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * max(0, n_steps - step) / (n_steps - warmup)
