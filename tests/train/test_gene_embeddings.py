from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from stofm.genes.gene_table import GeneTable
from stofm.nn import Stofm
from stofm.spatial.virtual_cells import principal_components
from stofm.train.gene_embeddings import make_initializer, read_gene_embeddings

WIDTH = 16


@pytest.fixture
def make_table(vocabulary, rng):
    """Make a table of the first genes of the vocabulary, in another order, and of unknown ones."""

    def make(width, n_known=60):
        names = rng.permutation([*vocabulary.symbols[:n_known], "x", "y", "z"])
        values = 7 + 3 * rng.standard_normal((len(names), width))
        return GeneTable(tuple(names.tolist()), values.astype(np.float32), "x.npz", "0" * 16)

    return make


def embeddings(model):
    return model.cell_encoder.gene_embeddings.weight.detach().clone().numpy()


def start(table, model):
    """The model's embeddings before and after, and the table's rows in the order of genes."""
    before = embeddings(model)
    initialize = make_initializer(table, model, seed=0)
    np.testing.assert_array_equal(embeddings(model), before)
    initialize(None, model)
    rows = table.rows_of(model.vocabulary)
    return before, embeddings(model), table.values[rows[rows >= 0]]


def test_a_table_of_the_same_width_is_taken(make_table, model, caplog):
    caplog.set_level("INFO", logger="stofm")
    before, after, rows = start(make_table(WIDTH), model)
    known = model.vocabulary.tokens[:60]
    others = np.setdiff1d(np.arange(len(after)), known)
    np.testing.assert_array_equal(after[others], before[others])
    centered = rows - rows.mean(axis=0)
    np.testing.assert_allclose(after[known], 0.02 * centered / centered.std(), atol=1e-7)
    assert "60 of the model's 67 genes begin with embeddings from x.npz; the other 7" in caplog.text
    assert caplog.records[-1].levelname == "INFO"


@pytest.mark.parametrize("width", [17, 61, 150])
def test_of_a_wider_table_the_first_components_are_taken(make_table, model, width):
    _, after, rows = start(make_table(width), model)
    found = after[model.vocabulary.tokens[:60]].astype(np.float64)
    centered = rows - rows.mean(axis=0, dtype=np.float64)
    # The same up to sign and scale as by a singular value decomposition.
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    wanted = u[:, :WIDTH] * s[:WIDTH]
    np.testing.assert_allclose(found.std(), 0.02, rtol=1e-5)
    scaled = 0.02 * wanted / np.sqrt((wanted**2).mean())
    np.testing.assert_allclose(np.abs(found), np.abs(scaled), atol=1e-5)
    loadings = centered.T @ found
    largest = np.abs(loadings).argmax(axis=0)
    assert (loadings[largest, np.arange(WIDTH)] > 0).all()
    np.testing.assert_allclose(
        found * np.sqrt((wanted**2).mean()) / 0.02, principal_components(rows, WIDTH), atol=1e-3
    )


def test_a_narrower_table_is_refused(make_table, model):
    with pytest.raises(ValueError, match=r"x\.npz has 15 numbers .* have 16\. Lower that \(d_gene"):
        make_initializer(make_table(15), model, seed=0)


def test_a_model_may_have_wider_gene_embeddings_than_bert(make_table, model):
    cells = replace(model.config.cell_encoder, d_gene=20)
    wide = Stofm(replace(model.config, cell_encoder=cells), model.vocabulary, seed=1)
    _, after, _ = start(make_table(21), wide)
    assert after.shape == (70, 20)
    np.testing.assert_allclose(after[model.vocabulary.tokens[:60]].std(), 0.02, rtol=1e-5)


def test_it_warns_if_most_genes_are_missing(make_table, model):
    with pytest.warns(
        UserWarning, match="30 of the model's 67 genes .*; the other 37, which it lacks"
    ):
        make_initializer(make_table(WIDTH, n_known=30), model, seed=0)


def test_a_table_that_tells_nothing_is_refused(make_table, model):
    table = make_table(WIDTH)
    flat = replace(table, values=np.ones_like(table.values))
    with pytest.raises(ValueError, match="has the same numbers for all genes"):
        make_initializer(flat, model, seed=0)


def test_a_table_may_be_named_in_place_of_a_word(tmp_path):
    path = tmp_path / "x.csv"
    pd.DataFrame({"a": [1.0]}, index=["GFAP"]).to_csv(path)
    for given in (path, str(path)):
        assert read_gene_embeddings(given).names == ("GFAP",)
    assert read_gene_embeddings("random") == "random"
    message = r"must be 'random', 'coexpression' or a table that ends in \.parquet, .* found 'pca'"
    with pytest.raises(ValueError, match=message):
        read_gene_embeddings("pca")


def test_it_is_the_same_every_time(make_table, model):
    table = make_table(40)
    start(table, model)
    first = embeddings(model)
    torch.manual_seed(3)
    start(table, model)
    np.testing.assert_array_equal(embeddings(model), first)
