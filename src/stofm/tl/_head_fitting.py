"""A head for a task: fitted to stored embeddings, and tuned together with the model if asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stofm._edge.embedding import load_model
from stofm.tl._embeddings import MADE_BY_EMBED, describe_origin, origin_by, same_origin
from stofm.tl._fine_tune import fine_tune_head
from stofm.tl._head_inputs import read_inputs
from stofm.tl._heads import check_strategy
from stofm.tl._neighborhood import renew_neighborhood
from stofm.train import fit_head

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

    from stofm.nn import PredictionHead, Stofm
    from stofm.spatial import Split
    from stofm.tl._embeddings import Origin
    from stofm.tl._head_inputs import Inputs
    from stofm.tl._heads import Strategy
    from stofm.tl._sections import Sections
    from stofm.train import HeadTraining, Targets


@dataclass(frozen=True, eq=False)
class TaskFit:
    """A fitted network with what it reads.

    Attributes
    ----------
    network
        The head.
    inputs
        Representations of all cells, by the tuned model if there is one.
    model
        The tuned model; None for ``strategy="frozen"``.
    history
        Losses: of the head, or of tuning.
    best_epoch
        Passes after which the head was best; of a tuned one, before tuning.
    """

    network: PredictionHead
    inputs: Inputs
    model: Stofm | None
    history: pd.DataFrame
    best_epoch: int


def fit_task(
    sections: Sections,
    inputs: Inputs,
    targets: Targets,
    split: Split,
    *,
    strategy: Strategy = "frozen",
    model: Stofm | str | Path | None = None,
    task: str,
    training: HeadTraining | None = None,
    seed: int,
    reading: Mapping[str, Any],
) -> TaskFit:
    """Fit a head to stored representations, and go on to tune the model if asked.

    Parameters
    ----------
    sections
        The cells.
    inputs
        Their representations, from :func:`~stofm.tl._head_inputs.read_inputs`.
    targets
        A row for each cell.
    split
        Rows to fit and to hold out.
    strategy
        ``"frozen"``, ``"lora"`` or ``"full"``.
    model
        Model to tune; None for the one that `inputs` are by, if that is stofm-mini.
    task
        Becomes part of the tuned model's name.
    training
        How the head is fitted.
    seed
        Seed of the fit.
    reading
        Options of ``read_inputs``: library_key, layer, spatial_key, device, show_progress_bar.

    Raises
    ------
    ValueError
        There is no such strategy, or nothing that could be tuned for these representations.
    """
    check_strategy(strategy)
    # Before the head is fitted: it may be refused.
    tunable = None if strategy == "frozen" else model_to_tune(model, inputs.origin)
    fitted = fit_head(
        inputs.features,
        targets,
        fitted=split.fitted,
        held_out=split.held_out,
        input_widths=inputs.widths,
        training=training,
        seed=seed,
    )
    if strategy == "frozen":
        return TaskFit(fitted.head, inputs, None, fitted.history, fitted.best_epoch)
    assert tunable is not None
    tuned = fine_tune_head(
        sections.tables,
        tunable,
        fitted.head,
        targets,
        strategy=strategy,
        fitted=split.fitted,
        held_out=split.held_out,
        use_rep=inputs.use_rep,
        task=task,
        seed=seed,
        **reading,
    )
    again = read_inputs(sections, use_rep=inputs.use_rep, model=tuned.model, **reading)
    again = renew_neighborhood(
        sections,
        replace(again, expression=inputs.expression),
        inputs,
        spatial_key=reading["spatial_key"],
    )
    return TaskFit(tuned.head, again, tuned.model, tuned.history, fitted.best_epoch)


def model_to_tune(model: Stofm | str | Path | None, origin: Origin) -> Stofm:
    """The model that representations are by.

    Raises
    ------
    ValueError
        They are not all by a model, or by another one.
    """
    strange = [rep for rep in origin if rep not in MADE_BY_EMBED]
    if strange:
        msg = (
            f"obsm{strange} are not embeddings of a model that could be tuned; use "
            f"strategy='frozen', or use_rep from {list(MADE_BY_EMBED)}."
        )
        raise ValueError(msg)
    loaded = load_model(model)
    made = origin_by(loaded)
    for rep, found in origin.items():
        if not same_origin(found, made[rep]):
            msg = (
                f"obsm[{rep!r}] is by {describe_origin(found)}; pass that model as `model` to tune "
                "it."
            )
            raise ValueError(msg)
    return loaded
