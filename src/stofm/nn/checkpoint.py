"""The checkpoint folder: config.json, model.safetensors, vocabulary.tsv, README.md."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stofm.nn.config import StofmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
VOCABULARY = "vocabulary.tsv"
CARD = "README.md"

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
    """
    if isinstance(name, str) and name in EMBEDDED:
        # A folder of that name is meant by "./stofm-mini" or by a Path.
        return Path(str(resources.files("stofm") / "weights" / name))
    if Path(name).is_dir():
        return Path(name)
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
            allow_patterns=[CONFIG, WEIGHTS, VOCABULARY, CARD],
        )
    except Exception as error:
        msg = (
            f"The checkpoint {str(name)!r} is no local folder and could not be had from the hub "
            f"({type(error).__name__}: {error}). Offline, pass a folder or the embedded "
            f"{EMBEDDED[0]!r}."
        )
        raise FileNotFoundError(msg) from error
    return Path(folder)


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
    try:
        entries: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        msg = f"{folder / CONFIG} is damaged ({error}); get the checkpoint again."
        raise ValueError(msg) from error
    vocabulary = str(entries.pop("vocabulary", ""))
    return StofmConfig.from_dict(entries), vocabulary


def write_atomically(folder: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `fill` write a folder beside `folder`, then put it in place.

    A crash leaves either the old folder or the new one, never half of one.

    Raises
    ------
    FileExistsError
        `folder` is there and `overwrite` is false, or it holds something else than a checkpoint.
    """
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        msg = f"{folder} exists and is not empty; pass overwrite=True to replace it."
        raise FileExistsError(msg)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        msg = f"{folder} holds something else than a checkpoint and is not replaced."
        raise FileExistsError(msg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        replace_path(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_path(new: Path, old: Path) -> None:
    """Put a file or folder in the place of another, which comes back if that fails."""
    aside = new.with_name(new.name + "-old")
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        if aside.exists():
            aside.rename(old)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
