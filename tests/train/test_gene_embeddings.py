from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from stofm.genes import RankedTokens
from stofm.genes.gene_table import GeneTable
from stofm.nn import Stofm, TokenBatch, encode_cells
from stofm.spatial.virtual_cells import principal_components
from stofm.train.gene_embeddings import (
    coexpression_factors,
    initialize_from_coexpression,
    make_initializer,
    read_gene_embeddings,
)

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


#: Tokens 2 to 68 are genes, as in the vocabulary.
N_GENES = 67
N_TOKENS = 70


def ranked_from(expression, genes):
    """Tokens of cells with log(1 + value) = expression at some genes; zeros are not stored."""
    values = sparse.csr_matrix(expression)
    return RankedTokens(
        tokens=(2 + np.asarray(genes))[values.indices].astype(np.int32),
        offsets=values.indptr.astype(np.int64),
        values=np.expm1(values.data).astype(np.float32),
    )


def dense(ranked):
    """log(1 + value), (n_cells, N_TOKENS)."""
    rows = np.repeat(np.arange(ranked.n_cells), ranked.n_tokens)
    found = np.zeros((ranked.n_cells, N_TOKENS))
    found[rows, ranked.tokens] = np.log1p(ranked.values)
    return found


def scores(ranked, factors):
    """Factors of the cells, less their mean over the slice."""
    found = dense(ranked) @ factors
    return found - found.mean(axis=0)


@pytest.fixture
def planted(rng):
    """Slices of one tissue with three hidden factors, each with a panel and a level of its own."""
    loadings = rng.standard_normal((N_GENES, 3)) * [0.7, 0.6, 0.5]
    level = rng.uniform(1.5, 3.0, N_GENES)
    panels = [np.arange(0, 45), np.arange(22, 67), rng.permutation(N_GENES)[:40]]
    slices, hidden = [], []
    for genes, n_cells in zip(panels, (211, 173, 97), strict=True):
        cells = rng.standard_normal((n_cells, 3))
        expression = level + rng.normal(0, 0.5, N_GENES) + cells @ loadings.T
        expression += 0.3 * rng.standard_normal(expression.shape)
        slices.append(ranked_from(np.maximum(expression, 0)[:, genes], genes))
        hidden.append(cells)
    return slices, hidden


def explained(given, wanted, of=None):
    """Share of the variance of `wanted` that a linear map of `given`, fitted on `of`, explains."""
    fitted_on, answers = of or (given, wanted)
    weights = np.linalg.lstsq(fitted_on, answers - answers.mean(axis=0), rcond=None)[0]
    wanted = wanted - wanted.mean(axis=0)
    return 1 - ((given @ weights - wanted) ** 2).sum(axis=0) / (wanted**2).sum(axis=0)


def test_planted_factors_are_found_whatever_the_panel(planted):
    slices, hidden = planted
    factors = coexpression_factors(slices, N_TOKENS, 3)
    assert factors.shape == (N_TOKENS, 3)
    assert factors.dtype == np.float32
    for ranked, cells in zip(slices, hidden, strict=True):
        assert explained(scores(ranked, factors), cells).min() > 0.9


def test_factors_mean_the_same_in_slices_with_different_panels(planted):
    slices, hidden = planted
    factors = coexpression_factors(slices, N_TOKENS, 3)
    first = scores(slices[0], factors), hidden[0]
    for ranked, cells in zip(slices[1:], hidden[1:], strict=True):
        assert explained(scores(ranked, factors), cells, of=first).min() > 0.65
        # Factors of its own would not do.
        own = scores(ranked, coexpression_factors([ranked], N_TOKENS, 3))
        assert explained(own, cells).min() > 0.9
        assert explained(own, cells, of=first).min() < 0.3


@pytest.mark.parametrize("scaling", [0.0, 0.5, 1.0])
def test_of_one_slice_they_are_the_principal_components(planted, scaling):
    ranked = planted[0][0]
    found = coexpression_factors([ranked], N_TOKENS, 3, iterations=30, scaling=scaling)
    values = dense(ranked)
    measured = values.any(axis=0)
    centered = values[:, measured] - values[:, measured].mean(axis=0)
    scale = centered.std(axis=0) ** -scaling
    components = np.linalg.svd(centered * scale, full_matrices=False)[2][:3].T
    largest = np.abs(components).argmax(axis=0)
    components *= np.sign(components[largest, range(3)])
    np.testing.assert_allclose(found[measured], components * scale[:, None], atol=2e-3)
    assert not found[~measured].any()


def test_scaling_decides_what_a_loud_gene_counts(planted):
    ranked = planted[0][0]
    loud = dense(ranked)[:, 2:47]
    loud[:, 7] *= 20
    loud = ranked_from(loud, np.arange(45))

    def first_factor(ranked, scaling):
        factors = coexpression_factors([ranked], N_TOKENS, 3, iterations=30, scaling=scaling)
        return scores(ranked, factors)[:, 0]

    as_before = np.corrcoef(first_factor(loud, 1.0), first_factor(ranked, 1.0))[0, 1]
    assert as_before > 0.999
    of_gene = [
        abs(np.corrcoef(dense(one)[:, 2 + 7], first_factor(one, 0.0))[0, 1])
        for one in (loud, ranked)
    ]
    assert of_gene[0] > 0.95 > of_gene[1]


def test_a_gene_that_hardly_varies_is_not_blown_up(planted, rng):
    ranked = planted[0][0]
    with_noise = dense(ranked)[:, 2:48]
    with_noise[:, 45] = 1 + 1e-4 * rng.standard_normal(len(with_noise))
    factors = coexpression_factors(
        [ranked_from(with_noise, np.arange(46))], N_TOKENS, 3, scaling=1.0
    )
    share = np.abs(factors[2:48] * with_noise.std(axis=0)[:, None])
    assert (share[45] < 0.02 * np.median(share[:45], axis=0)).all()


def test_order_of_cells_and_slices_does_not_matter(planted, rng):
    slices, _ = planted
    factors = coexpression_factors(slices, N_TOKENS, 3)
    mixed = []
    for ranked in slices:
        genes = np.flatnonzero(dense(ranked).any(axis=0))
        mixed.append(ranked_from(rng.permutation(dense(ranked))[:, genes], genes - 2))
    np.testing.assert_allclose(
        coexpression_factors(mixed[::-1], N_TOKENS, 3), factors, rtol=1e-3, atol=1e-5
    )


def test_the_seed_decides_neither_sign_nor_order(planted):
    slices, _ = planted
    first, other = (
        coexpression_factors(slices, N_TOKENS, 3, iterations=30, seed=seed) for seed in (0, 1)
    )
    np.testing.assert_allclose(other, first, atol=2e-3)
    strength = [np.mean([scores(one, first)[:, k].var() for one in slices]) for k in range(3)]
    assert strength == sorted(strength, reverse=True)
    again = coexpression_factors(slices, N_TOKENS, 3, iterations=30)
    np.testing.assert_array_equal(again, first)


def test_too_few_genes_are_refused(planted):
    genes = np.unique(planted[0][0].tokens)
    message = f"Found {len(genes)} genes that vary within slices for {len(genes) + 1} factors; .* Lower the width of gene embeddings"
    with pytest.raises(ValueError, match=message):
        coexpression_factors(planted[0][:1], N_TOKENS, len(genes) + 1)
    full = coexpression_factors(planted[0][:1], N_TOKENS, len(genes))
    assert np.isfinite(full).all()


def test_values_are_needed(planted):
    without = [planted[0][0], planted[0][1].without_values()]
    with pytest.raises(ValueError, match=r"needs the values .* cell_encoder\.pooled = true"):
        coexpression_factors(without, N_TOKENS, 3)


@pytest.fixture
def corpus(planted):
    """The planted slices, of which only the tokens are read."""
    return SimpleNamespace(slices=[SimpleNamespace(ranked=ranked) for ranked in planted[0]])


@pytest.fixture
def make_model(vocabulary, model):
    """Make a model that reads values, from random weights."""

    def make(**changed):
        options = {"d_cell": 24, "d_hidden": 16, "pooled": True, **changed}
        cells = replace(model.config.cell_encoder, values="log", **options)
        transformer = replace(model.config.se2_transformer, d_cell=options["d_cell"])
        config = replace(model.config, cell_encoder=cells, se2_transformer=transformer)
        return Stofm(config, vocabulary, seed=1).eval()

    return make


@pytest.mark.parametrize("d_gene", [None, 20])
def test_the_cell_embedding_then_begins_with_factors_of_counts_and_of_values(
    corpus, make_model, d_gene
):
    model = make_model(d_gene=d_gene)
    initialize_from_coexpression(corpus, model)
    encoder, width = model.cell_encoder, d_gene or 16
    medians = encoder.medians.numpy()
    assert np.ptp(medians) > 0
    ranked = [one.ranked for one in corpus.slices]
    for scale, scaling, columns in (
        (medians, 0.0, slice(width // 2)),
        (np.ones_like(medians), 0.5, slice(width // 2, width)),
    ):
        factors = coexpression_factors(ranked, N_TOKENS, width // 2, scaling=scaling, scale=scale)
        np.testing.assert_allclose(encoder.gene_embeddings.weight[:, columns].detach(), factors)
    found = [
        encode_cells(encoder, one, model.vocabulary, device=torch.device("cpu"))[:, :width]
        for one in ranked
    ]
    means = np.array([one.mean(axis=0) for one in found])
    np.testing.assert_allclose(means.mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("d_gene", [20, 10])
def test_bert_reads_the_first_factors(corpus, make_model, d_gene):
    model = make_model(d_gene=d_gene)
    initialize_from_coexpression(corpus, model)
    encoder = model.cell_encoder
    genes, words = encoder.gene_embeddings.weight, encoder.words()
    shared = min(d_gene, 16)
    ratio = words[:, 0].norm() / genes[:, 0].norm()
    torch.testing.assert_close(words[:, :shared], genes[:, :shared] * ratio)
    assert not words[:, shared:].any()
    seen = genes.any(dim=1)
    spread = (genes[seen] * ratio).square().mean().sqrt().item()
    assert spread == pytest.approx(encoder.bert.config.initializer_range)


def test_only_bert_learns_from_there(corpus, make_model):
    model = make_model(d_gene=20)
    initialize_from_coexpression(corpus, model)
    encoder = model.cell_encoder
    tokens = TokenBatch.from_ranked(
        corpus.slices[0].ranked,
        np.arange(5),
        cls_token=model.vocabulary.cls,
        pad_token=model.vocabulary.pad,
        length=24,
    )
    (encoder(tokens) @ torch.linspace(-1, 1, encoder.config.d_learned)).sum().backward()
    for weight in (encoder.projection.weight, encoder.gene_projection.weight):
        assert weight.grad.abs().max() > 0
    assert encoder.gene_embeddings.weight.grad is None
    assert encoder.gene_offset.grad is None


def test_a_model_that_does_not_pool_is_refused(corpus, make_model):
    with pytest.raises(ValueError, match=r"pools nothing: set cell_encoder\.pooled to true"):
        initialize_from_coexpression(corpus, make_model(pooled=False))


def test_a_corpus_without_values_is_refused(write_corpus, make_model):
    with pytest.raises(ValueError, match="needs the values of the tokens"):
        initialize_from_coexpression(write_corpus([23]), make_model())
