"""Fitting a head, whatever its task: networks on what is read of cells, tuned with the model if asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stofm._edge.records import all_or_nothing
from stofm._logging import logger
from stofm.heads.components import add_expression
from stofm.heads.embeddings import MADE_BY_EMBED, describe_origin, origin_by, same_origin
from stofm.heads.inputs import choose_neighborhood, read_inputs, renew_neighborhood
from stofm.heads.network import FittedHead, fit_head, row_order
from stofm.heads.tuning import fine_tune_head
from stofm.nn.model import load_model
from stofm.spatial import Split, split_cells

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stofm.heads.base import Head
    from stofm.heads.components import ExpressionComponents
    from stofm.heads.embeddings import Origin
    from stofm.heads.inputs import Inputs
    from stofm.heads.network import HeadTraining
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections
    from stofm.heads.targets import Targets
    from stofm.nn import Stofm
    from stofm.spatial import Split
    from stofm.spatial.splits import SplitRule
_HELD_OUT: float = 0.1


@dataclass(frozen=True, eq=False)
class FirstFit:
    """The first network on the embeddings of cells.

    Attributes
    ----------
    fitted
        The network; of a tuned one the history is that of tuning, the best epoch that before it.
    inputs
        What is read of all cells; embeddings are by the tuned model if there is one.
    model
        The tuned model; None for ``strategy="frozen"``.
    """

    fitted: FittedHead
    inputs: Inputs
    model: Stofm | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(ABC):
    """What a head learns of cells, and what networks that learnt it become.

    Attributes
    ----------
    targets
        A row for each cell.
    options
        How to fit.
    """

    name: ClassVar[str]
    #: How networks are fitted; None for the usual.
    training: ClassVar[HeadTraining | None] = None
    #: Between the seeds of networks.
    seed_step: ClassVar[int] = 1000

    targets: Targets
    options: FitOptions

    @property
    def classes(self) -> NDArray[np.int64] | None:
        """(n_obs,) classes, which parts of the cells are to be alike in; None if there are none."""
        return self.targets.values if self.targets.kind == "classes" else None

    @property
    def seeds(self) -> list[int]:
        """Seeds of the networks of a kind, and of the splits that they are fitted on."""
        n_heads = self.options.heads_of(int(self.targets.is_known.sum()))
        return [self.options.seed + self.seed_step * k for k in range(n_heads)]

    def add_expression(
        self, sections: Sections, inputs: Inputs, rows: NDArray[np.int64]
    ) -> tuple[Inputs, ExpressionComponents | None]:
        """Find components of the expression of some cells, and add those of all."""
        return add_expression(sections, inputs, rows, self.options, classes=self.classes)

    @abstractmethod
    def make_head(self, first: FirstFit, splits: Sequence[Split], common: dict[str, Any]) -> Head:
        """Fit the other networks, and weigh them.

        Parameters
        ----------
        first
            The first network, and what is read.
        splits
            Cells to fit and to hold out: a split for each network, or a single one for all.
        common
            Fields of the head that no network changes.
        """


def fit(task: Task, sections: Sections) -> Any:
    """Fit a head: networks on what is read of cells, each on its split, and what they weigh."""
    options, is_known = task.options, task.targets.is_known
    known = np.flatnonzero(is_known)
    with all_or_nothing(*sections.tables):
        inputs = read_inputs(
            sections, options.reading, use_rep=options.use_rep, model=options.model
        )
        rows = row_order(inputs.features, task.targets.values, known)
        inputs, expression = task.add_expression(sections, inputs, rows)
        inputs = choose_neighborhood(sections, inputs, options, rows=known)
    # A model is tuned on a split, which all networks share then.
    seeds = task.seeds if options.strategy == "frozen" else task.seeds[:1]
    splits = [
        plan_split(
            sections,
            is_known,
            inputs.features,
            split=options.split,
            classes=task.classes,
            spatial_key=options.reading.spatial_key,
            seed=seed,
        )
        for seed in seeds
    ]
    first = fit_first(task, sections, inputs, splits[0])
    slices = zip(sections.slices.names, sections.slices.rows, strict=True)
    common = {
        "use_rep": first.inputs.use_rep,
        "origin": first.inputs.origin,
        "strategy": options.strategy,
        "split": splits[0].record([name for name, own in slices if is_known[own].any()]),
        "model": first.model,
    }
    return task.make_head(first, splits, common).with_components(expression)


def fit_first(task: Task, sections: Sections, inputs: Inputs, split: Split) -> FirstFit:
    """Fit a network to embeddings, and go on to tune the model if asked."""
    options, targets = task.options, task.targets
    is_frozen = options.strategy == "frozen"
    # Before the network is fitted: it may be refused.
    tunable = None if is_frozen else model_to_tune(options.model, inputs.origin)
    fitted = fit_head(
        inputs.features,
        targets,
        fitted=split.fitted,
        held_out=split.held_out,
        input_widths=inputs.widths,
        training=task.training,
        seed=options.seed,
    )
    if tunable is None or options.strategy == "frozen":
        return FirstFit(fitted, inputs)
    tuned = fine_tune_head(
        sections.tables,
        tunable,
        fitted.head,
        targets,
        strategy=options.strategy,
        fitted=split.fitted,
        held_out=split.held_out,
        use_rep=inputs.use_rep,
        task=task.name,
        seed=options.seed,
        **options.reading.as_dict(),
    )
    again = read_inputs(sections, options.reading, use_rep=inputs.use_rep, model=tuned.model)
    again = renew_neighborhood(
        sections,
        replace(again, expression=inputs.expression),
        inputs,
        spatial_key=options.reading.spatial_key,
    )
    network = FittedHead(tuned.head, tuned.history, fitted.best_epoch)
    return FirstFit(network, again, tuned.model)


def model_to_tune(model: Stofm | str | Path | None, origin: Origin) -> Stofm:
    """The model that representations are by; refuse those that are not all by one, or by another."""
    if strange := [rep for rep in origin if rep not in MADE_BY_EMBED]:
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


def plan_split(
    sections: Sections,
    is_known: NDArray[np.bool_],
    features: NDArray[np.float32],
    *,
    split: SplitRule = "auto",
    classes: NDArray[np.int64] | None = None,
    spatial_key: str,
    seed: int,
) -> Split:
    """Split the cells of which something is known.

    Without coordinates ``"auto"`` is by slice, or random if there is only one, and `features` tell
    cells apart. Parts are alike in `classes`, (n_obs,), of which -1 is none.
    """
    own = [rows[is_known[rows]] for rows in sections.slices.rows]
    slices = [rows for rows in own if len(rows)]
    if split == "slices" and len(slices) < 2:
        msg = (
            f"split='slices' holds out whole slices, and {len(slices)} of the {len(own)} slices has "
            "cells to learn from; use split='blocks'."
        )
        raise ValueError(msg)
    has_places = sections.has_coordinates(spatial_key)
    if has_places or split == "blocks":
        places = sections.coordinates(spatial_key)
    else:
        places = features[:, [0, -1]].astype(np.float64)
    if split == "auto" and not has_places:
        split = "slices" if len(slices) > 1 else "random"
        logger.info("There is no obsm[%r]: the split is %r.", spatial_key, split)
    return split_cells(places, slices, how=split, share=_HELD_OUT, classes=classes, seed=seed)
