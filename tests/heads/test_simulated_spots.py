"""Learning proportions from spots that are simulated from single cells."""

from __future__ import annotations

import numpy as np
import pytest

from stofm.heads import spots as module
from stofm.heads.expression import ExpressionComponents
from stofm.heads.network import apply_head
from stofm.heads.request import HeadOptions, Request, resolve_slices
from stofm.heads.spots import fit_simulated
from stofm.spatial.spots import SpotRules

N_SPOTS = 400

pytestmark = pytest.mark.usefixtures("few_epochs")


@pytest.fixture
def query_and_reference(adata):
    """Both slices' cells: the left ones measured as spots, the right ones typed."""
    left = (adata.obs["library"] == "left").to_numpy()
    return adata[left].copy(), adata[~left].copy()


@pytest.fixture
def simulated(monkeypatch):
    """How spots are simulated, in turn, and the spots."""
    calls = []
    simulate = module.simulate_spots

    def spy(typed, **options):
        calls.append((typed, options, simulate(typed, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(module, "simulate_spots", spy)
    return calls


def fit(query, reference, **options):
    request = Request(
        device="cpu",
        show_progress_bar=False,
        options=HeadOptions(spots=SpotRules(n_spots=N_SPOTS), **options),
    )
    cells = resolve_slices(reference, spatial_key="", role="reference")
    return fit_simulated(resolve_slices(query, role="query"), cells, "kind", request)


def test_only_shared_genes_with_counts_are_read(query_and_reference, simulated):
    query, reference = query_and_reference
    query, reference = query[:, 5:].copy(), reference[:, :60].copy()
    query.X = query.X.toarray() * (np.arange(66) != 3)
    found = fit(query, reference)
    seen = np.asarray(reference.X.sum(axis=0)).ravel() > 0
    places = [k for k in (*range(5, 8), *range(9, 60)) if seen[k] and query.X[:, k - 5].any()]
    names = reference.var_names[places].tolist()
    assert [gene.name for gene in found.fields["expression"].genes] == names
    typed, options, _ = simulated[0]
    kinds = reference.obs["kind"].to_numpy()
    means = [reference.X.toarray()[kinds == kind][:, places].mean(axis=0) for kind in "012"]
    np.testing.assert_allclose(typed.mean_counts(), means, rtol=1e-6)
    totals = query.X[:, np.array(places) - 5].sum(axis=1)
    np.testing.assert_array_equal(np.sort(options["depths"]), np.sort(totals[totals > 0]))


def test_two_rounds(query_and_reference, simulated, monkeypatch):
    query, reference = query_and_reference
    shares = np.tile(np.array([[0.9, 0.1, 0.0]], dtype=np.float32), (query.n_obs, 1))

    def found_in(head, values, kind):
        return shares if len(values) == query.n_obs else apply_head(head, values, kind)

    monkeypatch.setattr(module, "apply_head", found_in)
    fitted = fit(query, reference)
    rounds = [options["composition"] for _, options, _ in simulated]
    np.testing.assert_allclose(rounds[0], 1 / 3)
    np.testing.assert_array_equal(simulated[0][1]["gene_scale"], 1.0)
    # Half of what the first round found, half of equal shares.
    assert len(rounds) == 2
    np.testing.assert_allclose(rounds[1], [0.617, 0.217, 0.167], atol=1e-3)
    spots = [one.proportions for *_, one in simulated]
    assert np.abs(spots[0] - spots[1]).max() > 0.5
    # A tenth of them is held out.
    n_held_out = N_SPOTS // 10
    assert fitted.fields["split"] == {
        "how": "simulated",
        "n_fitted": N_SPOTS - n_held_out,
        "n_held_out": n_held_out,
    }
    # Each network holds out others.
    tenths = np.split(spots[1], [N_SPOTS - k * n_held_out for k in (3, 2, 1)])
    np.testing.assert_allclose(fitted.true, np.concatenate(tenths[:0:-1]))
    assert fitted.found.shape == fitted.true.shape
    # One set of components, of the first network's spots, is read by all.
    components = ExpressionComponents.fit(
        simulated[1][-1].counts, fitted.fields["expression"].genes, 50
    )
    np.testing.assert_array_equal(fitted.fields["expression"].axes, components.axes)
    assert fitted.fields["reads"] == ("expression",) * 3
    assert sum(fitted.fields["weights"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("n_components", "expected"), [(None, 50), (6, 6)])
def test_number_of_components(query_and_reference, n_components, expected):
    fields = fit(*query_and_reference, n_components=n_components).fields
    assert fields["expression"].axes.shape[1] == expected
    assert fields["params"]["n_components"] == expected
    assert {one.config.d_input for one in fields["networks"]} == {expected}


@pytest.mark.filterwarnings("ignore:.*genes are shared by all")
def test_what_can_not_be_read(query_and_reference):
    query, reference = query_and_reference
    some = query[:, :30].copy(), reference[:, 25:].copy()
    with pytest.raises(ValueError, match=r"share 5 genes with counts in both; at least 10"):
        fit(*some)
    with pytest.raises(ValueError, match="share no gene"):
        fit(query[:, :30].copy(), reference[:, 30:].copy())
    reference.X = reference.X * 0.7
    with pytest.raises(ValueError, match=r"reference\.X does not hold raw counts"):
        fit(query, reference)
