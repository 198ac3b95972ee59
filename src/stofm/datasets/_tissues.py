"""Simulated tissues: which cell types live in which region, and what they express.

Everything here is fixed: slices of one tissue that are drawn with different seeds have the same
types, the same panel and the same profiles, as sections of one organ have.
"""

from __future__ import annotations

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
        msg = f"n_genes={n_genes}, but there are real symbols of {len(known)} {species} genes."
        raise ValueError(msg)
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
