"""Proportions of cell types: the head of ``stofm.tl.deconvolve``, how it is fitted and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm._edge.records import (
    all_or_nothing,
    make_frame,
    refuse_foreign,
    refuse_not_finite,
    remove_entry,
    write_frame,
    write_record,
)
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.heads.fitting import Task, fit
from stofm.heads.head import Head, refuse_reserved, require_head
from stofm.heads.labels import read_labels
from stofm.heads.simulated_spots import fit_simulated
from stofm.heads.slices import resolve_slices
from stofm.heads.spot_tables import SLICE, grid_into_spots, read_proportions
from stofm.heads.targets import Targets
from stofm.metrics import mae, pearson, rmse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.members import Members
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.heads.spot_tables import SpotTable
    from stofm.spatial import Split

_STD = Obsm.DECONVOLUTION_STD.removeprefix(Obsm.DECONVOLUTION)
#: With fewer spots than this there is nothing to hold out.
_MIN_SPOTS: Final = 20
_SCORES: Final = {"pearson": pearson, "rmse": rmse, "mae": mae}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DeconvolutionHead(Head):
    """A head for proportions of cell types, from :func:`stofm.tl.deconvolve`.

    A head that was fitted on simulated spots reads components of expression and no embedding.
    """

    task: ClassVar[str] = "deconvolution"
    called: ClassVar[str] = "types"

    def __post_init__(self) -> None:
        """Name the scores by type: in a file, types "0" and "NA" look like something else."""
        if len(self.validation_scores):
            index = pd.Index(self.outputs, name="type")
            scores = self.validation_scores.set_axis(index, axis=0)
            object.__setattr__(self, "validation_scores", scores)

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the cell types."""
        return self.outputs

    def predict(self, blocks: Blocks) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Proportions, (n, n_types), rows sum to 1, and their standard deviation between members."""
        shape = (len(blocks.features), len(self.outputs))
        mean, squares = np.zeros(shape), np.zeros(shape)
        for vote, weight in self.votes(blocks, "proportions"):
            shares = vote.astype(np.float64)
            # In single precision a softmax sums to 1 only nearly.
            shares /= shares.sum(axis=1, keepdims=True)
            mean += weight[:, None] * shares
            squares += weight[:, None] * shares**2
        if len(self.networks) == 1:
            return mean, None
        return mean, np.sqrt(np.maximum(squares - mean**2, 0.0))


@dataclass(frozen=True, eq=False, kw_only=True)
class ProportionsTask(Task):
    """Learning proportions that are known.

    Attributes
    ----------
    types
        Names of the types.
    source
        What is learnt from, for the head's record.
    """

    name: ClassVar[str] = DeconvolutionHead.task

    types: tuple[str, ...]
    source: Mapping[str, Any]

    @classmethod
    def of(cls, spots: SpotTable, request: Request, source: Mapping[str, Any]) -> ProportionsTask:
        """The task of learning what is known of spots; refuses too few."""
        targets = Targets("proportions", spots.proportions, len(spots.types))
        n_known = int(targets.is_known.sum())
        if n_known < _MIN_SPOTS:
            raise ValueError(
                f"{n_known} of {len(targets)} spots have known proportions; at least {_MIN_SPOTS} "
                "are needed to fit a head and to hold some out. Pass more slices, or a smaller "
                "spot_size if cells are summed into spots."
            )
        return cls(targets=targets, request=request, types=tuple(spots.types), source=source)

    def make_head(
        self, blocks: Blocks, splits: Sequence[Split], members: Members, common: dict[str, Any]
    ) -> DeconvolutionHead:
        """Score the types on the held-out spots."""
        true = self.targets.values[members.rows]
        return DeconvolutionHead(
            **common,
            outputs=self.types,
            params={**self.request.record, **self.source, "n_neighbors": blocks.n_neighbors},
            validation_scores=score_types(self.types, true, members.votes),
        )


def score_types(
    types: Sequence[str], true: NDArray[np.floating], found: NDArray[np.floating]
) -> pd.DataFrame:
    """Score each type over some spots: a row per type, columns pearson, rmse and mae.

    Fewer than two spots have no scores, NaN; a constant type has no Pearson correlation.
    """
    index = pd.Index(types, name="type")
    if len(true) < 2:
        return pd.DataFrame(np.nan, index=index, columns=list(_SCORES))
    true = np.asarray(true, dtype=np.float64)
    scores = {name: np.asarray(score(true, found)) for name, score in _SCORES.items()}
    return pd.DataFrame(scores, index=index)


def learn_proportions(
    slices: SliceTables, key: str | Sequence[str], request: Request, *, copy: bool
) -> DeconvolutionHead:
    """Fit a head to spots whose proportions are known."""
    request.check(slices)
    known = read_proportions(slices, key)
    source = {"proportions_key": key if isinstance(key, str) else list(key)}
    task = ProportionsTask.of(known, request, source)
    head: DeconvolutionHead = fit(task, slices.copied() if copy else slices)
    return head


def learn_squares(
    slices: SliceTables, spot_size: float, label_key: str, request: Request
) -> DeconvolutionHead:
    """Fit a head to squares that single cells are summed into."""
    request.check(slices)
    options = request.options
    labels = read_labels(slices, label_key, missing=options.missing, min_share=options.min_share)
    squares = grid_into_spots(slices, labels, request, spot_size=spot_size)
    own = replace(request, library_key=SLICE, layer=None, spatial_key=Obsm.SPATIAL)
    source = {"label_key": label_key, "spot_size": spot_size}
    head: DeconvolutionHead = fit(ProportionsTask.of(squares, own, source), squares.slices)
    return head


def learn_reference(
    slices: SliceTables, reference: Any, label_key: str, request: Request, key: str
) -> DeconvolutionHead:
    """Fit a head to spots simulated from single cells, and write the proportions that it finds."""
    if request.options.strategy != "frozen":
        raise ValueError(
            f"strategy={request.options.strategy!r} does not go with reference=: a model is tuned on "
            "slices, and simulated spots have no place in one. Use strategy='frozen', or spot_size= "
            "with a slice of single cells."
        )
    _refuse_keys(slices, key, request)
    plain = list(reference.values()) if isinstance(reference, dict) else reference
    for one in plain if isinstance(plain, list | tuple) else [plain]:
        if len(names := sorted(getattr(one, "tables", ()))) > 1:
            # `table_key` names one of the query.
            raise KeyError(
                f"The reference is a SpatialData with the tables {names}; pass the one with the "
                f"single cells: reference=sdata.tables[{names[0]!r}]."
            )
    # A reference's slices do not matter, nor whether they overlap.
    cells = resolve_slices(reference, spatial_key="", role="reference")
    fitted = fit_simulated(slices, cells, label_key, request)
    head = DeconvolutionHead(
        **fitted.fields,
        validation_scores=score_types(fitted.fields["outputs"], fitted.true, fitted.found),
    )
    with all_or_nothing(*slices.tables):
        _write(slices, head, request, key)
    return head


def deconvolve_with(
    slices: SliceTables, head: DeconvolutionHead, request: Request, key: str
) -> None:
    """Find the proportions of some spots, and write them."""
    require_head(head, DeconvolutionHead)
    _refuse_keys(slices, key, request, head.use_rep)
    with all_or_nothing(*slices.tables):
        _write(slices, head, request, key)


def _refuse_keys(
    slices: SliceTables, key: str, request: Request, use_rep: Sequence[str] = ()
) -> None:
    """Refuse a key that is read, or where or beside which something else is stored."""
    refuse_reserved(key, Obsm.DECONVOLUTION, request.spatial_key, request.library_key, *use_rep)
    slices.each(lambda table: refuse_foreign(table, key, obsm=[key + _STD]))


def _write(slices: SliceTables, head: DeconvolutionHead, request: Request, key: str) -> None:
    """Write proportions and their deviation to each table, with a record."""
    found = head.predict(head.read(slices, request))
    refuse_not_finite(head.task, *found)
    params = {
        "use_rep": list(head.use_rep),
        "strategy": head.strategy,
        "seed": head.params["seed"],
    }
    # All is made before anything is written.
    frames = [
        [make_frame(table, values[part], head.types) for values in found if values is not None]
        for table, part in zip(slices.tables, slices.places, strict=True)
    ]
    for table, (mean, *spread) in zip(slices.tables, frames, strict=True):
        write_record(table, key, params, **head.model_names())
        write_frame(table, key, mean, head.types)
        # That of an earlier run would be taken for this one's.
        remove_entry(table, key + _STD)
        for frame in spread:
            write_frame(table, key + _STD, frame, head.types)
    logger.info(
        "Proportions of %d types in %d spots: obsm[%r].", len(head.types), len(found[0]), key
    )
