from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from stofm.genes import GeneMapping, GeneVocabulary, embedded_vocabulary, map_gene_ids
from stofm.genes.mapping import advice_for_names, spreadsheet_dates

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stofm.genes import GeneVocabulary


NEURON = {"ENSMUSG00000070570": "ENSG00000104888"}


@pytest.mark.parametrize(
    ("name", "row", "route"),
    [
        ("ENSG00000131095", 0, "id"),
        ("ENSG00000131095.7", 0, "id"),
        ("ENSMUSG00000020932", 0, "alias"),
        ("ENSMUSG00000020932.12", 0, "alias"),
        ("VGLUT1", 1, "alias"),
        ("ENSMUSG00000070570.4", 1, "ortholog"),
        ("S100B", 2, "symbol"),
        ("S100b", 2, "case"),
        ("Vglut1", 1, "case"),
    ],
)
def test_each_kind_of_id(vocabulary: GeneVocabulary, name: str, row: int, route: str) -> None:
    mapping = map_gene_ids(["nothing", name], vocabulary, orthologs=NEURON)
    assert mapping.gene_index.tolist() == [-1, row]
    assert mapping.gene_id.tolist() == ["", vocabulary.gene_ids[row]]
    assert mapping.token_id.tolist() == [-1, vocabulary.tokens[row]]
    assert mapping.routes == {route: 1}


def test_kinds_may_be_mixed(vocabulary: GeneVocabulary) -> None:
    ids = ["ENSG00000131095.7", "Mbp", "GAD1", None, "ENSMUSG00000070570", "Unknown1"]
    mapping = map_gene_ids(ids, vocabulary, orthologs=NEURON)
    assert mapping.gene_index.tolist() == [0, 4, 5, -1, 1, -1]
    assert mapping.species == "human and mouse"
    assert mapping.id_types == {
        "mouse symbols": 2,
        "human Ensembl ids with version": 1,
        "human symbols": 1,
        "missing names": 1,
        "mouse Ensembl ids": 1,
    }


def test_species_settles_what_is_looked_up(vocabulary: GeneVocabulary) -> None:
    ids = ["Gfap", "gfap", "ENSMUSG00000070570"]
    found = {
        species: map_gene_ids(ids, vocabulary, species=species, orthologs=NEURON).gene_index
        for species in ("auto", "human", "mouse")
    }
    assert found["auto"].tolist() == [0, -1, 1]
    assert found["human"].tolist() == [-1, -1, -1]
    assert found["mouse"].tolist() == [0, 0, 1]


def test_fallback_ids(vocabulary: GeneVocabulary) -> None:
    mapping = map_gene_ids(
        ["ENSG00000131095", None, "ENSG00000999999", ""],
        vocabulary,
        fallback_ids=["MBP", "MBP", "Gad1", "x_y"],
    )
    assert mapping.gene_index.tolist() == [0, 4, 5, -1]
    assert mapping.unmatched == ("x_y",)


def test_report(vocabulary: GeneVocabulary) -> None:
    ids = ["GFAP", "A", "B", "MBP", "C", "ENSG00000131095", "D", ""]
    counts = np.array([10, 1, 5, 20, 2, 0, 4, 8.0])
    mapping = map_gene_ids(ids, vocabulary, counts_per_gene=counts)
    assert (mapping.n_vars, mapping.n_matched, mapping.n_genes) == (8, 3, 2)
    assert mapping.counts_share == pytest.approx(30 / 50)
    assert mapping.unmatched == ("B", "D", "C")
    assert mapping.summary() == (
        "3 of 8 genes matched (2 different), 60.0% of the counts; species: human; found "
        "6 human symbols, 1 human Ensembl ids, 1 missing names; not matched, for example: B, D, C"
    )


def test_report_without_counts(vocabulary: GeneVocabulary) -> None:
    mapping = map_gene_ids(["GFAP", "A"], vocabulary)
    assert np.isnan(mapping.counts_share)
    assert "the counts" not in mapping.summary()
    assert np.isnan(replace(mapping, counts_per_gene=np.zeros(2)).counts_share)


@pytest.mark.parametrize(
    ("ids", "species"),
    [
        (["GFAP", "MBP"], "human"),
        (["Gfap", "Mbp", "ENSMUSG00000070570"], "mouse"),
        (["gfap_1", "mbp_1"], "unknown"),
        (["ENSDARG00000025301", "ENSDARG00000025302", "GFAP"], "unknown"),
        ([*["GFAP"] * 10, "Gfap"], "human"),
    ],
)
def test_species_of_a_slice(vocabulary: GeneVocabulary, ids: list[str], species: str) -> None:
    assert map_gene_ids(ids, vocabulary).species == species


def matched(n_matched: int, n_vars: int, vocabulary: GeneVocabulary) -> GeneMapping:
    return map_gene_ids(
        ["GFAP"] * n_matched + [f"Zf{i}" for i in range(n_vars - n_matched)], vocabulary
    )


@pytest.mark.parametrize(("n_matched", "n_vars"), [(1, 1), (4, 7), (10, 33), (10, 500), (41, 2050)])
def test_enough_genes(vocabulary: GeneVocabulary, n_matched: int, n_vars: int) -> None:
    matched(n_matched, n_vars, vocabulary).require_enough()


@pytest.mark.parametrize(("n_matched", "n_vars"), [(0, 1), (3, 7), (9, 33), (10, 501), (40, 2050)])
def test_too_few_genes(vocabulary: GeneVocabulary, n_matched: int, n_vars: int) -> None:
    with pytest.raises(ValueError, match=f"Only {n_matched} of {n_vars} genes are in the vocab"):
        matched(n_matched, n_vars, vocabulary).require_enough()


def test_message_says_what_was_found_and_what_to_do(vocabulary: GeneVocabulary) -> None:
    ids = [f"ENSDARG000000{i:05d}.2" for i in range(29)]
    with pytest.raises(ValueError, match="Only 0 of 29 genes") as caught:
        map_gene_ids(ids, vocabulary).require_enough()
    message = str(caught.value)
    assert "Found 29 Ensembl ids of another species (species: unknown)" in message
    assert "'ENSDARG00000000000.2', 'ENSDARG00000000001.2', 'ENSDARG00000000002.2'" in message
    for advice in ("`gene_key`", "`species`", "`orthologs`"):
        assert advice in message


def test_unusable_arguments(vocabulary: GeneVocabulary) -> None:
    with pytest.raises(ValueError, match="species must be 'auto', 'human' or 'mouse', found 'rat'"):
        map_gene_ids(["GFAP"], vocabulary, species="rat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 ids, but 2 fallback ids"):
        map_gene_ids(["GFAP"], vocabulary, fallback_ids=["a", "b"])
    with pytest.raises(ValueError, match=r"1 ids, but counts_per_gene is \(3,\)"):
        map_gene_ids(["GFAP"], vocabulary, counts_per_gene=np.ones(3))


def test_aliases_of_the_embedded_vocabulary_agree_with_the_ortholog_table(shared: Path) -> None:
    vocabulary = embedded_vocabulary()
    bare = replace(vocabulary, aliases={})
    mouse = [name for name in vocabulary.aliases if name.startswith("ENSMUSG")]
    table = shared / "vocab" / "mouse_human_orthologs.tsv.gz"
    by_table = map_gene_ids(mouse, bare, orthologs=table)
    by_alias = map_gene_ids(mouse, vocabulary)
    in_table = by_table.gene_index >= 0
    assert in_table.mean() > 0.95
    assert np.array_equal(by_table.gene_index[in_table], by_alias.gene_index[in_table])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda k, s: f"GRCh38_{s}", "removeprefix('GRCh38_')"),
        (lambda k, s: f"mm10___{s}", "removeprefix('mm10___')"),
        (lambda k, s: f"gene:{s}", "removeprefix('gene:')"),
        (lambda k, s: f"gene-{s}", "removeprefix('gene-')"),
        (lambda k, s: s.lower(), "upper()"),
        (lambda k, s: f"{s}_p{k}", "split('_').str[0]"),
        (lambda k, s: f"p{k}|{s}", "split('|').str[-1]"),
        (lambda k, s: f"{'hg38_' if k % 2 else 'mm10_'}{s}", "split('_').str[-1]"),
    ],
)
def test_what_a_pattern_suggests(
    vocabulary: GeneVocabulary, change: Callable[[int, str], str], code: str
) -> None:
    symbols = [symbol for symbol in vocabulary.symbols.tolist() if symbol]
    names = [change(k, symbol) for k, symbol in enumerate(symbols)]
    advice = advice_for_names(["", *names], vocabulary, "adata.var_names")
    assert advice.startswith(f"{len(names)} of {len(names)} names ")
    assert advice.endswith(f": adata.var_names = adata.var_names.str.{code}")
    changed = eval(f"index.str.{code}", {"index": pd.Index(names)})
    assert changed.tolist() == symbols


@pytest.mark.parametrize("name", ["x{}", "ADT_{}", "{}_TotalSeqB", "{}-1", "prot:{}", ""])
def test_no_idea(vocabulary: GeneVocabulary, name: str) -> None:
    names = [name.format(symbol) for symbol in vocabulary.symbols if symbol]
    assert advice_for_names(names, vocabulary, "adata.var_names") == ""


def test_dates_of_spreadsheets() -> None:
    dates = ["1-Mar", "2-Sep", "SEP-11", "Dec-01", "10-Mar", "2019-09-02 00:00:00", "3/1/2020"]
    assert spreadsheet_dates([*dates, "MARCHF1", "Sept7", "DEC1", "HLA-A", "1-Foo"]) == dates


def test_days_that_a_spreadsheet_counts() -> None:
    assert spreadsheet_dates(["43891", "MARCHF1", "44075"]) == ["43891", "44075"]
    # Ids of genes are numbers too.
    assert spreadsheet_dates(["43891", "7157"]) == spreadsheet_dates(["43891", "43840"]) == []
