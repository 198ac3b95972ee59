"""``stofm.corpus.build``: files of slices to shards and a manifest."""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import shutil
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock

from stofm._config import read_json
from stofm._files import local, put_in_place
from stofm._logging import logger, progress
from stofm._messages import text_of, warn
from stofm.corpus.manifest import (
    FAILED,
    HELD_OUT,
    PARTS,
    SETTINGS,
    SHARDS,
    VOCABULARY,
    read_vocabulary,
    write_manifest,
)
from stofm.corpus.preparation import (
    describe,
    describe_vocabulary,
    read_all_orthologs,
)
from stofm.corpus.shards import find_shards, join_shards, write_shard
from stofm.corpus.sources import FileConfig, SliceSource, find_files
from stofm.corpus.storage import alone, digest_json, is_there, write_json
from stofm.corpus.writing import write_source
from stofm.genes import GeneVocabulary, embedded_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from os import PathLike

    import pandas as pd

#: Errors after which no further slice can be written.
_FATAL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_N_NAMED: Final = 5
_MANIFEST_LOCK: Final = ".manifest.lock"


def build(
    files: Any,
    out: str | PathLike[str],
    *,
    client: Any = None,
    exclude: Sequence[str | PathLike[str]] = (),
    min_genes: int = 100,
    options: FileConfig | None = None,
    vocabulary: GeneVocabulary | None = None,
    shard: str = "1/1",
    shard_bytes: int = 2 << 30,
    show_progress_bar: bool = True,
) -> pd.DataFrame:
    """Gather slices in a folder that training reads without loading it.

    File by file, counts of known genes are ranked and written with coordinates, and joined to
    shards of `shard_bytes`. A file that fails is reported at the end and in the manifest, and the
    others go on. A build that was stopped at any moment continues when it is called again, with the
    same result; failed files are tried again.

    Parameters
    ----------
    files
        Paths of ``.h5ad``, ``.zarr`` and what :func:`stofm.read` takes, a folder of such files, or a table
        (``.tsv``, ``.csv``, ``.parquet``) with a column ``source`` of paths relative to it. Other columns
        may say how a file is read (fields of :class:`stofm.train.FileConfig`) and ``licence``,
        ``technology``, ``tissue``, ``donor`` and ``unit``.
    out
        Folder of the corpus.
    client
        A ``distributed.Client``, whose workers see the same paths, to read files on; by default they
        are read in this process, one by one.
    exclude
        Slices for evaluation: files, or patterns of names and paths (``"test/*.h5ad"``). Slices
        with one of these names are left out, and slices that share half of the cells (of the
        smaller one) with one of these files.
    min_genes
        Cells that express fewer genes are left out; in a small panel a tenth of it is enough.
    options
        Options for reading files, unless a table has others.
    vocabulary
        Genes that are kept; those of ``stofm-mini`` by default. The counts of other genes remain
        part of each cell's total.
    shard
        Share of the files of this call, ``"2/8"`` the second of eight, for job arrays. Calls for
        different shares may run at once.
    shard_bytes
        Size of a shard. A slice is never split; a larger slice is a shard of its own.
    show_progress_bar
        Show a bar.

    Returns
    -------
    The manifest, as in ``manifest.parquet``: a row for each slice, with ``status`` ``"ok"``,
    ``"duplicate"``, ``"left out"`` or ``"failed"``, and ``reason``.

    Raises
    ------
    FileExistsError
        Another process builds this share in the folder, or the folder holds something else.
    OSError
        The disk is full; what was written is kept.
    ValueError
        The folder was begun with other settings, or a table of files has unknown columns.

    Examples
    --------
    >>> import stofm as st
    >>> st.datasets.simulate_slice(300, 100).write_h5ad("a.h5ad")
    >>> manifest = st.corpus.build(["a.h5ad"], "corpus")
    >>> manifest[["name", "cells", "status"]].values.tolist()
    [['a', 282, 'ok']]
    """
    folder, vocabulary = local(out).absolute(), vocabulary or embedded_vocabulary()
    part, n_parts = parse_share(shard)
    options = options or FileConfig()
    found = find_files(files, options)
    sources = list(enumerate(found))[part - 1 :: n_parts]
    given = [exclude] if isinstance(exclude, str | Path) else list(exclude)
    paths = [one for one in given if local(one).exists()]
    evaluation, patterns = find_files(paths, options), [str(p) for p in given if p not in paths]
    orthologs = read_all_orthologs([*found, *evaluation])
    if unused := [one for one in patterns if not any(_is_named(source, one) for source in found)]:
        warn(f"exclude = {unused} names neither an existing file nor one of `files`: check it.")
    held_out = {describe(one, orthologs): one for one in evaluation}
    settings = {**describe_vocabulary(vocabulary), "min_genes": min_genes}
    _begin(folder, vocabulary, settings | {"exclude": [*patterns, *held_out]})
    with alone(folder / f".build-{part}.lock"):
        for key, source in held_out.items():
            if not is_there(folder / HELD_OUT / key):
                write_source(source, vocabulary, folder / HELD_OUT / key, min_genes=min_genes)
        done = {one["key"] for shard in find_shards(folder / SHARDS) for one in shard.slices}
        for key in done:
            shutil.rmtree(folder / PARTS / key, ignore_errors=True)
        keyed = [(key_of(source, orthologs), order, source) for order, source in sources]
        jobs = [job for job in keyed if job[0] not in done]
        names = [*patterns, *(one.name for one in evaluation)]
        make = partial(_make, folder=folder, min_genes=min_genes, names=names)
        results = run_each(make, jobs, client, "build corpus", "file", show=show_progress_bar)
        _join(folder, _sound(folder, results), part, shard_bytes)
        with FileLock(folder / _MANIFEST_LOCK):
            manifest = write_manifest(folder)
    _report(manifest, folder)
    return manifest


def parse_share(shard: str) -> tuple[int, int]:
    """Number of a share, and of how many."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, n_parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= n_parts:
        raise ValueError(f"`shard` must be '1/8' to '8/8' for eight shares, found {shard!r}.")
    return part, n_parts


def _is_named(source: SliceSource, pattern: str) -> bool:
    return any(PurePath(one).match(pattern) for one in (source.name, source.origin))


def _begin(folder: Path, vocabulary: GeneVocabulary, settings: dict[str, Any]) -> None:
    """Write the settings of a new corpus, or refuse to go on with others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    with FileLock(folder / _MANIFEST_LOCK):
        if not path.is_file():
            names = {one.name for one in folder.iterdir() if one.name[0] != "."}
            if others := sorted(names - {VOCABULARY}):
                raise FileExistsError(
                    f"{folder} holds something other than a corpus ({', '.join(others[:3])}); take "
                    "another folder."
                )
            put_in_place(folder / VOCABULARY, vocabulary.save)
            write_json(path, settings)
    begun = read_json(path, "delete the folder and build the corpus again")
    if changed := [name for name, value in settings.items() if begun.get(name) != value]:
        was, now = ([of.get(name) for name in changed] for of in (begun, settings))
        raise ValueError(
            f"The corpus in {folder} was begun with another {', '.join(changed)} ({was}, now {now}): "
            "go on with that, or take another folder."
        )


def key_of(source: SliceSource, orthologs: Any) -> str:
    """Key of a source and its options, even if it is missing."""
    # A missing source fails later, in its turn.
    with contextlib.suppress(FileNotFoundError):
        return describe(source, orthologs)
    return digest_json(str(source.file))


def run_each(
    make: Callable[[Any], object],
    jobs: Sequence[Any],
    client: Any,
    description: str,
    unit: str,
    *,
    show: bool,
) -> Iterator[tuple[Any, Exception | None]]:
    """Do jobs here or on the workers of a Dask client; yields each with its error, in order.

    A disk that is full or can't be written to ends it, since no other job could succeed either.
    """
    futures = None if client is None else client.map(make, jobs, pure=False)
    try:
        for number, job in enumerate(progress(jobs, description, unit, show=show)):
            failed = None
            try:
                if futures is None:
                    make(job)
                else:
                    futures[number].result()
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _FATAL:
                    raise
                failed = error
            yield job, failed
    finally:
        if client is not None:
            client.cancel(futures)


def _make(
    job: tuple[str, int, SliceSource], folder: Path, min_genes: int, names: Sequence[str]
) -> None:
    """Write the slices of a file to a folder of their own."""
    key, _, source = job
    place = folder / PARTS / key
    if is_there(place):
        return
    vocabulary = read_vocabulary(folder)
    entries = _entries(job)
    if pattern := next((one for one in names if _is_named(source, one)), ""):
        reason = f"is named as {pattern!r}, which is held out"
        entry = entries | {"status": "left out", "reason": reason, "cells": 0}
        write_shard(place, vocabulary.fingerprint, lambda _: [entry])
        return
    known = {
        str(one["name"]): shard["hashes"][shard.first_cell[k] : shard.first_cell[k + 1]]
        for shard in find_shards(folder / HELD_OUT)
        for k, one in enumerate(shard.slices)
    }
    write_source(source, vocabulary, place, min_genes=min_genes, known=known, entries=entries)


def _entries(job: tuple[str, int, SliceSource]) -> dict[str, Any]:
    key, order, source = job
    return {
        **source.about,
        "name": source.name,
        "source": str(source.file),
        "key": key,
        "order": order,
    }


def _sound(folder: Path, results: Iterable[tuple[Any, Exception | None]]) -> Iterator[Path]:
    """Folders of the slices that were written; records what failed."""
    for job, error in results:
        entry = _entries(job)
        note = folder / FAILED / f"{digest_json(entry['source'])}.json"
        if error is None:
            note.unlink(missing_ok=True)
            yield folder / PARTS / job[0]
        else:
            reason = f"{type(error).__name__}: {text_of(error)}"
            write_json(note, entry | {"status": "failed", "reason": reason})


def _join(folder: Path, parts: Iterable[Path], part: int, limit: int) -> None:
    """Join slices to shards, in order, as many as fit into one."""
    waiting: list[Path] = []
    size = 0

    def join() -> None:
        numbers = (f"{part:03d}-{number:05d}" for number in itertools.count())
        place = next(p for name in numbers if not (p := folder / SHARDS / name).exists())
        place.parent.mkdir(exist_ok=True)
        if len(waiting) == 1:
            waiting[0].rename(place)
        else:
            join_shards(place, waiting)
        for one in waiting:
            shutil.rmtree(one, ignore_errors=True)

    for one in parts:
        n_bytes = sum(file.stat().st_size for file in one.glob("*.npy"))
        if waiting and size + n_bytes > limit:
            join()
            waiting, size = [], 0
        waiting.append(one)
        size += n_bytes
    if waiting:
        join()


def _report(manifest: pd.DataFrame, folder: Path) -> None:
    found = manifest["status"].value_counts()
    n_cells = int(manifest.loc[manifest["status"] == "ok", "cells"].sum())
    counted = ", ".join(f"{n} {status}" for status, n in found.items())
    logger.info("The corpus in %s has %d cells. Slices: %s.", folder, n_cells, counted)
    failed = manifest[manifest["status"] == "failed"]
    if len(failed):
        warn(
            f"{len(failed)} files failed and are not in the corpus. The manifest names all of them; call "
            f"build again to try them again. {' '.join(failed['reason'][:_N_NAMED])}"
        )
