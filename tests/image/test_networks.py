from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from stofm.image.networks import CompactCNN, ResNet, build, statistics
from stofm.nn.device import seeded


def vit_state(
    *, width: int, depth: int, patch: int, side: int, hidden: int, n_registers: int = 0,
    gated: bool = False, scaled: bool = True, own_positions: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights with the names and shapes that timm's VisionTransformer has."""
    n = (side // patch) ** 2
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, n + (1 + n_registers if own_positions else 0), width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if n_registers:
        shapes["reg_token"] = (1, n_registers, width)
    for k in range(depth):
        block = {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden // 2 if gated else hidden), "mlp.fc2.bias": (width,),
        }
        if scaled:
            block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
        shapes |= {f"blocks.{k}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


HEADS = {"model_args": {"num_heads": 3}}
SMALL = {"width": 15, "depth": 2, "patch": 4, "side": 12, "hidden": 22}


def test_parameters_of_a_uni_type_vit_have_timms_names() -> None:
    with torch.device("meta"):
        state = vit_state(width=1024, depth=24, patch=16, side=224, hidden=4096)
        # What a ViT-L/16 has in timm, without its classifier.
        assert sum(value.numel() for value in state.values()) == 303_350_784 
    del state


@pytest.mark.parametrize(
    ("n_registers", "gated", "scaled", "own_positions"),
    [(0, False, True, True), (0, False, False, True), (4, True, True, True), (3, True, True, False)],
)
def test_weights_are_taken_to_the_last(
    n_registers: int, gated: bool, scaled: bool, own_positions: bool
) -> None:
    state = vit_state(**SMALL, n_registers=n_registers, gated=gated, scaled=scaled, own_positions=own_positions)
    network = build({**state, "head.weight": torch.zeros(5, 15)}, HEADS, "made")
    own = network.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert network.n_pixels == 12
    assert network(torch.zeros(2, 3, 12, 12)).shape == (2, 15)


def test_a_vit_gives_what_that_of_transformers_gives() -> None:
    config = transformers.ViTConfig(
        hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=22,
        image_size=12, patch_size=4, layer_norm_eps=1e-6, hidden_act="gelu",
    )
    state = vit_state(**SMALL, scaled=False)
    with seeded(0):
        other = transformers.ViTModel(config, add_pooling_layer=False).eval()
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }
    theirs = other.state_dict()
    print(sorted(theirs))
