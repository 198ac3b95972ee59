from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from stofm.genes import RankedTokens, rank_genes
from stofm.genes.compressed import DamagedMatrixError, require_sound
from stofm.genes.fitting import as_count_slice


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
    with pytest.raises(DamagedMatrixError, match="Here is damaged"):
        require_sound(damaged(form, dtype, place, value), "Here")


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil"])
def test_sound_matrices(form: str) -> None:
    require_sound(matrix().asformat(form), "Here")
    require_sound(sparse.csr_matrix((3, 0)), "Here")
    require_sound(np.ones((2, 2)), "Here")


def test_message_names_the_cell() -> None:
    made = matrix()
    made.indices[made.indptr[4]] = 70
    with pytest.raises(
        DamagedMatrixError, match=r"a column index is 70 \(at cell 104\), and there"
    ):
        require_sound(made, "Here", first_row=100)


def test_coordinates_of_entries() -> None:
    made = matrix().tocoo()
    made.coords[1][2] = 7
    with pytest.raises(DamagedMatrixError, match="indices of axis 1 must be 0 to 6, found 7"):
        require_sound(made, "Here")


def test_wherever_matrices_enter() -> None:
    made = damaged("csr", np.int32, "indices", -2)
    with pytest.raises(DamagedMatrixError):
        rank_genes(made, np.arange(7), np.ones(7))
    with pytest.raises(DamagedMatrixError):
        as_count_slice((made, ["ENSG00000000001"] * 7), layer=None)
    with pytest.raises(DamagedMatrixError):
        RankedTokens.from_csr(made.astype(np.int32))
