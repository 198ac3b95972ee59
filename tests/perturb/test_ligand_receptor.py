from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stofm.perturb.influence import by_genes, expressed, read_resource
from stofm.perturb.masking import PairEffects

GENES = ["L1", "L2", "R1", "R2", "HLA_X", "Z"]


def resource(*pairs: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["ligand", "receptor"])


def test_pairs_that_are_not_measured_are_left_out() -> None:
    given = resource(("L1", "R1"), ("L1", "R9"), ("L1_L2", "R1_R2"), ("HLA_X", "R2"), ("L1", "R1"))
    found = read_resource(given, GENES)
    names = [
        tuple(found.names[[a, b]]) for a, b in zip(found.ligands, found.receptors, strict=True)
    ]
    assert names == [("L1", "R1"), ("L1_L2", "R1_R2"), ("HLA_X", "R2")]


def test_a_complex_is_expressed_if_all_its_genes_are(rng) -> None:
    counts = sparse.csr_matrix(rng.poisson(0.7, (83, 6)).astype(np.float32))
    found = read_resource(resource(("L1_L2", "R1_R2_Z"), ("HLA_X", "R2")), GENES)
    cells = expressed(counts, found.subunits).toarray()
    is_on = counts.toarray() > 0
    np.testing.assert_array_equal(cells[:, found.ligands[0]], is_on[:, [0, 1]].all(axis=1))
    np.testing.assert_array_equal(cells[:, found.receptors[0]], is_on[:, [2, 3, 5]].all(axis=1))
    np.testing.assert_array_equal(cells[:, found.ligands[1]], is_on[:, 4])


def test_pairs_of_cells_that_express_both(rng) -> None:
    n, kinds = 400, rng.integers(0, 2, 400)
    counts = sparse.csr_matrix(rng.poisson(0.8, (n, 6)).astype(np.float32))
    senders, receivers = rng.integers(0, n, (2, 20_000))
    distances = rng.uniform(1.0, 9.0, 20_000)
    is_on = counts.toarray() > 0
    effects = np.exp(-distances / 5.0) * rng.gamma(4.0, 0.25, 20_000)
    planted = is_on[senders, 0] & is_on[receivers, 2] & (kinds[senders] == 0)
    effects[planted] *= 1.6
    pairs = PairEffects(senders, receivers, distances, effects.astype(np.float32))
    given = read_resource(resource(("L2", "R2"), ("L1", "R1"), ("L2", "R1")), GENES)
    cells = expressed(counts, given.subunits)
    table = by_genes(pairs, kinds, ["x", "y"], cells, given, min_pairs=30)
    assert len(table) == 12
    columns = ["source", "ligand_complex", "receptor_complex"]
    assert table.iloc[:2][columns].drop_duplicates().to_numpy().tolist() == [["x", "L1", "R1"]]
    assert table["FDR"].iloc[:2].max() < 1e-3
    assert table["FDR"].iloc[2:].min() > 0.01
    row = table.iloc[0]
    own = planted & (kinds[receivers] == ["x", "y"].index(row["target"]))
    assert row["n_pairs"] == own.sum()
    assert row["strength"] == pytest.approx(effects[own].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pd.DataFrame({"a": ["x"]}), r"columns 'ligand' and 'receptor'.*found \['a'\]"),
        ([("L1", "R1")], "found list"),
        (resource(("l1", "r1")), "None of the 1 ligand-receptor pairs is measured.*gene_symbols"),
    ],
)
def test_messages(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_resource(given, GENES)


def test_without_liana_the_message_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "liana", None)
    monkeypatch.setitem(sys.modules, "liana.resource", None)
    with pytest.raises(ImportError, match=r"stofm\[communication\]"):
        read_resource("consensus", GENES)


def test_a_resource_of_liana(monkeypatch) -> None:
    pytest.importorskip("liana", reason="needs stofm[communication]")
    found = read_resource("consensus", ["CCL19", "CCR7", "ITGA4", "ITGB1", "VCAM1"])
    pairs = {
        tuple(found.names[[a, b]]) for a, b in zip(found.ligands, found.receptors, strict=True)
    }
    assert {("CCL19", "CCR7"), ("VCAM1", "ITGA4_ITGB1")} <= pairs
    with pytest.raises(ValueError, match="LIANA has no resource 'consensu'"):
        read_resource("consensu", ["CCL19"])
