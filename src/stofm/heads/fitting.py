"""Fitting a head, whatever its task: read blocks, tune the model if asked, fit and weigh members."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm._edge.records import all_or_nothing
from stofm._logging import logger
from stofm.heads.blocks import choose_neighborhood, read_embeddings, with_neighborhood
from stofm.heads.embeddings import MADE_BY_EMBED, describe_origin, origin_by, same_origin
from stofm.heads.expression import add_expression
from stofm.heads.members import fit_members
from stofm.heads.network import fit_head, row_order
from stofm.heads.tuning import fine_tune
from stofm.nn.model import load_model
from stofm.spatial import split_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.embeddings import Origin
    from stofm.heads.head import Head
    from stofm.heads.members import Members
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.heads.targets import Targets
    from stofm.heads.tuning import TuningStrategy
    from stofm.nn import Stofm
    from stofm.spatial import Split

_HELD_OUT: Final = 0.1
#: Rounds with other cells held out, and between their seeds.
_N_ROUNDS: Final = 3
_SEED_STEP: Final = 1000
_MOST_DRAWS: Final = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(ABC):
    """What a head learns of cells.

    Attributes
    ----------
    targets
        A row for each cell.
    request
        How to read and to fit.
    """

    name: ClassVar[str]

    targets: Targets
    request: Request

    @property
    def classes(self) -> NDArray[np.int64] | None:
        """(n_obs,) classes that held-out parts should have all of; None if there are none."""
        return self.targets.values if self.targets.kind == "classes" else None

    @abstractmethod
    def make_head(
        self, blocks: Blocks, splits: Sequence[Split], members: Members, common: dict[str, Any]
    ) -> Head:
        """Make the head of fitted members; `common` are fields that all heads have."""


def fit(task: Task, slices: SliceTables) -> Any:
    """Fit a head: members on what is read of cells, in rounds with other cells held out."""
    request, is_known = task.request, task.targets.is_known
    options, known = request.options, np.flatnonzero(is_known)
    with all_or_nothing(*slices.tables):
        blocks = read_embeddings(slices, request)
        rows = row_order(blocks.features, task.targets.values, known)
        blocks, expression = add_expression(slices, blocks, rows, request, task.classes)
        blocks = choose_neighborhood(slices, blocks, request, known)
    # A model is tuned on a split, which is the only one then.
    seeds = [
        request.seed + _SEED_STEP * k
        for k in range(_N_ROUNDS if options.strategy == "frozen" else 1)
    ]
    splits = _plan_splits(slices, task, blocks, seeds)
    model = None
    if options.strategy != "frozen":
        model, losses = _tune(task, slices, blocks, splits[0], options.strategy)
        blocks = _read_again(slices, blocks, replace(request, model=model))
    members = fit_members(blocks, task.targets, splits, seeds)
    history = members.history
    if model is not None:
        history = pd.concat([losses.assign(reads="slices"), history], ignore_index=True)
    named = zip(slices.names, slices.rows, strict=True)
    common = {
        "use_rep": blocks.use_rep,
        "origin": blocks.origin,
        "strategy": options.strategy,
        "split": splits[0].record([name for name, own in named if is_known[own].any()]),
        "model": model,
        "expression": expression,
        "networks": members.networks,
        "reads": members.reads,
        "weights": members.weights,
        "n_neighbors": blocks.neighbors_of(members.reads),
        "history": history,
    }
    return task.make_head(blocks, splits, members, common)


def _tune(
    task: Task, slices: SliceTables, blocks: Blocks, split: Split, strategy: TuningStrategy
) -> tuple[Stofm, pd.DataFrame]:
    """Tune a copy of the model with a network on its embeddings; also the losses."""
    request = task.request
    model = model_to_tune(request, blocks.origin)
    network = fit_head(
        blocks.features,
        task.targets,
        fitted=split.fitted,
        held_out=split.held_out,
        input_widths=blocks.widths,
        seed=request.seed,
    )
    return fine_tune(
        slices,
        model,
        network.head,
        task.targets,
        strategy=strategy,
        fitted=split.fitted,
        held_out=split.held_out,
        request=request,
        task=task.name,
    )


def _read_again(slices: SliceTables, before: Blocks, request: Request) -> Blocks:
    """The same blocks with embeddings by another model."""
    found = replace(read_embeddings(slices, request), expression=before.expression)
    if before.neighborhood is None:
        return found
    means = before.neighborhood
    had = [k for k, place in enumerate(slices.places) if np.isfinite(means[place]).all()]
    return with_neighborhood(slices, found, before.n_neighbors, request, needed=had)


def model_to_tune(request: Request, origin: Origin) -> Stofm:
    """The model that embeddings are by; refuse those that are not all by one, or by another."""
    if strange := [rep for rep in origin if rep not in MADE_BY_EMBED]:
        raise ValueError(
            f"obsm{strange} are not embeddings of a model that could be tuned; use "
            f"strategy='frozen', or use_rep from {list(MADE_BY_EMBED)}."
        )
    loaded = load_model(request.model)
    made = origin_by(loaded)
    for rep, found in origin.items():
        if not same_origin(found, made[rep]):
            raise ValueError(
                f"obsm[{rep!r}] is by {describe_origin(found)}; pass that model as `model` to tune "
                "it."
            )
    return loaded


def _plan_splits(
    slices: SliceTables, task: Task, blocks: Blocks, seeds: Sequence[int]
) -> list[Split]:
    """A split for each seed, with other whole slices held out as long as there are others."""
    splits: list[Split] = []
    for seed in seeds:
        for draw in range(_MOST_DRAWS):
            split = plan_split(slices, task, blocks, seed + draw)
            if not split.slices or all(split.slices != one.slices for one in splits):
                break
        splits.append(split)
    return splits


def plan_split(slices: SliceTables, task: Task, blocks: Blocks, seed: int) -> Split:
    """Split the cells of which something is known.

    Without coordinates ``"auto"`` is by slice, or random if there is only one.
    """
    how, spatial_key = task.request.options.split, task.request.spatial_key
    is_known = task.targets.is_known
    own = [rows[is_known[rows]] for rows in slices.rows]
    usable = [rows for rows in own if len(rows)]
    if how == "slices" and len(usable) < 2:
        raise ValueError(
            f"split='slices' holds out whole slices, and {len(usable)} of the {len(own)} slices has "
            "cells to learn from; use split='blocks'."
        )
    has_places = slices.has_coordinates(spatial_key)
    if has_places or how == "blocks":
        places = slices.coordinates(spatial_key)
    else:
        # They tell cells apart, whatever their order.
        places = blocks.features[:, [0, -1]].astype(np.float64)
    if how == "auto" and not has_places:
        how = "slices" if len(usable) > 1 else "random"
        logger.info("There is no obsm[%r]: the split is %r.", spatial_key, how)
    return split_cells(places, usable, how=how, share=_HELD_OUT, classes=task.classes, seed=seed)
