"""What is aligned and how, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from stofm._config import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, Checked
from stofm.train.config import OptimizerConfig

#: Which other spots of a batch a spot is told apart from.
Negatives = Literal["apart", "other_clusters", "all"]
Preset = Literal["stofm", "st-align"]
#: Names of the losses, in the order of the weights.
LOSSES: Final = ("spot", "niche", "scales")


@dataclass(frozen=True, kw_only=True)
class AlignOptions(Checked):
    """How image and expression are aligned: options of :func:`stofm.tl.align`.

    Attributes
    ----------
    d_model
        Width of each projection on the unit sphere, and of a token.
    n_tokens
        Tokens that each modality gives to the fusion.
    n_heads
        Heads of the attention that fuses them.
    d_hidden
        Hidden units of each projection.
    dropout
        Share of hidden units that training drops.
    modality_dropout
        Share of the spots, and of the niches, of which training hides the image, and the same of the
        genes, from the fusion. So it works with one of them; and it has to look at both: the patch of
        a spot is a part of its niche's, which alone would tell which niche is the spot's.
    spot, niche, scales
        Weights of the three losses: image and genes of spots, image and genes of niches, spots and
        their niches. 0 leaves one out.
    temperature
        Of the softmax over similarities; where training starts if it is learnt.
    learns_temperature
        Whether each loss learns its own.
    symmetric
        Both directions of each loss; else image to genes, and spot to niche, alone.
    negatives
        ``"apart"``: all spots of the batch whose niches do not overlap with that of the spot.
        ``"other_clusters"``: those of other clusters of the genes' features. ``"all"``.
    n_clusters
        Clusters for ``"other_clusters"``.
    self_in_niche
        Whether a spot is a member of its own niche where genes are averaged.
    n_components
        Principal components of expression that are read of spots and of niches.
    slides_per_batch
        Slides that a batch is drawn from. The stain tells slides apart, and so the batch of few
        slides teaches more.
    batch_size, epochs, max_steps, learning_rate, weight_decay
        Of AdamW, whose learning rate rises over the first steps and falls to 0 at the last: after
        all epochs, or `max_steps`.

    References
    ----------
    ST-Align: Multi-Scale Image-Gene Foundation Modeling for Spatial Transcriptomics via Spot-Niche
    Alignment (openreview.net/forum?id=EWzPy228cM), for the three losses and the fusion. Radford et
    al. 2021, Learning transferable visual models from natural language supervision (ICML), for the
    learnt temperature.
    """

    d_model: int = field(default=64, metadata=AT_LEAST_ONE)
    n_tokens: int = field(default=1, metadata=AT_LEAST_ONE)
    n_heads: int = field(default=4, metadata=AT_LEAST_ONE)
    d_hidden: int = field(default=256, metadata=AT_LEAST_ONE)
    dropout: float = field(default=0.5, metadata=BELOW_ONE)
    modality_dropout: float = field(default=0.4, metadata=BELOW_ONE)
    spot: float = field(default=1 / 3, metadata=NOT_NEGATIVE)
    niche: float = field(default=1 / 3, metadata=NOT_NEGATIVE)
    scales: float = field(default=1 / 3, metadata=NOT_NEGATIVE)
    temperature: float = field(default=0.1, metadata=POSITIVE)
    learns_temperature: bool = True
    symmetric: bool = True
    negatives: Negatives = "apart"
    n_clusters: int = field(default=10, metadata=AT_LEAST_ONE)
    self_in_niche: bool = True
    n_components: int = field(default=50, metadata=AT_LEAST_ONE)
    slides_per_batch: int = field(default=1, metadata=AT_LEAST_ONE)
    batch_size: int = field(default=256, metadata=AT_LEAST_ONE)
    epochs: int = field(default=40, metadata=AT_LEAST_ONE)
    max_steps: int | None = field(default=200, metadata=AT_LEAST_ONE)
    learning_rate: float = field(default=1e-3, metadata=POSITIVE)
    weight_decay: float = field(default=0.5, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        """Check each value, and what they are together."""
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads, found {self.d_model} and {self.n_heads}."
            )
        if not sum(self.weights.values()):
            raise ValueError("spot, niche and scales are all 0: nothing would be aligned.")
        if self.modality_dropout > 0.5:
            raise ValueError(
                f"modality_dropout must be at most 0.5, found {self.modality_dropout}: a spot keeps "
                "one of the two."
            )

    @classmethod
    def of(cls, options: AlignOptions | str) -> AlignOptions:
        """Options, or those of a preset by its name."""
        if isinstance(options, cls):
            return options
        if options not in get_args(Preset):
            raise ValueError(
                f"options must be one of {list(get_args(Preset))} or st.tl.AlignOptions(...), found "
                f"{options!r}."
            )
        return cls.st_align() if options == "st-align" else cls()

    @classmethod
    def st_align(cls) -> AlignOptions:
        """Sizes, weights and losses of ST-Align, as its description has them."""
        return cls(
            d_model=512,
            n_tokens=8,
            n_heads=8,
            d_hidden=512,
            dropout=0.1,
            weight_decay=0.01,
            modality_dropout=0.0,
            spot=0.3,
            niche=0.3,
            scales=0.4,
            learns_temperature=False,
            symmetric=False,
            negatives="other_clusters",
        )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss."""
        return {name: getattr(self, name) for name in LOSSES}

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimiser and schedule, as the training loop takes them."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=20,
            batch_size=self.batch_size,
            accumulation=1,
        )
