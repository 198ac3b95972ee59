from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stofm.nn import choose_device, choose_dtype
from stofm.nn.device import reseed, seeded

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


def test_seeding_leaves_every_generator_as_it_was(monkeypatch):
    mps, cuda = torch.Generator(), torch.Generator()
    for device in (torch.mps, torch.cuda):
        # torch.manual_seed calls these; on a machine without CUDA it does so when CUDA starts.
        monkeypatch.setattr(device, "manual_seed", lambda _: cuda.manual_seed(0), raising=False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: cuda.manual_seed(0))
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: mps)
    states = [g.get_state() for g in (torch.default_generator, mps, cuda)]
    with seeded(5, torch.device("mps")):
        first = torch.rand(3, generator=mps)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
        reseed(5, torch.device("mps"))
        assert torch.equal(torch.rand(3, generator=mps), first)
    for generator, state in zip((torch.default_generator, mps, cuda), states, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_threads_that_seed_take_turns():
    def draw(seed):
        with seeded(seed):
            parts = [torch.rand(1)]
            time.sleep(0.002)
            parts.append(torch.rand(1))
        return torch.cat(parts)

    expected = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for found, one in zip(threads.map(draw, range(4)), expected, strict=True):
            assert torch.equal(found, one)
