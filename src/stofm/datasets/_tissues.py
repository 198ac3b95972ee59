"""Simulated tissues: which cell types live in which region, and what they express.

Everything here is fixed: slices of one tissue that are drawn with different seeds have the same
types, the same panel and the same profiles, as sections of one organ have.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Species = Literal["human", "mouse"]
Regions = Literal["laminar", "nodular"]

_PROFILE_SEED: Final = 2025
#: Rounds of one marker per cell type that open a panel, before other genes are mixed in.
_FIRST_ROUNDS: Final = 6
_SHARE_WITH_GRADIENT: Final = 0.15


class Tissue(NamedTuple):
    """What a kind of tissue is made of.

    Attributes
    ----------
    regions, cell_types
        Names, in anatomical order.
    composition
        (n_regions, n_types) expected share of each type, rows sum to 1.
    type_gradients
        (2, n_types) change of a type's log share along the two fields of position.
    """

    regions: tuple[str, ...]
    cell_types: tuple[str, ...]
    composition: NDArray[np.float64]
    type_gradients: NDArray[np.float64]


class Panel(NamedTuple):
    """The genes that are measured, and what each cell type expresses of them.

    Attributes
    ----------
    symbols
        (n_genes,) gene symbols of the species.
    marker_of
        (n_genes,) cell types of the tissue that the gene marks, joined by commas, or "".
    expression
        (n_types, n_genes) mean counts; a row's total is 1 on average over types.
    gradients
        (2, n_genes) change of log expression along the two fields of position; most are 0.
    shape
        (n_genes,) shape of the Gamma distribution of a gene's rate: the smaller, the noisier.
    """

    symbols: NDArray[np.str_]
    marker_of: NDArray[np.str_]
    expression: NDArray[np.float32]
    gradients: NDArray[np.float32]
    shape: NDArray[np.float32]


class _Gene(NamedTuple):
    human: str
    mouse: str
    cell_types: frozenset[str]


@cache
def make_tissue(regions: Regions) -> Tissue:
    """Return the cortex-like (``"laminar"``) or tumour-like (``"nodular"``) tissue."""
    with (files("stofm.datasets") / f"_{regions}.tsv").open(encoding="utf-8") as file:
        (_, *cell_types), *rows = csv.reader(file, delimiter="\t")
    composition = np.array([row[1:] for row in rows], dtype=np.float64)
    rng = np.random.default_rng([_PROFILE_SEED, len(cell_types)])
    return Tissue(
        regions=tuple(row[0] for row in rows),
        cell_types=tuple(cell_types),
        composition=composition / composition.sum(axis=1, keepdims=True),
        type_gradients=rng.normal(0.0, 0.4, (2, len(cell_types))),
    )


def make_panel(n_genes: int, *, species: Species, regions: Regions, platform: int) -> Panel:
    """Choose the first `n_genes` of a tissue's panel and the profiles of its cell types.

    A smaller panel is the beginning of a larger one. A mouse gene has the profile of its human
    counterpart. Each `platform` detects some genes better than others.
    """
    genes, tissue = _genes(), make_tissue(regions)
    in_order = _panel_order(tissue.cell_types)
    known = [row for row in in_order if getattr(genes[row], species)]
    if n_genes > len(known):
        msg = (
            f"n_genes={n_genes} asked for, but there are real symbols of {len(known)} {species} "
            f"genes; pass n_genes <= {len(known)}."
        )
        raise ValueError(msg)
    columns = np.array(known[:n_genes])
    chosen = [genes[row] for row in columns]
    log_expression, gradients, shape = _profiles()
    types = np.array([_all_types().index(name) for name in tissue.cell_types])
    efficiency = np.random.default_rng([_PROFILE_SEED, platform]).normal(0.0, 0.4, len(genes))
    expression = np.exp(log_expression[np.ix_(types, columns)] + efficiency[columns])
    return Panel(
        symbols=np.array([getattr(gene, species) for gene in chosen]),
        marker_of=np.array(
            [",".join(t for t in tissue.cell_types if t in gene.cell_types) for gene in chosen]
        ),
        expression=(expression / expression.sum(axis=1).mean()).astype(np.float32),
        gradients=gradients[:, columns].astype(np.float32),
        shape=shape[columns].astype(np.float32),
    )


@cache
def _genes() -> tuple[_Gene, ...]:
    with (files("stofm.datasets") / "_markers.tsv").open(encoding="utf-8") as file:
        return tuple(
            _Gene(row["human"], row["mouse"], frozenset(filter(None, row["cell_types"].split(","))))
            for row in csv.DictReader(file, delimiter="\t")
        )


@cache
def _all_types() -> tuple[str, ...]:
    return tuple(sorted({name for gene in _genes() for name in gene.cell_types}))


def _panel_order(cell_types: tuple[str, ...]) -> NDArray[np.int64]:
    """Markers of each type in turn; after some rounds every other gene is not a marker."""
    genes = _genes()
    markers_of = [
        [row for row, gene in enumerate(genes) if name in gene.cell_types] for name in cell_types
    ]
    rounds = chain.from_iterable(zip_longest(*markers_of))
    markers = list(dict.fromkeys(row for row in rounds if row is not None))
    rest = np.setdiff1d(np.arange(len(genes)), markers)
    rest = np.random.default_rng(_PROFILE_SEED).permutation(rest)
    start = _FIRST_ROUNDS * len(cell_types) + 0.5
    place = np.concatenate([np.arange(len(markers)), start + np.arange(len(rest))])
    order: NDArray[np.int64] = np.concatenate([markers, rest])[np.argsort(place)].astype(np.int64)
    return order


@cache
def _profiles() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Log expression (n_all_types, n_all_genes), gradients (2, n) and Gamma shapes (n,)."""
    rng = np.random.default_rng(_PROFILE_SEED)
    genes, types = _genes(), _all_types()
    marks = np.array([[name in gene.cell_types for gene in genes] for name in types])
    size = (len(types), len(genes))
    # Markers are nearly silent where they are off; other genes are on everywhere.
    base = np.where(
        marks.any(axis=0), rng.normal(-2.6, 0.7, size[1]), rng.normal(-1.2, 1.0, size[1])
    )
    fold = rng.normal(2.2, 0.6, size[1]) + rng.normal(0.0, 0.4, size)
    total_rna = rng.normal(0.0, 0.25, (size[0], 1))
    log_expression = base + rng.normal(0.0, 0.25, size) + total_rna + np.where(marks, fold, 0.0)
    has_gradient = rng.random((2, size[1])) < _SHARE_WITH_GRADIENT
    gradients = np.where(has_gradient, rng.normal(0.0, 0.7, (2, size[1])), 0.0)
    shape = np.exp(rng.normal(np.log(2.0), 0.4, size[1]))
    return log_expression, gradients, shape
