"""What the stages of a run do, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from stofm._config import check_seed
from stofm.train._checks import check_choice
from stofm.train.cell_masking import SpatialMasking
from stofm.train.gene_masking import TokenMasking
from stofm.train.losses import CellLoss, ContrastiveConfig, LossWeights, MaskedGeneConfig
from stofm.train.optimizer import OptimizerConfig

StageName = Literal["cell_encoder", "spatial", "joint"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
#: What is handed on from a stage: the weights with the lowest held-out loss, or the last ones.
Keep = Literal["best", "last"]


def _check_at_least_one(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, found {value}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
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

    seed: int = 0
    precision: Precision = "32"
    keep: Keep = "best"
    validate_every: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    n_threads: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check each value."""
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("keep", self.keep, get_args(Keep))
        _check_at_least_one(self, "validate_every", "patience", "checkpoint_every", "log_every")
        check_seed(self.seed)
        if self.n_threads < 0:
            msg = f"n_threads must not be negative, found {self.n_threads}."
            raise ValueError(msg)

    def settings(self) -> dict[str, Any]:
        """Entries that the trained weights depend on."""
        return {
            name: getattr(self, name)
            for name in ("seed", "precision", "keep", "validate_every", "patience")
        }


@dataclass(frozen=True, kw_only=True)
class StageConfig:
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
    epochs: int = 1
    max_steps: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    masking: TokenMasking = field(default_factory=TokenMasking)
    masked_genes: MaskedGeneConfig = field(default_factory=MaskedGeneConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    spatial_masking: SpatialMasking = field(default_factory=SpatialMasking)
    cell_loss: CellLoss = "mse"
    distance_unit: float = 1.0
    surrounding_cells: int = 10
    subslice_cells: int | None = None
    vary_subslices: bool = False
    virtual_cells: bool = True
    sampled_cells: int = 12
    refresh_every: int | None = None
    trains_masked_genes: bool = False

    def __post_init__(self) -> None:
        """Check each value."""
        check_choice("name", self.name, get_args(StageName))
        check_choice("cell_loss", self.cell_loss, get_args(CellLoss))
        _check_at_least_one(self, "epochs", "max_steps", "subslice_cells", "sampled_cells")
        _check_at_least_one(self, "refresh_every", "surrounding_cells")
        if not self.distance_unit > 0:
            msg = f"distance_unit must be positive, found {self.distance_unit}."
            raise ValueError(msg)

    @property
    def n_surrounding(self) -> int:
        """Cells around each that is not hidden, to be told from it; 0 if nothing is asked of it."""
        return self.surrounding_cells if self.weights.asks_visible_cells else 0

    def settings(self) -> dict[str, Any]:
        """Entries that the trained weights depend on: all."""
        return asdict(self)


def paper_schedule(
    *, epochs: tuple[int, int, int] = (1, 2, 1), optimizer: OptimizerConfig | None = None
) -> tuple[StageConfig, ...]:
    """The stages of the paper: cell encoder, SE(2) Transformer, both.

    Parameters
    ----------
    epochs
        Of each stage.
    optimizer
        Of all stages; table A.8's by default.

    References
    ----------
    SToFM (arXiv 2507.11588), section 4.1 and table A.8.
    """
    names: tuple[StageName, ...] = get_args(StageName)
    chosen = optimizer or OptimizerConfig()
    return tuple(
        StageConfig(name=name, epochs=n, optimizer=chosen)
        for name, n in zip(names, epochs, strict=True)
    )
