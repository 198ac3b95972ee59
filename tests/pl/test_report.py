from __future__ import annotations

import base64
import builtins
import json
import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad

pytest.importorskip("plotly", reason="needs plotly (stofm[report])")


@pytest.fixture
def described(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    adata.obs["stofm_domain"] = pd.Categorical(np.where(adata.obsm["spatial"][:, 0] > 90, "0", "1"))
    adata.obsm["X_umap"] = rng.normal(size=(adata.n_obs, 2))
    adata.uns["stofm"] = {
        "stofm_domain": {"params": {"n_domains": 2, "library_key": ""}, "version": "0.1.0"},
        "source": {"technology": "10x Visium", "tissue": "liver, left lobe", "unit": "micrometre"},
    }
    # A gene of one domain.
    counts = adata.X.toarray()
    counts[:, 4] += 9 * (adata.obs["stofm_domain"] == "0").to_numpy()
    adata.X = counts
    return adata


def data_of(file: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def unpacked(packed: dict[str, str], dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["bytes"])), dtype)


def test_what_is_in_a_page(described: ad.AnnData, tmp_path: Path) -> None:
    (file,) = st.pl.report(described, tmp_path / "page.html")
    data = data_of(file)
    assert data["what"] == "spots"
    np.testing.assert_allclose(unpacked(data["x"], "<f4"), described.obsm["spatial"][:, 0], 1e-6)
    np.testing.assert_allclose(
        unpacked(data["umap"]["y"], "<f4"), described.obsm["X_umap"][:, 1], 1e-6
    )
    columns = {one["name"]: one for one in data["columns"]}
    assert list(columns) == ["stofm_domain", "slide", "kind", "partial", "flag"]
    codes = unpacked(columns["partial"]["values"], "u1")
    expected = described.obs["partial"].cat.codes.to_numpy()
    np.testing.assert_array_equal(codes, np.where(expected < 0, 3, expected))
    assert columns["kind"]["colors"] == list(described.uns["kind_colors"])
    # Log-normalised, in 255 steps.
    gene = next(one for one in data["genes"] if one["name"] == "GENE4")
    counts = described.X
    normal = np.log1p(1e4 * counts[:, 4] / counts.sum(axis=1))
    found = unpacked(gene["values"], "u1") * gene["scale"]
    np.testing.assert_allclose(found, normal, atol=normal.max() / 500)
    # The scale bar, of a fifth of the width.
    assert data["layout"]["annotations"][0]["text"] == "20 µm"
    text = file.read_text(encoding="utf-8")
    assert "<title>liver</title>" in text
    assert "n_domains=2" in text
    markers = text[text.index("Marker genes by domain") :]
    assert markers.index('data-gene="GENE4"') < markers.index("</tr>", markers.index("<td>0</td>"))
    assert "Composition of domain by slide" in text


def test_each_slice_has_a_page(described: ad.AnnData, tmp_path: Path) -> None:
    files = st.pl.report(described, tmp_path / "page.html", library_key="slide", genes=["GENE1"])
    assert [file.name for file in files] == ["page_a.html", "page_b.html"]
    assert [len(unpacked(data_of(file)["x"], "<f4")) for file in files] == [41, 53]
    assert [one["name"] for one in data_of(files[0])["genes"]] == ["GENE1"]


def test_the_image_lies_where_it_was_taken(described: ad.AnnData, tmp_path: Path) -> None:
    image = np.zeros((60, 110, 3), np.uint8)
    described.uns["spatial"] = {
        "one": {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 0.5}}
    }
    (file,) = st.pl.report(described, tmp_path / "page.html", color="kind")
    (placed,) = data_of(file)["layout"]["images"]
    assert placed["source"].startswith("data:image/jpeg;base64,")
    low, high = described.obsm["spatial"].min(axis=0), described.obsm["spatial"].max(axis=0)
    assert placed["x"] <= low[0]
    assert placed["y"] <= low[1]
    assert placed["x"] + placed["sizex"] >= min(high[0], 2 * 110) - 2
    assert placed["y"] + placed["sizey"] >= min(high[1], 2 * 60) - 2


def test_missing(described: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="'GENE99' is no gene of var_names"):
        st.pl.report(described, tmp_path / "page.html", genes=["GENE99"])
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        st.pl.report(described, tmp_path / "nowhere" / "page.html")
    load = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'stofm\[report\]'"):
        st.pl.report(described, tmp_path / "page.html")


def test_the_command(described: ad.AnnData, tmp_path: Path, capsys: Any) -> None:
    described.write_h5ad(tmp_path / "slice.h5ad")
    arguments = ["report", str(tmp_path / "slice.h5ad"), str(tmp_path / "page.html"), "--quiet"]
    assert main(arguments) == 0
    assert data_of(tmp_path / "page.html")["columns"][0]["name"] == "stofm_domain"
    assert main(arguments) == 1
    assert "is there already: pass --overwrite" in capsys.readouterr().err
    plain = st.datasets.simulate_slice(200, 40)
    plain.obsm["X_umap"] = plain.obsm["spatial"]
    plain.write_h5ad(tmp_path / "slice.h5ad")
    assert main([*arguments, "--overwrite"]) == 0
    assert data_of(tmp_path / "page.html")["columns"][0]["name"] == "stofm_domain"
