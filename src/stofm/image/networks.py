"""Image encoders in torch: a compact CNN, and ResNets and ViTs with timm's names of parameters."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from stofm.nn.checkpoint import load_exactly
from stofm.nn.device import seeded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: Heads of the usual widths; others have to be told.
_HEADS: Final = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
#: Weights that sizes of a ViT are read from.
_OF_VITS: Final = {
    *(f"blocks.0.{name}.weight" for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")),
    *("patch_embed.proj.weight", "pos_embed"),
}
#: Of classification, which no features need.
_UNUSED: Final = ("fc.", "head.", "head_dist.")


class CompactCNN(nn.Module):
    """Six small convolutions; features are mean and spread of the channels at three scales.

    The weights come from `seed`. Features have a width of 2 x the sum of `widths`.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), *, seed: int = 0) -> None:
        super().__init__()
        steps = itertools.pairwise(widths)
        with seeded(seed):
            first = nn.Conv2d(3, widths[0], 4, stride=4)
            others = (nn.Conv2d(*step, 3, stride=2, padding=1) for step in steps)
            self.reduce = nn.ModuleList([first, *others])
            self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
            for layer in (*self.reduce, *self.refine):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
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
    """Two or three convolutions beside a residual, of the sizes that weights have."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        names = [f"{prefix}conv{k}.weight" for k in (1, 2, 3)]
        shapes = [state[name].shape for name in names if name in state]
        sides = [shape[2] for shape in shapes]
        for k, (d_out, d_in, side, _) in enumerate(shapes):
            # The first that sees neighbours takes every second pixel.
            own = stride if k == sides.index(3) else 1
            self.add_module(
                f"conv{k + 1}", nn.Conv2d(d_in, d_out, side, own, side // 2, bias=False)
            )
            self.add_module(f"bn{k + 1}", nn.BatchNorm2d(d_out))
        self.n_convs, self.downsample = len(shapes), nn.Sequential()
        if f"{prefix}downsample.0.weight" in state:
            conv = nn.Conv2d(shapes[0][1], shapes[-1][0], 1, stride, bias=False)
            self.downsample.extend([conv, nn.BatchNorm2d(shapes[-1][0])])

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for k in range(1, self.n_convs + 1):
            out = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(F.relu(out) if k > 1 else out))
        return F.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """ResNet of the size that weights under timm's names have; features are means of the last maps."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        width = state["layer1.0.conv1.weight"].shape[1]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        found = (re.match(r"(layer\d)\.\d+\.conv1\.", name) for name in state)
        self.depths = Counter(sorted(one[1] for one in found if one))
        for name, depth in self.depths.items():
            strides = [1 if name == "layer1" else 2] + [1] * (depth - 1)
            blocks = (
                _ResNetBlock(state, f"{name}.{k}.", stride) for k, stride in enumerate(strides)
            )
            self.add_module(name, nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, d)
        """Encode normalised images."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        for name in self.depths:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _ViTBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual; sizes are those of weights."""

    def __init__(self, state: Mapping[str, Tensor], n_heads: int) -> None:
        super().__init__()
        d_fc1, width = state["blocks.0.mlp.fc1.weight"].shape
        d_fc2 = state["blocks.0.mlp.fc2.weight"].shape[1]
        self.n_heads, self.is_gated = n_heads, d_fc1 == 2 * d_fc2
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        qkv = nn.Linear(width, 3 * width, bias="blocks.0.attn.qkv.bias" in state)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(width, width)})
        fc1, fc2 = nn.Linear(width, d_fc1), nn.Linear(d_fc2, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
        is_scaled = "blocks.0.ls1.gamma" in state
        self.ls1, self.ls2 = (_Scale(width) if is_scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        B, T, D = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(B, T, 3, self.n_heads, D // self.n_heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.ls1(self.attn["proj"](attended.transpose(1, 2).reshape(B, T, D)))
        hidden = self.mlp["fc1"](self.norm2(x))
        if self.is_gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        out: Tensor = x + self.ls2(self.mlp["fc2"](hidden))
        return out


class VisionTransformer(nn.Module):
    """ViT of the size that weights under timm's names have, with or without registers.

    Features are the class token, or with ``pool="avg"`` the mean of the patches.
    """

    cls_token: Tensor | None
    reg_token: Tensor | None
    pos_embed: Tensor

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
        n_blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        self.blocks = nn.Sequential(*(_ViTBlock(state, n_heads) for _ in range(n_blocks)))
        self.norm, self.fc_norm = (
            nn.LayerNorm(width, eps=1e-6) if f"{name}.weight" in state else nn.Identity()
            for name in ("norm", "fc_norm")
        )

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, n, n) -> (B, D)
        """Encode normalised images."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed if self.adds_before else x
        prefix = [one for one in (self.cls_token, self.reg_token) if one is not None]
        x = torch.cat([*(one.expand(len(x), -1, -1) for one in prefix), x], dim=1)
        x = self.norm(self.blocks(x if self.adds_before else x + self.pos_embed))
        x = x[:, self.n_prefix :].mean(dim=1) if self.pool == "avg" else x[:, 0]
        out: Tensor = self.fc_norm(x)
        return out


def build(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> nn.Module:
    """Build the network that weights under timm's names belong to, and load them.

    `config` is timm's, as far as there is one: the number of heads can't be told from weights.
    """
    own = {name: value for name, value in state.items() if not name.startswith(_UNUSED)}
    with seeded(0):  # of weights that are replaced
        if set(own) >= _OF_VITS:
            network: nn.Module = _vit_for(own, config, what)
        elif "layer1.0.conv1.weight" in own:
            network = ResNet(own)
        else:
            raise ValueError(
                f"{what} has weights such as {sorted(own)[:3]}; expected the names of a ViT or ResNet "
                "in timm ('blocks.0.attn.qkv.weight', 'layer1.0.conv1.weight'). Rename them, or pass a "
                "function that runs your network as `encoder`."
            )
    # How many batches a norm has seen is not always written, nor needed.
    counts = {name: value for name, value in network.state_dict().items() if "num_batches" in name}
    load_exactly(network, {**counts, **own}, what)
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
