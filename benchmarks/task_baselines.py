"""What tasks.py compares heads with, on arrays: nothing here knows a model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsRegressor

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

#: Strengths that inner cross-validation chooses from.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
_N_FOLDS = 3
_MAX_ROUNDS = 100
_TOLERANCE = 1e-3
#: Numbers of neighbours that held-out cells choose from, and their share of the fitted ones.
_N_NEIGHBORS = (5, 10, 20, 50)
_HELD_OUT = 0.1
#: What is added to a gene's mean before its root is taken, as a share of the mean over genes.
_SMALLEST_MEAN = 1e-3


def logistic_regression(
    fitted: sparse.csr_matrix, labels: NDArray[np.str_], tested: sparse.csr_matrix
) -> NDArray[np.str_]:
    """Classes of cells from the log-normalised counts of all genes in common.

    Parameters
    ----------
    fitted, tested
        (n, n_genes) log-normalised counts.
    labels
        (n,) classes of the fitted cells.

    Returns
    -------
    (n,) classes of the tested cells, with the strength of the penalty that has the best macro-F1
    in threefold cross-validation on the fitted ones.
    """
    search = GridSearchCV(
        LogisticRegression(max_iter=_MAX_ROUNDS, tol=_TOLERANCE),
        {"C": _STRENGTHS},
        scoring="f1_macro",
        cv=StratifiedKFold(_N_FOLDS, shuffle=True, random_state=0),
    )
    with warnings.catch_warnings():
        # Scores on held-out cells no longer change in the last rounds, and small classes may have
        # fewer cells than there are folds.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        found: NDArray[np.str_] = search.fit(fitted, labels).predict(tested)
    return found


def least_squares_proportions(
    spots: AnnData, reference: AnnData, label_key: str, *, weighted: bool
) -> pd.DataFrame:
    """Non-negative least squares of each spot's counts on the types' mean counts.

    Coefficients are numbers of cells, so that they are divided by their sum.

    Parameters
    ----------
    spots
        Raw counts.
    reference
        Raw counts of single cells; those without a type do not count.
    label_key
        Column of ``reference.obs`` with the types.
    weighted
        Divide each gene by the root of its mean over types, as counts vary. Without it a few
        highly expressed genes decide.

    Returns
    -------
    Spots × types, of the genes that both have; equal shares where no type explains a spot.
    """
    genes = np.intersect1d(spots.var_names, reference.var_names)
    types = reference.obs[label_key].dropna()
    cells = reference[types.index, genes].X
    names = np.unique(types.to_numpy(dtype=str))
    profiles = np.stack(
        [np.asarray(cells[(types == name).to_numpy()].mean(axis=0)).ravel() for name in names]
    )
    mean = profiles.mean(axis=0)
    weights = 1 / np.sqrt(mean + _SMALLEST_MEAN * mean.mean()) if weighted else np.ones(len(genes))
    design = (profiles * weights).T
    counts = spots[:, genes].X.toarray() * weights
    numbers = np.stack([nnls(design, one)[0] for one in counts])
    total = numbers.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, numbers / np.where(total > 0, total, 1.0), 1 / len(names))
    return pd.DataFrame(shares, index=spots.obs_names, columns=names)


def reference_composition(spots: AnnData, reference: AnnData, label_key: str) -> pd.DataFrame:
    """The reference's own composition for every spot."""
    shares = reference.obs[label_key].value_counts(normalize=True)
    return pd.DataFrame(
        np.tile(shares.to_numpy(), (spots.n_obs, 1)),
        index=spots.obs_names,
        columns=shares.index.astype(str),
    )


def nearest_neighbor_values(
    fitted: NDArray[np.floating], values: NDArray[np.floating], query: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Mean values of the nearest fitted cells.

    Parameters
    ----------
    fitted, query
        (n, d) components of the genes that both have.
    values
        (n, k) of the fitted cells.

    Returns
    -------
    (n, k) of the query, with the number of neighbours (5 to 50) that has the least squared error
    on a tenth of the fitted cells.
    """
    held_out = np.zeros(len(fitted), dtype=bool)
    n_held_out = max(1, int(_HELD_OUT * len(fitted)))
    held_out[np.random.default_rng(0).choice(len(fitted), n_held_out, replace=False)] = True

    def error(n_neighbors: int) -> float:
        found = _neighbor_means(fitted[~held_out], values[~held_out], fitted[held_out], n_neighbors)
        return float(np.mean((found - values[held_out]) ** 2))

    possible = [n for n in _N_NEIGHBORS if n <= len(fitted) - n_held_out]
    return _neighbor_means(fitted, values, query, min(possible, key=error))


def _neighbor_means(
    fitted: NDArray[np.floating],
    values: NDArray[np.floating],
    query: NDArray[np.floating],
    n_neighbors: int,
) -> NDArray[np.floating]:
    search = KNeighborsRegressor(n_neighbors, algorithm="brute")
    found: NDArray[np.floating] = search.fit(fitted, values).predict(query)
    return found


def mean_values(values: NDArray[np.floating], n_cells: int) -> NDArray[np.floating]:
    """The fitted cells' mean of each gene for every cell."""
    return np.tile(values.mean(axis=0), (n_cells, 1))
