"""The members of a head: networks and linear maps on blocks, and what each weighs on held-out cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from threadpoolctl import threadpool_limits

from stofm._logging import counter
from stofm.heads.expression import principal_axes
from stofm.heads.network import HeadTraining, apply_head, fit_head, row_order
from stofm.nn.device import seeded
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks, Source
    from stofm.heads.network import FittedHead
    from stofm.heads.targets import Targets
    from stofm.spatial import Split

#: Held-out cells that every kind is taken to have explained before any is looked at.
_PRIOR: Final = 1.0
_ROUNDS: Final = 200
_TINY: Final = 1e-6
#: Share of the mean squared error that is added to each kind's own: equal ones then weigh the same.
_RIDGE: Final = 1e-6
#: How much more than the errors it counts that weights sum to 1, before they are made to.
_SUM_TO_1: Final = 1e3
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
#: Networks for classes and proportions: members of a vote need fewer and larger steps than a head alone.
VOTING: Final = HeadTraining(learning_rate=2e-3, batch_size=512, max_epochs=30, patience=5)
#: Networks for expression, which is noisy.
IMPUTING: Final = HeadTraining(dropout=0.4)
#: Score of a class of which no cell was fitted, below the lowest.
_ABSENT: Final = -20.0
#: Held-out cells whose errors are computed at a time, for all genes.
_ROWS_AT_ONCE: Final = 256


class Members(NamedTuple):
    """Fitted members of a head."""

    #: As a :class:`~stofm.heads.head.Head` has them.
    networks: tuple[PredictionHead, ...]
    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    history: pd.DataFrame  # losses of the networks, numbered in the column ``network``
    held_out: tuple[NDArray[np.int64], ...]  # held-out cells of each split; splits may share cells
    #: (n_rows, n_outputs) what members that were not fitted to them say of these, split after
    #: split; None for values.
    votes: Any = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Held-out cells of all splits in turn."""
        return np.concatenate(self.held_out)


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


def fit_members(
    blocks: Blocks,
    targets: Targets,
    splits: Sequence[Split],
    seeds: Sequence[int],
    *,
    show_progress_bar: bool = False,
) -> Members:
    """Fit members to what is read of cells, and weigh them by the held-out cells.

    For classes and proportions these are networks that read the embeddings with their neighbourhood,
    and a linear member on each block; for values, networks on embeddings and on expression, each
    with its neighbourhood. There is a network for each split, with a seed of its own. Linear members
    are fitted to all cells once they are weighed.
    """

    def in_order(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return row_order(blocks.features, targets.values, rows)

    known = in_order(np.flatnonzero(targets.is_known))
    held_out = tuple(in_order(split.held_out) for split in splits)
    kinds, histories = [], []
    rotations: dict[Source, Rotation] = {}
    planned = _kinds(blocks, targets)
    total = sum(len(splits) + is_linear for _, is_linear in planned)
    bar = counter(total=total, description="fit head", unit="member", show=show_progress_bar)
    with bar as advance:

        def linear(rotation: Rotation, rows: NDArray[np.int64]) -> PredictionHead:
            found = _fit_linear(rotation.values, targets, rows)
            advance(1)
            return found

        def network(rotation: Rotation, split: Split, seed: int) -> FittedHead:
            found = fit_head(
                rotation.values,
                targets,
                fitted=split.fitted,
                held_out=split.held_out,
                input_widths=rotation.widths,
                training=IMPUTING if targets.kind == "values" else VOTING,
                seed=seed,
            )
            advance(1)
            return found

        for reads, is_linear in planned:
            if reads not in rotations:
                rotations[reads] = Rotation(blocks.of(reads), blocks.widths_of(reads), known)
            rotation = rotations[reads]
            if is_linear:
                trials = [linear(rotation, split.fitted) for split in splits]
                kept = [linear(rotation, known)]
            else:
                parts = zip(splits, seeds, strict=True)
                fits = [network(rotation, split, seed) for split, seed in parts]
                histories += [one.history.assign(reads=reads) for one in fits]
                trials = kept = [one.head for one in fits]
            kinds.append(_Kind(reads, rotation.values, trials, list(map(rotation.undone, kept))))
    weights, votes = _weigh(kinds, targets, held_out)
    shares = zip(weights.tolist(), kinds, strict=True)
    histories = [one.assign(network=k) for k, one in enumerate(histories)]
    return Members(
        networks=tuple(network for kind in kinds for network in kind.final),
        reads=tuple(kind.reads for kind in kinds for _ in kind.final),
        weights=tuple(w / len(kind.final) for w, kind in shares for _ in kind.final),
        history=pd.concat(histories, ignore_index=True),
        held_out=held_out,
        votes=votes,
    )


class _Kind(NamedTuple):
    """Members that read the same: those fitted on each split, and those that are kept."""

    reads: Source
    values: NDArray[np.float32]
    trials: list[PredictionHead]
    final: list[PredictionHead]


def _kinds(blocks: Blocks, targets: Targets) -> list[tuple[Source, bool]]:
    """What each kind of members reads, and whether it is linear."""
    sources = blocks.sources
    # The widest of the embeddings' and the expression's blocks come last.
    embeddings = [one for one in sources if "expression" not in one]
    expression = [one for one in sources if "expression" in one]
    networks = [(embeddings[-1], False)]
    if targets.kind == "values":
        return networks + [(one, False) for one in expression[-1:]]
    return networks + [(one, True) for one in sources]


def _fit_linear(
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


def _weigh(
    kinds: Sequence[_Kind], targets: Targets, held_out: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], Any]:
    """Weight of each kind, and what all say of the held-out cells, split after split."""
    if targets.kind == "values":
        errors = sum(
            error_products([(kind.trials[k], kind.values[rows]) for kind in kinds], targets, rows)
            for k, rows in enumerate(held_out)
        )
        return stack_weights(np.asarray(errors)), None
    votes = [
        np.concatenate(
            [
                apply_head(network, kind.values[rows], targets.kind)
                for network, rows in zip(kind.trials, held_out, strict=True)
            ]
        )
        for kind in kinds
    ]
    weights = blend_weights(votes, targets, np.concatenate(held_out))
    return weights, np.tensordot(weights, np.stack(votes).astype(np.float64), axes=1)


def blend_weights(
    votes: Sequence[NDArray[np.floating]], targets: Targets, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Weights, (n_voters,) of sum 1, with which probabilities of several voters are best averaged.

    The weighted mean is a mixture, and its likelihood on the held-out `rows`, which the voters have
    not seen, is raised by expectation maximisation; from equal weights it comes to the only maximum.
    Rows are in an order that does not depend on the file.

    References
    ----------
    van der Laan et al. 2007, Super learner (Statistical Applications in Genetics and Molecular
    Biology 6:25). Dempster et al. 1977, Maximum likelihood from incomplete data via the EM algorithm
    (J R Stat Soc B 39:1).
    """
    values = targets.values[rows]
    if targets.kind == "classes":
        likelihood = np.stack([vote[np.arange(len(rows)), values] for vote in votes], axis=1)
        own = targets.class_weights
        mass = np.ones(len(rows)) if own is None else own[values].astype(np.float64)
    else:
        likelihood = np.stack([vote.ravel() for vote in votes], axis=1)
        mass = np.asarray(values, dtype=np.float64).ravel()
    likelihood = np.maximum(likelihood.astype(np.float64), _TINY)
    weights = np.full(len(votes), 1 / len(votes))
    for _ in range(_ROUNDS):
        shares = likelihood * weights
        shares /= shares.sum(axis=1, keepdims=True)
        explained = mass @ shares + _PRIOR
        weights = explained / explained.sum()
    return weights


def stack_weights(errors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights, (n_voters,), not negative and of sum 1, with which values are best averaged.

    `errors`, (n_voters, n_voters), are sums over held-out values of the products of two voters'
    errors; the weighted mean has the least squared error (Breiman 1996, Stacked regressions, Machine
    Learning 24:49).
    """
    n_voters = len(errors)
    scale = float(np.trace(errors)) / n_voters
    if not scale > 0:
        return np.full(n_voters, 1 / n_voters)
    scaled = errors / scale + _RIDGE * np.eye(n_voters)
    root = np.linalg.cholesky(scaled).T
    conditions = np.vstack([root, np.full(n_voters, _SUM_TO_1)])
    weights, _ = nnls(conditions, np.append(np.zeros(n_voters), _SUM_TO_1))
    return np.asarray(weights / weights.sum())


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
