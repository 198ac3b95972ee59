from __future__ import annotations

import numpy as np
import pytest
import torch

from stofm.align.config import AlignOptions
from stofm.align.network import AlignNetwork

WIDTHS = {"spot_image": 7, "niche_image": 5, "spot_genes": 11, "niche_genes": 3}


@pytest.fixture
def network() -> AlignNetwork:
    torch.manual_seed(0)
    return AlignNetwork(WIDTHS, AlignOptions(d_model=6, n_tokens=2, n_heads=3, d_hidden=9)).eval()


@pytest.fixture
def features(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(rng.normal(size=(13, d)).astype("f")) for k, d in WIDTHS.items()}


def test_all_are_unit_vectors(network: AlignNetwork, features: dict[str, torch.Tensor]) -> None:
    for level in network(features).values():
        for values in level:
            assert values.shape == (13, 6)
            torch.testing.assert_close(values.norm(dim=1), torch.ones(13))


def test_one_modality_stands_for_itself(
    network: AlignNetwork, features: dict[str, torch.Tensor]
) -> None:
    both = network(features)
    images = {k: v for k, v in features.items() if k.endswith("image")}
    alone = network(images)
    for level in ("spot", "niche"):
        assert alone[level].genes is None
        torch.testing.assert_close(alone[level].image, both[level].image)
        assert not torch.allclose(alone[level].fused, both[level].fused)
    # Genes that are not there do not enter.
    tokens = torch.randn(13, 2, 2, 6)
    is_there = torch.tensor([True, False]).repeat(13, 1)
    fusion, changed = network.fusions["spot"], tokens.clone()
    changed[:, 1] = 7.0
    torch.testing.assert_close(fusion(tokens, is_there), fusion(changed, is_there))


def test_training_hides_one_modality_at_most(
    network: AlignNetwork, features: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fusion = network.fusions["spot"]
    forward = fusion.forward
    monkeypatch.setattr(fusion, "forward", lambda t, there: seen.append(there) or forward(t, there))
    many = {k: v.repeat(100, 1) for k, v in features.items()}
    network.train()(many)
    network.eval()(many)
    training, evaluation = seen
    assert bool(training.any(dim=1).all())
    np.testing.assert_allclose(training.float().mean(dim=0), 0.6, atol=0.05)
    assert bool(evaluation.all())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, found 6 and 4"):
        AlignOptions(d_model=6)
    with pytest.raises(ValueError, match="all 0"):
        AlignOptions(spot=0, niche=0, scales=0)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        AlignOptions(modality_dropout=0.6)
    with pytest.raises(ValueError, match=r"\['stofm', 'st-align'\].*found 'clip'"):
        AlignOptions.of("clip")
    assert AlignOptions.of("st-align").weights == {"spot": 0.3, "niche": 0.3, "scales": 0.4}
