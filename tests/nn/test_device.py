from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stofm
from stofm.nn import choose_device, choose_dtype
from stofm.nn.checkpoint import read_config
from stofm.nn.device import (
    Nodes,
    Workload,
    describe_bytes,
    encoder_memory,
    host_memory,
    reseed,
    seeded,
    transformer_memory,
)
from stofm.nn.inference import TOKEN_BUDGET
from stofm.spatial import SubSliceConfig

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_cuda
def test_auto_says_what_was_chosen_and_why(caplog):
    with caplog.at_level(logging.INFO, logger="stofm"):
        device = choose_device("auto")
    assert f"Computing on {device}" in caplog.text


@no_cuda
def test_missing_device_is_refused():
    with pytest.raises(ValueError, match="'cuda:3' was requested, but torch finds no such device"):
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


CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
RULES = SubSliceConfig(n_cells=400)


@pytest.fixture(scope="module")
def mini():
    """Config of the built-in model."""
    folder = Path(stofm.__file__).parent / "weights" / "stofm-mini"
    return read_config(folder)[0]


def on_cpu(config, n_cells, genes_per_cell):
    nodes = Nodes.expected(config.subslice, n_cells)
    return host_memory(
        config,
        config.subslice,
        Workload(n_cells=n_cells, largest_slice=n_cells, genes_per_cell=genes_per_cell),
        encoding=encoder_memory(config.cell_encoder, TOKEN_BUDGET["cpu"], torch.float32),
        transforming=transformer_memory(
            config.se2_transformer, config.subslice, nodes, 1, device=CPU, dtype=torch.float32
        ),
    )


@pytest.mark.parametrize(
    ("n_cells", "genes_per_cell", "measured"),
    [
        # benchmarks/memory.py: highest of several peaks, panels of 100, 300 and 1,000 genes.
        (2_000, 21, 139e6),
        (2_000, 72, 209e6),
        (2_000, 251, 363e6),
        (10_000, 16, 330e6),
        (10_000, 56, 331e6),
        (10_000, 195, 543e6),
        (40_000, 21, 434e6),
        (40_000, 69, 526e6),
        (40_000, 245, 662e6),
    ],
)
def test_estimates_are_near_measured_peaks(mini, n_cells, genes_per_cell, measured):
    assert on_cpu(mini, n_cells, genes_per_cell) / measured == pytest.approx(1, abs=0.3)


def test_a_million_cells_of_a_small_panel_take_a_few_gigabytes(mini):
    # Embeddings are in files.
    assert 1e9 < on_cpu(mini, 1_000_000, 65) < 3e9
    assert on_cpu(mini, 300_000, 65) < 3e9


def test_each_part_of_the_work_counts(mini):
    work = Workload(n_cells=50_000, largest_slice=10_000, genes_per_cell=80)
    one = host_memory(mini, RULES, work)
    for change in (
        {"n_cells": 60_000},
        {"largest_slice": 49_000},
        {"genes_per_cell": 900},
        {"n_copied": 10**9},
    ):
        assert host_memory(mini, RULES, replace(work, **change)) > 1.05 * one
    assert host_memory(mini, RULES, work, encoding=10**8) > one + 5 * 10**7
    large = replace(work, n_cells=10**6, largest_slice=10**6)
    reference = SubSliceConfig.reference()
    assert host_memory(mini, reference, large) > host_memory(mini, RULES, large)


def in_transformer(config, nodes, batch_size=1, device=CPU, dtype=torch.float32):
    sizes = config.se2_transformer
    return transformer_memory(sizes, RULES, nodes, batch_size, device=device, dtype=dtype)


def test_a_device_holds_the_bias_and_the_masked_bias(mini):
    nodes = Nodes(5000, 20)
    one_bias = 4 * mini.se2_transformer.n_heads * nodes.total**2
    cpu, cuda, mps = (in_transformer(mini, nodes, device=d) for d in (CPU, CUDA, MPS))
    half = in_transformer(mini, nodes, device=CUDA, dtype=torch.bfloat16)
    assert one_bias < cpu < 2.5 * one_bias
    assert 2 * one_bias < cuda < mps
    assert mps > 4 * one_bias
    # It is made in single precision whatever the precision of the rest.
    assert 1.5 * one_bias < half < cuda
    assert in_transformer(mini, nodes, 4, CUDA) == 4 * cuda


def test_virtual_cells_without_a_limit_grow_with_the_slice(mini):
    rules = SubSliceConfig.reference()
    few, many = (Nodes.expected(rules, n) for n in (10_000, 1_000_000))
    assert few.n_cells == many.n_cells == 2000
    assert 50 < few.n_virtual < 200 < many.n_virtual < 2000
    assert Nodes.expected(RULES, 1_000_000).n_virtual == 200
    assert Nodes.expected(rules, 7) == Nodes(7, 7)
    # Each has a distance to every node.
    assert in_transformer(mini, Nodes(400, 900)) > 5 * in_transformer(mini, Nodes(400, 20))


@pytest.mark.parametrize(
    ("n", "text"), [(7, "7 bytes"), (2_500, "2 kB"), (3_000_000, "3 MB"), (12e9, "12.0 GB")]
)
def test_bytes_are_described(n, text):
    assert describe_bytes(n) == text
