from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stofm.genes.gene_table import GeneTable

NAMES = ["GFAP", "Slc17a7", "ENSG00000160307.9", "PLP9"]
VALUES = np.array([[1.5, 2, 0.1], [3, -4, 0], [5, 6, 7], [8, 9, 10]], dtype=np.float32)


@pytest.fixture
def frame():
    return pd.DataFrame(VALUES, index=pd.Index(NAMES, name="gene"), columns=["a", "b", "c"])


def write_npz(frame, path):
    np.savez(path, genes=np.array(NAMES), embeddings=VALUES.astype(np.float64))


WRITERS = {
    "x.parquet": pd.DataFrame.to_parquet,
    "column.parquet": lambda frame, path: frame.reset_index().to_parquet(path),
    "x.tsv": lambda frame, path: frame.to_csv(path, sep="\t"),
    "x.csv": pd.DataFrame.to_csv,
    "x.tsv.gz": lambda frame, path: frame.to_csv(path, sep="\t"),
    "x.csv.gz": pd.DataFrame.to_csv,
    # As write.table of R does.
    "r.tsv": lambda frame, path: frame.to_csv(path, sep="\t", index_label=False),
    "x.npz": write_npz,
}


@pytest.mark.parametrize("file", WRITERS)
def test_each_format_gives_the_same_table(frame, tmp_path, file):
    WRITERS[file](frame, tmp_path / file)
    table = GeneTable.read(tmp_path / file)
    assert table.names == tuple(NAMES)
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.values.dtype == np.float32
    assert (table.file, table.width, len(table.digest)) == (file, 3, 16)


def test_the_fingerprint_is_of_the_content(frame, tmp_path):
    first, second, other = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"
    frame.to_csv(first)
    frame.to_csv(second)
    (2 * frame).to_csv(other)
    assert GeneTable.read(first).digest == GeneTable.read(second).digest
    assert GeneTable.read(first).digest != GeneTable.read(other).digest


def test_rows_without_a_gene_are_left_out(frame, tmp_path):
    frame.index = ["GFAP", None, "MBP", ""]
    frame.iloc[1] = np.nan
    frame.to_csv(tmp_path / "x.csv", index_label="gene")
    table = GeneTable.read(tmp_path / "x.csv")
    assert table.names == ("GFAP", "MBP")
    np.testing.assert_array_equal(table.values, VALUES[[0, 2]])


def table_of(*names):
    values = np.arange(len(names), dtype=np.float32)[:, None]
    return GeneTable(names, values, "x.csv", "0" * 16)


def test_genes_are_found_by_ids_symbols_and_other_names(vocabulary):
    rows = table_of("Slc17a7", "nothing", "ENSG00000160307.9", "ENSMUSG00000020932", "MBP").rows_of(
        vocabulary
    )
    # GFAP by its mouse id, SLC17A7 as a mouse symbol, S100B by its id with version.
    np.testing.assert_array_equal(rows, [3, 0, 2, -1, 4, -1, -1])


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (("VGLUT1", "SLC17A7"), 1),
        (("SLC17A7", "VGLUT1"), 0),
        (("VGLUT1", "Slc17a7", "ENSG00000104888", "SLC17A7"), 2),
        (("Slc17a7", "VGLUT1"), 0),
    ],
)
def test_of_several_rows_of_a_gene_its_own_name_counts(vocabulary, names, row):
    assert table_of(*names).rows_of(vocabulary)[1] == row


def test_no_gene_at_all_is_refused_with_examples(vocabulary):
    message = r"x\.csv: none of its 4 genes is in the vocabulary; found.*'7157', '999', 'x'\. Exp"
    with pytest.raises(ValueError, match=message):
        table_of("7157", "999", "x", "y").rows_of(vocabulary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.replace(-4, np.inf), r"1 genes are missing, infinite.*\['Slc17a7'\]"),
        (lambda f: f.replace(-4, np.nan), r"1 genes are missing, infinite.*\['Slc17a7'\]"),
        (lambda f: 1e300 * f, r"4 genes are missing, infinite or beyond float32"),
        (lambda f: f.rename({"PLP9": "GFAP"}), r"1 genes occur more than once.*\['GFAP'\]"),
        (lambda f: f.assign(b="x"), r"numbers in all others; 'b' holds something else"),
        (lambda f: f[[]], r"numbers in all others; the table is \(4, 1\)"),
        (lambda f: f.set_axis(["", " ", "", ""]), r"names 0 genes"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(frame, tmp_path, change, message):
    path = tmp_path / "x.tsv"
    change(frame.astype(float)).to_csv(path, sep="\t", index_label="gene")
    with pytest.raises(ValueError, match=message) as error:
        GeneTable.read(path)
    assert str(path) in str(error.value)


def test_lists_in_a_column_are_no_numbers(frame, tmp_path):
    lists = pd.DataFrame({"gene": NAMES, "embedding": list(VALUES)})
    lists.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="'embedding' holds something else"):
        GeneTable.read(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": NAMES, "values": VALUES},
        {"genes": NAMES, "a": VALUES, "b": VALUES},
        {"genes": NAMES, "values": VALUES[:3]},
        {"genes": NAMES, "values": VALUES[:, 0]},
        {"genes": NAMES, "values": VALUES.astype(str)},
    ],
)
def test_arrays_that_are_no_table_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=r"expected the array 'genes', .* and one other"):
        GeneTable.read(tmp_path / "x.npz")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_pickles_are_never_read(tmp_path):
    genes = np.array([*NAMES[:3], Trap()], dtype=object)
    np.savez(tmp_path / "x.npz", genes=genes, values=VALUES)
    with pytest.raises(ValueError, match=r"can't be read without unpickling.*dtype=str"):
        GeneTable.read(tmp_path / "x.npz")
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"ends in \.parquet, .*'.*x\.pickle'\. Pickles are never"):
        GeneTable.read(tmp_path / "x.pickle")


def test_a_file_that_is_absent_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table of genes .*x\.npz"):
        GeneTable.read(tmp_path / "x.npz")
    for name in ("x.npz", "x.parquet", "x.csv.gz"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(
            ValueError, match=f"{name} can't be read .*damaged, or no table of genes"
        ):
            GeneTable.read(tmp_path / name)


def test_a_symbol_that_the_vocabulary_lacks_is_no_name_of_a_gene(vocabulary):
    # The last gene has no symbol.
    without = replace(vocabulary, symbols=np.array([""] * 7))
    rows = table_of("ENSG00000136750", "GFAP").rows_of(without)
    np.testing.assert_array_equal(rows, [-1] * 6 + [0])
