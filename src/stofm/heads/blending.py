"""How much networks that vote should weigh: as much as is best for held-out cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import nnls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.targets import Targets

#: Held-out cells that every voter is taken to have explained before any is looked at.
_PRIOR = 1.0
_ROUNDS = 200
_TINY = 1e-6
#: Voters with a smaller weight are left out.
_LEAST_WEIGHT = 0.02
#: Share of the mean squared error that is added to each voter's own: equal ones then weigh the same.
_RIDGE = 1e-6
#: How much more than the errors it counts that weights sum to 1, before they are made to.
_SUM_TO_1 = 1e3


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


def drop_light(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Set weights under 0.02 to 0, but for the first voter's, which reads what all cells have."""
    kept = weights >= _LEAST_WEIGHT
    kept[0] = True
    return np.asarray(np.where(kept, weights, 0.0) / weights[kept].sum())


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
