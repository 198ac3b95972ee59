"""Features of all cells at two scales: of the cell or spot, and of its niche."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from sklearn.neighbors import radius_neighbors_graph

from stofm._logging import counter, logger
from stofm._messages import warn
from stofm.image.patches import Cut, read_patches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.image.encoders import Encoder
    from stofm.image.slide import Slide

#: Sides of the two patches in micrometres, of spots, and of cells, which lie nearer than `_APART`.
_OF_SPOTS, _OF_CELLS, _APART = (100.0, 200.0), (40.0, 120.0), 40.0
#: From how many times on an enlarged patch is warned of.
_ENLARGED: Final = 2.0
#: Coordinates in whole pixels put neighbours of one distance a little nearer or farther.
_TIE: Final = 0.05


@dataclass(frozen=True, eq=False)
class Scene:
    """The image of a slice, with places of cells in it (n, 2) in pixels, and their rows (n,)."""

    name: str
    rows: NDArray[np.int64]
    slide: Slide
    centers: NDArray[np.float64]
    microns_per_pixel: float

    @property
    def is_outside(self) -> NDArray[np.bool_]:
        """Whether the middle of each cell lies beside the image, (n,)."""
        height, width = self.slide.levels[0].shape
        found: NDArray[np.bool_] = ((self.centers < 0) | (self.centers > (width, height))).any(
            axis=1
        )
        return found


def choose_sides(crops: tuple[float, float] | None, apart: float) -> tuple[float, float]:
    """Sides of both patches in micrometres: as given, or by how far apart cells or spots are."""
    if crops is None:
        sides = _OF_CELLS if 0 < apart < _APART else _OF_SPOTS
        logger.info("Patches of %g and %g µm, as cells or spots are %.3g µm apart.", *sides, apart)
        return sides
    given = tuple(map(float, crops))
    if len(given) != 2 or not 0 < given[0] <= given[1] < np.inf:
        raise ValueError(
            "`crops` must be the sides of the spot's and the niche's patch in µm, such as "
            f"(100, 200), found {crops!r}."
        )
    return given[0], given[1]


def embed_scenes(
    scenes: Sequence[Scene],
    sides: tuple[float, float],
    encoder: Encoder,
    *,
    show_progress_bar: bool = False,
) -> list[NDArray[np.float32]]:
    """Encode patches of each side (micrometres) around all cells: for each side (n_obs, d)."""
    for scene in scenes:
        _warn(scene, sides, encoder.n_pixels)
    n_obs = sum(len(scene.rows) for scene in scenes)
    found: list[NDArray[np.float32]] = []
    with counter(
        total=2 * n_obs, description="embed images", unit="patch", show=show_progress_bar
    ) as advance:
        for side in sides:
            values = np.empty((n_obs, 0), dtype=np.float32)
            for scene in scenes:
                cut = Cut(side / scene.microns_per_pixel, encoder.n_pixels)
                batches = read_patches(scene.slide, scene.centers, cut, encoder.batch_size)
                for rows, patches in batches:
                    features = encoder(patches)
                    if not values.shape[1]:
                        values = np.empty((n_obs, features.shape[1]), dtype=np.float32)
                    values[scene.rows[rows]] = features
                    advance(len(rows))
            found.append(values)
    return found


def _warn(scene: Scene, sides: tuple[float, float], n_pixels: int) -> None:
    """Warn of cells beside the image, and of an image that is too coarse; refuse a misplaced one."""
    called = f"Slice {scene.name!r}" if scene.name else "The slice"
    height, width = scene.slide.levels[0].shape
    n, n_out = len(scene.rows), int(scene.is_outside.sum())
    if 2 * n_out > n:
        low, high = scene.centers.min(axis=0), scene.centers.max(axis=0)
        raise ValueError(
            f"{called}: {n_out} of {n} cells lie outside the image, which has {width} x {height} pixels: "
            f"they are at x {low[0]:.0f} to {high[0]:.0f} and y {low[1]:.0f} to {high[1]:.0f}. Pass "
            "`scale`, the pixels of the image per unit of the coordinates, or the image that they "
            "belong to."
        )
    if n_out:
        warn(
            f"{called}: {n_out} of {n} cells lie outside the image of {width} x {height} pixels: their "
            "patches are reflections of its border, and their features say nothing. Drop these cells, or "
            "check `scale`."
        )
    enlarged = Cut(sides[0] / scene.microns_per_pixel, n_pixels).enlarged
    if enlarged > _ENLARGED:
        warn(
            f"{called}: patches of {sides[0]:g} µm have {n_pixels / enlarged:.3g} pixels of the image and are "
            f"enlarged {enlarged:.2g} times to the {n_pixels} that the encoder reads: they show no cells. "
            "Pass an image of higher resolution as `image`."
        )


def niche_members(xy: NDArray[np.float64], radius: float) -> sparse.csr_matrix:
    """Which cells are in the niche of each, (n, n): itself and all within a radius, ties included."""
    return radius_neighbors_graph(xy, radius * (1 + _TIE), include_self=True)


def niche_means(
    features: NDArray[np.float32], xy: NDArray[np.float64], radius: float
) -> NDArray[np.float32]:
    """Mean features of each cell's niche, (n, d)."""
    members = niche_members(xy, radius)
    means: NDArray[np.float32] = (members @ features) / np.asarray(members.sum(axis=1)).reshape(
        -1, 1
    )
    return means.astype(np.float32)
