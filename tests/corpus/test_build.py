from __future__ import annotations

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

import stofm as st
from stofm.corpus import _build
from stofm.corpus.manifest import read_manifest, read_slices
from stofm.corpus.shards import Shard


@pytest.fixture
def build(files, tmp_path, vocabulary):
    def run(given=files, out="corpus", **options):
        options = {"vocabulary": vocabulary, "show_progress_bar": False, **options}
        return st.corpus.build(given, tmp_path / out, **options)

    return run


def statuses(manifest):
    return dict(zip(manifest["name"], manifest["status"], strict=True))


def test_slices_are_joined_to_shards_in_order(build, files, tmp_path, adata, vocabulary):
    manifest = build(shard_bytes=30_000)
    assert manifest["name"].tolist() == [*"abcde"]
    assert manifest["status"].unique().tolist() == ["ok"]
    assert manifest["cells"].tolist() == [41, 37, 31, 43, 32]
    assert manifest["genes_matched"].unique().tolist() == [67]
    assert manifest["genes"].unique().tolist() == [71]
    assert manifest["species"].unique().tolist() == ["human"]
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "corpus"), manifest)
    shards = sorted((tmp_path / "corpus" / "shards").iterdir())
    sizes = [sum(file.stat().st_size for file in one.glob("*.npy")) for one in shards]
    assert 1 < len(shards) < 5
    assert max(sizes) <= 30_000
    assert not list((tmp_path / "corpus" / "parts").iterdir())
    slices = read_slices(tmp_path / "corpus")
    assert [one.name for one in slices] == [*"abcde"]
    known = adata[:41, :67].X
    np.testing.assert_array_equal(
        slices[0].to_anndata().X[:, :-1].toarray(), known[:, known.getnnz(0) > 0].toarray()
    )


def test_cells_must_express_a_share_of_a_small_panel(build, adata):
    # 7 of 67 genes, as 100 are more than a tenth of the panel.
    n_genes = (adata[:41, :67].X > 0).sum(axis=1).A1
    first = build().iloc[0]
    assert (first["min_genes"], first["cells"]) == (7, (n_genes >= 7).sum())
    strict = build(out="strict", min_genes=3)
    assert strict["min_genes"].unique().tolist() == [3]


def test_cells_with_few_genes_are_left_out(build, files, adata):
    few = adata[:50].copy()
    few.obs["library"] = "one"
    dense = few.X.toarray()
    dense[3, 2:] = 0
    few.X = dense
    few.write_h5ad(files / "few.h5ad")
    (row,) = build(files / "few.h5ad", out="few").to_dict("records")
    assert (row["cells"], row["cells_left_out"]) == (49, 1)
    assert 3 not in read_slices(files.parent / "few")[0].part("rows")
    few.X = 0 * dense
    few.write_h5ad(files / "none.h5ad")
    with pytest.warns(UserWarning, match=r"'none': No cell expresses 7 of the 67 known genes"):
        assert statuses(build(files / "none.h5ad", out="none")) == {"none": "failed"}


def test_failed_files_are_reported_and_tried_again(build, files):
    whole = (files / "c.h5ad").read_bytes()
    (files / "c.h5ad").write_bytes(whole[:1000])
    with pytest.warns(UserWarning, match=r"1 files failed .*c\.h5ad can't be read"):
        first = build()
    assert statuses(first) == dict.fromkeys("abde", "ok") | {"c": "failed"}
    assert "can't be read" in first.loc[2, "reason"]
    (files / "c.h5ad").write_bytes(whole)
    assert statuses(build()) == dict.fromkeys("abcde", "ok")
    gone = [files / "a.h5ad", files / "gone.h5ad"]
    with pytest.raises(FileNotFoundError, match=r"no slice or folder of slices at .*gone\.h5ad"):
        build(gone, out="other")


def test_what_is_done_is_not_done_again(build, monkeypatch):
    build()
    monkeypatch.setattr(_build, "write_source", lambda *_, **__: pytest.fail("read again"))
    assert len(build()) == 5


def test_the_same_cells_are_taken_once(build, files, rng):
    again = ad.read_h5ad(files / "b.h5ad")
    again = again[rng.permutation(again.n_obs), rng.permutation(again.n_vars)].copy()
    again.obsm["spatial"] *= 0.2
    again.write_h5ad(files / "x.h5ad")
    manifest = build()
    assert statuses(manifest) == dict.fromkeys("abcde", "ok") | {"x": "duplicate"}
    assert manifest.loc[5, "reason"] == f"has the cells of {files / 'b.h5ad'}"
    assert len(read_slices(files.parent / "corpus")) == 5


def test_a_changed_file_replaces_what_it_was(build, files):
    build()
    shutil.copy(files / "a.h5ad", files / "b.h5ad")
    manifest = build()
    assert manifest["status"].tolist() == ["ok", "replaced", "duplicate", "ok", "ok", "ok"]


def test_evaluation_slices_are_left_out_by_name_and_content(build, files, tmp_path):
    (tmp_path / "test").mkdir()
    part = ad.read_h5ad(files / "d.h5ad")[5:20]
    part.copy().write_h5ad(tmp_path / "test" / "crop.h5ad")
    shutil.copy(files / "e.h5ad", tmp_path / "test" / "a.h5ad")
    with pytest.warns(UserWarning, match=r"exclude = \['x\*'\] names neither an existing file"):
        manifest = build(exclude=[tmp_path / "test", "files/b*", "x*"])
    assert statuses(manifest) == dict.fromkeys("abde", "left out") | {"c": "ok"}
    reasons = dict(zip(manifest["name"], manifest["reason"], strict=True))
    assert "named as 'a'" in reasons["a"]
    assert "named as 'files/b*'" in reasons["b"]
    assert reasons["d"] == "has cells of crop, which is held out"
    assert reasons["e"] == "has cells of a, which is held out"
    assert [one.name for one in read_slices(tmp_path / "corpus")] == ["c"]


def test_a_table_says_how_files_are_read_and_what_they_are(build, files, adata, tmp_path):
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X * 0.1
    adata.write_h5ad(files / "both.h5ad")
    rows = (
        "source,layer,library_key,licence,technology\n"
        "both.h5ad,raw,library,CC BY 4.0,Xenium\na.h5ad,,,,\n"
    )
    (files / "table.csv").write_text(rows, encoding="utf-8")
    manifest = build(files / "table.csv")
    assert manifest["name"].tolist() == ["both/left", "both/right", "a"]
    assert manifest["licence"].tolist() == ["CC BY 4.0", "CC BY 4.0", ""]
    assert manifest["technology"].tolist() == ["Xenium", "Xenium", ""]
    assert manifest["cells"].tolist() == [101, 83, 41]
    (files / "table.csv").write_text("source,license\na.h5ad,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"table\.csv must have the column 'source'.*'license'"):
        build(files / "table.csv")


def write_xenium(folder, adata):
    """A run's tables of counts and of places."""
    folder.mkdir(parents=True)
    table = pd.DataFrame(adata.X.toarray().astype(int), adata.obs_names, adata.var_names)
    table.to_csv(folder / "counts.csv", index_label="cell_id")
    places = pd.DataFrame(adata.obsm["spatial"], table.index, ["x_centroid", "y_centroid"])
    places.to_csv(folder / "cells.csv", index_label="cell_id")


def test_what_an_instrument_wrote_is_read_as_its_h5ad_is(build, files, tmp_path):
    adata = ad.read_h5ad(files / "a.h5ad")
    write_xenium(tmp_path / "S1.2" / "outs", adata)
    table = tmp_path / "table.tsv"
    table.write_text("source\ttechnology\nS1.2/outs\tXenium v1\nfiles/a.h5ad\t\n")
    found, again = build(table).to_dict("records")
    assert (found["name"], found["unit"], found["cells"]) == ("S1.2", "micrometre", adata.n_obs)
    assert found["technology"] == "Xenium v1"
    assert (again["status"], again["content"]) == ("duplicate", found["content"])
    assert again["reason"] == f"has the cells of {tmp_path / 'S1.2' / 'outs'}"


@pytest.mark.parametrize("where", ["raw", "layer"])
def test_counts_may_be_elsewhere_than_in_x(build, files, where):
    adata = ad.read_h5ad(files / "a.h5ad")
    if where == "raw":
        adata.raw = adata.copy()
    else:
        adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.37
    adata.write_h5ad(files / "z.h5ad")
    first, again = build([files / "a.h5ad", files / "z.h5ad"]).to_dict("records")
    assert (again["status"], again["content"]) == ("duplicate", first["content"])


def test_shares_make_one_corpus(build, files):
    shutil.copy(files / "a.h5ad", files / "z.h5ad")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda part: build(shard=f"{part}/2"), (1, 2)))
    manifest = read_manifest(files.parent / "corpus")
    assert statuses(manifest) == dict.fromkeys("abcde", "ok") | {"z": "duplicate"}
    assert set(manifest["shard"]) == {"001-00000", "002-00000"}
    for wrong in ("0/2", "3/2", "2"):
        with pytest.raises(ValueError, match=r"`shard` must be '1/8' to '8/8'"):
            build(shard=wrong)


def test_two_processes_do_not_build_one_share(build, tmp_path):
    build()
    with (
        FileLock(tmp_path / "corpus" / ".build-1.lock"),
        pytest.raises(
            FileExistsError, match=r"corpus is in use: another process writes to it\. Wait"
        ),
    ):
        build()


def test_other_settings_and_other_folders_are_refused(build, tmp_path, files):
    build()
    with pytest.raises(ValueError, match=r"begun with another min_genes \(\[100\], now \[5\]\)"):
        build(min_genes=5)
    with pytest.raises(
        FileExistsError, match=r"files holds something other than a corpus \(a\.h5ad"
    ):
        build(out="files")


def test_half_a_shard_that_a_kill_left_does_not_count(build, tmp_path, content):
    build()
    corpus = tmp_path / "corpus"
    whole = content(corpus)
    # As if it had been killed before the shard got its name. No process has this number.
    left = corpus / "shards" / f".001-00000.stofm-new-{2**22 + 1}-ab"
    (corpus / "shards" / "001-00000").rename(left)
    assert statuses(build()) == dict.fromkeys("abcde", "ok")
    assert content(corpus) == whole


def test_a_full_disk_ends_the_build_and_loses_nothing(build, content, tmp_path, monkeypatch):
    build(out="whole")
    original, n_written = _build.write_source, []

    def write_source(*args, **options):
        if len(n_written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        n_written.append(original(*args, **options))

    with monkeypatch.context() as patch:
        patch.setattr(_build, "write_source", write_source)
        with pytest.raises(OSError, match="No space left"):
            build()
    assert len(list((tmp_path / "corpus" / "parts").iterdir())) == 3
    build()
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")


def test_a_full_disk_is_told_by_the_file_that_did_not_fit(build, monkeypatch):
    class Full:
        def __init__(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stofm.corpus.shards._ArrayFile", Full)
    with pytest.raises(
        OSError, match=r"can't be written: No space left on device\. What was there"
    ):
        build()


def test_check_finds_what_changed(build, content, tmp_path):
    build(shard_bytes=30_000)
    corpus = tmp_path / "corpus"
    whole = content(corpus)
    assert st.corpus.check(corpus) == []
    shard = corpus / "shards" / "001-00001"
    array = shard / "counts.npy"
    array.write_bytes(array.read_bytes()[:-2])
    (found,) = st.corpus.check(corpus)
    assert "counts.npy is damaged" in found
    assert f"Delete {shard} and build again" in found
    lost = [one["name"] for one in Shard(shard).slices]
    assert ", ".join(lost) in found
    with pytest.raises(ValueError, match=r"counts\.npy can't be read"):
        [one.ranked for one in read_slices(corpus)]
    shutil.rmtree(shard)
    (found,) = st.corpus.check(corpus)
    assert "damaged" in found
    build(shard_bytes=30_000)
    assert content(corpus) == whole


def test_info_counts(build, tmp_path):
    shutil.copy(tmp_path / "files" / "a.h5ad", tmp_path / "files" / "z.h5ad")
    build()
    table = st.corpus.info(tmp_path / "corpus").set_index("status")
    assert table["slices"].to_dict() == {"ok": 5, "duplicate": 1}
    assert table.loc["ok", "cells"] == 184


def test_export_writes_stores_that_anndata_reads(build, tmp_path):
    build()
    st.corpus.export(tmp_path / "corpus", tmp_path / "stores", show_progress_bar=False)
    stores = sorted((tmp_path / "stores").glob("*.zarr"))
    assert [one.stem for one in stores] == [*"abcde"]
    for store, one in zip(stores, read_slices(tmp_path / "corpus"), strict=True):
        expected = one.to_anndata()
        found = ad.read_zarr(store)
        np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
        assert found.var_names.tolist() == expected.var_names.tolist()
        assert json.loads(json.dumps(found.uns["source"]["cells"], default=int)) == one.n_cells


def test_a_folder_that_is_no_corpus_is_refused(files):
    for function in (st.corpus.info, st.corpus.check):
        with pytest.raises(
            FileNotFoundError, match=r"files is not a corpus .*stofm\.corpus\.build"
        ):
            function(files)
