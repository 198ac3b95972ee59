from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from stofm.heads.request import resolve_slices
from stofm.heads.targets import ExpressionTargets, Targets, head_loss, log_normalised


def test_classes():
    targets = Targets("classes", np.array([2, -1, 0]), 3)
    assert targets.is_known.tolist() == [True, False, True]
    assert targets.take(np.array([2, 0])).tolist() == [0, 2]
    assert len(targets) == 3


def test_rows_with_nan_are_not_known():
    values = np.array([[0, 1, 2], [np.nan, 0, 0], [0, 0, 0], [1, 0, np.nan]], dtype=np.float32)
    targets = Targets("values", values, 3)
    assert targets.is_known.tolist() == [True, False, True, False]
    taken = targets.take(np.array([2, 0]))
    assert taken.dtype == torch.float32
    assert taken.tolist() == [[0, 0, 0], [0, 1, 2]]


def test_cross_entropy_with_class_weights(rng):
    outputs = torch.from_numpy(rng.normal(size=(5, 3)))
    classes, weights = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([0.5, 1.0, 3.0]).double()
    each = -torch.log(torch.softmax(outputs, 1))[torch.arange(5), classes]
    total, count = head_loss(outputs, classes, "classes")
    assert (float(total), count) == (pytest.approx(float(each.sum())), 5.0)
    total, count = head_loss(outputs, classes, "classes", weights)
    assert (float(total), count) == (pytest.approx(float((each * weights[classes]).sum())), 8.0)


def test_loss_of_proportions_is_least_where_they_are_met(rng):
    proportions = torch.from_numpy(rng.dirichlet(np.ones(4), 6))
    met, count = head_loss(proportions.log(), proportions, "proportions")
    assert count == 6.0
    assert float(met) == pytest.approx(float(-(proportions * proportions.log()).sum()))
    other = torch.from_numpy(rng.dirichlet(np.ones(4), 6)).log()
    assert float(head_loss(other, proportions, "proportions")[0]) > float(met)


def test_loss_of_values_is_the_mean_over_columns():
    total, count = head_loss(torch.zeros(2, 4), torch.full((2, 4), 3.0), "values")
    assert (float(total), count) == (18.0, 2.0)


@pytest.fixture
def counts(rng):
    """Of 30 genes that are read and of three to learn, in 61 cells, of which one has none."""
    read = rng.poisson(2.0, (61, 30)).astype(np.float32)
    read[7] = 0
    return read, rng.poisson(4.0, (61, 3)).astype(np.float32)


GENES = ["A", "B", "C"]


def targets_of(counts):
    read, learnt = counts
    slices = resolve_slices(AnnData(sparse.csr_matrix(read)), spatial_key="")
    return ExpressionTargets.of(slices, [sparse.csr_matrix(learnt)], GENES)


def test_expression_is_normalised_by_the_total_of_what_is_read(counts):
    targets = targets_of(counts)
    read, learnt = counts
    known = np.arange(61) != 7
    expected = np.log1p(1e4 * learnt[known] / read[known].sum(axis=1, keepdims=True))
    assert sparse.issparse(targets.values)
    np.testing.assert_allclose(targets.values.toarray()[known], expected, atol=1e-5)
    np.testing.assert_array_equal(targets.is_known, known)
    assert not targets.values[7].toarray().any()


def test_expression_is_standardised_by_gene(counts):
    counts[1][:, 1] = 0
    with pytest.warns(UserWarning, match=r"1 of 3 genes are constant .* for example \['B'\]"):
        targets = targets_of(counts)
    taken = targets.take(np.flatnonzero(targets.is_known)).numpy()
    assert taken.dtype == np.float32
    np.testing.assert_allclose(taken.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(taken.std(axis=0), [1, 0, 1], atol=1e-4)
    assert targets.scale[1] == 1.0


def test_log_normalised_values():
    counts = sparse.csr_matrix(np.array([[3.0, 0.0], [1.0, 1.0]]))
    found = log_normalised(counts, np.array([30.0, 0.0])).toarray()
    np.testing.assert_allclose(found, [[np.log1p(1000.0), 0.0], [0.0, 0.0]])
    found = log_normalised(counts, target_sum=4.0).toarray()
    np.testing.assert_allclose(found, np.log1p([[4, 0], [2, 2]]))
