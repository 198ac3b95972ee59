"""The checkpoint folder: config.json, model.safetensors, vocabulary.tsv, README.md."""

from __future__ import annotations

import contextlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from stofm._config import read_json
from stofm._files import Kind, local, put_in_place, take_back
from stofm.nn.config import StofmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
VOCABULARY = "vocabulary.tsv"
CARD = "README.md"
#: Folder of what a run needs beside the model.
TRAINING = "training"
FILES = frozenset({CONFIG, WEIGHTS, VOCABULARY, CARD})

#: Models that are embedded in the package.
EMBEDDED = ("stofm-mini",)


def find_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Find a checkpoint folder: a local one, an embedded model, or one on the hub.

    Parameters
    ----------
    name
        Path of a folder, name of an embedded model, or hub id (``owner/name``).
    revision, cache_dir, local_files_only, token
        As in :func:`huggingface_hub.snapshot_download`; for hub ids only.

    Raises
    ------
    FileNotFoundError
        There is no such folder, and `name` can't be found on the hub.
    ValueError
        A `revision` of a folder or an embedded model is asked for.
    """
    if found := _at_hand(name):
        if revision is not None:
            msg = (
                f"`revision` is for models on the hub, and {str(name)!r} is on this machine: leave "
                "it out."
            )
            raise ValueError(msg)
        return found
    if not _looks_like_hub_id(str(name)):
        msg = (
            f"There is no checkpoint {str(name)!r}: no such folder, none of the embedded models "
            f"{list(EMBEDDED)}, and no hub id of the form 'owner/name'."
        )
        raise FileNotFoundError(msg)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            str(name),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=sorted(FILES),
        )
    except Exception as error:
        msg = (
            f"The checkpoint {str(name)!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}: {error}). Offline, pass a folder or the embedded "
            f"{EMBEDDED[0]!r}."
        )
        raise FileNotFoundError(msg) from error
    return Path(folder)


def _at_hand(name: str | Path) -> Path | None:
    if isinstance(name, str) and name in EMBEDDED:
        # A folder of that name is meant by "./stofm-mini" or by a Path.
        return Path(str(resources.files("stofm") / "weights" / name))
    return local(name) if take_back(Path(name)).is_dir() else None


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def read_config(folder: Path) -> tuple[StofmConfig, str]:
    """Read a checkpoint's config and the fingerprint of the vocabulary that it was made with.

    Raises
    ------
    FileNotFoundError
        A file of the checkpoint is missing.
    ValueError
        The config is damaged, or comes from a newer version of stofm.
    """
    missing = [n for n in (CONFIG, WEIGHTS, VOCABULARY) if not (folder / n).is_file()]
    if missing:
        hint = ""
        if (folder / "cell_encoder").is_dir():
            hint = " It has the layout of SToFM's published weights: use Stofm.from_reference."
        msg = f"{folder} is no stofm checkpoint: {missing} missing.{hint}"
        raise FileNotFoundError(msg)
    entries = read_json(folder / CONFIG, "get the checkpoint again")
    vocabulary = str(entries.pop("vocabulary", ""))
    return StofmConfig.from_dict(entries, str(folder / CONFIG)), vocabulary


def _is_checkpoint(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        entries = read_json(folder / CONFIG, "")
        own = {"format_version", "cell_encoder", "se2_transformer"}
        return own <= set(entries) and (folder / WEIGHTS).is_file()
    return False


#: What :meth:`stofm.Stofm.save_pretrained` writes, and what a run writes beside it.
CHECKPOINT = Kind("a checkpoint of a model", _is_checkpoint, FILES.__contains__)
RUN_CHECKPOINT = Kind(
    "a checkpoint of a run",
    lambda folder: _is_checkpoint(folder) and (folder / TRAINING).is_dir(),
    lambda name: name in FILES or name.startswith(f"{TRAINING}/"),
)


def write_atomically(
    folder: Path, fill: Callable[[Path], None], *, overwrite: bool, kind: Kind = CHECKPOINT
) -> None:
    """Let `fill` write a folder beside `folder`, then put it in place.

    A crash leaves either the old folder or the new one, never half of one.

    Parameters
    ----------
    folder
        The folder.
    fill
        Gets an empty folder.
    overwrite
        Replace one that is already there.
    kind
        What may be replaced.

    Raises
    ------
    FileExistsError
        `folder` is there and `overwrite` is false, or it holds something else or more.
    OSError
        The disk is full, or can't be written to.
    """
    kind.refuse_other(folder, overwrite=overwrite)

    def make(place: Path) -> None:
        place.mkdir()
        fill(place)

    put_in_place(folder, make)
