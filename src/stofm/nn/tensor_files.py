"""Tensors on disk, with a digest of what was written."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

_DIGEST = "stofm_digest"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, Any] | None = None
) -> None:
    """Write tensors by name to a ``.safetensors`` file.

    Parameters
    ----------
    path
        The file.
    tensors
        The tensors.
    beside
        Content of files that belong to them, by name of the file, as JSON can hold it; for
        :func:`require_beside`.
    """
    from safetensors.torch import save_file

    stored = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    # One entry: several are written in any order, and the same content must give the same bytes.
    digests = [_digest(stored), *(f"{k}={_digest_of(v)}" for k, v in (beside or {}).items())]
    save_file(stored, path, metadata={_DIGEST: " ".join(digests)})


def require_beside(path: Path, beside: Mapping[str, Any]) -> None:
    """Refuse files that are not those that tensors were written with, if that was noted.

    Parameters
    ----------
    path
        The file with the tensors.
    beside
        As for :func:`write_tensors`, as found now.

    Raises
    ------
    ValueError
        One has changed, is missing or has come.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        _, *noted = (file.metadata() or {}).get(_DIGEST, "").split(" ")
    found = [f"{name}={_digest_of(content)}" for name, content in beside.items()]
    if noted and (changed := sorted(set(noted) ^ set(found))):
        name = changed[0].partition("=")[0]
        change = "its content has changed since it was written"
        raise ValueError(_damaged(path.with_name(name), change))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a file's tensors, without the tensors.

    Raises
    ------
    ValueError
        The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_damaged(path, str(error))) from error


def read_tensors(path: Path, *, may_be_nan: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Parameters
    ----------
    path
        The file.
    may_be_nan
        Names of tensors that may hold NaN.

    Raises
    ------
    ValueError
        The file is damaged: it can't be read, its content is not what was written, or a number is
        NaN or infinite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get(_DIGEST, "").split(" ")[0]
    except SafetensorError as error:
        raise ValueError(_damaged(path, str(error))) from error
    if written and written != _digest(tensors):
        raise ValueError(_damaged(path, "its content has changed since it was written"))
    require_finite(path, {n: v for n, v in tensors.items() if n not in may_be_nan})
    return tensors


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinite numbers.

    Raises
    ------
    ValueError
        There are some.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and (bad := int((~torch.isfinite(value)).sum())):
            found = f"{bad} of {value.numel()} numbers of {name!r} are NaN or infinite"
            raise ValueError(_damaged(path, found))


def _damaged(path: Path, found: str) -> str:
    return f"{path} is damaged ({found}); get or write the file again."


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
