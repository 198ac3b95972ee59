"""What the stages of a run do, as frozen dataclasses."""

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
#: What is handed on from a stage: the weights with the lowest held-out loss, or the last ones.
Keep = Literal["best", "last"]
Candidates = Literal["vocabulary", "batch"]
CellLoss = Literal["mse", "cosine"]
_LIMIT = must("be positive, or left out for no limit", lambda value: value > 0)
_FILLING = must(
    "be 'learned' or a finite number",
    lambda value: value == "learned" or (isinstance(value, float | int) and math.isfinite(value)),
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """How weights are changed; the defaults are the paper's.

    Attributes
    ----------
    learning_rate
        Largest learning rate, reached at the end of the warm-up.
    weight_decay
        Of AdamW; for matrices only, neither for biases and norms nor for embeddings.
    beta1, beta2, epsilon
        Of AdamW.
    warmup_steps
        Optimiser steps over which the learning rate rises linearly from 0; at most half of the
        stage. Then it falls linearly to 0 at the stage's last step.
    batch_size
        Samples of a batch (cells, or sub-slices) over all processes.
    accumulation
        Batches of an optimiser step.
    max_norm
        Norm to which larger gradients are scaled down; None for no limit.

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
    """Which genes of a cell are to be recovered, and what the model sees in their place.

    Attributes
    ----------
    share
        Share of a cell's genes to recover; at least one gene where the cell has any.
    mask_share
        Share of these that ``<mask>`` replaces.
    random_share
        Share of these that a random gene replaces. The rest stays visible.

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
    """What masked cell modelling and pairwise distance recovery change in a sub-slice.

    Slice token and virtual cells never change.

    Attributes
    ----------
    masked
        Share of the cells whose features are hidden and to be recovered.
    kept
        Share of the cells whose features stay visible and are to be recovered.
    moved
        Share of the cells that are moved; their distances to other cells are to be recovered.
    kept_pairs
        Share of the cells that stay in place and whose distances are to be recovered.
    disjoint
        No cell is in two of these groups. Otherwise the first two are drawn independently of the
        last two.
    noise_spacings
        Standard deviation of a move along each axis, in mean spacings of the sub-slice's cells,
        ``sqrt(width x height / n)``.
    mask_value
        What stands in place of hidden features: ``"learned"``, a vector that is trained along,
        or a number in every place.

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
        Genes among which the hidden one is to be found: ``"vocabulary"``, as in the paper, or
        ``"batch"``, the genes that occur in the batch: what a panel does not measure can't be the
        answer, and to learn that teaches panels, not cells. For panels this is also much faster.
    """

    candidates: Candidates = "vocabulary"


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(Checked):
    """Contrastive learning of cell embeddings.

    Attributes
    ----------
    temperature
        Cosines are divided by this.
    gene_dropout
        Share of a cell's genes that each of its two views leaves out, besides dropout in the
        network: a panel that measures fewer genes should place the cell alike. 0 in the paper.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1; SimCSE (Gao et al. 2021), equation 4, temperature 0.05.
    """

    temperature: float = field(default=0.05, metadata=POSITIVE)
    gene_dropout: float = field(default=0.0, metadata=BELOW_ONE)


@dataclass(frozen=True, kw_only=True)
class LossWeights(Checked):
    """Weights of the losses in a stage's loss; a loss of weight 0 is not computed.

    Attributes
    ----------
    masked_genes, contrastive
        Of the cell encoder's losses; the paper adds them up.
    masked_cells
        The paper's lambda, between 0 and 1: weight of the masked cells. The pairs' distances have
        the weight 1 - lambda.
    visible_cells
        Of telling, from a cell that is not hidden, its own embedding.
    surroundings
        Of telling, from a cell that is not hidden, the mean embedding of the cells around it. Such
        a mean varies less than an embedding does, and its squared errors are smaller.

    References
    ----------
    SToFM (arXiv 2507.11588), sections A.1 and 3.4. The published code states no lambda.
    DISCREPANCY: the paper has no loss at cells that are not hidden, where embeddings are read
    after training; the weights of these two are 0 by default.
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
        """Weights of some losses, as far as they are computed."""
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """How all stages of a run are trained.

    Attributes
    ----------
    seed
        Decides order, masks, noise, dropout and the heads' first weights.
    precision
        ``"32"``, ``"bf16-mixed"`` or (CUDA) ``"16-mixed"``; weights are float32 always.
    keep
        Weights that go on to the next stage and into the result: ``"best"`` on the held-out
        slices (the last, if there are none) or ``"last"``.
    validate_every
        Optimiser steps between validations; None: at the end of each epoch.
    patience
        Validations without a lower loss after which a stage stops; None: never.
    checkpoint_every
        Optimiser steps between checkpoints, besides that at the end of a stage; None: every 10
        minutes.
    log_every
        Optimiser steps that a row of the history is the mean of.
    n_threads
        Threads that load ahead; 0 loads between the steps. Does not change the result.
    tensorboard
        Write TensorBoard's files too.
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

    def settings(self) -> dict[str, Any]:
        """Entries that the trained weights depend on."""
        names = ("seed", "precision", "keep", "validate_every", "patience")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class StageConfig(Checked):
    """One stage of training.

    Attributes
    ----------
    name
        ``"cell_encoder"`` (samples are cells), ``"spatial"`` (sub-slices; the cell encoder is
        frozen) or ``"joint"`` (sub-slices; all is trained).
    epochs
        Passes over the training slices.
    max_steps
        Optimiser steps after which the stage ends, and to which its schedule is fitted; None for
        all of the epochs.
    optimizer
        Optimiser, batch and schedule.
    weights
        Of the losses.
    masking, masked_genes, contrastive
        Options of the cell encoder's losses; the joint stage has the first two, if
        `trains_masked_genes`.
    spatial_masking, cell_loss
        Options of the losses on sub-slices.
    distance_unit
        Model units (a slice's diagonal is 100) in which predicted and true distances are
        compared; 1 in the paper. With 10, a squared error of distances is of the size of one of
        cell embeddings, and the weights between them mean what they say.
    surrounding_cells
        Nearest cells of the sub-slice whose mean embedding is to be told, where the weights ask
        for surroundings.
    subslice_cells
        Cells of a training sub-slice; None for the model's rule.
    vary_subslices
        Cut the slices anew in every epoch, at another angle; the paper does not.
    virtual_cells
        Put virtual cells into the sub-slices.
    sampled_cells
        Joint: cells of a sub-slice that go through the cell encoder again, with gradients.
    refresh_every
        Joint: optimiser steps after which all other cells' embeddings are computed anew; None for
        never.
    trains_masked_genes
        Joint: train masked genes of the sampled cells along.
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
    trains_masked_genes: bool = False

    @property
    def n_surrounding(self) -> int:
        """Cells around each that is not hidden, to be told from it; 0 if nothing is asked of it."""
        is_asked = self.weights.visible_cells > 0 or self.weights.surroundings > 0
        return self.surrounding_cells if is_asked else 0
