"""How a model is tuned, and tokens and places of the slices that it is tuned on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stofm._edge.tokens import read_tokens
from stofm.heads.embeddings import bare_table, places_entry, read_places, recorded_options
from stofm.pp import tokenize
from stofm.spatial import canonical_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.nn import Stofm


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a model is tuned together with a head. A step sees one sub-slice.

    Attributes
    ----------
    learning_rate, weight_decay
        Of AdamW; decay for matrices only.
    warmup_steps
        Steps over which the learning rate rises; then it falls linearly to 0.
    epochs, min_steps
        Passes over the sub-slices, and the fewest steps.
    validate_every
        Steps between validations, or those of an epoch if these are more. All cells are embedded
        anew before each.
    patience
        Validations without a lower loss after which tuning stops.
    sampled_cells
        Cells of a sub-slice that go through the cell encoder in a step, with gradients.
    max_norm
        Norm to which larger gradients are scaled down.
    lora_rank, lora_alpha
        ``"lora"``: rank of the changes, and their scale times the rank.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 10
    epochs: int = 10
    min_steps: int = 100
    validate_every: int = 10
    patience: int = 5
    sampled_cells: int = 32
    max_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16.0


@dataclass(frozen=True, eq=False)
class TuningSlice:
    """Rows of a slice's cells in the tokens of their table and in the targets, in order of place."""

    tokens: RankedTokens
    cells: NDArray[np.int64]
    rows: NDArray[np.int64]
    coordinates: NDArray[np.float64]


def read_tuning_slices(
    slices: SliceTables, model: Stofm, request: Request, used: NDArray[np.int64]
) -> list[TuningSlice]:
    """Tokens and places of the slices that have a used cell."""
    tokens, coordinates = {}, np.full((slices.n_obs, 2), np.nan)
    for k in slices.tables_of(used):
        table = slices.tables[k]
        with slices.naming(k):
            options = request.reading | recorded_options(table, request)
            places = read_places(table, places_entry(table, request.spatial_key))
            coordinates[slices.places[k]] = places
            bare = bare_table(table, options)
            tokenize(bare, model, layer=options["layer"], show_progress_bar=False)
            tokens[k] = read_tokens(bare, model)
    found = []
    for rows in slices.rows:
        if len(np.intersect1d(rows, used)):
            number = slices.tables_of(rows)[0]
            order = canonical_order(coordinates[rows], np.empty((len(rows), 0)))
            own = rows[order]
            cells = own - slices.places[number].start
            found.append(TuningSlice(tokens[number], cells, own, coordinates[own]))
    return found
