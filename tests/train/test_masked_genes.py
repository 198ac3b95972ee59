from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import TokenBatch
from stofm.train.config import TokenMasking
from stofm.train.masking import MaskedGenes, drop_genes

PAD, MASK, CLS = 0, 1, 69
GENES = np.arange(2, 69)


def batch_of(lists, *, length=48, values=False):
    tokens = np.concatenate([np.empty(0, int), *lists]).astype(np.int32)
    ranked = RankedTokens(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum([len(genes) for genes in lists])]),
        values=1 + tokens.astype(np.float32) if values else None,
    )
    return TokenBatch.from_ranked(
        ranked, np.arange(len(lists)), cls_token=CLS, pad_token=PAD, length=length
    )


def rngs(n, seed=0):
    return [np.random.default_rng([seed, k]) for k in range(n)]


@pytest.fixture
def lists(rng):
    """Genes of five cells: 40, 0, 1, 33 and 7."""
    return [rng.permutation(GENES)[:n] for n in (40, 0, 1, 33, 7)]


def mask(batch, masking=None, seed=0, *, generators=None):
    """The lists with genes hidden, and which positions are to be recovered."""
    genes = MaskedGenes.build(
        batch,
        generators or rngs(len(batch.tokens), seed),
        masking=masking or TokenMasking(),
        vocabulary=SimpleNamespace(mask=MASK, tokens=GENES),
    )
    is_target = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
    is_target[genes.places] = True
    return genes.tokens, is_target.view(batch.tokens.shape)


def test_share_of_each_cells_genes_is_masked(lists):
    batch = batch_of(lists)
    masked, is_target = mask(batch)
    assert is_target.sum(dim=1).tolist() == [6, 0, 1, 5, 1]
    assert (masked.tokens[is_target] == MASK).all()
    assert torch.equal(masked.tokens[~is_target], batch.tokens[~is_target])
    assert not is_target[:, 0].any()  # <cls>
    assert not (is_target & ~batch.is_real).any()
    assert not (batch.tokens == MASK).any()  # the input is not changed


def test_nothing_and_everything(lists):
    batch = batch_of(lists)
    nothing, is_target = mask(batch, TokenMasking(share=0))
    assert torch.equal(nothing.tokens, batch.tokens)
    assert not is_target.any()
    _, is_target = mask(batch, TokenMasking(share=1))
    assert is_target.sum(dim=1).tolist() == [len(genes) for genes in lists]


def test_bert_shows_some_and_swaps_some(rng):
    batch = batch_of([rng.permutation(GENES)[:47] for _ in range(300)])
    masked, is_target = mask(batch, replace(TokenMasking.bert(), share=0.5))
    n_targets = int(is_target.sum())
    is_mask = masked.tokens == MASK
    is_changed = masked.tokens != batch.tokens
    assert is_mask.sum() / n_targets == pytest.approx(0.8, abs=0.02)
    # One gene in 67 is replaced by itself.
    assert (is_changed & ~is_mask).sum() / n_targets == pytest.approx(0.1, abs=0.02)
    assert (is_changed <= is_target).all()
    assert np.isin(masked.tokens[is_changed & ~is_mask], GENES).all()


def test_every_gene_is_masked_as_often_as_the_others():
    batch = batch_of([GENES[:20]] * 2000, length=24)
    _, is_target = mask(batch)
    assert is_target[:, 1:21].float().mean(dim=0).numpy() == pytest.approx(0.15, abs=0.035)


def test_masks_do_not_depend_on_the_batch(lists):
    together, is_target = mask(batch_of(lists), TokenMasking.bert())
    for cell in (0, 3, 4):
        length = len(lists[cell]) + 1
        own = batch_of([lists[cell]], length=length)
        alone, is_target_alone = mask(own, TokenMasking.bert(), generators=[rngs(5)[cell]])
        assert torch.equal(alone.tokens[0], together.tokens[cell, :length])
        assert torch.equal(is_target_alone[0], is_target[cell, :length])


def test_seeds_matter(lists):
    first, second = (mask(batch_of(lists), seed=seed)[1] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_gene_that_stands_twice_is_hidden_twice():
    genes = np.array([5, 9, 5, 11, 9, 13, 15, 17, 19, 21])
    batch = batch_of([genes] * 60, length=11)
    masked, is_target = mask(batch, replace(TokenMasking.bert(), share=0.3))
    for one in (5, 9):
        is_one = batch.tokens == one
        assert torch.equal(is_target[is_one].view(60, 2)[:, 0], is_target[is_one].view(60, 2)[:, 1])
        seen = (masked.tokens == one) & is_one
        assert (seen[is_one].view(60, 2).sum(dim=1) != 1).all()


def test_values_stay(lists):
    batch = batch_of(lists, values=True)
    masked, _ = mask(batch)
    assert torch.equal(masked.values, batch.values)


def test_dropped_genes_leave_the_list_and_the_rest_moves_up(lists):
    batch = batch_of(lists)
    fewer = drop_genes(batch, 0.3, pad_token=PAD, rngs=rngs(5))
    for cell, genes in enumerate(lists):
        n_left = len(genes) - int(0.3 * len(genes))
        left = fewer.tokens[cell, 1 : 1 + n_left].numpy()
        assert fewer.tokens[cell, 0] == CLS
        assert np.array_equal(left, genes[np.isin(genes, left)])  # in the order of rank
        assert not fewer.tokens[cell, 1 + n_left :].any()
        assert fewer.is_real[cell].sum() == 1 + n_left
    assert batch.is_real.sum() == 5 + sum(map(len, lists))  # the input is not changed


def test_values_stay_with_the_genes_that_are_left(lists):
    batch = batch_of(lists, values=True, length=20)
    fewer = drop_genes(batch, 0.5, pad_token=PAD, rngs=rngs(5))
    for tokens, values, is_real in zip(fewer.tokens, fewer.values, fewer.is_real, strict=True):
        assert torch.equal(values[is_real][1:], 1.0 + tokens[is_real][1:])
        assert not values[~is_real].any()


def test_dropping_nothing_changes_nothing(lists):
    batch = batch_of(lists, values=True)
    same = drop_genes(batch, 0.0, pad_token=PAD, rngs=rngs(5))
    assert torch.equal(same.tokens, batch.tokens)
    assert torch.equal(same.values, batch.values)


def test_drops_do_not_depend_on_the_batch(lists):
    together = drop_genes(batch_of(lists), 0.4, pad_token=PAD, rngs=rngs(5))
    alone = drop_genes(batch_of([lists[3]]), 0.4, pad_token=PAD, rngs=[rngs(5)[3]])
    assert torch.equal(alone.tokens[0], together.tokens[3])


def test_errors_of_gene_masking():
    with pytest.raises(ValueError, match="share must lie between 0 and 1, found 2"):
        TokenMasking(share=2)
    with pytest.raises(ValueError, match=r"mask_share, random_share must add up to at most 1"):
        TokenMasking(mask_share=0.8, random_share=0.3)


def test_masked_genes_know_what_was_hidden(lists, vocabulary):
    cells = batch_of(lists)
    genes = MaskedGenes.build(cells, rngs(5), masking=TokenMasking(), vocabulary=vocabulary)
    seen, before = genes.tokens.tokens.flatten(), cells.tokens.flatten()
    assert len(genes.places) == 6 + 0 + 1 + 5 + 1
    assert (seen[genes.places] == vocabulary.mask).all()
    assert torch.equal(before[genes.places], genes.labels)
    assert torch.equal(seen != before, torch.isin(torch.arange(5 * 48), genes.places))
    listed = set(before.tolist()) - {vocabulary.cls, vocabulary.pad}
    assert genes.measured.tolist() == sorted(listed)
