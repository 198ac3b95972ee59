from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from stofm.heads.targets import Targets, head_loss


def test_classes():
    targets = Targets("classes", np.array([2, -1, 0]), 3)
    assert targets.is_known.tolist() == [True, False, True]
    assert targets.take(np.array([2, 0])).tolist() == [0, 2]
    assert len(targets) == 3


@pytest.mark.parametrize("is_sparse", [False, True])
def test_rows_with_nan_are_not_known(is_sparse):
    values = np.array([[0, 1, 2], [np.nan, 0, 0], [0, 0, 0], [1, 0, np.nan]], dtype=np.float32)
    targets = Targets("values", sparse.csr_matrix(values) if is_sparse else values, 3)
    assert targets.is_known.tolist() == [True, False, True, False]
    taken = targets.take(np.array([2, 0]))
    assert taken.dtype == torch.float32
    assert taken.tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ranks", np.zeros(3), 2), "kind must be one of"),
        (("classes", np.zeros((3, 2)), 2), r"shape \(3, 2\); expected \(3,\)"),
        (("values", np.zeros((3, 2)), 5), r"shape \(3, 2\); expected \(3, 5\)"),
        (("classes", np.zeros(3), 2, np.ones(3)), "3 class weights for 2 classes"),
    ],
)
def test_bad_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Targets(*arguments)


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
