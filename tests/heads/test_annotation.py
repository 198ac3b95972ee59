"""What stofm.tl.annotate writes."""

from __future__ import annotations

import json

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

import stofm as st
from stofm._edge.records import frame_names
from stofm._keys import Obs, Obsm, Uns
from stofm.heads.annotation import AnnotationHead, write_annotation
from stofm.heads.inputs import read_inputs
from stofm.heads.options import Reading
from stofm.heads.sections import resolve_slices
from stofm.heads.trust import Rejection, Surroundings
from stofm.nn import HeadConfig, PredictionHead

QUIET = {"device": "cpu", "show_progress_bar": False, "use_rep": "X_pca"}


@pytest.fixture
def cells(adata, rng):
    """The left slice, with classes that h5ad and Zarr can't name columns by, and an embedding."""
    left = adata[adata.obs["library"] == "left"].copy()
    names = {"0": "T/NK", "1": "T_NK", "2": "L2/3"}
    left.obs["label"] = left.obs["kind"].map(names).astype(str)
    kind = left.obs["kind"].cat.codes.to_numpy()
    left.obsm["X_pca"] = np.eye(3, 5, dtype=np.float32)[kind] * 4 + rng.normal(size=(101, 5))
    return left


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_classes_that_a_file_can_not_name(cells, tmp_path, suffix):
    head = st.tl.annotate(cells, label_key="label", split="random", **QUIET)
    st.tl.annotate(cells, head=head, **QUIET)
    path = tmp_path / f"cells.{suffix}"
    getattr(cells, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert head.classes == ("L2/3", "T/NK", "T_NK")
    assert frame_names(again, Obsm.ANNOTATION_PROBA) == list(head.classes)
    assert list(again.obsm[Obsm.ANNOTATION_PROBA]) == ["L2_3", "T_NK_2", "T_NK"]
    assert set(again.obs[Obs.ANNOTATION]) <= {*head.classes, "unknown"}
    for panels in (["confusion"], ["reliability"]):
        drawn = [
            st.pl.annotation(one, truth_key="label", panels=panels, show=False)
            for one in (cells, again)
        ]
        assert drawn[0].get_title() == drawn[1].get_title()
    accuracy = (again.obs[Obs.ANNOTATION].astype(str) == cells.obs["label"]).mean()
    ax = st.pl.annotation(again, truth_key="label", panels=["confusion"], show=False)
    assert f"accuracy {accuracy:.3f}" in ax.get_title()
    plt.close("all")


def test_all_or_nothing_is_written(cells):
    head = st.tl.annotate(cells, label_key="label", split="random", **QUIET)
    sections = resolve_slices(cells)
    found = head.predict(read_inputs(sections, Reading(device="cpu"), use_rep="X_pca"))
    object.__setattr__(head, "outputs", head.outputs[:2])
    with pytest.raises(ValueError, match="Shape of passed values"):
        write_annotation(sections, head, found, Obs.ANNOTATION)
    assert Obs.ANNOTATION not in cells.obs
    assert Uns.STOFM not in cells.uns


@pytest.fixture
def folder(tmp_path, rng):
    """A saved head that nobody has fitted."""
    features = rng.normal(size=(30, 5)).astype(np.float32)
    classes = np.arange(30) % 3
    head = AnnotationHead(
        networks=(PredictionHead(HeadConfig(d_input=5, d_output=3, widths=())),),
        outputs=("a", "b", "c"),
        use_rep=("X_pca",),
        origin={"X_pca": {}},
        strategy="frozen",
        params={"label_key": "label", "seed": 0, "reject_rate": 0.1},
        split={"how": "random"},
        validation_scores=pd.DataFrame({"f1": [0.5]}),
        history=pd.DataFrame({"epoch": [1], "loss": [0.5]}),
        temperature=1.5,
        rejection=Rejection(0.1, 0.1, 10, 0.4, 2.0),
        surroundings=Surroundings.fit(features, classes),
    )
    head.save(tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda own: own.update(temperature=-1), "temperature must be from 0.2 to 5.0, found -1"),
        (lambda own: own.update(temperature=1e300), "temperature must be from 0.2 to 5.0"),
        (lambda own: own.update(temperature=float("nan")), "temperature must be a finite number"),
        (lambda own: own.update(temperature="1"), "temperature must be a finite number, found '1'"),
        (lambda own: own.pop("rejection"), r"\['center', 'means', 'projection'\], which config.js"),
        (lambda own: own["rejection"].update(rate=2), "rate is a share and must lie"),
        (lambda own: own["rejection"].update(greatest_distance=-1), "must not be negative"),
        (lambda own: own["rejection"].pop("measured"), r"Missing from \[own.rejection\]"),
        (lambda own: own.pop("reads"), r"Missing from \[own\] of config.json: \['reads'\]"),
        (lambda own: own.update(weights=[1.0, 1.0]), "1 networks, and reads and weights for"),
        (lambda own: own.update(weights=[-1.0]), "weights must be shares of a whole"),
        (lambda own: own.update(weights=[0.7]), r"and sum to 1, found \[0.7\]"),
        (lambda own: own.update(n_neighbors=5), "and n_neighbors is 5"),
        (lambda own: own.update(reads=["expression"]), "expression is missing"),
        (lambda own: own.update(reads=["thoughts"]), "reads must be a list of one of"),
    ],
)
def test_what_changes_labels_is_checked_when_a_head_is_loaded(folder, change, found):
    AnnotationHead.load(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["own"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{folder} is damaged .*{found}"):
        AnnotationHead.load(folder)


def test_surroundings_belong_to_the_classes(folder):
    arrays = load_file(folder / "head.safetensors")
    arrays["means"] = arrays["means"][:2].copy()
    save_file(arrays, folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"\(5, 2\) columns and classes; the head has \(5, 3\)"):
        AnnotationHead.load(folder)
