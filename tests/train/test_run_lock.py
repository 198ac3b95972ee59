from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from stofm.train import run_lock
from stofm.train.run_lock import LOCK, locked

_HOLDER = """
import sys, time
from pathlib import Path
from stofm.train.run_lock import locked
with locked(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(300)
"""


def write(folder, **entries):
    (folder / LOCK).write_text(json.dumps({"host": socket.gethostname(), "key": "x", **entries}))


def test_a_folder_that_another_process_has_is_refused_until_that_is_gone(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "has it\n"
        expected = (
            f"process {holder.pid} on '{socket.gethostname()}' trains into it.*delete .*{LOCK}"
        )
        with pytest.raises(FileExistsError, match=expected), locked(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / LOCK).is_file()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_and_released_after_a_failure(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    write(tmp_path, pid=os.getpid(), started=1.0)
    with locked(tmp_path):
        pass


def test_a_process_of_another_machine_is_there_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT", 0.05)
    monkeypatch.setattr(run_lock, "_SILENCE", 0.3)
    write(tmp_path, pid=1, started=1.0, host="elsewhere")
    ended = threading.Event()
    beating = threading.Thread(target=run_lock._beat, args=(tmp_path / LOCK, ended))
    beating.start()
    with pytest.raises(FileExistsError, match="process 1 on 'elsewhere'"), locked(tmp_path):
        pass
    ended.set()
    beating.join()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "x", "[]", '{"host": "a"}', None])
def test_a_file_that_is_no_lock_is_replaced_soon(tmp_path, monkeypatch, caplog, content):
    monkeypatch.setattr(run_lock, "_BEAT", 0.02)
    if content is None:
        write(tmp_path, pid=os.getpid(), started="now")
    else:
        (tmp_path / LOCK).write_text(content)
    with caplog.at_level("INFO", logger="stofm"), locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"{LOCK} was left by something that does not say who it is: waiting" in caplog.text


def test_of_two_that_find_a_dead_process_one_has_the_folder(tmp_path, monkeypatch):
    write(tmp_path, pid=2**22 + 1, started=1.0)
    sleep = time.sleep

    def other_comes(seconds):
        sleep(seconds)
        write(tmp_path, pid=os.getpid(), started=run_lock._started(os.getpid()))

    monkeypatch.setattr(time, "sleep", other_comes)
    with pytest.raises(FileExistsError, match="is in use"), locked(tmp_path):
        pass
    # It is the other's.
    assert (tmp_path / LOCK).is_file()
