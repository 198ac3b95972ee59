"""The head of stofm.tl.impute by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm.heads import imputation as module
from stofm.heads.blocks import Blocks
from stofm.heads.genes import Gene
from stofm.heads.imputation import ImputationHead
from stofm.heads.network import apply_head
from stofm.nn import HeadConfig, PredictionHead

GENES = ("GFAP", "MBP", "SST", "VIP", "RELN")


@pytest.fixture
def head(rng):
    """Two networks with random weights, for five genes."""
    torch.manual_seed(3)
    config = HeadConfig(d_input=7, d_output=5, widths=(11, 6))
    return ImputationHead(
        networks=(PredictionHead(config).eval(), PredictionHead(config).eval()),
        reads=("embedding", "embedding"),
        weights=(0.5, 0.5),
        outputs=GENES,
        use_rep=("mine",),
        origin={"mine": {}},
        strategy="frozen",
        params={"seed": 0},
        split={},
        validation_scores=pd.DataFrame({"pearson": [0.5]}, index=pd.Index([1], name="network")),
        history=pd.DataFrame({"epoch": [1], "loss": [0.5]}),
        panel=(Gene("A", "ENSG1"),),
        gene_scores=rng.random(5),
        output_ids=("ENSG2", "", "ENSG4", "ENSG5", ""),
        mean=rng.random(5).astype(np.float32),
        scale=(1 + rng.random(5)).astype(np.float32),
    )


@pytest.fixture
def blocks(rng):
    """Of 13 cells."""
    return Blocks(rng.normal(size=(13, 7)).astype(np.float32), ("mine",), (7,), {"mine": {}})


def expected(head, features, weights=(0.5, 0.5)):
    """What networks predict, without any blocks."""
    raw = [apply_head(network, features, "values") for network in head.networks]
    return np.maximum(np.average(raw, axis=0, weights=weights) * head.scale + head.mean, 0)


def test_prediction_is_the_weighted_mean_in_the_unit_of_the_genes(head, blocks):
    head.mean[1] = -9.0  # clipped
    head = replace(head, weights=(0.75, 0.25))
    found = head.predict(blocks)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, expected(head, blocks.features, weights=(0.75, 0.25)), atol=1e-6
    )
    assert not found[:, 1].any()


def test_only_genes_asked_for_are_computed_some_at_a_time(head, blocks, monkeypatch):
    monkeypatch.setattr(module, "_GENES_AT_ONCE", 2)
    asked = []

    def watched(*args, columns, **options):
        asked.append(columns.tolist())
        return apply_head(*args, columns=columns, **options)

    monkeypatch.setattr("stofm.heads.head.apply_head", watched)
    found = head.predict(blocks, np.array([4, 0, 2]))
    assert asked == [[4, 0], [4, 0], [2], [2]]
    np.testing.assert_allclose(found, expected(head, blocks.features)[:, [4, 0, 2]], atol=1e-6)


def test_genes_by_name_or_id(head):
    assert head.columns_of(None).tolist() == [0, 1, 2, 3, 4]
    assert head.columns_of(["RELN", "ENSG4"]).tolist() == [4, 2]
    assert head.columns_of("MBP").tolist() == [1]
    with pytest.raises(ValueError, match=r"1 of 2 genes, for example \['GFA'\].*'GFAP'"):
        head.columns_of(["GFA", "MBP"])
    for genes in ([], ["SST", "ENSG4"]):
        with pytest.raises(ValueError, match="each once"):
            head.columns_of(genes)


def test_scores_are_the_metrics(head, blocks, rng, monkeypatch):
    monkeypatch.setattr(module, "_GENES_AT_ONCE", 2)
    true = rng.random((13, 5)).astype(np.float32)
    true[:, 3] = 0
    rows = np.array([1, 4, 5, 9, 11, 12])
    for own, weights in ((slice(None), (0.75, 0.25)), (slice(1, None, 2), (0.0, 1.0))):
        part = replace(
            head, networks=head.networks[own], reads=head.reads[own], weights=(0.3, 0.1)[own]
        )
        scores = module.score_genes(part, blocks.take(rows), sparse.csr_matrix(true[rows]))
        found = expected(head, blocks.features[rows], weights)
        for name in ("pearson", "rmse", "mae"):
            wanted = getattr(st.metrics, name)(true[rows], found)
            np.testing.assert_allclose(scores[name], wanted, rtol=1e-4)
    assert np.isnan(scores["pearson"][3])
    one = module.score_genes(part, blocks.take(rows[:1]), sparse.csr_matrix(true[rows[:1]]))
    assert one.isna().all(axis=None)


def test_files(head, tmp_path):
    assert head.gene_scores.index.tolist() == list(GENES)
    head.gene_scores.iloc[2] = np.nan
    head.save(tmp_path / "head")
    loaded = ImputationHead.load(tmp_path / "head")
    assert loaded.gene_scores.equals(head.gene_scores)
    assert loaded.output_ids == head.output_ids
    assert loaded.inputs == head.inputs == (Gene("A", "ENSG1"),)
    np.testing.assert_array_equal(loaded.scale, head.scale)
    np.testing.assert_array_equal(loaded.mean, head.mean)
