"""The processes that train one model together, over Lightning Fabric."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stofm._messages import warn
from stofm.nn.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from lightning_fabric import Fabric

    from stofm.train.config import Precision

    T = TypeVar("T")

#: All processes must arrive within this time. It applies to DistributedDataParallel too, whose
#: exchanges follow others that wait longer.
_START = timedelta(minutes=3)
#: The first process may tokenise a whole corpus while the others wait for it. If a process ends
#: early, it closes its connections, and the others fail too.
_PATIENCE = timedelta(days=30)
#: Between two exchanges of one step, in which the first process may write a checkpoint.
_WITHIN_STEP = timedelta(minutes=30)


class Processes:
    """The processes that train one model together, seen from one of them.

    Started by ``torchrun`` or SLURM there are several, each with a device of its own; else there
    is one. When one fails, ``torchrun`` ends the others, as ``srun --kill-on-bad-exit=1`` does;
    without these they fail at their next exchange.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric  # launched
        #: Number of this process, from 0, and of all processes.
        self.rank, self.count = fabric.global_rank, fabric.world_size
        #: Whether this process writes what only one may write, and where it computes.
        self.is_first, self.device = fabric.is_global_zero, fabric.device
        #: For waiting, and for exchanges beside DistributedDataParallel's own.
        self._waiting: Any = None
        self._own: Any = None
        if self.count > 1:
            self._waiting = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
            self._own = torch.distributed.new_group(timeout=_WITHIN_STEP)

    @classmethod
    def start(cls, device: str | torch.device = "auto", precision: Precision = "32") -> Processes:
        """Find the other processes, if there are any, and the device of this one.

        A device that does not exist or can't compute in this precision raises ValueError. Weights
        and optimiser are float32 in any precision.
        """
        # Takes more than a second to import, which embedding should not wait for, and adds warning
        # filters.
        with warnings.catch_warnings():
            from lightning_fabric import Fabric
            from lightning_fabric.plugins.environments.lightning import LightningEnvironment
            from lightning_fabric.strategies.ddp import DDPStrategy

        place = choose_device(device)
        if precision == "16-mixed" and place.type != "cuda":
            raise ValueError(
                f"precision='16-mixed' needs a CUDA device, found {place.type!r}; use 'bf16-mixed' "
                "or '32'."
            )
        options: dict[str, Any] = {
            "accelerator": place.type,
            "precision": "32-true" if precision == "32" else precision,
        }
        per_node, n_nodes = _places_of_environment()
        if per_node * n_nodes > 1:
            # No buffer changes, so there is no need to send them with each batch.
            strategy = DDPStrategy(
                find_unused_parameters=True, broadcast_buffers=False, timeout=_START
            )
            fabric = Fabric(devices=per_node, num_nodes=n_nodes, strategy=strategy, **options)
        else:
            devices: Any = [place.index or 0] if place.type == "cuda" else 1
            fabric = Fabric(devices=devices, plugins=[LightningEnvironment()], **options)
        fabric.launch()
        return cls(fabric)

    def wait(self) -> None:
        """Wait until all processes reach this point."""
        if self.count > 1:
            torch.distributed.barrier(group=self._waiting)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values, group=self._own)
        return values

    def agree(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.count == 1:
            return value
        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0, group=self._waiting)
        return shared[0]

    def gather_rows(self, *, is_active: bool) -> Callable[[Tensor], tuple[Tensor, int]] | None:
        """Return a function that collects rows from all processes, with gradients; None for one process.

        It returns the rows of all processes in order, and the index of this process's first row.
        All processes must call it equally often. A process that is not `is_active` gets its own
        rows after those of the others, which don't see them.
        """
        if self.count == 1:
            return None
        from torch.distributed.nn.functional import all_gather

        def gather(rows: Tensor) -> tuple[Tensor, int]:
            own = rows if is_active else rows[:0]
            counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
            counts[self.rank] = len(own)
            n_rows = [int(n) for n in self.sum(counts).tolist()]
            padded = F.pad(own, (0, 0, 0, max(*n_rows, 1) - len(own)))
            # In a group of its own: with DistributedDataParallel's, exchanges of the backward pass
            # could meet in another order in each process.
            parts: tuple[Tensor, ...] = all_gather(padded, group=self._own)
            gathered = torch.cat([part[:n] for part, n in zip(parts, n_rows, strict=True)])
            if not is_active:
                return torch.cat([gathered, rows]), len(gathered)
            return gathered, sum(n_rows[: self.rank])

        return gather


def _places_of_environment() -> tuple[int, int]:
    """Processes per node, and nodes, as started by torchrun or SLURM."""
    if torch.distributed.is_torchelastic_launched():
        total, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return local, total // local
    names = ("SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_NUM_TASKS")
    found = (os.environ.get(name, "") for name in names)
    total, n_nodes, in_step = (int(text) if text.isdecimal() else 1 for text in found)
    # A shell in an allocation has the variables of a step, but is not one.
    if total == 1 or os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}:
        return 1, 1
    if in_step == 1:
        # A job script has the variables of its job, but is a single process.
        warn(
            f"SLURM gives this job {total} tasks, but srun has not started this process: it trains "
            "alone. To train in all of them, write `srun` before the command."
        )
        return 1, 1
    return total // n_nodes, n_nodes
