from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from stofm.genes import RankedTokens
from stofm.nn import Stofm, TokenBatch
from stofm.nn.reference import se2_from_reference
from stofm.spatial import NodeType, build_subslice, lay_out_slice, rows_by_subslice
from stofm.train import StageConfig
from stofm.train.config import (
    ContrastiveConfig,
    LossWeights,
    MaskedGeneConfig,
    SpatialMasking,
    TokenMasking,
)
from stofm.train.masking import CellBatch, MaskedGenes, MaskedSubSliceBatch, apply, draw, drop_genes
from stofm.train.objectives import (
    CellEncoderObjective,
    JointObjective,
    MaskedGeneHead,
    SpatialObjective,
    TwoLayerHead,
    contrastive_loss,
    make_objectives,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def stage(name, **options):
    return StageConfig(name=name, **options)


@pytest.fixture
def golden():
    return np.load(GOLDEN / "g_losses.npz")


@pytest.fixture
def golden_objective():
    config = json.loads((GOLDEN / "g_losses.config.json").read_text())
    state = load_file(GOLDEN / "g_losses.safetensors")
    objective = SpatialObjective(
        se2_from_reference(config, state),
        stage("spatial", spatial_masking=SpatialMasking.reference(), cell_loss="cosine"),
    )
    for name, head in (("lm_head.", objective.cell_head), ("pair_head.", objective.pair_head)):
        own = {key.removeprefix(name): state[key] for key in state if key.startswith(name)}
        head.layers.load_state_dict(own)
    return objective.eval()


@pytest.fixture
def golden_inputs(golden, dense_batch):
    labels, pair_labels = (torch.from_numpy(golden[k]) for k in ("labels", "pair_labels"))
    is_target = labels[..., 0] != -100
    batch, rows, columns = torch.nonzero(pair_labels != -100, as_tuple=True)
    is_hidden = torch.from_numpy(golden["token_embeddings"])[..., 0] == -100
    return MaskedSubSliceBatch(
        subslices=dense_batch(
            golden["token_embeddings"],
            golden["attn_bias"],
            golden["token_types"],
            golden["indices"],
        ),
        hidden_places=is_hidden.flatten().nonzero()[:, 0],
        target_places=is_target.flatten().nonzero()[:, 0],
        target_features=labels[is_target],
        pair_batch=batch,
        pair_rows=rows,
        pair_columns=columns,
        pair_distances=pair_labels[batch, rows, columns],
        visible_places=rows[:0],
        surroundings=labels[is_target][:0],
    )


def test_losses_and_predictions_like_the_reference(golden, golden_objective, golden_inputs):
    with torch.no_grad():
        parts = golden_objective(golden_inputs)
        out = golden_objective.transformer(golden_inputs.subslices)
        told = out.last_hidden_state.flatten(0, 1)[golden_inputs.target_places]
        cells = golden_objective.cell_head(told)
        places = (golden_inputs.pair_batch, golden_inputs.pair_rows, golden_inputs.pair_columns)
        distances = golden_objective.pair_head(out.pairs.at(*places))[:, 0]
    for name, expected in (("masked_cells", "loss"), ("pair_distances", "pair_loss")):
        own = parts[name].total.item() / parts[name].count
        assert own == pytest.approx(float(golden[expected]), rel=2e-5)
    unit = torch.nn.functional.normalize(cells, dim=-1)
    np.testing.assert_allclose(unit, golden["logits"], atol=2e-5)
    np.testing.assert_allclose(distances, golden["pair_pred"], atol=2e-4)


@pytest.mark.parametrize(
    ("part", "prefix"), [("masked_cells", "grad_loss__"), ("pair_distances", "grad_pair_loss__")]
)
def test_gradients_like_the_reference(golden, golden_objective, golden_inputs, part, prefix):
    model = golden_objective.transformer
    parameters = {
        "model.embedding_layer.weight": model.input_projection.weight,
        "model.gaussian.means.weight": model.distance_bias.means,
        "model.gaussian.stds.weight": model.distance_bias.widths,
        "model.gaussian.linear.weight": model.distance_bias.scale,
        "model.encoder.layers.0.self_attn.q_proj.weight": model.layers[0].qkv.weight,
        "model.encoder.layers.2.fc1.weight": model.layers[2].fc1.weight,
        "lm_head.0.weight": golden_objective.cell_head.layers[0].weight,
        "pair_head.0.weight": golden_objective.pair_head.layers[0].weight,
    }
    loss = golden_objective(golden_inputs)[part]
    gradients = torch.autograd.grad(
        loss.total / loss.count, list(parameters.values()), materialize_grads=True
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        expected = golden[prefix + name]
        own = gradient.numpy()[: len(expected)] if "q_proj" in name else gradient.numpy()
        np.testing.assert_allclose(
            own.reshape(expected.shape),
            expected,
            atol=1e-3 * max(np.abs(expected).max(), 1e-9),
            err_msg=name,
        )


# --- The cell encoder.


def token_batch(rng, vocabulary, lengths, *, values=False):
    tokens = np.concatenate([rng.permutation(vocabulary.tokens)[:n] for n in lengths])
    ranked = RankedTokens(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        values=rng.gamma(1.0, 3.0, len(tokens)).astype(np.float32) if values else None,
    )
    return TokenBatch.from_ranked(
        ranked,
        np.arange(len(lengths)),
        cls_token=vocabulary.cls,
        pad_token=vocabulary.pad,
        length=24,
    )


def cell_batch(cells, vocabulary, *, gene_dropout=0.0):
    rngs = [np.random.default_rng(k) for k in range(len(cells.tokens))]
    genes = MaskedGenes.build(cells, rngs, masking=TokenMasking(), vocabulary=vocabulary)
    views = [drop_genes(cells, gene_dropout, pad_token=vocabulary.pad, rngs=rngs) for _ in "ab"]
    return CellBatch(genes=genes, views=tuple(views))


@pytest.fixture
def cells(rng, vocabulary):
    return token_batch(rng, vocabulary, [23, 11, 17, 20, 9])


def test_cell_encoder_has_both_losses(model, cells, vocabulary):
    torch.manual_seed(0)
    objective = CellEncoderObjective(model.cell_encoder, stage("cell_encoder"))
    assert objective.weights == {"masked_genes": 1.0, "contrastive": 1.0}
    parts = objective(cell_batch(cells, vocabulary))
    assert list(parts) == list(objective.weights)
    assert parts["masked_genes"].count == 3 + 2 + 3 + 3 + 1
    assert parts["contrastive"].count == 5
    sum(part.total for part in parts.values()).backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None]
    assert without == []


def test_dropout_makes_two_views_of_a_cell(model, cells, vocabulary):
    batch = cell_batch(cells, vocabulary)
    encoder = model.cell_encoder
    objective = CellEncoderObjective(encoder, stage("cell_encoder"))
    objective.eval()
    with torch.no_grad():
        same = objective(batch)["contrastive"].total
        embeddings = encoder(cells)
        torch.testing.assert_close(
            same, contrastive_loss(embeddings, embeddings, temperature=0.05).total
        )
        objective.train()
        torch.manual_seed(0)
        assert objective(batch)["contrastive"].total != same


def test_gene_dropout_reaches_the_encoder(model, cells, vocabulary):
    encoder = model.cell_encoder
    objective = CellEncoderObjective(encoder, stage("cell_encoder")).eval()
    batch = cell_batch(cells, vocabulary, gene_dropout=0.3)
    with torch.no_grad():
        first, second = (encoder(view) for view in batch.views)
        expected = contrastive_loss(first, second, temperature=0.05).total
        assert not torch.allclose(first, second)
        torch.testing.assert_close(objective(batch)["contrastive"].total, expected)


def test_views_are_compared_by_what_is_learned(model, rng, vocabulary):
    config = replace(model.config.cell_encoder, pooled=True, d_gene=8)
    encoder = Stofm(replace(model.config, cell_encoder=config), vocabulary, seed=1).cell_encoder
    objective = CellEncoderObjective(encoder, stage("cell_encoder")).eval()
    cells = token_batch(rng, vocabulary, [23, 11, 17, 20, 9], values=True)
    batch = cell_batch(cells, vocabulary, gene_dropout=0.3)
    with torch.no_grad():
        first, second = (encoder(view) for view in batch.views)
        loss = objective(batch)["contrastive"].total
        expected = contrastive_loss(first, second, temperature=0.05).total
        torch.testing.assert_close(loss, expected)
        encoder.gene_offset.uniform_(-100, 100)
        assert objective(batch)["contrastive"].total == loss


def test_losses_of_weight_zero_are_not_computed(model, cells, vocabulary):
    batch = cell_batch(cells, vocabulary)
    for name, other in (("masked_genes", "contrastive"), ("contrastive", "masked_genes")):
        objective = CellEncoderObjective(
            model.cell_encoder, stage("cell_encoder", weights=LossWeights(**{name: 0.0}))
        )
        assert list(objective(batch)) == list(objective.weights) == [other]


def test_masked_genes_can_be_learned(model, cells, vocabulary):
    torch.manual_seed(0)
    objective = CellEncoderObjective(
        model.cell_encoder,
        stage(
            "cell_encoder",
            masked_genes=MaskedGeneConfig(candidates="batch"),
            weights=LossWeights(contrastive=0.0),
        ),
    )
    batch = cell_batch(cells, vocabulary)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        part = objective(batch)["masked_genes"]
        loss = part.total / part.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    n_candidates = len(batch.genes.measured)
    assert losses[0] == pytest.approx(np.log(n_candidates), rel=0.15)
    assert losses[-1] < 0.5 * losses[0]


# --- The SE(2) Transformer.

MASKING = SpatialMasking(masked=0.2, kept=0.1, moved=0.2)


@pytest.fixture
def masked(rng, model):
    xy = rng.random((97, 2)) * [70.0, 50.0]
    features = rng.normal(size=(97, 12)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rules = model.config.subslice
    layout = lay_out_slice(xy, features, rules)
    parts = []
    for rows in rows_by_subslice(layout):
        subslice = build_subslice(layout, features, rows, rules)
        parts.append(apply(subslice, draw(len(rows), MASKING, rng), MASKING))
    return parts


@pytest.fixture
def objective(model):
    torch.manual_seed(2)
    return SpatialObjective(model.se2_transformer, stage("spatial")).eval()


def totals(parts):
    return {name: part.total.item() for name, part in parts.items()}


def test_spatial_objective_has_both_losses(objective, masked):
    parts = objective(MaskedSubSliceBatch.from_masked(masked))
    assert objective.weights == {"masked_cells": 0.5, "pair_distances": 0.5}
    assert list(parts) == list(objective.weights)
    assert parts["masked_cells"].count == sum(len(m.target_nodes) for m in masked)
    assert parts["pair_distances"].count == sum(len(m.pair_rows) for m in masked) > 0
    sum(part.total for part in parts.values()).backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    assert objective.cell_head.mask.grad.any()


def test_losses_of_a_batch_are_the_sum_over_its_subslices(objective, masked):
    assert len(masked) == 2
    with torch.no_grad():
        together = objective(MaskedSubSliceBatch.from_masked(masked, node_multiple=16))
        alone = [objective(MaskedSubSliceBatch.from_masked([one])) for one in masked]
    for name, part in together.items():
        assert part.total.item() == pytest.approx(
            sum(one[name].total.item() for one in alone), rel=1e-5
        )
        assert part.count == sum(one[name].count for one in alone)


def test_hidden_features_are_not_seen(objective, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    with torch.no_grad():
        expected = totals(objective(batch))
        features = batch.subslices.features.clone()
        features.flatten(0, 1)[batch.hidden_places] = 7.0
        assert totals(objective.losses(batch, features)) == expected
        objective.cell_head.mask += 0.5
        assert totals(objective(batch)) != expected


def test_a_number_in_place_of_features_stays(model, masked):
    torch.manual_seed(2)
    objective = SpatialObjective(
        model.se2_transformer, stage("spatial", spatial_masking=SpatialMasking.reference())
    ).eval()
    batch = MaskedSubSliceBatch.from_masked(masked)
    features = batch.subslices.features.clone()
    features.flatten(0, 1)[batch.hidden_places] = -100.0
    filled = replace(batch, subslices=replace(batch.subslices, features=features))
    with torch.no_grad():
        at_zero, at_number = totals(objective(batch)), totals(objective(filled))
        assert at_zero != at_number
        # What else is put there does not reach the model.
        assert totals(objective.losses(filled, batch.subslices.features)) == at_number


def test_lambda_of_one_and_zero(model, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    for weight, only in ((1.0, "masked_cells"), (0.0, "pair_distances")):
        objective = SpatialObjective(
            model.se2_transformer, stage("spatial", weights=LossWeights(masked_cells=weight))
        )
        assert list(objective(batch)) == [only]
        assert objective.weights == {only: 1.0}


def with_visible(masked, rng):
    """The same sub-slices with made-up surroundings of the cells that are not hidden."""
    parts = []
    for part in masked:
        nodes = np.setdiff1d(np.flatnonzero(part.subslice.cell_index >= 0), part.hidden_nodes)
        around = rng.normal(size=(len(nodes), 12)).astype(np.float32)
        parts.append(replace(part, visible_nodes=nodes, surroundings=around))
    return MaskedSubSliceBatch.from_masked(parts, node_multiple=16)


def test_losses_at_cells_that_are_not_hidden(model, masked, rng):
    batch = with_visible(masked, rng)
    model.se2_transformer.config = replace(model.se2_transformer.config, feature_scale=4.0)
    objective = SpatialObjective(
        model.se2_transformer,
        stage("spatial", weights=LossWeights(visible_cells=0.3, surroundings=8.0)),
    ).eval()
    assert list(objective.weights) == [
        "masked_cells",
        "pair_distances",
        "visible_cells",
        "surroundings",
    ]
    parts = objective(batch)
    out = objective.transformer(objective_input(objective, batch))
    hidden = out.last_hidden_state.flatten(0, 1)[batch.visible_places]
    for name, head, target in (
        (
            "visible_cells",
            objective.visible_head,
            batch.subslices.features.flatten(0, 1)[batch.visible_places],
        ),
        ("surroundings", objective.surroundings_head, batch.surroundings),
    ):
        error = head(hidden) - 4 * target
        assert parts[name].total.item() == pytest.approx(
            error.square().mean(dim=1).sum().item(), rel=1e-5
        )
        assert parts[name].count == len(target) > 50
    parts["surroundings"].total.backward()
    assert objective.surroundings_head.layers[0].weight.grad.any()
    assert objective.visible_head.layers[0].weight.grad is None


def test_other_losses_are_the_same_with_and_without_those_at_visible_cells(model, masked, rng):
    found = []
    for weights in (LossWeights(), LossWeights(visible_cells=1.0, surroundings=1.0)):
        torch.manual_seed(2)
        objective = SpatialObjective(
            model.se2_transformer, stage("spatial", weights=weights)
        ).eval()
        with torch.no_grad():
            found.append(totals(objective(with_visible(masked, rng))))
    assert found[0] == {name: found[1][name] for name in found[0]}
    assert "surroundings" not in found[0]


def test_units_of_the_losses(objective, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    objective.eval()
    with torch.no_grad():
        before = objective(batch)["pair_distances"].total.item()
        objective.config = replace(objective.config, distance_unit=10.0)
        assert objective(batch)["pair_distances"].total.item() == pytest.approx(before / 100)
        config = objective.transformer.config
        objective.transformer.config = replace(config, feature_scale=4.0)
        out = objective.transformer(objective_input(objective, batch))
        told = out.last_hidden_state.flatten(0, 1)[batch.target_places]
        error = objective.cell_head(told) - 4 * batch.target_features
        assert objective(batch)["masked_cells"].total.item() == pytest.approx(
            error.square().mean(dim=1).sum().item(), rel=1e-5
        )


def objective_input(objective, batch):
    """Sub-slices as the transformer sees them, the learned mask at hidden nodes."""
    features = batch.subslices.features.flatten(0, 1).clone()
    features[batch.hidden_places] = objective.cell_head.mask
    return replace(batch.subslices, features=features.view_as(batch.subslices.features))


def test_subslices_without_targets_give_zero(objective, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    nothing = replace(
        batch,
        hidden_places=batch.hidden_places[:0],
        target_places=batch.target_places[:0],
        target_features=batch.target_features[:0],
        pair_batch=batch.pair_batch[:0],
        pair_rows=batch.pair_rows[:0],
        pair_columns=batch.pair_columns[:0],
        pair_distances=batch.pair_distances[:0],
    )
    parts = objective(nothing)
    sum(part.total for part in parts.values()).backward()
    for part in parts.values():
        assert (part.total.item(), part.count) == (0.0, 0)


def test_distances_are_predicted_in_full_precision(objective, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        parts = objective(batch)
        out = objective.transformer(batch.subslices)
        pairs = out.pairs.at(batch.pair_batch, batch.pair_rows, batch.pair_columns)
        assert objective.pair_head(pairs).dtype == torch.float32
        assert objective.cell_head(out.last_hidden_state[0]).dtype == torch.float32
    assert all(part.total.dtype == torch.float32 for part in parts.values())


# --- Both together.


@pytest.fixture
def joint_batch(rng, vocabulary, masked):
    batch = MaskedSubSliceBatch.from_masked(masked)
    is_cell = (batch.subslices.node_type == NodeType.CELL).flatten()
    free = is_cell.nonzero()[:, 0]
    free = free[~torch.isin(free, batch.hidden_places)]
    groups = (token_batch(rng, vocabulary, [23, 19]), token_batch(rng, vocabulary, [7, 5, 3]))
    return replace(batch, sampled=groups, sampled_places=free[[3, 30, 41, 8, 60]])


@pytest.fixture
def joint(model, objective):
    return JointObjective(model.cell_encoder, objective).eval()


def test_fresh_embeddings_take_the_place_of_kept_ones(joint, joint_batch):
    batch = joint_batch
    with torch.no_grad():
        kept = totals(joint.spatial(batch))
        features = batch.subslices.features.clone()
        embeddings = [joint.encoder(group) for group in joint_batch.sampled]
        for place, row in zip(joint_batch.sampled_places, torch.cat(embeddings), strict=True):
            features.flatten(0, 1)[place] = row
        expected = totals(joint.spatial.losses(batch, features))
        assert totals(joint(joint_batch)) == pytest.approx(expected, rel=1e-6)
    assert expected != kept


def test_hidden_cells_stay_hidden(joint, joint_batch):
    hidden = replace(joint_batch, sampled_places=joint_batch.hidden_places[:5])
    with torch.no_grad():
        assert totals(joint(hidden)) == totals(joint.spatial(joint_batch))


def test_joint_objective_trains_the_cell_encoder(joint, joint_batch):
    sum(part.total for part in joint(joint_batch).values()).backward()
    gradients = {n: p.grad for n, p in joint.encoder.named_parameters()}
    assert gradients["projection.weight"].any()
    assert gradients["bert.encoder.layer.0.attention.self.query.weight"].any()
    assert joint.weights == joint.spatial.weights


def test_order_of_groups_does_not_matter(joint, joint_batch):
    swapped = replace(
        joint_batch,
        sampled=joint_batch.sampled[::-1],
        sampled_places=joint_batch.sampled_places[[2, 3, 4, 0, 1]],
    )
    with torch.no_grad():
        assert totals(joint(swapped)) == pytest.approx(totals(joint(joint_batch)), rel=1e-6)


def test_without_sampled_cells_it_is_the_spatial_objective(joint, joint_batch):
    without = replace(joint_batch, sampled=(), sampled_places=None)
    with torch.no_grad():
        assert totals(joint(without)) == totals(joint.spatial(joint_batch))


@pytest.fixture
def stages():
    reference = SpatialMasking.reference()
    return [
        StageConfig(name="cell_encoder", masked_genes=MaskedGeneConfig(candidates="batch")),
        StageConfig(name="spatial"),
        StageConfig(name="spatial", spatial_masking=reference, cell_loss="cosine"),
        StageConfig(name="joint"),
    ]


def test_stages_train_the_same_heads_unless_they_need_others(model, stages):
    cells, spatial, reference, joint = make_objectives(model, stages, seed=0)
    assert joint.spatial.cell_head is spatial.cell_head
    # One has a learned vector in place of hidden features, the other a number.
    assert reference.cell_head is not spatial.cell_head
    assert joint.spatial.pair_head is reference.pair_head is spatial.pair_head
    assert joint.encoder is cells.encoder is model.cell_encoder
    assert joint.spatial.transformer is spatial.transformer is model.se2_transformer


def test_the_seed_decides_the_heads(model, stages):
    first, second, other = (make_objectives(model, stages, seed=seed)[1] for seed in (1, 1, 2))
    weights = [one.cell_head.layers[0].weight for one in (first, second, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


# --- Losses and heads.


class OfAll:
    """What a process gets that gathers, all processes being in this one."""

    def __init__(self, parts, rank):
        self.parts, self.rank = parts, rank

    def __call__(self, rows):
        parts = [*self.parts[: self.rank], rows, *self.parts[self.rank + 1 :]]
        return torch.cat(parts), sum(map(len, self.parts[: self.rank]))


def test_contrastive_loss_by_its_formula():
    torch.manual_seed(0)
    first, second = 3 * torch.randn(5, 4), torch.randn(5, 4)
    part = contrastive_loss(first, second, temperature=0.3)
    total = 0.0
    for i in range(5):
        cosines = [float(first[i] @ b / (first[i].norm() * b.norm())) for b in second]
        terms = [math.exp(cosine / 0.3) for cosine in cosines]
        total -= math.log(terms[i] / sum(terms))
    assert part.total.item() == pytest.approx(total, rel=1e-5)
    assert part.count == 5


def test_contrastive_loss_of_two_processes_is_that_of_one():
    torch.manual_seed(0)
    embeddings = torch.randn(2, 7, 4, requires_grad=True)
    whole = contrastive_loss(*embeddings, temperature=0.1)
    (expected,) = torch.autograd.grad(whole.total, embeddings)
    normal = torch.nn.functional.normalize(embeddings[1], dim=-1)
    bounds = (slice(0, 3), slice(3, 7))
    parts = [
        contrastive_loss(
            *embeddings[:, own],
            temperature=0.1,
            gather=OfAll([normal[b] for b in bounds], rank),
        )
        for rank, own in enumerate(bounds)
    ]
    total = parts[0].total + parts[1].total
    assert [part.count for part in parts] == [3, 4]
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(total, embeddings)[0], expected)


def test_contrastive_loss_is_computed_in_full_precision():
    torch.manual_seed(0)
    first, second = torch.randn(6, 40), torch.randn(6, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = contrastive_loss(first, second, temperature=0.05)
    assert torch.equal(within.total, contrastive_loss(first, second, temperature=0.05).total)


@pytest.fixture
def genes(rng, vocabulary):
    """Nine cells that list the first 20 genes only."""
    tokens = np.concatenate([rng.permutation(vocabulary.tokens[:20])[:n] for n in range(6, 15)])
    offsets = np.concatenate([[0], np.cumsum(np.arange(6, 15))])
    cells = TokenBatch.from_ranked(
        RankedTokens(tokens=tokens, offsets=offsets),
        np.arange(9),
        cls_token=vocabulary.cls,
        pad_token=vocabulary.pad,
        length=16,
    )
    return MaskedGenes.build(
        cells,
        [np.random.default_rng(k) for k in range(9)],
        masking=TokenMasking(share=0.3),
        vocabulary=vocabulary,
    )


@pytest.fixture
def head():
    torch.manual_seed(1)
    head = MaskedGeneHead(n_tokens=70, d_hidden=16, activation="relu", layer_norm_eps=1e-12)
    torch.nn.init.normal_(head.bias)
    return head


@pytest.mark.parametrize("candidates", ["vocabulary", "batch"])
def test_masked_gene_loss_by_its_formula(model, genes, head, candidates):
    encoder = model.cell_encoder
    part = masked_gene_loss(encoder, head, genes, how=MaskedGeneConfig(candidates=candidates))
    with torch.no_grad():
        hidden = encoder.hidden_states(genes.tokens)
        words = encoder.bert.embeddings.word_embeddings.weight
        scores = head(hidden.view(-1, 16), words)
    among = range(70) if candidates == "vocabulary" else range(2, 22)
    total = 0.0
    for place, label in zip(genes.places.tolist(), genes.labels.tolist(), strict=True):
        terms = {token: math.exp(scores[place, token]) for token in among}
        total -= math.log(terms[label] / sum(terms.values()))
    assert part.total.item() == pytest.approx(total, rel=1e-5)
    assert part.count == len(genes.labels) == sum(round(0.3 * n) for n in range(6, 15))


def test_candidates_are_the_genes_of_all_processes(model, genes, head, monkeypatch):
    among = []
    words = model.cell_encoder.words
    monkeypatch.setattr(
        model.cell_encoder, "words", lambda tokens: among.append(tokens) or words(tokens)
    )
    own, other = genes.measured, torch.tensor([9, 41, 66])
    gather = OfAll([own[:, None], other[:, None]], 0)
    for candidates in ("batch", "vocabulary"):
        how = MaskedGeneConfig(candidates=candidates)
        masked_gene_loss(model.cell_encoder, head, genes, how=how, gather=gather)
    assert among[0].tolist() == sorted({*own.tolist(), 9, 41, 66})
    assert among[1] is None


def test_nothing_to_recover_gives_zero_and_a_gradient(model, genes, head):
    nothing = replace(genes, places=genes.places[:0], labels=genes.labels[:0])
    parts = [
        masked_gene_loss(model.cell_encoder, head, nothing, how=MaskedGeneConfig()),
        masked_cell_loss(head.dense(torch.zeros(0, 16)), torch.zeros(0, 16)),
        masked_cell_loss(head.dense(torch.zeros(0, 16)), torch.zeros(0, 16), kind="cosine"),
        pair_distance_loss(head.dense(torch.zeros(0, 16))[:, 0], torch.zeros(0)),
    ]
    for part in parts:
        assert part.count == 0
        assert part.total.item() == 0
        part.total.backward()
    assert not head.dense.weight.grad.any()


def test_masked_cell_losses_by_their_formulas():
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    target = torch.tensor([[0.6, 0.8], [0.0, 2.0]])
    squared = masked_cell_loss(predicted, target)
    assert squared.total.item() == pytest.approx((2.4**2 + 3.2**2) / 2 + (1 + 4) / 2)
    cosine = masked_cell_loss(predicted, target, kind="cosine")
    assert cosine.total.item() == pytest.approx(0 + 1)
    assert squared.count == cosine.count == 2


def test_pair_distance_loss_by_its_formula():
    part = pair_distance_loss(torch.tensor([1.0, 2.5, 7.0]), torch.tensor([1.5, 2.5, 4.0]))
    assert part.total.item() == pytest.approx(0.25 + 9)
    assert part.count == 3


def test_weights_of_the_spatial_losses_add_up_to_one():
    weights = LossWeights(masked_cells=0.8)
    assert weights.pair_distances == pytest.approx(0.2)
    assert LossWeights().masked_cells == LossWeights().pair_distances == 0.5


def test_errors():
    with pytest.raises(ValueError, match="temperature must be positive and finite, found 0"):
        ContrastiveConfig(temperature=0)
    with pytest.raises(ValueError, match="gene_dropout must be at least 0 and below 1, found 1"):
        ContrastiveConfig(gene_dropout=1)
    with pytest.raises(ValueError, match=r"candidates must be one of \['vocabulary', 'batch'\]"):
        MaskedGeneConfig(candidates="panel")
    with pytest.raises(ValueError, match="masked_cells must lie between 0 and 1"):
        LossWeights(masked_cells=1.5)
    for name in ("contrastive", "visible_cells", "surroundings"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, found -1"):
            LossWeights(**{name: -1})


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gene_scores_like_transformers(activation):
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=31,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=9,
            hidden_act=activation,
            layer_norm_eps=1e-12,
        )
    )
    other = bert.cls.predictions
    head = MaskedGeneHead(n_tokens=31, d_hidden=8, activation=activation, layer_norm_eps=1e-12)
    with torch.no_grad():
        other.transform.LayerNorm.weight.uniform_(0.5, 2)
        other.bias.uniform_(-1, 1)
    head.dense.load_state_dict(other.transform.dense.state_dict())
    head.norm.load_state_dict(other.transform.LayerNorm.state_dict())
    head.bias.data.copy_(other.bias)
    words = bert.bert.embeddings.word_embeddings.weight
    hidden = torch.randn(6, 8)
    scores = head(hidden, words)
    torch.testing.assert_close(scores, other(hidden))
    some = torch.tensor([3, 7, 30])
    torch.testing.assert_close(head(hidden, words[some], some), scores[:, some])


def test_mask_is_as_long_as_an_embedding_or_absent():
    torch.manual_seed(0)
    length = TwoLayerHead(6, 400, learned_mask=True).mask.norm().item()
    assert length == pytest.approx(1, abs=0.2)
    head = TwoLayerHead(6, 4)
    assert head.mask is None
    assert "mask" not in dict(head.named_parameters())
    assert head(torch.randn(3, 6)).shape == (3, 4)
