from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from stofm._config import build_dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    n_epochs: int
    learning_rate: float = 1e-4
    slices: list[str] = field(default_factory=list)


def test_fields_with_a_default_may_be_left_out() -> None:
    assert build_dataclass(Recipe, {"n_epochs": 3}, "recipe.toml") == Recipe(n_epochs=3)
    entries = {"n_epochs": 3, "slices": ["a"], "learning_rate": 0.1}
    assert build_dataclass(Recipe, entries, "recipe.toml") == Recipe(**entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_epoch": 3}, "'n_epoch' in recipe.toml; did you mean 'n_epochs'[?]"),
        ({"n_epochs": 3, "zzz": 1}, r"'zzz' in recipe.toml\. Known are \['learning_rate', 'n_ep"),
        ({"slices": []}, r"Missing from recipe.toml: \['n_epochs'\]"),
    ],
)
def test_unknown_and_missing_entries_are_refused(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataclass(Recipe, entries, "recipe.toml")
