from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stofm.spatial.spots import (
    SpotRules,
    TypedCells,
    gene_scales,
    grid_spots,
    simulate_spots,
)

N_GENES = 61


@pytest.fixture
def profiles(rng):
    """Mean counts of four types; the third has three times the RNA."""
    return rng.gamma(0.4, 4.0, (4, N_GENES)) * np.array([1.0, 1.0, 3.0, 1.0])[:, None]


@pytest.fixture
def reference(rng, profiles):
    codes = rng.permutation(np.repeat(np.arange(4), [90, 50, 31, 7]))
    return sparse.csr_matrix(rng.poisson(profiles[codes])), codes


def simulate(reference, *, seed=0, depths=(200.0,), scale=None, **options):
    cells = TypedCells.sort(*reference, 4)
    rules = SpotRules(**{"n_spots": 300, **options})
    scale = np.ones(N_GENES) if scale is None else scale
    return simulate_spots(cells, depths=np.array(depths), gene_scale=scale, rules=rules, seed=seed)


def test_composition_and_numbers_of_cells(reference):
    spots = simulate(reference, n_spots=3000, cells_per_spot=(1, 8))
    shares = spots.proportions
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    assert shares.min() >= 0.0
    # Each type has the same share over all, and there are pure as well as mixed spots.
    np.testing.assert_allclose(shares.mean(axis=0), 0.25, atol=0.03)
    n_types = (shares > 0).sum(axis=1)
    assert {1, 2, 3, 4} == set(n_types.tolist())
    assert 0.2 < (n_types == 1).mean() < 0.8


def test_spots_of_one_cell_are_pure_and_like_their_type(reference, profiles):
    # As deep as the reference's cells, or the type's mean would be redrawn from several of them.
    spots = simulate(reference, cells_per_spot=(1, 1), depths=[30.0], n_spots=2000)
    assert set(np.unique(spots.proportions)) == {0.0, 1.0}
    for code in range(4):
        mean = spots.counts[spots.proportions[:, code] == 1].mean(axis=0)
        assert np.corrcoef(np.asarray(mean).ravel(), profiles[code])[0, 1] > 0.9


def test_depth_is_that_of_the_query(reference):
    totals = np.asarray(simulate(reference, depths=[80.0, 900.0]).counts.sum(axis=1)).ravel()
    low, high = totals[totals < 300], totals[totals > 300]
    assert low.mean() == pytest.approx(80.0, abs=3.0)
    assert high.mean() == pytest.approx(900.0, abs=10.0)


def test_a_shallow_reference_is_not_blown_up(reference):
    # 4,000 counts from a cell of 100 would make every gene 0 or at least 20.
    spots = simulate(reference, cells_per_spot=(1, 1), depths=[1500.0])
    assert np.median(spots.counts.data) < 40
    assert (spots.counts.data < 10).mean() > 0.1


def test_scale_of_genes(reference):
    scale = np.where(np.arange(N_GENES) % 2, 4.0, 0.25)
    plain, scaled = (
        np.asarray(simulate(reference, scale=s).counts.mean(axis=0)).ravel()
        for s in (np.ones(N_GENES), scale)
    )
    ratio = (scaled / plain)[plain > 0.5]
    odd = (np.arange(N_GENES) % 2 == 1)[plain > 0.5]
    assert ratio[odd].min() > 4 * ratio[~odd].max()


def test_expected_composition(reference):
    cells = TypedCells.sort(*reference, 4)
    share = np.array([0.7, 0.1, 0.1, 0.1])
    spots = simulate_spots(
        cells,
        depths=np.array([100.0]),
        gene_scale=np.ones(N_GENES),
        composition=share,
        rules=SpotRules(n_spots=3000),
        seed=0,
    )
    np.testing.assert_allclose(spots.proportions.mean(axis=0), share, atol=0.03)


def test_order_of_reference_and_query_does_not_matter(reference, rng):
    counts, codes = reference
    order = rng.permutation(len(codes))
    one = simulate(reference, depths=[50.0, 60.0, 70.0])
    other = simulate((counts[order], codes[order]), depths=[70.0, 50.0, 60.0])
    assert (one.counts != other.counts).nnz == 0
    np.testing.assert_array_equal(one.proportions, other.proportions)


def test_seed(reference):
    assert (simulate(reference, seed=1).counts != simulate(reference, seed=1).counts).nnz == 0
    assert (simulate(reference, seed=1).counts != simulate(reference, seed=2).counts).nnz > 0


def test_gene_scales_do_not_take_composition_for_technology(profiles, rng):
    share = np.array([0.85, 0.05, 0.05, 0.05])
    true = np.exp(rng.normal(0.0, 0.7, N_GENES))
    true /= np.median(true)
    scales = gene_scales(share @ profiles * true, 5000, profiles, share)
    assert np.corrcoef(np.log(scales), np.log(true))[0, 1] > 0.98
    # With counts too few to tell, nothing is scaled.
    few = gene_scales(share @ profiles * true * 1e-4, 100, profiles, share)
    assert np.abs(np.log(few)).max() < 0.1
    largest = gene_scales(share @ profiles * np.r_[1e6, np.ones(N_GENES - 1)], 10, profiles, share)
    assert largest.max() == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_spots": 0}, "n_spots must be at least 1, found 0"),
        ({"cells_per_spot": (5, 2)}, r"fewest and the most cells .* found \(5, 2\)"),
        ({"cells_per_spot": (0, 2)}, r"found \(0, 2\)"),
        ({"concentration": (0.0, 1.0)}, r"concentration must be two positive .* \(0\.0, 1\.0\)"),
    ],
)
def test_rules_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        SpotRules(**options)


@pytest.fixture
def cells(rng):
    """97 cells of two slices, three types, some unknown; counts of 5 genes."""
    return (
        rng.random((97, 2)) * [100.0, 60.0] - 20.0,
        rng.integers(-1, 3, 97),
        [np.arange(41), np.arange(41, 97)],
        sparse.csr_matrix(rng.poisson(1.0, (97, 5))),
    )


def test_spots_are_sums_of_the_labelled_cells_in_a_square(cells):
    coordinates, codes, slices, counts = cells
    grid = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    summed = grid.sum_counts(counts).toarray()
    dense = counts.toarray()
    assert (grid.spot[codes < 0] == -1).all()
    assert (grid.spot[codes >= 0] >= 0).all()
    np.testing.assert_allclose(grid.proportions.sum(axis=1), 1.0)
    for spot, (center, number) in enumerate(zip(grid.centers, grid.slices, strict=True)):
        inside = np.zeros(97, dtype=bool)
        inside[slices[number]] = True
        inside &= (np.abs(coordinates - center) <= 12.5).all(axis=1) & (codes >= 0)
        assert (np.flatnonzero(grid.spot == spot) == np.flatnonzero(inside)).all()
        assert (summed[spot] == dense[inside].sum(axis=0)).all()
        shares = np.bincount(codes[inside], minlength=3) / inside.sum()
        np.testing.assert_allclose(grid.proportions[spot], shares)
    assert summed.sum() == dense[codes >= 0].sum()


def test_counts_may_come_in_blocks(cells):
    coordinates, codes, slices, counts = cells
    grid = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    blocks = [grid.sum_counts(counts[a:b], start=a) for a, b in ((0, 30), (30, 31), (31, 97))]
    assert (sum(blocks) != grid.sum_counts(counts)).nnz == 0


def test_order_of_cells_does_not_matter(cells, rng):
    coordinates, codes, slices, counts = cells
    order = np.concatenate([rng.permutation(41), 41 + rng.permutation(56)])
    one = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    other = grid_spots(coordinates[order], codes[order], slices, n_types=3, spot_size=25.0)
    np.testing.assert_array_equal(one.spot[order], other.spot)
    np.testing.assert_array_equal(one.centers, other.centers)
    assert (one.sum_counts(counts) != other.sum_counts(counts[order])).nnz == 0


@pytest.mark.parametrize("size", [0.0, -2.0, np.inf, np.nan])
def test_size_that_can_not_be(cells, size):
    coordinates, codes, slices, _ = cells
    with pytest.raises(ValueError, match="spot_size must be positive"):
        grid_spots(coordinates, codes, slices, n_types=3, spot_size=size)


def test_no_cell_of_known_type(cells):
    coordinates, _, slices, _ = cells
    with pytest.raises(ValueError, match="None of 97 cells has a known type"):
        grid_spots(coordinates, np.full(97, -1), slices, n_types=3, spot_size=5.0)
