"""The command line: ``stofm check``, ``embed``, ``report``, ``train``, ``align``, ``corpus``, ``convert``, ``demo``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stofm._files import local
from stofm._logging import logger
from stofm._messages import naming, text_of
from stofm._version import __version__
from stofm.corpus.commands import add_corpus, embed_many, is_many

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FAILED = 1
#: Options of ``stofm embed`` that :func:`stofm.tl.embed` takes as they are.
_PASSED_ON = (
    "layer", "spatial_key", "library_key", "species", "gene_key", "orthologs", "device", "dtype",
    "seed", "key_added", "table_key",
)  # fmt: skip
_INTERRUPTED = 130
#: What a message to the user comes as; others are faults of the software.
_MEANT = (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for an error (its message is on stderr) or 130 if interrupted.

    ``check`` returns 1 if embedding would stop.

    Wrong usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    if options.quiet:
        logging.getLogger("stofm").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # A library's notes to programmers (FutureWarning and the like) don't concern a user.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        try:
            with naming(**options.flags):
                code: int = options.run(options) or 0
        except KeyboardInterrupt:
            print("stofm: interrupted.", file=sys.stderr)
            return _INTERRUPTED
        except Exception as error:
            if options.traceback:
                raise
            print(f"stofm: error: {_message(error)}", file=sys.stderr)
            return _FAILED
    return code


def _message(error: Exception) -> str:
    text = text_of(error)
    if not isinstance(error, _MEANT):
        text = f"unexpected {type(error).__name__}: {text} (--traceback shows where it comes from)"
    return ": ".join([*(n for n in getattr(error, "__notes__", ()) if n not in text), text])


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except Exception as error:
        error.add_note(str(file))
        raise


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"stofm: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    shared, writing, slices, seed, device, counts = (
        argparse.ArgumentParser(add_help=False) for _ in range(6)
    )
    shared.add_argument("--quiet", action="store_true", help="only warnings and errors")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")
    writing.add_argument("--overwrite", action="store_true", help="replace what is there")
    slices.add_argument("--library-key", help="obs column that names the slices")
    slices.add_argument("--table-key", help="table of a SpatialData [the only one]")
    seed.add_argument("--seed", type=int, default=0)
    device.add_argument("--device", default="auto", help="auto, cpu, mps, cuda, cuda:1 [auto]")
    add = counts.add_argument
    add("--model", default="stofm-mini", help="folder or hub id [%(default)s]")
    add("--layer", help="layer with raw counts [X]")
    add("--spatial-key", default="spatial", help="obsm entry [%(default)s]")
    add("--species", default="auto", choices=["auto", "human", "mouse"])
    add("--gene-key", help="var column with gene ids [found automatically]")
    add("--orthologs", help="table of mouse and human Ensembl ids")
    parser = argparse.ArgumentParser(
        prog="stofm", description="Foundation-model embeddings of spatial transcriptomics slices."
    )
    parser.add_argument("--version", action="version", version=f"stofm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    parents = [shared, writing, slices, seed, device, counts]
    embed = commands.add_parser(
        "embed", parents=parents, help="embed the cells of a slice, or of many"
    )
    add = embed.add_argument
    add(
        "input",
        type=local,
        nargs="+",
        help=".h5ad, .zarr, what an instrument wrote, folder of slices, or corpus",
    )
    add(
        "output",
        type=local,
        help=".h5ad or .zarr (of a SpatialData, .h5ad gets the table); of many, a folder",
    )
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--batch-size", type=int, help="sub-slices at a time")
    add("--key-added", default="X_stofm", help="obsm entry to write [%(default)s]")
    add("--shard", default="1/1", help="share of a folder's slices: 2/8 [%(default)s]")
    add("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster, for a folder")
    embed.set_defaults(run=_embed)

    text = "tell what embedding a slice will do, without doing it"
    check = commands.add_parser("check", parents=[shared, slices, device, counts], help=text)
    check.add_argument(
        "input", type=local, help=".h5ad, .zarr, or a folder that an instrument wrote"
    )
    check.set_defaults(run=_check)

    text = "write a page of HTML about a slice: map, UMAP, domains, markers, how it was made"
    report = commands.add_parser("report", parents=[shared, writing, slices, seed], help=text)
    add = report.add_argument
    add("input", type=local, help=".h5ad, .zarr, or a folder that an instrument wrote")
    add("output", type=local, help=".html; of several slices each gets its own")
    report.set_defaults(run=_report)

    train = commands.add_parser(
        "train",
        parents=[shared, writing, device],
        help="pretrain a model on a folder of slices",
        description="Pretrain a model on a folder of slices, as a recipe says. To use several "
        "devices: torchrun --nproc-per-node 4 -m stofm train ..., or srun in a SLURM job.",
    )
    add = train.add_argument
    add("recipe", type=local, help=".toml with data, model and stages")
    add("--data", type=local, required=True, help="folder of .h5ad and .zarr")
    add("--out", dest="out_dir", metavar="OUT", type=local, required=True, help="folder of the run")
    work = "folder of prepared slices [OUT/work]"
    add("--work", dest="work_dir", metavar="WORK", type=local, help=work)
    add("--resume", action="store_true", help="go on with the run in OUT, if any")
    train.set_defaults(run=_train)

    text = "align images and expression of a folder of slices"
    align = commands.add_parser(
        "align",
        parents=[shared, writing, device],
        help=text,
        description="Align images and expression of a folder of slices, whose images stofm.im.embed "
        "has embedded, as a recipe says. Several devices: as in stofm train. Stopped, the same "
        "command goes on.",
    )
    add = align.add_argument
    add("recipe", type=local, help=".toml with options")
    add("--data", type=local, required=True, help="folder of .h5ad and .zarr")
    add("--out", type=local, required=True, help="folder of the aligner")
    align.set_defaults(run=_align)

    text = "turn SToFM's published weights into a checkpoint"
    convert = commands.add_parser("convert", parents=[shared, writing], help=text)
    add = convert.add_argument
    add("reference", type=local, help="folder in the published layout")
    add("output", type=local, help="checkpoint folder to write")
    add("--vocabulary", type=local, help="table of genes [Geneformer 30M's, from the hub]")
    add("--name", default="stofm-reference", help="the model's name")
    convert.set_defaults(run=_convert)

    text = "embed a section, find and learn its regions, and draw figures"
    demo = commands.add_parser("demo", parents=[shared, writing, slices, seed], help=text)
    demo.add_argument("--out", type=local, default=Path("demo"), help="folder [%(default)s]")
    instead = demo.add_mutually_exclusive_group()
    instead.add_argument("--data", type=local, help=".h5ad or .zarr [a section of the package]")
    instead.add_argument("--simulate", action="store_true", help="a simulated slice")
    demo.set_defaults(run=_demo)
    corpus = add_corpus(commands, shared)
    for command in (check, embed, report, train, align, convert, demo, *corpus):
        # Messages speak of arguments; here these are flags.
        flags = {one.dest: one.option_strings[0] for one in command._actions if one.option_strings}
        command.set_defaults(flags=flags)
    return parser


def _embed(options: argparse.Namespace) -> None:
    from stofm import io, tl
    from stofm._edge.slice_files import (
        is_data,
        is_spatialdata,
        read_data,
        refuse_output,
        write_data,
    )
    from stofm._edge.tables import resolve_table
    from stofm.io.matrices import is_plain, place_of_counts
    from stofm.nn import Stofm

    if is_many(options.input, options.output):
        embed_many(options)
        return
    (file,) = options.input
    is_file = is_data(file)
    has_tables = is_file and is_spatialdata(file)
    _refuse_table_key(file, options.table_key, has_tables=has_tables)
    refuse_output(options.output, has_spatialdata=has_tables, overwrite=options.overwrite)
    model = Stofm.from_pretrained(options.model, revision=options.revision)
    with _about(file):
        data = read_data(file, backed=True) if is_file else io.read(file)
        if is_file and not has_tables and options.layer is None:
            place = place_of_counts(data)
            if place in data.layers:
                options.layer = place
                logger.info("X holds no raw counts; those in layers[%r] are embedded.", place)
            elif not is_plain(data):
                data = io.read(file)
        tl.embed(
            data,
            model,
            batch_size="auto" if options.batch_size is None else options.batch_size,
            show_progress_bar=not options.quiet,
            **{name: getattr(options, name) for name in _PASSED_ON},
        )
    if options.output.suffix == ".h5ad":
        data = resolve_table(data, options.table_key)
    write_data(data, options.output)
    what = "The SpatialData" if hasattr(data, "tables") else "The AnnData"
    logger.info("%s is written to %s.", what, options.output)


def _check(options: argparse.Namespace) -> int:
    from stofm import io, pp
    from stofm._edge.slice_files import is_data, read_data

    file = options.input
    with _about(file):
        data = read_data(file, backed=True) if is_data(file) else io.read(file)
        names = ("model", "device", *_PASSED_ON)
        given = {name: getattr(options, name) for name in names if hasattr(options, name)}
        found = pp.check(data, **given)
    print(found)
    return 0 if found.ok else _FAILED


def _report(options: argparse.Namespace) -> None:
    from stofm import io, pl, tl
    from stofm._edge.slice_files import is_data, read_data
    from stofm._edge.tables import resolve_table
    from stofm._keys import Obs

    file, output = options.input, options.output
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} is there already: pass --overwrite to replace it.")
    own = {"library_key": options.library_key, "table_key": options.table_key}
    with _about(file):
        data = read_data(file) if is_data(file) else io.read(file)
        if Obs.DOMAIN not in resolve_table(data, options.table_key).obs:
            logger.info("%s has no domains yet: they are found for the page.", file.name)
            tl.domains(data, seed=options.seed, **own)
        pl.report(data, output, **own)


def _refuse_table_key(file: Path, table_key: str | None, *, has_tables: bool) -> None:
    if table_key is not None and not has_tables:
        raise ValueError(
            f"--table-key names a table of a SpatialData, and {file} holds an AnnData: leave it out."
        )


def _let_the_first_speak() -> bool:
    """Quieten all processes but the first, and say whether this is it."""
    is_first = (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"
    if not is_first:
        logging.getLogger("stofm").setLevel(logging.WARNING)
    return is_first


def _train(options: argparse.Namespace) -> None:
    _let_the_first_speak()
    from stofm.train import Recipe
    from stofm.train.recipe import train_recipe

    names = ("out_dir", "device", "work_dir", "resume", "overwrite")
    result = train_recipe(
        options.data,
        Recipe.from_toml(options.recipe),
        show_progress_bar=not options.quiet,
        **{name: getattr(options, name) for name in names},
    )
    logger.info("%s is trained: %s.", result.model.name, options.out_dir / "model")


def _align(options: argparse.Namespace) -> None:
    is_first = _let_the_first_speak()
    from stofm import tl
    from stofm._edge.slice_files import read_data
    from stofm.align.aligner import ALIGNER
    from stofm.align.recipe import AlignRecipe

    recipe, out = AlignRecipe.from_toml(options.recipe), options.out
    ALIGNER.refuse_other(out, overwrite=options.overwrite)
    checkpoint = out.with_name(f"{out.name}.training")
    names = ("genes", "image_key", "donor_key", "library_key", "layer", "seed", "options")
    aligner = tl.align(
        {file.stem: read_data(file) for file in recipe.find(options.data)},
        **{name: getattr(recipe, name) for name in names},
        device=options.device,
        checkpoint=checkpoint,
        show_progress_bar=not options.quiet,
    )
    if is_first:
        aligner.save(out, overwrite=options.overwrite)
        checkpoint.unlink()
        logger.info("The aligner is written to %s.", out)


def _convert(options: argparse.Namespace) -> None:
    from stofm.genes import GeneVocabulary
    from stofm.nn import Stofm
    from stofm.nn.checkpoint import CHECKPOINT

    CHECKPOINT.refuse_other(options.output, overwrite=options.overwrite)
    vocabulary = None
    if options.vocabulary is not None:
        vocabulary = GeneVocabulary.from_tsv(options.vocabulary)
    model = Stofm.from_reference(options.reference, vocabulary, name=options.name)
    model.save_pretrained(options.output, overwrite=options.overwrite)


def _demo(options: argparse.Namespace) -> None:
    from stofm._demo import run_demo
    from stofm._edge.slice_files import is_spatialdata

    if options.data is not None:
        has_tables = is_spatialdata(options.data)
        _refuse_table_key(options.data, options.table_key, has_tables=has_tables)
    names = ("data", "simulate", "library_key", "table_key", "seed", "overwrite")
    run_demo(options.out, **{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
