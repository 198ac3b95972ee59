"""A failure in one of several processes ends all of them, with its message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("failing_run.py")
CASES = ("prepare", "step", "compute", "killed", "both", "end")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its processes")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Exit codes, and what each process said last, of all cases."""
    out = tmp_path_factory.mktemp("ends")
    command = [sys.executable, str(SCRIPT), str(out), *CASES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for case in CASES:
        end = json.loads((out / f"{case}.json").read_text())
        assert end["seconds"] < 60
        said = [(out / f"{case}{k}.txt").read_text().splitlines() for k in range(2)]
        found[case] = end["codes"], [lines[-1] if lines else "" for lines in said]
    return found


@pytest.mark.parametrize(
    ("case", "failing", "message"),
    [
        ("prepare", 0, "ValueError: the table is no table"),
        ("step", 1, "FloatingPointError: the loss is not finite"),
        ("compute", 1, "KeyError: 'no such slice'"),
    ],
)
def test_a_failure_ends_the_other_process_with_its_message(ends, case, failing, message):
    codes, said = ends[case]
    assert codes == [1, 1]
    assert said[failing] == message
    other = said[1 - failing]
    assert other.startswith(f"stofm: Process {failing} of 2 (")
    assert f"failed: {message} This process ends with it." in other


def test_a_process_that_is_killed_ends_the_other_even_where_no_signal_reaches(ends):
    codes, said = ends["killed"]
    assert codes == [1, -signal.SIGKILL]
    assert said[0].startswith("stofm: Process 1 ended without a message: it was killed")


def test_processes_that_find_the_same_fault_say_it_themselves(ends):
    assert ends["both"] == ([1, 1], ["FloatingPointError: all find it"] * 2)


def test_processes_that_end_in_order_say_nothing(ends):
    assert ends["end"][0] == [0, 0]
    assert not any("stofm" in line for line in ends["end"][1])
