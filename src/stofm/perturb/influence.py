"""Influence of cell types, and of ligands and receptors, on each other against expectation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm

from stofm.perturb.effect import adjusted

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


#: Joins the names of a complex's subunits, as in LIANA.
_JOINED: Final = "_"
_LR_AT_ONCE: Final = 512


class Resource(NamedTuple):
    """Pairs of a ligand and a receptor whose genes are all measured.

    `ligands` and `receptors` (n,) are columns of `subunits`, (n_genes, n_complexes), which has the
    genes of each complex; `names` are the names of the complexes.
    """

    ligands: NDArray[np.int64]
    receptors: NDArray[np.int64]
    names: NDArray[np.object_]
    subunits: sparse.csr_array


def read_resource(resource: pd.DataFrame | str, genes: Sequence[str]) -> Resource:
    """Keep the pairs of a resource, a table or one of LIANA's, that are measured."""
    table = _from_liana(resource) if isinstance(resource, str) else resource
    if not isinstance(table, pd.DataFrame) or not {"ligand", "receptor"} <= set(table.columns):
        found = list(table.columns) if isinstance(table, pd.DataFrame) else type(table).__name__
        raise ValueError(
            "resource must be a DataFrame with the columns 'ligand' and 'receptor', or the name "
            f"of one of LIANA's; found {found}."
        )
    pairs = table[["ligand", "receptor"]].astype(str).drop_duplicates()
    column = {name: k for k, name in enumerate(genes)}
    codes, names = pd.factorize(pairs.to_numpy().ravel())
    parts = [name.split(_JOINED) if name not in column else [name] for name in names]
    is_measured = np.array([all(part in column for part in own) for own in parts], dtype=bool)
    ligands, receptors = codes.reshape(-1, 2).T
    kept = is_measured[ligands] & is_measured[receptors]
    if not kept.any():
        raise ValueError(
            f"None of the {len(pairs)} ligand-receptor pairs is measured: the resource names genes "
            f"such as {names[:3].tolist()}, the table such as {list(genes[:3])}. Pass the column of "
            "var with symbols as `gene_symbols`, or resource='mouseconsensus' for mouse."
        )
    used = [(column[part], k) for k in np.flatnonzero(is_measured) for part in set(parts[k])]
    rows, columns = np.array(used).T
    subunits = sparse.csr_array(
        (np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(len(genes), len(names))
    )
    return Resource(ligands[kept], receptors[kept], names, subunits)


def _from_liana(name: str) -> Any:
    try:
        from liana.resource import select_resource, show_resources
    except ImportError as error:
        raise ImportError(
            f"resource={name!r} is one of LIANA's: pip install 'stofm[communication]'. Or pass a "
            "DataFrame with the columns 'ligand' and 'receptor'."
        ) from error
    if name not in (there := show_resources()):
        raise ValueError(f"LIANA has no resource {name!r}; it has {there}.")
    return select_resource(name)


def expressed(counts: sparse.csr_matrix, subunits: sparse.csr_array) -> sparse.csr_array:
    """Which cells (n, n_complexes) have a count of all genes of a complex."""
    is_there = sparse.csr_array(
        ((counts.data > 0).astype(np.int32), counts.indices, counts.indptr), shape=counts.shape
    )
    found = sparse.csr_array(is_there @ subunits)
    size = np.asarray(subunits.sum(axis=0)).ravel()
    found.data = (found.data == size[found.indices]).astype(np.int32)
    found.eliminate_zeros()
    return found


def by_genes(
    pairs: PairEffects,
    kinds: NDArray[np.int64],
    names: Sequence[str],
    cells: sparse.csr_array,
    resource: Resource,
    *,
    min_pairs: int,
) -> pd.DataFrame:
    """Contrast pairs of cells that express both: see :func:`stofm.tl.ligand_receptor`.

    `kinds` (n_obs,) are codes of `names`, and `cells` (n_obs, n_complexes) says which cells express
    which complex.
    """
    senders, number = np.unique(pairs.senders, return_inverse=True)
    shape, where = (len(senders), len(kinds)), (number.ravel(), pairs.receivers)
    values = (pairs.effects.astype(float), baselines(pairs, kinds), np.ones(len(pairs.effects)))
    totals, bases, counts = (sparse.csr_array((one, where), shape=shape) for one in values)
    sends = sparse.csc_array(cells[senders])
    parts = []
    for target, target_name in enumerate(names):
        rows = np.flatnonzero(kinds == target)
        receives = sparse.csc_array(cells[rows])
        near = [sparse.csr_array(one[:, rows]) for one in (totals, bases, counts)]
        for source, source_name in enumerate(names):
            own = np.flatnonzero(kinds[senders] == source)
            for start in range(0, len(resource.ligands), _LR_AT_ONCE):
                ligands, receptors = (
                    one[start : start + _LR_AT_ONCE]
                    for one in (resource.ligands, resource.receptors)
                )
                flags = sends[own][:, ligands].toarray() > 0
                effects, expected, n = (
                    (one[own] @ receives[:, receptors]).toarray() for one in near
                )
                found = contrast(effects, expected, np.rint(n).astype(np.int64), flags)
                part = pd.DataFrame(
                    {
                        "source": source_name,
                        "target": target_name,
                        "ligand_complex": resource.names[ligands],
                        "receptor_complex": resource.names[receptors],
                        **found,
                    }
                )
                parts.append(part[part["n_pairs"] >= min_pairs])
    table = pd.concat(parts, ignore_index=True)
    table.insert(7, "FDR", adjusted(norm.sf(table["z"])))
    return table.sort_values("z", ascending=False, kind="stable", ignore_index=True)
