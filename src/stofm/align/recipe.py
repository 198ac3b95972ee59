"""Recipes of alignments: which slides, and how, written in TOML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stofm._config import SEED, Checked, build_dataclass
from stofm._files import local
from stofm._keys import Obsm
from stofm.align.config import AlignOptions
from stofm.train.recipe import read_toml

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AlignRecipe(Checked):
    """What ``stofm align`` does.

    Attributes
    ----------
    files
        Pattern of the slides' files in the data folder; each is a slide or several.
    genes, image_key, donor_key, library_key, layer, seed
        As in :func:`stofm.tl.align`.
    options
        Table of :class:`stofm.tl.AlignOptions`.
    """

    files: str = "*.h5ad"
    genes: str = "pca"
    image_key: str = Obsm.X_IMAGE
    donor_key: str | None = None
    library_key: str | None = None
    layer: str | None = None
    seed: int = field(default=0, metadata=SEED)
    options: AlignOptions = field(default_factory=AlignOptions)

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> AlignRecipe:
        """Read a recipe.

        Raises
        ------
        ValueError
            The file is not valid TOML, or an entry is unknown or invalid.
        """
        file = local(path)
        return build_dataclass(cls, read_toml(file), file.name)

    def find(self, folder: Path) -> list[Path]:
        """Files of the slides, in alphabetical order."""
        if not (found := sorted(folder.glob(self.files))):
            raise FileNotFoundError(f"files = {self.files!r} names no file in {folder}.")
        return found
