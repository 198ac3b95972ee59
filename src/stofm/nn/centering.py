"""From the cell encoder's projections to cell embeddings: off with a slice's mean, unit length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from stofm.nn.cell_encoder import to_unit_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Rows that are worked on at a time.
_ROWS_AT_ONCE: Final = 1 << 15


def finish_embeddings(
    raw: NDArray[np.float32],
    slices: Sequence[NDArray[np.integer]] | None,
    centering: Literal["none", "slice"],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Centre projections by slice if asked to, and scale them to unit length.

    Parameters
    ----------
    raw
        (n_cells, d_cell) from :func:`project_cells`.
    slices
        Rows of each slice, every row once; None if all are one slice. Not read unless
        `centering` is ``"slice"``.
    centering
        As in the config of the cell encoder.

    Returns
    -------
    features
        (n_cells, d_cell) embeddings of unit length; 0 for a cell that equals the mean of its
        slice, as the only cell of a slice does.
    centers
        (n_slices, d_cell) what was taken off in each slice. The mean does not depend on the
        order of rows, to the last bit; without centring there is one row of 0.

    Raises
    ------
    ValueError
        The slices do not hold each row once, or a projection is NaN or infinite.
    """
    if n_bad := sum(int((~np.isfinite(part).all(axis=1)).sum()) for part in _parts(raw)):
        msg = f"{n_bad} of {len(raw)} projections are NaN or infinite; they have no embedding."
        raise ValueError(msg)
    features = np.empty_like(raw)
    if centering == "none":
        _scale_rows(raw, np.arange(len(raw)), None, features)
        return features, np.zeros((1, raw.shape[1]), dtype=np.float32)
    slices = [np.arange(len(raw))] if slices is None else slices
    check_slices(slices, len(raw))
    centers = np.zeros((len(slices), raw.shape[1]), dtype=np.float32)
    for center, rows in zip(centers, slices, strict=True):
        center[:] = exact_mean(raw, rows)
        _scale_rows(raw, rows, center, features)
    return features, centers


def check_slices(slices: Sequence[NDArray[np.integer]], n_cells: int) -> None:
    """Check that slices, given by their rows, share out `n_cells` rows.

    Raises
    ------
    ValueError
        A row is in no slice or in several, or there is no such row.
    """
    rows = np.concatenate([np.empty(0, dtype=np.int64), *slices])
    if not np.array_equal(np.sort(rows), np.arange(n_cells)):
        msg = (
            f"slices must hold each of {n_cells} rows exactly once, found {len(rows)} entries with "
            f"{len(np.unique(rows))} different ones; pass the row numbers of each slice."
        )
        raise ValueError(msg)


def _scale_rows(
    raw: NDArray[np.float32],
    rows: NDArray[np.integer],
    center: NDArray[np.float32] | None,
    features: NDArray[np.float32],
) -> None:
    """Write `rows` of `features`: what the encoder computes itself where it is told the centre."""
    off = None if center is None else torch.from_numpy(center)
    for part in _parts(rows):
        features[part] = to_unit_length(torch.from_numpy(raw[part]), off).numpy()


def exact_mean(raw: NDArray[np.float32], rows: NDArray[np.integer]) -> NDArray[np.float64]:
    """Mean of some rows, the same to the last bit in whatever order they come.

    Each column is added up in integers, after scaling with the power of two that just keeps the
    sum in 63 bits. The mean of equal rows is that row.
    """
    if not len(rows):
        return np.zeros(raw.shape[1])
    largest = np.max([np.abs(raw[part]).max(axis=0) for part in _parts(rows)], axis=0)
    _, exponent = np.frexp(largest.astype(np.float64))
    shift = 62 - math.ceil(math.log2(len(rows))) - exponent
    total = np.zeros(raw.shape[1], dtype=np.int64)
    for part in _parts(rows):
        total += np.rint(np.ldexp(raw[part].astype(np.float64), shift)).astype(np.int64).sum(axis=0)
    mean: NDArray[np.float64] = np.ldexp(total.astype(np.float64), -shift) / len(rows)
    return mean


def _parts(rows: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(rows, range(_ROWS_AT_ONCE, len(rows), _ROWS_AT_ONCE))
