"""The processes that train one model together, over Lightning Fabric."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stofm._messages import warn
from stofm.nn.device import choose_device
from stofm.train.watch import Watch, accept_all, connect, open_server

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self, TypeVar

    from lightning_fabric import Fabric
    from torch import nn
    from torch.optim import Optimizer

    from stofm.train.config import Precision

    T = TypeVar("T")

#: All processes must have come within this time. It holds for DistributedDataParallel too, whose
#: exchanges follow on others that wait longer.
_START = timedelta(minutes=3)
#: The first process may tokenise a whole corpus while the others wait for it; that it has failed
#: they learn otherwise (:mod:`stofm.train.watch`).
_PATIENCE = timedelta(days=30)


class Processes:
    """What a process knows of itself and of those that train with it.

    Started by ``torchrun`` or SLURM there are several, each with a device of its own; else there
    is one. As a context: a failure within it ends all of them, with its message.

    Parameters
    ----------
    fabric
        Launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._watch: Watch | None = None
        #: For waiting, and for what runs beside DistributedDataParallel's own exchanges.
        self._waiting: Any = None
        self._own: Any = None
        if self.count > 1:
            self._waiting = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
            self._own = torch.distributed.new_group(timeout=_PATIENCE)

    def __enter__(self) -> Self:
        if self.count > 1:
            self._watch = Watch(self.rank, self._connect())
        return self

    def _connect(self) -> dict[int, socket.socket]:
        if self.is_first:
            server, place = open_server()
            self.agree(place)
            return accept_all(server, self.count - 1)
        names, port = self.agree(([""], 0))
        return connect(self.rank, names, port)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        watch = self._watch
        if watch is None:
            return
        if error is None:
            watch.leave()
        elif watch.failed_elsewhere(error):
            watch.leave(watch.reason)
            msg = f"{watch.reason} All other processes end with it; its own output says more."
            raise RuntimeError(msg) from error
        else:
            where = f"Process {self.rank} of {self.count} ({socket.gethostname()}, {os.getpid()})"
            watch.leave(f"{where} failed: {type(error).__name__}: {error}")

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
        RuntimeError
            Not all processes have come.
        """
        # Takes more than a second to import, which who only embeds should not wait for, and adds
        # to the filters of warnings.
        with warnings.catch_warnings():
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
            # No buffer changes; to send them with each batch would be for nothing.
            strategy = DDPStrategy(
                find_unused_parameters=True, broadcast_buffers=False, timeout=_START
            )
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
        _launch(fabric, per_node * n_nodes)
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
        if self.count > 1:
            torch.distributed.barrier(group=self._waiting)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values, group=self._own)
        return values

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0, group=self._waiting)
        return shared[0]

    def set_up(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Place a module and its optimiser, and have gradients averaged over the processes."""
        self.wait()
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
        return RowGatherer(self, self._own, is_active=is_active) if self.count > 1 else None


class RowGatherer:
    """Puts together the rows of all processes; gradients find their way back.

    All processes call it the same number of times, in a `group` of its own: with that of
    DistributedDataParallel, its exchanges could meet others of the backward pass in another order
    in each process. One that is not active, as its rows are none of the batch, gets those of the
    others with its own behind them.
    """

    def __init__(self, processes: Processes, group: Any, *, is_active: bool) -> None:
        self._processes = processes
        self._group = group
        self._is_active = is_active

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        """Give the rows of all processes in their order, and the place of this one's first row."""
        own = rows if self._is_active else rows[:0]
        counts = torch.zeros(self._processes.count, dtype=torch.int64, device=rows.device)
        counts[self._processes.rank] = len(own)
        n_rows = [int(n) for n in self._processes.sum(counts).tolist()]
        gathered: Tensor = _GatherRows.apply(own, n_rows, self._processes.rank, self._group)  # type: ignore[no-untyped-call]
        if not self._is_active:
            return torch.cat([gathered, rows]), len(gathered)
        return gathered, sum(n_rows[: self._processes.rank])


class _GatherRows(torch.autograd.Function):
    """All-gather of different numbers of rows; backward sums each row's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n_rows: list[int], rank: int, group: Any) -> Tensor:
        ctx.start, ctx.length, ctx.group = sum(n_rows[:rank]), n_rows[rank], group
        padded = rows.new_zeros((max(*n_rows, 1), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in n_rows]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.length], None, None, None


def _launch(fabric: Fabric, n_expected: int) -> None:
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        minutes = _START.total_seconds() / 60
        msg = (
            f"{n_expected} processes should train together, and not all of them have come within "
            f"{minutes:g} minutes ({error}). See what the others say; each must call the same "
            "function. To train with one process, start it without torchrun or srun."
        )
        raise RuntimeError(msg) from error


def _fabric_name(precision: Precision) -> Any:
    return "32-true" if precision == "32" else precision


def _places_of_environment() -> tuple[int, int]:
    """Processes of a node and nodes, as torchrun or SLURM has started them."""
    if torch.distributed.is_torchelastic_launched():
        total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return local, total // local
    total = _number("SLURM_NTASKS")
    if total == 1 or _is_interactive_slurm():
        return 1, 1
    if _number("SLURM_STEP_NUM_TASKS") == 1:
        # A job script has the variables of its job, and is one process all the same.
        warn(
            f"SLURM gives this job {total} tasks, but srun has not started this process: it trains "
            "alone. To train in all of them, write `srun` before the command."
        )
        return 1, 1
    n_nodes = _number("SLURM_NNODES")
    return total // n_nodes, n_nodes


def _number(variable: str) -> int:
    """A count in the environment; 1 where none is stated, as outside of SLURM."""
    text = os.environ.get(variable, "")
    return max(int(text), 1) if text.isdecimal() else 1


def _is_interactive_slurm() -> bool:
    # A shell in an allocation has the variables of a step and is no step.
    return os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}
