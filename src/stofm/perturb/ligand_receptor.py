"""Ligands and receptors: which are measured, which cells express both, and how these pairs differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm

from stofm.perturb.influence import baselines, contrast
from stofm.perturb.null import adjusted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.perturb.masking import PairEffects

#: Names of subunits of a complex are joined by this, as in LIANA.
_JOINED: Final = "_"
_LR_AT_ONCE: Final = 512


class Resource(NamedTuple):
    """Pairs of a ligand and a receptor whose genes are all measured.

    `ligands` and `receptors` (n,) are columns of `subunits`, (n_genes, n_complexes), which says the
    genes of each complex; `names` are those of the complexes.
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

    `kinds` (n_obs,) are codes of `names`, and `cells` (n_obs, n_complexes) say who expresses what.
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
