"""Sub-slices with what is known of their cells, as inputs of fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from stofm.train.config import OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Int
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.heads.targets import Targets
    from stofm.train.masked_cells import MaskedSubSliceBatch
    from stofm.train.samples import SubSliceSamples
#: What is changed: low-rank changes that are added to the weights at the end, or the weights.
TuningStrategy = Literal["lora", "full"]


@dataclass(frozen=True)
class FineTuningBatch:
    """Input of :class:`~stofm.heads.tuning_stage.FineTuningObjective`.

    Attributes
    ----------
    cells
        The sub-slices with kept embeddings at all cells, nothing hidden and nothing moved, and
        the tokens of the cells that are embedded anew.
    places
        (n_targets,) nodes whose targets count, counted through the padded sub-slices.
    targets
        Their targets, a row for each.
    """

    cells: MaskedSubSliceBatch
    places: Int[Tensor, " targets"]
    targets: Tensor

    @property
    def n_cells(self) -> int:
        """Number of cells of the sub-slices."""
        return self.cells.n_cells

    @property
    def n_tokens(self) -> int:
        """Number of nodes, and of tokens of the cells that are embedded anew."""
        return self.cells.n_tokens

    def to(self, device: torch.device | str) -> FineTuningBatch:
        """Return a copy on `device`."""
        return FineTuningBatch(
            cells=self.cells.to(device),
            places=self.places.to(device),
            targets=self.targets.to(device),
        )


@dataclass(frozen=True, eq=False)
class KnownCells:
    """Which cells of a corpus have a target that counts, and which.

    Attributes
    ----------
    targets
        Of all cells that the user gave.
    rows
        For each slice of the corpus, the row in `targets` of each of its cells.
    counts
        (n_targets,) whether a row counts: it is of the right part and its target is known.
    """

    targets: Targets
    rows: Sequence[NDArray[np.int64]]
    counts: NDArray[np.bool_]


class FineTuningSamples:
    """Sub-slices of a corpus with the targets of some of their cells. A sample is a sub-slice.

    Sub-slices without any target that counts are left out.

    Parameters
    ----------
    subslices
        The sub-slices, with nothing hidden and nothing moved.
    known
        Which targets count.
    before_epoch
        Called before the batches of an epoch are listed.
    """

    def __init__(
        self,
        subslices: SubSliceSamples,
        known: KnownCells,
        *,
        before_epoch: Callable[[], object] | None = None,
    ) -> None:
        self._subslices = subslices
        self._known = known
        self._before_epoch = before_epoch

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches that take each sub-slice with a target that counts once."""
        if self._before_epoch is not None:
            self._before_epoch()
        found = [
            np.array([s for s in batch.tolist() if self._is_known(s, number)], dtype=np.int64)
            for batch in self._subslices.epoch(number)
        ]
        return [batch for batch in found if len(batch)]

    def load(self, samples: NDArray[np.int64], epoch: int) -> FineTuningBatch:
        """Build some sub-slices, and read tokens and targets of their cells."""
        cells = self._subslices.load(samples, epoch)
        index = cells.subslices.cell_index.numpy()
        places, rows = [], []
        for b, number in enumerate(self._subslices.slices_of(samples)):
            nodes = np.flatnonzero(index[b] >= 0)
            own = self._known.rows[number][index[b][nodes]]
            counts = self._known.counts[own]
            places.append(b * index.shape[1] + nodes[counts])
            rows.append(own[counts])
        return FineTuningBatch(
            cells=cells,
            places=torch.from_numpy(np.concatenate(places)),
            targets=self._known.targets.take(np.concatenate(rows)),
        )

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that sub-slices come from."""
        return self._subslices.describe(samples)

    def _is_known(self, sample: int, epoch: int) -> bool:
        number = int(self._subslices.slices_of(np.array([sample]))[0])
        cells = self._subslices.cells_of(sample, epoch)
        return bool(self._known.counts[self._known.rows[number][cells]].any())


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """How a model is tuned together with a head.

    Attributes
    ----------
    learning_rate
        Largest learning rate, of model and head.
    weight_decay
        Of AdamW; for matrices only.
    warmup_steps
        Optimiser steps over which the learning rate rises; then it falls linearly to 0.
    batch_size
        Sub-slices of an optimiser step.
    epochs, min_steps
        Passes over the sub-slices; more of them if these would be fewer than `min_steps` steps.
        Rounded up to a whole number of validations.
    validate_every
        Optimiser steps between validations, or those of an epoch if these are more. All cells are
        embedded anew before each.
    patience
        Validations without a lower loss after which tuning stops.
    sampled_cells
        Cells of a sub-slice that go through the cell encoder in a step, with gradients.
    vary_subslices
        Cut the slices anew in every epoch, at another angle.
    lora_rank, lora_alpha
        ``"lora"``: rank of the changes, and their scale times the rank.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 10
    batch_size: int = 1
    epochs: int = 10
    min_steps: int = 100
    validate_every: int = 10
    patience: int = 5
    sampled_cells: int = 32
    vary_subslices: bool = True
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        """Check each value."""
        counts = ("epochs", "min_steps", "validate_every", "patience", "sampled_cells", "lora_rank")
        for name in counts:
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, found {getattr(self, name)}."
                raise ValueError(msg)
        if not 0 < self.lora_alpha < math.inf:
            msg = f"lora_alpha must be positive and finite, found {self.lora_alpha}."
            raise ValueError(msg)
        _ = self.optimizer

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimiser, batch and schedule."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            batch_size=self.batch_size,
            accumulation=1,
        )
