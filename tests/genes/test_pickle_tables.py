from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from stofm.genes.pickle_tables import UnsafeTableError, read_pickle_table


def write(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_and_numbers(tmp_path: Path, protocol: int) -> None:
    table = {
        "ENSG1": 1.5,
        "ENSG2": 7,
        "<pad>": 0,
        "A": "ENSG1",
        "f8": np.float64(1 / 3),
        "f4": np.float32(0.25),
        "i8": np.int64(-(2**40)),
        "big": np.array(2.5, dtype=">f8")[()],
    }
    found = read_pickle_table(write(tmp_path / "table.pkl", table, protocol))
    assert found == table
    assert {type(value) for value in found.values()} == {float, int, str}


class Bomb:
    """Leaves a mark when it is unpickled as usual."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "table.pkl", {"ENSG1": 1.0, "ENSG2": Bomb(mark)})
    with pytest.raises(
        UnsafeTableError, match=r"table.pkl is refused. It asks for \S+ *\S*\. Only"
    ):
        read_pickle_table(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the file does what it was made for
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(print), "asks for builtins.print"),
        (b"cposix\nsystem\n(S'true'\ntR.", "asks for posix.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "asks for builtins.eval"),
        (pickle.dumps({"a": OrderedDict()}), "asks for collections.OrderedDict"),
        (pickle.dumps({"a": np.arange(3)}), "asks for numpy"),
        (pickle.dumps({"a": np.array("text")[()]}), "refused"),
        (pickle.dumps({"a": np.datetime64("2020-01-01")}), "unknown type 'M8'"),
        (b"\x80\x04Pid\n.", "asks for an outside object"),
        (b"cnumpy\ndtype\n.", "no dictionary of names"),
        (b"cnumpy.core.multiarray\nscalar\n(I1\nI2\ntR.", "number in an unknown form"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafeTableError, match=message):
        read_pickle_table(path)


@pytest.mark.parametrize(
    "value", [["a"], {1: 2.0}, {"a": None}, {"a": [1]}, {"a": {"b": 1}}, "text"]
)
def test_other_content_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsafeTableError, match="no dictionary of names to names or numbers"):
        read_pickle_table(write(tmp_path / "table.pkl", value))


def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.pkl"
    for content in (b"", b"no pickle", pickle.dumps({"a": 1.5})[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as a pickle"):
            read_pickle_table(path)
    monkeypatch.setattr("stofm.genes.pickle_tables._MAX_BYTES", 4)
    with pytest.raises(ValueError, match="more than a table of genes can have"):
        read_pickle_table(write(path, {"a": 1.5}))


def test_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "table.pkl", {"a": 1.5})
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_pickle_table(path, sha256=checksum) == {"a": 1.5}
    with pytest.raises(ValueError, match=f"its sha256 is {checksum}, expected 00. Download"):
        read_pickle_table(path, sha256="00")
