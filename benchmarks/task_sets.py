"""The tasks of tasks.py: which slices to fit, which to test, and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from probe_tasks import TASKS, LoadedTask, Task, rows_by_slice
from scipy.spatial import cKDTree

from stofm.spatial import split_cells
from stofm.tl._probe_scores import NO_CLASS, common_classes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

#: Column that tasks with a reference read its types from.
LABEL_KEY = "cell_type"

#: Share of a slice's cells to test on, in blocks.
_TESTED_SHARE = 0.25
#: A spot's composition counts if it has so many cells with a type, and such a share of its cells.
_LEAST_CELLS = 5
_LEAST_LABELLED = 0.8
#: Genes to hold out: so many, but no more than this share of those that all slices have.
_N_HELD_OUT = 50
_MOST_HELD_OUT = 0.2
#: A held-out gene is detected in this share of the fitted cells.
_LEAST_DETECTED = 0.1
_COUNTS_PER_CELL = 1e4


@dataclass(frozen=True)
class Folder:
    """Reads each file of a folder once."""

    path: Path

    def read(self, name: str) -> AnnData:
        """An ``.h5ad`` file by its stem; the same object each time.

        Raises
        ------
        FileNotFoundError
            It is not there.
        """
        return _read(self.path / f"{name}.h5ad")


@cache
def _read(path: Path) -> AnnData:
    if not path.is_file():
        msg = f"{path.parent} lacks {path.name}, which this task needs."
        raise FileNotFoundError(msg)
    return anndata.read_h5ad(path)


@dataclass(frozen=True)
class Annotation:
    """Classes of cells of one slice, learnt from cells of others or of another part of it.

    Attributes
    ----------
    slices
        By file, to fit and to test.
    fitted
        Class of each cell of the slices to fit; :data:`NO_CLASS` where it must not be
        learnt: in the tested part, its margin, and for rare classes.
    test
        The tested slice.
    truth
        Class of each of its cells; :data:`NO_CLASS` where it is not tested.
    """

    slices: Mapping[str, AnnData]
    fitted: Mapping[str, NDArray[np.str_]]
    test: str
    truth: NDArray[np.str_]


@dataclass(frozen=True)
class Domains:
    """Regions of a slice, without any labels.

    Attributes
    ----------
    adata
        The slice.
    truth
        Region of each cell; :data:`NO_CLASS` where it is not known or rare.
    """

    adata: AnnData
    truth: NDArray[np.str_]

    @property
    def n_domains(self) -> int:
        """Number of regions."""
        return len(np.unique(self.truth[self.truth != NO_CLASS]))


@dataclass(frozen=True)
class Deconvolution:
    """Cell types' proportions in spots, from single cells.

    Attributes
    ----------
    query
        Spots.
    reference
        Single cells with ``obs["cell_type"]``.
    truth
        Proportions of the spots for which they are known, spots × types.
    """

    query: AnnData
    reference: AnnData
    truth: pd.DataFrame


@dataclass(frozen=True)
class Proportions:
    """Cell types' proportions in spots, from other spots of the slice where they are known.

    Attributes
    ----------
    query
        Spots, with known proportions in ``obsm["known"]``: NaN where they are tested, and in the
        margin.
    reference
        Single cells with ``obs["cell_type"]``, for baselines that read no spots.
    truth
        Proportions of the tested spots, spots × types.
    """

    query: AnnData
    reference: AnnData
    truth: pd.DataFrame


@dataclass(frozen=True)
class Imputation:
    """Expression of genes that the query lacks.

    Attributes
    ----------
    fit
        Slices with all genes.
    query
        The tested slice without the held-out genes.
    genes
        Held out.
    counts
        Their raw counts in the query, cells × genes.
    """

    fit: Sequence[AnnData]
    query: AnnData
    genes: Sequence[str]
    counts: NDArray[np.floating]

    @cached_property
    def known_genes(self) -> list[AnnData]:
        """All slices, the query last, with the genes that all have and that are not held out."""
        slices = [*self.fit, self.query]
        names = sorted(set(slices[0].var_names).intersection(*(one.var_names for one in slices)))
        return [one[:, names].copy() for one in slices]

    @property
    def values(self) -> NDArray[np.float64]:
        """Log-normalised expression of the held-out genes in the cells to fit."""
        counts = [one[:, self.genes].X.toarray() for one in self.fit]
        parts = map(_expression, counts, self.known_genes[:-1])
        return np.concatenate(list(parts))

    @property
    def truth(self) -> pd.DataFrame:
        """Log-normalised expression of the held-out genes in the query."""
        values = _expression(self.counts, self.known_genes[-1])
        return pd.DataFrame(values, index=self.query.obs_names, columns=list(self.genes))


def _expression(counts: NDArray[np.floating], known: AnnData) -> NDArray[np.float64]:
    """Counts per 10,000 of the genes that may be read, as log(1 + x)."""
    totals = np.maximum(np.asarray(known.X.sum(axis=1), dtype=np.float64), 1.0)
    return np.log1p(counts / totals * _COUNTS_PER_CELL)


def load_annotation(folder: Folder, task: Task) -> Annotation:
    """Slices and classes; a task without slices to fit is tested on blocks of its only slice."""
    loaded = LoadedTask(task, {name: folder.read(name) for name in (*task.fit, task.test)})
    labels = dict(zip(loaded.slices, loaded.labels, strict=True))
    truth = labels[task.test]
    if task.fit:
        fitted = {name: labels[name] for name in task.fit}
    else:
        rows, tested = split_blocks(loaded.slices[task.test], truth != NO_CLASS)
        fitted = {task.test: _only(truth, rows)}
        truth = _only(truth, tested)
    classes = common_classes(np.concatenate(list(fitted.values())))
    return Annotation(
        slices=loaded.slices,
        fitted={name: _of(own, classes) for name, own in fitted.items()},
        test=task.test,
        truth=_of(truth, classes),
    )


def split_blocks(
    adata: AnnData, use: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit and rows to test among those that are used: blocks of the plane, with a margin."""
    rows = np.flatnonzero(use)
    slices = [np.searchsorted(rows, np.intersect1d(rows, own)) for own in rows_by_slice(adata)]
    split = split_cells(
        np.asarray(adata.obsm["spatial"])[rows, :2],
        [own for own in slices if len(own)],
        how="blocks",
        share=_TESTED_SHARE,
        seed=0,
    )
    return rows[split.fitted], rows[split.held_out]


def _only(labels: NDArray[np.str_], rows: NDArray[np.int64]) -> NDArray[np.str_]:
    kept = np.full_like(labels, NO_CLASS)
    kept[rows] = labels[rows]
    return kept


def _of(labels: NDArray[np.str_], classes: NDArray[np.str_]) -> NDArray[np.str_]:
    return np.where(np.isin(labels, classes), labels, NO_CLASS)


def load_domains(folder: Folder, task: Task) -> Domains:
    """The tested slice of a task and its regions."""
    loaded = LoadedTask(task, {task.test: folder.read(task.test)})
    (labels,) = loaded.labels
    return Domains(loaded.slices[task.test], _of(labels, common_classes(labels)))


def load_pseudospots(folder: Folder) -> Deconvolution:
    """Sums of real cells, whose proportions are known exactly."""
    query = folder.read("starmap_pseudospots")
    truth = pd.DataFrame(
        np.asarray(query.obsm["proportions"]),
        index=query.obs_names,
        columns=np.asarray(query.uns["proportion_names"], dtype=str),
    )
    return Deconvolution(query, folder.read("starmap_v1_cells_ref"), truth)


def load_known_spots(folder: Folder) -> Proportions:
    """The same sums of cells, a part of them with known proportions."""
    spots = load_pseudospots(folder)
    adata = spots.query.copy()
    rows, tested = split_blocks(adata, np.ones(adata.n_obs, dtype=bool))
    known = spots.truth.copy()
    known.loc[~np.isin(np.arange(adata.n_obs), rows)] = np.nan
    adata.obsm["known"] = known
    return Proportions(adata, spots.reference, spots.truth.iloc[tested])


def load_neighboring_sections(folder: Folder) -> Deconvolution:
    """Visium spots, and the cells of the neighbouring Xenium section that lie in each."""
    query, cells = folder.read("visium_breast_tile"), folder.read("xenium_breast_tile")
    (labels,) = LoadedTask(XENIUM_TYPES, {"": cells}).labels
    labels = _of(labels, common_classes(labels))
    truth = composition(
        np.asarray(query.obsm["spatial"]),
        cells.obs[["x_visium", "y_visium"]].to_numpy(),
        labels,
        # Of a spot, in the common frame of both sections.
        radius=4.6,
    ).set_axis(query.obs_names)
    reference = cells[labels != NO_CLASS].copy()
    return Deconvolution(query, reference, truth.dropna())


def composition(
    spots: NDArray[np.floating],
    cells: NDArray[np.floating],
    labels: NDArray[np.str_],
    *,
    radius: float,
) -> pd.DataFrame:
    """Proportions of the types of the cells in each spot.

    Parameters
    ----------
    spots, cells
        (n, 2) in one frame.
    labels
        (n,) types; :data:`NO_CLASS` for none.
    radius
        Of a spot.

    Returns
    -------
    Spots × types; NaN where fewer than five cells have a type, or less than 80 % of them.
    """
    types = np.unique(labels[labels != NO_CLASS])
    shares = np.full((len(spots), len(types)), np.nan)
    for row, near in zip(shares, cKDTree(cells).query_ball_point(spots, radius), strict=True):
        found = labels[near]
        n_labelled = int((found != NO_CLASS).sum())
        if n_labelled >= max(_LEAST_CELLS, _LEAST_LABELLED * len(found)):
            row[:] = (found[:, None] == types).sum(axis=0) / n_labelled
    return pd.DataFrame(shares, columns=types)


def load_imputation(folder: Folder, task: Task) -> Imputation:
    """Slices to fit, the tested slice, and held-out genes; blocks where there is one slice."""
    test = folder.read(task.test)
    if task.fit:
        return hold_out([folder.read(name) for name in task.fit], test)
    rows, tested = split_blocks(test, np.ones(test.n_obs, dtype=bool))
    return hold_out([test[rows].copy()], test[tested].copy())


def hold_out(fit: Sequence[AnnData], test: AnnData) -> Imputation:
    """Choose genes by the slices to fit, and take them out of the tested slice.

    They are drawn from the genes that all slices have and that a tenth of the cells to fit show.
    """
    names = [one.var_names.to_numpy(dtype=str) for one in (*fit, test)]
    shared = sorted(set(names[0]).intersection(*names[1:]))
    detected = sum(np.asarray((one[:, shared].X > 0).sum(axis=0)).ravel() for one in fit)
    often = np.array(shared)[detected >= _LEAST_DETECTED * sum(one.n_obs for one in fit)]
    n_genes = min(_N_HELD_OUT, int(_MOST_HELD_OUT * len(shared)), len(often))
    genes = np.sort(np.random.default_rng(0).choice(often, n_genes, replace=False)).tolist()
    query = test[:, ~test.var_names.isin(genes)].copy()
    return Imputation(fit, query, genes, test[:, genes].X.toarray())


XENIUM_TYPES = Task(name="Xenium breast types", test="xenium_breast_tile", label=LABEL_KEY)
_LAYERS, _TYPES, _SEQFISH, _MERFISH, _DLPFC, _HER2, _BULB = TASKS[:7]
_BARREL = Task(name="osmFISH regions", test="osmfish_sscortex", label="region")
#: Loaders of all tasks by family and name.
TASK_SETS: Mapping[str, Mapping[str, Callable[[Folder], Any]]] = {
    "annotation": {
        task.name: partial(load_annotation, task=task)
        for task in (_LAYERS, _TYPES, _SEQFISH, _MERFISH, XENIUM_TYPES, _DLPFC, _HER2)
    },
    "domains": {
        task.name: partial(load_domains, task=task)
        for task in (_LAYERS, _DLPFC, _HER2, _BULB, _BARREL)
    },
    "deconvolution": {
        "STARmap spots": load_pseudospots,
        "Visium breast": load_neighboring_sections,
    },
    "proportions": {"STARmap spots": load_known_spots},
    "imputation": {
        name: partial(load_imputation, task=task)
        for name, task in {
            "STARmap": _LAYERS,
            "seqFISH": _SEQFISH,
            "MERFISH": _MERFISH,
            "DLPFC": _DLPFC,
            "Xenium breast": XENIUM_TYPES,
        }.items()
    },
}
