"""Choosing where and in which precision to compute."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_CPU = torch.device("cpu")
# torch has one generator a device for all threads: those that seed it take turns.
_turn = threading.RLock()


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve ``"auto"`` to CUDA, then MPS, then the CPU, and log which and why.

    Raises
    ------
    ValueError
        The device asked for is not there.
    """
    if str(device) != "auto":
        return _named_device(device)
    if torch.cuda.is_available():
        chosen, reason = torch.device("cuda"), torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        chosen, reason = torch.device("mps"), "no CUDA device, Apple GPU found"
    else:
        chosen = torch.device("cpu")
        reason = f"no GPU that torch can use; {torch.get_num_threads()} threads"
    logger.info("Computing on %s (%s).", chosen, reason)
    return chosen


def _named_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        msg = f"Unknown device {device!r}; use 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'."
        raise ValueError(msg) from None
    n_cuda = torch.cuda.device_count() if chosen.type == "cuda" else 0
    lacks_cuda = chosen.type == "cuda" and (chosen.index or 0) >= n_cuda
    lacks_mps = chosen.type == "mps" and not torch.backends.mps.is_available()
    if lacks_cuda or lacks_mps:
        msg = f"device={str(device)!r} was asked for, but torch finds no such device; use 'auto'."
        raise ValueError(msg)
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve ``"auto"`` to bfloat16 on CUDA devices made for it and to float32 elsewhere.

    Raises
    ------
    ValueError
        The precision is not one that the model runs in.
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        msg = f"dtype must be 'auto', 'float32' or 'bfloat16', found {dtype!r}."
        raise ValueError(msg)
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device without swapping."""
    if device.type == "cuda":
        # What torch keeps for itself is free to it as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), _allowed_memory())


def _allowed_memory() -> int:
    """Bytes that the process may still take by its own limit (``ulimit -v``)."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(0, limit - int(psutil.Process().memory_info().vms))


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Within it, torch draws from `seed` on the CPU and on `device`; then as it would have before.

    Generators of other devices are not touched, which ``torch.manual_seed`` would seed too.
    """
    with _turn:
        generators = _generators(device)
        states = [generator.get_state() for generator in generators]
        try:
            reseed(seed, device)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def reseed(seed: int, device: torch.device = _CPU) -> None:
    """Seed what computing on `device` draws from; only within :func:`seeded`."""
    for generator in _generators(device):
        generator.manual_seed(seed)


def _generators(device: torch.device) -> list[torch.Generator]:
    found = [torch.default_generator]
    if device.type == "cuda":
        # "cuda" without a number is the device that torch uses now.
        found.append(torch.cuda.default_generators[torch.empty(0, device=device).device.index])
    elif device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    return found
