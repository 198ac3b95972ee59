"""Fine-tuning a model together with a head, for the tasks of ``stofm.tl``."""

from __future__ import annotations

import copy
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stofm._config import check_seed
from stofm._edge.coordinates import read_coordinates
from stofm._edge.slices import read_slices
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.embeddings import recorded_options
from stofm.heads.tuning_lora import LowRankModel
from stofm.heads.tuning_samples import FineTuningConfig, KnownCells, TuningStrategy
from stofm.heads.tuning_stage import FineTuningObjective, FineTuningStage, tune
from stofm.spatial import canonical_order
from stofm.train.epochs import Draws
from stofm.train.preparation import find_sources, open_corpus, prepare_slices
from stofm.train.processes import Processes
from stofm.train.recipe import FileConfig
from stofm.train.stages import StageSetup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.targets import Targets
    from stofm.nn import Stofm
    from stofm.nn.prediction_head import PredictionHead
    from stofm.train.corpus import Corpus
    from stofm.train.preparation import SliceSource


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What fine-tuning gives.

    Attributes
    ----------
    model
        The tuned model, on the CPU, named after the other and the task, with its own fingerprint.
    head
        The head that was tuned along, on the CPU; it reads what :func:`stofm.tl.embed` gives with
        `model`.
    history
        Losses over the steps: columns ``split`` (``"train"``, the mean since the row before, or
        ``"validation"``, the first at step 0), ``epoch``, ``step``, ``loss``, ``learning_rate``, ``gradient_norm``,
        ``cells`` and ``tokens`` seen, ``seconds``.
    best_step
        Optimiser step whose weights are kept: that with the lowest loss on the held-out cells.
    """

    model: Stofm
    head: PredictionHead
    history: pd.DataFrame
    best_step: int


def fine_tune_head(
    slices: Sequence[AnnData],
    model: Stofm,
    head: PredictionHead,
    targets: Targets,
    *,
    strategy: TuningStrategy,
    fitted: NDArray[np.integer],
    held_out: NDArray[np.integer],
    use_rep: str | Sequence[str] = (Obsm.X_CELL, Obsm.X),
    task: str = "annotation",
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    training: FineTuningConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    show_progress_bar: bool = True,
) -> FineTuned:
    """Tune copies of a model and of a head on it, so that the head predicts targets better.

    Slices are cut into sub-slices. In each step some of a sub-slice's cells go through the cell
    encoder, with gradients; the others keep embeddings that are computed anew before each
    validation. The loss is that of the head, on the cells with a known target in the fitted part.
    Of the cells in neither part only counts and places are read, as the surroundings of others.

    Parameters
    ----------
    slices
        Raw counts and places. They stay as they are.
    model
        Stays as it is.
    head
        To begin with, usually fitted on the embeddings of `model`; stays as it is.
    targets
        A row for each cell, slice after slice.
    strategy
        ``"full"``: all weights are trained but the table of gene embeddings, so that genes that
        these slices don't measure still lie where they did among those that they do.
        ``"lora"``: changes of low rank, which are added to the weights at the end; needs peft.
    fitted, held_out
        Rows of `targets` to train on, and to choose the best step by; without the latter the last
        step is taken.
    use_rep
        What the head reads, in the order of its input: ``"X_stofm_cell"``, ``"X_stofm"`` or both.
    task
        Becomes part of the new model's name.
    layer, spatial_key, library_key
        Layer with raw counts (``X`` by default), entry of ``obsm`` with the coordinates, column
        of ``obs`` that names the slices; by default those that a table was embedded with.
    training
        Length, rates and sizes.
    seed
        Decides cuts, order, sampled cells, dropout and first changes.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    show_progress_bar
        Show bars.

    Returns
    -------
    Tuned model and head, and the history.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2; LoRA (Hu et al. 2021, arXiv 2106.09685).
    """
    started = time.perf_counter()
    check_seed(seed)
    training = training or FineTuningConfig()
    names = (use_rep,) if isinstance(use_rep, str) else tuple(use_rep)
    _check_head(head, model, targets, names)
    parts = _check_parts(targets, fitted, held_out, n_cells=sum(one.n_obs for one in slices))
    options = FileConfig(layer=layer, spatial_key=spatial_key, library_key=library_key)
    sources = [_as_embedded(source) for source in find_sources(list(slices), options)]
    # All but the vocabulary, which nothing changes.
    tuned = copy.deepcopy(model, {id(model.vocabulary): model.vocabulary})
    head = copy.deepcopy(head)
    changes = _prepare_weights(tuned, strategy, training, seed)
    objective = FineTuningObjective(tuned, head, use_rep=names, targets=targets, low_rank=changes)
    with Processes.start(device) as processes, _temporary_folder(processes) as folder:
        show = show_progress_bar and processes.is_first
        corpus, rows = _read(sources, model, folder, parts[0] | parts[1], processes, show=show)
        known = [KnownCells(targets, rows, counts) for counts in parts]
        stage = FineTuningStage(
            objective,
            StageSetup(
                model=tuned,
                corpus=corpus,
                draws=Draws(seed=seed, stage=0, batch_size=training.batch_size),
                folder=folder / "cells",
                own_folder=folder / "cells",
                processes=processes,
                device=processes.device,
            ),
            training,
            fitted=known[0],
            held_out=known[1] if parts[1].any() else None,
            low_rank=changes,
        )
        found = tune(stage, training, processes=processes, seed=seed, show_progress_bar=show)
    result = tuned if changes is None else changes.merged()
    for weight, given in zip(result.parameters(), model.parameters(), strict=True):
        weight.requires_grad_(given.requires_grad)
    result = result.to("cpu").eval()
    result.config = replace(
        model.config,
        name=f"{model.name}-{task}",
        provenance=_provenance(model, strategy, task, int(parts[0].sum())),
        trained=True,
    )
    history = pd.DataFrame(found.rows).drop(columns=["stage", "head"])
    _log_summary(model, result, history, found.best_step, time.perf_counter() - started)
    return FineTuned(result, head.to("cpu").eval(), history, found.best_step)


def _as_embedded(source: SliceSource) -> SliceSource:
    """The source, read as it was embedded where nothing else is asked for."""
    options = source.options
    found = recorded_options(source.data, options)
    return replace(source, options=replace(options, **found))


def _check_head(
    head: PredictionHead, model: Stofm, targets: Targets, names: tuple[str, ...]
) -> None:
    """Refuse a head that does not read what the model gives, or predicts something else."""
    config = model.config
    widths = {Obsm.X_CELL: config.cell_encoder.d_cell, Obsm.X: config.se2_transformer.d_embedding}
    if not names or len(set(names)) < len(names) or not set(names) <= set(widths):
        msg = (
            f"use_rep={list(names)}: gradients reach {sorted(widths)} only, so that a model can be "
            "tuned for a head on one or both of these, each once. Choose those, or "
            "strategy='frozen'."
        )
        raise ValueError(msg)
    expected = (sum(widths[name] for name in names), targets.n_outputs)
    found = (head.config.d_input, head.config.d_output)
    if found != expected:
        msg = (
            f"The head reads {found[0]} and gives {found[1]} numbers; {list(names)} of "
            f"{model.name!r} and the targets have {expected[0]} and {expected[1]}. Fit a head on "
            "this model's embeddings and these targets first."
        )
        raise ValueError(msg)


def _check_parts(
    targets: Targets,
    fitted: NDArray[np.integer],
    held_out: NDArray[np.integer],
    *,
    n_cells: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are trained on and which are validated on: with a known target only."""
    is_known = np.asarray(targets.is_known)
    if len(is_known) != n_cells:
        msg = f"There are {n_cells} cells in the slices and {len(is_known)} rows of targets."
        raise ValueError(msg)
    parts = []
    for name, rows in (("fitted", fitted), ("held_out", held_out)):
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < n_cells):
            msg = f"{name} must hold rows from 0 to {n_cells - 1}, found {rows.min()} to {rows.max()}."
            raise ValueError(msg)
        is_part = np.zeros(n_cells, dtype=bool)
        is_part[rows] = True
        parts.append(is_part & is_known)
    if n_both := int((parts[0] & parts[1]).sum()):
        msg = f"{n_both} cells are in fitted and in held_out: the loss would say nothing."
        raise ValueError(msg)
    if not parts[0].any():
        msg = f"None of the {len(fitted)} fitted cells has a target; there is nothing to learn."
        raise ValueError(msg)
    return parts[0], parts[1]


def _prepare_weights(
    model: Stofm, strategy: TuningStrategy, training: FineTuningConfig, seed: int
) -> LowRankModel | None:
    """Decide which weights are trained; put changes of low rank in if it is these."""
    model.requires_grad_(requires_grad=True)
    if strategy == "lora":
        rank, alpha = training.lora_rank, training.lora_alpha
        return LowRankModel(model, rank=rank, alpha=alpha, seed=seed)
    model.cell_encoder.gene_embeddings.weight.requires_grad = False
    return None


@contextmanager
def _temporary_folder(processes: Processes) -> Iterator[Path]:
    """Give a folder that all processes know and that is gone afterwards."""
    if not processes.is_first:
        yield Path(processes.agree(""))
        processes.wait()
        return
    # A memory-mapped file can't be deleted on Windows while anything refers to it.
    with tempfile.TemporaryDirectory(prefix="stofm-", ignore_cleanup_errors=True) as folder:
        yield Path(processes.agree(folder))
        processes.wait()


def _read(
    sources: Sequence[SliceSource],
    model: Stofm,
    folder: Path,
    is_used: NDArray[np.bool_],
    processes: Processes,
    *,
    show: bool,
) -> tuple[Corpus, list[NDArray[np.int64]]]:
    """Prepare the slices that have a used cell; also the rows of targets of their cells."""
    used: list[SliceSource] = []
    rows: list[NDArray[np.int64]] = []
    first = 0
    for source in sources:
        with source.naming(), source.open() as adata:
            in_order = _canonical_rows(source, adata)
            own = [first + one for one in in_order]
            if is_used[first : first + adata.n_obs].any():
                table = adata.to_memory() if adata.isbacked else adata
                used.append(replace(source, data=table[np.concatenate(in_order)]))
                rows += own
            first += adata.n_obs
    folder = folder / "slices"
    keys = None
    if processes.is_first:
        keys = prepare_slices(used, model, folder, show_progress_bar=show)
    keys = processes.agree(keys)
    assert keys is not None
    assert len(keys) == len(rows)
    chosen = [k for k, own in enumerate(rows) if is_used[own].any()]
    return open_corpus(folder, [keys[k] for k in chosen]), [rows[k] for k in chosen]


def _canonical_rows(source: SliceSource, adata: AnnData) -> list[NDArray[np.int64]]:
    """Rows of each slice in an order that is of their places: the user's must not matter."""
    options = source.options
    coordinates = read_coordinates(adata, options.spatial_key)
    slices = read_slices(adata, options.library_key, options.spatial_key)
    return [
        rows[canonical_order(coordinates[rows], np.empty((len(rows), 0)))] for rows in slices.rows
    ]


def _provenance(model: Stofm, strategy: str, task: str, n_cells: int) -> str:
    return (
        f"Tuned ({strategy}, {task}, {n_cells} cells) from {model.name!r}, fingerprint "
        f"{model.fingerprint}. Of that: {model.config.provenance}"
    )


def _log_summary(
    model: Stofm, result: Stofm, history: pd.DataFrame, best_step: int, seconds: float
) -> None:
    losses = history.loc[history["split"] == "validation", "loss"].to_numpy()
    by = ""
    if len(losses):
        by = f"loss on held-out cells {losses[0]:.4g} -> {losses[1:].min():.4g}, "
        if losses[1:].min() > losses[0]:
            warn(
                f"Tuning {model.name!r} made the loss on the held-out cells no lower "
                f"({losses[0]:.4g} at the beginning, at best {losses[1:].min():.4g} afterwards): "
                "strategy='frozen' may serve as well."
            )
    logger.info(
        "%r was tuned from %r: %sbest step %d of %d, %.1f s.",
        result.name,
        model.name,
        by,
        best_step,
        int(history["step"].max()),
        seconds,
    )
