"""stofm.tl.impute."""

from __future__ import annotations

import logging

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm._keys import Obsm, Uns
from stofm.heads import fitting, tuning
from stofm.heads.annotation import AnnotationHead
from stofm.heads.imputation import ImputationHead
from stofm.heads.network import HeadTraining

EMBEDDINGS, EXPRESSION = "neighborhood", "expression neighborhood"
QUIET = {"show_progress_bar": False, "device": "cpu"}
LIBRARY = {"library_key": "library", **QUIET}
HELD_OUT = [f"ENSG{k:011d}" for k in (3, 11, 40)]


@pytest.fixture
def training(adata):
    """Genes that follow others, so that there is something to learn."""
    dense = adata.X.toarray()
    for gene, (a, b) in zip((2, 10, 39), ((0, 1), (5, 6), (7, 8)), strict=True):
        dense[:, gene] = dense[:, a] * 3 + dense[:, b]
    adata.X = sparse.csr_matrix(dense)
    return adata


@pytest.fixture
def query(training, rng):
    """The right-hand slice of the training data, its rows mixed."""
    right = training[training.obs["library"] == "right"]
    return right[rng.permutation(right.n_obs)].copy()


def split_by(options):
    """Arguments of a call, and options of the head."""
    names = st.tl.HeadOptions.__dataclass_fields__
    own = {name: options.pop(name) for name in list(options) if name in names}
    return options | ({"options": st.tl.HeadOptions(**own)} if own else {})


@pytest.fixture
def fit(training, model, monkeypatch):
    """Fit a head in two rounds of a few steps; arguments as for `impute`."""
    monkeypatch.setattr(fitting, "_N_ROUNDS", 2)
    monkeypatch.setattr(fitting, "IMPUTING", HeadTraining(max_epochs=4))

    def run(data=training, **options):
        usual = {"genes": HELD_OUT, "model": model, **LIBRARY}
        return st.tl.impute(data, **(usual | split_by(options)))

    return run


@pytest.fixture
def scrambled(rng):
    """Copy an AnnData with other counts in the genes that are held out."""

    def run(adata):
        dense = adata.X.toarray()
        places = adata.var_names.get_indexer(HELD_OUT)
        dense[:, places] = rng.poisson(50.0, (adata.n_obs, len(places)))
        other = adata.copy()
        other.X = sparse.csr_matrix(dense)
        return other

    return run


def seen_inputs(monkeypatch):
    """Collect what heads are fitted to."""
    seen = []

    def watched(sections, request, **options):
        found = original(sections, request, **options)
        tokens = [table.obsm[Obsm.TOKENS].toarray() for table in sections.tables]
        seen.append((found.features, tokens, [table.X.toarray() for table in sections.tables]))
        return found

    original = fitting.read_embeddings
    monkeypatch.setattr(fitting, "read_embeddings", watched)
    return seen


def test_slices_are_read_as_they_were_embedded(fit, training, model):
    expected = fit()
    training.obs["puck"] = training.obs.pop("library")
    training.layers["counts"], training.obsm["xy"] = training.X, training.obsm.pop("spatial")
    training.X = training.X.log1p()
    with pytest.raises(KeyError, match=r"no obsm\['spatial'\]\. These look like .*obsm\['xy'\]"):
        fit(library_key="puck", layer="counts")
    options = {"layer": "counts", "spatial_key": "xy", "library_key": "puck"}
    st.tl.embed(training, model, **options, **QUIET)
    head = fit(library_key=None)
    pd.testing.assert_series_equal(head.gene_scores, expected.gene_scores)
    st.tl.impute(training, head=head, model=model, **QUIET)
    values = training.obsm["stofm_imputed"].copy()
    st.tl.impute(training, head=expected, model=model, **options, **QUIET)
    pd.testing.assert_frame_equal(training.obsm["stofm_imputed"], values)


def test_held_out_genes_reach_nothing_that_is_read(fit, training, scrambled, monkeypatch):
    seen = seen_inputs(monkeypatch)
    components = [fit(one).expression for one in (training, scrambled(training))]
    for name in ("shares", "mean", "axes"):
        np.testing.assert_array_equal(*(getattr(one, name) for one in components))
    (features, tokens, counts), other = seen
    assert np.array_equal(features, other[0])
    assert np.array_equal(tokens[0], other[1][0])
    assert np.array_equal(counts[0], other[2][0])
    # The same change in a gene that is read is seen.
    training.X[:, 4] = training.X[:, 4] * 7
    fit()
    assert not np.array_equal(features, seen[-1][0])


def test_counts_of_held_out_genes_in_a_query_change_nothing(fit, query, scrambled, model):
    head = fit()
    other, without = scrambled(query), query[:, ~query.var_names.isin(HELD_OUT)].copy()
    for one in (query, other, without):
        st.tl.impute(one, head=head, model=model, **LIBRARY)
    assert other.obsm[Obsm.IMPUTED].equals(query.obsm[Obsm.IMPUTED])
    assert without.obsm[Obsm.IMPUTED].equals(query.obsm[Obsm.IMPUTED])


def test_stored_embeddings_and_tokens_are_not_read(fit, training, query, model):
    head = fit()
    st.tl.impute(query, head=head, model=model, **LIBRARY)
    expected = query.obsm.pop(Obsm.IMPUTED)
    for one in (training, query):
        st.tl.embed(one, model, **LIBRARY)
        one.obsm[Obsm.X][:] = 7.0
    again = fit()
    st.tl.impute(query, head=again, model=model, **LIBRARY)
    assert query.obsm[Obsm.IMPUTED].equals(expected)
    assert (query.obsm[Obsm.X] == 7.0).all()


def test_second_columns_of_a_held_out_gene_are_held_out(fit, training, vocabulary, monkeypatch):
    names = training.var_names.tolist()
    names[-1] = str(vocabulary.symbols[2])  # the gene of HELD_OUT[0] under another name
    training.var_names = names
    seen = seen_inputs(monkeypatch)
    head = fit()
    assert seen[0][2][0].shape[1] == 71 - 4
    assert vocabulary.symbols[2] not in {gene.name for gene in head.inputs}


def test_what_is_written(fit, query, model):
    head = fit()
    before = query.copy()
    changed = st.tl.impute(query, head=head, model=model, copy=True, **LIBRARY)
    assert Obsm.IMPUTED not in query.obsm
    assert st.tl.impute(query, head=head, model=model, **LIBRARY) is None
    table = query.obsm[Obsm.IMPUTED]
    assert changed.obsm[Obsm.IMPUTED].equals(table)
    assert table.columns.tolist() == HELD_OUT
    assert table.index.equals(query.obs_names)
    assert (table.dtypes == np.float32).all()
    assert table.to_numpy().min() >= 0
    assert set(query.obsm) == {Obsm.SPATIAL, Obsm.IMPUTED}
    assert query.obs.equals(before.obs)
    assert query.var.equals(before.var)
    assert (query.X != before.X).nnz == 0
    record = query.uns[Uns.STOFM][Obsm.IMPUTED]
    assert record["model_fingerprint"] == model.fingerprint
    assert record["params"]["n_genes"] == 3


def test_genes_are_learnt(fit, training, monkeypatch):
    monkeypatch.setattr(fitting, "IMPUTING", HeadTraining())
    # Of random weights, the cell encoder says little about counts: exact features stand in.
    training.obsm["exact"] = np.log1p(training.X[:, :10].toarray())
    head = fit(use_rep="exact")
    st.tl.impute(training, head=head, **LIBRARY)
    dense = training.X.toarray()
    total = np.delete(dense, training.var_names.get_indexer(HELD_OUT), axis=1).sum(axis=1)
    true = np.log1p(1e4 * dense[:, training.var_names.get_indexer(HELD_OUT)] / total[:, None])
    found = training.obsm[Obsm.IMPUTED].to_numpy()
    assert (st.metrics.pearson(true, found) > 0.8).all()
    assert (st.metrics.rmse(true, found) < true.std(axis=0)).all()
    assert (head.gene_scores > 0.5).all()
    assert head.origin == {"exact": {}}


def test_networks_weigh_as_much_as_is_best_for_held_out_cells(fit, query, model, monkeypatch):
    monkeypatch.setattr(fitting, "stack_weights", lambda _: np.array([0.2, 0.8]))
    head = fit()
    assert head.reads == (EMBEDDINGS,) * 2 + (EXPRESSION,) * 2
    np.testing.assert_allclose(head.weights, [0.1, 0.1, 0.4, 0.4])
    assert head.n_neighbors == 10
    st.tl.impute(query, head=head, model=model, **LIBRARY)
    weighed = query.obsm[Obsm.IMPUTED].to_numpy()
    monkeypatch.setattr(fitting, "stack_weights", lambda _: np.array([1.0, 0.0]))
    st.tl.impute(query, head=fit(), model=model, **LIBRARY)
    assert np.abs(query.obsm[Obsm.IMPUTED].to_numpy() - weighed).max() > 0.01


def test_what_networks_read(fit, model, scales_of):
    """Columns of each representation share a scale."""
    head = fit(n_components=55)
    cell, spatial = model.config.cell_encoder.d_cell, model.config.se2_transformer.d_model
    widths = {EMBEDDINGS: (cell, cell, spatial), EXPRESSION: (50, 50)}
    for network, reads in zip(head.networks, head.reads, strict=True):
        assert len(set(scales_of(network, widths[reads]))) == len(widths[reads])
    alone = fit(n_components=0, n_neighbors=0)
    assert (alone.reads, alone.n_neighbors, alone.expression) == (("embedding",) * 2, 0, None)
    assert fit(n_neighbors=0).reads == ("embedding",) * 2 + ("expression",) * 2


def test_neighbours_of_a_query(fit, training):
    """Neither places nor neighbours are needed of what no model makes, unless asked for."""
    query = training.copy()
    query.obsm["exact"] = training.obsm["exact"] = training.X[:, :6].toarray()
    del query.obsm["spatial"]
    st.tl.impute(query, head=fit(use_rep="exact"), **LIBRARY)
    head = fit(use_rep="exact", n_neighbors=3)
    assert head.reads == (EMBEDDINGS,) * 2
    st.tl.impute(training, head=head, **LIBRARY)
    with pytest.raises(KeyError, match=r"no obsm\['spatial'\]"):
        st.tl.impute(query, head=head, **LIBRARY)


@pytest.mark.parametrize("n_cells", [3, 1])
def test_small_slices_of_a_query(fit, query, model, n_cells):
    head = fit()
    parts = [query[n_cells:].copy(), query[:n_cells].copy()]
    st.tl.impute(parts, head=head, model=model, **QUIET)
    assert np.isfinite(parts[1].obsm[Obsm.IMPUTED]).all(axis=None)


def test_gene_scores_are_of_held_out_cells(fit, training, monkeypatch):
    training.obsm["exact"] = np.log1p(training.X[:, :10].toarray())
    monkeypatch.setattr(fitting, "_N_ROUNDS", 1)
    head = fit(use_rep="exact", split="slices")
    name = head.split["held_out_slices"][0]
    part = training[training.obs["library"] == name].copy()
    st.tl.impute(part, head=head, **LIBRARY)
    dense = part.X.toarray()
    places = part.var_names.get_indexer(HELD_OUT)
    total = np.delete(dense, places, axis=1).sum(axis=1, keepdims=True)
    true = np.log1p(1e4 * dense[:, places] / total)
    expected = st.metrics.pearson(true, part.obsm[Obsm.IMPUTED].to_numpy())
    assert np.allclose(head.gene_scores, expected, atol=1e-5)
    assert head.gene_scores.index.tolist() == HELD_OUT
    assert head.validation_scores["pearson"].iloc[0] == pytest.approx(expected.mean(), abs=1e-5)


def test_order_of_cells_and_genes_does_not_matter(fit, training, query, model, rng):
    # Spatial embeddings differ by rounding, which the steps of AdamW enlarge; these don't. What
    # is left is the rounding of the genes' means.
    rows, columns = rng.permutation(training.n_obs), rng.permutation(training.n_vars)
    found = []
    for data in (training, training[rows, columns].copy()):
        st.tl.impute(query, head=fit(data, use_rep=Obsm.X_CELL), model=model, **LIBRARY)
        found.append(query.obsm[Obsm.IMPUTED])
    assert np.allclose(*found, rtol=0, atol=3e-5)


def test_seeds(fit, query, model):
    found = []
    for seed in (0, 0, 1):
        st.tl.impute(query, head=fit(seed=seed), model=model, **LIBRARY)
        found.append(query.obsm[Obsm.IMPUTED])
    assert found[0].equals(found[1])
    assert np.abs(found[0] - found[2]).to_numpy().max() > 0.05


@pytest.mark.usefixtures("few_epochs")
def test_reference(training, query, model, vocabulary):
    # Names of another kind, other genes, and no column of slices in the reference.
    symbols = dict(zip(vocabulary.gene_ids, vocabulary.symbols, strict=True))
    query.var_names = [symbols.get(name, name) for name in query.var_names]
    lacks = query[:, ~query.var_names.isin([symbols[g] for g in HELD_OUT])].copy()
    reference = training[training.obs["library"] == "left"].copy()
    del reference.obs["library"]
    head = st.tl.impute(lacks, reference=reference, model=model, **LIBRARY)
    assert head.genes == tuple(HELD_OUT)
    assert len(head.inputs) == 68
    assert lacks.obsm[Obsm.IMPUTED].columns.tolist() == HELD_OUT
    again = lacks.copy()
    st.tl.impute(again, head=head, model=model, **LIBRARY)
    assert again.obsm[Obsm.IMPUTED].equals(lacks.obsm[Obsm.IMPUTED])
    # Genes that the query has are held out of it too when they are named.
    named = st.tl.impute(query, reference=reference, genes=["GENE3"], model=model, **LIBRARY)
    assert named.genes == ("GENE3",)
    assert len(named.inputs) == 70


def test_several_anndata(fit, training, query, model):
    parts = {n: training[training.obs["library"] == n].copy() for n in ("left", "right")}
    parts["left"] = parts["left"][:, 5:].copy()
    head = fit(parts, genes=HELD_OUT[1:])
    assert len(head.inputs) == 64
    found = st.tl.impute([query, parts["left"]], head=head, model=model, copy=True, **LIBRARY)
    assert [len(one.obsm[Obsm.IMPUTED]) for one in found] == [83, 101]


def test_some_genes_of_a_head(fit, query, model, monkeypatch):
    monkeypatch.setattr("stofm.heads.imputation._GENES_AT_ONCE", 2)
    head = fit()
    st.tl.impute(query, head=head, model=model, **LIBRARY)
    every = query.obsm[Obsm.IMPUTED]
    st.tl.impute(query, head=head, model=model, genes=[HELD_OUT[2], HELD_OUT[0]], **LIBRARY)
    assert query.obsm[Obsm.IMPUTED].columns.tolist() == [HELD_OUT[2], HELD_OUT[0]]
    assert np.allclose(query.obsm[Obsm.IMPUTED], every[[HELD_OUT[2], HELD_OUT[0]]], atol=1e-6)
    with pytest.raises(ValueError, match=r"does not impute 1 of 2.*'nothing'"):
        st.tl.impute(query, head=head, genes=["nothing", HELD_OUT[0]], model=model, **LIBRARY)
    with pytest.raises(ValueError, match="each once"):
        head.columns_of([HELD_OUT[0], HELD_OUT[0]])


def test_save_and_load(fit, query, model, tmp_path):
    head = fit()
    head.save(tmp_path / "head")
    loaded = ImputationHead.load(tmp_path / "head")
    assert loaded.gene_scores.equals(head.gene_scores)
    assert loaded.inputs == head.inputs
    assert loaded.genes == head.genes
    other = query.copy()
    st.tl.impute(query, head=head, model=model, **LIBRARY)
    st.tl.impute(other, head=loaded, model=model, **LIBRARY)
    assert other.obsm[Obsm.IMPUTED].equals(query.obsm[Obsm.IMPUTED])
    suffixes = {path.suffix for path in (tmp_path / "head").iterdir()}
    assert suffixes == {".json", ".safetensors", ".tsv"}
    with pytest.raises(ValueError, match="imputation"):
        AnnotationHead.load(tmp_path / "head")


def test_genes_that_no_vocabulary_knows(fit, training, query, model):
    strange = training.copy()
    strange.var_names = [f"q{k}" for k in range(strange.n_vars)]
    strange.var = strange.var[[]]
    for data, reference, name in ((query, strange, "reference"), (strange, query, "query")):
        with pytest.raises(
            ValueError, match=rf"Genes of the {name}: Only 0 of .*map_genes\((adata|{name})"
        ):
            st.tl.impute(data, reference=reference, model=model, **LIBRARY)
        assert Obsm.IMPUTED not in data.obsm
    # As the message says.
    strange.var["mine"] = training.var_names
    st.pp.map_genes(strange, gene_key="mine", vocabulary=model)
    fit(query[:, 3:].copy(), genes=None, reference=strange)


def test_another_model_is_refused(fit, query, model):
    head = fit()
    with torch.no_grad():
        next(model.se2_transformer.parameters()).add_(0.5)
    with pytest.raises(ValueError, match="head was fitted to embeddings from"):
        st.tl.impute(query, head=head, model=model, **LIBRARY)
    assert Obsm.IMPUTED not in query.obsm


@pytest.mark.usefixtures("few_steps")
@pytest.mark.filterwarnings("ignore:Tuning")
def test_tuning_the_model(fit, query, model, tmp_path, monkeypatch):
    before, given = model.fingerprint, []
    tune = tuning.fine_tune

    def watched(sections, *args, **options):
        given.extend(sections.tables)
        return tune(sections, *args, **options)

    monkeypatch.setattr(tuning, "fine_tune", watched)
    head = fit(strategy="full")
    # There is a single split.
    assert head.reads == (EMBEDDINGS, EXPRESSION)
    assert model.fingerprint == before != head.model.fingerprint
    assert not set(HELD_OUT) & set(given[0].var_names)
    # The head brings its own model, also from a folder.
    head.save(tmp_path / "head")
    other = query.copy()
    st.tl.impute(query, head=head, **LIBRARY)
    st.tl.impute(other, head=ImputationHead.load(tmp_path / "head"), **LIBRARY)
    assert other.obsm[Obsm.IMPUTED].equals(query.obsm[Obsm.IMPUTED])


def test_each_side_has_its_layer(fit, training, query, model):
    raw = training.copy()
    raw.layers["counts"], raw.X = raw.X, raw.X * 0.37
    some = query[:, 3:].copy()
    for options in ({"reference_layer": "counts"}, {"layer": "counts"}):
        fit(some, genes=None, reference=raw, **options)
        assert some.obsm.pop(Obsm.IMPUTED).shape == (83, 3)
    told = "^reference.X does not hold raw counts.* pass reference_layer='counts'"
    with pytest.raises(ValueError, match=told):
        fit(some, genes=None, reference=raw)
    some.X, some.layers["own"] = some.X * 0.37, some.X
    told = r"^The query: adata.X does not .*adata.layers\['own'\] .*: pass layer='own'"
    with pytest.raises(ValueError, match=told):
        fit(some, genes=None, reference=raw, reference_layer="counts")
    fit(some, genes=None, reference=raw, layer="own", reference_layer="counts")
    with pytest.raises(KeyError, match="The query: There is no layer 'nope'"):
        fit(some, genes=None, reference=raw, layer="nope", reference_layer="counts")


def test_a_dissociated_reference(fit, training, query, model):
    del training.obsm["spatial"]
    some = query[:, 3:].copy()
    with pytest.raises(
        KeyError, match=r"into reference.obsm\['spatial'\].* use_rep='X_stofm_cell'"
    ):
        fit(some, genes=None, reference=training)
    head = fit(some, genes=None, reference=training, use_rep=Obsm.X_CELL)
    assert head.n_neighbors == 0
    assert some.obsm[Obsm.IMPUTED].shape == (83, 3)


@pytest.mark.filterwarnings("ignore:The query has")
def test_query_with_few_of_the_genes(fit, query, model, caplog):
    head = fit()
    some = query[:, [*range(12, 36), *range(45, 50)]].copy()
    with caplog.at_level(logging.WARNING, logger="stofm"):
        st.tl.impute(some, head=head, model=model, **LIBRARY)
    assert "29 of the 68 genes that the head reads (43%)" in caplog.text
    with pytest.raises(ValueError, match=r"5 of the 68 .*At least 10% are needed"):
        st.tl.impute(query[:, 12:17].copy(), head=head, model=model, **LIBRARY)


@pytest.mark.filterwarnings("ignore:.*are constant")
def test_constant_genes(fit, training, caplog):
    training.X = sparse.csr_matrix(
        np.where(training.var_names.isin(HELD_OUT[:1]), 0, training.X.toarray())
    )
    with caplog.at_level(logging.INFO, logger="stofm"):
        head = fit()
    assert "1 of 3 genes are constant" in caplog.text
    assert head.gene_scores.isna().tolist() == [True, False, False]
    with pytest.raises(ValueError, match="All 1 genes to impute are constant"):
        fit(genes=HELD_OUT[:1])


def test_cells_without_counts(fit, training, model):
    dense = training.X.toarray()
    dense[5] = 0
    dense[5, training.var_names.get_indexer(HELD_OUT)] = 9
    training.X = sparse.csr_matrix(dense)
    with pytest.warns(UserWarning, match="no count in any known gene"):
        head = fit(split="slices")
    assert head.split["n_fitted"] + head.split["n_held_out"] == 183
    with pytest.warns(UserWarning, match="no count in any known gene"):
        st.tl.impute(training, head=head, model=model, **LIBRARY)
    assert np.isfinite(training.obsm[Obsm.IMPUTED].to_numpy()).all()


def test_options_are_checked_before_anything_is_embedded(fit, monkeypatch):
    monkeypatch.setattr(fitting, "read_embeddings", None)
    monkeypatch.setattr("stofm.heads.imputation.reduce_tables", None)
    for options in ({"split": "slice"}, {"seed": -1}, {"n_components": 2.5}):
        with pytest.raises(ValueError, match="must be"):
            fit(**options)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_genes_that_a_file_can_not_name(fit, training, model, tmp_path, suffix):
    names = training.var_names.tolist()
    names[-2:] = ["GENE1/GENE2", "GENE1_GENE2"]
    training.var_names = names
    head = fit(genes=[*names[-2:], HELD_OUT[0]], use_rep=Obsm.X_CELL)
    st.tl.impute(training, head=head, model=model, key_added="mine", **LIBRARY)
    left = training[training.obs["library"] == "left"].copy()
    path = tmp_path / f"cells.{suffix}"
    getattr(left, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert list(again.obsm["mine"]) == ["GENE1_GENE2_2", "GENE1_GENE2", HELD_OUT[0]]
    ax = st.pl.imputation(again, "GENE1/GENE2", key="mine", show=False)
    drawn = np.sort(np.ravel(ax)[-1].collections[0].get_array())
    np.testing.assert_allclose(drawn, np.sort(left.obsm["mine"].iloc[:, 0]), rtol=1e-6)
    plt.close("all")


def test_the_picture_normalises_by_the_genes_that_were_read(
    fit, query, model, vocabulary, tmp_path
):
    # The second column of a gene that is held out is in no total.
    names = query.var_names.tolist()
    names[-1] = str(vocabulary.symbols[2])
    query.var_names = names
    head = fit(genes=HELD_OUT[:2])
    st.tl.impute(query, head=head, model=model, genes=HELD_OUT[:1], **LIBRARY)
    read = query.uns[Uns.STOFM][Obsm.IMPUTED]["params"]["inputs"].tolist()
    assert read == [n for n in names[:-1] if n not in HELD_OUT[:2]]
    counts = query.to_df()
    true = np.log1p(1e4 * counts[HELD_OUT[0]] / counts[read].sum(axis=1))
    query.write_h5ad(tmp_path / "query.h5ad")
    for one in (query, ad.read_h5ad(tmp_path / "query.h5ad")):
        measured, _ = st.pl.imputation(one, HELD_OUT[0], show=False)
        drawn = np.sort(measured.collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(true), rtol=1e-5)


def test_bad_calls(fit, training, query, model):
    head = fit()
    cases = [
        ({"genes": None}, "Pass genes= to learn"),
        ({"head": head, "reference": query}, "fitted already"),
        ({"copy": True}, "copy=True is for head="),
        ({"use_rep": ()}, "use_rep must name"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"strategy": "lora", "use_rep": "exact"}, r"obsm\['exact'\] are not embeddings"),
        ({"genes": ["ENSG0000000004"]}, "near: "),
        ({"key_added": Obsm.X}, "would replace something"),
        ({"genes": training.var_names.tolist()}, "No gene is left to read"),
        ({"reference": query, "genes": None}, "nothing to impute"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(**options)
    with pytest.raises(TypeError, match="Expected a head for imputation"):
        st.tl.impute(query, head="folder", model=model, **LIBRARY)
    with pytest.raises(KeyError, match="no layer 'raw'"):
        fit(layer="raw")
    assert Obsm.IMPUTED not in query.obsm
