"""The networks of a head that vote, and what each kind of them weighs: as held-out cells say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls

from stofm.heads.network import apply_head, fit_head, row_order
from stofm.heads.targets import head_loss
from stofm.nn.device import seeded
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from stofm.heads.fitting import FirstFit
    from stofm.heads.inputs import Source
    from stofm.heads.network import FittedHead, HeadTraining
    from stofm.heads.targets import Targets
    from stofm.spatial import Split


#: Held-out cells that every voter is taken to have explained before any is looked at.
_PRIOR: Final = 1.0
_ROUNDS: Final = 200
_TINY: Final = 1e-6
#: Share of the mean squared error that is added to each voter's own: equal ones then weigh the same.
_RIDGE: Final = 1e-6
#: How much more than the errors it counts that weights sum to 1, before they are made to.
_SUM_TO_1: Final = 1e3
#: Standard deviation of all columns together that inputs are scaled to. They are scaled as one:
#: principal components that hardly vary hardly count.
_SPREAD: Final = 10.0
#: The ``C`` of scikit-learn, which is the prior variance of each weight: with inputs of that spread
#: the scores of a class are expected to vary by about five, from rare to nearly certain.
_STRENGTH: Final = 0.3
#: More cells than this are thinned out: so few numbers are known well enough from these.
_MOST_CELLS: Final = 50_000
_MOST_STEPS: Final = 100
#: Largest entry of the gradient at which fitting stops.
_TOLERANCE: Final = 1e-4


@dataclass(frozen=True, eq=False)
class Voters:
    """Networks that vote.

    Attributes
    ----------
    networks, reads, weights, n_neighbors
        As a :class:`~stofm.heads.base.Head` has them.
    history
        Losses of those with hidden layers, numbered in the column ``network``.
    held_out
        Held-out cells of each split; different splits may share cells.
    votes
        (n_rows, n_outputs) what networks that were not fitted to them say of these, split after
        split.
    """

    networks: tuple[PredictionHead, ...]
    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    n_neighbors: int
    history: pd.DataFrame
    held_out: tuple[NDArray[np.int64], ...]
    votes: NDArray[np.float64]

    @property
    def fields(self) -> dict[str, Any]:
        """What a head has of them."""
        names = ("networks", "reads", "weights", "n_neighbors", "history")
        return {name: getattr(self, name) for name in names}

    @property
    def rows(self) -> NDArray[np.int64]:
        """Held-out cells of all splits in turn; a cell may be in several."""
        return np.concatenate(self.held_out)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Networks that read the same, what they say of held-out cells, and how they are finished."""

    reads: Source
    votes: NDArray[np.float32]
    finish: Callable[[], list[PredictionHead]]


def fit_networks(
    first: FirstFit,
    reads: Source,
    targets: Targets,
    splits: Sequence[Split],
    seeds: Sequence[int],
    training: HeadTraining | None = None,
) -> list[FittedHead]:
    """Fit networks with hidden layers that read the same, one for each seed, each on its split."""
    features = first.inputs.of(reads)
    assert features is not None
    fits = [first.fitted] if reads == "embedding" else []
    for k in range(len(fits), len(seeds)):
        split = splits[k % len(splits)]
        one = fit_head(
            features,
            targets,
            fitted=split.fitted,
            held_out=split.held_out,
            input_widths=first.inputs.widths_of(reads),
            training=training,
            seed=seeds[k],
        )
        fits.append(one)
    return fits


def fit_voters(
    first: FirstFit,
    targets: Targets,
    splits: Sequence[Split],
    seeds: Sequence[int],
) -> Voters:
    """Fit networks to embeddings, and to neighbourhoods and components of expression if there are any.

    Of each there is a network with hidden layers for each seed; a linear one on the expression
    stands for all that it would be alike. Weights of these kinds are those with which the held-out
    cells are likeliest.

    Parameters
    ----------
    first
        The network on embeddings for the first split, and what is read.
    targets
        Classes or proportions.
    splits
        Cells to fit and to hold out: one split for each network, or a single one for all.
    seeds
        Of the networks.
    """
    inputs = first.inputs
    held_out = [row_order(inputs.features, targets.values, one.held_out) for one in splits]
    fitting = _Fitting(first, targets, splits, held_out, seeds)
    kinds = [fitting.networks(source) for source in inputs.sources]
    if inputs.expression is not None:
        kinds.append(fitting.linear("expression", inputs.expression))
    weights = blend_weights([kind.votes for kind in kinds], targets, np.concatenate(held_out))
    votes = sum(w * kind.votes.astype(np.float64) for w, kind in zip(weights, kinds, strict=True))
    networks: list[PredictionHead] = []
    reads: list[Source] = []
    shares: list[float] = []
    for kind, weight in zip(kinds, weights.tolist(), strict=True):
        own = kind.finish()
        networks += own
        reads += [kind.reads] * len(own)
        shares += [weight / len(own)] * len(own)
    return Voters(
        networks=tuple(networks),
        reads=tuple(reads),
        weights=tuple(shares),
        n_neighbors=inputs.neighbors_of(reads),
        history=pd.concat(fitting.histories, ignore_index=True),
        held_out=tuple(held_out),
        votes=np.asarray(votes),
    )


class _Fitting:
    """A run of :func:`fit_voters`."""

    def __init__(
        self,
        first: FirstFit,
        targets: Targets,
        splits: Sequence[Split],
        held_out: Sequence[NDArray[np.int64]],
        seeds: Sequence[int],
    ) -> None:
        self.histories: list[pd.DataFrame] = []
        self._first = first
        self._targets = targets
        self._splits = splits
        self._held_out = held_out
        self._seeds = seeds
        self._known = np.flatnonzero(targets.is_known)

    def networks(self, reads: Source) -> _Kind:
        """Networks with hidden layers, one for each seed."""
        first = self._first
        features = first.inputs.of(reads)
        assert features is not None
        fits = fit_networks(first, reads, self._targets, self._splits, self._seeds)
        for one in fits:
            self.histories.append(one.history.assign(network=len(self.histories), reads=reads))
        votes = [
            self._mean_vote([one.head for one in fits[k :: len(self._splits)]], features[rows])
            for k, rows in enumerate(self._held_out)
        ]

        def finish() -> list[PredictionHead]:
            # The one that was tuned with the model stays as it is.
            n_kept = int(reads == "embedding" and first.model is not None)
            return [one.head for one in fits[:n_kept]] + [
                fit_head(
                    features,
                    self._targets,
                    fitted=self._known,
                    held_out=self._known[:0],
                    input_widths=first.inputs.widths_of(reads),
                    n_epochs=one.best_epoch,
                    seed=seed,
                ).head
                for one, seed in list(zip(fits, self._seeds, strict=True))[n_kept:]
            ]

        return _Kind(reads, np.concatenate(votes), finish)

    def _mean_vote(
        self, networks: Sequence[PredictionHead], features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        votes = [apply_head(one, features, self._targets.kind) for one in networks]
        return np.asarray(np.mean(votes, axis=0, dtype=np.float64), dtype=np.float32)

    def linear(self, reads: Source, features: NDArray[np.float32]) -> _Kind:
        """A linear network."""

        def fit(rows: NDArray[np.int64]) -> PredictionHead:
            ordered = row_order(features, self._targets.values, rows)
            return fit_linear_head(features, self._targets, fitted=ordered, strength=_STRENGTH)

        votes = [
            apply_head(fit(split.fitted), features[rows], self._targets.kind)
            for split, rows in zip(self._splits, self._held_out, strict=True)
        ]
        return _Kind(reads, np.concatenate(votes), lambda: [fit(self._known)])


def blend_weights(
    votes: Sequence[NDArray[np.floating]], targets: Targets, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Find the weights with which probabilities of several voters are best averaged.

    The weighted mean is a mixture, and its likelihood on the held-out cells is raised by
    expectation maximisation, which from equal weights comes to the only maximum.

    Parameters
    ----------
    votes
        For each voter (n, n_outputs) probabilities or proportions of held-out cells that it was
        not fitted to; rows sum to 1.
    targets
        Classes or proportions.
    rows
        (n,) which of the targets' rows the votes are of, in an order that does not depend on the
        file. A row may occur more than once.

    Returns
    -------
    (n_voters,) weights that sum to 1; equal without rows.

    References
    ----------
    van der Laan et al. 2007, Super learner (Statistical Applications in Genetics and Molecular
    Biology 6:25), for weights from held-out predictions. Dempster et al. 1977, Maximum likelihood
    from incomplete data via the EM algorithm (J R Stat Soc B 39:1).
    """
    likelihood, mass = _likelihoods(votes, targets, rows)
    weights = np.full(len(votes), 1 / len(votes))
    for _ in range(_ROUNDS):
        shares = likelihood * weights
        shares /= shares.sum(axis=1, keepdims=True)
        explained = mass @ shares + _PRIOR
        weights = explained / explained.sum()
    return weights


def stack_weights(errors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Find the weights with which values that several voters predict are best averaged.

    Parameters
    ----------
    errors
        (n_voters, n_voters) mean, or sum, over held-out values of the products of two voters'
        errors.

    Returns
    -------
    (n_voters,) weights of the weighted mean with the least squared error, not negative, that sum
    to 1; equal if there are no errors.

    References
    ----------
    Breiman 1996, Stacked regressions (Machine Learning 24:49).
    """
    n_voters = len(errors)
    scale = float(np.trace(errors)) / n_voters
    if not scale > 0:
        return np.full(n_voters, 1 / n_voters)
    root = np.linalg.cholesky(
        np.asarray(errors, dtype=np.float64) / scale + _RIDGE * np.eye(n_voters)
    )
    conditions = np.vstack([root.T, np.full(n_voters, _SUM_TO_1)])
    weights, _ = nnls(conditions, np.append(np.zeros(n_voters), _SUM_TO_1))
    return np.asarray(weights / weights.sum())


def _likelihoods(
    votes: Sequence[NDArray[np.floating]], targets: Targets, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each voter's probability of what is true, (n_events, n_voters), and how much that counts."""
    values = targets.values[rows]
    if targets.kind == "classes":
        own = [vote[np.arange(len(rows)), values] for vote in votes]
        weights = targets.class_weights
        mass = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float)[values]
    else:
        own = [vote.ravel() for vote in votes]
        mass = np.asarray(values, dtype=np.float64).ravel()
    return np.maximum(np.stack(own, axis=1).astype(np.float64), _TINY), mass


def fit_linear_head(
    features: NDArray[np.float32],
    targets: Targets,
    *,
    fitted: NDArray[np.int64],
    strength: float = 1.0,
) -> PredictionHead:
    """Fit logistic regression to classes, or the same to proportions.

    Parameters
    ----------
    features
        (n, d) representations.
    targets
        Classes or proportions of the same rows.
    fitted
        Rows to fit, in an order that does not depend on the file.
    strength
        How much the cells count against the penalty on squared weights, above 0: the ``C`` of
        scikit-learn.

    Returns
    -------
    The head, in evaluation mode.
    """
    rows = fitted[:: -(-len(fitted) // _MOST_CELLS)]
    values = torch.from_numpy(features[rows]).double()
    config = HeadConfig(
        d_input=features.shape[1], d_output=targets.n_outputs, widths=(), dropout=0.0
    )
    with seeded(0):
        head = PredictionHead(config).double()
    mean = values.mean(dim=0)
    total = math.sqrt(float(values.var(dim=0, correction=0).sum()))
    head.input_mean.copy_(mean)
    head.input_scale.fill_(total / _SPREAD or 1.0)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    _minimise(head, values, targets, rows, penalty=0.5 / (strength * len(rows)))
    return head.float().eval()


def _minimise(
    head: PredictionHead,
    values: torch.Tensor,
    targets: Targets,
    rows: NDArray[np.int64],
    *,
    penalty: float,
) -> None:
    wanted = targets.take(rows)
    wanted = wanted if targets.kind == "classes" else wanted.double()
    weights = targets.class_weights
    class_weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        head.last.parameters(),
        max_iter=_MOST_STEPS,
        tolerance_grad=_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total, count = head_loss(head(values), wanted, targets.kind, class_weights)
        mean = total / count + penalty * head.last.weight.square().sum()
        mean.backward()
        return mean

    optimizer.step(loss)
