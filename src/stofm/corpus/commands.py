"""The commands ``stofm corpus ...``, and ``stofm embed`` of many slices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._files import local
from stofm._keys import Obsm

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path


def add_corpus(commands: Any, shared: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add the commands to those of ``stofm``."""
    text = "gather thousands of slices in a folder, and maintain it"
    corpus = commands.add_parser("corpus", help=text).add_subparsers(
        title="commands", required=True
    )
    build = corpus.add_parser("build", parents=[shared], help="turn files of slices into shards")
    add = build.add_argument
    add("out", type=local, help="folder of the corpus")
    add("files", nargs="+", help=".h5ad, .zarr, folders, or a .tsv, .csv or .parquet with `source`")
    add("--exclude", nargs="+", default=[], help="evaluation slices: files, or patterns of names")
    add("--min-genes", type=int, default=100, help="genes that a cell must express [%(default)s]")
    add("--vocabulary", type=local, help="table of genes [stofm-mini's]")
    add("--shard", default="1/1", help="share of the files, for job arrays: 2/8 [%(default)s]")
    add("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster to read files on")
    build.set_defaults(run=_build)

    info = corpus.add_parser("info", parents=[shared], help="count slices and cells")
    check = corpus.add_parser("check", parents=[shared], help="check that all is as it was written")
    export = corpus.add_parser("export", parents=[shared], help="write a Zarr store for each slice")
    for command, run in ((info, _info), (check, _check), (export, _export)):
        command.add_argument("corpus", type=local, help="folder of the corpus")
        command.set_defaults(run=run)
    export.add_argument("out", type=local, help="folder of the stores")
    return [build, info, check, export]


def _build(options: argparse.Namespace) -> None:
    from stofm.corpus import build
    from stofm.genes import GeneVocabulary

    vocabulary = options.vocabulary and GeneVocabulary.from_tsv(options.vocabulary)
    names = ("exclude", "min_genes", "shard")
    build(
        options.files,
        options.out,
        client=options.dask and _connect(options.dask),
        vocabulary=vocabulary,
        show_progress_bar=not options.quiet,
        **{name: getattr(options, name) for name in names},
    )


def _connect(address: str) -> Any:
    from importlib import import_module

    return import_module("distributed").Client(address)


def _info(options: argparse.Namespace) -> None:
    from stofm.corpus import info

    print(info(options.corpus).to_string(index=False))


def _check(options: argparse.Namespace) -> None:
    from stofm.corpus import check

    if found := check(options.corpus):
        raise ValueError("\n".join(found))
    print(f"{options.corpus} is whole.")


def _export(options: argparse.Namespace) -> None:
    from stofm.corpus import export

    export(options.corpus, options.out, show_progress_bar=not options.quiet)


def is_many(inputs: Sequence[Path], out: Path) -> bool:
    """Whether there are several inputs, a corpus, or a folder of slices, to embed into a folder."""
    from stofm.corpus.manifest import is_corpus
    from stofm.corpus.sources import ENDINGS, slice_files

    path, *others = inputs
    if others:
        return True
    is_folder = path.is_dir() and not {path.suffix, out.suffix} & {*ENDINGS}
    return is_corpus(path) or (is_folder and bool(slice_files(path)))


def embed_many(options: argparse.Namespace) -> None:
    """Embed a corpus, or the files of a folder, with the options of ``stofm embed``."""
    from stofm.corpus import embed
    from stofm.corpus.sources import FileConfig

    idle = {"revision": None, "batch_size": None, "key_added": Obsm.X, "overwrite": False}
    if given := [name for name, value in idle.items() if getattr(options, name) != value]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags}: for a single file; leave it out for several slices.")
    names = ("layer", "spatial_key", "library_key", "species", "gene_key", "orthologs", "table_key")
    first, *others = options.input
    failed = embed(
        options.input if others else first,
        options.output,
        options.model,
        options=FileConfig(**{name: getattr(options, name) for name in names}),
        client=options.dask and _connect(options.dask),
        show_progress_bar=not options.quiet,
        **{name: getattr(options, name) for name in ("device", "dtype", "seed", "shard")},
    )
    if failed:
        raise ValueError(f"{len(failed)} slices failed.")
