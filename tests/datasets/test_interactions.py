from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import stofm as st

PLANTED = [("Macrophage", "Fibroblast", "VEGFA", 40.0), ("B cell", "B cell", "CCL22", 15)]


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return st.datasets.simulate_slice(1203, 301, regions="nodular", interactions=PLANTED, seed=3)


def has(adata: ad.AnnData, column: str, ligand: str) -> np.ndarray:
    return np.array([ligand in own.split(",") for own in adata.obs[column]])


@pytest.mark.parametrize("interaction", PLANTED)
def test_receivers_are_those_with_a_sender_within_reach(adata, interaction) -> None:
    sender, receiver, ligand, reach = interaction
    sends, responds = (has(adata, column, ligand) for column in ("sends", "responds_to"))
    kinds = adata.obs["cell_type"]
    assert set(kinds[sends]) == {sender}
    assert 0.3 < sends[kinds == sender].mean() < 0.7
    distances = cdist(adata.obsm["spatial"], adata.obsm["spatial"])
    np.fill_diagonal(distances, np.inf)
    expected = (kinds == receiver) & (distances[:, sends] <= reach).any(axis=1)
    np.testing.assert_array_equal(responds, expected)
    assert 0.1 < responds[kinds == receiver].mean() < 0.9


def test_ligands_and_programmes_rise_where_they_are_on(adata) -> None:
    truth = adata.uns["simulation"]["interactions"]
    for k, (sender, receiver, ligand, _) in enumerate(PLANTED):
        genes = truth["programme"][k].split(",")
        assert ligand not in genes
        assert (adata.var.loc[genes, "marker_of"] == "").all()
        responds = has(adata, "responds_to", ligand)
        others = (adata.obs["cell_type"] == receiver).to_numpy() & ~responds
        assert adata[responds, genes].X.mean() > 2 * adata[others, genes].X.mean()
        sends = has(adata, "sends", ligand)
        silent = (adata.obs["cell_type"] == sender).to_numpy() & ~sends
        assert adata[sends, ligand].X.mean() > 2 * adata[silent, ligand].X.mean()
    assert truth["sender"].tolist() == ["Macrophage", "B cell"]
    assert not set(truth["programme"][0].split(",")) & set(truth["programme"][1].split(","))


def test_programmes_are_the_same_for_every_seed_and_the_rest_is_as_without(adata) -> None:
    options = {"regions": "nodular", "seed": 3}
    plain = st.datasets.simulate_slice(1203, 301, **options)
    np.testing.assert_array_equal(plain.obsm["spatial"], adata.obsm["spatial"])
    assert (plain.obs["cell_type"] == adata.obs["cell_type"]).all()
    assert "sends" not in plain.obs
    assert "interactions" not in plain.uns["simulation"]
    options["seed"] = 4
    other = st.datasets.simulate_slice(97, 301, interactions=PLANTED, **options)
    for name in ("programme", "ligand"):
        found = [one.uns["simulation"]["interactions"][name].tolist() for one in (adata, other)]
        assert found[0] == found[1]


def test_it_can_be_written(adata, tmp_path) -> None:
    adata.write_h5ad(tmp_path / "slice.h5ad")
    read = ad.read_h5ad(tmp_path / "slice.h5ad").uns["simulation"]["interactions"]
    assert list(read["distance"]) == [40.0, 15.0]


def test_spots_have_the_states_of_their_cells() -> None:
    spots = st.datasets.simulate_slice(
        151, 301, regions="nodular", technology="visium", interactions=PLANTED[:1]
    )
    assert has(spots, "sends", "VEGFA").sum() > 5
    assert has(spots, "responds_to", "VEGFA").sum() > 5


@pytest.mark.parametrize(
    ("interaction", "message"),
    [
        (("CAF", "Tumor", "VEGFA", 50), r"name \['CAF'\], which the tissue lacks"),
        (("Tumor", "Tumor", "TGFB1", 50), r"ligand 'TGFB1'.*raise `n_genes`"),
        (("Tumor", "Tumor", "VEGFA", 0), "must be above 0, found 0"),
        (("Tumor", "Tumor", "VEGFA"), "must be .sender type, receiver type, ligand gene"),
    ],
)
def test_messages(interaction, message) -> None:
    with pytest.raises(ValueError, match=message):
        st.datasets.simulate_slice(20, 301, regions="nodular", interactions=[interaction])


def test_a_small_panel_has_no_room_for_many_programmes() -> None:
    many = [("Tumor", "Tumor", "ERBB2", 50)] * 2
    with pytest.raises(ValueError, match="for a programme of 3; raise `n_genes`"):
        st.datasets.simulate_slice(20, 20, regions="nodular", interactions=many)
