from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from stofm.image.networks import CompactCNN, build, statistics
from stofm.nn.device import seeded


def vit_shapes(
    width: int,
    depth: int,
    patch: int,
    side: int,
    hidden: int,
    *,
    n_registers: int = 0,
    is_gated: bool = False,
    is_scaled: bool = True,
    has_prefix_positions: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of timm's VisionTransformer, without its classifier."""
    n_prefix = 1 + n_registers if has_prefix_positions else 0
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // patch) ** 2 + n_prefix, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if n_registers:
        shapes["reg_token"] = (1, n_registers, width)
    inner = hidden // 2 if is_gated else hidden
    for k in range(depth):
        linear = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, inner),
        }
        for name, shape in linear.items():
            shapes[f"blocks.{k}.{name}.weight"] = shape
            shapes[f"blocks.{k}.{name}.bias"] = shape[:1]
        vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
        vectors += ["ls1.gamma", "ls2.gamma"] if is_scaled else []
        shapes |= {f"blocks.{k}.{name}": (width,) for name in vectors}
    return shapes


def resnet_shapes(
    depths: tuple[int, ...], *, is_deep: bool, width: int = 64
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of timm's ResNet."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (width, 3, 7, 7)}
    norms = {"bn1": width}
    d_in = width
    for layer, depth in enumerate(depths, start=1):
        hidden = width * 2 ** (layer - 1)
        d_out = 4 * hidden if is_deep else hidden
        for k in range(depth):
            here = f"layer{layer}.{k}"
            sizes = [(hidden, d_in, 1), (hidden, hidden, 3), (d_out, hidden, 1)]
            for j, (after, before, side) in enumerate(
                sizes if is_deep else [(hidden, d_in, 3), (hidden, hidden, 3)], start=1
            ):
                shapes[f"{here}.conv{j}.weight"] = (after, before, side, side)
                norms[f"{here}.bn{j}"] = after
            if k == 0 and (layer > 1 or d_in != d_out):
                shapes[f"{here}.downsample.0.weight"] = (d_out, d_in, 1, 1)
                norms[f"{here}.downsample.1"] = d_out
            d_in = d_out
    for name, size in norms.items():
        shapes |= {
            f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")
        }
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(5)
    return state


HEADS = {"model_args": {"num_heads": 3}}
SMALL = {"width": 15, "depth": 2, "patch": 4, "side": 12, "hidden": 22}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"is_scaled": False},
        {"n_registers": 4, "is_gated": True},
        {"n_registers": 3, "is_gated": True, "has_prefix_positions": False},
    ],
)
def test_a_vit_takes_all_weights_under_timms_names(more: dict) -> None:
    state = filled(vit_shapes(**SMALL, **more))
    network = build({**state, "head.weight": torch.zeros(5, 15)}, HEADS, "made")
    own = network.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert network.n_pixels == 12
    assert network(torch.zeros(2, 3, 12, 12)).shape == (2, 15)


def test_numbers_of_parameters_are_the_published_ones() -> None:
    # ViT-L/16 with layer scale (UNI), ResNet-18 and ResNet-50, each without a classifier.
    for shapes, millions in (
        (vit_shapes(1024, 24, 16, 224, 4096), 303.35),
        (resnet_shapes((2, 2, 2, 2), is_deep=False), 11.18),
        (resnet_shapes((3, 4, 6, 3), is_deep=True), 23.51),
    ):
        names = [name for name in shapes if not re.search("running|tracked", name)]
        numbers = sum(torch.Size(shapes[name]).numel() for name in names)
        assert numbers / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_vit_computes_what_torchs_own_layers_do() -> None:
    state = filled(vit_shapes(**SMALL, is_scaled=False))
    network = build(state, HEADS, "made")
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    tokens = [
        state["patch_embed.proj.weight"].flatten(1)
        @ images[:, :, i : i + 4, j : j + 4].flatten(1).T
        for i in (0, 4, 8)
        for j in (0, 4, 8)
    ]
    x = torch.stack(tokens).permute(2, 0, 1) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(2, -1, -1), x], dim=1) + state["pos_embed"]
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    for k in range(2):
        with seeded(0):
            layer = nn.TransformerEncoderLayer(
                15, 3, 22, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
        layer.load_state_dict(
            {
                f"{own}{part}": state[f"blocks.{k}.{name}{part}"]
                for own, name in names.items()
                for part in ("weight", "bias")
            }
        )
        x = layer(x)
    expected = nn.functional.layer_norm(x, (15,), state["norm.weight"], state["norm.bias"], 1e-6)
    torch.testing.assert_close(network(images), expected[:, 0], atol=1e-5, rtol=1e-5)
    mean = build(state, {**HEADS, "global_pool": "avg"}, "made")(images)
    torch.testing.assert_close(mean, expected[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-5)


def test_gates_scales_and_registers_of_a_vit_have_their_effect() -> None:
    state = filled(vit_shapes(**SMALL, n_registers=4, is_gated=True))
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    first = build(state, HEADS, "made")(images)
    for name in ("reg_token", "blocks.1.ls2.gamma", "blocks.0.mlp.fc1.weight"):
        other = build({**state, name: state[name].roll(1, -1)}, HEADS, "made")(images)
        assert not torch.allclose(first, other, atol=1e-4), name
    # Without scale there is nothing but the class token and its place.
    still = {name: value * (0 if "gamma" in name else 1) for name, value in state.items()}
    expected = (state["cls_token"] + state["pos_embed"][:, :1])[:, 0].expand(2, -1)
    expected = nn.functional.layer_norm(
        expected, (15,), state["norm.weight"], state["norm.bias"], 1e-6
    )
    torch.testing.assert_close(build(still, HEADS, "made")(images), expected)


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_resnet_takes_weights_under_timms_names_and_computes_what_they_mean(
    is_deep: bool,
) -> None:
    state = filled(resnet_shapes((2, 1), is_deep=is_deep, width=5))
    network = build({**state, "fc.weight": torch.zeros(2, 2)}, {}, "made")
    assert set(network.state_dict()) == set(state)
    images = torch.randn(2, 3, 35, 35, generator=torch.Generator().manual_seed(5))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def conv(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    x = norm(conv(images, "conv1", 2), "bn1").relu()
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    for here, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2)):
        strides = (1, stride, 1) if is_deep else (stride, 1)
        out = x
        for k, own in enumerate(strides, start=1):
            out = norm(conv(out.relu() if k > 1 else out, f"{here}.conv{k}", own), f"{here}.bn{k}")
        if f"{here}.downsample.0.weight" in state:
            x = norm(conv(x, f"{here}.downsample.0", stride), f"{here}.downsample.1")
        x = (out + x).relu()
    torch.testing.assert_close(network(images), x.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the names of a ViT or ResNet in timm"):
        build({"layers.0.weight": torch.zeros(3)}, {}, "made")
    state = filled(vit_shapes(**SMALL))
    with pytest.raises(ValueError, match=r"heads of made \(width 15\) is not known"):
        build(state, {}, "made")
    with pytest.raises(ValueError, match="weights of made do not fit"):
        build({**state, "blocks.1.attn.q_norm.weight": torch.zeros(5)}, HEADS, "made")
    del state["norm.bias"]
    with pytest.raises(ValueError, match="weights of made do not fit"):
        build(state, HEADS, "made")


def test_the_compact_cnn_has_seeded_weights_and_leaves_torchs_state() -> None:
    before = torch.get_rng_state()
    first, again, other = CompactCNN(), CompactCNN(), CompactCNN(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert first(images).shape == (3, 448)
    assert torch.equal(first(images), again(images))
    assert not torch.allclose(first(images), other(images))
    assert CompactCNN((5, 7))(images).shape == (3, 24)


def test_statistics_tell_colour_and_texture() -> None:
    smooth = torch.full((1, 3, 64, 64), 0.5)
    red = smooth * torch.tensor([1.0, 0.2, 0.2])[:, None, None]
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * torch.ones(1, 3, 1, 1)
    found = statistics(torch.cat([smooth, red, board]))
    assert found.shape == (3, 30)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0, :3], torch.full((3,), 0.5))
    torch.testing.assert_close(found[1, :3], torch.tensor([0.5, 0.1, 0.1]))
    assert found[2, 19] == pytest.approx(1.0)  # each pixel differs from the next
    assert found[0, 18:].abs().max() < 1e-6
