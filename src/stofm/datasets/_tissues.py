"""Simulated tissues: where regions lie, which cell types live in them, and what these express.

Everything here is fixed: slices of one tissue that are drawn with different seeds have the same
types, the same panel and the same profiles, as sections of one organ have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

Species = Literal["human", "mouse"]
Regions = Literal["laminar", "nodular"]

_PROFILE_SEED: Final = 2025
#: Rounds of one marker per cell type that open a panel, before other genes are mixed in.
_FIRST_ROUNDS: Final = 6
_SHARE_WITH_GRADIENT: Final = 0.15
#: From places (n, 2) to regions (n,) and two fields of position (n, 2) in -1 to 1.
RegionMap = Callable[["NDArray[np.float64]"], "tuple[NDArray[np.int64], NDArray[np.float64]]"]

_ROW_HEIGHT: Final = np.sqrt(3.0) / 2.0
#: Depths at which the layers of the cortex end, from the pia (0) to the cut edge (1).
_LAYER_ENDS: Final = np.array([0.10, 0.36, 0.48, 0.68, 0.88])
#: Width of a nodule's margin against its radius.
_MARGIN: Final = 0.25
#: Area of the nodules against that of the field, before they overlap or leave it.
_COVERED: Final = 0.7
_CORE, _MARGIN_REGION, _STROMA, _FOLLICLE = range(4)


class Tissue(NamedTuple):
    """What a kind of tissue is made of.

    Rows of `composition` (n_regions, n_types) are expected shares of the types and sum to 1;
    `type_gradients` (2, n_types) change a type's log share along the two fields of position.
    """

    regions: tuple[str, ...]
    cell_types: tuple[str, ...]
    composition: NDArray[np.float64]
    type_gradients: NDArray[np.float64]


class Panel(NamedTuple):
    """The genes that are measured, and what each cell type expresses of them.

    `marker_of` are the cell types that a gene marks, joined by commas. A row of `expression`
    (n_types, n_genes), mean counts, has a total of 1 on average over types; `gradients` (2, n_genes)
    change log expression along the two fields of position, most are 0. `shape` (n_genes,) is that of
    the Gamma distribution of a gene's rate: the smaller, the noisier.
    """

    symbols: NDArray[np.str_]
    marker_of: NDArray[np.str_]
    expression: NDArray[np.float32]
    gradients: NDArray[np.float32]
    shape: NDArray[np.float32]


@cache
def make_tissue(regions: Regions) -> Tissue:
    """Return the cortex-like (``"laminar"``) or tumour-like (``"nodular"``) tissue."""
    table = _read_table(f"_{regions}.tsv").set_index("region")
    composition = table.to_numpy(dtype=np.float64)
    rng = np.random.default_rng([_PROFILE_SEED, table.shape[1]])
    return Tissue(
        regions=tuple(table.index),
        cell_types=tuple(table.columns),
        composition=composition / composition.sum(axis=1, keepdims=True),
        type_gradients=rng.normal(0.0, 0.4, (2, table.shape[1])),
    )


def make_panel(n_genes: int, *, species: Species, regions: Regions, platform: int) -> Panel:
    """Choose the first `n_genes` of a tissue's panel and the profiles of its cell types.

    A smaller panel is the beginning of a larger one. A mouse gene has the profile of its human
    counterpart. Each `platform` detects some genes better than others.
    """
    genes, tissue = _genes(), make_tissue(regions)
    types = tissue.cell_types
    known = [row for row in _panel_order(types) if genes[species][row]]
    if n_genes > len(known):
        raise ValueError(
            f"n_genes={n_genes}, but there are real symbols of {len(known)} {species} genes."
        )
    columns = np.array(known[:n_genes])
    marked = [genes["cell_types"][row] for row in columns]
    log_expression, gradients, shape = _profiles()
    rows = np.array([_all_types().index(name) for name in types])
    efficiency = np.random.default_rng([_PROFILE_SEED, platform]).normal(0.0, 0.4, len(genes))
    expression = np.exp(log_expression[np.ix_(rows, columns)] + efficiency[columns])
    return Panel(
        symbols=np.array([genes[species][row] for row in columns]),
        marker_of=np.array([",".join(name for name in types if name in own) for own in marked]),
        expression=(expression / expression.sum(axis=1).mean()).astype(np.float32),
        gradients=gradients[:, columns].astype(np.float32),
        shape=shape[columns].astype(np.float32),
    )


def _read_table(name: str) -> pd.DataFrame:
    with (files("stofm.datasets") / name).open(encoding="utf-8") as file:
        return pd.read_csv(file, sep="\t", keep_default_na=False)


@cache
def _genes() -> pd.DataFrame:
    """Human and mouse symbols, "" for none, and the cell types that each gene marks."""
    table = _read_table("_markers.tsv")
    marked = table["cell_types"].str.split(",")
    return table.assign(cell_types=[frozenset(filter(None, names)) for names in marked])


@cache
def _all_types() -> tuple[str, ...]:
    return tuple(sorted(frozenset().union(*_genes()["cell_types"])))


def _panel_order(cell_types: tuple[str, ...]) -> NDArray[np.int64]:
    """Markers of each type in turn; after some rounds every other gene is not a marker."""
    marked = _genes()["cell_types"]
    markers_of = [[row for row, own in enumerate(marked) if name in own] for name in cell_types]
    rounds = chain.from_iterable(zip_longest(*markers_of))
    markers = list(dict.fromkeys(row for row in rounds if row is not None))
    rest = np.setdiff1d(np.arange(len(marked)), markers)
    rest = np.random.default_rng(_PROFILE_SEED).permutation(rest)
    start = _FIRST_ROUNDS * len(cell_types) + 0.5
    place = np.concatenate([np.arange(len(markers)), start + np.arange(len(rest))])
    return np.asarray(np.concatenate([markers, rest])[np.argsort(place)], dtype=np.int64)


@cache
def _profiles() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Log expression (n_all_types, n_all_genes), gradients (2, n) and Gamma shapes (n,)."""
    rng = np.random.default_rng(_PROFILE_SEED)
    marked, types = _genes()["cell_types"], _all_types()
    marks = np.array([[name in own for own in marked] for name in types])
    size = (len(types), len(marked))
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


def draw_layers(side: float, rng: np.random.Generator) -> RegionMap:
    """Draw curved parallel layers in a square field of view, micrometres.

    The fields are the depth inside the layer and the place along it.
    """
    phases = rng.uniform(0.0, 2.0 * np.pi, 2)

    def locate(places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        x, y = (places / side).T
        bend = 0.06 * np.sin(np.pi * x + phases[0]) + 0.02 * np.sin(5.0 * np.pi * x + phases[1])
        depth = np.clip(0.03 + 0.94 * y + bend, 0.0, 1.0)
        region = np.searchsorted(_LAYER_ENDS, depth, side="right")
        edges = np.concatenate([[0.0], _LAYER_ENDS, [1.0]])
        inside = (depth - edges[region]) / (edges[region + 1] - edges[region])
        return region, np.column_stack([2.0 * inside - 1.0, np.clip(2.0 * x - 1.0, -1.0, 1.0)])

    return locate


def draw_nodules(side: float, n_nodules: int, rng: np.random.Generator) -> RegionMap:
    """Draw tumour nests with a margin, and lymphoid follicles, that lie apart in stroma.

    The fields are the closeness to the nearest nodule's centre, and the place from left to right.
    """
    candidates = rng.uniform(0.12, 0.88, (40 * n_nodules, 2)) * side
    centers = candidates[:1]
    for _ in range(n_nodules - 1):
        gaps = np.linalg.norm(candidates[:, None] - centers[None], axis=2).min(axis=1)
        centers = np.vstack([centers, candidates[gaps.argmax()]])
    radius = side * np.sqrt(_COVERED / (np.pi * n_nodules))
    radii = radius * np.exp(rng.normal(0.0, 0.2, n_nodules))
    phases = rng.uniform(0.0, 2.0 * np.pi, (n_nodules, 2))

    def locate(places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        closeness = np.full(len(places), -np.inf)
        is_follicle = np.zeros(len(places), dtype=bool)
        for number, (center, radius, waves) in enumerate(zip(centers, radii, phases, strict=True)):
            dx, dy = (places - center).T
            angle = np.arctan2(dy, dx)
            wave = 0.15 * np.sin(2.0 * angle + waves[0]) + 0.08 * np.sin(5.0 * angle + waves[1])
            # 1 at the centre, 0 on the outline, negative outside.
            own = 1.0 - np.hypot(dx, dy) / (radius * (1.0 + wave))
            # Of five nodules two are follicles.
            is_follicle = np.where(own > closeness, number % 5 >= 3, is_follicle)
            closeness = np.maximum(own, closeness)
        region = np.select(
            [closeness < 0.0, is_follicle, closeness < _MARGIN],
            [_STROMA, _FOLLICLE, _MARGIN_REGION],
            default=_CORE,
        )
        across = np.clip(2.0 * places[:, 0] / side - 1.0, -1.0, 1.0)
        return region, np.column_stack([np.clip(2.0 * closeness - 1.0, -1.0, 1.0), across])

    return locate


def hexagonal_lattice(n_points: int, pitch: float) -> NDArray[np.float64]:
    """Return the first (n_points, 2) of a hexagonal lattice that fills a square row by row.

    `pitch` is the distance between neighbours, micrometres.
    """
    n_columns = max(1, round(np.sqrt(n_points * _ROW_HEIGHT)))
    row, column = np.divmod(np.arange(n_points), n_columns)
    return np.column_stack([(column + 0.5 * (row % 2)) * pitch, row * _ROW_HEIGHT * pitch])
