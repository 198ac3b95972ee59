"""The three losses, which pairs they leave out, and how well partners are found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stofm.train.objectives import LossPart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.align.config import Negatives
    from stofm.align.network import AlignNetwork
    from stofm.train.objectives import Gather

#: Similarities are multiplied with no more, as in CLIP.
_MOST: Final = math.log(100.0)
#: Coordinates in whole pixels put niches that touch a little nearer or farther.
_TIE: Final = 0.05
_ROWS_AT_ONCE: Final = 1024


@dataclass(frozen=True, eq=False)
class AlignBatch:
    """Features of a batch of spots by branch, (batch, d), and where each is.

    `where` (batch, 4): x and y in sides of a niche, the number of the slide, and of the cluster.
    """

    features: dict[str, Tensor]
    where: Tensor

    @property
    def n_cells(self) -> int:
        """Spots."""
        return len(self.where)

    #: What the history counts beside cells.
    n_tokens = n_cells

    def to(self, device: torch.device) -> AlignBatch:
        """The batch on a device."""
        moved = {name: one.to(device) for name, one in self.features.items()}
        return AlignBatch(moved, self.where.to(device))


def may_be_negative(
    own: Float[Tensor, "batch 4"], others: Float[Tensor, "others 4"], negatives: Negatives
) -> Bool[Tensor, "batch others"]:
    """Which pairs of spots count as negatives.

    Niches overlap if the middles of two spots of a slide are no farther apart than a side.
    """
    if negatives == "other_clusters":
        return own[:, None, 3] != others[None, :, 3]
    if negatives == "all":
        return torch.ones(len(own), len(others), dtype=torch.bool, device=own.device)
    # Not by the matrix product, which is not exact where spots are near.
    how = "donot_use_mm_for_euclid_dist"
    is_near = torch.cdist(own[:, :2], others[:, :2], compute_mode=how) <= 1 + _TIE
    return ~(is_near & (own[:, None, 2] == others[None, :, 2]))


def info_nce(
    queries: Float[Tensor, "batch d"],
    keys: Float[Tensor, "others d"],
    is_negative: Bool[Tensor, "batch others"],
    scale: Tensor,
    start: int = 0,
) -> Tensor:
    """``-log(exp(s q_i.k_i) / (exp(s q_i.k_i) + sum_j exp(s q_i.k_j)))`` summed over i.

    j runs over the negatives of i; the partner of the first query is the key number `start`.
    """
    answers = start + torch.arange(len(queries), device=queries.device)
    is_partner = F.one_hot(answers, len(keys)).bool()
    logits = (scale * (queries @ keys.T)).masked_fill(~(is_negative | is_partner), -math.inf)
    return F.cross_entropy(logits, answers, reduction="sum")


class AlignObjective(nn.Module):
    """Image against genes of spots and of niches, and fused spots against their fused niches."""

    def __init__(self, network: AlignNetwork) -> None:
        super().__init__()
        self.network = network
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = {name: one for name, one in network.options.weights.items() if one}

    def forward(self, inputs: AlignBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the losses of a batch; `gather` collects rows from all processes."""
        found, options = self.network(inputs.features), self.network.options
        pairs = {name: (level.image, level.genes) for name, level in found.items()}
        pairs["scales"] = found["spot"].fused, found["niche"].fused
        where, start = (inputs.where, 0) if gather is None else gather(inputs.where)
        is_negative = may_be_negative(inputs.where, where, options.negatives)
        parts = {}
        for name in self.weights:
            scale = self.network.log_scales[name].clamp(max=_MOST).exp()
            ways = [pairs[name], pairs[name][::-1]] if options.symmetric else [pairs[name]]
            totals = []
            for queries, own in ways:
                keys = own if gather is None else gather(own)[0]
                totals.append(info_nce(queries, keys, is_negative, scale, start))
            parts[name] = LossPart(torch.stack(totals).mean(), len(inputs.where))
        return parts


def retrieval_ranks(
    queries: NDArray[np.floating[Any]], keys: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    """Rank from 1 of each query's partner among all keys, (n,); keys as near as it count half."""
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(queries)))
        found = queries[rows] @ keys.T
        own = found[np.arange(len(rows)), rows][:, None]
        ties = (found == own).sum(axis=1) - 1
        ranks[rows] = 1 + (found > own).sum(axis=1) + (ties + 1) // 2
    return ranks
