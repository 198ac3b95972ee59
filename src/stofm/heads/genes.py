"""Genes that heads read and learn: which columns of different AnnData they are, and their counts."""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import VAR_NAMES, find_columns, names_by_source
from stofm._keys import Obsm
from stofm._messages import warn
from stofm.genes import embedded_vocabulary, map_gene_ids
from stofm.genes.mapping import clean_names
from stofm.heads.embeddings import MADE_BY_EMBED, counts_layer, places_entry, read_places

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.heads.request import Request, SliceTables

#: With a smaller share of the smallest table's genes, names may not match.
_FEW_SHARED: Final = 0.5
#: A query with a smaller share of a head's panel is refused, or warned of.
_LEAST_SHARE: Final = 0.1
_LOW_SHARE: Final = 0.5
#: Column of ``obs`` that tells slices apart in the reduced tables.
_SLICE: Final = "slice"


class Gene(NamedTuple):
    """A gene, as the user or the AnnData calls it, and its id in a vocabulary; ``""`` without."""

    name: str
    id: str

    @property
    def key(self) -> str:
        """What tells it from other genes: its id, else its name."""
        return self.id or self.name


@dataclass(frozen=True, eq=False)
class GeneColumns:
    """The names of an AnnData's columns, to find genes by."""

    genes: tuple[Gene, ...]  # gene of each column, called by its ``var_names`` entry
    #: Further names of each column, from columns of ``var`` that hold names of genes.
    other_names: tuple[tuple[str, ...], ...]

    @classmethod
    def read(
        cls,
        adata: AnnData,
        vocabulary: GeneVocabulary,
        *,
        must_map: bool = True,
        name: str = "the AnnData",
    ) -> GeneColumns:
        """Read the names of an AnnData's columns, and find them in a vocabulary.

        A mapping that :func:`stofm.pp.map_genes` wrote for this vocabulary is used. Unless genes
        `must_map`, an AnnData of which the vocabulary knows too few is matched by name alone. `name`
        is what the AnnData is, in messages.
        """
        sources = names_by_source(adata)
        names = sources.pop(VAR_NAMES)
        others = tuple(zip(*sources.values(), strict=True))
        ids = [""] * adata.n_vars
        try:
            tokens = find_columns(adata, vocabulary).token_ids.tolist()
        except ValueError as error:
            if must_map:
                raise ValueError(
                    f"Genes of {name}: {error} These are options of st.pp.map_genes(adata, ...); "
                    f"call it on {name} first, and its result is used here."
                ) from error
        else:
            known = dict(zip(vocabulary.tokens.tolist(), vocabulary.gene_ids.tolist(), strict=True))
            ids = [known.get(token, "") for token in tokens]
        genes = tuple(map(Gene, names, ids))
        return cls(genes, others or ((),) * len(genes))

    def same_gene(self, gene: Gene) -> list[int]:
        """All columns of a gene: those with its id, and those without id that share its name."""
        named = self._by_name.get(gene.name, [])
        if not gene.id:
            return named
        nameless = (column for column in named if not self.genes[column].id)
        return sorted({*self._by_id.get(gene.id, []), *nameless})

    def columns_of(self, genes: Iterable[Gene]) -> list[int]:
        """All columns of some genes, each once."""
        return sorted({column for gene in genes for column in self.same_gene(gene)})

    def measured(self, gene: Gene) -> list[int]:
        """Columns whose counts are the gene's: those called so, or all with its id."""
        called = [c for c in self._by_name.get(gene.name, []) if self.genes[c].name == gene.name]
        return called or self.same_gene(gene)

    def find(self, name: str) -> Gene | None:
        """Gene of a column that has a name, under that name; None if none has it."""
        columns = self._by_name.get(name, [])
        if not columns:
            return None
        called = [c for c in columns if self.genes[c].name == name]
        return Gene(name, self.genes[(called or columns)[0]].id)

    def near(self, name: str) -> list[str]:
        """Up to three names of columns that resemble a name."""
        lower = {known.lower(): known for known in self._by_name}
        found = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.7)
        return [lower[one] for one in found]

    @cached_property
    def _by_name(self) -> Mapping[str, list[int]]:
        names = zip(self.genes, self.other_names, strict=True)
        return _columns_by([(gene.name, *others) for gene, others in names])

    @cached_property
    def _by_id(self) -> Mapping[str, list[int]]:
        return _columns_by([(gene.id,) for gene in self.genes])


def _columns_by(names: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Numbers of the columns with each name, but for empty ones."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for column, own in enumerate(names):
        for name in dict.fromkeys(filter(None, own)):
            found[name].append(column)
    return dict(found)


def read_columns(
    slices: SliceTables,
    vocabulary: GeneVocabulary | None = None,
    *,
    must_map: bool = False,
    name: str = "the AnnData",
) -> list[GeneColumns]:
    """Genes of each table, in the embedded vocabulary by default; see :meth:`GeneColumns.read`."""
    vocabulary = vocabulary or embedded_vocabulary()
    return slices.each(
        lambda table: GeneColumns.read(table, vocabulary, must_map=must_map, name=name)
    )


def choose_panel(
    training: Sequence[GeneColumns],
    targets: Sequence[Gene] = (),
    query: Sequence[GeneColumns] = (),
) -> tuple[Gene, ...]:
    """Genes to read, each with another key: all that every AnnData has, but for the targets.

    None of them shares a column with a target.
    """
    tables = [*training, *query]
    hidden = [set(table.columns_of(targets)) for table in tables]
    inputs: dict[str, Gene] = {}
    for gene in tables[0].genes:
        if not gene.key or gene.key in inputs:
            continue
        columns = [table.same_gene(gene) for table in tables]
        if all(columns) and not any(h & set(c) for h, c in zip(hidden, columns, strict=True)):
            inputs[gene.key] = gene
    if inputs:
        n_genes = [
            len({gene.key for c, gene in enumerate(table.genes) if gene.key and c not in own})
            for table, own in zip(tables, hidden, strict=True)
        ]
        warn_of_few_shared(len(inputs), n_genes)
        return tuple(inputs.values())
    examples = "; ".join(", ".join(repr(g.name) for g in table.genes[:3]) for table in tables)
    found = (
        f"No gene is left to read: the {len(tables)} AnnData share none besides the {len(targets)} "
        "genes to impute. Hold out fewer genes, or give"
        if targets
        else f"The {len(tables)} AnnData share no gene. Give"
    )
    raise ValueError(
        f"{found} all AnnData Ensembl ids or symbols, see st.pp.map_genes. Their genes are, for "
        f"example: {examples}."
    )


def warn_of_few_shared(n_shared: int, n_genes: Sequence[int]) -> None:
    """Warn if tables share few of the genes that the smallest of them has."""
    if n_shared < _FEW_SHARED * min(n_genes):
        warn(
            f"{n_shared} genes are shared by all {len(n_genes)} AnnData, which have "
            f"{', '.join(map(str, n_genes[:5]))}: the others are not used. If more should be shared, "
            "give all of them Ensembl ids or symbols, see st.pp.map_genes."
        )


def selector(columns: Sequence[Sequence[int]], n_vars: int) -> sparse.csr_matrix:
    """0/1 matrix (n_vars, n_genes) that sums columns gene by gene."""
    rows = np.array([c for own in columns for c in own], dtype=np.int64)
    genes = np.repeat(np.arange(len(columns)), [len(own) for own in columns])
    ones = np.ones(len(rows), dtype=np.float32)
    return sparse.csr_matrix((ones, (rows, genes)), shape=(n_vars, len(columns)))


def read_genes(
    adata: AnnData,
    columns: Sequence[Sequence[int]],
    layer: str | None,
    chosen: NDArray[np.bool_] | None = None,
) -> sparse.csr_matrix:
    """Counts of genes, (n_obs, n_genes), read block by block and summed over the columns of each.

    `layer` None is what was embedded. `chosen`, (n_obs,), are the rows to read, None for all.
    """
    return sparse.vstack(list(gene_blocks(adata, columns, layer, chosen)), format="csr")


def gene_blocks(
    adata: AnnData,
    columns: Sequence[Sequence[int]],
    layer: str | None,
    chosen: NDArray[np.bool_] | None = None,
) -> Iterator[sparse.csr_matrix]:
    """The blocks of :func:`read_genes`."""
    choice, start = selector(columns, adata.n_vars), 0
    for block in read_counts(adata, layer=counts_layer(adata, layer)):
        stop = start + block.shape[0]
        yield (block if chosen is None else block[chosen[start:stop]]) @ choice
        start = stop


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
    model makes.
    """
    import anndata
    import pandas as pd

    named = np.empty(slices.n_obs, dtype=object)
    for name, rows in zip(slices.names, slices.rows, strict=True):
        named[rows] = name
    tables, counts = [], []
    for k, (table, own, place) in enumerate(
        zip(slices.tables, columns, slices.places, strict=True)
    ):
        there = [gene for gene in panel if own.same_gene(gene)]
        wanted = [own.same_gene(gene) for gene in there] + [own.measured(gene) for gene in learnt]
        obsm: dict[str, Any] = {}
        with slices.naming(k):
            both = read_genes(table, wanted, request.layer).astype(np.float32)
            where = places_entry(table, request.spatial_key)
            if where in table.obsm:
                obsm[request.spatial_key] = table.obsm[where]
            if Obsm.X in request.reps:
                obsm[request.spatial_key] = read_places(table, where)
        obsm |= {rep: table.obsm[rep] for rep in request.reps if rep not in MADE_BY_EMBED}
        obs = pd.DataFrame({_SLICE: pd.Categorical(named[place])}, index=table.obs_names)
        var = pd.DataFrame(index=[gene.key for gene in there])
        tables.append(anndata.AnnData(both[:, : len(there)], obs=obs, var=var, obsm=obsm))
        counts.append(both[:, len(there) :])
    reduced = replace(slices, tables=tuple(tables))
    return reduced, replace(request, library_key=_SLICE, layer=None), counts


def check_overlap(columns: GeneColumns, panel: Sequence[Gene]) -> None:
    """Refuse a query that lacks nearly all genes of a panel, and warn if it lacks much."""
    missing = [gene.name for gene in panel if not columns.same_gene(gene)]
    share = 1 - len(missing) / len(panel)
    found = (
        f"The query has {len(panel) - len(missing)} of the {len(panel)} genes that the head reads "
        f"({share:.0%}); missing are, for example, {missing[:3]}."
    )
    if share < _LEAST_SHARE:
        raise ValueError(
            f"{found} At least {_LEAST_SHARE:.0%} are needed. Fit a head on the genes that both have: "
            "st.tl.impute(query, reference=training)."
        )
    if share < _LOW_SHARE:
        warn(
            f"{found} Its embeddings differ from those that the head was fitted to; "
            "st.tl.impute(query, reference=training) fits one on the genes that both have."
        )
