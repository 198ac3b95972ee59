"""Changes of low rank to a model's linear maps (LoRA), through peft."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Final

from stofm.nn.device import seeded

if TYPE_CHECKING:
    from torch import Tensor

    from stofm.nn import Stofm

#: Maps that are changed: those of the SE(2) Transformer's layers, of BERT's
#: attention, and what brings either to its output or input.
_CHANGED: Final = re.compile(
    r"se2_transformer\.(input_projection|layers\.\d+\.(qkv|out|fc1|fc2))"
    r"|cell_encoder\.projection"
    r"|cell_encoder\.bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
)
_ADAPTER: Final = "default"


def add_low_rank(model: Stofm, rank: int, alpha: int, *, seed: int) -> Any:
    """Put changes, 0 at first and scaled by ``alpha / rank``, into a model's maps: peft's wrapper of it.

    The model's own weights stay; `seed` is that of the changes' first weights.

    References
    ----------
    LoRA (Hu et al. 2021, arXiv 2106.09685).
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=_CHANGED.pattern)
    with seeded(seed):
        return peft.LoraModel(model, config, _ADAPTER)


def merged(changes: Any, model: Stofm) -> Stofm:
    """A plain model, a copy, with the changes added to its weights."""
    # The vocabulary is large, and nothing changes it.
    copied = copy.deepcopy(changes, {id(model.vocabulary): model.vocabulary})
    found: Stofm = copied.merge_and_unload()
    return found


def encoder_weights(model: Stofm) -> dict[str, Tensor]:
    """Weights of the cell encoder's changed maps with the change added, by name.

    The cell encoder reads its maps' weights rather than calling them, so that a change has to
    be in the weights; gradients flow to the change.
    """
    return {
        f"{name}.base_layer.weight": part.get_base_layer().weight + part.get_delta_weight(_ADAPTER)
        for name, part in model.cell_encoder.named_modules()
        if hasattr(part, "get_delta_weight")
    }
