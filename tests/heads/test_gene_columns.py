"""Which columns of different AnnData are the same gene."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stofm.heads.genes import (
    Gene,
    GeneColumns,
    choose_panel,
    selector,
    warn_of_few_shared,
)


def columns(vocabulary, names, **others):
    """Columns of an AnnData with these names."""
    adata = AnnData(np.ones((3, len(names))), var=pd.DataFrame(others, index=names))
    return GeneColumns.read(adata, vocabulary, must_map=False)


@pytest.fixture
def ensembl(vocabulary):
    """The first 20 genes by id, and a probe that no vocabulary has."""
    return columns(vocabulary, [*vocabulary.gene_ids[:20], "probe"])


@pytest.fixture
def symbols(vocabulary):
    """The genes 5 to 24 by symbol, and the probe."""
    return columns(vocabulary, ["probe", *vocabulary.symbols[5:25]])


def test_few_shared_genes_are_told() -> None:
    warn_of_few_shared(5, [10, 3000])
    with pytest.warns(
        UserWarning, match="4 genes are shared by all 2 AnnData, which have 10, 3000"
    ):
        warn_of_few_shared(4, [10, 3000])


def test_genes_meet_by_id_or_name(ensembl, symbols, vocabulary):
    ids = vocabulary.gene_ids
    assert ensembl.genes[5] == Gene(ids[5], ids[5])
    assert symbols.genes[1] == Gene("GENE6", ids[5])
    assert symbols.same_gene(ensembl.genes[5]) == [1]
    assert symbols.same_gene(ensembl.genes[20]) == [0]
    assert symbols.same_gene(ensembl.genes[4]) == []


def test_a_gene_without_id_meets_one_with_id_by_name(vocabulary):
    named = columns(vocabulary, vocabulary.symbols[:20])
    unknown = GeneColumns(tuple(Gene(gene.name, "") for gene in named.genes), ((),) * 20)
    assert unknown.same_gene(named.genes[3]) == [3]
    assert named.same_gene(unknown.genes[3]) == [3]


def test_all_columns_of_a_gene_are_found(vocabulary):
    twice = columns(vocabulary, [*vocabulary.gene_ids[:12], vocabulary.symbols[3]])
    assert twice.same_gene(twice.genes[3]) == [3, 12]
    assert twice.measured(twice.genes[3]) == [3]
    assert twice.measured(twice.genes[12]) == [12]
    assert twice.measured(Gene("another name", vocabulary.gene_ids[3])) == [3, 12]


def test_panel_has_what_all_share_but_for_the_targets(ensembl, symbols):
    target = symbols.find("GENE8")
    panel = choose_panel([ensembl], [target], [symbols])
    assert [gene.id for gene in panel.inputs[:-1]] == [
        ensembl.genes[k].id for k in range(5, 20) if k != 7
    ]
    assert panel.inputs[-1].name == "probe"


def test_panel_has_no_second_column_of_a_target(vocabulary):
    twice = columns(vocabulary, [*vocabulary.gene_ids[:12], vocabulary.symbols[3]])
    panel = choose_panel([twice], [twice.genes[3]])
    assert vocabulary.gene_ids[3] not in {gene.key for gene in panel.inputs}
    assert len(panel.inputs) == 11


def test_no_shared_genes(vocabulary):
    first = columns(vocabulary, vocabulary.gene_ids[:20])
    second = columns(vocabulary, vocabulary.gene_ids[20:40])
    with pytest.raises(ValueError, match=r"No gene is left to read.*ENSG00000000021"):
        choose_panel([first], [first.genes[0]], [second])


def test_selector_adds_up_columns():
    counts = np.arange(8).reshape(2, 4)
    assert (counts @ selector([[0, 3], [], [2]], 4)).tolist() == [[3, 0, 2], [11, 0, 6]]
