from __future__ import annotations

import pytest
import torch

from stofm.train.processes import Processes, _places_of_environment

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
SRUN = SLURM | {"SLURM_STEP_NUM_TASKS": "6"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 1)),
        (TORCHRUN, (4, 2)),
        (SRUN, (2, 3)),
        # One task, and a shell in an allocation.
        (SRUN | {"SLURM_NTASKS": "1"}, (1, 1)),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, (1, 1)),
        (SRUN | {"SLURM_NTASKS": ""}, (1, 1)),
        (SRUN | {"SLURM_NTASKS": "four"}, (1, 1)),
        (SRUN | {"SLURM_NNODES": ""}, (6, 1)),
        # torchrun within a SLURM job.
        (SRUN | TORCHRUN, (4, 2)),
    ],
)
def test_processes_of_a_node_and_nodes(monkeypatch, variables, expected):
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _places_of_environment() == expected


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_job_script_without_srun_is_one_process(monkeypatch, step):
    for name, value in (SLURM | step).items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"SLURM gives this job 6 tasks, .* write `srun` before"):
        processes = Processes.start("cpu")
    assert processes.count == 1


def test_one_process_alone():
    processes = Processes.start("cpu")
    assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
    assert processes.device == torch.device("cpu")
    assert processes.gather_rows(is_active=True) is None
    values = torch.arange(3.0)
    assert processes.sum(values) is values
    assert processes.agree("x") == "x"
    processes.wait()


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device='cuda:99' was requested"):
        Processes.start("cuda:99")
