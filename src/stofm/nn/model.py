"""Stofm: cell encoder, SE(2) Transformer, vocabulary and rules as one model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stofm._messages import warn
from stofm._version import __version__
from stofm.genes import GeneVocabulary
from stofm.nn import checkpoint
from stofm.nn.cell_encoder import CellEncoder
from stofm.nn.config import StofmConfig
from stofm.nn.device import seeded
from stofm.nn.reference import read_reference
from stofm.nn.se2_transformer import SE2Transformer
from stofm.spatial import SubSliceConfig


class UntrainedModelWarning(UserWarning):
    """A model's weights are random: its embeddings carry no learned biology."""


class Stofm(nn.Module):
    """A foundation model of tissue slices: cell encoder, SE(2) Transformer, vocabulary and rules.

    Parameters
    ----------
    config
        Architecture and rules.
    vocabulary
        Genes that the cell encoder knows.
    seed
        Seed of the initial weights.

    Raises
    ------
    ValueError
        The vocabulary has more tokens than the cell encoder.

    References
    ----------
    SToFM (arXiv 2507.11588).
    """

    def __init__(self, config: StofmConfig, vocabulary: GeneVocabulary, *, seed: int = 0) -> None:
        super().__init__()
        if vocabulary.n_tokens > (n_tokens := config.cell_encoder.n_tokens):
            raise ValueError(
                f"The vocabulary has {vocabulary.n_tokens} tokens, the cell encoder {n_tokens}."
            )
        self.config = config
        self.vocabulary = vocabulary
        with seeded(seed):
            self.cell_encoder = CellEncoder(config.cell_encoder)
            self.se2_transformer = SE2Transformer(config.se2_transformer)
        if config.cell_encoder.pooled:
            tokens = torch.from_numpy(vocabulary.tokens.astype(np.int64))
            medians = torch.from_numpy(vocabulary.medians.astype(np.float32))
            self.cell_encoder.medians[tokens] = medians

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.config.name

    @property
    def cell_encoder_fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight of the cell encoder."""
        return _hash(self.cell_encoder.state_dict())

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight, token or rule of the model."""
        described = json.dumps(self.config.rules(), sort_keys=True) + self.vocabulary.fingerprint
        weights = _hash(self.state_dict())
        return hashlib.sha256((described + weights).encode()).hexdigest()[:16]

    def warn_if_untrained(self) -> None:
        """Warn if the weights are random."""
        if not self.config.trained:
            text = (
                f"The weights of {self.name!r} are random, not trained: its embeddings are a random "
                "projection of the input and carry no learned biology. Use them to try the software "
                "only."
            )
            warn(text, UntrainedModelWarning)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "stofm-mini",
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Stofm:
        """Load a checkpoint: a local folder, the built-in model, or one on the hub.

        Parameters
        ----------
        name
            Path of a folder, ``"stofm-mini"`` (embedded in the package), or a hub id
            (``owner/name``).
        revision
            Branch, tag or commit on the hub.
        cache_dir
            Folder for downloaded files; the hub's own cache by default.
        local_files_only
            Use cached files only.
        token
            Access token for private repositories.

        Raises
        ------
        FileNotFoundError
            The checkpoint or one of its files is missing.
        ValueError
            The checkpoint is damaged, comes from a newer version of stofm, or mixes parts of
            different models.
        """
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        folder = checkpoint.find_checkpoint(name, revision=revision, **hub)
        config, made_with = checkpoint.read_config(folder)
        vocabulary = GeneVocabulary.from_tsv(folder / checkpoint.VOCABULARY)
        if vocabulary.fingerprint != made_with:
            raise ValueError(
                f"{folder / checkpoint.VOCABULARY} has the fingerprint {vocabulary.fingerprint}, "
                f"and the checkpoint was made with {made_with or '(none recorded)'}: it belongs to "
                "another model. Get the checkpoint again."
            )
        path = folder / checkpoint.WEIGHTS
        checkpoint.require_beside(path, _beside(config, folder))
        model = cls(config, vocabulary)
        checkpoint.load_exactly(model, checkpoint.read_tensors(path), str(path))
        return model.eval()

    @classmethod
    def from_reference(
        cls,
        folder: str | Path,
        vocabulary: GeneVocabulary | None = None,
        *,
        subslice: SubSliceConfig | None = None,
        name: str = "stofm-reference",
    ) -> Stofm:
        """Load weights in the layout in which SToFM's authors publish them.

        Parameters
        ----------
        folder
            Holds ``cell_encoder/cell_bert/``, ``cell_encoder/cell_proj.bin``, ``config.json``
            and ``se2transformer.pth`` (or ``.safetensors`` of the same names). Pickle-based
            files are read with ``weights_only=True``.
        vocabulary
            Genes of the cell encoder; by default ``GeneVocabulary.geneformer("30m")``, with which the
            published weights were trained.
        subslice
            Sub-slice rules; those of the published code by default.
        name
            Name of the model in records.

        Raises
        ------
        FileNotFoundError
            A file is missing.
        ValueError
            A file is damaged or does not fit.
        """
        cell_encoder, transformer = read_reference(folder)
        model = cls(
            StofmConfig(
                name=name,
                cell_encoder=cell_encoder.config,
                se2_transformer=transformer.config,
                subslice=subslice or SubSliceConfig.reference(),
                trained=True,
                provenance="Converted from weights in the layout of SToFM's release (arXiv 2507.11588).",
            ),
            GeneVocabulary.geneformer("30m") if vocabulary is None else vocabulary,
        )
        model.cell_encoder = cell_encoder
        model.se2_transformer = transformer
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a checkpoint folder; a crash leaves nothing half-written.

        To share it on the hub, call ``huggingface_hub.create_repo(repo_id)`` and
        ``huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder)``.

        Parameters
        ----------
        folder
            Gets ``config.json``, ``model.safetensors``, ``vocabulary.tsv`` and ``README.md``.
        dtype
            Precision of the stored weights, such as ``torch.float16``; unchanged by default.
        overwrite
            Replace an existing checkpoint.

        Raises
        ------
        FileExistsError
            `folder` exists and `overwrite` is False, or it holds anything but a checkpoint.
        OSError
            The disk is full or can't be written to.
        """
        checkpoint.write_atomically(
            Path(folder), lambda where: self._write(where, dtype), overwrite=overwrite
        )

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        config = replace(self.config, stofm_version=__version__)
        entries = config.to_dict() | {"vocabulary": self.vocabulary.fingerprint}
        text = json.dumps(entries, indent=2) + "\n"
        (folder / checkpoint.CONFIG).write_text(text, encoding="utf-8")
        state = self.state_dict()
        weights = {name: value.to("cpu", dtype or value.dtype) for name, value in state.items()}
        self.vocabulary.save(folder / checkpoint.VOCABULARY)
        checkpoint.write_tensors(folder / checkpoint.WEIGHTS, weights, _beside(config, folder))
        (folder / checkpoint.CARD).write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        cells, spatial = self.config.cell_encoder, self.config.se2_transformer
        n_weights = sum(p.numel() for p in self.parameters())
        state = "trained" if self.config.trained else "**NOT TRAINED: random weights**"
        return (
            f"---\nlibrary_name: stofm\ntags: [spatial-transcriptomics]\n---\n# {self.name}\n\n"
            f"A [stofm](https://pypi.org/project/stofm) checkpoint ({state}).\n\n"
            f"- {n_weights / 1e6:.1f} million weights; {self.vocabulary.n_genes} genes\n"
            f"- cell encoder: {cells.n_layers} layers, {cells.d_hidden} wide\n"
            f"- SE(2) Transformer: {spatial.n_layers} layers, {spatial.d_model} wide\n\n"
            f"{self.config.provenance}\n\n"
            f"```python\nimport stofm as st\n\n"
            f'model = st.Stofm.from_pretrained("path/to/this/folder")\n'
            f"st.tl.embed(adata, model)\n```\n"
        )


def _beside(config: StofmConfig, folder: Path) -> dict[str, Any]:
    """What embeddings depend on besides weights: rules and genes."""
    lines = (folder / checkpoint.VOCABULARY).read_text(encoding="utf-8").splitlines()
    return {checkpoint.CONFIG: config.rules(), checkpoint.VOCABULARY: lines}


def _hash(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_model(model: Any) -> Stofm:
    """Return a model as it is, or load it by name."""
    if model is None or isinstance(model, str | Path):
        return Stofm.from_pretrained("stofm-mini" if model is None else model)
    if not isinstance(model, Stofm):
        raise TypeError(
            f"model must be a Stofm, a folder or a hub id, found {type(model).__name__}."
        )
    return model
