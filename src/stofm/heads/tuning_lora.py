"""Low-rank changes of a model's linear maps (LoRA), through peft."""

from __future__ import annotations

import copy
import importlib.util
import re
from typing import TYPE_CHECKING, Any, cast

from stofm.nn.device import seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stofm.nn import Stofm

#: Maps that are changed: those of the SE(2) Transformer's layers, of BERT's attention, and what
#: brings either to its output or input.
_CHANGED = re.compile(
    r"se2_transformer\.(input_projection|layers\.\d+\.(qkv|out|fc1|fc2))"
    r"|cell_encoder\.projection"
    r"|cell_encoder\.bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
)
_ADAPTER = "default"


class LowRankModel:
    """A model whose linear maps have a trained change of low rank; its own weights stay.

    The changes are 0 at first.

    Parameters
    ----------
    model
        Its modules are changed in place.
    rank
        Of the changes.
    alpha
        The changes are scaled by ``alpha / rank``.
    seed
        Of the changes' first weights.

    Attributes
    ----------
    model
        The model, with the changes in it.

    References
    ----------
    LoRA (Hu et al. 2021, arXiv 2106.09685).
    """

    def __init__(self, model: Stofm, *, rank: int, alpha: float, seed: int) -> None:
        peft = _import_peft()
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=_CHANGED.pattern)
        with seeded(seed):
            self._wrapped = peft.LoraModel(model, config, _ADAPTER)
        self.model = model

    def encoder_weights(self) -> dict[str, Tensor]:
        """Weights of the cell encoder's changed maps with the change added, by name.

        The cell encoder reads its maps' weights rather than calling them, so that a change has to
        be in the weights; gradients flow to the change.
        """
        return {
            f"{name}.base_layer.weight": part.get_base_layer().weight
            + part.get_delta_weight(_ADAPTER)
            for name, part in _changed(self.model.cell_encoder)
        }

    def merged(self) -> Stofm:
        """Return a plain model, a copy, with the changes added to its weights."""
        # The vocabulary is large, and nothing changes it.
        shared = {id(self.model.vocabulary): self.model.vocabulary}
        return cast("Stofm", copy.deepcopy(self._wrapped, shared).merge_and_unload())


def _changed(module: nn.Module) -> list[tuple[str, Any]]:
    return [(n, part) for n, part in module.named_modules() if hasattr(part, "get_delta_weight")]


def require_peft() -> None:
    """Say how to get peft where it is missing; it is not imported, which takes seconds."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "strategy='lora' needs peft: pip install 'stofm[lora]'. Or use strategy='full'."
        )


def _import_peft() -> Any:
    require_peft()
    import peft

    return peft
