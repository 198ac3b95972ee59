"""The tasks of probes.py, their slices, and embeddings of these."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anndata
import numpy as np

import stofm as st
from stofm.heads.request import resolve_slices
from stofm.heads.targets import read_label_names
from stofm.nn import UntrainedModelWarning, choose_device, choose_dtype, embed_slice
from stofm.spatial import VirtualCells, lay_out_slice
from stofm.tl._probe import read_representations
from stofm.tl._probe_scores import AND, plan_folds, score_head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

    #: Representations by name, as :func:`stofm.tl.probe` takes them.
    Representations = Mapping[str, str | tuple[str, ...]]
    #: (n, d) of the cells of a slice, from genes alone and in the context of the tissue.
    Embedding = tuple[NDArray[np.float32], NDArray[np.float32]]

LIBRARY_KEY = "slice_id"
#: A model's embeddings, and both side by side, as tables call them.
CELL, SPATIAL = "cell", "spatial"
BOTH = f"{CELL} + {SPATIAL}"
#: Names of the parts that a file is cut into.
_LEFT, _RIGHT = "left", "right"
#: Cells that go through the SE(2) Transformer at a time on a CPU, where sub-slices are small.
_CELLS_AT_ONCE = 400


@dataclass(frozen=True, kw_only=True)
class Task:
    """Classes of what is left out, learnt from the rest.

    Attributes
    ----------
    name
        In tables.
    fit
        Files of the slices to fit to; none where these are in the file that is tested.
    test
        File of what is left out: all of it, if there are others to fit to.
    label
        Column of ``obs``.
    no_class
        Labels that say that the class is not known.
    library_key
        Column that tells the slices of a file apart.
    fitted_share
        Of a single file, the share of the labelled cells that are fitted, those with the lowest x;
        the others are tested. The two parts are slices of their own.
    left_out
        Of a single file, the slices that are left out in turn; None for all.
    """

    name: str
    fit: tuple[str, ...] = ()
    test: str
    label: str
    no_class: tuple[str, ...] = ()
    library_key: str = LIBRARY_KEY
    fitted_share: float | None = None
    left_out: tuple[str, ...] | None = None


#: The first six leave out whole files, which the recipes of this package don't train on.
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
    Task(name="olfactory bulb layers", test="st_mob_rep11", label="layer", fitted_share=0.5),
    Task(name="Xenium types", test="xenium_breast_tile", label="cell_type", fitted_share=0.6),
    Task(name="heart regions", test="st_heart_embryo_CN74", label="region"),
    Task(
        name="lung regions",
        test="cosmx_lung5",
        label="region",
        library_key="fov",
        left_out=("fov22",),
    ),
    Task(name="breast regions", test="xenium_idc_left", label="region", fitted_share=2 / 3),
    Task(name="seqFISH+ cortex types", test="seqfishplus_cortex_svz", label="cell_type"),
    Task(name="seqFISH+ bulb types", test="seqfishplus_ob", label="cell_type"),
    Task(name="liver clusters", fit=("st_liver_CN65",), test="st_liver_CN16", label="cluster"),
    Task(name="osmFISH types", test="osmfish_sscortex", label="cell_type", fitted_share=0.6),
    Task(name="osmFISH regions", test="osmfish_sscortex", label="region", fitted_share=0.6),
)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its slices.

    Attributes
    ----------
    task
        What is asked.
    slices
        By file, or left and right part of a file, what is tested last; several tasks share an
        AnnData.
    """

    task: Task
    slices: Mapping[str, AnnData]

    @property
    def labels(self) -> list[NDArray[np.str_]]:
        """Classes of the cells of each slice."""
        sections = resolve_slices(dict(self.slices), self.task.library_key)
        labels = read_label_names(sections, self.task.label, missing=self.task.no_class)
        return [labels[place] for place in sections.places]

    @property
    def data(self) -> AnnData | dict[str, AnnData]:
        """What :func:`stofm.tl.probe` takes."""
        return dict(self.slices) if len(self.slices) > 1 else next(iter(self.slices.values()))

    @property
    def left_out(self) -> tuple[str, ...] | None:
        """What :func:`stofm.tl.probe` leaves out."""
        return (list(self.slices)[-1],) if len(self.slices) > 1 else self.task.left_out

    def probe(self, use_rep: Representations, *, seeds: int) -> pd.DataFrame:
        """Scores of representations, and of principal components beside them."""
        scores = st.tl.probe(
            self.data,
            label_key=self.task.label,
            use_rep=list(use_rep.values()),
            left_out=self.left_out,
            library_key=self.task.library_key,
            missing=self.task.no_class,
            seeds=seeds,
            show_progress_bar=False,
        ).scores
        return scores.replace({"representation": _names(use_rep)})

    def head_scores(
        self, use_rep: Representations, *, seeds: Sequence[int]
    ) -> dict[str, list[float]]:
        """Macro-F1 by seed, the mean over what is left out, and nothing beside it."""
        sections = resolve_slices(self.data, self.task.library_key)
        labels = read_label_names(sections, self.task.label, missing=self.task.no_class)
        folds = plan_folds(sections, labels, left_out=self.left_out, spatial_key="spatial")
        return {
            name: [
                float(np.mean([score_head(values, one, seed=seed)["macro_f1"] for one in folds]))
                for seed in seeds
            ]
            for name, values in zip(
                use_rep,
                read_representations(sections, list(use_rep.values())).values(),
                strict=True,
            )
        }


def _names(use_rep: Representations) -> dict[str, str]:
    """What tables call representations, by what :func:`stofm.tl.probe` calls them."""
    return {one if isinstance(one, str) else AND.join(one): name for name, one in use_rep.items()}


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
    return [_load(task, {name: slices[name] for name in (*task.fit, task.test)}) for task in tasks]


def _load(task: Task, slices: dict[str, AnnData]) -> LoadedTask:
    if task.fitted_share is None:
        return LoadedTask(task, slices)
    adata = slices[task.test]
    x = np.asarray(adata.obsm["spatial"])[:, 0]
    border = np.quantile(x[adata.obs[task.label].notna()], task.fitted_share)
    parts = {_LEFT: x <= border, _RIGHT: x > border}
    return LoadedTask(task, {name: adata[own].copy() for name, own in parts.items()})


def rows_by_slice(adata: AnnData) -> list[NDArray[np.int64]]:
    """Rows of each slice of a file."""
    if LIBRARY_KEY not in adata.obs:
        return [np.arange(adata.n_obs)]
    names = adata.obs[LIBRARY_KEY].to_numpy(dtype=str)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def embed_with(
    model: Stofm,
    tasks: Sequence[LoadedTask],
    *,
    prefix: str = "",
    virtual_cells: bool = True,
    device: str = "auto",
) -> dict[str, str | tuple[str, ...]]:
    """Embed all slices of tasks, and keep what the model gives.

    Parameters
    ----------
    model
        Trained or not.
    tasks
        Their AnnData get ``obsm["X_cell"]``, from genes alone, and ``obsm["X_spatial"]``, in the
        context of the tissue.
    prefix
        Of their names after the ``X_``, and of those in tables.
    virtual_cells
        Put virtual cells into the sub-slices; without them the model sees cells only.
    device
        Where to compute.

    Returns
    -------
    Either scale, and both side by side, for :meth:`LoadedTask.probe`.
    """
    keys = (f"X_{prefix}{CELL}", f"X_{prefix}{SPATIAL}")
    embed = _embed if virtual_cells else _embed_without_virtual_cells
    columns = {
        id(one): loaded.task.library_key for loaded in tasks for one in loaded.slices.values()
    }
    slices = {id(one): one for loaded in tasks for one in loaded.slices.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedModelWarning)
        for number, adata in slices.items():
            found = embed(adata, model, columns[number], device)
            adata.obsm.update(zip(keys, found, strict=True))
    names = (f"{prefix}{name}" for name in (CELL, SPATIAL, BOTH))
    return dict(zip(names, (*keys, keys), strict=True))


def _batch_size(model: Stofm, device: str) -> int | None:
    """Sub-slices at a time on a CPU; None to fit the device."""
    on_cpu = choose_device(device).type == "cpu"
    return max(1, _CELLS_AT_ONCE // model.config.subslice.n_cells) if on_cpu else None


def _embed(adata: AnnData, model: Stofm, library_key: str, device: str) -> Embedding:
    st.tl.embed(
        adata,
        model,
        library_key=library_key,
        device=device,
        batch_size=_batch_size(model, device) or "auto",
        show_progress_bar=False,
    )
    return adata.obsm["X_stofm_cell"], adata.obsm["X_stofm"]


def _embed_without_virtual_cells(
    adata: AnnData, model: Stofm, library_key: str, device: str
) -> Embedding:
    st.pp.tokenize(adata, model, show_progress_bar=False)
    st.tl.encode_cells(adata, model, device=device, show_progress_bar=False)
    place = choose_device(device)
    rules, transformer = model.config.subslice, model.se2_transformer
    cells = np.asarray(adata.obsm["X_stofm_cell"])
    spatial = np.empty((adata.n_obs, transformer.config.d_embedding), dtype=np.float32)
    for rows in resolve_slices(adata, library_key).rows:
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
    return cells, spatial
