from __future__ import annotations

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

import stofm as st

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
    with pytest.raises(FileNotFoundError, match=r"no file 'cortex'; pass the path or the http"):
        st.datasets.load("cortex", sha256="0" * 64)
