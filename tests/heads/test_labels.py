from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from stofm.heads.request import resolve_slices
from stofm.heads.targets import MIN_SHARE, MISSING, read_labels


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
    assert "with less than 0.02 of the labelled cells are left out (3 cells): rare" in caplog.text
    assert read(adata, text, min_share=0).classes == ("a", "b", "rare")


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
        (["a"] + ["b"] * 90 + ["c"] * 93, {}, r"one cell each: \['a'\]. A class needs two"),
        (np.linspace(0, 1, 184), {}, "numbers with fractions"),
        ([0.0, np.inf] * 92, {}, "holds inf: numbers with fractions or infinite"),
        (
            ["a"] * 182 + ["b"] * 2,
            {"min_share": 0.02},
            r"2 classes of .*, 1 have 2\.0% .* out: b\.",
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
    with pytest.warns(UserWarning, match=r"with less than 0.01 .*\(1 cells\): Unknown"):
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
    with pytest.raises(KeyError, match=r"did you mean \['kind'\]"):
        read_labels(slices, "kinds")
    for missing in ("Unknown", None):
        with pytest.raises(TypeError, match="must be a list of labels"):
            read_labels(slices, "kind", missing=missing)
