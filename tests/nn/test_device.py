from __future__ import annotations

import logging

import pytest
import torch

from stofm.nn import choose_device, choose_dtype

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_cuda
def test_auto_says_what_was_chosen_and_why(caplog):
    with caplog.at_level(logging.INFO, logger="stofm"):
        device = choose_device("auto")
    assert f"Computing on {device}" in caplog.text


@no_cuda
def test_missing_device_is_refused():
    with pytest.raises(ValueError, match="'cuda:3' was asked for, but torch finds no such device"):
        choose_device("cuda:3")


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="Unknown device 'gpu'"):
        choose_device("gpu")


def test_named_device():
    assert choose_device("cpu") == torch.device("cpu")


def test_dtypes():
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype(torch.float32, cpu) == torch.float32
    for wrong in ("float16", torch.float64):
        with pytest.raises(ValueError, match="dtype must be 'auto', 'float32' or 'bfloat16'"):
            choose_dtype(wrong, cpu)
