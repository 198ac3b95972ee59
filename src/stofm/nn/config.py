"""What a model's numbers depend on, as frozen dataclasses that go to and from plain JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stofm._config import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, Checked, build_dataclass, must
from stofm._version import __version__
from stofm.spatial import SubSliceConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Raised when a checkpoint written by this version can't be read by an older one.
FORMAT_VERSION = 1

Activation = Literal["relu", "gelu"]
Values = Literal["none", "log"]
DistanceStart = Literal["random", "near"]


#: More is damage: no array can be so wide.
_MOST = 2**31 - 1
_SIZE = must(f"be at least 1 and at most {_MOST}", lambda size: 1 <= size <= _MOST)
_LENGTH = must(f"be at least 2 and at most {_MOST}", lambda size: 2 <= size <= _MOST)
_EPSILON = must("be above 0 and below 1", lambda value: 0 < value < 1)


def _require_divisible(name: str, width: int, n_heads: int) -> None:
    if width % n_heads:
        raise ValueError(f"{name} must be divisible by n_heads, found {width} and {n_heads}.")


def _not_default(config: Any) -> dict[str, Any]:
    own = ((one.name, getattr(config, one.name), one.default) for one in dataclasses.fields(config))
    return {name: value for name, value, default in own if value != default}


@dataclass(frozen=True, kw_only=True)
class CellEncoderConfig(Checked):
    """BERT over ranked gene tokens, and the projection to the cell embedding.

    Attributes
    ----------
    n_tokens
        Rows of the token embedding: the largest token id plus one.
    d_cell
        Width of the cell embedding.
    n_layers, d_hidden, n_heads, d_inner
        Depth, width, attention heads and feed-forward width of BERT.
    d_gene
        Width of the gene embeddings; None, as in the paper: that of BERT. If it differs, BERT gets
        a linear map of them, as in ALBERT (Lan et al. 2020, section 3.1). A narrow BERT is fast,
        and wide gene embeddings distinguish more genes.
    max_positions
        Longest input, including ``<cls>``.
    activation
        Activation of the feed-forward part.
    dropout
        Dropout rate in training.
    values
        What is used beside a gene's rank: ``"none"``, as in the paper, or ``"log"``, which adds an
        embedding of log(1 + value) to each token. The rank alone does not say how much of a gene
        there is.
    depth_power
        A value is count x (10,000 / total count of the cell)^`depth_power` / median of the gene.
        1 is the paper's rule. Lower powers give single counts of shallow cells, mostly noise, less
        weight.
    pooled
        Put sums over **all** genes of a cell in front of BERT's output: gene embeddings weighted by
        log(1 + value x median) in their first half and by log(1 + value) in the second, made
        orthonormal on the genes that occur. Gene embeddings are then not trained. This keeps a
        linear view of the counts, however the model is trained. Off in the paper.
    """

    n_tokens: int = field(metadata=_SIZE)
    d_cell: int = field(default=256, metadata=_SIZE)
    n_layers: int = field(default=12, metadata=_SIZE)
    d_hidden: int = field(default=512, metadata=_SIZE)
    n_heads: int = field(default=8, metadata=_SIZE)
    d_inner: int = field(default=1024, metadata=_SIZE)
    d_gene: int | None = field(default=None, metadata=_SIZE)
    max_positions: int = field(default=2048, metadata=_LENGTH)
    activation: Activation = "relu"
    dropout: float = field(default=0.02, metadata=BELOW_ONE)
    layer_norm_eps: float = field(default=1e-12, metadata=_EPSILON)
    values: Values = "none"
    depth_power: float = field(default=1.0, metadata=SHARE)
    pooled: bool = False

    @property
    def gene_width(self) -> int:
        """Width of the gene embeddings."""
        return self.d_hidden if self.d_gene is None else self.d_gene

    @property
    def d_learned(self) -> int:
        """Width of BERT's part, at the end of the cell embedding."""
        return self.d_cell - self.gene_width if self.pooled else self.d_cell

    @property
    def projects_genes(self) -> bool:
        """Whether BERT gets a linear map of the gene embeddings."""
        return self.gene_width != self.d_hidden

    @property
    def reads_values(self) -> bool:
        """Whether tokens need values."""
        return self.values != "none" or self.pooled

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        super().__post_init__()
        _require_divisible("d_hidden", self.d_hidden, self.n_heads)
        width = self.gene_width
        if self.pooled and (width % 2 or self.d_learned < 1):
            raise ValueError(
                f"pooled=True needs an even d_gene below d_cell, found {width} and {self.d_cell}."
            )


@dataclass(frozen=True, kw_only=True)
class SE2TransformerConfig(Checked):
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
        Put the layer norm before each block instead of after it; there is then none at the end.
    pair_bias
        Add distances, and the logits of earlier layers, to the attention logits.
    distance_start
        Initial weights of the distance encoder. ``"random"``, as in the paper: the model must learn
        which cells are near. ``"near"``: three of four heads attend to near cells from the start,
        each with its own reach; masked cells are then recovered after about half the steps.
    n_passed
        Number of leading cell features that are copied into the embedding, as they are and averaged
        over the cells around, in front of the transformer's output. 0 in the paper.
    reach
        Standard deviation of the Gaussian weights of that average, in the unit of the sub-slice's
        distances.
    dropout
        Dropout rate in training.
    feature_scale
        Factor of the cell embeddings on entry. Entries of unit-length embeddings are about
        1 / sqrt(d_cell); a factor of sqrt(d_cell) makes them as large as the node type embeddings.
        Models that pool need none. 1 in the paper.
    """

    d_cell: int = field(default=256, metadata=_SIZE)
    n_layers: int = field(default=4, metadata=_SIZE)
    d_model: int = field(default=256, metadata=_SIZE)
    n_heads: int = field(default=8, metadata=_SIZE)
    d_inner: int = field(default=256, metadata=_SIZE)
    n_kernels: int = field(default=128, metadata=_SIZE)
    norm_first: bool = False
    pair_bias: bool = True
    distance_start: DistanceStart = "random"
    n_passed: int = field(default=0, metadata=NOT_NEGATIVE)
    reach: float = field(default=2.0, metadata=POSITIVE)
    dropout: float = field(default=0.1, metadata=BELOW_ONE)
    layer_norm_eps: float = field(default=1e-5, metadata=_EPSILON)
    feature_scale: float = field(default=1.0, metadata=POSITIVE)

    @property
    def d_embedding(self) -> int:
        """Width of the embedding: features passed on, and the transformer's output."""
        return 2 * self.n_passed + self.d_model

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        super().__post_init__()
        _require_divisible("d_model", self.d_model, self.n_heads)
        if self.n_passed > self.d_cell:
            raise ValueError(
                f"n_passed must be from 0 to d_cell, {self.d_cell}, found {self.n_passed}."
            )


@dataclass(frozen=True, kw_only=True)
class StofmConfig(Checked):
    """Everything besides weights and vocabulary that a model's embeddings depend on.

    Attributes
    ----------
    name
        Name of the model in records.
    cell_encoder, se2_transformer, subslice
        Configs of its parts.
    max_tokens
        Genes kept per cell. BERT reads the first ``cell_encoder.max_positions``, including
        ``<cls>``; pooled sums (``cell_encoder.pooled``) use all of them.
    trained
        Whether the weights come from training. Using untrained weights gives a warning.
    provenance
        Where the weights come from: data, recipe, licence.
    stofm_version
        Version of stofm that wrote the checkpoint.
    """

    name: str
    cell_encoder: CellEncoderConfig
    se2_transformer: SE2TransformerConfig
    subslice: SubSliceConfig = field(default_factory=SubSliceConfig)
    max_tokens: int = field(default=2048, metadata=_SIZE)
    trained: bool = False
    provenance: str = ""
    stofm_version: str = __version__

    def __post_init__(self) -> None:
        """Check how the parts fit together."""
        super().__post_init__()
        widths = self.cell_encoder.d_cell, self.se2_transformer.d_cell
        if widths[0] != widths[1]:
            raise ValueError(
                f"Both networks must have one d_cell, found {widths[0]} and {widths[1]}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    def rules(self) -> dict[str, Any]:
        """Return the entries that the embeddings depend on and that differ from the defaults.

        An option added by a later version then changes no model's fingerprint by its default.
        """
        transformer = _not_default(self.se2_transformer)
        transformer.pop("distance_start", None)  # decides first weights only
        return {
            "cell_encoder": _not_default(self.cell_encoder),
            "se2_transformer": transformer,
            "subslice": _not_default(self.subslice),
            "max_tokens": self.max_tokens,
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str = "config") -> StofmConfig:
        """Build from what :meth:`to_dict` returned.

        Parameters
        ----------
        entries
            Values by field name.
        where
            Their name in messages, usually the file.

        Raises
        ------
        ValueError
            An entry is unknown, missing or of another type, or comes from a newer version of stofm.
        """
        entries = dict(entries)
        found = entries.pop("format_version", None)
        if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
            raise ValueError(
                f"{where} has format_version {found!r}; this stofm ({__version__}) reads up to "
                f"{FORMAT_VERSION}. It was written by stofm "
                f"{entries.get('stofm_version', '(unknown)')}: upgrade with `pip install -U stofm`."
            )
        config: StofmConfig = build_dataclass(cls, entries, where)
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

        It departs from the paper where that helps a small model: a fixed linear view of all counts
        stands in front of a small BERT's output (:class:`CellEncoderConfig`); part of that view,
        and its mean around the cell, stands in front of the SE(2) Transformer's output; the
        transformer has its layer norms before the blocks and attends to near cells from the start;
        sub-slices have 500 cells and distances in cell spacings; virtual cells are clusters of
        position and ten principal components.

        Parameters
        ----------
        n_tokens
            Size of the vocabulary (:attr:`stofm.GeneVocabulary.n_tokens`).
        """
        return cls(
            name="stofm-mini",
            cell_encoder=CellEncoderConfig(
                n_tokens=n_tokens,
                d_cell=576,
                n_layers=2,
                d_hidden=128,
                n_heads=4,
                d_inner=256,
                d_gene=512,
                max_positions=129,
                values="log",
                depth_power=0.25,
                pooled=True,
            ),
            se2_transformer=SE2TransformerConfig(
                d_cell=576,
                n_layers=3,
                d_model=192,
                n_heads=6,
                d_inner=384,
                n_kernels=32,
                norm_first=True,
                distance_start="near",
                n_passed=192,
                reach=1.5,
            ),
            subslice=SubSliceConfig(n_cells=500, n_components=10, unit="spacing"),
            max_tokens=8192,
        )
