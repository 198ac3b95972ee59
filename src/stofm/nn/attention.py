"""Attention with a static pair bias from distances, and logits carried from layer to layer.

The logits of layer l are those of layer l - 1 plus q k / sqrt(d), that is ``bias + [q_1 .. q_l]
[k_1 .. k_l]^T / sqrt(d)``: the heads' queries and keys are concatenated, and the bias stays the
same. No pair matrix is carried along, and the bias is evaluated once for each distinct distance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

    from stofm.nn.batch import PairIndex


def biased_attention(
    queries: Float[Tensor, "batch heads nodes qk"],
    keys: Float[Tensor, "batch heads nodes qk"],
    values: Float[Tensor, "batch heads nodes d_head"],
    bias: Float[Tensor, "batch heads nodes nodes"],
    n_real: tuple[int, ...],
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads nodes d_head"]:
    """Compute ``softmax(queries keys^T + bias) values`` over the real nodes of each sub-slice.

    Queries are already divided by the square root of the head's width. On any device but the CPU,
    the bias must be -inf at padded keys. `n_real` is the number of real nodes of each sub-slice,
    and `dropout` the share of attention weights set to zero. The output at padding is arbitrary.
    """
    if queries.device.type == "mps":
        # Its fused kernel wants values as wide as the queries, which grow from layer to layer.
        weights = torch.softmax(queries @ keys.transpose(-1, -2) + bias, dim=-1)
        return torch.nn.functional.dropout(weights, dropout) @ values
    if queries.device.type != "cpu":
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
    attended: Tensor
    if torch.is_grad_enabled() or dropout > 0:
        parts = (queries, keys, values, bias, n_real, dropout)
        attended = _HeadwiseAttention.apply(*parts)  # type: ignore[no-untyped-call]
        return attended
    attended = torch.zeros_like(values)
    for head, weights in _weights_by_head(queries, keys, bias, n_real):
        attended[head] = weights @ values[head]
    return attended


def _weights_by_head(
    queries: Tensor, keys: Tensor, bias: Tensor, n_real: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int, slice], Tensor]]:
    """Index of each head's real nodes, and its attention weights.

    One head at a time: its logits (4 MB for 1,000 nodes) stay in the processor's cache, and padding
    is not computed.
    """
    for b, n in enumerate(n_real):
        for h in range(queries.shape[1]):
            head = (b, h, slice(n))
            logits = torch.addmm(bias[b, h, :n, :n], queries[head], keys[head].T)
            yield head, torch.softmax(logits, dim=-1)


class _HeadwiseAttention(torch.autograd.Function):
    """The same, with a gradient that keeps one dense matrix of weights per head and no other."""

    # Under autocast the backward pass would see other types than the forward pass kept.
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        n_real: tuple[int, ...],
        dropout: float,
    ) -> Tensor:
        attended = torch.zeros_like(values)
        kept_weights: list[Tensor] = []
        kept_masks: list[Tensor] = []
        for head, weights in _weights_by_head(queries, keys, bias, n_real):
            kept_weights.append(weights)
            if dropout > 0:
                kept_masks.append(torch.rand_like(weights) >= dropout)
                weights = weights * kept_masks[-1] / (1.0 - dropout)
            attended[head] = weights @ values[head]
        ctx.save_for_backward(queries, keys, values, *kept_weights, *kept_masks)
        ctx.n_real, ctx.dropout, ctx.bias_shape = n_real, dropout, bias.shape
        return attended

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        n_heads = queries.shape[1]
        heads = [(b, h, slice(n)) for b, n in enumerate(ctx.n_real) for h in range(n_heads)]
        masks = kept[len(heads) :]
        grad_q, grad_k = torch.zeros_like(queries), torch.zeros_like(keys)
        grad_v = torch.zeros_like(values)
        grad_bias = queries.new_zeros(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        for at, head in enumerate(heads):
            grad, used = gradients[0][head], kept[at]
            grad_weights = grad @ values[head].T
            if masks:
                keep = masks[at] / (1.0 - ctx.dropout)
                used = used * keep
                grad_weights *= keep
            grad_v[head] = used.T @ grad
            # d softmax: w (g - sum_j w g).
            mean = (grad_weights * kept[at]).sum(-1, keepdim=True)
            grad_logits = grad_weights.sub_(mean).mul_(kept[at])
            grad_q[head] = grad_logits @ keys[head]
            grad_k[head] = grad_logits.T @ queries[head]
            if grad_bias is not None:
                grad_bias[(*head, head[2])] = grad_logits
        return grad_q, grad_k, grad_v, grad_bias, None, None


#: The curve that :meth:`GaussianDistanceBias.favor_near` fits: its range and step (model units), a
#: distance that stands for all larger ones, and the bias that amounts to no attention.
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
        units (a slice's diagonal is 100), but not below -6; those of the others become 0. Only
        the last linear map changes; it is the least-squares fit to these curves.
        """
        near = torch.linspace(0.0, _FIT_UP_TO, _FIT_POINTS)
        distances = torch.cat([near, torch.full((_FIT_POINTS // 4,), _FAR)])
        n_heads = self.output.out_features
        wanted = torch.zeros(len(distances), n_heads, dtype=torch.float64)
        reaches = torch.logspace(0.0, math.log10(4.0), n_heads - n_heads // 4)
        for head, reach in enumerate(reaches.tolist()):
            wanted[:, head] = (-(distances**2) / (2 * reach**2)).clamp(min=_LOWEST_BIAS)
        hidden = self._hidden(distances.to(self.means.device)).cpu().double()
        design = nn.functional.pad(hidden, (0, 1), value=1.0)
        ridge = _RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
        fitted = torch.linalg.solve(design.T @ design + ridge, design.T @ wanted)
        self.output.weight.copy_(fitted[:-1].T)
        self.output.bias.copy_(fitted[-1])

    def forward(self, distances: Float[Tensor, " pairs"]) -> Float[Tensor, "pairs heads"]:
        """Evaluate the bias of each distance, in the precision of the weights."""
        # Distances up to 100 need more than bfloat16's three digits.
        with torch.autocast(distances.device.type, enabled=False):
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
    """Write the biases of listed pairs, and the constant of all others, into one dense matrix.

    Autograd would keep and copy several dense matrices for the same gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, constant: Tensor, pairs: PairIndex) -> Tensor:
        ctx.pairs = pairs
        n_heads, n_nodes = len(constant), pairs.n_nodes
        dense = constant.view(1, n_heads, 1, 1).repeat(pairs.n_batch, 1, n_nodes, n_nodes)
        dense[:, :, 0, :] = 0.0
        dense[:, :, :, 0] = 0.0
        dense.diagonal(dim1=-2, dim2=-1).zero_()
        by_head = values.T.contiguous()
        for own, n, (start, stop) in zip(dense, pairs.n_real, pairs.ranges, strict=True):
            for places in (pairs.forward[start:stop], pairs.mirrored[start:stop]):
                flat = own.view(n_heads, n_nodes * n_nodes)
                flat.scatter_(1, places.expand(n_heads, -1), by_head[:, start:stop])
            own[:, :, n:] = 0.0
            own[:, n:, :] = 0.0
        return dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pairs: PairIndex = ctx.pairs
        n_heads = gradients[0].shape[1]
        total, parts = gradients[0].new_zeros(n_heads), []
        for own, n, (start, stop) in zip(gradients[0], pairs.n_real, pairs.ranges, strict=True):
            flat = own.reshape(n_heads, pairs.n_nodes**2)
            listed = flat.index_select(1, pairs.forward[start:stop])
            listed += flat.index_select(1, pairs.mirrored[start:stop])
            parts.append(listed)
            inner = own[:, 1:n, 1:n]
            diagonal = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
            total += inner.sum((-2, -1)) - diagonal - listed.sum(-1)
        return torch.cat(parts, dim=1).T, total, None


def scatter_pairs(
    values: Float[Tensor, "pairs heads"],
    constant: Float[Tensor, " heads"],
    pairs: PairIndex,
) -> Float[Tensor, "batch heads nodes nodes"]:
    """Spread biases over the dense matrix that attention adds.

    Those of the listed pairs count in both directions, `constant` at all other pairs of distinct nodes
    ("not a neighbour"); 0 stands on the diagonal, for the slice token and for padding.
    """
    dense: Tensor = _ScatterPairs.apply(values, constant, pairs)  # type: ignore[no-untyped-call]
    return dense
