"""The checkpoint folder: config.json, model.safetensors, vocabulary.tsv, README.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stofm._config import read_json
from stofm._files import Kind, local, put_in_place, take_back
from stofm.nn.config import StofmConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor


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
    embedded: tuple[str, ...] = EMBEDDED,
    files: Collection[str] = FILES,
    **options: Any,
) -> Path:
    """Find a checkpoint folder: an built-in model (by name), a local one, or one on the hub.

    `files` are downloaded. Options are those of :func:`huggingface_hub.snapshot_download`, for hub ids (``owner/name``) only.
    """
    folder = None
    if isinstance(name, str) and name in embedded:
        # A folder of that name is meant by "./stofm-mini" or by a Path.
        folder = Path(str(resources.files("stofm") / "weights" / name))
    elif take_back(Path(name)).is_dir():
        folder = local(name)
    if folder is not None and revision is not None:
        raise ValueError(f"`revision` is for models on the hub; {str(name)!r} is on this machine.")
    if folder is not None:
        return folder
    if not re.fullmatch(r"[^./~][^/]*/[^/]+", str(name)):
        raise FileNotFoundError(
            f"There is no checkpoint {str(name)!r}: no such folder, none of the built-in models "
            f"{list(embedded)}, and no hub id of the form 'owner/name'."
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            str(name), revision=revision, allow_patterns=sorted(files), **options
        )
    except Exception as error:
        raise FileNotFoundError(
            f"The checkpoint {str(name)!r} is not a local folder and could not be downloaded "
            f"({type(error).__name__}: {error}). Offline, pass a folder or the embedded "
            f"{embedded[0]!r}."
        ) from error
    return Path(found)


def read_config(folder: Path) -> tuple[StofmConfig, str]:
    """Read a checkpoint's config and the fingerprint of the vocabulary that it was made with."""
    missing = [n for n in (CONFIG, WEIGHTS, VOCABULARY) if not (folder / n).is_file()]
    if missing:
        hint = ""
        if (folder / "cell_encoder").is_dir():
            hint = " It has the layout of SToFM's published weights: use Stofm.from_reference."
        raise FileNotFoundError(f"{folder} is not a stofm checkpoint: {missing} missing.{hint}")
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


_DIGEST = "stofm_digest"
#: Number of letters quoted from torch's message about weights that do not fit.
_LONGEST = 500


def write_atomically(
    folder: Path, fill: Callable[[Path], None], *, overwrite: bool, kind: Kind = CHECKPOINT
) -> None:
    """Let `fill` write an empty folder beside `folder`, then put it in place.

    A crash leaves either the old folder or the new one, never half of one. An existing folder is
    replaced only if `overwrite` is true and it is of the same kind.
    """
    kind.refuse_other(folder, overwrite=overwrite)

    def make(place: Path) -> None:
        place.mkdir()
        fill(place)

    put_in_place(folder, make)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, Any] | None = None
) -> None:
    """Write tensors by name to a ``.safetensors`` file.

    `beside` is the content of the files that belong to them, by file name, as JSON can hold it;
    :func:`require_beside` checks it.
    """
    from safetensors.torch import save_file

    stored = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    # A single entry, because several are written in any order and the same content must give the
    # same bytes.
    digests = [_digest(stored), *(f"{k}={_digest_of(v)}" for k, v in (beside or {}).items())]
    save_file(stored, path, metadata={_DIGEST: " ".join(digests)})


def require_beside(path: Path, beside: Mapping[str, Any]) -> None:
    """Refuse files that have changed since the tensors beside them were written."""
    with _opened(path) as file:
        _, *noted = _noted(file)
    found = [f"{name}={_digest_of(content)}" for name, content in beside.items()]
    if noted and (changed := sorted(set(noted) ^ set(found))):
        name = changed[0].partition("=")[0]
        change = "its content has changed since it was written"
        raise ValueError(_damaged(path.with_name(name), change))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(_damaged(path, str(error))) from error


def _noted(file: Any) -> list[str]:
    """Digests of the tensors and of the files beside them; the first may be blank."""
    noted: list[str] = (file.metadata() or {}).get(_DIGEST, "").split(" ")
    return noted


def read_tensors(path: Path, *, may_be_nan: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file; only tensors of these names may hold NaN or infinite numbers."""
    with _opened(path) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = _noted(file)[0]
    if written and written != _digest(tensors):
        raise ValueError(_damaged(path, "its content has changed since it was written"))
    require_finite(path, {n: v for n, v in tensors.items() if n not in may_be_nan})
    return tensors


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinite numbers."""
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


def load_exactly(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load `state` into `module`, or say which weights do not fit and how."""
    own = module.state_dict()
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        found = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
        raise ValueError(f"The weights of {what} do not fit the config: {found}") from error
    for name, value in own.items():
        if value.is_floating_point() != state[name].is_floating_point():
            raise ValueError(
                f"The weights of {what} do not fit the config: {name} is {state[name].dtype}."
            )
