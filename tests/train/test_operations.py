"""Estimates against torch's count of what its matrix products do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, TokenBatch, se2_transformer
from stofm.spatial import build_subslice, lay_out_slice
from stofm.train.cell_masking import SpatialMasking, apply, draw
from stofm.train.gene_masking import TokenMasking
from stofm.train.inputs import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.losses import LossWeights, MaskedGeneConfig
from stofm.train.objectives import CellEncoderObjective, JointObjective
from stofm.train.spatial_objective import SpatialObjective

N_CELLS, N_GENES = 17, 30


def forward_operations(objective, inputs):
    """Operations of all products of vectors with matrices."""
    counter = FlopCounterMode(display=False)
    with counter:
        objective(inputs)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in {"aten.mm", "aten.addmm"})


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    """Leave out the products of queries, keys and values, which are not counted."""
    monkeypatch.setattr(se2_transformer, "biased_attention", lambda q, k, values, *_, **__: values)


@pytest.fixture
def tokens(rng, vocabulary):
    """17 cells of 30 genes, so that nothing is padding."""
    lists = [rng.permutation(vocabulary.tokens)[:N_GENES] for _ in range(N_CELLS)]
    ranked = RankedTokens(
        tokens=np.concatenate(lists),
        offsets=N_GENES * np.arange(N_CELLS + 1),
        values=rng.uniform(0.5, 9.0, N_CELLS * N_GENES).astype(np.float32),
    )
    cells = np.arange(N_CELLS)
    special = {"cls_token": vocabulary.cls, "pad_token": vocabulary.pad}
    return TokenBatch.from_ranked(ranked, cells, length=N_GENES + 1, **special)


@pytest.fixture
def generators():
    return [np.random.default_rng(k) for k in range(N_CELLS)]


@pytest.fixture
def masked(rng, model):
    rules = model.config.subslice
    features = rng.normal(size=(40, 12)).astype(np.float32)
    layout = lay_out_slice(rng.random((40, 2)), features, rules)
    subslice = build_subslice(layout, features, np.arange(40), rules)
    masking = SpatialMasking(masked=0.5, moved=0.5)
    drawn = draw(40, masking, rng)
    return MaskedSubSliceBatch.from_masked([apply(subslice, drawn, masking, n_surrounding=5)])


@pytest.mark.parametrize("candidates", ["vocabulary", "batch"])
@pytest.mark.parametrize(
    "reads",
    [
        {},
        {"values": "log", "pooled": True, "d_cell": 28},
        {"pooled": True, "d_gene": 24, "d_cell": 36},
    ],
)
def test_cell_encoder(model, vocabulary, tokens, generators, candidates, reads):
    encoder = CellEncoder(replace(model.config.cell_encoder, **reads))
    inputs = CellBatch.build(
        tokens, generators, masking=TokenMasking(), gene_dropout=0.0, vocabulary=vocabulary
    )
    config = MaskedGeneConfig(candidates=candidates)
    found = []
    for weights in ({"contrastive": 0.0}, {"masked_genes": 0.0}, {}):
        objective = CellEncoderObjective(
            encoder, masked_genes=config, weights=LossWeights(**weights)
        )
        counted = forward_operations(objective, inputs)
        if "contrastive" in objective.weights:
            counted -= 2 * N_CELLS**2 * 12  # cosines of all cells
        assert objective.count_operations(inputs) == 3 * counted
        found.append(3 * counted)
    assert found[2] == found[0] + found[1]


def test_frozen_weights_do_not_count(model, vocabulary, tokens, generators):
    inputs = CellBatch.build(
        tokens, generators, masking=TokenMasking(), gene_dropout=0.0, vocabulary=vocabulary
    )
    objective = CellEncoderObjective(model.cell_encoder, weights=LossWeights(masked_genes=0.0))
    model.cell_encoder.bert.requires_grad_(False)
    assert objective.count_operations(inputs) == 6 * 2 * N_CELLS * 16 * 12


@pytest.mark.parametrize(
    "weights",
    [
        {"masked_cells": 0.0},
        {"masked_cells": 0.5},
        {"masked_cells": 1.0},
        {"visible_cells": 1.0},
        {"visible_cells": 1.0, "surroundings": 2.0},
    ],
)
def test_transformer_over_nodes_and_pairs(model, masked, weights):
    objective = SpatialObjective(model.se2_transformer, weights=LossWeights(**weights))
    # The bias is also computed of the one distance that stands for all pairs without.
    counted = forward_operations(objective, masked) - 2 * (5 * 5 + 5 * 2)
    assert objective.count_operations(masked) == 3 * counted


def test_both_networks_with_their_own_tokens(model, vocabulary, masked, tokens, generators):
    genes = MaskedGenes.build(tokens, generators, masking=TokenMasking(), vocabulary=vocabulary)
    inputs = JointBatch(
        masked=masked, cells=(tokens,), places=torch.arange(1, 1 + N_CELLS), genes=(genes,)
    )
    for masked_genes in (None, MaskedGeneConfig(), MaskedGeneConfig(candidates="batch")):
        objective = JointObjective(
            model.cell_encoder, SpatialObjective(model.se2_transformer), masked_genes=masked_genes
        )
        counted = forward_operations(objective, inputs) - 2 * (5 * 5 + 5 * 2)
        assert objective.count_operations(inputs) == 3 * counted
