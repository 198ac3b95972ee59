"""Which columns of different AnnData are the same gene."""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._edge.gene_mapping import VAR_NAMES, find_columns, names_by_source
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData

    from stofm._edge.gene_mapping import Columns
    from stofm.genes import GeneVocabulary


#: With a smaller share of the smallest table's genes, names may not match.
_FEW_SHARED: Final = 0.5


@dataclass(frozen=True)
class Gene:
    """A gene, as it is called and as a vocabulary knows it.

    Attributes
    ----------
    name
        As the user or the AnnData calls it.
    id
        Gene id of the vocabulary; ``""`` for a gene that it lacks.
    """

    name: str
    id: str

    @property
    def key(self) -> str:
        """What tells it from other genes: its id, else its name."""
        return self.id or self.name


@dataclass(frozen=True, eq=False)
class GeneColumns:
    """The names of an AnnData's columns, to find genes by.

    Attributes
    ----------
    genes
        Gene of each column, called by its ``var_names`` entry.
    other_names
        Further names of each column, from columns of ``var`` that hold names of genes.
    """

    genes: tuple[Gene, ...]
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

        A mapping that :func:`stofm.pp.map_genes` wrote for this vocabulary is used.

        Parameters
        ----------
        must_map
            Whether genes have to be in the vocabulary. Without it, an AnnData of which it knows
            too few is matched by name alone.
        name
            What the AnnData is, in messages.
        """
        sources = names_by_source(adata)
        names = sources.pop(VAR_NAMES)
        others = tuple(zip(*sources.values(), strict=True))
        ids = _vocabulary_ids(adata, vocabulary, must_map=must_map, name=name)
        genes = tuple(Gene(name, id_) for name, id_ in zip(names, ids, strict=True))
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
        found: defaultdict[str, list[int]] = defaultdict(list)
        for column, (gene, others) in enumerate(zip(self.genes, self.other_names, strict=True)):
            for name in dict.fromkeys((gene.name, *others)):
                if name:
                    found[name].append(column)
        return dict(found)

    @cached_property
    def _by_id(self) -> Mapping[str, list[int]]:
        found: defaultdict[str, list[int]] = defaultdict(list)
        for column, gene in enumerate(self.genes):
            if gene.id:
                found[gene.id].append(column)
        return dict(found)


def map_columns(adata: AnnData, vocabulary: GeneVocabulary, name: str) -> Columns:
    """Find the gene of each column, by the mapping that :func:`stofm.pp.map_genes` wrote if any.

    Parameters
    ----------
    name
        What the AnnData is, in messages.
    """
    try:
        return find_columns(adata, vocabulary, species="auto", gene_key=None, orthologs=None)
    except ValueError as error:
        raise ValueError(
            f"Genes of {name}: {error} These are options of st.pp.map_genes(adata, ...); call it "
            f"on {name} first, and its result is used here."
        ) from error


def _vocabulary_ids(
    adata: AnnData, vocabulary: GeneVocabulary, *, must_map: bool, name: str
) -> list[str]:
    try:
        columns = map_columns(adata, vocabulary, name)
    except ValueError:
        if must_map:
            raise
        return [""] * adata.n_vars
    ids = dict(zip(vocabulary.tokens.tolist(), vocabulary.gene_ids.tolist(), strict=True))
    return [ids.get(token, "") for token in columns.token_ids.tolist()]


@dataclass(frozen=True)
class GenePanel:
    """Which genes are read and which are learnt.

    Attributes
    ----------
    inputs
        Genes that the model reads, each with another key.
    targets
        Genes to learn; none shares a column with the inputs.
    """

    inputs: tuple[Gene, ...]
    targets: tuple[Gene, ...]


def choose_panel(
    training: Sequence[GeneColumns],
    targets: Sequence[Gene],
    query: Sequence[GeneColumns] | None = None,
) -> GenePanel:
    """Take as inputs all genes that every AnnData has, but for the targets.

    Parameters
    ----------
    training
        Columns of the AnnData to learn from.
    targets
        Genes to learn.
    query
        Columns of the AnnData to impute in, if it is known.
    """
    tables = [*training, *(query or ())]
    hidden = [{c for gene in targets for c in table.same_gene(gene)} for table in tables]
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
        return GenePanel(tuple(inputs.values()), tuple(targets))
    examples = "; ".join(", ".join(repr(g.name) for g in table.genes[:3]) for table in tables)
    if not targets:
        raise ValueError(
            f"The {len(tables)} AnnData share no gene. Their genes are, for example: {examples}. "
            "Give all of them Ensembl ids or symbols, see st.pp.map_genes."
        )
    raise ValueError(
        f"No gene is left to read: the {len(tables)} AnnData share none besides the {len(targets)} "
        f"genes to impute. Their genes are, for example: {examples}. Hold out fewer genes, or give "
        "all AnnData Ensembl ids or symbols, see st.pp.map_genes."
    )


def warn_of_few_shared(n_shared: int, n_genes: Sequence[int]) -> None:
    """Warn if tables share few of the genes that the smallest of them has."""
    if n_shared < _FEW_SHARED * min(n_genes):
        warn(
            f"{n_shared} genes are shared by all {len(n_genes)} AnnData, which have "
            f"{', '.join(map(str, n_genes[:5]))}: the others are not read. If more should be shared, "
            "give all of them Ensembl ids or symbols, see st.pp.map_genes."
        )


def selector(columns: Sequence[Sequence[int]], n_vars: int) -> sparse.csr_matrix:
    """0/1 matrix (n_vars, n_genes) that sums columns gene by gene."""
    rows = np.array([c for own in columns for c in own], dtype=np.int64)
    genes = np.repeat(np.arange(len(columns)), [len(own) for own in columns])
    ones = np.ones(len(rows), dtype=np.float32)
    return sparse.csr_matrix((ones, (rows, genes)), shape=(n_vars, len(columns)))
