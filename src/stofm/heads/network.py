"""Fitting a network to representations of cells that are stored, and predicting with it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from stofm.heads.targets import head_loss
from stofm.nn.device import seeded, using_threads
from stofm.nn.prediction_head import HeadConfig, PredictionHead
from stofm.spatial import canonical_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm._arrays import SideBySide
    from stofm.heads.targets import TargetKind, Targets

#: Rows that are computed at a time where no gradient is needed: so many, and fewer where they have
#: so many outputs that these would take much memory.
_CHUNK = 8192
_MOST_OUTPUTS = 2**22
_LEAST_CHUNK = 256
#: With more outputs, such as all genes, the steps of a fit are large enough for several threads.
_FEW_OUTPUTS = 1000
#: With more cells to fit a pass has so many steps that a third of the patience is enough.
_MANY_CELLS = 15_000


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How a head is fitted."""

    learning_rate: float = 1e-3  # of AdamW; falls along a half cosine to 0 over `max_epochs`
    weight_decay: float = 1e-2
    #: Most cells in a step; a sixteenth of the cells if these are fewer, but at least 16.
    batch_size: int = 256
    max_epochs: int = 60  # most passes over the training part
    #: Passes without a lower loss on the held-out part after which fitting stops; a third of them
    #: with more than 15,000 cells to fit, which take many steps in each.
    patience: int = 8
    dropout: float = 0.3  # share of hidden units that is dropped


class FittedHead(NamedTuple):
    """A head and how it was fitted."""

    head: PredictionHead  # on the CPU, in evaluation mode, with the weights of the best epoch
    #: Columns epoch, step, split (``"train"`` or ``"validation"``), loss, learning_rate, seconds.
    history: pd.DataFrame


def fit_head(
    features: NDArray[np.float32],
    targets: Targets,
    *,
    fitted: NDArray[np.int64],
    held_out: NDArray[np.int64],
    input_widths: Sequence[int] | None = None,
    training: HeadTraining | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> FittedHead:
    """Fit a head to representations, (n, d), whatever the order of their rows.

    Rows `fitted` all have a target; those `held_out` tell when to stop, without them all epochs are
    run. Columns of one of the `input_widths` share a scale. A loss that is NaN or infinite raises
    FloatingPointError.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2.
    """
    fitted, held_out = (row_order(features, targets.values, rows) for rows in (fitted, held_out))
    place, training = torch.device(device), training or HeadTraining()
    sizes = {"d_input": features.shape[1], "d_output": targets.n_outputs}
    # Where steps are small, several threads of the CPU would wait for each other most of the time, and
    # without end if other programs are at work. One makes the result the same for any number, too.
    n_threads = 1 if targets.n_outputs <= _FEW_OUTPUTS else None
    with seeded(seed, place), using_threads(n_threads):
        head = PredictionHead(HeadConfig(**sizes, dropout=training.dropout))
        head.fit_inputs(torch.from_numpy(features[fitted]), input_widths)
        run = _Fitting(head.to(place), features, targets, training, len(fitted))
        run.fit(fitted, held_out, np.random.default_rng(seed))
    return FittedHead(head.cpu().eval(), pd.DataFrame(run.history))


def row_order(
    features: NDArray[np.float32], values: Any, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Order `rows` by what they hold, so that their order in the file does not matter.

    `features`, (n, d), are representations; of `values`, targets, classes order cells with the same
    representation.
    """
    keys = features[rows]
    if np.ndim(values) == 1:
        keys = np.column_stack([keys, values[rows].astype(np.float32)])
    return rows[canonical_order(keys[:, [0, keys.shape[1] // 2]], keys)]


class _Fitting:
    """A run of :func:`fit_head`."""

    def __init__(
        self,
        head: PredictionHead,
        features: NDArray[np.float32],
        targets: Targets,
        training: HeadTraining,
        n_fitted: int,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self._head, self._features, self._targets = head, features, targets
        self._training, self._device = training, head.input_mean.device
        weights = targets.class_weights
        self._class_weights = None if weights is None else torch.as_tensor(weights).to(self._device)
        self._optimizer = torch.optim.AdamW(
            head.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=self._device.type in ("cpu", "cuda"),
        )
        batch = min(training.batch_size, max(16, n_fitted // 16))
        self._n_batches = -(-n_fitted // batch)
        self._step, self._started = 0, time.perf_counter()

    def fit(
        self, fitted: NDArray[np.int64], held_out: NDArray[np.int64], rng: np.random.Generator
    ) -> None:
        """Fit, and leave the head with its best weights."""
        patience = self._training.patience
        if len(fitted) > _MANY_CELLS:
            patience = -(-patience // 3)
        best, best_epoch, kept = math.inf, 0, self._head.state_dict()
        for epoch in range(1, self._training.max_epochs + 1):
            order = fitted[rng.permutation(len(fitted))]
            self._record(epoch, "train", self._train(np.array_split(order, self._n_batches)))
            if not len(held_out):
                continue
            loss = self._evaluate(held_out)
            self._record(epoch, "validation", loss)
            if loss < best:
                best, best_epoch = loss, epoch
                kept = {name: value.clone() for name, value in self._head.state_dict().items()}
            elif epoch - best_epoch >= patience:
                break
        self._head.load_state_dict(kept)

    def _train(self, parts: list[NDArray[np.int64]]) -> float:
        self._head.train()
        total, count = 0.0, 0.0
        for rows in parts:
            share = self._step / (self._training.max_epochs * self._n_batches)
            rate = self._training.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
            self._optimizer.param_groups[0]["lr"] = rate
            loss, n = self._loss(rows)
            self._optimizer.zero_grad(set_to_none=True)
            (loss / n).backward()
            self._optimizer.step()
            self._step += 1
            total, count = total + float(loss.detach()), count + n
        return total / count

    @torch.no_grad()
    def _evaluate(self, rows: NDArray[np.int64]) -> float:
        self._head.eval()
        at_once = max(_LEAST_CHUNK, min(_CHUNK, _MOST_OUTPUTS // self._targets.n_outputs))
        parts = (rows[start : start + at_once] for start in range(0, len(rows), at_once))
        sums = [self._loss(part) for part in parts]
        return sum(float(total) for total, _ in sums) / sum(n for _, n in sums)

    def _loss(self, rows: NDArray[np.int64]) -> tuple[Tensor, float]:
        features = torch.from_numpy(self._features[rows]).to(self._device)
        targets = self._targets.take(rows).to(self._device)
        return head_loss(self._head(features), targets, self._targets.kind, self._class_weights)

    def _record(self, epoch: int, split: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The {split} loss of the head is {loss} in epoch {epoch}; look for extreme values "
                "in the representations, or lower learning_rate."
            )
        rate, seconds = self._optimizer.param_groups[0]["lr"], time.perf_counter() - self._started
        columns = ("epoch", "step", "split", "loss", "learning_rate", "seconds")
        row = (epoch, self._step, split, loss, rate, seconds)
        self.history.append(dict(zip(columns, row, strict=True)))


@torch.no_grad()
def apply_head(
    head: PredictionHead,
    features: NDArray[np.float32] | SideBySide,
    kind: TargetKind,
    *,
    columns: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Predict from representations, (n, d_input), with a head in evaluation mode, where it is.

    Classes and proportions give a softmax, values what comes out: float32 (n, d_output), or the
    `columns` that are asked for; of values, only these are computed.
    """
    picked = None if columns is None else torch.as_tensor(columns).to(head.input_mean.device)
    found = []
    for start in range(0, max(len(features), 1), _CHUNK):
        part = np.ascontiguousarray(features[start : start + _CHUNK], dtype=np.float32)
        rows = torch.from_numpy(part).to(head.input_mean.device)
        if kind == "values":
            outputs = head(rows, picked)
        else:
            outputs = head(rows).softmax(dim=1)
            outputs = outputs if picked is None else outputs[:, picked]
        found.append(outputs.cpu().numpy())
    return np.concatenate(found) if len(found) > 1 else found[0]
