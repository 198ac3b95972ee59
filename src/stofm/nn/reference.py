"""Reading SToFM's published weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from stofm._config import build_dataclass, read_json
from stofm._files import local
from stofm.nn.cell_encoder import BERT_NAMES, CellEncoder
from stofm.nn.checkpoint import load_exactly, read_tensors, require_finite
from stofm.nn.config import CellEncoderConfig, SE2TransformerConfig
from stofm.nn.device import seeded
from stofm.nn.se2_transformer import SE2Transformer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

#: Entries of the published config.json, and ours for them.
_SE2_SIZES = {
    "input_dim": "d_cell",
    "embedding_dim": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "ffn_embedding_dim": "d_inner",
    "gaussian_hidden_dim": "n_kernels",
}
#: The same for modules; those of a layer follow its number.
_SE2_NAMES = {
    "embedding_layer": "input_projection",
    "token_type_embeddings": "node_type_embedding",
    "gaussian.proj.0": "distance_bias.hidden",
    "gaussian.proj.2": "distance_bias.output",
    "self_attn.out_proj": "out",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "norm",
}
_SE2_SCALARS = {
    "gaussian.linear.weight": "distance_bias.scale",
    "gaussian.linear.bias": "distance_bias.shift",
    "gaussian.means.weight": "distance_bias.means",
    "gaussian.stds.weight": "distance_bias.widths",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NAME = re.compile(r"(?:encoder\.(layers\.\d+\.))?(.*)\.(\w+)")
# Stored by the published code and never used: the norm after a pre-norm stack, pretraining
# heads, and BERT's pooler.
_UNUSED_SE2 = ("encoder.final_layer_norm.", "lm_head.", "pair_head.")
_UNUSED_BERT = ("pooler.", "embeddings.position_ids", "cls.")


@seeded(0)
def se2_from_reference(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SE2Transformer:
    """Build the SE(2) Transformer from the published ``config.json`` and state dict."""
    sizes = _renamed(config, _SE2_SIZES, "config.json")
    sizes["norm_first"] = config.get("pre_layernorm", False)
    own = build_dataclass(SE2TransformerConfig, sizes, "the published config.json")
    model = SE2Transformer(own)
    load_exactly(model, rename_se2(state), "se2transformer")
    return model


def rename_se2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published SE(2) Transformer's weights to ours, queries, keys and values joined."""
    renamed: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in _without(state, "model.", _UNUSED_SE2).items():
        layer, module, kind = (
            match.groups("") if (match := _NAME.fullmatch(name)) else ("", "", name)
        )
        if name in _SE2_SCALARS:
            flat = value.reshape(-1)
            is_scalar = name.startswith("gaussian.linear.") and len(flat) == 1
            renamed[_SE2_SCALARS[name]] = flat[0] if is_scalar else flat
        elif module in _QKV:
            joined.setdefault(f"{layer}qkv.{kind}", {})[module] = value
        else:
            renamed[f"{layer}{_SE2_NAMES.get(module, module)}.{kind}"] = value
    whole = {name: parts for name, parts in joined.items() if len(parts) == len(_QKV)}
    return renamed | {n: torch.cat([parts[part] for part in _QKV]) for n, parts in whole.items()}


def _without(
    state: Mapping[str, Tensor], prefix: str, unused: tuple[str, ...]
) -> dict[str, Tensor]:
    """Remove a prefix from the names, and entries that the published code stores but never uses."""
    named = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in named.items() if not name.startswith(unused)}


@seeded(0)
def cell_encoder_from_reference(folder: Path) -> CellEncoder:
    """Build the cell encoder from a published ``cell_encoder`` folder.

    It holds ``cell_bert`` (as transformers writes it) and ``cell_proj.bin`` or
    ``cell_proj.safetensors`` (``weight`` and ``bias``).
    """
    file = "cell_bert/config.json"
    projection = read_weights(folder, "cell_proj")
    sizes = _renamed(_read_json(folder / file), BERT_NAMES, file)
    sizes["d_cell"] = len(projection.get("bias", (0,)))
    encoder = CellEncoder(build_dataclass(CellEncoderConfig, sizes, f"the published {file}"))
    weights = read_weights(folder / "cell_bert", "model", "pytorch_model")
    load_exactly(encoder.bert, _without(weights, "bert.", _UNUSED_BERT), "cell_bert")
    load_exactly(encoder.projection, projection, "cell_proj")
    return encoder


def _renamed(config: Mapping[str, Any], names: Mapping[str, str], file: str) -> dict[str, Any]:
    if missing := sorted(set(names) - set(config)):
        raise ValueError(f"The published {file} lacks {missing}; it has {sorted(config)}.")
    return {ours: config[theirs] for theirs, ours in names.items()}


def read_reference(folder: str | Path) -> tuple[CellEncoder, SE2Transformer]:
    """Read a folder in the layout of SToFM's published weights.

    It holds ``cell_encoder/cell_bert/``, ``cell_encoder/cell_proj.bin``, ``config.json`` and
    ``se2transformer.pth``; ``.safetensors`` of the same names work as well.
    """
    folder = local(folder)
    config = _read_json(folder / "config.json")
    transformer = se2_from_reference(config, read_weights(folder, "se2transformer"))
    return cell_encoder_from_reference(folder / "cell_encoder"), transformer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; it belongs to the layout of SToFM's published weights."
        )
    return read_json(path, "get the file again")


def read_weights(folder: Path, *stems: str) -> dict[str, Tensor]:
    """Read a state dict from the first of ``stem.safetensors``, ``stem.bin`` and ``stem.pth``.

    Pickle-based files are read with ``weights_only=True``: nothing in them is executed.
    """
    names = [f"{stem}.{suffix}" for stem in stems for suffix in ("safetensors", "bin", "pth")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds none of {names}.")
    if found.suffix == ".safetensors":
        return read_tensors(found)
    try:
        state: Any = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{found} can't be read as plain tensors ({type(error).__name__}): it is damaged or "
            "holds Python objects, which stofm does not load. Get the file again."
        ) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(
            f"{found} should hold tensors by name, found {type(state).__name__} of other things."
        )
    require_finite(found, state)
    return state
