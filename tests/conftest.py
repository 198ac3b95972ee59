"""Fixtures that the whole suite shares."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stofm.genes import GeneVocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

    from stofm.nn import Stofm, SubSliceBatch


# No test opens a window.
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Nobody pulls the plug in a test: no write waits until the disk has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    """No test finds the figures of another."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real slices, vocabulary tables and golden numbers; skips where it is not there."""
    folder = Path(os.environ.get("STOFM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the development data ({folder} is not there; set STOFM_SHARED)")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20260)


@pytest.fixture(scope="session")
def vocabulary() -> GeneVocabulary:
    """67 human genes."""
    rng = np.random.default_rng(7)
    return GeneVocabulary(
        gene_ids=np.array([f"ENSG{k:011d}" for k in range(1, 68)]),
        symbols=np.array([f"GENE{k}" for k in range(1, 68)]),
        tokens=np.arange(2, 69, dtype=np.int32),
        medians=rng.uniform(0.5, 9.0, 67),
        special={"pad": 0, "mask": 1, "cls": 69},
    )


@pytest.fixture(scope="session")
def _model(vocabulary: GeneVocabulary) -> Stofm:
    from stofm.nn import (
        CellEncoderConfig,
        SE2TransformerConfig,
        Stofm,
        StofmConfig,
        SubSliceConfig,
    )

    config = StofmConfig(
        name="tiny",
        cell_encoder=CellEncoderConfig(
            n_tokens=70, d_cell=12, n_layers=2, d_hidden=16, n_heads=2, d_inner=20, max_positions=41
        ),
        se2_transformer=SE2TransformerConfig(
            d_cell=12, n_layers=2, d_model=14, n_heads=2, d_inner=9, n_kernels=5
        ),
        subslice=SubSliceConfig(n_cells=53, n_neighbors=11),
        max_tokens=40,
        trained=True,
    )
    return Stofm(config, vocabulary, seed=1).eval()


@pytest.fixture
def model(_model: Stofm) -> Stofm:
    """A tiny model; a copy for each test. Its weights are random, which nothing is told."""
    return copy.deepcopy(_model)


@pytest.fixture
def responsive_model(model: Stofm) -> Stofm:
    """The tiny model with larger weights, so that its cells see their genes and each other."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(4)
        torch.nn.init.normal_(model.cell_encoder.gene_embeddings.weight)
        for layer in model.se2_transformer.layers:
            torch.nn.init.normal_(layer.qkv.weight, std=0.5)
        for layer in model.cell_encoder.bert.encoder.layer:
            torch.nn.init.normal_(layer.attention.self.value.weight)
            torch.nn.init.normal_(layer.attention.output.dense.weight)
    return model


@pytest.fixture
def dense_batch() -> Callable[..., SubSliceBatch]:
    """Builds a batch from the padded arrays of SToFM's published code.

    Features, distances (0 stands for "no distance" and 100 for "not a neighbour"), types of nodes and
    indices of cells; padding is on the right.
    """
    from stofm.nn import SubSliceBatch
    from stofm.spatial import NO_NEIGHBOR, PairDistances, SubSlice

    def build(*arrays: np.ndarray) -> SubSliceBatch:
        subslices = []
        for features, distances, node_type, index in zip(*arrays, strict=True):
            n = int((node_type != 3).sum())
            inner = np.triu(distances[:n, :n], k=1)
            rows, columns = np.nonzero((inner != 0) & (inner != NO_NEIGHBOR))
            pairs = PairDistances(
                rows=rows.astype(np.int32),
                columns=columns.astype(np.int32),
                distances=inner[rows, columns].astype(np.float32),
                n_nodes=n,
            )
            nodes = {"node_type": node_type[:n], "cell_index": index[:n], "pairs": pairs}
            subslices.append(
                SubSlice(features=features[:n], coordinates=np.zeros((n, 2), np.float32), **nodes)
            )
        return SubSliceBatch.from_subslices(subslices, node_multiple=arrays[0].shape[1])

    return build


@pytest.fixture
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the networks of heads be fitted in a moment."""
    from stofm.heads import fitting, network, spots
    from stofm.heads.network import HeadTraining

    short = HeadTraining(learning_rate=5e-3, max_epochs=6, patience=3)
    for module, name in (
        (fitting, "VOTING"),
        (fitting, "IMPUTING"),
        (spots, "_TRAINING"),
    ):
        monkeypatch.setattr(module, name, short)
    monkeypatch.setattr(network, "HeadTraining", lambda: short)


@pytest.fixture
def adata(rng: np.random.Generator, vocabulary: GeneVocabulary) -> AnnData:
    """Two slices of 101 and 83 cells and 71 genes, four of them unknown; rows mixed."""
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    n_cells, n_genes = 184, 71
    library = rng.permutation(np.repeat(["left", "right"], [101, 83]))
    kind = rng.integers(0, 3, n_cells)
    profiles = rng.gamma(0.5, 2.0, (3, n_genes))
    counts = sparse.csr_matrix(rng.poisson(profiles[kind]).astype(np.float32))
    names = [*vocabulary.gene_ids.tolist(), *(f"ENSG9{k:010d}" for k in range(4))]
    xy = rng.random((n_cells, 2)) * [700.0, 500.0]
    return AnnData(
        counts,
        obs=pd.DataFrame(
            {"library": pd.Categorical(library), "kind": pd.Categorical(kind.astype(str))},
            index=[f"cell{k}" for k in range(n_cells)],
        ),
        var=pd.DataFrame(index=names),
        obsm={"spatial": xy},
    )
