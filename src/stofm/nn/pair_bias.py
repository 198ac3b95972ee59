"""Distances to attention bias, evaluated only where distances differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

    from stofm.nn.batch import PairIndex

#: To which curve :meth:`GaussianDistanceBias.favor_near` fits: so far and so finely (model units), a
#: distance that stands for all beyond, and the bias that amounts to no attention.
_FIT_UP_TO, _FIT_POINTS, _FAR = 14.0, 281, 50.0
_LOWEST_BIAS = -6.0
_RIDGE = 1e-6


class GaussianDistanceBias(nn.Module):
    """One bias per attention head from a distance, by a learned mixture of Gaussians.

    With x = w d + b, Gaussians of mean m_k and width ``s_k = |sigma_k| + 1e-5``
    (normalised to unit area), followed by a linear map, ReLU and a linear map to the heads.

    Parameters
    ----------
    n_kernels
        Number of Gaussians.
    n_heads
        Number of attention heads.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.3, after Uni-Mol (Zhou et al. 2023).
    """

    def __init__(self, *, n_kernels: int, n_heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))
        self.means = nn.Parameter(torch.empty(n_kernels).uniform_(0.0, 3.0))
        self.widths = nn.Parameter(torch.empty(n_kernels).uniform_(0.0, 3.0))
        self.hidden = nn.Linear(n_kernels, n_kernels)
        self.output = nn.Linear(n_kernels, n_heads)

    @torch.no_grad()
    def favor_near(self) -> None:
        """Set the output weights so that attention falls with distance from the start.

        The biases of three heads in four become -d^2 / (2 r^2), with reaches r from 1 to 4 model
        units (a slice's diagonal is 100) and -6 at the least; those of the others become 0. Only
        the last linear map changes; it is the least-squares fit to these curves.
        """
        device, dtype = self.output.weight.device, self.output.weight.dtype
        near = torch.linspace(0.0, _FIT_UP_TO, _FIT_POINTS)
        far = torch.full((_FIT_POINTS // 4,), _FAR)
        distances = torch.cat([near, far])
        n_heads = self.output.out_features
        n_near = n_heads - n_heads // 4
        wanted = torch.zeros(len(distances), n_heads, dtype=torch.float64)
        for head, reach in enumerate(torch.logspace(0.0, math.log10(4.0), n_near).tolist()):
            wanted[:, head] = (-(distances**2) / (2 * reach**2)).clamp(min=_LOWEST_BIAS)
        hidden = self._hidden(distances.to(device)).cpu().double()
        design = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)
        ridge = _RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
        fitted = torch.linalg.solve(design.T @ design + ridge, design.T @ wanted)
        self.output.weight.copy_(fitted[:-1].T.to(device, dtype))
        self.output.bias.copy_(fitted[-1].to(device, dtype))

    def forward(self, distances: Float[Tensor, " pairs"]) -> Float[Tensor, "pairs heads"]:
        """Evaluate the bias of each distance, in the precision of the weights."""
        # Distances up to 100 need more than bfloat16's three digits.
        with torch.autocast(distances.device.type, enabled=False):
            return self._evaluate(distances)

    def _evaluate(self, distances: Tensor) -> Tensor:
        bias: Tensor = self.output(self._hidden(distances))
        return bias

    def _hidden(self, distances: Tensor) -> Tensor:
        width = self.widths.abs() + 1e-5
        x = self.scale * distances.to(self.means.dtype)[:, None] + self.shift
        # exp(-z^2 / 2) / (sqrt(2 pi) width), with the factor moved into the small vectors.
        z = (x - self.means) * (math.sqrt(0.5) / width)
        density = z.square_().neg_().exp_() if not torch.is_grad_enabled() else (-z * z).exp()
        weight = self.hidden.weight / (math.sqrt(2 * math.pi) * width)
        return torch.relu_(nn.functional.linear(density, weight, self.hidden.bias))


class _ScatterPairs(torch.autograd.Function):
    """Lay the biases of listed pairs and the constant of all others into one dense matrix.

    Autograd would keep and copy several dense matrices for the same gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, constant: Tensor, pairs: PairIndex) -> Tensor:
        ctx.pairs = pairs
        n_heads = len(constant)
        n_nodes = pairs.n_nodes
        dense = constant.view(1, n_heads, 1, 1).repeat(pairs.n_batch, 1, n_nodes, n_nodes)
        dense[:, :, 0, :] = 0.0
        dense[:, :, :, 0] = 0.0
        dense.diagonal(dim1=-2, dim2=-1).zero_()
        flat = dense.view(pairs.n_batch, n_heads, n_nodes * n_nodes)
        by_head = values.T.contiguous()
        for b, (start, stop) in enumerate(pairs.ranges):
            own = by_head[:, start:stop]
            for places in (pairs.forward[start:stop], pairs.mirrored[start:stop]):
                flat[b].scatter_(1, places.expand(n_heads, -1), own)
            dense[b, :, :, pairs.n_real[b] :] = 0.0
            dense[b, :, pairs.n_real[b] :, :] = 0.0
        return dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pairs: PairIndex = ctx.pairs
        (gradient,) = gradients
        n_batch, n_heads, n_nodes, _ = gradient.shape
        flat = gradient.reshape(n_batch, n_heads, n_nodes * n_nodes)
        parts = []
        total = gradient.new_zeros(n_heads)
        for b, (start, stop) in enumerate(pairs.ranges):
            listed = flat[b].index_select(1, pairs.forward[start:stop])
            listed += flat[b].index_select(1, pairs.mirrored[start:stop])
            parts.append(listed)
            n = pairs.n_real[b]
            inner = gradient[b, :, 1:n, 1:n]
            diagonal = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
            total += inner.sum((-2, -1)) - diagonal - listed.sum(-1)
        return torch.cat(parts, dim=1).T, total, None


def scatter_pairs(
    values: Float[Tensor, "pairs heads"],
    constant: Float[Tensor, " heads"],
    pairs: PairIndex,
) -> Float[Tensor, "batch heads nodes nodes"]:
    """Spread biases over the dense matrix that attention adds.

    Parameters
    ----------
    values
        Biases of the listed pairs, used in both directions.
    constant
        Bias of all other pairs of distinct nodes ("not a neighbour").
    pairs
        Where the listed pairs stand.

    Returns
    -------
    Biases; 0 on the diagonal, for the slice token and for padding.
    """
    dense: Tensor = _ScatterPairs.apply(values, constant, pairs)  # type: ignore[no-untyped-call]
    return dense
