"""Structural similarity of maps on positions in the plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stofm.metrics.values import read_values, score_columns

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    _Array = NDArray[np.float64]

#: Constants of Wang et al.: what is added to means and variances, as shares of the data range,
#: the window's standard deviation in pixels, and how many of these it reaches.
_K1, _K2 = 0.01, 0.03
_SIGMA = 1.5
_REACH = 3.5
#: Most places in a window. A disc of that reach holds about 90 places of a square grid.
_MAX_WINDOW = 128
_CHUNK = 65_536


def ssim(
    y_true: Any,
    y_pred: Any,
    coordinates: ArrayLike,
    *,
    sigma: float | None = None,
    data_range: float | None = None,
) -> Any:
    """Structural similarity of maps, for positions that need not lie on a grid.

    At each position the two maps are compared in a window of neighbours with Gaussian weights:
    weighted means m, variances v and covariance c give
    ``(2 m1 m2 + C1) (2 c + C2) / ((m1^2 + m2^2 + C1) (v1 + v2 + C2))`` with
    ``C1 = (0.01 R)^2`` and ``C2 = (0.03 R)^2`` for the data range R. The mean over positions is
    returned. On a square grid, away from the border, this is the index of images with a
    Gaussian window of 1.5 pixels (Wang et al. 2004, IEEE Trans Image Process 13:600).

    Unlike a correlation it depends on scale and offset: put both maps in the same unit first.
    Where a gene is 0 at most positions, windows that are 0 in both maps count 1 and dominate the
    mean.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers, rows being positions; see :func:`pearson`, also for errors.
    coordinates
        (n, 2) of the rows of `y_true`, any unit, of one slice: windows know no slices.
    sigma
        Standard deviation of the window, unit of the coordinates; None: 1.5 times the median
        distance to the nearest other position. The window ends at 3.5 times that, and holds the 128
        nearest positions at most.
    data_range
        Range R of the values; None: for each column, largest minus smallest true value.

    Returns
    -------
    A float for (n,), else a Series, from -1 to 1. NaN where the true values are constant.

    Raises
    ------
    ValueError
        Coordinates are not finite or all the same, or `sigma` or `data_range` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> import stofm as st
    >>> positions = np.argwhere(np.ones((10, 10)))
    >>> true = np.sin(positions[:, 0])
    >>> round(st.metrics.ssim(true, true, positions), 6)
    1.0
    """
    for value, name in ((sigma, "sigma"), (data_range, "data_range")):
        if value is not None and not 0.0 < value < np.inf:
            raise ValueError(f"{name} must be positive, found {value!r}.")
    values = read_values(y_true, y_pred)
    places, n_rows = np.asarray(coordinates, dtype=np.float64), len(values[0])
    if places.shape != (n_rows, 2) or not np.isfinite(places).all():
        raise ValueError(
            f"coordinates must be finite, x and y of each of the {n_rows} rows; found the shape "
            f"{places.shape} with {np.sum(~np.isfinite(places))} NaN or infinite values."
        )
    if not np.ptp(places, axis=0).any():
        raise ValueError(
            f"All {n_rows} rows lie at one position, so there is no map; check the coordinates."
        )
    window = gaussian_windows(places, sigma)

    def similarity(true: _Array, predicted: _Array) -> _Array:
        extent = np.ptp(true, axis=0)
        reach = np.full_like(extent, data_range) if data_range else np.where(extent, extent, 1.0)
        index = similarity_index(window, true, predicted, reach)
        return np.where(extent == 0, np.nan, index.mean(axis=0))

    return score_columns(values, similarity, "ssim")


def gaussian_windows(places: _Array, sigma: float | None) -> sparse.csr_array:
    """Gaussian weights (n, n) of each place's window, each row summing to 1."""
    tree = cKDTree(places)
    if sigma is None:
        distinct = np.unique(places, axis=0)
        sigma = _SIGMA * float(np.median(cKDTree(distinct).query(distinct, k=[2])[0]))
    ranks = np.arange(1, min(_MAX_WINDOW, tree.n) + 1)
    parts = []
    for start in range(0, len(places), _CHUNK):
        distances, indices = tree.query(
            places[start : start + _CHUNK], k=ranks, distance_upper_bound=_REACH * sigma
        )
        # Missing neighbours are at infinity, with an index that is no row.
        in_reach = np.isfinite(distances)
        weights = np.exp(-0.5 * (distances / sigma) ** 2)
        weights /= weights.sum(axis=1, keepdims=True)
        offsets = np.r_[0, np.cumsum(in_reach.sum(axis=1))]
        shape = (len(distances), tree.n)
        parts.append(sparse.csr_array((weights[in_reach], indices[in_reach], offsets), shape=shape))
    return sparse.vstack(parts, format="csr")


def similarity_index(
    window: sparse.csr_array, true: _Array, predicted: _Array, data_range: _Array
) -> _Array:
    """Index (n, k) at each place."""
    # Variances of shifted values are the same, and lose fewer digits.
    shifts = true.mean(axis=0), predicted.mean(axis=0)
    first, second = true - shifts[0], predicted - shifts[1]
    m1, m2 = window @ first, window @ second
    v1 = np.maximum(window @ first**2 - m1**2, 0.0)
    v2 = np.maximum(window @ second**2 - m2**2, 0.0)
    covariance = window @ (first * second) - m1 * m2
    m1, m2 = m1 + shifts[0], m2 + shifts[1]
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * m1 * m2 + c1) / (m1**2 + m2**2 + c1)
    index: _Array = luminance * (2 * covariance + c2) / (v1 + v2 + c2)
    return index
