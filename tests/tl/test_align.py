from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

import stofm as st
from stofm._edge.expression import log_normalised
from stofm.align.losses import retrieval_ranks

if TYPE_CHECKING:
    from pathlib import Path

QUICK = st.tl.AlignOptions(d_model=12, d_hidden=16, epochs=2, batch_size=61)
BRANCHES = ("X_aligned", "X_aligned_image", "X_aligned_genes")


@pytest.fixture(scope="module")
def _slides() -> ad.AnnData:
    options = {"technology": "visium", "n_slices": 3, "image": True, "seed": 1}
    adata = st.datasets.simulate_slice(173, 60, **options)
    adata.obs["donor"] = adata.obs["slice_id"].map({"slice0": "a", "slice1": "b", "slice2": "b"})
    st.im.embed(adata, "statistics", device="cpu", show_progress_bar=False)
    return adata


@pytest.fixture
def slides(_slides: ad.AnnData) -> ad.AnnData:
    return _slides.copy()


def align(data: object, options: object = QUICK, **more: object) -> st.tl.Aligner:
    return st.tl.align(data, options=options, device="cpu", show_progress_bar=False, **more)


@pytest.fixture(scope="module")
def aligner(_slides: ad.AnnData) -> st.tl.Aligner:
    return align(_slides)


def test_what_is_written(slides: ad.AnnData, aligner: st.tl.Aligner, tmp_path: Path) -> None:
    before = {key: value.copy() for key, value in slides.obsm.items()}
    aligner.transform(slides)
    for key in BRANCHES:
        halves = slides.obsm[key].reshape(519, 2, 12)
        assert halves.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(halves, axis=2), 1, atol=1e-5)
    for key, value in before.items():
        np.testing.assert_array_equal(slides.obsm[key], value)
    assert slides.uns["stofm"]["X_aligned"]["fingerprint"] == aligner.fingerprint
    slides.write_h5ad(tmp_path / "slides.h5ad")
    again = ad.read_h5ad(tmp_path / "slides.h5ad")
    np.testing.assert_array_equal(again.obsm["X_aligned"], slides.obsm["X_aligned"])


def test_the_order_of_rows_does_not_matter(
    slides: ad.AnnData, aligner: st.tl.Aligner, rng: np.random.Generator
) -> None:
    order = rng.permutation(slides.n_obs)
    mixed = slides[order].copy()
    again = align(mixed)
    assert again.fingerprint == aligner.fingerprint
    again.transform(mixed)
    aligner.transform(slides)
    for key in BRANCHES:
        np.testing.assert_allclose(mixed.obsm[key], slides.obsm[key][order], atol=1e-5)


def test_slides_may_come_one_by_one(slides: ad.AnnData, aligner: st.tl.Aligner) -> None:
    parts = {name: slides[slides.obs["slice_id"] == name].copy() for name in ("slice1", "slice0")}
    returned = aligner.transform(parts, copy=True)
    assert "X_aligned" not in parts["slice0"].obsm
    aligner.transform(slides)
    for name, part in returned.items():
        own = slides[slides.obs["slice_id"] == name].obsm["X_aligned"]
        np.testing.assert_allclose(part.obsm["X_aligned"], own, atol=1e-5)


def test_seeds(slides: ad.AnnData, aligner: st.tl.Aligner) -> None:
    assert align(slides).fingerprint == aligner.fingerprint
    assert align(slides, seed=1).fingerprint != aligner.fingerprint


def test_training_goes_on_after_a_stop(
    slides: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stofm.align import training
    from stofm.train import loop

    whole, file = align(slides, donor_key="donor"), tmp_path / "training"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_BETWEEN_CHECKPOINTS", 0.0)
        save = training._Recorder.save

        def stop(recorder: training._Recorder) -> None:
            save(recorder)
            if len(recorder.best) and recorder._loop.progress.step == 8:
                raise KeyboardInterrupt

        patch.setattr(training._Recorder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            align(slides, donor_key="donor", checkpoint=file)
    again = align(slides, donor_key="donor", checkpoint=file)
    assert again.fingerprint == whole.fingerprint
    kept = [name for name in whole.history if name != "seconds"]
    assert again.history[kept].equals(whole.history[kept])
    # At the end, nothing is left to do.
    monkeypatch.setattr(loop.TrainingLoop, "_train_epoch", None)
    assert align(slides, donor_key="donor", checkpoint=file).fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="of other slides, or with other options"):
        align(slides, donor_key="donor", checkpoint=file, seed=1)
    file.write_text("notes")
    with pytest.raises(ValueError, match=r"no checkpoint of st\.tl\.align"):
        align(slides, checkpoint=file)


def test_one_modality(slides: ad.AnnData, aligner: st.tl.Aligner) -> None:
    aligner.transform(slides)
    both = {key: slides.obsm[key] for key in BRANCHES}
    # No genes at all.
    he_only = ad.AnnData(obs=slides.obs, obsm=dict(slides.obsm), uns=dict(slides.uns))
    aligner.transform(he_only, modality="image")
    np.testing.assert_allclose(he_only.obsm["X_aligned_image"], both["X_aligned_image"], atol=1e-5)
    assert "X_aligned_genes" not in he_only.obsm
    assert not np.allclose(he_only.obsm["X_aligned"], both["X_aligned"], atol=1e-2)
    # No image: how large a unit is, has to be told.
    for key in ("X_image_spot", "X_image_niche", *BRANCHES):
        del slides.obsm[key]
    del slides.uns["spatial"]
    slides.uns["stofm"] = {}
    options = {"modality": "genes", "library_key": "slice_id"}
    with pytest.raises(ValueError, match="Pass `microns_per_unit`"):
        aligner.transform(slides, **options)
    aligner.transform(slides, **options, microns_per_unit=1.0)
    np.testing.assert_allclose(slides.obsm["X_aligned_genes"], both["X_aligned_genes"], atol=1e-5)
    with pytest.raises(KeyError, match="There is no obsm"):
        aligner.transform(slides, library_key="slice_id")


def test_save_and_load(slides: ad.AnnData, aligner: st.tl.Aligner, tmp_path: Path) -> None:
    aligner.save(tmp_path / "aligner")
    again = st.tl.Aligner.load(tmp_path / "aligner")
    assert again.fingerprint == aligner.fingerprint
    assert (again.image, again.options, again.params) == (
        aligner.image,
        aligner.options,
        aligner.params,
    )
    copy = again.transform(slides, copy=True)
    aligner.transform(slides)
    np.testing.assert_array_equal(copy.obsm["X_aligned"], slides.obsm["X_aligned"])
    np.testing.assert_array_equal(
        again.reference.expression.toarray(), aligner.reference.expression.toarray()
    )
    with pytest.raises(FileExistsError, match="overwrite=True"):
        aligner.save(tmp_path / "aligner")
    config = tmp_path / "aligner" / "config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps(entries | {"params": {}}))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        st.tl.Aligner.load(tmp_path / "aligner")
    with pytest.raises(FileNotFoundError, match="no folder of an aligner"):
        st.tl.Aligner.load(tmp_path)


def test_features_of_another_encoder_are_refused(
    slides: ad.AnnData, aligner: st.tl.Aligner
) -> None:
    st.im.embed(slides, "statistics", crops=(100, 300), device="cpu", show_progress_bar=False)
    with pytest.raises(ValueError, match=r"of 100 and 300 µm, expected .*crops=\(100\.0, 200\.0\)"):
        aligner.transform(slides)
    st.im.embed(slides, "X_image_spot", crops=(100, 200), key_added="X_other")
    with pytest.raises(ValueError, match=r"features of 'X_image_spot' .*expected 'statistics'"):
        aligner.transform(slides, image_key="X_other")
    st.im.embed(slides, "statistics", n_views=2, device="cpu", show_progress_bar=False)
    with pytest.raises(ValueError, match=r"n_views=2\) in .*'statistics', .*n_views=1\)"):
        aligner.transform(slides)
    del slides.uns["stofm"]["X_image_spot"]
    with pytest.raises(KeyError, match=r"no record .*st\.im\.embed"):
        align(slides)
    with pytest.raises(KeyError, match=r"X_imag_spot.*Nearest: \['X_image_spot'"):
        align(slides, image_key="X_imag")


def test_genes_of_niches_are_means_before_scaling(slides: ad.AnnData) -> None:
    """The MLP reads the expression itself, which a plain loop gives too."""
    from stofm.align.inputs import Spots
    from stofm.heads.request import resolve_slices

    found = align(slides, options=QUICK, genes="mlp")
    assert found.network.widths["niche_genes"] == 60
    tables = resolve_slices(slides)
    spots, features = found.read(tables, "both", "X_image", "spatial")
    assert isinstance(spots, Spots)
    values = log_normalised(slides.X).toarray()
    xy, slices = slides.obsm["spatial"], slides.obs["slice_id"].to_numpy()
    near = (cdist(xy, xy) <= 105) & (slices[:, None] == slices)
    for level, own in (("spot", values), ("niche", near @ values / near.sum(axis=1)[:, None])):
        scaled = np.empty_like(own)
        for name in np.unique(slices):
            rows = slices == name
            spread = np.maximum(own[rows].std(axis=0), 0.05)
            scaled[rows] = (own[rows] - own[rows].mean(axis=0)) / spread
        scaled /= np.sqrt((scaled**2).mean())
        read = spots.to_tables(features[f"{level}_genes"])
        np.testing.assert_allclose(read, scaled, atol=2e-3)


def test_the_spot_may_be_left_out_of_its_niche(slides: ad.AnnData) -> None:
    from stofm.align.inputs import Spots
    from stofm.heads.request import resolve_slices

    spots = Spots.read(resolve_slices(slides), 200, "spatial", key="X_image", self_in_niche=False)
    for members in spots.members:
        assert members.diagonal().max() == 0
        assert set(np.unique(members.sum(axis=1).A1)) <= {2, 3, 4, 5, 6}


def test_a_donor_is_held_out(slides: ad.AnnData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stofm"):
        found = align(slides, donor_key="donor")
    assert "Slides ['slice0'], of the donor with the fewest spots, are held out." in caplog.text
    assert "within its slide the partner" in caplog.text
    splits = found.retrieval.groupby("slide")["split"].unique().map(list).to_dict()
    assert splits == {"slice0": ["validation"], "slice1": ["train"], "slice2": ["train"]}
    assert set(found.history["split"]) == {"train", "validation"}
    assert np.bincount(found.reference.group).tolist() == [173, 346]
    with pytest.raises(ValueError, match="names one donor"):
        align(slides[slides.obs["donor"] == "b"].copy(), donor_key="donor")
    with pytest.raises(ValueError, match="the one donor of each slice; slice 'slice0' has"):
        align(slides, donor_key="region")
    with pytest.raises(KeyError, match=r"no obs\['patient'\] that names donors"):
        align(slides, donor_key="patient")


@pytest.mark.parametrize("genes", ["X_pcs", ("X_pcs", "X_more")])
def test_any_entry_stands_for_genes(slides: ad.AnnData, genes: object) -> None:
    values = log_normalised(slides.X).toarray()
    slides.obsm["X_pcs"], slides.obsm["X_more"] = values[:, :7], values[:, 7:18]
    found = align(slides, genes=genes)
    is_pair = isinstance(genes, tuple)
    assert found.network.widths["niche_genes"] == (11 if is_pair else 7)
    found.transform(slides)
    assert slides.obsm["X_aligned"].shape == (519, 24)


def test_the_embeddings_of_a_model_are_asked_for(slides: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"Run st\.tl\.encode_cells\(adata\) first"):
        align(slides, genes="stofm")


def test_st_align_is_a_preset(slides: ad.AnnData) -> None:
    from dataclasses import replace

    options = replace(st.tl.AlignOptions.st_align(), d_model=16, d_hidden=16, epochs=1)
    found = align(slides, options=options)
    scales = [float(one.exp()) for one in found.network.log_scales.values()]
    assert scales == pytest.approx([10.0] * 3)


def cluster(values: np.ndarray, truth: object) -> float:
    """ARI of k-means, mean over seeds."""
    found = [KMeans(6, n_init=5, random_state=k).fit_predict(values) for k in range(3)]
    return float(np.mean([st.metrics.ari(truth, one) for one in found]))


@pytest.fixture(scope="module")
def planted() -> tuple[ad.AnnData, ad.AnnData]:
    """Slides to align, and one that is left out."""
    options = {"technology": "visium", "n_slices": 4, "image": True, "depth": 60.0}
    adata = st.datasets.simulate_slice(420, 100, **options)
    st.im.embed(adata, "statistics", device="cpu", show_progress_bar=False)
    is_new = adata.obs["slice_id"] == "slice3"
    return adata[~is_new].copy(), adata[is_new].copy()


@pytest.mark.slow
def test_planted_morphology(planted: tuple[ad.AnnData, ad.AnnData]) -> None:
    """On a slide that was left out, partners are found, and regions better than by one modality."""
    slides, new = planted
    align(slides, options=st.tl.AlignOptions(max_steps=80)).transform(new)
    d = new.obsm["X_aligned"].shape[1] // 2
    for half in (slice(d), slice(d, None)):
        image, genes = (new.obsm[f"X_aligned_{one}"][:, half] for one in ("image", "genes"))
        ranks = retrieval_ranks(image, genes)
        assert np.mean(ranks <= 10) > 3 * 10 / len(ranks)
    expression = log_normalised(new.X).toarray()
    image = np.concatenate([new.obsm["X_image_spot"], new.obsm["X_image_niche"]], axis=1)
    image = (image - image.mean(axis=0)) / image.std(axis=0)
    truth = new.obs["region"]
    scores = {
        "aligned": cluster(new.obsm["X_aligned"], truth),
        "genes": cluster(PCA(20, random_state=0).fit_transform(expression), truth),
        "image": cluster(PCA(20, random_state=0).fit_transform(image), truth),
    }
    assert scores["aligned"] > max(scores["genes"], scores["image"]), scores


def test_genes_of_the_panel_may_be_missing(
    slides: ad.AnnData, aligner: st.tl.Aligner, recwarn: pytest.WarningsRecorder
) -> None:
    few = slides[:, :24].copy()
    with pytest.warns(UserWarning, match="40% of the 60 genes"):
        aligner.transform(few)
    with pytest.raises(ValueError, match=r"7% of the 60 .* At least 10% are needed"):
        aligner.transform(slides[:, :4].copy())


def test_niches_of_one_spot_are_warned_of(slides: ad.AnnData) -> None:
    slides.obsm["X_mine"] = slides.obsm["X_image_spot"]
    st.im.embed(slides, "X_mine", microns_per_unit=2.0, crops=(100, 200))
    with pytest.warns(UserWarning, match="hold no other spot"):
        align(slides)
