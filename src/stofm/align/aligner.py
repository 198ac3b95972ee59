"""The aligner: what :func:`stofm.tl.align` returns, transforms slides with, saves and loads."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from scipy import sparse

from stofm._config import read_json
from stofm._digests import fingerprint
from stofm._edge.tables import all_or_nothing, refuse_foreign, write_record
from stofm._files import Kind, local, read_table, reading, take_back
from stofm._keys import Obsm, Suffix
from stofm._version import __version__
from stofm.align.config import AlignOptions
from stofm.align.expression import GeneBranch
from stofm.align.inputs import ImageOrigin, Spots, read_images
from stofm.align.network import LEVELS, AlignNetwork
from stofm.align.training import fuse, project
from stofm.heads.genes import Gene
from stofm.heads.head import refuse_reserved
from stofm.heads.request import resolve_slices
from stofm.nn.checkpoint import (
    load_exactly,
    read_tensors,
    require_beside,
    write_atomically,
    write_tensors,
)
from stofm.nn.device import choose_device, seeded

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from stofm.heads.request import SliceTables

    Matrix = NDArray[np.float32]

Modality = Literal["both", "image", "genes"]
_CONFIG, _WEIGHTS = "config.json", "aligner.safetensors"
_TABLES: Final = {"history": "history.tsv", "retrieval": "retrieval.tsv"}
_FILES: Final = {_CONFIG, _WEIGHTS, *_TABLES.values()}
#: Fields of the branch of genes that are no arrays.
_OF_GENES: Final = ("kind", "panel", "factors", "reps", "origins")
#: Arrays of the reference that are not sparse.
_DENSE: Final = ("image", "aligned_image", "aligned_genes", "group")


@dataclass(frozen=True, eq=False)
class Reference:
    """Spots that genes are predicted from, (n, ...): a sample of the slides that were aligned.

    Attributes
    ----------
    image
        Standardised features of the image, of the spot beside the niche.
    aligned_image, aligned_genes
        Projections of the image and of the genes, of the spot beside the niche.
    expression
        (n, n_panel) log-normalised; no columns if the slides had no counts.
    group
        (n,) number of each spot's donor, or of its slide where donors are not told.
    """

    image: Matrix
    aligned_image: Matrix
    aligned_genes: Matrix
    expression: sparse.csr_matrix
    group: NDArray[np.int64]

    def at(self, rows: NDArray[Any]) -> Reference:
        """Some of the spots."""
        return Reference(*(getattr(self, one.name)[rows] for one in fields(self)))

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the file of weights holds of it."""
        parts = {name: getattr(self.expression, name) for name in ("data", "indices", "indptr")}
        parts |= {name: getattr(self, name) for name in _DENSE}
        return {f"reference.{name}": value for name, value in parts.items()}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]], n_genes: int) -> Reference:
        """Read what :attr:`arrays` were."""
        found = {name.removeprefix("reference."): value for name, value in arrays.items()}
        parts = tuple(found[name] for name in ("data", "indices", "indptr"))
        shape = (len(found["image"]), n_genes)
        matrix = sparse.csr_matrix(parts, shape=shape)
        return cls(expression=matrix, **{name: found[name] for name in _DENSE})


@dataclass(frozen=True, eq=False)
class Aligner:
    """Represents spots by image, by genes or by both, in one space; from :func:`stofm.tl.align`.

    Attributes
    ----------
    network
        The trained :class:`~stofm.align.network.AlignNetwork`.
    image
        Encoder, fingerprint and patches of the features of images that it reads.
    genes
        How it reads genes.
    reference
        Spots of the aligned slides, for :func:`stofm.tl.predict_genes`.
    history
        Losses over the steps, of training and, with donors, of the held-out one.
    retrieval
        For each slide and level, how well genes are found by the image within the slide.
    params
        Arguments of the call that made it.
    """

    network: AlignNetwork
    image: ImageOrigin
    genes: GeneBranch
    reference: Reference
    history: pd.DataFrame
    retrieval: pd.DataFrame
    params: dict[str, Any]

    def __repr__(self) -> str:
        """A line with what is read."""
        genes = self.genes.reps or self.genes.kind
        return f"Aligner(image={str(self.image)!r}, genes={genes!r}, d={2 * self.options.d_model})"

    @property
    def options(self) -> AlignOptions:
        """How it was trained."""
        return self.network.options

    @property
    def fingerprint(self) -> str:
        """Changes with the weights."""
        state = sorted(self.network.state_dict().items())
        return fingerprint(*(name for name, _ in state), *(v.cpu().numpy() for _, v in state))

    def transform(
        self,
        data: Any,
        *,
        modality: Modality = "both",
        image_key: str = Obsm.X_IMAGE,
        microns_per_unit: Any = None,
        pitch: float | None = None,
        library_key: str | None = None,
        layer: str | None = None,
        spatial_key: str = Obsm.SPATIAL,
        device: str | torch.device = "auto",
        key_added: str = Obsm.X_ALIGNED,
        table_key: str | None = None,
        copy: bool = False,
    ) -> Any:
        """Represent the spots of slides.

        Parameters
        ----------
        data
            AnnData or SpatialData of one or several slides, or a list or dict of them, with features
            of images by :func:`stofm.im.embed` with the aligner's encoder.
        modality
            ``"both"``, or the one to go by: ``"image"`` for slides without expression, ``"genes"``
            for those without an image.
        image_key
            What the names of the image features in ``obsm`` start with.
        microns_per_unit, pitch
            As in :func:`stofm.im.embed`; for ``modality="genes"`` alone, else the features' record
            tells.
        library_key, layer, spatial_key, device, table_key
            As in :func:`stofm.tl.align`.
        key_added
            Entry of ``obsm`` to write.
        copy
            Return changed copies and leave `data` as it is.

        Returns
        -------
        None, or with ``copy=True`` the new AnnData, in the form of `data`. Sets:

        ``adata.obsm['X_aligned' | key_added]`` : float32 (n_obs, 2 x d_model)
            The spot beside its niche, each of length 1: image and genes, weighted on each slide by how
            well they foretell the genes of the spots around.
        ``adata.obsm['X_aligned_image']``, ``adata.obsm['X_aligned_genes']`` : float32 (n_obs, 2 x d_model)
            The same of each modality alone, as far as it is read.
        ``adata.uns['stofm']['X_aligned']`` : dict
            Parameters and fingerprint of the aligner.

        Raises
        ------
        KeyError
            There are no features of images, or a column or layer is missing.
        ValueError
            Features are of another encoder or other patches, or there are too few of the genes.
        """
        if modality not in get_args(Modality):
            raise ValueError(
                f"modality must be one of {list(get_args(Modality))}, found {modality!r}."
            )
        images = [image_key + suffix for suffix in (Suffix.SPOT, Suffix.NICHE)]
        read = (spatial_key, library_key, *images, *self.genes.reps)
        refuse_reserved(key_added, Obsm.X_ALIGNED, *read)
        slices = resolve_slices(data, library_key, spatial_key, table_key, copy=copy)
        suffixes = {"both": "", "image": Suffix.IMAGE, "genes": Suffix.GENES}
        names = [key_added + suffix for suffix in suffixes.values()]
        slices.each(lambda table: refuse_foreign(table, key_added, obsm=names))
        target = slices.copied() if copy else slices
        options = {"microns_per_unit": microns_per_unit, "pitch": pitch, "layer": layer}
        spots, features = self.read(target, modality, image_key, spatial_key, **options)
        found = project(self.network, features, choose_device(device))
        found["both"] = fuse(found, spots)
        values = {
            key_added + suffix: spots.to_tables(np.concatenate([*found[name].values()], axis=1))
            for name, suffix in suffixes.items()
            if name in found
        }
        params = {"modality": modality, "image_key": image_key, "spatial_key": spatial_key}
        with all_or_nothing(*target.tables):
            for table, place in zip(target.tables, target.places, strict=True):
                for key in names:
                    table.obsm.pop(key, None)
                for key, own in values.items():
                    table.obsm[key] = own[place]
                write_record(table, key_added, params, fingerprint=self.fingerprint)
        return target.as_given() if copy else None

    def read(
        self,
        slices: SliceTables,
        modality: Modality,
        image_key: str,
        spatial_key: str,
        *,
        layer: str | None = None,
        microns_per_unit: Any = None,
        pitch: float | None = None,
    ) -> tuple[Spots, dict[str, Matrix]]:
        """What the network reads of slides: spots, and their features by branch."""
        features: dict[str, Matrix] = {}
        if modality != "genes":
            features, _ = read_images(slices, image_key, self.image)
        spots = Spots.read(
            slices,
            self.image.sides[1],
            spatial_key,
            key=image_key if features else None,
            microns_per_unit=microns_per_unit,
            pitch=pitch,
            self_in_niche=self.options.self_in_niche,
        )
        features = {
            name: spots.standardised(values[spots.rows]) for name, values in features.items()
        }
        if modality != "image":
            features |= self.genes.read(slices, spots, layer)
        for name, values in features.items():
            if values.shape[1] != self.network.widths[name]:
                raise ValueError(
                    f"The aligner reads {self.network.widths[name]} columns of {name}, found "
                    f"{values.shape[1]}. Make them as those of the slides that were aligned."
                )
        return spots, features

    # On disk

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the aligner to a folder; a crash leaves nothing half-written.

        Parameters
        ----------
        folder
            Gets ``config.json``, ``aligner.safetensors``, history and retrieval as tables.
        overwrite
            Replace an aligner that is already there.

        Raises
        ------
        FileExistsError
            `folder` is there and `overwrite` is false, or it holds something else.
        """
        write_atomically(Path(folder), self._write, overwrite=overwrite, kind=ALIGNER)

    def _write(self, folder: Path) -> None:
        config = {
            "task": "alignment",
            "stofm_version": __version__,
            "options": asdict(self.options),
            "widths": self.network.widths,
            "image": asdict(self.image),
            "genes": {name: getattr(self.genes, name) for name in _OF_GENES},
            "params": self.params,
        }
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, file in _TABLES.items():
            getattr(self, name).to_csv(folder / file, sep="\t", index=False)
        arrays = self.reference.arrays
        if self.genes.chosen is not None:
            arrays["chosen"] = self.genes.chosen
        arrays |= {f"axes.{level}": one for level, one in (self.genes.axes or {}).items()}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in arrays.items()}
        tensors |= {f"network.{k}": v for k, v in self.network.state_dict().items()}
        write_tensors(folder / _WEIGHTS, tensors, _digested(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Aligner:
        """Read an aligner from a folder that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            `folder` is not there, or lacks a file.
        ValueError
            It holds something else, or is damaged.
        """
        where = take_back(local(folder))
        if missing := sorted(name for name in _FILES if not (where / name).is_file()):
            raise FileNotFoundError(f"{folder} is no folder of an aligner: {missing} missing.")
        if not _is_one(where):
            raise ValueError(f"{folder} holds no aligner.")
        require_beside(where / _WEIGHTS, _digested(where))
        with reading(where, "aligner of this version of stofm"):
            return cls._read(where)

    @classmethod
    def _read(cls, where: Path) -> Aligner:
        config = read_json(where / _CONFIG, "save the aligner again")
        tensors = read_tensors(where / _WEIGHTS)
        arrays = {k: v.numpy() for k, v in tensors.items() if not k.startswith("network.")}
        genes = config["genes"]
        axes = {level: arrays[f"axes.{level}"] for level in LEVELS if f"axes.{level}" in arrays}
        branch = GeneBranch(
            kind=genes["kind"],
            panel=tuple(Gene(*gene) for gene in genes["panel"]),
            chosen=arrays.get("chosen"),
            axes=axes or None,
            factors=(genes["factors"][0], genes["factors"][1]),
            reps=tuple(genes["reps"]),
            origins=tuple(genes["origins"]),
        )
        with seeded(0):
            network = AlignNetwork(config["widths"], AlignOptions(**config["options"]))
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k not in arrays}
        load_exactly(network, weights, _WEIGHTS)
        image = ImageOrigin(**config["image"])
        of_reference = {k: v for k, v in arrays.items() if k.startswith("reference.")}
        return cls(
            network=network.eval(),
            image=replace(image, sides=(image.sides[0], image.sides[1])),
            genes=branch,
            reference=Reference.of(of_reference, len(branch.panel)),
            **{name: read_table(where / file, sep="\t") for name, file in _TABLES.items()},
            params=config["params"],
        )


def _is_one(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(read_json(folder / _CONFIG, "").get("task") == "alignment")
    return False


#: What :meth:`Aligner.save` writes.
ALIGNER: Final = Kind("an aligner", _is_one, _FILES.__contains__)


def _digested(folder: Path) -> dict[str, Any]:
    """What the file of weights keeps a digest of."""
    return {name: (folder / name).read_text("utf-8") for name in sorted(_FILES - {_WEIGHTS})}
