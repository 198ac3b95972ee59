"""How much the embedding of each cell depends on single cells near it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.spatial import cKDTree

from stofm.perturb.edit import Detached, Edit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from stofm.perturb.engine import UneditedSlice

#: Bins of equally many pairs by distance.
_N_BINS: Final = 5


class PairEffects(NamedTuple):
    """What single senders do to the receivers near them; arrays (n_pairs,).

    `distances` are in the unit of the coordinates.
    """

    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]
    distances: NDArray[np.float64]
    effects: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: list[PairEffects]) -> PairEffects:
        """Pairs of several slices, one after another."""
        return cls(*(np.concatenate(one) for one in zip(*parts, strict=True)))


def pair_effects(
    whole: UneditedSlice,
    senders: NDArray[np.int64],
    *,
    reach: float,
    change: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating]],
) -> PairEffects:
    """Mask senders one at a time for the cells around them, and see how much these change.

    Senders that lie more than twice the reach apart are masked in one run, as no cell is within
    reach of two of them; what others do to a cell through cells in between is small beside that.

    Parameters
    ----------
    whole
        The slice.
    senders
        Rows of the cells to mask.
    reach
        Distance up to which cells no longer read a masked one, in the unit of the coordinates.
    change
        From embeddings before and after, (n, d_embedding), to the change of each cell, (n,).

    Returns
    -------
    All pairs of a sender and another cell of its sub-slice within reach.
    """
    groups = _apart(whole.coordinates[senders], 2 * reach)
    is_sender = np.zeros((groups.max(initial=-1) + 1, whole.n_cells), dtype=bool)
    is_sender[groups, senders] = True
    edits = [Edit(detached=Detached(senders=one, reach=reach)) for one in is_sender]
    nobody = np.empty(0, dtype=np.int64)
    parts = [PairEffects(nobody, nobody, np.empty(0), np.empty(0, dtype=np.float32))]
    for found in whole.embed(edits):
        xy = whole.coordinates[found.rows]
        masked = np.flatnonzero(is_sender[found.edit, found.rows])
        distances, nearest = cKDTree(xy[masked]).query(xy, distance_upper_bound=reach * (1 + 1e-9))
        is_near = np.isfinite(distances)
        is_near[masked] = False
        values = change(found.before[is_near], found.after[is_near]).astype(np.float32)
        rows = found.rows[masked][nearest[is_near]]
        parts.append(PairEffects(rows, found.rows[is_near], distances[is_near], values))
    return PairEffects.joined(parts)


def _apart(xy: NDArray[np.float64], distance: float) -> NDArray[np.int64]:
    """Number groups of points so that those of a group lie at least so far apart, (n,).

    A group has one point of each second tile, along both axes.
    """
    tile = np.floor(xy / distance).astype(np.int64)
    which = np.unique(tile, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], which[order])
    rank = np.empty(len(xy), dtype=np.int64)
    rank[order] = np.arange(len(xy)) - starts
    parity = tile[:, 0] % 2 * 2 + tile[:, 1] % 2
    groups: NDArray[np.int64] = np.unique(rank * 4 + parity, return_inverse=True)[1].ravel()
    return groups


class Contrast(NamedTuple):
    """Effects of some groups of pairs against what is expected; arrays (n_groups,).

    `strength` is the mean effect, `expected` its mean over permutations, and `z` the difference in
    standard deviations over permutations; NaN for groups without pairs or without variation.
    """

    strength: NDArray[np.float64]
    expected: NDArray[np.float64]
    z: NDArray[np.float64]
    n_pairs: NDArray[np.int64]


def in_bins(pairs: PairEffects) -> NDArray[np.int64]:
    """Number of each pair's bin by distance, (n_pairs,)."""
    edges = np.quantile(pairs.distances, np.arange(1, _N_BINS) / _N_BINS)
    return np.searchsorted(edges, pairs.distances, side="left").astype(np.int64)


def baselines(pairs: PairEffects, kinds: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each effect would be if its sender treated all receivers alike, (n_pairs,).

    That is the mean effect on receivers of the same kind at the same distance, times what the sender
    does to all its receivers, as a share of these means.
    """
    cell = kinds[pairs.receivers] * _N_BINS + in_bins(pairs)
    means = (np.bincount(cell, pairs.effects) / np.maximum(np.bincount(cell), 1))[cell]
    sender = np.unique(pairs.senders, return_inverse=True)[1].ravel()
    effects, expected = (
        np.bincount(sender, values).astype(np.float64) for values in (pairs.effects, means)
    )
    shares = effects / np.where(expected > 0, expected, np.inf)
    return np.asarray(means * shares[sender])


def contrast(
    totals: NDArray[np.float64],
    bases: NDArray[np.float64],
    counts: NDArray[np.integer],
    flags: NDArray[np.bool_],
    strata: NDArray[np.integer],
) -> Contrast:
    """Compare flagged senders with others of their stratum, for groups of receivers.

    The flags are permuted among those senders of a stratum that have a receiver of the group. Mean
    and variance of the sum over flagged senders follow from all permutations at once. Senders are
    permuted and not pairs, because pairs of one sender are not independent.

    Parameters
    ----------
    totals, bases, counts
        (n_senders, n_groups) sum of the effects on a group's receivers, of what effects are at
        their distance, and number of these receivers.
    flags
        (n_senders, n_groups) which senders are in the group.
    strata
        (n_senders,) codes.

    References
    ----------
    Hoeffding 1951, A combinatorial central limit theorem (Ann. Math. Stat. 22:558), for the
    moments.
    """
    n_groups = totals.shape[1]
    excess, variance = np.zeros(n_groups), np.zeros(n_groups)
    for stratum in np.unique(strata):
        own = strata == stratum
        n_own, is_flagged = counts[own], flags[own] & (counts[own] > 0)
        n, k = (n_own > 0).sum(axis=0), is_flagged.sum(axis=0)
        residuals = totals[own] - bases[own]
        residuals = residuals - n_own * (residuals.sum(axis=0) / np.maximum(n_own.sum(axis=0), 1))
        excess += (is_flagged * residuals).sum(axis=0)
        spread = (residuals**2).sum(axis=0) / np.maximum(n * (n - 1), 1)
        variance += k * (n - k) * spread
    n_pairs = (flags * counts).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = (flags * totals).sum(axis=0) / n_pairs
        expected = strength - excess / n_pairs
        z = np.where(variance > 0, excess / np.sqrt(variance), np.nan)
    return Contrast(strength, expected, z, n_pairs)


def false_discovery_rates(z: NDArray[np.floating]) -> NDArray[np.float64]:
    """Benjamini-Hochberg of one-sided normal p-values; NaN where z is."""
    found, is_known = np.full(len(z), np.nan), np.isfinite(z)
    found[is_known] = stats.false_discovery_control(stats.norm.sf(z[is_known]))
    return found


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
        found = contrast(totals, bases, counts.astype(int), flags, np.zeros(len(senders), int))
        part = pd.DataFrame({"source": name, "target": list(names), **found._asdict()})
        parts.append(part[part["n_pairs"] >= min_pairs])
    table = pd.concat(parts, ignore_index=True)
    table.insert(5, "FDR", false_discovery_rates(table["z"].to_numpy()))
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
