"""Spots with known proportions, summed from cells, or simulated."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._edge.tables import make_frame, write_frame
from stofm.heads import spots as module
from stofm.heads.expression import ExpressionComponents
from stofm.heads.network import apply_head
from stofm.heads.request import HeadOptions, Request, resolve_slices
from stofm.heads.spots import fit_simulated, grid_into_spots, read_proportions
from stofm.heads.targets import read_labels
from stofm.spatial.spots import SpotRules


@pytest.fixture
def spots(adata, rng):
    """Spots with proportions of three types in obsm, five rows not known, and in obs."""
    shares = pd.DataFrame(
        rng.dirichlet(np.ones(3), adata.n_obs), index=adata.obs_names, columns=["a", "b", "c"]
    )
    adata.obs[["a", "b", "c"]] = shares
    shares.iloc[3:8, 1] = np.nan
    adata.obsm["shares"] = shares
    return adata


def read(adata, key="shares"):
    data = adata if isinstance(adata, list) else [adata]
    return read_proportions(resolve_slices(data, "library"), key)


def test_a_dataframe(spots):
    found = read(spots)
    assert found.types == ["a", "b", "c"]
    assert np.isnan(found.proportions[3:8]).all()
    known = np.r_[0:3, 8:184]
    np.testing.assert_allclose(
        found.proportions[known], spots.obsm["shares"].to_numpy()[known], rtol=1e-6
    )


def test_columns_and_arrays(spots):
    values = spots.obs[["a", "b", "c"]].to_numpy()
    np.testing.assert_allclose(read(spots, ["a", "b", "c"]).proportions, values, rtol=1e-6)
    spots.obsm["proportions"] = sparse.csr_matrix(values)
    found = read(spots, "proportions")
    assert found.types == ["0", "1", "2"]
    np.testing.assert_allclose(found.proportions, values, rtol=1e-6)
    spots.uns["proportion_names"] = ["x", "y", "z"]
    assert read(spots, "proportions").types == ["x", "y", "z"]


def test_types_of_several_tables_may_be_in_another_order(spots):
    other = spots.copy()
    other.obsm["shares"] = other.obsm["shares"][["c", "a", "b"]]
    found = read([spots, other])
    assert found.types == ["a", "b", "c"]
    np.testing.assert_array_equal(found.proportions[:184], found.proportions[184:])
    other.obsm["shares"].columns = ["c", "a", "d"]
    with pytest.raises(ValueError, match=r"the types .* in the first AnnData and .* in number 2"):
        read([spots, other])


def test_rounding_is_divided_out(spots):
    spots.obsm["shares"] = spots.obsm["shares"].fillna(1 / 3) * 1.0005
    spots.obsm["shares"].iloc[3:8] = 0.3335
    np.testing.assert_allclose(read(spots).proportions.sum(axis=1), 1.0, rtol=1e-6)


def test_proportions_that_can_not_be(spots):
    shares = spots.obsm["shares"]
    shares.iloc[10:12] *= 2.0
    shares.iloc[12] *= 0.5
    match = r"3 of 179 spots in obsm\['shares'\] do not sum to 1: they sum to 0\.5 to 2\."
    with pytest.raises(ValueError, match=match):
        read(spots)
    shares.iloc[12, 0] = -0.25
    with pytest.raises(ValueError, match=r"1 of 179 spots have negative .* down to -0\.25"):
        read(spots)
    with pytest.raises(KeyError, match=r"no obsm\['share'\]; there are \['shares', 'spatial'\]"):
        read(spots, "share")
    with pytest.raises(KeyError, match=r"There is no obs\['d'\]"):
        read(spots, ["a", "d"])
    with pytest.raises(ValueError, match=r"obs\[\['library', 'a'\]\] must hold numbers"):
        read(spots, ["library", "a"])
    with pytest.raises(ValueError, match="has 1 types; at least two are needed"):
        read(spots, ["a"])


def grid(data, spot_size=90.0):
    slices = resolve_slices(data, "library")
    labels = read_labels(slices, "kind", missing=("2",))
    return grid_into_spots(slices, labels, Request(), spot_size=spot_size)


def test_cells_become_spots(adata):
    found = grid(adata)
    table = found.slices.tables[0]
    assert found.types == ["0", "1"]
    assert found.slices.names == ["left", "right"]
    is_known = (adata.obs["kind"] != "2").to_numpy()
    for name in ("left", "right"):
        own = (adata.obs["library"] == name).to_numpy() & is_known
        summed = table[table.obs["slice"] == name].X.sum(axis=0)
        np.testing.assert_array_equal(np.asarray(summed), adata[own].X.sum(axis=0))
    np.testing.assert_allclose(found.proportions.sum(axis=1), 1.0, rtol=1e-6)
    assert list(table.var_names) == list(adata.var_names)


@pytest.mark.parametrize(("spot_size", "is_small"), [(90.0, False), (3.0, True)])
def test_spots_of_a_single_cell_are_told(adata, caplog, spot_size, is_small):
    caplog.set_level("INFO", logger="stofm")
    if is_small:
        with pytest.warns(
            UserWarning, match=r"100% have a single cell.* Is spot_size=3 in the unit"
        ):
            grid(adata, spot_size)
    else:
        grid(adata, spot_size)
        assert "cells on average" in caplog.text


def test_cells_of_several_tables(adata):
    names = adata.obs["library"].to_numpy()
    # The second table has none with a type.
    parts = [adata[names == "left"].copy(), adata[:9].copy(), adata[names == "right"].copy()]
    parts[1].obs["kind"] = "2"
    together, apart = grid(adata), grid(parts)
    assert len(apart.slices.tables) == 2
    np.testing.assert_array_equal(together.proportions, apart.proportions)
    both = np.concatenate([table.X.toarray() for table in apart.slices.tables])
    np.testing.assert_array_equal(together.slices.tables[0].X.toarray(), both)
    assert apart.slices.names == ["0:left", "2:right"]
    for one, other in zip(together.slices.rows, apart.slices.rows, strict=True):
        np.testing.assert_array_equal(one, other)


def test_spots_keep_the_genes_that_were_mapped(adata, vocabulary):
    adata.var["mine"], adata.var_names = adata.var_names, [f"probe{k}" for k in range(71)]
    st.pp.map_genes(adata, gene_key="mine", vocabulary=vocabulary)
    table = grid(adata).slices.tables[0]
    st.pp.tokenize(table, vocabulary, show_progress_bar=False)
    assert table.obs["stofm_n_tokens"].min() > 0


def test_types_that_a_file_can_not_name(spots):
    names = ["T/NK", "b", "c"]
    frame = make_frame(spots, spots.obs[["a", "b", "c"]].to_numpy(), names)
    write_frame(spots, "mine", frame, names)
    assert read(spots, "mine").types == names


def test_size_that_can_not_be(adata):
    with pytest.raises(ValueError, match="spot_size must be positive"):
        grid(adata, spot_size=0.0)


@pytest.mark.parametrize("kind", ["obs", "obsm", "second"])
def test_a_type_that_occurs_twice_is_refused(spots, kind):
    data, key = spots, "shares"
    if kind == "obs":
        key = ["a", "b", "a", "c"]
    else:
        twice = spots.copy() if kind == "second" else spots
        shares = spots.obsm["shares"]
        twice.obsm["shares"] = shares[["a", "b", "c", "a"]]
        data = [spots, twice] if kind == "second" else spots
    with pytest.raises(ValueError, match=r"has the types \['a'\] more than once"):
        read(data, key)


N_SPOTS = 400

pytestmark = pytest.mark.usefixtures("few_epochs")


@pytest.fixture
def query_and_reference(adata):
    """Both slices' cells: the left ones measured as spots, the right ones typed."""
    left = (adata.obs["library"] == "left").to_numpy()
    return adata[left].copy(), adata[~left].copy()


@pytest.fixture
def simulated(monkeypatch):
    """How spots are simulated, in turn, and the spots."""
    calls = []
    simulate = module.simulate_spots

    def spy(typed, **options):
        calls.append((typed, options, simulate(typed, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(module, "simulate_spots", spy)
    return calls


def fit(query, reference, **options):
    request = Request(
        device="cpu",
        show_progress_bar=False,
        options=HeadOptions(spots=SpotRules(n_spots=N_SPOTS), **options),
    )
    cells = resolve_slices(reference, spatial_key="", role="reference")
    return fit_simulated(resolve_slices(query, role="query"), cells, "kind", request)


def test_only_shared_genes_with_counts_are_read(query_and_reference, simulated):
    query, reference = query_and_reference
    query, reference = query[:, 5:].copy(), reference[:, :60].copy()
    query.X = query.X.toarray() * (np.arange(66) != 3)
    fields, *_ = fit(query, reference)
    seen = np.asarray(reference.X.sum(axis=0)).ravel() > 0
    places = [k for k in (*range(5, 8), *range(9, 60)) if seen[k] and query.X[:, k - 5].any()]
    names = reference.var_names[places].tolist()
    assert [gene.name for gene in fields["expression"].genes] == names
    typed, options, _ = simulated[0]
    kinds = reference.obs["kind"].to_numpy()
    means = [reference.X.toarray()[kinds == kind][:, places].mean(axis=0) for kind in "012"]
    np.testing.assert_allclose(typed.mean_counts(), means, rtol=1e-6)
    totals = query.X[:, np.array(places) - 5].sum(axis=1)
    np.testing.assert_array_equal(np.sort(options["depths"]), np.sort(totals[totals > 0]))


def test_two_rounds(query_and_reference, simulated, monkeypatch):
    query, reference = query_and_reference
    shares = np.tile(np.array([[0.9, 0.1, 0.0]], dtype=np.float32), (query.n_obs, 1))

    def found_in(head, values, kind):
        return shares if len(values) == query.n_obs else apply_head(head, values, kind)

    monkeypatch.setattr(module, "apply_head", found_in)
    fields, found, true = fit(query, reference)
    rounds = [options["composition"] for _, options, _ in simulated]
    np.testing.assert_allclose(rounds[0], 1 / 3)
    np.testing.assert_array_equal(simulated[0][1]["gene_scale"], 1.0)
    # Half of what the first round found, half of equal shares.
    assert len(rounds) == 2
    np.testing.assert_allclose(rounds[1], [0.617, 0.217, 0.167], atol=1e-3)
    spots = [one.proportions for *_, one in simulated]
    assert np.abs(spots[0] - spots[1]).max() > 0.5
    # A tenth of them is held out.
    n_held_out = N_SPOTS // 10
    assert fields["split"] == {
        "how": "simulated",
        "n_fitted": N_SPOTS - n_held_out,
        "n_held_out": n_held_out,
    }
    # Each network holds out others.
    tenths = np.split(spots[1], [N_SPOTS - k * n_held_out for k in (3, 2, 1)])
    np.testing.assert_allclose(true, np.concatenate(tenths[:0:-1]))
    assert found.shape == true.shape
    # One set of components, of the first network's spots, is read by all.
    components = ExpressionComponents.fit(simulated[1][-1].counts, fields["expression"].genes, 50)
    np.testing.assert_array_equal(fields["expression"].axes, components.axes)
    assert fields["reads"] == ("expression",) * 3
    assert sum(fields["weights"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("n_components", "expected"), [(None, 50), (6, 6)])
def test_number_of_components(query_and_reference, n_components, expected):
    fields, *_ = fit(*query_and_reference, n_components=n_components)
    assert fields["expression"].axes.shape[1] == expected
    assert fields["params"]["n_components"] == expected
    assert {one.config.d_input for one in fields["networks"]} == {expected}


@pytest.mark.filterwarnings("ignore:.*genes are shared by all")
def test_what_can_not_be_read(query_and_reference):
    query, reference = query_and_reference
    some = query[:, :30].copy(), reference[:, 25:].copy()
    with pytest.raises(ValueError, match=r"share 5 genes with counts in both; at least 10"):
        fit(*some)
    with pytest.raises(ValueError, match="share no gene"):
        fit(query[:, :30].copy(), reference[:, 30:].copy())
    reference.X = reference.X * 0.7
    with pytest.raises(ValueError, match=r"reference\.X does not hold raw counts"):
        fit(query, reference)
