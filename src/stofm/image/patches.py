"""Patches around cells and spots, cut out of an image piece by piece and resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.image.slide import Slide

#: Side of the pieces that are read at a time, in pixels of the file.
_PIECE: Final = 2048


@dataclass(frozen=True)
class Cut:
    """How patches are cut: `side` in pixels of the image's first level, `n_pixels` of a patch."""

    side: float
    n_pixels: int

    @property
    def enlarged(self) -> float:
        """How many times a patch is larger than what the image has of it."""
        return self.n_pixels / self.side


def read_patches(
    slide: Slide, centers: NDArray[np.float64], cut: Cut, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Cut a square around each centre (n, 2), x and y in pixels of the first level.

    Gives rows of `centers` and their patches, float32 (batch, 3, n_pixels, n_pixels) from 0 to 1,
    until each row was given once. Beyond its border the image is reflected. A patch depends on
    its own centre only.
    """
    level = _level_for(slide, cut)
    factor = slide.levels[0].shape[0] / slide.levels[level].shape[0]
    step = int(min(max(1.0, cut.side / factor / cut.n_pixels), min(slide.levels[level].shape)))
    side, places = cut.side / factor / step, centers / (factor * step)
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
        piece = torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))[None]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield part, _resample(piece, places[part] - origin, side, cut.n_pixels)


def _level_for(slide: Slide, cut: Cut) -> int:
    """The smallest level that a patch need not be enlarged from, or the first."""
    height = slide.levels[0].shape[0]
    enough = [
        k
        for k, level in enumerate(slide.levels)
        if cut.side * level.shape[0] / height >= cut.n_pixels
    ]
    return max(enough, default=0)


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
