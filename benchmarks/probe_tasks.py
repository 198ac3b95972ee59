"""The tasks of probes.py, their slices, and embeddings of these."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anndata
import numpy as np
from probing import NO_CLASS

import stofm as st
from stofm.nn import UntrainedModelWarning, choose_device, choose_dtype, embed_slice
from stofm.spatial import VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

LIBRARY_KEY = "slice_id"
#: Cells that go through the SE(2) Transformer at a time on a CPU, where sub-slices are small.
_CELLS_AT_ONCE = 400


@dataclass(frozen=True, kw_only=True)
class Task:
    """Classes of a left-out slice, learnt from its siblings.

    Attributes
    ----------
    name
        In tables.
    fit
        Files of the slices to fit to; none for a task of clustering only.
    test
        File of the left-out slice.
    label
        Column of ``obs``.
    no_class
        Labels that say that the class is not known.
    """

    name: str
    fit: tuple[str, ...] = ()
    test: str
    label: str
    no_class: tuple[str, ...] = ()


TASKS = (
    Task(name="STARmap layers", fit=("starmap_mpfc_BZ5",), test="starmap_mpfc_BZ9", label="layer"),
    Task(
        name="STARmap types", fit=("starmap_mpfc_BZ5",), test="starmap_mpfc_BZ9", label="cell_type"
    ),
    Task(name="seqFISH types", fit=("seqfish_embryo2",), test="seqfish_embryo1", label="cell_type"),
    Task(
        name="MERFISH types",
        fit=("merfish_hypothalamus_m0.29",),
        test="merfish_hypothalamus_a7_m0.09",
        label="cell_type",
        no_class=("Ambiguous",),
    ),
    Task(
        name="DLPFC layers",
        fit=("dlpfc_151674", "dlpfc_151675"),
        test="dlpfc_151676",
        label="layer",
    ),
    Task(
        name="HER2+ regions",
        fit=("her2st_A1", "her2st_B1", "her2st_C1", "her2st_F1"),
        test="her2st_E1",
        label="region",
    ),
    Task(name="olfactory bulb layers", test="st_mob_rep11", label="layer"),
)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its slices.

    Attributes
    ----------
    task
        What is asked.
    slices
        By file, the left-out one last; several tasks share an AnnData.
    """

    task: Task
    slices: Mapping[str, AnnData]

    @property
    def labels(self) -> list[NDArray[np.str_]]:
        """Classes of the cells of each slice."""
        return [_read_labels(one, self.task) for one in self.slices.values()]


def load_tasks(folder: Path, tasks: Sequence[Task] = TASKS) -> list[LoadedTask]:
    """Read the slices of tasks.

    Raises
    ------
    FileNotFoundError
        Files are not in the folder.
    ValueError
        A slice has no such column of labels.
    """
    names = list(dict.fromkeys(name for task in tasks for name in (*task.fit, task.test)))
    missing = [name for name in names if not (folder / f"{name}.h5ad").is_file()]
    if missing:
        msg = f"{folder} lacks {', '.join(f'{name}.h5ad' for name in missing)}, which probes need."
        raise FileNotFoundError(msg)
    slices = {name: anndata.read_h5ad(folder / f"{name}.h5ad") for name in names}
    for task in tasks:
        for name in (*task.fit, task.test):
            if task.label not in slices[name].obs:
                found = slices[name].obs.columns.tolist()
                msg = f"{name}.h5ad has no obs[{task.label!r}], which {task.name!r} needs: {found}."
                raise ValueError(msg)
    return [LoadedTask(t, {name: slices[name] for name in (*t.fit, t.test)}) for t in tasks]


def _read_labels(adata: AnnData, task: Task) -> NDArray[np.str_]:
    column = adata.obs[task.label].astype(object)
    known = column.notna() & ~column.isin(task.no_class)
    labels: NDArray[np.str_] = column.where(known, NO_CLASS).to_numpy(dtype=str)
    return labels


def rows_by_slice(adata: AnnData) -> list[NDArray[np.int64]]:
    """Rows of each slice of a file."""
    if LIBRARY_KEY not in adata.obs:
        return [np.arange(adata.n_obs)]
    names = adata.obs[LIBRARY_KEY].to_numpy(dtype=str)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


@dataclass(frozen=True)
class Embedding:
    """Embeddings of the cells of a file.

    Attributes
    ----------
    cell
        (n, d_cell) from genes alone.
    spatial
        (n, d_model) in the context of the tissue.
    """

    cell: NDArray[np.float32]
    spatial: NDArray[np.float32]


def embed_with(
    model: Stofm,
    tasks: Sequence[LoadedTask],
    *,
    virtual_cells: bool = True,
    device: str = "auto",
) -> dict[str, Embedding]:
    """Embed all slices of tasks.

    Parameters
    ----------
    model
        Trained or not.
    tasks
        Tokens and embeddings are left in their AnnData, and used again where they fit.
    virtual_cells
        Put virtual cells into the sub-slices; without them the model sees cells only.
    device
        Where to compute.

    Returns
    -------
    By file.
    """
    slices = {name: adata for one in tasks for name, adata in one.slices.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedModelWarning)
        embed = _embed if virtual_cells else _embed_without_virtual_cells
        return {name: embed(adata, model, device) for name, adata in slices.items()}


def _batch_size(model: Stofm, device: str) -> int | None:
    """Sub-slices at a time on a CPU; None to fit the device."""
    on_cpu = choose_device(device).type == "cpu"
    return max(1, _CELLS_AT_ONCE // model.config.subslice.n_cells) if on_cpu else None


def _embed(adata: AnnData, model: Stofm, device: str) -> Embedding:
    st.tl.embed(
        adata,
        model,
        library_key=LIBRARY_KEY if LIBRARY_KEY in adata.obs else None,
        device=device,
        batch_size=_batch_size(model, device) or "auto",
        show_progress_bar=False,
    )
    return Embedding(adata.obsm["X_stofm_cell"], adata.obsm["X_stofm"])


def _embed_without_virtual_cells(adata: AnnData, model: Stofm, device: str) -> Embedding:
    library_key = LIBRARY_KEY if LIBRARY_KEY in adata.obs else None
    st.pp.tokenize(adata, model, show_progress_bar=False)
    st.tl.encode_cells(
        adata, model, library_key=library_key, device=device, show_progress_bar=False
    )
    place = choose_device(device)
    rules, transformer = model.config.subslice, model.se2_transformer
    cells = np.asarray(adata.obsm["X_stofm_cell"])
    spatial = np.empty((adata.n_obs, transformer.config.d_model), dtype=np.float32)
    for rows in rows_by_slice(adata):
        coordinates = np.asarray(adata.obsm["spatial"])[rows, :2]
        layout = lay_out_slice(coordinates, cells[rows], rules)
        nothing = VirtualCells(layout.virtual.coordinates[:0], layout.virtual.features[:0])
        spatial[rows] = embed_slice(
            transformer,
            replace(layout, virtual=nothing),
            cells[rows],
            rules,
            device=place,
            dtype=choose_dtype("auto", place),
            batch_size=_batch_size(model, device),
        )
    return Embedding(cells, spatial)
