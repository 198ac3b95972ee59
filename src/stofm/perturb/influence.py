"""Influence of cell types on each other against expectation: from pairs of cells to tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm

from stofm.perturb.null import adjusted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.perturb.masking import PairEffects

#: Number of bins by distance, each with equally many pairs.
_N_BINS: Final = 5


def in_bins(pairs: PairEffects) -> NDArray[np.int64]:
    """Number of each pair's bin by distance, (n_pairs,)."""
    edges = np.quantile(pairs.distances, np.arange(1, _N_BINS) / _N_BINS)
    return np.searchsorted(edges, pairs.distances, side="left").astype(np.int64)


def baselines(pairs: PairEffects, kinds: NDArray[np.int64]) -> NDArray[np.float64]:
    """The effect expected if a sender affected all receivers alike, (n_pairs,).

    This is the mean effect on receivers of the same kind at the same distance, multiplied by the
    ratio of the sender's total effect to the sum of these means.
    """
    cell = kinds[pairs.receivers] * _N_BINS + in_bins(pairs)
    means = (np.bincount(cell, pairs.effects) / np.maximum(np.bincount(cell), 1))[cell]
    sender = np.unique(pairs.senders, return_inverse=True)[1].ravel()
    found, usual = (np.bincount(sender, values) for values in (pairs.effects, means))
    shares = np.divide(found, usual, out=np.zeros(len(found)), where=usual > 0)
    return np.asarray(means * shares[sender])


def contrast(
    totals: NDArray[np.float64],
    bases: NDArray[np.float64],
    counts: NDArray[np.integer],
    flags: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Compare flagged senders with others, for groups of receivers.

    The flags are permuted among those senders that have a receiver of the group. Mean and variance of
    the sum over flagged senders follow from all permutations at once. Senders are permuted and not
    pairs, because pairs of one sender are not independent.

    Parameters
    ----------
    totals, bases, counts
        (n_senders, n_groups) sum of the effects on a group's receivers, of what is expected of them,
        and number of these receivers.
    flags
        (n_senders, n_groups) which senders are compared with the others.

    Returns
    -------
    Columns (n_groups,): ``strength``, the mean effect; ``expected``, its mean over permutations; ``z``,
    the difference in standard deviations over permutations; ``n_pairs``. NaN for groups without pairs
    or without variation.

    References
    ----------
    Hoeffding 1951, A combinatorial central limit theorem (Ann. Math. Stat. 22:558), for the
    moments.
    """
    has_some = counts > 0
    n, k = has_some.sum(axis=0), (flags & has_some).sum(axis=0)
    residuals = totals - bases
    residuals = residuals - counts * (residuals.sum(axis=0) / np.maximum(counts.sum(axis=0), 1))
    excess = (flags * residuals).sum(axis=0)
    variance = k * (n - k) * (residuals**2).sum(axis=0) / np.maximum(n * (n - 1), 1)
    n_pairs = (flags * counts).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = (flags * totals).sum(axis=0) / n_pairs
        expected = strength - excess / n_pairs
        z = np.where(variance > 0, excess / np.sqrt(variance), np.nan)
    return {"strength": strength, "expected": expected, "z": z, "n_pairs": n_pairs}


def by_type(
    pairs: PairEffects, kinds: NDArray[np.int64], names: Sequence[str], *, min_pairs: int
) -> pd.DataFrame:
    """Contrast each pair of types: see :class:`stofm.tl.Influence`.

    `kinds` (n_obs,) are codes of `names`; those of senders and receivers are not negative.
    """
    senders, number = np.unique(pairs.senders, return_inverse=True)
    shape, where = (len(senders), len(names)), (number.ravel(), kinds[pairs.receivers])
    expected, ones = baselines(pairs, kinds), np.ones(len(number))
    totals, bases, counts = (
        sparse.coo_array((values, where), shape=shape).toarray()
        for values in (pairs.effects.astype(float), expected, ones)
    )
    distances = _mean_by_bin(pairs, kinds, names, expected)
    lengths = _lengths(distances)
    parts = []
    for code, name in enumerate(names):
        flags = np.repeat((kinds[senders] == code)[:, None], len(names), axis=1)
        found = contrast(totals, bases, counts.astype(int), flags)
        part = pd.DataFrame({"source": name, "target": list(names), **found})
        parts.append(part[part["n_pairs"] >= min_pairs])
    table = pd.concat(parts, ignore_index=True)
    table.insert(5, "FDR", adjusted(norm.sf(table["z"])))
    table = table.merge(lengths, how="left", on=["source", "target"])
    return table.sort_values("z", ascending=False, kind="stable", ignore_index=True)


def by_distance(
    pairs: PairEffects, kinds: NDArray[np.int64], names: Sequence[str], *, min_pairs: int
) -> pd.DataFrame:
    """Strength of each pair of types by distance: see :class:`stofm.tl.Influence`."""
    table = _mean_by_bin(pairs, kinds, names, baselines(pairs, kinds))
    n_pairs = table.groupby(["source", "target"])["n_pairs"].transform("sum")
    return table[n_pairs >= min_pairs].reset_index(drop=True)


def _mean_by_bin(
    pairs: PairEffects,
    kinds: NDArray[np.int64],
    names: Sequence[str],
    expected: NDArray[np.float64],
) -> pd.DataFrame:
    own = pd.DataFrame(
        {
            "source": kinds[pairs.senders],
            "target": kinds[pairs.receivers],
            "bin": in_bins(pairs),
            "distance": pairs.distances,
            "strength": pairs.effects.astype(np.float64),
            "expected": expected,
        }
    )
    groups = own.groupby(["source", "target", "bin"])
    found = groups.mean().assign(n_pairs=groups.size()).reset_index().drop(columns="bin")
    for column in ("source", "target"):
        found[column] = np.asarray(names, dtype=object)[found[column]]
    return found


def _lengths(distances: pd.DataFrame) -> pd.DataFrame:
    """Distance over which each pair's strength falls by 1/e, from a line through its logarithm."""
    own = distances[distances["strength"] > 0]
    x, y, w = own["distance"], np.log(own["strength"]), own["n_pairs"]
    sums = pd.DataFrame({"w": w, "x": w * x, "y": w * y, "xx": w * x * x, "xy": w * x * y})
    s = sums.groupby([own["source"], own["target"]]).sum()
    spread = s["w"] * s["xx"] - s["x"] ** 2
    slope = (s["w"] * s["xy"] - s["x"] * s["y"]) / spread.where(spread > 1e-9 * s["xx"] * s["w"])
    return (-1 / slope.where(slope < 0)).rename("length").reset_index()
