"""The head that turns representations of cells into classes, proportions or values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

#: A column that varies by no more than this share of its largest value is constant but for rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
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

    d_input: int
    d_output: int
    widths: tuple[int, ...] = (256, 128)
    dropout: float = 0.3

    def __post_init__(self) -> None:
        """Check each value; lists become tuples."""
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) not in (0, 2):
            msg = f"widths must name two hidden layers or none, found {self.widths}."
            raise ValueError(msg)
        smallest = min(self.widths, default=1)
        sizes = {"d_input": self.d_input, "d_output": self.d_output, "widths": smallest}
        for name, value in sizes.items():
            if value < 1:
                msg = f"{name} must be at least 1, found {value}."
                raise ValueError(msg)
        if not 0 <= self.dropout < 1:
            msg = f"dropout must be from 0 to below 1, found {self.dropout}."
            raise ValueError(msg)


class PredictionHead(nn.Module):
    """Three fully connected layers with LeakyReLU between them, or a single one.

    Inputs are standardised first, by numbers that :meth:`fit_inputs` takes from the training part.

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
        #: What is taken off the inputs, and what they are divided by, (d_input,).
        self.register_buffer("input_mean", torch.zeros(config.d_input))
        self.register_buffer("input_scale", torch.ones(config.d_input))
        layers: list[nn.Module] = []
        sizes = (config.d_input, *config.widths)
        for below, above in itertools.pairwise(sizes):
            layers += [nn.Linear(below, above), nn.LeakyReLU(), nn.Dropout(config.dropout)]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(sizes[-1], config.d_output)

    def fit_inputs(self, features: Float[Tensor, "n d_input"]) -> None:
        """Take mean and standard deviation of each column from the training part."""
        scale, mean = torch.std_mean(features.double(), dim=0, correction=0)
        varies = scale > ROUNDING * features.abs().amax(dim=0)
        self.input_mean.copy_(mean)
        self.input_scale.copy_(torch.where(varies, scale, 1.0))

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
        if columns is None:
            outputs: Tensor = self.last(hidden)
            return outputs
        return F.linear(hidden, self.last.weight[columns], self.last.bias[columns])
