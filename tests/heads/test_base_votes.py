"""Heads whose networks vote on embeddings and on expression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

import stofm as st
from stofm._keys import Obsm
from stofm.heads.base import Head
from stofm.heads.components import add_expression
from stofm.heads.embeddings import counts_layer
from stofm.heads.inputs import Inputs
from stofm.heads.options import FitOptions, Reading
from stofm.heads.sections import resolve_slices
from stofm.nn import HeadConfig, PredictionHead


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ballot(Head):
    task: ClassVar[str] = "ballots"
    called: ClassVar[str] = "sides"


@pytest.fixture
def inputs(adata, rng):
    """184 cells with five columns of an embedding."""
    features = rng.normal(size=(184, 5)).astype(np.float32)
    return Inputs(features, ("X_stofm",), (5,), {"X_stofm": {}})


@pytest.fixture
def pair(adata):
    return [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]


def network(d_input, seed):
    torch.manual_seed(seed)
    return PredictionHead(HeadConfig(d_input=d_input, d_output=3, widths=())).eval()


def ballot(*d_inputs, **options):
    return Ballot(
        **{
            "networks": tuple(network(d, seed) for seed, d in enumerate(d_inputs)),
            "outputs": ("a", "b", "c"),
            "use_rep": ("X_stofm",),
            "origin": {"X_stofm": {}},
            "strategy": "frozen",
            "params": {},
            "split": {},
            "validation_scores": pd.DataFrame({"f1": [0.5]}, index=pd.Index([1], name="run")),
            "history": pd.DataFrame({"epoch": [1], "loss": [0.5]}),
        }
        | options
    )


def found_by(one, features):
    weight, bias = (value.detach().double().numpy() for value in (one.last.weight, one.last.bias))
    return softmax(features.astype(float) @ weight.T + bias, axis=1)


def votes_of(head, inputs, kind="classes"):
    """What each network says, and its weight, which is the same for all cells."""
    votes, weights = zip(*head.votes(inputs, kind), strict=True)
    assert all(np.ptp(own) == 0.0 for own in weights)
    return np.stack(votes), [own[0] for own in weights]


def components(data, inputs, n_components=4, layer=None, *, is_asked_for=True, rows=None):
    sections = resolve_slices(data, "library")
    asked = n_components if is_asked_for else None
    return add_expression(
        sections,
        inputs,
        np.arange(sections.n_obs) if rows is None else rows,
        FitOptions(n_components=asked, use_rep="X_stofm", reading=Reading(layer=layer)),
    )


def read(head, data, inputs, layer=None):
    sections = resolve_slices(data, "library")
    return head.read_beside(sections, inputs, Reading(layer=layer))


@pytest.fixture
def mixed(adata, inputs):
    """Two networks on the embedding, one on four components, and what they read."""
    both, expression = components(adata, inputs)
    head = ballot(
        5,
        5,
        4,
        reads=("embedding", "embedding", "expression"),
        weights=(0.5, 0.2, 0.3),
        expression=expression,
    )
    return head, both


def test_votes_by_weight(mixed):
    head, both = mixed
    votes, weights = votes_of(head, both)
    assert weights == pytest.approx([0.5, 0.2, 0.3])
    read_by = (both.features, both.features, both.expression)
    expected = [found_by(one, own) for one, own in zip(head.networks, read_by, strict=True)]
    np.testing.assert_allclose(votes, expected, atol=1e-5)


def test_without_expression_the_others_vote(mixed, inputs):
    head, both = mixed
    votes, weights = votes_of(head, inputs, "proportions")
    assert weights == pytest.approx([5 / 7, 2 / 7])
    np.testing.assert_array_equal(votes, votes_of(head, both, "proportions")[0][:2])


def test_all_count_the_same_by_default(inputs):
    head = ballot(5, 5, 5)
    votes, weights = votes_of(head, inputs)
    assert votes.shape == (3, 184, 3)
    assert weights == pytest.approx([1 / 3] * 3)


def test_widths_of_embeddings_are_checked(mixed):
    head, both = mixed
    head.check_inputs(both)
    narrow = Inputs(both.features[:, :4], ("X_stofm",), (4,), {"X_stofm": {}}, both.expression)
    with pytest.raises(ValueError, match="The head reads 5 columns"):
        head.check_inputs(narrow)


def test_files(mixed, adata, inputs, tmp_path):
    head, both = mixed
    head.save(tmp_path / "mixed")
    again = Ballot.load(tmp_path / "mixed")
    assert (again.reads, again.weights) == (head.reads, head.weights)
    assert again.expression.genes == head.expression.genes
    for one, other in zip(votes_of(again, both), votes_of(head, both), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        read(again, adata, inputs).expression, read(head, adata, inputs).expression
    )
    ballot(5, 5).save(tmp_path / "plain")
    plain = Ballot.load(tmp_path / "plain")
    assert (plain.reads, plain.weights, plain.expression) == ((), (), None)


def test_fitting_cells_are_read_as_they_were_fitted(mixed, adata, inputs, rng):
    head, both = mixed
    again = read(head, adata, inputs)
    np.testing.assert_array_equal(again.expression, both.expression)
    np.testing.assert_array_equal(again.features, inputs.features)
    order = rng.permutation(184)
    moved = read(head, adata[order].copy(), inputs.take(order))
    np.testing.assert_array_equal(moved.expression, both.expression[order])


def test_a_head_of_embeddings_reads_no_counts(adata, inputs):
    adata.X = None
    assert read(ballot(5), adata, inputs) is inputs


@pytest.mark.parametrize("lack", ["raw counts", "genes", "a matrix"])
@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_embeddings_alone_vote_on_cells_of_a_table_without(mixed, pair, inputs, caplog, lack):
    head, _ = mixed
    whole = read(head, pair, inputs)
    assert not caplog.text
    if lack == "genes":
        pair[1] = pair[1][:, :2].copy()
    else:
        pair[1].X = pair[1].X * 0.37 if lack == "raw counts" else None
    found = read(head, pair, inputs)
    told = {"genes": "2 of the 71 genes", "raw counts": "raw counts", "a matrix": "is empty"}
    assert told[lack] in caplog.text
    assert "without their expression" in caplog.text
    np.testing.assert_array_equal(found.expression[:101], whole.expression[:101])
    assert np.isnan(found.expression[101:]).all()
    ballots = list(head.votes(found, "classes"))
    weights = np.stack([weight for _, weight in ballots])
    np.testing.assert_allclose(weights[:, :101].T, [head.weights] * 101)
    np.testing.assert_allclose(weights[:, 101:].T, [[5 / 7, 2 / 7, 0.0]] * 83)
    assert all(np.isfinite(vote).all() for vote, _ in ballots)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_slices_without_expression_are_not_centred(mixed, pair, inputs):
    head, _ = mixed
    object.__setattr__(head, "expression", replace(head.expression, by_slice=True))
    whole = read(head, pair, inputs).expression
    pair[1].X = None
    found = read(head, pair, inputs).expression
    np.testing.assert_array_equal(found[:101], whole[:101])
    assert np.isnan(found[101:]).all()


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_a_layer_that_is_gone(mixed, adata, inputs, model, caplog):
    head, _ = mixed
    adata.layers["raw"] = adata.X.copy()
    options = {"library_key": "library", "device": "cpu", "show_progress_bar": False}
    st.tl.embed(adata, model, layer="raw", **options)
    del adata.layers["raw"]
    assert np.isnan(read(head, adata, inputs).expression).all()
    found, expression = components(adata, inputs, is_asked_for=False)
    assert found is inputs
    assert expression is None
    assert "There is no layer 'raw'" in caplog.text
    with pytest.raises(KeyError, match="There is no layer 'raw'"):
        components(adata, inputs)


def test_tables_without_labels_have_no_say(pair, inputs):
    rows = np.arange(101)
    expected = components(pair[0], inputs.take(rows), rows=rows)
    pair[1].X = None
    found, expression = components(pair, inputs, rows=rows)
    np.testing.assert_array_equal(expression.axes, expected[1].axes)
    np.testing.assert_array_equal(found.expression[:101], expected[0].expression)
    assert np.isnan(found.expression[101:]).all()


def test_layers(mixed, adata, inputs, model):
    head, both = mixed
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X * 0.37
    named = read(head, adata, inputs, "raw")
    np.testing.assert_array_equal(named.expression, both.expression)
    # Without a name it is the one that was embedded.
    assert counts_layer(adata, None) is None
    options = {"library_key": "library", "device": "cpu", "show_progress_bar": False}
    st.tl.embed(adata, model, layer="raw", **options)
    assert counts_layer(adata, None) == "raw"
    np.testing.assert_array_equal(read(head, adata, inputs).expression, both.expression)
    again, _ = components(adata, inputs)
    np.testing.assert_array_equal(again.expression, both.expression)
    named, _ = components(adata, inputs, layer="raw")
    np.testing.assert_array_equal(named.expression, both.expression)


def test_none_are_asked_for(adata, inputs):
    adata.X = None
    found, expression = components(adata, inputs, 0)
    assert found is inputs
    assert expression is None


def test_components_of_labelled_cells(adata, inputs):
    rows = np.arange(0, 184, 2)
    found, expression = components(adata, inputs, 6, rows=rows)
    assert found.expression.shape == (184, 6)
    np.testing.assert_array_equal(found.features, inputs.features)
    assert len(expression.genes) == 71
    every = components(adata, inputs, 6)[1]
    assert not np.array_equal(expression.axes, every.axes)


@pytest.mark.parametrize("lack", ["raw counts", "genes", "a matrix"])
@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_nothing_to_read(pair, inputs, caplog, lack):
    if lack == "raw counts":
        pair[1].X = pair[1].X * 0.37
    elif lack == "genes":
        pair[1].var_names = [f"strange{k}" for k in range(71)]
    else:
        pair[1].X = None
    found, expression = components(pair, inputs, is_asked_for=False)
    assert found is inputs
    assert expression is None
    assert "184 cells are judged without their expression" in caplog.text
    with pytest.raises(ValueError, match=r"raw counts|share no gene|is empty"):
        components(pair, inputs)


@pytest.mark.parametrize(
    ("n_components", "use_rep", "expected"),
    [
        (None, (Obsm.X_CELL, Obsm.X), 150),
        (None, (Obsm.X,), 150),
        (None, (Obsm.X, "X_pca"), 0),
        (None, ("X_pca",), 0),
        (7, ("X_pca",), 7),
        (0, (Obsm.X,), 0),
    ],
)
def test_number_of_components(n_components, use_rep, expected):
    options = FitOptions(n_components=n_components)
    assert options.components_beside(use_rep) == expected
