"""The head that turns representations of cells into classes, proportions or values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stofm._config import BELOW_ONE, Checked, must

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

#: A column that varies by no more than this share of its largest value is constant, up to rounding.
ROUNDING = 1e-6
_SIZES = must("be at least 1", lambda size: np.min(size, initial=1) >= 1)


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Checked):
    """Sizes of a :class:`PredictionHead`.

    Attributes
    ----------
    d_input
        Columns of the representation.
    d_output
        Classes, cell types or genes.
    widths
        Units of the hidden layers: two, or none for a linear head.
    dropout
        Share of hidden units that training drops.
    """

    d_input: int = field(metadata=_SIZES)
    d_output: int = field(metadata=_SIZES)
    widths: tuple[int, ...] = field(default=(256, 128), metadata=_SIZES)
    dropout: float = field(default=0.3, metadata=BELOW_ONE)

    def __post_init__(self) -> None:
        """Check each value; lists become tuples."""
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) not in (0, 2):
            raise ValueError(f"widths must name two hidden layers or none, found {self.widths}.")
        super().__post_init__()


class PredictionHead(nn.Module):
    """Three fully connected layers with LeakyReLU between them, or a single one.

    Inputs are centred and scaled first, with numbers that :meth:`fit_inputs` takes from the
    training part.

    Parameters
    ----------
    config
        Sizes.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        #: Numbers subtracted from the inputs, and numbers they are divided by, (d_input,).
        self.register_buffer("input_mean", torch.zeros(config.d_input))
        self.register_buffer("input_scale", torch.ones(config.d_input))
        layers: list[nn.Module] = []
        sizes = (config.d_input, *config.widths)
        for below, above in itertools.pairwise(sizes):
            layers += [nn.Linear(below, above), nn.LeakyReLU(), nn.Dropout(config.dropout)]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(sizes[-1], config.d_output)

    def fit_inputs(
        self, features: Float[Tensor, "n d_input"], widths: Sequence[int] | None = None
    ) -> None:
        """Take the mean of each column and the scale of each representation from the training part.

        All columns of a representation are scaled by the same number, so that principal components
        that hardly vary hardly count; the root of the mean of their variances becomes 1. `widths`
        is the number of columns of each, if there are several side by side.
        """
        variance, mean = torch.var_mean(features.double(), dim=0, correction=0)
        varies = variance.sqrt() > ROUNDING * features.abs().amax(dim=0)
        parts = torch.where(varies, variance, 0.0).split(list(widths or [len(variance)]))
        scale = torch.cat([part.mean().sqrt().expand_as(part) for part in parts])
        self.input_mean.copy_(mean)
        self.input_scale.copy_(torch.where(varies & (scale > 0), scale, 1.0))

    def forward(
        self,
        features: Float[Tensor, "n d_input"],
        columns: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "n d_output"]:
        """Compute raw outputs, before any softmax.

        Parameters
        ----------
        features
            Representations of cells, as they are stored.
        columns
            Outputs to compute; None for all.
        """
        hidden = self.hidden((features - self.input_mean) / self.input_scale)
        chosen = slice(None) if columns is None else columns
        return F.linear(hidden, self.last.weight[chosen], self.last.bias[chosen])
