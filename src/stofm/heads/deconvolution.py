"""Proportions of cell types: the head of ``stofm.tl.deconvolve``, how it is fitted and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm._edge.colors import colors_of
from stofm._edge.tables import all_or_nothing
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.heads.fitting import fit, score_outputs
from stofm.heads.head import Head
from stofm.heads.request import resolve_slices
from stofm.heads.spots import SLICE, fit_simulated, grid_into_spots, read_proportions
from stofm.heads.targets import Targets, read_labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.spots import SpotTable

_STD = Obsm.DECONVOLUTION_STD.removeprefix(Obsm.DECONVOLUTION)
#: With fewer spots than this there is nothing to hold out.
_MIN_SPOTS: Final = 20


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DeconvolutionHead(Head):
    """A head for proportions of cell types, from :func:`stofm.tl.deconvolve`.

    A head that was fitted to simulated spots uses components of expression and no embedding.
    """

    task: ClassVar[str] = "deconvolution"
    called: ClassVar[str] = "types"
    key: ClassVar[str] = Obsm.DECONVOLUTION
    obsm_beside: ClassVar[tuple[str, ...]] = (_STD,)

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

    def apply(self, slices: SliceTables, request: Request, key: str) -> None:
        """Find the proportions of some spots, and write them."""
        self.refuse_key(slices, key, request, self.use_rep)
        with all_or_nothing(*slices.tables):
            mean, spread = self.predict(self.read(slices, request))
            frames = {"": mean} if spread is None else {"": mean, _STD: spread}
            self.write(slices, key, frames, params=[{}] * len(slices.tables))
        logger.info(
            "Proportions of %d types in %d spots: obsm[%r].", len(self.types), len(mean), key
        )


def learn_proportions(
    spots: SpotTable, request: Request, source: Mapping[str, Any]
) -> DeconvolutionHead:
    """Fit a head to spots whose proportions are known; `source` says of what, for its record."""
    targets = Targets("proportions", spots.proportions, len(spots.types))
    n_known = int(targets.is_known.sum())
    if n_known < _MIN_SPOTS:
        raise ValueError(
            f"{n_known} of {len(targets)} spots have known proportions; at least {_MIN_SPOTS} are "
            "needed to fit a head and to hold some out. Pass more slices, or a smaller spot_size if "
            "cells are summed into spots."
        )
    blocks, _, members, fields = fit(spots.slices, targets, request, DeconvolutionHead.task)
    return DeconvolutionHead(
        **fields,
        outputs=tuple(spots.types),
        params={**request.record, **source, "n_neighbors": blocks.n_neighbors},
        validation_scores=score_outputs(
            spots.types, targets.values[members.rows], members.votes, "type"
        ),
    )


def learn_known(
    slices: SliceTables, key: str | Sequence[str], request: Request
) -> DeconvolutionHead:
    """Fit a head to an entry of ``obsm``, or columns of ``obs``, with proportions."""
    request.check(slices)
    source = {"proportions_key": key if isinstance(key, str) else list(key)}
    return learn_proportions(read_proportions(slices, key), request, source)


def learn_squares(
    slices: SliceTables, spot_size: float, label_key: str, request: Request
) -> DeconvolutionHead:
    """Fit a head to squares that single cells are summed into."""
    request.check(slices)
    options = request.options
    labels = read_labels(slices, label_key, missing=options.missing, min_share=options.min_share)
    squares = grid_into_spots(slices, labels, request, spot_size=spot_size)
    own = replace(request, library_key=SLICE, layer=None, spatial_key=Obsm.SPATIAL)
    source: dict[str, Any] = {"label_key": label_key, "spot_size": spot_size}
    source["colors"] = colors_of(slices.tables, label_key)
    return learn_proportions(squares, own, source)


def learn_reference(
    slices: SliceTables, reference: Any, label_key: str, request: Request
) -> DeconvolutionHead:
    """Fit a head to spots simulated from single cells."""
    if request.options.strategy != "frozen":
        raise ValueError(
            f"strategy={request.options.strategy!r} does not go with reference=: a model is tuned on "
            "slices, and simulated spots are not part of one. Use strategy='frozen', or spot_size= "
            "with a slice of single cells."
        )
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
    fields, found, true = fit_simulated(slices, cells, label_key, request)
    scores = score_outputs(fields["outputs"], true, found, "type")
    return DeconvolutionHead(**fields, validation_scores=scores)
