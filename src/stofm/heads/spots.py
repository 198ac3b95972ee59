"""Spots that heads for proportions learn from: with known ones, summed from cells, or simulated."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from stofm._edge.colors import colors_of
from stofm._edge.counts import read_counts
from stofm._edge.tables import frame_names
from stofm._keys import Obsm
from stofm._logging import counter, logger
from stofm._messages import naming, require_name, warn
from stofm.genes.ranking import require_sound
from stofm.heads.embeddings import gene_records
from stofm.heads.expression import ExpressionComponents
from stofm.heads.genes import choose_panel, read_columns, read_genes
from stofm.heads.network import HeadTraining, apply_head, fit_head
from stofm.heads.request import SliceTables, check_whole_number
from stofm.heads.targets import Targets, read_labels
from stofm.nn import choose_device
from stofm.spatial.spots import TypedCells, gene_scales, grid_spots, simulate_spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.genes import Gene
    from stofm.heads.request import Request
    from stofm.heads.targets import Labels

#: By so much the proportions of a spot may miss 1: rounding, not something left out.
_TOLERANCE: Final = 1e-3
#: With fewer cells in most spots, hardly any spot is mixed.
_FEW_CELLS: Final = 2
#: Column of ``obs`` that names the slice of spots made from cells.
SLICE: Final = "slice"
#: Fewer shared genes than this say too little about types.
_MIN_GENES: Final = 10
#: Networks, and between their seeds.
_N_NETWORKS: Final = 3
_SEED_STEP: Final = 1000
#: Components: what differs between types; more is noise of the reference.
_N_COMPONENTS: Final = 50
_HELD_OUT: Final = 0.1
#: Simulated spots are many, and a tenth of them tells well when to stop.
_TRAINING: Final = HeadTraining(
    learning_rate=4e-3, batch_size=1024, max_epochs=30, patience=6, dropout=0.1
)


class SpotTable(NamedTuple):
    """Spots, names of types, and float32 (n_obs, n_types) proportions, NaN where they are not known."""

    slices: SliceTables
    types: list[str]
    proportions: NDArray[np.float32]


def read_proportions(slices: SliceTables, key: str | Sequence[str]) -> SpotTable:
    """Read known proportions, checked: an entry of ``obsm``, or columns of ``obs``."""
    where = f"obsm[{key!r}]" if isinstance(key, str) else f"obs[{list(key)!r}]"
    frames = slices.each(lambda table: _read_frame(table, key))
    types = list(frames[0])
    for k, frame in enumerate(frames, start=1):
        if not frame.columns.is_unique:
            twice = sorted(set(frame.columns[frame.columns.duplicated()]))
            raise ValueError(
                f"{where} has the types {twice} more than once; each must have one column."
            )
        if set(frame) != set(types):
            raise ValueError(
                f"{where} has the types {types} in the first AnnData and {list(frame)} in number "
                f"{k}; they must be the same."
            )
    if len(types) < 2:
        raise ValueError(f"{where} has {len(types)} types; at least two are needed.")
    try:
        values = np.concatenate(
            [f[types].to_numpy(np.float64, na_value=np.nan, copy=True) for f in frames]
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must hold numbers, the share of each type; found {error}."
        ) from error
    known = ~np.isnan(values).any(axis=1)
    values[~known] = np.nan
    sums = values.sum(axis=1)
    if n_negative := int((values < 0).any(axis=1).sum()):
        raise ValueError(
            f"{n_negative} of {known.sum()} spots have negative proportions in {where}, down to "
            f"{np.nanmin(values):.4g}; expected shares from 0 to 1. Correct them, or set rows that "
            "are not known to NaN."
        )
    if (off := known & ~(np.abs(sums - 1) <= _TOLERANCE)).any():
        raise ValueError(
            f"The proportions of {off.sum()} of {known.sum()} spots in {where} do not sum to 1: they "
            f"sum to {sums[off].min():.4g} to {sums[off].max():.4g}. Divide each row by its sum, and "
            "set rows that are not known to NaN."
        )
    if not known.all():
        logger.info("%d of %d spots have no known proportions (NaN).", (~known).sum(), len(known))
    return SpotTable(slices, types, (values / sums[:, None]).astype(np.float32))


def _read_frame(adata: AnnData, key: str | Sequence[str]) -> pd.DataFrame:
    """Proportions with the types' names as columns."""
    if not isinstance(key, str):
        for name in key:
            require_name(name, adata.obs, f"There is no obs[{name!r}].")
        return adata.obs[list(key)].rename(columns=str)
    if key not in adata.obsm:
        raise KeyError(
            f"There is no obsm[{key!r}]; there are {sorted(map(str, adata.obsm))}. For proportions "
            "in columns of obs pass the list of their names."
        )
    values = adata.obsm[key]
    if isinstance(values, pd.DataFrame):
        return values.set_axis(frame_names(adata, key), axis=1)
    require_sound(values, f"adata.obsm[{key!r}]")
    dense = np.asarray(values.toarray() if sparse.issparse(values) else values)
    if dense.ndim != 2:
        raise ValueError(f"obsm[{key!r}] has the shape {dense.shape}; expected (n_obs, n_types).")
    # Names that `uns` lists for the columns, or their numbers.
    listed = [adata.uns.get(f"{one}_names") for one in (key, key.removesuffix("s"))]
    fits = (names for names in listed if names is not None and len(names) == dense.shape[1])
    return pd.DataFrame(dense, adata.obs_names, [str(n) for n in next(fits, range(dense.shape[1]))])


def grid_into_spots(
    slices: SliceTables, labels: Labels, request: Request, *, spot_size: float
) -> SpotTable:
    """Sum cells with types into square spots, whose proportions are known.

    The spots have their slice in ``obs["slice"]`` and their centre in ``obsm["spatial"]``.
    """
    import anndata

    grid = grid_spots(
        slices.coordinates(request.spatial_key),
        labels.codes,
        slices.rows,
        n_types=len(labels.classes),
        spot_size=spot_size,
    )
    tables, order = [], []
    for k, (table, place) in enumerate(zip(slices.tables, slices.places, strict=True)):
        spots = np.unique(grid.spot[place])
        spots = spots[spots >= 0]
        if not len(spots):
            continue
        counts = sparse.csr_matrix((len(grid.centers), table.n_vars), dtype=np.int64)
        start = place.start
        with slices.naming(k):
            for block in read_counts(table, layer=request.layer):
                counts = sparse.csr_matrix(counts + grid.sum_counts(block, start=start))
                start += block.shape[0]
        names = [slices.names[number] for number in grid.slices[spots]]
        tables.append(
            anndata.AnnData(
                counts[spots].astype(np.float32),
                obs=pd.DataFrame({SLICE: names}, index=[f"spot{n}" for n in spots]),
                var=table.var.copy(),
                obsm={Obsm.SPATIAL: grid.centers[spots]},
                uns=gene_records(table),
            )
        )
        order.append(spots)
    sizes = np.bincount(grid.spot[grid.spot >= 0])
    made = f"{sizes.sum()} cells with types make {len(sizes)} spots, of {sizes.mean():.1f} cells"
    if np.median(sizes) >= _FEW_CELLS:
        logger.info("%s on average.", made)
    else:
        warn(
            f"{made} on average; {(sizes == 1).mean():.0%} have a single cell, and hardly any are "
            f"mixed. Is spot_size={spot_size:g} in the unit of the coordinates? A larger `spot_size` "
            "makes larger spots."
        )
    rows = np.concatenate(order)
    numbers = np.unique(grid.slices[rows])
    spotted = SliceTables(
        tuple(tables),
        [slices.names[k] for k in numbers],
        [np.flatnonzero(grid.slices[rows] == k) for k in numbers],
        (("the spots", "adata"),) * len(tables),
    )
    return SpotTable(spotted, list(labels.classes), grid.proportions[rows].astype(np.float32))


def fit_simulated(
    query: SliceTables, reference: SliceTables, label_key: str, request: Request
) -> tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float64]]:
    """Fit networks to spots simulated from a reference, which read components of expression.

    Returns fields of a head, and what it finds of held-out spots, (n, n_types), and the truth. Spots are simulated in two rounds. The first takes all types for equally frequent and all genes
    for equally well seen by both technologies. What a network that is fitted to it finds in the query
    on average tells how frequent types are and, with that, how technologies differ. The second
    round simulates half of that composition and half of equal frequencies, so that rare types are
    still learnt; each network holds out other spots of it.
    """
    options, seed = request.options, request.seed
    n_components = _N_COMPONENTS if options.n_components is None else options.n_components
    check_whole_number("n_components", n_components, least=1)
    with naming("the reference", adata="reference"):
        labels = read_labels(
            reference, label_key, missing=options.missing, min_share=options.min_share
        )
    genes, counts, cells = _shared_counts(query, reference, request)
    known = np.flatnonzero(labels.is_known)
    typed = TypedCells.sort(cells[known], labels.codes[known], len(labels.classes))
    logger.info(
        "%d genes are in both query and reference, which has %d types in %d cells.",
        *(len(genes), len(labels.classes), len(known)),
    )
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    if n_empty := int((totals == 0).sum()):
        warn(
            f"{n_empty} of {len(totals)} spots have no counts in the genes that the head reads; what "
            "is predicted for them says nothing."
        )

    device = choose_device(request.device)
    n_held_out = round(_HELD_OUT * options.spots.n_spots)
    equal = composition = np.full(typed.n_types, 1 / typed.n_types)
    scale: NDArray[Any] = np.ones(len(genes))
    show = request.show_progress_bar
    with counter(1 + _N_NETWORKS, "fit head", "network", show=show) as advance:
        for number, n_networks in enumerate((1, _N_NETWORKS)):
            spots = simulate_spots(
                typed,
                depths=totals[totals > 0],
                gene_scale=scale,
                composition=composition,
                rules=options.spots,
                seed=2 * seed + number,
            )
            components = ExpressionComponents.fit(spots.counts, genes, n_components)
            values = components.of_counts(spots.counts)
            targets = Targets("proportions", spots.proportions.astype(np.float32), typed.n_types)
            fits, held_out = [], []
            for part in range(n_networks):
                rows = np.roll(np.arange(len(values)), part * n_held_out)
                one = fit_head(
                    values,
                    targets,
                    fitted=rows[:-n_held_out],
                    held_out=rows[-n_held_out:],
                    training=_TRAINING,
                    seed=seed + _SEED_STEP * part,
                    device=device,
                )
                fits.append(one)
                held_out.append(rows[-n_held_out:])
                advance(1)
            if not number:
                first = apply_head(fits[0].head, components.of_counts(counts), "proportions")
                usual = first.mean(axis=0, dtype=np.float64)
                usual /= usual.sum()
                mean = np.asarray(counts.mean(axis=0), dtype=np.float64).ravel()
                scale = gene_scales(mean, len(totals), typed.mean_counts(), usual)
                composition = (usual + equal) / 2
    rules = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options.spots).items()}
    own: dict[str, Any] = {"label_key": label_key, "n_neighbors": 0, "n_components": n_components}
    own["colors"] = colors_of(reference.tables, label_key)
    histories = [one.history.assign(network=k) for k, one in enumerate(fits)]
    fields = {
        "networks": tuple(one.head for one in fits),
        "reads": ("expression",) * len(fits),
        "weights": (1 / len(fits),) * len(fits),
        "outputs": labels.classes,
        "use_rep": (),
        "origin": {},
        "strategy": options.strategy,
        "params": {**request.record, **rules, **own},
        "split": {
            "how": "simulated",
            "n_fitted": options.spots.n_spots - n_held_out,
            "n_held_out": n_held_out,
        },
        "history": pd.concat(histories, ignore_index=True),
        "expression": components,
    }
    found = [
        apply_head(one.head, values[rows], "proportions")
        for one, rows in zip(fits, held_out, strict=True)
    ]
    true = spots.proportions[np.concatenate(held_out)]
    return fields, np.concatenate(found), true


def _shared_counts(
    query: SliceTables, reference: SliceTables, request: Request
) -> tuple[list[Gene], sparse.csr_matrix, sparse.csr_matrix]:
    """Genes with counts in all tables of both, and the counts of both over these."""
    names = [read_columns(slices) for slices in (query, reference)]
    genes = choose_panel(names[1], query=names[0])
    matrices = []
    for slices, tables, layer in (
        (query, names[0], request.layer),
        (reference, names[1], request.options.reference_layer),
    ):
        parts = []
        for k, columns in enumerate(tables):
            with slices.naming(k):
                wanted = [columns.same_gene(gene) for gene in genes]
                parts.append(read_genes(slices.tables[k], wanted, layer))
        matrices.append(sparse.vstack(parts, format="csr"))
    counts, cells = matrices
    seen = [np.asarray(matrix.sum(axis=0)).ravel() > 0 for matrix in matrices]
    both = np.flatnonzero(seen[0] & seen[1])
    if len(both) < _MIN_GENES:
        first, other = query.tables[0], reference.tables[0]
        examples = [", ".join(map(str, one.var_names[:3])) for one in (first, other)]
        raise ValueError(
            f"Query and reference share {len(both)} genes with counts in both; at least "
            f"{_MIN_GENES} are needed. The query has {first.n_vars} genes ({examples[0]}), the "
            f"reference {other.n_vars} ({examples[1]}). Are both raw counts with gene names?"
        )
    return [genes[k] for k in both], counts[:, both], cells[:, both]
