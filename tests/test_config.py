from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from stofm._config import SHARE, Checked, build_dataclass, check_seed, read_json

if TYPE_CHECKING:
    from pathlib import Path


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


@dataclass(frozen=True, kw_only=True)
class Part:
    share: float = 0.5
    is_used: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            msg = f"share must lie between 0 and 1, found {self.share}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    n: int | None = None
    kind: Literal["a", "b"] = "a"
    pairs: tuple[tuple[str, str], ...] = ()
    origin: dict[str, dict[str, str]] = field(default_factory=dict)
    last: Part | None = None
    anything: Any = None


def test_tables_and_lists_become_what_fields_say() -> None:
    entries = {
        "part": {"share": 1},
        "parts": [{"share": 0.25}, {}],
        "n": None,
        "pairs": [["x", "y"]],
        "origin": {"X": {"model": "m"}},
        "last": None,
        "anything": [1, None],
    }
    assert build_dataclass(Whole, entries, "file.json") == Whole(
        part=Part(share=1),
        parts=(Part(share=0.25), Part()),
        pairs=(("x", "y"),),
        origin={"X": {"model": "m"}},
        anything=[1, None],
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"^f.json must be a table, found \[\]"),
        ({"part": None}, r"\[part\] of f.json must be a table, found None"),
        ({"part": {"share": "1"}}, r"\[part\] of f.json: share must be a finite number, found '1'"),
        ({"part": {"share": float("nan")}}, "share must be a finite number, found nan"),
        ({"part": {"share": 10**400}}, "share must lie between 0 and 1"),
        ({"part": {"share": 2}}, r"\[part\] of f.json: share must lie between 0 and 1, found 2"),
        ({"part": {"is_used": "false"}}, "is_used must be true or false, found 'false'"),
        ({"part": {"is_used": 1}}, "is_used must be true or false, found 1"),
        ({"parts": {}}, r"parts must be a list of tables: write \[\[parts\]\]"),
        ({"parts": [{"share": 2}]}, r"\[\[parts\]\] of f.json: share must lie"),
        ({"n": 1.5}, "n must be an integer, found 1.5"),
        ({"n": True}, "n must be an integer, found True"),
        ({"kind": "c"}, r"kind must be one of \['a', 'b'\], found 'c'"),
        ({"pairs": [["x"]]}, "pairs must be a list of"),
        ({"origin": {"X": "m"}}, "origin must be a table"),
        ({"last": {"share": -1}}, r"\[last\] of f.json: share must lie"),
        ({"part": {"shar": 1}}, r"'shar' in \[part\] of f.json; did you mean 'share'"),
    ],
)
def test_types_and_values_are_checked(entries: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataclass(Whole, entries, "f.json")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[]", "expected a table of names and values"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_json_file_is_named(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json is damaged.*{found}.*; get it again\."):
        read_json(path, "get it again")


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999, 1.0, "1", None])
def test_a_seed_is_one_for_every_generator(seed: object) -> None:
    check_seed(2**32 - 1)
    check_seed(np.int64(3))
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
        check_seed(seed)


@dataclass(frozen=True)
class Rules(Checked):
    name: Literal["a", "b"] = "a"
    share: float | None = field(default=None, metadata=SHARE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "c"}, r"name must be one of \['a', 'b'\], found 'c'"),
        ({"share": 1.5}, r"share must lie between 0 and 1, found 1\.5"),
    ],
)
def test_rules_of_fields_hold(values: dict[str, Any], message: str) -> None:
    assert Rules(share=0.5).share == 0.5
    with pytest.raises(ValueError, match=message):
        Rules(**values)
