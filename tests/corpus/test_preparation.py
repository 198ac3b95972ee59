from __future__ import annotations

import shutil

import numpy as np
import pytest

from stofm._edge import counts
from stofm.genes import GeneVocabulary
from stofm.train import FileConfig, preparation
from stofm.corpus.preparation import find_sources, fit_vocabulary, open_corpus, prepare_slices


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
    original = preparation.find_columns
    monkeypatch.setattr(
        preparation, "find_columns", lambda *a, **k: found.append(1) or original(*a, **k)
    )
    return found


def test_a_file_of_one_slice_is_written_block_by_block(prepare, file, left, tmp_path, monkeypatch):
    whole = open_corpus(tmp_path / "work", prepare(left)).slices[0]
    monkeypatch.setattr(counts, "_BLOCK_ENTRIES", 20 * left.n_vars)
    sizes = []
    original = preparation.write_slice

    def write_slice(*args, blocks, **options):
        def counted():
            for block in blocks:
                sizes.append(block.n_cells)
                yield block

        return original(*args, blocks=counted(), **options)

    monkeypatch.setattr(preparation, "write_slice", write_slice)
    streamed = open_corpus(tmp_path / "work", prepare(file)).slices[0]
    assert sizes == [20, 20, 20, 20, 20, 1]
    assert streamed.ranked.equals(whole.ranked)
    assert streamed.digest == whole.digest


def test_a_file_of_several_slices_gives_each_its_cells(prepare, adata, tmp_path):
    adata.write_h5ad(tmp_path / "both.h5ad")
    work = tmp_path / "work"
    both = open_corpus(work, prepare(tmp_path / "both.h5ad", library_key="library")).slices
    parts = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    alone = [open_corpus(work, prepare(part)).slices[0] for part in parts]
    assert [one.name for one in both] == ["both/left", "both/right"]
    for one, other in zip(both, alone, strict=True):
        assert one.ranked.equals(other.ranked)


def test_cells_without_known_genes_are_told_of_for_a_file_too(prepare, left, tmp_path):
    left.X.data[: left.X.indptr[3]] = 0
    left.write_h5ad(tmp_path / "left.h5ad")
    with pytest.warns(UserWarning, match="3 of 101 cells have no count in any known gene"):
        prepare(tmp_path / "left.h5ad")


def test_a_slice_that_another_process_can_not_see_is_not_dropped(prepare, file, tmp_path):
    work = tmp_path / "work"
    keys = prepare(file)
    assert open_corpus(work, keys).n_cells == 101
    shutil.rmtree(work / keys[0])
    with pytest.raises(FileNotFoundError, match=rf"{keys[0]} is not there.* visible to every proc"):
        open_corpus(work, keys)


def test_the_same_slice_twice_is_refused(prepare, file, left, adata, tmp_path):
    right = adata[adata.obs["library"] == "right"].copy()
    shutil.copy(file, tmp_path / "copy.h5ad")
    for data, names in (
        ([file, right, tmp_path / "copy.h5ad"], ("'copy'", "'left'")),
        ([file, file], ("'left'", "'left'")),
        ([right, left, file], ("'left'", r"'data\[1\]'")),
    ):
        keys = prepare(data)
        message = "Slice {} is the same as slice {}, in all tokens"
        with pytest.raises(ValueError, match=message.format(*names)):
            open_corpus(tmp_path / "work", keys)


def test_changed_orthologs_make_new_tokens(prepare, mouse, tmp_path, reads):
    file, write = mouse
    work = tmp_path / "work"
    options = {"gene_key": "mine", "orthologs": write("pairs.tsv")}
    first = prepare(file, **options)
    # What counts is what the table says, not its name or its date.
    assert prepare(file, gene_key="mine", orthologs=write("copy.tsv")) == first
    assert len(reads) == 1
    write("pairs.tsv", shift=1)
    second = prepare(file, **options)
    assert len(reads) == 2
    one, other = (open_corpus(work, keys).slices[0] for keys in (first, second))
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
    with pytest.raises(KeyError, match=r"mouse: adata\.var has no column 'yours'; it has"):
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
    with pytest.raises(ValueError, match=r"^data: adata\.X does not hold raw counts"):
        fit_vocabulary(find_sources(left, FileConfig()), tmp_path)
