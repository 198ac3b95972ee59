"""The head of stofm.tl.impute by itself."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm.heads import genes as module
from stofm.heads.gene_columns import Gene
from stofm.heads.genes import (
    Ballot,
    ImputationHead,
    error_products,
    predict_expression,
    score_genes,
    write_imputed,
)
from stofm.heads.inputs import Inputs
from stofm.heads.sections import resolve_slices
from stofm.heads.targets import ExpressionTargets
from stofm.nn import HeadConfig, PredictionHead

GENES = ("GFAP", "MBP", "SST", "VIP", "RELN")


@pytest.fixture
def head(rng):
    """Two networks with random weights, for five genes."""
    torch.manual_seed(3)
    config = HeadConfig(d_input=7, d_output=5, widths=(11, 6))
    return ImputationHead(
        networks=(PredictionHead(config).eval(), PredictionHead(config).eval()),
        outputs=GENES,
        use_rep=("mine",),
        origin={"mine": {}},
        strategy="frozen",
        params={"seed": 0},
        split={},
        validation_scores=pd.DataFrame({"pearson": [0.5]}, index=pd.Index([1], name="network")),
        history=pd.DataFrame({"epoch": [1], "loss": [0.5]}),
        gene_scores=rng.random(5),
        inputs=(Gene("A", "ENSG1"),),
        output_ids=("ENSG2", "", "ENSG4", "ENSG5", ""),
        mean=rng.random(5).astype(np.float32),
        scale=(1 + rng.random(5)).astype(np.float32),
    )


@pytest.fixture
def features(rng):
    """Of 13 cells."""
    return rng.normal(size=(13, 7)).astype(np.float32)


def inputs_of(features, expression=None):
    return Inputs(features, ("mine",), (features.shape[1],), {"mine": {}}, expression)


def ballots(head, features):
    return [Ballot(network, features) for network in head.networks]


def expected(networks, head, features):
    """What networks predict, without any blocks."""
    with torch.no_grad():
        raw = np.mean([network(torch.from_numpy(features)).numpy() for network in networks], axis=0)
    return np.maximum(raw * head.scale + head.mean, 0)


def test_prediction_is_the_mean_of_the_networks_in_the_unit_of_the_genes(head, features):
    head.mean[1] = -9.0  # clipped
    found = head.predict(inputs_of(features))
    assert found.dtype == np.float32
    assert np.allclose(found, expected(head.networks, head, features), atol=1e-6)
    assert not found[:, 1].any()


def test_networks_on_expression_have_a_vote_where_there_is_some(head, features, rng):
    torch.manual_seed(4)
    other = PredictionHead(HeadConfig(d_input=3, d_output=5, widths=(11, 6))).eval()
    networks = (*head.networks, other)
    mixed = replace(head, networks=networks, reads=("embedding", "embedding", "expression"))
    expression = rng.normal(size=(13, 3)).astype(np.float32)
    with torch.no_grad():
        raw = [network(torch.from_numpy(features)).numpy() for network in head.networks]
        raw.append(other(torch.from_numpy(expression)).numpy())
    found = mixed.predict(inputs_of(features, expression))
    wanted = np.maximum(np.mean(raw, axis=0) * head.scale + head.mean, 0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    alone = mixed.predict(inputs_of(features))
    np.testing.assert_array_equal(alone, head.predict(inputs_of(features)))


def test_networks_count_as_they_weigh(head, features):
    weighed = replace(head, weights=(0.6, 0.2))
    with torch.no_grad():
        raw = [network(torch.from_numpy(features)).numpy() for network in head.networks]
    wanted = np.maximum((0.75 * raw[0] + 0.25 * raw[1]) * head.scale + head.mean, 0)
    np.testing.assert_allclose(weighed.predict(inputs_of(features)), wanted, atol=1e-6)
    alone = replace(head, weights=(0.0, 0.2)).predict(inputs_of(features))
    np.testing.assert_allclose(alone, expected(head.networks[1:], head, features), atol=1e-6)


def test_errors_of_standardised_expression(head, features, targets, monkeypatch):
    monkeypatch.setattr(module, "_GENES_AT_ONCE", 2)
    rows = np.array([1, 4, 5, 9, 11, 12])
    found = error_products(ballots(head, features), targets, rows)
    true = (targets.values.toarray()[rows] - head.mean) / head.scale
    with torch.no_grad():
        errors = [
            network(torch.from_numpy(features[rows])).numpy() - true for network in head.networks
        ]
    wanted = [[np.sum(one * other) for other in errors] for one in errors]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_only_genes_asked_for_are_computed_some_at_a_time(head, features, monkeypatch):
    monkeypatch.setattr(module, "_GENES_AT_ONCE", 2)
    asked = []
    original = module.apply_head

    def watched(*args, columns, **options):
        asked.append(columns.tolist())
        return original(*args, columns=columns, **options)

    monkeypatch.setattr(module, "apply_head", watched)
    found = head.predict(inputs_of(features), np.array([4, 0, 2]))
    assert asked == [[4, 0], [4, 0], [2], [2]]
    every = expected(head.networks, head, features)
    assert np.allclose(found, every[:, [4, 0, 2]], atol=1e-6)


def test_genes_by_name_or_id(head):
    assert head.columns_of(None).tolist() == [0, 1, 2, 3, 4]
    assert head.columns_of(["RELN", "ENSG4"]).tolist() == [4, 2]
    assert head.columns_of("MBP").tolist() == [1]
    with pytest.raises(ValueError, match=r"1 of 2 genes, for example \['GFA'\].*'GFAP'"):
        head.columns_of(["GFA", "MBP"])
    for genes in ([], ["SST", "ENSG4"]):
        with pytest.raises(ValueError, match="each once"):
            head.columns_of(genes)


@pytest.fixture
def targets(head, rng):
    """Five genes of 13 cells, one of them always 0."""
    true = rng.random((13, 5)).astype(np.float32)
    true[:, 3] = 0
    return ExpressionTargets(
        kind="values",
        values=sparse.csr_matrix(true),
        n_outputs=5,
        mean=head.mean,
        scale=head.scale,
        has_counts=np.ones(13, dtype=bool),
    )


def test_scores_are_the_metrics(head, features, targets, monkeypatch):
    monkeypatch.setattr(module, "_GENES_AT_ONCE", 2)
    true = targets.values.toarray()
    rows = np.array([1, 4, 5, 9, 11, 12])
    scores = score_genes(ballots(head, features), targets, rows)
    own = ballots(head, features[rows])
    found = predict_expression(own, np.arange(5), head.mean, head.scale)
    for name in ("pearson", "rmse", "mae"):
        own = getattr(st.metrics, name)(true[rows], found)
        assert np.allclose(scores[name], own, equal_nan=True)
    assert np.isnan(scores["pearson"][3])
    assert score_genes(ballots(head, features), targets, rows[:1]).isna().all(axis=None)


def test_scores_have_the_genes_names(head, tmp_path):
    assert head.gene_scores.index.tolist() == list(GENES)
    head.save(tmp_path / "head")
    loaded = ImputationHead.load(tmp_path / "head")
    assert loaded.gene_scores.equals(head.gene_scores)
    assert loaded.targets == head.targets
    assert loaded.inputs == head.inputs
    assert np.array_equal(loaded.scale, head.scale)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_genes_that_a_file_can_not_name(head, adata, rng, tmp_path, suffix):
    genes = ("GENE1/GENE2", "GENE1_GENE2", "SST", "VIP", "RELN")
    head = replace(head, outputs=genes)
    left = adata[adata.obs["library"] == "left"].copy()
    features = rng.normal(size=(101, 7)).astype(np.float32)
    sections = resolve_slices(left, "library")
    write_imputed(sections, head, inputs_of(features), np.array([1, 0, 4]), [["GENE3"]], "mine")
    path = tmp_path / f"cells.{suffix}"
    getattr(left, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert list(again.obsm["mine"]) == ["GENE1_GENE2", "GENE1_GENE2_2", "RELN"]
    ax = st.pl.imputation(again, "GENE1/GENE2", key="mine", show=False)
    drawn = np.sort(ax.collections[0].get_array())
    np.testing.assert_allclose(drawn, np.sort(head.predict(inputs_of(features))[:, 0]), rtol=1e-6)
    plt.close("all")
