"""Genes that heads for imputation read and learn, and tables reduced to them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._keys import Obsm
from stofm._messages import warn
from stofm.genes import map_gene_ids
from stofm.genes.mapping import clean_names
from stofm.heads.embeddings import MADE_BY_EMBED, counts_layer, places_entry, read_places
from stofm.heads.gene_columns import Gene, selector
from stofm.heads.options import checked_reps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stofm.genes import GeneVocabulary
    from stofm.heads.gene_columns import GeneColumns
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables

#: Column of ``obs`` that tells slices apart in the reduced tables.
_SLICE: Final = "slice"


def find_genes(
    names: Iterable[str], training: Sequence[GeneColumns], vocabulary: GeneVocabulary
) -> tuple[Gene, ...]:
    """Find genes by any of their names, and by their ids in a vocabulary."""
    asked = clean_names([names] if isinstance(names, str) else names)
    if not asked or len(set(asked)) < len(asked):
        twice = sorted({name for name in asked if asked.count(name) > 1})[:3]
        what = f"{twice} occur more than once" if twice else "there are none"
        raise ValueError(f"genes must name the genes to impute, each once; {what}.")
    ids = map_gene_ids(asked, vocabulary).gene_id.tolist()
    found = [
        next(filter(None, (table.find(name) for table in training)), None) or Gene(name, id_)
        for name, id_ in zip(asked, ids, strict=True)
    ]
    missing = [g for g in found if not all(table.measured(g) for table in training)]
    if missing:
        near = {g.name: training[0].near(g.name) for g in missing[:3]}
        hints = "; ".join(f"{name!r} (near: {like or 'nothing'})" for name, like in near.items())
        raise ValueError(
            f"{len(missing)} of {len(found)} genes are not in every AnnData to learn from, for "
            f"example {hints}. Only genes that all of them measure can be imputed."
        )
    return tuple(found)


def new_genes(training: Sequence[GeneColumns], query: Sequence[GeneColumns]) -> tuple[Gene, ...]:
    """Genes that every AnnData to learn from has and one of the query's lacks."""
    found = {
        gene.name: gene
        for gene in training[0].genes
        if gene.name
        and not all(table.same_gene(gene) for table in query)
        and all(table.measured(gene) for table in training[1:])
    }
    if found:
        return tuple(found.values())
    raise ValueError(
        "The query has all genes that the reference measures, so there is nothing to impute. To "
        "check predictions against measured genes, name them: genes=[...]."
    )


def reduce_tables(
    slices: SliceTables,
    columns: Sequence[GeneColumns],
    panel: Sequence[Gene],
    request: Request,
    *,
    learnt: Sequence[Gene] = (),
) -> tuple[SliceTables, Request, list[sparse.csr_matrix]]:
    """Tables of the panel's genes alone, how to read them, and counts of the `learnt` genes.

    Nothing else of the given tables is in them but places, slices, and representations that no
    model makes. Counts are read block by block, and columns of one gene are added up.
    """
    import anndata
    import pandas as pd

    named = np.empty(slices.n_obs, dtype=object)
    for name, rows in zip(slices.names, slices.rows, strict=True):
        named[rows] = name
    reps = checked_reps(request.use_rep)
    tables, counts = [], []
    for k, (table, own, place) in enumerate(
        zip(slices.tables, columns, slices.places, strict=True)
    ):
        there = [gene for gene in panel if own.same_gene(gene)]
        read = selector([own.same_gene(gene) for gene in there], table.n_vars)
        wanted = selector([own.measured(gene) for gene in learnt], table.n_vars)
        obsm: dict[str, Any] = {}
        with slices.naming(k):
            blocks = read_counts(table, layer=counts_layer(table, request.layer))
            both = [(block @ read, block @ wanted) for block in blocks]
            where = places_entry(table, request.spatial_key)
            if where in table.obsm:
                obsm[request.spatial_key] = table.obsm[where]
            if Obsm.X in reps:
                obsm[request.spatial_key] = read_places(table, where)
        obsm |= {rep: table.obsm[rep] for rep in reps if rep not in MADE_BY_EMBED}
        x, y = (
            sparse.vstack(parts, format="csr", dtype=np.float32)
            for parts in zip(*both, strict=True)
        )
        obs = pd.DataFrame({_SLICE: pd.Categorical(named[place])}, index=table.obs_names)
        var = pd.DataFrame(index=[gene.key for gene in there])
        tables.append(anndata.AnnData(x, obs=obs, var=var, obsm=obsm))
        counts.append(y)
    reduced = replace(slices, tables=tuple(tables))
    return reduced, replace(request, library_key=_SLICE, layer=None), counts


def read_columns(
    slices: SliceTables, vocabulary: GeneVocabulary, *, must_map: bool, name: str
) -> list[GeneColumns]:
    """Genes of each table; `name` is what they are called in messages."""
    from stofm.heads.gene_columns import GeneColumns

    return slices.each(
        lambda table: GeneColumns.read(table, vocabulary, must_map=must_map, name=name)
    )


def check_overlap(columns: GeneColumns, panel: Sequence[Gene], *, least: float, low: float) -> None:
    """Refuse a query that lacks nearly all genes of a panel, and warn if it lacks much."""
    missing = [gene.name for gene in panel if not columns.same_gene(gene)]
    share = 1 - len(missing) / len(panel)
    found = (
        f"The query has {len(panel) - len(missing)} of the {len(panel)} genes that the head reads "
        f"({share:.0%}); missing are, for example, {missing[:3]}."
    )
    if share < least:
        raise ValueError(
            f"{found} At least {least:.0%} are needed. Fit a head on the genes that both have: "
            "st.tl.impute(query, reference=training)."
        )
    if share < low:
        warn(
            f"{found} Its embeddings differ from those that the head was fitted to; "
            "st.tl.impute(query, reference=training) fits one on the genes that both have."
        )
