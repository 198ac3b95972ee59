"""Members of a head: fitting a network or a linear map to what is read of cells, and predicting with it."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from stofm.heads.expression import principal_axes
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

#: Wider blocks are rotated to so many principal components, which saves most of the time.
_MOST_COLUMNS: Final = 256
#: Cells that these are found from; of more, every second or third one is taken.
_MOST_CELLS: Final = 20_000
#: Standard deviation of all columns together for logistic regression, and its ``C``, the prior
#: variance of each weight: the scores of a class are then expected to vary by about five. Columns are
#: scaled as one: components that hardly vary hardly count.
_SPREAD: Final = 10.0
_STRENGTH: Final = 0.3
_MOST_ROUNDS: Final = 100
#: Score of a class of which no cell was fitted, below the lowest.
_ABSENT: Final = -20.0
#: Held-out cells whose errors are computed at a time, for all genes.
_ROWS_AT_ONCE: Final = 256


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


class Rotation:
    """A block, (n, d), in its first principal components if it is wide.

    `widths` are the columns of its parts, each of which has one scale, and `rows` those to fit, in an
    order that does not depend on the file. Other rows may be NaN.
    """

    def __init__(
        self, values: NDArray[np.float32], widths: Sequence[int], rows: NDArray[np.int64]
    ) -> None:
        self.values, self.widths = values, tuple(widths)
        self._axes: NDArray[np.float32] | None = None
        if values.shape[1] <= _MOST_COLUMNS:
            return
        self._plain = _network(values.shape[1], 1)
        fitted = values[rows[:: -(-len(rows) // _MOST_CELLS)]]
        self._plain.fit_inputs(torch.from_numpy(fitted), widths)
        mean, scale = self._plain.input_mean.numpy(), self._plain.input_scale.numpy()
        axes = principal_axes((fitted - mean) / scale, _MOST_COLUMNS)[1]
        self._axes = axes.astype(np.float32)
        self.values = ((values - mean) / scale) @ self._axes
        self.widths = (self.values.shape[1],)

    def undone(self, network: PredictionHead) -> PredictionHead:
        """The same network, reading the block itself."""
        if self._axes is None:
            return network
        config = network.config
        found = _network(len(self._axes), config.d_output, config.widths, config.dropout)
        state = network.state_dict()
        first = "hidden.0" if config.widths else "last"
        weight = state[f"{first}.weight"] / state["input_scale"]
        state[f"{first}.bias"] = state[f"{first}.bias"] - weight @ state["input_mean"]
        state[f"{first}.weight"] = weight @ torch.from_numpy(self._axes).T
        found.load_state_dict(state | dict(self._plain.named_buffers()))
        return found


def _network(
    d_input: int, d_output: int, widths: tuple[int, ...] = (), dropout: float = 0.0
) -> PredictionHead:
    """A network, linear by default, whose weights are still to be set."""
    with seeded(0):
        found = PredictionHead(
            HeadConfig(d_input=d_input, d_output=d_output, widths=widths, dropout=dropout)
        )
    return found.eval()


def fit_linear(
    values: NDArray[np.float32], targets: Targets, rows: NDArray[np.int64]
) -> PredictionHead:
    """Logistic regression of classes or, each type of a spot taken as a part of a cell, proportions."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = row_order(values, targets.values, rows)
    read, known = values[rows], targets.values[rows]
    mean = read.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(read.var(axis=0, dtype=np.float64).sum())) / _SPREAD or 1.0
    if targets.kind == "classes":
        codes, of = known, np.arange(len(rows))
        mass = np.ones(len(rows)) if targets.class_weights is None else targets.class_weights[codes]
    else:
        of, codes = np.nonzero(known > 0)
        mass = known[of, codes]
    seen = np.unique(codes)
    weight, bias = np.zeros((1, values.shape[1])), np.zeros(1)
    if len(seen) > 1:
        model = LogisticRegression(C=_STRENGTH, max_iter=_MOST_ROUNDS)
        # The steps are so small that threads would wait for each other.
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            # Scores on held-out cells no longer change in the last rounds.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(((read - mean) / scale).astype(np.float32)[of], codes, sample_weight=mass)
        weight, bias = model.coef_, model.intercept_
    if len(seen) == 2:
        weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    found = _network(values.shape[1], targets.n_outputs)
    torch.nn.init.zeros_(found.last.weight)
    # Classes of which no cell is fitted are all but impossible.
    torch.nn.init.constant_(found.last.bias, float(bias.min()) + _ABSENT)
    with torch.no_grad():
        found.last.weight[seen] = torch.from_numpy(weight).float()
        found.last.bias[seen] = torch.from_numpy(bias).float()
    found.input_mean.copy_(torch.from_numpy(mean))
    found.input_scale.fill_(scale)
    return found


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


def error_products(
    members: Sequence[tuple[PredictionHead, NDArray[np.float32]]],
    targets: Targets,
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Products of the errors of each two members, (n, n), summed over some cells and all genes.

    Errors are those of standardised expression, so that all genes count the same. `members` come
    with what they read of the cells.
    """
    products = np.zeros((len(members), len(members)))
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // _ROWS_AT_ONCE) or 1):
        true = targets.take(rows[part]).numpy()
        errors = np.stack(
            [
                (apply_head(network, read[part], "values") - true).ravel()
                for network, read in members
            ]
        ).astype(np.float64)
        products += errors @ errors.T
    return products
