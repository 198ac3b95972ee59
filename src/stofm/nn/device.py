"""Device, precision, seeds, and an estimate of the memory that is needed."""

from __future__ import annotations

import math
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import torch

from stofm._arrays import MOST_IN_MEMORY
from stofm._logging import logger
from stofm._settings import settings
from stofm.spatial.virtual_cells import MOST_CLUSTERED, ROWS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stofm.nn.config import CellEncoderConfig, SE2TransformerConfig, StofmConfig
    from stofm.spatial import SubSliceConfig


_DTYPES: Final[dict[object, torch.dtype]] = {
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
        The requested device does not exist.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            chosen, reason = torch.device("cuda"), torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            chosen, reason = torch.device("mps"), "no CUDA device, Apple GPU found"
        else:
            chosen = _CPU
            n_threads = settings.n_threads or torch.get_num_threads()
            reason = f"no GPU that torch can use; {n_threads} thread{'s' * (n_threads > 1)}"
        logger.info("Computing on %s (%s).", chosen, reason)
        return chosen
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"Unknown device {device!r}; use 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'."
        ) from None
    n_cuda = torch.cuda.device_count() if chosen.type == "cuda" else 0
    lacks_cuda = chosen.type == "cuda" and (chosen.index or 0) >= n_cuda
    if lacks_cuda or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(
            f"device={str(device)!r} was requested, but torch finds no such device; use 'auto'."
        )
    return chosen


def take_turn(device: str, turn: int) -> str:
    """The GPU for process number `turn` on a machine with several, unless one is requested."""
    n_devices = torch.cuda.device_count()
    if device not in ("auto", "cuda") or n_devices < 2:
        return device
    # dask-cuda gives each worker the same GPUs, its own first; SLURM all of them in order.
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = given if len(given) == n_devices else [str(k) for k in range(n_devices)]
    return f"cuda:{names.index(sorted(names)[turn % n_devices])}"


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
    chosen = _DTYPES.get(dtype, dtype)
    if not isinstance(chosen, torch.dtype) or chosen not in _DTYPES.values():
        raise ValueError(f"dtype must be 'auto', 'float32' or 'bfloat16', found {dtype!r}.")
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        # Memory that torch has reserved is free to it as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), _allowed_memory())


def _allowed_memory() -> int:
    """Bytes left to the process by its own limit (``ulimit -v``)."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(0, limit - int(psutil.Process().memory_info().vms))


@contextmanager
def using_threads(number: int | None = None) -> Iterator[None]:
    """Let torch use `number` threads within a block, or as many as ``stofm.settings`` says."""
    before, wanted = torch.get_num_threads(), number or settings.n_threads
    if wanted:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed torch on the CPU and on `device` within a block; its generators are restored afterwards.

    Unlike ``torch.manual_seed``, this leaves the generators of other devices alone.
    """
    with _turn:
        states = [(generator, generator.get_state()) for generator in _generators(device)]
        try:
            reseed(seed, device)
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def reseed(seed: int, device: torch.device = _CPU) -> None:
    """Seed the generators of the CPU and of `device`; only within :func:`seeded`."""
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


#: Numbers per token that the cell encoder holds at a time, beside those in proportion to its
#: widths, including what the allocator does not return; measured.
_TOKEN_NUMBERS: Final = 780
#: Bytes per cell of a slice for its neighbour graph and igraph's copies, by clustering; measured.
_GRAPH_BYTES: Final = {"canonical": 1500, "scanpy": 2200}
#: Bytes per cell for coordinates, sub-slice and virtual cell, over all slices.
_LAYOUT_BYTES: Final = 48
#: Bytes per entry of a block of counts while it is read and ranked, rows of a block, and bytes at
#: most.
_ENTRY_BYTES, _BLOCK_ROWS, _BLOCK_BYTES = 18, 32_768, 40_000_000
#: Share of a batch's memory in the cell encoder that the allocator keeps. Since batches differ in
#: size it keeps more: bytes per encoded token, and bytes at most. Measured.
_KEPT, _SCATTERED, _MOST_SCATTERED = 0.7, 600, 200_000_000


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The properties of the input that memory depends on.

    `n_cells` is over all slices, `genes_per_cell` the mean number of tokens, and `n_copied` the
    bytes of the AnnData that are copied before results are written.
    """

    n_cells: int
    largest_slice: int
    genes_per_cell: float
    n_copied: int = 0


@dataclass(frozen=True)
class Nodes:
    """The largest sub-slice: its cells, and the virtual cells that it gets."""

    n_cells: int
    n_virtual: int

    @classmethod
    def expected(cls, rules: SubSliceConfig, largest_slice: int) -> Nodes:
        """Guess them before slices are cut and clustered."""
        # A sub-slice of the reference partition may hold twice as many cells.
        n_cells = rules.n_cells * (2 if rules.partition == "reference" else 1)
        # More cells have more clusters, by about the root of their number.
        found = 20 + math.sqrt(largest_slice) / 2 * max(1.0, rules.leiden_resolution)
        limit = rules.max_virtual_cells or largest_slice
        return cls(min(n_cells, largest_slice), min(round(found), limit, largest_slice))

    @property
    def total(self) -> int:
        """Number of nodes, the slice token counted."""
        return 1 + self.n_cells + self.n_virtual


def encoder_memory(config: CellEncoderConfig, token_budget: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that a batch with this many tokens takes in the cell encoder."""
    numbers = 9 * config.d_hidden + 2 * config.d_inner + _TOKEN_NUMBERS
    return token_budget * numbers * dtype.itemsize


def transformer_memory(
    config: SE2TransformerConfig,
    rules: SubSliceConfig,
    nodes: Nodes,
    batch_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Estimate the bytes that a batch of sub-slices like the largest takes in the transformer."""
    n, heads, size = nodes.total, config.n_heads, dtype.itemsize
    n_pairs = n * nodes.n_virtual + nodes.n_cells * rules.n_neighbors
    listed = n_pairs * (4 * (3 * config.n_kernels + 2 * heads) + 40)
    hidden = n * size * (4 * config.d_inner + config.d_model * (3 * config.n_layers + 8))
    # Per head and pair of nodes: a bias that is made in single precision and cast, elsewhere masked
    # where there is padding; logits without and with it on MPS, and the copy that CUDA aligns.
    made = 4 + (size if size < 4 else 0)
    bias = n * n * heads * {"cpu": made, "mps": 16}.get(device.type, max(made, 3 * size))
    logits = 12 * n * n if device.type == "cpu" else 0
    return batch_size * (listed + hidden + bias) + logits


def host_memory(
    config: StofmConfig,
    rules: SubSliceConfig,
    work: Workload,
    *,
    encoding: int = 0,
    transforming: int = 0,
) -> int:
    """Estimate the bytes that embedding takes in main memory beyond its input, at its peak.

    Embeddings that are kept in temporary files (:mod:`stofm._arrays`) are not counted.

    `encoding` and `transforming` are the bytes that a batch takes in the two parts of the model,
    where they compute in main memory.
    """
    encoder = config.cell_encoder
    n, slice_ = work.n_cells, work.largest_slice
    token = 8 if encoder.reads_values else 4
    tokens = token * work.genes_per_cell + 8
    cell, spatial = 4 * encoder.d_cell, 4 * config.se2_transformer.d_embedding
    cells, embeddings = (0 if n * one > MOST_IN_MEMORY else n * one for one in (cell, spatial))
    # While all results are put together and the largest slice is worked on.
    laid_out = n * (tokens + _LAYOUT_BYTES) + cells
    # Rows of a chunk, the same in double precision, and such of the chunk before.
    components = 20 * min(slice_, ROWS_AT_ONCE) * encoder.d_cell
    clustered = slice_ if rules.clustering == "scanpy" else min(slice_, MOST_CLUSTERED)
    graph = clustered * _GRAPH_BYTES[rules.clustering] + slice_ * 8 * rules.n_components
    block = min(_ENTRY_BYTES * work.genes_per_cell * min(n, _BLOCK_ROWS), _BLOCK_BYTES)
    weights = 4 * encoder.n_tokens * (encoder.d_hidden + encoder.gene_width * encoder.pooled)
    encoded = n * (min(work.genes_per_cell, encoder.max_positions) + 1)
    scattered = min(_SCATTERED * encoded, _MOST_SCATTERED)
    # Of the encoder, where it computes in main memory.
    batch = encoding + weights + scattered if encoding else 0
    kept = _KEPT * encoding + scattered if encoding else 0
    copied = 0 if slice_ == n else slice_
    peaks = (
        n * (tokens + 24) + cells + batch,
        laid_out + copied * cell + max(components, graph) + kept,
        laid_out + embeddings + copied * (cell + spatial) + max(kept, transforming),
        # Columns of the sparse matrices, and what they are made from.
        laid_out + embeddings + n * (token + 4) * work.genes_per_cell + kept + work.n_copied,
    )
    return round(block + max(peaks))


def describe_bytes(n_bytes: int) -> str:
    """Write a number of bytes in readable units."""
    size = float(n_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
