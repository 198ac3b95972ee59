from __future__ import annotations

import fnmatch
import functools
import hashlib
import socket
import threading
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import stofm as st

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ["human_breast_xenium", "mouse_cortex_osmfish", "mouse_olfactory_bulb_st"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def slice_file(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    st.datasets.simulate_slice(13, 7).write_h5ad(folder / "slice.h5ad")
    return folder / "slice.h5ad"


@pytest.fixture
def digest(slice_file: Path) -> str:
    return hashlib.sha256(slice_file.read_bytes()).hexdigest()


@pytest.fixture
def url(slice_file: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=slice_file.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/slice.h5ad"
    server.shutdown()
    thread.join()
    server.server_close()


def test_address_with_checksum_is_downloaded_once(
    url: str, digest: str, slice_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert st.datasets.load(url, sha256=digest.upper(), cache_dir=cache).shape == (13, 7)
    slice_file.unlink()
    assert st.datasets.load(url, sha256=digest, cache_dir=cache).shape == (13, 7)
    assert len(list(cache.iterdir())) == 1


def test_wrong_checksum_of_an_address(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not match the known hash"):
        st.datasets.load(url, sha256="0" * 64, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.h5ad"))


def test_path_with_checksum(slice_file: Path, digest: str) -> None:
    assert st.datasets.load(str(slice_file), sha256=digest).shape == (13, 7)
    with pytest.raises(ValueError, match=f"has the sha256 {digest}, expected 0000"):
        st.datasets.load(str(slice_file), sha256="0" * 64)


def test_checksum_is_asked_for(slice_file: Path) -> None:
    with pytest.raises(ValueError, match=r"as `sha256sum` prints them, found None"):
        st.datasets.load(str(slice_file))
    with pytest.raises(ValueError, match=r"64 hexadecimal digits, .* found 'abc'"):
        st.datasets.load("https://example.org/slice.h5ad", sha256="abc")


def test_what_is_no_file() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no section or file 'cortex'.*mouse_cortex_osmfish"
    ):
        st.datasets.load("cortex", sha256="0" * 64)


@pytest.mark.parametrize("name", NAMES)
def test_sections_of_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # no network
    adata = st.datasets.load(name)
    assert adata.X.format == "csr"
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    assert np.isfinite(adata.obsm["spatial"]).all()
    assert adata.obs_names.is_unique
    assert adata.var["gene_ids"].str.startswith("ENS").mean() > 0.95
    said = adata.uns["stofm"]["source"]
    assert said["licence"].split()[0] in {"MIT", "CC"}
    assert said["citation"]
    assert said["repository"].startswith("github.com/")


def test_sections_are_small_and_have_licences() -> None:
    folder = Path(st.datasets.__file__).with_name("sections")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    text, licences = ((folder / one).read_text() for one in ("README.md", "LICENSES.txt"))
    for name in NAMES:
        assert f"| `{name}` |" in text
        assert f"{name}.h5ad" in licences


def test_sections_that_trained_the_model_say_so() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "stofm-mini.toml"
    if not recipe.is_file():
        pytest.skip("no recipes/ beside the tests")
    excluded = tomllib.loads(recipe.read_text())["data"]["exclude"]
    files = {
        "mouse_cortex_osmfish": "osmfish_sscortex",
        "human_breast_xenium": "xenium_breast_tile",
    }
    files["mouse_olfactory_bulb_st"] = "st_mob_he_MOB1"
    for name, file in files.items():
        is_trained = not any(fnmatch.fnmatch(f"{file}.h5ad", one) for one in excluded)
        assert st.datasets.load(name).uns["stofm"]["source"]["trained_stofm_mini"] == is_trained


def test_image_lies_under_the_spots() -> None:
    adata = st.datasets.load("mouse_olfactory_bulb_st")
    (one,) = adata.uns["spatial"].values()
    image = one["images"]["lowres"].mean(axis=2)
    column, row = (
        (adata.obsm["spatial"] * one["scalefactors"]["tissue_lowres_scalef"]).astype(int).T
    )
    # Tissue is darker than the slide around it.
    assert image[row, column].mean() < np.median(image) - 20
