from __future__ import annotations

import copy
import importlib.util
import json
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stofm.train import loop as loop_module
from stofm.train.checkpoint import Progress, load_optimizer_tensors, optimizer_tensors
from stofm.train.config import OptimizerConfig
from stofm.train.loop import learning_rate, load_ahead, make_optimizer
from stofm.train.objectives import LossPart
from stofm.train.processes import Processes

_SPEC = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
toy = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(toy)


def train(stage, **options):
    loop = toy.toy_loop(stage, **options)
    recorder = toy.ToyRecorder(loop)
    loop.train(recorder)
    return loop, recorder


def weights(stage):
    return {name: value.clone() for name, value in stage.objective.state_dict().items()}


def assert_same(first, second, *, atol=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=atol)


def test_the_loss_falls_and_every_sample_counts_once_an_epoch():
    stage = toy.ToyStage(toy.ToyObjective())
    loop, recorder = train(stage, n_epochs=12)
    losses = [row["squares"] for row in recorder.rows if row["split"] == "train"]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert np.bincount(stage.loaded).tolist() == [12] * toy.N_SAMPLES
    assert loop.progress.n_cells == 12 * toy.N_SAMPLES
    assert loop.progress.n_tokens == 6 * 12 * toy.N_SAMPLES


def test_a_step_is_that_of_plain_torch():
    stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0), batch_size=40)
    plain = copy.deepcopy(stage.objective)
    options = {"accumulation": 1, "warmup_steps": 0, "max_norm": 0.7, "weight_decay": 0.3}
    train(stage, optimizer=options, max_steps=1, n_epochs=1)

    inputs = stage.load(np.arange(toy.N_SAMPLES), 0)
    part = plain(inputs)["squares"]
    (part.total / part.count).backward()
    used = [p for p in plain.parameters() if p.grad is not None]
    assert float(torch.nn.utils.clip_grad_norm_(used, 0.7)) > 0.7
    decayed = [plain.first.weight, plain.last.weight]
    ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": 0.3},
        {"params": [p for p in used if id(p) not in ids], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.02).step()
    assert_same(weights(stage), plain.state_dict(), atol=1e-6)


@pytest.mark.parametrize("n_epochs", [1, 3])
def test_accumulation_equals_the_larger_batch(n_epochs):
    # 37 samples: the last batch and the last step are smaller than the others.
    small = toy.ToyStage(toy.ToyObjective(contrastive=0.0), batch_size=3)
    large = toy.ToyStage(toy.ToyObjective(contrastive=0.0), batch_size=12)
    train(small, optimizer={"accumulation": 4}, n_epochs=n_epochs)
    train(large, optimizer={"accumulation": 1}, n_epochs=n_epochs)
    assert_same(weights(small), weights(large), atol=2e-6)


def test_rows_of_the_history():
    stage = toy.ToyStage(toy.ToyObjective(), held_out=True)
    _, recorder = train(stage, run={"log_every": 3, "validate_every": 4})
    rows = [(row["split"], row["step"], row["epoch"]) for row in recorder.rows]
    assert rows == [
        ("train", 3, 0),
        ("validation", 4, 0),
        ("train", 6, 1),
        ("validation", 8, 1),
        ("train", 9, 1),
        ("train", 10, 1),
        ("validation", 10, 1),
    ]
    for row in recorder.rows:
        assert row["loss"] == pytest.approx(row["squares"] + 0.5 * row["contrast"])


def test_a_row_is_the_mean_over_samples_since_the_row_before():
    stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0))
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0}
    _, recorder = train(stage, optimizer=frozen, n_epochs=1, run={"log_every": 5})
    part = stage.objective.eval()(stage.load(np.arange(toy.N_SAMPLES), 0))["squares"]
    (row,) = recorder.rows
    assert row["squares"] == pytest.approx(part.total.item() / part.count, rel=1e-5)


def test_validation_takes_all_held_out_samples_with_the_draws_of_epoch_0():
    stage = toy.ToyStage(toy.ToyObjective(dropout=0.5, contrastive=0.0), held_out=True)
    loop, recorder = train(stage, n_epochs=2)
    held_out = stage.validation
    part = stage.objective.eval()(held_out.load(np.arange(toy.N_HELD_OUT), 0))["squares"]
    last = [row for row in recorder.rows if row["split"] == "validation"][-1]
    assert last["loss"] == pytest.approx(part.total.item() / part.count, rel=1e-5)
    assert loop.progress.best_loss <= last["loss"]


def test_learning_rate_rises_and_falls_to_the_last_step():
    stage = toy.ToyStage(toy.ToyObjective())
    _, recorder = train(stage, optimizer={"warmup_steps": 4, "learning_rate": 0.6})
    rates = [row["learning_rate"] for row in recorder.rows]
    assert rates == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_max_steps_ends_the_stage_and_its_schedule():
    stage = toy.ToyStage(toy.ToyObjective())
    loop, recorder = train(stage, max_steps=7, optimizer={"warmup_steps": 0}, n_epochs=50)
    assert loop.progress.step == 7
    assert recorder.rows[-1]["learning_rate"] == pytest.approx(0.02 / 7)


class UnevenStage(toy.ToyStage):
    """Epochs of 10, 6, 2, 10 ... batches."""

    def epoch(self, number):
        return super().epoch(number)[: 10 - 4 * (number % 3)]


@pytest.mark.parametrize(
    ("n_epochs", "max_steps", "n_steps"), [(2, None, 8), (3, None, 9), (4, None, 14), (3, 8, 8)]
)
def test_epochs_of_different_length_end_with_the_schedule(n_epochs, max_steps, n_steps):
    stage = UnevenStage(toy.ToyObjective(), held_out=True)
    run = {"log_every": 5, "validate_every": 100}
    loop, recorder = train(stage, n_epochs=n_epochs, max_steps=max_steps, run=run)
    assert loop.progress.step == loop.n_steps == n_steps
    # The last steps have a row, the learning rate fell to the last, and the end was validated.
    training, validation = recorder.rows[-2:]
    assert (training["split"], training["step"]) == ("train", n_steps)
    assert training["learning_rate"] == pytest.approx(0.02 / (n_steps - 2))
    assert (validation["split"], validation["step"]) == ("validation", n_steps)


def test_early_stopping_and_the_best_checkpoint():
    stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0), held_out=True)
    options = {"learning_rate": 3.0, "max_norm": None}
    run = {"patience": 2, "validate_every": 1}
    loop, recorder = train(stage, optimizer=options, run=run, n_epochs=60)
    losses = [row["loss"] for row in recorder.rows if row["split"] == "validation"]
    assert loop.progress.step == len(losses) < loop.n_steps
    assert recorder.kept[-1] == int(np.argmin(losses)) + 1 == len(losses) - 2
    assert loop.progress.best_loss == min(losses)
    assert recorder.saved == [len(losses)]


def test_checkpoints_come_by_steps_or_by_time_and_at_the_end(monkeypatch):
    def saved(**run):
        return train(toy.ToyStage(toy.ToyObjective()), run=run)[1].saved

    # Two epochs of five steps, which take no ten minutes.
    assert saved() == [10]
    assert saved(checkpoint_every=4) == [4, 8, 10]
    monkeypatch.setattr(loop_module, "_BETWEEN_CHECKPOINTS", 0.0)
    assert saved() == list(range(1, 11))


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_scale_of_weights_of_what_is_asked_does_not_matter(factor):
    def gradients(scale):
        stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0))
        plain = stage.objective.forward

        def weighted(inputs, gather=None):
            part = plain(inputs, gather)["squares"]
            return {"squares": LossPart(part.total * scale, part.count * scale)}

        stage.objective.forward = weighted
        options = {"max_norm": None}
        recorder = train(stage, optimizer=options, n_epochs=1, max_steps=2)[1]
        return [row["gradient_norm"] for row in recorder.rows]

    assert gradients(factor) == pytest.approx(gradients(1.0), rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(stop_at, dropout):
    def stage():
        return toy.ToyStage(toy.ToyObjective(dropout=dropout), held_out=True)

    run = {"checkpoint_every": 1, "log_every": 3, "validate_every": 2}
    whole = stage()
    _, expected = train(whole, run=run)

    first = stage()
    loop = toy.toy_loop(first, run=run)
    before = toy.ToyRecorder(loop, stop_at=stop_at)
    with pytest.raises(toy.StoppedError):
        loop.train(before)
    kept = json.loads(json.dumps(vars(loop.progress)))
    tensors = optimizer_tensors(loop.optimizer, first.objective)

    second = stage()
    second.objective.load_state_dict(first.objective.state_dict())
    loop = toy.toy_loop(second, run=run, progress=Progress(**kept))
    load_optimizer_tensors(loop.optimizer, second.objective, tensors)
    after = toy.ToyRecorder(loop)
    loop.train(after)

    assert_same(weights(second), weights(whole))
    rows = [{**row, "seconds": 0} for row in before.rows + after.rows]
    assert rows == [{**row, "seconds": 0} for row in expected.rows]


def test_neither_threads_nor_the_callers_generator_matter():
    found = []
    for n_threads, seed in ((0, 1), (3, 2)):
        stage = toy.ToyStage(toy.ToyObjective(dropout=0.5))
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        train(stage, run={"n_threads": n_threads})
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(weights(stage))
    assert_same(*found)
    other = toy.ToyStage(toy.ToyObjective(dropout=0.5))
    train(other, run={"seed": 7})
    assert not torch.equal(weights(other)["first.weight"], found[0]["first.weight"])


def test_a_refresh_comes_after_the_steps_before_and_before_the_loading_after():
    stage = toy.ToyStage(toy.ToyObjective())
    stage.refresh_every = 3
    train(stage, run={"n_threads": 2}, n_epochs=1)
    # 5 steps of two batches of 4 samples: one refresh, when the 24 samples of 3 steps are loaded.
    assert stage.refreshed_at == [24]
    assert sorted(stage.loaded) == list(range(toy.N_SAMPLES))


def test_a_loss_that_is_not_finite_names_step_and_slices_and_changes_nothing():
    stage = toy.ToyStage(toy.ToyObjective())
    batch = stage.epoch(0)[5]
    stage.y[batch[1]] = np.nan
    loop = toy.toy_loop(stage, run={"checkpoint_every": 1})
    recorder = toy.ToyRecorder(loop)
    expected = r"The loss \(squares\) is not finite at step 3 of stage 'toy' \(epoch 0\)"
    with pytest.raises(FloatingPointError, match=expected) as caught:
        loop.train(recorder)
    assert f"slices {sorted(batch.tolist())}" in str(caught.value)
    assert "lower learning_rate (now 0.02), a longer warm-up (now 2 steps)." in str(caught.value)
    assert recorder.saved == [1, 2]
    assert loop.progress.step == 2
    assert all(value.isfinite().all() for value in weights(stage).values())


def test_a_held_out_loss_that_is_not_finite_is_not_the_best():
    stage = toy.ToyStage(toy.ToyObjective(), held_out=True)
    stage.validation.y[3] = np.inf
    loop = toy.toy_loop(stage)
    recorder = toy.ToyRecorder(loop)
    expected = r"held-out slices is not finite after step 5.*or take a lower learning_rate"
    with pytest.raises(FloatingPointError, match=expected):
        loop.train(recorder)
    assert recorder.saved == []
    assert loop.progress.best_loss is None


def test_a_gradient_that_is_not_finite_is_refused_too():
    stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0))
    stage.objective.first.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(FloatingPointError, match="The gradient is not finite at step 1") as caught:
        train(stage, run={"precision": "bf16-mixed"})
    assert "or precision='32'." in str(caught.value)


def test_a_failure_while_loading_comes_through():
    stage = toy.ToyStage(toy.ToyObjective())

    def load(samples, epoch):
        raise OSError("the disk is gone")

    stage.load = load
    with pytest.raises(OSError, match="the disk is gone"):
        train(stage, run={"n_threads": 2})


def test_nothing_to_train_is_refused():
    objective = toy.ToyObjective()
    objective.weights = {}
    with pytest.raises(ValueError, match="All losses have the weight 0"):
        toy.toy_loop(toy.ToyStage(objective))
    objective = toy.ToyObjective().requires_grad_(False)
    with pytest.raises(ValueError, match="There are no weights to train"):
        toy.toy_loop(toy.ToyStage(objective))


def test_bf16_mixed_on_the_cpu_keeps_weights_and_inputs_in_float32():
    stage = toy.ToyStage(toy.ToyObjective(contrastive=0.0))
    seen = []
    forward = stage.objective.forward

    def watch(inputs, gather=None):
        seen.append((inputs.x.dtype, torch.is_autocast_enabled("cpu")))
        return forward(inputs, gather)

    stage.objective.forward = watch
    _, recorder = train(stage, run={"precision": "bf16-mixed"}, n_epochs=12)
    assert set(seen) == {(torch.float32, True)}
    assert {value.dtype for value in weights(stage).values()} == {torch.float32}
    losses = [row["loss"] for row in recorder.rows]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_16_mixed_needs_cuda():
    with pytest.raises(ValueError, match="'16-mixed' needs a CUDA device, found 'cpu'"):
        Processes.start("cpu", "16-mixed")


def test_time_spent_waiting_is_measured():
    import time

    class Slow(toy.ToyStage):
        def load(self, samples, epoch):
            time.sleep(0.01)
            return super().load(samples, epoch)

    loop, _ = train(Slow(toy.ToyObjective()), run={"n_threads": 0}, n_epochs=1)
    # 10 batches of 10 ms each.
    assert 0.1 <= loop.progress.waited <= loop.progress.seconds


@pytest.mark.parametrize("n_threads", [0, 1, 4])
def test_items_come_in_order(n_threads):
    def load(item):
        time.sleep(0.002 * (5 - item % 5))
        return item * 10

    assert list(load_ahead(load, range(17), n_threads)) == [10 * k for k in range(17)]


def test_only_so_many_are_loaded_ahead_and_threads_end():
    started, before = [], threading.active_count()
    with closing(load_ahead(started.append, range(50), 2)) as loaded:
        for k in range(10):
            next(loaded)
            time.sleep(0.005)
            assert len(started) <= k + 1 + 4
    # Leaving does not load the rest.
    assert len(started) <= 14
    assert threading.active_count() == before


@pytest.mark.parametrize("n_threads", [0, 2])
def test_an_error_comes_where_the_item_is_asked_for(n_threads):
    def load(item):
        if item == 2:
            raise OSError("gone")
        return item

    loaded = load_ahead(load, range(5), n_threads)
    assert [next(loaded), next(loaded)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(loaded)


def test_waiting_is_what_was_not_loaded_ahead():
    class SlowStage(toy.ToyStage):
        def load(self, samples, epoch):
            time.sleep(0.02)
            return super().load(samples, epoch)

    def waited(n_threads):
        stage = SlowStage(toy.ToyObjective())
        loop = toy.toy_loop(stage, n_epochs=1, run={"n_threads": n_threads})
        loop.train(toy.ToyRecorder(loop))
        return loop.progress.waited

    # Ten batches.
    assert waited(0) >= 0.2
    assert waited(5) < waited(0) / 2


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 2)
        self.mask = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self):
        return self.linear(self.norm(self.words.weight) + self.mask).square().sum()


def test_only_matrices_decay():
    module = Small()
    decayed, others = make_optimizer(module, OptimizerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert [id(p) for p in decayed["params"]] == [id(module.linear.weight)]
    assert others["weight_decay"] == 0.0
    expected = {module.words.weight, *module.norm.parameters(), module.linear.bias, module.mask}
    assert set(others["params"]) == expected


@pytest.mark.parametrize(
    ("n_steps", "warmup", "expected"),
    [
        (5, 2, [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        (4, 0, [1.0, 0.75, 0.5, 0.25]),
        # A warm-up longer than half of the stage is cut to that.
        (4, 500, [0.5, 1.0, 1.0, 0.5]),
        (1, 500, [1.0]),
    ],
)
def test_learning_rate(n_steps, warmup, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup)
    found = [learning_rate(step, n_steps, config) for step in range(n_steps)]
    assert found == pytest.approx([2.0 * share for share in expected])
    assert learning_rate(n_steps, n_steps, config) == 0.0


def trained(steps):
    torch.manual_seed(0)
    module = Small()
    optimizer = make_optimizer(module, OptimizerConfig(learning_rate=0.1))
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        module().backward()
        optimizer.step()


def test_the_state_goes_through_tensors():
    module, _ = trained(5)
    half, first = trained(2)
    second = make_optimizer(half, OptimizerConfig(learning_rate=0.1))
    tensors = optimizer_tensors(first, half)
    assert sorted(tensors)[:3] == [
        "linear.bias/exp_avg",
        "linear.bias/exp_avg_sq",
        "linear.bias/step",
    ]
    load_optimizer_tensors(second, half, tensors)
    advance(half, second, 3)
    for one, other in zip(module.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other)
    # Copies: training on changes neither.
    assert float(tensors["linear.bias/step"]) == 2.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, found -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, found nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0 and finite, found inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, found nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, found inf"),
        ({"max_norm": float("nan")}, "max_norm must be positive, or left out"),
    ],
)
def test_values_that_can_not_be_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**entries)
