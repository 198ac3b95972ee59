"""Which genes of a cell are hidden from the cell encoder, to be recovered or left out.

All random numbers come from generators that the caller makes, one per cell, so that what is
hidden depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stofm.nn import GeneBag, TokenBatch
from stofm.train._checks import check_shares, check_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenMasking:
    """Which genes of a cell are to be recovered, and what the model sees in their place.

    Attributes
    ----------
    share
        Share of a cell's genes to recover; at least one gene where the cell has any.
    mask_share
        Share of these that ``<mask>`` replaces.
    random_share
        Share of these that a random gene replaces. The rest stays visible.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1 (15 %); BERT (Devlin et al. 2019), section 3.1.
    """

    share: float = 0.15
    mask_share: float = 1.0
    random_share: float = 0.0

    def __post_init__(self) -> None:
        """Check each share and their sum."""
        check_shares(self, "share", "mask_share", "random_share")
        check_sum(self, "mask_share", "random_share")

    @classmethod
    def bert(cls) -> TokenMasking:
        """BERT's: 80 % ``<mask>``, 10 % a random gene, 10 % visible."""
        return cls(mask_share=0.8, random_share=0.1)


def mask_tokens(
    batch: TokenBatch,
    masking: TokenMasking,
    *,
    mask_token: int,
    gene_tokens: NDArray[np.integer],
    rngs: Sequence[Generator],
) -> tuple[TokenBatch, Tensor]:
    """Hide genes of cells.

    A gene that stands twice in a list (``duplicates="keep"``) is hidden at both places. A hidden
    gene's position and value stay; ``is_hidden`` takes it out of the sum over all genes.

    Parameters
    ----------
    batch
        Token lists, on the CPU; not changed.
    masking
        How much to hide.
    mask_token
        Token of ``<mask>``.
    gene_tokens
        Tokens from which random genes are taken.
    rngs
        One generator per cell.

    Returns
    -------
    The lists with genes hidden, and which positions are to be recovered (cells, length).

    Raises
    ------
    ValueError
        The generators are not as many as the cells, or there are no genes to take at random.
    """
    _check_generators(batch, rngs)
    if masking.random_share > 0 and not len(gene_tokens):
        msg = "random_share is positive but gene_tokens is empty; pass the vocabulary's tokens."
        raise ValueError(msg)
    genes = _DistinctGenes.of_lists(batch)
    replacement = genes.tokens.copy()
    is_chosen = np.zeros(len(genes.keys), dtype=bool)
    is_hidden = np.zeros(len(genes.keys), dtype=bool)
    for cell, rng in enumerate(rngs):
        n_genes = genes.n_of(cell)
        n_chosen = min(n_genes, max(1, round(masking.share * n_genes))) if masking.share else 0
        chosen = genes.starts[cell] + rng.permutation(n_genes)[:n_chosen]
        lot = rng.random(n_chosen)
        is_random = (lot >= masking.mask_share) & (lot < masking.mask_share + masking.random_share)
        replacement[chosen[lot < masking.mask_share]] = mask_token
        if is_random.any():
            replacement[chosen[is_random]] = rng.choice(gene_tokens, int(is_random.sum()))
        is_chosen[chosen] = True
        is_hidden[chosen] = lot < masking.mask_share + masking.random_share

    tokens = batch.tokens.numpy().copy()
    tokens[genes.at] = replacement[genes.gene_of_entry]
    masked = replace(
        batch,
        tokens=torch.from_numpy(tokens),
        is_hidden=genes.spread(is_hidden, tokens.shape),
    )
    return masked, genes.spread(is_chosen, tokens.shape)


def drop_genes(
    batch: TokenBatch, share: float, *, pad_token: int, rngs: Sequence[Generator]
) -> TokenBatch:
    """Leave out genes at random, as a panel that measures fewer genes would.

    The genes that remain move up to the ranks that they have among themselves, with their values
    as they were: the total count that values are relative to is taken to be known.

    Parameters
    ----------
    batch
        Token lists, on the CPU; not changed.
    share
        Share of each cell's genes to leave out, at least 0 and less than 1; rounded down, so
        that a cell with genes keeps at least one.
    pad_token
        Token of padding.
    rngs
        One generator per cell.

    Raises
    ------
    ValueError
        The share is out of range, or the generators are not as many as the cells.
    """
    _check_generators(batch, rngs)
    if not 0 <= share < 1:
        msg = f"The share of genes to leave out must be at least 0 and below 1, found {share}."
        raise ValueError(msg)
    in_lists = _DistinctGenes.of_lists(batch)
    genes = in_lists
    if batch.bag is not None:
        genes = _DistinctGenes.of_bag(batch.bag, in_lists.stride)
    is_dropped = np.zeros(len(genes.keys), dtype=bool)
    for cell, rng in enumerate(rngs):
        n_genes = genes.n_of(cell)
        is_dropped[genes.starts[cell] + rng.permutation(n_genes)[: int(share * n_genes)]] = True

    in_lists_dropped = np.isin(in_lists.keys, genes.keys[is_dropped])
    kept = batch.is_real & ~in_lists.spread(in_lists_dropped, batch.is_real.shape)
    order = torch.argsort(~kept, dim=1, stable=True)

    is_real = kept.gather(1, order)

    def moved_up(entries: Tensor, blank: int) -> Tensor:
        return entries.gather(1, order).masked_fill(~is_real, blank)

    return TokenBatch(
        tokens=moved_up(batch.tokens, pad_token),
        is_real=is_real,
        values=None if batch.values is None else moved_up(batch.values, 0),
        bag=None if batch.bag is None else _smaller_bag(batch.bag, genes, is_dropped),
        is_hidden=None if batch.is_hidden is None else moved_up(batch.is_hidden, 0),
    )


def _check_generators(batch: TokenBatch, rngs: Sequence[Generator]) -> None:
    if len(rngs) != len(batch.tokens):
        msg = f"{len(rngs)} generators for {len(batch.tokens)} cells; expected one per cell."
        raise ValueError(msg)


@dataclass(frozen=True)
class _DistinctGenes:
    """The genes of a batch's cells, each once per cell, by cell and token.

    Attributes
    ----------
    keys
        (genes,) cell x stride + token, ascending.
    starts
        (cells + 1,) first gene of each cell.
    gene_of_entry
        (entries,) which gene each entry of the lists, or of the bag, is.
    at
        (cell, column) of the entries in the lists; empty for those of the bag.
    stride
        One more than the largest token.
    """

    keys: NDArray[np.int64]
    starts: NDArray[np.int64]
    gene_of_entry: NDArray[np.intp]
    at: tuple[NDArray[np.intp], ...]
    stride: int

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self.keys % self.stride

    def n_of(self, cell: int) -> int:
        return int(self.starts[cell + 1] - self.starts[cell])

    def spread(self, is_so: NDArray[np.bool_], shape: tuple[int, ...]) -> Tensor:
        """Positions in the lists of the genes for which `is_so`."""
        spread = np.zeros(shape, dtype=bool)
        spread[self.at] = is_so[self.gene_of_entry]
        return torch.from_numpy(spread)

    @classmethod
    def of_lists(cls, batch: TokenBatch) -> _DistinctGenes:
        is_gene = batch.is_real.numpy().copy()
        is_gene[:, 0] = False  # <cls>
        at = np.nonzero(is_gene)
        stride = _stride(batch)
        return cls._collect(at[0] * stride + batch.tokens.numpy()[at], at, stride, len(is_gene))

    @classmethod
    def of_bag(cls, bag: GeneBag, stride: int) -> _DistinctGenes:
        tokens = bag.tokens.numpy()
        lengths = np.diff(bag.offsets.numpy(), append=len(tokens))
        cells = np.repeat(np.arange(len(lengths)), lengths)
        return cls._collect(cells * stride + tokens, (), stride, len(lengths))

    @classmethod
    def _collect(
        cls, entries: NDArray[Any], at: tuple[NDArray[np.intp], ...], stride: int, n_cells: int
    ) -> _DistinctGenes:
        keys, gene_of_entry = np.unique(entries, return_inverse=True)
        starts = np.searchsorted(keys, np.arange(n_cells + 1) * stride)
        return cls(keys, starts, gene_of_entry, at, stride)


def _stride(batch: TokenBatch) -> int:
    """One more than the largest token."""
    largest = int(batch.tokens.max())
    if batch.bag is not None and len(batch.bag.tokens):
        largest = max(largest, int(batch.bag.tokens.max()))
    return largest + 1


def _smaller_bag(bag: GeneBag, genes: _DistinctGenes, is_dropped: NDArray[np.bool_]) -> GeneBag:
    kept = ~is_dropped[genes.gene_of_entry]
    before = np.concatenate([[0], np.cumsum(kept)])
    chosen = torch.from_numpy(kept)
    return GeneBag(
        tokens=bag.tokens[chosen],
        offsets=torch.from_numpy(before[bag.offsets.numpy()]),
        values=bag.values[chosen],
    )
