"""Of an old and a new file or folder one is there at every moment."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from stofm._files import Kind, local, put_in_place, read_table, take_back, tidy

if TYPE_CHECKING:
    from collections.abc import Callable

#: Calls of the system that change something.
CALLS = ("rename", "replace", "mkdir", "unlink", "rmdir", "open", "fsync")


class Killed(BaseException):
    """As if the process were no more."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the k-th call of the system, and all that follow, fail: before or after they are done."""
    real = {name: getattr(os, name) for name in CALLS}

    def arrange(k: int) -> None:
        calls = iter(range(10_000))

        def wrap(name: str) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                number = next(calls)
                if number > k:
                    raise Killed
                done = real[name](*args, **options)
                if number == k:
                    raise Killed
                return done

            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, wrap(name))

    return arrange


def write_folder(text: str) -> Callable[[Path], None]:
    def fill(part: Path) -> None:
        part.mkdir()
        (part / "a").write_text(text)
        (part / "inner").mkdir()
        (part / "inner" / "b").write_text(text)

    return fill


def write_file(text: str) -> Callable[[Path], int]:
    return lambda part: part.write_text(text)


def content(path: Path) -> set[str]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.read_text() for file in files if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_killed_at_any_call_old_or_new_is_found(write, tmp_path, kill_at, monkeypatch):
    place = tmp_path / "thing"
    found, k = set(), 0
    while True:
        put_in_place(place, write("old"))
        assert names(tmp_path) == ["thing"], "leftovers of the killed write are still there"
        kill_at(k)
        try:
            put_in_place(place, write("new"))
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        take_back(place)
        [text] = content(place)
        found.add(text)
        k += 1
    assert found == {"old", "new"}
    assert k > 4


@pytest.mark.parametrize("call", ["rename", "replace"])
def test_interrupted_once_nothing_is_left_behind(call, tmp_path, monkeypatch):
    place, real = tmp_path / "thing", getattr(os, call)
    put_in_place(place, write_folder("old"))

    def interrupt(*args: object) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(place, write_folder("new"))
    monkeypatch.undo()
    assert len(content(place)) == 1
    # What the interrupt kept from being deleted, the next write deletes.
    put_in_place(place, write_folder("old"))
    assert names(tmp_path) == ["thing"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("k", [0, 1])
def test_a_killed_process_leaves_old_or_new(k, tmp_path):
    place = tmp_path / "thing"
    put_in_place(place, write_folder("old"))
    script = f"""
import os, signal, sys
from pathlib import Path
from stofm._files import put_in_place
calls = iter(range(100))
def kill(event, _):
    if event == "os.rename" and next(calls) == {k}:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
def fill(part):
    part.mkdir()
    (part / "a").write_text("new")
put_in_place(Path({str(place)!r}), fill)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    tidy(tmp_path)
    assert names(tmp_path) == ["thing"]
    assert content(place) == {"old"}


def test_what_others_are_writing_stays(tmp_path):
    def fill(part: Path) -> None:
        put_in_place(tmp_path / "thing", write_file("other"))
        part.write_text("mine")

    put_in_place(tmp_path / "thing", fill)
    assert content(tmp_path / "thing") == {"mine"}


def test_a_link_stays_and_leads_to_the_new(tmp_path):
    put_in_place(tmp_path / "v1", write_folder("old"))
    (tmp_path / "current").symlink_to("v1")
    put_in_place(tmp_path / "current", write_folder("new"))
    assert (tmp_path / "current").is_symlink()
    assert content(tmp_path / "v1") == {"new"}
    assert names(tmp_path) == ["current", "v1"]


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    for here, name in (("here", "."), ("here/deeper", "..")):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(OSError, match=r"is the current folder, .* name a folder in it"):
            put_in_place(Path(name), write_folder("new"))
    put_in_place(Path("in-it"), write_folder("new"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        OSError("Can't write data (file write failed: errno = 28, error message = '...')"),
    ],
)
def test_a_full_disk_is_one_error_and_leaves_nothing(error, tmp_path):
    place = tmp_path / "thing"
    put_in_place(place, write_file("old"))

    def fail(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match="thing can't be written: No space left"):
        put_in_place(place, fail)
    assert names(tmp_path) == ["thing"]
    assert content(place) == {"old"}


BOXES = Kind("a box", lambda path: (path / "a").is_file(), lambda name: name in ("a", "inner/b"))


def test_only_the_same_kind_is_replaced(tmp_path):
    box = tmp_path / "box"
    BOXES.refuse_other(box, overwrite=False)
    box.mkdir()
    BOXES.refuse_other(box, overwrite=False)
    (box / "thesis.docx").write_text("years of work")
    with pytest.raises(FileExistsError, match="something other than a box and is not replaced"):
        BOXES.refuse_other(box, overwrite=True)
    (box / "a").write_text("")
    with pytest.raises(FileExistsError, match=r"more than a box, for example \['thesis.docx'\]"):
        BOXES.refuse_other(box, overwrite=True)
    (box / "thesis.docx").unlink()
    (box / ".DS_Store").write_text("")
    BOXES.refuse_other(box, overwrite=True)
    with pytest.raises(FileExistsError, match="exists; pass overwrite=True"):
        BOXES.refuse_other(box, overwrite=False)


def test_a_place_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(NotADirectoryError, match="results is a file"):
        BOXES.refuse_other(tmp_path / "results" / "deep" / "box", overwrite=False)


@pytest.mark.parametrize(("write", "mode"), [(write_file, 0o640), (write_folder, 0o750)])
def test_permissions_stay(write, mode, tmp_path):
    put_in_place(tmp_path / "thing", write("old"))
    (tmp_path / "thing").chmod(mode)
    put_in_place(tmp_path / "thing", write("new"))
    assert (tmp_path / "thing").stat().st_mode & 0o777 == mode
    assert content(tmp_path / "thing") == {"new"}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put_in_place(Path("~/thing"), write_file("new"))
    assert names(tmp_path) == ["thing"]
    assert local("~/thing") == tmp_path / "thing"
    assert local("~draft.h5ad") == Path("~draft.h5ad")


def test_what_comes_back_is_told(tmp_path, caplog):
    (tmp_path / ".thing.stofm-old").write_text("old")
    assert take_back(tmp_path / "thing").read_text() == "old"
    assert "thing was not there, but an older one" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_numbers_come_back_to_the_last_bit(tmp_path, rng):
    numbers = 10.0 ** rng.uniform(-300, 300, 1000)
    written = pd.DataFrame({"step": np.arange(1000), "loss": numbers, "split": "train"})
    written.to_csv(tmp_path / "history.csv", index=False)
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "history.csv"), written, check_exact=True, check_dtype=False
    )
