"""``stofm.corpus.embed``: embeddings of many slices, a store for each."""

from __future__ import annotations

import socket
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stofm._config import read_json
from stofm._edge.slice_files import write_data
from stofm._files import local
from stofm._keys import Obsm, Uns
from stofm._logging import logger
from stofm._messages import text_of, warn
from stofm.corpus._build import key_of, parse_share, run_each
from stofm.corpus.manifest import is_corpus
from stofm.corpus.preparation import read_all_orthologs
from stofm.corpus.sources import FileConfig, find_files, find_sources, numbered
from stofm.corpus.storage import alone, digest_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from stofm.corpus.sources import SliceSource
    from stofm.nn import Stofm

#: Folder with records of what is done.
_DONE = "done"


def embed(
    corpus_or_files: Any,
    out: str | PathLike[str],
    model: Stofm | str | Path = "stofm-mini",
    *,
    client: Any = None,
    options: FileConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    shard: str = "1/1",
    show_progress_bar: bool = True,
) -> list[str]:
    """Embed slice after slice with :func:`stofm.tl.embed`, and write a Zarr store for each.

    A call that was stopped at any moment continues when it is repeated. Slices that fail are
    reported at the end, and do not stop the others.

    Parameters
    ----------
    corpus_or_files
        A corpus, or files as :func:`stofm.corpus.build` takes them.
    out
        Folder of the stores. A store ``NAME.zarr`` is an AnnData without counts: names of cells (of a corpus,
        rows in the source) and ``obsm["X_stofm"]``, with its record.
    model
        A :class:`stofm.Stofm`, a checkpoint folder, a hub id or ``"stofm-mini"``.
    client
        A ``distributed.Client`` to compute on, whose workers see the same paths; by default slices are
        embedded in this process. Workers on a machine with several GPUs take one each, in turn.
    options
        Options for reading files, unless a table has others.
    device, dtype, seed
        As in :func:`stofm.tl.embed`.
    shard
        Share of the slices of this call, ``"2/8"`` the second of eight, for job arrays.
    show_progress_bar
        Show a bar.

    Returns
    -------
    Messages of the slices that failed.

    Raises
    ------
    FileExistsError
        Another process embeds this share into the folder.
    OSError
        The disk is full; what was written is kept.

    Examples
    --------
    >>> import anndata as ad, stofm as st
    >>> st.datasets.simulate_slice(300, 100).write_h5ad("a.h5ad")
    >>> st.corpus.embed(["a.h5ad"], "embeddings")
    []
    >>> ad.read_zarr("embeddings/a.zarr").obsm["X_stofm"].shape
    (300, 576)
    """
    folder = local(out).absolute()
    if isinstance(corpus_or_files, str | Path) and is_corpus(corpus_or_files):
        sources = find_sources(corpus_or_files, FileConfig())
    else:
        sources = find_files(corpus_or_files, options or FileConfig())
    part, n_parts = parse_share(shard)
    fingerprint = _load(model).fingerprint
    orthologs = read_all_orthologs(sources)
    stores = _place(folder, sources)
    jobs = []
    for source, store in [*zip(sources, stores, strict=True)][part - 1 :: n_parts]:
        key = digest_json(key_of(source, orthologs), fingerprint, dtype, seed)
        if not (_read_note(store).get("key") == key and store.is_dir()):
            jobs.append((source, store, key))
    folder.mkdir(parents=True, exist_ok=True)
    turns = {} if client is None else _turns(client.run(socket.gethostname))
    make = partial(_embed, model=model, device=device, dtype=dtype, seed=seed, turns=turns)
    with alone(folder / f".embed-{part}.lock"):
        results = run_each(make, jobs, client, "embed slices", "slice", show=show_progress_bar)
        failed = [text_of(error) for _, error in results if error is not None]
    logger.info("%d slices are embedded into %s.", len(jobs) - len(failed), folder)
    if failed:
        warn(f"{len(failed)} slices failed; call embed again to try again. {' '.join(failed[:5])}")
    return failed


def _turns(machines: Mapping[str, str]) -> dict[str, int]:
    """Number of each worker among those on its machine, by address."""
    found: dict[str, int] = {}
    for machine in set(machines.values()):
        own = sorted(address for address, one in machines.items() if one == machine)
        found |= {address: number for number, address in enumerate(own)}
    return found


def _own_device(device: str, turns: Mapping[str, int]) -> str:
    """The GPU of this worker, if a machine has several and none is requested by number."""
    from stofm.nn.device import take_turn

    if not turns:
        return device
    from distributed import get_worker

    return take_turn(device, turns.get(get_worker().address, 0))


def _place(folder: Path, sources: list[SliceSource]) -> list[Path]:
    """Stores of sources; names that occur again, also from other calls, are numbered."""
    stores: dict[Path, None] = {}
    for source in sources:
        paths = (folder / f"{one}.zarr" for one in numbered(source.name))
        own = (None, source.origin)
        stores[next(p for p in paths if p not in stores and _read_note(p).get("source") in own)] = (
            None
        )
    return [*stores]


def _note_of(store: Path) -> Path:
    return store.parent / _DONE / f"{store.stem}.json"


def _read_note(store: Path) -> dict[str, Any]:
    note = _note_of(store)
    return read_json(note, "delete it") if note.is_file() else {}


@lru_cache(maxsize=1)
def _load(model: Any) -> Stofm:
    from stofm.nn.model import load_model

    return load_model(model)


def _embed(
    job: tuple[SliceSource, Path, str],
    *,
    model: Any,
    device: str,
    dtype: str,
    seed: int,
    turns: Mapping[str, int],
) -> None:
    from anndata import AnnData

    from stofm import tl

    source, store, key = job
    options = source.options
    with source.naming(), source.open() as adata:
        tl.embed(
            adata,
            _load(model),
            layer=options.layer,
            spatial_key=options.spatial_key,
            library_key=options.library_key,
            species=options.species,
            gene_key=options.gene_key,
            orthologs=options.orthologs,
            device=_own_device(device, turns),
            dtype=dtype,
            seed=seed,
            show_progress_bar=False,
        )
        record = {Uns.STOFM: {Obsm.X: adata.uns[Uns.STOFM][Obsm.X]}}
        result = AnnData(obs=adata.obs[[]], obsm={Obsm.X: adata.obsm[Obsm.X]}, uns=record)
        write_data(result, store)
    write_json(_note_of(store), {"source": source.origin, "key": key})
