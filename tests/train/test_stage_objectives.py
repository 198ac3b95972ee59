from __future__ import annotations

import pytest

from stofm.train import MaskedGeneConfig, SpatialMasking, StageConfig
from stofm.train.stage_objectives import make_objectives


@pytest.fixture
def stages():
    reference = SpatialMasking.reference()
    return [
        StageConfig(name="cell_encoder", masked_genes=MaskedGeneConfig(candidates="batch")),
        StageConfig(name="spatial"),
        StageConfig(name="spatial", spatial_masking=reference, cell_loss="cosine"),
        StageConfig(name="joint", trains_masked_genes=True),
    ]


def test_stages_train_the_same_heads_unless_they_need_others(model, stages):
    cells, spatial, reference, joint = make_objectives(model, stages, seed=0)
    assert joint.gene_head is cells.gene_head
    assert joint.spatial.cell_head is spatial.cell_head
    # One has a learned vector in place of hidden features, the other a number.
    assert reference.cell_head is not spatial.cell_head
    assert joint.spatial.pair_head is reference.pair_head is spatial.pair_head
    assert joint.encoder is cells.encoder is model.cell_encoder
    assert joint.spatial.transformer is spatial.transformer is model.se2_transformer
    assert cells.masked_genes.candidates == "batch"
    assert (spatial.cell_loss, reference.cell_loss) == ("mse", "cosine")


def test_the_seed_decides_the_heads(model, stages):
    first, second, other = (make_objectives(model, stages, seed=seed)[1] for seed in (1, 1, 2))
    weights = [one.cell_head.layers[0].weight for one in (first, second, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
