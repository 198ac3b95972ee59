"""The files of a saved head, and what they are checked for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._config import read_json
from stofm._files import Kind, reading
from stofm._files import read_table as read_plain_table
from stofm.nn.checkpoint import CONFIG, load_exactly
from stofm.nn.checkpoint import FILES as CHECKPOINT_FILES
from stofm.nn.device import seeded
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd
    import torch

WEIGHTS = "head.safetensors"
HISTORY = "history.tsv"
VALIDATION = "validation_scores.tsv"
#: Older heads may have it; it is no longer written.
TEST = "test_scores.tsv"
MODEL = "model"


def plain(value: Any) -> Any:
    """Numbers of numpy, which options may be, as those of Python."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    msg = f"Object of type {type(value).__name__} is not JSON serializable"
    raise TypeError(msg)


def kind_of(task: str) -> Kind:
    """What a head may replace: one of the same task."""

    def is_one(folder: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            config = read_json(folder / CONFIG, "")
            return config.get("task") == task and "networks" in config
        return False

    files = {CONFIG, WEIGHTS, HISTORY, VALIDATION, TEST}
    files |= {f"{MODEL}/{name}" for name in CHECKPOINT_FILES}
    return Kind(f"a head for {task}", is_one, files.__contains__)


def read_config(folder: Path, task: str) -> dict[str, Any]:
    """Read config.json of a head of a task; refuse other folders, and one that lacks a file."""
    parts = (CONFIG, WEIGHTS, VALIDATION, HISTORY)
    missing = [name for name in parts if not (folder / name).is_file()]
    config = {} if CONFIG in missing else read_json(folder / CONFIG, "save the head again")
    found = config.get("task")
    if config and found != task:
        what = f"a head for {found}" if found else "no head"
        msg = f"{folder} holds {what}, not one for {task}."
        raise ValueError(msg)
    if missing:
        msg = f"{folder} is no folder of a head: {missing} missing."
        raise FileNotFoundError(msg)
    return config


def beside_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of weights keeps a digest of."""
    tables = [p for name in (VALIDATION, HISTORY, TEST) if (p := folder / name).is_file()]
    return {CONFIG: config} | {p.name: p.read_text("utf-8").splitlines() for p in tables}


def read_network(
    config: HeadConfig, tensors: Mapping[str, torch.Tensor], number: int
) -> PredictionHead:
    """Take one of the networks out of the tensors of a head."""
    prefix = f"{number}."
    state = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    what = f"network {number} in {WEIGHTS}"
    with seeded(0):
        network = PredictionHead(config)
    load_exactly(network, state, what)
    return network.eval()


def read_table(path: Path) -> pd.DataFrame:
    """Read scores or losses."""
    with reading(path, "table"):
        return read_plain_table(path, sep="\t", index_col=0)
