"""What heads are fitted to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from stofm._edge.expression import log_normalised
from stofm.heads.request import resolve_slices
from stofm.heads.targets import (
    MIN_SHARE,
    MISSING,
    ExpressionTargets,
    Targets,
    head_loss,
    read_labels,
)


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


def read(adata, labels, **options):
    adata.obs["label"] = labels
    return read_labels(resolve_slices(adata, "library"), "label", **options)


def test_missing_labels_are_no_class(adata):
    text = np.array(["b", "a", "Unknown", "c"], dtype=object)[np.arange(184) % 4]
    text[4] = None
    labels = read(adata, pd.Categorical(text), missing=["Unknown"])
    assert labels.classes == ("a", "b", "c")
    assert labels.codes[:6].tolist() == [1, 0, -1, 2, -1, 0]
    assert labels.is_known.sum() == 184 - 46 - 1
    assert labels.left_out == ()


def test_rare_classes_are_left_out_and_named(adata, caplog):
    caplog.set_level("INFO", logger="stofm")
    text = np.where(np.arange(184) < 3, "rare", np.where(np.arange(184) < 90, "a", "b"))
    labels = read(adata, text, min_share=0.02)
    assert labels.classes == ("a", "b")
    assert labels.left_out == ("rare",)
    assert (labels.codes[:3] == -1).all()
    told = "Rare classes of obs['label'] are left out (cells): rare (3). A class needs two cells and a share"
    assert told in caplog.text
    assert read(adata, text, min_share=0).classes == ("a", "b", "rare")
    # Of a single cell none could be held out.
    text[1:3] = "b"
    with pytest.warns(UserWarning, match=r"\(cells\): rare \(1\)\. A class needs two cells\.$"):
        assert read(adata, text, min_share=0).classes == ("a", "b")


def test_numbers_and_truth_values(adata):
    assert read(adata, np.arange(184) % 3).classes == ("0", "1", "2")
    numbers = np.where(np.arange(184) % 5, np.arange(184) % 2, np.nan)
    assert read(adata, numbers).classes == ("0", "1")
    assert read(adata, np.arange(184) % 2 == 0).classes == ("False", "True")


def test_whole_numbers_are_one_class_however_they_are_stored(adata):
    numbers = np.arange(184) % 2
    some = pd.Series(np.where(np.arange(184) % 5, numbers, np.nan), index=adata.obs_names)
    assert read(adata, some.astype("category")).classes == ("0", "1")
    mixed = numbers.astype(object)
    mixed[:50] = mixed[:50].astype(float)
    assert read(adata, mixed).classes == ("0", "1")


def test_blanks_and_other_spellings_of_none(adata):
    text = np.array(["b", "UNKNOWN ", " ", "a", "", "nan"], dtype=object)[np.arange(184) % 6]
    labels = read(adata, text, missing=["unknown", "nan"])
    assert labels.classes == ("a", "b")
    assert read(adata, text).classes == ("UNKNOWN ", "a", "b", "nan")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("a", {}, "single class, 'a' .184 of 184 cells."),
        ("Other", {"missing": ["Other"]}, "None of 184 cells has a label"),
        (np.linspace(0, 1, 184), {}, "numbers with fractions"),
        ([0.0, np.inf] * 92, {}, "holds inf: numbers with fractions or infinite"),
        (
            ["a"] * 182 + ["b"] * 2,
            {"min_share": 0.02},
            r"2 classes of .*, 1 have two cells, and 2\.0% .* out: b \(2\)\.",
        ),
        (np.arange(184), {"min_share": 0.02}, "184 classes .*, 0 have .* and 174 more. Lower `min"),
    ],
)
def test_bad_labels(adata, labels, options, message):
    with pytest.raises(ValueError, match=message):
        read(adata, labels, **options)


def test_labels_that_stand_for_none(adata, caplog):
    caplog.set_level("INFO", logger="stofm")
    text = np.array(["other", "Unknown", "", *["a"] * 90, *["b"] * 91], dtype=object)
    told = r"'Unknown' \(1 cells, 0.5%\), 'other' \(1 cells, 0.5%\)\. .*pass missing=\[\]"
    with pytest.warns(UserWarning, match=told):
        assert read(adata, text, missing=MISSING).classes == ("a", "b")
    assert "1 of 184 cells have no label" in caplog.text
    # As it was asked for.
    assert read(adata, text, missing=["other", "unknown"]).classes == ("a", "b")
    with pytest.warns(UserWarning, match=r"\(cells\): Unknown \(1\).* share of 0.01"):
        read(adata, text, missing=["other"], min_share=MIN_SHARE)


@pytest.mark.parametrize(
    "label",
    """NA|N/A|na|None|Others|unlabeled|Unlabelled cells|Unclassified|Undetermined|Undefined|?|-|???
    Unannotated|Ambiguous|Unknown cell|unknown_2|Not assigned|not-available|Doublet|Doublets|UNK
    Low quality|low_quality cells|LowQuality|Unassigned cell type|Doublet_T_B|Unidentified""".replace(
        "\n", "|"
    ).split("|"),
)
def test_what_reads_like_none(adata, label):
    text = np.array([label.strip(), *["a"] * 90, *["b"] * 93], dtype=object)
    with pytest.warns(UserWarning, match=r"\(1 cells, 0.5%\)\. .*pass missing=\[\]"):
        assert read(adata, text, missing=MISSING).classes == ("a", "b")


def test_classes_whose_names_begin_alike(adata):
    names = """NK|Neutrophil|Neural crest|Other neurons|Undifferentiated|Unswitched B|Naive T|Nano
    Na+ channel|Doublecortin|Low grade|Ambiguous zone|Unipolar brush|Nonclassical monocyte|1|2|+
    cluster 1|type 2|cells|NA-like|Untypical|Unclear cell carcinoma|Known|Annular|nonneuronal"""
    names = [name.strip() for name in names.replace("\n", "|").split("|")]
    assert len(read(adata, np.resize(names, 184), missing=MISSING).classes) == len(names)


def test_wrong_names(adata):
    slices = resolve_slices(adata, "library")
    with pytest.raises(KeyError, match=r"Nearest: \['kind'\]"):
        read_labels(slices, "kinds")
    for missing in ("Unknown", None):
        with pytest.raises(TypeError, match="must be a list of labels"):
            read_labels(slices, "kind", missing=missing)
