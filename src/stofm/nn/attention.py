"""Attention with a static pair bias, and logits carried from layer to layer without a pair matrix.

The logits of layer l are those of layer l - 1 plus q k / sqrt(d), that is
``bias + [q_1 .. q_l] [k_1 .. k_l]^T / sqrt(d)``: the heads' queries and keys are laid side by
side, and the bias stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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

    Parameters
    ----------
    queries
        Already divided by the square root of the head's width.
    keys, values
        As usual.
    bias
        Added to the logits. Elsewhere than on the CPU it must hold -inf at padded keys.
    n_real
        Number of real nodes of each sub-slice; the rest is padding.
    dropout
        Share of attention weights set to zero.

    Returns
    -------
    Values of real nodes are right; those of padding are arbitrary.
    """
    if queries.device.type == "mps":
        # Its fused kernel wants values as wide as the queries, which grow from layer to layer.
        weights = torch.softmax(queries @ keys.transpose(-1, -2) + bias, dim=-1)
        return torch.nn.functional.dropout(weights, dropout) @ values
    if queries.device.type != "cpu":
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
    if torch.is_grad_enabled() or dropout > 0:
        attended: Tensor = _HeadwiseAttention.apply(  # type: ignore[no-untyped-call]
            queries, keys, values, bias, n_real, dropout
        )
        return attended
    return _attend(queries, keys, values, bias, n_real)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, n_real: tuple[int, ...]
) -> Tensor:
    # A head at a time: its logits (4 MB for 1,000 nodes) stay in the processor's cache, and
    # there is no padding to compute.
    attended = torch.zeros_like(values)
    for b, n in enumerate(n_real):
        for h in range(queries.shape[1]):
            logits = torch.addmm(bias[b, h, :n, :n], queries[b, h, :n], keys[b, h, :n].T)
            weights = torch.softmax(logits, dim=-1)
            attended[b, h, :n] = weights @ values[b, h, :n]
    return attended


class _HeadwiseAttention(torch.autograd.Function):
    """The same with a gradient that keeps one matrix of weights a head, and nothing else dense."""

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
        for b, n in enumerate(n_real):
            for h in range(queries.shape[1]):
                logits = torch.addmm(bias[b, h, :n, :n], queries[b, h, :n], keys[b, h, :n].T)
                weights = torch.softmax(logits, dim=-1)
                kept_weights.append(weights)
                if dropout > 0:
                    kept_masks.append(torch.rand_like(weights) >= dropout)
                    weights = weights * kept_masks[-1] / (1.0 - dropout)
                attended[b, h, :n] = weights @ values[b, h, :n]
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
        masks = kept[len(ctx.n_real) * n_heads :]
        grad_q, grad_k = torch.zeros_like(queries), torch.zeros_like(keys)
        grad_v = torch.zeros_like(values)
        grad_bias = queries.new_zeros(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        for b, n in enumerate(ctx.n_real):
            for h in range(n_heads):
                at = b * n_heads + h
                grad = gradients[0][b, h, :n]
                weights = kept[at]
                grad_weights = grad @ values[b, h, :n].T
                used = weights
                if masks:
                    keep = masks[at] / (1.0 - ctx.dropout)
                    used = weights * keep
                    grad_weights *= keep
                grad_v[b, h, :n] = used.T @ grad
                # d softmax: w (g - sum_j w g).
                mean = (grad_weights * weights).sum(-1, keepdim=True)
                grad_logits = grad_weights.sub_(mean).mul_(weights)
                grad_q[b, h, :n] = grad_logits @ keys[b, h, :n]
                grad_k[b, h, :n] = grad_logits.T @ queries[b, h, :n]
                if grad_bias is not None:
                    grad_bias[b, h, :n, :n] = grad_logits
        return grad_q, grad_k, grad_v, grad_bias, None, None


def gather_logits(
    queries: Float[Tensor, "batch heads nodes qk"],
    keys: Float[Tensor, "batch heads nodes qk"],
    bias: Float[Tensor, "batch heads nodes nodes"],
    batch: Int[Tensor, " pairs"],
    rows: Int[Tensor, " pairs"],
    columns: Int[Tensor, " pairs"],
) -> Float[Tensor, "pairs heads"]:
    """Compute logits at chosen pairs of nodes only.

    Parameters
    ----------
    queries, keys, bias
        As for :func:`biased_attention`.
    batch, rows, columns
        The sub-slice and the two nodes of each pair.
    """
    products = (queries[batch, :, rows] * keys[batch, :, columns]).sum(-1)
    return products + bias[batch, :, rows, columns]
