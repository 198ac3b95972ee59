"""Cells with hidden genes, and views of cells that lack genes.

All random numbers come from generators that the caller makes, one per cell, so that what is hidden
depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from stofm.nn import GeneBag, TokenBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.genes import GeneVocabulary
    from stofm.train.config import TokenMasking

#: A gene of a cell is one number: the cell, and in these lower bits the token.
_TOKEN_BITS = 32


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
        Share of each cell's genes to leave out, below 1; rounded down, so that a cell with genes
        keeps at least one.
    pad_token
        Token of padding.
    rngs
        One generator per cell.
    """
    at, in_lists = _genes_of_lists(batch)
    genes = in_lists if batch.bag is None else _genes_of_bag(batch.bag, len(batch.tokens))
    is_dropped = np.zeros(len(genes.keys), dtype=bool)
    for start, end, rng in zip(genes.starts[:-1], genes.starts[1:], rngs, strict=True):
        n_genes = end - start
        is_dropped[start + rng.permutation(n_genes)[: int(share * n_genes)]] = True
    is_gone = np.isin(in_lists.keys, genes.keys[is_dropped])[in_lists.of_entry]
    kept = batch.is_real.clone()
    kept[at] = torch.from_numpy(~is_gone)
    order = torch.argsort(~kept, dim=1, stable=True)
    is_real = kept.gather(1, order)

    def moved_up(entries: Tensor | None, blank: int = 0) -> Any:
        return None if entries is None else entries.gather(1, order).masked_fill(~is_real, blank)

    return TokenBatch(
        tokens=moved_up(batch.tokens, pad_token),
        is_real=is_real,
        values=moved_up(batch.values),
        bag=None if batch.bag is None else _take(batch.bag, ~is_dropped[genes.of_entry]),
        is_hidden=moved_up(batch.is_hidden),
    )


class _Genes(NamedTuple):
    """The genes of cells, each once per cell, by cell and token."""

    keys: NDArray[np.int64]  # (genes,) of cell and token, ascending
    starts: NDArray[np.int64]  # (cells + 1,) first gene of each cell
    of_entry: NDArray[np.intp]  # (entries,) which gene each entry is

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self.keys & ((1 << _TOKEN_BITS) - 1)

    @classmethod
    def of(cls, cells: NDArray[np.intp], tokens: NDArray[np.int64], n_cells: int) -> _Genes:
        keys, of_entry = np.unique((cells << _TOKEN_BITS) + tokens, return_inverse=True)
        starts = np.searchsorted(keys, np.arange(n_cells + 1) << _TOKEN_BITS)
        return cls(keys, starts, of_entry)


def _genes_of_lists(batch: TokenBatch) -> tuple[tuple[NDArray[np.intp], ...], _Genes]:
    """Where the lists have genes, and which."""
    is_gene = batch.is_real.numpy().copy()
    is_gene[:, 0] = False  # <cls>
    at = np.nonzero(is_gene)
    return at, _Genes.of(at[0], batch.tokens.numpy()[at].astype(np.int64), len(is_gene))


def _genes_of_bag(bag: GeneBag, n_cells: int) -> _Genes:
    lengths = np.diff(bag.offsets.numpy(), append=len(bag.tokens))
    return _Genes.of(np.repeat(np.arange(n_cells), lengths), bag.tokens.numpy(), n_cells)


def _take(bag: GeneBag, kept: NDArray[np.bool_]) -> GeneBag:
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = torch.from_numpy(before[bag.offsets.numpy()])
    return GeneBag(tokens=bag.tokens[kept], offsets=offsets, values=bag.values[kept])


class Batch:
    """A dataclass of tensors, of other batches, and of tuples of these."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`."""
        own: Any = self
        return type(self)(**{f.name: _moved(getattr(self, f.name), device) for f in fields(own)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        # What stands in it twice is moved once.
        moved = {id(one): one.to(device) for one in value}
        return tuple(moved[id(one)] for one in value)
    return None if value is None else value.to(device)


@dataclass(frozen=True)
class MaskedGenes(Batch):
    """Cells with hidden genes, and which genes these are.

    Attributes
    ----------
    tokens
        What the cell encoder sees.
    places
        (n_targets,) positions to recover, counted through the lists, padding included.
    labels
        (n_targets,) their genes' tokens.
    measured
        (n_genes,) tokens of all genes that occur in these cells, each once.
    """

    tokens: TokenBatch
    places: Int[Tensor, " targets"]
    labels: Int[Tensor, " targets"]
    measured: Int[Tensor, " genes"]

    @classmethod
    def build(
        cls,
        cells: TokenBatch,
        rngs: Sequence[Generator],
        *,
        masking: TokenMasking,
        vocabulary: GeneVocabulary,
    ) -> MaskedGenes:
        """Hide genes of cells, given as token lists on the CPU, with one generator per cell.

        A gene that stands twice in a list (``duplicates="keep"``) is hidden at both places. A
        hidden gene's position and value stay; ``is_hidden`` takes it out of the sum over all genes.
        """
        at, genes = _genes_of_lists(cells)
        replacement = genes.tokens.copy()
        is_chosen, is_hidden = np.zeros((2, len(replacement)), dtype=bool)
        for start, end, rng in zip(genes.starts[:-1], genes.starts[1:], rngs, strict=True):
            n_genes = end - start
            n_chosen = min(n_genes, max(1, round(masking.share * n_genes))) if masking.share else 0
            chosen = start + rng.permutation(n_genes)[:n_chosen]
            lot = rng.random(n_chosen)
            is_mask = lot < masking.mask_share
            is_random = ~is_mask & (lot < masking.mask_share + masking.random_share)
            replacement[chosen[is_mask]] = vocabulary.mask
            if is_random.any():
                random = rng.choice(vocabulary.tokens, int(is_random.sum()))
                replacement[chosen[is_random]] = random
            is_chosen[chosen] = True
            is_hidden[chosen] = is_mask | is_random
        tokens = cells.tokens.clone()
        tokens[at] = torch.from_numpy(replacement[genes.of_entry]).to(tokens.dtype)
        hidden, is_target = torch.zeros((2, *tokens.shape), dtype=torch.bool)
        hidden[at] = torch.from_numpy(is_hidden[genes.of_entry])
        is_target[at] = torch.from_numpy(is_chosen[genes.of_entry])
        return cls(
            tokens=replace(cells, tokens=tokens, is_hidden=hidden),
            places=is_target.flatten().nonzero()[:, 0],
            labels=cells.tokens[is_target],
            measured=torch.unique(cells.tokens[:, 1:][cells.is_real[:, 1:]]),
        )


@dataclass(frozen=True)
class CellBatch(Batch):
    """Input of the objective of the cell encoder.

    Attributes
    ----------
    genes
        The cells with hidden genes.
    views
        The cells as contrastive learning sees them, twice; one object if they are the same.
    """

    genes: MaskedGenes
    views: tuple[TokenBatch, TokenBatch]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.views[0].tokens)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of these cells, each counted once."""
        return int(self.genes.tokens.is_real.sum())
