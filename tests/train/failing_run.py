"""Two processes of which one fails somewhere, for test_failures.py."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from stofm.train.processes import Processes


def prepare(processes: Processes) -> None:
    """The first process prepares, and the others wait for it."""
    if processes.is_first:
        time.sleep(0.5)
        msg = "the table is no table"
        raise ValueError(msg)
    processes.agree(None)


def step(processes: Processes) -> None:
    """The second fails in a step, and the first waits for its share."""
    processes.agree("a")
    if not processes.is_first:
        msg = "the loss is not finite"
        raise FloatingPointError(msg)
    processes.sum(torch.ones(3))


def killed(processes: Processes) -> None:
    """The second is killed while the first waits for it."""
    if not processes.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.wait()


def end(processes: Processes) -> None:
    """Nothing fails."""
    processes.wait()


def in_processes(case: str, out: Path) -> None:
    """Fork the two processes of a case, as torchrun would start them, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    children = [os.fork() or run(case, out, rank, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    found = {"codes": codes, "seconds": time.monotonic() - started}
    (out / f"{case}.json").write_text(json.dumps(found))


def run(case: str, out: Path, rank: int, port: int) -> NoReturn:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    with (out / f"{case}{rank}.txt").open("w") as sys.stderr:
        status = 1
        try:
            globals()[case](Processes.start("cpu"))
            status = 0
        except Exception as error:  # noqa: BLE001 the test looks at it
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    # Once, before the processes are forked.
    importlib.import_module("lightning_fabric")
    for one in sys.argv[2:]:
        in_processes(one, Path(sys.argv[1]))
