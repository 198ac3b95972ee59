"""What the training loop asks of a stage, and of what it reports to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


class Samples(Protocol):
    """Samples of a stage, from the slices to train on or from those held out.

    A batch is a list of sample numbers; each process loads its share of one. What :meth:`load`
    returns depends on the samples and the epoch only, not on batch, process or thread.
    """

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches of an epoch; the same in every process."""
        ...

    def load(self, samples: NDArray[np.int64], epoch: int) -> Any:
        """Inputs of the objective, with a method ``to(device)``; called from threads."""
        ...

    def n_cells(self, inputs: Any) -> int:
        """Number of cells of the inputs."""
        ...

    def n_tokens(self, inputs: Any) -> int:
        """Number of tokens, or of nodes, that go through the network."""
        ...

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that samples come from, for messages."""
        ...


class Stage(Samples, Protocol):
    """A stage of training: samples to train on, an objective, samples to validate on.

    Attributes
    ----------
    name
        Such as ``"spatial"``; in the history.
    number
        Of the stage in the run; part of every seed.
    objective
        Module whose ``forward(inputs, gather)`` returns a
        :class:`~stofm.train.objectives.LossPart` for each name in its attribute ``weights``, and
        whose ``count_operations(inputs)`` estimates the floating-point operations of that.
    validation
        Held-out samples, loaded with the draws of epoch 0; None if there are none.
    refresh_every
        Optimiser steps after which :meth:`refresh` is called; None for never.
    epochs_differ_in_length
        Whether the number of batches may differ between epochs.
    """

    name: str
    number: int
    objective: nn.Module
    validation: Samples | None
    refresh_every: int | None

    @property
    def epochs_differ_in_length(self) -> bool:
        """Whether the number of batches may differ between epochs."""
        ...

    def refresh(self) -> None:
        """Compute anew what is kept of the model's output; called by all processes at once."""
        ...

    def state(self) -> dict[str, str]:
        """What must be known besides the weights to go on exactly here; JSON can hold it."""
        ...

    def restore(self, state: Mapping[str, str]) -> None:
        """Go back to what :meth:`state` returned."""
        ...


class Recorder(Protocol):
    """Where the loop reports to."""

    @property
    def newest(self) -> Path | None:
        """The run's newest checkpoint; None if there is none."""
        ...

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a row of the history."""
        ...

    def advance(self) -> None:
        """One more optimiser step is done."""
        ...

    def keep(self) -> None:
        """Take the present weights as the best so far."""
        ...

    def save(self) -> None:
        """Write a checkpoint; processes may call it at different steps, but all at the end."""
        ...
