"""Learning to deconvolve from a single-cell reference: spots simulated to match the query."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._logging import logger
from stofm._messages import naming, warn
from stofm.genes.vocabulary import embedded_vocabulary
from stofm.heads.embeddings import counts_layer
from stofm.heads.expression import ExpressionComponents
from stofm.heads.gene_columns import GeneColumns, choose_panel, selector
from stofm.heads.labels import read_labels
from stofm.heads.network import HeadTraining, apply_head, fit_head
from stofm.heads.options import check_whole_number
from stofm.heads.targets import Targets
from stofm.nn import choose_device
from stofm.spatial.spots import TypedCells, gene_scales, simulate_spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.gene_columns import Gene
    from stofm.heads.network import FittedHead
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.spatial.spots import SimulatedSpots

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


class FittedToSpots(NamedTuple):
    """Fields of a head, and what it finds of held-out simulated spots, (n, n_types), and the truth."""

    fields: dict[str, Any]
    found: NDArray[np.float32]
    true: NDArray[np.float64]


def fit_simulated(
    query: SliceTables, reference: SliceTables, label_key: str, request: Request
) -> FittedToSpots:
    """Fit networks to spots simulated from a reference, which read components of expression.

    Spots are simulated in two rounds. The first takes all types for equally frequent and all genes
    for equally well seen by both technologies. What a network that is fitted to it finds in the query
    on average tells how frequent types are and, with that, how technologies differ. The second
    round simulates half of that composition and half of equal frequencies, so that rare types are
    still learnt; each network holds out other spots of it.
    """
    options, seed = request.options, request.seed
    with naming("the reference", adata="reference"):
        labels = read_labels(
            reference, label_key, missing=options.missing, min_share=options.min_share
        )
    genes, counts, cells = _shared_counts(query, reference, request)
    known = np.flatnonzero(labels.is_known)
    typed = TypedCells.sort(cells[known], labels.codes[known], len(labels.classes))
    logger.info(
        "%d genes are in both query and reference, which has %d types in %d cells.",
        len(genes),
        len(labels.classes),
        len(known),
    )
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    if n_empty := int((totals == 0).sum()):
        warn(
            f"{n_empty} of {len(totals)} spots have no counts in the genes that the head reads; what "
            "is predicted for them says nothing."
        )
    mean = np.asarray(counts.mean(axis=0), dtype=np.float64).ravel()
    n_components = _N_COMPONENTS if options.n_components is None else options.n_components
    check_whole_number("n_components", n_components, least=1)

    def simulate(scale: NDArray[Any], composition: NDArray[Any], seed: int) -> SimulatedSpots:
        return simulate_spots(
            typed,
            depths=totals[totals > 0],
            gene_scale=scale,
            composition=composition,
            rules=options.spots,
            seed=seed,
        )

    equal = np.full(typed.n_types, 1 / typed.n_types)
    spots = simulate(np.ones(len(genes)), equal, 2 * seed)
    components = ExpressionComponents.fit(spots.counts, genes, n_components)
    first = _fit(components.of_counts(spots.counts), spots, seed, request)
    found = apply_head(first.head, components.of_counts(counts), "proportions")
    composition = found.mean(axis=0, dtype=np.float64)
    composition /= composition.sum()
    scale = gene_scales(mean, len(totals), typed.mean_counts(), composition)
    spots = simulate(scale, (composition + equal) / 2, 2 * seed + 1)
    components = ExpressionComponents.fit(spots.counts, genes, n_components)
    values = components.of_counts(spots.counts)
    fits, held_out = [], []
    for k in range(_N_NETWORKS):
        fits.append(_fit(values, spots, seed + _SEED_STEP * k, request, part=k))
        rows = _parts(len(values), k)[1]
        found = apply_head(fits[-1].head, values[rows], "proportions")
        held_out.append((found, spots.proportions[rows]))
    rules = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options.spots).items()}
    n_fitted, n_held_out = map(len, _parts(options.spots.n_spots))
    fields = {
        "networks": tuple(one.head for one in fits),
        "reads": ("expression",) * len(fits),
        "weights": (1 / len(fits),) * len(fits),
        "outputs": labels.classes,
        "use_rep": (),
        "origin": {},
        "strategy": options.strategy,
        "params": {
            **request.record,
            **rules,
            "label_key": label_key,
            "n_neighbors": 0,
            "n_components": n_components,
        },
        "split": {"how": "simulated", "n_fitted": n_fitted, "n_held_out": n_held_out},
        "history": pd.concat(
            [one.history.assign(network=k) for k, one in enumerate(fits)], ignore_index=True
        ),
        "expression": components,
    }
    return FittedToSpots(fields, *(np.concatenate(part) for part in zip(*held_out, strict=True)))


def _parts(n_spots: int, part: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Simulated spots to fit, and one of their tenths to hold out."""
    rows = np.roll(np.arange(n_spots), part * round(_HELD_OUT * n_spots))
    fitted, held_out = np.split(rows, [n_spots - round(_HELD_OUT * n_spots)])
    return fitted, held_out


def _fit(
    values: NDArray[np.float32],
    spots: SimulatedSpots,
    seed: int,
    request: Request,
    *,
    part: int = 0,
) -> FittedHead:
    proportions = spots.proportions.astype(np.float32)
    fitted, held_out = _parts(len(values), part)
    return fit_head(
        values,
        Targets("proportions", proportions, proportions.shape[1]),
        fitted=fitted,
        held_out=held_out,
        training=_TRAINING,
        seed=seed,
        device=choose_device(request.device),
    )


def _shared_counts(
    query: SliceTables, reference: SliceTables, request: Request
) -> tuple[list[Gene], sparse.csr_matrix, sparse.csr_matrix]:
    """Genes with counts in all tables of both, and the counts of both over these."""
    vocabulary = embedded_vocabulary()
    names = [
        slices.each(lambda table: GeneColumns.read(table, vocabulary, must_map=False))
        for slices in (query, reference)
    ]
    genes = choose_panel(names[1], (), names[0]).inputs
    layers = (request.layer, request.options.reference_layer)
    counts, cells = (
        sparse.vstack(
            [_counts_of(slices, k, own, genes, layer) for k, own in enumerate(columns)],
            format="csr",
        )
        for slices, columns, layer in zip((query, reference), names, layers, strict=True)
    )
    seen = [np.asarray(matrix.sum(axis=0)).ravel() > 0 for matrix in (counts, cells)]
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


def _counts_of(
    slices: SliceTables,
    number: int,
    columns: GeneColumns,
    genes: Sequence[Gene],
    layer: str | None,
) -> sparse.csr_matrix:
    table = slices.tables[number]
    choice = selector([columns.same_gene(gene) for gene in genes], table.n_vars)
    with slices.naming(number):
        blocks = read_counts(table, layer=counts_layer(table, layer))
        return sparse.vstack([block @ choice for block in blocks], format="csr")
