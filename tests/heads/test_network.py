from __future__ import annotations

import numpy as np
import pytest
import torch

from stofm.heads import network
from stofm.heads.network import HeadTraining, apply_head, fit_head
from stofm.heads.targets import Targets

SHORT = HeadTraining(max_epochs=15, patience=3)


@pytest.fixture
def problem(rng):
    """Three classes on a ring, which no linear rule tells apart, and two columns of noise."""
    n = 397
    angle, radius = rng.random(n) * 2 * np.pi, rng.integers(0, 3, n)
    places = (radius + 1)[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    features = np.column_stack([places, rng.normal(size=(n, 2))]).astype(np.float32)
    return features, radius.astype(np.int64), np.arange(300), np.arange(300, 397)


def fit(problem, targets=None, **options):
    features, classes, fitted, held_out = problem
    targets = targets or Targets("classes", classes, 3)
    options = {"fitted": fitted, "held_out": held_out} | options
    return fit_head(features, targets, **options)


def losses_of(result):
    """Losses on the held-out rows, by epoch."""
    history = result.history
    return history[history["split"] == "validation"].set_index("epoch")["loss"]


def test_classes_are_learnt(problem):
    result = fit(problem, training=HeadTraining(learning_rate=5e-3))
    features, classes, _, held_out = problem
    found = apply_head(result.head, features[held_out], "classes")
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
    assert (found.argmax(axis=1) == classes[held_out]).mean() > 0.9
    assert not result.head.training


def test_history_and_early_stopping(problem):
    result = fit(problem, training=HeadTraining(learning_rate=0.05, patience=2))
    history = result.history
    assert list(history) == ["epoch", "step", "split", "loss", "learning_rate", "seconds"]
    losses = losses_of(result)
    assert losses.index[-1] == losses.idxmin() + 2 < 60
    # The weights are those of the best epoch, and not of the last.
    features, classes, _, held_out = problem
    found = apply_head(result.head, features[held_out], "classes")
    loss = -np.log(found[np.arange(len(held_out)), classes[held_out]]).mean()
    assert loss == pytest.approx(losses.min(), rel=1e-4)


def test_less_patience_with_many_cells(problem, monkeypatch):
    training = HeadTraining(learning_rate=0.05, patience=7)

    def passes_in_vain():
        result = fit(problem, training=training)
        return int(result.history["epoch"].max() - losses_of(result).idxmin())

    assert passes_in_vain() == 7
    monkeypatch.setattr(network, "_MANY_CELLS", 299)
    assert passes_in_vain() == 3


def test_without_held_out_rows_all_epochs_are_run(problem):
    result = fit(problem, held_out=np.empty(0, dtype=np.int64), training=SHORT)
    assert result.history["epoch"].max() == 15
    assert set(result.history["split"]) == {"train"}


def test_seed_and_order_of_rows(problem, rng):
    features, classes, fitted, held_out = problem
    first = fit(problem, training=SHORT).head.state_dict()
    order = rng.permutation(len(classes))
    place = np.argsort(order)
    moved = (features[order], classes[order], np.sort(place[fitted]), np.sort(place[held_out]))
    again = fit(moved, training=SHORT).head.state_dict()
    other = fit(problem, training=SHORT, seed=1).head.state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["last.weight"], first["last.weight"])


def test_the_generator_of_torch_is_left_alone(problem):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(problem, training=SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_class_weights_favour_rare_classes(problem):
    features, classes, _fitted, _held_out = problem
    pairs = Targets("classes", np.where(classes == 2, 1, 0), 2)
    weighted = Targets("classes", pairs.values, 2, np.array([1.0, 20.0], dtype=np.float32))
    training = HeadTraining(max_epochs=3)
    shares = [
        (
            apply_head(fit(problem, one, training=training).head, features, "classes")[:, 1] > 0.5
        ).mean()
        for one in (pairs, weighted)
    ]
    assert shares[1] > shares[0] + 0.1


def test_proportions_and_values(problem, rng):
    features, classes, *_ = problem
    proportions = np.eye(3, dtype=np.float32)[classes] * 0.7 + 0.1
    training = HeadTraining(learning_rate=5e-3, dropout=0.1)
    result = fit(problem, Targets("proportions", proportions, 3), training=training)
    found = apply_head(result.head, features, "proportions")
    assert np.abs(found - proportions).mean() < 0.05
    values = (classes[:, None] * [1.0, -2.0, 0.5, 0.0]).astype(np.float32)
    result = fit(problem, Targets("values", values, 4), training=training)
    found = apply_head(result.head, features, "values")
    assert np.corrcoef(found[:, 1], values[:, 1])[0, 1] > 0.95


def test_columns_and_batches_do_not_change_predictions(problem, monkeypatch):
    features, _classes, *_ = problem
    head = fit(problem, training=SHORT).head
    columns = np.array([2, 0])
    for kind in ("classes", "values"):
        monkeypatch.setattr(network, "_CHUNK", 8192)
        whole = apply_head(head, features, kind)
        monkeypatch.setattr(network, "_CHUNK", 13)
        np.testing.assert_allclose(
            apply_head(head, features, kind, columns=columns),
            whole[:, columns],
            rtol=1e-5,
            atol=1e-6,
        )


def test_many_outputs_are_validated_in_few_rows_at_a_time(problem, monkeypatch):
    _features, classes, *_ = problem
    parts = {"fitted": np.arange(60), "held_out": np.arange(60, 397)}
    training = HeadTraining(max_epochs=2)

    class Watched(Targets):
        def take(self, rows):
            sizes.append(len(rows))
            return super().take(rows)

    targets = Watched("values", np.eye(4, dtype=np.float32)[classes], 4)
    losses = []
    for most, expected in ((2**22, {337}), (4 * 300, {300, 37}), (4, {256, 81})):
        sizes: list[int] = []
        monkeypatch.setattr(network, "_MOST_OUTPUTS", most)
        losses.append(fit(problem, targets, training=training, **parts).history["loss"])
        assert {size for size in sizes if size > 16} == expected
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_a_loss_that_is_not_finite(problem):
    _features, classes, _fitted, _held_out = problem
    values = np.full((len(classes), 1), 1e30, dtype=np.float32)
    with pytest.raises(FloatingPointError, match="train loss of the head is inf in epoch 1"):
        fit(problem, Targets("values", values, 1))
