"""What each stage of a run minimises, from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm.nn.device import seeded
from stofm.train.objectives import CellEncoderObjective, JointObjective
from stofm.train.spatial_objective import SpatialObjective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from stofm.nn import Stofm
    from stofm.train.config import StageConfig


def make_objectives(model: Stofm, stages: Sequence[StageConfig], *, seed: int) -> list[nn.Module]:
    """Make the objectives of all stages; heads that several stages need are one.

    Parameters
    ----------
    model
        The objectives hold its networks.
    stages
        What is asked in each.
    seed
        Of the heads' first weights.
    """
    heads: dict[str, nn.Module] = {}
    with seeded(seed):
        return [_share_heads(_make_objective(model, stage), heads) for stage in stages]


def _make_objective(model: Stofm, config: StageConfig) -> nn.Module:
    if config.name == "cell_encoder":
        return CellEncoderObjective(
            model.cell_encoder,
            masked_genes=config.masked_genes,
            contrastive=config.contrastive,
            weights=config.weights,
        )
    spatial = SpatialObjective(
        model.se2_transformer,
        learned_mask=config.spatial_masking.mask_value == "learned",
        cell_loss=config.cell_loss,
        distance_unit=config.distance_unit,
        weights=config.weights,
    )
    if config.name == "spatial":
        return spatial
    return JointObjective(
        model.cell_encoder,
        spatial,
        masked_genes=config.masked_genes if config.trains_masked_genes else None,
        weights=config.weights,
    )


def _share_heads(objective: nn.Module, heads: dict[str, nn.Module]) -> nn.Module:
    """Put the heads that earlier stages train in place of an objective's own."""
    for owner in (objective, getattr(objective, "spatial", None)):
        for name in ("gene_head", "cell_head", "pair_head", "visible_head", "surroundings_head"):
            own = getattr(owner, name, None)
            if own is None:
                continue
            learns_mask = getattr(own, "mask", None) is not None
            setattr(owner, name, heads.setdefault(f"{name}, {learns_mask}", own))
    return objective
