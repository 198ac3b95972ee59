from __future__ import annotations

import logging

import pytest

import stofm as st
from stofm._logging import logger


@pytest.fixture(autouse=True)
def restored():
    level, n_threads = logger.level, st.settings.n_threads
    yield
    logger.setLevel(level)
    st.settings.n_threads = n_threads


@pytest.mark.parametrize(
    ("given", "level", "name"),
    [
        ("error", logging.ERROR, "error"),
        (1, logging.WARNING, "warning"),
        ("info", logging.INFO, "info"),
        (3, logging.INFO, "info"),
        (4, logging.DEBUG, "debug"),
    ],
)
def test_verbosity_is_the_level_of_the_log(given, level, name):
    st.settings.verbosity = given
    assert logger.level == level
    assert st.settings.verbosity == name


@pytest.mark.parametrize("given", ["loud", 5, -1, True, None])
def test_verbosity_that_is_none(given):
    with pytest.raises(ValueError, match=r"verbosity must be one of \['error', .* or 0 to 4"):
        st.settings.verbosity = given


@pytest.mark.parametrize("given", [0, -2, 1.5, "2", True])
def test_threads_that_are_none(given):
    with pytest.raises(ValueError, match="n_threads must be a whole number from 1 on or None"):
        st.settings.n_threads = given


def test_models_compute_with_the_threads_of_the_settings(model, adata, monkeypatch):
    import torch

    from stofm.nn import inference

    seen, build = [], inference.build_subslice

    def spy(*arguments, **options):
        seen.append(torch.get_num_threads())
        return build(*arguments, **options)

    monkeypatch.setattr(inference, "build_subslice", spy)
    before = torch.get_num_threads()
    st.settings.n_threads = 2 if before == 1 else 1
    st.tl.embed(adata, model, library_key="library", show_progress_bar=False)
    assert set(seen) == {st.settings.n_threads}
    assert torch.get_num_threads() == before
