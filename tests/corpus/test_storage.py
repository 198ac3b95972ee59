from __future__ import annotations

import os

import numpy as np
import pytest

from stofm.corpus.storage import open_array

resource = pytest.importorskip("resource", reason="this system has no limit of open files")


@pytest.fixture
def few_files():
    """Let this process open about 16 more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    soft = lowest_free + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    yield soft
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "numbers.npy", np.arange(5, dtype=np.int32))
    return tmp_path / "numbers.npy"


def test_array_is_a_read_only_map(path):
    array = open_array(path)
    assert isinstance(array.base, np.memmap)
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, np.arange(5))


def test_more_arrays_than_open_files_are_allowed(path, few_files):
    arrays = [open_array(path) for _ in range(few_files + 50)]
    assert all(array[4] == 4 for array in arrays)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard))


def test_missing_file_is_reported_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        open_array(tmp_path / "none.npy")
