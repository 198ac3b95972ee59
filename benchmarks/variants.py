"""Variants of a recipe, each with one thing changed: the ablations of the paper at the size of a laptop.

A change is a function from recipe to recipe. Recipes here have a cell encoder stage and a spatial
stage (:func:`shortened`); which rules and sizes a model has, inference follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stofm.nn import StofmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from stofm.train import Recipe, StageConfig

    Change = Callable[[Recipe], Recipe]

#: Sub-slices of a batch at most, where they are so small that as many cells would be too many.
_LARGEST_BATCH = 256


@dataclass(frozen=True)
class Variant:
    """A recipe with one thing changed.

    Attributes
    ----------
    what
        The change, in words.
    change
        Makes it.
    """

    what: str
    change: Change


def shortened(recipe: Recipe, *, steps: int, cell_steps: int | None) -> Recipe:
    """Leave out what is the same in all variants and costs time: the joint stage, and validation.

    Held-out slices stay out of training.

    Parameters
    ----------
    recipe
        A whole recipe.
    steps
        Optimiser steps of the spatial stage.
    cell_steps
        Optimiser steps of the cell encoder stage; None for the recipe's.

    Raises
    ------
    ValueError
        The recipe goes on from a checkpoint, or has not one cell encoder and one spatial stage.
    """
    if recipe.model.checkpoint:
        msg = (
            f"The recipe goes on from the checkpoint {recipe.model.checkpoint!r}, whose sizes can't "
            "be changed; variants need one that starts from a preset."
        )
        raise ValueError(msg)
    names = [stage.name for stage in recipe.stages]
    kept = [stage for stage in recipe.stages if stage.name != "joint"]
    if [stage.name for stage in kept] != ["cell_encoder", "spatial"]:
        msg = f"The recipe must have the stages cell_encoder and spatial, found {names}."
        raise ValueError(msg)
    cells, spatial = kept
    if cell_steps is not None:
        cells = _with_steps(cells, cell_steps)
    data = replace(
        recipe.data, validation=(), exclude=(*recipe.data.exclude, *recipe.data.validation)
    )
    return replace(recipe, data=data, stages=(cells, _with_steps(spatial, steps)))


def _with_steps(stage: StageConfig, steps: int) -> StageConfig:
    # An epoch has one step at least, so that there are enough of them.
    return replace(stage, max_steps=steps, epochs=max(stage.epochs, steps))


def spatial_stage(recipe: Recipe) -> StageConfig:
    """The stage that trains the SE(2) Transformer."""
    return next(stage for stage in recipe.stages if stage.name == "spatial")


def cell_stages(recipe: Recipe) -> tuple[StageConfig, ...]:
    """The stage that trains the cell encoder, or nothing."""
    return tuple(stage for stage in recipe.stages if stage.name == "cell_encoder")


def _with_spatial_stage(recipe: Recipe, **changes: Any) -> Recipe:
    changed = replace(spatial_stage(recipe), **changes)
    return replace(recipe, stages=(*cell_stages(recipe), changed))


def _with_subslice(recipe: Recipe, **rules: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, subslice=recipe.model.subslice | rules))


def full(recipe: Recipe) -> Recipe:
    """Change nothing."""
    return recipe


def without_virtual_cells(recipe: Recipe) -> Recipe:
    """Sub-slices of cells alone, in training and in inference."""
    return _with_spatial_stage(recipe, virtual_cells=False)


def without_distances(recipe: Recipe) -> Recipe:
    """Attention that does not know how far cells are from one another."""
    sizes = recipe.model.se2_transformer | {"pair_bias": False}
    return replace(recipe, model=replace(recipe.model, se2_transformer=sizes))


def without_domain_adaptation(recipe: Recipe) -> Recipe:
    """A cell encoder that is not trained; its gene embeddings are those of the recipe."""
    return replace(recipe, stages=(spatial_stage(recipe),))


def random_gene_embeddings(recipe: Recipe) -> Recipe:
    """A cell encoder that is trained from random gene embeddings."""
    return replace(recipe, model=replace(recipe.model, gene_embeddings="random"))


def with_subslices_of(n_cells: int) -> Change:
    """Sub-slices of another size, in training and in inference; as many cells in a batch."""

    def change(recipe: Recipe) -> Recipe:
        stage = spatial_stage(recipe)
        cells = (stage.subslice_cells or _cells_of_subslice(recipe)) * stage.optimizer.batch_size
        batch_size = min(max(1, round(cells / n_cells)), _LARGEST_BATCH)
        optimizer = replace(stage.optimizer, batch_size=batch_size)
        changed = _with_spatial_stage(recipe, subslice_cells=None, optimizer=optimizer)
        return _with_subslice(changed, n_cells=n_cells)

    return change


def _cells_of_subslice(recipe: Recipe) -> int:
    preset = StofmConfig.mini(1) if recipe.model.preset == "mini" else StofmConfig.base(1)
    n_cells: int = recipe.model.subslice.get("n_cells", preset.subslice.n_cells)
    return n_cells


def with_position_weight(weight: float) -> Change:
    """Clusters that give the virtual cells with another weight of place (the paper's alpha)."""
    return lambda recipe: _with_subslice(recipe, position_weight=weight)


def with_resolution(resolution: float) -> Change:
    """Clusters that give the virtual cells at another resolution."""
    return lambda recipe: _with_subslice(recipe, leiden_resolution=resolution)


def with_masked_cells(weight: float) -> Change:
    """The paper's losses with another weight of masked cells against distances (its lambda)."""

    def change(recipe: Recipe) -> Recipe:
        weights = replace(
            spatial_stage(recipe).weights, masked_cells=weight, visible_cells=0.0, surroundings=0.0
        )
        return _with_spatial_stage(recipe, weights=weights)

    return change


VARIANTS = {
    "full": Variant("as the recipe", full),
    "no-virtual-cells": Variant("without virtual cells", without_virtual_cells),
    "single-cells": Variant("sub-slices of one cell", with_subslices_of(1)),
    "no-distances": Variant("without the distance matrix", without_distances),
    "no-domain-adaptation": Variant("cell encoder not trained", without_domain_adaptation),
    "random-genes": Variant("random gene embeddings at first", random_gene_embeddings),
    "alpha-0": Variant("alpha 0", with_position_weight(0.0)),
    "alpha-0.5": Variant("alpha 0.5", with_position_weight(0.5)),
    "alpha-0.8": Variant("alpha 0.8", with_position_weight(0.8)),
    "lambda-0": Variant("lambda 0: distances only", with_masked_cells(0.0)),
    "lambda-0.5": Variant("lambda 0.5", with_masked_cells(0.5)),
    "lambda-1": Variant("lambda 1: masked cells only", with_masked_cells(1.0)),
    "size-200": Variant("sub-slices of 200 cells", with_subslices_of(200)),
    "size-1000": Variant("sub-slices of 1,000 cells", with_subslices_of(1000)),
    "resolution-0.5": Variant("Leiden resolution 0.5", with_resolution(0.5)),
    "resolution-2": Variant("Leiden resolution 2", with_resolution(2.0)),
}
