from __future__ import annotations

import numpy as np
import pytest

from stofm.heads.labels import read_labels
from stofm.heads.options import Reading
from stofm.heads.sections import resolve_slices
from stofm.heads.spot_reference import SpotSimulation, read_panels
from stofm.spatial.spots import SpotRules


@pytest.fixture
def query_and_reference(adata):
    """Both slices' cells: the left ones measured as spots, the right ones typed."""
    left = (adata.obs["library"] == "left").to_numpy()
    return adata[left].copy(), adata[~left].copy()


def read(query, reference, model):
    cells = resolve_slices(reference)
    labels = read_labels(cells, "kind")
    slices = resolve_slices(query)
    return read_panels(slices, cells, labels, model, layer=None, reference_layer=None)


def test_only_shared_genes_with_counts_are_read(query_and_reference, model):
    query, reference = query_and_reference
    query, reference = query[:, 5:].copy(), reference[:, :60].copy()
    query.X = query.X.toarray() * (np.arange(66) != 3)
    panels = read(query, reference, model)
    assert panels.places.tolist() == [*range(5, 8), *range(9, 60)]
    np.testing.assert_array_equal(panels.query.toarray(), query.X[:, [0, 1, 2, *range(4, 55)]])
    kinds = reference.obs["kind"].to_numpy()
    means = [reference.X.toarray()[kinds == kind][:, panels.places].mean(axis=0) for kind in "012"]
    assert panels.types == ["0", "1", "2"]
    np.testing.assert_allclose(panels.cells.mean_counts(), means, rtol=1e-6)


def test_two_rounds(query_and_reference, model):
    query, reference = query_and_reference
    panels = read(query, reference, model)
    rounds = []

    def predict(training):
        rounds.append(training)
        return np.tile(np.array([[0.9, 0.1, 0.0]], dtype=np.float32), (query.n_obs, 1))

    found, other = SpotSimulation(
        model=model,
        rules=SpotRules(n_spots=1000),
        n_components=5,
        reading=Reading(device="cpu", show_progress_bar=False),
    ).run(panels, predict, [0, 7])
    first = rounds[0].proportions
    assert len(first) == 1000
    np.testing.assert_allclose(first.mean(axis=0), 1 / 3, atol=0.05)
    # Half of what the first round found, half of equal shares.
    np.testing.assert_allclose(found.proportions.mean(axis=0), [0.617, 0.217, 0.167], atol=0.05)
    assert found.features.shape == (1000, model.config.cell_encoder.d_cell + 5)
    assert len(found.query_features) == query.n_obs
    assert (len(found.fitted), len(found.held_out)) == (900, 100)
    # Each network has spots of its own, of the same kind and read the same way.
    assert len(rounds) == 1
    assert other.panel is found.panel
    assert other.query_features is found.query_features
    assert np.abs(other.proportions - found.proportions).max() > 0.5
    np.testing.assert_allclose(other.proportions.mean(axis=0), [0.617, 0.217, 0.167], atol=0.05)
    assert other.features.shape == found.features.shape


def test_what_can_not_be_read(query_and_reference, model):
    query, reference = query_and_reference
    with pytest.raises(ValueError, match=r"share 0 genes with counts in both; at least 10"):
        read(query[:, :30].copy(), reference[:, 30:].copy(), model)
    reference.X = reference.X * 0.7
    with pytest.raises(ValueError, match="does not hold raw counts"):
        read(query, reference, model)
