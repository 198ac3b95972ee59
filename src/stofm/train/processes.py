"""The processes that train one model together, over Lightning Fabric."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stofm.nn.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from typing import TypeVar

    from lightning_fabric import Fabric
    from torch import nn
    from torch.optim import Optimizer

    from stofm.train.config import Precision

    T = TypeVar("T")

#: The first process may tokenise a whole corpus while the others wait for it.
_PATIENCE = timedelta(hours=12)


class Processes:
    """What a process knows of itself and of those that train with it.

    Started by ``torchrun`` or SLURM there are several, each with a device of its own; else there
    is one.

    Parameters
    ----------
    fabric
        Launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    @classmethod
    def start(cls, device: str | torch.device = "auto", precision: Precision = "32") -> Processes:
        """Find the other processes, if there are any, and the device of this one.

        Parameters
        ----------
        device
            As in :func:`stofm.nn.choose_device`.
        precision
            Of the computation; weights and optimiser are float32 always.

        Raises
        ------
        ValueError
            The device is not there, or can't compute in this precision.
        """
        # Takes more than a second to import, which who only embeds should not wait for.
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy

        place = choose_device(device)
        if precision == "16-mixed" and place.type != "cuda":
            msg = (
                f"precision='16-mixed' needs a CUDA device, found {place.type!r}; use 'bf16-mixed' "
                "or '32'."
            )
            raise ValueError(msg)
        per_node, n_nodes = _places_of_environment()
        if per_node * n_nodes > 1:
            strategy = DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE)
            fabric = Fabric(
                accelerator=place.type,
                devices=per_node,
                num_nodes=n_nodes,
                strategy=strategy,
                precision=_fabric_name(precision),
            )
        else:
            devices: Any = 1 if place.type != "cuda" else [place.index or 0]
            fabric = Fabric(
                accelerator=place.type,
                devices=devices,
                precision=_fabric_name(precision),
                plugins=[LightningEnvironment()],
            )
        fabric.launch()
        return cls(fabric)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.fabric.global_rank

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.fabric.is_global_zero

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.fabric.device

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.fabric.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.count == 1:
            return values
        return cast("Tensor", self.fabric.all_reduce(values, reduce_op="sum"))

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        return self.fabric.broadcast(value) if self.count > 1 else value

    def set_up(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Place a module and its optimiser, and have gradients averaged over the processes."""
        return cast("tuple[Any, Any]", self.fabric.setup(module, optimizer))

    def scaler_state(self) -> dict[str, float]:
        """Scale of the gradients in precision ``"16-mixed"``; empty in others."""
        return dict(self.fabric.strategy.precision.state_dict())

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Put back what :meth:`scaler_state` gave."""
        if state:
            self.fabric.strategy.precision.load_state_dict(dict(state))

    def without_sync(self, module: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        """Leave gradients unaveraged, until a backward pass outside of this context."""
        enabled = enabled and self.count > 1
        return self.fabric.no_backward_sync(module, enabled=enabled)

    def gather_rows(self, *, is_active: bool) -> RowGatherer | None:
        """Return what collects rows from all processes with gradients; None for one process.

        Parameters
        ----------
        is_active
            Whether this process's rows count; the others don't see them if not.
        """
        return RowGatherer(self, is_active=is_active) if self.count > 1 else None


class RowGatherer:
    """Puts together the rows of all processes; gradients find their way back.

    Parameters
    ----------
    processes
        Those that call it, all the same number of times.
    is_active
        False for a process whose rows are none of the batch: it gets those of the others with
        its own behind them.
    """

    def __init__(self, processes: Processes, *, is_active: bool) -> None:
        self._processes = processes
        self._is_active = is_active

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        """Gather.

        Parameters
        ----------
        rows
            (n, d) of this process; n may differ between processes.

        Returns
        -------
        The rows of all processes in their order, and the place of this process's first row.
        """
        own = rows if self._is_active else rows[:0]
        counts = torch.zeros(self._processes.count, dtype=torch.int64, device=rows.device)
        counts[self._processes.rank] = len(own)
        n_rows = [int(n) for n in self._processes.sum(counts).tolist()]
        gathered: Tensor = _GatherRows.apply(own, n_rows, self._processes.rank)  # type: ignore[no-untyped-call]
        if not self._is_active:
            return torch.cat([gathered, rows]), len(gathered)
        return gathered, sum(n_rows[: self._processes.rank])


class _GatherRows(torch.autograd.Function):
    """All-gather of different numbers of rows; backward sums each row's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n_rows: list[int], rank: int) -> Tensor:
        ctx.start, ctx.length = sum(n_rows[:rank]), n_rows[rank]
        padded = rows.new_zeros((max(*n_rows, 1), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in n_rows]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        torch.distributed.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.length], None, None


def _fabric_name(precision: Precision) -> Any:
    return "32-true" if precision == "32" else precision


def _places_of_environment() -> tuple[int, int]:
    """Processes of a node and nodes, as torchrun or SLURM has started them."""
    if torch.distributed.is_torchelastic_launched():
        total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return local, total // local
    total = int(os.environ.get("SLURM_NTASKS", "1"))
    if total > 1 and "SLURM_PROCID" in os.environ and not _is_interactive_slurm():
        n_nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return total // n_nodes, n_nodes
    return 1, 1


def _is_interactive_slurm() -> bool:
    # A shell in an allocation has the variables of a step and is no step.
    return os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}
