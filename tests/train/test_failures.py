"""A failure in one of several processes ends all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("failing_run.py")
CASES = ("prepare", "step", "killed", "end")

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
    ],
)
def test_a_failure_ends_the_other_process_at_its_next_exchange(ends, case, failing, message):
    codes, said = ends[case]
    assert codes == [1, 1]
    assert said[failing] == message
    assert said[1 - failing]


def test_a_process_that_is_killed_ends_the_other(ends):
    assert ends["killed"][0] == [1, -signal.SIGKILL]


def test_processes_that_end_in_order_say_nothing(ends):
    assert ends["end"] == ([0, 0], ["", ""])
