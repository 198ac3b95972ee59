from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from stofm.nn import Stofm
from stofm.train import stages
from stofm.train.config import (
    ContrastiveConfig,
    LossWeights,
    OptimizerConfig,
    RunConfig,
    SpatialMasking,
    StageConfig,
)
from stofm.train.folder import RunFolder
from stofm.train.loop import make_optimizer
from stofm.train.objectives import make_objectives
from stofm.train.stages import Setup


class Together:
    """A process; alone unless told otherwise."""

    def __init__(self, rank=0, count=1, device="cpu"):
        self.rank, self.count, self.device = rank, count, torch.device(device)

    def wait(self):
        pass


@pytest.fixture
def held_out(write_corpus):
    return write_corpus([61], names="held-out")


@pytest.fixture
def setup(tmp_path, model, corpus, held_out):
    return Setup(
        model=model,
        run=RunConfig(seed=5),
        corpus=corpus,
        validation=held_out,
        folder=RunFolder(tmp_path / "run", tmp_path / "work"),
        processes=Together(),
    )


def make_stage(name, setup, *, weights=None, **options):
    """A stage with its objective, of which dropout is off."""
    optimizer = OptimizerConfig(batch_size=4)
    options = {"subslice_cells": 20, "vary_subslices": True, "optimizer": optimizer} | options
    config = StageConfig(name=name, weights=weights or LossWeights(), **options)
    (objective,) = make_objectives(setup.model, [config], seed=0)
    return stages.make_stage(objective.eval(), setup, config, 1)


def total(stage, inputs):
    parts = stage.objective(inputs)
    assert set(parts) == set(stage.objective.weights)
    return sum(
        weight * parts[name].total / max(parts[name].count, 1)
        for name, weight in stage.objective.weights.items()
    )


def moves(module):
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "trains_cells", "trains_space"),
    [
        ("cell_encoder", {}, True, False),
        ("cell_encoder", {"contrastive": ContrastiveConfig(gene_dropout=0.3)}, True, False),
        ("spatial", {}, False, True),
        ("spatial", {"virtual_cells": False}, False, True),
        ("spatial", {"spatial_masking": SpatialMasking.reference()}, False, True),
        ("joint", {}, True, True),
        ("joint", {"sampled_cells": 3}, True, True),
    ],
)
def test_real_objective_learns_from_each_stage(setup, name, options, trains_cells, trains_space):
    stage = make_stage(name, setup, **options)
    stage.refresh()
    loss = total(stage, stage.samples.load(stage.samples.epoch(0)[0], 0))
    assert torch.isfinite(loss)
    assert loss > 0
    loss.backward()
    assert moves(setup.model.cell_encoder) == trains_cells
    assert moves(setup.model.se2_transformer) == trains_space
    assert all(
        torch.isfinite(p.grad).all() for p in stage.objective.parameters() if p.grad is not None
    )
    held_out = stage.validation.load(stage.validation.epoch(0)[0], 0)
    assert torch.isfinite(total(stage, held_out))


@pytest.mark.parametrize("name", ["cell_encoder", "spatial", "joint"])
def test_shares_of_processes_add_up_to_the_batch(setup, name):
    # Without contrastive learning, which needs all the batch's cells together.
    stage = make_stage(name, setup, weights=LossWeights(contrastive=0.0))
    stage.refresh()
    batch = stage.samples.epoch(1)[1]
    shares = [batch[rank::3] for rank in range(3)]
    with torch.no_grad():
        whole = stage.objective(stage.samples.load(batch, 1))
        parts = [stage.objective(stage.samples.load(share, 1)) for share in shares]
    for key, part in whole.items():
        assert sum(p[key].count for p in parts) == part.count
        summed = sum(p[key].total for p in parts)
        torch.testing.assert_close(summed, part.total, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cell_encoder", "spatial", "joint"])
def test_stage_says_what_it_is(setup, name):
    stage = make_stage(name, setup, refresh_every=7)
    assert (stage.name, stage.number) == (name, 1)
    assert stage.refresh_every == (7 if name == "joint" else None)
    assert stage.samples.describe(stage.samples.epoch(0)[0]).startswith("'slice-")
    assert stage.validation.describe(stage.validation.epoch(0)[0]) == "'held-out-0'"
    assert make_stage(name, replace(setup, validation=None)).validation is None


@pytest.mark.parametrize("name", ["spatial", "joint"])
def test_validation_takes_the_sub_slices_of_inference(setup, name):
    stage = make_stage(name, setup)
    stage.refresh()

    def sizes(samples, epoch):
        loaded = [samples.load(batch, epoch) for batch in samples.epoch(epoch)]
        batches = [inputs.subslices for inputs in loaded]
        return sorted(n for b in batches for n in (b.cell_index >= 0).sum(1).tolist())

    assert max(sizes(stage.samples, 0)) <= 20
    assert sizes(stage.validation, 0) == sizes(stage.validation, 1) == [30, 31]
    whole = make_stage(name, setup, subslice_cells=None)
    whole.refresh()
    assert max(sizes(whole.samples, 0)) > 30


def first_features(stage):
    return np.array(stage.samples.encoded[0].features)


def change(model):
    with torch.no_grad():
        model.cell_encoder.projection.weight[0, 0] += 0.5


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def shared_folder(setup):
    return setup.folder.work / "cells"


def n_kept(setup):
    found = [*names(shared_folder(setup)), *names(setup.folder.refreshed)]
    return len([name for name in found if name.startswith("cells-")])


def test_joint_stage_renews_all_embeddings_and_virtual_cells(setup):
    stage = make_stage("joint", setup)
    stage.refresh()
    before = first_features(stage)
    virtual = stage.samples.encoded[0].layout.virtual
    loaded = stage.samples.load(stage.samples.epoch(0)[0], 0).target_features
    change(setup.model)
    stage.refresh()
    assert not np.array_equal(first_features(stage), before)
    renewed = stage.samples.encoded[0].layout.virtual
    assert not np.array_equal(renewed.features, virtual.features)
    assert not torch.equal(stage.samples.load(stage.samples.epoch(0)[0], 0).target_features, loaded)


def test_held_out_slices_keep_the_first_embeddings(setup):
    stage = make_stage("joint", setup)
    stage.refresh()
    batch = stage.validation.epoch(0)[0]
    before = stage.validation.load(batch, 0)
    change(setup.model)
    stage.refresh()
    resumed = make_stage("joint", setup)
    resumed.embeddings.restore(stage.embeddings.state())
    for one in (stage, resumed):
        after = one.validation.load(batch, 0)
        assert torch.equal(after.target_features, before.target_features)
        assert torch.equal(after.subslices.features, before.subslices.features)


def test_runs_with_one_work_folder_leave_each_others_results(setup):
    other_model = copy.deepcopy(setup.model)
    stage = make_stage("joint", setup)
    stage.refresh()
    shared = names(shared_folder(setup))
    change(setup.model)
    stage.refresh()
    state, used = stage.embeddings.state(), names(setup.folder.refreshed)
    # What is computed anew is the run's own; the first result stays where others find it.
    assert used
    assert names(shared_folder(setup)) == shared

    folder = RunFolder(setup.folder.path.parent / "other", setup.folder.work)
    other = replace(setup, model=other_model, folder=folder)
    second = make_stage("joint", other)
    second.refresh()
    for _ in range(4):
        change(other_model)
        second.refresh()
    assert names(shared_folder(setup)) == shared
    assert names(setup.folder.refreshed) == used
    make_stage("joint", setup).embeddings.restore(state)


def test_restored_stage_goes_on_with_the_embeddings_of_its_checkpoint(setup):
    stage = make_stage("joint", setup)
    stage.refresh()
    change(setup.model)
    stage.refresh()
    expected, state = first_features(stage), stage.embeddings.state()
    change(setup.model)

    resumed = make_stage("joint", setup)
    resumed.embeddings.restore(state)
    np.testing.assert_array_equal(first_features(resumed), expected)
    batch = stage.samples.epoch(0)[1]
    one, other = (s.samples.load(batch, 0).subslices for s in (stage, resumed))
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.pairs.distances, other.pairs.distances)


def test_embeddings_stay_while_a_checkpoint_needs_them(setup):
    stage = make_stage("joint", setup)
    stage.refresh()
    states = []
    n_slices = 4  # three to train on, one held out
    for _ in range(4):
        change(setup.model)
        stage.refresh()
        states.append(stage.embeddings.state())
    # The first, and the last three: two that checkpoints refer to and, before that, the present.
    # Held-out slices have the first alone.
    assert n_kept(setup) == n_slices + 3 * 3
    change(setup.model)
    stage.refresh()
    assert n_kept(setup) == n_slices + 3 * 3
    resumed = make_stage("joint", setup)
    resumed.embeddings.restore(states[-1])
    with pytest.raises(FileNotFoundError, match="and the stage begins again"):
        make_stage("joint", setup).embeddings.restore(states[0])
    # What the run before the interruption made is cleared away too.
    resumed.refresh()
    change(setup.model)
    resumed.refresh()
    resumed.embeddings.state()
    change(setup.model)
    resumed.refresh()
    resumed.embeddings.state()
    change(setup.model)
    resumed.refresh()
    assert n_kept(setup) == n_slices + 3 * 3


def test_lost_embeddings_of_a_frozen_encoder_are_made_again(setup):
    stage = make_stage("spatial", setup)
    stage.refresh()
    expected, state = first_features(stage), stage.embeddings.state()
    shutil.rmtree(shared_folder(setup))
    resumed = make_stage("spatial", setup)
    resumed.embeddings.restore(state)
    np.testing.assert_array_equal(first_features(resumed), expected)


def test_second_process_removes_nothing(setup):
    stage = make_stage("joint", setup)
    stage.refresh()
    other = make_stage("joint", replace(setup, processes=Together(rank=1, count=2)))
    other.refresh()
    for _ in range(3):
        change(setup.model)
        stage.refresh()
        stage.embeddings.state()
        other.refresh()
    assert n_kept(setup) == 4 + 3 * 3


@pytest.fixture
def pooling(setup, write_corpus):
    """The same with a model that reads values and pools them."""
    config = setup.model.config
    cells = replace(config.cell_encoder, values="log", pooled=True, d_gene=8)
    model = Stofm(replace(config, cell_encoder=cells), setup.model.vocabulary, seed=1).eval()
    model.cell_encoder.gene_offset.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    corpus = write_corpus([113, 31, 59], values=True, names="valued")
    held_out = write_corpus([61], values=True, names="valued-held-out")
    return replace(setup, model=model, corpus=corpus, validation=held_out)


def test_nothing_is_computed_beforehand_for_cells(setup):
    stage = make_stage("cell_encoder", setup)
    stage.refresh()
    assert stage.embeddings is None
    assert stage.refresh_every is None
    assert not shared_folder(setup).exists()


@pytest.mark.parametrize("name", ["cell_encoder", "spatial", "joint"])
def test_what_is_pooled_by_stays_in_each_stage(pooling, name):
    stage = make_stage(name, pooling)
    stage.refresh()
    encoder = pooling.model.cell_encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    optimizer = make_optimizer(stage.objective, OptimizerConfig(learning_rate=0.1))
    total(stage, stage.samples.load(stage.samples.epoch(0)[0], 0)).backward()
    assert moves(stage.objective)
    assert moves(encoder) == (name != "spatial")
    optimizer.step()
    changed = {key for key, value in encoder.state_dict().items() if not before[key].equal(value)}
    assert ("gene_projection.weight" in changed) == (name != "spatial")
    assert not changed & {"bert.embeddings.word_embeddings.weight", "gene_offset"}


def test_fresh_embeddings_of_an_unchanged_encoder_are_the_kept_ones(pooling):
    stage = make_stage("joint", pooling)
    stage.refresh()
    inputs = stage.samples.load(stage.samples.epoch(0)[0], 0)
    with torch.no_grad():
        fresh = torch.cat([pooling.model.cell_encoder(group) for group in inputs.sampled])
    kept = inputs.subslices.features.flatten(0, 1)[inputs.sampled_places]
    torch.testing.assert_close(fresh, kept[:, -fresh.shape[1] :], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("device", "multiple"), [("cpu", 1), ("cuda", 8)])
def test_nodes_are_padded_for_the_device(setup, device, multiple):
    stage = make_stage("spatial", replace(setup, processes=Together(device=device)))
    assert stage.samples.node_multiple == multiple


def test_model_that_reads_values_needs_them(setup, pooling):
    with pytest.raises(ValueError, match="uses expression values, but the tokens have none"):
        make_stage("cell_encoder", replace(pooling, corpus=setup.corpus))
