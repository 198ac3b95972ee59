from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import stofm as st
from stofm.heads.request import HeadOptions, Request, resolve_slices
from stofm.heads.targets import Targets, head_loss
from stofm.heads.tuning import FineTuning, fine_tune
from stofm.nn import HeadConfig, PredictionHead

pytestmark = pytest.mark.filterwarnings("ignore:Tuning .* no lower")

SHORT = FineTuning(
    learning_rate=5e-3,
    warmup_steps=1,
    epochs=1,
    min_steps=4,
    validate_every=2,
    sampled_cells=6,
    lora_rank=2,
)
BOTH = ("X_stofm_cell", "X_stofm")
N_CELLS = 184
QUIET = {"device": "cpu", "show_progress_bar": False}


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
def tune(adata, model, targets, parts):
    def run(slices=None, *, trained=None, head=None, known=None, **options):
        names = ("use_rep", "library_key", "seed")
        asked = {name: options.pop(name) for name in names if name in options}
        how_to = HeadOptions(strategy=options.pop("strategy", "full"))
        asked = {"library_key": "library", "use_rep": BOTH, "options": how_to} | asked
        request = Request(**asked, **QUIET)
        given = {"task": "annotation", "how": SHORT, **parts, **options}
        return fine_tune(
            resolve_slices(adata if slices is None else slices, request.library_key),
            trained or model,
            head or make_head(),
            known or targets,
            request=request,
            **given,
        )

    return run


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_gives_a_new_model_and_leaves_the_old_one(tune, model, adata, tmp_path, strategy):
    head, before, counts = make_head(), copy.deepcopy(model), adata.X.copy()
    tuned, history = tune(head=head, strategy=strategy)
    assert same_weights(model, before)
    assert same_weights(head, make_head())
    assert (counts != adata.X).nnz == 0
    assert not adata.uns
    assert tuned.fingerprint != model.fingerprint
    assert tuned.name == "tiny-annotation"
    for word in (strategy, "'tiny'", model.fingerprint, "120 cells"):
        assert word in tuned.config.provenance
    assert tuned.state_dict().keys() == model.state_dict().keys()
    assert all(weight.requires_grad for weight in tuned.parameters())
    assert not tuned.training
    assert history["split"].tolist() == ["validation", "train", "validation"]
    tuned.save_pretrained(tmp_path / "tuned")
    assert st.Stofm.from_pretrained(tmp_path / "tuned").fingerprint == tuned.fingerprint


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("pooled", [False, True])
def test_gene_embeddings_stay_and_what_is_pooled_by(tune, model, pooled, strategy):
    config = replace(model.config.cell_encoder, pooled=pooled, d_gene=8)
    model = st.Stofm(replace(model.config, cell_encoder=config), model.vocabulary, seed=1).eval()
    before = model.cell_encoder.state_dict()
    width = config.d_cell + model.config.se2_transformer.d_embedding
    tuned = tune(trained=model, head=make_head(width), strategy=strategy)[0].cell_encoder
    after = tuned.state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    table = "bert.embeddings.word_embeddings.weight"
    assert same >= ({table, "gene_offset"} if pooled else {table})
    assert "projection.weight" not in same


def test_the_loss_is_that_of_the_head_on_stored_embeddings(tune, adata, model, targets, parts):
    history = tune()[1]
    embedded = st.tl.embed(adata, model, library_key="library", copy=True, **QUIET)
    features = np.hstack([embedded.obsm[name] for name in BOTH])[parts["held_out"]]
    outputs = make_head()(torch.from_numpy(features))
    total, count = head_loss(outputs, targets.take(parts["held_out"]), "classes")
    assert total.item() / count == pytest.approx(history["loss"][0], rel=1e-4)


def test_only_fitted_cells_are_learnt_from(tune, targets, parts):
    how = replace(SHORT, patience=99)
    values = targets.values.copy()
    rest = np.setdiff1d(np.arange(N_CELLS), np.concatenate(list(parts.values())))
    values[parts["held_out"]] = (values[parts["held_out"]] + 1) % 3
    values[rest] = 0
    first, second = (
        tune(known=known, how=how)[1].set_index("split")["loss"]
        for known in (targets, Targets("classes", values, 3))
    )
    assert first["train"] == second["train"]
    assert not set(first["validation"]) & set(second["validation"])


def test_same_seed_same_result_whatever_the_order_of_rows(tune, adata, targets, parts, rng):
    state = torch.random.get_rng_state()
    first = tune(seed=1)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    order = rng.permutation(N_CELLS)
    place = np.argsort(order)
    known = Targets("classes", targets.values[order], 3)
    again = {name: place[rows] for name, rows in parts.items()}
    assert (
        first.fingerprint == tune(adata[order].copy(), known=known, seed=1, **again)[0].fingerprint
    )
    assert first.fingerprint != tune(seed=2)[0].fingerprint


def test_slices_as_they_were_embedded_and_in_tables_of_their_own(
    tune, adata, model, targets, parts
):
    expected = tune()[0].fingerprint
    rows = np.concatenate([np.flatnonzero(adata.obs["library"] == x) for x in ("left", "right")])
    place = np.argsort(rows)
    apart = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    known = Targets("classes", targets.values[rows], 3)
    again = {name: place[own] for name, own in parts.items()}
    assert tune(apart, known=known, library_key=None, **again)[0].fingerprint == expected
    adata.obs["puck"] = adata.obs.pop("library")
    adata.layers["counts"], adata.obsm["places"] = adata.X, adata.obsm.pop("spatial")
    adata.X = adata.X.log1p()
    options = {"layer": "counts", "spatial_key": "places", "library_key": "puck"}
    st.tl.embed(adata, model, **QUIET, **options)
    assert tune(library_key=None)[0].fingerprint == expected


def test_slices_without_a_used_cell_are_not_read(tune, adata, targets):
    unusable = adata.copy()
    unusable.X = unusable.X * 0.37
    known = Targets("classes", np.tile(targets.values, 2), 3)
    tune([unusable, adata], known=known, fitted=np.arange(184, 300), held_out=np.arange(300, 368))
    with pytest.raises(ValueError, match=r"data\[0\]"):
        tune([unusable, adata], known=known, fitted=np.arange(300), held_out=np.array([301]))


@pytest.mark.parametrize("kind", ["proportions", "values"])
def test_other_targets_one_representation_and_no_held_out_cells(tune, model, rng, kind):
    values = rng.dirichlet(np.ones(4), N_CELLS).astype(np.float32)
    tuned, history = tune(
        head=make_head(12, 4),
        known=Targets(kind, values, 4),
        use_rep="X_stofm_cell",
        held_out=np.empty(0, dtype=np.int64),
        task="test",
    )
    assert np.isfinite(history["loss"]).all()
    assert set(history["split"]) == {"train"}
    assert tuned.name == "tiny-test"
    assert same_weights(tuned.se2_transformer, model.se2_transformer)
    assert not same_weights(tuned.cell_encoder, model.cell_encoder)


def test_a_loss_that_is_not_finite_stops(tune):
    head = make_head()
    with torch.no_grad():
        head.last.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 1 of tuning 'tiny'"):
        tune(head=head)


def test_says_when_tuning_did_not_help(tune, caplog):
    with caplog.at_level("INFO", logger="stofm"):
        history = tune(how=replace(SHORT, learning_rate=0.9))[1]
    losses = history.query("split == 'validation'")["loss"]
    assert losses.iloc[1:].min() > losses.iloc[0]
    assert "no lower" in caplog.text
    assert "'tiny-annotation' was tuned from 'tiny'" in caplog.text
