from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from stofm.genes import RankedTokens, rank_genes
from stofm.genes.fitting import as_count_slice
from stofm.genes.ranking import require_sound


def matrix(form: str = "csr", dtype: type = np.int32) -> Any:
    made = sparse.random(9, 7, 0.5, format=form, random_state=3, dtype=np.float32)
    made.data[:] = 1
    made.indices, made.indptr = made.indices.astype(dtype), made.indptr.astype(dtype)
    return made


def damaged(form: str, dtype: type, place: str, value: int) -> Any:
    made = matrix(form, dtype)
    getattr(made, place)[-4] = value
    return made


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("place", "value"),
    [("indices", -1), ("indices", -(10**8)), ("indices", 9), ("indptr", 10**6), ("indptr", -3)],
)
def test_damaged_matrices(form: str, dtype: type, place: str, value: int) -> None:
    with pytest.raises(ValueError, match="Here is damaged"):
        require_sound(damaged(form, dtype, place, value), "Here")


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil"])
def test_sound_matrices(form: str) -> None:
    require_sound(matrix().asformat(form), "Here")
    require_sound(sparse.csr_matrix((3, 0)), "Here")
    require_sound(np.ones((2, 2)), "Here")


def test_wherever_matrices_enter() -> None:
    made = damaged("csr", np.int32, "indices", -2)
    with pytest.raises(ValueError, match="is damaged"):
        rank_genes(made, np.arange(7), np.ones(7))
    with pytest.raises(ValueError, match="is damaged"):
        as_count_slice((made, ["ENSG00000000001"] * 7), layer=None)
    with pytest.raises(ValueError, match="is damaged"):
        RankedTokens.from_csr(made.astype(np.int32))
