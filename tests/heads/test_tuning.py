from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stofm.heads.tuning_samples import FineTuningConfig

import stofm as st
from stofm.heads.targets import Targets, head_loss
from stofm.heads.tuning import fine_tune_head
from stofm.nn import HeadConfig, PredictionHead

pytestmark = pytest.mark.filterwarnings("ignore:Tuning .* no lower")

SHORT = FineTuningConfig(
    learning_rate=5e-3,
    warmup_steps=1,
    epochs=1,
    min_steps=4,
    validate_every=2,
    sampled_cells=6,
    batch_size=2,
    lora_rank=2,
)
BOTH = ("X_stofm_cell", "X_stofm")
N_CELLS = 184


@pytest.fixture
def targets(adata):
    return Targets("classes", adata.obs["kind"].cat.codes.to_numpy().astype(np.int64), 3)


@pytest.fixture
def parts(rng):
    order = rng.permutation(N_CELLS)
    return {"fitted": order[:120], "held_out": order[120:160]}


def make_head(d_input=26, d_output=3):
    torch.manual_seed(5)
    return PredictionHead(HeadConfig(d_input=d_input, d_output=d_output)).eval()


@pytest.fixture
def fine_tune(adata, model, targets, parts):
    def run(slices=None, trained=None, head=None, known=None, **options):
        return fine_tune_head(
            [adata] if slices is None else slices,
            trained or model,
            head or make_head(),
            known or targets,
            **{
                "strategy": "full",
                "library_key": "library",
                "training": SHORT,
                "device": "cpu",
                "show_progress_bar": False,
                **parts,
                **options,
            },
        )

    return run


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_gives_a_new_model_and_leaves_the_old_one(fine_tune, model, adata, strategy):
    head, before = make_head(), copy.deepcopy(model)
    fingerprint, counts = model.fingerprint, adata.X.copy()
    result = fine_tune(head=head, strategy=strategy)
    assert same_weights(model, before)
    assert model.fingerprint == fingerprint != result.model.fingerprint
    assert same_weights(head, make_head())
    assert not same_weights(result.head, head)
    assert (counts != adata.X).nnz == 0
    assert not adata.uns
    assert result.model.name == "tiny-annotation"
    assert model.name == "tiny"
    for word in (strategy, "'tiny'", fingerprint, "120 cells"):
        assert word in result.model.config.provenance
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert all(weight.requires_grad for weight in result.model.parameters())
    assert not result.model.training
    assert not result.head.training


def test_slices_are_read_as_they_were_embedded(fine_tune, adata, model):
    expected = fine_tune()
    adata.obs["puck"] = adata.obs.pop("library")
    adata.layers["counts"], adata.obsm["places"] = adata.X, adata.obsm.pop("spatial")
    adata.X = adata.X.log1p()
    options = {"layer": "counts", "spatial_key": "places", "library_key": "puck"}
    st.tl.embed(adata, model, device="cpu", show_progress_bar=False, **options)
    assert same_weights(fine_tune(library_key=None).model, expected.model)


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("pooled", [False, True])
def test_gene_embeddings_stay_and_what_is_pooled_by(fine_tune, model, pooled, strategy):
    config = replace(model.config.cell_encoder, pooled=pooled, d_gene=8)
    model = st.Stofm(replace(model.config, cell_encoder=config), model.vocabulary, seed=1).eval()
    before = model.cell_encoder.state_dict()
    tuned = fine_tune(trained=model, strategy=strategy).model.cell_encoder
    after = tuned.state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    table = "bert.embeddings.word_embeddings.weight"
    assert same >= ({table, "gene_offset"} if pooled else {table})
    assert "projection.weight" not in same
    assert tuned.gene_embeddings.weight.requires_grad is not pooled
    assert all(w.requires_grad for w in tuned.parameters() if w is not tuned.gene_embeddings.weight)


def test_the_result_can_be_saved_and_embeds(fine_tune, adata, tmp_path):
    result = fine_tune(strategy="lora")
    result.model.save_pretrained(tmp_path / "tuned")
    loaded = st.Stofm.from_pretrained(tmp_path / "tuned")
    assert loaded.fingerprint == result.model.fingerprint
    st.tl.embed(adata, loaded, library_key="library", show_progress_bar=False)
    assert adata.uns["stofm"]["X_stofm"]["model_fingerprint"] == loaded.fingerprint


def test_the_loss_is_that_of_the_head_on_stored_embeddings(fine_tune, adata, model, targets, parts):
    """What tuning sees of the held-out cells is what the head will be applied to."""
    result = fine_tune(strategy="lora")
    losses = result.history[result.history["split"] == "validation"].set_index("step")["loss"]
    for one, head, step in (
        (model, make_head(), 0),
        (result.model, result.head, result.best_step),
    ):
        embedded = st.tl.embed(
            adata, one, library_key="library", show_progress_bar=False, copy=True
        )
        features = np.hstack([embedded.obsm[name] for name in BOTH])[parts["held_out"]]
        outputs = head(torch.from_numpy(features))
        total, count = head_loss(outputs, targets.take(parts["held_out"]), "classes")
        # Kept embeddings are float16.
        assert total.item() / count == pytest.approx(losses[step], rel=1e-3)


def test_held_out_cells_do_not_change_what_is_learnt(fine_tune, targets, parts):
    values = targets.values.copy()
    values[parts["held_out"]] = (values[parts["held_out"]] + 1) % 3
    training = replace(SHORT, patience=99)
    first, second = (
        fine_tune(known=known, training=training).history
        for known in (targets, Targets("classes", values, 3))
    )
    is_train = first["split"] == "train"
    assert is_train.sum() == 2
    assert first[is_train]["loss"].equals(second[is_train]["loss"])
    assert not (first[~is_train]["loss"] == second[~is_train]["loss"]).any()


def test_cells_in_neither_part_count_in_no_loss(fine_tune, targets, parts):
    values = targets.values.copy()
    rest = np.setdiff1d(np.arange(N_CELLS), np.concatenate(list(parts.values())))
    values[rest] = 0
    first, second = fine_tune(), fine_tune(known=Targets("classes", values, 3))
    assert first.history["loss"].equals(second.history["loss"])


def test_same_seed_same_result_whatever_the_order_of_rows(fine_tune, adata, targets, parts, rng):
    state = torch.random.get_rng_state()
    first = fine_tune(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    order = rng.permutation(N_CELLS)
    place = np.argsort(order)
    second = fine_tune(
        [adata[order].copy()],
        known=Targets("classes", targets.values[order], 3),
        seed=1,
        **{name: place[rows] for name, rows in parts.items()},
    )
    assert first.model.fingerprint == second.model.fingerprint
    assert same_weights(first.head, second.head)
    assert fine_tune(seed=2).model.fingerprint != first.model.fingerprint


def test_slices_of_their_own_are_as_those_of_one_table(fine_tune, adata, targets, parts):
    rows = np.concatenate([np.flatnonzero(adata.obs["library"] == x) for x in ("left", "right")])
    place = np.argsort(rows)
    apart = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    result = fine_tune(
        apart,
        known=Targets("classes", targets.values[rows], 3),
        library_key=None,
        **{name: place[own] for name, own in parts.items()},
    )
    assert result.model.fingerprint == fine_tune().model.fingerprint


def test_slices_without_a_used_cell_are_not_read(fine_tune, adata, targets):
    unusable = adata.copy()
    unusable.X = unusable.X * 0.37
    known = Targets("classes", np.tile(targets.values, 2), 3)
    result = fine_tune(
        [unusable, adata], known=known, fitted=np.arange(184, 300), held_out=np.arange(300, 368)
    )
    assert result.best_step > 0
    with pytest.raises(ValueError, match=r"data\[0\]"):
        fine_tune([unusable, adata], known=known, fitted=np.arange(300), held_out=[301])


@pytest.mark.parametrize("kind", ["proportions", "values"])
def test_other_kinds_of_targets(fine_tune, rng, kind):
    values = rng.dirichlet(np.ones(4), N_CELLS).astype(np.float32)
    values[7] = np.nan
    result = fine_tune(head=make_head(d_output=4), known=Targets(kind, values, 4), task="test")
    assert np.isfinite(result.history["loss"]).all()
    assert result.model.name == "tiny-test"


def test_one_representation(fine_tune, model):
    result = fine_tune(head=make_head(d_input=12), use_rep="X_stofm_cell")
    assert same_weights(result.model.se2_transformer, model.se2_transformer)
    assert not same_weights(result.model.cell_encoder, model.cell_encoder)


def test_without_held_out_cells_the_last_step_is_taken(fine_tune):
    result = fine_tune(held_out=np.empty(0, dtype=np.int64))
    assert result.best_step == 4
    assert set(result.history["split"]) == {"train"}


def test_nothing_stays_on_disk(fine_tune, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fine_tune()
    assert not list(Path(tmp_path).iterdir())


def test_a_loss_that_is_not_finite_stops(fine_tune):
    head = make_head()
    with torch.no_grad():
        head.last.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 1 .*'fine-tuning'.*data\[0\]"):
        fine_tune(head=head)


def test_says_when_tuning_did_not_help(fine_tune, caplog):
    training = replace(SHORT, learning_rate=0.9)
    with caplog.at_level("INFO", logger="stofm"):
        result = fine_tune(training=training)
    losses = result.history.query("split == 'validation'")["loss"]
    assert losses.iloc[1:].min() > losses.iloc[0]
    assert "no lower" in caplog.text
    assert "'tiny-annotation' was tuned from 'tiny'" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "frozen"}, r"one of \['lora', 'full'\] to tune a model, found 'frozen'"),
        ({"use_rep": "X_pca"}, r"gradients reach .*X_stofm.* only.*strategy='frozen'"),
        ({"use_rep": ("X_stofm", "X_stofm")}, "each once"),
        ({"use_rep": "X_stofm"}, "reads 26 and gives 3 numbers.*have 14 and 3"),
        ({"head": make_head(d_output=5)}, "gives 5 numbers"),
        ({"fitted": np.array([0, 184])}, "fitted must hold rows from 0 to 183, found 0 to 184"),
        ({"held_out": np.array([-1])}, "held_out must hold rows from 0"),
        ({"fitted": np.arange(9), "held_out": np.arange(7, 12)}, "2 cells are in fitted and in"),
        ({"known": Targets("classes", np.zeros(9, np.int64), 3)}, "184 cells .* and 9 rows"),
        ({"known": Targets("classes", np.full(184, -1), 3)}, "None of the 120 fitted cells has"),
    ],
)
def test_refuses(fine_tune, options, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(**options)
