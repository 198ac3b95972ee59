"""The losses of pretraining, each as a sum and a count.

Several processes that each hold a part of a batch can so divide by the count of all: the loss and
its gradient are then those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from stofm.train._checks import check_choice, check_shares

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int

    from stofm.nn import CellEncoder
    from stofm.train.heads import MaskedGeneHead
    from stofm.train.inputs import MaskedGenes

Candidates = Literal["vocabulary", "batch"]
CellLoss = Literal["mse", "cosine"]


class Gather(Protocol):
    """Puts the rows of all processes together; gradients find their way back."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        """Gather (n, d) rows, where n may differ between processes, and say where one's own begin."""
        ...


@dataclass(frozen=True, eq=False)
class LossPart:
    """One loss over what a process holds of a batch; the loss is `total` / `count`.

    Attributes
    ----------
    total
        Scalar with gradient, 0 where there is nothing to recover.
    count
        Number of genes, cells or pairs in the sum, or their weight.
    """

    total: Tensor
    count: float


@dataclass(frozen=True, kw_only=True)
class MaskedGeneConfig:
    """Masked gene modelling.

    Attributes
    ----------
    candidates
        Genes among which the hidden one is to be found: ``"vocabulary"``, as in the paper, or
        ``"batch"``, the genes that occur in the batch: what a panel does not measure can't be the
        answer, and to learn that teaches panels, not cells. For panels this is also much faster.
    """

    candidates: Candidates = "vocabulary"

    def __post_init__(self) -> None:
        """Check the value."""
        check_choice("candidates", self.candidates, get_args(Candidates))


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Contrastive learning of cell embeddings.

    Attributes
    ----------
    temperature
        Cosines are divided by this.
    gene_dropout
        Share of a cell's genes that each of its two views leaves out, besides dropout in the
        network: a panel that measures fewer genes should place the cell alike. 0 in the paper.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1; SimCSE (Gao et al. 2021), equation 4, temperature 0.05.
    """

    temperature: float = 0.05
    gene_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check each value."""
        if not self.temperature > 0:
            msg = f"temperature must be positive, found {self.temperature}."
            raise ValueError(msg)
        if not 0 <= self.gene_dropout < 1:
            msg = f"gene_dropout must be at least 0 and below 1, found {self.gene_dropout}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses in a stage's loss.

    Attributes
    ----------
    masked_genes, contrastive
        Of the cell encoder's losses; the paper adds them up. A loss of weight 0 is not computed.
    masked_cells
        The paper's lambda, between 0 and 1: weight of the masked cells. The pairs' distances have
        the weight 1 - lambda.
    visible_cells
        Of telling, from a cell that is not hidden, its own embedding.
    surroundings
        Of telling, from a cell that is not hidden, the mean embedding of the cells around it. Such
        a mean varies less than an embedding does, and its squared errors are smaller.

    References
    ----------
    SToFM (arXiv 2507.11588), sections A.1 and 3.4. The published code states no lambda.
    DISCREPANCY: the paper has no loss at cells that are not hidden, where embeddings are read
    after training; the weights of these two are 0 by default.
    """

    masked_genes: float = 1.0
    contrastive: float = 1.0
    masked_cells: float = 0.5
    visible_cells: float = 0.0
    surroundings: float = 0.0

    def __post_init__(self) -> None:
        """Check each weight."""
        check_shares(self, "masked_cells")
        for name in ("masked_genes", "contrastive", "visible_cells", "surroundings"):
            if not getattr(self, name) >= 0:
                msg = f"{name} must not be negative, found {getattr(self, name)}."
                raise ValueError(msg)

    @property
    def pair_distances(self) -> float:
        """Weight of the pairs' distances, 1 - lambda."""
        return 1.0 - self.masked_cells

    @property
    def asks_visible_cells(self) -> bool:
        """Whether anything is asked of cells that are not hidden."""
        return self.visible_cells > 0 or self.surroundings > 0


def positive(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of the losses that are computed: those above 0."""
    return {name: weight for name, weight in weights.items() if weight > 0}


def contrastive_loss(
    first: Float[Tensor, "cells d_cell"],
    second: Float[Tensor, "cells d_cell"],
    *,
    temperature: float,
    gather: Gather | None = None,
) -> LossPart:
    """Tell each cell's second view from those of all other cells, given its first.

    ``-log(exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t))``, summed over i; j runs over the
    cells of all processes. In float32 whatever the precision of training.

    Parameters
    ----------
    first, second
        Embeddings a and b of the same cells.
    temperature
        t.
    gather
        Collects b from all processes; None for one process.

    References
    ----------
    SimCSE (Gao et al. 2021), equation 4; SToFM (arXiv 2507.11588), section A.1.
    """
    with torch.autocast(first.device.type, enabled=False):
        queries = F.normalize(first.float(), dim=-1) / temperature
        own_keys = F.normalize(second.float(), dim=-1)
        keys, start = (own_keys, 0) if gather is None else gather(own_keys)
        answers = start + torch.arange(len(queries), device=queries.device)
        total = F.cross_entropy(queries @ keys.T, answers, reduction="sum")
    return LossPart(total, len(first))


def masked_gene_loss(
    encoder: CellEncoder,
    head: MaskedGeneHead,
    genes: MaskedGenes,
    *,
    candidates: Int[Tensor, " candidates"] | None = None,
) -> LossPart:
    """Cross-entropy of the hidden genes, summed over them.

    Parameters
    ----------
    encoder, head
        The cell encoder, and what scores genes from its hidden states.
    genes
        Cells with hidden genes.
    candidates
        Tokens among which the hidden ones are to be found, ascending
        (:func:`candidate_genes`); None for the whole vocabulary.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1; BERT (Devlin et al. 2019), section 3.1.
    """
    hidden = encoder.hidden_states(genes.tokens).flatten(0, 1)[genes.places]
    scores = head(hidden, encoder.words(candidates), candidates)
    answers = genes.labels
    if candidates is not None:
        answers = torch.searchsorted(candidates, answers)
    total = F.cross_entropy(scores.float(), answers, reduction="sum")
    return LossPart(total, len(genes.labels))


def candidate_genes(
    candidates: Candidates, measured: Int[Tensor, " genes"], gather: Gather | None = None
) -> Int[Tensor, " candidates"] | None:
    """Tokens among which hidden genes are to be found, ascending; None for the whole vocabulary.

    Parameters
    ----------
    candidates
        As in :class:`MaskedGeneConfig`.
    measured
        Tokens that occur in what this process holds of the batch.
    gather
        Collects those of the other processes; None for one process.
    """
    if candidates == "vocabulary":
        return None
    if gather is not None:
        measured = gather(measured[:, None])[0]
    distinct: Tensor = torch.unique(measured)
    return distinct


def masked_cell_loss(
    predicted: Float[Tensor, "cells d_cell"],
    target: Float[Tensor, "cells d_cell"],
    *,
    kind: CellLoss = "mse",
) -> LossPart:
    """Distance of predicted cell embeddings from the hidden ones, summed over the cells.

    Parameters
    ----------
    predicted, target
        Predicted and hidden embeddings.
    kind
        ``"mse"``: mean over the width of the squared difference, as in the paper. ``"cosine"``:
        1 - cosine, as in the published code, which scales predictions to unit length before.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """
    predicted, target = predicted.float(), target.float()
    if kind == "mse":
        total = (predicted - target).square().mean(dim=-1).sum()
    else:
        total = (1 - F.cosine_similarity(predicted, target, dim=-1)).sum()
    return LossPart(total, len(target))


def pair_distance_loss(
    predicted: Float[Tensor, " pairs"], target: Float[Tensor, " pairs"]
) -> LossPart:
    """Squared difference of predicted and true distances, model units squared, summed over pairs.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """
    return LossPart((predicted.float() - target.float()).square().sum(), len(target))
