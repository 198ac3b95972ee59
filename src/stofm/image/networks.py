"""Image encoders in torch: a compact CNN, and ResNets and ViTs with timm's names of parameters."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: Heads of the usual widths; others have to be told.
_HEADS: Final = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
#: Of classification, which no features need.
_UNUSED: Final = ("fc.", "head.", "head_dist.")


class CompactCNN(nn.Module):
    """Six small convolutions; features are mean and spread of the channels at three scales.

    The weights come from `seed`. Features have a width of 2 x the sum of `widths`.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = zip((3, *widths), widths, strict=False)
        self.reduce = nn.ModuleList(
            nn.Conv2d(
                before,
                after,
                4 if before == 3 else 3,
                stride=4 if before == 3 else 2,
                padding=0 if before == 3 else 1,
            )
            for before, after in sizes
        )
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        for layer in (*self.reduce, *self.refine):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, d)
        """Encode images whose colours are about 0 on average."""
        x, found = images, []
        for reduce, refine in zip(self.reduce, self.refine, strict=True):
            x = F.relu(reduce(x))
            x = x + F.relu(refine(x))
            variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
            found += [mean, (variance + 1e-6).sqrt()]
        return torch.cat(found, dim=1)


def statistics(images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, 30)
    """Colour and texture of images from 0 to 1, without any weights.

    Mean, spread, tenth, median and ninetieth percentile of each channel, correlations of channels,
    and steepness (mean and spread along both axes) at three scales.
    """
    colours = images.flatten(2)
    # A quarter of the pixels tells them as well.
    few = images[..., ::2, ::2].flatten(2)
    quantiles = torch.quantile(few, few.new_tensor([0.1, 0.5, 0.9]), dim=2)
    spread, mean = torch.std_mean(colours, dim=2, correction=0)
    standard = (colours - mean[..., None]) / (spread[..., None] + 1e-3)
    pairs = [(standard[:, i] * standard[:, j]).mean(dim=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    found = [mean, spread, *quantiles, torch.stack(pairs, dim=1)]
    grey = images.mean(dim=1, keepdim=True)
    for _ in range(3):
        steps = [grey.diff(dim=axis).abs().flatten(1) for axis in (2, 3)]
        found += [torch.stack(torch.std_mean(step, dim=1), dim=1) for step in steps]
        grey = F.avg_pool2d(grey, 2)
    return torch.cat(found, dim=1)


class _ResNetBlock(nn.Module):
    """Two convolutions of 3 x 3, or one between two of 1 x 1 that change the width."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, stride: int, *, is_deep: bool) -> None:
        super().__init__()
        self.is_deep = is_deep
        first, second = (1, stride) if is_deep else (stride, 1)
        side = 1 if is_deep else 3
        self.conv1 = nn.Conv2d(d_in, d_hidden, side, first, side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(d_hidden)
        self.conv2 = nn.Conv2d(d_hidden, d_hidden, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d_hidden)
        if is_deep:
            self.conv3 = nn.Conv2d(d_hidden, d_out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(d_out)
        self.downsample = None
        if stride > 1 or d_in != d_out:
            conv = nn.Conv2d(d_in, d_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.is_deep:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet (18 to 152 layers) whose features are the means of its last maps.

    `depths` counts the blocks of the four layers, `is_deep` tells blocks of three convolutions.
    """

    def __init__(self, depths: tuple[int, ...], *, is_deep: bool, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        d_in, self.n_layers = width, len(depths)
        for k, depth in enumerate(depths):
            hidden = width * 2**k
            d_out = hidden * (4 if is_deep else 1)
            blocks = [
                _ResNetBlock(
                    d_in if j == 0 else d_out,
                    hidden,
                    d_out,
                    2 if k > 0 and j == 0 else 1,
                    is_deep=is_deep,
                )
                for j in range(depth)
            ]
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
            d_in = d_out

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, d)
        """Encode normalised images."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        for k in range(self.n_layers):
            x = getattr(self, f"layer{k + 1}")(x)
        return x.mean(dim=(2, 3))


class _ViTBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(
        self, width: int, n_heads: int, d_fc1: int, d_fc2: int, *, has_bias: bool, is_scaled: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.is_gated = n_heads, d_fc1 == 2 * d_fc2
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        qkv = nn.Linear(width, 3 * width, bias=has_bias)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(width, width)})
        fc1, fc2 = nn.Linear(width, d_fc1), nn.Linear(d_fc2, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
        if is_scaled:
            self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))
        self.is_scaled = is_scaled

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        B, T, D = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(B, T, 3, self.n_heads, D // self.n_heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        attended = self.attn["proj"](attended.transpose(1, 2).reshape(B, T, D))
        x = x + (attended * self.ls1["gamma"] if self.is_scaled else attended)
        hidden = self.mlp["fc1"](self.norm2(x))
        if self.is_gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        out = self.mlp["fc2"](hidden)
        return x + (out * self.ls2["gamma"] if self.is_scaled else out)


class VisionTransformer(nn.Module):
    """ViT of a size that weights under timm's names have: learnt positions, with or without registers.

    Features are the class token, or with ``pool="avg"`` the mean of the patches.
    """

    def __init__(self, state: Mapping[str, Tensor], n_heads: int, pool: str) -> None:
        super().__init__()
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        n_prefix = sum(state[name].shape[1] for name in ("cls_token", "reg_token") if name in state)
        n_positions = state["pos_embed"].shape[1]
        # Positions of all tokens, or of patches only, which make a square.
        self.adds_before = math.isqrt(n_positions) ** 2 == n_positions
        self.n_pixels = patch * math.isqrt(n_positions - (0 if self.adds_before else n_prefix))
        self.pool, self.n_prefix = pool, n_prefix
        conv = nn.Conv2d(3, width, patch, patch, bias="patch_embed.proj.bias" in state)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        for name in ("cls_token", "reg_token", "pos_embed"):
            value = nn.Parameter(torch.zeros(state[name].shape)) if name in state else None
            self.register_parameter(name, value)
        first, second = (state[f"blocks.0.mlp.fc{k}.weight"].shape[2 - k] for k in (1, 2))
        is_block = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        options = {
            "has_bias": "blocks.0.attn.qkv.bias" in state,
            "is_scaled": "blocks.0.ls1.gamma" in state,
        }
        self.blocks = nn.Sequential(
            *(_ViTBlock(width, n_heads, first, second, **options) for _ in is_block)
        )
        self.norms = [name for name in ("norm", "fc_norm") if f"{name}.weight" in state]
        for name in self.norms:
            setattr(self, name, nn.LayerNorm(width, eps=1e-6))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, D)
        """Encode normalised images."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed if self.adds_before else x
        prefix = [one for one in (self.cls_token, self.reg_token) if one is not None]
        x = torch.cat([*(one.expand(len(x), -1, -1) for one in prefix), x], dim=1)
        x = self.blocks(x if self.adds_before else x + self.pos_embed)
        x = self.norm(x) if "norm" in self.norms else x
        x = x[:, self.n_prefix :].mean(dim=1) if self.pool == "avg" else x[:, 0]
        return self.fc_norm(x) if "fc_norm" in self.norms else x


def build(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> nn.Module:
    """Build the network that weights under timm's names belong to, and load them.

    `config` is timm's, as far as there is one: the number of heads can't be told from weights.
    """
    from stofm.nn.checkpoint import load_exactly

    own = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
    if {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "pos_embed"} <= set(own):
        network: nn.Module = _vit_for(own, config, what)
    elif "layer1.0.conv1.weight" in own:
        blocks = {
            tuple(map(int, found.groups()))
            for name in own
            if (found := re.match(r"layer(\d)\.(\d+)\.", name))
        }
        depths = tuple(
            sum(layer == k for layer, _ in blocks) for k in sorted({k for k, _ in blocks})
        )
        width = own["conv1.weight"].shape[0] if "conv1.weight" in own else 64
        network = ResNet(depths, is_deep="layer1.0.conv3.weight" in own, width=width)
    else:
        raise ValueError(
            f"{what} has weights such as {sorted(own)[:3]}; expected the names of a ViT or ResNet in "
            "timm ('blocks.0.attn.qkv.weight', 'layer1.0.conv1.weight'). Rename them, or pass a "
            "function that runs your network as `encoder`."
        )
    counters = {
        name: value
        for name, value in network.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    load_exactly(network, {**counters, **own}, what)
    return network.eval()


def _vit_for(
    state: Mapping[str, Tensor], config: Mapping[str, Any], what: str
) -> VisionTransformer:
    args = config.get("model_args") or {}
    width = state["patch_embed.proj.weight"].shape[0]
    n_heads = int(args.get("num_heads") or _HEADS.get(width, 0))
    if not n_heads or width % n_heads:
        raise ValueError(
            f"The number of attention heads of {what} (width {width}) is not known: put it into a "
            'config.json beside the weights: {"model_args": {"num_heads": 16}}'
        )
    is_mean = "cls_token" not in state or "fc_norm.weight" in state
    pool = args.get("global_pool", config.get("global_pool")) or ("avg" if is_mean else "token")
    return VisionTransformer(state, n_heads, pool)
