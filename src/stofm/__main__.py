"""The command line: ``stofm embed``, ``stofm train``, ``stofm convert``, ``stofm demo``."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from stofm import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_FAILED = 1
_INTERRUPTED = 130
_USER_ERRORS = (FloatingPointError, KeyError, MemoryError, OSError, TypeError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments
        Words of the command line; those of the process by default.

    Returns
    -------
    Exit code: 0, 1 for an error (its message is on stderr), 2 for wrong usage, 130 if
    interrupted.
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
            options.run(options)
        except KeyboardInterrupt:
            print("stofm: interrupted.", file=sys.stderr)
            return _INTERRUPTED
        except _USER_ERRORS as error:
            if options.traceback:
                raise
            print(f"stofm: error: {_message(error)}", file=sys.stderr)
            return _FAILED
    return 0


def _message(error: Exception) -> str:
    # str(KeyError) is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"stofm: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--quiet", action="store_true", help="only warnings and errors")
    shared.add_argument(
        "--traceback", action="store_true", help="show where in the code an error came from"
    )
    parser = argparse.ArgumentParser(
        prog="stofm", description="Foundation-model embeddings of spatial transcriptomics slices."
    )
    parser.add_argument("--version", action="version", version=f"stofm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    embed = commands.add_parser("embed", parents=[shared], help="embed the cells of a file")
    embed.add_argument("input", type=Path, help=".h5ad or .zarr with raw counts and coordinates")
    embed.add_argument("output", type=Path, help=".h5ad or .zarr to write")
    embed.add_argument("--model", default="stofm-mini", help="folder or hub id [%(default)s]")
    embed.add_argument("--layer", help="layer with raw counts [X]")
    embed.add_argument("--spatial-key", default="spatial", help="obsm entry [%(default)s]")
    embed.add_argument("--library-key", help="obs column that names the slices")
    embed.add_argument("--species", default="auto", choices=["auto", "human", "mouse"])
    embed.add_argument("--gene-key", help="var column with gene ids [found automatically]")
    embed.add_argument("--orthologs", help="table of mouse and human Ensembl ids")
    embed.add_argument("--device", default="auto", help="auto, cpu, mps, cuda, cuda:1 [auto]")
    embed.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    embed.add_argument("--batch-size", type=int, help="sub-slices at a time")
    embed.add_argument("--seed", type=int, default=0)
    embed.add_argument("--overwrite", action="store_true", help="replace the output")
    embed.set_defaults(run=_embed)

    train = commands.add_parser(
        "train",
        parents=[shared],
        help="pretrain a model on a folder of slices",
        description="Pretrain a model on a folder of slices, as a recipe says. To use several "
        "devices: torchrun --nproc-per-node 4 -m stofm train ..., or srun in a SLURM job.",
    )
    train.add_argument("recipe", type=Path, help=".toml with data, model and stages")
    train.add_argument("--data", type=Path, required=True, help="folder of .h5ad and .zarr")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--device", default="auto", help="auto, cpu, mps, cuda, cuda:1 [auto]")
    train.add_argument("--work", type=Path, help="folder of prepared slices [OUT/work]")
    train.add_argument("--resume", action="store_true", help="go on with the run in OUT, if any")
    train.add_argument("--overwrite", action="store_true", help="throw away the run in OUT")
    train.set_defaults(run=_train)

    convert = commands.add_parser(
        "convert", parents=[shared], help="turn SToFM's published weights into a checkpoint"
    )
    convert.add_argument("reference", type=Path, help="folder in the published layout")
    convert.add_argument("output", type=Path, help="checkpoint folder to write")
    convert.add_argument(
        "--vocabulary", type=Path, help="table of genes [Geneformer 30M's, from the hub]"
    )
    convert.add_argument("--name", default="stofm-reference", help="the model's name")
    convert.add_argument("--overwrite", action="store_true", help="replace the output")
    convert.set_defaults(run=_convert)

    demo = commands.add_parser(
        "demo", parents=[shared], help="embed and cluster a slice and draw figures"
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder [%(default)s]")
    demo.add_argument("--data", type=Path, help=".h5ad or .zarr in place of a simulated slice")
    demo.add_argument("--library-key", help="obs column that names the slices")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    return parser


def _embed(options: argparse.Namespace) -> None:
    _check_output(options.output, overwrite=options.overwrite)
    adata = read_anndata(options.input)
    from stofm import tl

    tl.embed(
        adata,
        options.model,
        layer=options.layer,
        spatial_key=options.spatial_key,
        library_key=options.library_key,
        species=options.species,
        gene_key=options.gene_key,
        orthologs=options.orthologs,
        device=options.device,
        dtype=options.dtype,
        batch_size="auto" if options.batch_size is None else options.batch_size,
        seed=options.seed,
        show_progress_bar=not options.quiet and sys.stderr.isatty(),
    )
    write_anndata(adata, options.output)


def _train(options: argparse.Namespace) -> None:
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))):
        # Of several processes the first one speaks.
        logging.getLogger("stofm").setLevel(logging.WARNING)
    from stofm.tl._train import train_recipe
    from stofm.train import Recipe

    if not options.recipe.is_file():
        msg = f"There is no recipe {options.recipe}."
        raise FileNotFoundError(msg)
    result = train_recipe(
        options.data,
        Recipe.from_toml(options.recipe),
        out_dir=options.out,
        device=options.device,
        work_dir=options.work,
        resume=options.resume,
        overwrite=options.overwrite,
        show_progress_bar=not options.quiet and sys.stderr.isatty(),
    )
    logging.getLogger("stofm").info("%s is trained: %s.", result.model.name, options.out / "model")


def _convert(options: argparse.Namespace) -> None:
    from stofm.genes import GeneVocabulary
    from stofm.nn import Stofm

    vocabulary = None
    if options.vocabulary is not None:
        vocabulary = GeneVocabulary.from_tsv(options.vocabulary)
    model = Stofm.from_reference(options.reference, vocabulary, name=options.name)
    model.save_pretrained(options.output, overwrite=options.overwrite)


def _demo(options: argparse.Namespace) -> None:
    from stofm._demo import run_demo

    run_demo(options.out, data=options.data, library_key=options.library_key, seed=options.seed)


def _check_output(path: Path, *, overwrite: bool) -> None:
    if path.suffix not in (".h5ad", ".zarr"):
        msg = f"The output must end in .h5ad or .zarr, found {path.name!r}."
        raise ValueError(msg)
    if path.exists() and not overwrite:
        msg = f"{path} exists; pass --overwrite to replace it."
        raise FileExistsError(msg)


def read_anndata(path: Path) -> AnnData:
    """Read an AnnData from an ``.h5ad`` file or a ``.zarr`` folder."""
    import anndata

    if not path.exists():
        msg = f"There is no file {path}."
        raise FileNotFoundError(msg)
    if path.suffix == ".zarr":
        return anndata.read_zarr(path)
    if path.suffix != ".h5ad":
        msg = f"Expected an .h5ad or .zarr file, found {path.name!r}."
        raise ValueError(msg)
    return anndata.read_h5ad(path)


def write_anndata(adata: AnnData, path: Path) -> None:
    """Write an AnnData beside `path` first, so that a crash leaves no half file."""
    from stofm.nn.checkpoint import replace_path

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        part = folder / path.name
        if path.suffix == ".zarr":
            adata.write_zarr(part)
        else:
            adata.write_h5ad(part, compression="gzip")
        replace_path(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
