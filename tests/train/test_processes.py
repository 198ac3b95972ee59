from __future__ import annotations

import pytest
import torch

from stofm.train import Processes
from stofm.train.processes import _places_of_environment

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 1)),
        (TORCHRUN, (4, 2)),
        (SLURM, (2, 3)),
        # One task, and a shell in an allocation.
        (SLURM | {"SLURM_NTASKS": "1"}, (1, 1)),
        (SLURM | {"SLURM_JOB_NAME": "bash"}, (1, 1)),
        # torchrun within a SLURM job.
        (SLURM | TORCHRUN, (4, 2)),
    ],
)
def test_processes_of_a_node_and_nodes(monkeypatch, variables, expected):
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _places_of_environment() == expected


def test_one_process_alone():
    processes = Processes.start("cpu")
    assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
    assert processes.device == torch.device("cpu")
    assert processes.gather_rows(is_active=True) is None
    values = torch.arange(3.0)
    assert processes.sum(values) is values
    assert processes.agree("x") == "x"
    assert processes.scaler_state() == {}
    processes.wait()


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device='cuda:99' was asked for"):
        Processes.start("cuda:99")
