from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._edge.expression import log_normalised

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = st.tl.AlignOptions(d_model=16, d_hidden=32, epochs=8)


@pytest.fixture(scope="module")
def made() -> tuple[ad.AnnData, ad.AnnData, st.tl.Aligner]:
    options = {"technology": "visium", "n_slices": 3, "image": True}
    adata = st.datasets.simulate_slice(211, 60, **options)
    st.im.embed(adata, "statistics", device="cpu", show_progress_bar=False)
    is_new = adata.obs["slice_id"] == "slice2"
    slides, new = adata[~is_new].copy(), adata[is_new].copy()
    aligner = st.tl.align(slides, options=OPTIONS, device="cpu", show_progress_bar=False)
    return slides, new, aligner


@pytest.fixture
def new(made: tuple[ad.AnnData, ad.AnnData, st.tl.Aligner]) -> ad.AnnData:
    """A slide without counts."""
    known = made[1]
    return ad.AnnData(obs=known.obs, obsm=dict(known.obsm), uns=dict(known.uns))


@pytest.fixture
def aligner(made: tuple[ad.AnnData, ad.AnnData, st.tl.Aligner]) -> st.tl.Aligner:
    return made[2]


@pytest.fixture
def truth(made: tuple[ad.AnnData, ad.AnnData, st.tl.Aligner]) -> pd.DataFrame:
    known = made[1]
    values = log_normalised(known.X).toarray()
    return pd.DataFrame(values, known.obs_names, known.var_names)


@pytest.mark.parametrize("method", ["ridge", "aligned", "retrieval", "mlp"])
def test_planted_genes_are_predicted(
    new: ad.AnnData, aligner: st.tl.Aligner, truth: pd.DataFrame, method: str
) -> None:
    st.tl.predict_genes(new, aligner, method=method, device="cpu")
    found = new.obsm["stofm_predicted"]
    assert list(found.columns) == list(truth.columns)
    top = truth.var().nlargest(15).index
    assert np.mean(st.metrics.pearson(truth[top], found[top])) > (
        0.1 if method == "retrieval" else 0.2
    )
    scores = new.uns["stofm"]["stofm_predicted"]["scores"]
    assert list(scores.index) == list(truth.columns)
    # Scores of left-out slides tell which genes of a new one can be predicted.
    own = st.metrics.pearson(truth, found)
    assert np.corrcoef(scores["pearson"], own)[0, 1] > 0.7


def test_ridge_is_that_of_scikit_learn(
    new: ad.AnnData, aligner: st.tl.Aligner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import Ridge

    from stofm.align import prediction

    monkeypatch.setattr(prediction, "_STRENGTHS", np.array([2.0]))
    st.tl.predict_genes(new, aligner, genes=["GFAP", "MBP"], device="cpu")
    x = aligner.reference.image.astype(np.float64)
    strength = 2.0 * (np.linalg.svd(x, compute_uv=False) ** 2).mean()
    y = aligner.reference.expression.toarray()
    names = [gene.name for gene in aligner.genes.panel]
    y = y[:, [names.index(gene) for gene in ("GFAP", "MBP")]]
    image = np.concatenate([new.obsm["X_image_spot"], new.obsm["X_image_niche"]], axis=1)
    image = (image - image.mean(axis=0)) / image.std(axis=0)
    expected = Ridge(strength).fit(x, y).predict(image)
    np.testing.assert_allclose(new.obsm["stofm_predicted"], expected, atol=1e-3)
    # Scores are of each slide, predicted from the other.
    group = aligner.reference.group
    pearson, mse = [], []
    for k in (0, 1):
        own = x[group != k]
        s = 2.0 * (np.linalg.svd(own, compute_uv=False) ** 2).mean()
        found = Ridge(s).fit(own, y[group != k]).predict(x[group == k])
        pearson.append(st.metrics.pearson(y[group == k], found))
        mse.append(((found - y[group == k]) ** 2).mean(axis=0))
    scores = new.uns["stofm"]["stofm_predicted"]["scores"]
    np.testing.assert_allclose(scores["pearson"], np.mean(pearson, axis=0), atol=1e-3)
    np.testing.assert_allclose(scores["mse"], np.mean(mse, axis=0), atol=1e-3)


def test_each_gene_has_the_strength_with_the_least_error_on_left_out_spots(
    new: ad.AnnData, aligner: st.tl.Aligner
) -> None:
    from sklearn.linear_model import RidgeCV

    from stofm.align.prediction import _STRENGTHS, Views, fit_predictor

    reference = aligner.reference
    y, found, query = reference.expression.toarray(), [], aligner.reference.at(np.arange(7))
    for x in (reference.image, reference.aligned_image):
        unit = (np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2).mean(dtype=np.float64)
        model = RidgeCV(unit * _STRENGTHS, alpha_per_target=True).fit(x.astype(np.float64), y)
        assert len(set(model.alpha_)) > 3
        found.append(model.predict(x[:7]))
    predictor = fit_predictor(reference, "aligned", 0)
    own = predictor(Views(query.image, query.aligned_image), np.arange(y.shape[1]))
    np.testing.assert_allclose(own, np.mean(found, axis=0), atol=1e-3)


def test_a_saved_aligner_predicts_the_same(
    new: ad.AnnData, aligner: st.tl.Aligner, tmp_path: Path
) -> None:
    aligner.save(tmp_path / "aligner")
    again = st.tl.Aligner.load(tmp_path / "aligner")
    options = {"genes": ["SNAP25", "GFAP"], "device": "cpu", "copy": True}
    first, second = (st.tl.predict_genes(new, one, **options) for one in (aligner, again))
    assert "stofm_predicted" not in new.obsm
    pd.testing.assert_frame_equal(first.obsm["stofm_predicted"], second.obsm["stofm_predicted"])
    first.write_h5ad(tmp_path / "new.h5ad")
    written = ad.read_h5ad(tmp_path / "new.h5ad").uns["stofm"]["stofm_predicted"]["scores"]
    pd.testing.assert_frame_equal(written, second.uns["stofm"]["stofm_predicted"]["scores"])


def test_what_is_refused(new: ad.AnnData, aligner: st.tl.Aligner) -> None:
    with pytest.raises(KeyError, match=r"1 of 2 genes .*near are: \{'GFPA': \['GFAP'"):
        st.tl.predict_genes(new, aligner, genes=["GFPA", "MBP"])
    with pytest.raises(ValueError, match="each once"):
        st.tl.predict_genes(new, aligner, genes=["MBP", "MBP"])
    with pytest.raises(
        ValueError, match=r"\['ridge', 'aligned', 'retrieval', 'mlp'\], found 'lasso'"
    ):
        st.tl.predict_genes(new, aligner, method="lasso")
    assert "stofm_predicted" not in new.obsm


def test_a_single_slide_gives_no_scores(
    made: tuple[ad.AnnData, ad.AnnData, st.tl.Aligner], new: ad.AnnData
) -> None:
    slides = made[0]
    one = slides[slides.obs["slice_id"] == "slice0"].copy()
    options = st.tl.AlignOptions(d_model=16, d_hidden=16, epochs=1)
    aligner = st.tl.align(one, options=options, device="cpu", show_progress_bar=False)
    with pytest.warns(UserWarning, match="Genes have no scores"):
        st.tl.predict_genes(new, aligner, genes=["MBP"])
    assert new.uns["stofm"]["stofm_predicted"]["scores"].isna().all(axis=None)
    assert new.obsm["stofm_predicted"].notna().all(axis=None)
