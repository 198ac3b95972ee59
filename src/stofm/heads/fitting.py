"""Fitting a head, whatever its task: read blocks, tune the model if asked, fit and weigh members."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from stofm import metrics
from stofm._edge.tables import all_or_nothing
from stofm._logging import counter, logger
from stofm.heads.blocks import choose_neighborhood, read_embeddings, with_neighborhood
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.expression import add_expression
from stofm.heads.network import (
    HeadTraining,
    Rotation,
    apply_head,
    error_products,
    fit_head,
    fit_linear,
    row_order,
)
from stofm.nn.model import load_model
from stofm.spatial import split_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks, Source
    from stofm.heads.embeddings import Origin
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import Targets
    from stofm.nn import Stofm
    from stofm.nn.prediction_head import PredictionHead
    from stofm.spatial import Split

_HELD_OUT: Final = 0.1
#: Rounds with other cells held out, and between their seeds.
_N_ROUNDS: Final = 3
_SEED_STEP: Final = 1000
_MOST_DRAWS: Final = 8
#: Held-out cells that every kind is taken to have explained before any is looked at.
_PRIOR: Final = 1.0
_ROUNDS: Final = 200
_TINY: Final = 1e-6
#: Share of the mean squared error that is added to each kind's own: equal ones then weigh the same.
_RIDGE: Final = 1e-6
#: How much more than the errors it counts that weights sum to 1, before they are made to.
_SUM_TO_1: Final = 1e3
#: Networks for classes and proportions: members of a vote need fewer and larger steps than a head alone.
VOTING: Final = HeadTraining(learning_rate=2e-3, batch_size=512, max_epochs=30, patience=5)
#: Networks for expression, which is noisy.
IMPUTING: Final = HeadTraining(dropout=0.4)


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


class Members(NamedTuple):
    """Fitted members of a head."""

    #: As a :class:`~stofm.heads.head.Head` has them.
    networks: tuple[PredictionHead, ...]
    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    history: pd.DataFrame  # losses of the networks, numbered in the column ``network``
    held_out: tuple[NDArray[np.int64], ...]  # held-out cells of each split; splits may share cells
    #: (n_rows, n_outputs) what members that were not fitted to them say of these, split after
    #: split; None for values.
    votes: Any = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Held-out cells of all splits in turn."""
        return np.concatenate(self.held_out)


def fit_members(
    blocks: Blocks,
    targets: Targets,
    splits: Sequence[Split],
    seeds: Sequence[int],
    *,
    show_progress_bar: bool = False,
) -> Members:
    """Fit members to what is read of cells, and weigh them by the held-out cells.

    For classes and proportions these are networks that read the embeddings with their neighbourhood,
    and a linear member on each block; for values, networks on embeddings and on expression, each
    with its neighbourhood. There is a network for each split, with a seed of its own. Linear members
    are fitted to all cells once they are weighed.
    """

    def in_order(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return row_order(blocks.features, targets.values, rows)

    known = in_order(np.flatnonzero(targets.is_known))
    held_out = tuple(in_order(split.held_out) for split in splits)
    kinds, histories = [], []
    rotations: dict[Source, Rotation] = {}
    planned = _kinds(blocks, targets)
    total = sum(len(splits) + is_linear for _, is_linear in planned)
    with counter(total, "fit head", "member", show=show_progress_bar) as advance:
        for reads, is_linear in planned:
            if reads not in rotations:
                rotations[reads] = Rotation(blocks.of(reads), blocks.widths_of(reads), known)
            rotation = rotations[reads]
            if is_linear:
                trials = [fit_linear(rotation.values, targets, split.fitted) for split in splits]
                kept = [fit_linear(rotation.values, targets, known)]
            else:
                fits = [
                    fit_head(
                        rotation.values,
                        targets,
                        fitted=split.fitted,
                        held_out=split.held_out,
                        input_widths=rotation.widths,
                        training=IMPUTING if targets.kind == "values" else VOTING,
                        seed=seed,
                    )
                    for split, seed in zip(splits, seeds, strict=True)
                ]
                histories += [one.history.assign(reads=reads) for one in fits]
                trials = kept = [one.head for one in fits]
            kinds.append(_Kind(reads, rotation.values, trials, list(map(rotation.undone, kept))))
            advance(len(splits) + is_linear)
    weights, votes = _weigh(kinds, targets, held_out)
    shares = zip(weights.tolist(), kinds, strict=True)
    histories = [one.assign(network=k) for k, one in enumerate(histories)]
    return Members(
        networks=tuple(network for kind in kinds for network in kind.final),
        reads=tuple(kind.reads for kind in kinds for _ in kind.final),
        weights=tuple(w / len(kind.final) for w, kind in shares for _ in kind.final),
        history=pd.concat(histories, ignore_index=True),
        held_out=held_out,
        votes=votes,
    )


class _Kind(NamedTuple):
    """Members that read the same: those fitted on each split, and those that are kept."""

    reads: Source
    values: NDArray[np.float32]
    trials: list[PredictionHead]
    final: list[PredictionHead]


def _kinds(blocks: Blocks, targets: Targets) -> list[tuple[Source, bool]]:
    """What each kind of members reads, and whether it is linear."""
    sources = blocks.sources
    # The widest of the embeddings' and the expression's blocks come last.
    embeddings = [one for one in sources if "expression" not in one]
    expression = [one for one in sources if "expression" in one]
    networks = [(embeddings[-1], False)]
    if targets.kind == "values":
        return networks + [(one, False) for one in expression[-1:]]
    return networks + [(one, True) for one in sources]


def _weigh(
    kinds: Sequence[_Kind], targets: Targets, held_out: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], Any]:
    """Weight of each kind, and what all say of the held-out cells, split after split."""
    if targets.kind == "values":
        errors = sum(
            error_products([(kind.trials[k], kind.values[rows]) for kind in kinds], targets, rows)
            for k, rows in enumerate(held_out)
        )
        return stack_weights(np.asarray(errors)), None
    votes = [
        np.concatenate(
            [
                apply_head(network, kind.values[rows], targets.kind)
                for network, rows in zip(kind.trials, held_out, strict=True)
            ]
        )
        for kind in kinds
    ]
    weights = blend_weights(votes, targets, np.concatenate(held_out))
    return weights, np.tensordot(weights, np.stack(votes).astype(np.float64), axes=1)


def blend_weights(
    votes: Sequence[NDArray[np.floating]], targets: Targets, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Weights, (n_voters,) of sum 1, with which probabilities of several voters are best averaged.

    The weighted mean is a mixture, and its likelihood on the held-out `rows`, which the voters have
    not seen, is raised by expectation maximisation; from equal weights it comes to the only maximum.
    Rows are in an order that does not depend on the file.

    References
    ----------
    van der Laan et al. 2007, Super learner (Statistical Applications in Genetics and Molecular
    Biology 6:25). Dempster et al. 1977, Maximum likelihood from incomplete data via the EM algorithm
    (J R Stat Soc B 39:1).
    """
    values = targets.values[rows]
    if targets.kind == "classes":
        likelihood = np.stack([vote[np.arange(len(rows)), values] for vote in votes], axis=1)
        own = targets.class_weights
        mass = np.ones(len(rows)) if own is None else own[values].astype(np.float64)
    else:
        likelihood = np.stack([vote.ravel() for vote in votes], axis=1)
        mass = np.asarray(values, dtype=np.float64).ravel()
    likelihood = np.maximum(likelihood.astype(np.float64), _TINY)
    weights = np.full(len(votes), 1 / len(votes))
    for _ in range(_ROUNDS):
        shares = likelihood * weights
        shares /= shares.sum(axis=1, keepdims=True)
        explained = mass @ shares + _PRIOR
        weights = explained / explained.sum()
    return weights


def stack_weights(errors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights, (n_voters,), not negative and of sum 1, with which values are best averaged.

    `errors`, (n_voters, n_voters), are sums over held-out values of the products of two voters'
    errors; the weighted mean has the least squared error (Breiman 1996, Stacked regressions, Machine
    Learning 24:49).
    """
    n_voters = len(errors)
    scale = float(np.trace(errors)) / n_voters
    if not scale > 0:
        return np.full(n_voters, 1 / n_voters)
    scaled = errors / scale + _RIDGE * np.eye(n_voters)
    root = np.linalg.cholesky(scaled).T
    conditions = np.vstack([root, np.full(n_voters, _SUM_TO_1)])
    weights, _ = nnls(conditions, np.append(np.zeros(n_voters), _SUM_TO_1))
    return np.asarray(weights / weights.sum())
