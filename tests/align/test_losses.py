from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stofm.align.config import AlignOptions
from stofm.align.losses import (
    AlignBatch,
    AlignObjective,
    info_nce,
    may_be_negative,
    retrieval_ranks,
)
from stofm.align.network import AlignNetwork

WIDTHS = {"spot_image": 7, "niche_image": 5, "spot_genes": 11, "niche_genes": 3}


def units(rng: np.random.Generator, n: int, d: int) -> torch.Tensor:
    return F.normalize(torch.from_numpy(rng.normal(size=(n, d))), dim=1)


def batch(rng: np.random.Generator, n: int = 13) -> AlignBatch:
    features = {
        name: torch.from_numpy(rng.normal(size=(n, d)).astype(np.float32))
        for name, d in WIDTHS.items()
    }
    where = np.column_stack([rng.uniform(0, 4, (n, 2)), np.arange(n) % 2, np.arange(n) % 3])
    return AlignBatch(features, torch.from_numpy(where.astype(np.float32)))


def network(**options: object) -> AlignNetwork:
    torch.manual_seed(0)
    small = {"d_model": 6, "n_heads": 2, "d_hidden": 9}
    return AlignNetwork(WIDTHS, AlignOptions(**{**small, **options})).eval()


def test_info_nce_is_the_plain_double_loop(rng: np.random.Generator) -> None:
    queries, keys = units(rng, 7, 5), units(rng, 11, 5)
    is_negative = torch.from_numpy(rng.random((7, 11)) < 0.5)
    scale, start, expected = 8.0, 3, 0.0
    for i in range(7):
        own = math.exp(scale * float(queries[i] @ keys[start + i]))
        others = [
            math.exp(scale * float(queries[i] @ keys[j]))
            for j in range(11)
            if j != start + i and bool(is_negative[i, j])
        ]
        expected -= math.log(own / (own + sum(others)))
    found = info_nce(queries, keys, is_negative, torch.tensor(scale), start)
    assert float(found) == pytest.approx(expected)


def test_spots_whose_niches_overlap_are_no_negatives() -> None:
    # Sides of a niche; the last lies on the first, in another slide.
    where = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 1], [1.2, 0, 0, 1], [0, 0, 1, 0]])
    found = may_be_negative(where, where, "apart")
    overlaps = [[0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0]]
    assert found.int().tolist() == overlaps
    other = may_be_negative(where, where, "other_clusters")
    assert other.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert bool(may_be_negative(where, where, "all").all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_three_losses(rng: np.random.Generator, *, symmetric: bool) -> None:
    inputs, aligned = batch(rng), network(symmetric=symmetric, temperature=0.2)
    parts = AlignObjective(aligned)(inputs)
    found = aligned(inputs.features)
    is_negative = may_be_negative(inputs.where, inputs.where, "apart")
    scale = torch.tensor(5.0)
    pairs = {
        "spot": (found["spot"].image, found["spot"].genes),
        "niche": (found["niche"].image, found["niche"].genes),
        "scales": (found["spot"].fused, found["niche"].fused),
    }
    for name, (one, other) in pairs.items():
        first, second = (info_nce(*p, is_negative, scale) for p in ((one, other), (other, one)))
        expected = (first + second) / 2 if symmetric else first
        torch.testing.assert_close(parts[name].total, expected)
        assert parts[name].count == 13


def test_losses_of_weight_0_are_left_out(rng: np.random.Generator) -> None:
    objective = AlignObjective(network(niche=0.0))
    assert set(objective(batch(rng))) == {"spot", "scales"} == set(objective.weights)


def test_rows_of_other_processes_are_negatives(rng: np.random.Generator) -> None:
    whole, aligned = batch(rng), network()
    parts = [slice(0, 4), slice(4, 13)]
    totals = {"spot": 0.0, "niche": 0.0, "scales": 0.0}
    found = aligned(whole.features)
    rows = [whole.where, *(level[k] for level in found.values() for k in range(3))]

    for part in parts:

        def gather(own: torch.Tensor, part: slice = part) -> tuple[torch.Tensor, int]:
            fits = (r for r in rows if r.shape[1] == own.shape[1])
            all_rows = next(r for r in fits if torch.allclose(r[part], own, atol=1e-6))
            return all_rows, part.start

        inputs = AlignBatch({k: v[part] for k, v in whole.features.items()}, whole.where[part])
        for name, one in AlignObjective(aligned)(inputs, gather).items():
            totals[name] += float(one.total.detach())
    for name, one in AlignObjective(aligned)(whole).items():
        assert totals[name] == pytest.approx(float(one.total.detach()), rel=1e-5)


def test_the_temperature_is_learnt_or_not(rng: np.random.Generator) -> None:
    for learns in (True, False):
        objective = AlignObjective(network(learns_temperature=learns, temperature=0.1))
        sum(part.total for part in objective(batch(rng)).values()).backward()
        scale = objective.network.log_scales["spot"]
        assert float(scale.detach().exp()) == pytest.approx(10.0)
        assert (scale.grad is not None) == learns


def test_ranks_of_partners(rng: np.random.Generator) -> None:
    queries, keys = units(rng, 17, 4).numpy(), units(rng, 17, 4).numpy()
    similarity = queries @ keys.T
    expected = [1 + int((row > row[k]).sum()) for k, row in enumerate(similarity)]
    assert retrieval_ranks(queries, keys).tolist() == expected
    # Nothing is known where all keys are the same.
    assert retrieval_ranks(queries, np.ones((17, 4))).tolist() == [9] * 17
