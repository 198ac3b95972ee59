"""Structural similarity of maps on places in the plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stofm.metrics._inputs import read_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

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
    """Structural similarity of maps, for places that need not lie on a grid.

    At each place the two maps are compared in a window of neighbours with Gaussian weights:
    weighted means m, variances v and covariance c give
    ``(2 m1 m2 + C1) (2 c + C2) / ((m1^2 + m2^2 + C1) (v1 + v2 + C2))`` with
    ``C1 = (0.01 R)^2`` and ``C2 = (0.03 R)^2`` for the data range R. The mean over places is
    returned. On a square grid, away from the border, this is the index of images with a
    Gaussian window of 1.5 pixels.

    Unlike a correlation it depends on scale and offset: put both maps in the same unit first.
    Where a gene is 0 in most places, windows that are 0 in both maps count 1 and dominate the
    mean.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers, rows being places; see :func:`pearson`.
    coordinates
        (n, 2) of the rows of `y_true`, any unit, of one slice: windows know no slices.
    sigma
        Standard deviation of the window, unit of the coordinates; 1.5 times the median distance
        to the nearest other place by default. The window ends at 3.5 times that, and holds the
        128 nearest places at most.
    data_range
        Range R of the values; for each column largest minus smallest true value by default.

    Returns
    -------
    A float for (n,), else a Series, from -1 to 1. NaN where the true values are constant.

    Raises
    ------
    TypeError
        Values are sparse, or no numbers.
    ValueError
        Shapes or names differ, values or coordinates are not finite, there are fewer than two
        different places, or `sigma` or `data_range` is not positive.

    References
    ----------
    Wang, Bovik, Sheikh and Simoncelli 2004, Image quality assessment (IEEE Trans Image Process
    13:600).
    """
    for value, name in ((sigma, "sigma"), (data_range, "data_range")):
        if value is not None and not 0.0 < value < np.inf:
            msg = f"{name} must be positive, found {value!r}."
            raise ValueError(msg)
    pair = read_values(y_true, y_pred)
    places = _read_places(coordinates, len(pair.true))
    window = gaussian_windows(places, sigma)

    def similarity(
        true: NDArray[np.float64], predicted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        extent = np.ptp(true, axis=0)
        reach = extent if data_range is None else np.full(len(extent), float(data_range))
        is_flat = extent == 0
        index = similarity_index(window, true, predicted, np.where(is_flat, 1.0, reach))
        return np.where(is_flat, np.nan, index.mean(axis=0))

    return pair.score(similarity, "column", "ssim")


def _read_places(coordinates: ArrayLike, n_rows: int) -> NDArray[np.float64]:
    places = np.asarray(coordinates, dtype=np.float64)
    if places.shape != (n_rows, 2) or not np.isfinite(places).all():
        msg = (
            f"coordinates must be finite, x and y of each of the {n_rows} rows; found the shape "
            f"{places.shape} with {int((~np.isfinite(places)).sum())} NaN or infinite values."
        )
        raise ValueError(msg)
    if not np.ptp(places, axis=0).any():
        msg = f"All {n_rows} rows lie at one place, so there is no map; check the coordinates."
        raise ValueError(msg)
    return places


def gaussian_windows(places: NDArray[np.float64], sigma: float | None) -> sparse.csr_array:
    """Gaussian weights (n, n) of each place's window, each row summing to 1."""
    tree = cKDTree(places)
    if sigma is None:
        distinct = np.unique(places, axis=0)
        nearest = cKDTree(distinct).query(distinct, k=[2])[0]
        sigma = _SIGMA * float(np.median(nearest))
    starts = range(0, len(places), _CHUNK)
    parts = [_window_rows(tree, places[start : start + _CHUNK], sigma) for start in starts]
    return sparse.vstack(parts, format="csr")


def _window_rows(tree: cKDTree, places: NDArray[np.float64], sigma: float) -> sparse.csr_array:
    n_window = min(_MAX_WINDOW, tree.n)
    distances, indices = tree.query(
        places, k=np.arange(1, n_window + 1), distance_upper_bound=_REACH * sigma
    )
    # Neighbours that are missing stand at infinity, with an index that is no row.
    in_reach = np.isfinite(distances)
    weights = np.where(in_reach, np.exp(-0.5 * (distances / sigma) ** 2), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    offsets = np.r_[0, np.cumsum(in_reach.sum(axis=1))]
    return sparse.csr_array(
        (weights[in_reach], indices[in_reach], offsets), shape=(len(places), tree.n)
    )


def similarity_index(
    window: sparse.csr_array,
    true: NDArray[np.float64],
    predicted: NDArray[np.float64],
    data_range: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Index (n, k) at each place."""
    # Variances of shifted values are the same, and lose fewer digits.
    shifts = true.mean(axis=0), predicted.mean(axis=0)
    first, second = true - shifts[0], predicted - shifts[1]
    means = window @ first, window @ second
    variances = [
        np.maximum(window @ (values**2) - mean**2, 0.0)
        for values, mean in zip((first, second), means, strict=True)
    ]
    covariance = window @ (first * second) - means[0] * means[1]
    levels = [mean + shift for mean, shift in zip(means, shifts, strict=True)]
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * levels[0] * levels[1] + c1) / (levels[0] ** 2 + levels[1] ** 2 + c1)
    structure = (2 * covariance + c2) / (variances[0] + variances[1] + c2)
    index: NDArray[np.float64] = luminance * structure
    return index
