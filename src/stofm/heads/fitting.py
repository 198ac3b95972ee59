"""Fitting a head, whatever its task: read blocks, tune the model if asked, fit and weigh members."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.tables import all_or_nothing
from stofm._logging import logger
from stofm.heads.blocks import choose_neighborhood, read_embeddings, with_neighborhood
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.expression import add_expression
from stofm.heads.members import fit_members
from stofm.heads.network import fit_head, row_order
from stofm.nn.model import load_model
from stofm.spatial import split_cells

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.embeddings import Origin
    from stofm.heads.members import Members
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import Targets
    from stofm.nn import Stofm
    from stofm.spatial import Split

_HELD_OUT: Final = 0.1
#: Rounds with other cells held out, and between their seeds.
_N_ROUNDS: Final = 3
_SEED_STEP: Final = 1000
_MOST_DRAWS: Final = 8


class Fitted(NamedTuple):
    """What is known of cells, the members that were fitted to it, and fields that all heads have."""

    blocks: Blocks
    splits: list[Split]
    members: Members
    fields: dict[str, Any]


def fit(slices: SliceTables, targets: Targets, request: Request, task: str) -> Fitted:
    """Fit members to targets of all cells, in rounds with other cells held out.

    What is read are embeddings, expression and neighbours, as far as there are any. `task` is part
    of the name of a tuned model.
    """
    options, known = request.options, np.flatnonzero(targets.is_known)
    classes = targets.values if targets.kind == "classes" else None
    with all_or_nothing(*slices.tables):
        blocks = read_embeddings(slices, request)
        rows = row_order(blocks.features, targets.values, known)
        blocks, expression = add_expression(slices, blocks, rows, request, classes)
        blocks = choose_neighborhood(slices, blocks, request, known)
    # A model is tuned on a split, which is the only one then.
    n_rounds = _N_ROUNDS if options.strategy == "frozen" else 1
    seeds = [request.seed + _SEED_STEP * k for k in range(n_rounds)]
    splits: list[Split] = []
    for seed in seeds:
        # Other whole slices are held out as long as there are others.
        for draw in range(_MOST_DRAWS):
            split = plan_split(slices, targets, request, blocks, seed + draw)
            if not split.slices or all(split.slices != one.slices for one in splits):
                break
        splits.append(split)
    model, losses = None, []
    if options.strategy != "frozen":
        from stofm.heads.tuning import fine_tune

        parts: dict[str, Any] = {"fitted": splits[0].fitted, "held_out": splits[0].held_out}
        given = model_to_tune(request, blocks.origin)
        widths, seed = blocks.widths, request.seed
        network = fit_head(blocks.features, targets, **parts, input_widths=widths, seed=seed).head
        model, history = fine_tune(
            slices, given, network, targets, request=request, task=task, **parts
        )
        losses.append(history.assign(reads="slices"))
        blocks = _read_again(slices, blocks, replace(request, model=model))
    show = request.show_progress_bar
    members = fit_members(blocks, targets, splits, seeds, show_progress_bar=show)
    named = zip(slices.names, slices.rows, strict=True)
    fields = {
        "use_rep": blocks.use_rep,
        "origin": blocks.origin,
        "strategy": options.strategy,
        "split": splits[0].record([name for name, own in named if targets.is_known[own].any()]),
        "model": model,
        "expression": expression,
        "networks": members.networks,
        "reads": members.reads,
        "weights": members.weights,
        "n_neighbors": blocks.n_neighbors * any("neighborhood" in one for one in members.reads),
        "history": pd.concat([*losses, members.history], ignore_index=True),
    }
    return Fitted(blocks, splits, members, fields)


def _read_again(slices: SliceTables, before: Blocks, request: Request) -> Blocks:
    """The same blocks with embeddings by another model."""
    found = replace(read_embeddings(slices, request), expression=before.expression)
    if before.neighborhood is None:
        return found
    means = before.neighborhood
    had = [k for k, place in enumerate(slices.places) if np.isfinite(means[place]).all()]
    return with_neighborhood(slices, found, before.n_neighbors, request, needed=had)


def model_to_tune(request: Request, origin: Origin) -> Stofm:
    """The model that embeddings are by; refuse those by another."""
    loaded = load_model(request.model)
    made = origin_by(loaded)
    for rep, found in origin.items():
        if not same_origin(found, made[rep]):
            raise ValueError(
                f"obsm[{rep!r}] is by {describe_origin(found)}; pass that model as `model` to tune it."
            )
    return loaded


def plan_split(
    slices: SliceTables, targets: Targets, request: Request, blocks: Blocks, seed: int
) -> Split:
    """Split the cells of which something is known.

    Without coordinates ``"auto"`` is by slice, or random if there is only one.
    """
    how, is_known = request.options.split, targets.is_known
    own = [rows[is_known[rows]] for rows in slices.rows]
    usable = [rows for rows in own if len(rows)]
    if how == "slices" and len(usable) < 2:
        raise ValueError(
            f"split='slices' holds out whole slices, and {len(usable)} of the {len(own)} slices has "
            "cells to learn from; use split='blocks'."
        )
    has_places = slices.has_coordinates(request.spatial_key)
    if has_places or how == "blocks":
        places = slices.coordinates(request.spatial_key)
    else:
        # They tell cells apart, whatever their order.
        places = blocks.features[:, [0, -1]].astype(np.float64)
    if how == "auto" and not has_places:
        how = "slices" if len(usable) > 1 else "random"
        logger.info("There is no obsm[%r]: the split is %r.", request.spatial_key, how)
    classes = targets.values if targets.kind == "classes" else None
    return split_cells(places, usable, how=how, share=_HELD_OUT, classes=classes, seed=seed)


def score_outputs(
    names: Iterable[Any], true: NDArray[np.floating], found: NDArray[np.floating], called: str
) -> pd.DataFrame:
    """Pearson correlation, RMSE and MAE of each output over some cells, (n, n_outputs) each.

    Fewer than two cells have no scores, NaN; a constant output has no Pearson correlation.
    """
    scores = {"pearson": metrics.pearson, "rmse": metrics.rmse, "mae": metrics.mae}
    index = pd.Index(names, name=called)
    if len(true) < 2:
        return pd.DataFrame(np.nan, index=index, columns=list(scores))
    values = {name: np.asarray(score(true, found)) for name, score in scores.items()}
    return pd.DataFrame(values, index=index)
