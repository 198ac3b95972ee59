from __future__ import annotations

import pytest
import torch

from stofm.nn import HeadConfig, PredictionHead


@pytest.fixture
def head():
    torch.manual_seed(3)
    return PredictionHead(HeadConfig(d_input=7, d_output=5, widths=(11, 13), dropout=0.5)).eval()


def test_three_layers_with_leaky_relu(head):
    features = torch.randn(17, 7)
    head.input_mean += 2.0
    head.input_scale *= 3.0
    first, second = head.hidden[0], head.hidden[3]
    hidden = (features - 2.0) / 3.0 @ first.weight.T + first.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden) @ second.weight.T + second.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    expected = hidden @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(head(features), expected)


def test_a_linear_head():
    torch.manual_seed(4)
    head = PredictionHead(HeadConfig(d_input=7, d_output=5, widths=(), dropout=0.5))
    assert set(head.state_dict()) == {"input_mean", "input_scale", "last.weight", "last.bias"}
    features = torch.randn(17, 7) * 3 + 2
    head.fit_inputs(features)
    inner = (features - features.mean(0)) / features.var(0, correction=0).mean().sqrt()
    expected = inner @ head.last.weight.T + head.last.bias
    # Nothing is hidden, so nothing is dropped while it is trained.
    torch.testing.assert_close(head.train()(features), expected, atol=1e-5, rtol=1e-4)
    columns = torch.tensor([3, 0])
    torch.testing.assert_close(head(features, columns), head(features)[:, columns])


def test_lists_become_tuples():
    assert HeadConfig(d_input=2, d_output=2, widths=[]).widths == ()
    assert HeadConfig(d_input=2, d_output=2, widths=[4, 3]).widths == (4, 3)


def test_some_outputs_alone(head):
    features, columns = torch.randn(17, 7), torch.tensor([4, 1])
    torch.testing.assert_close(head(features, columns), head(features)[:, columns])


def test_columns_of_a_representation_share_a_scale(head):
    # Two representations, of which one is a million times as large; column 3 is constant.
    features = torch.randn(503, 7) * torch.tensor([1.0, 2.0, 3.0, 0.0, 1e6, 2e6, 1e6]) + 5.0
    head.fit_inputs(features, (4, 3))
    inner = (features - head.input_mean) / head.input_scale
    torch.testing.assert_close(inner.mean(0), torch.zeros(7), atol=1e-3, rtol=0)
    for columns in (slice(0, 4), slice(4, 7)):
        shares = inner[:, columns].var(0, correction=0)
        assert float(shares.mean()) == pytest.approx(1.0, rel=1e-4)
        expected = features[:, columns].var(0, correction=0)
        torch.testing.assert_close(shares, expected / expected.mean(), rtol=1e-3, atol=1e-6)
    assert inner[:, 3].abs().max() < 1e-5
    # As one, the larger is nearly all that there is.
    head.fit_inputs(features)
    inner = (features - head.input_mean) / head.input_scale
    assert inner[:, :4].abs().max() < 1e-4 < inner[:, 4:].var(0).min()


def test_constant_inputs(head):
    head.fit_inputs(torch.full((3, 7), 2.0), (7, 0))
    assert torch.isfinite(head(torch.full((3, 7), 2.0))).all()


def test_dropout_only_while_training(head):
    features = torch.randn(17, 7)
    assert torch.equal(head(features), head(features))
    head.train()
    assert not torch.equal(head(features), head(features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_input": 0}, "d_input must be at least 1, found 0"),
        ({"d_output": 0}, "d_output must be at least 1"),
        ({"widths": (4, 0)}, "widths must be at least 1"),
        ({"widths": (4,)}, r"two hidden layers or none, found \(4,\)"),
        ({"widths": (4, 3, 2)}, "two hidden layers or none"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**{"d_input": 2, "d_output": 2} | change)
