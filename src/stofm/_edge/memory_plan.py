"""Whether there is memory for embedding, before and while it runs, and what to do if not."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from stofm._edge.counts import peek_counts
from stofm.nn.device import (
    Nodes,
    Workload,
    describe_bytes,
    encoder_memory,
    free_memory,
    host_memory,
    transformer_memory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.gene_mapping import Columns
    from stofm.nn import StofmConfig
    from stofm.spatial import SliceLayout, SubSliceConfig

_CPU: Final = torch.device("cpu")
_HOST: Final = "main memory"
#: A change is worth naming if it leaves at most this share.
_HELPS: Final = 0.9
#: Rows that are looked at for the number of genes of a cell: so many, in so many places.
_SAMPLE_ROWS: Final = 64
_N_SAMPLES: Final = 8
#: What errors say that come of too little memory, in other words than MemoryError.
_SHORTAGES: Final = (
    "can't start new thread",
    "can't allocate memory",
    "Resource temporarily unavailable",
)


@dataclass(kw_only=True)
class MemoryPlan:
    """What embedding will take, as far as is known by now: work and nodes as expected or found."""

    config: StofmConfig
    rules: SubSliceConfig
    work: Workload
    nodes: Nodes
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    token_budget: int
    is_backed: bool

    @property
    def in_encoder(self) -> int:
        """Bytes that a batch takes in the cell encoder."""
        n_tokens = round(self.work.n_cells * (self.work.genes_per_cell + 1))
        n_at_once = min(self.token_budget, n_tokens) if self.work.genes_per_cell else 0
        return encoder_memory(self.config.cell_encoder, n_at_once, self.dtype)

    @property
    def in_transformer(self) -> int:
        """Bytes that a batch takes in the SE(2) Transformer."""
        return transformer_memory(
            self.config.se2_transformer,
            self.rules,
            self.nodes,
            self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )

    def needed(self) -> dict[str, int]:
        """Bytes by place; an Apple GPU computes in main memory."""
        parts = {"encoding": self.in_encoder, "transforming": self.in_transformer}
        if self.device.type in ("cpu", "mps"):
            return {_HOST: host_memory(self.config, self.rules, self.work, **parts)}
        return {
            str(self.device): max(parts.values()),
            _HOST: host_memory(self.config, self.rules, self.work),
        }

    def require(self) -> None:
        """Compare what is needed with what is free."""
        for place, n_bytes in self.needed().items():
            free = free_memory(_CPU if place == _HOST else self.device)
            if n_bytes > free:
                msg = (
                    f"Embedding {self.work.n_cells} cells of {self.work.genes_per_cell:.0f} genes "
                    f"takes about {describe_bytes(n_bytes)} of {place}, and {describe_bytes(free)} "
                    f"are free. {self.advice(place)}"
                )
                raise MemoryError(msg)

    def count_genes(self, adata: AnnData, layer: str | None, columns: Columns) -> None:
        """Find how many genes a cell has, and whether there is memory for as many."""
        found = genes_per_cell(adata, layer, columns.token_ids >= 0)
        found = min(found, self.config.max_tokens)
        self.work = replace(self.work, genes_per_cell=found)
        self.require()

    def fit_batch(self, layouts: Sequence[SliceLayout], batch_size: int, *, is_fixed: bool) -> int:
        """Halve a batch of the sub-slices that were found until the device has room for it."""
        self.batch_size = batch_size
        self.nodes = max((_largest(one) for one in layouts), key=lambda nodes: nodes.total)
        free = free_memory(self.device)
        while not is_fixed and self.batch_size > 1 and self.in_transformer > free:
            self.batch_size //= 2
        if self.in_transformer > free:
            place = next(iter(self.needed()))
            msg = (
                f"Sub-slices of {self.nodes.n_cells} cells and {self.nodes.n_virtual} virtual "
                f"cells take about {describe_bytes(self.in_transformer)} of {place}, and "
                f"{describe_bytes(free)} are free. {self._advice(lambda plan: plan.in_transformer)}"
            )
            raise MemoryError(msg)
        return self.batch_size

    def advice(self, place: str) -> str:
        """Say which changes make a difference."""
        rest = ["fewer cells at a time"]
        if place == _HOST and not self.is_backed:
            rest.insert(0, "leave the counts on disk (anndata.read_h5ad(path, backed='r'))")
        return self._advice(lambda plan: plan.needed().get(place, 0), rest)

    def _advice(self, size: Callable[[MemoryPlan], int], rest: Sequence[str] = ()) -> str:
        work, nodes, budget = self.work, self.nodes, self.token_budget
        changes: dict[str, dict[str, Any]] = {
            "embed slice by slice": {"work": replace(work, n_cells=work.largest_slice)},
            "leave out copy=True": {"work": replace(work, n_copied=0)},
            f"a lower batch_size (now {self.batch_size})": {"batch_size": 1},
            f"a lower token_budget (now {budget})": {"token_budget": budget // 4 or 1},
            f"subslice= with fewer n_cells (now {self.rules.n_cells})": {
                "nodes": Nodes(nodes.n_cells // 2, nodes.n_virtual)
            },
            f"subslice= with fewer max_virtual_cells (now {nodes.n_virtual} virtual cells)": {
                "nodes": Nodes(nodes.n_cells, nodes.n_virtual // 2)
            },
            "device='cpu'": {"device": _CPU},
        }
        enough = _HELPS * size(self)
        found = [text for text, change in changes.items() if size(replace(self, **change)) < enough]
        return f"What helps: {'; '.join([*found, *rest])}."

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say what helps where memory runs out all the same."""
        try:
            yield
        except (MemoryError, RuntimeError, OSError) as error:
            if not _is_shortage(error):
                raise
            msg = (
                f"Memory ran out while {self.work.n_cells} cells were embedded ({error}); "
                f"{describe_bytes(free_memory(_CPU))} are free now, and about "
                f"{describe_bytes(self.needed()[_HOST])} are needed. {self.advice(_HOST)}"
            )
            raise MemoryError(msg) from error


def genes_per_cell(adata: AnnData, layer: str | None, is_known: NDArray[np.bool_]) -> float:
    """Mean number of known genes of a cell, from a sample spread over the counts."""
    n_rows = min(_SAMPLE_ROWS, adata.n_obs)
    starts = np.linspace(0, adata.n_obs - n_rows, _N_SAMPLES).astype(np.int64)
    rows = np.unique(starts[:, None] + np.arange(n_rows))
    block, _ = peek_counts(adata, layer, rows)
    return float((is_known[block.indices] & (block.data != 0)).sum() / len(rows))


def _largest(layout: SliceLayout) -> Nodes:
    return Nodes(int(np.bincount(layout.subslice).max()), layout.virtual.n_virtual)


def _is_shortage(error: BaseException) -> bool:
    """Whether another library ran out of memory or of threads, which need memory."""
    if type(error) is MemoryError:
        # One with words is ours and says what helps.
        return not error.args
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _SHORTAGES)
