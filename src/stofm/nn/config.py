"""What a model's numbers depend on, as frozen dataclasses that go to and from plain JSON."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from stofm import __version__
from stofm.spatial import SubSliceConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Raised when a checkpoint written by this version can't be read by an older one.
FORMAT_VERSION = 1

Activation = Literal["relu", "gelu"]


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            msg = f"{name} must be at least 1, found {getattr(config, name)}."
            raise ValueError(msg)


def _check_heads(width: int, n_heads: int, name: str) -> None:
    if width % n_heads:
        msg = f"{name} must be divisible by n_heads, found {width} and {n_heads}."
        raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class CellEncoderConfig:
    """BERT over ranked gene tokens, and the projection to the cell embedding.

    Attributes
    ----------
    n_tokens
        Rows of the token embedding: the largest token id plus one.
    d_cell
        Width of the cell embedding.
    n_layers, d_hidden, n_heads, d_inner
        Depth, width, attention heads and feed-forward width of BERT.
    max_positions
        Longest input, ``<cls>`` counted.
    activation
        Of the feed-forward part.
    dropout
        In training only.
    """

    n_tokens: int
    d_cell: int = 256
    n_layers: int = 12
    d_hidden: int = 512
    n_heads: int = 8
    d_inner: int = 1024
    max_positions: int = 2048
    activation: Activation = "relu"
    dropout: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        _check_positive(self, "n_tokens", "d_cell", "n_layers", "d_hidden", "n_heads", "d_inner")
        _check_heads(self.d_hidden, self.n_heads, "d_hidden")
        if self.max_positions < 2:
            msg = f"max_positions must leave room for <cls> and a gene, found {self.max_positions}."
            raise ValueError(msg)
        if self.activation not in get_args(Activation):
            msg = f"activation must be one of {get_args(Activation)}, found {self.activation!r}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class SE2TransformerConfig:
    """Transformer over the nodes of a sub-slice with distances as attention bias.

    Attributes
    ----------
    d_cell
        Width of the input, the cell embedding.
    n_layers, d_model, n_heads, d_inner
        Depth, width, attention heads and feed-forward width.
    n_kernels
        Gaussians of the distance encoder.
    norm_first
        Layer norm before each block in place of after it; without a norm at the end.
    pair_bias
        Distances, and logits carried from layer to layer, enter attention.
    dropout
        In training only.
    """

    d_cell: int = 256
    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 8
    d_inner: int = 256
    n_kernels: int = 128
    norm_first: bool = False
    pair_bias: bool = True
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        _check_positive(self, "d_cell", "n_layers", "d_model", "n_heads", "d_inner", "n_kernels")
        _check_heads(self.d_model, self.n_heads, "d_model")


@dataclass(frozen=True, kw_only=True)
class StofmConfig:
    """Everything that a model's embeddings depend on besides its weights and vocabulary.

    Attributes
    ----------
    name
        Name of the model, as it stands in records.
    cell_encoder, se2_transformer, subslice
        The parts.
    max_tokens
        Genes kept of a cell. ``<cls>`` is put in front afterwards and the whole is cut to
        ``cell_encoder.max_positions``.
    trained
        Whether the weights come from training. Untrained weights are announced wherever used.
    provenance
        Where the weights come from, in words: data, recipe, licence.
    stofm_version
        Version of stofm that made the checkpoint.
    """

    name: str
    cell_encoder: CellEncoderConfig
    se2_transformer: SE2TransformerConfig
    subslice: SubSliceConfig = field(default_factory=SubSliceConfig)
    max_tokens: int = 2048
    trained: bool = False
    provenance: str = ""
    stofm_version: str = __version__

    def __post_init__(self) -> None:
        """Check how the parts fit together."""
        _check_positive(self, "max_tokens")
        if self.cell_encoder.d_cell != self.se2_transformer.d_cell:
            msg = (
                f"cell_encoder.d_cell is {self.cell_encoder.d_cell} and se2_transformer.d_cell is "
                f"{self.se2_transformer.d_cell}; the cell embedding must have one width."
            )
            raise ValueError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> StofmConfig:
        """Build from what :meth:`to_dict` returned.

        Raises
        ------
        ValueError
            An entry is unknown or missing, or comes from a newer version of stofm.
        """
        entries = dict(entries)
        found = entries.pop("format_version", None)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            msg = (
                f"The config has format_version {found!r}; this stofm ({__version__}) reads up to "
                f"{FORMAT_VERSION}. It was written by stofm "
                f"{entries.get('stofm_version', '(unknown)')}: upgrade with `pip install -U stofm`."
            )
            raise ValueError(msg)
        parts = {
            "cell_encoder": CellEncoderConfig,
            "se2_transformer": SE2TransformerConfig,
            "subslice": SubSliceConfig,
        }
        for name, part in parts.items():
            if isinstance(entries.get(name), dict):
                entries[name] = _build(part, entries[name], name)
        config: StofmConfig = _build(cls, entries, "config")
        return config

    @classmethod
    def base(cls, n_tokens: int) -> StofmConfig:
        """The paper's model (SToFM, arXiv 2507.11588, table A.8), with the published code's rules.

        Parameters
        ----------
        n_tokens
            Size of the vocabulary (:attr:`stofm.GeneVocabulary.n_tokens`).
        """
        return cls(
            name="stofm-base",
            cell_encoder=CellEncoderConfig(n_tokens=n_tokens),
            se2_transformer=SE2TransformerConfig(),
            subslice=SubSliceConfig.reference(),
        )

    @classmethod
    def mini(cls, n_tokens: int) -> StofmConfig:
        """A model for a laptop's CPU.

        Parameters
        ----------
        n_tokens
            Size of the vocabulary (:attr:`stofm.GeneVocabulary.n_tokens`).
        """
        return cls(
            name="stofm-mini",
            cell_encoder=CellEncoderConfig(
                n_tokens=n_tokens,
                d_cell=128,
                n_layers=2,
                d_hidden=128,
                n_heads=4,
                d_inner=256,
                max_positions=1025,
            ),
            se2_transformer=SE2TransformerConfig(
                d_cell=128, n_layers=3, d_model=128, n_heads=4, d_inner=256, n_kernels=32
            ),
            max_tokens=1024,
        )


def _build(cls: type[Any], entries: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in entries:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            msg = f"Unknown entry {name!r} in {where}{hint} Known are {sorted(known)}."
            raise ValueError(msg)
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in entries]:
        msg = f"Missing from {where}: {missing}."
        raise ValueError(msg)
    return cls(**entries)
