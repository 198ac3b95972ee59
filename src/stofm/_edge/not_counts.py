"""What a matrix holds that does not hold raw counts, told from its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

#: Rows that are looked at for a pattern.
_SAMPLE_ROWS: Final = 256
#: Sums or multiples that agree to this are the same.
_SAME: Final = 1e-3
#: Logarithms of counts stay below, and lie anywhere between integers.
_LARGEST_LOGARITHM: Final = 20.0
_NEAR_INTEGERS: Final = 0.15
_LARGEST_EXPONENT: Final = 80.0
#: Nothing that was counted in a cell goes so far.
_LARGEST_COUNT: Final = 1e9
#: What counts are often transformed to, how to undo it, and the code for it.
_TRANSFORMS: Final[tuple[tuple[str, Callable[[Any], Any], str], ...]] = (
    ("", np.asarray, ""),
    ("log1p of ", np.expm1, "np.expm1({matrix})"),
    ("log2(1 + x) of ", lambda values: np.exp2(values) - 1, "np.expm1({matrix} * np.log(2))"),
    ("square roots of ", np.square, "np.power({matrix}, 2)"),
)


#: What values look like (a sentence and a space, or nothing), and what to do about ``{matrix}``.
Cause = tuple[str, str]
_ADVICE: Final = "Raw counts are needed, before any normalisation."


def cause_of(block: sparse.csr_matrix) -> Cause:
    """What the values of some rows look like, which are no raw counts."""
    if block.dtype.kind == "f" and np.isnan(block.data).any():
        return _cause_of_nan(block)
    filled = np.flatnonzero(np.diff(block.indptr) > 1)
    rows = sparse.csr_matrix(block[filled[:_SAMPLE_ROWS]], dtype=np.float64)
    if len(filled) < 2 or not np.isfinite(rows.data).all():
        return "", _ADVICE
    if rows.data.min() < 0:
        return _cause_of_negative(rows)
    if rows.data.max() >= _LARGEST_COUNT:
        return "", _ADVICE
    if scaled := _cause_of_scale(rows):
        return scaled
    is_near = _from_integers(rows.data).mean() < _NEAR_INTEGERS
    if rows.data.max() < _LARGEST_LOGARITHM and not is_near:
        return "They look like logarithms. ", _ADVICE
    return (
        "They look like counts that a correction left between integers, as the removal of ambient "
        "RNA does (SoupX, CellBender, DecontX). ",
        "Take the counts before it, or round: adata.layers['counts'] = np.rint({matrix}), and pass "
        "layer='counts'.",
    )


def _cause_of_nan(block: sparse.csr_matrix) -> Cause:
    missing = sparse.csr_matrix(block, dtype=np.float64)
    missing.data = np.isnan(missing.data).astype(np.float64)
    missing.eliminate_zeros()
    n_missing = np.diff(missing.indptr)
    # The sum of random numbers stands for the set of a row's genes.
    marks = np.random.default_rng(0).random(block.shape[1])
    is_hit = n_missing > 0
    n_rows, n_sets = int(is_hit.sum()), len(np.unique(np.round((missing @ marks)[is_hit], 9)))
    if n_rows < 2 * n_sets or n_missing.max() < 2:
        return (
            f"{n_rows} cells have NaN. ",
            "Drop these cells or genes, or fill in what is missing: {matrix} = "
            "np.nan_to_num({matrix}) if a missing value means no count.",
        )
    genes = int(n_missing.max())
    return (
        f"Up to {genes} genes are NaN in all of many cells at once, as after joining slices of "
        "different panels with join='outer'. ",
        "Join them with anndata.concat(..., join='inner'), which keeps the genes that all have, or "
        "with join='outer', fill_value=0. For this AnnData: {matrix} = np.nan_to_num({matrix}).",
    )


def _cause_of_negative(rows: sparse.csr_matrix) -> Cause:
    means = np.asarray(rows.mean(axis=0)).ravel()
    spread = np.sqrt(np.asarray(rows.multiply(rows).mean(axis=0)).ravel())
    if np.median(np.abs(means)) < 0.25 * np.median(spread):
        return "They look scaled gene by gene (z-scores, as of sc.pp.scale). ", _ADVICE
    return "They look corrected or transformed. ", _ADVICE


def _cause_of_scale(rows: sparse.csr_matrix) -> Cause | None:
    """What counts were multiplied or transformed by; None if nothing of the kind."""
    for transform, undo, code in _TRANSFORMS:
        if code and rows.data.max() > _LARGEST_EXPONENT:
            continue
        values = sparse.csr_matrix((undo(rows.data), rows.indices, rows.indptr), rows.shape)
        sums = np.asarray(values.sum(axis=1)).ravel()
        if code and _from_integers(values.data).max() < 0.01:
            return (
                f"They are {transform}counts. ",
                f"adata.layers['counts'] = np.rint({code}) gives those back; pass layer='counts'.",
            )
        if np.ptp(sums) < _SAME * sums.mean():
            total = f"{sums.mean():,.0f}" if sums.mean() > 10 else f"{sums.mean():.3g}"
            return (
                f"They are {transform}counts that were scaled to a total of {total} in each cell. ",
                _ADVICE,
            )
        if _are_multiples(values):
            return (
                f"They are {transform}counts that were divided by a factor of each cell. ",
                _ADVICE,
            )
    return None


def _are_multiples(values: sparse.csr_matrix) -> bool:
    """Whether the values of each row are multiples of its smallest one, as those of counts are."""
    smallest = np.minimum.reduceat(values.data, values.indptr[:-1])
    ratios = values.data / np.repeat(smallest, np.diff(values.indptr))
    is_near = _from_integers(ratios) < 0.01 + 1e-4 * ratios
    return bool(is_near.mean() > 0.9 and ratios.max() > 1.5)


def _from_integers(values: NDArray[Any]) -> NDArray[Any]:
    off: NDArray[Any] = np.abs(values - np.rint(values))
    return off
