"""Patches around cells and spots: cut out of an image piece by piece, resampled, and encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import radius_neighbors_graph

from stofm._logging import counter, logger
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from stofm.image.encoders import Encoder
    from stofm.image.slide import Slide

#: Side of the pieces that are read at a time, in pixels of the file.
_PIECE: Final = 2048
#: Sides of the two patches in micrometres, of spots, and of cells, which lie nearer than `_APART`.
_OF_SPOTS, _OF_CELLS, _APART = (100.0, 200.0), (40.0, 120.0), 40.0
#: Orientations of a patch that features may be means over, and axes that are flipped for these.
VIEWS: Final = (1, 2, 4, 8)
_FLIPS: Final[tuple[list[int], ...]] = ([], [3], [2], [2, 3])
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
    n_views: int = 1,
    show_progress_bar: bool = False,
) -> list[NDArray[np.float32]]:
    """Encode patches of each side (micrometres) around all cells: for each side (n_obs, d).

    Features are means over `n_views` orientations of a patch, the same for all patches.
    """
    for scene in scenes:
        _warn(scene, sides, encoder.n_pixels)
    n_obs = sum(len(scene.rows) for scene in scenes)
    found: list[NDArray[np.float32]] = []
    with counter(2 * n_obs, "embed images", "patch", show=show_progress_bar) as advance:
        for side in sides:
            values = np.empty((n_obs, 0), dtype=np.float32)
            for scene in scenes:
                pixels = side / scene.microns_per_pixel, encoder.n_pixels
                batches = read_patches(scene.slide, scene.centers, *pixels, encoder.batch_size)
                for rows, patches in batches:
                    features = np.mean([*map(encoder, _orient(patches, n_views))], axis=0)
                    if not values.shape[1]:
                        values = np.empty((n_obs, features.shape[1]), dtype=np.float32)
                    values[scene.rows[rows]] = features
                    advance(len(rows))
            found.append(values)
    return found


def _orient(patches: Tensor, n_views: int) -> Iterator[Tensor]:
    """Patches as they are, mirrored, upside down and both; and all of these turned."""
    for k in range(n_views):
        yield (patches.transpose(2, 3) if k >= len(_FLIPS) else patches).flip(_FLIPS[k % 4])


def _warn(scene: Scene, sides: tuple[float, float], n_pixels: int) -> None:
    """Warn of cells beside the image, and of an image that is too coarse; refuse a misplaced one."""
    called = f"Slice {scene.name!r}" if scene.name else "The slice"
    height, width = scene.slide.levels[0].shape
    beside = (scene.centers < 0) | (scene.centers > (width, height))
    n, n_out = len(scene.rows), int(beside.any(axis=1).sum())
    n_seen = sides[0] / scene.microns_per_pixel
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
    if n_pixels > _ENLARGED * n_seen:
        warn(
            f"{called}: patches of {sides[0]:g} µm have {n_seen:.3g} pixels of the image and are enlarged "
            f"{n_pixels / n_seen:.2g} times to the {n_pixels} that the encoder reads. Pass an image of "
            "higher resolution as `image`."
        )


def niche_members(xy: NDArray[np.float64], radius: float) -> sparse.csr_matrix:
    """Which cells are in the niche of each, (n, n): itself and all within a radius, ties included."""
    return radius_neighbors_graph(xy, radius * (1 + _TIE), include_self=True)


def read_patches(
    slide: Slide, centers: NDArray[np.float64], side: float, n_pixels: int, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Cut a square of `side` around each centre (n, 2), x and y, in pixels of the first level.

    Gives rows of `centers` and their patches, float32 (batch, 3, n_pixels, n_pixels) from 0 to 1,
    until each row was given once. Beyond its border the image is reflected. A patch depends on
    its own centre only.
    """
    # Of the levels that a patch need not be enlarged from, the smallest.
    sides = [side * one.shape[0] / slide.levels[0].shape[0] for one in slide.levels]
    level = max((k for k, own in enumerate(sides) if own >= n_pixels), default=0)
    step = int(min(max(1.0, sides[level] / n_pixels), *slide.levels[level].shape))
    places, side = centers * (sides[level] / side / step), sides[level] / step
    halo = int(np.ceil(side / 2)) + 2
    height, width = slide.levels[level].chunks
    width = max(_PIECE, width)
    pieces = np.array([width, max(height, _PIECE**2 // width)]) // step + 1
    # Spots beside the image belong to pieces beside it.
    _, codes = np.unique(np.floor(places / pieces).astype(np.int64), axis=0, return_inverse=True)
    order = np.argsort(codes.ravel(), kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(codes.ravel()))[:-1]):
        origin = np.floor(places[rows].min(axis=0)).astype(np.int64) - halo
        end = np.ceil(places[rows].max(axis=0)).astype(np.int64) + halo
        window = slide.read(level, (origin[1], end[1], origin[0], end[0]), step)
        piece = torch.as_tensor(window).permute(2, 0, 1)[None]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield part, _resample(piece, places[part] - origin, side, n_pixels)
        # Not two pieces at a time.
        del window, piece


def _resample(piece: Tensor, centers: NDArray[np.float64], side: float, n_pixels: int) -> Tensor:
    """Interpolate patches (n, 3, n_pixels, n_pixels) around centres in a piece (1, 3, H, W)."""
    offsets = ((np.arange(n_pixels) + 0.5) / n_pixels - 0.5) * side
    size = np.array([piece.shape[3], piece.shape[2]])
    # From -1 at the outer edge of the first pixel to 1 at that of the last.
    x, y = (2 * (centers[:, k, None] + offsets) / size[k] - 1 for k in (0, 1))
    shape = (len(centers), n_pixels, n_pixels)
    grid = np.empty((*shape, 2), dtype=np.float32)
    grid[..., 0], grid[..., 1] = x[:, None, :], y[:, :, None]
    whole = piece.expand(len(centers), -1, -1, -1)
    return F.grid_sample(whole, torch.from_numpy(grid), align_corners=False)
