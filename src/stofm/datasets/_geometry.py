"""Where cells, spots and regions of a simulated slice lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
