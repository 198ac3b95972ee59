"""Spots of many cells: simulated, or made from slices of single cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._config import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


#: Counts of a gene, over the whole query, below which its scale is held near 1.
_PRIOR_COUNTS: Final = 10.0
_LARGEST_SCALE: Final = 20.0
#: Reference cells that may stand for one simulated cell where the reference is shallow.
_MAX_REPLICATES: Final = 20
#: Odd multiplier that spreads the numbers of genes over 31 bits.
_SPREAD: Final = 2_654_435_761


@dataclass(frozen=True, kw_only=True)
class SpotRules:
    """How spots are simulated.

    Attributes
    ----------
    n_spots
        Number of spots.
    cells_per_spot
        Fewest and most cells in a spot, log-uniform in between.
    concentration
        Smallest and largest concentration of the Dirichlet distribution that compositions come
        from, per type. At 0.05 nearly all spots have one or two types, at 1 all mixtures are
        equally likely; log-uniform in between.
    """

    n_spots: int = 10_000
    cells_per_spot: tuple[int, int] = (1, 10)
    concentration: tuple[float, float] = (0.05, 1.0)

    def __post_init__(self) -> None:
        """Check the numbers."""
        require(self, "must be at least 1", lambda n: n >= 1, "n_spots")
        rule = "must be the fewest and the most cells of a spot, such as (1, 10)"
        require(self, rule, lambda pair: 1 <= pair[0] <= pair[1], "cells_per_spot")
        rule = "must be two positive numbers, the smaller first"
        require(self, rule, lambda pair: 0 < pair[0] <= pair[1] < np.inf, "concentration")


@dataclass(frozen=True, eq=False)
class TypedCells:
    """Single cells of known type, in an order that does not depend on that of the input.

    Attributes
    ----------
    counts
        (n_cells, n_genes) raw counts; cells sorted by type.
    starts
        (n_types + 1,) first row of each type, and the number of cells.
    """

    counts: sparse.csr_matrix
    starts: NDArray[np.int64]

    @classmethod
    def sort(
        cls, counts: sparse.csr_matrix, codes: NDArray[np.integer], n_types: int
    ) -> TypedCells:
        """Sort cells by type, and within a type by their counts."""
        weights = (np.arange(1, counts.shape[1] + 1) * _SPREAD) % (1 << 31)
        # Integers below 2**53 add up exactly, in any order of the entries.
        keys = counts.astype(np.int64) @ weights
        order = np.lexsort((keys, codes))
        sizes = np.bincount(codes, minlength=n_types)
        return cls(sparse.csr_matrix(counts[order]), np.concatenate([[0], np.cumsum(sizes)]))

    @property
    def n_types(self) -> int:
        """Number of types."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(n_types,) cells of each type."""
        return np.diff(self.starts)

    def mean_counts(self) -> NDArray[np.float64]:
        """Return the mean counts of each type's cells, (n_types, n_genes)."""
        weights = np.repeat(1.0 / np.maximum(self.sizes, 1), self.sizes)
        rows = sparse.csr_matrix((weights, np.arange(len(weights)), self.starts))
        return np.asarray((rows @ self.counts).toarray(), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class SimulatedSpots:
    """Counts and true composition of simulated spots.

    Attributes
    ----------
    counts
        (n_spots, n_genes) counts.
    proportions
        (n_spots, n_types) share of each type among the cells of a spot; rows sum to 1.
    """

    counts: sparse.csr_matrix
    proportions: NDArray[np.float64]


def simulate_spots(
    cells: TypedCells,
    *,
    depths: NDArray[np.floating],
    gene_scale: NDArray[np.floating],
    composition: NDArray[np.floating] | None = None,
    rules: SpotRules,
    seed: int,
) -> SimulatedSpots:
    """Add up random cells into spots that look like measured ones.

    A composition is drawn for each spot, from pure to well mixed, then its cells, with the counts
    that they have: types with more RNA weigh more, as in a measured spot. Counts are scaled gene by
    gene, and drawn again (Poisson) so that the total of the spot is that of a random measured one;
    genes drop out with it. Where the reference is shallower than that, several of its cells of the
    same type stand for one, so that no count is inflated.

    Parameters
    ----------
    cells
        The reference.
    depths
        Totals of the measured spots over the same genes.
    gene_scale
        (n_genes,) factors from the reference's technology to the measured one,
        :func:`gene_scales`.
    composition
        (n_types,) expected share of each type; all the same by default.
    rules
        Numbers of spots and cells, and kinds of compositions.
    seed
        Seed of all draws.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(cells.n_types, 1 / cells.n_types) if composition is None else composition
    n_cells = _draw_compositions(shares, rules, rng)
    totals = rng.choice(np.sort(np.asarray(depths, dtype=np.float64)), rules.n_spots)
    expected = n_cells @ (cells.mean_counts() @ gene_scale)
    short = totals / np.maximum(expected, 1e-9)
    replicates = np.clip(np.ceil(short), 1, _MAX_REPLICATES).astype(np.int64)
    # How often each cell occurs in a spot, drawn type by type with replacement.
    numbers = n_cells * replicates[:, None]
    types = np.repeat(np.tile(np.arange(cells.n_types), rules.n_spots), numbers.ravel())
    places = cells.starts[types] + (rng.random(len(types)) * cells.sizes[types]).astype(np.int64)
    rows = np.repeat(np.arange(rules.n_spots), numbers.sum(axis=1))
    drawn = (np.ones(len(rows), dtype=np.int64), (rows, places))
    members = sparse.csr_matrix(drawn, shape=(rules.n_spots, cells.counts.shape[0]))
    counts = _measure(sparse.csr_matrix(members @ cells.counts), gene_scale, totals, rng)
    return SimulatedSpots(counts, n_cells / n_cells.sum(axis=1, keepdims=True))


def _draw_compositions(
    shares: NDArray[np.floating], rules: SpotRules, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Numbers of cells of each type, (n_spots, n_types)."""
    n_types = len(shares)
    shares = shares.astype(np.float64) / shares.sum(dtype=np.float64)
    low, high = np.log(rules.concentration)
    concentration = np.exp(rng.uniform(low, high, rules.n_spots))
    weights = rng.standard_gamma(concentration[:, None] * n_types * shares)
    # All of them may underflow to 0 where the concentration is small.
    some = rng.choice(n_types, size=rules.n_spots, p=shares)
    weights[np.arange(rules.n_spots), some] += 1e-100
    fewest, most = rules.cells_per_spot
    span = rng.uniform(np.log(fewest - 0.5), np.log(most + 0.5), rules.n_spots)
    n_cells = np.clip(np.rint(np.exp(span)), fewest, most).astype(np.int64)
    return np.asarray(rng.multinomial(n_cells, weights / weights.sum(axis=1, keepdims=True)))


def _measure(
    summed: sparse.csr_matrix,
    gene_scale: NDArray[np.floating],
    totals: NDArray[np.float64],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Scale genes, then draw counts whose expected total is the given one."""
    summed.sum_duplicates()
    rates = summed.data * gene_scale[summed.indices]
    rows = np.repeat(np.arange(len(totals)), np.diff(summed.indptr))
    sums = np.bincount(rows, weights=rates, minlength=len(totals))
    factor = totals / np.where(sums > 0, sums, 1.0)
    counts = rng.poisson(rates * factor[rows]).astype(np.int32)
    drawn = sparse.csr_matrix((counts, summed.indices, summed.indptr), shape=summed.shape)
    drawn.eliminate_zeros()
    return drawn


def gene_scales(
    query: NDArray[np.floating],
    n_spots: int,
    mean_counts: NDArray[np.floating],
    composition: NDArray[np.floating],
) -> NDArray[np.float64]:
    """Estimate how much more of each gene the query's technology sees than the reference's.

    The query's mean is compared with the mean of the reference's types in the query's composition,
    not in the reference's own, so that frequent types are not mistaken for technology. The median
    gene has the scale 1; genes with few counts are kept near it.

    Parameters
    ----------
    query
        (n_genes,) mean counts of the query.
    n_spots
        Spots of the query.
    mean_counts
        (n_types, n_genes) mean counts of each type.
    composition
        (n_types,) share of each type among the query's cells.

    Returns
    -------
    (n_genes,) factors between 1/20 and 20.
    """
    seen = query * n_spots
    expected = np.asarray(composition @ mean_counts)
    expected = expected * (seen.sum() / max(expected.sum(), 1e-9))
    ratio = np.log((seen + _PRIOR_COUNTS) / (expected + _PRIOR_COUNTS))
    measured = (seen > 0) & (expected > 0)
    ratio -= np.median(ratio[measured]) if measured.any() else 0.0
    largest = np.log(_LARGEST_SCALE)
    return np.asarray(np.exp(np.clip(ratio, -largest, largest)))


@dataclass(frozen=True, eq=False)
class SpotGrid:
    """Which cells form which spot; cells without a type are in none.

    Attributes
    ----------
    spot
        (n_cells,) spot of each cell, -1 for none.
    centers
        (n_spots, 2) centres of the squares, in the unit of the coordinates.
    slices
        (n_spots,) number of each spot's slice.
    proportions
        (n_spots, n_types) share of each type among a spot's cells; rows sum to 1.
    """

    spot: NDArray[np.int64]
    centers: NDArray[np.float64]
    slices: NDArray[np.int64]
    proportions: NDArray[np.float64]

    def sum_counts(self, counts: sparse.csr_matrix, start: int = 0) -> sparse.csr_matrix:
        """Add up counts of cells from row `start` on, as (n_spots, n_genes)."""
        spot = self.spot[start : start + counts.shape[0]]
        cells = np.flatnonzero(spot >= 0)
        members = (np.ones(len(cells), dtype=np.int64), (spot[cells], cells))
        shape = (len(self.centers), counts.shape[0])
        return sparse.csr_matrix(sparse.csr_matrix(members, shape=shape) @ counts)


def grid_spots(
    coordinates: NDArray[np.floating],
    codes: NDArray[np.integer],
    slices: Sequence[NDArray[np.integer]],
    *,
    n_types: int,
    spot_size: float,
) -> SpotGrid:
    """Assign cells to the squares of a grid, slice by slice.

    Squares without a cell of known type are left out. Spots are ordered by slice, then x, then y;
    the order of cells does not matter.

    Parameters
    ----------
    coordinates
        (n_cells, 2), any unit.
    codes
        (n_cells,) type of each cell, from 0 to `n_types` - 1; -1 for cells to leave out.
    slices
        Rows of each slice.
    n_types
        Number of types.
    spot_size
        Side of a square, in the unit of the coordinates.

    Raises
    ------
    ValueError
        `spot_size` is not positive, or no cell has a type.
    """
    if not 0.0 < spot_size < np.inf:
        raise ValueError(
            f"spot_size must be positive, in the unit of the coordinates, found {spot_size!r}."
        )
    number = np.full(len(codes), -1, dtype=np.int64)
    corner = np.zeros((len(slices), 2))
    for k, rows in enumerate(slices):
        number[rows] = k
        corner[k] = coordinates[rows].min(axis=0, initial=np.inf)
    cells = np.flatnonzero((codes >= 0) & (number >= 0))
    if not len(cells):
        raise ValueError(f"None of {len(codes)} cells has a known type, so no spots can be made.")
    own = number[cells]
    square = np.floor((coordinates[cells] - corner[own]) / spot_size).astype(np.int64)
    places, found = np.unique(np.column_stack([own, square]), axis=0, return_inverse=True)
    spot = np.full(len(codes), -1, dtype=np.int64)
    spot[cells] = found.ravel()
    members = np.zeros((len(places), n_types))
    np.add.at(members, (spot[cells], codes[cells]), 1.0)
    centers = corner[places[:, 0]] + (places[:, 1:] + 0.5) * spot_size
    return SpotGrid(spot, centers, places[:, 0], members / members.sum(axis=1, keepdims=True))
