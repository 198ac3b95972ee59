from __future__ import annotations

import anndata as ad
import pytest

from stofm.__main__ import main
from stofm.corpus.manifest import read_manifest


@pytest.fixture
def run(tmp_path, vocabulary, model, monkeypatch):
    vocabulary.save(tmp_path / "genes.tsv")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return lambda words: main([*words.split(), "--quiet"])


BUILD = "corpus build corpus files --vocabulary genes.tsv"


def test_a_corpus_is_built_counted_checked_exported_and_embedded(run, files, tmp_path, capsys):
    assert run(f"{BUILD} --exclude b --min-genes 3 --shard 1/1") == 0
    manifest = read_manifest(tmp_path / "corpus")
    assert manifest["status"].tolist() == ["ok", "left out", "ok", "ok", "ok"]
    assert manifest["min_genes"].max() == 3
    assert run("corpus info corpus") == 0
    assert "ok              human       4    147" in capsys.readouterr().out
    assert run("corpus check corpus") == 0
    assert "corpus is whole" in capsys.readouterr().out
    assert run("corpus export corpus stores") == 0
    assert ad.read_zarr("stores/a.zarr").n_obs == 41
    assert run("embed corpus out --model model --device cpu") == 0
    assert ad.read_zarr("out/c.zarr").obsm["X_stofm"].shape == (31, 14)
    array = next((tmp_path / "corpus" / "shards").glob("*/tokens.npy"))
    array.write_bytes(array.read_bytes()[:-2])
    assert run("corpus check corpus") == 1
    assert "tokens.npy is damaged" in capsys.readouterr().err


def test_files_of_a_folder_are_embedded(run, files, capsys):
    assert run("embed files out --model model --device cpu --shard 1/5") == 0
    assert ad.read_zarr("out/a.zarr").n_obs == 41
    assert run("embed files out --model model --key-added X --overwrite") == 1
    assert "--key-added, --overwrite: for a single file" in capsys.readouterr().err
    (files / "c.h5ad").write_bytes(b"nothing")
    assert run("embed files out --model model --device cpu --shard 3/5") == 1
    assert "1 slices failed" in capsys.readouterr().err


def test_errors_speak_of_flags(run, files, capsys):
    assert run(f"{BUILD} --shard 3/2") == 1
    assert "--shard must be '1/8' to '8/8'" in capsys.readouterr().err
