"""Genes that heads read and learn, and tables reduced to them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from stofm._keys import Obsm
from stofm.heads import genes
from stofm.heads.genes import (
    Gene,
    GeneColumns,
    check_overlap,
    choose_panel,
    find_genes,
    new_genes,
    read_columns,
    reduce_tables,
    selector,
    warn_of_few_shared,
)
from stofm.heads.request import Request, resolve_slices


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
    assert [gene.id for gene in panel[:-1]] == [ensembl.genes[k].id for k in range(5, 20) if k != 7]
    assert panel[-1].name == "probe"


def test_panel_has_no_second_column_of_a_target(vocabulary):
    twice = columns(vocabulary, [*vocabulary.gene_ids[:12], vocabulary.symbols[3]])
    panel = choose_panel([twice], [twice.genes[3]])
    assert vocabulary.gene_ids[3] not in {gene.key for gene in panel}
    assert len(panel) == 11


def test_no_shared_genes(vocabulary):
    first = columns(vocabulary, vocabulary.gene_ids[:20])
    second = columns(vocabulary, vocabulary.gene_ids[20:40])
    with pytest.raises(ValueError, match=r"No gene is left to read.*ENSG00000000021"):
        choose_panel([first], [first.genes[0]], [second])


def test_selector_adds_up_columns():
    counts = np.arange(8).reshape(2, 4)
    assert (counts @ selector([[0, 3], [], [2]], 4)).tolist() == [[3, 0, 2], [11, 0, 6]]


def test_genes_are_found_by_any_name(vocabulary, ensembl, symbols):
    ids = vocabulary.gene_ids
    numbered = columns(vocabulary, ids[:20], rank=[str(k) for k in range(20)])
    assert find_genes(["GENE8", ids[9]], [ensembl, symbols], vocabulary) == (
        Gene("GENE8", ids[7]),
        Gene(ids[9], ids[9]),
    )
    assert find_genes("probe", [ensembl], vocabulary) == (Gene("probe", ""),)
    assert numbered.find("3") is None  # numbers are no names
    named = columns(vocabulary, ids[:20], nickname=[f"x{k}" for k in range(20)])
    assert find_genes(["x3"], [named], vocabulary) == (Gene("x3", ids[3]),)
    assert named.measured(Gene("x3", ids[3])) == [3]


def test_genes_that_are_not_there(vocabulary, ensembl, symbols):
    with pytest.raises(ValueError, match=r"1 of 2 genes are not in every.*'prob'.*'probe'"):
        find_genes(["prob", "GENE8"], [symbols], vocabulary)
    with pytest.raises(ValueError, match="1 of 1 genes are not in every"):
        find_genes(["GENE2"], [ensembl, symbols], vocabulary)
    with pytest.raises(ValueError, match=r"\['GENE8'\] occur more than once"):
        find_genes(["GENE8", "GENE9", "GENE8"], [symbols], vocabulary)
    with pytest.raises(ValueError, match="there are none"):
        find_genes([], [symbols], vocabulary)


def test_new_genes_are_those_that_a_query_lacks(ensembl, symbols):
    assert [gene.id for gene in new_genes([symbols], [ensembl])] == [
        gene.id for gene in symbols.genes[16:]
    ]
    with pytest.raises(ValueError, match="nothing to impute"):
        new_genes([symbols], [symbols])


def reduced(adata, vocabulary, learnt, **options):
    """The table reduced to its first 30 genes, and counts of some to learn."""
    slices = resolve_slices(adata, "library")
    known = read_columns(slices, vocabulary, must_map=True, name="the data")
    request = Request(library_key="library", **options)
    panel = known[0].genes[:30]
    found, own, counts = reduce_tables(slices, known, panel, request, learnt=learnt(known[0]))
    return found.tables[0], own, counts[0]


def some(columns):
    return columns.genes[30:33]


def test_nothing_but_the_panel_places_and_slices_is_kept(adata, vocabulary):
    adata.obsm["X_pca"] = adata.obsm["X_other"] = np.ones((184, 3))
    bare, own, counts = reduced(adata, vocabulary, some, use_rep=("X_pca", Obsm.X))
    np.testing.assert_array_equal(bare.X.toarray(), adata.X[:, :30].toarray())
    np.testing.assert_array_equal(counts.toarray(), adata.X[:, 30:33].toarray())
    assert bare.obs_names.equals(adata.obs_names)
    assert set(bare.obsm) == {Obsm.SPATIAL, "X_pca"}
    assert bare.obs[own.library_key].astype(str).tolist() == adata.obs["library"].tolist()
    assert not bare.uns
    assert not bare.layers
    del adata.obsm[Obsm.SPATIAL]
    with pytest.raises(KeyError, match=r"no obsm\['spatial'\]"):
        reduced(adata, vocabulary, some)
    assert not reduced(adata, vocabulary, some, use_rep=Obsm.X_CELL)[0].obsm


@pytest.mark.parametrize("form", [sparse.csc_matrix, np.asarray, sparse.csr_array])
def test_any_matrix_and_layer(adata, vocabulary, form):
    expected = reduced(adata, vocabulary, some)
    dense = adata.X.toarray()
    adata.layers["raw"] = dense if form is np.asarray else form(dense)
    adata.X = dense / 3
    bare, own, counts = reduced(adata, vocabulary, some, layer="raw")
    assert own.layer is None
    assert (bare.X != expected[0].X).nnz == 0
    assert (counts != expected[2]).nnz == 0


def test_columns_of_one_gene_are_added_up(adata, vocabulary):
    # The last columns are the first gene and the first to learn, under another name.
    names = adata.var_names.tolist()
    names[-2:] = vocabulary.symbols[[0, 30]].tolist()
    adata.var_names = names
    bare, _, counts = reduced(adata, vocabulary, some)
    dense = adata.X.toarray()
    np.testing.assert_array_equal(bare.X[:, 0].toarray().ravel(), dense[:, 0] + dense[:, -2])
    # Learnt is the column that is called so.
    np.testing.assert_array_equal(counts.toarray(), dense[:, 30:33])


def test_a_query_must_have_some_of_the_panel(ensembl, symbols, monkeypatch):
    panel = ensembl.genes
    check_overlap(ensembl, panel)
    monkeypatch.setattr(genes, "_LOW_SHARE", 0.9)
    with pytest.warns(UserWarning, match=r"has 16 of the 21 genes that the head reads \(76%\)"):
        check_overlap(symbols, panel)
    monkeypatch.setattr(genes, "_LEAST_SHARE", 0.8)
    with pytest.raises(ValueError, match="At least 80% are needed"):
        check_overlap(symbols, panel)
