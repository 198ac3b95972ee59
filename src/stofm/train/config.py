"""Options of the stages of a run, as frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from stofm._config import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Checked,
    check_sum,
    must,
)

StageName = Literal["cell_encoder", "spatial", "joint"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
#: What a stage passes on: the weights with the lowest held-out loss, or the last ones.
Keep = Literal["best", "last"]
Candidates = Literal["vocabulary", "batch"]
CellLoss = Literal["mse", "cosine"]
_LIMIT = must("be positive, or left out for no limit", lambda value: value > 0)
_FILLING = must(
    "be 'learned' or a finite number",
    lambda value: value == "learned" or (isinstance(value, float | int) and math.isfinite(value)),
)
_MIXTURE = must(
    "give weights of at least 0 by column and value, such as {'species': {'mouse': 0.5}}",
    lambda value: all(0 <= one < math.inf for own in value.values() for one in own.values()),
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """AdamW and its schedule; the defaults are the paper's.

    Attributes
    ----------
    learning_rate
        Largest learning rate, reached at the end of the warm-up.
    weight_decay
        Weight decay of matrices; biases, layer norms and embeddings are not decayed.
    beta1, beta2, epsilon
        Of AdamW.
    warmup_steps
        Optimiser steps over which the learning rate rises linearly from 0; at most half of the
        stage. It then falls linearly to 0 at the stage's last step.
    batch_size
        Samples per batch (cells or sub-slices), over all processes.
    accumulation
        Batches per optimiser step.
    max_norm
        Gradients are clipped to this norm; None: no clipping.

    References
    ----------
    SToFM (arXiv 2507.11588), table A.8.
    """

    learning_rate: float = field(default=1e-4, metadata=POSITIVE)
    weight_decay: float = field(default=0.01, metadata=NOT_NEGATIVE)
    beta1: float = field(default=0.9, metadata=BELOW_ONE)
    beta2: float = field(default=0.999, metadata=BELOW_ONE)
    epsilon: float = field(default=1e-8, metadata=POSITIVE)
    warmup_steps: int = field(default=500, metadata=NOT_NEGATIVE)
    batch_size: int = field(default=16, metadata=AT_LEAST_ONE)
    accumulation: int = field(default=4, metadata=AT_LEAST_ONE)
    max_norm: float | None = field(default=1.0, metadata=_LIMIT)


@dataclass(frozen=True, kw_only=True)
class TokenMasking(Checked):
    """Which genes of a cell the model must recover, and what it sees in their place.

    Attributes
    ----------
    share
        Share of a cell's genes to recover; at least one gene if the cell has any.
    mask_share
        Share of these replaced by ``<mask>``.
    random_share
        Share of these replaced by a random gene. The rest stays visible.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1 (15 %); BERT (Devlin et al. 2019), section 3.1.
    """

    share: float = field(default=0.15, metadata=SHARE)
    mask_share: float = field(default=1.0, metadata=SHARE)
    random_share: float = field(default=0.0, metadata=SHARE)

    def __post_init__(self) -> None:
        """Check each share and their sum."""
        super().__post_init__()
        check_sum(self, "mask_share", "random_share")

    @classmethod
    def bert(cls) -> TokenMasking:
        """BERT's: 80 % ``<mask>``, 10 % a random gene, 10 % visible."""
        return cls(mask_share=0.8, random_share=0.1)


@dataclass(frozen=True, kw_only=True)
class SpatialMasking(Checked):
    """Which cells of a sub-slice are masked, moved and recovered.

    The slice token and the virtual cells are never changed.

    Attributes
    ----------
    masked
        Share of cells whose features are hidden and must be recovered.
    kept
        Share of cells whose features stay visible and must be recovered.
    moved
        Share of cells that are moved; their original distances to other cells must be recovered.
    kept_pairs
        Share of cells that stay in place and whose distances must be recovered.
    disjoint
        Put each cell in at most one of these groups. If False, the first two are drawn
        independently of the last two.
    noise_spacings
        Standard deviation of a move along each axis, in mean spacings of the sub-slice's cells,
        ``sqrt(width x height / n)``.
    mask_value
        Replaces hidden features: ``"learned"``, a trained vector, or a constant.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4. DISCREPANCY: the paper masks 10 % and moves 10 % of
    the cells, disjoint; the published code masks and moves 12 %, keeps 3 % of each, draws the
    two independently and writes -100 into masked features (:meth:`reference`).
    """

    masked: float = field(default=0.10, metadata=SHARE)
    kept: float = field(default=0.0, metadata=SHARE)
    moved: float = field(default=0.10, metadata=SHARE)
    kept_pairs: float = field(default=0.0, metadata=SHARE)
    disjoint: bool = True
    noise_spacings: float = field(default=5.0, metadata=NOT_NEGATIVE)
    mask_value: Literal["learned"] | float = field(default="learned", metadata=_FILLING)

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        super().__post_init__()
        groups = ("masked", "kept", "moved", "kept_pairs")
        for together in [groups] if self.disjoint else [groups[:2], groups[2:]]:
            check_sum(self, *together)

    @classmethod
    def reference(cls) -> SpatialMasking:
        """Settings of SToFM's published code."""
        return cls(
            masked=0.12, kept=0.03, moved=0.12, kept_pairs=0.03, disjoint=False, mask_value=-100.0
        )


@dataclass(frozen=True, kw_only=True)
class MaskedGeneConfig(Checked):
    """Masked gene modelling.

    Attributes
    ----------
    candidates
        Genes among which a hidden gene must be identified: ``"vocabulary"``, as in the paper, or
        ``"batch"``, those that occur in the batch. Genes outside a panel are never the answer, so
        ruling them out teaches the panel, not the cell; ``"batch"`` is also much faster.
    """

    candidates: Candidates = "vocabulary"


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(Checked):
    """Contrastive learning of cell embeddings.

    Attributes
    ----------
    temperature
        Divides the cosines.
    gene_dropout
        Share of genes left out of each of a cell's two views, besides dropout in the network, so
        that a smaller panel gives a similar embedding. 0 in the paper.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1; SimCSE (Gao et al. 2021), equation 4, temperature 0.05.
    """

    temperature: float = field(default=0.05, metadata=POSITIVE)
    gene_dropout: float = field(default=0.0, metadata=BELOW_ONE)


@dataclass(frozen=True, kw_only=True)
class LossWeights(Checked):
    """Weights of a stage's losses; a loss of weight 0 is not computed.

    Attributes
    ----------
    masked_genes, contrastive
        Losses of the cell encoder; the paper adds them up.
    masked_cells
        The paper's lambda, from 0 to 1: weight of masked cells. Pair distances have the weight
        1 - lambda.
    visible_cells
        Predicts a visible cell's own embedding from its hidden state.
    surroundings
        Predicts the mean embedding of the cells around a visible cell. Means vary less than single
        embeddings, so their squared errors are smaller.

    References
    ----------
    SToFM (arXiv 2507.11588), sections A.1 and 3.4. The published code states no lambda.
    DISCREPANCY: the paper has no loss at visible cells, where embeddings are read after training;
    the last two weights are 0 by default.
    """

    masked_genes: float = field(default=1.0, metadata=NOT_NEGATIVE)
    contrastive: float = field(default=1.0, metadata=NOT_NEGATIVE)
    masked_cells: float = field(default=0.5, metadata=SHARE)
    visible_cells: float = field(default=0.0, metadata=NOT_NEGATIVE)
    surroundings: float = field(default=0.0, metadata=NOT_NEGATIVE)

    @property
    def pair_distances(self) -> float:
        """Weight of the pairs' distances, 1 - lambda."""
        return 1.0 - self.masked_cells

    def above_zero(self, *names: str) -> dict[str, float]:
        """Return the weights of these losses that are above 0."""
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """How all stages of a run are trained.

    Attributes
    ----------
    seed
        Seed of order, masks, noise, dropout and the heads' initial weights.
    precision
        ``"32"``, ``"bf16-mixed"`` or (CUDA) ``"16-mixed"``; weights are always float32.
    keep
        Weights passed on to the next stage and the result: ``"best"`` on the held-out slices (the
        last if there are none) or ``"last"``.
    validate_every
        Optimiser steps between validations; None: at the end of each epoch.
    patience
        Stop a stage after so many validations without a lower loss; None: never.
    checkpoint_every
        Optimiser steps between checkpoints, besides the one at the end of a stage; None: every 10
        minutes.
    log_every
        Optimiser steps averaged in a row of the history.
    n_threads
        Threads that load batches in advance; 0 loads them between steps. The result does not
        change.
    tensorboard
        Also write TensorBoard files.
    mixture
        Weights of slices by a column of the corpus' manifest and a value there, such as
        ``{"technology": {"Visium": 0.2}, "species": {"mouse": 0.5}}``; 1 if not given. A slice's
        weight is the product of those that apply. An epoch takes all samples of the slices with the
        largest weight, and a proportional share of the others, drawn again for each epoch.
    """

    seed: int = field(default=0, metadata=SEED)
    precision: Precision = "32"
    keep: Keep = "best"
    validate_every: int | None = field(default=None, metadata=AT_LEAST_ONE)
    patience: int | None = field(default=None, metadata=AT_LEAST_ONE)
    checkpoint_every: int | None = field(default=None, metadata=AT_LEAST_ONE)
    log_every: int = field(default=10, metadata=AT_LEAST_ONE)
    n_threads: int = field(default=2, metadata=NOT_NEGATIVE)
    tensorboard: bool = False
    mixture: dict[str, dict[str, float]] = field(default_factory=dict, metadata=_MIXTURE)

    def settings(self) -> dict[str, Any]:
        """Return the entries that affect the trained weights."""
        names = ("seed", "precision", "keep", "validate_every", "patience")
        found = {name: getattr(self, name) for name in names}
        return found | ({"mixture": self.mixture} if self.mixture else {})


@dataclass(frozen=True, kw_only=True)
class StageConfig(Checked):
    """One stage of training.

    Attributes
    ----------
    name
        ``"cell_encoder"`` (samples are cells), ``"spatial"`` (samples are sub-slices, the cell
        encoder is frozen) or ``"joint"`` (samples are sub-slices, everything is trained).
    epochs
        Passes over the training slices.
    max_steps
        Optimiser steps after which the stage ends and its schedule with it; None: all epochs.
    optimizer
        Optimiser, batch size and schedule.
    weights
        Weights of the losses.
    masking, masked_genes, contrastive
        Options of the cell encoder's losses.
    spatial_masking, cell_loss
        Options of the losses on sub-slices.
    distance_unit
        Unit, in model units (a slice's diagonal is 100), in which predicted and true distances are
        compared; 1 in the paper. With 10, squared errors of distances and of cell embeddings are of
        similar size, so that their weights are comparable.
    surrounding_cells
        Nearest cells averaged for the surroundings loss.
    subslice_cells
        Cells per training sub-slice; None: as in the model's rules.
    vary_subslices
        Cut the slices at a new angle in every epoch; the paper does not.
    virtual_cells
        Add virtual cells to the sub-slices.
    sampled_cells
        Joint stage: cells per sub-slice that are encoded again, with gradients.
    refresh_every
        Joint stage: optimiser steps between updates of all other cells' embeddings; None: never.
    """

    name: StageName
    epochs: int = field(default=1, metadata=AT_LEAST_ONE)
    max_steps: int | None = field(default=None, metadata=AT_LEAST_ONE)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    masking: TokenMasking = field(default_factory=TokenMasking)
    masked_genes: MaskedGeneConfig = field(default_factory=MaskedGeneConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    spatial_masking: SpatialMasking = field(default_factory=SpatialMasking)
    cell_loss: CellLoss = "mse"
    distance_unit: float = field(default=1.0, metadata=POSITIVE)
    surrounding_cells: int = field(default=10, metadata=AT_LEAST_ONE)
    subslice_cells: int | None = field(default=None, metadata=AT_LEAST_ONE)
    vary_subslices: bool = False
    virtual_cells: bool = True
    sampled_cells: int = field(default=12, metadata=AT_LEAST_ONE)
    refresh_every: int | None = field(default=None, metadata=AT_LEAST_ONE)

    @property
    def n_surrounding(self) -> int:
        """Cells averaged around each visible cell; 0 without a loss at visible cells."""
        is_asked = self.weights.visible_cells > 0 or self.weights.surroundings > 0
        return self.surrounding_cells if is_asked else 0
