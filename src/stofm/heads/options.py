"""What the heads of all tasks are asked for, checked before anything is computed."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from stofm._config import check_seed
from stofm._keys import Obsm
from stofm.heads.embeddings import MADE_BY_EMBED
from stofm.heads.tuning_lora import require_peft
from stofm.spatial.splits import SplitRule

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stofm.heads.sections import Sections
    from stofm.nn import Stofm

DEFAULT_REP = (Obsm.X_CELL, Obsm.X)

#: ``"frozen"``: the head alone is fitted. Else the model is tuned with it: by changes of low rank
#: (``"lora"``), or all its weights (``"full"``).
Strategy = Literal["frozen", "lora", "full"]

#: With more known cells, networks that start elsewhere differ little, and one of a kind does.
_MANY_CELLS: Final = 15_000
_FEW_NETWORKS: Final = 3
#: A panel of some hundred genes has hardly more components that matter.
_N_COMPONENTS: Final = 150


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How tables are read and embedded; as in :func:`stofm.tl.embed`."""

    library_key: str | None = None
    layer: str | None = None
    spatial_key: str = Obsm.SPATIAL
    device: str | torch.device = "auto"
    show_progress_bar: bool = True

    @property
    def keys(self) -> dict[str, str | None]:
        """What is written down of it."""
        names = ("layer", "library_key", "spatial_key")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Arguments of :func:`stofm.tl.embed`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a head is fitted, whatever its task; as in :func:`stofm.tl.annotate`."""

    use_rep: str | Sequence[str] = DEFAULT_REP
    model: Stofm | str | Path | None = None
    strategy: Strategy = "frozen"
    n_neighbors: int | None = None
    n_components: int | None = None
    n_heads: int | None = None
    split: SplitRule = "auto"
    seed: int = 0
    reading: Reading = Reading()

    def __post_init__(self) -> None:
        """Refuse values that no data could go with."""
        for name, least in {"n_neighbors": 0, "n_components": 0, "n_heads": 1}.items():
            check_if_given(name, getattr(self, name), least=least)
        choices = {"strategy": Strategy, "split": SplitRule}
        for name, choice in choices.items():
            check_choice(name, getattr(self, name), get_args(choice))
        check_seed(self.seed)

    def check(self, sections: Sections | None) -> None:
        """Refuse what does not go together, or with the slices; embedding takes long, and comes after.

        Parameters
        ----------
        sections
            The cells to fit to; None if the split does not depend on their slices and places.
        """
        if self.strategy != "frozen":
            if strange := [r for r in checked_reps(self.use_rep) if r not in MADE_BY_EMBED]:
                msg = (
                    f"strategy={self.strategy!r} tunes a model, and obsm{strange} are not embeddings "
                    "that one makes; use strategy='frozen', or use_rep from "
                    f"{list(MADE_BY_EMBED)}."
                )
                raise ValueError(msg)
            if self.strategy == "lora":
                require_peft()
        if sections is None:
            return
        if self.split == "slices" and len(sections.slices.rows) < 2:
            msg = (
                "split='slices' holds out whole slices, and there is a single one; use "
                "split='blocks', or pass library_key= if there are several."
            )
            raise ValueError(msg)
        if self.split == "blocks" or self.strategy != "frozen":
            sections.coordinates(self.reading.spatial_key)

    def heads_of(self, n_known: int) -> int:
        """Networks of each kind: as asked for, or by the number of cells with a target."""
        if self.n_heads is not None:
            return self.n_heads
        return 1 if n_known > _MANY_CELLS else _FEW_NETWORKS

    def components_beside(self, use_rep: Sequence[str]) -> int:
        """Most components to read: as asked for, or some beside embeddings that a model makes."""
        if self.n_components is not None:
            return self.n_components
        is_made = set(use_rep) <= set(MADE_BY_EMBED)
        return _N_COMPONENTS if is_made else 0


def checked_reps(use_rep: str | Sequence[str]) -> tuple[str, ...]:
    """Names of representations as a tuple; refuse none, or one twice."""
    reps = (use_rep,) if isinstance(use_rep, str) else tuple(use_rep)
    if not reps or len(set(reps)) < len(reps):
        msg = f"use_rep must name one or several entries of obsm, each once; found {use_rep!r}."
        raise ValueError(msg)
    return reps


def check_whole_number(name: str, value: Any, *, least: int) -> None:
    """Refuse what is no whole number, or too small."""
    try:
        is_usable = operator.index(value) >= least
    except TypeError:
        is_usable = False
    if not is_usable:
        msg = f"{name} must be a whole number of at least {least}, found {value!r}."
        raise ValueError(msg)


def check_if_given(name: str, value: Any, *, least: int) -> None:
    """Refuse what is neither None nor a whole number of at least that."""
    if value is not None:
        check_whole_number(name, value, least=least)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is none of some values."""
    if value not in choices:
        msg = f"{name} must be one of {list(choices)}, found {value!r}."
        raise ValueError(msg)
