"""The network: projections on the unit sphere, and the fusion of image and genes at each level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Float
    from torch import Tensor

    from stofm.align.config import AlignOptions

#: Levels and modalities; a branch is one of each, such as ``"spot_image"``.
LEVELS: Final = ("spot", "niche")
MODALITIES: Final = ("image", "genes")


class Level(NamedTuple):
    """What the network tells of a level: unit vectors, (batch, d_model); None without its input.

    `fused` is for the loss across scales.
    """

    image: Tensor | None
    genes: Tensor | None
    fused: Tensor


class Projection(nn.Module):
    """Features to `n_tokens` tokens of the width `d_model`: a linear map, and two layers beside it."""

    def __init__(
        self, d_input: int, *, d_model: int, n_tokens: int, d_hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.linear = nn.Linear(d_input, n_tokens * d_model)
        self.layers = nn.Sequential(
            nn.LayerNorm(d_input),
            nn.Linear(d_input, d_hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, n_tokens * d_model),
        )

    def forward(
        self, features: Float[Tensor, "batch d_input"]
    ) -> Float[Tensor, "batch n_tokens d_model"]:
        """Project features."""
        projected: Tensor = self.linear(features) + self.layers(features)
        return projected.view(len(features), self.n_tokens, -1)


class Fusion(nn.Module):
    """One layer of attention over the tokens of image and genes, with residuals.

    A modality that is not there is a learnt null token in its place.
    """

    def __init__(self, *, d_model: int, n_tokens: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(2, n_tokens, d_model) * d_model**-0.5)
        self.kind = nn.Parameter(torch.zeros(2, 1, d_model))
        self.first, self.second = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = nn.MultiheadAttention(d_model, n_heads, dropout, batch_first=True)
        self.layers = nn.Sequential(
            nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model)
        )

    def forward(
        self,
        tokens: Float[Tensor, "batch 2 n_tokens d_model"],
        is_there: Bool[Tensor, "batch 2"],
    ) -> Float[Tensor, "batch d_model"]:
        """Fuse the tokens of both modalities, of which some are not there, to a unit vector."""
        known = torch.where(is_there[..., None, None], tokens, self.null) + self.kind
        x = known.flatten(1, 2)
        inner = self.first(x)
        x = x + self.attention(inner, inner, inner, need_weights=False)[0]
        x = x + self.layers(self.second(x))
        fused: Tensor = F.normalize(x.mean(dim=1), dim=1)
        return fused


class AlignNetwork(nn.Module):
    """Four projections, and a fusion at each level.

    `widths` are the columns that each branch reads, by its name.
    """

    def __init__(self, widths: Mapping[str, int], options: AlignOptions) -> None:
        super().__init__()
        self.widths, self.options = dict(widths), options
        sizes: dict[str, Any] = {"d_model": options.d_model, "n_tokens": options.n_tokens}
        hidden: dict[str, Any] = {"d_hidden": options.d_hidden, "dropout": options.dropout}
        self.projections = nn.ModuleDict(
            {name: Projection(width, **sizes, **hidden) for name, width in self.widths.items()}
        )
        self.fusions = nn.ModuleDict(
            {
                level: Fusion(**sizes, n_heads=options.n_heads, dropout=options.dropout)
                for level in LEVELS
            }
        )
        #: Logarithm of what similarities of each loss are multiplied with.
        self.log_scales = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.tensor(-math.log(options.temperature)),
                    requires_grad=options.learns_temperature,
                )
                for name in options.weights
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Level]:
        """Project and fuse features (batch, d) by the name of their branch, of one or both modalities.

        In training modalities are hidden from the fusion at random.
        """
        first = next(iter(features.values()))
        share, there = self.options.modality_dropout, [f"spot_{m}" in features for m in MODALITIES]
        is_there = torch.tensor(there, device=first.device).repeat(len(first), 1)
        found = {}
        for level in LEVELS:
            if self.training and share and all(there):
                # A spot and its niche lose what they lose each for itself.
                draw = torch.rand(len(first), 1, device=first.device)
                is_there = torch.cat([draw >= share, draw < 1 - share], dim=1)
            tokens = {
                name: self.projections[branch](features[branch])
                for name in MODALITIES
                if (branch := f"{level}_{name}") in features
            }
            null = torch.zeros_like(next(iter(tokens.values())))
            filled = torch.stack([tokens.get(name, null) for name in MODALITIES], dim=1)
            units = {name: F.normalize(one.mean(1), dim=1) for name, one in tokens.items()}
            fused = self.fusions[level](filled, is_there)
            found[level] = Level(units.get("image"), units.get("genes"), fused)
        return found
