"""Messages speak of the caller's table, arguments and line."""

from __future__ import annotations

import logging

import pytest

import stofm as st
from stofm._logging import logger
from stofm._messages import collecting, naming, warn


def _message(text: str, where: str = "", **names: str) -> str:
    with pytest.raises(ValueError) as caught, naming(where, **names):
        raise ValueError(text)
    return str(caught.value)


def test_table_and_arguments_are_the_callers() -> None:
    text = "adata.X does not hold raw counts: pass layer='counts'. Is `layer` right?"
    names = {"adata": "reference", "layer": "reference_layer"}
    expected = (
        "reference.X does not hold raw counts: pass reference_layer='counts'. "
        "Is `reference_layer` right?"
    )
    assert _message(text, "the reference", **names) == expected


def test_table_is_named_first_where_nothing_else_names_it() -> None:
    assert _message("There are no cells.", "the reference") == "The reference: There are no cells."


def test_other_names_that_end_alike_stay() -> None:
    assert _message("pass sub_layer='a'", layer="reference_layer") == "pass sub_layer='a'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pass library_key='slide'.", "Pass --library-key slide."),
        ("Pass library_key='tissue slide'.", "Pass --library-key 'tissue slide'."),
        ("Pass library_key=True (or not).", "Pass --library-key (or not)."),
        ("pass library_key= with a column", "pass --library-key with a column"),
        ("Pass `library_key`.", "Pass --library-key."),
    ],
)
def test_command_line_has_flags(text: str, expected: str) -> None:
    assert _message(text, library_key="--library-key") == expected


def test_names_of_nested_calls_are_put_in_from_the_inside() -> None:
    with (
        pytest.raises(KeyError, match="pass --ref x"),
        naming(reference_layer="--ref"),
        naming(layer="reference_layer"),
    ):
        raise KeyError("pass layer='x'")


def test_log_lines_and_warnings_are_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="stofm")
    with naming("slice 'a'", layer="reference_layer"):
        logger.info("`layer` is %d.", 3)
        with pytest.warns(UserWarning, match="^Slice 'a': pass reference_layer=1$"):
            warn("pass layer=1")
    logger.info("`layer` again.")
    assert caplog.messages == [
        "Slice 'a': `reference_layer` is 3.",
        "Slice 'a': pass reference_layer=1",
        "`layer` again.",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_warning_points_at_the_users_line() -> None:
    adata = st.datasets.simulate_slice(20, 67, seed=0)
    adata.obsm["spatial"] = adata.obsm["spatial"] * 0
    with pytest.warns(UserWarning, match="at one position") as caught:
        st.tl.embed(adata, show_progress_bar=False)
    assert {warning.filename for warning in caught} == {__file__}


def test_warning_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="harm"):
        warn("harm")
    assert "harm" not in capsys.readouterr().err


def test_warnings_are_collected_and_nothing_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stofm")
    with collecting() as found, naming(layer="--layer"):
        warn("pass layer='a'.")
        logger.info("a line")
        with collecting() as inner:
            warn("one within")
    assert (found, inner) == (["pass --layer a."], ["one within"])
    assert not caplog.records
    logger.info("another line")
    assert caplog.messages == ["another line"]
