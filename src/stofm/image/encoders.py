"""What turns patches into features: built-in encoders, weights of others, any function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from stofm._digests import fingerprint
from stofm._files import local, reading, take_back
from stofm._logging import logger
from stofm._messages import warn
from stofm.image.networks import CompactCNN, build, statistics
from stofm.nn.checkpoint import find_checkpoint, read_tensors, require_finite
from stofm.nn.device import seeded
from stofm.nn.model import UntrainedModelWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

#: Mean and spread of red, green and blue in ImageNet, which most weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL, _LARGE = 64, 224
#: Pixels of a batch.
_BATCH_PIXELS: Final = 2**20
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_FILES: Final = ("config.json", "preprocessor_config.json", "README.md", *_WEIGHTS)
BUILT_IN: Final = ("cnn", "statistics")
#: Parts of a transformers model that features do not need.
_NEEDLESS: Final = re.compile(r"(^|\.)(pooler|head|text\w*|logit_scale)(\.|$)")
#: Terms of a licence that forbid commercial use or derivatives.
_RESTRICTED: Final = re.compile(
    r"(?<![a-z])(nc|nd)(?![a-z])|non-?_?\s?commercial|no-?_?derivative|research|academic",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Encoder:
    """Features of patches (batch, 3, n_pixels, n_pixels) from 0 to 1.

    `fingerprint` changes with the weights; it is empty of a function that has none to look at.
    """

    name: str
    function: Callable[[Tensor], Any]
    n_pixels: int
    fingerprint: str = ""
    device: str | torch.device = "cpu"

    @property
    def batch_size(self) -> int:
        """Patches encoded at a time."""
        return max(1, _BATCH_PIXELS // self.n_pixels**2)

    def __call__(self, patches: Tensor) -> NDArray[np.float32]:
        """Encode a batch; refuse what are no finite features of each patch."""
        with torch.inference_mode():
            found = self.function(patches.to(self.device))
        if isinstance(found, torch.Tensor):
            found = found.float().cpu().numpy()
        features = np.asarray(found, dtype=np.float32)
        if features.ndim != 2 or len(features) != len(patches):
            raise ValueError(
                f"The encoder {self.name!r} gave the shape {features.shape} for {len(patches)} "
                f"patches; expected ({len(patches)}, d), a row for each."
            )
        if not np.isfinite(features).all():
            raise FloatingPointError(f"The encoder {self.name!r} gave NaN or infinite features.")
        return features


def choose_encoder(encoder: Any, device: torch.device) -> Encoder:
    """Make an encoder of what a user names: see :func:`stofm.im.embed`."""
    if isinstance(encoder, str) and encoder == "cnn":
        warn(
            "The weights of the encoder 'cnn' are random, not trained: its features tell colour and "
            "texture, and no pathology. Pass trained weights as `encoder`; see the guide 'Bring "
            "your own pathology encoder'.",
            UntrainedModelWarning,
        )
        return _of_network("cnn", CompactCNN().eval(), device, _SMALL, (0.5,) * 3, (0.25,) * 3)
    if isinstance(encoder, str) and encoder == "statistics":
        return Encoder("statistics", statistics, _SMALL, device=device)
    if isinstance(encoder, str | Path):
        return _of_files(encoder, device)
    if not callable(encoder):
        raise TypeError(
            "`encoder` must be 'cnn', 'statistics', an entry of obsm, a folder or file of weights, a "
            f"hub id or a function; found {type(encoder).__name__}."
        )
    name = getattr(encoder, "name", getattr(encoder, "__name__", type(encoder).__name__))
    n_pixels = int(getattr(encoder, "n_pixels", _LARGE))
    if isinstance(encoder, nn.Module):
        return Encoder(name, encoder.to(device).eval(), n_pixels, _digest(encoder), device)
    return Encoder(name, encoder, n_pixels, device=device)


def _of_network(
    name: str, network: nn.Module, device: torch.device, n_pixels: int, mean: Any, std: Any
) -> Encoder:
    """Let a network read colours that are shifted by `mean` and divided by `std`."""
    network = network.to(device, torch.float32)
    middle, unit = (torch.tensor(one, device=device).view(3, 1, 1) for one in (mean, std))
    return Encoder(name, lambda x: network((x - middle) / unit), n_pixels, _digest(network), device)


def _digest(network: nn.Module) -> str:
    state = sorted(network.state_dict().items())
    weights = (value.detach().cpu().reshape(-1).view(torch.uint8).numpy() for _, value in state)
    return fingerprint(*(name for name, _ in state), *weights)


# Weights of others


def _of_files(source: str | Path, device: torch.device) -> Encoder:
    file = take_back(local(source))
    folder = (
        file.parent if file.is_file() else find_checkpoint(source, embedded=BUILT_IN, files=_FILES)
    )
    config = _read_json(folder / "config.json")
    _tell_licence(str(source), folder, config)
    if "model_type" in config:
        return _of_transformers(str(source), folder, device)
    if not file.is_file():
        file = next((folder / one for one in _WEIGHTS if (folder / one).is_file()), folder)
    if file == folder:
        raise FileNotFoundError(f"{folder} has none of {list(_WEIGHTS)}; pass the file of weights.")
    network = build(_read_weights(file), config, str(file))
    stated = config.get("pretrained_cfg") or {}
    side = getattr(network, "n_pixels", (stated.get("input_size") or [_LARGE])[-1])
    mean, std = stated.get("mean") or _MEAN, stated.get("std") or _STD
    return _of_network(str(source), network, device, int(side), mean, std)


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name, from safetensors or from what torch saved; nothing else is unpickled."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    with reading(file, "file of weights that torch reads with weights_only=True"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        # Training scripts put the weights beside other things.
        inner = [one for one in state.values() if isinstance(one, Mapping) and _are_tensors(one)]
        state = inner[0] if len(inner) == 1 else state
        if not _are_tensors(state):
            raise ValueError(
                f"{file} holds {sorted(map(str, state))[:5]}; expected tensors by name."
            )
    require_finite(file, state)
    return dict(state)


def _are_tensors(state: Mapping[str, Any]) -> bool:
    return bool(state) and all(isinstance(value, torch.Tensor) for value in state.values())


class _Vision(nn.Module):
    """A transformers model whose features are its class token, or else the mean of what it gives."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        names = (name for name, _ in model.named_parameters())
        self.has_class = any(name.endswith(("cls_token", "class_embedding")) for name in names)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.model(pixel_values=images).last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.has_class else hidden.mean(dim=1)


def _of_transformers(name: str, folder: Path, device: torch.device) -> Encoder:
    """Take the vision part of a model."""
    from transformers import AutoModel

    with reading(folder, "folder of a transformers model"), seeded(0):
        model, report = AutoModel.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    # Heads above the features, and the part for texts, may be lacking.
    missing = [one for one in report["missing_keys"] if not _NEEDLESS.search(one)]
    if missing:
        raise ValueError(f"{folder} lacks weights, such as {missing[:3]}: get it again.")
    network = _Vision(getattr(model, "vision_model", model)).eval()
    stated = _read_json(folder / "preprocessor_config.json")
    own: Any = getattr(network.model.config, "image_size", _LARGE)
    size = stated.get("crop_size") or stated.get("size") or own
    side = next(iter(size.values())) if isinstance(size, dict) else size
    mean, std = stated.get("image_mean") or _MEAN, stated.get("image_std") or _STD
    return _of_network(name, network, device, int(side), mean, std)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with reading(file, "JSON"):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _tell_licence(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Log the licence of weights if it forbids commercial use or derivatives, or is not stated."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8").split("---")[1:2] if card.is_file() else []
    stated = re.findall(r"^license(?:_name)?:\s*(\S+)", "".join(head), re.MULTILINE)
    stated += [str((config.get("pretrained_cfg") or config).get("license") or "")]
    terms = " ".join(stated).strip()
    if _RESTRICTED.search(terms):
        logger.warning(
            "The licence of the weights %s is %s: commercial use, or passing on what was made from "
            "them, may be forbidden. Read it before you use the features.",
            *(name, terms),
        )
    elif not terms:
        logger.info("The files of %s state no licence: look at where you have them from.", name)
