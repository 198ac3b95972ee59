"""What the heads of all tasks are fitted with, checked before anything is computed."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, get_args

from stofm._config import check_seed
from stofm.heads.base import check_strategy
from stofm.heads.embeddings import MADE_BY_EMBED
from stofm.heads.inputs import checked_reps
from stofm.heads.splits import Protocol
from stofm.heads.tuning_lora import require_peft
from stofm.spatial.splits import SplitRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stofm.heads.sections import Sections


def check_fit_options(
    sections: Sections | None,
    *,
    strategy: str,
    use_rep: str | Sequence[str],
    split: SplitRule,
    protocol: Protocol | None,
    seed: int,
    spatial_key: str,
) -> None:
    """Refuse options that a head can't be fitted with; embedding takes long, and comes after.

    Parameters
    ----------
    sections
        The cells to fit to; None if the split does not depend on their slices and places.
    strategy, use_rep, split, protocol, seed, spatial_key
        As in :func:`stofm.tl.annotate`.

    Raises
    ------
    ImportError
        ``strategy="lora"`` without peft.
    KeyError
        There are no coordinates, and a split by blocks or tuning needs them.
    ValueError
        An option is not usable, or does not go with another or with the slices.
    """
    check_strategy(strategy)
    _check_choice("split", split, get_args(SplitRule))
    _check_choice("protocol", protocol, (None, *get_args(Protocol)))
    check_seed(seed)
    if strategy != "frozen":
        _check_tuning(strategy, checked_reps(use_rep))
    if sections is None:
        return
    how = split if protocol is None else "random"
    if how == "slices" and len(sections.slices.rows) < 2:
        msg = (
            "split='slices' holds out whole slices, and there is a single one; use split='blocks', "
            "or pass library_key= if there are several."
        )
        raise ValueError(msg)
    if how == "blocks" or strategy != "frozen":
        sections.coordinates(spatial_key)


def check_whole_number(name: str, value: Any, *, least: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises
    ------
    ValueError
        It is one of these.
    """
    try:
        is_usable = operator.index(value) >= least
    except TypeError:
        is_usable = False
    if not is_usable:
        msg = f"{name} must be a whole number of at least {least}, found {value!r}."
        raise ValueError(msg)


def check_if_given(name: str, value: Any, *, least: int) -> None:
    """Refuse what is neither None nor a whole number of at least that.

    Raises
    ------
    ValueError
        It is not.
    """
    if value is not None:
        check_whole_number(name, value, least=least)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        msg = f"{name} must be one of {list(choices)}, found {value!r}."
        raise ValueError(msg)


def _check_tuning(strategy: str, reps: Sequence[str]) -> None:
    """Refuse what no gradient reaches, and low rank without its library."""
    if strange := [rep for rep in reps if rep not in MADE_BY_EMBED]:
        msg = (
            f"strategy={strategy!r} tunes a model, and obsm{strange} are not embeddings that one "
            f"makes; use strategy='frozen', or use_rep from {list(MADE_BY_EMBED)}."
        )
        raise ValueError(msg)
    if strategy == "lora":
        require_peft()
