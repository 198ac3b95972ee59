"""Fitting the networks of a head that vote, and finding what each kind of them should weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from stofm.heads.blending import blend_weights, drop_light
from stofm.heads.linear import fit_linear_head
from stofm.heads.network import apply_head, fit_head, row_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from stofm.heads.fitting import TaskFit
    from stofm.heads.inputs import Inputs, Source
    from stofm.heads.splits import Run
    from stofm.heads.targets import Targets
    from stofm.nn import PredictionHead
    from stofm.spatial import Split

#: Strengths that linear heads try, weakest first.
_STRENGTHS: Final = (0.01, 0.1, 1.0, 10.0)
#: With more known cells, networks that start elsewhere differ little, and one of a kind does.
_MANY_CELLS: Final = 15_000
_FEW_NETWORKS: Final = 3
#: Between the seeds of networks; runs of a protocol have neighbouring seeds.
_SEED_STEP: Final = 1000


def choose_n_heads(n_heads: int | None, n_known: int, *, is_repeated: bool) -> int:
    """Number of networks of a kind: as asked for, or by the number of cells.

    Parameters
    ----------
    n_heads
        What is asked for; None for a choice.
    n_known
        Cells with a target.
    is_repeated
        Whether the fit is one of several runs, as a protocol has them: these have one network.
    """
    if n_heads is not None:
        return n_heads
    return 1 if is_repeated or n_known > _MANY_CELLS else _FEW_NETWORKS


def voter_seeds(seed: int, n_heads: int) -> list[int]:
    """Seeds of the networks of a kind and of the splits they are fitted on."""
    return [seed + _SEED_STEP * k for k in range(n_heads)]


def splits_of_networks(
    run: Run, plan: Callable[[int], list[Run]], *, n_heads: int, is_shared: bool
) -> list[Split]:
    """Splits that networks are fitted on: each its own, or all the same.

    Parameters
    ----------
    run
        The first one's.
    plan
        Plans runs from a seed.
    n_heads
        Number of networks of a kind.
    is_shared
        Whether there is one for all, as where a protocol tests cells, or a model is tuned on some.
    """
    if is_shared:
        return [run.split]
    return [run.split, *(plan(seed)[0].split for seed in voter_seeds(run.seed, n_heads)[1:])]


@dataclass(frozen=True, eq=False)
class Voters:
    """Networks that vote.

    Attributes
    ----------
    networks, reads, weights, n_neighbors
        As a :class:`~stofm.heads.voting.VotingHead` has them.
    history
        Losses of those with hidden layers, numbered in the column ``network``.
    held_out
        Held-out cells of each split; different splits may share cells.
    votes
        (n_rows, n_outputs) what networks that were not fitted to them say of these, split after
        split.
    """

    networks: tuple[PredictionHead, ...]
    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    n_neighbors: int
    history: pd.DataFrame
    held_out: tuple[NDArray[np.int64], ...]
    votes: NDArray[np.float64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Held-out cells of all splits in turn; a cell may be in several."""
        return np.concatenate(self.held_out)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Networks of a kind, one for each split or one for all, and what they say of held-out cells."""

    reads: Source
    votes: NDArray[np.float32]
    #: Fits the networks that are kept.
    finish: Callable[[], list[PredictionHead]]


def fit_voters(
    first: TaskFit,
    targets: Targets,
    splits: Sequence[Split],
    *,
    n_heads: int,
    refit: bool,
    seed: int,
) -> Voters:
    """Fit networks to embeddings, and to neighbourhoods and components of expression if there are any.

    There are `n_heads` networks with hidden layers on each; a linear one on the expression stands
    for all that it would be alike. Weights of these kinds are those with which the held-out cells
    are likeliest.

    Parameters
    ----------
    first
        The network on embeddings for the first split, and what is read.
    targets
        Classes or proportions.
    splits
        Cells to fit and to hold out: one split for each network, or a single one for all.
    n_heads
        Number of networks of a kind.
    refit
        Fit all networks but a tuned one again to all known cells, in as many epochs, once weights
        are known.
    seed
        Seed of the first network.
    """
    inputs = first.inputs
    held_out = [row_order(inputs.features, targets.values, one.held_out) for one in splits]
    rows = np.concatenate(held_out)
    fitting = _Fitting(targets, splits, held_out, voter_seeds(seed, n_heads), refit=refit)
    kinds = [fitting.networks(inputs, source, first) for source in inputs.sources]
    if inputs.expression is not None:
        kinds.append(fitting.linear("expression", inputs.expression))
    weights = drop_light(blend_weights([kind.votes for kind in kinds], targets, rows))
    votes = sum(w * kind.votes.astype(np.float64) for w, kind in zip(weights, kinds, strict=True))
    networks: list[PredictionHead] = []
    reads: list[Source] = []
    shares: list[float] = []
    for kind, weight in zip(kinds, weights.tolist(), strict=True):
        if not weight:
            continue
        own = kind.finish()
        networks += own
        reads += [kind.reads] * len(own)
        shares += [weight / len(own)] * len(own)
    return Voters(
        networks=tuple(networks),
        reads=tuple(reads),
        weights=tuple(shares),
        n_neighbors=inputs.neighbors_of(reads),
        history=pd.concat(fitting.histories, ignore_index=True),
        held_out=tuple(held_out),
        votes=np.asarray(votes),
    )


class _Fitting:
    """A run of :func:`fit_voters`."""

    def __init__(
        self,
        targets: Targets,
        splits: Sequence[Split],
        held_out: Sequence[NDArray[np.int64]],
        seeds: Sequence[int],
        *,
        refit: bool,
    ) -> None:
        self.histories: list[pd.DataFrame] = []
        self._targets = targets
        self._splits = splits
        self._held_out = held_out
        self._refit = refit
        self._seeds = seeds
        self._known = np.flatnonzero(targets.is_known)

    def networks(self, inputs: Inputs, reads: Source, first: TaskFit) -> _Kind:
        """Networks with hidden layers, one for each split."""
        features, widths = inputs.of(reads), inputs.widths_of(reads)
        assert features is not None
        fits: list[tuple[PredictionHead, int]] = []
        for k, seed in enumerate(self._seeds):
            split = self._splits[k % len(self._splits)]
            if reads == "embedding" and not fits:
                network, best_epoch, history = first.network, first.best_epoch, first.history
            else:
                one = fit_head(
                    features,
                    self._targets,
                    fitted=split.fitted,
                    held_out=split.held_out,
                    input_widths=widths,
                    seed=seed,
                )
                network, best_epoch, history = one.head, one.best_epoch, one.history
            fits.append((network, best_epoch))
            self.histories.append(history.assign(network=len(self.histories), reads=reads))
        votes = [
            self._mean_vote([one for one, _ in fits[k :: len(self._splits)]], features[rows])
            for k, rows in enumerate(self._held_out)
        ]

        def finish() -> list[PredictionHead]:
            if not self._refit:
                return [network for network, _ in fits]
            # The one that was tuned with the model stays as it is.
            n_tuned = int(reads == "embedding" and first.model is not None)
            return [network for network, _ in fits[:n_tuned]] + [
                fit_head(
                    features,
                    self._targets,
                    fitted=self._known,
                    held_out=self._known[:0],
                    input_widths=widths,
                    n_epochs=n_epochs,
                    seed=seed,
                ).head
                for (_, n_epochs), seed in list(zip(fits, self._seeds, strict=True))[n_tuned:]
            ]

        return _Kind(reads, np.concatenate(votes), finish)

    def _mean_vote(
        self, networks: Sequence[PredictionHead], features: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        votes = [apply_head(one, features, self._targets.kind) for one in networks]
        return np.asarray(np.mean(votes, axis=0, dtype=np.float64), dtype=np.float32)

    def linear(self, reads: Source, features: NDArray[np.float32]) -> _Kind:
        """A linear network, of the strength that is best over the splits."""
        votes: list[list[NDArray[np.float32]]] = [[] for _ in _STRENGTHS]
        heads: list[PredictionHead] = []
        for split, rows in zip(self._splits, self._held_out, strict=True):
            fitted = row_order(features, self._targets.values, split.fitted)
            start = None
            for own, strength in zip(votes, _STRENGTHS, strict=True):
                start = fit_linear_head(
                    features, self._targets, fitted=fitted, strength=strength, start=start
                )
                own.append(apply_head(start, features[rows], self._targets.kind))
                heads.append(start)
        every = [np.concatenate(own) for own in votes]
        # Without held-out cells all losses are 0.
        losses = [self._loss(own) for own in every]
        best = int(np.argmin(losses)) if any(losses) else _STRENGTHS.index(1.0)

        def finish() -> list[PredictionHead]:
            if not self._refit:
                return heads[best :: len(_STRENGTHS)]
            known = row_order(features, self._targets.values, self._known)
            strength = _STRENGTHS[best]
            return [fit_linear_head(features, self._targets, fitted=known, strength=strength)]

        return _Kind(reads, every[best], finish)

    def _loss(self, votes: NDArray[np.float32]) -> float:
        """Cross-entropy of what is known of the held-out cells."""
        values = self._targets.values[np.concatenate(self._held_out)]
        likelihood = np.log(np.maximum(votes, np.finfo(np.float32).tiny))
        if self._targets.kind == "classes":
            return -float(likelihood[np.arange(len(values)), values].sum())
        return -float((values * likelihood).sum())
