from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stofm.genes import GeneVocabulary
from stofm.genes.fitting import RELATIVE_ERROR, GeneNames, Medians

if TYPE_CHECKING:
    from pathlib import Path


HUMAN = ["ENSG00000131095", "ENSG00000104888.3", "ENSG00000160307", None]
HUMAN_SYMBOLS = ["GFAP", "SLC17A7", "S100B", "UNKNOWN"]
MOUSE = ["ENSMUSG00000020932", "ENSMUSG00000070570", "ENSMUSG00000070571", "ENSMUSG00000000003"]
MOUSE_SYMBOLS = ["Gfap", "Slc17a7", "Slc17a7l", "Pbsn"]
ORTHOLOGS = {
    "ENSMUSG00000020932": "ENSG00000131095",
    "ENSMUSG00000070570": "ENSG00000104888",
    "ENSMUSG00000070571": "ENSG00000104888",
}


@pytest.fixture
def slices(rng: np.random.Generator) -> list[tuple[sparse.csr_matrix, list, list]]:
    human = sparse.csr_matrix(rng.poisson(1.3, size=(17, 4)))
    # The paralog has few counts; with many it could be no gene.
    rates = [9.0, 1.9, 0.1, 5.0]
    mouse = sparse.csr_matrix(rng.poisson(rates, size=(23, 4)).astype(np.float32))
    return [(human, HUMAN, HUMAN_SYMBOLS), (mouse, MOUSE, MOUSE_SYMBOLS)]


def plain_medians(slices: list[tuple[sparse.csr_matrix, list, list]]) -> dict[str, float]:
    """One cell after another."""
    genes = [
        ["ENSG00000131095", "ENSG00000104888", "ENSG00000160307", ""],
        ["ENSG00000131095", "ENSG00000104888", "ENSG00000104888", ""],
    ]
    values: dict[str, list[float]] = {}
    for (counts, _, _), columns in zip(slices, genes, strict=True):
        for row in counts.toarray():
            own: dict[str, float] = {}
            for count, gene in zip(row, columns, strict=True):
                if gene and count:
                    own[gene] = own.get(gene, 0.0) + float(count)
            for gene, count in own.items():
                values.setdefault(gene, []).append(count / float(row.sum()) * 10_000)
    return {gene: float(np.median(found)) for gene, found in values.items()}


def test_medians_over_human_and_mouse(slices: list) -> None:
    vocabulary = GeneVocabulary.fit(iter(slices), orthologs=ORTHOLOGS, min_cells=1)
    expected = plain_medians(slices)
    assert vocabulary.gene_ids.tolist() == sorted(expected)
    np.testing.assert_allclose(
        vocabulary.medians, [expected[gene] for gene in vocabulary.gene_ids], rtol=1e-12
    )
    assert vocabulary.tokens.tolist() == [2, 3, 4]
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 5}


def test_histogram_agrees_and_order_of_slices_does_not_matter(slices: list) -> None:
    exact = GeneVocabulary.fit(slices, orthologs=ORTHOLOGS)
    rough = GeneVocabulary.fit(slices, orthologs=ORTHOLOGS, method="histogram")
    np.testing.assert_allclose(rough.medians, exact.medians, rtol=1.001e-3)
    again = GeneVocabulary.fit(slices[::-1], orthologs=ORTHOLOGS, method="histogram")
    assert again.fingerprint == rough.fingerprint


def test_names_of_both_species(slices: list) -> None:
    vocabulary = GeneVocabulary.fit(slices, orthologs=ORTHOLOGS, min_cells=1)
    assert dict(zip(vocabulary.gene_ids, vocabulary.symbols, strict=True)) == {
        "ENSG00000131095": "GFAP",
        "ENSG00000104888": "SLC17A7",
        "ENSG00000160307": "S100B",
    }
    assert vocabulary.aliases["ENSMUSG00000070571"] == "ENSG00000104888"
    assert vocabulary.aliases["Slc17a7"] == "ENSG00000104888"
    assert "Pbsn" not in vocabulary.aliases


def test_rare_genes_are_left_out(slices: list) -> None:
    counts = sparse.lil_matrix((9, 2))
    counts[:3, 0] = 1
    counts[:2, 1] = 1
    rare = (counts, ["ENSG00000000001", "ENSG00000000002"])
    vocabulary = GeneVocabulary.fit([rare, *slices], orthologs=ORTHOLOGS, min_cells=3)
    assert "ENSG00000000001" in vocabulary.gene_ids
    assert "ENSG00000000002" not in vocabulary.gene_ids


def test_a_reference_tells_symbols(vocabulary: GeneVocabulary, rng: np.random.Generator) -> None:
    counts = sparse.csr_matrix(rng.poisson(2, size=(31, 4)))
    fitted = GeneVocabulary.fit(
        [(counts, ["GFAP", "Mbp", "VGLUT1", "nothing"])], reference=vocabulary, min_cells=1
    )
    assert fitted.gene_ids.tolist() == ["ENSG00000104888", "ENSG00000131095", "ENSG00000197971"]
    assert fitted.symbols.tolist() == ["SLC17A7", "GFAP", "MBP"]
    assert fitted.aliases["VGLUT1"] == "ENSG00000104888"
    assert fitted.aliases["Mbp"] == "ENSG00000197971"


def test_anndata_and_files(slices: list, tmp_path: Path) -> None:
    items: list[object] = []
    for number, (counts, ids, symbols) in enumerate(slices):
        var = pd.DataFrame({"ensembl_id": ids}, index=symbols)
        adata = anndata.AnnData(counts.astype(np.float32), var=var)
        adata.layers["doubled"] = adata.X * 2
        path = tmp_path / (f"{number}.zarr" if number else f"{number}.h5ad")
        adata.write_zarr(path) if number else adata.write_h5ad(path)
        items += [adata, path]
    expected = GeneVocabulary.fit(slices, orthologs=ORTHOLOGS)
    for chosen in (items[::2], items[1::2]):
        found = GeneVocabulary.fit(chosen, orthologs=ORTHOLOGS)
        assert found.fingerprint == expected.fingerprint
        assert dict(found.aliases) == dict(expected.aliases)
    # The share of a gene in its cell stays the same.
    doubled = GeneVocabulary.fit(items[::2], orthologs=ORTHOLOGS, layer="doubled")
    np.testing.assert_allclose(doubled.medians, expected.medians)


def test_messages(slices: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No gene is left: 0 genes were recognised"):
        GeneVocabulary.fit([(np.ones((3, 2)), ["GFAP", "MBP"])])
    with pytest.raises(ValueError, match="none of them seen in 99 cells"):
        GeneVocabulary.fit(slices, min_cells=99)
    with pytest.raises(ValueError, match=r"method must be one of \['exact', 'histogram'\]"):
        GeneVocabulary.fit(slices, method="mean")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="There is no file"):
        GeneVocabulary.fit([tmp_path / "none.h5ad"])
    adata = anndata.AnnData(np.array([[0.5, 1.0]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"adata\.X does not hold raw counts"):
        GeneVocabulary.fit([adata])


def test_arrays_need_no_anndata() -> None:
    code = (
        "import sys, numpy as np; from stofm.genes import GeneVocabulary;"
        "GeneVocabulary.fit([(np.ones((11, 1)), ['ENSG00000131095'])]);"
        "print([m for m in ('anndata', 'pandas', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_columns_with_most_counts(slices: list) -> None:
    (human, ids, _), _ = slices
    counts = human.toarray()
    counts[:, 3] += 9
    options = {"min_cells": 1, "reference": None}
    with pytest.warns(
        UserWarning, match=r"Slice 2: [67]\d\.\d% of the counts are in columns that no"
    ):
        GeneVocabulary.fit([(human, ids), (counts, ids)], **options)
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = [name or "unknown" for name in ids]
    adata.var["feature_types"] = ["Gene Expression"] * 3 + ["Negative Control Probe"]
    fitted = GeneVocabulary.fit([adata], **options)
    assert fitted.fingerprint == GeneVocabulary.fit([adata[:, :3].copy()], **options).fingerprint


def test_many_counts_in_several_columns_of_a_gene(slices: list) -> None:
    (human, ids, _), _ = slices
    antibodies = sparse.csr_matrix(human[:, :2] * 7)
    told = r"Slice 1: \d+\.\d% of the counts are in columns of genes that another column bef"
    for parts in ([human, antibodies], [antibodies, human]):
        counts = sparse.hstack(parts, format="csr")
        names = [[*ids, *ids[:2]], [*ids[:2], *ids]][parts[0] is antibodies]
        with pytest.warns(UserWarning, match=told):
            GeneVocabulary.fit([(counts, names)], min_cells=1)


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Values of 11 genes, from one of a gene to hundreds; gene 7 has none."""
    genes = rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 9, 10], size=1501, p=[0.5, *[0.5 / 9] * 9])
    values = rng.lognormal(genes - 4, 1.5)
    return np.append(genes, 7 + 4), np.append(np.clip(values, 1e-3, 1e4), 2.5)


def plain_result(genes: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    own = [values[genes == gene] for gene in range(12)]
    return [len(part) for part in own], [np.median(part) if len(part) else np.nan for part in own]


def test_exact(rng: np.random.Generator) -> None:
    genes, values = draw(rng)
    medians = Medians(binned=False)
    for part in np.array_split(np.arange(len(genes)), 7):
        medians.add(genes[part], values[part])
    numbers, found = medians.result(12)
    expected_numbers, expected = plain_result(genes, values)
    assert numbers.tolist() == expected_numbers
    np.testing.assert_array_equal(found, expected)


def test_histogram_is_within_its_error(rng: np.random.Generator) -> None:
    genes, values = draw(rng)
    medians = Medians(binned=True)
    medians.add(genes, values)
    numbers, found = medians.result(12)
    expected_numbers, expected = plain_result(genes, values)
    assert numbers.tolist() == expected_numbers
    np.testing.assert_allclose(found, expected, rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert np.isnan(found[7])
    assert found[11] == pytest.approx(2.5, rel=1e-3)


def test_histogram_does_not_depend_on_order_and_parts(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    genes, values = draw(rng)
    whole = Medians(binned=True)
    whole.add(genes, values)
    monkeypatch.setattr("stofm.genes.fitting._FEW", 41)
    order = rng.permutation(len(genes))
    parted = Medians(binned=True)
    for part in np.array_split(order, 13):
        parted.add(genes[part], values[part])
    for own, expected in zip(parted.result(12), whole.result(12), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_histogram_holds_extremes() -> None:
    medians = Medians(binned=True)
    medians.add(np.array([0, 1]), np.array([1e-4, 1e4]))
    np.testing.assert_allclose(medians.result(2)[1], [1e-4, 1e4], rtol=RELATIVE_ERROR * 1.0001)


@pytest.mark.parametrize("binned", [True, False])
def test_nothing_added(binned: bool) -> None:
    numbers, medians = Medians(binned=binned).result(3)
    assert numbers.tolist() == [0, 0, 0]
    assert np.isnan(medians).all()


def test_most_slices_decide_the_symbol() -> None:
    names = GeneNames()
    names.add(["ENSG1", "ENSG2", ""], ["ENSG1", "ENSG2", ""], ["OLD", "B", "C"])
    for _ in range(2):
        names.add(["ENSG1", "ENSG2"], ["ENSG1.4", "ENSG2"], ["NEW", "B"])
    symbols = names.symbols(["ENSG1", "ENSG2"])
    assert symbols == {"ENSG1": "NEW", "ENSG2": "B"}
    assert names.aliases(symbols)["OLD"] == "ENSG1"


def test_mouse_names_are_aliases_only() -> None:
    names = GeneNames()
    names.add(["ENSG1"], ["ENSMUSG00000020932.2"], ["Gfap"])
    assert names.symbols(["ENSG1"]) == {"ENSG1": ""}
    assert names.aliases({"ENSG1": ""}) == {"ENSMUSG00000020932": "ENSG1", "Gfap": "ENSG1"}


def test_a_symbol_is_given_once_and_is_no_alias() -> None:
    names = GeneNames()
    names.add(["ENSG1", "ENSG2"], ["A", "A"])
    names.add(["ENSG2"], ["B"])
    symbols = names.symbols(["ENSG1", "ENSG2"])
    assert symbols == {"ENSG1": "A", "ENSG2": "B"}
    assert names.aliases(symbols) == {}


def test_aliases_of_several_genes() -> None:
    names = GeneNames()
    names.add_aliases({"Tied": "ENSG1", "Won": "ENSG1", "Gone": "ENSG9"})
    names.add_aliases({"Tied": "ENSG2", "Won": "ENSG2", "ENSG2": "ENSG2"})
    names.add_aliases({"Won": "ENSG2"})
    assert names.aliases({"ENSG1": "", "ENSG2": ""}) == {"Won": "ENSG2"}
