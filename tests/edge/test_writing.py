"""All of it is written, or nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._edge import tables
from stofm._edge.tables import all_or_nothing, refuse_foreign, refuse_not_finite, refuse_taken
from stofm._keys import Obsm

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = str(Path(st.__file__).parent)
QUIET = {"device": "cpu", "show_progress_bar": False}
SLICES = {"library_key": "library", **QUIET}
FAST = {"use_rep": "X_pca", **SLICES}


class Interrupted(KeyboardInterrupt):
    """What the tests raise."""


def held(adata: ad.AnnData) -> dict[str, Any]:
    """Everything that stofm may write, entry by entry."""
    parts = {f"obs/{name}": adata.obs[name].to_numpy() for name in adata.obs}
    parts |= {f"var/{name}": adata.var[name].to_numpy() for name in adata.var}
    parts |= {f"obsm/{name}": value for name, value in adata.obsm.items()}
    return parts | {f"uns/{name}": value for name, value in adata.uns.items()}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if sparse.issparse(first):
        return (first != second).nnz == 0
    if isinstance(first, pd.DataFrame | pd.Series):
        return first.equals(second)
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


def interrupted(adata: ad.AnnData, write: Callable[[], object]) -> None:
    with pytest.raises(Interrupted):
        _interrupt(adata, write)


def _interrupt(adata: ad.AnnData, write: Callable[[], object], *others: ad.AnnData) -> None:
    with all_or_nothing(adata, *others):
        write()
        raise Interrupted


class Tracer:
    """From the first write on: notes after which lines the data differ, or interrupts at one."""

    def __init__(self, adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch, stop: int = 0) -> None:
        self.adata = adata
        self.stop = stop
        self.n_lines = 0
        self.changes: list[int] = []
        self._last = self._keys()
        self._monkeypatch = monkeypatch

    def _keys(self) -> Any:
        stored = (*self.adata.obsm.items(), *self.adata.uns.items())
        columns = (*self.adata.obs.columns, *self.adata.var.columns)
        return [(key, id(value)) for key, value in stored], columns

    def __enter__(self) -> Tracer:
        original = tables._held

        def of(adata: ad.AnnData) -> Any:
            frame = sys._getframe()
            while frame is not None:
                frame.f_trace = self._line if _is_ours(frame) else None
                frame = frame.f_back
            sys.settrace(lambda frame, *_: self._line if _is_ours(frame) else None)
            return original(adata)

        self._monkeypatch.setattr(tables, "_held", of)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._monkeypatch.undo()

    def _line(self, _frame: Any, event: str, _arg: object) -> Any:
        if event != "line":
            return self._line
        self.n_lines += 1
        if self.n_lines == self.stop:
            sys.settrace(None)
            raise Interrupted
        if not self.stop and (keys := self._keys()) != self._last:
            self._last = keys
            self.changes.append(self.n_lines)
        return self._line


def _is_ours(frame: Any) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(PACKAGE) and name != tables.__file__


@pytest.fixture
def cells(adata, rng):
    few = adata[:64].copy()
    kind = few.obs["kind"].cat.codes.to_numpy()
    few.obsm["X_pca"] = (np.eye(3, 5)[kind] + rng.normal(size=(64, 5))).astype(np.float32)
    return few


def _map(adata, _model, vocabulary, base):
    st.pp.map_genes(adata, vocabulary=vocabulary)


def _tokenize(adata, model, _vocabulary, base):
    st.pp.tokenize(adata, model, show_progress_bar=False)


def _encode(adata, model, _vocabulary, base):
    st.tl.encode_cells(adata, model, **QUIET)


def _subslice(adata, _model, _vocabulary, base):
    st.pp.subslice(adata, use_rep="X_pca", library_key="library")


def _embed(adata, model, _vocabulary, base):
    st.tl.embed(adata, model, **SLICES)


def _domains(adata, _model, _vocabulary, base):
    st.tl.domains(adata, n_domains=4, coarser=[2], use_rep="X_pca", library_key="library")


def _annotate(adata, _model, _vocabulary, heads):
    st.tl.annotate(adata, head=heads["annotate"], **SLICES)


def _deconvolve(adata, _model, _vocabulary, heads):
    st.tl.deconvolve(adata, head=heads["deconvolve"], **SLICES)


def _impute(adata, _model, _vocabulary, heads):
    st.tl.impute(adata, head=heads["impute"], **SLICES)


@pytest.fixture
def heads(cells, request, few_epochs):
    """A head for each task that a test asks for."""
    found: dict[str, Any] = {}
    if request.param == "annotate":
        found["annotate"] = st.tl.annotate(cells, label_key="kind", **FAST)
    if request.param == "deconvolve":
        cells.obsm["truth"] = pd.get_dummies(cells.obs["kind"]).astype(float)
        found["deconvolve"] = st.tl.deconvolve(cells, proportions_key="truth", **FAST)
    if request.param == "impute":
        genes = cells.var_names[:2].tolist()
        found["impute"] = st.tl.impute(cells, genes=genes, **FAST)
    return found


@pytest.mark.parametrize(
    ("write", "heads", "before"),
    [
        (_map, "", []),
        (_tokenize, "", []),
        (_tokenize, "", [_tokenize]),
        (_encode, "", [_tokenize]),
        (_subslice, "", []),
        (_embed, "", []),
        (_embed, "", [_embed]),
        (_domains, "", [_domains]),
        (_annotate, "annotate", []),
        (_annotate, "annotate", [_annotate]),
        (_deconvolve, "deconvolve", []),
        (_impute, "impute", []),
    ],
    indirect=["heads"],
)
def test_interrupted_at_any_write_it_leaves_the_data_as_they_were(
    cells, model, vocabulary, heads, write, before, monkeypatch
):
    for step in before:
        step(cells, model, vocabulary, heads)
    if before:
        cells.X = cells.X[:, ::-1]
        cells.obsm["spatial"] = cells.obsm["spatial"][::-1]
    given = [model, vocabulary, heads]
    if write is _encode:
        cells.X = cells.X[:, ::-1]
    start = cells.copy()
    # What is remembered from the first call changes the number of lines.
    write(cells.copy(), *given)
    with Tracer(cells, monkeypatch) as first:
        write(cells, *given)
    assert first.changes
    for stop in first.changes:
        again = start.copy()
        expected = held(again)
        with pytest.raises(Interrupted), Tracer(again, monkeypatch, stop):
            write(again, *given)
        assert same(held(again), expected), f"line {stop}"


def test_what_was_replaced_or_removed_is_there_again(cells):
    cells.uns["colors"] = ["red"]
    cells.obs["number"] = np.arange(64)
    expected, kept = held(cells.copy()), cells.obsm["X_pca"]

    def spoil():
        cells.obs["number"] = 0
        cells.obs["new"] = "x"
        del cells.obs["kind"]
        cells.var["new"] = 1
        del cells.obsm["X_pca"]
        cells.obsm["spatial"] = np.zeros((64, 2))
        cells.uns.pop("colors")
        cells.uns["other"] = {}

    interrupted(cells, spoil)
    assert same(held(cells), expected)
    assert cells.obsm["X_pca"] is kept
    with all_or_nothing(cells):
        spoil()
    assert "new" in cells.obs


def test_all_of_several_tables(cells):
    tables = [cells, cells.copy()]

    def write():
        tables[0].obs["new"] = tables[1].obs["new"] = 1

    with pytest.raises(Interrupted):
        _interrupt(tables[0], write, tables[1])
    assert not any("new" in table.obs for table in tables)


def test_a_view(cells):
    view = cells[:50]
    expected = held(view.copy())
    interrupted(view, lambda: None)
    assert view.is_view
    interrupted(view, lambda: view.obsm.update(X_new=np.zeros((50, 1))))
    assert same(held(view), expected)
    assert same(held(cells[:50].copy()), expected)


def test_a_backed_file(cells, model, tmp_path, monkeypatch):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r+")
    expected = held(backed)

    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    monkeypatch.setattr("stofm._edge.embedding.write_record", interrupt)
    with pytest.raises(Interrupted):
        st.tl.embed(backed, model, **SLICES)
    assert same(held(backed), expected)
    assert Obsm.X not in backed.obsm


def test_entries_beside_a_key_are_not_replaced(cells, heads_by_key):
    cells.obsm["mine_proba"] = np.zeros((64, 2))
    with pytest.raises(ValueError, match=r"key_added='mine' would replace obsm\['mine_proba'\]"):
        heads_by_key("mine")
    assert "mine" not in cells.obs
    del cells.obsm["mine_proba"]
    heads_by_key("mine")
    heads_by_key("mine")
    cells.obs["kind_level1"], cells.obsm["y"] = 1, np.zeros((64, 1))
    with pytest.raises(ValueError, match=r"would replace obs\['kind_level1'\] and obsm\['y'\]"):
        refuse_foreign(cells, "kind", obs=["kind_level1"], obsm=["y"])
    refuse_foreign(cells, "stofm_domain", obs=["kind_level1"])


@pytest.fixture
def heads_by_key(cells):
    """Annotate cells under a key."""
    head = st.tl.annotate(cells, label_key="kind", **FAST)
    return lambda key: st.tl.annotate(cells, head=head, key_added=key, **SLICES)


@pytest.mark.parametrize("name", ["", "a/b", "/", ".", "..", "a\0b"])
def test_a_name_that_files_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"key_added=.* can't be written to a file.*such as 'x'"):
        refuse_taken(name, "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_not_written(bad):
    found = np.ones((3, 2))
    refuse_not_finite("annotation", found, None)
    found[1, 0] = bad
    with pytest.raises(FloatingPointError, match="annotation of 1 of 3 cells is not finite"):
        refuse_not_finite("annotation", found)
