"""What heads read of cells: entries of obsm, which may have to be made, and means over neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import stofm as st
from stofm._keys import Obsm, Uns
from stofm.heads.blocks import (
    Blocks,
    Source,
    choose_neighborhood,
    read_embeddings,
    with_neighborhood,
)
from stofm.heads.embeddings import origin_by
from stofm.heads.request import DEFAULT_REP, HeadOptions, Request, resolve_slices
from stofm.nn import Stofm
from stofm.spatial.plane import neighbor_means

QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}


@pytest.fixture
def pair(adata):
    """The left and the right slice as an AnnData each."""
    return [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]


@pytest.fixture
def other(model):
    return Stofm(model.config, model.vocabulary, seed=8).eval()


def read(data, library_key="library", **options):
    slices = resolve_slices(data, library_key)
    expected = options.pop("expected", None)
    request = Request(**(QUIET | {"library_key": library_key} | options))
    return read_embeddings(slices, request, expected=expected)


def test_any_entry_can_be_read(adata, rng):
    adata.obsm["X_pca"] = rng.normal(size=(184, 5))
    adata.obsm["X_more"] = rng.normal(size=(184, 3))
    blocks = read(adata, use_rep=["X_more", "X_pca"])
    assert blocks.features.dtype == np.float32
    np.testing.assert_allclose(
        blocks.features, np.hstack([adata.obsm["X_more"], adata.obsm["X_pca"]]), rtol=1e-6
    )
    assert blocks.widths == (3, 5)
    assert blocks.origin == {"X_more": {}, "X_pca": {}}


def test_missing_embeddings_are_made_and_kept(adata, model):
    blocks = read(adata, model=model)
    assert blocks.widths == (12, 14)
    np.testing.assert_array_equal(blocks.features[:, :12], adata.obsm[Obsm.X_CELL])
    np.testing.assert_array_equal(blocks.features[:, 12:], adata.obsm[Obsm.X])
    assert blocks.origin == origin_by(model)
    # What is there is read as it is, by a model that need not be named.
    adata.X = None
    np.testing.assert_array_equal(read(adata).features, blocks.features)


def test_another_models_embeddings_stay_and_the_given_model_is_used(adata, model, other):
    wanted = read(adata.copy(), model=model)
    st.tl.embed(adata, other, library_key="library", device="cpu", show_progress_bar=False)
    before = adata.obsm[Obsm.X].copy()
    blocks = read(adata, model=model)
    np.testing.assert_array_equal(blocks.features, wanted.features)
    np.testing.assert_array_equal(adata.obsm[Obsm.X], before)
    assert adata.uns[Uns.STOFM][Obsm.X]["model_fingerprint"] == other.fingerprint


def test_another_models_embeddings_are_refused(adata, pair, model, other):
    st.tl.embed(adata, other, library_key="library", device="cpu", show_progress_bar=False)
    with pytest.raises(ValueError, match=rf"is from tiny \({other.cell_encoder_fingerprint}\)"):
        read(adata, expected=origin_by(model))
    with pytest.raises(ValueError, match="fit a new head"):
        read(adata, expected=origin_by(model), model=other)
    for one, its in zip(pair, (model, other), strict=True):
        st.tl.embed(one, its, device="cpu", show_progress_bar=False)
    with pytest.raises(ValueError, match="in the first AnnData and by"):
        read(pair, None)
    del adata.obsm[Obsm.X_CELL]
    with pytest.raises(ValueError, match="would be made with stofm-mini"):
        read(adata)


def test_an_embedding_without_a_record_is_refused_by_a_head(adata, model):
    adata.obsm[Obsm.X] = np.ones((184, 14), dtype=np.float32)
    with pytest.raises(ValueError, match="is from an unrecorded model"):
        read(adata, use_rep=Obsm.X, expected={Obsm.X: origin_by(model)[Obsm.X]})


def embedded(data, model, **options):
    st.tl.embed(data, model, **({"device": "cpu", "show_progress_bar": False} | options))
    return data


def test_an_embedding_without_a_record_is_not_read(pair, model, other):
    for one in pair:
        embedded(one, model)
    bare = ad.concat(pair)
    with pytest.raises(ValueError, match=r"no record of the model .* uns_merge='same'"):
        read(bare)
    # With a model that is given they are made anew, and stay as they are.
    assert read(bare, model=other).origin == origin_by(other)
    assert not bare.uns
    joined = ad.concat(pair, uns_merge="same")
    blocks = read(joined)
    assert blocks.origin == origin_by(model)
    np.testing.assert_array_equal(blocks.features[:101, 12:], pair[0].obsm[Obsm.X])


def test_embeddings_of_other_counts_or_slices_are_refused(adata, model):
    adata.layers["other"] = adata.X[:, ::-1].copy()
    adata.obs["one"], adata.obs["same"] = "a", adata.obs["library"].map({"left": 2, "right": 1})
    adata.obsm["moved"] = adata.obsm["spatial"][::-1].copy()
    embedded(adata, model, library_key="library")
    before = adata.obsm[Obsm.X].copy()
    for options, found in [
        ({"layer": "other"}, r"with layer=None, and layer='other' is asked for"),
        ({"library_key": "one"}, r"with library_key='library', and library_key='one'"),
        ({"spatial_key": "moved"}, r"with spatial_key='spatial', and spatial_key='moved'"),
    ]:
        with pytest.raises(ValueError, match=found):
            read(adata, **options)
        aside = read(adata, model=model, **options)
        assert not np.array_equal(aside.features[:, 12:], before)
    np.testing.assert_array_equal(adata.obsm[Obsm.X], before)
    for key in ("same", "library"):
        np.testing.assert_array_equal(read(adata, key).features[:, 12:], before)
    with pytest.raises(KeyError, match="There is no layer 'nope'"):
        read(adata, layer="nope")


@pytest.mark.parametrize(
    ("part", "found"),
    [("X", "was made from other counts: of 184 cells"), ("spatial", "made with other coordinates")],
)
def test_embeddings_that_are_stale_are_refused_or_made_aside(adata, model, part, found):
    embedded(adata, model, library_key="library")
    before = adata.obsm[Obsm.X].copy()
    if part == "X":
        adata.X = adata.X[::-1]
    else:
        adata.obsm["spatial"] = adata.obsm["spatial"][::-1]
    with pytest.raises(ValueError, match=rf"{found}.* Embed the cells again.*pass `model`"):
        read(adata)
    aside = read(adata, model=model)
    np.testing.assert_array_equal(adata.obsm[Obsm.X], before)
    fresh = adata.copy()
    embedded(fresh, model, library_key="library")
    np.testing.assert_array_equal(aside.features[:, 12:], fresh.obsm[Obsm.X])
    assert read(fresh).origin == origin_by(model)
    some = fresh[fresh.obs["kind"] == "1", 5:].copy()
    np.testing.assert_array_equal(read(some).features[:, 12:], some.obsm[Obsm.X])


def test_cells_without_places(adata, model):
    places = adata.obsm.pop("spatial")
    expected = read(adata, use_rep=Obsm.X_CELL, model=model).features
    assert set(adata.obsm) == {Obsm.TOKENS, Obsm.X_CELL}
    told = r"no obsm\['spatial'\].* Dissociated cells have none: .*use_rep='X_stofm_cell'"
    with pytest.raises(KeyError, match=told):
        read(adata, model=model)
    adata.obsm["spatial"] = places
    embedded(adata, model, library_key="library")
    np.testing.assert_array_equal(adata.obsm[Obsm.X_CELL], expected)


def test_messages_name_the_table(pair, model):
    pair[1].X = pair[1].X * 0.37
    named = {"a": pair[0], "b": pair[1]}
    for data, where in ((pair, r"data\[1\]"), (named, r"data\['b'\]"), (pair[1], "adata")):
        with pytest.raises(ValueError, match=rf"^{where}\.X does not hold raw counts"):
            read(data, model=model)
    pair[1].layers["raw"] = pair[1].X.rint()
    for data, where in ((pair[1], "reference"), (named, r"reference\['b'\]")):
        slices = resolve_slices(data, "library", role="reference")
        with pytest.raises(ValueError, match=rf"^{where}\..*pass reference_layer='raw'"):
            read_embeddings(slices, Request(model=model, **QUIET))
    with pytest.raises(KeyError, match=r"The query: There is no obs\['nope'\]"):
        resolve_slices(pair[0], "nope", role="query")


def test_options_of_an_embedding_need_not_be_repeated(adata, model):
    left = adata[adata.obs["library"] == "left"].copy()
    left.layers["counts"], left.obsm["places"] = left.X, left.obsm["spatial"]
    embedded(left, model, layer="counts", spatial_key="places", library_key="library")
    assert read(left, None).origin == origin_by(model)


def test_cells_are_embedded_aside_as_they_were_embedded(adata, model, other):
    adata.obs["puck"] = adata.obs.pop("library")
    adata.layers["counts"], adata.obsm["places"] = adata.X, adata.obsm.pop("spatial")
    adata.X = adata.X.log1p()
    options = {"layer": "counts", "spatial_key": "places", "library_key": "puck"}
    embedded(adata, model, **options)
    expected = read(adata, model=other, **options).features
    np.testing.assert_array_equal(read(adata, None, model=other).features, expected)
    # So they are where one of two embeddings is missing.
    expected = adata.obsm.pop(Obsm.X_CELL)
    read(adata, None, model=model)
    np.testing.assert_array_equal(adata.obsm[Obsm.X_CELL], expected)


def test_all_tables_are_embedded_or_none(pair, model):
    pair[1].X = pair[1].X * 0.37
    keys = [[list(getattr(one, part)) for part in ("obs", "var", "obsm", "uns")] for one in pair]
    with pytest.raises(ValueError, match="raw counts"):
        read(pair, None, model=model)
    after = [[list(getattr(one, part)) for part in ("obs", "var", "obsm", "uns")] for one in pair]
    assert after == keys


def test_nothing_is_embedded_where_another_entry_is_missing(adata, model):
    with pytest.raises(KeyError, match=r"no obsm\['X_pca'\]"):
        read(adata, model=model, use_rep=(Obsm.X_CELL, "X_pca"))
    assert Obsm.X_CELL not in adata.obsm


def test_cells_are_embedded_aside_with_the_genes_that_were_mapped(adata, model, other):
    plain = read(adata.copy(), model=other).features
    adata.var["mine"] = adata.var_names
    # Names by which other genes would be found.
    adata.var_names = [*adata.var_names[:67][::-1], *adata.var_names[67:]]
    st.pp.map_genes(adata, gene_key="mine", vocabulary=model)
    embedded(adata, model, library_key="library")
    np.testing.assert_array_equal(read(adata, model=other).features, plain)


def test_a_sparse_entry(adata, rng):
    values = rng.normal(size=(184, 5)).astype(np.float32)
    adata.obsm["X_sparse"] = sparse.csr_matrix(values)
    np.testing.assert_array_equal(read(adata, use_rep="X_sparse").features, values)


def test_embeddings_under_another_name_keep_their_origin(adata, model, other):
    for key, its in (("X_mine", model), ("X_theirs", other)):
        st.tl.embed(
            adata, its, library_key="library", key_added=key, device="cpu", show_progress_bar=False
        )
    origin = read(adata, use_rep="X_mine").origin
    assert origin == {"X_mine": origin_by(model)[Obsm.X]}
    adata.obsm["X_mine"] = adata.obsm["X_theirs"]
    adata.uns[Uns.STOFM]["X_mine"] = adata.uns[Uns.STOFM]["X_theirs"]
    with pytest.raises(ValueError, match=r"obsm\['X_mine'\] is from tiny"):
        read(adata, use_rep="X_mine", expected=origin, model=model)


def test_bad_representations(adata, pair, rng):
    adata.obsm["X_pca"] = rng.normal(size=(184, 5))
    with pytest.raises(KeyError, match=r"Nearest: .*'X_pca'"):
        read(adata, use_rep="X_pcs")
    adata.obsm["X_pca"][3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 184 cells have NaN"):
        read(adata, use_rep="X_pca")
    adata.obsm["X_text"] = np.full((184, 2), "a")
    with pytest.raises(ValueError, match="expected numbers"):
        read(adata, use_rep="X_text")
    for k, one in enumerate(pair):
        one.obsm["X_pca"] = np.ones((one.n_obs, 4 + k))
    with pytest.raises(ValueError, match=r"\[4, 5\] columns in different AnnData"):
        read(pair, None, use_rep="X_pca")
    for reps in (("X", "X"), ("X_pca", "X_stofm", "X_pca")):
        with pytest.raises(ValueError, match="each once"):
            read(adata, use_rep=reps)


def test_nothing_is_read(adata):
    blocks = read_embeddings(resolve_slices(adata, "library"), Request(), ())
    assert (blocks.features.shape, blocks.sources) == ((184, 0), ())


@pytest.fixture
def blocks(rng):
    """Two representations of 184 cells."""
    return blocks_of(rng.normal(size=(184, 7)).astype(np.float32))


def blocks_of(features, use_rep=DEFAULT_REP, widths=(4, 3)):
    return Blocks(features, use_rep, widths, {rep: {} for rep in use_rep})


def around(data, blocks, n_neighbors, library_key="library", **options):
    slices = resolve_slices(data, library_key)
    return with_neighborhood(slices, blocks, n_neighbors, Request(), **options)


def choose(data, blocks, n_neighbors=None, *, rows=None, **options):
    """Means over as many neighbours as asked for, or as is usual."""
    slices = resolve_slices(data, "library")
    request = Request(options=HeadOptions(n_neighbors=n_neighbors, **options))
    rows = np.arange(slices.n_obs) if rows is None else rows
    return choose_neighborhood(slices, blocks, request, rows)


@pytest.mark.parametrize(
    ("use_rep", "widths", "averaged", "of_means"),
    [
        ((Obsm.X_CELL, Obsm.X), (4, 3), slice(0, 4), (4,)),
        ((Obsm.X, Obsm.X_CELL), (3, 4), slice(3, 7), (4,)),
        ((Obsm.X, "X_pca"), (3, 4), slice(0, 7), (3, 4)),
    ],
)
def test_what_is_averaged(adata, blocks, use_rep, widths, averaged, of_means):
    read = blocks_of(blocks.features, use_rep, widths)
    found = around(adata, read, 5)
    rows = resolve_slices(adata, "library").rows
    means = neighbor_means(blocks.features[:, averaged], adata.obsm["spatial"], rows, 5)
    np.testing.assert_array_equal(found.neighborhood, means)
    assert found.n_neighbors == 5
    np.testing.assert_array_equal(found.of("neighborhood"), np.hstack([means, blocks.features]))
    assert found.widths_of("neighborhood") == (*of_means, *widths)


def test_the_first_components_are_averaged_too(adata, blocks, rng):
    rows = resolve_slices(adata, "library").rows
    expression = rng.normal(size=(184, 63)).astype(np.float32)
    # The cells of one slice have none.
    expression[rows[1]] = np.nan
    read = replace(blocks, expression=expression)
    assert read.sources == ("embedding", "expression")
    found = around(adata, read, 5)
    assert found.sources == get_args(Source)
    first = expression[:, :50]
    means = neighbor_means(first, adata.obsm["spatial"], rows, 5)
    both = found.of("expression neighborhood")
    np.testing.assert_array_equal(both, np.hstack([means, first]))
    assert found.widths_of("expression neighborhood") == (50, 50)
    assert found.widths_of("expression") == (63,)
    np.testing.assert_array_equal(
        found.knows("expression neighborhood"), np.isfinite(expression[:, 0])
    )
    assert found.knows("neighborhood").all()


@pytest.mark.parametrize(
    ("n_neighbors", "use_rep", "options", "expected"),
    [
        (None, DEFAULT_REP, {}, 10),
        (None, DEFAULT_REP, {"split": "blocks"}, 10),
        # Held-out cells would share their neighbours with fitted ones.
        (None, DEFAULT_REP, {"split": "random"}, 0),
        (None, (Obsm.X_CELL, "X_pca"), {}, 0),
        (4, (Obsm.X_CELL, "X_pca"), {"split": "random"}, 4),
        (0, DEFAULT_REP, {}, 0),
    ],
)
def test_number_of_neighbors(adata, blocks, n_neighbors, use_rep, options, expected):
    found = choose(adata, blocks_of(blocks.features, use_rep), n_neighbors, **options)
    assert found.n_neighbors == expected
    assert (found.neighborhood is None) == (expected == 0)


def test_neighbors_of_cells_without_places(adata, blocks):
    del adata.obsm["spatial"]
    assert choose(adata, blocks) is blocks
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        choose(adata, blocks, 3)


@pytest.mark.parametrize("lack", ["no places", "no usable places"])
@pytest.mark.filterwarnings("ignore:.*without their neighbours")
def test_tables_without_labels_have_no_say(adata, pair, blocks, lack):
    left = blocks_of(blocks.features[:101])
    expected = choose(pair[0], left).neighborhood
    if lack == "no places":
        del pair[1].obsm["spatial"]
    else:
        pair[1].obsm["spatial"][3, 0] = np.nan
    found = choose(pair, blocks, rows=np.arange(90))
    np.testing.assert_array_equal(found.neighborhood[:101], expected)
    assert np.isnan(found.neighborhood[101:]).all()
    with pytest.raises((KeyError, ValueError), match="spatial"):
        choose(pair, blocks, 10, rows=np.arange(120))


def test_neighbors_are_of_the_slices_that_were_embedded(adata, model, blocks, rng):
    adata.obs["bregma"] = adata.obs.pop("library")
    adata.obsm["xy"], adata.obsm["spatial"] = adata.obsm["spatial"], rng.random((184, 2))
    st.tl.embed(adata, model, **(QUIET | {"library_key": "bregma", "spatial_key": "xy"}))
    rows = [np.flatnonzero(adata.obs["bregma"] == name) for name in ("left", "right")]
    expected = neighbor_means(blocks.features[:, :4], adata.obsm["xy"], rows, 10)
    found = around(adata, blocks, 10, None)
    np.testing.assert_array_equal(found.neighborhood, expected)


def test_small_slices_are_not_judged_by_their_neighbours(adata, blocks):
    adata.obs["library"] = np.where(np.arange(184) < 5, "five", "many")
    found = around(adata, blocks, 10)
    assert np.isnan(found.neighborhood[:5]).all()
    assert np.isfinite(found.neighborhood[5:]).all()
    # Cells to fit to have what there is.
    assert np.isfinite(choose(adata, blocks).neighborhood).all()
