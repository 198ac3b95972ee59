"""Steps for all formats: controls are removed, counts checked, sources recorded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.counts import NotRawCountsError, read_counts
from stofm._edge.gene_mapping import kinds_of_others
from stofm._edge.tables import write_record
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm._messages import naming, warn
from stofm.io.formats import CONTROLS, H5AD, MICROMETRE, VISIUM, VISIUM_HD
from stofm.io.matrices import name_genes
from stofm.io.units import read_images, scale_images

if TYPE_CHECKING:
    from anndata import AnnData

    from stofm.io.detection import Candidate
    from stofm.io.files import File
    from stofm.io.joining import Read

#: Where scanpy keeps images.
_IMAGES: Final = "spatial"
_CONTROL: Final = re.compile(
    r"control|codeword|blank|neg|unassigned|deprecated|intergenic|spike", re.IGNORECASE
)


def add_images(read_: Read, one: Candidate, files: list[File]) -> None:
    """Put Visium's images into ``uns["spatial"]``."""
    if one.technology is H5AD:
        return  # they are there, if there are any
    if one.technology not in (VISIUM, VISIUM_HD):
        raise ValueError(
            f"Images are read for Visium only, and this is {read_.technology}. For images, read it with "
            "spatialdata-io; stofm takes the result."
        )
    name = one.file.sample.replace("/", "_") or read_.facts.get("library") or "sample"
    read_.adata.uns[_IMAGES] = read_images(one.file, files, name)


def finished(read_: Read, names: list[str], how: str) -> AnnData:
    """Remove controls, check counts, and record the sources."""
    name_genes(read_.adata)
    adata, others = _without_controls(read_)
    with naming(adata=names[-1]):
        _require_counts(adata, names[-1])
    scale = read_.scale
    adata.obsm[Obsm.SPATIAL] = np.asarray(adata.obsm[Obsm.SPATIAL], dtype=np.float64) * scale.factor
    if _IMAGES in adata.uns:
        adata.uns[_IMAGES] = scale_images(adata.uns[_IMAGES], scale.factor)
    genomes = {str(one) for one in adata.var.get("genome", ())} - {"", "Unknown"}
    facts = {"software": "", "panel": "", "organism": " ".join(sorted(genomes)), "library": ""}
    facts |= {key: value for key, value in read_.facts.items() if value}
    write_record(
        adata,
        Uns.SOURCE,
        {},
        technology=read_.technology,
        detected_by=how,
        **facts,
        files=np.array(names, dtype=object),
        unit=scale.unit,
        microns_per_unit=scale.factor,
        unit_from=scale.source,
        observations=read_.rows,
        dropped=read_.dropped | others,
    )
    unit = "micrometres" if scale.unit == MICROMETRE else "a unit that the files don't name"
    left = "; ".join(f"{number} {what}" for what, number in read_.dropped.items())
    logger.info(
        "%s (%s): %d %s x %d genes, coordinates in %s%s.",
        *(read_.technology, ", ".join(names), adata.n_obs, read_.rows, adata.n_vars, unit),
        f". Left out: {left}" if left else "",
    )
    return adata


def _without_controls(read_: Read) -> tuple[AnnData, dict[str, int]]:
    """Remove features that are not genes from ``X``, and sum them kind by kind."""
    adata = read_.adata
    kinds = kinds_of_others(adata)
    kinds[(kinds == "") & adata.var_names.str.contains(CONTROLS)] = "control"
    if not (kinds != "").any():
        return adata, {}
    dropped = {}
    sums: dict[str, Any] = {}
    for kind in sorted(set(kinds) - {""}):
        columns = np.flatnonzero(kinds == kind)
        dropped[f"features: {kind}"] = len(columns)
        is_control = _CONTROL.search(kind)
        key = Obs.CONTROLS if is_control else f"{re.sub(r'[^a-z0-9]+', '_', kind.lower())}_counts"
        total = np.asarray(adata.X[:, columns].sum(axis=1)).ravel()
        sums[key] = sums.get(key, 0) + np.rint(total).astype(np.int64)
    adata = adata[:, kinds == ""].copy()
    for key, total in sums.items():
        adata.obs[key] = total
    return adata, dropped


def _require_counts(adata: AnnData, name: str) -> None:
    n_counts = 0
    try:
        for block in read_counts(adata):
            n_counts += block.nnz
    except NotRawCountsError as error:
        raise ValueError(f"{name}: {error}") from None
    if not n_counts:
        warn(f"{name} has no counts: all {adata.n_obs} cells are empty.")
