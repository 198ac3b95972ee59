"""What a model's numbers depend on, as frozen dataclasses that go to and from plain JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stofm._config import build_dataclass, check_choice, require
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


def _check(config: Any, sizes: tuple[str, ...], width: str) -> None:
    """Check what both networks have: sizes, heads that share the width, and rates."""
    _check_sizes(config, *sizes)
    if getattr(config, width) % config.n_heads:
        found = f"{getattr(config, width)} and {config.n_heads}"
        raise ValueError(f"{width} must be divisible by n_heads, found {found}.")
    require(config, "must be at least 0 and below 1", lambda rate: 0 <= rate < 1, "dropout")
    require(config, "must be above 0 and below 1", lambda eps: 0 < eps < 1, "layer_norm_eps")


def _check_sizes(config: Any, *names: str, least: int = 1) -> None:
    rule = f"must be at least {least} and at most {_MOST}"
    require(config, rule, lambda size: least <= size <= _MOST, *names)


def _not_default(config: Any) -> dict[str, Any]:
    own = ((one.name, getattr(config, one.name), one.default) for one in dataclasses.fields(config))
    return {name: value for name, value, default in own if value != default}


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
    d_gene
        Width of the gene embeddings; None, the paper's setting: that of BERT. Where it differs,
        BERT reads a linear map of them, as in ALBERT (Lan et al. 2020, section 3.1), and pooled
        sums all of them: a narrow BERT is fast, and wide gene embeddings tell more genes apart.
    max_positions
        Longest input, ``<cls>`` counted.
    activation
        Of the feed-forward part.
    dropout
        In training only.
    values
        What enters beside a gene's rank: ``"none"`` is the paper's setting. ``"log"`` adds an
        embedding of log(1 + value) to each token: rank alone does not say how much of a gene there
        is.
    depth_power
        A value is count x (10,000 / total count of the cell)^`depth_power` / median of the gene. 1
        is the paper's rule. 0.5 is half-way to raw counts, so that single counts of shallow cells,
        mostly noise, don't weigh as much as hundreds in deep ones.
    pooled
        Put sums over **all** genes of a cell in front of what BERT tells: weight x embedding of
        the gene, with log(1 + value x median) as weight for the first half of the gene embeddings'
        numbers, and log(1 + value) for the second. Gene embeddings are then not trained, and
        nothing is scaled to unit length but BERT's part: a linear view of a cell's counts that no
        training can lose. Off in the paper.
    """

    n_tokens: int
    d_cell: int = 256
    n_layers: int = 12
    d_hidden: int = 512
    n_heads: int = 8
    d_inner: int = 1024
    d_gene: int | None = None
    max_positions: int = 2048
    activation: Activation = "relu"
    dropout: float = 0.02
    layer_norm_eps: float = 1e-12
    values: Values = "none"
    depth_power: float = 1.0
    pooled: bool = False

    @property
    def gene_width(self) -> int:
        """Width of the gene embeddings."""
        return self.d_hidden if self.d_gene is None else self.d_gene

    @property
    def d_learned(self) -> int:
        """Width of what BERT tells, at the end of the cell embedding."""
        return self.d_cell - self.gene_width if self.pooled else self.d_cell

    @property
    def projects_genes(self) -> bool:
        """Whether BERT reads a linear map of the gene embeddings."""
        return self.gene_width != self.d_hidden

    @property
    def reads_values(self) -> bool:
        """Whether tokens must come with their values."""
        return self.values != "none" or self.pooled

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        sizes = ("n_tokens", "d_cell", "n_layers", "d_hidden", "n_heads", "d_inner", "d_gene")
        _check(self, sizes, "d_hidden")
        _check_sizes(self, "max_positions", least=2)
        check_choice(self, "activation", Activation)
        check_choice(self, "values", Values)
        require(self, "must be from 0 to 1", lambda power: 0 <= power <= 1, "depth_power")
        width = self.gene_width
        if self.pooled and (width % 2 or self.d_learned < 1):
            raise ValueError(
                f"pooled=True needs an even d_gene below d_cell, found {width} and {self.d_cell}."
            )


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
    distance_start
        First weights of the distance encoder in a new model. ``"random"`` is the paper's setting:
        what is near must be learnt. With ``"near"`` three of four heads attend to near cells from
        the start, each with another reach; masked cells are then learnt in about half the steps.
    n_passed
        First features of a cell that its embedding passes on: as they are, and as their mean over
        the cells around it, in front of what the transformer tells. No training can lose these. 0
        in the paper.
    reach
        Deviation of the Gaussian of distance that weighs the cells around in that mean, in the
        unit of the sub-slice's distances.
    dropout
        In training only.
    feature_scale
        Cell embeddings are multiplied by this on entry. Those of unit length have entries of about
        1 / sqrt(d_cell), and the square root of d_cell gives them the size of the node types'
        embeddings beside them; those of a model that pools have it. 1 in the paper.
    """

    d_cell: int = 256
    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 8
    d_inner: int = 256
    n_kernels: int = 128
    norm_first: bool = False
    pair_bias: bool = True
    distance_start: DistanceStart = "random"
    n_passed: int = 0
    reach: float = 2.0
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    feature_scale: float = 1.0

    @property
    def d_embedding(self) -> int:
        """Width of the embedding: what is passed on, and what the transformer tells."""
        return 2 * self.n_passed + self.d_model

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        sizes = ("d_cell", "n_layers", "d_model", "n_heads", "d_inner", "n_kernels")
        _check(self, sizes, "d_model")
        check_choice(self, "distance_start", DistanceStart)
        rule = f"must be from 0 to d_cell, {self.d_cell}"
        require(self, rule, lambda n: 0 <= n <= self.d_cell, "n_passed")
        positive = "must be positive and finite"
        require(self, positive, lambda one: 0 < one < math.inf, "reach", "feature_scale")


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
        ``cell_encoder.max_positions``; a pooled sum (``cell_encoder.pooled``) takes them all.
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
        _check_sizes(self, "max_tokens")
        widths = self.cell_encoder.d_cell, self.se2_transformer.d_cell
        if widths[0] != widths[1]:
            raise ValueError(
                f"Both networks must have one d_cell, found {widths[0]} and {widths[1]}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    def rules(self) -> dict[str, Any]:
        """Return what the embeddings depend on, as far as it differs from the defaults.

        So an option that a later version adds changes no model's fingerprint while it is at its
        default.
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
            Values by name of field.
        where
            What they are called in messages, the file as a rule.

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

        It departs from the paper where that costs little and helps a small model: a fixed linear
        view of all counts in front of what a small BERT tells of ranks and values
        (:class:`CellEncoderConfig`); a quarter of that view, and its mean around the cell, in front of
        what the SE(2) Transformer tells, which has its layer norms before the blocks and attends to
        near cells from the start; sub-slices of 500 cells, with distances in spacings of cells;
        clusters on ten principal components beside place.

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
                depth_power=0.75,
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
