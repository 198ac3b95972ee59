"""The head of stofm.tl.deconvolve by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import stofm as st
from stofm.heads.blocks import Blocks
from stofm.heads.deconvolution import DeconvolutionHead
from stofm.heads.fitting import score_outputs
from stofm.heads.network import apply_head
from stofm.nn import HeadConfig, PredictionHead

TYPES = ("astro", "micro", "oligo")


@pytest.fixture
def head():
    """Two networks with random weights, for three types."""
    torch.manual_seed(3)
    config = HeadConfig(d_input=7, d_output=3, widths=(11, 6))
    return DeconvolutionHead(
        networks=(PredictionHead(config).eval(), PredictionHead(config).eval()),
        reads=("embedding", "embedding"),
        weights=(0.75, 0.25),
        outputs=TYPES,
        use_rep=("mine",),
        origin={"mine": {}},
        strategy="frozen",
        params={"seed": 0},
        split={},
        validation_scores=pd.DataFrame({"pearson": [0.5, 0.6, 0.7]}),
        history=pd.DataFrame({"epoch": [1], "loss": [0.5]}),
    )


@pytest.fixture
def blocks(rng):
    """Of 13 spots."""
    return Blocks(rng.normal(size=(13, 7)).astype(np.float32), ("mine",), (7,), {"mine": {}})


def test_mean_and_spread_are_by_weight(head, blocks):
    votes = [apply_head(one, blocks.features, "proportions").astype(float) for one in head.networks]
    mean = np.average(votes, axis=0, weights=head.weights)
    spread = np.sqrt(np.average((votes - mean) ** 2, axis=0, weights=head.weights))
    found = head.predict(blocks)
    np.testing.assert_allclose(found[0], mean, atol=1e-6)
    np.testing.assert_allclose(found[1], spread, atol=1e-6)
    np.testing.assert_allclose(found[0].sum(axis=1), 1.0, rtol=1e-12)
    single = replace(head, networks=head.networks[:1], reads=("embedding",), weights=(1.0,))
    np.testing.assert_allclose(single.predict(blocks)[0], votes[0], atol=1e-6)
    assert single.predict(blocks)[1] is None


def test_scores_of_types(rng):
    true, found = rng.dirichlet(np.ones(3), 9), rng.dirichlet(np.ones(3), 9)
    true[:, 1] = 0.25
    scores = score_outputs(TYPES, true.astype(np.float32), found, "type")
    assert list(scores.index) == list(TYPES)
    for name in ("pearson", "rmse", "mae"):
        wanted = getattr(st.metrics, name)(true.astype(np.float32).astype(float), found)
        np.testing.assert_allclose(scores[name], wanted)
    assert np.isnan(scores.loc["micro", "pearson"])
    assert score_outputs(TYPES, true[:1], found[:1], "type").isna().all(axis=None)


def test_names_of_types_stay_when_they_look_like_something_else(head, tmp_path):
    head = replace(head, outputs=("0", "NA", "None"))
    head.save(tmp_path / "head")
    again = DeconvolutionHead.load(tmp_path / "head")
    pd.testing.assert_frame_equal(head.validation_scores, again.validation_scores)
    assert list(again.validation_scores.index) == ["0", "NA", "None"]
