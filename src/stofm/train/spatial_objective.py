"""What the SE(2) Transformer is trained for: hidden cells, distances of moved ones, and surroundings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from stofm.train._checks import check_choice
from stofm.train.heads import MaskedCellHead, PairDistanceHead
from stofm.train.losses import (
    CellLoss,
    LossPart,
    LossWeights,
    masked_cell_loss,
    pair_distance_loss,
    positive,
)
from stofm.train.operations import PER_PRODUCT, matrix_weights, products_of_transformer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int

    from stofm.nn import SE2Output, SE2Transformer
    from stofm.train.inputs import MaskedSubSliceBatch
    from stofm.train.losses import Gather


class SpatialObjective(nn.Module):
    """Masked cell modelling and pairwise distance recovery with the SE(2) Transformer.

    Parameters
    ----------
    transformer
        The SE(2) Transformer; trained in place.
    learned_mask
        Whether a learned vector stands in place of hidden features; otherwise the number that
        the batch holds there.
    cell_loss
        ``"mse"`` (paper) or ``"cosine"`` (published code).
    distance_unit
        Model units in which distances are compared: 1 in the paper. Their squared error is then
        hundreds, and that of unit-length cell embeddings a hundredth.
    weights
        Weights of the losses; with one of those at cells that are not hidden, inputs need targets
        for them.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4: L = lambda L_MCM + (1 - lambda) L_PDR. The losses at
    cells that are not hidden are ours.
    """

    def __init__(
        self,
        transformer: SE2Transformer,
        *,
        learned_mask: bool = True,
        cell_loss: CellLoss = "mse",
        distance_unit: float = 1.0,
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        check_choice("cell_loss", cell_loss, get_args(CellLoss))
        config = transformer.config
        self.transformer = transformer
        self.cell_loss = cell_loss
        self.distance_unit = distance_unit
        self.cell_head = MaskedCellHead(
            d_model=config.d_model, d_cell=config.d_cell, learned_mask=learned_mask
        )
        self.pair_head = PairDistanceHead(n_heads=config.n_heads)
        weights = weights or LossWeights()
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = positive(
            {
                "masked_cells": weights.masked_cells,
                "pair_distances": weights.pair_distances,
                "visible_cells": weights.visible_cells,
                "surroundings": weights.surroundings,
            }
        )
        # What is told from cells that are not hidden has heads of its own, so that hidden states
        # have room for both a cell and what lies around it.
        self.visible_head, self.surroundings_head = (
            MaskedCellHead(d_model=config.d_model, d_cell=config.d_cell, learned_mask=False)
            if name in self.weights
            else None
            for name in ("visible_cells", "surroundings")
        )

    def forward(
        self, inputs: MaskedSubSliceBatch, gather: Gather | None = None
    ) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        Parameters
        ----------
        inputs
            Sub-slices with cells hidden and moved.
        gather
            Not used: no loss looks at other processes' sub-slices.
        """
        return self.losses(inputs, inputs.subslices.features)

    def losses(
        self, inputs: MaskedSubSliceBatch, features: Float[Tensor, "batch nodes d_cell"]
    ) -> dict[str, LossPart]:
        """Compute the losses with `features` in place of those in `inputs`.

        Hidden nodes stay hidden, whatever `features` holds there.
        """
        batch = replace(inputs.subslices, features=self._hidden(inputs, features))
        out: SE2Output = self.transformer(batch)
        parts = {}
        if "masked_cells" in self.weights:
            target = inputs.target_features * self.transformer.config.feature_scale
            parts["masked_cells"] = masked_cell_loss(
                self.predict_cells(out, inputs), target, kind=self.cell_loss
            )
        if "pair_distances" in self.weights:
            parts["pair_distances"] = pair_distance_loss(
                self.predict_distances(out, inputs) / self.distance_unit,
                inputs.pair_distances / self.distance_unit,
            )
        return parts | self._visible_losses(out, inputs)

    def _visible_losses(self, out: SE2Output, inputs: MaskedSubSliceBatch) -> dict[str, LossPart]:
        """Compute the losses at cells that are not hidden."""
        if self.visible_head is None and self.surroundings_head is None:
            return {}
        visible = inputs.visible
        if visible is None:
            msg = (
                "The weights ask for what cells that are not hidden tell, and the sub-slices have no "
                "targets for it: mask them with n_surrounding of at least 1."
            )
            raise ValueError(msg)
        hidden = out.last_hidden_state.flatten(0, 1)[visible.places]
        scale = self.transformer.config.feature_scale
        parts = {}
        for name, head, target in (
            ("visible_cells", self.visible_head, visible.features),
            ("surroundings", self.surroundings_head, visible.surroundings),
        ):
            if head is not None:
                with torch.autocast(hidden.device.type, enabled=False):
                    predicted = head(hidden.float())
                parts[name] = masked_cell_loss(predicted, target * scale, kind=self.cell_loss)
        return parts

    def count_operations(self, inputs: MaskedSubSliceBatch) -> int:
        """Estimate the floating-point operations of a step (:mod:`stofm.train.operations`)."""
        products = products_of_transformer(self.transformer, inputs)
        if "masked_cells" in self.weights:
            products += len(inputs.target_places) * matrix_weights(self.cell_head.layers)
        if "pair_distances" in self.weights:
            products += len(inputs.pair_rows) * matrix_weights(self.pair_head)
        for head in (self.visible_head, self.surroundings_head):
            if head is not None and inputs.visible is not None:
                products += len(inputs.visible.places) * matrix_weights(head)
        return PER_PRODUCT * products

    def predict_cells(
        self, out: SE2Output, inputs: MaskedSubSliceBatch
    ) -> Float[Tensor, "targets d_cell"]:
        """Cell embeddings predicted for the target nodes, times the model's `feature_scale`."""
        hidden = out.last_hidden_state.flatten(0, 1)[inputs.target_places]
        with torch.autocast(hidden.device.type, enabled=False):
            predicted: Tensor = self.cell_head(hidden.float())
        return predicted

    def predict_distances(
        self, out: SE2Output, inputs: MaskedSubSliceBatch
    ) -> Float[Tensor, " pairs"]:
        """Distances predicted for the target pairs, model units."""
        pairs = out.pairs.at(inputs.pair_batch, inputs.pair_rows, inputs.pair_columns)
        # Distances reach 100, where bfloat16 is only good to 0.5.
        with torch.autocast(pairs.device.type, enabled=False):
            predicted: Tensor = self.pair_head(pairs.float())
        return predicted

    def _hidden(self, inputs: MaskedSubSliceBatch, features: Tensor) -> Tensor:
        """Put at hidden nodes what stands in place of their features."""
        places = inputs.hidden_places
        if self.cell_head.mask is None:
            filling = inputs.subslices.features.flatten(0, 1)[places]
        else:
            filling = self.cell_head.mask.expand(len(places), -1)
        return replace_rows(features, places, filling)

    def load_reference_heads(self, state: Mapping[str, Tensor]) -> None:
        """Take the heads' weights from a published checkpoint.

        Parameters
        ----------
        state
            Tensors by name, ``lm_head.*`` and ``pair_head.*`` among them; others are ignored.

        Raises
        ------
        RuntimeError
            Weights are missing or have another shape.
        """
        for name, head in (("lm_head", self.cell_head), ("pair_head", self.pair_head)):
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in state.items()
                if key.startswith(f"{name}.")
            }
            head.layers.load_state_dict(own)


def replace_rows(
    features: Float[Tensor, "batch nodes d_cell"],
    places: Int[Tensor, " rows"],
    rows: Float[Tensor, "rows d_cell"],
) -> Float[Tensor, "batch nodes d_cell"]:
    """Return features with `rows` at `places`, counted through the batch."""
    flat = features.flatten(0, 1)
    return flat.index_put((places,), rows.to(flat.dtype)).view_as(features)
