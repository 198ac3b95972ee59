from __future__ import annotations

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

import stofm as st
from stofm.datasets import _load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEADER = "name\turl\tsha256\tlicense\tcitation\n"


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
    with pytest.raises(ValueError, match="its checksum is needed: pass sha256="):
        st.datasets.load(str(slice_file))
    with pytest.raises(ValueError, match="64 hexadecimal digits, found 'abc'"):
        st.datasets.load("https://example.org/slice.h5ad", sha256="abc")


def test_listed_section(
    url: str, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = f"cortex_a\t{url}\t{digest}\tCC0-1.0\tNobody et al. 2026\n"
    monkeypatch.setattr(_load, "_sections_file", lambda: HEADER + row)
    assert st.datasets.load("cortex_a", cache_dir=tmp_path).shape == (13, 7)
    with pytest.raises(KeyError, match=r"There are \['cortex_a'\]\."):
        st.datasets.load("cortex_b")


def test_unknown_name_says_how_to_pass_an_address() -> None:
    with pytest.raises(KeyError, match=r"no section and no file 'cortex'.*sha256="):
        st.datasets.load("cortex")


def test_shipped_list_is_well_formed() -> None:
    assert _load._sections_file().startswith(HEADER)
    for section in _load._sections().values():
        assert _load._SHA256.fullmatch(section["sha256"])
        assert section["url"].startswith("https://")
        assert section["license"]
        assert section["citation"]
