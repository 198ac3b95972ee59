"""Small writers of what instruments write."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Section:
    """Counts of 17 cells and 8 features, of which two are controls, and places in any order."""

    counts: np.ndarray
    ids: list[str]
    genes: pd.DataFrame
    xy: np.ndarray
    order: np.ndarray

    @property
    def is_gene(self) -> np.ndarray:
        return (self.genes["type"] == "Gene Expression").to_numpy()

    def places(self, **columns: str) -> pd.DataFrame:
        """Table of places in an order of its own, with names for id, x and y."""
        values = {"id": self.ids, "x": self.xy[:, 0], "y": self.xy[:, 1]}
        table = pd.DataFrame({columns.get(key, key): value for key, value in values.items()})
        return table.iloc[self.order].reset_index(drop=True)

    def write_h5(self, path: Path, **attributes: Any) -> None:
        import h5py

        path.parent.mkdir(parents=True, exist_ok=True)
        matrix = sparse.csr_matrix(self.counts)
        with h5py.File(path, "w") as file:
            file.attrs.update(attributes)
            group = file.create_group("matrix")
            group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices
            group["indptr"], group["shape"] = matrix.indptr, matrix.shape[::-1]
            group["barcodes"] = np.array(self.ids, dtype="S")
            features = group.create_group("features")
            for name, column in (("id", "id"), ("name", "name"), ("feature_type", "type")):
                features[name] = self.genes[column].to_numpy().astype("S")
            features["genome"] = np.array(["GRCh38"] * len(self.genes), dtype="S")

    def write_mtx(self, folder: Path, *, prefix: str = "", zipped: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plain = folder / f"{prefix}matrix.mtx"
        mmwrite(plain, sparse.coo_matrix(self.counts.T))
        ending = ".gz" if zipped else ""
        if zipped:
            (folder / f"{prefix}matrix.mtx.gz").write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
        options: dict[str, Any] = {"sep": "\t", "header": False, "index": False}
        self.genes.to_csv(folder / f"{prefix}features.tsv{ending}", **options)
        pd.Series(self.ids).to_csv(folder / f"{prefix}barcodes.tsv{ending}", **options)

    def dense(self) -> pd.DataFrame:
        """Cells x genes, with names."""
        return pd.DataFrame(self.counts, columns=self.genes["name"].tolist())


@pytest.fixture
def section(rng: np.random.Generator) -> Section:
    n_cells, n_genes = 17, 8
    types = ["Gene Expression"] * 6 + ["Negative Control Probe", "Unassigned Codeword"]
    names = [f"GENE{k}" for k in range(6)] + ["NegControlProbe_00001", "UnassignedCodeword_0002"]
    genes = pd.DataFrame(
        {"id": [f"ENSG{k:011d}" for k in range(6)] + names[6:], "name": names, "type": types}
    )
    return Section(
        counts=rng.poisson(1.1, (n_cells, n_genes)) + np.eye(n_cells, n_genes, dtype=int),
        ids=[f"{''.join(rng.choice(list('ACGT'), 12))}-1" for _ in range(n_cells)],
        genes=genes,
        xy=rng.uniform(10, 900, (n_cells, 2)).round(3),
        order=rng.permutation(n_cells),
    )
