from __future__ import annotations

import numpy as np
import pytest

from stofm.genes.medians import RELATIVE_ERROR, ExactMedians, HistogramMedians


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Values of 11 genes, from one of a gene to hundreds; gene 7 has none."""
    genes = rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 9, 10], size=1501, p=[0.5, *[0.5 / 9] * 9])
    values = rng.lognormal(genes - 4, 1.5)
    return np.append(genes, 7 + 4), np.append(np.clip(values, 1e-3, 1e4), 2.5)


def plain(genes: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    own = [values[genes == gene] for gene in range(12)]
    return [len(part) for part in own], [np.median(part) if len(part) else np.nan for part in own]


def test_exact(rng: np.random.Generator) -> None:
    genes, values = draw(rng)
    medians = ExactMedians()
    for part in np.array_split(np.arange(len(genes)), 7):
        medians.add(genes[part], values[part])
    numbers, found = medians.result(12)
    expected_numbers, expected = plain(genes, values)
    assert numbers.tolist() == expected_numbers
    np.testing.assert_array_equal(found, expected)


def test_histogram_is_within_its_error(rng: np.random.Generator) -> None:
    genes, values = draw(rng)
    medians = HistogramMedians()
    medians.add(genes, values)
    numbers, found = medians.result(12)
    expected_numbers, expected = plain(genes, values)
    assert numbers.tolist() == expected_numbers
    np.testing.assert_allclose(found, expected, rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert np.isnan(found[7])
    assert found[11] == pytest.approx(2.5, rel=1e-3)


def test_histogram_does_not_depend_on_order_and_parts(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    genes, values = draw(rng)
    whole = HistogramMedians()
    whole.add(genes, values)
    monkeypatch.setattr("stofm.genes.medians._FEW", 41)
    order = rng.permutation(len(genes))
    first, second = HistogramMedians(), HistogramMedians()
    for number, part in enumerate(np.array_split(order, 13)):
        (first if number % 2 else second).add(genes[part], values[part])
    first.merge(second)
    for own, expected in zip(first.result(12), whole.result(12), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_histogram_holds_extremes() -> None:
    medians = HistogramMedians()
    medians.add(np.array([0, 1]), np.array([1e-4, 1e4]))
    np.testing.assert_allclose(medians.result(2)[1], [1e-4, 1e4], rtol=RELATIVE_ERROR * 1.0001)


@pytest.mark.parametrize("method", [ExactMedians, HistogramMedians])
def test_nothing_added(method: type[ExactMedians | HistogramMedians]) -> None:
    numbers, medians = method().result(3)
    assert numbers.tolist() == [0, 0, 0]
    assert np.isnan(medians).all()
