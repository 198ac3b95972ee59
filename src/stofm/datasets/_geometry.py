"""Where cells, spots and regions of a simulated slice lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROW_HEIGHT: Final = np.sqrt(3.0) / 2.0
#: Depths at which the layers of the cortex end, from the pia (0) to the cut edge (1).
_LAYER_ENDS: Final = np.array([0.10, 0.36, 0.48, 0.68, 0.88])
#: Width of a nodule's margin against its radius.
_MARGIN: Final = 0.25
#: Area of the nodules against that of the field, before they overlap or leave it.
_COVERED: Final = 0.7
_CORE, _MARGIN_REGION, _STROMA, _FOLLICLE = range(4)


@dataclass(frozen=True)
class LaminarMap:
    """Curved parallel layers.

    Attributes
    ----------
    side
        Side of the square field of view, micrometres.
    phases
        (2,) phases of the two waves that bend the layers.
    """

    side: float
    phases: NDArray[np.float64]

    @classmethod
    def draw(cls, side: float, rng: np.random.Generator) -> LaminarMap:
        """Draw how the layers bend."""
        return cls(side=side, phases=rng.uniform(0.0, 2.0 * np.pi, 2))

    def locate(self, places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return region (n,) and fields of position (n, 2) in -1 to 1 of `places` (n, 2).

        The fields are the depth inside the layer and the place along it.
        """
        x, y = (places / self.side).T
        bend = 0.06 * np.sin(np.pi * x + self.phases[0])
        bend += 0.02 * np.sin(5.0 * np.pi * x + self.phases[1])
        depth = np.clip(0.03 + 0.94 * y + bend, 0.0, 1.0)
        region = np.searchsorted(_LAYER_ENDS, depth, side="right")
        edges = np.concatenate([[0.0], _LAYER_ENDS, [1.0]])
        inside = (depth - edges[region]) / (edges[region + 1] - edges[region])
        return region, np.column_stack([2.0 * inside - 1.0, np.clip(2.0 * x - 1.0, -1.0, 1.0)])


@dataclass(frozen=True)
class NodularMap:
    """Tumour nests with a margin, and lymphoid follicles, in stroma.

    Attributes
    ----------
    side
        Side of the square field of view, micrometres.
    centers, radii
        (n_nodules, 2) and (n_nodules,) micrometres.
    is_follicle
        (n_nodules,) whether a nodule is a follicle; the others are tumour nests.
    phases
        (n_nodules, 2) phases of the waves on a nodule's outline.
    """

    side: float
    centers: NDArray[np.float64]
    radii: NDArray[np.float64]
    is_follicle: NDArray[np.bool_]
    phases: NDArray[np.float64]

    @classmethod
    def draw(cls, side: float, n_nodules: int, rng: np.random.Generator) -> NodularMap:
        """Draw nodules that lie apart from one another."""
        candidates = rng.uniform(0.12, 0.88, (40 * n_nodules, 2)) * side
        centers = candidates[:1]
        for _ in range(n_nodules - 1):
            gaps = np.linalg.norm(candidates[:, None] - centers[None], axis=2).min(axis=1)
            centers = np.vstack([centers, candidates[gaps.argmax()]])
        radius = side * np.sqrt(_COVERED / (np.pi * n_nodules))
        return cls(
            side=side,
            centers=centers,
            radii=radius * np.exp(rng.normal(0.0, 0.2, n_nodules)),
            is_follicle=np.arange(n_nodules) % 5 >= 3,
            phases=rng.uniform(0.0, 2.0 * np.pi, (n_nodules, 2)),
        )

    def locate(self, places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return region (n,) and fields of position (n, 2) in -1 to 1 of `places` (n, 2).

        The fields are the closeness to the nearest nodule's centre, and the place from left to
        right.
        """
        closeness = np.full(len(places), -np.inf)
        is_follicle = np.zeros(len(places), dtype=bool)
        for center, radius, follicle, phases in zip(
            self.centers, self.radii, self.is_follicle, self.phases, strict=True
        ):
            dx, dy = (places - center).T
            angle = np.arctan2(dy, dx)
            wave = 0.15 * np.sin(2.0 * angle + phases[0]) + 0.08 * np.sin(5.0 * angle + phases[1])
            # 1 at the centre, 0 on the outline, negative outside.
            own = 1.0 - np.hypot(dx, dy) / (radius * (1.0 + wave))
            nearer = own > closeness
            closeness = np.where(nearer, own, closeness)
            is_follicle = np.where(nearer, follicle, is_follicle)
        region = np.select(
            [closeness < 0.0, is_follicle, closeness < _MARGIN],
            [_STROMA, _FOLLICLE, _MARGIN_REGION],
            default=_CORE,
        )
        across = np.clip(2.0 * places[:, 0] / self.side - 1.0, -1.0, 1.0)
        return region, np.column_stack([np.clip(2.0 * closeness - 1.0, -1.0, 1.0), across])


def hexagonal_lattice(n_points: int, pitch: float) -> NDArray[np.float64]:
    """Return the first `n_points` of a hexagonal lattice that fills a square row by row.

    Parameters
    ----------
    pitch
        Distance between neighbours, micrometres.

    Returns
    -------
    (n_points, 2) micrometres.
    """
    n_columns = max(1, round(np.sqrt(n_points * _ROW_HEIGHT)))
    row, column = np.divmod(np.arange(n_points), n_columns)
    return np.column_stack([(column + 0.5 * (row % 2)) * pitch, row * _ROW_HEIGHT * pitch])


def scattered_cells(n_points: int, pitch: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return cells that keep a distance without lying on a lattice, (n_points, 2) micrometres."""
    places = hexagonal_lattice(n_points, pitch)
    return places + rng.normal(0.0, 0.2 * pitch, places.shape)
