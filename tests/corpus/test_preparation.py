from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from stofm._edge import counts
from stofm._edge.gene_mapping import find_columns
from stofm.corpus import preparation, writing
from stofm.corpus.preparation import fit_vocabulary, open_corpus, prepare_slices
from stofm.corpus.reader import take_cells
from stofm.corpus.sources import FileConfig, find_sources
from stofm.genes import GeneVocabulary, rank_genes


@pytest.fixture
def left(adata):
    return adata[adata.obs["library"] == "left"].copy()


@pytest.fixture
def file(left, tmp_path):
    left.write_h5ad(tmp_path / "left.h5ad")
    return tmp_path / "left.h5ad"


@pytest.fixture
def prepare(model, tmp_path):
    def run(data, **options):
        sources = find_sources(data, FileConfig(**options))
        return prepare_slices(sources, model, tmp_path / "work", show_progress_bar=False)

    return run


@pytest.fixture
def open_prepared(model):
    return lambda places, reader=model: open_corpus(places, reader).slices


@pytest.fixture
def mouse(left, tmp_path):
    """A file whose columns are mouse genes, and a function that writes their orthologs."""
    human = list(left.var_names)
    ids = [f"ENSMUSG{k:011d}" for k in range(left.n_vars)]
    left.var["mine"] = ids
    left.var_names = [f"column {k}" for k in range(left.n_vars)]
    left.write_h5ad(tmp_path / "mouse.h5ad")

    def write(name, shift=0):
        rows = ["mouse_ensembl_id\thuman_ensembl_id"]
        rows += [f"{one}\t{other}" for one, other in zip(ids, np.roll(human, shift), strict=True)]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return tmp_path / "mouse.h5ad", write


@pytest.fixture
def reads(monkeypatch):
    """Count how often a source is read."""
    found = []
    original = writing.find_columns
    monkeypatch.setattr(
        writing, "find_columns", lambda *a, **k: found.append(1) or original(*a, **k)
    )
    return found


def test_a_file_is_read_block_by_block(prepare, open_prepared, file, left, monkeypatch):
    whole = open_prepared(prepare(left))[0]
    monkeypatch.setattr(counts, "_BLOCK_ENTRIES", 20 * left.n_vars)
    sizes = []
    original = writing.ShardWriter.append

    def append(self, lengths, **arrays):
        sizes.append(len(lengths))
        return original(self, lengths, **arrays)

    monkeypatch.setattr(writing.ShardWriter, "append", append)
    streamed = open_prepared(prepare(file))[0]
    assert sizes == [20, 20, 20, 20, 20, 1, 101]
    assert streamed.ranked.equals(whole.ranked)
    assert streamed.digest == whole.digest


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_tokens_are_those_of_the_counts(prepare, open_prepared, adata, model, vocabulary, power):
    # Two columns of one gene, one without.
    left = adata[adata.obs["library"] == "left"].copy()
    left.var_names = [*left.var_names[:5], left.var_names[4], *left.var_names[6:]]
    reads = replace(model.config.cell_encoder, values="log", depth_power=power)
    model.config = replace(model.config, cell_encoder=reads, max_tokens=9)
    found = open_prepared(prepare(left), model)[0]
    columns = find_columns(left, vocabulary)
    options = {"max_tokens": 9, "values": True, "depth_power": power}
    expected = rank_genes(left.X, columns.token_ids, columns.medians, **options)
    assert found.ranked.equals(expected)
    rows = np.array([7, 0, 100, 7])
    assert found.take(rows).equals(take_cells(expected, rows))


def test_large_counts_are_kept(prepare, open_prepared, left):
    left.X.data[3] = 1_000_000
    left.X.data[-1] = 70_000
    found = open_prepared(prepare(left))[0]
    assert found.part("totals").tolist() == left.X.sum(axis=1).A1.tolist()
    counts = found.to_anndata().to_df()
    known = left.to_df()[counts.columns.drop("(other genes)")]
    np.testing.assert_array_equal(counts.drop(columns="(other genes)"), known)
    assert found.shard["counts"].dtype == np.uint32
    assert found.shard["tokens"].dtype == np.uint16


def test_a_file_of_several_slices_gives_each_its_cells(prepare, open_prepared, adata, tmp_path):
    adata.write_h5ad(tmp_path / "both.h5ad")
    both = open_prepared(prepare(tmp_path / "both.h5ad", library_key="library"))
    parts = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    alone = [open_prepared(prepare(part))[0] for part in parts]
    assert [one.name for one in both] == ["both/left", "both/right"]
    for one, other in zip(both, alone, strict=True):
        assert one.ranked.equals(other.ranked)


def test_cells_without_known_genes_are_told_of_for_a_file_too(prepare, left, tmp_path):
    left.X.data[: left.X.indptr[3]] = 0
    left.write_h5ad(tmp_path / "left.h5ad")
    with pytest.warns(UserWarning, match="3 of 101 cells have no count in any known gene"):
        prepare(tmp_path / "left.h5ad")


def test_a_slice_that_another_process_can_not_see_is_not_dropped(
    prepare, open_prepared, file, tmp_path
):
    keys = prepare(file)
    assert open_prepared(keys)[0].n_cells == 101
    shutil.rmtree(keys[0][0])
    with pytest.raises(
        FileNotFoundError, match=rf"{keys[0][0].name} is not there.* visible to every proc"
    ):
        open_prepared(keys)


def test_the_same_slice_twice_is_refused(prepare, open_prepared, file, left, adata, tmp_path):
    right = adata[adata.obs["library"] == "right"].copy()
    shutil.copy(file, tmp_path / "copy.h5ad")
    for data, names in (
        ([file, right, tmp_path / "copy.h5ad"], ("'copy'", "'left'")),
        ([file, file], ("'left'", "'left'")),
        ([right, left, file], ("'left'", r"'data\[1\]'")),
    ):
        keys = prepare(data)
        message = "Slice {} is the same as slice {}, in all counts"
        with pytest.raises(ValueError, match=message.format(*names)):
            open_prepared(keys)


def test_changed_orthologs_make_new_tokens(prepare, open_prepared, mouse, reads):
    file, write = mouse
    options = {"gene_key": "mine", "orthologs": write("pairs.tsv")}
    first = prepare(file, **options)
    # What counts is what the table says, not its name or its date.
    assert prepare(file, gene_key="mine", orthologs=write("copy.tsv")) == first
    assert len(reads) == 1
    write("pairs.tsv", shift=1)
    second = prepare(file, **options)
    assert len(reads) == 2
    one, other = (open_prepared(keys)[0] for keys in (first, second))
    assert not one.ranked.equals(other.ranked)


def test_a_table_of_orthologs_that_is_none_is_named(prepare, file, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"pairs\.tsv"):
        prepare(file, orthologs=str(tmp_path / "pairs.tsv"))


def test_a_vocabulary_is_fitted_on_the_genes_that_options_name(mouse, left, tmp_path):
    file, write = mouse
    options = FileConfig(gene_key="mine", orthologs=write("pairs.tsv"))
    human = np.loadtxt(tmp_path / "pairs.tsv", dtype=str, skiprows=1)[:, 1]
    table = fit_vocabulary(find_sources(file, options), tmp_path)
    fitted = GeneVocabulary.from_tsv(table)
    seen = np.asarray((left.X > 0).sum(axis=0)).ravel() >= 10
    assert set(fitted.gene_ids) == set(human[seen])
    # Tokens of the same file, read in the same way, are of these genes.
    assert fitted.aliases[left.var["mine"].iloc[0]] == human[0]

    # Another column, another table: another vocabulary.
    assert fit_vocabulary(find_sources(file, options), tmp_path) == table
    write("pairs.tsv", shift=1)
    shifted = fit_vocabulary(find_sources(file, options), tmp_path)
    assert shifted != table
    medians = dict(zip(fitted.gene_ids, fitted.medians, strict=True))
    other = GeneVocabulary.from_tsv(shifted)
    assert medians != dict(zip(other.gene_ids, other.medians, strict=True))
    with pytest.raises(KeyError, match=r"File 'mouse': adata\.var has no column 'yours'; it has"):
        fit_vocabulary(find_sources(file, FileConfig(gene_key="yours")), tmp_path)


def test_gene_key_decides_over_a_better_known_column(file, left, tmp_path):
    names = list(left.var_names)
    left.var["mine"] = np.roll(names, 1)
    left.write_h5ad(file)
    tables = [
        fit_vocabulary(find_sources(file, FileConfig(gene_key=key)), tmp_path)
        for key in (None, "mine")
    ]
    plain, chosen = (GeneVocabulary.from_tsv(table) for table in tables)
    shifted = dict(zip(names, np.roll(names, 1), strict=True))
    expected = {
        shifted[gene]: median for gene, median in zip(plain.gene_ids, plain.medians, strict=True)
    }
    assert dict(zip(chosen.gene_ids, chosen.medians, strict=True)) == expected


def test_another_reference_makes_another_vocabulary(file, vocabulary, tmp_path, monkeypatch):
    sources = find_sources(file, FileConfig())
    first = fit_vocabulary(sources, tmp_path)
    monkeypatch.setattr(preparation, "embedded_vocabulary", lambda: vocabulary)
    second = fit_vocabulary(sources, tmp_path)
    assert second != first
    assert "GENE1" in GeneVocabulary.from_tsv(second).symbols


def test_counts_that_are_not_raw_name_the_source_when_a_vocabulary_is_fitted(left, tmp_path):
    left.X = left.X * 0.37
    with pytest.raises(ValueError, match=r"^Slice 'data': adata\.X does not hold raw counts"):
        fit_vocabulary(find_sources(left, FileConfig()), tmp_path)


def test_files_that_are_read_with_another_count_as_well(tmp_path):
    from stofm.corpus.preparation import preparation_key

    names = ("A_matrix.mtx", "A_barcodes.tsv", "A_features.tsv", "B_matrix.mtx", "B_barcodes.tsv")
    for name in names:
        (tmp_path / name).write_text("1")
    keys = {name: preparation_key(tmp_path / name, {}) for name in ("A_matrix.mtx", "B_matrix.mtx")}
    (tmp_path / "A_barcodes.tsv").write_text("12")
    assert preparation_key(tmp_path / "A_matrix.mtx", {}) != keys["A_matrix.mtx"]
    assert preparation_key(tmp_path / "B_matrix.mtx", {}) == keys["B_matrix.mtx"]
    (tmp_path / "one.h5ad").write_text("1")
    alone = preparation_key(tmp_path / "one.h5ad", {})
    (tmp_path / "B_barcodes.tsv").write_text("12")
    assert preparation_key(tmp_path / "one.h5ad", {}) == alone
