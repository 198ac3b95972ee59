"""The plain implementation must give the golden numbers, or comparing with it says nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray


def _load_plain() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "plain.py"
    spec = importlib.util.spec_from_file_location("stofm_benchmarks_plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plain = _load_plain()


class _Golden:
    """Golden files: the smaller ones lie beside the tests, the others in the development data."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def path(self, name: str) -> Path:
        path = Path(__file__).parents[1] / "golden" / name
        if not path.exists():
            path = self._request.getfixturevalue("shared") / "golden" / name
        return path

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.path(name), allow_pickle=False) as arrays:
            return dict(arrays)

    def config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.path(f"{name}.config.json").read_text())
        return config

    def model(self, name: str) -> Any:
        model = plain.PlainSE2Transformer(**self.config(name))
        model.load_state_dict(load_file(self.path(f"{name}.safetensors")))
        return model.eval()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> _Golden:
    return _Golden(request)


def _parts(arrays: dict[str, NDArray[Any]], name: str) -> list[NDArray[Any]]:
    return np.split(arrays[f"{name}_flat"], arrays[f"{name}_offsets"][1:-1])


@pytest.mark.parametrize("name", ["a_tokenizer.npz", "a_tokenizer_long.npz"])
def test_tokens(golden: _Golden, name: str) -> None:
    arrays = golden.arrays(name)
    counts = csr_matrix(
        (arrays["counts_data"], arrays["counts_indices"], arrays["counts_indptr"]),
        shape=arrays["counts_shape"],
    )
    known = arrays["token_id"] >= 0
    ids = arrays["ensembl_id"]
    encoded = plain.plain_tokens(
        counts,
        ids,
        dict(zip(ids[known], arrays["token_id"][known], strict=True)),
        dict(zip(ids[known], arrays["median"][known], strict=True)),
        max_tokens=100_000,
    )
    value_of = {
        token: (median, np.flatnonzero(arrays["token_id"] == token))
        for token, median in zip(arrays["token_id"][known], arrays["median"][known], strict=True)
    }
    rows = arrays.get("cell_row", np.arange(counts.shape[0]))
    for cell, expected, values in zip(
        rows,
        _parts(arrays, "tokens"),
        np.split(arrays["values_flat"], arrays["tokens_offsets"][1:-1]),
        strict=True,
    ):
        found = encoded[cell]
        assert_array_equal(np.sort(found), np.sort(expected))
        dense = counts[[cell]].toarray()[0]
        ours = []
        for token in found:
            median, columns = value_of[token]
            ours.append(dense[columns] / arrays["n_counts"][cell] * np.float32(1e4) / median)
        # A gene of two columns has two values; position by position one of them must fit.
        assert all(np.isclose(v, o, rtol=1e-6).any() for v, o in zip(values, ours, strict=True))


def test_cell_encoder(golden: _Golden) -> None:
    from transformers import BertModel

    arrays = golden.arrays("b_cell_encoder.npz")
    folder = golden.path("b_cell_encoder")
    bert = BertModel.from_pretrained(folder / "cell_bert").eval()
    weights = load_file(folder / "cell_proj.safetensors")
    projection = torch.nn.Linear(*weights["weight"].T.shape)
    projection.load_state_dict(weights)
    rows = zip(arrays["input_ids"], arrays["lengths"], strict=True)
    encoded = [ids[1:length].astype(np.int64) for ids, length in rows]
    cls = int(arrays["input_ids"][0, 0])
    found = plain.plain_encode_cells(bert, projection, encoded, cls=cls, max_positions=64)
    assert_allclose(found.numpy(), arrays["embeddings"], atol=1e-5)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("shape", ["uniform", "clustered", "elongated"])
def test_normalize_and_split(golden: _Golden, size: str, shape: str) -> None:
    arrays = golden.arrays(f"c_split_{size}.npz")
    xy = plain.plain_normalize(arrays[f"{shape}_xy"])
    assert_allclose(xy, arrays[f"{shape}_norm"], atol=1e-10)
    for n_cells in (100, 1000):
        found = plain.plain_split(xy, n_cells)
        expected = _parts(arrays, f"{shape}_split{n_cells}")
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_array_equal(ours, theirs)


def test_split_loses_the_same_cells(golden: _Golden) -> None:
    arrays = golden.arrays("c_split_lattice_edge.npz")
    found = np.concatenate(plain.plain_split(arrays["norm"], int(arrays["split_num"])))
    assert_array_equal(found, arrays["split_flat"])


@pytest.mark.slow
def test_virtual_cells(golden: _Golden) -> None:
    arrays = golden.arrays("d_virtual_small.npz")
    found = plain.plain_virtual_cells(arrays["nodes"], arrays["features"])
    signs = np.sign((found.components * arrays["pca_features"]).sum(axis=0))
    assert_allclose(found.components * signs, arrays["pca_features"], rtol=1e-4, atol=1e-6)
    tag = "alpha0.2_res1.0"
    assert_allclose(found.points, arrays[f"{tag}_cluster_features"], atol=1e-5)
    assert adjusted_rand_score(found.labels, arrays[f"{tag}_labels"]) >= 0.75
    labels = plain.plain_leiden(arrays[f"{tag}_cluster_features"], resolution=1.0, seed=0)
    assert adjusted_rand_score(labels, arrays[f"{tag}_labels"]) >= 0.75


@pytest.mark.parametrize("size", ["small", "medium"])
def test_distances(golden: _Golden, size: str) -> None:
    arrays = golden.arrays(f"e_distances_{size}.npz")
    found = plain.plain_distances(arrays["nodes"], arrays["token_types"])
    _assert_distances(found, arrays["attn_bias"])


@pytest.mark.parametrize("prefix", ["n1_v1", "n3_v2", "n20_v3", "n47_v2", "n48_v2"])
def test_distances_of_tiny_subslices(golden: _Golden, prefix: str) -> None:
    arrays = golden.arrays("e_distances_tiny.npz")
    found = plain.plain_distances(arrays[f"{prefix}_nodes"], arrays[f"{prefix}_token_types"])
    _assert_distances(found, arrays[f"{prefix}_attn_bias"])


def _assert_distances(found: NDArray[Any], expected: NDArray[Any]) -> None:
    for value in (0, 100):
        assert_array_equal(found == value, expected == value)
    assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["f_model_post_ln", "f_model_pre_ln"])
def test_se2_transformer(golden: _Golden, name: str) -> None:
    arrays = golden.arrays(f"{name}.npz")
    inputs = golden.arrays("f_model_post_ln.npz")
    model = golden.model(name)
    node_type = torch.from_numpy(inputs["token_types"]).long()
    features = torch.from_numpy(inputs["token_embeddings"])
    distances = torch.from_numpy(inputs["attn_bias"])
    with torch.no_grad():
        output = model(features, distances, node_type)
        unbiased = model(features, distances, node_type, use_bias=False).last_hidden_state
    real = inputs["token_types"] != 3
    pairs = real[:, :, None] & real[:, None, :]
    for key, found, where, atol in (
        ("last_hidden_state", output.last_hidden_state, real, 5e-5),
        ("pair_rep", output.pair_rep, pairs, 1e-4),
        ("attention_last", output.attention, pairs, 1e-5),
        ("last_hidden_state_no_attn_bias", unbiased, real, 5e-5),
    ):
        assert_allclose(found.numpy()[where], arrays[key][where], atol=atol, err_msg=key)
    for layer, found in enumerate(output.hidden_states):
        assert_allclose(found.numpy()[real], arrays["hidden_states"][layer][real], atol=5e-5)
    gaussian = output.gaussian.permute(0, 2, 3, 1).numpy()
    expected = np.moveaxis(arrays["gaussian"], 1, -1)
    assert_allclose(gaussian[pairs], expected[pairs], atol=5e-5)


def test_losses(golden: _Golden) -> None:
    arrays = golden.arrays("g_losses.npz")
    config = golden.config("g_losses")
    weights = load_file(golden.path("g_losses.safetensors"))
    model = plain.PlainSE2Transformer(**config).eval()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    )
    heads = plain.PlainHeads(
        embedding_dim=config["embedding_dim"], num_attention_heads=config["num_attention_heads"]
    )
    heads.load_state_dict({k: v for k, v in weights.items() if not k.startswith("model.")})
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items() if value.shape}
    output = model(tensors["token_embeddings"], tensors["attn_bias"], tensors["token_types"].long())
    cells = tensors["labels"][..., 0] != -100
    pairs = tensors["pair_labels"] != -100
    losses = heads(
        output.last_hidden_state[cells],
        output.pair_rep[pairs],
        tensors["labels"][cells],
        tensors["pair_labels"][pairs],
    )
    expected = float(arrays["loss"]), float(arrays["pair_loss"])
    assert_allclose([float(loss.detach()) for loss in losses], expected, rtol=2e-5)


def test_whole_inference(golden: _Golden) -> None:
    arrays = golden.arrays("i_end_to_end.npz")
    features = arrays["features"]
    xy = plain.plain_normalize(arrays["xy"])
    virtual = plain.PlainVirtualCells(
        arrays["pca_features"],
        np.empty(0),
        arrays["cluster_labels"],
        arrays["virtual_nodes"],
        arrays["virtual_features"],
    )
    parts = plain.plain_split(xy, int(arrays["split_num"]))
    subslices = [plain.plain_subslice(part, xy, features, virtual) for part in parts]
    model = golden.model("i_end_to_end")
    found = plain.plain_embed_subslices(model, subslices, len(xy))
    assert_allclose(found, arrays["embeddings"], atol=1e-4)
